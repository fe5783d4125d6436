"""Selection of the score ridge by effective dimension, with or without an n x n matrix.

d_eff(ridge) = tr K_u (K_u + ridge I)^{-1} is the sum of the ridge leverage scores (see `leverage`).
It decreases strictly from the rank of K_u to 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import blocks, checks, keys, linalg, pytrees
from kipcore.selection import scoring
from kipcore.types import Array, KernelFn, Status

# `auto` sets d_eff = AUTO_KAPPA * (number of samples). Values of 0.5 to 1 are reasonable; 1 is a
# heuristic choice.
AUTO_KAPPA = 1.0


class ScoreRidge(NamedTuple):
  """A ridge for scores, selected by effective dimension.

  Attributes:
    ridge: absolute, scalar.
    effective_dimension: d_eff at that ridge; an upper bound if landmarks were used.
    effective_dimension_lower: lower bound on d_eff; equal to `effective_dimension` without
      landmarks.
    converged: bool, whether `effective_dimension` matches the target within the tolerance.
    status: int32, `Status`; `MAX_STEPS` if the target could not be reached.
  """

  ridge: Array
  effective_dimension: Array
  effective_dimension_lower: Array
  converged: Array
  status: Array


class DimensionBounds(NamedTuple):
  """Bounds lower <= d_eff <= upper, each with the shape of the ridge."""

  lower: Array
  upper: Array


def score_ridge_for_dimension(k: Array, target, weights: Array | None = None) -> ScoreRidge:
  """Finds the ridge with d_eff(ridge) = target by bisection on log(ridge).

  The ridge is unique, because d_eff decreases strictly from rank K to 0. To draw m samples, use
  target = `AUTO_KAPPA` * m: the guarantees of leverage sampling require m above d_eff log d_eff,
  and with a much larger d_eff the scores are nearly equal (heuristic).

  Args:
    k: `(n, n)` kernel matrix, or `(n,)` its eigenvalues.
    target: desired d_eff, 0 < target < n.
    weights: `(n,)` input weights, only with a matrix.

  Returns:
    `ScoreRidge` with an absolute ridge. `converged` is True if d_eff is within a relative 1e-6 of
    the target (1e-4 in float32). It is False if the target exceeds the rank, or if the ridge would
    be below the smallest one that scores accept in float32; then that smallest ridge is returned.

  Raises:
    ValueError: for a target outside (0, n) or inconsistent shapes.
  """
  checks.rank("k", k, 1, 2)
  checks.floating("k", k)
  _check_target(target, k.shape[0])
  wide = linalg.widest_dtype(k.dtype)
  values = k.astype(wide)
  if k.ndim == 2:
    checks.square("k", k)
    values = _spectrum(values, scoring.prepare_weights(weights, k.shape[0], wide))
  elif weights is not None:
    raise ValueError(
      "weights: expected None with eigenvalues, got an array; apply the weights to the matrix instead"
    )
  return _bisect_ridge(values, jnp.zeros((), wide), jnp.asarray(target, wide), k.shape[0])


def landmark_score_ridge(
  key,
  kernel_fn: KernelFn,
  x: Array,
  target,
  num_landmarks: int,
  weights: Array | None = None,
  block_size: int = 1024,
) -> ScoreRidge:
  """Finds a ridge at which d_eff is at most the target, from landmarks and without an n x n matrix.

  Uses the bounds of `effective_dimension_bounds`: the upper bound is set equal to the target, and
  the lower bound is returned too.

  Args:
    key: random key of the landmarks.
    kernel_fn, x, weights: as for `leverage.landmark_leverage_scores`.
    target: bound on d_eff, 0 < target < n.
    num_landmarks: s; limited to n.
    block_size: number of rows processed at a time.

  Returns:
    `ScoreRidge` with an absolute ridge.

  Raises:
    ValueError: as `score_ridge_for_dimension`.
  """
  n = x.shape[0]
  _check_target(target, n)
  num_landmarks, block_size = checks.positive_ints(
    num_landmarks=num_landmarks, block_size=block_size
  )
  values, tail = _landmark_spectrum(key, kernel_fn, x, num_landmarks, weights, block_size)
  return _bisect_ridge(values, tail, jnp.asarray(target, values.dtype), n)


def effective_dimension_bounds(
  key,
  kernel_fn: KernelFn,
  x: Array,
  ridge,
  num_landmarks: int,
  weights: Array | None = None,
  block_size: int = 1024,
) -> DimensionBounds:
  """Bounds on the effective dimension at one or more ridges, from one pass over the rows.

    lower = sum sigma / (sigma + ridge) <= d_eff <= lower + T / ridge

  Here sigma are the eigenvalues of the Nystrom approximation of K_u from uniform random landmarks,
  and T is the trace of its residual. The bounds are proved for every set of landmarks.

  Args:
    key: random key of the landmarks.
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    ridge: absolute, > 0, scalar or `(r,)`.
    num_landmarks: s; limited to n. Cost: n s kernel entries and n s^2 operations.
    weights: `(n,)` input weights >= 0, or None for 1.
    block_size: number of rows processed at a time.

  Returns:
    `DimensionBounds`.

  Raises:
    ValueError: for inconsistent shapes or a ridge <= 0.
  """
  num_landmarks, block_size = checks.positive_ints(
    num_landmarks=num_landmarks, block_size=block_size
  )
  checks.rank("ridge", ridge, 0, 1)
  checks.positive("ridge", ridge)
  values, tail = _landmark_spectrum(key, kernel_fn, x, num_landmarks, weights, block_size)
  ridge, values = jnp.asarray(ridge, values.dtype), jnp.maximum(values, 0)
  lower = jnp.vectorize(lambda r: jnp.sum(values / (values + r)))(ridge)
  return DimensionBounds(lower, lower + tail / ridge)


def _landmark_spectrum(key, kernel_fn, x, num_landmarks, weights, block_size):
  n = x.shape[0]
  _, root = scoring.prepare_rows("x", x, 1.0, weights)
  landmarks = jax.random.permutation(keys.canonical_key(key), n)[:num_landmarks].astype(jnp.int32)
  return _nystrom_spectrum(pytrees.argument(kernel_fn), x, root, landmarks, min(block_size, n))


@jax.jit
def _spectrum(k, root):
  return jnp.linalg.eigvalsh(root[:, None] * k * root[None, :])


@functools.partial(jax.jit, static_argnames="block_size")
def _nystrom_spectrum(kernel_fn, x, root, landmarks, block_size):
  xs, rs = x[landmarks], root[landmarks]
  f = scoring.nystrom_factor(kernel_fn, xs, rs)

  def moments(block, present):
    rows, roots = block[0], jnp.where(present, block[1], 0)
    v = linalg.whiten(f, scoring.weighted_block(kernel_fn, rows, roots, xs, rs).T)
    missed = jnp.sum(scoring.weighted_diagonal(kernel_fn, rows, roots)) - jnp.sum(v**2)
    return linalg.matmul(v, v.T), missed

  moment, tail = blocks.sum_row_blocks(moments, (x, root), block_size)
  return jnp.linalg.eigvalsh(moment), jnp.maximum(tail, 0)


@functools.partial(jax.jit, static_argnums=3)
def _bisect_ridge(values, tail, target, num_rows):
  values = jnp.maximum(values, 0)
  lower_dimension = lambda ridge: jnp.sum(values / (values + ridge))
  dimension = lambda ridge: lower_dimension(ridge) + tail / ridge
  # d_eff <= tr K / ridge, so d_eff is at most the target at the upper end.
  trace = jnp.sum(values) + tail
  high = jnp.log(trace / target)
  # Eigenvalues below n eps times the largest are rounding errors, so a smaller ridge is
  # meaningless.
  low = jnp.log(jnp.max(values) * values.shape[0] * jnp.finfo(values.dtype).eps)
  if values.dtype == jnp.float32:
    # Twice the smallest ridge that scores accept in float32, because the landmarks may have a
    # larger mean diagonal.
    low = jnp.maximum(low, jnp.log(2 * scoring.FLOAT32_RIDGE_FLOOR * trace / num_rows))
    high = jnp.maximum(low, high)

  def halve(_, ends):
    middle = 0.5 * (ends[0] + ends[1])
    above = dimension(jnp.exp(middle)) > target
    return jnp.where(above, middle, ends[0]), jnp.where(above, ends[1], middle)

  ridge = jnp.exp(jax.lax.fori_loop(0, 80, halve, (low, high))[1])
  reached = dimension(ridge)
  converged = jnp.abs(reached - target) <= (1e-6 if values.dtype == jnp.float64 else 1e-4) * target
  status = jnp.where(
    jnp.isfinite(reached), jnp.where(converged, Status.OK, Status.MAX_STEPS), Status.NOT_FINITE
  )
  return ScoreRidge(ridge, reached, lower_dimension(ridge), converged, status.astype(jnp.int32))


def _check_target(target, n: int) -> None:
  checks.rank("target", target, 0)
  if not checks.is_traced(target) and not 0 < float(target) < n:
    raise ValueError(f"target: expected an effective dimension in (0, {n}), got {target}")
