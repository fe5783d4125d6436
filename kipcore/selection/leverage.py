"""Ridge leverage scores: exact, from features, and from landmarks.

For a kernel matrix K with input weights u (default 1), let K_u = U^{1/2} K U^{1/2}, and let phi_i
be the features of row i of K_u. The ridge leverage score of row i is

  tau_i = phi_i^T G^{-1} phi_i = (K_u (K_u + ridge I)^{-1})_ii,   G = sum_j phi_j phi_j^T + ridge I,

a number in [0, 1]. The sum of the scores is the effective dimension d_eff(ridge). `ridge` is always
absolute, as in K + ridge I. Alaoui and Mahoney (NeurIPS 2015) and the BLESS code of Rudi et al.
(2018) use the same convention; the paper of Rudi et al. multiplies the ridge by n.

At a ridge far below tr K / n, every score is nearly 1, and sampling by the scores is nearly
uniform. Scores therefore need their own ridge, see `score_ridge.score_ridge_for_dimension`.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import checks, linalg, pytrees
from kipcore.selection import scoring
from kipcore.types import Array, KernelFn, Status

# Scores are considered nearly equal if the largest is below this multiple of their mean.
FLAT_RATIO = 1.05


class LeverageBounds(NamedTuple):
  """Bounds lower <= tau <= upper, each `(n,)`."""

  lower: Array
  upper: Array


def ridge_leverage_scores(k: Array, ridge, weights: Array | None = None) -> Array:
  """Exact ridge leverage scores, tau_i = 1 - ridge ((K_u + ridge I)^{-1})_ii.

  Args:
    k: `(n, n)` kernel matrix, symmetric positive semi-definite.
    ridge: absolute, scalar > 0.
    weights: `(n,)` input weights >= 0, or None for 1.

  Returns:
    `(n,)` in [0, 1], in the dtype of `k`; NaN if the factorization fails. In float32 (without
    64-bit mode) they agree with float64 to 1e-3 for ridge >= 1e-2 tr K / n.

  Raises:
    ValueError: for inconsistent shapes, a ridge <= 0, or a ridge below 1e-4 tr K / n if only
      float32 is available. If such a ridge is traced, the scores are NaN instead.

  Example:
    >>> k = jnp.diag(jnp.asarray([9.0, 1.0]))
    >>> print(np.asarray(kipcore.ridge_leverage_scores(k, 1.0)).round(3))  # k_ii / (k_ii + ridge)
    [0.9 0.5]
  """
  k, ridge, root = scoring.prepare_matrix(k, ridge, weights)
  return _exact(k, ridge, root).astype(k.dtype)


def effective_dimension(k: Array, ridge, weights: Array | None = None) -> Array:
  """Effective dimension d_eff = tr K_u (K_u + ridge I)^{-1}, the sum of `ridge_leverage_scores`.

  Args:
    k, ridge, weights: as for `ridge_leverage_scores`. See there for the errors raised.

  Returns:
    Scalar in [0, rank K].

  Example:
    >>> k = jnp.ones((2, 2))  # rank 1: twice the same row
    >>> round(float(kipcore.effective_dimension(k, 1.0)), 3)  # 2 / (2 + ridge)
    0.667
  """
  return jnp.sum(ridge_leverage_scores(k, ridge, weights))


def feature_leverage_scores(
  z: Array, ridge, weights: Array | None = None, block_size: int | None = None
) -> Array:
  """Leverage scores of the kernel Z Z^T, u_i z_i^T (Z^T U Z + ridge I)^{-1} z_i, in D dimensions.

  The scores are exact for Z Z^T. For a kernel matrix K with Z Z^T <= K they are lower bounds on the
  scores of K.

  Args:
    z: `(n, D)` features.
    ridge: absolute, scalar > 0.
    weights: `(n,)` input weights >= 0, or None.
    block_size: number of rows processed at a time; None for all.

  Returns:
    `(n,)` in [0, 1]; NaN if the factorization fails.

  Raises:
    ValueError: as `ridge_leverage_scores`.
  """
  checks.rank("z", z, 2)
  ridge, root = scoring.prepare_rows("z", z, ridge, weights)
  scoring.check_precision(ridge, lambda: jnp.mean(scoring.feature_diagonal(z, root)), z.dtype)
  block_size = checks.optional_positive_int("block_size", block_size)
  return _feature_leverage(z, ridge, root, block_size).astype(z.dtype)


def landmark_leverage_scores(
  kernel_fn: KernelFn,
  x: Array,
  landmarks: Array,
  ridge,
  weights: Array | None = None,
  landmark_weights: Array | None = None,
  block_size: int | None = None,
) -> Array:
  """Leverage scores from landmarks S, in one pass over the rows and without an n x n matrix.

  With M = K_SS + ridge diag(1/w) and t_i = (k_ii - k_iS M^{-1} k_Si) / ridge:

    w = None:  returns the upper bounds t_i / (1 + t_i) >= tau_i outside S and
               1 - ridge (M^{-1})_ii >= tau_i in S. They are proved for every S: each is the exact
               score of row i among the rows of S and i, and leaving out rows makes G smaller. For
               uniform random S their expected sum is at most (n + 1) d_eff / (|S| + 1).
    w given:   returns t_i, which is in [tau_i / (1 + e), tau_i / (1 - e)] if the weighted landmarks
               approximate G within factors 1 - e and 1 + e in the Loewner order. Otherwise there is
               no guarantee.

  Args:
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    landmarks: `(s,)` distinct indices into `x`.
    ridge: absolute, scalar > 0.
    weights: `(n,)` input weights >= 0, or None.
    landmark_weights: `(s,)` weights > 0, 1 / (selection probability), or None.
    block_size: number of rows processed at a time; None for all.

  Returns:
    `(n,)`; NaN if the factorization fails.

  Raises:
    ValueError: as `ridge_leverage_scores`, and for repeated landmarks.

  References:
    Musco and Musco (NeurIPS 2017), section 3; Cohen et al. (ITCS 2015), theorem 4 (uniform
    sampling). The form t / (1 + t) is the Sherman-Morrison formula.
  """
  ridge, root = scoring.prepare_rows("x", x, ridge, weights)
  landmarks = scoring.prepare_landmarks(landmarks, x.shape[0])
  block_size = checks.optional_positive_int("block_size", block_size)
  few = scoring.few_rows(x.shape[0])
  scoring.check_precision(
    ridge, lambda: jnp.mean(scoring.weighted_diagonal(kernel_fn, x[few], root[few])), x.dtype
  )
  if landmark_weights is not None:
    checks.shape("landmark_weights", landmark_weights, landmarks.shape)
    checks.positive("landmark_weights", landmark_weights)
    landmark_weights = jnp.asarray(landmark_weights, root.dtype)
  return _landmark_leverage(
    pytrees.argument(kernel_fn), x, root, landmarks, landmark_weights, ridge, block_size
  ).astype(x.dtype)


def low_rank_leverage_bounds(
  factor: Array, k_diag: Array, ridge, residual_norm=None
) -> LeverageBounds:
  """Bounds on the leverage scores of K from F with F F^T <= K, e.g. a partial Cholesky factor.

  With E = K - F F^T, ||E|| <= residual_norm, c = residual_norm / ridge, and sigma_i(l) the score of
  row i for F F^T at ridge l:

    sigma_i(ridge) <= tau_i <= (c + sigma_i((1 + c) ridge)) / (1 + c)
    tau_i <= t / (1 + t),  t = h / (1 - a h) + E_ii / ((1 - q) ridge),
    h = f_i^T (a F^T F + ridge I)^{-1} f_i,  a = q / (q + c),  for any q in (0, 1).

  Both upper bounds are proved on the theory page, and the smaller one is returned. The first adds
  the largest possible residual, the second the residual of row i. q is chosen from a grid to make
  the second bound small.

  Args:
    factor: `(n, k)` with F F^T <= K.
    k_diag: `(n,)` diagonal of K.
    ridge: absolute, scalar > 0.
    residual_norm: upper bound on the spectral norm of E; None for the trace of E.

  Returns:
    `LeverageBounds`.

  Raises:
    ValueError: for inconsistent shapes or a ridge <= 0.
  """
  checks.rank("factor", factor, 2)
  ridge, _ = scoring.prepare_rows("factor", factor, ridge, None)
  checks.shape("k_diag", k_diag, (factor.shape[0],))
  z = factor.astype(ridge.dtype)
  residual = jnp.maximum(jnp.asarray(k_diag, ridge.dtype) - jnp.sum(z**2, axis=1), 0)
  norm = jnp.sum(residual) if residual_norm is None else jnp.asarray(residual_norm, ridge.dtype)
  return LeverageBounds(
    *(b.astype(factor.dtype) for b in _low_rank_bounds(z, residual, norm, ridge))
  )


def warn_if_flat(max_over_mean) -> None:
  """Issues a warning if the largest score is below 1.05 times the mean; ignores tracers."""
  if not checks.is_traced(max_over_mean) and float(max_over_mean) < FLAT_RATIO:
    warnings.warn(
      f"scores are nearly equal (largest / mean = {float(max_over_mean):.3f}), so sampling by them is "
      "nearly uniform; use a larger ridge for the scores, see score_ridge_for_dimension",
      stacklevel=4,
    )


_exact = jax.jit(
  lambda k, ridge, root: scoring.factor_leverage(
    scoring.score_factor(root[:, None] * k.astype(root.dtype) * root[None, :], ridge), ridge
  )
)


@functools.partial(jax.jit, static_argnames="block_size")
def _feature_leverage(z, ridge, root, block_size):
  return scoring.feature_fit(z, root, jnp.zeros((z.shape[0], 1), root.dtype), ridge, block_size)[0]


@functools.partial(jax.jit, static_argnames="block_size")
def _landmark_leverage(kernel_fn, x, root, landmarks, landmark_weights, ridge, block_size):
  y = jnp.zeros((x.shape[0], 1), root.dtype)
  tau, _, _, status = scoring.landmark_fit(
    kernel_fn, x, root, y, landmarks, landmark_weights, ridge, block_size
  )
  return jnp.where(status == Status.OK, tau, jnp.nan)


@jax.jit
def _low_rank_bounds(z, residual, norm, ridge):
  moment = linalg.matmul(z.T, z)

  def scores(kept, level):
    return jnp.sum(linalg.whiten(linalg.factor(kept * moment, level), z.T) ** 2, axis=0)

  c = norm / ridge
  share = scoring.best_share(
    jnp.maximum(jnp.linalg.eigvalsh(moment), 0), jnp.sum(residual), ridge, norm
  )
  kept = scoring.kept_share(share, ridge, norm)
  one = jnp.ones_like(ridge)
  monotone = (c + scores(one, (1 + c) * ridge)) / (1 + c)
  return scores(one, ridge), jnp.minimum(
    monotone, scoring.corrected(scores(kept, ridge), residual, kept, share, ridge)
  )
