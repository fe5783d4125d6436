"""Datasets of the studies of selected rows, with standardized columns."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
  """Training rows `(n, d)` and test rows `(t, d)` in float32, and their labels.

  Labels are int32 classes or float32 targets `(n,)`, standardized with the moments of the training rows.
  """

  x: np.ndarray
  y: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray

  @property
  def has_classes(self) -> bool:
    """Whether the labels are classes."""
    return self.y.dtype.kind != "f"


def _wrong_labels(y: np.ndarray, fraction: float) -> np.ndarray:
  """Labels of which a fraction is replaced by other classes."""
  rng = np.random.default_rng(0)
  classes = y.max() + 1
  flipped = rng.random(len(y)) < fraction
  return np.where(flipped, (y + rng.integers(1, classes, len(y))) % classes, y)


def _images(name: str, data_dir: str | None, wrong: float = 0.0):
  """Pixels of a TFDS dataset as vectors, a fraction of the training labels replaced by others."""
  from kipcore.datasets import load_dataset

  data = load_dataset(name, data_dir, 0.0)
  x, x_test = (a.reshape(len(a), -1).astype(np.float32) for a in (data.x_train, data.x_test))
  y = _wrong_labels(np.array(data.y_train), wrong)
  order = np.random.default_rng(0).permutation(len(y))
  return x[order], y[order], x_test, data.y_test


def _split(x, y, num_test: int):
  """The first rows as test rows."""
  return x[num_test:], y[num_test:], x[:num_test], y[:num_test]


def _diabetes(_):
  from sklearn.datasets import load_diabetes

  x, y = load_diabetes(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(y))
  return _split(x[order], y[order], 100)


def _friedman(_, n: int = 20_000):
  """A nonlinear function of five of ten columns, with noise."""
  from sklearn.datasets import make_friedman1

  return _split(*make_friedman1(n + 2000, 10, noise=1.0, random_state=0), 2000)


def _heavy_tailed(_, n: int = 5000):
  """A linear target of columns with Student's t distribution (3 degrees of freedom), and such noise."""
  rng = np.random.default_rng(0)
  x = rng.standard_t(3, (n + 2000, 10))
  return _split(x, x @ rng.normal(size=10) + rng.standard_t(3, n + 2000), 2000)


def _imbalanced(_, n: int = 5000):
  """Two classes, 100 : 1."""
  from sklearn.datasets import make_classification

  x, y = make_classification(
    n + 10_000, 20, n_informative=8, weights=[100 / 101], flip_y=0.0, class_sep=0.8, random_state=0
  )
  return _split(x, y, 10_000)


def _wrong_tabular(_, n: int = 5000):
  """Five classes, 10 % of the training labels wrong."""
  from sklearn.datasets import make_classification

  x, y = make_classification(
    n + 5000, 20, n_informative=8, n_classes=5, flip_y=0.0, class_sep=1.5, random_state=1
  )
  x, y, x_test, y_test = _split(x, y, 5000)
  return x, _wrong_labels(y, 0.1), x_test, y_test


def _duplicates(_, n: int = 20_000):
  """2,000 distinct rows of Friedman's function, repeated with frequencies of a power law."""
  x, y, x_test, y_test = _friedman(None, 2000)
  p = 1 / np.arange(1, 2001)
  rows = np.random.default_rng(1).choice(2000, n, p=p / p.sum())
  return x[rows], y[rows], x_test, y_test


# Loaders of arrays from --data_dir.
DATASETS: dict[str, Callable] = {
  "diabetes": _diabetes,
  "friedman": _friedman,
  "heavy_tailed": _heavy_tailed,
  "imbalanced": _imbalanced,
  "wrong_labels": _wrong_tabular,
  "duplicates": _duplicates,
  "digits": functools.partial(_images, "digits"),
  "mnist": functools.partial(_images, "mnist"),
  "mnist_wrong_labels": functools.partial(_images, "mnist", wrong=0.1),
  "cifar10": functools.partial(_images, "cifar10"),
}
NEEDS_FILES = ("mnist", "mnist_wrong_labels", "cifar10")


def load(name: str, data_dir: str | None = None, train_rows: int = 0) -> Rows:
  """A dataset, with at most `train_rows` training rows (0 for all)."""
  x, y, x_test, y_test = DATASETS[name](data_dir)
  x, y = x[: train_rows or None], y[: train_rows or None]
  mean, std = x.mean(axis=0), x.std(axis=0)
  std = np.where(std > 1e-6 * std.max(), std, 1)
  columns = lambda a: ((a - mean) / std).astype(np.float32)
  if y.dtype.kind == "f":
    labels = lambda a, center=y.mean(), scale=y.std(): ((a - center) / scale).astype(np.float32)
  else:
    labels = lambda a: a.astype(np.int32)
  return Rows(columns(x), labels(y), columns(x_test), labels(y_test))
