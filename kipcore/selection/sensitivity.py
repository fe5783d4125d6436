"""Sensitivities: exact and certified over-estimates for kernel ridge regression, and for k-means.

The sensitivity of row i is the largest share that it can have of the objective,

  s_i = sup_q u_i f_i(q) / F(q),  F = sum_i u_i f_i (+ regularizer),

(Langberg and Schulman, SODA 2010). Sampling in proportion to s_i, or to any over-estimate of it, with weights one over
the expected count gives a coreset whose size grows with their total (Feldman, Langberg 2011; Braverman et al. 2016);
under-estimates void it.

For kernel ridge regression q is a linear map W on features phi, the row loss is ||W^T phi_i - y_i||^2, the regularizer
ridge ||W||^2 stays in the coreset's objective as it is, and for any number of outputs the supremum is

  s_i = tau_i + ||r_i||^2 / F*,   sum_i s_i <= d_eff + 1,

with tau_i the ridge leverage score, r_i the residual of the optimal fit and F* its
objective. Input weights u enter by phi_i -> sqrt(u_i) phi_i, y_i -> sqrt(u_i) y_i.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks, keys, linalg
from kipcore.selection import leverage, scoring, sensitivity_cores
from kipcore.types import Array, KernelFn


class Guarantee(enum.IntEnum):
  """What holds for the scores: equal to the sensitivities, or never below them (up to rounding)."""

  EXACT = 0
  OVER_ESTIMATE = 1


class SensitivityScores(NamedTuple):
  """Kernel ridge regression scores and what they promise.

  Attributes:
    scores: `(n,)` in [0, 1], the sensitivities or over-estimates; NaN unless status is OK.
    leverage: `(n,)` in [0, 1], ridge leverage scores, or over-estimates.
    label_scores: `(n,)`, scores - leverage, the share that comes from the labels.
    objective: F*, or a lower bound on it; scalar.
    total: sum of the scores; sampling m rows gives relative error of order sqrt(total / m).
    effective_dimension: sum of `leverage`: d_eff, or an upper bound.
    effective_dimension_lower: lower bound on d_eff (0 where none was computed).
    label_mass: sum of `label_scores`; at most 1 where exact.
    max_over_mean: 1 for scores that are all equal; below 1.05 they sample like the uniform law.
    second_moment: n sum p_i^2 with p = scores / total; 1 for the uniform law.
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

  Exact: with W = W* + V, F(W) = F* + tr(V^T G V), and theta F - f_i >= 0 for all V exactly when theta >= tau_i +
  ||r_i||^2 / F*. Not invariant to centring the labels, so pass those of the distiller. With Y = 0 the label term is 0.

  Args:
    k: `(n, n)` kernel matrix, symmetric positive semi-definite.
    y: `(n, c)` labels, floating.
    ridge: absolute, scalar > 0; see `score_ridge.score_ridge_for_dimension`.
    weights: `(n,)` input weights >= 0, e.g. n / (c n_class) for class-balanced risk; None for 1.

  Returns:
    `SensitivityScores`, exact. Warns on the host where the scores are flat.

  Raises:
    ValueError: for shapes that do not fit, a ridge <= 0, NaN or infinite input, or a
      ridge below 1e-4 tr K / n where only float32 is available (a status if traced).
  """
  k, ridge, root = scoring.prepare_matrix(k, ridge, weights)
  y = _prepare_labels(y, k, root)
  checks.finite("k", k)
  return finish(sensitivity_cores.exact_scores(k, y, ridge, root), Guarantee.EXACT, k.dtype)


def krr_sensitivities(k: Array, y: Array, ridge, weights: Array | None = None) -> Array:
  """Exact sensitivities tau_i + ||r_i||^2 / F* of kernel ridge regression: the scores alone.

  Args:
    k, y, ridge, weights: as `krr_sensitivity_scores`, which also says the errors.

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

  Exact for the kernel Z Z^T. For another that Z approximates they are as good as the approximation, and not certified.

  Args:
    z: `(n, D)` features.
    y, ridge, weights: as `krr_sensitivity_scores`.
    block_size: rows at a time; None for all.

  Returns:
    `SensitivityScores`, exact. Warns on the host where the scores are flat.

  Raises:
    ValueError: as `krr_sensitivity_scores`.
  """
  checks.rank("z", z, 2)
  ridge, root = scoring.prepare_rows("z", z, ridge, weights)
  y = _prepare_labels(y, z, root)
  block_size = checks.optional_positive_int("block_size", block_size)
  checks.finite("z", z)
  scoring.check_precision(
    ridge, lambda: jnp.mean(root**2 * jnp.sum(z.astype(root.dtype) ** 2, axis=1)), z.dtype
  )
  return finish(
    sensitivity_cores.feature_scores(z, y, ridge, root, block_size), Guarantee.EXACT, z.dtype
  )


def blocked_krr_sensitivities(
  kernel_fn: KernelFn,
  x: Array,
  y: Array,
  ridge,
  groups,
  weights: Array | None = None,
  objective_bound=0.0,
) -> SensitivityScores:
  """Certified over-estimates: the exact sensitivity of each row within its own group.

  Valid for every partition, because leaving rows out of F can only raise a ratio; classes make tight groups. One
  group's kernel matrix is held at a time, all padded to the largest, so cost is (number of groups) (largest group)^3.

  Args:
    kernel_fn: see `types.KernelFn`; hashable.
    x: `(n, ...)` rows.
    y, ridge, weights: as `krr_sensitivity_scores`.
    groups: `(n,)` integers on the host, e.g. class labels; sizes may differ.
    objective_bound: a known lower bound on F*, which tightens the label term (`sensitivity_cores.joint`); 0 for none.

  Returns:
    `SensitivityScores`, over-estimates; `objective` is the best lower bound known. Warns on the host if they are flat.

  Raises:
    TypeError: for traced groups, whose sizes are not known.
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
    kernel_fn,
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
  """Certified over-estimates from landmarks S, streaming over rows; no n x n matrix.

  Each score is the smaller of two bounds, both proved for every S and every order of rows:

  1. One pass: tau_i, r_i and F*_i exactly within the rows S and i alone, joined with a bound F_low <= F* (see `joint`).
  2. Nystrom (with `refine`): K = V V^T + E with V from S. The upper bound of `leverage.low_rank_leverage_bounds` on
     tau_i, where ||E|| is at most the sum over diagonal blocks of their norms; and with W~ the fit in the span of S,
     r~_i its residuals, ||r_i|| <= ||r~_i|| + sqrt(tau_i (F(W~) - F*)), because r_i - r~_i = (W~ - W*)^T phi_i.

  F_low: the gradient of F at W~ lies outside the span of S and G >= ridge, so F(W~) - F* <= <R~, E R~> / ridge <=
  (sum_b <R~_b, E_bb R~_b>^{1/2})^2 / ridge, the triangle inequality over blocks b of rows (for each output); also F* >=
  F*_S. Memory is that of s x s and block x (s + block). Bound 2 is tight while the norms of E's blocks sum to less than
  the ridge (d_eff in the low hundreds for 60,000 rows of MNIST); beyond it bound 1 rules, and class blocks are tighter.

  Args:
    key: random key for the landmarks and for the order of the blocks.
    kernel_fn: see `types.KernelFn`; hashable.
    x: `(n, ...)` rows.
    y, ridge, weights: as `krr_sensitivity_scores`.
    num_landmarks: s; capped at n.
    landmarks: `(s,)` distinct indices to use instead of uniform ones.
    block_size: rows at a time.
    refine: False for bound 1 alone with F_low = F*_S, at about a third of the cost.

  Returns:
    `SensitivityScores`, over-estimates; `effective_dimension` and `_lower` enclose d_eff. Warns on the host if flat.

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
    kernel_fn, x, y, ridge, root, landmarks, order, block_size, refine
  )
  return finish(parts, Guarantee.OVER_ESTIMATE, x.dtype)


def kmeans_sensitivities(
  x: Array, centers: Array, weights: Array | None = None, alpha=1.0
) -> Array:
  """Upper bounds on the k-means sensitivities from any centers B.

    s_i <= u_i (2 alpha d_i^2 / c + 4 alpha c_b / (U_b c) + 4 / U_b),   b = nearest center of i,

  with d_i the distance to it, c the weighted cost, c_b and U_b the cost and weight of
  the cluster. Their sum is at most 6 alpha + 4 |B|.

  Proved (triangle inequality, twice) for every k-tuple of centers whose optimal cost is at least c / alpha. For
  k-means++ seeds alpha = 16 (log2 k + 2) holds with probability 1/2; alpha = 1, the default, is proved only where B is
  optimal and is a heuristic after Lloyd's iterations.

  Args:
    x: `(n, d)` rows.
    centers: `(k, d)`.
    weights: `(n,)` input weights >= 0, or None for 1.
    alpha: cost of B over the optimal cost, or more; >= 1.

  Returns:
    `(n,)`, not clipped at 1. Where the cost is 0 the bound is 4 u_i / U_b.

  Raises:
    ValueError: for shapes that do not fit, alpha < 1, or NaN or infinite input.

  Source: Bachem, Lucic and Krause, "Practical coreset constructions for machine
  learning" (2017), lemma 2.2 and algorithm 2.
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
  """The lightweight-coreset law, q_i = u_i / (2 U) + u_i d_i^2 / (2 sum_j u_j d_j^2).

  d_i is the distance to the weighted mean and U the sum of weights. Proved (their theorem 2) for k-means with an
  additive error: sampling by q gives |cost_S - cost| <= (eps / 2) (cost(Q) + cost(mean)) for all Q of k centers. A
  weight is a multiplicity: it multiplies d_i^2 and not the coordinates.

  Args:
    x: `(n, d)` rows.
    weights: `(n,)` input weights >= 0, or None for 1.

  Returns:
    `(n,)`, summing to 1; u_i / U where all rows coincide.

  Raises:
    ValueError: for shapes that do not fit, or NaN or infinite input.

  Source: Bachem, Lucic and Krause, "Scalable k-means clustering via lightweight coresets" (KDD 2018), algorithm 1.
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
  # The mean over a few rows is enough to place the ridge against the floor of float32.
  few = slice(None, None, max(1, x.shape[0] // 256))
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
  """Diagnostics of (scores, leverage, objective, lower dimension, status); warns where flat."""
  result = SensitivityScores(*sensitivity_cores.diagnose(parts, jnp.dtype(dtype)))._replace(
    guarantee=guarantee
  )
  leverage.warn_if_flat(result.max_over_mean)
  return result


@jax.jit
def _kmeans_scores(x, centers, weights, alpha):
  # Distances do not depend on the origin; centring keeps the expansion accurate far from 0.
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
