"""Data files and TFDS: checks, splits, hashes, one-line errors, and no unpickling."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
import zipfile

import numpy as np
import pytest
from helpers import SHARED_DATA, needs
from sklearn.datasets import load_digits

from kipcore.datasets import DatasetError, load_dataset, tfds_data


def arrays_of(n=60, m=20, c=4, shape=(4, 4, 3), seed=0):
  """Random uint8 images and balanced labels."""
  rng = np.random.default_rng(seed)
  return {
    "x_train": rng.integers(0, 256, (n, *shape)).astype(np.uint8),
    "y_train": rng.permutation(np.arange(n) % c),
    "x_test": rng.integers(0, 256, (m, *shape)).astype(np.uint8),
    "y_test": rng.permutation(np.arange(m) % c),
  }


def save(path, **arrays):
  np.savez(path, **arrays)
  return str(path)


def fault(name, pattern, **options):
  """Checks that a DatasetError with this message on one line is raised."""
  with pytest.raises(DatasetError, match=pattern) as caught:
    load_dataset(name, **options)
  assert "\n" not in str(caught.value)


def row_hashes(x, y):
  return [hashlib.sha256(a.tobytes() + bytes([int(b)])).hexdigest() for a, b in zip(x, y)]


@pytest.mark.parametrize("fraction, seed", [(0.1, 0), (0.1, 7), (0.5, 0), (0, 0), (0.999, 1)])
def test_unbalanced_color_file_is_split_by_class_without_losing_rows(tmp_path, fraction, seed):
  rng = np.random.default_rng(1)
  counts = np.concatenate([[1, 2, 300], rng.integers(1, 60, 40)])  # 43 classes
  y = rng.permutation(np.repeat(np.arange(43), counts)).astype(np.uint8)
  given = arrays_of(len(y), 86, 43) | {"y_train": y}
  data = load_dataset(
    save(tmp_path / "signs.npz", **given), validation_fraction=fraction, seed=seed
  )
  assert (data.num_classes, data.class_names, data.pixel_max, data.note) == (43, None, 255, "")
  assert data.x_train.dtype == data.x_validation.dtype == np.uint8
  assert np.array_equal(data.x_test, given["x_test"]) and np.array_equal(
    data.y_test, given["y_test"]
  )
  # Disjoint, complete, and each part in its original order.
  before = row_hashes(given["x_train"], y)
  train, held = (
    row_hashes(data.x_train, data.y_train),
    row_hashes(data.x_validation, data.y_validation),
  )
  assert len(set(before)) == len(before) and sorted(train + held) == sorted(before)
  assert train == [h for h in before if h in set(train)] and held == [
    h for h in before if h in set(held)
  ]
  # Stratified: within one row of its share, and at least one row stays.
  kept, out = np.bincount(data.y_train, minlength=43), np.bincount(data.y_validation, minlength=43)
  assert (kept >= 1).all() and (np.abs(out - np.minimum(fraction * counts, counts - 1)) < 1).all()
  if fraction <= 0.1:
    assert data.x_validation.shape == (round(fraction * len(y)), 4, 4, 3)


def test_seed_changes_only_the_validation_split(tmp_path):
  path = save(tmp_path / "a.npz", **arrays_of())
  one, same, other = (load_dataset(path, seed=s) for s in (1, 1, np.int64(2)))
  assert one.hashes == same.hashes and np.array_equal(one.x_validation, same.x_validation)
  assert {k for k in one.hashes if one.hashes[k] != other.hashes[k]} == {"train", "validation"}


def test_hashes_depend_on_content_shape_dtype_and_labels_but_not_storage(tmp_path):
  given = arrays_of()
  x, y = given["x_test"], given["y_test"]

  def test_hash(**changes):
    return load_dataset(save(tmp_path / "a.npz", **{**given, **changes})).hashes["test"]

  def both(change):
    return {"x_train": change(given["x_train"]), "x_test": change(x)}

  found = [
    test_hash(),
    test_hash(x_test=x ^ (np.arange(20) == 7)[:, None, None, None].astype(np.uint8)),
    test_hash(y_test=np.roll(y, 1)),
    test_hash(**both(lambda v: v.astype(np.float32))),
    test_hash(**both(lambda v: v.reshape(len(v), 2, 8, 3))),
  ]
  assert len(set(found)) == 5
  assert test_hash(x_test=np.asfortranarray(x), y_test=y.astype(">i8")) == found[0]
  assert test_hash(**both(lambda v: v.astype(">f4"))) == found[3]


@pytest.mark.parametrize(
  "shape, dtype, expected, kept, pixel_max",
  [
    ((4, 5), np.uint8, (4, 5, 1), np.uint8, 255),
    ((7,), np.float64, (7,), np.float64, 1),
    ((4, 5, 1), np.float32, (4, 5, 1), np.float32, 1),
    ((4, 5, 3), np.int64, (4, 5, 3), np.float32, 200),
    ((3,), bool, (3,), np.float32, 1),
    ((3,), np.uint16, (3,), np.float32, 200),
    ((3,), ">f8", (3,), np.float64, 1),
  ],
)
def test_shapes_and_dtypes_of_pixels(tmp_path, shape, dtype, expected, kept, pixel_max):
  given = arrays_of(shape=shape)
  whole = np.dtype(dtype).kind in "iu"
  for key in ("x_train", "x_test"):
    given[key] = (
      np.minimum(given[key], 200).astype(dtype) if whole else (given[key] / 255).astype(dtype)
    )
  given["x_train"].flat[0] = 200 if whole else 1
  data = load_dataset(save(tmp_path / "a.npz", **given), validation_fraction=0)
  assert data.x_train.shape == (60, *expected) and data.x_test.shape == (20, *expected)
  assert data.x_train.dtype == data.x_test.dtype == kept and data.pixel_max == pixel_max
  assert np.array_equal(data.x_train.reshape(60, -1), given["x_train"].reshape(60, -1))
  assert ("converted" in data.note) == (kept != np.dtype(dtype).newbyteorder("="))


def test_labels_of_any_integer_form(tmp_path):
  given = arrays_of()
  for change in (
    lambda y: y.astype(np.uint8),
    np.float64,
    lambda y: y.astype(">u4"),
    lambda y: y[:, None],
  ):
    changed = {key: change(given[key]) for key in ("y_train", "y_test")}
    data = load_dataset(save(tmp_path / "a.npz", **given | changed), validation_fraction=0)
    assert (
      np.array_equal(data.y_train, given["y_train"])
      and data.y_train.dtype == data.y_test.dtype == np.int32
    )


@pytest.mark.parametrize("dtype", ["U9", "S9"])
def test_string_labels_map_to_their_sorted_order(tmp_path, dtype):
  names, given = np.array(["ship", "cat", "bird", "dog"]).astype(dtype), arrays_of()
  words = {key: names[given[key]] for key in ("y_train", "y_test")}
  data = load_dataset(save(tmp_path / "a.npz", **given | words), validation_fraction=0)
  assert data.class_names == ("bird", "cat", "dog", "ship") and data.num_classes == 4
  assert [data.class_names[k] for k in data.y_train] == list(words["y_train"].astype("U9"))
  assert [data.class_names[k] for k in data.y_test] == list(words["y_test"].astype("U9"))
  for key, count, expected in (("label_names", 4, tuple("0123")), ("class_names", 3, None)):
    named = save(tmp_path / "c.npz", **given, **{key: np.arange(count).astype("U")})
    assert load_dataset(named).class_names == expected
  words["y_test"][3] = "frog"
  fault(
    save(tmp_path / "b.npz", **given | words),
    "b.npz: expected y_test labels that occur in y_train.*'frog'",
  )


def with_value(key, index, value, dtype=None):
  def change(given):
    given[key] = given[key].astype(dtype or given[key].dtype)
    given[key][index] = value

  return change


def replaced(key, make):
  return lambda given: given.update({key: make(given[key])})


@pytest.mark.parametrize(
  "change, pattern",
  [
    (
      with_value("x_train", (3, 1, 2, 0), np.nan, np.float32),
      r"x_train: expected finite pixels, got 1 .* index \(3, 1, 2, 0\)",
    ),
    (
      with_value("x_test", (slice(4, 6),), np.inf, np.float64),
      r"x_test: .* got 96 .* index \(4, 0, 0, 0\)",
    ),
    (
      with_value("y_train", 5, -1),
      r"y_train: expected integers 0..c-1, got 1 other values, the first -1 at index 5",
    ),
    (with_value("y_train", 5, 1.5, np.float64), r"the first 1.5 at index 5"),
    (with_value("y_test", 2, np.nan, np.float64), r"y_test: .* the first nan at index 2"),
    (with_value("y_test", 2, 4), r"expected y_test in 0..3, the classes of y_train, got 4"),
    (with_value("y_train", 2, 2**40), r"the first 1099511627776 at index 2"),
    (
      with_value("y_train", 2, 2**31 - 2),
      r"every class of 0..2147483646, got 5 classes from 0 to 2147483646",
    ),
    (
      replaced("y_train", lambda y: y + 1),
      r"every class of 0..4, got 4 classes from 1 to 4, without 0",
    ),
    (
      replaced("y_train", lambda y: y[:-1]),
      r"y_train with one label for each of 60 rows, got shape \(59,\)",
    ),
    (
      replaced("y_test", lambda y: np.eye(4)[y]),
      r"y_test with one label for each of 20 rows, got shape \(20, 4\)",
    ),
    (
      replaced("y_test", lambda y: y.astype("U2")),
      r"y_test: expected integer labels \(or strings in both splits\)",
    ),
    (
      replaced("x_train", lambda x: x[:0]),
      r"x_train: expected a non-empty .* got shape \(0, 4, 4, 3\)",
    ),
    (
      replaced("x_test", lambda x: x[..., :1]),
      r"rows of one shape.*\(60, 4, 4, 3\) uint8 and \(20, 4, 4, 1\) uint8",
    ),
    (replaced("x_test", lambda x: x / 255.0), r"both uint8 or neither"),
    (
      replaced("x_train", lambda x: x.astype("U3")),
      r"x_train: expected uint8 or floating pixels, got <U3",
    ),
    (
      lambda given: given.pop("y_test"),
      r"expected the arrays x_train, y_train, x_test, y_test; y_test missing, found",
    ),
    (
      lambda given: [given.pop(k) for k in ("x_train", "x_test")],
      r"x_train, x_test missing, found y_test, y_train",
    ),
  ],
)
def test_content_errors_name_the_actual_value(tmp_path, change, pattern):
  given = arrays_of()
  change(given)
  fault(save(tmp_path / "bad.npz", **given), "bad.npz: .*" + pattern)


class Trap(str):
  """Unpickling it would create a folder."""

  def __reduce__(self):
    return os.mkdir, (str(self),)


def test_pickles_are_rejected_without_unpickling(tmp_path):
  trap = Trap(tmp_path / "sprung")
  for labels in (
    np.array([trap] * 60, object),
    np.array([(trap, 1)] * 60, [("a", object), ("b", int)]),
  ):
    fault(
      save(tmp_path / "a.npz", **arrays_of() | {"y_train": labels}),
      r"y_train: .* got dtype .*never unpickled",
    )
  assert not (tmp_path / "sprung").exists()


def test_invalid_files(tmp_path):
  good = save(tmp_path / "good.npz", **arrays_of())
  content = (tmp_path / "good.npz").read_bytes()
  (tmp_path / "dir.npz").mkdir()
  (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
  (tmp_path / "empty.npz").write_bytes(b"")
  with open(tmp_path / "array.npz", "wb") as file:
    np.save(file, np.ones(3))
  flipped = bytearray(content)
  flipped[content.index(b"x_train.npy") + 400] ^= 1
  (tmp_path / "flipped.npz").write_bytes(flipped)
  np.savez(tmp_path / "none.npz")
  for name, pattern in {
    "dir": "expected an .npz file, got a directory",
    "absent": "expected an .npz file, got no such file",
    "cut": "not a zip file",
    "empty": "not a zip file",
    "array": "not a zip file",
    "flipped": "BadZipFile: Bad CRC",
    "none": "x_train, y_train, x_test, y_test missing, found nothing",
  }.items():
    fault(str(tmp_path / f"{name}.npz"), pattern)
  assert load_dataset(good).num_classes == 4
  blank = {
    "x_train": np.zeros((60, 64, 64, 3), np.uint8),
    "x_test": np.zeros((20, 64, 64, 3), np.uint8),
  }
  np.savez_compressed(
    tmp_path / "packed.npz", **arrays_of() | blank
  )  # compressed as much as deflate allows
  assert load_dataset(str(tmp_path / "packed.npz")).x_test.shape == (20, 64, 64, 3)


@pytest.mark.parametrize(
  "header, pattern",
  [
    (
      "{'descr': '|u1', 'fortran_order': False, 'shape': (900000000000, 3)}",
      "expected 2700000000000 bytes",
    ),
    ("{'descr': '|u1', 'fortran_order': False, 'shape': (-60, 3)}", "expected -180 bytes"),
    (
      "{'descr': '<U900000000', 'fortran_order': False, 'shape': (60, 3)}",
      "bytes for shape|readable .npz",
    ),
    ("{'descr': '|O', 'fortran_order': False, 'shape': (60, 3)}", "never unpickled"),
    ("{'descr': __import__('os'), 'shape': (1,)}", "readable .npz file .* ValueError"),
  ],
)
def test_headers_are_checked_against_the_file_before_allocation(tmp_path, header, pattern):
  path = tmp_path / "a.npz"
  save(path, **{k: v for k, v in arrays_of().items() if k != "x_train"})
  with zipfile.ZipFile(path, "a") as archive:
    text = header.ljust(117) + "\n"
    archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00\x76\x00" + text.encode() + bytes(180))
  fault(str(path), pattern)


def test_damaged_files_always_raise_the_documented_error(tmp_path):
  rng, path, seen = np.random.default_rng(5), tmp_path / "a.npz", set()
  np.savez_compressed(path, **arrays_of(8, 4, 2, (2, 2)))
  content = path.read_bytes()
  for _ in range(400):
    damaged = bytearray(content)
    for position in rng.integers(0, len(content), rng.integers(1, 4)):
      damaged[position] = rng.integers(0, 256)
    path.write_bytes(damaged[: rng.integers(1, len(content))] if rng.random() < 0.1 else damaged)
    try:
      seen.add(load_dataset(str(path)).num_classes)
    except DatasetError as error:
      seen.add("refused")
      assert "\n" not in str(error)
  assert seen == {2, "refused"}


def test_digits_are_stratified_and_test_split_ignores_seed():
  one, two = load_dataset("digits"), load_dataset("digits", seed=3)
  assert one.x_train.shape[1:] == (8, 8, 1) and one.x_train.dtype == np.float32
  assert (
    one.pixel_max == 16 == one.x_train.max() and one.num_classes == 10 and one.class_names[7] == "7"
  )
  assert one.hashes["test"] == two.hashes["test"] and one.hashes["train"] != two.hashes["train"]
  x, y = load_digits(return_X_y=True)
  joined = np.concatenate([one.x_train, one.x_validation, one.x_test]).reshape(-1, 64)
  labels = np.concatenate([one.y_train, one.y_validation, one.y_test])
  order, expected = np.lexsort(joined.T), np.lexsort(x.T)
  assert np.array_equal(joined[order], x[expected]) and np.array_equal(labels[order], y[expected])
  assert (np.abs(np.bincount(one.y_test) - np.bincount(y) / 5) < 1).all()


def test_bad_options_are_refused():
  for name, values in {
    "validation_fraction": (1, -0.1, float("nan")),
    "seed": (-1, 0.5, True),
    "test_fraction": (0, 1, -0.1, float("nan")),
  }.items():
    for value in values:
      with pytest.raises(ValueError, match=f"{name}: expected"):
        load_dataset("digits", **{name: value})


def test_import_and_file_reading_do_not_import_tensorflow(tmp_path):
  path = save(tmp_path / "a.npz", **arrays_of())
  code = (
    "import sys; from kipcore.datasets import load_dataset as load; load(sys.argv[1]); "
    "load('digits');"
    "sys.exit(any(m.startswith('tensorflow') for m in sys.modules))"
  )
  assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 0


def record_writer(path):
  """Writes the file format that the path ends in."""
  if ".array_record-" in path.name:
    from array_record.python import array_record_module

    return contextlib.closing(array_record_module.ArrayRecordWriter(str(path), "group_size:1"))
  return pytest.importorskip("tensorflow").io.TFRecordWriter(str(path))


def prepare_tiny(
  folder, name="tiny_shapes", splits=("train", "test"), label=None, file_format="tfrecord"
):
  """Writes a prepared TFDS dataset without a builder class, a download or a network."""
  tfds = pytest.importorskip("tensorflow_datasets")
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(5, 6, 3)),
      "label": label or tfds.features.ClassLabel(names=["disc", "square"]),
    }
  )
  target = folder / name / "1.0.0"
  target.mkdir(parents=True)
  rng, infos, written = np.random.default_rng(8), [], {}
  for split, n in zip(splits, (20, 10, 6)):
    x = rng.integers(0, 256, (n, 5, 6, 3)).astype(np.uint8)
    y = np.full(n, -1) if split == "unlabeled" else np.arange(n) % 2
    split = "test" if split == "unlabeled" else split
    with record_writer(target / f"{name}-{split}.{file_format}-00000-of-00001") as writer:
      for image, k in zip(x, y):
        writer.write(features.serialize_example({"image": image, "label": int(k)}))
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[n], num_bytes=0))
    written |= {f"x_{split}": x, f"y_{split}": y}
  tfds.folder_dataset.write_metadata(
    data_dir=str(target),
    features=features,
    split_infos=infos,
    supervised_keys=("image", "label"),
    check_data=False,  # can read TFRecord files only
  )
  return written


def test_prepared_tfds_folder_is_read_exactly_and_silently(tmp_path, capfd):
  written = prepare_tiny(tmp_path)
  capfd.readouterr()
  data = load_dataset("tiny_shapes", data_dir=tmp_path, validation_fraction=0)
  print("after")
  assert capfd.readouterr() == ("after\n", "")
  for field in ("x_train", "y_train", "x_test", "y_test"):
    assert np.array_equal(getattr(data, field), written[field])
  assert (
    data.class_names == ("disc", "square") and data.x_train.dtype == np.uint8 and data.note == ""
  )


WITHOUT_TENSORFLOW = """
import json, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)
from kipcore.datasets import DatasetError, load_dataset
try:
  data = load_dataset(sys.argv[1], data_dir=sys.argv[2], train_rows=8, validation_fraction=0)
