"""Parquet and Arrow files of encoded images with a class column, as Hugging Face `datasets` writes them.

Files and splits:

| path | splits |
|---|---|
| one `.parquet` or `.arrow` file | one |
| folder of `DatasetDict.save_to_disk` (`dataset_dict.json`) | its subfolders |
| folder of `Dataset.save_to_disk` (`state.json`) | one |
| other folder of such files, or its folder `data` or only folder with such files | by the words train, test, validation, valid, val, dev in the file name, or in the name of the subfolder; a file without such a word is for training |

Columns: the images are the only column with feature type Image, or of encoded bytes (alone, or in the field `bytes` of a
struct). The classes are the only column with feature type ClassLabel, or of integers or strings; if there are several,
the first of `label`, `labels`, `fine_label`, `class`, `target`. Images are decoded by the rules of `decoding`.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kipcore.datasets import decoding
from kipcore.types import DatasetError

SUFFIXES = (".parquet", ".arrow")
_SPLITS = {
  "train": "train",
  "training": "train",
  "test": "test",
  "testing": "test",
  "validation": "validation",
  "valid": "validation",
  "val": "validation",
  "dev": "validation",
}
_LABELS = ("label", "labels", "fine_label", "class", "target")
_BATCH = 256  # rows of a Parquet file in memory


class _Columns(NamedTuple):
  """Names of the columns of a file, and its class names, if they are recorded."""

  image: str
  label: str
  class_names: tuple[str, ...] | None
  other_labels: tuple[str, ...]


def is_named(name: str) -> bool:
  """Whether a dataset name is a Parquet or Arrow file, or a folder that contains such files itself or in its folders."""
  path = pathlib.Path(name).expanduser()
  return name.lower().endswith(SUFFIXES) or path.is_dir() and bool(_tables(path))


def read(path: str, pick: Callable) -> dict[str, Any]:
  """The splits of Parquet or Arrow files.

  Args:
    path: a file or folder.
    pick: `(labels, cut) -> training rows, test rows`; with `cut`, it also separates test rows from the training
      rows. Only the headers of other images are read.

  Returns:
    x_train uint8 `(n, h, w, c)`, y_train `(n,)`, x_test, y_test, `class_names`, `note`; c is 1 if all images are gray,
    else 3.

  Raises:
    DatasetError: for other columns or splits, images of several sizes or without bytes, or if pyarrow is not installed.
  """
  _pyarrow()
  splits = _files(pathlib.Path(path))
  main = "train" if len(splits) > 1 else next(iter(splits))
  if main not in splits:
    raise DatasetError(f"{path}: expected a split called train, got {', '.join(sorted(splits))}")
  columns = _columns(splits[main][0])
  files, labels, notes = [splits[main]], [_labels(splits[main], columns)], []
  used = {main}
  if not len(labels[0]):
    raise DatasetError(f"{path}: expected at least one row for training, got none")
  for split in ("test", "validation"):
    if split in splits and split not in used and len(files) == 1:
      found = _labels(splits[split], columns)
      if found.dtype.kind != "i" or (found >= 0).all():  # -1 is the class of rows without one
        files, labels = [*files, splits[split]], [*labels, found]
        used.add(split)
        notes += ["the validation split is the test split"] * (split == "validation")
  if unused := sorted(set(splits) - used):
    notes.append(f"splits that were not read: {', '.join(unused)}")
  if columns.other_labels:
    notes.append(
      f"the classes are those of column {columns.label}, not {', '.join(columns.other_labels)}"
    )
  gray, size, converted = decoding.check(
    image for of_split in files for image in _images(of_split, columns.image)
  )
  train, test = pick(labels[0], cut=len(files) == 1)
  rows = [train, test] if len(files) == 1 else [train, np.arange(len(labels[1]))]
  files, labels = [files[0], files[-1]], [labels[0], labels[-1]]
  pixels = [
    _pixels(split, chosen, len(y), columns.image, gray, size)
    for split, chosen, y in zip(files, rows, labels)
  ]
  return {
    "x_train": pixels[0],
    "y_train": labels[0][rows[0]],
    "x_test": pixels[1],
    "y_test": labels[1][rows[1]],
    "class_names": columns.class_names,
    "note": "; ".join([*notes, *converted]),
  }


def _pyarrow():
  """The modules pyarrow, pyarrow.ipc and pyarrow.parquet."""
  try:
    import pyarrow
    from pyarrow import ipc, parquet
  except ImportError as error:
    raise DatasetError(
      f"expected pyarrow to be installed for Parquet and Arrow files, got {error}; pip install 'kipcore[arrow]'"
    ) from error
  return pyarrow, ipc, parquet


def _tables(folder: pathlib.Path) -> list[pathlib.Path]:
  """Files of the folder, or if there are none of its folders, without hidden ones and caches of computed datasets."""
  for pattern in ("*", "*/*"):
    found = [
      file
      for suffix in SUFFIXES
      for file in folder.glob(pattern + suffix)
      if not any(part.startswith(".") for part in file.relative_to(folder).parts)
      and not file.name.startswith("cache-")
      and file.is_file()
    ]
    if found:
      return sorted(found)
  return []


def _files(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """The files of each split, in order."""
  if not path.exists():
    raise DatasetError(
      f"{path}: expected a Parquet or Arrow file or a folder of them, got no such file"
    )
  if not path.is_dir():
    return {"train": [path]}
  if (path / "dataset_dict.json").is_file():
    names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    return {_SPLITS.get(name, name): _saved(path / _plain(name)) for name in names}
  if (path / "state.json").is_file():
    return {"train": _saved(path)}
  files = _tables(path)
  folders = sorted({file.parent for file in files})
  if len(folders) > 1 and all(folder.name.lower() in _SPLITS for folder in folders):
    name_of = lambda file: file.parent.name
  else:
    if path / "data" in folders:
      folders = [path / "data"]
    if len(folders) > 1:
      raise DatasetError(
        f"{path}: expected Parquet or Arrow files in one folder, got them in "
        f"{', '.join(folder.name for folder in folders)}; name one of these folders"
      )
    files = [file for file in files if file.parent == folders[0]]
    name_of = lambda file: file.stem
  splits: dict[str, list[pathlib.Path]] = {}
  for file in files:
    words = [word for word in re.split("[^a-z]+", name_of(file).lower()) if word in _SPLITS]
    splits.setdefault(_SPLITS[words[-1]] if words else "train", []).append(file)
  return splits


def _plain(name) -> str:
  """The name of a file or folder in a metadata file, which must be in the same folder."""
  if not isinstance(name, str) or pathlib.PurePath(name).name != name:
    raise DatasetError(f"expected names of files in the same folder, got {name!r:.100}")
  return name


def _saved(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of `Dataset.save_to_disk`."""
  state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
  return [folder / _plain(each["filename"]) for each in state["_data_files"]]


