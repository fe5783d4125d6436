"""Published sets that are folders of images: RDED and SRe2L."""

import pathlib
import re
from typing import NamedTuple

import numpy as np

from kipcore.io import torch_files

# Names of the class folders.
_NAMES = {"rded": r"\d{5}", "sre2l": r"new\d{3,}"}
_SUFFIXES = (".jpg", ".jpeg", ".png")
_SEED = 42  # of the order in which SRe2L labels its images


class Folder(NamedTuple):
  """Images `(m, h, w, 3)` in uint8, `(m,)` class numbers in the order of the folders, and the publisher by their names."""

  images: np.ndarray
  classes: np.ndarray
  kind: str | None


class Views(NamedTuple):
  """The crops of images that a teacher labeled: `(m, h, w, 3)` pixels in [0, 1], and `(m, c)` outputs of the teacher."""

  images: np.ndarray
  logits: np.ndarray


def read_folder(path: pathlib.Path) -> Folder:
  """Reads the images of class folders, ordered by name; ValueError for other folders or images of several sizes."""
  folders = sorted(each for each in path.iterdir() if each.is_dir() and each.name[0] != ".")
  files = [
    sorted(file for file in each.iterdir() if file.suffix.lower() in _SUFFIXES) for each in folders
  ]
  if not folders or not all(files):
    raise ValueError(
      "expected a file, or a folder with a folder of JPEG or PNG images for each class, got a folder "
      + (f"whose folder {folders[files.index([])].name} has none" if folders else "without folders")
    )
  images = [_pixels(file) for of_class in files for file in of_class]
  if len(shapes := {image.shape for image in images}) > 1:
    raise ValueError(f"expected images of one size, got {sorted(shapes)[:3]}")
  kind = next(
    (
      kind
      for kind, pattern in _NAMES.items()
      if all(re.fullmatch(pattern, each.name) for each in folders)
    ),
    None,
  )
  classes = np.repeat(np.arange(len(folders)), [len(of_class) for of_class in files])
  return Folder(np.stack(images), classes, kind)


def _pixels(file: pathlib.Path) -> np.ndarray:
  from PIL import Image

  try:
    with Image.open(file, formats=("JPEG", "PNG")) as image:
      return np.asarray(image.convert("RGB"))
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"{file}: expected a whole JPEG or PNG image, got {error}") from error


def labeled_views(images: np.ndarray, path) -> Views:
  """The crops of the first epoch of SRe2L's soft labels.

  A file `epoch_0/batch_B.tar` contains for each row of a batch the crop as fractions (top, left, height, width), whether
  it is mirrored, the row that it is mixed with, the share or box of the mixture, and the outputs of the teacher. The
  images of the rows are not recorded: they follow the permutation that torch draws with seed 42.

  Args:
    images: `(m, h, w, 3)` in uint8, in the order of their file names.
    path: the folder with `epoch_0`.

  Returns:
    `Views` of the size of the images.

  Raises:
    ValueError: for missing or other files, or another number of rows than images.
  """
  folder = pathlib.Path(path) / "epoch_0"
  files = sorted(folder.glob("batch_*.tar"), key=lambda file: (len(file.name), file.name))
  if not files:
    raise ValueError(f"labels: expected a folder with epoch_0/batch_0.tar, found none in {path}")
  order, first = torch_permutation(len(images), _SEED), 0
  views, logits = [], []
  for file in files:
    batch = torch_files.read_torch_file(file)
    if not (isinstance(batch, list) and len(batch) == 6):
      raise ValueError(f"{file}: expected a list of crops, mirrors, mixture and labels")
    crops, mirrored, partner, share, box, outputs = batch
    size = len(outputs) if isinstance(outputs, np.ndarray) and outputs.ndim == 2 else 0
    if not size or np.shape(crops) != (size, 4) or np.shape(mirrored) != (size,):
      raise ValueError(f"{file}: expected as many crops (n, 4) and mirrors (n,) as labels (n, c)")
    rows = order[first : first + size]
    if len(rows) < size:
      break
    made = np.stack(
      [
        _view(image, crop, mirror)
        for image, crop, mirror in zip(images[rows], np.asarray(crops, np.float32), mirrored)
      ]
    )
    views.append(_mixed(made, partner, share, box))
    logits.append(np.asarray(outputs, np.float32))
    first += size
  if first != len(images) or sum(len(each) for each in logits) != len(images):
    raise ValueError(
      f"labels: expected one for each of {len(images)} images in {folder}, got another number"
    )
  return Views(np.concatenate(views), np.concatenate(logits))


def _view(image: np.ndarray, crop: np.ndarray, mirrored) -> np.ndarray:
  """A crop at the size of the image, in [0, 1], as torchvision makes it with Pillow."""
  from PIL import Image

  height, width = image.shape[:2]
  if not (np.isfinite(crop).all() and (crop >= 0).all() and (crop <= 1).all()):
    raise ValueError(f"labels: expected crops as fractions in [0, 1], got {crop.tolist()}")
  # Products in double precision and rounded, as there.
  top, left, tall, wide = (
    float(part) * side for part, side in zip(crop, (height, width, height, width))
  )
  box = tuple(round(edge) for edge in (left, top, left + wide, top + tall))
  if box[0] >= box[2] or box[1] >= box[3]:
    raise ValueError(f"labels: expected crops that are not empty, got {crop.tolist()}")
  view = Image.fromarray(image).crop(box).resize((width, height), Image.Resampling.BILINEAR)
  pixels = np.asarray(view, np.float32) / np.float32(255)
  return pixels[:, ::-1] if mirrored else pixels


def _mixed(images: np.ndarray, partner, share, box) -> np.ndarray:
  """CutMix with a box of rows and columns, or mixup with a share, or the images themselves."""
  if partner is None:
    return images
  partner = np.asarray(partner)
  if partner.shape != (len(images),) or not ((partner >= 0) & (partner < len(images))).all():
    raise ValueError(f"labels: expected a row of the batch for each mixed row, got {partner!r:.80}")
  if box is None:
    share = np.float32(share)
    return share * images + (1 - share) * images[partner]
  top, bottom, left, right = (int(box[i]) for i in (0, 2, 1, 3))
  mixed = images.copy()
  mixed[:, top:bottom, left:right] = images[partner, top:bottom, left:right]
  return mixed


def torch_permutation(size: int, seed: int) -> np.ndarray:
  """`torch.randperm(size, generator=torch.Generator().manual_seed(seed))` on a CPU, without torch.

  Args:
    size: number of elements, below 2^32 / 20.
    seed: in [0, 2^32).

  Returns:
    A permutation of 0..size-1.
  """
  bits = np.random.RandomState(seed)._bit_generator.random_raw(max(size - 1, 1))  # type: ignore[attr-defined]
  order = np.arange(size)
  for i in range(size - 1):
    j = i + int(bits[i] % (size - i))
    order[i], order[j] = order[j], order[i]
  return order
