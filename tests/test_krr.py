"""Kernel ridge regression and label solving against float64 NumPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RTOL, assert_close
from sklearn.kernel_ridge import KernelRidge

import kipcore
from kipcore import linalg
from kipcore.types import Status


def problem(dtype=np.float64, m=12, t=40, c=3, seed=0):
  rng = np.random.default_rng(seed)
  x_s, x_t = rng.normal(size=(m, 5)), rng.normal(size=(t, 5))
  kernel = lambda a, b: np.exp(-0.1 * ((a[:, None] - b[None]) ** 2).sum(-1))
  arrays = kernel(x_s, x_s), kernel(x_t, x_s), rng.normal(size=(m, c)), rng.normal(size=(t, c))
  return [jnp.asarray(a, dtype) for a in arrays], x_s, x_t


def test_equals_scikit_learn(dtype):
  (k_ss, k_ts, y_s, y_t), *_ = problem(dtype)
  fit = kipcore.krr_fit(k_ss, y_s, 0.1)
  sklearn_fit = KernelRidge(alpha=0.1, kernel="precomputed").fit(
    np.asarray(k_ss, np.float64), np.asarray(y_s)
  )
  assert fit.status == Status.OK
  assert_close(fit.dual, sklearn_fit.dual_coef_, rtol=10 * RTOL[dtype.name])
  predictions = sklearn_fit.predict(np.asarray(k_ts))
  assert_close(kipcore.krr_predict(fit, k_ts), predictions, rtol=10 * RTOL[dtype.name])
  loss = kipcore.krr_loss(fit, k_ts, y_t)
  np.testing.assert_allclose(
    loss.loss, 0.5 * np.mean((predictions - np.asarray(y_t)) ** 2), rtol=1e-4
  )
  np.testing.assert_allclose(
    loss.accuracy, np.mean(predictions.argmax(1) == np.asarray(y_t).argmax(1)), rtol=1e-6
  )


def test_a_ridge_vector_is_a_weighting(x64):
  """Ridge / w_j equals the weighted problem as scikit-learn solves it."""
  (k_ss, k_ts, y_s, _), *_ = problem()
  w = jnp.linspace(0.5, 3.0, 12)
  fit = kipcore.krr_fit(k_ss, y_s, 0.2 / w)
  sklearn_fit = KernelRidge(alpha=0.2, kernel="precomputed").fit(
    np.asarray(k_ss), np.asarray(y_s), sample_weight=w
  )
  assert_close(kipcore.krr_predict(fit, k_ts), sklearn_fit.predict(np.asarray(k_ts)), rtol=1e-10)


def test_integer_weights_equal_repeated_rows(x64):
  (k_ss, k_ts, y_s, _), *_ = problem()
  rows = np.repeat(np.arange(12), [1, 2, 3] * 4)
  repeated = kipcore.krr_fit(k_ss[np.ix_(rows, rows)], y_s[rows], 0.3)
  weighted = kipcore.krr_fit(k_ss, y_s, 0.3 / jnp.asarray([1.0, 2.0, 3.0] * 4))
  assert_close(
    kipcore.krr_predict(weighted, k_ts), kipcore.krr_predict(repeated, k_ts[:, rows]), rtol=1e-10
  )


def test_relative_ridge_is_a_fraction_of_the_mean_diagonal(dtype):
  (k_ss, *_), *_ = problem(dtype)
  expected = 1e-3 * np.trace(k_ss) / 12
  np.testing.assert_allclose(kipcore.relative_ridge(k_ss, 1e-3), expected, rtol=1e-6)
  np.testing.assert_allclose(kipcore.relative_ridge(jnp.diagonal(k_ss), 1e-3), expected, rtol=1e-6)


def test_loss_weights_and_gradient(x64):
  (k_ss, k_ts, y_s, y_t), *_ = problem()
  w = jnp.asarray(np.random.default_rng(1).uniform(0, 2, 40))

  @jax.jit
  def loss(y_s, ridge):
    return kipcore.krr_loss(kipcore.krr_fit(k_ss, y_s, ridge), k_ts, y_t, w).loss

  residual = np.asarray(k_ts) @ np.linalg.solve(
    np.asarray(k_ss) + 0.1 * np.eye(12), np.asarray(y_s)
  ) - np.asarray(y_t)
  np.testing.assert_allclose(loss(y_s, 0.1), np.mean(w * 0.5 * (residual**2).mean(1)), rtol=1e-12)
  v, h = jnp.ones_like(y_s), 1e-5
  slope = (loss(y_s + h * v, 0.1) - loss(y_s - h * v, 0.1)) / (2 * h)
  np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(y_s, 0.1), v), slope, rtol=1e-7)
  slope = (loss(y_s, 0.1 + h) - loss(y_s, 0.1 - h)) / (2 * h)
  np.testing.assert_allclose(jax.grad(loss, 1)(y_s, 0.1), slope, rtol=1e-6)


@pytest.mark.parametrize("penalty", ["rkhs", "coefficients"])
def test_label_solve_is_the_minimizer(penalty, x64):
  """The gradient of the objective vanishes, and the labels reproduce the coefficients."""
  (k_ss, k_ts, _, y_t), *_ = problem()
  ridge, fit_ridge = 1e-3, 0.05
  labels = kipcore.label_solve(k_ss, k_ts, y_t, ridge, fit_ridge, penalty)
  c = np.linalg.solve(np.asarray(k_ss) + ridge * np.eye(12), np.asarray(labels))
  p = np.asarray(k_ss) if penalty == "rkhs" else np.eye(12)
  gradient = np.asarray(k_ts).T @ (np.asarray(k_ts) @ c - np.asarray(y_t)) + fit_ridge * p @ c
  assert np.abs(gradient).max() < 1e-8
  fit = kipcore.krr_fit(k_ss, labels, ridge)
  assert_close(fit.dual, c, rtol=1e-9)


def test_label_solve_beats_any_other_labels(dtype):
  (k_ss, k_ts, y_s, y_t), *_ = problem(dtype)
  solved = kipcore.label_solve(k_ss, k_ts, y_t, 1e-3)
  best = kipcore.krr_loss(kipcore.krr_fit(k_ss, solved, 1e-3), k_ts, y_t).loss
  for other in (y_s, 1.01 * solved, solved + 0.01 * y_s):
    assert best <= kipcore.krr_loss(kipcore.krr_fit(k_ss, other, 1e-3), k_ts, y_t).loss


def test_label_solve_over_rows_equals_the_matrix_form(dtype):
  rng = np.random.default_rng(2)
  x_s, x, y = (jnp.asarray(rng.normal(size=s), dtype) for s in ((7, 5), (53, 5), (53, 3)))
  kernel = kipcore.rbf_fn(2.0)
  expected = kipcore.label_solve(kernel(x_s), kernel(x, x_s), y, 1e-2)
  for block_size in (8, 53, 100):
    solution = jax.jit(
      lambda x_s: kipcore.label_solve_rows(kernel, x_s, x, y, 1e-2, block_size=block_size)
    )(x_s)
    assert solution.status == Status.OK
    assert_close(solution.labels, expected, rtol=1e3 * RTOL[dtype.name])


def test_failure_is_a_status_and_not_an_exception(dtype):
  y = jnp.ones((3, 1), dtype)
  negative = -jnp.eye(3, dtype=dtype)
  broken = jnp.full((3, 3), jnp.nan, dtype)
  fit = jax.jit(kipcore.krr_fit)
  assert fit(negative, y, 0.1).status == Status.NOT_POSITIVE_DEFINITE
  assert fit(broken, y, 0.1).status == Status.NOT_FINITE
  with pytest.raises(kipcore.NumericalError, match="larger ridge"):
    kipcore.checks.raise_for_status("the fit", fit(negative, y, 0.1).status)


def test_solves_run_in_the_widest_float(x64):
  """float32 inputs with the 64-bit switch on: a condition number of 1e9 is solved accurately."""
  k = jnp.asarray(np.diag([1.0, 1e-9]), jnp.float32)
  dual = kipcore.krr_fit(k, jnp.ones((2, 1), jnp.float32), 1e-12).dual
  assert dual.dtype == jnp.float32
  np.testing.assert_allclose(dual[:, 0], [1.0, 1e9], rtol=2e-3)


def test_inverse_diagonal(x64):
  (k_ss, *_), *_ = problem()
  expected = np.diag(np.linalg.inv(np.asarray(k_ss) + 0.1 * np.eye(12)))
  assert_close(linalg.inverse_diagonal(linalg.factor(k_ss, 0.1)), expected, rtol=1e-11)


def test_jit_vmap_and_no_recompilation_across_ridges(dtype):
  (k_ss, k_ts, y_s, _), *_ = problem(dtype)
  count = 0

  @jax.jit
  def dual(ridge):
    nonlocal count
    count += 1
    return kipcore.krr_fit(k_ss, y_s, ridge).dual

  for ridge in (0.1, 0.2, 0.3):
    assert_close(
      dual(jnp.asarray(ridge, dtype)),
      kipcore.krr_fit(k_ss, y_s, ridge).dual,
      rtol=100 * RTOL[dtype.name],
    )
  assert count == 1
  ridges = jnp.asarray([0.1, 0.2], dtype)
  assert_close(jax.vmap(dual)(ridges)[1], dual(ridges[1]), rtol=100 * RTOL[dtype.name])


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda k, y: kipcore.krr_fit(k[:2], y, 0.1), "square"),
    (lambda k, y: kipcore.krr_fit(k, y[:2], 0.1), "same number of rows"),
    (lambda k, y: kipcore.krr_fit(k, y[:, 0], 0.1), "2 dimensions"),
    (lambda k, y: kipcore.krr_fit(k, y, 0.0), "ridge: expected values > 0"),
    (lambda k, y: kipcore.krr_fit(k, y, -1.0), "ridge: expected values > 0"),
    (lambda k, y: kipcore.krr_fit(k, y, jnp.ones(2)), "ridge: expected shape"),
    (
      lambda k, y: kipcore.krr_predict(kipcore.krr_fit(k, y, 0.1), k[:, :2]),
      "k_ts: expected shape",
    ),
    (lambda k, y: kipcore.krr_loss(kipcore.krr_fit(k, y, 0.1), k, y[:, :1]), "y_target"),
    (lambda k, y: kipcore.relative_ridge(k, 0.0), "scale"),
    (lambda k, y: kipcore.label_solve(k, k, y, 0.1, penalty="l1"), "penalty"),
    (lambda k, y: kipcore.label_solve(k, k, y, jnp.ones(3)), "fit_ridge"),
  ],
)
def test_wrong_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.eye(3), jnp.ones((3, 2)))
