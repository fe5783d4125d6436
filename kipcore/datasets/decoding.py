"""Encoded images as arrays; images are not resized.

Each property of an image follows one rule:

| property | rule |
|---|---|
| EXIF orientation | applied; sizes are compared after it |
| palette | replaced by its colors (RGB), also if all of them are gray |
| alpha or transparent color | dropped; the stored color of transparent pixels is kept |
| more than 8 bits per channel | rejected |
| several frames (GIF, WebP, TIFF, APNG) | the first frame is read |
| CMYK, YCbCr | converted to RGB with Pillow's formula; color profiles are ignored |
| gray and color images together | all are read as color |
"""

import collections
import io
import pathlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

import numpy as np

from kipcore.types import DatasetError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_GRAY = ("1", "L", "LA")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # EXIF tags
_BITS_PER_SAMPLE = 258


class Encoded(NamedTuple):
  """An encoded image in memory, with the name by which messages refer to it."""

  name: str
  content: bytes

  def open(self, mode: str = "rb") -> BinaryIO:
    """A stream of the bytes, like that of a file."""
    return io.BytesIO(self.content)

  def __str__(self) -> str:
    return self.name


Image = pathlib.Path | Encoded


def check(files: Iterable[Image]) -> tuple[bool, tuple[int, int], list[str]]:
  """Checks that images can be read together, from their headers.

  Args:
    files: the images.

  Returns:
    Whether all images are gray, their size (width, height), and notes on conversions.

  Raises:
    DatasetError: for images of several sizes, more than 8 bits a channel, or another format; for no image.
  """
  size: tuple[int, int] | None = None
  reference: Image | None = None
  first: dict[str, Image] = {}
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
      size, reference = size or found, reference or file
      if found != size:
        raise DatasetError(
          f"{file}: expected all images of one size, got {found[0]} x {found[1]}, where {reference} is "
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
    raise DatasetError("expected at least one image, got none")
  return gray, size, shown


def _opened(file: Image):
  from PIL import Image as pillow

  source = file if isinstance(file, pathlib.Path) else file.open()
  try:
    return pillow.open(source, formats=_FORMATS)
  except (OSError, pillow.DecompressionBombError) as error:
    raise DatasetError(
      f"{file}: expected an image ({', '.join(_FORMATS)}), got a file that does not read ({error})"
    ) from error


def _bits(file: Image, image) -> int:
  """Bits per channel in the file: Pillow silently reads 16-bit RGB as 8-bit."""
  if image.mode[0] in "IF":
    return 16
  if image.format == "PNG":
    with file.open("rb") as stream:
      return stream.read(25)[24]  # of the IHDR chunk, which is first
  if image.format == "TIFF":
    return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,)))
  return 8


def _orientation(file: Image, image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except (OSError, SyntaxError, ValueError) as error:
    raise DatasetError(
      f"{file}: expected a whole image, got one that does not read ({error})"
    ) from error


def _oriented_size(file: Image, image, orientation: int) -> tuple[int, int]:
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


def pixels(file: Image, gray: bool, size: tuple[int, int]) -> np.ndarray:
  """The pixels of an image.

  Args:
    file: the image.
    gray: whether to return one channel; otherwise three.
    size: expected width and height.

  Returns:
    `(h, w, 1)` or `(h, w, 3)` in uint8.

  Raises:
    DatasetError: for an image that cannot be read, or of another size.
  """
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
