"""Export of distilled sets to NumPy, PNG, safetensors, PyTorch and TFDS files, and for DD-Ranking.

Without their conventions, distilled images give chance accuracy in other programs. Every export
therefore contains them as JSON: pixel units, layout, label convention, every preprocessing step
with its arrays, kernel, ridge, and the accuracy measured with them. A file `NAME` stores this text
under the key `conventions` and in `NAME.json` next to it; a folder stores it in `conventions.json`.
"""

import io
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from kipcore import checks
from kipcore.io import atomic, ddranking
from kipcore.io.quiet_tensorflow import quiet_tensorflow
from kipcore.preprocess import Preprocess
from kipcore.version import __version__

FORMATS = ("numpy", "png", "safetensors", "torch", "tfds", "ddranking")
SPACES = ("pixels", "inputs")
# Usual file name suffix of each single-file format. The other formats are folders.
SUFFIXES = {"numpy": ".npz", "safetensors": ".safetensors", "torch": ".pt"}
FORMAT = "kipcore-export"
FORMAT_VERSION = 1
CONVENTIONS = "conventions"
_CHANNELS_FIRST = ("safetensors", "torch", "ddranking")
_FROM_PIXELS = ("png", "ddranking")
_MOST_IN_JSON = 64  # larger arrays are stored outside the JSON

# What another program must compute for each step of a `Preprocess`.
_FORMULAS = {
  "scale": "x / divisor",
  "standardize": "(x - mean) / divisor, for each channel (the last axis)",
  "unit_norm": "for each row: subtract the mean of the row, then divide by the L2 norm of the row; "
  "a constant row becomes 0 (only the inverse uses mean and divisor)",
  "center": "x - mean, for each entry of a row",
  "zca": "x whitening, where x is the row flattened to one vector in C order",
}


class DistilledSet(NamedTuple):
  """A distilled set and the meaning of its numbers.

  Attributes:
    images: `(m, height, width, channels)` or `(m, features)`, floating, not clipped to the range of
      real images.
    labels: `(m, c)`: one-hot minus 1/c, or learned.
    space: "pixels" for images in the stored units of the dataset, "inputs" for preprocessed images.
    preprocess: maps pixels to model inputs.
    pixel_max: the stored value of full white (255 for uint8 images), or None if unknown.
    class_names: c names, or None.
    about: JSON-serializable dict that is exported unchanged: dataset, kernel, ridge, accuracy.
  """

  images: np.ndarray
  labels: np.ndarray
  space: str
  preprocess: Preprocess
  pixel_max: float | None
  class_names: tuple[str, ...] | None
  about: dict[str, Any]


def learned(labels) -> bool:
  """Whether labels `(m, c)` differ from one-hot minus 1/c by more than rounding."""
  labels = np.asarray(labels, np.float64)
  one_hot = np.eye(labels.shape[1])[labels.argmax(axis=1)]
  return bool(np.abs(labels + 1.0 / labels.shape[1] - one_hot).max(initial=0.0) > 1e-6)


def label_kind(labels) -> str:
  """A description of labels `(m, c)` for metadata and reports."""
  return (
    "learned, on the scale of one-hot minus offset" if learned(labels) else "one-hot minus offset"
  )


def folder_note(content: DistilledSet) -> str:
  """How PNG files are assigned to class folders; for learned labels, also the files per class."""
  if not learned(content.labels):
    return "files are in the folder of their class"
  counts = np.bincount(np.argmax(content.labels, axis=1), minlength=content.labels.shape[1])
  names = content.class_names or range(len(counts))
  listed = ", ".join(f"{name}: {count}" for name, count in zip(names, counts))
  return (
    "labels are learned; files are in the folder of their largest label, so classes have different "
    "numbers of "
    f"files ({listed}); labels.csv has the full labels"
  )


