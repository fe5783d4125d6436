"""Kernel ridge regression: fit, predict, loss, and the best labels for given support inputs.

`ridge` is absolute everywhere: the solve is (K_ss + ridge I)^{-1} y. Use
`relative_ridge` for the fraction of the mean diagonal that KIP, FRePo and
neural-tangents mean by their regularization.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import checks, linalg
from kipcore.types import Array, KernelFn, Status


class KRRFit(NamedTuple):
  """A fitted kernel ridge regression.

  Attributes:
    dual: `(m, c)` coefficients alpha = (K_ss + ridge I)^{-1} y.
    status: int32 scalar, `types.Status`.
  """

  dual: Array
  status: Array


class KRRLoss(NamedTuple):
  """`loss` (scalar), `accuracy` (scalar in [0, 1]) and `predictions` `(t, c)`."""

  loss: Array
  accuracy: Array
  predictions: Array


class LabelSolution(NamedTuple):
  """Labels solved for, `(m, c)`, and the `status` of the factorizations."""

  labels: Array
  status: Array


def relative_ridge(k: Array, scale) -> Array:
  """The absolute ridge that is a fraction of the mean diagonal: scale * tr(K) / n.

  Args:
    k: `(n, n)` kernel matrix, or its diagonal `(n,)`.
    scale: fraction > 0; published KIP uses 1e-6.

  Returns:
    Absolute ridge, scalar, in the dtype of `k`.

  Raises:
    ValueError: for a scale that is zero or negative.

  Example:
    >>> k = jnp.asarray([[1.0, 0.5], [0.5, 3.0]])
    >>> float(kipcore.relative_ridge(k, 0.5)), float(kipcore.relative_ridge(jnp.diagonal(k), 0.5))
    (1.0, 1.0)
  """
  checks.rank("k", k, 1, 2)
  checks.positive("scale", scale)
  diagonal = jnp.diagonal(k) if k.ndim == 2 else k
  return jnp.asarray(scale, k.dtype) * jnp.mean(diagonal)


def krr_fit(k_ss: Array, y_support: Array, ridge) -> KRRFit:
  """Dual coefficients alpha = (K_ss + diag(ridge))^{-1} y.

  They minimize sum_j (f(x_j) - y_j)^2 / ridge_j + ||f||^2 over functions f of the kernel's space.
  A ridge vector is how weights survive: ridge / w_j gives point j the weight w_j.

  The factorization runs in float64 when JAX's 64-bit switch is on. In float32 the
  condition number n / scale of a relative ridge `scale` should stay below about 1e7;
  beyond, the status may report a matrix that is not positive definite.

  Args:
    k_ss: `(m, m)` kernel matrix of the support.
    y_support: `(m, c)` labels.
    ridge: absolute, > 0, scalar or `(m,)`.

  Returns:
    `KRRFit` with `dual` `(m, c)` in the dtype of the labels, and a status: NOT_FINITE where kernel, labels or `dual` are not.

  Raises:
    ValueError, TypeError: for shapes that do not match, integers, or a concrete ridge <= 0.

  Example:
    A row with half the ridge counts as much as the row twice:

    >>> kernel_fn, x, y = (
    ...   kipcore.rbf_fn(1.0),
    ...   jnp.asarray([[0.0], [1.0]]),
    ...   jnp.asarray([[1.0], [-1.0]]),
    ... )
    >>> fit = kipcore.krr_fit(kernel_fn(x), y, jnp.asarray([0.5, 0.25]))
    >>> rows = np.array([0, 1, 1])
    >>> twice = kipcore.krr_fit(kernel_fn(x[rows]), y[rows], 0.5)
    >>> np.allclose(fit.dual[1], twice.dual[1:].sum(axis=0), atol=1e-5)
    True
  """
  checks.floating("k_ss", k_ss)
  checks.floating("y_support", y_support)
  checks.square("k_ss", k_ss)
  checks.rank("y_support", y_support, 2)
  checks.same_rows("k_ss", k_ss, "y_support", y_support)
  if not k_ss.shape[0]:
    raise ValueError("k_ss: expected at least one row, got none")
  if jnp.ndim(ridge):
    checks.shape("ridge", ridge, (k_ss.shape[0],))
  checks.positive("ridge", ridge)
  factor = linalg.factor(k_ss, ridge)
  dual = linalg.solve(factor, y_support).astype(y_support.dtype)
  return KRRFit(dual, status_with(factor.status, dual))


def status_with(status: Array, values: Array) -> Array:
  """The status, or NOT_FINITE where it is OK and the values are not finite."""
  return jnp.where(
    (status == Status.OK) & ~jnp.isfinite(values).all(), jnp.int32(Status.NOT_FINITE), status
  )


def krr_predict(fit: KRRFit, k_ts: Array) -> Array:
  """Predictions K_ts alpha.

  Args:
    fit: from `krr_fit`.
    k_ts: `(t, m)` kernel between targets and support.

  Returns:
    `(t, c)`.

  Raises:
    ValueError: where `k_ts` does not have m columns.

  Example:
    >>> k, y = (
    ...   jnp.asarray([[2.0, 1.0], [1.0, 2.0]]),
    ...   jnp.asarray([[1.0], [-1.0]]),
    ... )  # y: eigenvector of eigenvalue 1
    >>> fit = kipcore.krr_fit(k, y, 1.0)
    >>> print(
    ...   np.asarray(kipcore.krr_predict(fit, k)).round(3)
    ... )  # y times eigenvalue / (eigenvalue + ridge)
    [[ 0.5]
     [-0.5]]
  """
  checks.shape("k_ts", k_ts, (None, fit.dual.shape[0]))
  return linalg.matmul(k_ts, fit.dual.astype(k_ts.dtype))


def krr_loss(fit: KRRFit, k_ts: Array, y_target: Array, weights: Array | None = None) -> KRRLoss:
  """Half mean squared error of the predictions, as KIP reports it, and the accuracy.

      loss = 1/2 mean_{t, c} w_t (f(x_t) - y_t)^2

  Args:
    fit: from `krr_fit`.
    k_ts: `(t, m)` kernel between targets and support.
    y_target: `(t, c)`; the largest entry of a row is its class.
    weights: `(t,)`, None for ones; a weighted mean of weights 1/(N p_t) is unbiased
      for the mean over all N targets.

  Returns:
    `KRRLoss`; the accuracy is not weighted.

  Raises:
    ValueError: for shapes that do not match.

  Source: Nguyen, Chen, Lee 2021 (KIP), eq. 2, with mean for sum.

  Example:
    >>> k, y = jnp.asarray([[2.0, 1.0], [1.0, 2.0]]), jnp.asarray([[0.5, -0.5], [-0.5, 0.5]])
    >>> result = kipcore.krr_loss(kipcore.krr_fit(k, y, 1.0), k, y)
    >>> (
    ...   round(float(result.loss), 5),
    ...   float(result.accuracy),
    ... )  # all predictions are off by 1/4; 1/2 (1/4)^2
    (0.03125, 1.0)
  """
  checks.shape("y_target", y_target, (k_ts.shape[0], fit.dual.shape[1]))
  predictions = krr_predict(fit, k_ts)
  squares = 0.5 * jnp.mean((predictions - y_target) ** 2, axis=1)
  loss = jnp.mean(squares if weights is None else weights * squares)
  return KRRLoss(loss, accuracy(predictions, y_target), predictions)


def accuracy(predictions: Array, y_target: Array) -> Array:
  """Share of rows whose largest prediction is at the largest label, scalar."""
  hits = jnp.argmax(predictions, axis=1) == jnp.argmax(y_target, axis=1)
  return jnp.mean(hits.astype(predictions.dtype))


def label_solve(
  k_ss: Array, k_ts: Array, y_target: Array, ridge, fit_ridge=None, penalty: str = "rkhs"
) -> Array:
  """The labels of the support with which ridge regression fits the targets best.

      c = argmin ||K_ts c - y_t||^2 + fit_ridge * c^T P c,    y_s = (K_ss + ridge I) c

  with P = K_ss ("rkhs": the norm of the predictor, by which label solving is never worse
  than any weighting of the same support rows) or P = I ("coefficients": the form in
  the published KIP notebook, there with fit_ridge = ridge = 1e-6 / m, absolute).

  Args:
    k_ss: `(m, m)` kernel of the support.
    k_ts: `(t, m)` kernel between targets and support. For many targets, see
      `label_solve_rows`, which never holds it whole.
    y_target: `(t, c)`.
    ridge: absolute ridge > 0 (scalar or `(m,)`) with which the labels will be used.
    fit_ridge: absolute ridge > 0 of the objective; None for `ridge` (a scalar then).
    penalty: "rkhs" or "coefficients".

  Returns:
    `(m, c)` labels; NaN where a factorization failed.

  Raises:
    ValueError: for shapes that do not match, a ridge <= 0, an unknown penalty.

  Source: Nguyen et al. 2021b (KIP at infinite width), eq. 5 (Label Solve).

  Example:
    >>> x, kernel_fn, ridge = jnp.linspace(0.0, 4.0, 9)[:, None], kipcore.rbf_fn(1.0), 1e-3
    >>> y, x_support = x**2, x[::4]
    >>> k_ss, k_ts = kernel_fn(x_support), kernel_fn(x, x_support)
    >>> solved = jax.jit(kipcore.label_solve)(k_ss, k_ts, y, ridge)
    >>> for labels in (y[::4], solved):  # the rows' own labels, and the best ones
    ...   print(
    ...     round(float(kipcore.krr_loss(kipcore.krr_fit(k_ss, labels, ridge), k_ts, y).loss), 1)
    ...   )
    0.5
    0.2
  """
  checks.square("k_ss", k_ss)
  checks.shape("k_ts", k_ts, (None, k_ss.shape[0]))
  checks.same_rows("k_ts", k_ts, "y_target", y_target)
  ridges = _label_ridges(ridge, fit_ridge, penalty)
  factor = linalg.factor(k_ss, linalg.rounding_ridge(k_ss))
  b = linalg.whiten(factor, k_ts.T)
  y = y_target.astype(b.dtype)
  return _label_solution(
    k_ss, factor, linalg.matmul(b, b.T), linalg.matmul(b, y), *ridges, penalty, y_target.dtype
  ).labels


def label_solve_rows(
  kernel_fn: KernelFn,
  x_support: Array,
  x: Array,
  y: Array,
  ridge,
  fit_ridge=None,
  penalty: str = "rkhs",
  block_size: int = 2048,
) -> LabelSolution:
  """`label_solve` over many targets, in row blocks: memory for `(block_size, m)` and `(m, m)`.

  Args:
    kernel_fn: the kernel.
    x_support: `(m, ...)`.
    x: `(n, ...)` target rows.
    y: `(n, c)` target labels.
    ridge, fit_ridge, penalty: as in `label_solve`.
    block_size: target rows at a time.

  Returns:
    `LabelSolution` with `(m, c)` labels and a status.

  Raises:
    ValueError: as `label_solve`.
  """
  checks.same_rows("x", x, "y", y)
  checks.positive_int("block_size", block_size)
  ridges = _label_ridges(ridge, fit_ridge, penalty)
  k_ss = kernel_fn(x_support, None)
  factor = linalg.factor(k_ss, linalg.rounding_ridge(k_ss))
  wide, m, n = factor.lower.dtype, x_support.shape[0], x.shape[0]
  blocks = -(-n // block_size)

  def block(start, size):
    rows = jax.lax.dynamic_slice_in_dim(x, start, size)
    targets = jax.lax.dynamic_slice_in_dim(y, start, size).astype(wide)
    b = linalg.whiten(factor, kernel_fn(rows, x_support).T)
    return linalg.matmul(b, b.T), linalg.matmul(b, targets)

  def add(carry, start):
    return jax.tree.map(jnp.add, carry, block(start, block_size)), None

  sums = (jnp.zeros((m, m), wide), jnp.zeros((m, y.shape[1]), wide))
  whole = n // block_size
  if whole:
    sums, _ = jax.lax.scan(add, sums, jnp.arange(whole, dtype=jnp.int32) * block_size)
  if blocks > whole:
    sums = jax.tree.map(jnp.add, sums, block(whole * block_size, n - whole * block_size))
  return _label_solution(k_ss, factor, *sums, *ridges, penalty, y.dtype)


def _label_ridges(ridge, fit_ridge, penalty: str):
  checks.one_of("penalty", penalty, ("rkhs", "coefficients"))
  if fit_ridge is None and jnp.ndim(ridge):
    raise ValueError(
      f"fit_ridge: expected a number beside a ridge of shape {jnp.shape(ridge)}, got None"
    )
  fit_ridge = ridge if fit_ridge is None else fit_ridge
  checks.positive("ridge", ridge)
  checks.positive("fit_ridge", fit_ridge)
  return ridge, fit_ridge


def _label_solution(
  k_ss, factor, gram_whitened, rhs_whitened, ridge, fit_ridge, penalty, dtype
) -> LabelSolution:
  """Solves in the basis z = L^T c, L L^T = K_ss: the normal equations keep the condition of K, not its square."""
  k = k_ss.astype(factor.lower.dtype)
  p = k if penalty == "rkhs" else jnp.eye(k.shape[0], dtype=k.dtype)
  p_whitened = linalg.whiten(factor, linalg.whiten(factor, p).T)
  system = linalg.factor(gram_whitened + jnp.asarray(fit_ridge, k.dtype) * p_whitened)
  c = linalg.unwhiten(factor, linalg.solve(system, rhs_whitened))
  labels = linalg.matmul(linalg.add_ridge(k, ridge), c)
  return LabelSolution(labels.astype(dtype), jnp.maximum(factor.status, system.status))
