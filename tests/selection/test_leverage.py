"""Ridge leverage scores against float64 NumPy, their certificates, and the ridge by dimension."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, assert_close

from kipcore.selection import leverage, score_ridge
from kipcore.types import Status


def linear(x1, x2=None):
  return jnp.matmul(x1, (x1 if x2 is None else x2).T, precision="highest")


def rbf(x1, x2=None):
  x2 = x1 if x2 is None else x2
  return jnp.exp(-0.5 * jnp.sum((x1[:, None, :] - x2[None, :, :]) ** 2, axis=-1) / 4.0)


def points(n=60, d=5, seed=0):
  """Rows of unequal length, so that their scores are far from equal."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)) * np.exp(0.7 * rng.normal(size=(n, 1)))


def rbf_matrix(x):
  return np.exp(-0.5 * ((x[:, None] - x[None]) ** 2).sum(-1) / 4.0)


def exact(k, ridge, u=None):
  """diag(K (K + ridge)^{-1}) in float64."""
  root = np.sqrt(np.ones(len(k)) if u is None else u)
  k = root[:, None] * np.asarray(k, np.float64) * root[None]
  return np.diag(np.linalg.solve(k + ridge * np.eye(len(k)), k))


def rpcholesky(k, rank, rng):
  """Randomly pivoted partial Cholesky factor; columns are in order of the rank."""
  residual, f = k.copy(), np.zeros((len(k), rank))
  for j in range(rank):
    p = np.clip(np.diag(residual), 0, None)
    i = rng.choice(len(k), p=p / p.sum())
    f[:, j] = residual[:, i] / np.sqrt(residual[i, i])
    residual = residual - np.outer(f[:, j], f[:, j])
  return f


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_exact_scores(dtype, n, weighted):
  k = rbf_matrix(points(n))
  u = np.random.default_rng(1).uniform(0.1, 3.0, n) if weighted else None
  weights = None if u is None else jnp.asarray(u, dtype)
  for ridge in (0.05, 1.0, 30.0):
    tau = leverage.ridge_leverage_scores(jnp.asarray(k, dtype), ridge, weights)
    assert tau.dtype == dtype and tau.shape == (n,)
    assert_close(tau, exact(k, ridge, u), 10 * RTOL[dtype.name])
    d_eff = leverage.effective_dimension(jnp.asarray(k, dtype), ridge, weights)
    assert_close(d_eff, exact(k, ridge, u).sum(), 10 * RTOL[dtype.name])


def test_bounds_monotonicity_and_limits(x64):
  x = points()
  k = jnp.asarray(rbf_matrix(x))
  ridges = np.geomspace(1e-6, 1e4, 11)
  scores = np.array([leverage.ridge_leverage_scores(k, r) for r in ridges])
  assert scores.min() >= 0 and scores.max() <= 1
  assert (np.diff(scores, axis=0) < 0).all()
  fewer = np.array([leverage.ridge_leverage_scores(k[:40, :40], r) for r in ridges])
  assert (fewer >= scores[:, :40] - 1e-10).all()
  low_rank = jnp.asarray(x @ x.T)
  assert abs(leverage.effective_dimension(low_rank, 1e-9) - 5) < 1e-4
  assert leverage.effective_dimension(k, 1e9) < 1e-6


def test_invariances(x64):
  x, ridge = points(), 0.3
  k = rbf_matrix(x)
  tau = np.asarray(leverage.ridge_leverage_scores(jnp.asarray(k), ridge))
  assert_close(leverage.ridge_leverage_scores(jnp.asarray(7 * k), 7 * ridge), tau, 1e-11)
  order = np.random.default_rng(0).permutation(60)
  assert_close(
    leverage.ridge_leverage_scores(jnp.asarray(k[order][:, order]), ridge), tau[order], 1e-11
  )
  # Two copies of weight 1/2 are one row; an integer weight is that many rows.
  twice = np.concatenate([np.arange(60), [3]])
  u = np.ones(61)
  u[[3, 60]] = 0.5
  copies = np.asarray(
    leverage.ridge_leverage_scores(jnp.asarray(k[twice][:, twice]), ridge, jnp.asarray(u))
  )
  assert_close(copies[[3, 60]], [tau[3] / 2] * 2, 1e-11)
  assert_close(np.delete(copies, [3, 60]), np.delete(tau, 3), 1e-11)
  counts = np.random.default_rng(1).integers(1, 4, 60)
  repeated = np.repeat(np.arange(60), counts)
  by_copies = exact(k[repeated][:, repeated], ridge)
  by_weight = leverage.ridge_leverage_scores(
    jnp.asarray(k), ridge, jnp.asarray(counts, jnp.float64)
  )
  assert_close(by_weight, np.bincount(repeated, by_copies), 1e-10)
  # A row of weight 0 has score 0 and leaves the others as they are without it.
  u = np.ones(60)
  u[:5] = 0
  gone = np.asarray(leverage.ridge_leverage_scores(jnp.asarray(k), ridge, jnp.asarray(u)))
  assert_close(gone, np.concatenate([np.zeros(5), exact(k[5:, 5:], ridge)]), 1e-11)


