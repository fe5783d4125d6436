"""Sets as DD-Ranking 0.2.0 scores them: tensors in class order, and the settings of its label-robust scores.

DD-Ranking trains networks on `image_tensor` and tests them on rows that it loads and normalizes itself, so the images must
be in its space: RGB, channels first, normalized with its constants, or whitened as by `zca_absolute`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kipcore import checks
from kipcore.preprocess import Preprocess

# Datasets that DD-Ranking loads, and its constants for pixels in [0, 1].
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KNOWN = {
  "cifar10": ("CIFAR10", _CIFAR),
  "cifar100": ("CIFAR100", _CIFAR),
  "tinyimagenet": ("TinyImageNet", _IMAGENET),
  "imagenette": ("ImageNette", _IMAGENET),
  "imagewoof": ("ImageWoof", _IMAGENET),
  "imagenet": ("ImageNet1K", _IMAGENET),
}
_SMALLEST = 1e-8  # probability, whose logarithm is a logit
_TEMPERATURE = 1.0


class Space(NamedTuple):
  """How pixels become inputs of DD-Ranking.

  Attributes:
    dataset: the name under which DD-Ranking knows the dataset; another name if it does not.
    known: whether it does.
    pixel_max: the value of white.
    mean, deviation: per channel, of pixels in [0, 1]; not used for whitened images.
    padding: pixels of black on each side: 2 for images of 28 pixels, whose ConvNet expects 32.
    whitened: whether images are whitened (`use_zca`).
  """

  dataset: str
  known: bool
  pixel_max: float
  mean: tuple[float, ...]
  deviation: tuple[float, ...]
  padding: int
  whitened: bool

  def inputs(self, pixels) -> np.ndarray:
    """Normalized inputs `(n, 3, h, w)` in float32 of pixels `(n, h, w, 1 or 3)`."""
    x = np.asarray(pixels, np.float64) / self.pixel_max
    x = np.pad(x, ((0, 0), (self.padding,) * 2, (self.padding,) * 2, (0, 0)))
    x = (x - np.array(self.mean)) / np.array(self.deviation)
    return _channels_first(x)


class Scored(NamedTuple):
  """What DD-Ranking needs for a set; see `for_ddranking`."""

  arrays: dict[str, np.ndarray]
  settings: dict[str, Any]
  notes: list[str]


def space_of(about: Mapping | None, preprocess: Preprocess, pixel_max: float, shape) -> Space:
  """The space of DD-Ranking for a dataset.

  Args:
    about: the entry `dataset` of an artifact's metadata, for its name.
    preprocess: that of the set, whose mean and deviation normalize datasets that DD-Ranking does not know.
    pixel_max: the value of white.
    shape: of an image, `(h, w, channels)`.

  Returns:
    `Space`.
  """
  name = str((about or {}).get("name") or "custom")
  key = re.sub("[^a-z0-9]", "", name.lower().partition("/")[0])
  known, constants = _KNOWN.get(key, (name, None))
  padding = 2 if tuple(shape[:2]) == (28, 28) else 0
  if constants is None:
    step = next((step for step in preprocess.steps if step.name == "standardize"), None)
    scaled = (
      (np.zeros(shape[2]), np.ones(shape[2]))
      if step is None
      else (step.arrays["mean"] / pixel_max, step.arrays["divisor"] / pixel_max)
    )
    constants = tuple(tuple(map(float, part)) for part in scaled)  # type: ignore[assignment]
  mean, deviation = constants  # type: ignore[misc]
  whitened = preprocess.kind == "zca_absolute" and shape[2] == 3
  return Space(known, key in _KNOWN, float(pixel_max), mean, deviation, padding, whitened)


def for_ddranking(
  pixels, labels, preprocess: Preprocess, pixel_max: float, about: Mapping | None = None
) -> Scored:
  """A distilled set as DD-Ranking expects it.

  Args:
    pixels: `(m, h, w, 1 or 3)` images in stored units, with equally many of each class.
    labels: `(m, c)`: one-hot minus 1/c, or learned.
    preprocess: that of the set.
    pixel_max: the value of white.
    about: the entry `dataset` of an artifact's metadata.

  Returns:
    `Scored`: `images` `(m, 3, h, w)` float32, `hard_labels` `(m,)` int64 and `soft_labels` `(m, c)` float32, in class order;
    settings of `ddranking.Config`; and notes on what DD-Ranking does otherwise than this library.

  Raises:
    ValueError, TypeError: for images of another shape, or other numbers of images per class.
  """
  pixels, labels = np.asarray(pixels), np.asarray(labels, np.float64)
  if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
    raise ValueError(f"images: expected (m, height, width, 1 or 3), got shape {pixels.shape}")
  checks.rank("labels", labels, 2)
  checks.same_rows("images", pixels, "labels", labels)
  m, classes = labels.shape
  if m % classes:
    raise ValueError(f"images: expected a multiple of {classes} classes, got {m} images")
  order, notes = _class_order(labels)
  space = space_of(about, preprocess, pixel_max, pixels.shape[1:])
  if space.whitened:
    images = _channels_first(np.asarray(preprocess.apply(pixels)))
  else:
    images = space.inputs(pixels)
    if any(step.name == "zca" for step in preprocess.steps):
      notes.append(
        f"the set was learned for images whitened by {preprocess.kind}, which DD-Ranking does not offer; it is exported "
        "without whitening"
      )
  if not space.known:
    notes.append(
      f"DD-Ranking does not load {space.dataset}; experiments/studies/dd_ranking_scores.py gives it the rows"
    )
  soft, criterion = _soft_labels(labels)
  side = images.shape[2:]
  hard = np.repeat(np.arange(classes), m // classes)
  settings = {
    "dataset": space.dataset,
    "real_data_path": "./dataset/",
    "ipc": m // classes,
    "im_size": list(side),
    "use_zca": space.whitened,
    # Two by two pooling leaves 4 x 4 pixels.
    "model_name": f"ConvNet-{max(int(np.log2(max(min(side), 2))) - 2, 1)}",
    # In 0.2.0 the augmentation dsa returns nothing, and cutmix does not mix the labels.
    "data_aug_func": None,
    "aug_params": {},
    "use_aug_for_hard": False,
    **criterion,
    "soft_label_mode": "S",
    "optimizer": "sgd",
    "lr_scheduler": "step",
    "step_size": 150,
    "weight_decay": 0.0005,
    "momentum": 0.9,
    "num_epochs": 300,
    "num_eval": 5,
    "real_batch_size": 256,
    "syn_batch_size": 256,
    "random_data_format": "tensor",
    "random_data_path": None,
    "eval_full_data": True,
    "custom_train_trans": None,
    "custom_val_trans": None,
    "use_torchvision": False,
    "stu_use_torchvision": False,
    "tea_use_torchvision": False,
    "teacher_dir": "./teacher_models",
    "teacher_model_names": ["ConvNet-3"],
    "num_workers": 0,
    "device": "cpu",
    "dist": False,
    "save_path": "./results/scores.csv",
  }
  settings["teacher_model_names"] = [settings["model_name"]]
  arrays = {"images": images[order], "hard_labels": hard, "soft_labels": soft[order]}
  return Scored(arrays, settings, [*notes, *_DIFFERENCES])


_DIFFERENCES = (
  "accuracies are percentages inside the exponential of the score, so it is not in [0, 1]",
  "each accuracy is the best over epochs (every tenth, or twentieth for soft labels) and, without syn_lr, over five learning "
  "rates, on the test rows",
  "seeds come from the clock",
  "soft labels pass through a softmax at the temperature of loss_fn_kwargs, so they are stored as logits",
)


def _channels_first(x: np.ndarray) -> np.ndarray:
  """Images as contiguous float32 RGB, channels first."""
  x = np.repeat(x, 3, axis=3) if x.shape[3] == 1 else x
  return np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32)


def _class_order(labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
  """Rows in class order with equally many of each class, and a note if the largest label does not decide it."""
  m, classes = labels.shape
  largest = np.argmax(labels, axis=1)
  if (np.bincount(largest, minlength=classes) == m // classes).all():
    return np.argsort(largest, kind="stable"), []
  # Sets of this library are grouped by class.
  intended = np.repeat(np.arange(classes), m // classes)
  other = int((largest != intended).sum())
  return np.arange(m), [
    f"the classes are those of the rows, in groups of {m // classes}; {other} of {m} rows have their largest label elsewhere"
  ]


def _soft_labels(labels: np.ndarray) -> tuple[np.ndarray, dict]:
  """Targets of DD-Ranking's soft loss, and its settings."""
  share = labels + 1 / labels.shape[1]
  if (share >= -1e-6).all() and np.allclose(share.sum(axis=1), 1, atol=1e-4):
    logits = _TEMPERATURE * np.log(np.maximum(share, _SMALLEST))
    kwargs = {"temperature": _TEMPERATURE, "scale_loss": False}
    return logits.astype(np.float32), {"soft_label_criterion": "kl", "loss_fn_kwargs": kwargs}
  kwargs = {"mse_weight": 1.0, "ce_weight": 0.0}
  return labels.astype(np.float32), {"soft_label_criterion": "mse_gt", "loss_fn_kwargs": kwargs}
