"""Kernel ridge regression: fit, predict, loss, and the best labels for given support inputs.

`ridge` is always absolute: the solve is (K_ss + ridge I)^{-1} y. KIP, FRePo and neural-tangents
define their regularization as a fraction of the mean diagonal; `relative_ridge` converts it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from kipcore import blocks, checks, linalg, pytrees
from kipcore.types import Array, ArrayLike, IntLike, KernelFn, RealLike, Status


class KRRFit(NamedTuple):
  """A fitted kernel ridge regression.

  Attributes:
    dual: `(m, c)` coefficients alpha = (K_ss + ridge I)^{-1} y.
    status: int32 scalar, `types.Status`.
  """

  dual: Float[Array, "m c"]
  status: Int[Array, ""]


class KRRLoss(NamedTuple):
  """`loss` (scalar), `accuracy` (scalar in [0, 1]) and `predictions` `(t, c)`."""

  loss: Float[Array, ""]
  accuracy: Float[Array, ""]
  predictions: Float[Array, "t c"]


class LabelSolution(NamedTuple):
  """The best labels, `(m, c)`, and the `status` of the factorizations."""

  labels: Float[Array, "m c"]
  status: Int[Array, ""]


def relative_ridge(k: Float[ArrayLike, " n *n"], scale: RealLike) -> Float[Array, ""]:
  """The absolute ridge that is a fraction of the mean diagonal: scale * tr(K) / n.

  Args:
    k: `(n, n)` kernel matrix, or its diagonal `(n,)`.
    scale: fraction > 0; published KIP uses 1e-6.

  Returns:
    Absolute ridge, scalar, in the dtype of `k`.

  Raises:
    ValueError, TypeError: for a scale that is not a positive number, or a `k` that has another
      shape or integer entries.

  Example:
    >>> k = jnp.asarray([[1.0, 0.5], [0.5, 3.0]])
    >>> float(kipcore.relative_ridge(k, 0.5)), float(kipcore.relative_ridge(jnp.diagonal(k), 0.5))
    (1.0, 1.0)
  """
  checks.floating("k", k)
  checks.rank("k", k, 1, 2)
  if k.ndim == 2:
    checks.square("k", k)
  checks.positive("scale", scale)
  scale = checks.scalar("scale", scale)
  diagonal = jnp.diagonal(k) if k.ndim == 2 else k
  return jnp.asarray(scale, k.dtype) * jnp.mean(diagonal)


def krr_fit(
  k_ss: Float[ArrayLike, "m m"], y_support: Float[ArrayLike, "m c"], ridge: RealLike
) -> KRRFit:
  """Dual coefficients alpha = (K_ss + diag(ridge))^{-1} y.

  They minimize sum_j (f(x_j) - y_j)^2 / ridge_j + ||f||^2 over functions f of the kernel's space,
  so a ridge vector with entries ridge / w_j gives point j the weight w_j.

  The factorization runs in float64 if JAX's 64-bit switch is on. In float32 the condition number
  n / scale of a relative ridge `scale` should stay below about 1e7; otherwise the status may be
  NOT_POSITIVE_DEFINITE.

  Args:
    k_ss: `(m, m)` kernel matrix of the support, floating.
    y_support: `(m, c)` labels, floating.
    ridge: absolute, > 0, scalar or `(m,)`.

  Returns:
    `KRRFit` with `dual` `(m, c)` in the dtype of the labels (at least float32). Its status is
    NOT_FINITE if kernel, labels or `dual` are not finite.

  Raises:
    ValueError, TypeError: for shapes that do not match, integer arrays, or a concrete ridge that
      is not positive and finite.

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
  return _krr_fit(k_ss, y_support, checked_ridge("ridge", ridge, k_ss.shape[0]))


@jax.jit
def _krr_fit(k_ss: Array, y_support: Array, ridge) -> KRRFit:
  y_support = linalg.at_least_float32(y_support)
  factor = linalg.factor(k_ss, ridge)
  dual = linalg.solve(factor, y_support).astype(y_support.dtype)
  return KRRFit(dual, status_with(factor.status, dual))


def checked_ridge(name: str, ridge, m: int) -> RealLike:
  """A positive finite ridge, scalar or `(m,)`."""
  if jnp.ndim(ridge):
    checks.shape(name, ridge, (m,))
  checks.positive(name, ridge)
  return ridge if jnp.ndim(ridge) else checks.scalar(name, ridge)


def status_with(status: Array, values: Array) -> Array:
  """The status, or NOT_FINITE if it is OK and the values are not finite."""
  return jnp.where(
    (status == Status.OK) & ~jnp.isfinite(values).all(), jnp.int32(Status.NOT_FINITE), status
  )


