"""Supervised greedy selection of rows that minimize the kernel ridge regression objective."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import blocks, checks, keys, linalg, pytrees
from kipcore.types import Array, KernelFn, Status

# A remainder below this multiple of eps times the vector is treated as zero: the vector lies in the
# span of the others.
_ROUNDING_UNITS = 32


class Pursuit(NamedTuple):
  """Rows selected for kernel ridge regression.

  Attributes:
    indices: `(m,)` int32 rows of `x` in the order of selection (positions in the pool if the pool
      was given as separate rows). Entries are -1 if no candidate was left.
    candidates: `(L,)` int32, the pool, with the same meaning of indices.
    coefficients: `(m, c)`, c of the predictor K_tS c; zero for entries with index -1.
    objectives: `(m + 1,)`, F with the first 0, 1, ..., m points, non-increasing; entry 0 is
      ||Y||^2. K_LL includes the jitter of `linalg.factor_semidefinite`, so the values are slightly
      above F.
    pool_objective: scalar, F with all L candidates. `objectives[-1] / pool_objective` is the factor
      by which F increases with m points instead of L.
    status: int32 scalar, `Status`: NOT_POSITIVE_DEFINITE if fewer than m candidates could be
      selected (because of duplicates, or a quota that the pool cannot fill).
  """

  indices: Array
  candidates: Array
  coefficients: Array
  objectives: Array
  pool_objective: Array
  status: Array


def krr_pursuit(
  key,
  kernel_fn: KernelFn,
  x: Array,
  y: Array,
  candidates,
  num_points: int,
  ridge,
  *,
  quota: int | Array | None = None,
  classes: Array | None = None,
  block_size: int = 1024,
  weights: Array | None = None,
) -> Pursuit:
  """Greedy selection of support rows S for kernel ridge regression over all n rows.

  The objective is F(S, c) = ||U^{1/2} (K_nS c - Y)||^2 + ridge <c, K_SS c> with the weights u on the
  diagonal of U (1 by default, as in the formulas below). The method is orthogonal matching
  pursuit on the normal equations of a pool of L candidates. With M = K_Ln K_nL + ridge K_LL and
  B = K_Ln Y, each step selects the candidate with the largest ||B_j - M_jS c||^2 / (M_jj - M_jS
  M_SS^{-1} M_Sj), which is exactly the decrease of F, and solves again for all c. With the labels
  (K_SS + l I) c, ridge regression at ridge l reproduces the predictor. F decreases at every step.
  The decrease is at least a factor 1 - exp(-gamma) of that of the best m points, where gamma is the
  submodularity ratio, which is not computed.

  M is never formed, because its condition number is the square of that of the kernel matrix. The
  same steps are computed by modified Gram-Schmidt on vectors whose inner products are the entries
  of M. Candidates whose gain is at rounding level are skipped.

  Args:
    key: a random key or an int seed; used only to draw the pool.
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    y: `(n, c)` labels, centered as for the model (kernel ridge regression has no intercept).
    candidates: the pool: an int L to draw L rows of `x` without replacement (alternating between
      classes if there is a quota), `(L,)` integer rows of `x`, or `(L, ...)` separate floating
      rows.
    num_points: m, at most L.
    ridge: absolute, > 0.
    quota: maximum number of points per class, an int or `(c,)` integers, or None; `m / c` gives
      equal classes.
    classes: `(L,)` integer classes of the candidates for the quota; by default the index of the
      largest label.
    block_size: number of rows of `x` whose kernel with the pool is held at a time.
    weights: `(n,)` weights >= 0 of the rows in F; None for 1.

  Returns:
    `Pursuit`. Memory: L^2 + block_size L entries. Cost: n L kernel entries, n L^2 operations, and
    L^2 operations per step.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, or NaN rows.

  References:
    Das and Kempe (ICML 2011), on the submodularity ratio.
  """
  x, y = _rows("x", x), _rows("y", y)
  checks.rank("y", y, 2)
  checks.same_rows("x", x, "y", y)
  num_points, block_size = checks.positive_ints(num_points=num_points, block_size=block_size)
  checks.positive("ridge", ridge)
  if quota is not None and np.ndim(quota) == 0:
    quota = checks.positive_int("quota", quota)
  elif quota is not None:
    checks.shape("quota", quota, (y.shape[1],))
    checks.non_negative("quota", quota)
  if weights is None:
    root = jnp.ones(x.shape[:1], y.dtype)
  else:
    root = jnp.sqrt(checks.weights("weights", weights, x.shape[0], y.dtype))
  rows, pool, classes = _pool(keys.canonical_key(key), x, y, candidates, quota, classes)
  if num_points > pool.shape[0]:
    raise ValueError(
      f"num_points: expected at most the number of candidates, {pool.shape[0]}, got {num_points}"
    )
  # The number of points that may still be taken from the class of each candidate.
  room = jnp.asarray(num_points if quota is None else quota, jnp.int32)
  room = jnp.broadcast_to(room, classes.shape) if room.ndim == 0 else room[classes]
  ridge = jnp.asarray(ridge, linalg.widest_dtype(x.dtype))
  return _krr_pursuit(
    pytrees.argument(kernel_fn),
    x,
    root[:, None] * y,
    root,
    rows,
    pool,
    classes,
    room,
    ridge,
    num_points,
    min(block_size, x.shape[0]),
  )


def _rows(name, x):
  x = jnp.asarray(x)
  checks.floating(name, x)
  checks.finite(name, x)
  return x


def _pool(key, x, y, candidates, quota, classes):
  """The candidates as (indices, inputs, classes)."""
  n = x.shape[0]
  if np.ndim(candidates) == 0:
    candidates = checks.positive_int("candidates", candidates)
    if candidates > n:
      raise ValueError(f"candidates: expected at most the number of rows, {n}, got {candidates}")
    if classes is not None:
      raise ValueError("classes: expected None if the pool is drawn from x, got an array")
    rows = _draw_pool(key, jnp.argmax(y, axis=1), candidates, quota is not None)
  else:
    rows = jnp.asarray(candidates)
  if jnp.issubdtype(rows.dtype, jnp.floating):
    checks.shape("candidates", rows, (None, *x.shape[1:]))
    if quota is not None and classes is None:
      raise ValueError(
        "classes: expected one class per candidate, because the pool is not from x; got None"
      )
    pool, rows = (
      _rows("candidates", rows).astype(x.dtype),
      jnp.arange(rows.shape[0], dtype=jnp.int32),
    )
  else:
    checks.rank("candidates", rows, 1)
    checks.in_range("candidates", rows, 0, n - 1)
    rows = rows.astype(jnp.int32)
    pool = x[rows]
    classes = jnp.argmax(y[rows], axis=1) if classes is None else classes
  classes = (
    jnp.zeros(rows.shape, jnp.int32) if classes is None or quota is None else jnp.asarray(classes)
  )
  checks.shape("classes", classes, rows.shape)
  return rows, pool, classes.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("size", "balanced"))
def _draw_pool(key, labels, size, balanced):
  order = jax.random.permutation(key, labels.shape[0])
  if balanced:
    # The rank of a row within its class in random order. Rows of low rank come first.
    shuffled = labels[order]
    by_class = jnp.argsort(shuffled, stable=True)
    start = jnp.searchsorted(shuffled[by_class], shuffled[by_class])
    ranks = (
      jnp.zeros(order.shape, jnp.int32)
      .at[by_class]
      .set(jnp.arange(order.shape[0], dtype=jnp.int32) - start.astype(jnp.int32))
    )
    order = order[jnp.argsort(ranks, stable=True)]
  return order[:size].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("num_points", "block_size"))
def _krr_pursuit(kernel_fn, x, y, root, rows, pool, classes, room, ridge, num_points, block_size):
  vectors, wanted, square, jitter, status = _least_squares(
    kernel_fn, x, y, root, pool, ridge, block_size
  )
  size = pool.shape[0]
  # A copy of a selected row retains only rounding errors and the contribution of the jitter of
  # K_LL.
  floor = (_ROUNDING_UNITS * jnp.finfo(vectors.dtype).eps) ** 2 * jnp.sum(
    vectors**2, axis=1
  ) + 4 * ridge * jitter

  def step(t, carry):
    left, residual, lower, open_rows, room, chosen, labels, objectives = carry
    schur = jnp.sum(left**2, axis=1)
    eligible = open_rows & (room > 0) & (schur > floor)
    gains = jnp.sum(linalg.matmul(left, residual) ** 2, axis=1) / jnp.where(eligible, schur, 1)
    best = jnp.argmax(jnp.where(eligible, gains, -1))
    take = eligible[best]
    # Modified Gram-Schmidt: make the remainder of every candidate orthogonal to the selected one.
    direction = jnp.where(take, left[best] / jnp.sqrt(jnp.where(take, schur[best], 1)), 0)
    column = linalg.matmul(left, direction[:, None])[:, 0]
    label = linalg.matmul(direction[None], residual)[0]
    return (
      left - column[:, None] * direction[None],
      residual - direction[:, None] * label[None],
      lower.at[t].set(column),
      open_rows & ~(take & (jnp.arange(size) == best)),
      room - (take & (classes == classes[best])).astype(jnp.int32),
      chosen.at[t].set(jnp.where(take, best, -1).astype(jnp.int32)),
      labels.at[t].set(label),
      objectives.at[t + 1].set(objectives[t] - jnp.sum(label**2)),
    )

  zeros = functools.partial(jnp.zeros, dtype=vectors.dtype)
  carry = (
    vectors,
    wanted,
    zeros((num_points, size)),
    jnp.ones(size, bool),
    room,
    jnp.full(num_points, -1, jnp.int32),
    zeros((num_points, y.shape[1])),
    jnp.broadcast_to(square, (num_points + 1,)),
  )
  _, _, lower, _, _, chosen, labels, objectives = jax.lax.fori_loop(0, num_points, step, carry)
  used = chosen >= 0
  coefficients = _coefficients(vectors, wanted, lower, chosen, labels)
  pool_objective = jnp.minimum(square - jnp.sum(wanted**2), objectives[-1])
  short = jnp.where(used.all(), Status.OK, Status.NOT_POSITIVE_DEFINITE).astype(jnp.int32)
  return Pursuit(
    jnp.where(used, rows[chosen], -1),
    rows,
    coefficients.astype(y.dtype),
    objectives,
    pool_objective,
    jnp.maximum(status, short),
  )


def _least_squares(kernel_fn, x, y, root, pool, ridge, block_size):
  """F as a least-squares problem: vectors a_j with <a_i, a_j> = M_ij, and t with <a_j, t> = B_j.

  With K_LL = C C^T and C^{-1} K_Ln K_nL C^{-T} + ridge I = R R^T, the a_j are the rows of C R, and
  t = R^{-1} C^{-1} B. M itself is not formed, because its condition number is squared.
  """
  k_pool = kernel_fn(pool, None)
  factor, jitter = linalg.factor_semidefinite(k_pool)
  dtype = factor.lower.dtype

  def products(block, present):
    rows, labels, scale = block
    scale = jnp.where(present, scale, 0)
    k = linalg.whiten(factor, (scale[:, None] * kernel_fn(rows, pool).astype(scale.dtype)).T)
    return linalg.matmul(k, k.T), linalg.matmul(k, labels.astype(dtype))

  moments, targets = blocks.sum_row_blocks(products, (x, y, root), block_size)
  root = linalg.factor(moments, ridge)
  status = jnp.maximum(factor.status, root.status)
  return (
    linalg.matmul(factor.lower, root.lower),
    linalg.whiten(root, targets),
    jnp.sum(y.astype(dtype) ** 2),
    jitter,
    status,
  )


def _coefficients(vectors, wanted, lower, chosen, labels):
  """M_SS^{-1} B_S from the triangular factor, with one step of iterative refinement."""
  used = chosen >= 0
  # Row t of `lower` belongs to step t. A step without a selection becomes a row of the identity.
  among = used[:, None] & used[None]
  f = linalg.Factor(
    jnp.where(among, lower[:, chosen].T, jnp.eye(chosen.shape[0], dtype=lower.dtype)), jnp.int32(0)
  )
  basis = jnp.where(used[:, None], vectors[chosen], 0)
  c = linalg.unwhiten(f, labels)
  return c + linalg.solve(f, linalg.matmul(basis, wanted - linalg.matmul(basis.T, c)))
