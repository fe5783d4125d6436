"""Parquet and Arrow files with images and classes."""

import io
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from kipcore.datasets import DatasetError, arrow_tables, load_dataset

pa = pytest.importorskip("pyarrow")
from pyarrow import ipc, parquet  # noqa: E402

DATA = pathlib.Path(__file__).parent / "data"  # written by make_huggingface_files.py there
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 4, 5, 3), np.uint8)


def encoded(pixels, kind="PNG", **options) -> bytes:
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, kind, **options)
  return stream.getvalue()


def table(rows, labels=None, names=None, image="image", label="label", **columns):
  """A table in the layout of Hugging Face datasets; without the metadata if there are no names."""
  content = [
    each if isinstance(each, dict) else {"bytes": each, "path": None}
    for each in map(as_bytes, rows)
  ]
  kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  labels = np.arange(len(content)) % 2 if labels is None else labels
  made = pa.table({image: pa.array(content, kind), label: pa.array(labels), **columns})
  if names is None:
    return made
  features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
  return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def as_bytes(row):
  return encoded(row) if isinstance(row, np.ndarray) else row


def write(path, content, **options) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".parquet":
    parquet.write_table(content, path, **options)
  else:
    with ipc.new_stream(path, content.schema) as stream:
      stream.write_table(content, **options)
  return str(path)


def load(path, **options):
  return load_dataset(str(path), **{"validation_fraction": 0, **options})


def colors(first, count):
  """Corner pixels of the images of make_huggingface_files.py."""
  return np.arange(first, first + count)[:, None] * [1, 2, 3]


