"""Real rows chosen one after another: randomly pivoted Cholesky, and greedy pursuit of the KRR objective."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from kipcore import checks, keys, linalg
from kipcore.clustering import draw_rows_at
from kipcore.gram import gram, gram_diag
from kipcore.types import Array, KernelFn, Status

# A residual below this many units of rounding of its start counts as zero: such a row lies in the span of others.
_ROUNDING_UNITS = 32
_FACTOR_CHUNK = 128


class PivotedCholesky(NamedTuple):
  """A low-rank factor, K ~ F F^T from below.

  Attributes:
    factor: `(n, k)`, F; column j belongs to pivot j, and the first r columns are the factor of rank r.
    pivots: `(k,)` int32 rows in the order of the draw; -1, with a zero column, past `count`.
    count: int32 scalar; less than k where the residual vanished (up to rounding) before.
    residual_diagonal: `(n,)`, diag(K - F F^T) >= 0.
    residual_trace: scalar, its sum.
    status: int32 scalar, `Status`: OK or NOT_FINITE.
  """

  factor: Array
  pivots: Array
  count: Array
  residual_diagonal: Array
  residual_trace: Array
  status: Array


class Pursuit(NamedTuple):
  """Rows chosen for kernel ridge regression.

  Attributes:
    indices: `(m,)` int32 rows of `x`, in the order chosen (positions in the pool where the
      pool was given as rows of its own); -1 where no candidate was left.
    candidates: `(L,)` int32, the pool that the choice was made from, in the same terms.
    coefficients: `(m, c)`, c of the predictor K_tS c; zero where the index is -1.
    objectives: `(m + 1,)`, F with the first 0, 1, ..., m points, never increasing; entry 0 is ||Y||^2.
    pool_objective: scalar, F with all L candidates, so `objectives[-1] / pool_objective` tells
      what keeping m of L costs; NaN without float64, where M is too ill-conditioned for it.
    status: int32 scalar, `Status`: NOT_POSITIVE_DEFINITE if fewer than m candidates could
      be chosen (duplicates, or a quota that the pool cannot fill).
  """

  indices: Array
  candidates: Array
  coefficients: Array
  objectives: Array
  pool_objective: Array
  status: Array


def rpcholesky(
    key, kernel_fn: KernelFn, x: Array, rank: int, weights: Array | None = None, block_size: int = 64,
    row_block_size: int | None = None) -> PivotedCholesky:
  """Randomly pivoted Cholesky: each pivot with P(i) proportional to w_i (K - F F^T)_ii.

  With unit weights E tr(K - F F^T) <= (1 + eps) tr(K - [K]_r) after
  k >= r/eps + min(r log(1/(eps eta)), r/eps + r log_+(2^r/eps)) pivots, where eta is the relative tail
  trace at rank r (Chen, Epperly, Tropp and Webber, arXiv 2207.06503). `block_size=1` is
  their simple form. A larger block proposes 2 `block_size` rows at once and takes each with probability
  (its residual now) / (when proposed), up to `block_size`: the same law of pivots, by
  products of matrices (Epperly, Tropp and Webber, arXiv 2410.03969). Cost: about
  `rank` kernel columns and n rank^2 products; no n x n matrix.

  Args:
    key: a random key or an int seed.
    kernel_fn: see `types.KernelFn`; hashable, since the computation is compiled for it.
    x: `(n, ...)` rows.
    rank: k, at most n.
    weights: `(n,)`, >= 0, or None for ones. The pivots are those of W^{1/2} K W^{1/2}, while F
      remains the factor of K; rows of weight 0 are never pivots.
    block_size: most pivots a round.
    row_block_size: rows of a kernel column evaluated at a time; None for all.

  Returns:
    `PivotedCholesky`. A residual under 32 units of rounding of K_ii counts as zero.

  Raises:
    ValueError, TypeError: wrong shape, dtype or range, NaN rows.
  """
  x = _rows("x", x)
  for name, value in (("rank", rank), ("block_size", block_size)):
    checks.positive_int(name, value)
  if rank > x.shape[0]:
    raise ValueError(f"rank: expected at most the number of rows, {x.shape[0]}, got {rank}")
  weights = jnp.ones(x.shape[:1], x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
  checks.shape("weights", weights, x.shape[:1])
  checks.non_negative("weights", weights)
  return _rpcholesky(
      keys.canonical_key(key), kernel_fn, x, weights, rank, min(block_size, rank), row_block_size)


def _rows(name, x):
  x = jnp.asarray(x)
  checks.floating(name, x)
  checks.finite(name, x)
  return x


@functools.partial(jax.jit, static_argnames=("kernel_fn", "rank", "block_size", "row_block_size"))
def _rpcholesky(key, kernel_fn, x, weights, rank, block_size, row_block_size):
  n = x.shape[0]
  diagonal = gram_diag(kernel_fn, x, row_block_size)
  floor = _ROUNDING_UNITS * jnp.finfo(diagonal.dtype).eps * diagonal
  weights = weights.astype(diagonal.dtype)
  proposals = 1 if block_size == 1 else 2 * block_size
  chunk = min(_FACTOR_CHUNK, rank)
  # F^T, so that new columns are contiguous; room for a whole block and a whole chunk past the rank.
  capacity = rank + max(block_size, chunk)

  def law(residual):
    return jnp.where(residual > floor, weights * residual, 0)

  def one_round(state):
    count, step, residual, factor, pivots = state
    uniforms = jax.random.uniform(jax.random.fold_in(key, step), (proposals, 3), residual.dtype)
    rows = draw_rows_at(uniforms[:, :2], law(residual))
    inside = factor[:, rows]
    schur = kernel_fn(x[rows], None) - linalg.matmul(inside.T, inside)
    thresholds = uniforms[:, 2] * residual[rows]
    # A proposal is judged by the same residual that it was proposed by; the kernel block is only as exact as rounding.
    schur = jnp.fill_diagonal(schur, residual[rows], inplace=False)
    accepted, lower = _reject(schur, rows, thresholds, floor[rows], jnp.minimum(rank - count, block_size))
    found = jnp.sum(accepted, dtype=jnp.int32)
    order = jnp.argsort(~accepted, stable=True)[:block_size]
    used = jnp.arange(block_size, dtype=jnp.int32) < found
    new = rows[order]
    lower = jnp.where(used[:, None] & used[None], lower[order][:, order], jnp.eye(block_size, dtype=lower.dtype))
    columns = gram(kernel_fn, x, x[new], row_block_size).T

    def subtract(c, columns):
      part = jax.lax.dynamic_slice_in_dim(factor, c * chunk, chunk)
      return columns - linalg.matmul(part[:, new].T, part)

    columns = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, subtract, columns)
    columns = jnp.where(used[:, None], solve_triangular(lower.astype(columns.dtype), columns, lower=True), 0)
    residual = jnp.maximum(residual - jnp.sum(columns * columns, axis=0), 0)
    residual = residual.at[jnp.where(used, new, n)].set(0, mode="drop")
    factor = jax.lax.dynamic_update_slice_in_dim(factor, columns, count, 0)
    pivots = pivots.at[jnp.where(used, count + jnp.arange(block_size, dtype=jnp.int32), rank)].set(new, mode="drop")
    return count + found, step + 1, residual, factor, pivots

  state = (
      jnp.int32(0), jnp.int32(0), diagonal, jnp.zeros((capacity, n), diagonal.dtype), jnp.full(rank, -1, jnp.int32))
  count, _, residual, factor, pivots = jax.lax.while_loop(
      lambda s: (s[0] < rank) & jnp.any(law(s[2]) > 0), one_round, state)
  finite = jnp.isfinite(residual).all() & jnp.isfinite(factor).all()
  status = jnp.where(finite, Status.OK, Status.NOT_FINITE).astype(jnp.int32)
  return PivotedCholesky(factor[:rank].T, pivots, count, residual, jnp.sum(residual), status)


def _reject(schur, rows, thresholds, floor, room):
  """Cholesky of the accepted part: proposal j enters while threshold_j < its residual now."""
  size = rows.shape[0]

  def consider(j, carry):
    schur, lower, accepted, open_rows = carry
    pivot = schur[j, j]
    take = (thresholds[j] < pivot) & (pivot > floor[j]) & open_rows[j] & (jnp.sum(accepted, dtype=jnp.int32) < room)
    column = jnp.where(take, schur[:, j] / jnp.sqrt(jnp.where(take, pivot, 1)), 0)
    schur = schur - column[:, None] * column[None]
    # The same row again has no residual, whatever rounding says.
    open_rows = open_rows & ~(take & (rows == rows[j]))
    return schur, lower.at[:, j].set(column), accepted.at[j].set(take), open_rows

  carry = (schur, jnp.zeros_like(schur), jnp.zeros(size, bool), jnp.ones(size, bool))
  _, lower, accepted, _ = jax.lax.fori_loop(0, size, consider, carry)
  # Rows above the diagonal hold rounding only: proposals taken before column j have no residual there.
  return accepted, jnp.tril(lower)


def krr_pursuit(
    key, kernel_fn: KernelFn, x: Array, y: Array, candidates, num_points: int, ridge, *, quota: int | None = None,
    classes: Array | None = None, block_size: int = 1024) -> Pursuit:
  """Greedy choice of support rows S for F(S, c) = ||K_nS c - Y||^2 + ridge <c, K_SS c>, over all n rows.

  Orthogonal matching pursuit on the normal equations of a pool of L candidates, with
  M = K_Ln K_nL + ridge K_LL and B = K_Ln Y: each step takes the candidate of largest
  ||B_j - M_jS c||^2 / (M_jj - M_jS M_SS^{-1} M_Sj), which is exactly how much F falls, and
  solves again for all c. The labels that make K_SS + l I reproduce the predictor are
  (K_SS + l I) c. F falls at every step; that m greedy points come near the best m is proved
  only up to a factor 1 - exp(-gamma) of the decrease, with gamma the submodularity ratio
  (Das and Kempe, ICML 2011), which is not computed here.

  M squares the condition number of the kernel matrix, so it is accumulated and reduced in
  the widest float that is on. In float32 F has been seen off by 1e-3 at 500 points of
  60,000 rows; candidates whose gain is all rounding are skipped.

  Args:
    key: a random key or an int seed; used only to draw the pool.
    kernel_fn: see `types.KernelFn`; hashable, since the computation is compiled for it.
    x: `(n, ...)` rows.
    y: `(n, c)` labels, in the convention of the model (KRR has no intercept: centre them as it does).
    candidates: the pool: its size L (drawn without replacement, class by class in turn if
      there is a quota), or `(L,)` integer rows of `x`, or `(L, ...)` floating rows of its own.
    num_points: m, at most L.
    ridge: absolute, > 0.
    quota: most points of one class, or None; `m / c` gives equal classes.
    classes: `(L,)` integer classes of the candidates, for the quota; by default the largest label.
    block_size: rows of `x` whose kernel with the pool is held at a time.

  Returns:
    `Pursuit`. Memory L^2 + block_size L; n L kernel entries, n L^2 products, L m work a step.

  Raises:
    ValueError, TypeError: wrong shape, dtype or range, NaN rows.
  """
  x, y = _rows("x", x), _rows("y", y)
  checks.rank("y", y, 2)
  checks.same_rows("x", x, "y", y)
  for name, value in (("num_points", num_points), ("block_size", block_size)):
    checks.positive_int(name, value)
  checks.positive("ridge", ridge)
  if quota is not None:
    checks.positive_int("quota", quota)
  rows, pool, classes = _pool(keys.canonical_key(key), x, y, candidates, quota, classes)
  if num_points > pool.shape[0]:
    raise ValueError(f"num_points: expected at most the number of candidates, {pool.shape[0]}, got {num_points}")
  room = jnp.int32(num_points if quota is None else quota)
  ridge = jnp.asarray(ridge, linalg.widest_dtype(x.dtype))
  return _krr_pursuit(kernel_fn, x, y, rows, pool, classes, room, ridge, num_points, min(block_size, x.shape[0]))


def _pool(key, x, y, candidates, quota, classes):
  """The candidates as (their names, their inputs, their classes)."""
  n = x.shape[0]
  if isinstance(candidates, int):
    checks.positive_int("candidates", candidates)
    if candidates > n:
      raise ValueError(f"candidates: expected at most the number of rows, {n}, got {candidates}")
    if classes is not None:
      raise ValueError("classes: expected None where the pool is drawn here, got an array")
    rows = _draw_pool(key, jnp.argmax(y, axis=1), candidates, quota is not None)
  else:
    rows = jnp.asarray(candidates)
  if jnp.issubdtype(rows.dtype, jnp.floating):
    checks.shape("candidates", rows, (None, *x.shape[1:]))
    if quota is not None and classes is None:
      raise ValueError("classes: expected one class a candidate, since the pool is not made of rows of x; got None")
    pool, rows = _rows("candidates", rows).astype(x.dtype), jnp.arange(rows.shape[0], dtype=jnp.int32)
  else:
    checks.rank("candidates", rows, 1)
    checks.in_range("candidates", rows, 0, n - 1)
    rows = rows.astype(jnp.int32)
    pool = x[rows]
    classes = jnp.argmax(y[rows], axis=1) if classes is None else classes
  classes = jnp.zeros(rows.shape, jnp.int32) if classes is None or quota is None else jnp.asarray(classes)
  checks.shape("classes", classes, rows.shape)
  return rows, pool, classes.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("size", "balanced"))
def _draw_pool(key, labels, size, balanced):
  order = jax.random.permutation(key, labels.shape[0])
  if balanced:
    # Rank within the class along the random order; the first of each class come first.
    shuffled = labels[order]
    by_class = jnp.argsort(shuffled, stable=True)
    start = jnp.searchsorted(shuffled[by_class], shuffled[by_class])
    ranks = jnp.zeros(order.shape, jnp.int32).at[by_class].set(
        jnp.arange(order.shape[0], dtype=jnp.int32) - start.astype(jnp.int32))
    order = order[jnp.argsort(ranks, stable=True)]
  return order[:size].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("kernel_fn", "num_points", "block_size"))
def _krr_pursuit(kernel_fn, x, y, rows, pool, classes, room, ridge, num_points, block_size):
  moments, targets, square = _moments(kernel_fn, x, y, pool, ridge, block_size)
  eps = jnp.finfo(moments.dtype).eps
  diagonal = jnp.diagonal(moments)
  size = pool.shape[0]

  def step(t, carry):
    lower, schur, residual, open_rows, room, chosen, labels, objectives = carry
    eligible = open_rows & (room > 0) & (schur > _ROUNDING_UNITS * eps * diagonal)
    gains = jnp.where(eligible, jnp.sum(residual**2, axis=1) / jnp.where(eligible, schur, 1), -1)
    best = jnp.argmax(gains)
    take = eligible[best]
    scale = jnp.sqrt(jnp.where(take, schur[best], 1))
    column = (moments[best] - linalg.matmul(lower[:, best][None], lower)[0]) / scale
    # What is in the span of the chosen has no residual; rounding would feed it back.
    column = jnp.where(take, jnp.where(open_rows, column, 0).at[best].set(scale), 0)
    label = jnp.where(take, residual[best] / scale, 0)
    return (
        lower.at[t].set(column), schur - column**2, residual - column[:, None] * label[None],
        open_rows & ~(take & (jnp.arange(size) == best)), room - (take & (classes == classes[best])).astype(jnp.int32),
        chosen.at[t].set(jnp.where(take, best, -1).astype(jnp.int32)), labels.at[t].set(label),
        objectives.at[t + 1].set(objectives[t] - jnp.sum(label**2)))

  zeros = functools.partial(jnp.zeros, dtype=moments.dtype)
  carry = (
      zeros((num_points, size)), diagonal, targets, jnp.ones(size, bool), jnp.broadcast_to(room, (size,)),
      jnp.full(num_points, -1, jnp.int32), zeros((num_points, y.shape[1])),
      jnp.broadcast_to(square, (num_points + 1,)))
  lower, _, _, _, _, chosen, labels, objectives = jax.lax.fori_loop(0, num_points, step, carry)
  used = chosen >= 0
  coefficients = _coefficients(moments, targets, lower, chosen, labels)
  pool_objective = jnp.full_like(square, jnp.nan)
  if moments.dtype == jnp.float64:
    whole = linalg.factor(moments, size * eps * jnp.max(diagonal))
    pool_objective = jnp.minimum(square - jnp.sum(linalg.whiten(whole, targets) ** 2), objectives[-1])
  finite = jnp.isfinite(moments).all() & jnp.isfinite(targets).all()
  status = jnp.where(finite, jnp.where(used.all(), Status.OK, Status.NOT_POSITIVE_DEFINITE), Status.NOT_FINITE)
  return Pursuit(
      jnp.where(used, rows[chosen], -1), rows, coefficients.astype(y.dtype), objectives, pool_objective,
      status.astype(jnp.int32))


def _moments(kernel_fn, x, y, pool, ridge, block_size):
  """M `(L, L)`, B `(L, c)` and ||Y||^2, over blocks of rows, in the widest float."""
  dtype = linalg.widest_dtype(x.dtype)
  n, size = x.shape[0], pool.shape[0]
  blocks = -(-n // block_size)

  def add(b, carry):
    moments, targets = carry
    index = b * block_size + jnp.arange(block_size, dtype=jnp.int32)
    mask = (index < n)[:, None]
    index = jnp.minimum(index, n - 1)
    k = jnp.where(mask, kernel_fn(x[index], pool), 0).astype(dtype)
    return moments + linalg.matmul(k.T, k), targets + linalg.matmul(k.T, y[index].astype(dtype))

  carry = (jnp.zeros((size, size), dtype), jnp.zeros((size, y.shape[1]), dtype))
  moments, targets = jax.lax.fori_loop(0, blocks, add, carry)
  moments = moments + ridge * kernel_fn(pool, None).astype(dtype)
  return 0.5 * (moments + moments.T), targets, jnp.sum(y.astype(dtype) ** 2)


def _coefficients(moments, targets, lower, chosen, labels):
  """c = M_SS^{-1} B_S from the partial factor, refined once against M itself."""
  used = chosen >= 0
  # Row t of `lower` belongs to choice t; a step without a choice becomes a unit row.
  factor = jnp.where(used[:, None] & used[None], lower[:, chosen].T, jnp.eye(chosen.shape[0], dtype=lower.dtype))
  among = jnp.where(used[:, None] & used[None], moments[chosen][:, chosen], 0)
  wanted = jnp.where(used[:, None], targets[chosen], 0)
  c = solve_triangular(factor, labels, lower=True, trans="T")
  f = linalg.Factor(factor, jnp.int32(Status.OK))
  return c + linalg.solve(f, wanted - linalg.matmul(among, c))