def as_numpy(images, labels) -> dict[str, np.ndarray]:
  """The set as NumPy arrays, with the dtypes unchanged.

  Args:
    images: `(m, ...)`, channels last.
    labels: `(m, c)`: one-hot minus 1/c, or learned.

  Returns:
    Copies: `images` as given (NHWC), `labels` as given, `one_hot` `(m, c)`: labels + 1/c, and
    `classes` `(m,)` int64: the index of the largest label of each row.
  """
  images, labels = np.array(images), np.array(labels)
  checks.same_rows("images", images, "labels", labels)
  offset = labels.dtype.type(1.0 / labels.shape[1])
  return {
    "images": images,
    "labels": labels,
    "one_hot": labels + offset,
    "classes": np.argmax(labels, axis=1).astype(np.int64),
  }


def as_torch(images, labels) -> dict:
  """The arrays of `as_numpy` as PyTorch tensors on the CPU: float32, classes int64, images NCHW.

  Args:
    images: `(m, height, width, channels)` or `(m, features)`.
    labels: `(m, c)`.

  Returns:
    `images`, `labels`, `one_hot`, `classes`.

  Raises:
    ImportError: if PyTorch is not installed.
  """
  torch = _torch()
  return {
    name: torch.from_numpy(array if name == "classes" else array.astype(np.float32))
    for name, array in _channels_first(as_numpy(images, labels)).items()
  }


def as_tfds(images, labels):
  """The arrays of `as_numpy` as a `tf.data.Dataset` of dicts, one element per image, in order.

  Args:
    images: `(m, ...)`, channels last.
    labels: `(m, c)`.

  Returns:
    `tf.data.Dataset` of `images` `(...)`, `labels` `(c,)`, `one_hot` `(c,)` and `classes` (scalar).
  """
  with quiet_tensorflow() as (tf, _):
    return tf.data.Dataset.from_tensor_slices(as_numpy(images, labels))


def check(path, format: str, content: DistilledSet, overwrite: bool = False) -> None:
  """Validates the arguments of `write` without writing anything.

  Args:
    path, format, content, overwrite: as in `write`.

  Raises:
    The exceptions of `write`.
  """
  checks.one_of("format", format, FORMATS)
  checks.one_of("space", content.space, SPACES)
  for name, array in (("images", content.images), ("labels", content.labels)):
    checks.floating(name, array)
    checks.finite(name, array)
  checks.rank("labels", content.labels, 2)
  checks.same_rows("images", content.images, "labels", content.labels)
  if content.pixel_max is not None:
    checks.positive("pixel_max", content.pixel_max)
  if format in _FROM_PIXELS:
    if content.space != "pixels":
      raise ValueError(
        f"format {format}: expected space pixels, got {content.space}; preprocessed inputs are not "
        "images"
      )
    if content.images.ndim != 4 or content.images.shape[-1] not in (1, 3):
      raise ValueError(
        f"format {format}: expected images (m, height, width, 1 or 3), got shape {content.images.shape}"
      )
    if content.pixel_max is None:
      raise ValueError(
        f"format {format}: expected a set with pixel_max, the stored value of full white (255 for uint8 "
        "images), "
        "got one without it"
      )
  if format == "ddranking":
    _for_ddranking(content)
  if format == "torch":
    _torch()
  path = pathlib.Path(path)
  is_file = format in SUFFIXES
  beside = _conventions_of(path, is_file)
  if not is_file and path.is_dir() and not any(path.iterdir()):
    return
  taken = next((name for name in (path, beside) if os.path.lexists(name)), None)
  if taken and not overwrite:
    raise FileExistsError(
      f"{taken}: expected a path that does not exist; remove it, or set overwrite"
    )
  # Only earlier exports are replaced, because replacing a folder deletes everything in it.
  of_kind = not os.path.lexists(path) or (path.is_file() if is_file else path.is_dir())
  if taken and not (of_kind and _is_export(beside, format)):
    raise FileExistsError(
      f"{path}: expected an earlier export in format {format} to overwrite, got something else"
    )
  above = next(folder for folder in path.absolute().parents if folder.exists())
  if not (above.is_dir() and os.access(above, os.W_OK)):
    kind, got = (
      (PermissionError, "one that is read-only")
      if above.is_dir()
      else (NotADirectoryError, "a file")
    )
    raise kind(f"{path}: expected a writable folder {above}, got {got}")


