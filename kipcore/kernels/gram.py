"""Kernel matrices, their diagonals and products with them, in row blocks.

Each function is compiled once per structure of a kernel, block size and shape, for all values of its
hyperparameters. Functions of users are compared by value, or by identity if they are not hashable, so
such a kernel must be a pure function that does not change.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from kipcore import blocks, checks, linalg, pytrees
from kipcore.devices import Axis, device_axis, over_devices
from kipcore.kernels.base import diagonal
from kipcore.types import Array, ArrayLike, IntLike, KernelFn

_BLOCK_ENTRIES = 2**22  # kernel entries that `gram_matvec` holds by default
_PROBED_ROWS = 16  # rows of the block whose memory is analyzed


def gram(
  kernel_fn: KernelFn,
  x1: Shaped[ArrayLike, "n1 ..."],
  x2: Shaped[ArrayLike, "n2 ..."] | None = None,
  block_size: IntLike | None = None,
  devices: Sequence | None = None,
  memory_budget: IntLike | None = None,
  mapping: str = "pmap",
) -> Float[Array, "n1 n2"]:
  """The kernel matrix k(x1_i, x2_j), computed in blocks of rows of `x1`.

  Args:
    kernel_fn: see `types.KernelFn`.
    x1: `(n1, ...)` rows.
    x2: `(n2, ...)` rows, or None for `x1` itself.
    block_size: rows of `x1` at a time; None for all at once. It bounds the working memory of the
      kernel, not the `(n1, n2)` result.
    devices: devices of this process to divide the rows of `x1` over; None to compute where the
      arrays are. Not inside `jit`.
    memory_budget: bytes of working memory, in place of `block_size`: the largest block for which XLA's
      memory analysis of the kernel stays within it. The arguments and the result are not counted, nor
      the copy of a result in blocks that `x2=None` needs to make it exactly symmetric.
    mapping: how rows are mapped over `devices`: "pmap" or "shard_map", with equal results.

  Returns:
    `(n1, n2)`.

  Raises:
    ValueError, TypeError: for rows of `x1` and `x2` that differ in shape, a block size or budget that
      is not a positive integer, both of them, a budget below the memory for one row, or an unknown mapping.

  Example:
    >>> x, kernel_fn = jnp.arange(12.0).reshape(6, 2), kipcore.rbf_fn(3.0)
    >>> k = kipcore.gram(kernel_fn, x, block_size=4)
    >>> np.allclose(k, kernel_fn(x))
    True
    >>> np.array_equal(np.diag(k), kipcore.gram_diag(kernel_fn, x))
    True
  """
  block_size = _checked_block_size(block_size)
  x1 = _rows("x1", x1)
  if x2 is not None:
    x2 = _rows("x2", x2)
    if x1.shape[1:] != x2.shape[1:]:
      raise ValueError(f"expected rows of one shape, got x1 {x1.shape} and x2 {x2.shape}")
  kernel_fn = pytrees.argument(kernel_fn)
  if memory_budget is not None:
    if block_size is not None:
      raise ValueError(
        f"expected one of block_size and memory_budget, got {block_size} and {memory_budget}"
      )
    budget = checks.positive_int("memory_budget", memory_budget)
    block_size = _block_size_within(budget, kernel_fn, x1, x1 if x2 is None else x2)
  if devices is None:
    return _gram(kernel_fn, block_size, jax.default_backend(), x1, x2)
  axis = device_axis(devices, mapping)
  k = _rows_over_devices(kernel_fn, x1, x1 if x2 is None else x2, block_size, axis)
  if x2 is None:
    k = _symmetric(k, gram_diag(kernel_fn, x1, block_size))
  return k


def gram_diag(
  kernel_fn: KernelFn, x: Shaped[ArrayLike, "n ..."], block_size: IntLike | None = None
) -> Float[Array, " n"]:
  """The diagonal k(x_i, x_i) of a kernel matrix, without the matrix.

  Args:
    kernel_fn: see `types.KernelFn`; its method `diag` is used if it has one.
    x: `(n, ...)` rows.
    block_size: rows at a time; None for all at once.

  Returns:
    `(n,)`.

  Raises:
    ValueError, TypeError: for a block size that is not a positive integer.
  """
  block_size = _checked_block_size(block_size)
  return _gram_diag(pytrees.argument(kernel_fn), block_size, jax.default_backend(), _rows("x", x))


def gram_matvec(
  kernel_fn: KernelFn,
  x1: Shaped[ArrayLike, "n1 ..."],
  x2: Shaped[ArrayLike, "n2 ..."],
  v: Float[ArrayLike, "n2 c"],
  block_size: IntLike | None = None,
) -> Float[Array, "n1 c"]:
  """The product K(x1, x2) v with the memory of one block of rows of K.

  The gradient recomputes each block instead of storing it.

  Args:
    kernel_fn: see `types.KernelFn`.
    x1: `(n1, ...)` rows.
    x2: `(n2, ...)` rows.
    v: `(n2, c)`.
    block_size: rows of `x1` at a time; None for blocks of about 4 million kernel entries.

  Returns:
    `(n1, c)`.

  Raises:
    ValueError, TypeError: for shapes that do not match, an integer `v`, or a block size that is
      not a positive integer.
  """
  x1, x2 = _rows("x1", x1), _rows("x2", x2)
  if x1.shape[1:] != x2.shape[1:]:
    raise ValueError(f"expected rows of one shape, got x1 {x1.shape} and x2 {x2.shape}")
  checks.floating("v", v)
  checks.shape("v", v, (x2.shape[0], None))
  block_size = _checked_block_size(block_size) or max(1, _BLOCK_ENTRIES // max(1, x2.shape[0]))
  return _gram_matvec(
    pytrees.argument(kernel_fn), block_size, jax.default_backend(), x1, x2, jnp.asarray(v)
  )


def _block_size_within(budget: int, kernel_fn, x1: Array, x2: Array) -> int | None:
  """The rows per block that use at most `budget` bytes; None for all rows."""
  n1 = x1.shape[0]
  if n1 == 0 or x2.shape[0] == 0:
    return None
  shapes = [
    jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
    for n, x in ((min(n1, _PROBED_ROWS), x1), (x2.shape[0], x2))
  ]
  leaves, structure = jax.tree.flatten(kernel_fn)
  specs = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
  used = _row_bytes(structure, specs, *shapes, jax.default_backend())
  if used > budget:
    raise ValueError(
      f"memory_budget: expected at least the {used} bytes of one row of the kernel, got {budget}"
    )
  rows = budget // used
  return None if rows >= n1 else rows


@functools.lru_cache(maxsize=256)
def _row_bytes(structure, leaves, x1, x2, backend: str) -> int:
  """Bytes per row of `x1` of a block of the kernel and of the scratch memory that computes it."""
  kernel_fn = jax.tree.unflatten(structure, leaves)
  compiled = jax.jit(lambda kernel_fn, x1, x2: kernel_fn(x1, x2)).lower(kernel_fn, x1, x2).compile()
  memory: Any = compiled.memory_analysis()
  found = memory.temp_size_in_bytes + memory.output_size_in_bytes
  return -(-found // x1.shape[0])


def _checked_block_size(block_size) -> int | None:
  return None if block_size is None else checks.positive_int("block_size", block_size)


def _rows(name: str, x) -> Array:
  checks.array(name, x)
  if not x.shape:
    raise ValueError(f"{name}: expected rows (n, ...), got shape {x.shape}")
  return jnp.asarray(x)


# The backend is an argument because the programs of kernels may depend on it.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _gram(kernel_fn, block_size: int | None, backend: str, x1: Array, x2: Array | None) -> Array:
  if block_size is None or x1.shape[0] <= block_size:
    return kernel_fn(x1, x2)
  k = _block_rows(x1, x1 if x2 is None else x2, kernel_fn, block_size)
  return _symmetric(k, _gram_diag(kernel_fn, block_size, backend, x1)) if x2 is None else k


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gram_diag(kernel_fn, block_size: int | None, backend: str, x: Array) -> Array:
  return blocks.map_row_blocks(lambda rows: diagonal(kernel_fn, rows), x, block_size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gram_matvec(kernel_fn, block_size: int, backend: str, x1, x2, v) -> Array:
  product = jax.checkpoint(lambda rows: linalg.matmul(kernel_fn(rows, x2), v))
  return blocks.map_row_blocks(product, x1, block_size)


@jax.jit
def _symmetric(k: Array, own: Array) -> Array:
  """The symmetric part of `k`, with an exact diagonal: a block does not know its equal pairs."""
  i = jnp.arange(k.shape[0])
  return (0.5 * (k + k.T)).at[i, i].set(own)


def _block_rows(x1: Array, x2: Array, kernel_fn, block_size: int | None) -> Array:
  """K(x1, x2), written block by block into the result; the last block overlaps the one before."""
  n = x1.shape[0]
  if block_size is None or n <= block_size:
    return kernel_fn(x1, x2)

  def write(k, start):
    rows = jax.lax.dynamic_slice_in_dim(x1, start, block_size)
    return jax.lax.dynamic_update_slice_in_dim(k, kernel_fn(rows, x2), start, 0), None

  dtype = jax.eval_shape(kernel_fn, x1[:1], x2[:1]).dtype
  starts = np.minimum(np.arange(0, n, block_size, dtype=np.int32), n - block_size)
  return jax.lax.scan(write, jnp.zeros((n, x2.shape[0]), dtype), jnp.asarray(starts))[0]


def _rows_over_devices(kernel_fn, x1, x2, block_size: int | None, axis: Axis) -> Array:
  n = x1.shape[0]
  if n == 0:
    return kernel_fn(x1, x2)
  rows = -(-n // axis.size)
  x1 = blocks.pad_rows(x1, axis.size * rows)
  mapped = over_devices(
    _block_rows, axis, in_axes=(0, None, None, None), static_broadcasted_argnums=3
  )
  k = mapped(x1.reshape(axis.size, rows, *x1.shape[1:]), x2, kernel_fn, block_size)
  return jnp.asarray(jax.device_get(k)).reshape(axis.size * rows, -1)[:n]
