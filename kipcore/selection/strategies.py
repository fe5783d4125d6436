"""Selection within groups of rows (classes), shared by `select_coreset` and `select`.

Internal to this package; input is checked. Groups are padded to the largest, with rows of weight 0,
so that all of them share one compilation. The same holds for numbers of points that differ.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kipcore import keys, linalg
from kipcore.selection import clustering, representatives
from kipcore.types import Array

_BLOCK_ENTRIES = 2**21


class Points(NamedTuple):
  """Points of one group: `points` `(k, d)`, `rows` `(k,)` of the data (-1: synthetic), `masses` `(k,)`.

  Masses are the weights of the clusters, and equal shares for seeds.
  """

  points: Array
  rows: np.ndarray
  masses: Array


def trials(k: int) -> int:
  """Number of trials of greedy k-means++, as in scikit-learn."""
  return 2 + int(np.log(k))


def by_group(x, groups, weights=None) -> Iterator[tuple[np.ndarray, Array, Array]]:
  """Yields for each group its row indices, its rows as vectors, and their weights (1 for None).

  Rows and weights are padded to the size of the largest group, with weight 0.
  """
  flat = x.reshape(x.shape[0], -1)
  for rows, padded, mass in padded_groups(groups, weights, x.dtype):
    yield rows, flat[padded], mass


def padded_groups(groups, weights, dtype) -> Iterator[tuple[np.ndarray, np.ndarray, Array]]:
  """`by_group` with indices instead of the rows themselves."""
  longest = int(np.bincount(groups).max())
  for c in np.unique(groups):
    rows = np.flatnonzero(groups == c)
    padded = np.resize(rows, longest)
    own = 1.0 if weights is None else np.asarray(weights)[padded]
    yield rows, padded, jnp.asarray(np.where(np.arange(longest) < rows.size, own, 0), dtype)


def cluster(key, x, groups, quotas, strategies, weights=None, **options) -> dict[str, list[Points]]:
  """Centroids, medoids or seeds of k-means in each group; kmeans and kmedoids share one clustering.

  Args:
    key: random key.
    x: `(n, ...)` rows.
    groups: `(n,)` integers in 0..C-1, without gaps.
    quotas: `(C,)` number of points of each group, at most the number of its rows.
    strategies: of "kmeans", "kmedoids" and "kmeans_plusplus".
    weights: `(n,)` weights > 0 of the rows, or None.
    **options: of `clustering.kmeans`: `num_inits` (default 2) and `max_iterations`.

  Returns:
    For each strategy the points of each group.
  """
  found: dict[str, list[Points]] = {strategy: [] for strategy in strategies}
  most = int(max(quotas))
  options = {"num_trials": trials(most), "num_inits": 2, **options}
  for (rows, padded, mass), quota in zip(by_group(x, groups, weights), quotas):
    class_key = keys.at_step(keys.stream(key, "cluster"), int(groups[rows[0]]))
    named = lambda chosen, rows=rows, quota=quota: rows[np.asarray(chosen)[:quota]].astype(np.int32)
    if "kmeans_plusplus" in found:
      seeds = clustering.kmeans_plusplus(
        class_key, padded, most, mass, num_trials=options["num_trials"]
      )
      total = rows.size if weights is None else np.sum(np.asarray(weights)[rows])
      share = jnp.full((quota,), total / quota, x.dtype)
      found["kmeans_plusplus"].append(Points(seeds.centers[:quota], named(seeds.indices), share))
    if "kmeans" in found or "kmedoids" in found:
      count = None if (quotas == most).all() else quota
      result = clustering.padded_kmeans(class_key, padded, most, mass, count, **options)
      masses = jnp.zeros((most,), x.dtype).at[result.assignment].add(mass)[:quota]
      masses = shared_masses(result.centers[:quota], masses)
      if "kmeans" in found:
        made = np.full(quota, -1, np.int32)
        found["kmeans"].append(Points(result.centers[:quota], made, masses))
      if "kmedoids" in found:
        # The centers after the first `quota` come last, and do not change the choice of these.
        chosen = clustering.padded_nearest_rows(padded, result.centers, mass)[:quota]
        found["kmedoids"].append(Points(padded[chosen], named(chosen), masses))
  return found


def greedy(strategy: str, x, groups, quotas, weights=None) -> list[np.ndarray]:
  """Rows of each group in the order of `representatives.herding` or `k_center`."""
  most = int(max(quotas))
  choose = representatives.PADDED[strategy]
  return [
    # The first rows do not depend on the number of rows.
    rows[np.asarray(choose(most, padded, mass > 0, mass))[:quota]]
    for (rows, padded, mass), quota in zip(by_group(x, groups, weights), quotas)
  ]


def nearest_masses(x, groups, chosen: list[np.ndarray], weights=None) -> list[Array]:
  """For each chosen row, the weight of the rows of its group that are nearest to it.

  A chosen row belongs to itself. Equal rows share their weight.
  """
  most = max(len(rows) for rows in chosen)
  flat, masses = x.reshape(x.shape[0], -1), []
  block = max(256, _BLOCK_ENTRIES // most)
  for (_, padded, mass), rows in zip(by_group(x, groups, weights), chosen):
    centers, used = flat[np.resize(rows, most)], jnp.arange(most) < len(rows)
    own = clustering.nearest_masses(padded, centers, mass, used, block)[: len(rows)]
    masses.append(shared_masses(flat[rows], own))
  return masses


def shared_masses(centers, mass):
  """Cluster masses in which each empty cluster shares the mass of the nearest nonempty cluster.

  The sum is unchanged. Clusters are empty if there are fewer distinct rows than clusters; their
  centers are copies of other centers.
  """
  empty = np.asarray(mass) <= 0
  if not empty.any():
    return mass
  distances = np.asarray(linalg.squared_distances(centers))
  owner = np.where(
    empty, np.argmin(np.where(empty[None], np.inf, distances), axis=1), np.arange(len(empty))
  )
  return mass[owner] / jnp.asarray(np.bincount(owner, minlength=len(empty))[owner], mass.dtype)
