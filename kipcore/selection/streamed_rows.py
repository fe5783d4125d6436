"""`stream_select`: selection of weighted rows from data that do not fit in memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from kipcore import blocks, checks, keys
from kipcore.kernels import rbf_fn
from kipcore.selection import coreset, duplicates, rows, score_ridge, streaming
from kipcore.selection.coreset import Coreset
from kipcore.types import ArrayLike, KernelFn

STRATEGIES = ("uniform", "lightweight", "leverage", "krr_sensitivity")
# Rows from which the ridge of the scores is chosen.
_RIDGE_ROWS = 2000


class Moments(NamedTuple):
  """Weighted moments of rows: `total` weight, `mean` and `variance` `(d,)` float64 of each column."""

  total: float
  mean: np.ndarray
  variance: np.ndarray


def stream_select(
  key,
  x: Any,
  y: Shaped[ArrayLike, "n ..."] | None = None,
  size: int | None = None,
  size_per_class: int | None = None,
  strategy: str = "lightweight",
  kernel_fn: KernelFn | None = None,
  weights: Float[ArrayLike, " n"] | None = None,
  allocation: str = "proportional",
  transform: Callable | None = None,
  block_size: int = 4096,
) -> Coreset:
  """`select` for rows on disk, which are read in blocks: two passes, or four with a kernel.

  The strategies are "uniform", "lightweight", "leverage" and "krr_sensitivity" of `select`. Labels,
  weights and a few numbers for each row are in memory, the rows are not. Equal rows are merged by
  128-bit hashes. Scores with a kernel are the upper bounds of `stream_krr_sensitivities`; their
  ridge is chosen on 2,000 random rows (heuristic, the bounds hold for every ridge).

  Args:
    key: random key (or int seed).
    x: `(n, ...)` rows: an array, or an object with `shape` that supports slices and ascending
      integer arrays as indices, such as `np.memmap`.
    y, size, size_per_class, weights, allocation: as for `select`.
    strategy: see above.
    kernel_fn: as for `select`.
    transform: function that converts a block of `x` to floating rows, e.g. `Preprocess.apply`; None
      if the rows are already floating.
    block_size: number of rows that are read at a time.

  Returns:
    `Coreset`, with the transformed rows.

  Raises:
    ValueError, TypeError: as `select`. The message for NaN rows names the block.

  Example:
    >>> x = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    >>> chosen = kipcore.stream_select(0, x, size=10)
    >>> chosen.x.shape, chosen.strategy
    ((10, 3), 'lightweight')
  """
  checks.one_of("strategy", strategy, STRATEGIES)
  checks.one_of("allocation", allocation, rows.ALLOCATIONS)
  block_size, n = checks.positive_int("block_size", block_size), x.shape[0]
  mass = rows.input_weights(weights, n)
  labels = rows.read_labels(y, n, mass > 0)
  rows.check_labels(strategy, labels)
  limit = rows.check_size(labels, mass, size, size_per_class, allocation)
  read = lambda part: read_block(x, part, transform)
  stream, dtype = keys.stream(key, "select"), read(slice(0, 1)).dtype
  moments, hashes = _first_pass(read, n, block_size, mass)
  for seed, array in enumerate((labels.classes, labels.real), 1):
    if array is not None:
      hashes += duplicates.row_hashes(array, seed)
  merged = duplicates.merge_hashes(hashes, mass)
  every = np.arange(n)
  groups, targets = rows.groups_and_targets(labels, every, mass / mass.sum(), dtype)
  spread = dtype.type(np.sqrt(moments.variance.sum()) or 1.0)
  kernel = rbf_fn(spread) if kernel_fn is None else checks.hashable(kernel_fn)
  score_of = lambda: _krr_scores(
    stream, read, n, targets, limit, kernel_fn, spread, mass, block_size
  )
  ridge: float | None = None
  scored: Any = None
  if strategy in rows.USES_KERNEL or allocation == "sensitivity":
    ridge, scored = score_of()
  merge = lambda values: np.bincount(
    merged.place[merged.place >= 0],
    weights=np.asarray(values, np.float64)[merged.place >= 0],
    minlength=merged.rows.size,
  )
  quotas = rows.class_sizes(
    groups[merged.rows],
    merged.weights,
    limit,
    size_per_class is not None,
    allocation,
    lambda: merge(scored.scores),
  )
  chosen, mix = np.arange(merged.rows.size), 0.0
  found: Any = merged.weights
  if quotas.sum() < merged.rows.size:
    if strategy == "uniform":
      probabilities = merged.weights
    elif strategy == "lightweight":
      probabilities = merge(
        _lightweight(read, n, block_size, mass, moments, spread, labels, targets)
      )
    else:
      probabilities = merge(scored.leverage if strategy == "leverage" else scored.scores)
      mix = rows.UNIFORM_MIX
    sample = rows.draw(
      stream,
      jnp.asarray(probabilities, dtype),
      groups[merged.rows],
      quotas,
      mix,
      jnp.asarray(merged.weights, dtype),
    )
    chosen, found = np.asarray(sample.indices), np.asarray(sample.weights)
  order = np.argsort(groups[merged.rows[chosen]], kind="stable")
  indices = merged.rows[chosen[order]]
  back = np.argsort(np.argsort(indices))
  points = read(np.sort(indices))[back]
  uses = strategy in rows.USES_KERNEL
  return Coreset(
    jnp.asarray(points),
    jnp.zeros((indices.size, 0), dtype) if y is None else jnp.asarray(np.asarray(y)[indices]),
    indices.astype(np.int32),
    jnp.asarray(found[order], dtype),
    strategy,
    ridge=ridge if uses else None,
    scores=scored if uses else None,
    kernel_fn=kernel if uses else None,
  )


def read_block(x, part, transform) -> np.ndarray:
  """A block of floating rows, checked; half precision becomes float32."""
  block = np.asarray(x[part] if transform is None else transform(x[part]))
  checks.floating("x", block)
  if block.dtype.itemsize < 4:
    block = block.astype(np.float32)
  block = block.astype(jax.dtypes.canonicalize_dtype(block.dtype), copy=False)
  if not np.isfinite(block).all():
    where = f"rows {part.start} to {part.stop - 1}" if isinstance(part, slice) else "selected rows"
    raise ValueError(f"x: expected finite values, got NaN or infinite ones in {where}")
  return block


def block_moments(old: Moments | None, block: np.ndarray, weights: np.ndarray) -> Moments:
  """Moments of earlier rows and a block `(b, d)` with weights `(b,)`, of which one is positive."""
  block, total = block.astype(np.float64), weights.sum()
  if not total:
    return Moments(0.0, block[0] * 0, block[0] * 0) if old is None else old
  mean = weights @ block / total
  variance = weights @ (block - mean) ** 2 / total
  if old is None or not old.total:
    return Moments(total, mean, variance)
  both = old.total + total
  share, step = total / both, mean - old.mean
  return Moments(
    both,
    old.mean + share * step,
    (1 - share) * old.variance + share * variance + share * (1 - share) * step**2,
  )


def moments_of(read: Callable, n: int, weights: np.ndarray, block_size: int) -> Moments:
  """Moments of n rows as vectors, which `read` returns for slices."""
  moments: Any = None
  for part in blocks.row_slices(n, block_size):
    block = read(part)
    moments = block_moments(moments, block.reshape(block.shape[0], -1), weights[part])
  return moments


def standardization(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation `(d,)` of each column; 1 for columns that are constant up to rounding."""
  deviation = np.sqrt(moments.variance)
  rounding = 8 * np.finfo(np.float32).eps * np.abs(moments.mean)
  return moments.mean, np.where(deviation > rounding, deviation, 1)