@pytest.mark.parametrize("block_size", [None, 7, 60, 1000])
def test_feature_scores(dtype, block_size):
  z, u = points(d=8), np.random.default_rng(1).uniform(0.1, 3.0, 60)
  tau = leverage.feature_leverage_scores(
    jnp.asarray(z, dtype), 2.0, jnp.asarray(u, dtype), block_size
  )
  assert tau.dtype == dtype
  assert_close(tau, exact(z @ z.T, 2.0, u), 10 * RTOL[dtype.name])


@pytest.mark.parametrize("block_size", [None, 13])
def test_landmark_scores_are_exact_for_the_landmarks_and_one_row(dtype, block_size):
  x, ridge = points(), 0.2
  u = np.random.default_rng(1).uniform(0.1, 3.0, 60)
  k, s = rbf_matrix(x), np.array([4, 0, 17, 33, 59])
  tau = leverage.landmark_leverage_scores(
    rbf, jnp.asarray(x, dtype), jnp.asarray(s), ridge, jnp.asarray(u, dtype), block_size=block_size
  )
  expected = []
  for i in range(60):
    rows = np.union1d(s, i)
    expected.append(exact(k[rows][:, rows], ridge, u[rows])[list(rows).index(i)])
  assert_close(tau, expected, 20 * RTOL[dtype.name])


def test_landmark_scores_are_upper_bounds_with_bounded_expected_sum(x64):
  n, s, ridge = 60, 12, 0.5
  x = points(n)
  truth = exact(rbf_matrix(x), ridge)
  rng, sums = np.random.default_rng(0), []
  for _ in range(200):
    landmarks = jnp.asarray(rng.choice(n, s, replace=False))
    tau = np.asarray(leverage.landmark_leverage_scores(rbf, jnp.asarray(x), landmarks, ridge))
    assert (tau >= truth - 1e-12).all()
    sums.append(tau.sum())
  error = np.std(sums) / np.sqrt(len(sums))
  assert np.mean(sums) <= (n + 1) / (s + 1) * truth.sum() + 4 * error
  assert np.mean(sums) > truth.sum()
  everything = leverage.landmark_leverage_scores(rbf, jnp.asarray(x), jnp.arange(n), ridge)
  assert_close(everything, truth, 1e-11)


def test_weighted_landmark_scores_are_within_the_measured_spectral_error(x64):
  x, ridge, n, s = points(400), 20.0, 400, 200
  k = np.asarray(x @ x.T)
  truth = exact(k, ridge)
  rng = np.random.default_rng(0)
  chosen = rng.choice(n, s, replace=False)
  w = np.full(s, n / s)
  full = x.T @ x + ridge * np.eye(5)
  sub = (x[chosen] * w[:, None]).T @ x[chosen] + ridge * np.eye(5)
  half = np.linalg.inv(np.linalg.cholesky(full))
  spectrum = np.linalg.eigvalsh(half @ sub @ half.T)
  e = np.abs(spectrum - 1).max()
  assert 0.01 < e < 0.9
  t = np.asarray(
    leverage.landmark_leverage_scores(
      linear,
      jnp.asarray(x),
      jnp.asarray(chosen),
      ridge,
      landmark_weights=jnp.asarray(w),
      block_size=64,
    )
  )
  ratio = t / truth
  assert ratio.min() >= 1 / (1 + e) - 1e-9 and ratio.max() <= 1 / (1 - e) + 1e-9
  assert ratio.max() > 1 + 1e-3 or ratio.min() < 1 - 1e-3


