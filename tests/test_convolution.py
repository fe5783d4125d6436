"""The convolution of networks against XLA's own, with derivatives of every order, in both precisions, in blocks and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kipcore import convolution


def reference(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def problem(size, dtype="float64"):
  rng = np.random.default_rng(size)
  x, kernel = rng.normal(size=(5, 7, 6, 3)), rng.normal(size=(size, size, 3, 4))
  return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def loss(convolve):
  return lambda x, kernel: jnp.sum(jnp.tanh(0.1 * convolve(x, kernel)) ** 3)


def trained(convolve):
  """The gradient of a loss after three steps of training, recomputed in the backward pass."""

  def after(x, kernel):
    step = lambda k, _: (k - 0.1 * jax.grad(loss(convolve), 1)(x, k), None)
    return loss(convolve)(x, jax.lax.scan(jax.checkpoint(step), kernel, None, length=3)[0])

  return jax.grad(after, (0, 1))


DERIVATIVES = {
  "value": lambda f: f,
  "gradient": lambda f: jax.grad(loss(f), (0, 1)),
  "gradient of the gradient": lambda f: jax.grad(
    lambda x, k: sum(jnp.sum(g**2) for g in jax.grad(loss(f), (0, 1))(x, k)), (0, 1)
  ),
  "tangent": lambda f: lambda x, k: jax.jvp(f, (x, k), (x + 1, k - 1)),
  "tangent of the gradient": lambda f: (
    lambda x, k: jax.jvp(jax.grad(loss(f), (0, 1)), (x, k), (x + 1, k - 1))
  ),
  "several kernels": lambda f: (
    lambda x, k: jax.vmap(jax.grad(loss(f), (0, 1)), (None, 0))(x, jnp.stack([k, 2 * k]))
  ),
  "several sets": lambda f: (
    lambda x, k: jax.vmap(jax.grad(loss(f), (0, 1)), (1, None))(jnp.stack([x, 2 * x], 1), k)
  ),
  "several of both": lambda f: (
    lambda x, k: jax.vmap(jax.grad(loss(f), (0, 1)), (1, 0))(
      jnp.stack([x, 2 * x], 1), jnp.stack([k, 2 * k])
    )
  ),
  "training": trained,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_are_those_of_xla_in_blocks(x64, monkeypatch, derivative):
  monkeypatch.setattr(convolution, "_PATCH_BYTES", 1000)
  check(DERIVATIVES[derivative], 3, "float64", 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_gradients_are_those_of_xla_for_every_size(x64, size, dtype, tolerance):
  check(DERIVATIVES["gradient"], size, dtype, tolerance)


def check(of, size, dtype, tolerance):
  # A new function each time, because the size of the blocks is read when it is traced.
  found = jax.jit(lambda x, k: of(convolution.convolve)(x, k))(*problem(size, dtype))
  wanted = jax.jit(of(reference))(*problem(size))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(b))))


def test_no_rows():
  x, kernel = problem(3, "float32")
  assert convolution.convolve(x[:0], kernel).shape == (0, 7, 6, 4)
