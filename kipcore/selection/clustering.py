"""k-means: D^2 seeding in input or kernel space, Lloyd's algorithm, and medoids.

The guarantees apply only to the k-means cost sum_i w_i min_c ||x_i - c||^2. That a good clustering
gives a good distilled set is an empirical observation.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import blocks, checks, keys, linalg, pytrees
from kipcore.kernels.gram import gram, gram_diag
from kipcore.selection.draws import draw_few_rows
from kipcore.types import Array, KernelFn

# With few seeds, each new seed changes the distribution a lot, and most proposals of a large block
# would be rejected.
_EARLY_SEEDS, _EARLY_STEPS, _STEPS = 16, 4, 32
_BLOCK_ENTRIES = 2**21


class Seeds(NamedTuple):
  """Seeds of a clustering: `centers` `(k, ...)` are the rows `indices` `(k,)` int32 of the data."""

  centers: Array
  indices: Array


class KMeansResult(NamedTuple):
  """Result of `kmeans`.

  Attributes:
    centers: `(k, d)`.
    assignment: `(n,)` int32, the nearest center of each row.
    inertia: scalar, sum_i w_i ||x_i - (nearest center)||^2.
    iterations: int32 scalar.
    converged: bool scalar; False if `max_iterations` was reached first or a value is not finite.
  """

  centers: Array
  assignment: Array
  inertia: Array
  iterations: Array
  converged: Array


def _check(x, num_clusters, weights, *ranks):
  """The checked rows, number of clusters and weights (ones for None)."""
  x = jnp.asarray(x)
  checks.rank("x", x, *(ranks or range(1, 10)))
  checks.floating("x", x)
  num_clusters = checks.positive_int("num_clusters", num_clusters)
  if num_clusters > x.shape[0]:
    raise ValueError(
      f"num_clusters: expected at most the number of rows, {x.shape[0]}, got {num_clusters}"
    )
  checks.finite("x", x)
  if weights is None:
    return x, num_clusters, jnp.ones(x.shape[:1], x.dtype)
  weights = jnp.asarray(weights, x.dtype)
  checks.shape("weights", weights, x.shape[:1])
  checks.finite("weights", weights)
  checks.non_negative("weights", weights)
  if not checks.is_traced(weights) and not np.any(np.asarray(weights) > 0):
    raise ValueError("weights: expected at least one value > 0, got zeros")
  return x, num_clusters, weights


def kmeans_plusplus(
  key, x: Array, num_clusters: int, weights: Array | None = None, num_trials: int = 1
) -> Seeds:
  """k-means++ seeds: P(i) is proportional to w_i * (distance to the nearest seed)^2.

  The first seed is drawn with P(i) proportional to w_i. With `num_trials=1`, the expected cost is
  at most 8 (ln k + 2) times the optimal cost (Arthur and Vassilvitskii 2007, Theorem 3.1; improved
  to 5 (ln k + 2) by Makarychev et al. 2020). With l > 1 trials, each step draws l rows and keeps
  the one that reduces the cost most. This is usually better, but the known guarantee is weaker, of
  order l^3 log^3 k (Grunau et al. 2023). The default of scikit-learn is 2 + floor(ln k) trials.

  Rows are proposed in blocks and accepted with probability (current squared distance) / (squared
  distance when proposed). The seeds have exactly the distribution of the sequential algorithm, and
  distances are computed by matrix products (rejection sampling as in Cohen-Addad et al., NeurIPS
  2020, but with exact distances).

  Args:
    key: a random key or an int seed.
    x: `(n, d)` rows.
    num_clusters: k, at most n.
    weights: `(n,)`, >= 0, or None for ones. Rows of weight 0 (padding) are ignored.
    num_trials: number of rows drawn per step.

  Returns:
    `Seeds(centers, indices)` in the order of selection. If fewer than k distinct rows have a
    positive weight, the remaining seeds are drawn in proportion to weight from the rows not yet
    selected, and from all rows once these are exhausted. Distances below the rounding error of
    ||x||^2 + ||c||^2 - 2 x.c on centered rows are treated as zero.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, or NaN rows.

  Example:
    >>> seeds = kipcore.kmeans_plusplus(0, jnp.asarray([[0.0], [0.0], [0.0], [1.0]]), 2)
    >>> sorted(seeds.centers.ravel().tolist())  # a row equal to a seed has probability 0
    [0.0, 1.0]
  """
  x, num_clusters, weights = _check(x, num_clusters, weights, 2)
  num_trials = checks.positive_int("num_trials", num_trials)
  indices = _euclidean_seeds(keys.canonical_key(key), x, weights, num_clusters, num_trials)
  return Seeds(x[indices], indices)


def kernel_kmeans_plusplus(
  key,
  kernel_fn: KernelFn,
  x: Array,
  num_clusters: int,
  weights: Array | None = None,
  num_trials: int = 1,
  block_size: int | None = None,
) -> Seeds:
  """`kmeans_plusplus` in the feature space of a kernel: d^2(i, j) = k_ii + k_jj - 2 k_ij.

  The guarantees of `kmeans_plusplus` hold in any Hilbert space. Only the kernel columns of proposed
  rows are evaluated (somewhat more than `num_clusters * num_trials`), and at most `32 * num_trials`
  of them are held at a time. With the linear kernel and the same key, the function selects the same
  rows as `kmeans_plusplus`.

  Args:
    key: a random key or an int seed.
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    num_clusters, weights, num_trials: as for `kmeans_plusplus`.
    block_size: number of rows of a kernel column evaluated at a time; None for all.

  Returns:
    `Seeds(centers, indices)`, with the centers in input space.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, or NaN rows.
  """
  x, num_clusters, weights = _check(x, num_clusters, weights)
  num_trials = checks.positive_int("num_trials", num_trials)
  block_size = checks.optional_positive_int("block_size", block_size)
  indices = _kernel_seeds(
    keys.canonical_key(key),
    pytrees.argument(kernel_fn),
    x,
    weights,
    num_clusters,
    num_trials,
    block_size,
  )
  return Seeds(x[indices], indices)


@functools.partial(jax.jit, static_argnames=("num_seeds", "num_trials"))
def _euclidean_seeds(key, x, weights, num_seeds, num_trials):
  x = x - jnp.mean(x, axis=0, keepdims=True)
  squares = jnp.sum(x * x, axis=1)
  columns = lambda rows: _distances(squares, squares[rows], linalg.matmul(x, x[rows].T), x.shape[1])
  return _seeds(key, columns, weights, num_seeds, num_trials)


@functools.partial(jax.jit, static_argnames=("num_seeds", "num_trials", "block_size"))
def _kernel_seeds(key, kernel_fn, x, weights, num_seeds, num_trials, block_size):
  squares = gram_diag(kernel_fn, x, block_size)
  features = math.prod(x.shape[1:])
  columns = lambda rows: _distances(
    squares, squares[rows], gram(kernel_fn, x, x[rows], block_size), features
  )
  return _seeds(key, columns, weights.astype(squares.dtype), num_seeds, num_trials)


def _distances(squares, center_squares, products, features):
  """Squared distances `(n, b)` from products; those below the rounding error are set to zero."""
  norms = squares[:, None] + center_squares[None]
  distances = norms - 2 * products
  # The rounding error of a sum of `features` products grows like a random walk; this bound is
  # several standard deviations.
  rounding = jnp.finfo(norms.dtype).eps * (4 + math.sqrt(features) / 4)
  return jnp.where(distances <= rounding * norms, 0, distances)


def _seeds(key, columns, weights, num_seeds, num_trials):
  """D^2 seeding by blocks of proposals; `columns(rows)` returns squared distances `(n, b)`."""
  n = weights.shape[0]
  all_rows = jnp.arange(n, dtype=jnp.int32)
  first = draw_few_rows(
    jax.random.uniform(jax.random.fold_in(key, 0), (1, 2), weights.dtype), weights
  )

  def one_round(size, state):
    count, step, nearest, taken, chosen = state
    uniforms = jax.random.uniform(jax.random.fold_in(key, step), (size, 3), weights.dtype)
    # If all distances are zero, draw in proportion to weight from the rows not yet selected.
    spent = ~jnp.any(weights * nearest > 0)
    free = ~taken & (weights > 0)
    start = jnp.where(spent, (free | ~free.any()).astype(nearest.dtype), nearest)
    rows = draw_few_rows(uniforms[:, :2], weights * start)
    distances = jnp.where(
      all_rows[:, None] == rows[None], 0, jnp.where(spent, jnp.inf, columns(rows))
    )
    thresholds = (
      uniforms[:, 2] * start[rows]
    )  # accepted if below the current distance; the weights cancel
    count, current, _, chosen = _accept(
      weights, num_trials, start, rows, distances, thresholds, count, chosen
    )
    added = jnp.where(jnp.arange(num_seeds, dtype=jnp.int32) < count, chosen, n)
    return (
      count,
      step + 1,
      jnp.where(spent, nearest, current),
      taken.at[added].set(True, mode="drop"),
      chosen,
    )

  state = (
    jnp.int32(1),
    jnp.int32(1),
    jnp.where(all_rows == first, 0, columns(first)[:, 0]),
    all_rows == first,
    jnp.broadcast_to(first, (num_seeds,)),
  )
  phases = ((min(_EARLY_SEEDS, num_seeds), _EARLY_STEPS), (num_seeds, _STEPS))
  for limit, steps in phases[: 1 if num_seeds <= _EARLY_SEEDS else 2]:
    body = functools.partial(one_round, min(steps, num_seeds) * num_trials)
    state = jax.lax.while_loop(lambda s, limit=limit: s[0] < limit, body, state)
  return state[-1]


def _accept(weights, num_trials, start, rows, distances, thresholds, count, chosen):
  """Selects the proposal with the lowest cost out of every `num_trials` accepted ones as a seed."""
  positions = jnp.arange(rows.shape[0], dtype=jnp.int32)
  usable = lambda nearest, pointer: (thresholds < nearest[rows]) & (positions >= pointer)
  another = lambda carry: (
    (carry[0] < chosen.shape[0]) & (jnp.sum(usable(carry[1], carry[2])) >= num_trials)
  )

  def step(carry):
    count, nearest, pointer, chosen = carry
    ok = usable(nearest, pointer)
    trials = jnp.sort(jnp.where(ok, positions, rows.shape[0]))[:num_trials]
    best = trials[0]
    if num_trials > 1:
      best = trials[
        jnp.argmin(linalg.matmul(weights, jnp.minimum(nearest[:, None], distances[:, trials])))
      ]
    nearest = jnp.minimum(nearest, distances[:, best])
    return count + 1, nearest, trials[-1] + 1, chosen.at[count].set(rows[best])

  return jax.lax.while_loop(another, step, (count, start, jnp.int32(0), chosen))


def kmeans(
  key,
  x: Array,
  num_clusters: int,
  weights: Array | None = None,
  *,
  num_trials: int = 1,
  num_inits: int = 1,
  max_iterations: int = 100,
  tolerance: float = 1e-4,
  block_size: int | None = None,
) -> KMeansResult:
  """Lloyd's algorithm from k-means++ seeds: each center moves to the weighted mean of its rows.

  The cost never increases (up to rounding), so the bound of `kmeans_plusplus` also holds for the
  result. No stronger bound is proved. The centers of empty clusters move to the rows with the
  largest w_i d_i^2, or stay if these values are zero. The iteration stops when the sum of
  squared changes of the centers is at most `tolerance` times the mean variance of the features, as
  in scikit-learn.

  Args:
    key: a random key or an int seed.
    x: `(n, d)` rows.
    num_clusters: k, at most n.
    weights: `(n,)`, >= 0, or None for ones. Rows of weight 0 have no influence.
    num_trials: as for `kmeans_plusplus`.
    num_inits: number of independent starts; the result with the lowest cost is returned.
    max_iterations: maximum number of iterations.
    tolerance: relative tolerance of the stopping rule.
    block_size: number of rows whose distances to all centers are held at a time; None for about two
      million distances.

  Returns:
    `KMeansResult`. The last bits can differ between runs on accelerators whose scatter-add has no
    fixed order.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, or NaN rows.

  Example:
    >>> result = kipcore.kmeans(0, jnp.asarray([[0.0], [1.0], [10.0], [11.0]]), 2)
    >>> sorted(result.centers.ravel().tolist()), float(result.inertia)
    ([0.5, 10.5], 1.0)
  """
  x, num_clusters, weights = _check(x, num_clusters, weights, 2)
  num_trials, num_inits, max_iterations = checks.positive_ints(
    num_trials=num_trials, num_inits=num_inits, max_iterations=max_iterations
  )
  checks.non_negative("tolerance", tolerance)
  block_size = max(256, _BLOCK_ENTRIES // num_clusters) if block_size is None else block_size
  block_size = checks.positive_int("block_size", block_size)
  return _kmeans(
    keys.canonical_key(key),
    x,
    weights,
    jnp.asarray(tolerance, x.dtype),
    jnp.int32(max_iterations),
    num_clusters,
    num_trials,
    num_inits,
    block_size,
  )


def padded_kmeans(
  key, x, num_clusters, weights, count, num_trials, num_inits, max_iterations=100
) -> KMeansResult:
  """`kmeans` for checked input that uses only the first `count` centers; None for all.

  Problems of one shape with different numbers of clusters share one compilation.
  """
  return _kmeans(
    key,
    x,
    weights,
    jnp.asarray(1e-4, x.dtype),
    jnp.int32(max_iterations),
    num_clusters,
    num_trials,
    num_inits,
    max(256, _BLOCK_ENTRIES // num_clusters),
    None if count is None else jnp.int32(count),
  )


@functools.partial(
  jax.jit, static_argnames=("num_clusters", "num_trials", "num_inits", "block_size")
)
def _kmeans(
  key,
  x,
  weights,
  tolerance,
  max_iterations,
  num_clusters,
  num_trials,
  num_inits,
  block_size,
  count=None,
):
  """The core of `kmeans`; of `num_clusters` centers only the first `count` (traced) are used."""
  used = None if count is None else jnp.arange(num_clusters) < count
  total = jnp.sum(weights)
  shift = linalg.matmul(weights[None], x) / total
  x = x - shift
  variance = jnp.sum(weights * jnp.sum(x * x, axis=1)) / (total * x.shape[1])

  def update(carry):
    centers, step, _ = carry
    assignment, distances = _assign(x, centers, block_size, used)
    sums = jax.ops.segment_sum(weights[:, None] * x, assignment, num_clusters)
    masses = jax.ops.segment_sum(weights, assignment, num_clusters)
    empty = masses <= 0 if used is None else (masses <= 0) & used
    moved = jnp.where(
      (masses <= 0)[:, None], centers, sums / jnp.where(masses <= 0, 1, masses)[:, None]
    )
    values, rows = jax.lax.top_k(weights * distances, num_clusters)
    order = jnp.maximum(jnp.cumsum(empty, dtype=jnp.int32) - 1, 0)
    moved = jnp.where((empty & (values[order] > 0))[:, None], x[rows[order]], moved)
    return moved, step + 1, jnp.sum((moved - centers) ** 2)

  def run(key):
    start = x[_euclidean_seeds(key, x, weights, num_clusters, num_trials)]
    infinite = jnp.asarray(jnp.inf, x.dtype)
    centers, step, move = jax.lax.while_loop(
      lambda c: ~(c[2] <= tolerance * variance) & (c[1] < max_iterations),
      update,
      (start, jnp.int32(0), infinite),
    )
    assignment, _ = _assign(x, centers, block_size, used)
    inertia = jnp.sum(weights * jnp.sum((x - centers[assignment]) ** 2, axis=1))
    return KMeansResult(centers + shift, assignment, inertia, step, move <= tolerance * variance)

  runs = jax.lax.map(run, jax.random.split(key, num_inits))
  return jax.tree.map(lambda a: a[jnp.argmin(runs.inertia)], runs)


def _assign(x, centers, block_size, used=None):
  """The nearest center of each row, among those that are used, and the squared distance to it."""

  def block(rows):
    distances = jnp.sum(rows * rows, axis=1)[:, None] + jnp.sum(centers * centers, axis=1)[None]
    distances = jnp.maximum(distances - 2 * linalg.matmul(rows, centers.T), 0)
    if used is not None:
      distances = jnp.where(used[None], distances, jnp.inf)
    return jnp.argmin(distances, axis=1).astype(jnp.int32), jnp.min(distances, axis=1)

  return blocks.map_row_blocks(block, x, block_size)


@functools.partial(jax.jit, static_argnames="block_size")
def nearest_masses(x, centers, weights, used, block_size):
  """The weight of the rows nearest to each center, `(k,)`; only centers with `used` count."""
  shift = jnp.mean(x, axis=0, keepdims=True)
  assignment, _ = _assign(x - shift, centers - shift, block_size, used)
  return jax.ops.segment_sum(weights, assignment, centers.shape[0])


def nearest_rows(x: Array, centers: Array, weights: Array | None = None) -> Array:
  """Medoids: each center in turn takes the nearest free row, and ties go to the first row.

  Args:
    x: `(n, d)` rows.
    centers: `(k, d)`, k <= n.
    weights: `(n,)` or None. Rows of weight 0 (padding) are used only if no others are left.

  Returns:
    `(k,)` int32 distinct row indices.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, NaN rows, or fewer than k rows of
      positive weight.
  """
  centers = jnp.asarray(centers)
  checks.rank("centers", centers, 2)
  checks.floating("centers", centers)
  checks.finite("centers", centers)
  x, _, weights = _check(x, centers.shape[0], weights, 2)
  checks.shape("centers", centers, (None, x.shape[1]))
  if not checks.is_traced(weights) and np.sum(np.asarray(weights) > 0) < centers.shape[0]:
    raise ValueError(
      f"expected {centers.shape[0]} rows of positive weight, got {np.sum(np.asarray(weights) > 0)}"
    )
  return _nearest_rows(x, centers.astype(x.dtype), weights > 0)


def padded_nearest_rows(x, centers, weights) -> Array:
  """`nearest_rows` for checked input; the rows of the first centers do not depend on the others."""
  return _nearest_rows(x, centers, weights > 0)


@jax.jit
def _nearest_rows(x, centers, eligible):
  k, size = centers.shape[0], min(_STEPS, centers.shape[0])
  shift = jnp.mean(x, axis=0, keepdims=True)
  x, centers = x - shift, jnp.pad(centers - shift, ((0, -k % size), (0, 0)))
  squares = jnp.sum(x * x, axis=1)

  def block(penalty, group):
    distances = squares[:, None] - 2 * linalg.matmul(x, group.T)  # up to a constant per center

    def take(penalty, j):
      row = jnp.argmin(jnp.where(penalty == jnp.min(penalty), distances[:, j], jnp.inf)).astype(
        jnp.int32
      )
      return penalty.at[row].set(2), row

    return jax.lax.scan(take, penalty, jnp.arange(size))

  penalty = jnp.where(eligible, jnp.int32(0), jnp.int32(1))
  return jax.lax.scan(block, penalty, centers.reshape(-1, size, x.shape[1]))[1].reshape(-1)[:k]
