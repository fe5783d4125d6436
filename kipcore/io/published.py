"""Distilled sets that others published, read with the conventions of their publishers.

Such files carry images and labels and little else: not which of five whitenings the images are behind, nor what was
subtracted from the labels, nor that mirror images belong to them. What a file does not say is known from the code that
wrote it, and said here.
Nothing is ever unpickled into anything but arrays, numbers and containers.
"""

import dataclasses
import math
import pathlib
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from kipcore import checks, preprocess
from kipcore.io import npz, publishers, torch_files
from kipcore.io.publishers import KINDS
from kipcore.preprocess import Preprocess
from kipcore.types import KipcoreError, Support

_MAX_FLAX_BYTES = 2**30
# Of RGB sets: the mean of the training pixels in [0, 1], and the mean and deviation that DC, DSA, DM and MTT standardize
# with. Their CIFAR deviation is that within images, averaged: 0.8 times that over images and pixels.
_CONSTANTS = {
  "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  "CIFAR-100": ((0.5071, 0.4866, 0.4409), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  "Tiny ImageNet": ((0.478, 0.448, 0.395), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class PublishedError(KipcoreError, ValueError):
  """A file that is no whole distilled set of the expected kind; the message is one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedSet:
  """A distilled set of other authors, in our conventions.

  Attributes:
    kind: one of `KINDS`.
    images: `(m, height, width, channels)` float32, in the space that they were stored in.
    labels: `(m, c)` float32: one-hot minus 1/c, or learned against targets of that form.
    classes: `(m,)` int32: where a row of labels is largest.
    labels_note: what was done to the stored labels.
    preprocess: the recipe, of `kipcore.preprocess.KINDS`, behind which the images are; None where the file cannot tell.
    preprocess_note: where that is known from, and its exceptions.
    mirrored: whether the mirror images, with the same labels, belong to the set: FRePo and RCIG distill RGB images together with
      theirs and store one half. Networks trained on that half of RCIG's set reach less than half of the accuracy.
    relative_ridge: the stored ridge, as a fraction of tr(K_ss) / m; None where none is stored.
    temperature: the stored factor of the predictions inside a softmax; None where none is stored.
    source: JSON-able dict: file, layout, and what else the publisher stored.
  """

  kind: str
  images: np.ndarray
  labels: np.ndarray
  classes: np.ndarray
  labels_note: str
  preprocess: str | None
  preprocess_note: str
  mirrored: bool
  relative_ridge: float | None
  temperature: float | None
  source: dict[str, Any]

  def support(self, mirrored: bool | None = None) -> Support:
    """The set for `evaluate_krr` and `evaluate_network`, whose test rows go through `fit_preprocess(x_train).apply`.

    Args:
      mirrored: whether images mirrored left to right follow the stored ones, with their labels; None for `self.mirrored`.

    Returns:
      `Support` of m or 2 m rows.
    """
    images, labels = self.images, self.labels
    if self.mirrored if mirrored is None else mirrored:
      images, labels = (
        np.concatenate([images, images[:, :, ::-1]]),
        np.concatenate([labels, labels]),
      )
    return Support(jnp.asarray(images), jnp.asarray(labels))

  def fit_preprocess(
    self, x_train, kind: str | None = None, pixel_max: float = 255.0
  ) -> Preprocess:
    """The publisher's preprocessing, fitted on the dataset that was distilled; its `invert(images)` gives pixels.

    Whitening is the same for channels first (as RFAD and MTT flatten) and last: the matrix is a function of the second
    moments, and permuting these permutes it. Sets of "dc" and "mtt" that were standardized were so with fixed numbers; where
    the mean of `x_train` is that of CIFAR or Tiny ImageNet, these take the place of the fitted ones, from which they differ.

    Args:
      x_train: `(n, height, width, channels)` training pixels, as many as there are.
      kind: of `kipcore.preprocess.KINDS`, where `preprocess` is None, or in its place.
      pixel_max: stored value of full white: 255 for uint8, 1 for pixels in [0, 1].

    Returns:
      `Preprocess`.

    Raises:
      ValueError, TypeError: where neither the file nor `kind` names a recipe, for images of another shape, and as
        `kipcore.fit_preprocess` does.
    """
    kind = self.preprocess if kind is None else kind
    if kind is None:
      raise ValueError(
        f"kind: expected one of {', '.join(preprocess.KINDS)}, got None; {self.preprocess_note}"
      )
    checks.shape("x_train", x_train, (None, *self.images.shape[1:]))
    fitted = preprocess.fit_preprocess(x_train, kind, pixel_max)
    return (
      _with_constants(fitted, pixel_max)
      if self.kind in ("dc", "mtt") and kind == "standardize"
      else fitted
    )


def load_published(path, kind: str | None = None, experiment: int = 0) -> PublishedSet:
  """Reads a distilled set as its authors' code wrote it.

  Kinds and their files:
    kip    .npz with `images` NHWC and `labels` (Nguyen et al. 2021).
    rfad   .npz with `images` NCHW, `labels`, `k` and `jit` (Loo et al. 2022).
    frepo  .npz with `image` NHWC and `label`, or a Flax checkpoint with `x_proto` and `y_proto` (Zhou et al. 2022).
    rcig   Flax checkpoint, whose moving average is the result (Loo et al. 2023).
    dc     .pt of DC, DSA or DM: `data`, a list with images NCHW and class numbers of each experiment (Zhao et al. 2021).
    mtt    images_NAME.pt NCHW, with labels_NAME.pt beside it (Cazenavette et al. 2022).

  Args:
    path: file name.
    kind: of `KINDS`; None to go by what is in the file.
    experiment: which of the experiments of a "dc" file.

  Returns:
    `PublishedSet`.

  Raises:
    PublishedError: for a file that is missing, damaged, of another kind or of none that is known; arrays of the wrong shape or
      dtype, or with NaN or infinity; a class without an image.
    ValueError: for an unknown `kind`.
  """
  path = pathlib.Path(path)
  if kind is not None:
    checks.one_of("kind", kind, KINDS)
  if not path.is_file():
    raise PublishedError(
      f"{path}: expected a distilled set, found {'a folder' if path.is_dir() else 'no such file'}"
    )
  try:
    form, content = _read(path)
    if kind is None:
      kind = publishers.guess(form, content)
    elif form not in publishers.FORMS[kind]:
      raise PublishedError(
        f"expected a file of kind {kind} ({' or '.join(publishers.FORMS[kind])}), got a {form} file "
        f"{publishers.describe(content)}"
      )
    return _checked(kind, path, publishers.READERS[kind](path, content, experiment))
  except ValueError as error:  # of the readers as well, some of which name the file themselves
    text = " ".join(str(error).split())
    raise PublishedError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _read(path):
  """(".npz", "torch" or "Flax", content of the file)."""
  with open(path, "rb") as file:
    start = file.read(len(torch_files.LEGACY))
  if start.startswith(b"PK"):
    return (
      (".npz", npz.read_npz(path))
      if _holds_arrays(path)
      else ("torch", torch_files.read_torch_file(path))
    )
  if start == torch_files.LEGACY:
    return "torch", torch_files.read_torch_file(path)
  if path.stat().st_size > _MAX_FLAX_BYTES:
    raise PublishedError(f"expected at most {_MAX_FLAX_BYTES} bytes of a Flax checkpoint, got more")
  from flax import serialization

  try:
    tree = serialization.msgpack_restore(path.read_bytes())
  except Exception as error:  # msgpack raises many kinds
    raise PublishedError(
      "expected a whole .npz file, file of torch.save or Flax checkpoint, got one that reads as none of them "
      f"({type(error).__name__}: {str(error)[:100]})"
    ) from error
  if not isinstance(tree, dict):
    raise PublishedError(
      "expected a whole .npz file, file of torch.save or Flax checkpoint, got none of them"
    )
  return "Flax", tree


def _holds_arrays(path) -> bool:
  """Whether an archive is an `.npz` file; else it is one of torch.save, if any."""
  try:
    with zipfile.ZipFile(path) as archive:
      return any(name.endswith(".npy") for name in archive.namelist())
  except Exception as error:  # what damaged archives raise knows no bounds
    raise PublishedError(
      "expected a whole .npz file or file of torch.save, got one that does not read "
      f"({type(error).__name__}: {str(error)[:200]})"
    ) from error


def _checked(kind, path, stored: publishers.Stored) -> PublishedSet:
  """The set in our layout, after what holds for all of them was checked."""
  images, layout = stored.images, stored.layout
  if (
    not isinstance(images, np.ndarray)
    or images.ndim != 4
    or 0 in images.shape
    or images.shape[layout.index("C")] not in (1, 3)
  ):
    raise PublishedError(
      f"images: expected an array {layout} with 1 or 3 channels, got {publishers.describe(images)}"
    )
  source = {"file": path.name, "layout": layout, "dtype": images.dtype.name, **stored.source}
  images = publishers.floats("images", images)
  images = np.ascontiguousarray(images.transpose(0, 2, 3, 1) if layout == "NCHW" else images)
  labels = stored.labels.astype(np.float32)
  checks.same_rows("images", images, "labels", labels)
  if stored.relative_ridge is not None:
    checks.positive("ridge", stored.relative_ridge)
  temperature = stored.log_temperature
  if temperature is not None:
    if abs(temperature) > 50:
      raise PublishedError(
        f"expected a logarithm of a temperature within 50 of 0, got {temperature}"
      )
    temperature = math.exp(temperature)
  return PublishedSet(
    kind,
    images,
    labels,
    np.argmax(labels, axis=1).astype(np.int32),
    stored.labels_note,
    stored.preprocess,
    stored.preprocess_note,
    stored.mirrored,
    stored.relative_ridge,
    temperature,
    source,
  )


def _with_constants(fitted: preprocess.Preprocess, pixel_max: float) -> preprocess.Preprocess:
  """The standardization with the numbers of `_CONSTANTS`, where the fitted mean is that of a dataset there."""
  spec, arrays = fitted.to_arrays()
  mean = arrays["0_standardize_mean"] / pixel_max
  for of_dataset, used_mean, used_deviation in _CONSTANTS.values():
    if mean.shape == (3,) and np.max(np.abs(mean - of_dataset)) < 0.01:
      used = {"0_standardize_mean": used_mean, "0_standardize_divisor": used_deviation}
      return preprocess.Preprocess.from_arrays(
        spec, {name: pixel_max * np.array(value) for name, value in used.items()}
      )
  return fitted
