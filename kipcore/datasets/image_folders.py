"""Folders of images, one folder per class, as arrays; images are not resized.

Each property of an image file follows one rule:

| property | rule |
|---|---|
| EXIF orientation | applied; sizes are compared after it |
| palette | replaced by its colors (RGB), also if all of them are gray |
| alpha or transparent color | dropped; the stored color of transparent pixels is kept |
| more than 8 bits per channel | rejected |
| several frames (GIF, WebP, TIFF, APNG) | the first frame is read |
| CMYK, YCbCr | converted to RGB with Pillow's formula; color profiles are ignored |
| gray and color images together | all are read as color |

Files that are not read and images that are converted are counted in `note`.
"""

import collections
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from kipcore.types import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_GRAY = ("1", "L", "LA")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # EXIF tags
_BITS_PER_SAMPLE = 258
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
      f"{path}: expected a folder with a folder of images for each class, or a file that ends in .npz; got "
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
  gray, size, notes = _checked([file for each in files for file in each])
  if skipped:
    kinds = [f"{count} {kind}" for kind, count in skipped.most_common()]
    more = f" and {len(kinds) - _MAX_LISTED} more kinds" * (len(kinds) > _MAX_LISTED)
    notes.append(
      f"{sum(skipped.values())} files or folders were skipped ({', '.join(kinds[:_MAX_LISTED])}{more})"
    )
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
  x_train, x_test = (np.stack([_pixels(file, gray, size) for file in rows]) for rows in files)
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


def _checked(files: list[pathlib.Path]) -> tuple[bool, tuple[int, int], list[str]]:
  """Whether all images are gray, their size (width, height), and notes on conversions; reads headers only."""
  size: tuple[int, int] | None = None
  first: dict[str, pathlib.Path] = {}
  counts: collections.Counter[str] = collections.Counter()
  for file in files:
    with _opened(file) as image:
      mode, bits = image.mode, _bits(file, image)
      if bits > 8:
        raise DatasetError(f"{file}: expected 8 bits a channel, got more; convert it first")
      if mode not in _GRAY + _COLOR:
        raise DatasetError(
          f"{file}: expected a gray, palette, RGB or CMYK image, got mode {mode}; convert it first"
        )
      # Pillow reads the EXIF data of PNG after the pixels, unless it comes first: only where sizes differ.
      late = image.format == "PNG" and "exif" not in image.info
      oriented = 1 if late and size in (None, image.size) else _orientation(file, image)
      found = _oriented_size(file, image, oriented)
      size = size or found
      if found != size:
        raise DatasetError(
          f"{file}: expected all images of one size, got {found[0]} x {found[1]}, where {files[0]} is "
          f"{size[0]} x {size[1]} (width x height); resize or crop them first"
        )
      kinds = {
        "gray" if mode in _GRAY else "color": True,
        "transparent": mode in ("LA", "PA", "RGBA") or "transparency" in image.info,
        "CMYK": mode == "CMYK",
        "rotated": oriented > 1,
        "frames": getattr(image, "n_frames", 1) > 1,
      }
      for kind in (kind for kind, holds in kinds.items() if holds):
        counts[kind] += 1
        first.setdefault(kind, file)
  notes = {
    "transparent": "transparency of {} was dropped",
    "CMYK": "{} converted from CMYK to RGB",
    "rotated": "{} rotated or flipped according to EXIF orientation",
    "frames": "only the first frame was read of {}",
  }
  gray = not counts["color"]
  shown = [
    text.format(f"{counts[kind]} images such as {first[kind].name}")
    for kind, text in notes.items()
    if counts[kind]
  ]
  if not gray and counts["gray"]:
    shown.append(
      f"{counts['gray']} gray images were read as color, because there are color images too"
    )
  if size is None:
    raise DatasetError("expected an image in each class folder, got none")
  return gray, size, shown


def _opened(file: pathlib.Path):
  from PIL import Image

  try:
    return Image.open(file, formats=_FORMATS)
  except (OSError, Image.DecompressionBombError) as error:
    raise DatasetError(
      f"{file}: expected an image ({', '.join(_FORMATS)}), got a file that does not read ({error})"
    ) from error


def _bits(file: pathlib.Path, image) -> int:
  """Bits per channel in the file: Pillow silently reads 16-bit RGB as 8-bit."""
  if image.mode[0] in "IF":
    return 16
  if image.format == "PNG":
    with file.open("rb") as stream:
      return stream.read(25)[24]  # of the IHDR chunk, which is first
  if image.format == "TIFF":
    return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,)))
  return 8


def _orientation(file: pathlib.Path, image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except (OSError, SyntaxError, ValueError) as error:
    raise DatasetError(
      f"{file}: expected a whole image, got one that does not read ({error})"
    ) from error


def _oriented_size(file: pathlib.Path, image, orientation: int) -> tuple[int, int]:
  if orientation not in (5, 6, 7, 8):
    return image.size
  if image.format != "TIFF":
    return image.size[::-1]
  try:
    image.load()  # Pillow applies the orientation of TIFF itself, some versions to the size first
  except (OSError, SyntaxError, ValueError) as error:
    raise DatasetError(
      f"{file}: expected a whole image, got one that does not read ({error})"
    ) from error
  return image.size


def _pixels(file: pathlib.Path, gray: bool, size: tuple[int, int]) -> np.ndarray:
  """`(h, w, 1)` or `(h, w, 3)` in uint8."""
  from PIL import ImageOps

  with _opened(file) as image:
    try:
      image.load()
      image = ImageOps.exif_transpose(image)
      if image.mode in ("P", "PA"):  # directly to RGB, Pillow warns about transparency
        image = image.convert("RGBA")
      x = np.asarray(image.convert("L" if gray else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
      raise DatasetError(
        f"{file}: expected a whole image, got one that does not read ({error})"
      ) from error
  if x.shape[1::-1] != size:
    raise DatasetError(
      f"{file}: expected all images of one size, got {x.shape[1]} x {x.shape[0]} after its EXIF orientation, "
      f"where the others are {size[0]} x {size[1]} (width x height)"
    )
  return x[..., None] if gray else x
