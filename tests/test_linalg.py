"""Squared distances and factorizations against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from kipcore import linalg


def exact_distances(x1, x2):
  x1, x2 = np.asarray(x1, np.float64), np.asarray(x2, np.float64)
  return ((x1[:, None] - x2[None]) ** 2).sum(-1)


@pytest.mark.parametrize("mean, features", [(0, 3), (128, 3072), (1000, 8), (-1e5, 20)])
def test_distances_do_not_depend_on_the_mean(mean, features):
  """The float32 rows themselves are exact: the reference takes their differences in float64."""
  x = (mean + np.random.default_rng(0).normal(size=(40, features))).astype(np.float32)
  expected = exact_distances(x, x)
  for other in (None, jnp.asarray(x)):
    distances = linalg.squared_distances(jnp.asarray(x), other)
    assert_close(distances, expected, rtol=2e-6)
    np.testing.assert_array_equal(np.diag(distances), 0)
    assert (np.asarray(distances) >= 0).all()
  distances = linalg.squared_distances(jnp.asarray(x[:5]), jnp.asarray(x[5:]))
  assert_close(distances, expected[:5, 5:], rtol=2e-6)


def test_equal_rows_have_distance_zero(dtype):
  x = (5 + np.random.default_rng(0).normal(size=(6, 50))).astype(dtype)
  rows = np.array([0, 1, 2, 3, 4, 5, 0, 3])
  distances = np.asarray(linalg.squared_distances(jnp.asarray(x), jnp.asarray(x[rows])))
  np.testing.assert_array_equal(distances == 0, np.arange(6)[:, None] == rows[None])


def test_rows_are_independent():
  x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
  x1, x2 = jnp.asarray(x[:5] + 100), jnp.asarray(x[5:] - 30)
  whole = linalg.squared_distances(x1, x2)
  assert_close(linalg.squared_distances(x1[2:3], x2), whole[2:3], rtol=1e-6)


def test_derivatives_are_exact_at_equal_rows(x64):
  """Second order included: d^2 ||a - b||^2 / da da = 2 I and / da db = -2 I."""
  a = jnp.asarray([[3.0, -1.0, 2.0]])
  f = lambda a, b: linalg.squared_distances(a, b)[0, 0]
  np.testing.assert_allclose(jax.grad(f)(a, a), np.zeros((1, 3)), atol=1e-12)
  np.testing.assert_allclose(
    jax.hessian(f)(a, a).reshape(3, 3), 2 * np.eye(3), rtol=1e-12, atol=1e-12
  )
  mixed = jax.jacfwd(jax.grad(f), argnums=1)(a, a).reshape(3, 3)
  np.testing.assert_allclose(mixed, -2 * np.eye(3), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_differences(x64):
  rng = np.random.default_rng(1)
  x, w = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 5)))
  direct = lambda x: jnp.sum(w * jnp.sum((x[:, None] - x[None]) ** 2, axis=-1))
  expanded = lambda x: jnp.sum(w * linalg.squared_distances(x))
  assert_close(jax.grad(expanded)(x), jax.grad(direct)(x), rtol=1e-12)
  assert_close(
    jax.jit(jax.hessian(expanded))(x), jax.jit(jax.hessian(direct))(x), rtol=1e-12, atol=1e-12
  )
