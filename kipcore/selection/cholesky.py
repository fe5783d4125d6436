"""Randomly pivoted Cholesky: a low-rank factor of a kernel matrix from a few of its columns."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from kipcore import checks, keys, linalg, pytrees
from kipcore.kernels.gram import gram, gram_diag
from kipcore.selection.draws import draw_few_rows
from kipcore.types import Array, KernelFn, Status

# A residual below this multiple of eps times its initial value is treated as zero: the row lies in
# the span of the pivots.
_ROUNDING_UNITS = 32
_FACTOR_CHUNK = 128


class PivotedCholesky(NamedTuple):
  """A low-rank approximation K ~ F F^T with F F^T <= K.

  Attributes:
    factor: `(n, k)`, F. Column j belongs to pivot j; the first r columns are the factor of rank r.
    pivots: `(k,)` int32 rows in the order of selection. Entries from `count` on are -1, and their
      columns of `factor` are zero.
    count: int32 scalar, number of pivots; less than k if the residual became zero (up to rounding).
    residual_diagonal: `(n,)`, diag(K - F F^T) >= 0.
    residual_trace: scalar, sum of `residual_diagonal`.
    status: int32 scalar, `Status`: OK or NOT_FINITE.
  """

  factor: Array
  pivots: Array
  count: Array  # type: ignore[assignment]
  residual_diagonal: Array
  residual_trace: Array
  status: Array


def rpcholesky(
  key,
  kernel_fn: KernelFn,
  x: Array,
  rank: int,
  weights: Array | None = None,
  block_size: int = 64,
  row_block_size: int | None = None,
) -> PivotedCholesky:
  """Randomly pivoted Cholesky: selects each pivot with P(i) proportional to w_i (K - F F^T)_ii.

  With unit weights, E tr(K - F F^T) <= (1 + eps) tr(K - [K]_r) after
  k >= r/eps + min(r log(1/(eps eta)), r/eps + r log_+(2^r/eps)) pivots, where
  eta = tr(K - [K]_r) / tr K and [K]_r is the best approximation of rank r (Chen et al.).
  `block_size=1` is their algorithm. A larger block proposes 2 `block_size` rows at once and accepts
  each, up to `block_size`, with probability (current residual) / (residual when proposed). The
  pivots have the same distribution, and the work consists of matrix products (Epperly et al.).
  Cost: about `rank` kernel columns and n rank^2 operations; no n x n matrix is formed.

  Args:
    key: a random key or an int seed.
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    rank: k, at most n.
    weights: `(n,)`, >= 0, or None for ones. The pivots are those of W^{1/2} K W^{1/2}, but F is a
      factor of K. Rows of weight 0 are never pivots.
    block_size: maximum number of pivots per round.
    row_block_size: number of rows of a kernel column evaluated at a time; None for all.

  Returns:
    `PivotedCholesky`. A residual below 32 eps K_ii is treated as zero.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, or NaN rows.

  References:
    Chen, Epperly, Tropp and Webber, arXiv 2207.06503; Epperly, Tropp and Webber, arXiv 2410.03969.
  """
  x = jnp.asarray(x)
  checks.floating("x", x)
  checks.finite("x", x)
  rank, block_size = checks.positive_ints(rank=rank, block_size=block_size)
  row_block_size = checks.optional_positive_int("row_block_size", row_block_size)
  if rank > x.shape[0]:
    raise ValueError(f"rank: expected at most the number of rows, {x.shape[0]}, got {rank}")
  weights = jnp.ones(x.shape[:1], x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
  checks.shape("weights", weights, x.shape[:1])
  checks.non_negative("weights", weights)
  return _rpcholesky(
    keys.canonical_key(key),
    pytrees.argument(kernel_fn),
    x,
    weights,
    rank,
    min(block_size, rank),
    row_block_size,
  )


@functools.partial(jax.jit, static_argnames=("rank", "block_size", "row_block_size"))
def _rpcholesky(key, kernel_fn, x, weights, rank, block_size, row_block_size):
  n = x.shape[0]
  diagonal = gram_diag(kernel_fn, x, row_block_size)
  floor = _ROUNDING_UNITS * jnp.finfo(diagonal.dtype).eps * diagonal
  weights = weights.astype(diagonal.dtype)
  proposals = 1 if block_size == 1 else 2 * block_size
  chunk = min(_FACTOR_CHUNK, rank)
  # `factor` holds F^T, so that new columns are contiguous, with space for one more block and chunk.
  capacity = rank + max(block_size, chunk)

  def law(residual):
    return jnp.where(residual > floor, weights * residual, 0)

  def one_round(state):
    count, step, residual, factor, pivots = state
    uniforms = jax.random.uniform(jax.random.fold_in(key, step), (proposals, 3), residual.dtype)
    rows = draw_few_rows(uniforms[:, :2], law(residual))
    inside = factor[:, rows]
    schur = kernel_fn(x[rows], None) - linalg.matmul(inside.T, inside)
    thresholds = uniforms[:, 2] * residual[rows]
    # Use the residual from which the row was proposed: the kernel block differs from it by
    # rounding.
    schur = jnp.fill_diagonal(schur, residual[rows], inplace=False)
    accepted, lower = _reject(
      schur, rows, thresholds, floor[rows], jnp.minimum(rank - count, block_size)
    )
    found = jnp.sum(accepted, dtype=jnp.int32)
    order = jnp.argsort(~accepted, stable=True)[:block_size]
    used = jnp.arange(block_size, dtype=jnp.int32) < found
    new = rows[order]
    lower = jnp.where(
      used[:, None] & used[None], lower[order][:, order], jnp.eye(block_size, dtype=lower.dtype)
    )
    columns = gram(kernel_fn, x, x[new], row_block_size).T

    def subtract(c, columns):
      part = jax.lax.dynamic_slice_in_dim(factor, c * chunk, chunk)
      return columns - linalg.matmul(part[:, new].T, part)

    columns = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, subtract, columns)
    columns = jnp.where(
      used[:, None], solve_triangular(lower.astype(columns.dtype), columns, lower=True), 0
    )
    residual = jnp.maximum(residual - jnp.sum(columns * columns, axis=0), 0)
    residual = residual.at[jnp.where(used, new, n)].set(0, mode="drop")
    factor = jax.lax.dynamic_update_slice_in_dim(factor, columns, count, 0)
    pivots = pivots.at[jnp.where(used, count + jnp.arange(block_size, dtype=jnp.int32), rank)].set(
      new, mode="drop"
    )
    return count + found, step + 1, residual, factor, pivots

  state = (
    jnp.int32(0),
    jnp.int32(0),
    diagonal,
    jnp.zeros((capacity, n), diagonal.dtype),
    jnp.full(rank, -1, jnp.int32),
  )
  count, _, residual, factor, pivots = jax.lax.while_loop(
    lambda s: (s[0] < rank) & jnp.any(law(s[2]) > 0), one_round, state
  )
  finite = jnp.isfinite(residual).all() & jnp.isfinite(factor).all()
  status = jnp.where(finite, Status.OK, Status.NOT_FINITE).astype(jnp.int32)
  return PivotedCholesky(factor[:rank].T, pivots, count, residual, jnp.sum(residual), status)


def _reject(schur, rows, thresholds, floor, room):
  """Cholesky factor of the accepted rows: row j is accepted if threshold_j < its residual."""
  size = rows.shape[0]

  def consider(j, carry):
    schur, lower, accepted, open_rows = carry
    pivot = schur[j, j]
    take = (
      (thresholds[j] < pivot)
      & (pivot > floor[j])
      & open_rows[j]
      & (jnp.sum(accepted, dtype=jnp.int32) < room)
    )
    column = jnp.where(take, schur[:, j] / jnp.sqrt(jnp.where(take, pivot, 1)), 0)
    schur = schur - column[:, None] * column[None]
    # A repeated row has zero residual; rounding errors must not accept it again.
    open_rows = open_rows & ~(take & (rows == rows[j]))
    return schur, lower.at[:, j].set(column), accepted.at[j].set(take), open_rows

  carry = (schur, jnp.zeros_like(schur), jnp.zeros(size, bool), jnp.ones(size, bool))
  _, lower, accepted, _ = jax.lax.fori_loop(0, size, consider, carry)
  # Entries above the diagonal are rounding errors: rows accepted before column j have no residual.
  return accepted, jnp.tril(lower)
