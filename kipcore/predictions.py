"""Closed-form predictions: Gaussian process regression, and gradient flow on the squared error.

A network of infinite width with random weights is a Gaussian process with the NNGP kernel. Trained by
gradient flow on the squared error, it is a linear function of the labels that the NTK determines.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kipcore import checks, linalg
from kipcore.krr import checked_ridge, status_with
from kipcore.types import Array, ArrayLike, RealLike, Status


class GPPosterior(NamedTuple):
  """The posterior of a Gaussian process at t target rows.

  Attributes:
    mean: `(t, c)`.
    covariance: `(t, t)`, of the function without the noise of an observation, the same for every output;
      or the variances `(t,)`.
    status: int32 scalar, `types.Status`.
  """

  mean: Float[Array, "t c"]
  covariance: Float[Array, " t *t"]
  status: Int[Array, ""]


class GradientFlow(NamedTuple):
  """Predictions of a network that is trained by gradient flow.

  Attributes:
    predictions: `(t, c)`, or `(times, t, c)`.
    covariance: `(t, t)` or `(times, t, t)`, over random initial weights; None without NNGP kernels.
    status: int32 scalar, `types.Status`.
  """

  predictions: Float[Array, "*times t c"]
  covariance: Float[Array, "*times t t"] | None
  status: Int[Array, ""]


def gp_posterior(
  k_ss: Float[ArrayLike, "m m"],
  k_ts: Float[ArrayLike, "t m"],
  k_tt: Float[ArrayLike, " t *t"],
  y: Float[ArrayLike, "m c"],
  noise: RealLike,
) -> GPPosterior:
  """The posterior of a Gaussian process with mean 0, given noisy values at m rows.

      mean = K_ts (K_ss + noise I)^{-1} y,   covariance = K_tt - K_ts (K_ss + noise I)^{-1} K_st

  Args:
    k_ss: `(m, m)` kernel of the rows with values.
    k_ts: `(t, m)` kernel between targets and these rows.
    k_tt: `(t, t)` kernel of the targets; or its diagonal `(t,)`, for variances only.
    y: `(m, c)` values of c independent processes.
    noise: variance of the noise, > 0, scalar or `(m,)`.

  Returns:
    `GPPosterior`, in the dtype of `y` (at least float32). Its status is NOT_POSITIVE_DEFINITE if the
    noise is below rounding.

  Raises:
    ValueError, TypeError: for shapes that do not match, integer arrays, or noise that is not positive.

  References:
    Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), eq. 2.25 and 2.26.

  Example:
    >>> kernel_fn, x = kipcore.rbf_fn(1.0), jnp.asarray([[0.0], [5.0]])
    >>> near, y = jnp.asarray([[0.0]]), jnp.asarray([[1.0], [0.0]])
    >>> posterior = kipcore.gp_posterior(
    ...   kernel_fn(x), kernel_fn(near, x), kernel_fn.diag(near), y, 0.1
    ... )
    >>> mean, variance = np.asarray(posterior.mean), np.asarray(posterior.covariance)
    >>> print(mean.round(3), variance.round(3))  # 1 / 1.1 and 1 - 1 / 1.1
    [[0.909]] [0.091]
  """
  _check_kernels(k_ss, k_ts, k_tt)
  _check_labels("y", y, k_ss.shape[0])
  return _gp_posterior(k_ss, k_ts, k_tt, y, checked_ridge("noise", noise, k_ss.shape[0]))


@jax.jit
def _gp_posterior(k_ss, k_ts, k_tt, y, noise) -> GPPosterior:
  y = linalg.at_least_float32(y)
  factor = linalg.factor(k_ss, noise)
  half = linalg.whiten(factor, k_ts.T)
  mean = linalg.matmul(half.T, linalg.whiten(factor, y))
  k_tt = k_tt.astype(half.dtype)
  if k_tt.ndim == 1:
    covariance = jnp.maximum(k_tt - jnp.sum(half * half, axis=0), 0)
  else:
    covariance = k_tt - linalg.matmul(half.T, half)
  status = status_with(factor.status, mean)
  return GPPosterior(mean.astype(y.dtype), covariance.astype(y.dtype), status)


def gp_log_likelihood(
  k: Float[ArrayLike, "n n"], y: Float[ArrayLike, "n c"], noise: RealLike
) -> Float[Array, ""]:
  """The log marginal likelihood of a Gaussian process with mean 0, summed over the outputs.

      sum_c -1/2 y_c^T (K + noise I)^{-1} y_c - 1/2 log det(K + noise I) - n/2 log(2 pi)

  Differentiable by the matrix, hence by the hyperparameters of a kernel, and by the noise.

  Args:
    k: `(n, n)` kernel matrix.
    y: `(n, c)` values.
    noise: variance of the noise, > 0, scalar or `(n,)`.

  Returns:
    Scalar; -inf if K + noise I is not positive definite at this precision.

  Raises:
    ValueError, TypeError: for shapes that do not match, integer arrays, or noise that is not positive.

  References:
    Rasmussen and Williams (2006), eq. 2.30.

  Example:
    >>> k, y = jnp.asarray([[1.0]]), jnp.asarray([[2.0]])
    >>> round(float(kipcore.gp_log_likelihood(k, y, 1.0)), 4)  # log N(2; 0, 2)
    -2.2655
  """
  checks.floating("k", k)
  checks.square("k", k)
  _check_labels("y", y, k.shape[0])
  return _gp_log_likelihood(k, y, checked_ridge("noise", noise, k.shape[0]))


@jax.jit
def _gp_log_likelihood(k, y, noise) -> Array:
  y = linalg.at_least_float32(y)
  factor = linalg.factor(k, noise)
  fit = jnp.sum(linalg.whiten(factor, y) ** 2)
  log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor.lower)))
  value = -0.5 * (fit + y.shape[1] * (log_det + y.shape[0] * float(np.log(2 * np.pi))))
  return jnp.where(factor.status == Status.OK, value, -jnp.inf).astype(y.dtype)


def gradient_flow(
  k_ss: Float[ArrayLike, "m m"],
  k_ts: Float[ArrayLike, "t m"],
  y: Float[ArrayLike, "m c"],
  time: RealLike,
  initial: tuple[ArrayLike, ArrayLike] | None = None,
  nngp: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
) -> GradientFlow:
  """Predictions at time t of gradient flow on the mean squared error, at infinite width.

      df/dt = -Theta(., X) (f(X) - y) / (m c)
      f_t(T) = f_0(T) + A (y - f_0(X)),   A = K_ts K_ss^{-1} (I - exp(-t K_ss / (m c)))

  for the loss 1 / (2 m c) ||f(X) - y||^2, with the NTK K. The time of gradient descent with a small learning rate is the
  learning rate times the number of steps. t = inf gives the limit, ridge regression with the ridge
  0. Eigenvalues of K_ss below rounding, m eps times the largest, count as 0: their directions are never learned.

  With random initial weights f_0 is a Gaussian process with the NNGP kernel N, and f_t is one with the
  covariance

      N_tt - A N_st - N_ts A^T + A N_ss A^T

  Args:
    k_ss: `(m, m)` kernel of the training rows.
    k_ts: `(t, m)` kernel between targets and training rows.
    y: `(m, c)` labels.
    time: t >= 0, scalar or `(times,)`.
    initial: the initial function at the training rows `(m, c)` and the targets `(t, c)`; None for 0, the
      mean over initial weights.
    nngp: `(m, m)`, `(t, m)` and `(t, t)` NNGP kernels, for the covariance; None for no covariance.

  Returns:
    `GradientFlow`, in the dtype of `y` (at least float32).

  Raises:
    ValueError, TypeError: for shapes that do not match, integer arrays, or a time that is negative.

  References:
    Lee et al. (2019), Wide neural networks of any depth evolve as linear models, eq. 10 to 16.

  Example:
    >>> k, y = jnp.asarray([[2.0]]), jnp.asarray([[1.0]])
    >>> flow = kipcore.gradient_flow(k, k, y, jnp.asarray([0.0, 0.5, jnp.inf]))
    >>> print(np.asarray(flow.predictions)[:, 0, 0].round(3))  # 1 - exp(-2 t)
    [0.    0.632 1.   ]
  """
  _check_kernels(k_ss, k_ts)
  m, num_targets = k_ss.shape[0], k_ts.shape[0]
  _check_labels("y", y, m)
  checks.rank("time", time, 0, 1)
  checks.non_negative("time", time)
  if initial is not None:
    for name, values, n in zip(
      ("initial[0]", "initial[1]"), initial, (m, num_targets), strict=True
    ):
      checks.floating(name, values)
      checks.shape(name, values, (n, y.shape[1]))
  if nngp is not None:
    names, shapes = (
      ("nngp[0]", "nngp[1]", "nngp[2]"),
      ((m, m), (num_targets, m), (num_targets,) * 2),
    )
    for name, values, expected in zip(names, nngp, shapes, strict=True):
      checks.floating(name, values)
      checks.shape(name, values, expected)
  return _gradient_flow(k_ss, k_ts, y, time, initial, nngp)


@jax.jit
def _gradient_flow(k_ss, k_ts, y, time, initial, nngp) -> GradientFlow:
  dtype = linalg.at_least_float32(y).dtype
  wide = linalg.widest_dtype(dtype)
  k_ss, k_ts, y, initial, nngp = jax.tree.map(
    lambda a: a.astype(wide), (k_ss, k_ts, y, initial, nngp)
  )
  values, vectors = jnp.linalg.eigh(0.5 * (k_ss + k_ss.T))
  learned = values > values.shape[0] * jnp.finfo(wide).eps * jnp.max(values)
  values = jnp.where(learned, values, 1)
  rotated = linalg.matmul(k_ts, vectors)
  start = (
    (jnp.zeros_like(y), jnp.zeros((k_ts.shape[0], y.shape[1]), wide))
    if initial is None
    else initial
  )

  def at(time):
    weights = jnp.where(learned, -jnp.expm1(-time * values / y.size) / values, 0)
    a = linalg.matmul(rotated * weights[None], vectors.T)
    predictions = start[1] + linalg.matmul(a, y - start[0])
    if nngp is None:
      return predictions, None
    n_ss, n_ts, n_tt = nngp
    cross = linalg.matmul(a, n_ts.T)
    return predictions, n_tt - cross - cross.T + linalg.matmul(linalg.matmul(a, n_ss), a.T)

  time = jnp.asarray(time).astype(wide)
  predictions, covariance = jax.vmap(at)(time) if time.ndim else at(time)
  status = status_with(jnp.int32(Status.OK), predictions)
  covariance = None if covariance is None else covariance.astype(dtype)
  return GradientFlow(predictions.astype(dtype), covariance, status)


def _check_kernels(k_ss, k_ts, k_tt=None) -> None:
  checks.floating("k_ss", k_ss)
  checks.floating("k_ts", k_ts)
  checks.square("k_ss", k_ss)
  if not k_ss.shape[0]:
    raise ValueError("k_ss: expected at least one row, got none")
  checks.shape("k_ts", k_ts, (None, k_ss.shape[0]))
  if k_tt is not None:
    checks.floating("k_tt", k_tt)
    checks.rank("k_tt", k_tt, 1, 2)
    checks.shape("k_tt", k_tt, (k_ts.shape[0],) * np.ndim(k_tt))


def _check_labels(name: str, y, m: int) -> None:
  checks.floating(name, y)
  checks.shape(name, y, (m, None))
