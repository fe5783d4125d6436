"""Samplers of target batches that do not look at predictions; see `importance` for those that do.

Rows are grouped by class, so dividing them into equal strata also balances the classes of
every batch. A draw takes time proportional to the batch size, not to the number of rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from kipcore.distillation.method import Sampler, compiled
from kipcore.types import Array


@dataclasses.dataclass(frozen=True)
class Uniform(Sampler):
  """The sampler of `uniform`; its state is the number of rows."""

  name = "uniform"

  @compiled("capacity")
  def init(self, class_counts: Int[Array, " c"], capacity: int) -> Int[Array, ""]:
    return jnp.sum(class_counts, dtype=jnp.int32)

  @compiled("size")
  def draw(
    self, key: Array, state: Int[Array, ""], size: int
  ) -> tuple[Int[Array, " size"], Float[Array, " size"]]:
    num_rows = state
    first, count = _stratum(jnp.arange(size, dtype=jnp.int32), num_rows, size)
    indices = first + _uniform_integers(key, count)
    # With more strata than rows, several strata contain the same row.
    copies = jnp.where(
      size > num_rows, -(-(indices + 1) * size // num_rows) + (-indices * size // num_rows), 1
    )
    weights = (count / copies).astype(jnp.float32) * (size / num_rows.astype(jnp.float32))
    return indices, weights


@dataclasses.dataclass(frozen=True)
class ClassBalanced(Sampler):
  """The sampler of `class_balanced`; its state is the number of rows of each class."""

  name = "class_balanced"

  def init(self, class_counts: Int[Array, " c"], capacity: int) -> Int[Array, " c"]:
    return class_counts

  @compiled("size")
  def draw(
    self, key: Array, state: Int[Array, " c"], size: int
  ) -> tuple[Int[Array, " size"], Float[Array, " size"]]:
    class_counts, num_classes = state, state.shape[0]
    starts = jnp.cumsum(class_counts, dtype=jnp.int32) - class_counts
    position = jnp.arange(size, dtype=jnp.int32)
    label = position % num_classes
    per_class = jnp.full((num_classes,), size // num_classes, jnp.int32) + (
      jnp.arange(num_classes, dtype=jnp.int32) < size % num_classes
    ).astype(jnp.int32)
    first, count = _stratum(position // num_classes, class_counts[label], per_class[label])
    return starts[label] + first + _uniform_integers(key, count), jnp.ones((size,), jnp.float32)


def uniform() -> Uniform:
  """Draws one row from each of `size` strata of consecutive rows, uniformly.

  Row r of a stratum of s rows is drawn with probability 1 / s. Strata differ by at most one row,
  and the weight size * s / n makes mean(w f) exactly unbiased for the mean over all rows. Batches
  larger than n repeat rows, which share the weight.
  """
  return Uniform()


def class_balanced() -> ClassBalanced:
  """Draws the same number of rows from each class (up to one), uniformly within a class, with weights 1.

  mean(w f) estimates the mean over classes of the class means, which equals the mean over rows only
  if the classes are equally large. If the size is not a multiple of the number of classes, the first
  classes have one row more. Published KIP draws this way.
  """
  return ClassBalanced()


def _stratum(i: Array, num_rows: Array, size: int | Array) -> tuple[Array, Array]:
  """First row and number of rows of stratum i of `size`: disjoint, and at least one row each."""
  # floor(i n / size) with n = q size + r: no overflow of 32 bits up to a size of 46,340.
  q, r = num_rows // size, num_rows % size
  low, high = (j * q + (j * r) // size for j in (i, i + 1))
  return jnp.minimum(low, num_rows - 1), jnp.maximum(high - low, 1)


def _uniform_integers(key: Array, count: Array) -> Array:
  """Uniform integers in [0, count), exact to 2^-24 in probability."""
  u = jax.random.uniform(key, count.shape, jnp.float32)
  return jnp.minimum((u * count.astype(jnp.float32)).astype(jnp.int32), count - 1)