def _first_pass(read, n, block_size, mass) -> tuple[Moments, np.ndarray]:
  """Moments of the rows as vectors, and two hashes of each row."""
  hashes = np.empty((n, 2), np.uint64)
  moments: Any = None
  for part in blocks.row_slices(n, block_size):
    block = read(part)
    block = block.reshape(block.shape[0], -1)
    hashes[part] = duplicates.row_hashes(block, 0)
    moments = block_moments(moments, block, mass[part])
  return moments, hashes


def _lightweight(read, n, block_size, mass, moments, spread, labels, targets) -> np.ndarray:
  """`lightweight_sensitivities` of the rows, with real targets as in `select`."""
  squares = np.empty(n)
  for part in blocks.row_slices(n, block_size):
    block = read(part)
    away = block.reshape(block.shape[0], -1) - moments.mean.astype(block.dtype)
    squares[part] = np.sum(away**2, axis=1, dtype=np.float64)
  if labels.real is not None:
    squares = squares / float(spread) ** 2 + np.sum(targets.astype(np.float64) ** 2, axis=1)
  total, cost = mass.sum(), mass @ squares
  return mass * (1 / (2 * total) + squares / (2 * cost)) if cost > 0 else mass / total


class _Rows(NamedTuple):
  """Rows for `stream_krr_sensitivities`: blocks of floats, divided by a scale."""

  read: Callable
  shape: tuple
  scale: Any

  def __getitem__(self, part):
    return self.read(part) / self.scale


def _krr_scores(key, read, n, targets, limit, kernel_fn, spread, mass, block_size):
  """The score ridge, from a subset of the rows, and upper bounds on the sensitivities."""
  scaled = _Rows(read, (n,), spread if kernel_fn is None else spread / spread)
  kernel = rbf_fn(1.0) if kernel_fn is None else checks.hashable(kernel_fn)
  live = np.flatnonzero(mass > 0)
  order = np.asarray(jax.random.permutation(keys.stream(key, "ridge rows"), live.size))
  some = np.sort(live[order[:_RIDGE_ROWS]])
  k = kernel(jnp.asarray(scaled[some]), None)
  target = min(max(score_ridge.AUTO_KAPPA * limit, 2.0), 0.5 * some.size)
  own = jnp.asarray(mass[some], k.dtype)
  # K of all rows has about the spectrum of this part times the ratio of their weights.
  ridge = float(score_ridge.score_ridge_for_dimension(k, target, own).ridge)
  ridge *= mass.sum() / mass[some].sum()
  scores = streaming.stream_krr_sensitivities(
    keys.stream(key, "landmarks"),
    kernel,
    scaled,
    targets,
    ridge,
    coreset.num_score_columns(max(n, coreset.EXACT_ROWS + 1), limit),
    block_size=min(block_size, 1024),
    weights=mass,
  )
  checks.raise_for_status("krr_sensitivities", scores.status)
  return ridge, scores
