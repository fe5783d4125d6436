"""Evaluation by ridge regression against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RTOL, image_problem

import kipcore
from kipcore.types import Status


def exact(support, x, y, bandwidth, ridge):
  """Accuracy and half mean squared error of ridge regression with the RBF kernel."""
  flat = lambda a: np.asarray(a, np.float64).reshape(len(a), -1)
  k = lambda a, b: np.exp(-((flat(a)[:, None] - flat(b)[None]) ** 2).sum(-1) / (2 * bandwidth**2))
  k_ss = k(support.x, support.x)
  ridge = np.broadcast_to(ridge, len(k_ss))
  f = k(x, support.x) @ np.linalg.solve(k_ss + np.diag(ridge), np.asarray(support.y, np.float64))
  return np.mean(f.argmax(1) == y.argmax(1)), 0.5 * np.mean((f - y) ** 2)


@pytest.mark.parametrize("block_size", [1000, 90, 40])
def test_equals_numpy(block_size, dtype):
  support, x, y = image_problem(dtype)
  kernel, ridges = kipcore.rbf_fn(8.0), np.linspace(0.1, 0.6, 6).astype(dtype)
  for options, ridge in [
    ({"ridge": 0.2}, 0.2),
    ({"relative_ridge": 0.2}, 0.2),  # the diagonal of the kernel is 1
    ({"ridge": ridges}, ridges),
  ]:
    result = kipcore.evaluate_krr(kernel, support, x, y, block_size=block_size, **options)
    accuracy, loss = exact(support, x, y, 8.0, ridge)
    assert result.status == Status.OK
    np.testing.assert_allclose(result.accuracy, accuracy, rtol=1e-6)
    np.testing.assert_allclose(result.loss, loss, rtol=10 * RTOL[np.dtype(dtype).name])


def test_a_failed_fit_has_a_status():
  support, x, y = image_problem()
  negative = lambda x1, x2=None: -kipcore.rbf_fn(8.0)(x1, x2)
  result = kipcore.evaluate_krr(negative, support, x, y, ridge=0.01)
  assert result.status == Status.NOT_POSITIVE_DEFINITE
  broken = kipcore.Support(support.x.at[0].set(jnp.nan), support.y)
  result = kipcore.evaluate_krr(kipcore.rbf_fn(8.0), broken, x, y, ridge=0.01)
  assert result.status == Status.NOT_FINITE


@pytest.mark.parametrize(
  "change, message",
  [
    ({"ridge": None}, "expected one of ridge and relative_ridge"),
    ({"relative_ridge": 0.1}, "expected one of ridge and relative_ridge"),
    ({"ridge": -1.0}, "ridge: expected values > 0"),
    ({"ridge": None, "relative_ridge": 0.0}, "relative_ridge: expected values > 0"),
    ({"x": np.full((2, 8, 8, 1), np.nan, "f4"), "y": np.ones((2, 3), "f4")}, "x: expected finite"),
    (
      {"x": np.ones((0, 8, 8, 1), "f4"), "y": np.ones((0, 3), "f4")},
      "x: expected at least one row",
    ),
    ({"y": np.ones((90, 2), "f4")}, "y: expected shape"),
    ({"x": np.ones((90, 8, 8, 3), "f4")}, "x: expected shape"),
    ({"block_size": 0}, "block_size: expected a positive integer"),
  ],
)
def test_wrong_input_is_named(change, message):
  support, x, y = image_problem()
  arguments = {"support": support, "x": x, "y": y, "ridge": 0.1, **change}
  with pytest.raises(ValueError, match=message):
    kipcore.evaluate_krr(kipcore.rbf_fn(1.0), **arguments)
