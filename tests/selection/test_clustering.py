"""D^2 seeding has the right law, Lloyd never raises the cost, and medoids are distinct real rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, assert_close, slow_except
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.cluster import kmeans_plusplus as sklearn_plusplus
from sklearn.datasets import load_digits, make_blobs

from kipcore.selection import clustering
from kipcore.selection.clustering import (
  KMeansResult,
  kernel_kmeans_plusplus,
  kmeans,
  kmeans_plusplus,
  nearest_rows,
)
from kipcore.selection.draws import draw_few_rows


def linear(a, b=None):
  return jnp.matmul(a, (a if b is None else b).T, precision="highest")


def rbf(a, b=None):
  b = a if b is None else b
  return jnp.exp(-0.5 * jnp.sum((a[:, None] - b[None]) ** 2, axis=2))


def squared_distances(x, centers):
  x, centers = np.asarray(x, np.float64), np.asarray(centers, np.float64)
  return ((x[:, None] - centers[None]) ** 2).sum(2)


def cost(x, centers, weights=None):
  nearest = squared_distances(x, centers).min(1)
  return nearest.sum() if weights is None else (np.asarray(weights) * nearest).sum()


def blobs(n=300, d=5, centers=10, seed=0):
  return make_blobs(n, d, centers=centers, random_state=seed)[0]


def chi_square_p(counts, probabilities):
  """p-value of counts under a law; entries that the law excludes must be empty."""
  assert counts[probabilities == 0].sum() == 0
  keep = probabilities > 0
  return stats.chisquare(
    counts[keep], counts.sum() * probabilities[keep] / probabilities.sum()
  ).pvalue


@functools.partial(jax.jit, static_argnums=2)
def draw(key, weights, num_draws):
  return draw_few_rows(jax.random.uniform(key, (num_draws, 2), weights.dtype), weights)


class TestDrawRows:
  def test_distribution(self, dtype):
    weights = np.array([0, 3, 0, 1, 2, 0, 5, 0, 0, 0.5, 0])
    draws = np.asarray(draw(jax.random.key(0), jnp.asarray(weights, dtype), 20_000))
    assert chi_square_p(np.bincount(draws, minlength=11), weights) > 1e-3

  # In float32, the rounding of cumulative sums grows with the number of rows.
  @pytest.mark.parametrize("n", slow_except([200_000, 2_000_000], 200_000))
  def test_rows_of_zero_weight_are_never_drawn(self, n):
    weights = np.random.default_rng(0).uniform(size=n).astype(np.float32)
    weights[::2] = 0
    draws = np.concatenate(
      [np.asarray(draw(jax.random.key(i), jnp.asarray(weights), 4_000)) for i in range(15)]
    )
    assert (weights[draws] > 0).all()
    bins = np.bincount(draws // (n // 20), minlength=20)
    assert chi_square_p(bins, weights.reshape(20, -1).sum(1, dtype=np.float64)) > 1e-3

  def test_tiny_and_huge_weights(self, dtype):
    weights = jnp.zeros(1000, dtype).at[jnp.array([3, 997])].set(jnp.array([1e-20, 1e10], dtype))
    assert set(np.asarray(draw(jax.random.key(0), weights, 500)).tolist()) == {997}


class TestSeedingLaw:
  """The block of proposals with rejection against the sequential law, enumerated."""

  x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 0.0], [-2.0, 1.0]])
  weights = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 0.0])

  def sequences(self, k, draws, **kwargs):
    x, weights = jnp.asarray(self.x), jnp.asarray(self.weights)
    run = jax.jit(jax.vmap(lambda key: kmeans_plusplus(key, x, k, weights, **kwargs)[1]))
    return np.asarray(run(jax.random.split(jax.random.key(1), draws)))

  def law(self, previous):
    if not previous:
      return self.weights
    return self.weights * squared_distances(self.x, self.x[list(previous)]).min(1)

  def test_distribution_of_seed_sequences(self, x64):
    k = 4
    drawn = self.sequences(k, 20_000)
    expected = {}

    def extend(previous, p):
      if len(previous) == k:
        expected[previous] = p
        return
      law = self.law(previous)
      for i in np.flatnonzero(law):
        extend((*previous, int(i)), p * law[i] / law.sum())

    extend((), 1.0)
    assert sum(expected.values()) == pytest.approx(1)
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    counts = {tuple(map(int, s)): int(c) for s, c in zip(found, counts)}
    assert set(counts) <= set(expected)
    names = sorted(expected)
    p = np.array([expected[s] for s in names])
    order = np.argsort(p)
    # Rare sequences are pooled, so that the chi-square law holds.
    pooled = p[order].cumsum() * len(drawn) < 20
    observed = np.array([counts.get(s, 0) for s in names], float)[order]
    if pooled.any():
      observed = np.append(observed[~pooled], observed[pooled].sum())
      p = np.append(p[order][~pooled], p[order][pooled].sum())
    else:
      p = p[order]
    assert chi_square_p(observed, p) > 1e-3

  def test_greedy_selects_the_best_trial(self, x64):
    """With two trials, P(pair of seeds) = P(first) * P(it is the better of two independent draws)."""
    drawn = self.sequences(2, 20_000, num_trials=2)
    first = self.weights / self.weights.sum()
    expected = np.zeros((6, 6))
    for i in np.flatnonzero(first):
      law = self.law((i,)) / self.law((i,)).sum()
      after = [cost(self.x, self.x[[i, j]], self.weights) for j in range(6)]
      for a in range(6):
        for b in range(6):
          expected[i, a if after[a] <= after[b] else b] += first[i] * law[a] * law[b]
    # Rows 1 and 4 coincide, so either may stand for both.
    expected[:, 1] += expected[:, 4]
    expected[1] += expected[4]
    counts = np.zeros((6, 6))
    np.add.at(
      counts,
      (np.where(drawn[:, 0] == 4, 1, drawn[:, 0]), np.where(drawn[:, 1] == 4, 1, drawn[:, 1])),
      1,
    )
    keep = [0, 1, 2, 3, 5]
    assert (
      chi_square_p(counts[np.ix_(keep, keep)].ravel(), expected[np.ix_(keep, keep)].ravel()) > 1e-3
    )

  def test_many_seeds_match_a_sequential_loop(self, x64):
    """Past the early blocks too: mean cost after 60 seeds equals that of a sequential NumPy loop."""
    x = np.random.default_rng(0).normal(size=(200, 3))
    rng = np.random.default_rng(1)

    def loop():
      chosen = [rng.integers(200)]
      nearest = squared_distances(x, x[chosen])[:, 0]
      for _ in range(59):
        chosen.append(rng.choice(200, p=nearest / nearest.sum()))
        nearest = np.minimum(nearest, ((x - x[chosen[-1]]) ** 2).sum(1))
      return nearest.sum()

    reference = np.array([loop() for _ in range(200)])
    run = jax.jit(jax.vmap(lambda key: kmeans_plusplus(key, jnp.asarray(x), 60)[0]))
    ours = np.array([cost(x, c) for c in run(jax.random.split(jax.random.key(0), 300))])
    error = np.sqrt(ours.var() / 300 + reference.var() / 200)
    assert abs(ours.mean() - reference.mean()) < 4 * error


class TestSeeding:
  @FLOAT64_IS_SLOW
  def test_basic(self, dtype):
    x = jnp.asarray(blobs(), dtype)
    centers, indices = kmeans_plusplus(jax.random.key(0), x, 25)
    assert centers.dtype == dtype and indices.dtype == jnp.int32
    assert len(set(np.asarray(indices).tolist())) == 25
    np.testing.assert_array_equal(centers, x[indices])
    again = kmeans_plusplus(jax.random.key(0), x, 25)
    np.testing.assert_array_equal(indices, again.indices)
    assert not np.array_equal(indices, kmeans_plusplus(jax.random.key(1), x, 25).indices)

  @pytest.mark.parametrize("num_trials", [1, 3])
  @FLOAT64_IS_SLOW
  def test_duplicates_only_after_all_distinct_rows(self, dtype, num_trials):
    """Coordinates far from zero: float32 products of such rows do not cancel exactly."""
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(8, 40)) + 100
    x = jnp.asarray(np.repeat(distinct, 6, axis=0), dtype)
    for seed in range(10):
      indices = np.asarray(
        kmeans_plusplus(jax.random.key(seed), x, 12, num_trials=num_trials).indices
      )
      assert set((indices[:8] // 6).tolist()) == set(range(8))
      assert len(set(indices.tolist())) == 12

  @FLOAT64_IS_SLOW
  def test_constant_rows_and_edges(self, dtype):
    same = jnp.ones((5, 3), dtype)
    assert sorted(np.asarray(kmeans_plusplus(0, same, 5).indices).tolist()) == [0, 1, 2, 3, 4]
    assert kmeans_plusplus(0, same[:1], 1).indices.tolist() == [0]
    padded = kmeans_plusplus(0, same, 5, weights=jnp.array([0, 1, 1, 0, 0], dtype)).indices
    assert set(np.asarray(padded).tolist()) == {1, 2}

  @FLOAT64_IS_SLOW
  def test_rows_of_zero_weight_are_ignored(self, dtype):
    x = jnp.asarray(blobs(), dtype)
    weights = jnp.asarray(np.arange(300) % 30 == 0, dtype)
    for seed in range(5):
      indices = np.asarray(kmeans_plusplus(jax.random.key(seed), x, 10, weights).indices)
      assert sorted(indices.tolist()) == list(range(0, 300, 30))

  def test_jit(self, x64):
    x = jnp.asarray(blobs())
    outer = jax.jit(lambda key, x: kmeans_plusplus(key, x, 10).indices)(jax.random.key(0), x)
    np.testing.assert_array_equal(outer, kmeans_plusplus(jax.random.key(0), x, 10).indices)

  def test_vmap_over_classes(self, x64):
    num_trials = 2
    x = jnp.asarray(blobs(240).reshape(3, 80, 5))
    weights = (jnp.arange(80)[None] < jnp.array([80, 50, 33])[:, None]).astype(jnp.float64)
    split = jax.random.split(jax.random.key(0), 3)
    seeds = lambda key, x, w: kmeans_plusplus(key, x, 12, w, num_trials).indices
    together = jax.vmap(seeds)(split, x, weights)
    for c in range(3):
      np.testing.assert_array_equal(together[c], seeds(split[c], x[c], weights[c]))
      assert np.asarray(weights[c])[np.asarray(together[c])].all()

  @pytest.mark.parametrize("num_trials", [1, 3])
  def test_linear_kernel_matches_euclidean_seeding(self, x64, num_trials):
    x = jnp.asarray(load_digits().data[:200]) / 16
    for seed in range(5):
      key = jax.random.key(seed)
      euclidean = kmeans_plusplus(key, x, 15, num_trials=num_trials)
      np.testing.assert_array_equal(
        euclidean.indices,
        kernel_kmeans_plusplus(key, linear, x, 15, num_trials=num_trials, block_size=70).indices,
      )

  def test_kernel_distribution(self, x64):
    """The second seed of an RBF kernel follows 2 - 2 k(i, first)."""
    x = jnp.asarray(TestSeedingLaw.x)
    run = jax.jit(jax.vmap(lambda key: kernel_kmeans_plusplus(key, rbf, x, 2).indices))
    drawn = np.asarray(run(jax.random.split(jax.random.key(0), 20_000)))
    law = 2 - 2 * np.exp(-0.5 * squared_distances(x, x))
    np.fill_diagonal(law, 0)
    counts = np.zeros((6, 6))
    np.add.at(counts, (drawn[:, 0], drawn[:, 1]), 1)
    assert chi_square_p(counts.ravel(), (law / law.sum(1, keepdims=True)).ravel()) > 1e-3

  @pytest.mark.parametrize("num_trials", slow_except([1, None], None))
  @pytest.mark.parametrize("name", ["blobs", "digits"])
  def test_cost_matches_scikit_learn(self, name, num_trials):
    x, k = (blobs(1000, 8, 20), 20) if name == "blobs" else (load_digits().data[:600], 30)
    ours, theirs = [], []
    for seed in range(30):
      trials = num_trials or 2 + int(np.log(k))
      centers, _ = kmeans_plusplus(
        jax.random.key(seed), jnp.asarray(x, jnp.float32), k, num_trials=trials
      )
      ours.append(cost(x, centers))
      theirs.append(
        cost(x, sklearn_plusplus(x, k, n_local_trials=num_trials, random_state=seed)[0])
      )
    ratio = np.mean(ours) / np.mean(theirs)
    error = (
      ratio
      * np.sqrt(np.var(ours) / np.mean(ours) ** 2 + np.var(theirs) / np.mean(theirs) ** 2)
      / np.sqrt(30)
    )
    assert abs(ratio - 1) < max(0.05, 3 * error), ratio

  def test_expected_cost_bound(self, x64):
    run = jax.jit(jax.vmap(lambda key, x: kmeans_plusplus(key, x, 6).centers, (0, None)))
    for instance in range(20):
      x = blobs(150, 3, 3 + instance % 6, seed=instance)
      best = KMeans(6, n_init=5, random_state=0).fit(x).inertia_
      mean = np.mean(
        [cost(x, c) for c in run(jax.random.split(jax.random.key(instance), 20), jnp.asarray(x))]
      )
      assert mean <= 5 * (np.log(6) + 2) * best

  def test_rare_cluster(self):
    """5 of 345 rows far away: D^2 seeding finds them; uniform draws would in about 1 of 7 runs."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(340, 4)), rng.normal(size=(5, 4)) + 100]).astype(
      np.float32
    )
    run = jax.vmap(lambda key: kmeans_plusplus(key, jnp.asarray(x), 10).indices)
    found = (np.asarray(run(jax.random.split(jax.random.key(0), 1000))) >= 340).any(1)
    assert found.mean() >= 0.99

  def test_no_recompilation(self):
    x = jnp.asarray(blobs(), jnp.float32)
    kmeans_plusplus(jax.random.key(0), x, 10)
    kmeans(jax.random.key(0), x, 10)
    before = clustering._euclidean_seeds._cache_size(), clustering._kmeans._cache_size()
    kmeans_plusplus(jax.random.key(1), x + 1, 10)
    kmeans(jax.random.key(1), x, 10, tolerance=1e-3, max_iterations=3)
    assert before == (clustering._euclidean_seeds._cache_size(), clustering._kmeans._cache_size())

  def test_invalid_input_raises(self):
    x = jnp.ones((6, 2))
    with pytest.raises(ValueError, match="at most the number of rows, 6"):
      kmeans_plusplus(0, x, 7)
    with pytest.raises(ValueError, match="expected a positive integer"):
      kmeans_plusplus(0, x, 0)
    with pytest.raises(ValueError, match="dimensions"):
      kmeans_plusplus(0, jnp.ones(3), 2)
    with pytest.raises(TypeError, match="floating"):
      kmeans_plusplus(0, jnp.ones((6, 2), jnp.int32), 2)
    with pytest.raises(ValueError, match="expected finite"):
      kmeans_plusplus(0, x.at[2, 1].set(jnp.nan), 2)
    with pytest.raises(ValueError, match="weights: expected shape"):
      kmeans_plusplus(0, x, 2, weights=jnp.ones(5))
    with pytest.raises(ValueError, match=">= 0"):
      kmeans_plusplus(0, x, 2, weights=-jnp.ones(6))
    with pytest.raises(ValueError, match="got zeros"):
      kmeans_plusplus(0, x, 2, weights=jnp.zeros(6))
    with pytest.raises(ValueError, match="expected finite"):
      kmeans(0, x * jnp.inf, 2)


