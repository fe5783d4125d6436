"""Kernel matrices and products with them in row blocks, so that memory is set by a block.

The blocks are traced once inside `jax.lax.map`; the last one is padded. All
functions are pure and can be jitted with the kernel function closed over.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kipcore import checks, linalg
from kipcore.devices import Axis, device_axis, pmap
from kipcore.types import Array, KernelFn


def map_row_blocks(fn, x, block_size: int | None):
  """Applies `fn` to blocks of rows and joins the results along the rows.

  Args:
    fn: maps `(b, ...)` (an array or a pytree of them with equal leading size) to an
      array or pytree with leading size b; rows must not influence one another.
    x: array or pytree, leading size n.
    block_size: rows a block, None for all at once.

  Returns:
    `fn(x)`, computed with the memory of one block.
  """
  n = jax.tree.leaves(x)[0].shape[0]
  if block_size is None or n <= block_size:
    return fn(x)
  blocks = -(-n // block_size)

  def split(a):
    # Padding repeats the last row: a valid input, so it makes no NaN of its own.
    a = jnp.concatenate([a, jnp.broadcast_to(a[-1:], (blocks * block_size - n, *a.shape[1:]))])
    return a.reshape(blocks, block_size, *a.shape[1:])

  out = jax.lax.map(fn, jax.tree.map(split, x))
  return jax.tree.map(lambda a: a.reshape(blocks * block_size, *a.shape[2:])[:n], out)


def gram(
  kernel_fn: KernelFn,
  x1: Array,
  x2: Array | None = None,
  block_size: int | None = None,
  devices: Sequence | None = None,
) -> Array:
  """The kernel matrix k(x1_i, x2_j), computed in blocks of rows of `x1`.

  Args:
    kernel_fn: see `types.KernelFn`.
    x1: `(n1, ...)` rows.
    x2: `(n2, ...)` rows, or None for `x1` itself.
    block_size: rows of `x1` at a time; None for all at once. It bounds the working
      memory of the kernel, not the `(n1, n2)` result.
    devices: of this process, to share out the rows of `x1` to; None for where the arrays are. Not
      inside `jit`.

  Returns:
    `(n1, n2)`.

  Raises:
    ValueError: where the rows of `x1` and `x2` differ in shape, or a block size < 1.

  Example:
    >>> x, kernel_fn = jnp.arange(12.0).reshape(6, 2), kipcore.rbf_fn(3.0)
    >>> k = kipcore.gram(kernel_fn, x, block_size=4)
    >>> np.allclose(k, kernel_fn(x))
    True
    >>> np.array_equal(np.diag(k), kipcore.gram_diag(kernel_fn, x))
    True
  """
  if block_size is not None:
    checks.positive_int("block_size", block_size)
  if x2 is not None and x1.shape[1:] != x2.shape[1:]:
    raise ValueError(f"expected rows of one shape, got x1 {x1.shape} and x2 {x2.shape}")
  if devices is not None:
    k = _rows_over_devices(
      kernel_fn, x1, x1 if x2 is None else x2, block_size, device_axis(devices)
    )
  elif block_size is None or x1.shape[0] <= block_size:
    return kernel_fn(x1, x2)
  else:
    k = _rows(x1, x1 if x2 is None else x2, kernel_fn, block_size)
  if x2 is None:
    # A block does not know which of its pairs are a point with itself; the diagonal does, exactly.
    diagonal = jnp.arange(x1.shape[0])
    k = (0.5 * (k + k.T)).at[diagonal, diagonal].set(gram_diag(kernel_fn, x1, block_size))
  return k


def _rows(x1: Array, x2: Array, kernel_fn: KernelFn, block_size: int | None) -> Array:
  return map_row_blocks(lambda block: kernel_fn(block, x2), x1, block_size)


def _rows_over_devices(kernel_fn: KernelFn, x1, x2, block_size: int | None, axis: Axis) -> Array:
  n = x1.shape[0]
  if n == 0:
    return kernel_fn(x1, x2)
  rows = -(-n // axis.size)
  # As many rows for each device; the last one stands in for those that lack.
  x1 = jnp.take(x1, jnp.minimum(jnp.arange(axis.size * rows), n - 1), axis=0)
  mapped = pmap(_rows, axis, in_axes=(0, None, None, None), static_broadcasted_argnums=(2, 3))
  k = mapped(x1.reshape(axis.size, rows, *x1.shape[1:]), x2, kernel_fn, block_size)
  return jnp.asarray(jax.device_get(k)).reshape(axis.size * rows, -1)[:n]


def gram_diag(kernel_fn: KernelFn, x: Array, block_size: int | None = None) -> Array:
  """The diagonal k(x_i, x_i) of a kernel matrix, without the matrix.

  Args:
    kernel_fn: see `types.KernelFn`; its method `diag` is used where it has one.
    x: `(n, ...)` rows.
    block_size: rows at a time; None for all at once.

  Returns:
    `(n,)`.
  """
  one = getattr(kernel_fn, "diag", None)
  if one is None:
    one = jax.vmap(lambda row: kernel_fn(row[None], None)[0, 0])
  return map_row_blocks(one, x, block_size)


def gram_matvec(
  kernel_fn: KernelFn, x1: Array, x2: Array, v: Array, block_size: int | None = None
) -> Array:
  """The product K(x1, x2) v, never holding more than a block of K.

  Args:
    kernel_fn: see `types.KernelFn`.
    x1: `(n1, ...)` rows.
    x2: `(n2, ...)` rows.
    v: `(n2, c)`.
    block_size: rows of `x1` at a time; None for all at once.

  Returns:
    `(n1, c)`.
  """
  return map_row_blocks(lambda block: linalg.matmul(kernel_fn(block, x2), v), x1, block_size)
