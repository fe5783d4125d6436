"""Blocks of rows against the same computation on all rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kipcore import blocks

SIZES = [1, 3, 4, 10, 11, 100, None]  # 10 rows: divisible, not divisible, and all at once


def rows(n=10):
  rng = np.random.default_rng(0)
  return {"x": jnp.asarray(rng.normal(size=(n, 2, 3))), "y": jnp.asarray(rng.normal(size=n))}


@pytest.mark.parametrize("block_size", SIZES)
def test_map_equals_all_rows_at_once(block_size):
  fn = lambda block: (jnp.sum(block["x"], axis=(1, 2)) * block["y"], {"square": block["y"] ** 2})
  mapped = jax.jit(lambda x: blocks.map_row_blocks(fn, x, block_size))(rows())
  jax.tree.map(np.testing.assert_array_equal, mapped, fn(rows()))


@pytest.mark.parametrize("block_size", SIZES)
def test_sum_counts_each_row_once(block_size):
  def fn(block, present):
    y = jnp.where(present, block["y"], 0)
    return jnp.einsum("n,nij->ij", y, block["x"]), jnp.sum(present, dtype=jnp.int32)

  total, count = jax.jit(lambda x: blocks.sum_row_blocks(fn, x, block_size))(rows())
  expected = np.einsum("n,nij->ij", *(np.asarray(rows()[name], np.float64) for name in "yx"))
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  assert count == 10


@pytest.mark.parametrize("block_size", SIZES)
def test_scan_visits_rows_in_order(block_size):
  def fn(carry, block, present):
    sums = carry + jnp.cumsum(jnp.where(present, block, 0))
    return sums[-1], sums

  last, sums = blocks.scan_row_blocks(fn, jnp.int32(0), jnp.arange(10, dtype=jnp.int32), block_size)
  np.testing.assert_array_equal(sums, np.cumsum(np.arange(10)))
  assert last == 45


def test_padding_is_a_valid_row():
  """A function that fails on zeros has finite values and gradients in the padded block."""
  x = jnp.arange(1.0, 6.0)
  f = lambda x: jnp.sum(blocks.map_row_blocks(lambda b: jnp.sqrt(b), x, 4))
  np.testing.assert_allclose(jax.grad(f)(x), 0.5 / np.sqrt(x), rtol=1e-6)


def test_memory_is_that_of_a_block():
  """The scratch memory of column sums of an (n, n) matrix is far below that of the matrix."""

  def scratch(n):
    x = jax.ShapeDtypeStruct((n, 8), jnp.float32)
    outer = lambda x: blocks.sum_row_blocks(
      lambda b, present: jnp.sum(jnp.where(present[:, None], jnp.sin(b @ x.T), 0), axis=0), x, 64
    )
    return jax.jit(outer).lower(x).compile().memory_analysis().temp_size_in_bytes

  assert scratch(2048) < 4 * 2048**2 / 8


@pytest.mark.parametrize("n, size", [(10, 3), (9, 3), (1, 5), (0, 5)])
def test_slices_cover_all_rows(n, size):
  slices = list(blocks.row_slices(n, size))
  assert [i for s in slices for i in range(n)[s]] == list(range(n))
  assert all(s.stop - s.start <= size for s in slices)


@pytest.mark.parametrize("xp", [np, jnp])
def test_pad_rows_repeats_the_last_row(xp):
  x = xp.asarray([[1.0, 2.0], [3.0, 4.0]])
  padded = blocks.pad_rows(x, 4)
  assert isinstance(padded, type(x)) and padded.shape == (4, 2)
  np.testing.assert_array_equal(padded[1:], [[3.0, 4.0]] * 3)
  assert blocks.pad_rows(x, 2) is x