def krr_predict(fit: KRRFit, k_ts: Float[ArrayLike, "t m"]) -> Float[Array, "t c"]:
  """Predictions K_ts alpha.

  Args:
    fit: from `krr_fit`.
    k_ts: `(t, m)` kernel between targets and support.

  Returns:
    `(t, c)`.

  Raises:
    ValueError, TypeError: if `k_ts` does not have m columns or is not floating.

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
  checks.floating("k_ts", k_ts)
  checks.shape("k_ts", k_ts, (None, fit.dual.shape[0]))
  return _predict(fit.dual, k_ts)


@jax.jit
def _predict(dual: Array, k_ts: Array) -> Array:
  k_ts = linalg.at_least_float32(k_ts)
  return linalg.matmul(k_ts, dual.astype(k_ts.dtype))


def krr_loss(
  fit: KRRFit,
  k_ts: Float[ArrayLike, "t m"],
  y_target: Float[ArrayLike, "t c"],
  weights: Float[ArrayLike, " t"] | None = None,
) -> KRRLoss:
  """Half mean squared error of the predictions, as KIP reports it, and the accuracy.

      loss = 1/2 mean_{t, c} w_t (f(x_t) - y_t)^2

  Args:
    fit: from `krr_fit`.
    k_ts: `(t, m)` kernel between targets and support.
    y_target: `(t, c)`; the largest entry of a row is its class.
    weights: `(t,)`, finite and >= 0; None for ones. Targets drawn with probabilities p_t out of
      N need the weights 1 / (N p_t) for an unbiased estimate of the mean over all N.

  Returns:
    `KRRLoss`; the accuracy is not weighted.

  Raises:
    ValueError, TypeError: for shapes that do not match, integer arrays, or weights that are
      negative or not finite.

  References:
    Nguyen, Chen and Lee (2021), KIP, eq. 2, with the mean in place of the sum.

  Example:
    >>> k, y = jnp.asarray([[2.0, 1.0], [1.0, 2.0]]), jnp.asarray([[0.5, -0.5], [-0.5, 0.5]])
    >>> result = kipcore.krr_loss(kipcore.krr_fit(k, y, 1.0), k, y)
    >>> (
    ...   round(float(result.loss), 5),
    ...   float(result.accuracy),
    ... )  # all predictions are off by 1/4; 1/2 (1/4)^2
    (0.03125, 1.0)
  """
  checks.floating("k_ts", k_ts)
  checks.floating("y_target", y_target)
  checks.shape("k_ts", k_ts, (None, fit.dual.shape[0]))
  checks.shape("y_target", y_target, (k_ts.shape[0], fit.dual.shape[1]))
  if weights is not None:
    weights = checks.weights("weights", weights, k_ts.shape[0], y_target.dtype)
  return _krr_loss(fit.dual, k_ts, y_target, weights)


@jax.jit
def _krr_loss(dual: Array, k_ts: Array, y_target: Array, weights: Array | None) -> KRRLoss:
  predictions = _predict(dual, k_ts)
  y_target = y_target.astype(predictions.dtype)
  squares = 0.5 * jnp.mean((predictions - y_target) ** 2, axis=1)
  loss = jnp.mean(squares if weights is None else weights.astype(squares.dtype) * squares)
  return KRRLoss(loss, accuracy(predictions, y_target), predictions)


def accuracy(
  predictions: Float[Array, "t c"], y_target: Float[ArrayLike, "t c"]
) -> Float[Array, ""]:
  """Fraction of rows whose largest prediction is at the largest label, scalar."""
  hits = jnp.argmax(predictions, axis=1) == jnp.argmax(y_target, axis=1)
  return jnp.mean(hits.astype(predictions.dtype))


def label_solve(
  k_ss: Float[ArrayLike, "m m"],
  k_ts: Float[ArrayLike, "t m"],
  y_target: Float[ArrayLike, "t c"],
  ridge: RealLike,
  fit_ridge: RealLike | None = None,
  penalty: str = "rkhs",
) -> Float[Array, "m c"]:
  """The support labels for which ridge regression fits the targets best.

      c = argmin ||K_ts c - y_t||^2 + fit_ridge * c^T P c,    y_s = (K_ss + ridge I) c

  with P = K_ss ("rkhs": the norm of the predictor; label solving is then never worse than any
  weighting of the same support rows) or P = I ("coefficients": the form in the published KIP
  notebook, with fit_ridge = ridge = 1e-6 / m, absolute).

  Args:
    k_ss: `(m, m)` kernel of the support.
    k_ts: `(t, m)` kernel between targets and support. For many targets, use `label_solve_rows`,
      which computes it in blocks.
    y_target: `(t, c)`.
    ridge: absolute ridge > 0 (scalar or `(m,)`) with which the labels will be used.
    fit_ridge: absolute ridge > 0 of the objective, scalar; None for `ridge` (then a scalar).
    penalty: "rkhs" or "coefficients".

  Returns:
    `(m, c)` labels; NaN if a factorization failed.

  Raises:
    ValueError, TypeError: for shapes that do not match, integer arrays, a ridge that is not
      positive and finite, or an unknown penalty.

  References:
    Nguyen et al. (2021b), KIP at infinite width, eq. 5 (Label Solve).

  Example:
    >>> x, kernel_fn, ridge = jnp.linspace(0.0, 4.0, 9)[:, None], kipcore.rbf_fn(1.0), 1e-3
    >>> y, x_support = x**2, x[::4]
    >>> k_ss, k_ts = kernel_fn(x_support), kernel_fn(x, x_support)
    >>> solved = jax.jit(kipcore.label_solve)(k_ss, k_ts, y, ridge)
    >>> for labels in (y[::4], solved):  # the labels of the rows, and the best labels
    ...   print(
    ...     round(float(kipcore.krr_loss(kipcore.krr_fit(k_ss, labels, ridge), k_ts, y).loss), 1)
    ...   )
    0.5
    0.2
  """
  for name, array in (("k_ss", k_ss), ("k_ts", k_ts), ("y_target", y_target)):
    checks.floating(name, array)
  checks.square("k_ss", k_ss)
  checks.shape("k_ts", k_ts, (None, k_ss.shape[0]))
  checks.shape("y_target", y_target, (k_ts.shape[0], None))
  ridge, fit_ridge = _label_ridges(ridge, fit_ridge, penalty, k_ss.shape[0])
  return _label_solve(penalty, k_ss, k_ts, y_target, ridge, fit_ridge).labels


@functools.partial(jax.jit, static_argnums=0)
def _label_solve(penalty, k_ss, k_ts, y_target, ridge, fit_ridge) -> LabelSolution:
  y_target = linalg.at_least_float32(y_target)
  factor = linalg.factor(k_ss, linalg.rounding_ridge(k_ss))
  b = linalg.whiten(factor, k_ts.T)
  products = linalg.matmul(b, b.T), linalg.matmul(b, y_target.astype(b.dtype))
  return _label_solution(k_ss, factor, *products, ridge, fit_ridge, penalty, y_target.dtype)


def label_solve_rows(
  kernel_fn: KernelFn,
  x_support: Shaped[ArrayLike, "m ..."],
  x: Shaped[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  ridge: RealLike,
  fit_ridge: RealLike | None = None,
  penalty: str = "rkhs",
  block_size: IntLike = 2048,
) -> LabelSolution:
  """`label_solve` for many targets, in row blocks with memory for `(block_size, m)` and `(m, m)`.

  Args:
    kernel_fn: the kernel.
    x_support: `(m, ...)`.
    x: `(n, ...)` target rows.
    y: `(n, c)` target labels.
    ridge, fit_ridge, penalty: as in `label_solve`.
    block_size: target rows per block.

  Returns:
    `LabelSolution` with `(m, c)` labels and a status.

  Raises:
    ValueError, TypeError: see `label_solve`.
  """
  checks.array("x_support", x_support)
  checks.same_rows("x", x, "y", y)
  checks.floating("y", y)
  checks.rank("y", y, 2)
  block_size = checks.positive_int("block_size", block_size)
  ridge, fit_ridge = _label_ridges(ridge, fit_ridge, penalty, x_support.shape[0])
  kernel_fn = pytrees.argument(kernel_fn)
  return _label_solve_rows(kernel_fn, penalty, block_size, x_support, x, y, ridge, fit_ridge)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _label_solve_rows(kernel_fn, penalty, block_size, x_support, x, y, ridge, fit_ridge):
  y = linalg.at_least_float32(y)
  k_ss = kernel_fn(x_support, None)
  factor = linalg.factor(k_ss, linalg.rounding_ridge(k_ss))

  def products(block, present):
    rows, targets = block
    b = linalg.whiten(factor, kernel_fn(rows, x_support).T)
    b = jnp.where(present[None], b, 0)
    return linalg.matmul(b, b.T), linalg.matmul(b, targets.astype(b.dtype))

  sums = blocks.sum_row_blocks(products, (x, y), block_size)
  return _label_solution(k_ss, factor, *sums, ridge, fit_ridge, penalty, y.dtype)


def _label_ridges(ridge, fit_ridge, penalty: str, m: int) -> tuple[RealLike, RealLike]:
  checks.one_of("penalty", penalty, ("rkhs", "coefficients"))
  if fit_ridge is None and jnp.ndim(ridge):
    raise ValueError(
      f"fit_ridge: expected a number with a ridge of shape {jnp.shape(ridge)}, got None"
    )
  ridge = checked_ridge("ridge", ridge, m)
  if fit_ridge is None:
    return ridge, ridge
  checks.positive("fit_ridge", fit_ridge)
  return ridge, checks.scalar("fit_ridge", fit_ridge)


def _label_solution(
  k_ss, factor, gram_whitened, rhs_whitened, ridge, fit_ridge, penalty, dtype
) -> LabelSolution:
  """Solves for z = L^T c with L L^T = K_ss: the condition is that of K, not its square."""
  k = k_ss.astype(factor.lower.dtype)
  p = k if penalty == "rkhs" else jnp.eye(k.shape[0], dtype=k.dtype)
  p_whitened = linalg.whiten(factor, linalg.whiten(factor, p).T)
  system = linalg.factor(gram_whitened + jnp.asarray(fit_ridge, k.dtype) * p_whitened)
  c = linalg.unwhiten(factor, linalg.solve(system, rhs_whitened))
  labels = linalg.matmul(linalg.add_ridge(k, ridge), c)
  return LabelSolution(labels.astype(dtype), jnp.maximum(factor.status, system.status))
