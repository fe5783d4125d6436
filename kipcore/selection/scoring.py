"""Shared code of leverage scores and sensitivities: input checks, kernel blocks, ridge fits.

Internal to this package. Computations use the widest available float dtype. Rows of weight 0
(padding) have no effect.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from kipcore import blocks, checks, linalg
from kipcore.kernels.gram import gram_diag
from kipcore.types import Array, KernelFn, Status

# The error of float32 scores is about 1e-7 times the condition number. For a ridge below this
# fraction of tr K / n they are meaningless.
FLOAT32_RIDGE_FLOOR = 1e-4

_PANELS = 4


def prepare_weights(weights, n: int, dtype) -> Array:
  """Square roots of the weights, `(n,)`; ones for None."""
  if weights is None:
    return jnp.ones((n,), dtype)
  checks.shape("weights", weights, (n,))
  checks.non_negative("weights", weights)
  return jnp.sqrt(jnp.asarray(weights, dtype))


def prepare_rows(name: str, x, ridge, weights) -> tuple[Array, Array]:
  """Checks the arguments; returns (ridge, square roots of the weights) in the widest dtype."""
  checks.floating(name, x)
  if x.ndim < 2 or x.shape[0] < 1:
    raise ValueError(f"{name}: expected at least one row (n, ...), got shape {x.shape}")
  checks.rank("ridge", ridge, 0)
  checks.positive("ridge", ridge)
  wide = linalg.widest_dtype(x.dtype)
  return jnp.asarray(ridge, wide), prepare_weights(weights, x.shape[0], wide)


def prepare_matrix(k, ridge, weights):
  """Checks the arguments; returns (k, ridge, square roots of the weights)."""
  checks.square("k", k)
  ridge, root = prepare_rows("k", k, ridge, weights)
  check_precision(ridge, lambda: jnp.mean(root**2 * jnp.diagonal(k).astype(root.dtype)), k.dtype)
  return k, ridge, root


def few_rows(n: int) -> slice:
  """About 256 evenly spaced rows, whose mean diagonal is accurate enough for `check_precision`."""
  return slice(None, None, max(1, n // 256))


def feature_diagonal(z, root) -> Array:
  """u_i ||z_i||^2 of a few rows."""
  few = few_rows(z.shape[0])
  return root[few] ** 2 * jnp.sum(z[few].astype(root.dtype) ** 2, axis=1)


def prepare_landmarks(landmarks, n: int) -> Array:
  """Checks that the indices are distinct; returns them as int32 `(s,)`."""
  checks.rank("landmarks", landmarks, 1)
  if not checks.is_traced(landmarks):
    values = np.asarray(landmarks)
    checks.in_range("landmarks", values, 0, n - 1)
    if len(np.unique(values)) != len(values) or not len(values):
      raise ValueError(
        "landmarks: expected at least one index and no duplicates; use landmark_weights for repeated rows"
      )
  return jnp.asarray(landmarks).astype(jnp.int32)


def check_precision(ridge, mean_diagonal, dtype) -> None:
  """Raises an error if the ridge is too small for float32; float64 skips `mean_diagonal()`."""
  if linalg.widest_dtype(dtype) == jnp.float64 or checks.is_traced(ridge):
    return
  mean = mean_diagonal()
  if not checks.is_traced(mean) and float(ridge) < FLOAT32_RIDGE_FLOOR * float(mean):
    raise ValueError(
      f"ridge: expected at least {FLOAT32_RIDGE_FLOOR:g} tr K / n = {FLOAT32_RIDGE_FLOOR * float(mean):.3g} "
      f"in float32, got {float(ridge):.3g}; enable 64-bit mode or use a larger ridge for the scores"
    )


def weighted_block(kernel_fn: KernelFn, xa, root_a, xb=None, root_b=None) -> Array:
  """U_a^{1/2} K(xa, xb) U_b^{1/2} in the dtype of the roots."""
  k = kernel_fn(xa, xb).astype(root_a.dtype)
  return root_a[:, None] * k * (root_a if xb is None else root_b)[None, :]


def weighted_diagonal(kernel_fn: KernelFn, x, root) -> Array:
  """u_i k(x_i, x_i), `(n,)`."""
  return root**2 * gram_diag(kernel_fn, x).astype(root.dtype)


def score_factor(k: Array, ridge: Array) -> linalg.Factor:
  """Factor of K + ridge I; the status also reports a ridge that is too small for float32."""
  f = linalg.factor(k, ridge)
  if f.lower.dtype == jnp.float64:
    return f
  low = ridge < FLOAT32_RIDGE_FLOOR * jnp.trace(k).astype(ridge.dtype) / k.shape[0]
  return f._replace(
    status=jnp.where(low, jnp.maximum(f.status, Status.NOT_POSITIVE_DEFINITE), f.status)
  )


def factor_leverage(f: linalg.Factor, ridge: Array) -> Array:
  """1 - ridge diag((L L^T)^{-1}); NaN if the factorization failed.

  L^{-1} is computed in panels of columns, because panels on the right need only the trailing part
  of L.
  """
  m = f.lower.shape[0]
  size = -(-m // _PANELS)
  diagonal = []
  for start in range(0, m, size):
    eye = jnp.eye(m - start, min(size, m - start), dtype=f.lower.dtype)
    diagonal.append(
      jnp.sum(solve_triangular(f.lower[start:, start:], eye, lower=True) ** 2, axis=0)
    )
  tau = jnp.clip(1 - ridge * jnp.concatenate(diagonal), 0, 1)
  return jnp.where(f.status == Status.OK, tau, jnp.nan)


def feature_fit(z, root, y, ridge, block_size):
  """Scores `(n,)`, squared residuals `(n,)`, objective and status of the weighted ridge fit.

  `y` `(n, c)` is already weighted.
  """
  rows = lambda block: block[0].astype(root.dtype) * block[1][:, None]

  def moments(block, present):
    zw = jnp.where(present[:, None], rows(block), 0)
    return linalg.matmul(zw.T, zw), linalg.matmul(zw.T, block[2])

  moment, cross = blocks.sum_row_blocks(moments, (z, root, y), block_size)
  f = linalg.factor(moment, ridge)
  w = linalg.solve(f, cross)

  def score(block):
    zw = rows(block)
    return jnp.sum(linalg.whiten(f, zw.T) ** 2, axis=0), jnp.sum(
      (block[2] - linalg.matmul(zw, w)) ** 2, axis=1
    )

  tau, residual2 = blocks.map_row_blocks(score, (z, root, y), block_size)
  return jnp.clip(tau, 0, 1), residual2, jnp.sum(residual2) + ridge * jnp.sum(w**2), f.status


def landmark_fit(kernel_fn, x, root, y, landmarks, landmark_weights, ridge, block_size):
  """Exact score and squared residual of each row i in the problem with only the rows S and i.

  `y` is already weighted. Returns the scores, the squared residuals and the minimum objectives of
  these problems, each `(n,)`, and a status. With landmark weights the scores are t_i.
  """
  s = landmark_solution(
    kernel_fn, x[landmarks], root[landmarks], y[landmarks], ridge, landmark_weights
  )
  t, error2 = blocks.map_row_blocks(
    lambda block: landmark_block(kernel_fn, s, ridge, *block), (x, root, y), block_size
  )
  if landmark_weights is not None:
    return t, error2, error2, s.factor.status
  return (*landmark_optima(s, t, error2, landmarks, ridge), s.factor.status)


class LandmarkSolution(NamedTuple):
  """The ridge fit on the landmarks: rows, roots of weights, weighted labels, factor and dual."""

  x: Array
  root: Array
  y: Array
  factor: linalg.Factor
  dual: Array


def landmark_solution(kernel_fn, xs, rs, ys, ridge, landmark_weights=None) -> LandmarkSolution:
  k_ss = weighted_block(kernel_fn, xs, rs)
  f = (
    score_factor(k_ss, ridge)
    if landmark_weights is None
    else linalg.factor(k_ss, ridge / landmark_weights)
  )
  return LandmarkSolution(xs, rs, ys, f, linalg.solve(f, ys))


def landmark_block(kernel_fn, s: LandmarkSolution, ridge, xb, rb, yb):
  """(t_i, squared error of the landmark fit) for a block of rows."""
  k = weighted_block(kernel_fn, xb, rb, s.x, s.root)
  seen = jnp.sum(linalg.whiten(s.factor, k.T) ** 2, axis=0)
  t = jnp.maximum(weighted_diagonal(kernel_fn, xb, rb) - seen, 0) / ridge
  return t, jnp.sum((yb - linalg.matmul(k, s.dual)) ** 2, axis=1)


def landmark_optima(s: LandmarkSolution, t, error2, landmarks, ridge):
  """(scores, squared residuals, minimum objectives), each `(n,)`, from `landmark_block`."""
  optimum = ridge * jnp.sum(s.y * s.dual)
  tau = (t / (1 + t)).at[landmarks].set(factor_leverage(s.factor, ridge))
  residual2 = (error2 / (1 + t) ** 2).at[landmarks].set(ridge**2 * jnp.sum(s.dual**2, axis=1))
  return tau, residual2, (optimum + error2 / (1 + t)).at[landmarks].set(optimum)


def nystrom_factor(kernel_fn, xs, rs) -> linalg.Factor:
  """Factor of K_SS plus jitter at rounding level; V = K_nS L^{-T} satisfies V V^T <= K."""
  k_ss = weighted_block(kernel_fn, xs, rs)
  return linalg.factor(k_ss, 4 * jnp.finfo(k_ss.dtype).eps * jnp.trace(k_ss))


def kept_share(share, ridge, residual_norm):
  """The parameter a of `low_rank_leverage_bounds` for q = `share`."""
  return share * ridge / (share * ridge + jnp.maximum(residual_norm, jnp.finfo(share.dtype).tiny))


def best_share(values, tail, ridge, residual_norm) -> Array:
  """The q of `low_rank_leverage_bounds`, by grid search.

  It minimizes sum_i h_i + E_ii / ((1 - q) ridge).   `values` are the eigenvalues of F^T F, and
  `tail` is tr E.
  """
  share = jnp.linspace(0.0, 0.98, 99, dtype=ridge.dtype)
  kept = kept_share(share, ridge, residual_norm)
  sums = jnp.sum(values[None, :] / (kept[:, None] * values[None, :] + ridge), axis=1) + tail / (
    (1 - share) * ridge
  )
  return share[jnp.argmin(sums)]


def corrected(h, residual, kept, share, ridge) -> Array:
  """The second upper bound of `low_rank_leverage_bounds` from h and E_ii."""
  t = h / jnp.maximum(1 - kept * h, jnp.finfo(h.dtype).tiny) + residual / ((1 - share) * ridge)
  return t / (1 + t)
