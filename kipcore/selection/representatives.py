"""Greedy selection of representative rows: herding, kernel herding and k-center, common baselines.

They are deterministic, select distinct rows, and use no labels.
"""

import functools

import jax
import jax.numpy as jnp

from kipcore import checks, linalg
from kipcore.kernels.gram import gram_diag, gram_matvec
from kipcore.types import Array, ArrayLike, KernelFn


def herding(
  x: ArrayLike,
  num_rows: int,
  present: ArrayLike | None = None,
  weights: ArrayLike | None = None,
) -> Array:
  """Selects rows whose running mean approximates the (weighted) mean mu of all rows.

      i_k = argmin_i || mu - (x_i + sum_{j<k} x_{i_j}) / k ||,   distinct i

  The error of the mean decreases as 1/k while rows remain and mu is inside their convex hull
  (proved if rows may be selected repeatedly). That few such rows are good training data is an
  empirical observation.

  Args:
    x: `(n, ...)` floating rows, compared as vectors.
    num_rows: k, at most the number of rows that are present.
    present: `(n,)`, nonzero for rows that are used; None for all.
    weights: `(n,)` weights >= 0 of the rows in the mean; None for 1.

  Returns:
    `(num_rows,)` int32 indices in the order of selection.

  Raises:
    ValueError, TypeError: for rows that are not finite floats, or fewer than `num_rows` rows.

  References:
    Welling (ICML 2009); Rebuffi et al. (CVPR 2017), algorithm 4 (greedy selection of exemplars).
  """
  return _herding(*_checked(x, num_rows, present, weights))


def k_center(
  x: ArrayLike,
  num_rows: int,
  present: ArrayLike | None = None,
  weights: ArrayLike | None = None,
) -> Array:
  """Selects the row nearest to the mean, then repeatedly the row farthest from the selected rows.

  The largest distance of any row to its nearest selected row is at most twice the minimum over all
  selections (proved, for any first row).

  Args:
    x: `(n, ...)` floating rows, compared as vectors by Euclidean distance.
    num_rows: k, at most the number of rows that are present.
    present: `(n,)`, nonzero for rows that are used; None for all.
    weights: `(n,)` weights >= 0 of the rows in the mean; None for 1.

  Returns:
    `(num_rows,)` int32 indices in the order of selection.

  Raises:
    ValueError, TypeError: for rows that are not finite floats, or fewer than `num_rows` rows.

  References:
    Gonzalez (1985), theorem 2.2; Sener and Savarese (ICLR 2018), algorithm 1 (as a selection
    method).
  """
  return _k_center(*_checked(x, num_rows, present, weights))


def kernel_herding(
  kernel_fn: KernelFn,
  x: ArrayLike,
  num_rows: int,
  present: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  targets: ArrayLike | None = None,
  block_size: int | None = None,
) -> Array:
  """`herding` in the feature space of a kernel: the running mean approximates the mean embedding.

      mu(x) = sum_j u_j k(x_j, x) / sum_j u_j
      i_k = argmax_i mu(x_i) - (sum_{j<k} k(x_{i_j}, x_i) + k(x_i, x_i) / 2) / k,   distinct i

  Each step minimizes the maximum mean discrepancy (MMD) of the k selected rows with equal weights.
  With targets t the kernel is k(x, x') (1 + <t, t'>), so that the rows also represent the products
  of features and targets, which ridge regression depends on. The MMD decreases as 1/k in spaces of
  finite dimension (proved if rows may be selected repeatedly and mu is inside the convex hull).

  Args:
    kernel_fn: see `types.KernelFn`; hashable.
    x: `(n, ...)` floating rows.
    num_rows: k, at most the number of rows that are present.
    present: `(n,)`, nonzero for rows that are used; None for all.
    weights: `(n,)` weights u >= 0 of the rows; None for 1.
    targets: `(n, q)` floating targets, centered and scaled; None for none.
    block_size: rows of the kernel matrix that are held at a time; None for about 4 million entries.

  Returns:
    `(num_rows,)` int32 indices in the order of selection. Cost: n (n + k) kernel entries.

  Raises:
    ValueError, TypeError: for rows or targets that are not finite floats, or fewer than `num_rows`
      rows.

  References:
    Chen, Welling and Smola (UAI 2010). The kernel with targets: Gong, Choi and Dwivedi (2024) use
    a similar one for kernel thinning.
  """
  num_rows, _, present, mass = _checked(x, num_rows, present, weights)
  x = jnp.asarray(x)
  if targets is not None:
    targets = checked_targets(targets, x)
  return padded_kernel_herding(kernel_fn, num_rows, x, present, mass, targets, block_size)


