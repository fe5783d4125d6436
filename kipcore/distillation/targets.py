"""How target rows are dealt out along the device axis."""

from typing import NamedTuple

import jax
import numpy as np

from kipcore import checks, keys
from kipcore.types import Array


class Targets(NamedTuple):
  """Rows to learn from, grouped by class; made by `arrange_targets`.

  Attributes:
    x: `(n, ...)`, padded at the end with repeated rows that are never drawn.
    y: `(n, c)` labels.
    class_counts: `(c,)` int32, rows of each class without the padding.
    share: scalar, these rows' share of all rows times the number of devices; 1 on one device.
  """

  x: Array
  y: Array
  class_counts: Array
  share: Array


def deal_rows(labels, num_devices: int = 1, key=None) -> list[np.ndarray]:
  """Which rows each device gets, in the order in which `arrange_targets` lays them out.

  Args:
    labels: `(n,)` integer class of each row.
    num_devices: D.
    key: shuffles the rows within their class; None keeps their order.

  Returns:
    D arrays of row numbers, together every row once.
  """
  labels = np.asarray(labels)
  order = np.arange(labels.size)
  if key is not None:
    order = np.asarray(jax.random.permutation(keys.canonical_key(key), labels.size))
  order = order[np.argsort(labels[order], kind="stable")]
  return [order[d::num_devices] for d in range(num_devices)]


def gather_rows(shards: list[np.ndarray], values) -> np.ndarray:
  """One value a row from one a slot: the inverse of the deal, without the padding.

  Args:
    shards: of `deal_rows`.
    values: `(D, capacity)`, in the layout of `Targets`.

  Returns:
    `(n,)` in the order in which the rows were before.
  """
  values = np.asarray(values)
  gathered = np.empty(sum(map(len, shards)), values.dtype)
  for rows, own in zip(shards, values):
    gathered[rows] = own[: len(rows)]
  return gathered


def scatter_rows(shards: list[np.ndarray], values, capacity: int) -> np.ndarray:
  """One value a slot from one a row: the inverse of `gather_rows`, NaN in the padding.

  Args:
    shards: of `deal_rows`.
    values: `(n,)`, floating.
    capacity: slots a device, at least the longest of the shards.

  Returns:
    `(D, capacity)`.
  """
  values = np.asarray(values)
  dealt = np.full((len(shards), capacity), np.nan, values.dtype)
  for own, rows in zip(dealt, shards):
    own[: len(rows)] = values[rows]
  return dealt


def arrange_targets(x, y, num_devices: int = 1, key=None, wanted: slice = slice(None)) -> Targets:
  """Groups rows by class and deals them out to devices, with a leading device axis.

  Args:
    x: `(n, ...)` rows (host array).
    y: `(n, c)` labels; the largest entry of a row is its class.
    num_devices: D; shards differ by at most one row a class.
    key: shuffles the rows within their class; None keeps their order.
    wanted: the devices to make shards for: those of this process, where there are several.

  Returns:
    `Targets` with arrays `(D, n_max, ...)`, D the number of devices wanted.

  Raises:
    ValueError, TypeError: where `x` and `y` disagree, are integers, or hold NaN or infinity, or there are fewer rows than devices.
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
      f"expected at least one target row a device, got {x.shape[0]} rows for {num_devices} devices"
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
