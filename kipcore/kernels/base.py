"""What kernel objects share: validation, and programs that are compiled once per shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import checks, linalg, pytrees
from kipcore.types import Array, ArrayLike, KernelFn, Number


class Kernel:
  """A kernel `(x1, x2=None) -> (n1, n2)`; subclasses are frozen dataclasses, and `pytrees.record`.

  Subclasses define `_matrix(x1, x2)` and `_diagonal(x)` for nonempty floating rows, and may
  extend `_rows`. A call outside `jit` runs a program that is compiled once per shape and serves all
  values of the leaves, which are converted to the dtype of the rows.

  `k1 + k2`, `k1 * k2` and `c * k` are kernels, with numbers c >= 0. An operand may also be a function
  of a user, see `types.KernelFn`.
  """

  __array_ufunc__ = None  # a NumPy number times a kernel is a kernel

  def __add__(self, other: KernelFn) -> "SumKernel":
    return SumKernel((self, other)) if callable(other) else NotImplemented

  def __radd__(self, other: KernelFn) -> "SumKernel":
    return SumKernel((other, self)) if callable(other) else NotImplemented

  def __mul__(self, other: Any) -> "Kernel":
    return ProductKernel((self, other)) if callable(other) else self.__rmul__(other)

  def __rmul__(self, other: Any) -> "Kernel":
    if callable(other):
      return ProductKernel((other, self))
    return ScaledKernel(checks.scalar("scale", other), self)

  def __call__(self, x1: ArrayLike, x2: ArrayLike | None = None) -> Float[Array, "n1 n2"]:
    x1 = self._rows("x1", x1)
    if x2 is not None:
      x2 = self._rows("x2", x2)
      if x1.shape[1:] != x2.shape[1:]:
        raise ValueError(f"expected rows of one shape, got x1 {x1.shape} and x2 {x2.shape}")
    n1, n2 = x1.shape[0], x1.shape[0] if x2 is None else x2.shape[0]
    if n1 == 0 or n2 == 0:
      return jnp.zeros((n1, n2), x1.dtype)
    return _matrix(pytrees.argument(self), jax.default_backend(), x1, x2)

  def diag(self, x: ArrayLike) -> Float[Array, " n"]:
    """K(x_i, x_i), without the matrix."""
    x = self._rows("x", x)
    if x.shape[0] == 0:
      return jnp.zeros((0,), x.dtype)
    return _diagonal(pytrees.argument(self), jax.default_backend(), x)

  def _rows(self, name: str, x: ArrayLike) -> Array:
    """The rows, checked; half precision becomes float32."""
    checks.floating(name, x)
    if x.ndim < 1:
      raise ValueError(f"{name}: expected rows (n, ...), got shape {x.shape}")
    return linalg.at_least_float32(jnp.asarray(x))

  def _in_dtype(self, dtype) -> "Kernel":
    """The kernel with floating leaves in the dtype of the rows."""

    def convert(leaf):
      floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
      return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(convert, self)

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    raise NotImplementedError

  def _diagonal(self, x: Array) -> Array:
    raise NotImplementedError


# The backend is an argument because programs may depend on it.
@functools.partial(jax.jit, static_argnums=1)
def _matrix(kernel: Kernel, backend: str, x1: Array, x2: Array | None) -> Array:
  return kernel._in_dtype(x1.dtype)._matrix(x1, x2)


@functools.partial(jax.jit, static_argnums=1)
def _diagonal(kernel: Kernel, backend: str, x: Array) -> Array:
  return kernel._in_dtype(x.dtype)._diagonal(x)


def diagonal(kernel_fn: KernelFn, x: Array) -> Array:
  """K(x_i, x_i), `(n,)`, by the method `diag` of the kernel if it has one."""
  own = getattr(kernel_fn, "diag", None)
  if own is not None:
    return own(x)
  return jax.vmap(lambda row: kernel_fn(row[None], None)[0, 0])(x)


class _Combination(Kernel):
  """A kernel made of others, entry by entry."""

  kernels: tuple
  _operation: ClassVar[Callable]

  def __post_init__(self):
    flat: list = []
    for kernel in self.kernels:
      flat += kernel.kernels if type(kernel) is type(self) else [pytrees.argument(kernel)]
    object.__setattr__(self, "kernels", tuple(flat))

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    return functools.reduce(self._operation, [kernel(x1, x2) for kernel in self.kernels])

  def _diagonal(self, x: Array) -> Array:
    return functools.reduce(self._operation, [diagonal(kernel, x) for kernel in self.kernels])

  def _in_dtype(self, dtype) -> Kernel:
    return self  # those of the kernels convert their own


@pytrees.record("kernels")
@dataclasses.dataclass(frozen=True)
class SumKernel(_Combination):
  """The sum of kernels, k1 + k2."""

  kernels: tuple
  _operation = staticmethod(jnp.add)


@pytrees.record("kernels")
@dataclasses.dataclass(frozen=True)
class ProductKernel(_Combination):
  """The product of kernels, k1 * k2, entry by entry; positive semi-definite (Schur)."""

  kernels: tuple
  _operation = staticmethod(jnp.multiply)


@pytrees.record("scale", "kernel")
@dataclasses.dataclass(frozen=True)
class ScaledKernel(Kernel):
  """A kernel times a number >= 0, c * k."""

  scale: Number
  kernel: Any

  def __post_init__(self):
    checks.non_negative("scale", self.scale)
    scale = checks.scalar("scale", self.scale)
    if not checks.is_traced(scale) and scale == float("inf"):
      raise ValueError(f"scale: expected a finite number >= 0, got {scale}")
    object.__setattr__(self, "scale", scale)
    object.__setattr__(self, "kernel", pytrees.argument(self.kernel))

  def _in_dtype(self, dtype) -> Kernel:
    return self

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    k = self.kernel(x1, x2)
    return jnp.asarray(self.scale).astype(k.dtype) * k

  def _diagonal(self, x: Array) -> Array:
    k = diagonal(self.kernel, x)
    return jnp.asarray(self.scale).astype(k.dtype) * k