def write(path, format: str, content: DistilledSet, overwrite: bool = False) -> None:
  """Writes a set and its conventions to a file or folder, atomically.

  Formats:
    numpy: an `.npz` file with the exact arrays of `as_numpy`.
    safetensors: the same exact arrays, images NCHW.
    torch: a `.pt` file with the tensors of `as_torch`; read it with
      `torch.load(path, weights_only=True)`.
    png: one folder per class, in class order, with files `ROW.png`; full white is 255. The folder
      of a class is empty if no row has its largest label there. `labels.csv` has the labels of
      every file. Pixels that are not integers from 0 to pixel_max are rounded and clipped; the
      entry `png` of the conventions reports this and the largest error.
    tfds: a folder for `tfds.builder_from_directory(path)`, and for `tfds.load(NAME, data_dir=DIR)`
      if path is `DIR/NAME/1.0.0`. Its only split, `train`, has `image` (uint8 if that is exact,
      else a float32 tensor), `label` (the class) and `soft_label` (float32, labels + 1/c).
    ddranking: a folder with `images.npy`, `hard_labels.npy` and `soft_labels.npy` in class order, as DD-Ranking 0.2.0 takes
      them (normalized with its constants or whitened, RGB, channels first), and `settings.json` for `ddranking.Config`.

  Args:
    path: file or folder name; missing parent folders are created.
    format: one of `FORMATS`.
    content: the set.
    overwrite: whether to replace an earlier export with the same path and format.

  Raises:
    ValueError, TypeError: for an unknown format or space, arrays with inconsistent shapes or
      non-finite entries, or a set that PNG cannot represent.
    ImportError: for "torch" and "tfds" if a package they need is not installed.
    OSError: if the export cannot be written; FileExistsError if the path exists.
  """
  check(path, format, content, overwrite)
  path = pathlib.Path(path)
  described, large = _describe(format, content)
  path.parent.mkdir(parents=True, exist_ok=True)
  if format in SUFFIXES:
    text = json.dumps(described, indent=2)
    # Both files are complete before either is renamed; the conventions are also inside the file.
    with atomic.replacing(path) as file, atomic.replacing(_conventions_of(path, True)) as beside:
      file.write(_encode(format, content, large, text))
      file.flush()
      beside.write((text + "\n").encode())
    return
  with atomic.replacing_folder(path) as folder:
    if format == "ddranking":
      described |= _write_ddranking(folder, content)
    else:
      described |= (
        _write_png(folder, content) if format == "png" else _write_tfds(folder, path, content)
      )
    if large:
      np.savez_compressed(folder / "preprocess.npz", **large)  # type: ignore[arg-type]
    _conventions_of(folder, False).write_text(
      json.dumps(described, indent=2) + "\n", encoding="utf-8"
    )


def _for_ddranking(content: DistilledSet) -> ddranking.Scored:
  """The set as DD-Ranking expects it; ValueError if it cannot be."""
  return ddranking.for_ddranking(
    content.images,
    content.labels,
    content.preprocess,
    content.pixel_max or 1.0,
    content.about.get("dataset"),
  )


def _write_ddranking(folder: pathlib.Path, content: DistilledSet) -> dict:
  """Writes the arrays and settings of DD-Ranking; returns an entry for the conventions."""
  scored = _for_ddranking(content)
  for name, array in scored.arrays.items():
    np.save(folder / f"{name}.npy", array)
  (folder / "settings.json").write_text(
    json.dumps(scored.settings, indent=2) + "\n", encoding="utf-8"
  )
  images = scored.arrays["images"]
  return {
    "use": [
      "config = ddranking.Config.from_file('settings.json')",
      "images, labels = (torch.from_numpy(numpy.load(f)) for f in ('images.npy', 'hard_labels.npy'))",
      "ddranking.LabelRobustScoreHard(config).compute_metrics(images, hard_labels=labels)",
      "ddranking.LabelRobustScoreSoft(config).compute_metrics(images, soft_labels=...) with soft_labels.npy and a teacher",
      *scored.notes,
    ],
    "images": {
      "space": "whitened" if scored.settings["use_zca"] else "normalized by DD-Ranking's constants",
      "layout": "NCHW",
      "rows": len(images),
      "row_shape": images.shape[1:],
      "minimum": float(images.min()),
      "maximum": float(images.max()),
    },
    "ddranking_version": "0.2.0",
  }


