"""Computations over blocks of rows, so that memory depends on the block and not on all rows.

On traced arrays (`map_row_blocks`, `sum_row_blocks`, `scan_row_blocks`) every block has the same
size: the last one is padded by repeating the last row, which is valid input. On the host,
`row_slices` lists the blocks and `pad_rows` brings the last one to full size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from kipcore.types import Array, ArrayLike


def map_row_blocks(fn: Callable[[Any], Any], x: Any, block_size: int | None) -> Any:
  """Apply `fn` to blocks of rows and join the results along the rows.

  Args:
    fn: maps `(b, ...)` arrays (the structure of `x`) to arrays of leading size b. Each row of its
      result must depend only on the same row of its input.
    x: array or pytree of arrays of leading size n.
    block_size: rows per block; None for all at once.

  Returns:
    `fn(x)`.
  """
  n = _num_rows(x)
  if block_size is None or n <= block_size:
    return fn(x)
  rows, _ = _split(x, block_size)
  return _join(jax.lax.map(fn, rows), n)


def sum_row_blocks(fn: Callable[[Any, Bool[Array, " b"]], Any], x: Any, block_size: int | None):
  """Sum `fn(block, present)` over blocks of rows.

  Args:
    fn: maps `(b, ...)` arrays (the structure of `x`) and a mask `(b,)`, False for rows of padding,
      to a pytree of arrays. Rows of padding must not contribute.
    x: array or pytree of arrays of leading size n.
    block_size: rows per block; None for all at once.

  Returns:
    The sums, a pytree.
  """

  def add(total, block, present):
    return jax.tree.map(jnp.add, total, fn(block, present)), None

  n = _num_rows(x)
  if block_size is None or n <= block_size:
    return fn(x, jnp.ones((n,), bool))
  first = jax.tree.map(lambda a: a[:block_size], x)
  shapes = jax.eval_shape(fn, first, jax.ShapeDtypeStruct((block_size,), bool))
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  return scan_row_blocks(add, zeros, x, block_size)[0]


def scan_row_blocks(
  fn: Callable[[Any, Any, Bool[Array, " b"]], tuple[Any, Any]],
  carry: Any,
  x: Any,
  block_size: int | None,
) -> tuple[Any, Any]:
  """Pass a carry through blocks of rows in order.

  Args:
    fn: `fn(carry, block, present) -> (carry, rows)`, with the mask of `sum_row_blocks`; `rows` is
      a pytree of arrays of leading size b, or None.
    carry: its initial value.
    x: array or pytree of arrays of leading size n.
    block_size: rows per block; None for all at once.

  Returns:
    The last carry, and `rows` joined to leading size n.
  """
  n = _num_rows(x)
  if block_size is None or n <= block_size:
    return fn(carry, x, jnp.ones((n,), bool))
  carry, out = jax.lax.scan(lambda c, block: fn(c, *block), carry, _split(x, block_size))
  return carry, _join(out, n)


def row_slices(n: int, block_size: int) -> Iterator[slice]:
  """Yield the slices of at most `block_size` rows that cover `n` rows in order."""
  for start in range(0, n, block_size):
    yield slice(start, min(start + block_size, n))


def pad_rows(x: ArrayLike, size: int) -> ArrayLike:
  """`x` with its last row repeated up to `size` rows; NumPy in gives NumPy out."""
  missing = size - x.shape[0]
  if missing <= 0:
    return x
  xp = jnp if isinstance(x, jax.Array) else np
  return xp.concatenate([x, xp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])


def _num_rows(x) -> int:
  return jax.tree.leaves(x)[0].shape[0]


def _split(x, block_size: int):
  """The blocks `(blocks, block_size, ...)` of a pytree, and the mask `(blocks, block_size)`."""
  n = _num_rows(x)
  blocks = -(-n // block_size)

  def split(a):
    return pad_rows(a, blocks * block_size).reshape(blocks, block_size, *a.shape[1:])

  present = (np.arange(blocks * block_size) < n).reshape(blocks, block_size)
  return jax.tree.map(split, x), jnp.asarray(present)


def _join(out, n: int):
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], out)
