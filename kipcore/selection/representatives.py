"""Greedy selection of representative rows: herding and k-center, two common baselines.

Both are deterministic, select distinct rows, and use neither labels nor kernels.
"""

import functools

import jax
import jax.numpy as jnp

from kipcore import checks
from kipcore.types import Array, ArrayLike


def herding(x: ArrayLike, num_rows: int, present: ArrayLike | None = None) -> Array:
  """Selects rows whose running mean approximates the mean mu of all rows.

      i_k = argmin_i || mu - (x_i + sum_{j<k} x_{i_j}) / k ||,   distinct i

  The error of the mean decreases as 1/k while rows remain and mu is inside their convex hull
  (proved if rows may be selected repeatedly). That few such rows are good training data is an
  empirical observation.

  Args:
    x: `(n, ...)` floating rows, compared as vectors.
    num_rows: k, at most the number of rows that are present.
    present: `(n,)`, nonzero for rows that are used; None for all.

  Returns:
    `(num_rows,)` int32 indices in the order of selection.

  Raises:
    ValueError, TypeError: for rows that are not finite floats, or fewer than `num_rows` rows.

  References:
    Welling (ICML 2009); Rebuffi et al. (CVPR 2017), algorithm 4 (greedy selection of exemplars).
  """
  return _herding(*_checked(x, num_rows, present))


def k_center(x: ArrayLike, num_rows: int, present: ArrayLike | None = None) -> Array:
  """Selects the row nearest to the mean, then repeatedly the row farthest from the selected rows.

  The largest distance of any row to its nearest selected row is at most twice the minimum over all
  selections (proved, for any first row).

  Args:
    x: `(n, ...)` floating rows, compared as vectors by Euclidean distance.
    num_rows: k, at most the number of rows that are present.
    present: `(n,)`, nonzero for rows that are used; None for all.

  Returns:
    `(num_rows,)` int32 indices in the order of selection.

  Raises:
    ValueError, TypeError: for rows that are not finite floats, or fewer than `num_rows` rows.

  References:
    Gonzalez (1985), theorem 2.2; Sener and Savarese (ICLR 2018), algorithm 1 (as a selection
    method).
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
  # Centering the rows on this mean avoids cancellation in the sums.
  weights = present.astype(x.dtype) / jnp.sum(present).astype(x.dtype)
  return jnp.matmul(weights, x, precision="highest")


@functools.partial(jax.jit, static_argnums=0)
def _herding(num_rows, x, present):
  x = x - _mean(x, present)[None]

  def choose(k, carry):
    chosen, free, total = carry
    # Not expanded into products, which cancel if rows are far from the mean.
    distance = jnp.sum((x + total[None]) ** 2, axis=1)
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
    # The first step selects the row nearest to the mean, i.e. to the origin.
    score = jnp.where(k == 0, -squares, nearest)
    i = jnp.argmax(jnp.where(free, score, -jnp.inf)).astype(jnp.int32)
    distance = jnp.sum((x - x[i][None]) ** 2, axis=1)
    return chosen.at[k].set(i), free.at[i].set(False), jnp.minimum(nearest, distance)

  start = jnp.zeros((num_rows,), jnp.int32), present, jnp.full(x.shape[:1], jnp.inf, x.dtype)
  return jax.lax.fori_loop(0, num_rows, choose, start)[0]
