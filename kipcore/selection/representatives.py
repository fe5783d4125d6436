"""Rows that stand for a set, chosen greedily: herding and k-center, the usual baselines of selection.

Both are deterministic, choose distinct rows, and know nothing of labels or kernels.
"""

import functools

import jax
import jax.numpy as jnp

from kipcore import checks
from kipcore.types import Array, ArrayLike


def herding(x: ArrayLike, num_rows: int, present: ArrayLike | None = None) -> Array:
  """Rows whose running mean follows the mean of all rows.

      i_k = argmin_i || mu - (x_i + sum_{j<k} x_{i_j}) / k ||,   distinct i

  In the linear kernel the error of the mean falls as 1/k while rows are not exhausted and the mean is inside
  their hull (proved for repeated choice); that few rows then teach well is an observation.

  Args:
    x: `(n, ...)` floating rows, compared as vectors.
    num_rows: k, at most the number of rows that are present.
    present: `(n,)` nonzero for rows that count; None for all.

  Returns:
    `(num_rows,)` int32 indices in the order of choice.

  Raises:
    ValueError, TypeError: for rows that are not finite floats, or too few of them.

  Source: Welling (ICML 2009); as a greedy choice of exemplars Rebuffi et al. (CVPR 2017), algorithm 4.
  """
  return _herding(*_checked(x, num_rows, present))


def k_center(x: ArrayLike, num_rows: int, present: ArrayLike | None = None) -> Array:
  """Rows that leave no row far away: the one nearest to the mean, then ever the farthest from those chosen.

  The largest distance to the nearest chosen row is at most twice the smallest possible (proved, for any first row).

  Args:
    x: `(n, ...)` floating rows, compared as vectors by Euclidean distance.
    num_rows: k, at most the number of rows that are present.
    present: `(n,)` nonzero for rows that count; None for all.

  Returns:
    `(num_rows,)` int32 indices in the order of choice.

  Raises:
    ValueError, TypeError: for rows that are not finite floats, or too few of them.

  Source: Gonzalez (1985), theorem 2.2; as a baseline of selection Sener and Savarese (ICLR 2018), algorithm 1.
  """
  return _k_center(*_checked(x, num_rows, present))


def _checked(x, num_rows, present):
  x = jnp.asarray(x)
  checks.floating("x", x)
  checks.finite("x", x)
  num_rows = checks.positive_int("num_rows", num_rows)
  present = jnp.ones(x.shape[:1], bool) if present is None else jnp.asarray(present).astype(bool)
  checks.shape("present", present, x.shape[:1])
  count = x.shape[0] if checks.is_traced(present) else int(present.sum())
  if num_rows > count:
    raise ValueError(f"num_rows: expected at most the number of rows, {count}, got {num_rows}")
  return num_rows, x.reshape(x.shape[0], -1), present


def _mean(x, present):
  # Centered on it, sums of like rows lose nothing to cancellation.
  weights = present.astype(x.dtype) / jnp.sum(present).astype(x.dtype)
  return jnp.matmul(weights, x, precision="highest")


@functools.partial(jax.jit, static_argnums=0)
def _herding(num_rows, x, present):
  x = x - _mean(x, present)[None]

  def choose(k, carry):
    chosen, free, total = carry
    # Not expanded into products, which cancel if rows are far from the mean.
    distance = jnp.sum((x + total) ** 2, axis=1)
    i = jnp.argmin(jnp.where(free, distance, jnp.inf)).astype(jnp.int32)
    return chosen.at[k].set(i), free.at[i].set(False), total + x[i]

  start = jnp.zeros((num_rows,), jnp.int32), present, jnp.zeros(x.shape[1:], x.dtype)
  return jax.lax.fori_loop(0, num_rows, choose, start)[0]


@functools.partial(jax.jit, static_argnums=0)
def _k_center(num_rows, x, present):
  x = x - _mean(x, present)[None]
  squares = jnp.sum(x * x, axis=1)

  def choose(k, carry):
    chosen, free, nearest = carry
    # The first distances are from the mean, of which the nearest row is wanted.
    score = jnp.where(k == 0, -squares, nearest)
    i = jnp.argmax(jnp.where(free, score, -jnp.inf)).astype(jnp.int32)
    distance = jnp.sum((x - x[i]) ** 2, axis=1)
    return chosen.at[k].set(i), free.at[i].set(False), jnp.minimum(nearest, distance)

  start = jnp.zeros((num_rows,), jnp.int32), present, jnp.full(x.shape[:1], jnp.inf, x.dtype)
  return jax.lax.fori_loop(0, num_rows, choose, start)[0]
