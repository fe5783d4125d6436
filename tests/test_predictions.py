"""Closed-form predictions against scikit-learn and neural-tangents."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, check_gradient, standard_promotion
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

import kipcore
from kipcore.kernels.stax import import_neural_tangents, to_stax
from kipcore.types import Status

RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(8, 3)), RNG.normal(size=(5, 3))
Y = RNG.normal(size=(8, 2))
NOISE = 0.3
RBF_KERNEL = 0.7 * kipcore.rbf_fn(1.4)
# name -> (kernel, the same of scikit-learn)
KERNELS = {
  "rbf": (RBF_KERNEL, ConstantKernel(0.7) * RBF(1.4)),
  "sum": (
    RBF_KERNEL + kipcore.linear_fn(),
    ConstantKernel(0.7) * RBF(1.4) + DotProduct(0.0, sigma_0_bounds="fixed"),
  ),
}


def matrices(kernel, dtype=np.float64):
  x, t = jnp.asarray(X, dtype), jnp.asarray(T, dtype)
  return kernel(x), kernel(t, x), kernel(t)


@pytest.mark.parametrize("name", KERNELS)
def test_posterior_and_likelihood_equal_scikit_learn(name, dtype):
  ours, theirs = KERNELS[name]
  model = GaussianProcessRegressor(theirs, alpha=NOISE, optimizer=None).fit(X, Y)
  mean, covariance = model.predict(T, return_cov=True)
  k_ss, k_ts, k_tt = matrices(ours, dtype)
  rtol = 1e-10 if dtype == jnp.float64 else 1e-4
  posterior = kipcore.gp_posterior(k_ss, k_ts, k_tt, jnp.asarray(Y, dtype), NOISE)
  assert posterior.status == Status.OK and posterior.mean.dtype == dtype
  assert_close(posterior.mean, mean, rtol)
  assert_close(posterior.covariance, covariance[..., 0], rtol)
  variances = kipcore.gp_posterior(k_ss, k_ts, jnp.diagonal(k_tt), jnp.asarray(Y, dtype), NOISE)
  assert_close(variances.covariance, np.diagonal(covariance[..., 0]), rtol)
  likelihood = kipcore.gp_log_likelihood(k_ss, jnp.asarray(Y, dtype), NOISE)
  assert_close(likelihood, model.log_marginal_likelihood(model.kernel_.theta), rtol)


def test_likelihood_gradient_equals_scikit_learn(x64):
  """By the logarithms of the hyperparameters; and by the noise, against finite differences."""
  model = GaussianProcessRegressor(KERNELS["rbf"][1], alpha=NOISE, optimizer=None).fit(X, Y)
  expected = model.log_marginal_likelihood(model.kernel_.theta, eval_gradient=True)[1]

  def likelihood(log, noise):
    return kipcore.gp_log_likelihood(
      (jnp.exp(log[0]) * kipcore.rbf_fn(jnp.exp(log[1])))(jnp.asarray(X)), Y, noise
    )

  log = jnp.log(jnp.asarray([0.7, 1.4]))
  assert_close(jax.grad(likelihood)(log, NOISE), expected, 1e-9)
  check_gradient(
    lambda p: likelihood(log, p["noise"]), {"noise": jnp.asarray(np.linspace(0.2, 0.5, 8))}
  )


def test_hyperparameters_are_fitted_by_gradient(x64):
  """The likelihood reaches that of the optimizer of scikit-learn, in one compiled program."""
  rng = np.random.default_rng(1)
  x = rng.uniform(-3, 3, size=(30, 1))
  y = np.sin(2 * x) + 0.1 * rng.normal(size=x.shape)
  theirs = GaussianProcessRegressor(ConstantKernel(1.0) * RBF(1.0), alpha=0.01).fit(x, y)

  def loss(log):
    return -kipcore.gp_log_likelihood(
      (jnp.exp(log["scale"]) * kipcore.rbf_fn(jnp.exp(log["bandwidth"])))(x), y, 0.01
    )

  log, optimizer = {"scale": jnp.zeros(()), "bandwidth": jnp.zeros(())}, optax.adam(0.1)
  state, step = optimizer.init(log), jax.jit(jax.value_and_grad(loss))
  with standard_promotion():
    for _ in range(150):
      value, gradient = step(log)
      updates, state = optimizer.update(gradient, state)
      log = optax.apply_updates(log, updates)
  np.testing.assert_allclose(-value, theirs.log_marginal_likelihood_value_, atol=1e-3)
  np.testing.assert_allclose([log["scale"], log["bandwidth"]], theirs.kernel_.theta, atol=0.02)


TIMES = np.array([0.0, 0.7, 20.0, 1e4])


@pytest.mark.slow
def test_gradient_flow_equals_neural_tangents(x64):
  nt, stax_kernel = import_neural_tangents(), to_stax(kipcore.fc(2, 1.3, 0.4))[2]
  with standard_promotion():
    predict = nt.predict.gradient_descent_mse_ensemble(
      stax_kernel, jnp.asarray(X), jnp.asarray(Y), diag_reg=0.0
    )
    theirs = [predict(float(t), jnp.asarray(T), "ntk", compute_cov=True) for t in TIMES]
    limit = predict(None, jnp.asarray(T), "ntk", compute_cov=True)
  # Of the same kernels, because K^{-1} enlarges their rounding errors.
  (k_ss, k_ts, _), nngp = (matrices(kipcore.from_stax(stax_kernel, get)) for get in ("ntk", "nngp"))
  flow = kipcore.gradient_flow(k_ss, k_ts, jnp.asarray(Y), jnp.asarray([*TIMES, np.inf]), nngp=nngp)
  assert flow.status == Status.OK
  for i, expected in enumerate([*theirs, limit]):
    assert_close(flow.predictions[i], expected.mean, 1e-9, 1e-12)
    assert_close(flow.covariance[i], expected.covariance, 1e-9)
  one = kipcore.gradient_flow(k_ss, k_ts, jnp.asarray(Y), 0.7)
  assert one.covariance is None
  assert_close(one.predictions, flow.predictions[1], 1e-12)


def test_gradient_flow_from_an_initial_function_equals_neural_tangents(x64):
  nt = import_neural_tangents()
  k_ss, k_ts, _ = matrices(kipcore.ntk_fn(kipcore.fc(1)))
  initial = jnp.asarray(RNG.normal(size=(8, 2))), jnp.asarray(RNG.normal(size=(5, 2)))
  with standard_promotion():
    expected = nt.predict.gradient_descent_mse(k_ss, jnp.asarray(Y))(3.0, *initial, k_ts)
  flow = kipcore.gradient_flow(k_ss, k_ts, jnp.asarray(Y), 3.0, initial)
  assert_close(flow.predictions, expected[1], 1e-9)
  # The equation of the docstring, by its own time derivative.
  at = lambda t: (
    kipcore.gradient_flow(k_ss, k_ss, jnp.asarray(Y), t, (initial[0], initial[0])).predictions
  )
  value, slope = jax.jvp(at, (3.0,), (1.0,))
  assert_close(slope, -k_ss @ (value - Y) / Y.size, 1e-8)


def test_the_limit_is_ridge_regression_without_ridge(x64):
  k_ss, k_ts, k_tt = matrices(kipcore.ntk_fn(kipcore.fc(1)))
  flow = kipcore.gradient_flow(k_ss, k_ts, jnp.asarray(Y), np.inf)
  assert_close(flow.predictions, k_ts @ np.linalg.solve(k_ss, Y), 1e-9)
  # A repeated row makes the kernel singular: the mean of its labels is learned.
  rows = np.array([*range(8), 0])
  twice = kipcore.gradient_flow(
    k_ss[rows][:, rows], k_ts[:, rows], jnp.asarray(Y[rows]) + 0.5 * (rows == 0)[:, None], np.inf
  )
  shifted = Y + 0.5 * (np.arange(8) == 0)[:, None]
  assert_close(twice.predictions, k_ts @ np.linalg.solve(k_ss, shifted), 1e-8)


def test_failures_are_values():
  k, y = jnp.asarray([[1.0, 1.0], [1.0, 1.0]]), jnp.ones((2, 1))
  assert kipcore.gp_log_likelihood(k - 3.0 * jnp.eye(2), y, 1.0) == -np.inf
  assert (
    kipcore.gp_posterior(k - 3.0 * jnp.eye(2), k, k, y, 1.0).status == Status.NOT_POSITIVE_DEFINITE
  )
  assert kipcore.gradient_flow(k * jnp.nan, k, y, 1.0).status == Status.NOT_FINITE


INVALID = {
  r"k_ts: expected shape \('any', 8\), got \(5, 7\)": lambda k, t, y: kipcore.gp_posterior(
    k, t[:, :7], t[:, 0], y, 0.1
  ),
  r"k_tt: expected shape \(5, 5\), got \(5, 8\)": lambda k, t, y: kipcore.gp_posterior(
    k, t, t, y, 0.1
  ),
  r"y: expected shape \(8, 'any'\), got \(7, 2\)": lambda k, t, y: kipcore.gp_log_likelihood(
    k, y[1:], 0.1
  ),
  r"noise: expected values > 0, got 0": lambda k, t, y: kipcore.gp_log_likelihood(k, y, 0.0),
  r"noise: expected shape \(8,\), got \(3,\)": lambda k, t, y: kipcore.gp_posterior(
    k, t, t[:, 0], y, np.ones(3)
  ),
  r"time: expected values >= 0, got -1": lambda k, t, y: kipcore.gradient_flow(k, t, y, -1.0),
  r"time: expected values >= 0, got nan": lambda k, t, y: kipcore.gradient_flow(k, t, y, np.nan),
  r"initial\[1\]: expected shape \(5, 2\), got \(8, 2\)": lambda k, t, y: kipcore.gradient_flow(
    k, t, y, 1.0, (y, y)
  ),
  r"nngp\[2\]: expected shape \(5, 5\), got \(5, 8\)": lambda k, t, y: kipcore.gradient_flow(
    k, t, y, 1.0, None, (k, t, t)
  ),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments_are_named(message):
  k_ss, k_ts, _ = matrices(kipcore.linear_fn(), np.float32)
  with pytest.raises(ValueError, match=message):
    INVALID[message](k_ss, k_ts, jnp.asarray(Y, jnp.float32))
