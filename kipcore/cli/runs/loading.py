"""The first rooms of the path: a dataset, behind its preprocessing, with the kernels of the run checked against it."""

from typing import NamedTuple

import jax
import numpy as np

from kipcore import datasets, kernels, preprocess
from kipcore.architectures import architecture
from kipcore.cli.config import DataConfig
from kipcore.cli.cost import planner
from kipcore.cli.errors import usage


class Data(NamedTuple):
  """A dataset behind its preprocessing, as host arrays of the run's dtype.

  `y_*` are one-hot labels minus 1/c; `kernel_fn` is of the network that methods learn through, `score_kernel` of the one that scores.
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
  """The dataset, preprocessed, with the kernel of the run checked against it.

  Raises:
    UsageError: for anything that the user can mend.
  """
  with usage():
    arch = architecture(config.architecture)
    raw = datasets.load_dataset(
      config.dataset, config.data_dir, config.validation_fraction, config.seed, config.train_rows
    )
    planner.check_rows(
      raw, 8 if config.x64 else 4, config.num_devices or jax.local_device_count(), config.test_rows
    )
    return prepare(
      config,
      raw,
      preprocess.fit_preprocess(raw.x_train, config.preprocess, raw.pixel_max),
      kernels.NetworkKernel(arch, config.kernel, precision=config.precision),
    )


def prepare(config, raw: datasets.Dataset, fitted: preprocess.Preprocess, kernel_fn) -> Data:
  """Applies a fitted preprocessing to every split of a dataset."""
  dtype = np.dtype("float64" if config.x64 else "float32")
  test_rows = config.test_rows or raw.x_test.shape[0]

  def split(x, labels):
    y = preprocess.one_hot_centered(labels, raw.num_classes, dtype)
    return fitted.apply(x, dtype), np.asarray(y)

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
  for kernel in (data.kernel_fn, data.score_kernel):
    # The kernel's own checks of rank and size, without computing anything.
    jax.eval_shape(kernel, jax.ShapeDtypeStruct((1, *data.x_train.shape[1:]), dtype))
  return data
