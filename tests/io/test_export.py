"""Exports are read by other libraries, and their JSON contains all that is needed to use them."""

import ast
import csv
import dataclasses
import functools
import json
import os
import pathlib
import pkgutil
import sys
import types

import numpy as np
import pytest
from binaries import run_binary

import kipcore
from experiments.studies import pytorch_training
from kipcore.io import export

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("air plane", "b/c", "2", "dog")


def make(
  kind="zca", shape=(5, 6, 3), pixel_max=255.0, whole=False, dtype=np.float32, names=NAMES, m=7
):
  """An artifact of m random images and learned labels.

  One class has no image. Unless `whole`, pixels are not integers and exceed their range.
  """
  rng = np.random.default_rng(0)
  x_train = np.rint(rng.uniform(0, pixel_max, (40, *shape)))
  fitted = kipcore.fit_preprocess(x_train, kind, pixel_max)
  images = (
    np.rint(rng.uniform(0, pixel_max, (m, *shape)))
    if whole
    else rng.uniform(-0.2, 1.2, (m, *shape)) * pixel_max
  )
  labels = rng.normal(0, 0.1, (m, 4)) + np.eye(4)[np.arange(m) % 3]
  support = fitted.apply(images, dtype)
  dataset = {
    "name": "made",
    "pixel_max": pixel_max,
    "class_names": names,
    "hashes": {"test": "0f"},
    "test_rows": 9,
  }
  metadata = {"dataset": dataset, "result": {"test_accuracy": 0.5}}
  images = images.astype(dtype) if whole else fitted.invert(support, dtype)
  return kipcore.Artifact(
    images, labels.astype(dtype), support, fitted, kipcore.fc(1), "ntk", 1e-6, metadata
  )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """An artifact that was saved and loaded."""
  path = tmp_path_factory.mktemp("artifact") / "distilled.npz"
  kipcore.save_artifact(path, make())
  return kipcore.load_artifact(path)


