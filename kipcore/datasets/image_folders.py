"""Reads images from class folders as arrays; PNG and JPEG, without resizing."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from kipcore.types import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg")
# Folders of the test split, if there is a folder named train.
_TEST = ("test", "val", "validation")


def is_named(name: str) -> bool:
  """Whether a dataset name is a folder: an existing one that is not a TFDS directory, or a path."""
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return not any(path.glob("*/dataset_info.json")) and not any(path.glob("*/*/dataset_info.json"))
  return name.startswith((".", "~", os.sep)) or name.endswith(os.sep)


def read(path, pick: Callable) -> dict:
  """The images of `CLASS/*.png`, or of `train/CLASS/*.png` and `test/CLASS/*.png` (or val/, validation/), in file name order.

  Args:
    path: a folder. Other and hidden files, and folders within class folders, are ignored.
    pick: `(labels, cut) -> rows for training, rows for testing`, the latter if it must `cut` them from the former. Of all other
      images only the headers are read.

  Returns:
    x_train uint8 `(n, h, w, c)`, y_train `(n,)` the names of the class folders, x_test, y_test, and `note`. One channel if all images are
    gray, otherwise three.

  Raises:
    DatasetError: for a folder with another structure, images of different sizes, or an unreadable image.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise DatasetError(
      f"{path}: expected a folder with a folder of images for each class, or a file that ends in .npz; got "
      + ("a file" if path.exists() else "no such folder")
    )
  splits = [path]
  if (path / "train").is_dir():
    splits = [path / "train", *(path / name for name in _TEST if (path / name).is_dir())][:2]
    if len(splits) < 2:
      raise DatasetError(
        f"{path}: expected a folder called {', '.join(_TEST[:-1])} or {_TEST[-1]} beside train, got none"
      )
  found = [_files(split) for split in splits]
  files = [
    np.array([file for each in of_class.values() for file in each], object) for of_class in found
  ]
  labels = [
    np.repeat(list(of_class), [len(each) for each in of_class.values()]) for of_class in found
  ]
  gray, notes = _checked([file for each in files for file in each])
  train, test = pick(labels[0], cut=len(splits) == 1)
  if len(splits) == 1:
    if not len(test):
      raise DatasetError(
        f"{path}: expected 5 images of a class or more, of which every fifth is for testing, or folders train and test; "
        f"got {max(map(len, found[0].values()))} at most"
      )
    files, labels = [files[0], files[0][test]], [labels[0], labels[0][test]]
    notes = ["test is every fifth image of each class", *notes]
  files[0], labels[0] = files[0][train], labels[0][train]
  x_train, x_test = (
    np.stack([_pixels(file, "L" if gray else "RGB") for file in rows]) for rows in files
  )
  return {
    "x_train": x_train,
    "y_train": labels[0],
    "x_test": x_test,
    "y_test": labels[1],
    "note": "; ".join(notes),
  }


def _files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """The images of each class folder, by name."""
  classes = sorted(
    each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
  )
  if not classes:
    raise DatasetError(
      f"{folder}: expected a folder for each class, with {', '.join(SUFFIXES)} files in it; got no folder"
    )
  found = {
    each.name: sorted(
      file
      for file in each.iterdir()
      if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    for each in classes
  }
  for name, files in found.items():
    if not files:
      raise DatasetError(
        f"{folder}: expected {', '.join(SUFFIXES)} files in each class folder, got none in {name}"
      )
  return found


def _checked(files: list[pathlib.Path]) -> tuple[bool, list[str]]:
  """Whether all images are gray, from their headers, and notes on what 8-bit gray or color loses."""
  size: tuple[int, int] | None = None
  modes: dict[str, pathlib.Path] = {}
  for file in files:
    with _opened(file) as image:
      size = size or image.size
      if image.size != size:
        raise DatasetError(
          f"{file}: expected all images of one size, got {image.size[0]} x {image.size[1]}, where {files[0]} is "
          f"{size[0]} x {size[1]} (width x height); resize or crop them first"
        )
      transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
      modes.setdefault("transparent" if transparent else image.mode, file)
  if deep := next((file for mode, file in modes.items() if mode[0] in "IF"), None):
    raise DatasetError(f"{deep}: expected 8 bits a channel, got more; convert it first")
  gray = set(modes) <= {"L", "1"}
  notes = (
    [f"transparency of images such as {modes['transparent'].name} was dropped"]
    if "transparent" in modes
    else []
  )
  if not gray and {"L", "1"} & set(modes):
    notes.append("gray images were read as color, for there are both")
  return gray, notes


def _opened(file: pathlib.Path):
  from PIL import Image

  try:
    return Image.open(file, formats=("PNG", "JPEG"))
  except (OSError, Image.DecompressionBombError) as error:
    raise DatasetError(
      f"{file}: expected a PNG or JPEG image, got a file that does not read ({error})"
    ) from error


def _pixels(file: pathlib.Path, mode: str) -> np.ndarray:
  """`(h, w, c)` in uint8."""
  with _opened(file) as image:
    try:
      x = np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:
      raise DatasetError(
        f"{file}: expected a whole image, got one that does not read ({error})"
      ) from error
  return x[..., None] if mode == "L" else x