def _conventions_of(path: pathlib.Path, is_file: bool) -> pathlib.Path:
  return path.with_name(path.name + ".json") if is_file else path / f"{CONVENTIONS}.json"


def _is_export(conventions: pathlib.Path, format: str) -> bool:
  try:
    found = json.loads(conventions.read_text(encoding="utf-8"))
    return found["format"] == FORMAT and found["file_format"] == format
  except (OSError, ValueError, KeyError, TypeError):
    return False


def _torch():
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"--format=torch: expected PyTorch to be installed, got {error}; pip install torch"
    ) from error
  return torch


def _channels_first(arrays: dict) -> dict:
  images = arrays["images"]
  return {
    **arrays,
    "images": np.ascontiguousarray(np.moveaxis(images, -1, 1)) if images.ndim == 4 else images,
  }


def _describe(format: str, content: DistilledSet) -> tuple[dict, dict[str, np.ndarray]]:
  """The conventions as a JSON-serializable dict, and the preprocessing arrays too large for it."""
  images, classes = content.images, content.labels.shape[1]
  steps, large = [], {}
  for i, step in enumerate(content.preprocess.steps):
    arrays = {}
    for name, array in step.arrays.items():
      stored_as = f"preprocess/{i}_{step.name}_{name}"
      if array.size <= _MOST_IN_JSON:
        arrays[name] = array.tolist()
      else:
        large[stored_as], arrays[name] = array, {"stored_as": stored_as, "shape": array.shape}
    steps.append(
      {
        "name": step.name,
        "formula": _FORMULAS[step.name],
        "arrays": arrays,
        "settings": dict(step.settings),
      }
    )
  layout = (
    "rows of features" if images.ndim != 4 else "NCHW" if format in _CHANNELS_FIRST else "NHWC"
  )
  pixels = content.space == "pixels"
  return {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "kipcore_version": __version__,
    "file_format": format,
    "use": [
      "Models expect preprocessed inputs: apply all steps of preprocess to pixels, in order. "
      + (
        "Apply them to these images and to the test images."
        if pixels
        else "These images are already preprocessed: apply the steps only to the test images."
      ),
      "labels are one-hot minus label_convention.offset, for a mean squared error; the predicted "
      "class is that of the "
      "largest output. For a cross-entropy use one_hot (labels + offset) or classes; learned "
      "labels are not probabilities.",
    ],
    "images": {
      "space": content.space,
      "layout": layout,
      "rows": len(images),
      "row_shape": content.preprocess.row_shape,
      "units": "stored pixel units of the dataset, not clipped" if pixels else "preprocessed",
      "minimum": float(images.min()),
      "maximum": float(images.max()),
    },
    "pixel_range": {"black": 0.0, "white": content.pixel_max},
    "label_convention": {
      "kind": label_kind(content.labels),
      "offset": 1.0 / classes,
      "labels": "the labels that the accuracy was measured with",
      "one_hot": "labels + offset",
      "classes": "index of the largest label of each row",
      "num_classes": classes,
      "class_names": content.class_names,
    },
    "preprocess": {
      "kind": content.preprocess.kind,
      "layout": "rows of row_shape, channels last"
      + " (images here are channels first)" * (layout == "NCHW"),
      "arrays": "float64; large ones are stored under the name stored_as in "
      + ("the exported file" if format in SUFFIXES else "preprocess.npz"),
      "steps": steps,
    },
    **content.about,
  }, large


def _encode(format: str, content: DistilledSet, large: dict, text: str) -> bytes:
  """The content of the exported file."""
  buffer = io.BytesIO()
  arrays = as_numpy(content.images, content.labels)
  if format == "numpy":
    everything = {**arrays, **large, CONVENTIONS: np.array(text)}
    np.savez_compressed(buffer, **everything)  # type: ignore[arg-type]
  elif format == "safetensors":
    import safetensors.numpy

    stored = {
      name: np.ascontiguousarray(array)
      for name, array in {**_channels_first(arrays), **large}.items()
    }
    return safetensors.numpy.save(stored, {CONVENTIONS: text})
  else:
    torch = _torch()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in large.items()}
    torch.save({**as_torch(content.images, content.labels), **tensors, CONVENTIONS: text}, buffer)
  return buffer.getvalue()