def same(actual, expected):
  """Equal bits, dtypes and shapes."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert (
    actual.dtype == expected.dtype
    and actual.shape == expected.shape
    and actual.tobytes() == expected.tobytes()
  )


def content(folder):
  """All files below a folder by name, including hidden ones."""
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def test_exported_arrays_equal_the_artifact(stored):
  arrays = stored.as_numpy()
  same(arrays["images"], stored.images)
  same(arrays["labels"], stored.labels)
  same(arrays["one_hot"], stored.labels + np.float32(0.25))
  same(arrays["classes"], np.arange(7) % 3)
  same(stored.as_numpy("inputs")["images"], stored.support)
  arrays["images"][:] = 0
  assert stored.images.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("space", export.SPACES)
def test_numpy_and_safetensors_are_bit_exact(tmp_path, dtype, space):
  import safetensors

  stored = make(dtype=dtype)
  arrays = stored.as_numpy(space)
  stored.export(tmp_path / "set.npz", "numpy", space)
  stored.export(tmp_path / "below" / "set.safetensors", "safetensors", space)
  with np.load(tmp_path / "set.npz", allow_pickle=False) as file:
    for name, array in arrays.items():
      same(file[name], array)
    same(file["preprocess/2_zca_whitening"], stored.preprocess.steps[2].arrays["whitening"])
    inside = str(file["conventions"])
  with safetensors.safe_open(tmp_path / "below" / "set.safetensors", "np") as file:
    for name in ("labels", "one_hot", "classes"):
      same(file.get_tensor(name), arrays[name])
    same(file.get_tensor("images").transpose(0, 2, 3, 1), arrays["images"])
    same(file.get_tensor("preprocess/1_center_mean"), stored.preprocess.steps[1].arrays["mean"])
    text = file.metadata()["conventions"]
  assert (tmp_path / "set.npz.json").read_text().strip() == inside
  assert (tmp_path / "below" / "set.safetensors.json").read_text().strip() == text
  said = json.loads(inside)
  assert said["images"]["layout"] == "NHWC" and json.loads(text)["images"]["layout"] == "NCHW"
  assert said["images"]["space"] == space and said["label_convention"]["offset"] == 0.25
  assert said["pixel_range"]["white"] == 255 and said["accuracy"]["test_accuracy"] == 0.5
  assert kipcore.Architecture.from_json(json.dumps(said["kernel"]["architecture"])) == stored.arch


@pytest.mark.parametrize(
  "kind", ["none", "standardize", "zca", "zca_kip", "zca_dcbench", "zca_absolute"]
)
def test_conventions_suffice_to_compute_the_inputs(tmp_path, kind):
  stored = make(kind)
  stored.export(tmp_path / "set.npz", "numpy")
  with np.load(tmp_path / "set.npz", allow_pickle=False) as file:
    arrays = {name: file[name] for name in file.files}
  conventions = json.loads(str(arrays["conventions"]))
  # Rounding of the whitening product, which is float32 here and float64 there.
  inputs = pytorch_training.inputs_of(arrays["images"], conventions, arrays)
  np.testing.assert_allclose(inputs, stored.preprocess.apply(stored.images), rtol=1e-5, atol=1e-4)
  assert inputs.std() > 1e-2


def read_png(folder, stored):
  """The images by the conventions of the folder, in the order of labels.csv, and the labels."""
  from PIL import Image

  said = json.loads((folder / "conventions.json").read_text())["png"]
  rows = list(csv.reader((folder / "labels.csv").read_text().splitlines()))[1:]
  images = np.stack([np.asarray(Image.open(folder / row[0])) for row in rows]) * said["unit"]
  images = images.reshape(stored.images.shape)
  return (
    said,
    np.rint(images) if "rounded" in said["pixel"] else images,
    np.array([row[2:] for row in rows], np.float32),
    rows,
  )


@pytest.mark.parametrize("shape", [(5, 6, 3), (5, 6, 1)])
@pytest.mark.parametrize("pixel_max", [255.0, 16.0, 1.0])
def test_png_is_exact_for_integer_pixels_and_within_half_a_level_otherwise(
  tmp_path, shape, pixel_max
):
  for whole in (True, False):
    stored = make("none", shape, pixel_max, whole)
    folder = tmp_path / f"{whole}"
    stored.export(folder, "png")
    said, images, labels, rows = read_png(folder, stored)
    assert said["exact"] == whole and said["unit"] == pixel_max / 255
    same(labels, stored.labels)
    assert [int(row[1]) for row in rows] == list(np.arange(7) % 3)
    error = np.abs(images - np.clip(stored.images, 0, pixel_max)).max()
    # The stated bound: pixels in their range are off by at most half a level of 255, plus float64
    # rounding.
    assert error == 0 if whole else error <= said["unit"] / 2 * (1 + 1e-12)
    assert np.isclose(said["largest_error"], np.abs(images - stored.images).max(), rtol=1e-9)
    assert (said["clipped_share"] > 0.1) != whole
  # Readers of folders number classes by their sorted names, including the empty class.
  assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [
    "0_air-plane",
    "1_b-c",
    "2",
    "3_dog",
  ]
  assert not list((folder / "3_dog").iterdir())


def test_tfds_export_round_trips(tmp_path, stored):
  plain = make("none", whole=True, names=None)
  stored.export(tmp_path / "learned" / "1.0.0", "tfds")
  plain.export(tmp_path / "Plain set", "tfds")
  from kipcore.io.quiet_tensorflow import quiet_tensorflow

  with quiet_tensorflow() as (_, tfds):

    def read(dataset):
      rows = list(tfds.as_numpy(dataset))
      return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    builder = tfds.builder_from_directory(str(tmp_path / "learned" / "1.0.0"))
    found = [
      read(builder.as_dataset(split="train")),
      read(tfds.load("learned", data_dir=str(tmp_path), split="train")),
      read(tfds.builder_from_directory(str(tmp_path / "Plain set")).as_dataset(split="train")),
    ]
    whole = read(stored.as_tfds())
  for rows, source, dtype in zip(
    found, (stored, stored, plain), (np.float32, np.float32, np.uint8)
  ):
    arrays = source.as_numpy()
    same(rows["image"], arrays["images"].astype(dtype))
    same(rows["soft_label"], arrays["one_hot"])
    same(rows["label"], arrays["classes"])
  assert builder.info.features["label"].names == list(NAMES) and builder.info.supervised_keys == (
    "image",
    "label",
  )
  assert np.load(tmp_path / "learned" / "1.0.0" / "preprocess.npz")[
    "preprocess/2_zca_whitening"
  ].shape == (90, 90)
  for name, array in stored.as_numpy().items():
    same(whole[name], array)


def test_torch_export_is_float32_and_channels_first(tmp_path, monkeypatch):
  """Uses a stand-in for PyTorch; `test_pytorch_export_round_trips` uses PyTorch itself."""
  written = {}
  save = lambda tensors, file: (written.update(tensors), file.write(b"tensors"))
  monkeypatch.setitem(
    sys.modules, "torch", types.SimpleNamespace(from_numpy=lambda array: array, save=save)
  )
  stored = make(dtype=np.float64)
  stored.export(tmp_path / "set.pt", "torch")
  for tensors in (stored.as_torch(), written):
    same(tensors["images"], stored.images.transpose(0, 3, 1, 2).astype(np.float32))
    same(tensors["labels"], stored.labels.astype(np.float32))
    same(tensors["one_hot"], (stored.labels + 0.25).astype(np.float32))
    same(tensors["classes"], np.arange(7) % 3)
  same(written["preprocess/1_center_mean"], stored.preprocess.steps[1].arrays["mean"])
  assert json.loads(written["conventions"])["images"]["layout"] == "NCHW"
  assert (tmp_path / "set.pt").read_bytes() == b"tensors"


def test_pytorch_export_round_trips(tmp_path, stored):
  pytest.importorskip("torch", reason="needs PyTorch")
  stored.export(tmp_path / "set.pt", "torch")
  arrays, conventions = pytorch_training.load(tmp_path / "set.pt")
  same(arrays["images"].transpose(0, 2, 3, 1), stored.images)
  np.testing.assert_allclose(
    pytorch_training.inputs_of(stored.images, conventions, arrays), stored.support, atol=1e-4
  )


@pytest.mark.parametrize(
  "module, format, package, command",
  [
    ("torch", "torch", "PyTorch", "torch"),
    ("tensorflow", "tfds", "TensorFlow", r"'kipcore\[tfds\]'"),
    ("tensorflow_datasets", "tfds", "tensorflow-datasets", r"'kipcore\[tfds\]'"),
  ],
)
def test_missing_packages_are_reported_in_one_line(
  tmp_path, monkeypatch, stored, module, format, package, command
):
  monkeypatch.setitem(sys.modules, module, None)
  path = tmp_path / ("set" + export.SUFFIXES.get(format, ""))
  for call in (getattr(stored, f"as_{format}"), lambda: stored.export(path, format)):
    with pytest.raises(
      ImportError, match=rf"expected {package} to be installed, got .*; pip install {command}$"
    ):
      call()
  assert not content(tmp_path)


def test_pytorch_training_does_not_import_kipcore():
  tree = ast.parse((ROOT / "experiments" / "studies" / "pytorch_training.py").read_text())
  modules = {
    alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
  }
  modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
  assert modules <= {"copy", "json", "math", "numpy", "torch"}


@pytest.mark.parametrize("format", ["numpy", "png"])
def test_only_exports_are_overwritten_and_only_on_request(tmp_path, stored, format):
  path = tmp_path / "out"
  stored.export(path, format)
  before = content(tmp_path)
  with pytest.raises(FileExistsError, match="expected a path that does not exist"):
    stored.export(path, format)
  other = make("none", names=None)
  for different in ("safetensors", "tfds"):
    with pytest.raises(FileExistsError, match=f"expected an earlier export in format {different}"):
      other.export(path, different, overwrite=True)
  assert content(tmp_path) == before
  other.export(path, format, overwrite=True)
  after = content(tmp_path)
  other.export(tmp_path / "new" / "out", format)
  # Nothing of the earlier export is left; paths are not part of it.
  assert after == content(tmp_path / "new") != before


def test_other_files_are_never_replaced(tmp_path, stored):
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "conventions.json").write_text('{"format": "of mine"}')
  (tmp_path / "set.npz.json").write_text("[]")
  before = content(tmp_path)
  for path, format in (
    (folder, "png"),
    (folder, "numpy"),
    (tmp_path / "set.npz", "numpy"),
    (folder / "conventions.json", "png"),
  ):
    for overwrite, message in ((False, "a path that does not exist"), (True, "an earlier export")):
      with pytest.raises(FileExistsError, match=message):
        stored.export(path, format, overwrite=overwrite)
  assert content(tmp_path) == before
  (tmp_path / "empty").mkdir()
  stored.export(tmp_path / "empty", "png")
  assert (tmp_path / "empty" / "labels.csv").is_file()


@pytest.mark.parametrize(
  "format, broken",
  [
    ("numpy", "numpy.savez_compressed"),
    ("safetensors", "safetensors.numpy.save"),
    ("numpy", "os.fsync"),
    ("png", "PIL.Image.Image.save"),
    ("png", "pathlib.Path.write_text"),
    ("png", "pathlib.Path.rename"),
  ],
)
def test_interrupted_export_keeps_the_earlier_one(tmp_path, monkeypatch, stored, format, broken):
  stored.export(tmp_path / "out", format)
  before = content(tmp_path)
  import PIL.Image  # noqa: F401
  import safetensors.numpy  # noqa: F401, so that there is something to break

  calls, working = [], pkgutil.resolve_name(broken)

  def interrupted(*args, **kwargs):
    calls.append(args)
    if (
      broken.endswith("rename") and len(calls) != 2
    ):  # the first moves the earlier folder away, the third back
      return working(*args, **kwargs)
    raise KeyboardInterrupt

  monkeypatch.setattr(broken, interrupted)
  with pytest.raises(KeyboardInterrupt):
    make("none").export(tmp_path / "out", format, overwrite=True)
  monkeypatch.undo()
  assert (
    calls
    and content(tmp_path) == before
    and len(list(tmp_path.iterdir())) == (1 if format == "png" else 2)
  )


def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, stored):
  tabular = make("none", (6,), names=None)
  unknown = dataclasses.replace(stored, metadata={})
  path = tmp_path / "out"
  for call, message in (
    (
      lambda: stored.export(path, "jpeg"),
      "format: expected one of numpy, png, safetensors, torch, tfds, ddranking; got 'jpeg'",
    ),
    (
      lambda: stored.export(path, "numpy", "latent"),
      "space: expected one of pixels, inputs; got 'latent'",
    ),
    (lambda: stored.export(path, "png", "inputs"), "format png: expected space pixels, got inputs"),
    (lambda: tabular.export(path, "png"), r"format png: expected images .*, got shape \(7, 6\)"),
    (lambda: unknown.export(path, "png"), "format png: expected a set with pixel_max"),
    (lambda: stored.export(path, "png", pixel_max=-1.0), "pixel_max: expected values > 0, got -1"),
    (lambda: export.as_numpy(np.zeros((3, 2)), np.zeros((2, 2))), "same number of rows"),
    (
      lambda: export.write(
        path, "numpy", stored.distilled_set()._replace(labels=np.full((7, 4), np.nan))
      ),
      "labels: expected finite",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  assert not content(tmp_path)
  unknown.export(path, "png", pixel_max=255.0)
  tabular.export(tmp_path / "rows.npz", "numpy")
  assert (
    json.loads((tmp_path / "rows.npz.json").read_text())["images"]["layout"] == "rows of features"
  )
  assert json.loads((path / "conventions.json").read_text())["accuracy"] is None


@pytest.mark.parametrize("format", ["safetensors", "png"])
def test_unwritable_folder_raises_oserror(tmp_path, stored, format):
  (tmp_path / "file").write_text("")
  with pytest.raises(NotADirectoryError, match="expected a writable folder .*file, got a file"):
    stored.export(tmp_path / "file" / "below" / "out", format)
  closed = tmp_path / "closed"
  closed.mkdir(mode=0o500)
  if not os.access(closed, os.W_OK):  # a superuser can write everywhere
    with pytest.raises(PermissionError, match="got one that is read-only"):
      stored.export(closed / "out", format)
  assert set(content(tmp_path)) == {"file"}


def test_learned_labels_are_described_as_such(tmp_path, capsys):
  x = np.zeros((4, 2, 2, 1), np.float32)
  plain = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]] - np.float32(1 / 3)
  assert not export.learned(plain) and export.label_kind(plain) == "one-hot minus offset"
  moved = plain.copy()
  moved[1] = [0.5, 0.25, 0.0]  # started in class 1, its largest label is now 0
  assert export.learned(moved) and export.label_kind(moved).startswith("learned")
  stored = make("none", (4, 2, 2, 1), 255.0, True)
  content = stored.distilled_set("pixels", 255.0)._replace(
    images=x, labels=moved, class_names=("a", "b", "c")
  )
  export.write(tmp_path / "png", "png", content)
  said = json.loads((tmp_path / "png" / "conventions.json").read_text())
  assert "largest label" in said["png"]["folders"] and "a: 3, b: 0, c: 1" in said["png"]["folders"]
  assert len(list((tmp_path / "png" / "0_a").iterdir())) == 3
  assert "learned" not in export.folder_note(content._replace(labels=plain))


def test_command_exports_and_rejects_invalid_requests(tmp_path, stored):
  path = tmp_path / "distilled.npz"
  kipcore.save_artifact(path, stored)
  run = functools.partial(run_binary, "experiments.run_export")
  done = run(f"--artifact={path}", "--format=png,numpy", "--space=pixels")
  assert done.returncode == 0, done.stderr
  names = {"distilled_pixels.npz", "distilled_pixels.npz.json", "distilled_pixels_png"}
  assert {p.name for p in (tmp_path / "export").iterdir()} == names
  wrong = tmp_path / "export" / "distilled_pixels.npz"
  done = run(f"--artifact={wrong}")
  assert done.returncode == 2 and not done.stdout
  assert (
    done.stderr.startswith(f"error: {wrong}: expected arrays images")
    and done.stderr.count("\n") == 1
  )


# --- DD-Ranking ---


def ddranking_set(folder):
  """The arrays and settings of an export."""
  arrays = {
    name: np.load(folder / f"{name}.npy") for name in ("images", "hard_labels", "soft_labels")
  }
  return arrays, json.loads((folder / "settings.json").read_text())


def scored(tmp_path, name, kind, shape, labels):
  """The export of a set with the given labels, and its artifact."""
  made = make(kind, shape, m=len(labels))
  metadata = {**made.metadata, "dataset": {**made.metadata["dataset"], "name": name}}
  made = dataclasses.replace(made, labels=np.asarray(labels, np.float32), metadata=metadata)
  made.export(tmp_path / "set", "ddranking")
  return *ddranking_set(tmp_path / "set"), made


HARD = np.eye(2)[[1, 0, 1, 0]] - 0.5


def test_ddranking_gets_normalized_images_in_class_order(tmp_path):
  arrays, settings, made = scored(tmp_path, "cifar10", "standardize", (8, 8, 3), HARD)
  mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
  expected = ((made.images / 255 - mean) / deviation)[[1, 3, 0, 2]].transpose(0, 3, 1, 2)
  np.testing.assert_allclose(arrays["images"], expected, rtol=1e-5, atol=1e-5)
  assert arrays["images"].dtype == np.float32 and arrays["hard_labels"].tolist() == [0, 0, 1, 1]
  assert arrays["hard_labels"].dtype == np.int64
  assert (settings["dataset"], settings["ipc"], settings["use_zca"]) == ("CIFAR10", 2, False)
  assert settings["im_size"] == [8, 8] and settings["model_name"] == "ConvNet-1"
  # Its loss applies a softmax to the labels.
  share = np.exp(arrays["soft_labels"] / settings["loss_fn_kwargs"]["temperature"])
  np.testing.assert_allclose(
    share / share.sum(1, keepdims=True), np.eye(2)[[0, 0, 1, 1]], atol=1e-7
  )
  assert settings["soft_label_criterion"] == "kl"


def test_ddranking_gets_gray_images_of_28_pixels_as_rgb_of_32(tmp_path):
  arrays, settings, made = scored(tmp_path, "mnist", "standardize", (28, 28, 1), HARD)
  (step,) = made.preprocess.steps
  x = np.pad(made.images[[1, 3, 0, 2]], ((0, 0), (2, 2), (2, 2), (0, 0)))
  expected = ((x - step.arrays["mean"]) / step.arrays["divisor"]).transpose(0, 3, 1, 2)
  assert arrays["images"].shape == (4, 3, 32, 32)
  np.testing.assert_allclose(arrays["images"], np.repeat(expected, 3, axis=1), rtol=1e-5, atol=1e-5)
  assert settings["model_name"] == "ConvNet-3" and settings["im_size"] == [32, 32]
  said = json.loads((tmp_path / "set" / "conventions.json").read_text())
  assert any("does not load mnist" in note for note in said["use"])
  assert said["images"]["row_shape"] == [3, 32, 32]


@pytest.mark.parametrize("kind", ["zca_absolute", "zca"])
def test_only_the_whitening_of_ddranking_is_kept(tmp_path, kind):
  arrays, settings, made = scored(tmp_path, "cifar10", kind, (8, 8, 3), HARD)
  assert settings["use_zca"] == (kind == "zca_absolute")
  notes = json.loads((tmp_path / "set" / "conventions.json").read_text())["use"]
  assert any("whitened by zca" in note for note in notes) == (kind == "zca")
  if kind == "zca_absolute":
    whitened = made.support[[1, 3, 0, 2]].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(arrays["images"], whitened, rtol=1e-3, atol=1e-3)


def test_learned_labels_for_ddranking(tmp_path):
  # Not distributions, and the largest label of a row is not that of its group.
  labels = np.array([[0.7, -0.6], [0.1, 0.2], [-0.5, 0.5], [-0.9, 0.4]])
  arrays, settings, _ = scored(tmp_path, "cifar10", "standardize", (8, 8, 3), labels)
  assert settings["soft_label_criterion"] == "mse_gt"
  np.testing.assert_allclose(arrays["soft_labels"], labels, rtol=1e-6)
  assert arrays["hard_labels"].tolist() == [0, 0, 1, 1]
  notes = json.loads((tmp_path / "set" / "conventions.json").read_text())["use"]
  assert any("1 of 4 rows have their largest label elsewhere" in note for note in notes)


def test_sets_that_ddranking_cannot_score_are_refused(tmp_path):
  with pytest.raises(ValueError, match="expected a multiple of 4 classes, got 7 images"):
    make().export(tmp_path / "set", "ddranking")
  with pytest.raises(ValueError, match="format ddranking: expected space pixels, got inputs"):
    make().export(tmp_path / "set", "ddranking", "inputs")
  assert not (tmp_path / "set").exists()


def test_programs_of_other_interpreters_do_not_import_kipcore():
  tree = ast.parse((ROOT / "experiments" / "studies" / "dd_ranking_worker.py").read_text())
  for node in ast.walk(tree):
    names = (
      [node.module]
      if isinstance(node, ast.ImportFrom)
      else [alias.name for alias in node.names]
      if isinstance(node, ast.Import)
      else []
    )
    assert not any((name or "").startswith(("kipcore", "experiments", "jax")) for name in names)