def padded_kernel_herding(kernel_fn, num_rows, x, present, weights, targets, block_size=None):
  """`kernel_herding` for checked input."""
  kernel_fn = checks.hashable(kernel_fn)
  weights = jnp.where(present, weights, 0)
  share = weights / jnp.sum(weights)
  mean = mean_embedding(kernel_fn, x, x, share, targets, targets, block_size)
  return _kernel_herding(kernel_fn, num_rows, x, present, mean, targets)


def mean_embedding(kernel_fn, x1, x2, share, targets1=None, targets2=None, block_size=None):
  """sum_j share_j k(x2_j, x1_i) `(n1,)`, with targets for the kernel k (1 + <t, t'>)."""
  mean = gram_matvec(kernel_fn, x1, x2, share[:, None], block_size)[:, 0]
  if targets1 is None:
    return mean
  with_targets = gram_matvec(kernel_fn, x1, x2, share[:, None] * targets2, block_size)
  return mean + jnp.sum(targets1 * with_targets, axis=1)


def checked_targets(targets, x):
  """Targets `(n, q)` in the dtype of the rows."""
  checks.floating("targets", targets)
  checks.finite("targets", targets)
  checks.shape("targets", targets, (x.shape[0], None))
  return jnp.asarray(targets, x.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kernel_herding(kernel_fn, num_rows, x, present, mean, targets):
  factor = lambda i: (
    1.0 if targets is None else 1 + linalg.matmul(targets, targets[i][:, None])[:, 0]
  )
  scale = 1.0 if targets is None else 1 + jnp.sum(targets**2, axis=1)
  half = 0.5 * gram_diag(kernel_fn, x).astype(x.dtype) * scale

  def choose(k, carry):
    chosen, free, total = carry
    gain = mean - (total + half) / (k + 1).astype(x.dtype)
    i = jnp.argmax(jnp.where(free, gain, -jnp.inf)).astype(jnp.int32)
    column = kernel_fn(x, x[i][None])[:, 0].astype(x.dtype) * factor(i)
    return chosen.at[k].set(i), free.at[i].set(False), total + column

  start = jnp.zeros((num_rows,), jnp.int32), present, jnp.zeros(x.shape[:1], x.dtype)
  return jax.lax.fori_loop(0, num_rows, choose, start)[0]


def _checked(x, num_rows, present, weights):
  x = jnp.asarray(x)
  checks.floating("x", x)
  checks.finite("x", x)
  num_rows = checks.positive_int("num_rows", num_rows)
  present = jnp.ones(x.shape[:1], bool) if present is None else jnp.asarray(present).astype(bool)
  checks.shape("present", present, x.shape[:1])
  count = x.shape[0] if checks.is_traced(present) else int(present.sum())
  if num_rows > count:
    raise ValueError(f"num_rows: expected at most the number of rows, {count}, got {num_rows}")
  if weights is None:
    weights = jnp.ones(x.shape[:1], x.dtype)
  else:
    weights = checks.weights("weights", weights, x.shape[0], x.dtype)
  return num_rows, x.reshape(x.shape[0], -1), present, weights


def _mean(x, present, weights):
  # Centering the rows on this mean avoids cancellation in the sums.
  weights = jnp.where(present, weights, 0)
  return jnp.matmul(weights / jnp.sum(weights), x, precision="highest")


@functools.partial(jax.jit, static_argnums=0)
def _herding(num_rows, x, present, weights):
  x = x - _mean(x, present, weights)[None]

  def choose(k, carry):
    chosen, free, total = carry
    # Not expanded into products, which cancel if rows are far from the mean.
    distance = jnp.sum((x + total[None]) ** 2, axis=1)
    i = jnp.argmin(jnp.where(free, distance, jnp.inf)).astype(jnp.int32)
    return chosen.at[k].set(i), free.at[i].set(False), total + x[i]

  start = jnp.zeros((num_rows,), jnp.int32), present, jnp.zeros(x.shape[1:], x.dtype)
  return jax.lax.fori_loop(0, num_rows, choose, start)[0]


@functools.partial(jax.jit, static_argnums=0)
def _k_center(num_rows, x, present, weights):
  x = x - _mean(x, present, weights)[None]
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


# The cores for checked input: (number of rows, rows as vectors, mask, weights).
PADDED = {"herding": _herding, "k_center": _k_center}
