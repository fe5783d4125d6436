"""The convolution of finite networks, with derivatives of every order that are fast on CPUs."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float

from kipcore.types import Array, ArrayLike

# Bytes of a block of patches, which stays in the cache of a core.
_PATCH_BYTES = 2**19
# Fewer blocks than this are not worth a loop.
_LEAST_BLOCKS = 16


def convolve(
  x: Float[ArrayLike, "n h w c"], kernel: Float[ArrayLike, "size size c features"]
) -> Float[Array, "n h w features"]:
  """Zero-padded convolution of `(n, h, w, c)` with `(size, size, c, features)`; size is odd.

  On CPUs, XLA's convolution is fast in float32, but its derivatives are up to 100 times slower inside a loop. There, the
  derivative with respect to `x` is a convolution with the reversed kernel, and that with respect to `kernel` consists of matrix
  products of patches, as does the convolution in other types.
  """
  x, kernel = jnp.asarray(x), jnp.asarray(kernel)
  dtype = jnp.result_type(x, kernel)
  x, kernel = x.astype(dtype), kernel.astype(dtype)
  return _native(x, kernel) if jax.default_backend() != "cpu" else _convolve(x, kernel)


def _native(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _patches(x, size):
  """`(size, n, h, w, size c)`: for each row of the kernel, the parts of a row of `x` that its columns meet."""
  (_, h, w, _), border = x.shape, (size // 2, size // 2)
  padded = jnp.pad(x, ((0, 0), border, border, (0, 0)))
  rows = jnp.concatenate([padded[:, :, j : j + w] for j in range(size)], axis=-1)
  return [rows[:, i : i + h].reshape(-1, rows.shape[-1]) for i in range(size)]


def _by_patches(x, kernel):
  size, _, c, features = kernel.shape
  rows = kernel.reshape(size, size * c, features)
  products = [patch @ row for patch, row in zip(_patches(x, size), rows)]
  return functools.reduce(operator.add, products).reshape(*x.shape[:3], features)


def _correlation(x, g, size):
  """The gradient `(size, size, c, features)` of sum(g convolve(x, kernel)) in the kernel, a few images at a time."""
  n, c, features = x.shape[0], x.shape[3], g.shape[3]

  def part(x, g):
    flat = g.reshape(-1, features)
    return jnp.stack([patch.T @ flat for patch in _patches(x, size)])

  count = math.ceil((x.size * size + g.size) * x.dtype.itemsize / _PATCH_BYTES)
  rows = math.ceil(n / max(count, 1))
  if rows >= n or count < _LEAST_BLOCKS:
    total = part(x, g)
  else:
    parts = math.ceil(n / rows)
    split = lambda a: jnp.pad(a, ((0, parts * rows - n), (0, 0), (0, 0), (0, 0))).reshape(
      parts, rows, *a.shape[1:]
    )
    zero = jnp.zeros((size, size * c, features), x.dtype)
    total, _ = jax.lax.scan(lambda total, xg: (total + part(*xg), None), zero, (split(x), split(g)))
  return total.reshape(size, size, c, features)


# Primitives, because only they can have a transpose of one's own together with both modes of differentiation.
_convolution_p = Primitive("convolution_of_networks")
_correlation_p = Primitive("correlation_of_networks")


def _convolve(x, kernel):
  return _convolution_p.bind(x, kernel)


def _correlate(x, g, size):
  return _correlation_p.bind(x, g, size=size)


def _transposed(kernel):
  """The kernel of the transposed convolution."""
  return kernel[::-1, ::-1].swapaxes(2, 3)


def _compute_convolution(x, kernel):
  return _native(x, kernel) if x.dtype == jnp.float32 else _by_patches(x, kernel)


def _batch_convolution(arguments, axes):
  (x, kernel), (axis, kernel_axis) = arguments, axes
  if kernel_axis is not None:
    # Products of patches for several kernels at once are batched matrix products.
    return jax.vmap(_by_patches, axes)(x, kernel), 0
  x = jnp.moveaxis(x, axis, 0)
  flat = _convolve(x.reshape(-1, *x.shape[2:]), kernel)
  return flat.reshape(*x.shape[:2], *flat.shape[1:]), 0


def _batch_correlation(arguments, axes, size):
  return jax.vmap(lambda x, g: _correlation(x, g, size), axes)(*arguments), 0


def _define(primitive, compute, shape, batch, **static):
  """What JAX needs to know of a primitive besides its derivatives."""
  primitive.def_impl(jax.jit(compute, **static))
  primitive.def_abstract_eval(
    lambda x, other, **size: x.update(shape=shape(x, other, **size), weak_type=False)
  )
  mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
  batching.primitive_batchers[primitive] = batch


_define(
  _convolution_p,
  _compute_convolution,
  lambda x, kernel: (*x.shape[:3], kernel.shape[3]),
  _batch_convolution,
)
_define(
  _correlation_p,
  _correlation,
  lambda x, g, size: (size, size, x.shape[3], g.shape[3]),
  _batch_correlation,
  static_argnames="size",
)
# Each is linear in each argument.
ad.defbilinear(
  _convolution_p,
  lambda ct, x, kernel: _convolve(ct, _transposed(kernel)),
  lambda ct, x, kernel: _correlate(x, ct, kernel.aval.shape[0]),
)
ad.defbilinear(
  _correlation_p,
  lambda ct, x, g, size: _convolve(g, _transposed(ct)),
  lambda ct, x, g, size: _convolve(x, ct),
)
