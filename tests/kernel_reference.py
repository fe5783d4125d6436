"""Small images, and kernels by neural-tangents with their gradients, as a reference for the tests of kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import enable_x64

import kipcore
from kipcore.kernels.stax import to_stax


def images(dtype, n1=4, n2=3, shape=(4, 5, 2)):
  """Two sets; in the first, row 1 repeats row 0 and row 2 is twice row 0."""
  rng = np.random.default_rng(0)
  x1, x2 = rng.normal(size=(n1, *shape)), rng.normal(size=(n2, *shape))
  x1[1], x1[2] = x1[0], 2 * x1[0]
  return x1.astype(dtype), x2.astype(dtype)


def neural_tangents_kernel(arch, get, x1, x2):
  """Value and gradient of a random combination of entries, in float64: the reference for both dtypes."""
  with enable_x64(True):
    kernel = kipcore.from_stax(to_stax(arch)[2], get)
    x1, x2 = jnp.asarray(x1, jnp.float64), None if x2 is None else jnp.asarray(x2, jnp.float64)
    return [np.asarray(a) for a in value_and_gradient(kernel, x1, x2)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(kernel, x1, x2):
  value, pull = jax.vjp(lambda x: kernel(x, x2), x1)
  return value, pull(jnp.asarray(combination(value.shape), x1.dtype))[0]


def combination(shape):
  return np.random.default_rng(1).normal(size=shape)
