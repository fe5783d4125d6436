"""Reader for published distilled sets of other authors, with the conventions of each publisher.

Such files contain little more than images and labels. They do not record which whitening was
applied to the images, what was subtracted from the labels, or whether mirror images belong to the
set. This module supplies that information from the code that wrote the files. Pickles are decoded
only into arrays, numbers and containers.
"""

import dataclasses
import math
import pathlib
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from kipcore import checks, preprocess
from kipcore.io import formation, image_sets, npz, publishers, torch_files
from kipcore.io.publishers import KINDS
from kipcore.preprocess import Preprocess
from kipcore.types import KipcoreError, Support

_MAX_FLAX_BYTES = 2**30
# For RGB sets: the mean of the training pixels in [0, 1], and the mean and standard deviation that
# DC, DSA, DM and MTT standardize with. Their CIFAR deviation is the average of the deviations
# within each image, which is 0.8 times the deviation over all images and pixels.
_CONSTANTS = {
  "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  "CIFAR-100": ((0.5071, 0.4866, 0.4409), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  "Tiny ImageNet": ((0.478, 0.448, 0.395), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Publishers that standardize with constants; those that always use the ones of ImageNet.
_WITH_CONSTANTS = ("dc", "mtt", "datm", "idc", "dream", "ncfm", "cim", "rded", "sre2l")
_OF_IMAGENET = ("rded",)
_LARGE = 64  # pixels per side from which on images are of (Tiny) ImageNet


class PublishedError(KipcoreError, ValueError):
  """A file that is not a complete distilled set of the expected kind; the message is one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedSet:
  """A published distilled set of other authors, in the conventions of kipcore.

  Attributes:
    kind: one of `KINDS`.
    images: `(m, height, width, channels)` float32, in the space they were stored in; several images in one are separated.
    labels: `(m, c)` float32: one-hot minus 1/c, or learned against targets of that form.
    classes: `(m,)` int32: the index of the largest label of each row.
    labels_note: how the stored labels were converted.
    preprocess: the preprocessing applied to the images, one of `kipcore.preprocess.KINDS`, or None
      if the file does not determine it.
    preprocess_note: how the preprocessing is known, and its exceptions.
    mirrored: whether the mirror images, with the same labels, belong to the set. FRePo and RCIG
      distill RGB images together with their mirror images but store only the originals. Networks
      trained without the mirror images of RCIG's set reach less than half of the accuracy.
    relative_ridge: the stored ridge, as a fraction of tr(K_ss) / m; None if none is stored.
    temperature: the stored factor of the predictions inside a softmax; None if none is stored.
    source: JSON-serializable dict: file, layout, and other data that the publisher stored.
    pixels: whether the images are pixels in [0, 1], to which the preprocessing is still to be applied (IDC, DREAM, NCFM,
      CIM, RDED, SRe2L).
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
  pixels: bool = False

  def support(
    self,
    mirrored: bool | None = None,
    preprocess: Preprocess | None = None,
    pixel_max: float = 255.0,
  ) -> Support:
    """The set as a `Support` for `evaluate_krr` and `evaluate_network`.

    The test rows must be preprocessed with `fit_preprocess(x_train).apply`.

    Args:
      mirrored: whether to append the horizontally mirrored images with the same labels; None for
        `self.mirrored`.
      preprocess: that of `fit_preprocess`; required, and only used, if `pixels` is true.
      pixel_max: the value of full white that it was fitted with.

    Returns:
      `Support` of m or 2 m rows.

    Raises:
      ValueError: if `pixels` is true and `preprocess` is None.
    """
    images, labels = self.images, self.labels
    if self.pixels:
      if preprocess is None:
        raise ValueError(
          f"preprocess: expected that of fit_preprocess(x_train), because the images of {self.kind} are pixels, got None"
        )
      images = np.asarray(preprocess.apply(images * np.float32(pixel_max)))
    if self.mirrored if mirrored is None else mirrored:
      images, labels = (
        np.concatenate([images, images[:, :, ::-1]]),
        np.concatenate([labels, labels]),
      )
    return Support(jnp.asarray(images), jnp.asarray(labels))

  def fit_preprocess(
    self, x_train, kind: str | None = None, pixel_max: float = 255.0
  ) -> Preprocess:
    """The publisher's preprocessing, fitted on the original dataset.

    Its `invert(images)` gives pixels.

    Whitening does not depend on whether channels come first (RFAD, MTT) or last: permuting the
    pixels permutes the second moments and therefore the whitening matrix. The publishers of "dc", "mtt", "datm", "idc",
    "dream", "ncfm", "cim", "rded" and "sre2l" standardize with fixed constants, which differ from the fitted ones. These
    constants are used if the mean of `x_train` matches CIFAR or Tiny ImageNet; for RDED, and for images of 64 pixels and
    more of the last six, those of ImageNet.

    Args:
      x_train: `(n, height, width, channels)` pixels of all available training images.
      kind: one of `kipcore.preprocess.KINDS`, to replace `preprocess`; required if that is None.
      pixel_max: stored value of full white: 255 for uint8, 1 for pixels in [0, 1].

    Returns:
      `Preprocess`.

    Raises:
      ValueError, TypeError: if neither the file nor `kind` determines the preprocessing, for images
        of another shape, and as `kipcore.fit_preprocess`.
    """
    kind = self.preprocess if kind is None else kind
    if kind is None:
      raise ValueError(
        f"kind: expected one of {', '.join(preprocess.KINDS)}, got None; {self.preprocess_note}"
      )
    checks.shape("x_train", x_train, (None, *self.images.shape[1:]))
    fitted = preprocess.fit_preprocess(x_train, kind, pixel_max)
    if self.kind not in _WITH_CONSTANTS or kind != "standardize":
      return fitted
    imagenet = self.kind in _OF_IMAGENET or self.pixels and self.images.shape[1] >= _LARGE
    return _with_constants(fitted, pixel_max, imagenet and self.images.shape[3] == 3)


def load_published(
  path,
  kind: str | None = None,
  experiment: int = 0,
  factor: int | None = None,
  decoding: str | None = None,
  labels=None,
) -> PublishedSet:
  """Reads a distilled set in the file format of its authors.

  Kinds and their files:
    kip    .npz with `images` NHWC and `labels` (Nguyen et al. 2021).
    rfad   .npz with `images` NCHW, `labels`, `k` and `jit` (Loo et al. 2022).
    frepo  .npz with `image` NHWC and `label`, or a Flax checkpoint with `x_proto` and `y_proto`
           (Zhou et al. 2022).
    rcig   Flax checkpoint; the moving average is the result (Loo et al. 2023).
    dc     .pt of DC, DSA or DM: `data`, a list with NCHW images and class indices per experiment
           (Zhao et al. 2021).
    mtt    images_NAME.pt NCHW, with labels_NAME.pt in the same folder (Cazenavette et al. 2022).
    datm   the same with logits as labels, and lr_NAME.pt (Guo et al. 2024).
    idc    data.pt, a pair of NCHW pixels in [0, 1] and class indices, several training images in one (Kim et al. 2022).
    dream  dataSTEP.pt, the same (Liu et al. 2023).
    ncfm   data_STEP.pt, the same (Wang et al. 2025).
    cim    .pt with `dataset`, `data` NCHW and `label`, the same (Shang et al. 2026).
    rded   folder with a folder 00000, 00001, ... of JPEG files for each class (Sun et al. 2024).
    sre2l  folder with folders new000, new001, ... of JPEG files; optionally the labels of their crops (Yin et al. 2023).
  A dictionary with other names, or a pair in a file with another name, does not say who published it, so `kind` is required.

  Args:
    path: name of a file, or of a folder for "rded" and "sre2l".
    kind: one of `KINDS`; None to infer it from the content.
    experiment: index of the experiment in a "dc" file.
    factor: number of training images per side of a stored image of "idc", "dream", "ncfm", "cim" or a folder. None for that
      in the name of the folder (`_factor2`, as IDC and DREAM write it), or 2 for "ncfm" and "cim", or 1 for folders.
    decoding: which training images a stored image contains: "single", "multi" or "bound", as in IDC's --decode_type; None
      for that of the folder name or of the publisher.
    labels: folder of the soft labels of "sre2l" (`epoch_0/batch_0.tar`, ...); the set is then that of the crops of
      the first epoch.

  Returns:
    `PublishedSet`.

  Raises:
    PublishedError: for a file that is missing, damaged, or of another or unknown kind; for arrays
      with the wrong shape or dtype, or with NaN or infinity; for a class without an image.
    ValueError: for an unknown `kind` or `decoding`.
  """
  path = pathlib.Path(path)
  if kind is not None:
    checks.one_of("kind", kind, KINDS)
  if decoding is not None:
    checks.one_of("decoding", decoding, formation.DECODINGS)
  if not path.exists():
    raise PublishedError(f"{path}: expected a distilled set, found no such file")
  try:
    form, content = ("folder", image_sets.read_folder(path)) if path.is_dir() else _read(path)
    if kind is None:
      kind = publishers.guess(form, content, path)
    elif form not in publishers.FORMS[kind]:
      raise PublishedError(
        f"expected a file of kind {kind} ({' or '.join(publishers.FORMS[kind])}), got a {form} "
        f"{'' if form == 'folder' else 'file '}{publishers.describe(content)}"
      )
    options = publishers.Options(experiment, factor, decoding, labels)
    return _checked(kind, path, publishers.READERS[kind](path, content, options))
  except ValueError as error:  # the messages of some readers already contain the path
    text = " ".join(str(error).split())
    raise PublishedError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _read(path):
  """`(form, content)` of a file; the form is ".npz", "torch" or "Flax"."""
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
    raise PublishedError(
      f"expected a Flax checkpoint of at most {_MAX_FLAX_BYTES} bytes, got a larger file"
    )
  from flax import serialization

  try:
    tree = serialization.msgpack_restore(path.read_bytes())
  except Exception as error:  # msgpack raises many exception types
    raise PublishedError(
      "expected a complete .npz file, torch.save file or Flax checkpoint, got a file that cannot "
      "be read as any of them "
      f"({type(error).__name__}: {str(error)[:100]})"
    ) from error
  if not isinstance(tree, dict):
    raise PublishedError(
      "expected a complete .npz file, torch.save file or Flax checkpoint, got another file"
    )
  return "Flax", tree


def _holds_arrays(path) -> bool:
  """Whether a zip archive is an `.npz` file; otherwise it may be a torch.save file."""
  try:
    with zipfile.ZipFile(path) as archive:
      return any(name.endswith(".npy") for name in archive.namelist())
  except Exception as error:  # damaged archives can raise any exception
    raise PublishedError(
      "expected a complete .npz or torch.save file, got one that cannot be read "
      f"({type(error).__name__}: {str(error)[:200]})"
    ) from error


def _checked(kind, path, stored: publishers.Stored) -> PublishedSet:
  """The set in the layout of kipcore, after the checks common to all kinds."""
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
        f"expected the logarithm of the temperature in [-50, 50], got {temperature}"
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
    stored.pixels,
  )


def _with_constants(
  fitted: preprocess.Preprocess, pixel_max: float, imagenet: bool
) -> preprocess.Preprocess:
  """The standardization with published constants, those of ImageNet or those whose dataset the fitted mean matches."""
  spec, arrays = fitted.to_arrays()
  mean = arrays["0_standardize_mean"] / pixel_max
  if imagenet:
    used = dict(zip(("0_standardize_mean", "0_standardize_divisor"), _IMAGENET))
    return preprocess.Preprocess.from_arrays(
      spec, {name: pixel_max * np.array(value) for name, value in used.items()}
    )
  for of_dataset, used_mean, used_deviation in _CONSTANTS.values():
    if mean.shape == (3,) and np.max(np.abs(mean - of_dataset)) < 0.01:
      used = {"0_standardize_mean": used_mean, "0_standardize_divisor": used_deviation}
      return preprocess.Preprocess.from_arrays(
        spec, {name: pixel_max * np.array(value) for name, value in used.items()}
      )
  return fitted
