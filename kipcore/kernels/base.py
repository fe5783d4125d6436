"""What kernel objects share: validation, and programs that are compiled once per shape."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import checks, linalg
from kipcore.types import Array, ArrayLike


class Kernel:
  """A kernel `(x1, x2=None) -> (n1, n2)`; subclasses are frozen dataclasses of static values.

  Subclasses define `_matrix(x1, x2)` and `_diagonal(x)` for nonempty floating rows, and may
  extend `_rows`. A call outside `jit` runs a program that is compiled once per shape and kernel
  value.
  """

  def __call__(self, x1: ArrayLike, x2: ArrayLike | None = None) -> Float[Array, "n1 n2"]:
    x1 = self._rows("x1", x1)
    if x2 is not None:
      x2 = self._rows("x2", x2)
      if x1.shape[1:] != x2.shape[1:]:
        raise ValueError(f"expected rows of one shape, got x1 {x1.shape} and x2 {x2.shape}")
    n1, n2 = x1.shape[0], x1.shape[0] if x2 is None else x2.shape[0]
    if n1 == 0 or n2 == 0:
      return jnp.zeros((n1, n2), x1.dtype)
    return _matrix(self, jax.default_backend(), x1, x2)

  def diag(self, x: ArrayLike) -> Float[Array, " n"]:
    """K(x_i, x_i), without the matrix."""
    x = self._rows("x", x)
    if x.shape[0] == 0:
      return jnp.zeros((0,), x.dtype)
    return _diagonal(self, jax.default_backend(), x)

  def _rows(self, name: str, x: ArrayLike) -> Array:
    """The rows, checked; half precision becomes float32."""
    checks.floating(name, x)
    if x.ndim < 1:
      raise ValueError(f"{name}: expected rows (n, ...), got shape {x.shape}")
    return linalg.at_least_float32(jnp.asarray(x))

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    raise NotImplementedError

  def _diagonal(self, x: Array) -> Array:
    raise NotImplementedError


# The backend is an argument because programs may depend on it.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _matrix(kernel: Kernel, backend: str, x1: Array, x2: Array | None) -> Array:
  return kernel._matrix(x1, x2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _diagonal(kernel: Kernel, backend: str, x: Array) -> Array:
  return kernel._diagonal(x)