class TestLloyd:
  @FLOAT64_IS_SLOW
  def test_result_is_a_fixed_point(self, dtype):
    x = jnp.asarray(blobs(), dtype)
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 4, 300), dtype)
    result = kmeans(jax.random.key(0), x, 10, weights, tolerance=0.0)
    assert isinstance(result, KMeansResult) and bool(result.converged)
    distances = squared_distances(x, result.centers)
    assignment = np.asarray(result.assignment)
    chosen = distances[np.arange(300), assignment]
    assert_close(chosen, distances.min(1), RTOL[dtype.name])
    w = np.asarray(weights, np.float64)
    assert_close(result.inertia, (w * distances.min(1)).sum(), 10 * RTOL[dtype.name])
    means = np.stack(
      [
        np.average(np.asarray(x, np.float64)[assignment == c], axis=0, weights=w[assignment == c])
        for c in range(10)
      ]
    )
    assert_close(result.centers, means, 10 * RTOL[dtype.name])

  def test_inertia_never_increases(self):
    x = jnp.asarray(load_digits().data, jnp.float32)
    runs = [kmeans(jax.random.key(0), x, 10, max_iterations=i, tolerance=0.0) for i in range(1, 9)]
    path = [float(run.inertia) for run in runs]
    assert all(b <= a * (1 + RTOL["float32"]) for a, b in zip(path, path[1:]))
    seeds = kmeans_plusplus(jax.random.split(jax.random.key(0), 1)[0], x, 10).centers
    assert path[-1] < path[0] < cost(x, seeds)
    assert int(runs[1].iterations) == 2 and not bool(runs[1].converged)

  def test_as_good_as_scikit_learn(self):
    x = load_digits().data
    ours = [
      float(kmeans(jax.random.key(s), jnp.asarray(x, jnp.float32), 10).inertia) for s in range(10)
    ]
    theirs = [KMeans(10, n_init=1, random_state=s).fit(x).inertia_ for s in range(10)]
    assert 0.97 < np.mean(ours) / np.mean(theirs) < 1.03

  def test_blocks_and_inits(self, x64):
    x = jnp.asarray(blobs())
    whole = kmeans(jax.random.key(0), x, 10)
    blocked = kmeans(jax.random.key(0), x, 10, block_size=37)
    assert_close(blocked.centers, whole.centers, 1e-12)
    np.testing.assert_array_equal(blocked.assignment, whole.assignment)
    best = kmeans(jax.random.key(0), x, 10, num_inits=5)
    single = [float(kmeans(jax.random.key(s), x, 10).inertia) for s in range(5)]
    assert float(best.inertia) <= np.mean(single)

  def test_integer_weights_equal_repeated_rows(self, x64):
    """The optimum of well-separated blobs is found by both, and it is the same."""
    x = make_blobs(40, 2, centers=[[0, 0], [50, 0], [0, 50]], random_state=0)[0]
    copies = np.random.default_rng(0).integers(1, 4, 40)
    weighted = kmeans(
      jax.random.key(0), jnp.asarray(x), 3, jnp.asarray(copies, float), tolerance=0.0
    )
    repeated = KMeans(3, n_init=5, random_state=0, tol=0).fit(np.repeat(x, copies, axis=0))
    assert_close(weighted.inertia, repeated.inertia_, 1e-10)
    assert_close(
      np.sort(weighted.centers, axis=0), np.sort(repeated.cluster_centers_, axis=0), 1e-10
    )

  @FLOAT64_IS_SLOW
  def test_more_clusters_than_distinct_rows(self, dtype):
    x = jnp.asarray(np.repeat([[0.0, 0.0], [5.0, 5.0], [9.0, 1.0]], [50, 1, 1], axis=0), dtype)
    result = kmeans(jax.random.key(0), x, 6)
    assert (
      bool(result.converged)
      and float(result.inertia) <= 1e-6
      and bool(jnp.isfinite(result.centers).all())
    )

  def test_empty_cluster_moves_to_a_distant_row(self, x64, monkeypatch):
    """Coinciding seeds leave one of two clusters empty; it moves to a far row, and the optimum is found."""
    x = jnp.asarray(make_blobs(40, 2, centers=[[0, 0], [50, 0]], random_state=0)[0])
    monkeypatch.setattr(
      clustering, "_euclidean_seeds", lambda key, x, w, k, t: jnp.zeros(k, jnp.int32)
    )
    result = clustering._kmeans.__wrapped__(
      jax.random.key(0), x, jnp.ones(40), jnp.asarray(0.0), jnp.int32(50), 2, 1, 1, 256
    )
    assert_close(result.inertia, KMeans(2, n_init=5, random_state=0).fit(x).inertia_, 1e-9)
    assert np.bincount(np.asarray(result.assignment)).tolist() == [20, 20]

  def test_vmap_over_padded_classes(self, x64):
    x = jnp.asarray(blobs(240).reshape(3, 80, 5))
    weights = (jnp.arange(80)[None] < jnp.array([80, 50, 33])[:, None]).astype(jnp.float64)
    x = jnp.where(weights[:, :, None] > 0, x, 1e3)
    split = jax.random.split(jax.random.key(0), 3)
    run = lambda key, x, w: kmeans(key, x, 4, w, tolerance=0.0)
    together = jax.vmap(run)(split, x, weights)
    for c in range(3):
      alone = run(split[c], x[c], weights[c])
      assert_close(together.centers[c], alone.centers, 1e-9)
      rows = np.asarray(x[c])[np.asarray(weights[c]) > 0]
      assert_close(alone.inertia, cost(rows, alone.centers), 1e-9)


