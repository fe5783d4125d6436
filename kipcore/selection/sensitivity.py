"""Sensitivities: exact values and certified upper bounds for kernel ridge regression and k-means.

The sensitivity of row i is its largest possible share of the objective,

  s_i = sup_q u_i f_i(q) / F(q),  F = sum_i u_i f_i (+ regularizer),

(Langberg and Schulman, SODA 2010). Rows drawn in proportion to s_i, or to upper bounds on s_i, with
weights 1 / (expected count), form a coreset whose size grows with the total of the scores (Feldman
and Langberg 2011; Braverman et al. 2016). This does not hold for scores below the sensitivities.

For kernel ridge regression, q is a linear map W on features phi, the loss of a row is ||W^T
phi_i - y_i||^2, and the objective of the coreset has the same regularizer ridge ||W||^2. For any
number of outputs, the sensitivities are

  s_i = tau_i + ||r_i||^2 / F*,   sum_i s_i <= d_eff + 1,

where tau_i is the ridge leverage score, r_i the residual of the optimal fit, and F* the minimum of
F. Input weights u replace phi_i by sqrt(u_i) phi_i and y_i by sqrt(u_i) y_i.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks, keys, linalg, pytrees
from kipcore.selection import leverage, scoring, sensitivity_cores
from kipcore.types import Array, KernelFn


class Guarantee(enum.IntEnum):
  """Whether scores are equal to the sensitivities or upper bounds on them (up to rounding)."""

  EXACT = 0
  OVER_ESTIMATE = 1


class SensitivityScores(NamedTuple):
  """Scores for kernel ridge regression, with their guarantee and diagnostics.

  Attributes:
    scores: `(n,)` in [0, 1], sensitivities or upper bounds; NaN unless `status` is OK.
    leverage: `(n,)` in [0, 1], ridge leverage scores or upper bounds.
    label_scores: `(n,)`, scores - leverage, the contribution of the labels.
    objective: scalar, F* or a lower bound on it.
    total: sum of the scores. A sample of m rows has a relative error of order sqrt(total / m).
    effective_dimension: sum of `leverage`: d_eff or an upper bound on it.
    effective_dimension_lower: lower bound on d_eff (0 if it was not computed).
    label_mass: sum of `label_scores`; at most 1 if the scores are exact.
    max_over_mean: largest score / mean score, 1 if all are equal. Below 1.05, sampling is nearly
      uniform.
    second_moment: n sum p_i^2 with p = scores / total; 1 if all scores are equal.
    guarantee: `Guarantee`.
    status: int32, `Status`.
  """

  scores: Array
  leverage: Array
  label_scores: Array
  objective: Array
  total: Array
  effective_dimension: Array
  effective_dimension_lower: Array
  label_mass: Array
  max_over_mean: Array
  second_moment: Array
  guarantee: int
  status: Array


def krr_sensitivity_scores(
  k: Array, y: Array, ridge, weights: Array | None = None
) -> SensitivityScores:
  """Exact kernel ridge regression sensitivities with diagnostics.

    A = (K_u + ridge I)^{-1} U^{1/2} Y,   s_i = tau_i + ridge ||A_i||^2 / <U^{1/2} Y, A>

  The theory page proves that s_i is the sensitivity. If Y = 0, the label term is 0. Centering the
  labels changes the scores, so pass the labels that are used for training.

  Args:
    k: `(n, n)` kernel matrix, symmetric positive semi-definite.
    y: `(n, c)` floating labels.
    ridge: absolute, scalar > 0; see `score_ridge.score_ridge_for_dimension`.
    weights: `(n,)` input weights >= 0, e.g. n / (c n_class) for class-balanced risk; None for 1.

  Returns:
    `SensitivityScores`, exact. Issues a warning if the scores are nearly equal.

  Raises:
    ValueError: for inconsistent shapes, a ridge <= 0, NaN or infinite input, or a ridge below
      1e-4 tr K / n if only float32 is available. If such a ridge is traced, `status` reports it.
  """
  k, ridge, root = scoring.prepare_matrix(k, ridge, weights)
  y = _prepare_labels(y, k, root)
  checks.finite("k", k)
  return finish(sensitivity_cores.exact_scores(k, y, ridge, root), Guarantee.EXACT, k.dtype)


def krr_sensitivities(k: Array, y: Array, ridge, weights: Array | None = None) -> Array:
  """Exact sensitivities tau_i + ||r_i||^2 / F* of kernel ridge regression, without diagnostics.

  Args:
    k, y, ridge, weights: as for `krr_sensitivity_scores`. See there for the errors raised.

  Returns:
    `(n,)` in [0, 1].

  Example:
    >>> k, y = jnp.diag(jnp.asarray([9.0, 1.0])), jnp.asarray([[1.0], [0.0]])
    >>> print(
    ...   np.asarray(kipcore.krr_sensitivities(k, y, 1.0)).round(3)
    ... )  # leverage 0.9 and 0.5, plus 0.1 of a label
    [1.  0.5]
  """
  return krr_sensitivity_scores(k, y, ridge, weights).scores


def feature_krr_sensitivities(
  z: Array, y: Array, ridge, weights: Array | None = None, block_size: int | None = None
) -> SensitivityScores:
  """Exact sensitivities of ridge regression on features, from a D x D matrix.

  The scores are exact for the kernel Z Z^T. For a kernel that Z Z^T approximates, they are
  approximations without a guarantee.

  Args:
    z: `(n, D)` features.
    y, ridge, weights: as for `krr_sensitivity_scores`.
    block_size: number of rows processed at a time; None for all.

  Returns:
    `SensitivityScores`, exact. Issues a warning if the scores are nearly equal.

  Raises:
    ValueError: as `krr_sensitivity_scores`.
  """
  checks.rank("z", z, 2)
  ridge, root = scoring.prepare_rows("z", z, ridge, weights)
  y = _prepare_labels(y, z, root)
  block_size = checks.optional_positive_int("block_size", block_size)
  checks.finite("z", z)
  scoring.check_precision(ridge, lambda: jnp.mean(scoring.feature_diagonal(z, root)), z.dtype)
  parts = sensitivity_cores.feature_scores(
    z, y, ridge, None if weights is None else root, block_size
  )
  return finish(parts, Guarantee.EXACT, z.dtype)


def blocked_krr_sensitivities(
  kernel_fn: KernelFn,
  x: Array,
  y: Array,
  ridge,
  groups,
  weights: Array | None = None,
  objective_bound=0.0,
) -> SensitivityScores:
  """Certified upper bounds: the exact sensitivity of each row within its own group.

  The bounds hold for every partition, because leaving out rows makes F smaller. With classes as
  groups they are tight. One kernel matrix of a group is held at a time. All groups are padded to
  the largest, so the cost is (number of groups) (largest group)^3.

  Args:
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    y, ridge, weights: as for `krr_sensitivity_scores`.
    groups: `(n,)` integers, not traced, e.g. class labels; group sizes may differ.
    objective_bound: a known lower bound on F*, which tightens the label term; 0 for none.

  Returns:
    `SensitivityScores`, upper bounds; `objective` is the best known lower bound on F*. Issues a
    warning if the scores are nearly equal.

  Raises:
    TypeError: for traced groups, because their sizes determine array shapes.
    ValueError: as `krr_sensitivity_scores`.
  """
  ridge, root, y = _prepare_kernel_rows(kernel_fn, x, y, ridge, weights)
  checks.non_negative("objective_bound", objective_bound)
  if checks.is_traced(groups):
    raise TypeError("groups: expected a concrete array, got a traced one; group sizes set shapes")
  groups = np.asarray(groups)
  checks.shape("groups", groups, (x.shape[0],))
  order = np.argsort(groups, kind="stable")
  _, start, size = np.unique(groups[order], return_index=True, return_counts=True)
  column = np.arange(size.max())
  # A padded entry repeats a row of the group, with weight 0.
  index = order[start[:, None] + np.minimum(column[None, :], size[:, None] - 1)].astype(np.int32)
  present = column[None, :] < size[:, None]
  parts = sensitivity_cores.blocked_scores(
    pytrees.argument(kernel_fn),
    x,
    y,
    ridge,
    root,
    jnp.asarray(index),
    jnp.asarray(present),
    jnp.asarray(objective_bound, root.dtype),
  )
  return finish(parts, Guarantee.OVER_ESTIMATE, x.dtype)


def approximate_krr_sensitivities(
  key,
  kernel_fn: KernelFn,
  x: Array,
  y: Array,
  ridge,
  num_landmarks: int,
  weights: Array | None = None,
  landmarks: Array | None = None,
  block_size: int = 1024,
  refine: bool = True,
) -> SensitivityScores:
  """Certified upper bounds from landmarks S, in blocks of rows and without an n x n matrix.

  Each score is the smaller of two bounds. The theory page proves both for every S and every order
  of rows.

  1. One pass: the exact sensitivity of row i in the problem with only the rows S and i, tightened
     by a lower bound on F*.
  2. Two passes (with `refine`): with the Nystrom approximation from S, the second bound of
     `leverage.low_rank_leverage_bounds` on tau_i, and a bound on ||r_i|| from the fit in the span
     of S.

  Bound 2 is tight if the spectral norms of the diagonal blocks of the Nystrom residual sum to less
  than the ridge (d_eff in the low hundreds for 60,000 rows of MNIST). Otherwise bound 1 is the
  smaller one, and `blocked_krr_sensitivities` with classes as groups is tighter.

  Args:
    key: random key for the landmarks and for the order of the rows.
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    y, ridge, weights: as for `krr_sensitivity_scores`.
    num_landmarks: s; limited to n.
    landmarks: `(s,)` distinct indices to use instead of uniform random ones.
    block_size: number of rows processed at a time. Memory: s x s and block_size x (s + block_size)
      entries.
    refine: False for bound 1 only, at about a third of the cost.

  Returns:
    `SensitivityScores`, upper bounds; `effective_dimension` and `effective_dimension_lower` are
    bounds on d_eff. Issues a warning if the scores are nearly equal.

  Raises:
    ValueError: as `krr_sensitivity_scores`, and for repeated landmarks.

  Example:
    >>> x, y, kernel_fn = (
    ...   jnp.arange(4.0)[:, None],
    ...   jnp.asarray([[1.0], [-1.0], [1.0], [1.0]]),
    ...   kipcore.rbf_fn(1.0),
    ... )
    >>> upper = kipcore.approximate_krr_sensitivities(
    ...   0, kernel_fn, x, y, 1.0, num_landmarks=2
    ... ).scores
    >>> bool(jnp.all(upper >= kipcore.krr_sensitivities(kernel_fn(x), y, 1.0) - 1e-6))
    True
  """
  ridge, root, y = _prepare_kernel_rows(kernel_fn, x, y, ridge, weights)
  num_landmarks = checks.positive_int("num_landmarks", num_landmarks)
  block_size = checks.positive_int("block_size", block_size)
  if landmarks is not None:
    landmarks = scoring.prepare_landmarks(landmarks, x.shape[0])
    checks.shape("landmarks", landmarks, (num_landmarks,))
  order = jax.random.permutation(keys.canonical_key(key), x.shape[0]).astype(jnp.int32)
  landmarks = order[:num_landmarks] if landmarks is None else landmarks
  parts = sensitivity_cores.landmark_scores(
    pytrees.argument(kernel_fn), x, y, ridge, root, landmarks, order, block_size, refine
  )
  return finish(parts, Guarantee.OVER_ESTIMATE, x.dtype)


def kmeans_sensitivities(
  x: Array, centers: Array, weights: Array | None = None, alpha=1.0
) -> Array:
  """Upper bounds on the k-means sensitivities from any centers B.

    s_i <= u_i (2 alpha d_i^2 / c + 4 alpha c_b / (U_b c) + 4 / U_b),   b = nearest center of i,

  where d_i is the distance to b, c the weighted cost, and c_b and U_b the cost and weight of the
  cluster. The sum of the bounds is at most 6 alpha + 4 |B|.

  The bounds are proved (by the triangle inequality) for every k-tuple of centers if the optimal
  cost is at least c / alpha. For k-means++ seeds, alpha = 16 (log2 k + 2) is valid with probability
  1/2. The default alpha = 1 is proved only for optimal B and is a heuristic after Lloyd's
  algorithm.

  Args:
    x: `(n, d)` rows.
    centers: `(k, d)`.
    weights: `(n,)` input weights >= 0, or None for 1.
    alpha: upper bound on (cost of B) / (optimal cost), >= 1.

  Returns:
    `(n,)`, not clipped at 1. If the cost is 0, the bound is 4 u_i / U_b.

  Raises:
    ValueError: for inconsistent shapes, alpha < 1, or NaN or infinite input.

  References:
    Bachem, Lucic and Krause, "Practical coreset constructions for machine learning" (2017), lemma
    2.2 and algorithm 2.
  """
  weights = _prepare_points(x, weights)
  checks.floating("centers", centers)
  checks.shape("centers", centers, (None, x.shape[1]))
  checks.in_range("alpha", alpha, 1, np.inf)
  if centers.dtype != x.dtype or not centers.shape[0]:
    raise ValueError(
      f"centers: expected at least one row of dtype {x.dtype}, got {centers.shape} {centers.dtype}"
    )
  return _kmeans_scores(x, centers, weights, jnp.asarray(alpha, x.dtype))


def lightweight_sensitivities(x: Array, weights: Array | None = None) -> Array:
  """Probabilities of lightweight coresets, q_i = u_i / (2 U) + u_i d_i^2 / (2 sum_j u_j d_j^2).

  d_i is the distance to the weighted mean, and U is the sum of the weights. Proved for k-means with
  an additive error (theorem 2 of the reference): with draws from q,
  |cost_S(Q) - cost(Q)| <= (eps / 2) (cost(Q) + cost(mean)) for all sets Q of k centers. A weight is
  a
  multiplicity: it multiplies d_i^2, not the coordinates.

  Args:
    x: `(n, d)` rows.
    weights: `(n,)` input weights >= 0, or None for 1.

  Returns:
    `(n,)`, with sum 1; u_i / U if all rows are equal.

  Raises:
    ValueError: for inconsistent shapes, or NaN or infinite input.

  References:
    Bachem, Lucic and Krause, "Scalable k-means clustering via lightweight coresets" (KDD 2018),
    algorithm 1.
  """
  return _lightweight_scores(x, _prepare_points(x, weights))


def _prepare_labels(y, x, root) -> Array:
  """Weighted labels `(n, c)` in the working dtype."""
  checks.rank("y", y, 2)
  checks.floating("y", y)
  checks.same_rows("y", y, "the inputs", x)
  checks.finite("y", y)
  return root[:, None] * y.astype(root.dtype)


def _prepare_kernel_rows(kernel_fn, x, y, ridge, weights):
  ridge, root = scoring.prepare_rows("x", x, ridge, weights)
  y = _prepare_labels(y, x, root)
  checks.finite("x", x)
  few = scoring.few_rows(x.shape[0])
  scoring.check_precision(
    ridge, lambda: jnp.mean(scoring.weighted_diagonal(kernel_fn, x[few], root[few])), x.dtype
  )
  return ridge, root, y


def _prepare_points(x, weights) -> Array:
  checks.rank("x", x, 2)
  checks.floating("x", x)
  checks.finite("x", x)
  if weights is None:
    return jnp.ones((x.shape[0],), x.dtype)
  checks.shape("weights", weights, (x.shape[0],))
  checks.non_negative("weights", weights)
  return jnp.asarray(weights, x.dtype)


def finish(parts, guarantee: Guarantee, dtype) -> SensitivityScores:
  """`SensitivityScores` from (scores, leverage, objective, lower dimension, status)."""
  result = SensitivityScores(*sensitivity_cores.diagnose(parts, jnp.dtype(dtype)))._replace(
    guarantee=guarantee
  )
  leverage.warn_if_flat(result.max_over_mean)
  return result


@jax.jit
def _kmeans_scores(x, centers, weights, alpha):
  # Distances do not depend on the origin; centering keeps the expansion accurate far from 0.
  origin = jnp.mean(x, axis=0, keepdims=True)
  x, centers = x - origin, centers - origin
  cross = linalg.matmul(x, centers.T)
  nearest = jnp.argmin(jnp.sum(centers**2, axis=1)[None, :] - 2 * cross, axis=1)
  d2 = jnp.sum((x - centers[nearest]) ** 2, axis=1)
  k = centers.shape[0]
  mass = jnp.zeros((k,), x.dtype).at[nearest].add(weights)
  cost = jnp.zeros((k,), x.dtype).at[nearest].add(weights * d2)
  total = jnp.sum(cost)
  safe_total = jnp.where(total > 0, total, 1)
  # A cluster of weight 0 has rows of weight 0 only, whose score is 0.
  safe_mass = jnp.where(mass > 0, mass, 1)
  own = (4 * alpha * cost / safe_total + 4) / safe_mass
  return weights * (2 * alpha * d2 / safe_total + own[nearest])


@jax.jit
def _lightweight_scores(x, weights):
  mass = jnp.sum(weights)
  mean = jnp.sum(weights[:, None] * x, axis=0, keepdims=True) / mass
  spread = weights * jnp.sum((x - mean) ** 2, axis=1)
  total = jnp.sum(spread)
  uniform = weights / mass
  return jnp.where(
    total > 0, 0.5 * uniform + 0.5 * spread / jnp.where(total > 0, total, 1), uniform
  )
