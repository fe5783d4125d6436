"""Loads and preprocesses a dataset, and checks that the kernels of the run accept it."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from kipcore import datasets, kernels, preprocess
from kipcore.architectures import architecture
from kipcore.cli.config import DataConfig, validate
from kipcore.cli.cost import planner
from kipcore.cli.errors import UsageError, usage
from kipcore.cli.runs import preprocess_cache

# The architecture that depends on the shape of the rows.
AUTO = "auto"


class Data(NamedTuple):
  """A preprocessed dataset, as host arrays of the run's dtype.

  `y_*` are one-hot labels minus 1/c; `kernel_fn` is the kernel of the network that methods use,
  `score_kernel` of the one that scores.
  """

  raw: datasets.Dataset
  preprocess: preprocess.Preprocess
  x_train: np.ndarray
  y_train: np.ndarray
  x_validation: np.ndarray
  y_validation: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  kernel_fn: kernels.NetworkKernel
  score_kernel: kernels.NetworkKernel


def load(config: DataConfig) -> Data:
  """Loads and preprocesses the dataset of a config.

  Args:
    config: settings of the run.

  Returns:
    The data, with the kernels.

  Raises:
    UsageError: for invalid settings or data.
  """
  validate(config)
  with usage():
    if config.architecture != AUTO:
      architecture(config.architecture)
    try:
      raw = datasets.load_dataset(
        config.dataset,
        config.data_dir,
        config.validation_fraction,
        config.seed,
        config.train_rows,
        config.test_fraction,
      )
    except datasets.DatasetError as error:
      flag = "" if str(error).startswith("data_dir:") else "--dataset: "
      raise ValueError(f"{flag}{error}") from error
    config = dataclasses.replace(
      config, architecture=architecture_of(config, raw.x_train.shape[1:])
    )
    plain, raw = raw, filled(config, raw)
    planner.check_rows(
      raw, 8 if config.x64 else 4, config.num_devices or jax.local_device_count(), config.test_rows
    )
    return prepare(
      config,
      raw,
      preprocess_cache.fit(plain.x_train, config.preprocess, raw.pixel_max, plain.hashes["train"]),
      kernels.NetworkKernel(
        architecture(config.architecture), config.kernel, precision=config.precision
      ),
    )


def filled(config: DataConfig, raw: datasets.Dataset) -> datasets.Dataset:
  """The dataset with the rows that `--fill` adds; UsageError without it if a class is too small."""
  with usage():
    if config.fill:
      return datasets.fill_classes(raw, config.images_per_class, config.fill, config.seed)
  counts = np.bincount(raw.y_train, minlength=raw.num_classes)
  if (least := int(counts.min())) < config.images_per_class:
    name = (raw.class_names or range(raw.num_classes))[int(counts.argmin())]
    raise UsageError(
      f"--images_per_class: expected at most the {least} rows of the smallest class, {name}, got "
      f"{config.images_per_class}; --fill=repeat or --fill=augment adds rows"
    )
  return raw


def architecture_of(config: DataConfig, shape: tuple[int, ...] = (32, 32, 3)) -> str:
  """The name of the architecture for rows of a shape; `AUTO` is conv3 for images of 16 pixels and more, and fc1 for rows that are not images.

  Smaller images have fewer layers, so that the last convolution still sees 4 x 4 pixels: the instance norm after it
  removes most of what is in a smaller map.
  """
  if config.architecture != AUTO:
    return config.architecture
  side = min(shape[:2]) if len(shape) == 3 else 1
  depth = min(3, max(side.bit_length() - 2, int(side > 1)))
  return f"conv{depth}" if depth else "fc1"


def prepare(config, raw: datasets.Dataset, fitted: preprocess.Preprocess, kernel_fn) -> Data:
  """The data of a dataset with a fitted preprocessing."""
  dtype = np.dtype("float64" if config.x64 else "float32")
  test_rows = config.test_rows or raw.x_test.shape[0]

  def split(x, labels) -> tuple[np.ndarray, np.ndarray]:
    y = preprocess.one_hot_centered(labels, raw.num_classes, dtype)
    return np.asarray(fitted.apply(x, dtype)), np.asarray(y)

  data = Data(
    raw,
    fitted,
    *split(raw.x_train, raw.y_train),
    *split(raw.x_validation, raw.y_validation),
    *split(raw.x_test[:test_rows], raw.y_test[:test_rows]),
    kernel_fn,
    kernels.NetworkKernel(
      architecture(config.score_architecture or config.architecture), config.kernel
    ),
  )
  names = ("architecture", "score_architecture" if config.score_architecture else "architecture")
  for flag, kernel in zip(names, (data.kernel_fn, data.score_kernel)):
    check_rows(f"--{flag}={kernel.arch.name}", kernel, data.x_train.shape[1:], dtype)
  return data


def notes(data: Data) -> list[str]:
  """Lines about how a dataset was read, such as skipped files or images that look like channels first."""
  return [f"note: {data.raw.note}"] if data.raw.note else []


def check_rows(what: str, kernel_fn, shape: tuple, dtype) -> None:
  """Raises UsageError, with `what` the user chose, unless a kernel accepts rows of a shape."""
  if kernel_fn.arch.convolutional and len(shape) != 3:
    raise UsageError(
      f"{what}: expected a dataset of images (height, width, channels), got rows of shape {shape}; "
      "fc1, fc2, ... accept them"
    )
  try:  # the kernel's checks of rank and size, without computing anything
    jax.eval_shape(kernel_fn, jax.ShapeDtypeStruct((1, *shape), dtype))
  except (ValueError, TypeError) as error:
    reason = str(error).removeprefix("x1: ")
    raise UsageError(f"{what}: not possible for rows of shape {shape}: {reason}") from error