def test_low_rank_bounds_enclose_the_scores_at_every_rank(x64):
  x, ridge = points(), 0.5
  k = rbf_matrix(x)
  truth = exact(k, ridge)
  factor = rpcholesky(k, 40, np.random.default_rng(0))
  traces, widths = [], []
  for rank in range(1, 41):
    f = factor * (np.arange(40) < rank)  # columns of zeros keep the shape
    e = k - f @ f.T
    traces.append(np.trace(k) - (f**2).sum())
    assert abs(traces[-1] - np.trace(e)) < 1e-10
    for norm in (None, np.linalg.eigvalsh(e)[-1]):
      bounds = leverage.low_rank_leverage_bounds(
        jnp.asarray(f), jnp.diagonal(jnp.asarray(k)), ridge, norm
      )
      assert (np.asarray(bounds.lower) <= truth + 1e-10).all(), rank
      assert (np.asarray(bounds.upper) >= truth - 1e-10).all(), rank
    # The monotone bound alone, written out.
    c = np.trace(e) / ridge
    plain = (c + exact(f @ f.T, (1 + c) * ridge)) / (1 + c)
    by_trace = leverage.low_rank_leverage_bounds(
      jnp.asarray(f), jnp.diagonal(jnp.asarray(k)), ridge
    )
    assert (np.asarray(by_trace.upper) <= plain + 1e-10).all()
    widths.append(float(jnp.max(bounds.upper - bounds.lower)))
  assert (np.diff(traces) < 0).all()
  assert widths[-1] < 0.6 * widths[0]
  complete = np.linalg.cholesky(k + 1e-12 * np.eye(60))
  bounds = leverage.low_rank_leverage_bounds(jnp.asarray(complete), jnp.ones(60), ridge)
  assert_close(bounds.lower, truth, 1e-8)
  assert_close(bounds.upper, truth, 1e-6)


@pytest.mark.parametrize("target", [0.5, 3.0, 30.0])
def test_score_ridge(dtype, target):
  k = rbf_matrix(points())
  for argument in (jnp.asarray(k, dtype), jnp.asarray(np.linalg.eigvalsh(k), dtype)):
    found = score_ridge.score_ridge_for_dimension(argument, target)
    assert bool(found.converged) and int(found.status) == Status.OK
    d_eff = exact(k, float(found.ridge)).sum()
    assert abs(d_eff - target) / target < (1e-6 if dtype == jnp.float64 else 1e-3)


def test_score_ridge_with_weights_and_jit(x64):
  k, u = (
    jnp.asarray(rbf_matrix(points())),
    jnp.asarray(np.random.default_rng(1).uniform(0.1, 3.0, 60)),
  )
  found = jax.jit(score_ridge.score_ridge_for_dimension)(k, 6.0, u)
  assert abs(leverage.effective_dimension(k, found.ridge, u) / 6 - 1) < 1e-6
  low_rank = jnp.asarray(points() @ points().T)
  missed = score_ridge.score_ridge_for_dimension(low_rank, 7.0)
  assert not bool(missed.converged) and int(missed.status) == Status.MAX_STEPS
  assert (
    int(score_ridge.score_ridge_for_dimension(k.at[0, 0].set(jnp.nan), 7.0).status)
    == Status.NOT_FINITE
  )


def test_landmark_score_ridge_encloses_the_dimension(x64):
  x = points(200)
  k = rbf_matrix(x)
  for target, landmarks in ((4.0, 60), (20.0, 60), (20.0, 500)):
    found = score_ridge.landmark_score_ridge(
      jax.random.key(0), rbf, jnp.asarray(x), target, landmarks, block_size=48
    )
    ridges = jnp.asarray([float(found.ridge), 10.0])
    bounds = score_ridge.effective_dimension_bounds(
      0, rbf, jnp.asarray(x), ridges, landmarks, block_size=48
    )
    assert_close(bounds.upper[0], found.effective_dimension, 1e-6)
    assert_close(bounds.lower[0], found.effective_dimension_lower, 1e-6)
    for i, ridge in enumerate(ridges):
      truth = exact(k, float(ridge)).sum()
      assert bounds.lower[i] - 1e-9 <= truth <= bounds.upper[i] + 1e-9
    d_eff = exact(k, float(found.ridge)).sum()
    assert bool(found.converged)
    assert found.effective_dimension_lower - 1e-6 <= d_eff <= found.effective_dimension + 1e-6
    if landmarks > 200:
      assert abs(d_eff / target - 1) < 1e-4