class TestNearestRows:
  def test_nearest_rows_without_conflicts(self, dtype):
    x = jnp.asarray(blobs(), dtype)
    centers = kmeans(jax.random.key(0), x, 10).centers
    rows = np.asarray(nearest_rows(x, centers))
    assert len(set(rows.tolist())) == 10
    distances = squared_distances(x, centers)
    assert_close(distances[rows, np.arange(10)], distances.min(0), RTOL[dtype.name])

  def test_conflicts_are_resolved_in_order(self, x64):
    """More centers than a block holds; a plain loop in order gives the same rows."""
    rng = np.random.default_rng(0)
    x, centers = rng.normal(size=(90, 3)), 0.3 * rng.normal(size=(70, 3))
    distances = squared_distances(x, centers)
    expected = []
    for c in range(70):
      distances[expected, c] = np.inf
      expected.append(int(distances[:, c].argmin()))
    assert nearest_rows(jnp.asarray(x), jnp.asarray(centers)).tolist() == expected

  def test_ties_and_padding(self, dtype):
    x = jnp.ones((6, 2), dtype)
    assert nearest_rows(x, jnp.ones((4, 2), dtype)).tolist() == [0, 1, 2, 3]
    weights = jnp.array([0, 1, 0, 1, 1, 0], dtype)
    assert nearest_rows(x, jnp.ones((3, 2), dtype), weights).tolist() == [1, 3, 4]
    padded = jax.vmap(lambda w: nearest_rows(x, jnp.ones((3, 2), dtype), w))(weights[None])[0]
    assert padded.tolist() == [1, 3, 4]
    with pytest.raises(ValueError, match="positive weight, got 3"):
      nearest_rows(x, jnp.ones((4, 2), dtype), weights)
    with pytest.raises(ValueError, match="expected shape"):
      nearest_rows(x, jnp.ones((4, 3), dtype))
