"""Published sets of other authors: file formats, conventions, and malicious files."""

import collections
import pathlib
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from helpers import SHARED_DATA, assert_close, needs

import kipcore
from kipcore import PublishedError, load_published, read_torch_file

DATA = pathlib.Path(__file__).parent / "data"  # written by make_torch_files.py there
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 4, 4, 3)).astype(np.float32)
HOT = np.eye(4, dtype=np.float32)[[0, 1, 2, 3]]
LEARNED = RNG.normal(size=(4, 4)).astype(np.float32)


def write(path, form, content):
  if form == ".npz":
    np.savez(path, **content)
  else:
    path.write_bytes(serialization.msgpack_serialize(content))
  return path


def fault(pattern, path, *args, read=load_published, error=PublishedError):
  """Checks that the error has this message, names the file, and is one line."""
  with pytest.raises(error, match=pattern) as caught:
    read(path, *args)
  assert (
    "\n" not in str(caught.value)
    and str(caught.value).startswith(str(path))
    and "expected" in str(caught.value)
  )


# --- torch.save files ---


def test_files_written_by_torch_are_read():
  got = read_torch_file(DATA / "torch_layouts.pt")
  whole = np.arange(24.0).reshape(4, 6)
  expected = {
    "transposed": whole.T,
    "strided": whole[1::2, ::3],
    "whole": whole,
    "bfloat16": np.array([1.5, -2, 3e38], ml_dtypes.bfloat16),
    "half": np.array([0.5], np.float16),
    "bool": np.array([True, False]),
    "empty": np.empty((0, 3), np.float32),
    "scalar": np.array(7, np.int32),
    "parameter": np.ones((2, 2), np.float32),
    "array": np.arange(6, dtype=np.int16).reshape(2, 3),
  }
  for name, value in expected.items():
    assert (
      got[name].dtype == value.dtype
      and got[name].shape == value.shape
      and np.array_equal(got[name], value)
    ), name
  assert np.shares_memory(got["transposed"], got["whole"]) and np.shares_memory(
    got["strided"], got["whole"]
  )
  assert not got["whole"].flags.writeable
  assert got["nested"] == (1, [2.5, "three", None]) and got["size"] == (4, 6)
  assert type(got["state"]) is collections.OrderedDict and np.array_equal(
    got["state"]["w"], np.zeros(1)
  )
  assert set(got) == {*expected, "nested", "size", "state"}


def name_of(module, name):
  return f"c{module}\n{name}\n".encode()


def const(value):
  return pickle.dumps(value, 2)[2:-1]


def several(*items):
  return b"(" + b"".join(items) + b"t"


def tensor(size, stride, offset=0, count=6, kind="FloatStorage", key="0"):
  """The pickle of a tensor in a storage of `count` numbers."""
  storage = (
    several(const("storage"), name_of("torch", kind), const(key), const("cpu"), const(count)) + b"Q"
  )
  hooks = name_of("collections", "OrderedDict") + b")R"
  args = several(storage, const(offset), const(size), const(stride), const(False), hooks)
  return name_of("torch._utils", "_rebuild_tensor_v2") + args + b"R"


def torch_file(
  path,
  layout,
  storage=np.arange(6, dtype="<f4").tobytes(),
  compression=zipfile.ZIP_STORED,
  **members,
):
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, content in {
      "data.pkl": b"\x80\x02" + layout + b".",
      "data/0": storage,
      **members,
    }.items():
      archive.writestr(f"archive/{name}", content)
  return path


def test_handwritten_tensors_are_read(tmp_path):
  path = torch_file(tmp_path / "a.pt", tensor((2, 2), (1, 3), 1))
  assert np.array_equal(read_torch_file(path), [[1, 4], [2, 5]])
  path = torch_file(path, tensor((6,), (1,)), np.arange(6, dtype=">f4").tobytes(), byteorder=b"big")
  assert (
    np.array_equal(read_torch_file(path), np.arange(6))
    and read_torch_file(path).dtype == np.float32
  )
  # Shared parts are read once: this would be 2^60 lists.
  doubled = b"]q\x00" + b"".join(
    bytes([0x5D, 0x71, i, 0x28, 0x68, i - 1, 0x68, i - 1, 0x65]) for i in range(1, 60)
  )
  assert len(read_torch_file(torch_file(path, doubled))) == 2