@contextlib.contextmanager
def _arrow(file: pathlib.Path):
  """A reader of an Arrow file in the stream format, which `datasets` writes, or the file format."""
  pyarrow, ipc, _ = _pyarrow()
  with open(file, "rb") as stream:
    start = stream.read(6)
  with pyarrow.memory_map(str(file)) as source:
    yield ipc.open_file(source) if start == b"ARROW1" else ipc.open_stream(source)


def _schema(file: pathlib.Path):
  if file.suffix.lower() == ".parquet":
    return _pyarrow()[2].read_schema(file)
  with _arrow(file) as reader:
    return reader.schema


def _batches(file: pathlib.Path, column: str) -> Iterator:
  """One column of a file in parts that fit in memory."""
  if file.suffix.lower() == ".parquet":
    with _pyarrow()[2].ParquetFile(file) as table:
      for batch in table.iter_batches(_BATCH, columns=[column]):
        yield batch.column(0)
    return
  with _arrow(file) as reader:
    batches = (
      (reader.get_batch(i) for i in range(reader.num_record_batches))
      if hasattr(reader, "num_record_batches")
      else reader
    )
    for batch in batches:
      part = batch.column(column)
      part.validate(full=True)  # offsets of a damaged file may point outside the data
      yield part


def _columns(file: pathlib.Path) -> _Columns:
  """The columns of images and classes."""
  pyarrow, schema = _pyarrow()[0], _schema(file)
  kinds = pyarrow.types
  recorded = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
  features = (recorded.get("info") or {}).get("features") or {}
  feature = lambda name: (
    features[name].get("_type") if isinstance(features.get(name), dict) else None
  )
  is_bytes = lambda kind: kinds.is_binary(kind) or kinds.is_large_binary(kind)

  def is_encoded(kind) -> bool:
    if kinds.is_struct(kind):
      return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return is_bytes(kind)

  def is_class(kind) -> bool:
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    return kinds.is_integer(kind) or kinds.is_string(kind) or kinds.is_large_string(kind)

  fits = lambda test, name: (
    [field.name for field in schema if feature(field.name) == name and test(field.type)]
    or [field.name for field in schema if test(field.type)]
  )
  images, labels = fits(is_encoded, "Image"), fits(is_class, "ClassLabel")
  shown = ", ".join(f"{field.name} ({field.type})" for field in schema)[:300]
  if len(images) != 1:
    raise DatasetError(f"{file}: expected one column of encoded images, got the columns {shown}")
  label = next((name for name in _LABELS if name in labels), labels[0] if len(labels) == 1 else "")
  if not label:
    raise DatasetError(
      f"{file}: expected one column of classes (integers or strings), or one called {', '.join(_LABELS)}; got the "
      f"columns {shown}"
    )
  names = features[label].get("names") if feature(label) == "ClassLabel" else None
  return _Columns(
    images[0],
    label,
    tuple(map(str, names)) if names else None,
    tuple(name for name in labels if name != label),
  )


