"""Certified scores of data that do not fit in memory: rows are read block by block, twice.

The host loop is plain Python over compiled steps; nothing but the scores grows with n.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import blocks, checks, keys
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
) -> SensitivityScores:
  """`approximate_krr_sensitivities` of rows on disk: the same bounds, blocks in the order of the file.

  Both bounds are proved for every order of the rows. The norm that enters the second is
  a sum over blocks, so a file sorted by class gives somewhat larger scores than a shuffled one.

  Args:
    key: random key (or int seed) of the landmarks.
    kernel_fn: see `types.KernelFn`; hashable.
    x: `(n, ...)` rows: anything with `shape` whose slices and integer lists NumPy can
      read, e.g. `np.memmap`, or an array.
    y: `(n, c)` floating labels, likewise.
    ridge: absolute, scalar > 0.
    num_landmarks: s; capped at n.
    transform: maps a block of `x` as read to floating rows, e.g. `Preprocess.apply`; None for rows
      that are floating already.
    block_size: rows at a time. Memory is that of s x s and block x (s + block); the second bound
      takes products of block^2 numbers a row.
    refine: as in `approximate_krr_sensitivities`; False reads the rows once.

  Returns:
    `SensitivityScores`, over-estimates; the `(n,)` scores are what grows with n. Cost is
    linear in n: n s kernel entries and n s^2 products a pass. Warns where the scores are flat.

  Raises:
    ValueError, TypeError: as `approximate_krr_sensitivities`; NaN rows are named by block.

  Source: as `approximate_krr_sensitivities`.
  """
  n = x.shape[0]
  num_landmarks, block_size = checks.positive_ints(
    num_landmarks=num_landmarks, block_size=block_size
  )
  if len(y.shape) != 2 or y.shape[0] != n:
    raise ValueError(f"y: expected shape ({n}, c) to match x, got {tuple(y.shape)}")
  read = functools.partial(_read, x, y, transform)
  drawn = jax.random.permutation(keys.canonical_key(key), n)[: min(num_landmarks, n)]
  landmarks = np.sort(np.asarray(drawn))
  xs, ys = read(landmarks, "landmarks")
  ridge, rs = scoring.prepare_rows("x", xs, ridge, None)
  scoring.check_precision(
    ridge, lambda: jnp.mean(scoring.weighted_diagonal(kernel_fn, xs[:256], rs[:256])), xs.dtype
  )
  solution, start = _prepare(kernel_fn, xs, rs, ys.astype(rs.dtype), ridge)
  size = min(block_size, n)

  def row_blocks():
    """The rows of each block, and the block padded to `size` with rows of weight and labels 0."""
    for part in blocks.row_slices(n, size):
      rows = np.arange(part.start, part.stop)
      xb, yb = read(part, f"rows {part.start} to {part.stop - 1}")
      present = np.arange(size) < rows.size
      yb = jnp.where(present[:, None], blocks.pad_rows(yb, size), 0)
      yield rows, blocks.pad_rows(xb, size), jnp.asarray(present, rs.dtype), yb.astype(rs.dtype)

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
  """A block of rows and labels as device arrays, checked."""
  xb, yb = x[rows], np.asarray(y[rows])
  xb = np.asarray(xb if transform is None else transform(xb))
  for name, values in (("x", xb), ("y", yb)):
    checks.floating(name, values)
    if not np.isfinite(values).all():
      raise ValueError(f"{name}: expected finite values, got NaN or infinite ones in {where}")
  return jnp.asarray(xb), jnp.asarray(yb)


@functools.partial(jax.jit, static_argnames="kernel_fn")
def _prepare(kernel_fn, xs, rs, ys, ridge):
  return scoring.landmark_solution(kernel_fn, xs, rs, ys, ridge), sensitivity_cores.nystrom_start(
    kernel_fn, xs, rs
  )


@functools.partial(jax.jit, static_argnames=("kernel_fn", "refine"), donate_argnames="totals")
def _first_pass(kernel_fn, solution, start, totals, ridge, xb, rb, yb, refine):
  if refine:
    totals = sensitivity_cores.nystrom_gather(kernel_fn, start, totals, xb, rb, yb)
  return scoring.landmark_block(kernel_fn, solution, ridge, xb, rb, yb), totals


_fit = jax.jit(sensitivity_cores.nystrom_fit)
_alone = jax.jit(scoring.landmark_optima)
_one_pass = jax.jit(sensitivity_cores.one_pass_scores)
_two_pass = jax.jit(sensitivity_cores.two_pass_scores)


@functools.partial(jax.jit, static_argnames="kernel_fn")
def _second_pass(kernel_fn, start, fit, ridge, xb, rb, yb):
  return sensitivity_cores.nystrom_rows(kernel_fn, start, fit, ridge, xb, rb, yb)
