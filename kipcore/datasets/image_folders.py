"""Folders of images, one folder per class, as arrays, by the rules of `decoding`.

Files that are not read and images that are converted are counted in `note`.
"""

import collections
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from kipcore.datasets import decoding
from kipcore.types import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Folders of the test split next to a folder called train.
_TEST = ("test", "val", "validation")
_MAX_LISTED = 5  # kinds of skipped files in a note


def is_named(name: str) -> bool:
  """Whether a dataset name is a folder of images: one that exists and is not TFDS's, or a name that must be a path."""
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return not any(path.glob("*/dataset_info.json")) and not any(path.glob("*/*/dataset_info.json"))
  return name.startswith((".", "~", os.sep)) or name.endswith(os.sep)


def read(path: str | os.PathLike, pick: Callable) -> dict[str, Any]:
  """Read the images of `CLASS/*`, or of `train/CLASS/*` and `test/CLASS/*` (val, validation), ordered by name.

  Args:
    path: a folder. Files with other suffixes than `SUFFIXES`, hidden files, and folders within class folders are
      skipped and counted in `note`.
    pick: `(labels, cut) -> training rows, test rows`; with `cut`, it also separates test rows from the training
      rows. Only the headers of other images are read.

  Returns:
    x_train uint8 `(n, h, w, c)`, y_train `(n,)` class folder names, x_test, y_test, and `note`; c is 1 if all images
    are gray, else 3.

  Raises:
    DatasetError: for another folder structure, images of several sizes, or an image that cannot be read.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise DatasetError(
      f"{path}: expected a folder with a folder of images for each class, or a file that ends in .npz, .parquet or .arrow; got "
      + ("a file" if path.exists() else "no such folder")
    )
  skipped: collections.Counter[str] = collections.Counter()
  splits = [path]
  if (path / "train").is_dir():
    splits = [path / "train", *(path / name for name in _TEST if (path / name).is_dir())][:2]
    if len(splits) < 2:
      raise DatasetError(
        f"{path}: expected a folder called {', '.join(_TEST[:-1])} or {_TEST[-1]} beside train, got none"
      )
    for entry in sorted(set(path.iterdir()) - set(splits)):
      skipped[f"folder {entry.name}" if entry.is_dir() else _kind(entry)] += 1
  found = [_files(split, skipped) for split in splits]
  files = [
    np.array([file for each in of_class.values() for file in each], object) for of_class in found
  ]
  labels = [
    np.repeat(list(of_class), [len(each) for each in of_class.values()]) for of_class in found
  ]
  gray, size, notes = decoding.check([file for each in files for file in each])
  if skipped:
    kinds = [f"{count} {kind}" for kind, count in skipped.most_common()]
    more = f" and {len(kinds) - _MAX_LISTED} more kinds" * (len(kinds) > _MAX_LISTED)
    notes.append(
      f"{sum(skipped.values())} files or folders were skipped ({', '.join(kinds[:_MAX_LISTED])}{more})"
    )
  train, test = pick(labels[0], cut=len(splits) == 1)
  if len(splits) == 1:
    files, labels = [files[0], files[0][test]], [labels[0], labels[0][test]]
  files[0], labels[0] = files[0][train], labels[0][train]
  x_train, x_test = (
    np.stack([decoding.pixels(file, gray, size) for file in rows]) for rows in files
  )
  return {
    "x_train": x_train,
    "y_train": labels[0],
    "x_test": x_test,
    "y_test": labels[1],
    "note": "; ".join(notes),
  }


def _kind(entry: pathlib.Path) -> str:
  """Name of a kind of skipped entries."""
  if entry.name.startswith("."):
    return "hidden"
  return "folder" if entry.is_dir() else entry.suffix.lower() or "without suffix"


def _files(
  folder: pathlib.Path, skipped: collections.Counter[str]
) -> dict[str, list[pathlib.Path]]:
  """The images of each class folder by class name; counts what is skipped."""
  entries = sorted(folder.iterdir())
  classes = [each for each in entries if each.is_dir() and not each.name.startswith(".")]
  skipped.update(_kind(entry) for entry in entries if entry not in classes)
  if not classes:
    raise DatasetError(
      f"{folder}: expected a folder for each class, with {', '.join(SUFFIXES)} files in it; got no folder"
    )
  found = {}
  for each in classes:
    entries = sorted(each.iterdir())
    read = [
      file
      for file in entries
      if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not file.is_dir()
    ]
    if not read:
      raise DatasetError(
        f"{folder}: expected {', '.join(SUFFIXES)} files in each class folder, got none in {each.name}"
      )
    skipped.update(_kind(entry) for entry in set(entries) - set(read))
    found[each.name] = read
  return found
