"""Samplers of target batches that do not look at predictions; `importance` has those that do.

Rows stand grouped by class, so dividing them into equal strata also balances the
classes of every batch. A draw takes time proportional to the batch, not to the rows.
"""

import jax
import jax.numpy as jnp

from kipcore.distillation.method import Sampler, value_equal
from kipcore.types import Array


@value_equal
def uniform() -> Sampler:
  """Every row with equal probability, one from each of `size` strata of consecutive rows.

  Row r of a stratum of s rows is drawn with probability 1 / s; the strata differ by at
  most one row, and the weight size * s / n makes mean(w f) exactly unbiased for the
  mean over all rows. Batches larger than n repeat rows and share the weight.

  Returns:
    A `Sampler`; its state is the number of rows.
  """

  def draw(key: Array, num_rows: Array, size: int):
    first, count = _stratum(jnp.arange(size, dtype=jnp.int32), num_rows, size)
    indices = first + _uniform_integers(key, count)
    # Of more strata than rows, several are the same row.
    copies = jnp.where(
      size > num_rows, -(-(indices + 1) * size // num_rows) + (-indices * size // num_rows), 1
    )
    weights = (count / copies).astype(jnp.float32) * (size / num_rows.astype(jnp.float32))
    return indices, weights

  return Sampler(
    "uniform", lambda class_counts, capacity: jnp.sum(class_counts, dtype=jnp.int32), draw
  )


@value_equal
def class_balanced() -> Sampler:
  """The same number of rows from each class (up to one), each class uniformly, weights 1.

  mean(w f) estimates the mean over classes of the class means, which is the mean over
  rows only if the classes are equally large. A batch that is not a multiple of the
  number of classes gives the first ones a row more. Published KIP draws like this.

  Returns:
    A `Sampler`; its state is the number of rows of each class.
  """

  def draw(key: Array, class_counts: Array, size: int):
    num_classes = class_counts.shape[0]
    starts = jnp.cumsum(class_counts, dtype=jnp.int32) - class_counts
    position = jnp.arange(size, dtype=jnp.int32)
    label = position % num_classes
    per_class = jnp.full((num_classes,), size // num_classes, jnp.int32) + (
      jnp.arange(num_classes, dtype=jnp.int32) < size % num_classes
    ).astype(jnp.int32)
    first, count = _stratum(position // num_classes, class_counts[label], per_class[label])
    return starts[label] + first + _uniform_integers(key, count), jnp.ones((size,), jnp.float32)

  return Sampler("class_balanced", lambda class_counts, capacity: class_counts, draw)


def _stratum(i: Array, num_rows: Array, size):
  """First row and number of rows of stratum i of `size`: disjoint, and at least one row each."""
  # floor(i n / size) with n = q size + r: no overflow of 32 bits up to a size of 46,340.
  q, r = num_rows // size, num_rows % size
  low, high = (j * q + (j * r) // size for j in (i, i + 1))
  return jnp.minimum(low, num_rows - 1), jnp.maximum(high - low, 1)


def _uniform_integers(key: Array, count: Array) -> Array:
  """Uniform integers in [0, count), exact to 2^-24 in probability."""
  u = jax.random.uniform(key, count.shape, jnp.float32)
  return jnp.minimum((u * count.astype(jnp.float32)).astype(jnp.int32), count - 1)
