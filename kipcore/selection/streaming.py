"""Certified sensitivity bounds for data that do not fit in memory, from blocks of rows.

A Python loop calls compiled functions for each block. Only the scores use memory that grows with n.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import blocks, checks, keys, pytrees
from kipcore.selection import scoring, sensitivity, sensitivity_cores
from kipcore.selection.sensitivity import SensitivityScores
from kipcore.types import Array, KernelFn


def stream_krr_sensitivities(
  key,
  kernel_fn: KernelFn,
  x,
  y,
  ridge,
  num_landmarks: int,
  transform: Callable | None = None,
  block_size: int = 1024,
  refine: bool = True,
  weights: np.ndarray | None = None,
) -> SensitivityScores:
  """`approximate_krr_sensitivities` for rows on disk: the same bounds, with blocks in file order.

  Both bounds are proved for every order of the rows. The norm in the second bound is a sum over
  blocks, so a file sorted by class gives somewhat larger scores than a shuffled file.

  Args:
    key: random key (or int seed) of the landmarks.
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows: an array, or an object with `shape` that supports slices and integer lists
      as indices, such as `np.memmap`.
    y: `(n, c)` floating labels, of the same types as `x`.
    ridge: absolute, scalar > 0.
    num_landmarks: s; limited to n.
    transform: function that converts a block of `x` to floating rows, e.g. `Preprocess.apply`; None
      if the rows are already floating.
    block_size: number of rows processed at a time. Memory: s x s and block_size x (s + block_size)
      entries. The second bound takes about block_size^2 operations per row.
    refine: as for `approximate_krr_sensitivities`; False reads the rows only once.
    weights: `(n,)` input weights >= 0, or None for 1. Landmarks have positive weight.

  Returns:
    `SensitivityScores`, upper bounds. Cost per pass: n s kernel entries and n s^2 operations.
    Issues a warning if the scores are nearly equal.

  Raises:
    ValueError, TypeError: as `approximate_krr_sensitivities`. The message for NaN rows names the
      block.
  """
  n = x.shape[0]
  num_landmarks, block_size = checks.positive_ints(
    num_landmarks=num_landmarks, block_size=block_size
  )
  if len(y.shape) != 2 or y.shape[0] != n:
    raise ValueError(f"y: expected shape ({n}, c) to match x, got {tuple(y.shape)}")
  read = functools.partial(_read, x, y, transform)
  drawn = np.asarray(jax.random.permutation(keys.canonical_key(key), n))
  if weights is not None:
    checks.weights("weights", weights, n, jnp.float32)
    weights = np.asarray(weights)
    drawn = drawn[weights[drawn] > 0]
    if not drawn.size:
      raise ValueError("weights: expected at least one value > 0, got zeros")
  landmarks = np.sort(drawn[: min(num_landmarks, n)])
  xs, ys = read(landmarks, "landmarks")
  ridge, rs = scoring.prepare_rows("x", xs, ridge, None if weights is None else weights[landmarks])
  ys = rs[:, None] * ys.astype(rs.dtype)
  scoring.check_precision(
    ridge, lambda: jnp.mean(scoring.weighted_diagonal(kernel_fn, xs[:256], rs[:256])), xs.dtype
  )
  kernel_fn = pytrees.argument(kernel_fn)
  solution, start = _prepare(kernel_fn, xs, rs, ys, ridge)
  size = min(block_size, n)

  def row_blocks():
    """Yields row indices and the block, padded to `size` with rows of weight 0 and labels 0."""
    for part in blocks.row_slices(n, size):
      rows = np.arange(part.start, part.stop)
      xb, yb = read(part, f"rows {part.start} to {part.stop - 1}")
      root = np.ones(rows.size) if weights is None else np.sqrt(weights[part])
      root = jnp.asarray(np.pad(root, (0, size - rows.size)), rs.dtype)
      yb = root[:, None] * blocks.pad_rows(yb, size).astype(rs.dtype)
      yield rows, blocks.pad_rows(xb, size), root, yb

  totals = sensitivity_cores.nystrom_totals(start, y.shape[1])
  t, error2, tau, residual2 = (np.zeros(n, rs.dtype) for _ in range(4))
  for rows, *block in row_blocks():
    (tb, eb), totals = _first_pass(kernel_fn, solution, start, totals, ridge, *block, refine)
    t[rows], error2[rows] = np.asarray(tb)[: rows.size], np.asarray(eb)[: rows.size]
  alone = _alone(solution, jnp.asarray(t), jnp.asarray(error2), landmarks, ridge)
  status = solution.factor.status
  if not refine:
    parts = (*_one_pass(*alone), status)
  else:
    fit = _fit(start, totals, ridge)
    unseen = jnp.zeros(y.shape[1], rs.dtype)
    for rows, *block in row_blocks():
      tb, rb, ub = _second_pass(kernel_fn, start, fit, ridge, *block)
      tau[rows], residual2[rows] = np.asarray(tb)[: rows.size], np.asarray(rb)[: rows.size]
      unseen = unseen + ub
    parts = _two_pass(alone, fit, jnp.asarray(tau), jnp.asarray(residual2), unseen, ridge, status)
  return sensitivity.finish(parts, sensitivity.Guarantee.OVER_ESTIMATE, xs.dtype)


def _read(x, y, transform, rows, where) -> tuple[Array, Array]:
  """Reads and checks a block of rows and labels; returns device arrays."""
  xb, yb = x[rows], np.asarray(y[rows])
  xb = np.asarray(xb if transform is None else transform(xb))
  for name, values in (("x", xb), ("y", yb)):
    checks.floating(name, values)
    if not np.isfinite(values).all():
      raise ValueError(f"{name}: expected finite values, got NaN or infinite ones in {where}")
  return jnp.asarray(xb), jnp.asarray(yb)


@jax.jit
def _prepare(kernel_fn, xs, rs, ys, ridge):
  return scoring.landmark_solution(kernel_fn, xs, rs, ys, ridge), sensitivity_cores.nystrom_start(
    kernel_fn, xs, rs
  )


@functools.partial(jax.jit, static_argnames="refine", donate_argnames="totals")
def _first_pass(kernel_fn, solution, start, totals, ridge, xb, rb, yb, refine):
  if refine:
    totals = sensitivity_cores.nystrom_gather(kernel_fn, start, totals, xb, rb, yb)
  return scoring.landmark_block(kernel_fn, solution, ridge, xb, rb, yb), totals


_fit = jax.jit(sensitivity_cores.nystrom_fit)
_alone = jax.jit(scoring.landmark_optima)
_one_pass = jax.jit(sensitivity_cores.one_pass_scores)
_two_pass = jax.jit(sensitivity_cores.two_pass_scores)


@jax.jit
def _second_pass(kernel_fn, start, fit, ridge, xb, rb, yb):
  return sensitivity_cores.nystrom_rows(kernel_fn, start, fit, ridge, xb, rb, yb)
