"""Draws: exact laws, unbiased weights, static shapes and documented errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, assert_close

from kipcore.selection import draws, sampling
from kipcore.types import Status

N, M = 60, 12
LABELS = np.repeat([3, 5, 9], [30, 20, 10])


def skewed(dtype, n=N, seed=0):
  return jnp.asarray(np.random.default_rng(seed).lognormal(0.0, 1.2, n), dtype)


def within_standard_errors(values, expected, count=4.0):
  """The mean over draws (rows) is within `count` standard errors, in each column."""
  values = np.asarray(values, np.float64)
  error = np.abs(values.mean(0) - expected) / (values.std(0, ddof=1) / np.sqrt(len(values)))
  return bool((error <= count).all())


SAMPLERS = {
  "replacement": lambda key, s: sampling.sensitivity_sample(key, s, M),
  "mixed": lambda key, s: sampling.sensitivity_sample(key, s, M, uniform_mix=0.3),
  "no_replacement": lambda key, s: sampling.sensitivity_sample(
    key, s, M, uniform_mix=0.1, replace=False
  ),
  "systematic": lambda key, s: sampling.systematic_sample(key, s, M)[:2],
  "gumbel": lambda key, s: sampling.gumbel_sample(key, s, M),
  "importance": lambda key, s: sampling.Sample(
    *_as_sum(sampling.importance_sample(key, s, M), s.shape[0])
  ),
  "stratified": lambda key, s: sampling.stratified_sample(key, s, LABELS, M),
  "stratified_distinct": lambda key, s: sampling.stratified_sample(
    key, s, LABELS, M, replace=False
  ),
}


def _as_sum(sample, n):
  return sample.indices, sample.weights * n / sample.weights.shape[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_valid_and_unbiased(name):
  check_contract(name, jnp.dtype("float32"))


@pytest.mark.parametrize("name", ["replacement", "systematic", "stratified_distinct"])
def test_every_sampler_in_float64(name, x64):
  check_contract(name, jnp.dtype("float64"))


def check_contract(name, dtype):
  """Unbiased to 4 standard errors for 5 functions; valid rows; key alone decides; jit and vmap change nothing."""
  scores = skewed(dtype)
  rng = np.random.default_rng(1)
  # Contributions of the order of the scores, and some that ignore them.
  by_score = [np.asarray(scores) * factor for factor in (1, rng.random(N), rng.random(N))]
  f = np.stack([*by_score, rng.random(N), np.ones(N)], axis=1)
  keys = jax.random.split(jax.random.key(7), 2000)
  draw = functools.partial(SAMPLERS[name], s=scores)
  indices, weights = jax.jit(jax.vmap(lambda key: draw(key)))(keys)
  assert (
    indices.shape == weights.shape == (2000, M)
    and indices.dtype == jnp.int32
    and weights.dtype == dtype
  )
  assert int(indices.min()) >= 0 and int(indices.max()) < N and float(weights.min()) > 0
  sums = np.einsum("dm,dmf->df", np.asarray(weights, np.float64), f[np.asarray(indices)])
  keep = sums.std(0) > 1e-6 * f.sum(0)
  assert within_standard_errors(sums[:, keep], f.sum(0)[keep])
  assert np.allclose(sums[:, ~keep], f.sum(0)[~keep], rtol=1e-4)
  assert np.ptp(sums, axis=0).max() > 0
  eager, again = draw(keys[3]), draw(keys[3])
  np.testing.assert_array_equal(eager[0], again[0])
  np.testing.assert_array_equal(eager[0], indices[3])
  assert_close(eager[1], weights[3], 1e-5)
  assert not np.array_equal(np.asarray(indices[3]), np.asarray(indices[4]))
  if name in ("no_replacement", "systematic", "gumbel", "importance", "stratified_distinct"):
    assert all(len(set(row)) == M for row in np.asarray(indices).tolist())
  if "stratified" in name:
    drawn = LABELS[np.asarray(indices)]
    assert all((drawn == c).sum(1).tolist() == [M // 3] * 2000 for c in (3, 5, 9))


def test_input_weights_give_the_weighted_sum_and_exclude_zero_weights():
  dtype = jnp.dtype("float32")
  scores = skewed(dtype)
  u = jnp.asarray(np.random.default_rng(2).integers(0, 4, N), dtype)
  f = np.random.default_rng(3).random(N)
  for replace in (True, False):
    draw = lambda key: sampling.sensitivity_sample(
      key, scores * u, M, input_weights=u, uniform_mix=0.5, replace=replace
    )
    indices, weights = jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000))
    sums = (np.asarray(weights) * f[np.asarray(indices)]).sum(1)
    assert within_standard_errors(sums[:, None], (np.asarray(u) * f).sum())
    assert np.all(np.asarray(u)[np.asarray(indices)] > 0)
    if replace:
      assert float(weights.max()) <= float(u.sum()) / (0.5 * M) * (1 + 1e-5)


def test_uniform_mix_bounds_the_weights(x64):
  """With p >= 1/(2n), as in a lightweight coreset, no weight passes 2n/m."""
  x = np.random.default_rng(4).normal(size=(N, 3))
  distances = jnp.asarray(((x - x.mean(0)) ** 2).sum(1))
  draw = lambda key: sampling.sensitivity_sample(key, distances, M, uniform_mix=0.5).weights
  weights = jax.vmap(draw)(jax.random.split(jax.random.key(0), 500))
  assert float(weights.max()) <= 2 * N / M and float(weights.max()) > N / M


def test_inclusion_units_are_exact(dtype):
  """Units of 2^-32 sum to the number of draws exactly, certain rows are apart, a positive row keeps a chance."""
  units_of = jax.jit(draws._inclusion_units)
  rng, n = np.random.default_rng(5), 200
  tiny = float(jnp.finfo(dtype).tiny)
  laws = [
    lambda k: rng.random(k),
    np.ones,
    lambda k: rng.lognormal(0, 4, k),
    lambda k: np.where(rng.random(k) < 0.5, 1, 1e-9),
    lambda k: np.exp(-0.2 * np.arange(k)),
    lambda k: np.r_[np.ones(k - 1), 1e-12],
  ]
  for trial in range(300):
    count = int(rng.integers(2, n + 1))
    p = np.zeros(n, dtype)
    p[:count] = laws[trial % 6](count)
    p /= p.sum()
    p[p < tiny] = 0
    live = int((p > 0).sum())
    b = int(rng.integers(1, live + 1)) if trial % 2 else max(1, live - int(rng.integers(0, 3)))
    units, always = (np.asarray(a) for a in units_of(jnp.asarray(p), jnp.int32(b)))
    assert int(units.astype(np.uint64).sum()) + int(always.sum()) * 2**32 == b * 2**32, (
      trial,
      count,
      b,
    )
    assert np.all(units[always] == 0) and np.array_equal((units > 0) | always, p > 0)


def test_inclusion_matches_the_capped_probabilities(x64):
  """Pi = min(1, c p) with sum b, against bisection for c."""
  p = np.array(skewed("float64", 50))
  p[:2] *= 100
  low, high = 0.0, 1e6
  for _ in range(200):
    mid = (low + high) / 2
    low, high = (mid, high) if np.minimum(1, mid * p).sum() < 20 else (low, mid)
  units, always = draws._inclusion_units(jnp.asarray(p / p.sum()), jnp.int32(20))
  assert_close(np.where(always, 1, np.asarray(units) / 2**32), np.minimum(1, low * p), 1e-8)
  assert np.asarray(always).sum() >= 2


@FLOAT64_IS_SLOW
def test_systematic_frequencies_distinct_rows_and_certain_rows(dtype):
  """Empirical inclusion within 3 sigma (allowing the 0.3 % that lies beyond by chance), capped rows in every draw."""
  scores, times = skewed(dtype).at[:2].set(1000.0), 4000
  sample = jax.vmap(lambda key: sampling.systematic_sample(key, scores, M))(
    jax.random.split(jax.random.key(1), times)
  )
  counts = np.bincount(np.asarray(sample.indices).ravel(), minlength=N)
  pi = np.full(N, np.nan)
  pi[np.asarray(sample.indices).ravel()] = np.asarray(sample.inclusion, np.float64).ravel()
  assert np.all(np.asarray(sample.status) == Status.OK) and np.isfinite(pi).all()
  assert abs(pi.sum() - M) < 1e-5 * M
  assert counts[:2].tolist() == [times, times] and pi[:2].tolist() == [1, 1]
  z = (counts - times * pi)[2:] / np.sqrt(times * pi * (1 - pi))[2:]
  assert np.mean(np.abs(z) > 3) <= 0.02 and np.abs(z).max() < 4.5
  assert_close(sample.weights, 1 / np.asarray(sample.inclusion), 1e-6)
  assert all(len(set(row)) == M for row in np.asarray(sample.indices).tolist())


def test_adjacent_rows_are_drawn_almost_independently():
  """Rows next to one another are drawn together about as often as any pair."""
  indices = jax.vmap(lambda key: sampling.systematic_sample(key, jnp.ones(N), M).indices)(
    jax.random.split(jax.random.key(2), 4000)
  )
  drawn = np.zeros((4000, N))
  np.put_along_axis(drawn, np.asarray(indices), 1.0, axis=1)
  pairs = drawn.T @ drawn / 4000
  expected = M * (M - 1) / (N * (N - 1))
  for step in (1, 2, N // 2):
    assert abs(np.mean([pairs[i, (i + step) % N] for i in range(N)]) / expected - 1) < 0.25
  assert pairs[np.triu_indices(N, 1)].min() > 0.1 * expected


@pytest.mark.parametrize("log_size", [0, 1, 2, 3, 8, 11])
def test_scrambled_order_is_a_bijection(log_size):
  for words in jax.random.bits(jax.random.key(0), (20, 6), jnp.uint32):
    assert np.array_equal(np.sort(draws._scrambled(words, log_size)), np.arange(2**log_size))


def test_many_rows_in_float32():
  """2e6 rows, half of probability zero: none of them is drawn; 20 bins are within 1 % of their probability."""
  n = 2_000_000
  rng = np.random.default_rng(6)
  p = rng.lognormal(0, 1, n).astype(np.float32)
  p[rng.permutation(n)[: n // 2]] = 0
  scores = jnp.asarray(p)
  rows = np.asarray(
    jax.jit(draws.draw_rows, static_argnums=2)(jax.random.key(0), scores, 4_000_000)
  )
  assert np.all(p[rows] > 0)
  bins = np.arange(n) * 20 // n
  expected = np.bincount(bins, weights=p.astype(np.float64))
  frequency = np.bincount(bins[rows], minlength=20) / rows.size
  assert np.abs(frequency / (expected / expected.sum()) - 1).max() < 0.01
  for seed in range(2):
    sample = sampling.systematic_sample(seed, scores, 60_000)
    indices = np.asarray(sample.indices)
    assert np.unique(indices).size == 60_000 and np.all(p[indices] > 0)
    # The number of rows and of ones are estimated by any unbiased weights.
    assert (
      abs(
        np.sum(np.asarray(sample.weights) * p[indices], dtype=np.float64) / p.sum(dtype=np.float64)
        - 1
      )
      < 1e-3
    )


def test_extreme_uniform_variates_give_valid_indices():
  draw = jax.jit(draws.draw_rows, static_argnums=2)
  for weights in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 5.0]):
    rows = draw(jax.random.key(0), jnp.asarray(weights), 1000)
    assert np.all(np.asarray(weights)[np.asarray(rows)] > 0)
  tops = jnp.asarray([1.0, 3.0, 1e-30])
  assert np.all(np.asarray(draws._below(jax.random.key(1), tops, 3)) < np.asarray(tops))


def test_gumbel_weights_are_unbiased_and_naive_weights_are_not(x64):
  p = np.r_[0.5, 0.2, np.full(10, 0.03)]
  f, b, times = np.ones(12), 6, 5000
  f[0] = 4.0
  indices, weights = jax.vmap(lambda key: sampling.gumbel_sample(key, jnp.asarray(p), b))(
    jax.random.split(jax.random.key(3), times)
  )
  indices = np.asarray(indices)
  assert within_standard_errors((np.asarray(weights) * f[indices]).sum(1)[:, None], f.sum())
  assert not within_standard_errors((f[indices] / (b * p[indices])).sum(1)[:, None], f.sum(), 10.0)


@FLOAT64_IS_SLOW
def test_merge_duplicates_keeps_sums(dtype):
  indices = jnp.asarray([7, 2, 7, 7, 0, 2], jnp.int32)
  weights = jnp.asarray([1, 2, 3, 4, 5, 6], dtype)
  merged = sampling.merge_duplicates(indices, weights)
  assert merged.indices.tolist() == [0, 2, 7, 7, 7, 7] and int(merged.num_distinct) == 3
  assert merged.weights.tolist() == [5, 8, 8, 0, 0, 0] and merged.weights.dtype == dtype
  sample = sampling.sensitivity_sample(0, skewed(dtype), 500)
  big = sampling.merge_duplicates(*sample)
  count = int(big.num_distinct)
  expected = np.bincount(
    np.asarray(sample.indices), weights=np.asarray(sample.weights), minlength=N
  )
  assert np.array_equal(big.indices[:count], np.flatnonzero(expected)) and np.all(
    np.asarray(big.weights[count:]) == 0
  )
  assert_close(big.weights[:count], expected[expected > 0], 1e-5)


def test_importance_weights():
  losses = skewed("float32")
  assert np.all(np.asarray(sampling.importance_sample(0, losses, M, 0.1, 0.0).weights) == 1)
  whole = sampling.importance_sample(0, losses, N, 0.1, 1.0)
  assert sorted(whole.indices.tolist()) == list(range(N)) and np.all(np.asarray(whole.weights) == 1)
  for flat in (
    sampling.importance_sample(0, jnp.zeros_like(losses), M, 0.0),
    sampling.importance_sample(0, losses, M, 1.0),
    sampling.importance_sample(0, losses, M, 0.0, power=0.0),
  ):
    assert_close(flat.weights, np.ones(M), 1e-6)
  full, half = (sampling.importance_sample(0, losses, M, 0.1, e) for e in (1.0, 0.5))
  assert float(sampling.importance_sample(0, losses, M, 0.5, 1.0).weights.max()) <= 2
  assert_close(half.weights**2, full.weights, 1e-5)
  # Scale does not matter, nor does a range that overflows under the power.
  scaled = sampling.importance_sample(0, losses * 1e30, M, 0.1, 1.0, power=2.0)
  plain = sampling.importance_sample(0, losses, M, 0.1, 1.0, power=2.0)
  assert_close(scaled.weights, plain.weights, 1e-4)


def test_weighted_batch_gradients_and_their_variances(x64):
  """A fitted model: mean of 5,000 batch gradients = full gradient; optimum <= residual norm <= uniform."""
  rng, n, d, c, b = np.random.default_rng(8), 300, 6, 3, 10
  x = rng.normal(size=(n, d)) * rng.lognormal(0, 0.3, (n, 1))
  labels = np.eye(c)[np.argmax(x @ rng.normal(size=(d, c)) + 0.3 * rng.normal(size=(n, c)), 1)]
  w = np.zeros((d, c))
  softmax = lambda z: (
    np.exp(z - z.max(1, keepdims=True)) / np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)
  )
  for _ in range(400):
    w -= 0.5 * x.T @ (softmax(x @ w) - labels) / n
  residuals = softmax(x @ w) - labels
  gradients = np.einsum("nd,nc->ndc", x, residuals).reshape(n, -1)
  norms = [np.linalg.norm(v, axis=1) for v in (gradients, residuals)]
  laws = {"optimum": norms[0], "residual": norms[1], "uniform": np.ones(n)}
  keys, variance = jax.random.split(jax.random.key(4), 5000), {}
  for name, law in laws.items():
    draw = jax.vmap(lambda key: sampling.importance_sample(key, jnp.asarray(law), b, 0.05))
    indices, weights = map(np.asarray, draw(keys))
    batch = np.einsum("km,kmf->kf", weights, gradients[indices]) / b
    assert within_standard_errors(batch, gradients.mean(0))
    variance[name] = batch.var(0).sum()
  assert variance["optimum"] <= variance["residual"] <= variance["uniform"]
  assert variance["residual"] < 0.7 * variance["uniform"]


def test_proportional_quotas_and_small_classes(x64):
  scores = jnp.asarray(np.r_[np.full(30, 0.1), np.full(20, 1.0), np.full(10, 3.0)])
  sample = sampling.stratified_sample(0, scores, LABELS, 30, allocation="proportional")
  drawn = np.unique(LABELS[np.asarray(sample.indices)], return_counts=True)[1]
  assert np.abs(drawn - 30 * np.array([3, 20, 30]) / 53).max() <= 1
  capped = sampling.stratified_sample(
    0, scores, LABELS, 30, allocation="proportional", replace=False
  )
  assert np.unique(LABELS[np.asarray(capped.indices)], return_counts=True)[1].tolist()[2] == 10
  assert np.unique(np.asarray(capped.indices)).size == 30
  assert_close(jnp.sum(capped.weights * scores[capped.indices]), 53.0, 1e-6)
  shuffled = np.random.default_rng(0).permutation(N)
  mixed = sampling.stratified_sample(0, scores[shuffled], LABELS[shuffled], 12, replace=False)
  assert sorted(LABELS[shuffled][np.asarray(mixed.indices)].tolist()) == [3] * 4 + [5] * 4 + [9] * 4
  with pytest.raises(ValueError, match="class 9: expected at least 11 rows"):
    sampling.stratified_sample(0, scores, LABELS, 33, replace=False)
  with pytest.raises(ValueError, match="multiple of the number of classes"):
    sampling.stratified_sample(0, scores, LABELS, 31)
  with pytest.raises(ValueError, match="positive score in each class"):
    sampling.stratified_sample(0, scores.at[50:].set(0), LABELS, 30)
  with pytest.raises(TypeError, match="concrete labels"):
    jax.jit(lambda y: sampling.stratified_sample(0, scores, y, 30))(jnp.asarray(LABELS))


def test_sampling_gain(dtype):
  flat, peaked = (
    sampling.sampling_gain(jnp.ones(50, dtype)),
    sampling.sampling_gain(jnp.zeros(50, dtype).at[3].set(2)),
  )
  assert_close(jnp.stack(flat), [1, 50, 1], 1e-5)
  assert_close(jnp.stack(peaked), [50, 1, 50], 1e-5)


def test_one_row_and_all_rows():
  dtype = jnp.dtype("float32")
  one = sampling.systematic_sample(0, jnp.ones(1, dtype), 1)
  assert one.indices.tolist() == [0] and one.weights.tolist() == [1]
  assert sampling.sensitivity_sample(0, jnp.ones(1, dtype), 3).indices.tolist() == [0, 0, 0]
  assert sorted(sampling.gumbel_sample(0, jnp.ones(5, dtype), 5).indices.tolist()) == list(range(5))
  assert sampling.gumbel_sample(0, jnp.ones(5, dtype), 5).weights.tolist() == [1] * 5
  uneven = sampling.systematic_sample(0, skewed(dtype), N)
  assert sorted(uneven.indices.tolist()) == list(range(N)) and np.all(
    np.asarray(uneven.weights) == 1
  )


def test_invalid_input_raises():
  ones = jnp.ones(5)
  for draw in (sampling.systematic_sample, sampling.gumbel_sample, sampling.importance_sample):
    with pytest.raises(ValueError, match="at most the number of rows, 5, got 6"):
      draw(0, ones, 6)
    with pytest.raises(ValueError, match="expected finite values"):
      draw(0, ones.at[2].set(jnp.nan), 2)
    with pytest.raises(ValueError, match="expected values >= 0"):
      draw(0, -ones, 2)
    with pytest.raises(ValueError, match="expected a positive integer, got 0"):
      draw(0, ones, 0)
  with pytest.raises(ValueError, match="at least one value > 0"):
    sampling.sensitivity_sample(0, 0 * ones, 2)
  with pytest.raises(ValueError, match="at least 3 rows of positive probability, got 2"):
    sampling.systematic_sample(0, ones.at[2:].set(0), 3)
  with pytest.raises(ValueError, match="losses: expected at least 3 rows"):
    sampling.importance_sample(0, ones.at[2:].set(0), 3, 0.0)
  with pytest.raises(TypeError, match="floating"):
    sampling.sensitivity_sample(0, jnp.ones(5, jnp.int32), 2)
  with pytest.raises(ValueError, match="uniform_mix"):
    sampling.sensitivity_sample(0, ones, 2, uniform_mix=1.5)
  with pytest.raises(ValueError, match="dimensions"):
    sampling.sensitivity_sample(0, jnp.ones((5, 2)), 2)
  with pytest.raises(ValueError, match="at most 65536 in float32"):
    sampling.systematic_sample(0, jnp.ones(70_000), 66_000)


def test_traced_failures_give_nan_weights():
  """What a host call refuses gives NaN weights (and a status) inside a transformation, with valid indices."""
  bad = [jnp.ones(5).at[1].set(jnp.nan), -jnp.ones(5), jnp.ones(5).at[2:].set(0)]
  systematic = jax.jit(lambda s: sampling.systematic_sample(0, s, 3))
  others = [
    jax.jit(draw)
    for draw in (
      lambda s: sampling.gumbel_sample(0, s, 3),
      lambda s: sampling.importance_sample(0, s, 3, 0.0),
      lambda s: sampling.sensitivity_sample(0, s, 3, replace=False),
    )
  ]
  for scores in bad:
    sample = systematic(scores)
    assert np.isnan(np.asarray(sample.weights)).all() and int(sample.status) == Status.NOT_FINITE
    assert np.all((np.asarray(sample.indices) >= 0) & (np.asarray(sample.indices) < 5))
    assert all(np.isnan(np.asarray(draw(scores).weights)).all() for draw in others)


def test_no_recompilation_across_keys_and_options():
  losses = skewed("float32", 37)
  sampling.importance_sample(0, losses, 5, 0.1, 1.0)
  compiled = sampling._importance_core._cache_size()
  for seed in range(1, 4):
    sampling.importance_sample(seed, losses * seed, 5, 0.1 * seed, 1.0 / seed, power=0.5)
  assert sampling._importance_core._cache_size() == compiled