except DatasetError as error:
  sys.exit(str(error))
print(json.dumps([data.x_train.tolist(), data.y_train.tolist(), data.x_test.tolist(), data.y_test.tolist()]))
"""


def test_array_records_are_read_without_tensorflow(tmp_path):
  prepare_tiny(tmp_path, "tiny_records")
  prepare_tiny(tmp_path, "tiny_arrays", file_format="array_record")

  def run(name):
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, name, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)

  expected = load_dataset("tiny_records", tmp_path, train_rows=8, validation_fraction=0)
  here = load_dataset("tiny_arrays", tmp_path, train_rows=8, validation_fraction=0)
  found = json.loads(run("tiny_arrays").stdout)
  for field, value in zip(("x_train", "y_train", "x_test", "y_test"), found):
    assert np.array_equal(getattr(expected, field), value)
    assert np.array_equal(getattr(here, field), value)
  message = (
    "tiny_records: expected TensorFlow to be installed, got .*; pip install 'kipcore\\[tfds\\]'"
  )
  assert re.fullmatch(message + "\n", run("tiny_records").stderr)


def test_missing_tfds_is_reported_in_one_line(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  tfds_data.builder_names.cache_clear()
  message = (
    r"mnist: expected tensorflow-datasets to be installed, got .*; pip install 'kipcore\[tfds\]'"
  )
  fault("mnist", message)
  tfds_data.builder_names.cache_clear()


@pytest.mark.parametrize(
  "splits, note, size",
  [
    (("only",), "split is called only", 4),
    (("train", "validation"), "validation split is the test split", 10),
    (("train", "unlabeled", "validation"), "validation split is the test split", 6),
    (("train",), "test is every fifth row of each class", 4),
    (("train", "test", "validation"), "", 10),
  ],
)
def test_tfds_without_a_labeled_test_split(tmp_path, splits, note, size):
  prepare_tiny(tmp_path, splits=splits)
  data = load_dataset("tiny_shapes", data_dir=tmp_path)
  assert note in data.note and bool(note) == bool(data.note) and len(data.y_test) == size


def test_invalid_tfds_names(tmp_path, monkeypatch):
  tfds = pytest.importorskip("tensorflow_datasets")
  fault(
    "mnist", "mnist: expected data_dir to be an existing directory", data_dir=tmp_path / "absent"
  )
  fault(
    "mnits", "unknown dataset 'mnits': expected digits, .*did you mean mnist", data_dir=tmp_path
  )
  fault(
    "no such thing", "no such thing: expected a dataset that TFDS can load in", data_dir=tmp_path
  )
  fault("imdb_reviews", "expected a TFDS dataset of images with class labels", data_dir=tmp_path)
  fault(
    "cats_vs_dogs",
    r"expected images of one size, got image shape \(None, None, 3\)",
    data_dir=tmp_path,
  )
  prepare_tiny(tmp_path, name="tiny_numbers", label=tfds.features.Scalar(np.int64))
  fault("tiny_numbers", "images with class labels", data_dir=tmp_path)
  prepare_tiny(tmp_path, name="tiny_broken")
  file = tmp_path / "tiny_broken" / "1.0.0" / "tiny_broken-train.tfrecord-00000-of-00001"
  file.write_bytes(file.read_bytes()[:-9])
  fault("tiny_broken", "expected a dataset that TFDS can load in", data_dir=tmp_path)
  prepare_tiny(tmp_path, name="tiny_odd", splits=("fold1", "fold2"))
  fault("tiny_odd", "expected a split called train, got fold1, fold2", data_dir=tmp_path)
  monkeypatch.setattr(
    socket, "getaddrinfo", lambda *_: open(tmp_path / "no network")
  )  # an OSError, as in TFDS
  monkeypatch.setattr(urllib.request, "getproxies", dict)
  fault(
    "kmnist",
    "kmnist: expected it prepared in .*, or a network to download it; got neither",
    data_dir=tmp_path,
  )


@pytest.mark.slow
def test_mnist_through_tfds_equals_the_original_files(tmp_path):
  script = needs(SHARED_DATA / "prepare_tfds.py")
  pytest.importorskip("tensorflow_datasets")
  folder = os.environ.get("TFDS_DATA_DIR", "")  # a prepared dataset saves half a minute
  if not os.path.isdir(os.path.join(folder, "mnist")):
    folder = str(tmp_path)
    subprocess.run(
      [sys.executable, script, "--data_dir", folder, "--datasets=mnist"],
      check=True,
      capture_output=True,
    )
  data = load_dataset("mnist", data_dir=folder)
  assert (
    len(data.y_validation) == 6_000 and data.class_names == tuple("0123456789") and data.note == ""
  )

  def idx(name, header):
    with gzip.open(SHARED_DATA / "mnist" / f"{name}-ubyte.gz") as file:
      return np.frombuffer(file.read(), np.uint8, offset=header)

  train = row_hashes(data.x_train, data.y_train) + row_hashes(data.x_validation, data.y_validation)
  for found, name in ((train, "train"), (row_hashes(data.x_test, data.y_test), "t10k")):
    images, labels = idx(f"{name}-images-idx3", 16).reshape(-1, 784), idx(f"{name}-labels-idx1", 8)
    assert sorted(found) == sorted(row_hashes(images, labels))


@pytest.mark.parametrize("shape", [(8, 3, 8, 9), (8, 1, 28, 28)])
def test_arrays_that_look_like_channels_first_get_a_note(tmp_path, shape):
  path = tmp_path / "a.npz"
  x, y = np.zeros(shape, np.uint8), np.arange(8) % 2
  np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
  data = load_dataset(str(path), validation_fraction=0)
  assert data.x_train.shape == shape and f"x_train has shape {shape}" in data.note
  assert "NCHW" in data.note and f"with {shape[3]} channels" in data.note
  x = x.transpose(0, 2, 3, 1)
  np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
  assert "NCHW" not in load_dataset(str(path), validation_fraction=0).note


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_complex_arrays_are_named_as_such(tmp_path, dtype, key):
  path = tmp_path / "a.npz"
  x, y = np.zeros((4, 3)), np.arange(4) % 2
  arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
  np.savez(path, **(arrays | {key: arrays[key].astype(dtype)}))
  with pytest.raises(
    DatasetError, match=f"{key}.*got complex numbers .{np.dtype(dtype)}"
  ) as caught:
    load_dataset(str(path))
  assert "pickle" not in str(caught.value)
