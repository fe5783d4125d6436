"""Initial sets from files: `--init=FILE` with an artifact of kipcore or a published set of other authors."""

import pathlib

import jax.numpy as jnp
import numpy as np

from kipcore import checks
from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.runs.loading import Data
from kipcore.io import artifact, npz, published
from kipcore.preprocess import one_hot_centered
from kipcore.selection import coreset


def is_file(init: str) -> bool:
  """Whether `--init` names a file instead of a strategy."""
  path = pathlib.Path(init)
  return init not in ("", *coreset.STRATEGIES) and (path.suffix != "" or path.exists())


def check(init: str) -> None:
  """Raises UsageError unless `--init` is a strategy or an existing file."""
  if is_file(init):
    if not pathlib.Path(init).is_file():
      raise UsageError(f"--init: expected a strategy or a file, found no file {init}")
  elif init not in coreset.STRATEGIES:
    checks.one_of("--init", init, (*coreset.STRATEGIES, "a file with a distilled set"))


def read(path: str) -> artifact.Artifact | published.PublishedSet:
  """The set in a file; UsageError for another file."""
  try:
    return artifact.load_artifact(path) if _is_artifact(path) else published.load_published(path)
  except (ValueError, OSError) as error:
    raise UsageError(f"--init: {error}") from error


def _is_artifact(path: str) -> bool:
  """Whether a file is an artifact of kipcore, by the name of one of its arrays."""
  try:
    return npz.METADATA in npz.names_in(path)
  except npz.NpzError:
    return False


def with_size(given: dict) -> dict:
  """The settings that a user gave, with the images per class of the file of `init`, unless given.

  Raises:
    UsageError: for a file without a set, or whose number of images is no multiple of the number of classes.
  """
  path = given.get("init", "")
  if "images_per_class" in given or not is_file(path):
    return given
  check(path)
  images, classes = read(path).labels.shape
  if images % classes:
    raise UsageError(
      f"--init: {path}: expected equally many images per class, got {images} images of {classes} classes"
    )
  return {**given, "images_per_class": images // classes}


def coreset_of(config: DistillConfig, data: Data, classes: bool) -> coreset.Coreset:
  """The set of `config.init` in the preprocessing and the label convention of a run.

  The images are converted to pixels with the preprocessing recorded in the file (for published sets: that of their
  publisher, fitted on the training and validation rows), and preprocessed like the rows of the run.

  Args:
    config: settings of the run.
    data: its data.
    classes: whether labels are classes: the largest entry of learned ones.

  Returns:
    The points, all synthetic; the weights are equal shares of the rows.

  Raises:
    UsageError: for a set of another number or shape of images or number of classes, or a file that does not determine
      its preprocessing.
  """
  path, stored = config.init, read(config.init)
  row, c = data.x_train.shape[1:], data.y_train.shape[1]
  expected = ((config.images_per_class * c, *row), (config.images_per_class * c, c))
  if (stored.images.shape, stored.labels.shape) != expected:
    raise UsageError(
      f"--init: {path}: expected images {expected[0]} and labels {expected[1]} ({config.images_per_class} per class), "
      f"got {stored.images.shape} and {stored.labels.shape}"
    )
  x = data.preprocess.apply(_pixels(path, stored, data), data.x_train.dtype)
  y = stored.labels.astype(data.y_train.dtype)
  if classes:
    y = np.asarray(one_hot_centered(np.argmax(y, axis=1), c, y.dtype))
  rows, indices = len(data.x_train), np.full(len(x), -1, np.int32)
  weights = jnp.full(len(x), rows / len(x), x.dtype)
  name = pathlib.Path(path).name
  return coreset.Coreset(jnp.asarray(x), jnp.asarray(y), indices, weights, name)


def _pixels(path: str, stored, data: Data) -> np.ndarray:
  """The images of a set in the pixel units of the dataset."""
  raw = data.raw
  if isinstance(stored, artifact.Artifact):
    white = (stored.metadata.get("dataset") or {}).get("pixel_max") or raw.pixel_max
    return stored.images * (raw.pixel_max / white)
  if stored.preprocess is None:
    raise UsageError(
      f"--init: {path}: expected a file that determines the preprocessing of its images, got a {stored.kind} file; "
      f"{stored.preprocess_note}"
    )
  if stored.pixels:
    return stored.images * np.float32(raw.pixel_max)
  rows = np.concatenate([raw.x_train, raw.x_validation])
  return np.asarray(stored.fit_preprocess(rows, pixel_max=raw.pixel_max).invert(stored.images))