CALLS = {
  "os.system": name_of("os", "system") + several(const("touch harmed")) + b"R",
  "builtins.eval": name_of("builtins", "eval") + several(const("open('harmed', 'w')")) + b"R",
  "posix.system": const("posix")
  + const("system")
  + b"\x93"
  + several(const("touch harmed"))
  + b"R",
  "subprocess.Popen": b"(isubprocess\nPopen\n",
  "torch._utils._rebuild_xla_tensor": name_of("torch._utils", "_rebuild_xla_tensor") + b")R",
  "collections.OrderedDict.__class__": name_of("collections", "OrderedDict.__class__"),
}


@pytest.mark.parametrize("name", CALLS)
def test_pickles_execute_no_code(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for layout in (CALLS[name], b"](" + tensor((6,), (1,)) + CALLS[name] + b"e"):
    path = torch_file(tmp_path / "a.pt", layout)
    fault(f"asks for {name}, which is not run", path, read=read_torch_file, error=ValueError)
    fault("not run", path, "dc")
    assert not (tmp_path / "harmed").exists()


BAD_LAYOUTS = {
  "past the end": (tensor((2, 3), (3, 2), 2), {}, "within their storage"),
  "a negative stride": (tensor((6,), (-1,), 5), {}, "storage, offset, size and stride"),
  "a repeated number": (tensor((2**40,), (0,)), {}, "within their storage"),
  "a storage that claims more": (tensor((6,), (1,), count=2**40), {}, "numbers in storage"),
  "no such storage": (tensor((6,), (1,), key="../data.pkl"), {}, "no such member"),
  "half a number": (tensor((6,), (1,)), {"storage": bytes(23)}, "whole numbers of 4 bytes"),
  "another byte order": (tensor((6,), (1,)), {"byteorder": b"middle"}, "byte order"),
  "a large index": (b"]r\xff\xff\xff\x7f", {}, "memo indices"),
  "a list in itself": (b"]q\x00h\x00a", {}, "recursive container"),
  "a name, not a value": (name_of("torch", "FloatStorage"), {}, "tensors, numbers and containers"),
  "a change to a stand-in": (
    name_of("collections", "OrderedDict") + b"}" + const("build") + const(1) + b"sb",
    {},
    "complete torch.save file",
  ),
  "Python objects in an array": (
    name_of("numpy.core.multiarray", "scalar")
    + several(name_of("numpy", "dtype") + several(const("O8")) + b"R", const(b"12345678"))
    + b"R",
    {},
    "are numbers|complete torch.save file",
  ),
  "an end in the middle": (b"(", {}, "complete torch.save file"),
  "compressed members": (
    tensor((6,), (1,)),
    {"compression": zipfile.ZIP_DEFLATED},
    "not compressed",
  ),
}


@pytest.mark.parametrize("what", BAD_LAYOUTS)
def test_inconsistent_metadata_is_rejected(what, tmp_path):
  layout, options, pattern = BAD_LAYOUTS[what]
  fault(
    pattern,
    torch_file(tmp_path / "a.pt", layout, **options),
    read=read_torch_file,
    error=ValueError,
  )


def test_non_torch_files_are_rejected(tmp_path):
  path = tmp_path / "a.pt"
  fault("no such file", path, read=read_torch_file, error=ValueError)
  path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
  fault("before torch 1.6", path, read=read_torch_file, error=ValueError)
  write(tmp_path / "a.npz", ".npz", {"x": HOT})
  fault("one data.pkl", tmp_path / "a.npz", read=read_torch_file, error=ValueError)


# --- the sets ---

PARAMS = {"x_proto": IMAGES, "y_proto": LEARNED, "log_temp": np.float32(0.5)}
RCIG = {"step": 15000, "params": {**PARAMS, "x_proto": 0 * IMAGES}, "ema_average": PARAMS}
FREPO = {"step": 7, "params": {"x_proto": IMAGES, "y_proto": LEARNED}}
NCHW = IMAGES.transpose(0, 3, 1, 2)
RFAD = {
  "images": NCHW,
  "labels": HOT - 0.25,
  "k": np.float64(2.0),
  "jit": np.float64(5e-3),
  "valid_loss": np.float64(1.5),
}
# name of the file -> (form, content, kind, labels, recipe, mirrored)
SETS = {
  "kip.npz": (
    ".npz",
    {"images": IMAGES.astype(np.float64), "labels": LEARNED},
    "kip",
    LEARNED,
    None,
    False,
  ),
  "cifar10_zca_10.npz": (
    ".npz",
    {"images": IMAGES, "labels": HOT},
    "kip",
    HOT - 0.25,
    "zca_kip",
    False,
  ),
  "cifar10_nozca_10.npz": (
    ".npz",
    {"images": IMAGES, "labels": HOT - 0.25},
    "kip",
    HOT - 0.25,
    "standardize",
    False,
  ),
  "best.npz": (".npz", RFAD, "rfad", HOT - 0.25, "zca_rfad", False),
  "frepo.npz": (
    ".npz",
    {"image": IMAGES, "label": (HOT - 0.25) / np.sqrt(np.float32(0.4))},
    "frepo",
    HOT - 0.25,
    "zca",
    True,
  ),
  "checkpoint_7": ("Flax", FREPO, "frepo", LEARNED, "zca", True),
  "checkpoint_15000": ("Flax", RCIG, "rcig", LEARNED, "zca", True),
}


@pytest.mark.parametrize("name", SETS)
def test_published_sets_are_read_in_each_format(name, tmp_path):
  form, content, kind, labels, recipe, mirrored = SETS[name]
  path = write(tmp_path / name, form, content)
  got = load_published(path)
  assert (got.kind, got.preprocess, got.mirrored, got.source["file"]) == (
    kind,
    recipe,
    mirrored,
    name,
  )
  assert np.array_equal(got.images, IMAGES) and got.images.dtype == got.labels.dtype == np.float32
  assert_close(got.labels, labels, 1e-6)
  assert np.array_equal(got.classes, np.argmax(labels, axis=1))
  assert (got.relative_ridge, got.source.get("valid_loss")) == (
    (5e-3, 1.5) if kind == "rfad" else (None, None)
  )
  np.testing.assert_allclose(
    got.temperature or 0, {"rfad": np.exp(2.0), "rcig": np.exp(0.5)}.get(kind, 0), rtol=1e-7
  )
  assert np.array_equal(load_published(path, kind).images, got.images)
  support, twice = got.support(), got.support(mirrored=True)
  assert len(support.x) == len(support.y) == (8 if mirrored else 4)
  assert np.array_equal(twice.x[4:, :, 0], IMAGES[:, :, 3]) and np.array_equal(
    twice.y[4:], got.labels
  )


def test_gray_and_large_sets_have_no_mirror_images(tmp_path):
  gray = {**FREPO, "params": {"x_proto": IMAGES[..., :1], "y_proto": LEARNED}}
  got = load_published(write(tmp_path / "a", "Flax", gray))
  assert (got.mirrored, got.preprocess) == (False, "standardize")
  large = {**PARAMS, "x_proto": np.zeros((4, 1024, 1024, 3), np.float16)}
  got = load_published(write(tmp_path / "a", "Flax", {"params": large, "ema_average": large}))
  assert (got.mirrored, got.preprocess) == (False, None)


def test_torch_sets(tmp_path):
  images = np.arange(192, dtype=np.float32).reshape(4, 3, 4, 4).transpose(0, 2, 3, 1) / 8
  labels = np.eye(2)[[0, 0, 1, 1]] - 0.5
  for experiment, sign in enumerate((1, -1)):
    got = load_published(DATA / "torch_dc.pt", experiment=experiment)
    assert (
      np.array_equal(got.images, sign * images)
      and np.array_equal(got.labels, labels)
      and not got.mirrored
    )
    assert (got.kind, got.preprocess, got.source["experiments"]) == ("dc", "standardize", 2)
    assert got.source["accuracies_of_all_experiments"] == {"ConvNet": [0.25, 0.5]}
  fault(r"experiment: expected an integer in 0\.\.1, got 2", DATA / "torch_dc.pt", "dc", 2)
  got = load_published(DATA / "images_best.pt")
  assert (
    got.kind == "mtt"
    and got.preprocess is None
    and np.array_equal(got.images, images - 20)
    and np.array_equal(got.labels, labels)
  )
  path = shutil.copy(DATA / "images_best.pt", tmp_path / "images_1.pt")
  fault("labels_1.pt in the same folder", path)
  shutil.copy(DATA / "labels_best.pt", tmp_path / "labels_1.pt")
  shutil.copy(DATA / "images_best.pt", tmp_path / "images_zca_1.pt")
  assert load_published(path).preprocess == "zca_absolute"
  fault("images_zca_NAME.pt contains pixels", tmp_path / "images_zca_1.pt")


def test_pixels_are_preprocessed_as_by_the_publisher(tmp_path):
  x = RNG.integers(0, 256, (60, 4, 4, 3)).astype(np.uint8)
  rfad = load_published(write(tmp_path / "best.npz", ".npz", RFAD))
  assert np.array_equal(
    rfad.fit_preprocess(x).apply(x), kipcore.fit_preprocess(x, "zca_rfad").apply(x)
  )
  dc = load_published(DATA / "torch_dc.pt")
  assert np.array_equal(
    dc.fit_preprocess(x).apply(x), kipcore.fit_preprocess(x, "standardize").apply(x)
  )
  # With the mean of CIFAR-10, the fixed constants of DC are used.
  mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
  near = (255 * mean + RNG.choice([-60.0, 60.0], (4000, 4, 4, 3))).astype(np.float32)
  fitted = dc.fit_preprocess(near, pixel_max=255.0)
  assert_close(fitted.apply(near), (near / 255 - mean) / deviation, 1e-6)
  assert_close(fitted.invert(fitted.apply(near)), near, 1e-6)
  mtt = load_published(DATA / "images_best.pt")
  with pytest.raises(
    ValueError, match="kind: expected one of .*, got None; MTT's files do not record it"
  ):
    mtt.fit_preprocess(x)
  assert mtt.fit_preprocess(x, "zca_absolute").kind == "zca_absolute"
  with pytest.raises(ValueError, match="x_train: expected shape"):
    mtt.fit_preprocess(np.zeros((5, 8, 8, 3)), "standardize")


def changed(content, **new):
  return {**content, **new}


NAN = np.where(np.arange(4 * 48).reshape(IMAGES.shape) == 50, np.nan, IMAGES)
BAD_SETS = {
  "NaN": (".npz", changed(RFAD, images=NAN.transpose(0, 3, 1, 2)), None, "images: expected finite"),
  "infinite labels": (
    ".npz",
    changed(RFAD, labels=np.where(HOT > 0, np.float32(np.inf), HOT)),
    None,
    "labels: expected finite",
  ),
  "no labels": (".npz", {"images": IMAGES}, None, "of recognizable kind"),
  "no labels, kind given": (".npz", {"images": IMAGES}, "kip", "with labels"),
  "other rows": (".npz", changed(RFAD, labels=HOT[:3]), None, "same number of rows"),
  "flat images": (
    ".npz",
    changed(RFAD, images=IMAGES.reshape(4, -1)),
    None,
    "images: expected an array NCHW",
  ),
  "channels elsewhere": (".npz", changed(RFAD, images=IMAGES), None, "1 or 3 channels"),
  "no rows": (".npz", changed(RFAD, images=NCHW[:0], labels=HOT[:0]), None, "at least 2 classes"),
  "bytes": (
    ".npz",
    changed(RFAD, images=NCHW.astype(np.uint8)),
    None,
    "images: expected floats, got uint8",
  ),
  "class numbers": (
    ".npz",
    changed(RFAD, labels=np.arange(4)),
    None,
    "labels: expected floats, got int64",
  ),
  "no positive ridge": (
    ".npz",
    changed(RFAD, jit=np.float64(-1)),
    None,
    "ridge: expected values > 0",
  ),
  "a ridge a row": (".npz", changed(RFAD, jit=np.ones(4)), None, "jit: expected a finite number"),
  "a huge temperature": (
    ".npz",
    changed(RFAD, k=np.float64(1e4)),
    None,
    "logarithm of the temperature in",
  ),
  "NHWC or NCHW": (".npz", {"images": np.ones((4, 3, 3, 3)), "labels": HOT}, None, "pass kind"),
  "an artifact of ours": (
    ".npz",
    {"images": IMAGES, "labels": HOT, "metadata": np.zeros(1)},
    None,
    "use load_artifact",
  ),
  "objects": (".npz", changed(RFAD, labels=np.array([None] * 4)), None, "never unpickled"),
  "another form": (".npz", RFAD, "rcig", r"kind rcig \(Flax\), got a .npz file"),
  "another kind": ("Flax", FREPO, "rcig", "with ema_average"),
  "a list": ("Flax", [1, 2], None, "got another file"),
}


@pytest.mark.parametrize("what", BAD_SETS)
def test_invalid_sets_raise_one_line_errors(what, tmp_path):
  form, content, kind, pattern = BAD_SETS[what]
  fault(pattern, write(tmp_path / "a.npz", form, content), kind)


def test_invalid_torch_labels_and_files(tmp_path):
  pairs = lambda labels: (
    b"}" + const("data") + b"](](" + tensor((1, 1, 2, 3), (6, 6, 3, 1)) + labels + b"ees"
  )
  long = np.array([0, 2], "<i8").tobytes()
  path = torch_file(
    tmp_path / "a.pt", pairs(tensor((2,), (1,), 0, 2, "LongStorage", "1")), **{"data/1": long}
  )
  fault(r"every class 0..c-1, got the classes \[0, 2\]", path)
  fault("class indices .*float32", torch_file(path, pairs(tensor((2,), (1,)))))
  fault(
    "pair of images and labels", torch_file(path, b"}" + const("data") + b"]" + const(1) + b"as")
  )
  fault("got a torch file with an array of shape", torch_file(path, tensor((6,), (1,))))
  fault("no such file", tmp_path / "b.npz")
  fault("a folder", tmp_path)
  path.write_bytes(b"")
  fault("cannot be read as any of them", path)
  with pytest.raises(ValueError, match="kind: expected one of kip"):
    load_published(path, "darts")


@pytest.mark.parametrize("name", ["torch_dc.pt", "images_best.pt", "best.npz", "checkpoint_15000"])
def test_damage_is_detected_or_harmless(name, tmp_path):
  path = tmp_path / name
  if name.endswith(".pt"):
    shutil.copy(DATA / name, path)
    shutil.copy(DATA / "labels_best.pt", tmp_path)
  else:
    write(path, *SETS[name][:2])
  whole, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
  for i in range(150):
    damaged = np.frombuffer(whole, np.uint8).copy()
    damaged[rng.integers(0, len(whole), 1 + i % 3)] = rng.integers(0, 256, 1 + i % 3)
    path.write_bytes(damaged[: rng.integers(0, len(whole))] if i % 5 == 0 else damaged)
    try:
      got = load_published(path)
      assert (
        np.isfinite(got.images).all()
        and np.isfinite(got.labels).all()
        and len(got.images) == len(got.labels)
      )
    except PublishedError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused >= 30  # all truncated files


def test_rfad_and_rcig_sets():
  rfad = load_published(needs(SHARED_DATA / "peers" / "rfad_cifar10_1ipc.npz"))
  assert (
    rfad.images.shape == (10, 32, 32, 3)
    and rfad.relative_ridge == 0.005
    and 41 < rfad.temperature < 41.1
  )
  rcig = load_published(needs(SHARED_DATA / "peers" / "rcig_cifar10_1ipc.msgpack"))
  assert (rcig.kind, rcig.source["step"], rcig.mirrored) == (
    "rcig",
    15000,
    True,
  ) and rcig.support().x.shape == (20, 32, 32, 3)
  for published in (rfad, rcig):
    assert np.array_equal(published.classes, np.arange(10)) and 0.2 < published.images.std() < 1


# --- sets written by the code of other projects ---

PUBLISHED = DATA / "published"  # written by make_published_files.py
DECODED = np.load(PUBLISHED / "decoded.npz")
TAG = "conv3in_cut_niter2_factor2_lr0.005_ipc2"


def stored_pixels(name):
  """Images `(m, h, w, c)` that networks are trained on by the project itself, and their classes."""
  return DECODED[name].transpose(0, 2, 3, 1), DECODED[f"{name}_labels"]


@pytest.mark.parametrize("decoding", ["single", "multi", "bound"])
@pytest.mark.parametrize("kind, file", [("idc", "data.pt"), ("dream", "data1200.pt")])
def test_multi_formation_is_decoded_as_by_the_publisher(
  kind, file, decoding, tmp_path, monkeypatch
):
  from kipcore.io import formation

  # The published bound of 128 images per class does not limit two images.
  monkeypatch.setattr(formation.decode, "__defaults__", ("single", 6))
  path = PUBLISHED / kind / TAG / file
  got = load_published(path, decoding=decoding)
  images, classes = stored_pixels(f"{kind}_{decoding}")
  assert (got.kind, got.pixels, got.preprocess) == (kind, True, "standardize")
  assert_close(got.images, images, 1e-6, 1e-6)
  assert np.array_equal(got.classes, classes)
  assert_close(got.labels, np.eye(2)[classes] - 0.5, 1e-6)
  assert (got.source["factor"], got.source["stored_images"]) == (2, 4)
  # Without the folder name, the factor is not known; 1 gives the stored images.
  moved = shutil.copy(path, tmp_path)
  fault("factor: expected the number of training images per side", pathlib.Path(moved))
  whole = load_published(moved, factor=1)
  assert np.array_equal(whole.images, read_torch_file(path)[0].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("kind, file", [("ncfm", "data_20000.pt"), ("cim", "data.pt")])
def test_ncfm_and_cim_have_factor_2(kind, file):
  got = load_published(PUBLISHED / kind / file)
  images, classes = stored_pixels({"ncfm": "ncfm_single", "cim": "cim_multi"}[kind])
  assert (
    got.kind == kind
    and got.pixels
    and np.array_equal(np.bincount(got.classes), np.bincount(classes))
  )
  # CIM's own order of the rows is another.
  order = lambda x, y: np.lexsort((x.mean(axis=(1, 2, 3)).round(5), y))
  assert_close(
    got.images[order(got.images, got.classes)], images[order(images, classes)], 1e-6, 1e-6
  )
  assert (got.source.get("dataset"), "teacher" in got.labels_note) == (
    ("cifar10", True) if kind == "cim" else (None, False)
  )


def test_labels_of_datm_are_logits():
  folder = PUBLISHED / "datm" / "Normal"
  got = load_published(folder / "images_best.pt")
  logits = read_torch_file(folder / "labels_best.pt").astype(np.float64)
  share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  assert got.kind == "datm" and got.preprocess is None and not got.pixels
  assert_close(got.labels, share - 0.5, 1e-6, 1e-7)
  assert abs(got.source["learning_rate"] - 0.01) < 1e-8
  assert np.array_equal(
    got.images, read_torch_file(folder / "images_best.pt").transpose(0, 2, 3, 1)
  )
  fault("class indices", folder / "images_best.pt", "mtt")
  fault("real-valued labels .* in labels_best.pt", DATA / "images_best.pt", "datm")


@pytest.mark.parametrize("kind", ["rded", "sre2l"])
def test_folders_of_images(kind, tmp_path):
  from PIL import Image

  got = load_published(PUBLISHED / kind)
  files = sorted((PUBLISHED / kind).glob("*/*.jpg"))
  pixels = np.stack([np.asarray(Image.open(file)) for file in files])
  assert got.kind == kind and got.pixels and "teacher" in got.labels_note
  assert_close(got.images, pixels / 255, 1e-6)
  assert np.array_equal(got.classes, np.repeat([0, 1], len(files) // 2))
  parts = load_published(PUBLISHED / kind, factor=2)
  assert len(parts.images) == 4 * len(files) and parts.source["factor"] == 2
  # Folders with other names do not say who published them.
  for i, each in enumerate(sorted((PUBLISHED / kind).iterdir())):
    shutil.copytree(each, tmp_path / "set" / "ab"[i])
  fault("pass kind, one of rded, sre2l", tmp_path / "set")
  assert np.array_equal(load_published(tmp_path / "set", kind).images, got.images)
  (tmp_path / "set" / "c").mkdir()
  fault("whose folder c has none", tmp_path / "set", kind)


def test_soft_labels_of_crops_are_those_of_the_publisher():
  got = load_published(PUBLISHED / "sre2l", labels=PUBLISHED / "sre2l_labels")
  logits = DECODED["sre2l_logits"].astype(np.float64)
  share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  assert_close(got.images, DECODED["sre2l_views"].transpose(0, 2, 3, 1), 1e-6, 1e-6)
  assert_close(got.labels, share - 0.5, 1e-5, 1e-6)
  with pytest.raises(PublishedError, match="does not store labels"):
    load_published(PUBLISHED / "rded", labels=PUBLISHED / "sre2l_labels")
  with pytest.raises(PublishedError, match="found none in"):
    load_published(PUBLISHED / "sre2l", labels=PUBLISHED)


def test_permutations_of_torch():
  from kipcore.io import image_sets

  # torch.randperm(10, generator=torch.Generator().manual_seed(42))
  assert image_sets.torch_permutation(10, 42).tolist() == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]


def test_ambiguous_dictionaries_and_pairs_need_the_publisher(tmp_path):
  one = tensor((2, 1, 1, 3), (3, 3, 3, 1))
  labels = tensor((2,), (1,), 0, 2, "LongStorage", "1")
  members = {"data/1": np.array([0, 1], "<i8").tobytes()}
  for name, image in (("images", "labels"), ("image_syn", "label_syn"), ("data", "targets")):
    layout = b"}" + const(name) + one + b"s" + const(image) + labels + b"s"
    path = torch_file(tmp_path / "a.pt", layout, **members)
    fault("of recognizable kind, got a torch file with .*; pass kind, one of dc, mtt", path)
    for kind in ("idc", "dream"):
      got = load_published(path, kind, factor=1)
      assert np.array_equal(got.images.ravel(), np.arange(6)) and got.kind == kind
    assert load_published(path, "ncfm", factor=1).source["factor"] == 1
  pair = torch_file(tmp_path / "mine.pt", b"](" + one + labels + b"e", **members)
  fault("got a torch file with a list; pass kind", pair)
  assert load_published(shutil.copy(pair, tmp_path / "data_init.pt"), factor=1).kind == "ncfm"
  fault("factor: expected 1 for images of 1 x 3 pixels, got 2", pair, "cim")
  with pytest.raises(ValueError, match="decoding: expected one of single, multi, bound"):
    load_published(pair, "idc", decoding="double")


def test_sets_of_pixels_are_standardized_with_constants():
  got = load_published(PUBLISHED / "cim" / "data.pt")
  mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
  x = (255 * mean + RNG.choice([-60.0, 60.0], (4000, 4, 4, 3))).astype(np.float32)
  fitted = got.fit_preprocess(x)
  support = got.support(preprocess=fitted)
  assert_close(support.x, (got.images - mean) / deviation, 1e-5, 1e-5)
  assert_close(
    got.fit_preprocess(x / 255, pixel_max=1.0).apply(x / 255), fitted.apply(x), 1e-5, 1e-5
  )
  with pytest.raises(ValueError, match="preprocess: expected that of fit_preprocess"):
    got.support()
  rded = load_published(PUBLISHED / "rded")
  used = rded.fit_preprocess(np.resize(x, (500, 8, 8, 3)))
  imagenet = (rded.images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
  assert_close(rded.support(preprocess=used).x, imagenet, 1e-5, 1e-5)