def _write_png(folder: pathlib.Path, content: DistilledSet) -> dict:
  from PIL import Image

  images, unit = np.asarray(content.images, np.float64), float(content.pixel_max or 0) / 255.0
  levels = np.rint(images / unit)
  stored = np.clip(levels, 0, 255).astype(np.uint8)
  exact = np.array_equal(np.rint(stored * unit), images)
  arrays = as_numpy(content.images, content.labels)
  num_classes = content.labels.shape[1]
  names = [_folder_name(k, num_classes, content.class_names) for k in range(num_classes)]
  for name in names:
    (folder / name).mkdir()
  lines = ["file,class," + ",".join(f"label_{k}" for k in range(num_classes))]
  for row, k in enumerate(arrays["classes"]):
    file = f"{names[k]}/{row:05d}.png"
    Image.fromarray(stored[row, ..., 0] if stored.shape[-1] == 1 else stored[row]).save(
      folder / file
    )
    # str of a NumPy scalar is the shortest text that parses back to the same number.
    lines.append(",".join([file, str(k), *map(str, content.labels[row])]))
  (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
  return {
    "png": {
      "pixel": "value * unit" + ", rounded to an integer" * (exact and unit != 1),
      "unit": unit,
      "exact": exact,
      "largest_error": 0.0 if exact else float(np.max(np.abs(stored * unit - images))),
      "clipped_share": float(np.mean((levels < 0) | (levels > 255))),
      "labels": "labels.csv, in the order of the rows",
      "folders": folder_note(content),
    }
  }


def _folder_name(k: int, num_classes: int, class_names) -> str:
  """A name that sorts in class order, which is how readers of class folders number classes."""
  number = f"{k:0{len(str(num_classes - 1))}d}"
  name = re.sub(r"[^A-Za-z0-9]+", "-", str(class_names[k])).strip("-") if class_names else ""
  return number if name in ("", str(k)) else f"{number}_{name}"


def _write_tfds(folder: pathlib.Path, path: pathlib.Path, content: DistilledSet) -> dict:
  images, labels = content.images, content.labels
  byte_pixels = (
    content.space == "pixels"
    and content.pixel_max == 255
    and images.ndim == 4
    and images.shape[-1] in (1, 3)
    and np.array_equal(images, np.clip(np.rint(images), 0, 255))
  )
  dtype = np.uint8 if byte_pixels else np.float32
  arrays = as_numpy(images.astype(dtype), labels)
  owner = path.parent if re.fullmatch(r"\d+\.\d+\.\d+", path.name) else path
  name = "_".join(re.findall(r"[a-z0-9]+", owner.name.lower())) or "distilled"
  with quiet_tensorflow() as (tf, tfds):
    kind = tfds.features.Image if byte_pixels else tfds.features.Tensor
    classes = (
      {"names": list(content.class_names)}
      if content.class_names
      else {"num_classes": labels.shape[1]}
    )
    features = tfds.features.FeaturesDict(
      {
        "image": kind(shape=images.shape[1:], dtype=dtype),
        "label": tfds.features.ClassLabel(**classes),
        "soft_label": tfds.features.Tensor(shape=labels.shape[1:], dtype=np.float32),
      }
    )
    with tf.io.TFRecordWriter(str(folder / f"{name}-train.tfrecord-00000-of-00001")) as file:
      for image, label, soft in zip(
        arrays["images"], arrays["classes"], arrays["one_hot"].astype(np.float32)
      ):
        example = features.encode_example({"image": image, "label": int(label), "soft_label": soft})
        file.write(features.serialize_example(example))
    tfds.folder_dataset.write_metadata(
      data_dir=str(folder),
      features=features,
      version="1.0.0",
      check_data=False,
      supervised_keys=("image", "label"),
      disable_shuffling=True,
      description=f"A distilled set; {CONVENTIONS}.json documents its conventions.",
    )
  return {
    "tfds": {
      "split": "train",
      "image": np.dtype(dtype).name,
      "label": "classes",
      "soft_label": "one_hot, float32",
    }
  }