def _labels(files: list[pathlib.Path], columns: _Columns) -> np.ndarray:
  """The classes of the rows of a split, as integers or strings."""
  found = []
  for file in files:
    names = _schema(file).names
    if missing := [name for name in columns[:2] if name not in names]:
      raise DatasetError(
        f"{file}: expected the columns {columns.image} and {columns.label}, as in the other files; {missing[0]} missing"
      )
    if (own := _columns(file).class_names) != columns.class_names:
      raise DatasetError(
        f"{file}: expected the class names of the other files, {columns.class_names!r:.100}, got {own!r:.100}"
      )
    for part in _batches(file, columns.label):
      if part.null_count:
        raise DatasetError(f"{file}: expected a class for each row, got {part.null_count} without")
      found += part.to_pylist()
  return np.array(found) if found else np.empty(0, np.int64)


def _images(files: list[pathlib.Path], column: str, wanted=None) -> Iterator[decoding.Encoded]:
  """The encoded images of all rows, or of those for which `wanted` is true."""
  first = 0
  for file in files:
    start = first
    for part in _batches(file, column):
      rows = np.arange(len(part))
      for i in rows if wanted is None else rows[wanted[first : first + len(part)]]:
        name, value = f"{file}, row {first - start + i}", part[int(i)].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
          where = (
            f"only the path {value['path']}"
            if isinstance(value, dict) and value.get("path")
            else "none"
          )
          raise DatasetError(f"{name}: expected the bytes of an image, got {where}")
        yield decoding.Encoded(name, content)
      first += len(part)


def _pixels(files, rows: np.ndarray, total: int, column: str, gray: bool, size) -> np.ndarray:
  """The decoded images of some rows, ascending, of a split with `total` rows."""
  wanted = np.zeros(total, bool)
  wanted[rows] = True
  x = np.empty((len(rows), size[1], size[0], 1 if gray else 3), np.uint8)
  for i, image in enumerate(_images(files, column, wanted)):
    x[i] = decoding.pixels(image, gray, size)
  return x