def test_float32_has_three_digits_for_large_ridges():
  k = rbf_matrix(points(150))
  for scale in (1e-2, 1e-1, 1.0, 10.0):
    tau = leverage.ridge_leverage_scores(jnp.asarray(k, jnp.float32), scale)
    assert np.abs(np.asarray(tau) - exact(k, scale)).max() < 1e-3


def test_float32_rejects_a_tiny_ridge():
  k = jnp.asarray(rbf_matrix(points()), jnp.float32)
  x = jnp.asarray(points(), jnp.float32)
  for call in (
    lambda r: leverage.ridge_leverage_scores(k, r),
    lambda r: leverage.feature_leverage_scores(x / jnp.sqrt(jnp.mean(jnp.sum(x**2, axis=1))), r),
    lambda r: leverage.landmark_leverage_scores(rbf, x, jnp.arange(5), r),
  ):
    with pytest.raises(ValueError, match="in float32"):
      call(0.99e-4)
    assert np.isfinite(call(2e-4)).all()
  # A traced ridge cannot be refused, so the result says it.
  assert np.isnan(jax.jit(leverage.ridge_leverage_scores)(k, 1e-6)).all()
  assert np.isfinite(jax.jit(leverage.ridge_leverage_scores)(k, 1.0)).all()


@FLOAT64_IS_SLOW
def test_transformations_agree_and_do_not_recompile(dtype):
  k = jnp.asarray(rbf_matrix(points()), dtype)
  eager = leverage.ridge_leverage_scores(k, 0.5)
  assert_close(jax.jit(leverage.ridge_leverage_scores)(k, 0.5), eager, RTOL[dtype.name])
  batch = jnp.stack([k, 2 * k])
  mapped = jax.vmap(leverage.ridge_leverage_scores, (0, None))(batch, 0.5)
  assert_close(
    mapped, np.stack([eager, leverage.ridge_leverage_scores(2 * k, 0.5)]), 10 * RTOL[dtype.name]
  )
  x = jnp.asarray(points(), dtype)
  leverage.landmark_leverage_scores(rbf, x, jnp.arange(4), 0.5)
  compiled = leverage._exact._cache_size(), leverage._landmark_leverage._cache_size()
  for ridge in (0.1, 0.7, jnp.asarray(3.0, dtype)):
    leverage.ridge_leverage_scores(k, ridge)
    leverage.landmark_leverage_scores(rbf, x, jnp.arange(4) + 2, ridge)
  assert (leverage._exact._cache_size(), leverage._landmark_leverage._cache_size()) == compiled


def test_nearly_equal_scores_issue_a_warning():
  with pytest.warns(UserWarning, match="nearly equal"):
    leverage.warn_if_flat(1.0499)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    leverage.warn_if_flat(1.0501)


def test_invalid_input_raises():
  k = jnp.eye(4)
  x = jnp.ones((4, 2))
  for call, message in (
    (lambda: leverage.ridge_leverage_scores(jnp.ones((4, 3)), 1.0), "square"),
    (lambda: leverage.ridge_leverage_scores(k, 0.0), "ridge: expected values > 0"),
    (lambda: leverage.ridge_leverage_scores(k, jnp.ones(4)), "ridge"),
    (lambda: leverage.ridge_leverage_scores(k, 1.0, jnp.ones(3)), "weights: expected shape"),
    (lambda: leverage.ridge_leverage_scores(k, 1.0, -jnp.ones(4)), "weights: expected values >= 0"),
    (lambda: leverage.landmark_leverage_scores(linear, x, jnp.array([1, 1]), 1.0), "no duplicates"),
    (lambda: leverage.landmark_leverage_scores(linear, x, jnp.array([4]), 1.0), "landmarks"),
    (lambda: score_ridge.score_ridge_for_dimension(k, 4.0), "target"),
    (lambda: score_ridge.score_ridge_for_dimension(jnp.ones(4), 2.0, jnp.ones(4)), "eigenvalues"),
    (lambda: leverage.low_rank_leverage_bounds(x, jnp.ones(3), 1.0), "k_diag"),
    (lambda: leverage.ridge_leverage_scores(jnp.zeros((0, 0)), 1.0), "at least one row"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(TypeError, match="floating"):
    leverage.ridge_leverage_scores(jnp.eye(4, dtype=jnp.int32), 1.0)
  assert np.isnan(leverage.ridge_leverage_scores(k.at[1, 1].set(jnp.nan), 1.0)).all()