def test_files_written_by_datasets_are_read():
  data = load(DATA / "saved")
  assert data.class_names == ("cat", "dog") and data.x_train.shape == (6, 4, 5, 3)
  assert data.note == "" and data.x_train.dtype == np.uint8 and data.pixel_max == 255
  for x, expected in ((data.x_train, colors(0, 6)), (data.x_test, colors(40, 4))):
    assert np.array_equal(x, np.broadcast_to(expected[:, None, None], x.shape))
  assert data.y_train.tolist() == [0, 1] * 3 and data.y_test.tolist() == [0, 1] * 2
  # A single split: with the fraction 1/3, the third row of each class.
  for path in (DATA / "saved" / "train", DATA / "train.parquet"):
    data = load(path, test_fraction=1 / 3)
    assert np.array_equal(data.x_train[:, 0, 0], colors(0, 4)) and data.class_names[1] == "dog"
    assert np.array_equal(data.x_test[:, 3, 4], colors(4, 2)) and "no test split" in data.note


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_parts_and_batches_are_joined_in_order(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(arrow_tables, "_BATCH", 3)
  options = {"row_group_size": 4} if suffix == ".parquet" else {"max_chunksize": 4}
  for part, rows in enumerate((slice(0, 7), slice(7, 8), slice(8, 16))):
    write(tmp_path / f"train-{part:05d}-of-00003{suffix}", table(PIXELS[rows]), **options)
  write(tmp_path / f"test-00000-of-00001{suffix}", table(PIXELS[16:]), **options)
  data = load(tmp_path)
  assert np.array_equal(data.x_train, PIXELS[:16]) and np.array_equal(data.x_test, PIXELS[16:])
  part = load(tmp_path, train_rows=5)
  places = [int(np.flatnonzero((PIXELS == x).all(axis=(1, 2, 3)))[0]) for x in part.x_train]
  assert len(places) == 5 and places == sorted(places)
  assert part.y_train.tolist() == data.y_train[places].tolist()
  assert part.hashes["test"] == data.hashes["test"]


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 3


@pytest.mark.parametrize(
  "kind, options",
  [
    ("PNG", {}),
    ("PNG", {"exif": ORIENTED}),
    ("JPEG", {"exif": ORIENTED}),
    ("WEBP", {"exif": ORIENTED}),
    ("BMP", {}),
    ("GIF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
  ],
)
def test_every_format_is_read_as_pillow_reads_it(tmp_path, kind, options):
  content = encoded(PIXELS[0], kind, **options)
  data = load(write(tmp_path / "a.parquet", table([content] * 10)))
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
  assert (data.x_train == expected).all() and data.x_test.shape == (2, 4, 5, 3)


def test_columns_are_found_by_type_and_name(tmp_path):
  gray = [encoded(p[..., 0]) for p in PIXELS[:10]]
  words = pa.array(["b", "a"] * 5).dictionary_encode()
  plain = pa.table(
    {"id": pa.array(np.zeros(10)), "img": pa.array(gray, pa.large_binary()), "kind": words}
  )
  data = load(write(tmp_path / "a.parquet", plain))
  assert data.class_names == ("a", "b") and data.y_train.tolist() == [1, 0] * 4
  assert np.array_equal(data.x_train, PIXELS[:8, :, :, :1])
  # CIFAR-100 has two levels of classes.
  two = table(gray, label="fine_label", coarse_label=pa.array([0] * 10))
  data = load(write(tmp_path / "b.arrow", two))
  assert data.num_classes == 2 and "of column fine_label, not coarse_label" in data.note
  with ipc.new_file(tmp_path / "c.arrow", two.schema) as file:  # Arrow's file format
    file.write_table(two)
  assert load(tmp_path / "c.arrow").hashes == data.hashes


@pytest.mark.parametrize(
  "files, size, note",
  [
    ({"data/train-0.parquet": 10, "data/test-0.parquet": 4, "other/x.parquet": 2}, 4, ""),
    ({"mnist-train.arrow": 10, "mnist-validation.arrow": 4}, 4, "validation split is the test"),
    ({"train/0.parquet": 10, "test/0.parquet": 4, "val/0.parquet": 6}, 4, "not read: validation"),
    ({"plain_text/train-0.parquet": 10, "plain_text/valid-0.parquet": 6}, 6, "the test split"),
    ({"0.parquet": 6, "1.parquet": 4}, 2, "test is every fifth row of each class"),
    ({"a.arrow": 10, "cache-12ab.arrow": 4, ".hidden.arrow": 5}, 2, "test is every fifth row"),
  ],
)
def test_splits_are_named_by_files_and_folders(tmp_path, files, size, note):
  for name, count in files.items():
    write(tmp_path / name, table(PIXELS[:count]))
  data = load(tmp_path)
  assert len(data.y_test) == size and note in data.note and bool(note) == bool(data.note)
  assert len(data.y_train) == (8 if "every fifth" in note else 10)


def test_a_test_split_without_labels_is_not_used(tmp_path):
  write(tmp_path / "train-0.parquet", table(PIXELS[:10], names=["x", "y"]))
  write(tmp_path / "test-0.parquet", table(PIXELS[:4], np.full(4, -1), names=["x", "y"]))
  data = load(tmp_path)
  assert len(data.y_test) == 2 and "not read: test" in data.note and data.class_names == ("x", "y")


def two_folders(path):
  for name in ("a", "b"):
    write(path / name / "0.parquet", table(PIXELS[:10]))
  return path


def saved_elsewhere(path):
  shutil.copytree(DATA / "saved" / "train", path / "set")
  (path / "set" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
  return path / "set"


def other_names(path):
  write(path / "train.parquet", table(PIXELS[:10], names=["x", "y"]))
  write(path / "test.parquet", table(PIXELS[:4], names=["y", "x"]))
  return path


def other_columns(path):
  write(path / "train.parquet", table(PIXELS[:10]))
  write(path / "test.parquet", table(PIXELS[:4], label="target"))
  return path


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda p: p / "absent.parquet", "got no such file"),
    (
      lambda p: write(p / "a.parquet", table([*PIXELS[:9], None])),
      "row 9: .*bytes of an image, got none",
    ),
    (
      lambda p: write(p / "a.arrow", table([{"bytes": None, "path": "/x/y.png"}] * 9)),
      "row 0: expected the bytes of an image, got only the path /x/y.png",
    ),
    (
      lambda p: write(p / "a.parquet", table([*PIXELS[:9], b"no"])),
      "a.parquet, row 9: expected an image",
    ),
    (
      lambda p: write(p / "a.parquet", table([*PIXELS[:9], PIXELS[0, :3]])),
      "row 9: expected all images of one size, got 5 x 3, where .*row 0 is 5 x 4",
    ),
    (
      lambda p: write(p / "a.parquet", table(PIXELS, other=pa.array([b""] * 20))),
      "one column of encoded images, got the columns image .*, other .binary.",
    ),
    (
      lambda p: write(p / "a.parquet", table(PIXELS, np.zeros(20))),
      r"one column of classes .*label .double",
    ),
    (lambda p: write(p / "a.parquet", table(PIXELS, pa.array([0, None] * 10))), "got 10 without"),
    (lambda p: write(p / "a.parquet", table([])), "at least one row for training"),
    (lambda p: write(p / "a.parquet", table(PIXELS[:4])), "expected a test split, or a class with"),
    (two_folders, "got them in a, b; name one of these folders"),
    (saved_elsewhere, "files in the same folder, got '../x.arrow'"),
    (other_names, "class names of the other files"),
    (other_columns, "test.parquet: expected the columns image and label"),
  ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, make, message):
  with pytest.raises(DatasetError, match=message) as caught:
    load(make(tmp_path))
  assert "\n" not in str(caught.value)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
  path = write(tmp_path / "a.parquet", table(PIXELS))
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(DatasetError, match=r"pip install 'kipcore\[arrow\]'"):
    load(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damaged_files_raise_the_documented_error(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  content, rng, seen = pathlib.Path(write(path, table(PIXELS[:10]))).read_bytes(), RNG, set()
  for i in range(150):
    damaged = bytearray(content)
    for position in rng.integers(0, len(content), 1 + i % 3):
      damaged[position] = rng.integers(0, 256)
    path.write_bytes(damaged[: rng.integers(0, len(content))] if i % 5 == 0 else damaged)
    try:
      seen.add(load(path).num_classes > 1)
    except DatasetError as error:
      seen.add("refused")
      assert "\n" not in str(error)
  assert seen == {True, "refused"}
