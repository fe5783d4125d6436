"""Distribution of the target rows over the device axis."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from kipcore import checks, keys
from kipcore.types import ArrayLike


class Targets(NamedTuple):
  """Rows to learn from, grouped by class; from `arrange_targets`.

  Attributes:
    x: `(n, ...)`, padded at the end by repeated rows, which are never drawn.
    y: `(n, c)` labels.
    class_counts: `(c,)` int32, rows of each class, without padding.
    share: scalar, the fraction of all rows times the number of devices; 1 on one device.
  """

  x: ArrayLike
  y: ArrayLike
  class_counts: ArrayLike
  share: ArrayLike


def deal_rows(
  labels: Int[ArrayLike, " n"], num_devices: int = 1, key: Any = None
) -> list[np.ndarray]:
  """The rows of each device, in the order of `arrange_targets`.

  Args:
    labels: `(n,)` integer class of each row.
    num_devices: D.
    key: shuffles the rows within each class; None keeps their order.

  Returns:
    D arrays of row numbers that partition the rows.
  """
  labels = np.asarray(labels)
  order = np.arange(labels.size)
  if key is not None:
    order = np.asarray(jax.random.permutation(keys.canonical_key(key), labels.size))
  order = order[np.argsort(labels[order], kind="stable")]
  return [order[d::num_devices] for d in range(num_devices)]


def gather_rows(
  shards: list[np.ndarray], values: Shaped[ArrayLike, "D capacity"]
) -> Shaped[np.ndarray, " n"]:
  """Returns values of the device layout to the original order of the rows, without padding.

  Args:
    shards: of `deal_rows`.
    values: `(D, capacity)`, in the layout of `Targets`.

  Returns:
    `(n,)` in the original order of the rows.
  """
  values = np.asarray(values)
  gathered = np.empty(sum(map(len, shards)), values.dtype)
  for rows, shard in zip(shards, values):
    gathered[rows] = shard[: len(rows)]
  return gathered


def scatter_rows(
  shards: list[np.ndarray], values: Float[ArrayLike, " n"], capacity: int
) -> Float[np.ndarray, "D capacity"]:
  """The inverse of `gather_rows`, with NaN in the padding.

  Args:
    shards: of `deal_rows`.
    values: `(n,)`, floating.
    capacity: rows per device, at least those of the largest shard.

  Returns:
    `(D, capacity)`.
  """
  values = np.asarray(values)
  scattered = np.full((len(shards), capacity), np.nan, values.dtype)
  for shard, rows in zip(scattered, shards):
    shard[: len(rows)] = values[rows]
  return scattered


def arrange_targets(
  x: Float[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  num_devices: int = 1,
  key: Any = None,
  wanted: slice = slice(None),
) -> Targets:
  """Groups rows by class and distributes them over devices, with a leading device axis.

  Args:
    x: `(n, ...)` rows (host array).
    y: `(n, c)` labels; the largest entry of a row is its class.
    num_devices: D; shards differ by at most one row per class.
    key: shuffles the rows within each class; None keeps their order.
    wanted: the devices whose shards to return: those of this process, if there are several.

  Returns:
    `Targets` with arrays `(D, n_max, ...)`, D the number of wanted devices.

  Raises:
    ValueError, TypeError: for different numbers of rows, an integer dtype, NaN or infinity, or fewer rows than devices.
  """
  checks.rank("y", y, 2)
  checks.same_rows("x", x, "y", y)
  num_devices = checks.positive_int("num_devices", num_devices)
  for name, array in (("x", x), ("y", y)):
    checks.floating(name, array)
    checks.finite(name, array)
  x, y = np.asarray(x), np.asarray(y)
  if x.shape[0] < num_devices:
    raise ValueError(
      f"expected at least one target row per device, got {x.shape[0]} rows for {num_devices} devices"
    )
  labels = np.argmax(y, axis=1)
  shards = deal_rows(labels, num_devices, key)
  longest = max(map(len, shards))
  counts = np.stack([np.bincount(labels[shard], minlength=y.shape[1]) for shard in shards]).astype(
    np.int32
  )
  share = np.array([len(shard) for shard in shards]) * (num_devices / x.shape[0])
  rows = np.stack(
    [np.pad(shard, (0, longest - len(shard)), mode="edge") for shard in shards[wanted]]
  )
  return Targets(x[rows], y[rows], counts[wanted], share[wanted].astype(y.dtype))
