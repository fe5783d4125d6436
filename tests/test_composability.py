"""All numeric functions under jit, vmap and (if smooth) grad, and with degenerate data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, assert_close, slow_except

import kipcore
from kipcore.selection import (
  cholesky,
  clustering,
  leverage,
  pursuit,
  sampling,
  score_ridge,
  sensitivity,
  sensitivity_cores,
)
from kipcore.types import Status

NTK = kipcore.ntk_fn(kipcore.fc(1))
N, D, C = 24, 4, 3


def data(dtype=np.float64, n=N, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % C
  x = rng.normal(size=(n, D)) + np.eye(C, D)[labels]
  return jnp.asarray(x, dtype), jnp.asarray(np.eye(C)[labels] - 1 / C, dtype)


# name -> (function of (x, y), whether it is smooth in x). Keys are fixed, so all are functions.
FUNCTIONS = {
  "leverage": (lambda x, y: leverage.ridge_leverage_scores(NTK(x, None), 0.5), True),
  "effective_dimension": (lambda x, y: leverage.effective_dimension(NTK(x, None), 0.5), True),
  "feature_leverage": (lambda x, y: leverage.feature_leverage_scores(x, 0.5), True),
  "landmark_leverage": (
    lambda x, y: leverage.landmark_leverage_scores(NTK, x, jnp.arange(6), 0.5),
    True,
  ),
  "score_ridge": (
    lambda x, y: score_ridge.score_ridge_for_dimension(NTK(x, None), 5.0).ridge,
    False,
  ),
  "sensitivities": (lambda x, y: sensitivity.krr_sensitivities(NTK(x, None), y, 0.5), True),
  "feature_sensitivities": (
    lambda x, y: sensitivity.feature_krr_sensitivities(x, y, 0.5).scores,
    True,
  ),
  "approximate_sensitivities": (
    lambda x, y: (
      sensitivity.approximate_krr_sensitivities(jax.random.key(0), NTK, x, y, 0.5, 8).scores
    ),
    False,
  ),
  "kmeans_sensitivities": (lambda x, y: sensitivity.kmeans_sensitivities(x, x[:3]), False),
  "lightweight": (lambda x, y: sensitivity.lightweight_sensitivities(x), True),
  "kmeans_plusplus": (
    lambda x, y: clustering.kmeans_plusplus(jax.random.key(0), x, 4).centers,
    False,
  ),
  "kernel_kmeans_plusplus": (
    lambda x, y: clustering.kernel_kmeans_plusplus(jax.random.key(0), NTK, x, 4).centers,
    False,
  ),
  "kmeans": (lambda x, y: clustering.kmeans(jax.random.key(0), x, 3).centers, False),
  "rpcholesky": (
    lambda x, y: cholesky.rpcholesky(jax.random.key(0), NTK, x, 5).residual_trace,
    False,
  ),
  "pursuit": (
    lambda x, y: pursuit.krr_pursuit(jax.random.key(0), NTK, x, y, 16, 5, 0.5).objectives,
    False,
  ),
  "sensitivity_sample": (
    lambda x, y: sampling.sensitivity_sample(jax.random.key(0), jnp.sum(x**2, axis=1), 6).weights,
    False,
  ),
  "systematic_sample": (
    lambda x, y: sampling.systematic_sample(jax.random.key(0), jnp.sum(x**2, axis=1), 6).weights,
    False,
  ),
  "importance_sample": (
    lambda x, y: sampling.importance_sample(jax.random.key(0), jnp.sum(x**2, axis=1), 6).weights,
    False,
  ),
  "krr_fit": (lambda x, y: kipcore.krr_fit(NTK(x, None), y, 0.5).dual, True),
  "krr_loss": (
    lambda x, y: (
      kipcore.krr_loss(kipcore.krr_fit(NTK(x[:6], None), y[:6], 0.5), NTK(x, x[:6]), y).loss
    ),
    True,
  ),
  "label_solve": (lambda x, y: kipcore.label_solve(NTK(x[:6], None), NTK(x, x[:6]), y, 0.5), True),
  "label_solve_rows": (
    lambda x, y: kipcore.label_solve_rows(NTK, x[:6], x, y, 0.5, block_size=7).labels,
    True,
  ),
}
SMOOTH = [name for name, (_, smooth) in FUNCTIONS.items() if smooth]


# Functions whose own tests map them over classes, which takes less than here.
ALSO_MAPPED = ("leverage", "kmeans", "rpcholesky", "kmeans_plusplus")


@pytest.mark.parametrize(
  "name", slow_except(FUNCTIONS, *(name for name in FUNCTIONS if name not in ALSO_MAPPED))
)
def test_jit_and_vmap_change_nothing(name, x64):
  fn = FUNCTIONS[name][0]
  many = [data(seed=seed) for seed in range(3)]
  eager = [fn(*one) for one in many]
  compiled = jax.jit(fn)
  for one, expected in zip(many, eager):
    assert_close(compiled(*one), expected, 1e-8)
  assert compiled._cache_size() == 1
  assert_close(jax.vmap(fn)(*map(jnp.stack, zip(*many))), jnp.stack(eager), 1e-8)


# The gradient of `label_solve_rows` is also that of `tests/kernels/test_base.py`.
@pytest.mark.parametrize(
  "name", slow_except(SMOOTH, *(name for name in SMOOTH if name != "label_solve_rows"))
)
def test_gradients_are_finite_differences(name, x64):
  x, y = data()
  weigh = jnp.asarray(np.random.default_rng(1).normal(size=FUNCTIONS[name][0](x, y).shape))
  f = jax.jit(lambda x: jnp.sum(weigh * FUNCTIONS[name][0](x, y)))
  v, h = jnp.asarray(np.random.default_rng(2).normal(size=x.shape)), 1e-5
  slope = (f(x + h * v) - f(x - h * v)) / (2 * h)
  np.testing.assert_allclose(jnp.vdot(jax.grad(f)(x), v), slope, rtol=1e-5, atol=1e-9)


def scores_of(x, y, ridge=0.5):
  return sensitivity.krr_sensitivity_scores(NTK(x, None), y, ridge)


@FLOAT64_IS_SLOW
def test_one_row(dtype):
  x, y = data(dtype, 1)
  scores = scores_of(x, y)
  tau = float(NTK(x, None)[0, 0]) / (float(NTK(x, None)[0, 0]) + 0.5)
  # F* = ridge ||y||^2 / (k + ridge), so the label term is ridge / (k + ridge), and this row is the
  # only one.
  assert_close(scores.leverage, [tau], 1e-5)
  assert_close(scores.scores, [1.0], 1e-5)
  assert clustering.kmeans_plusplus(0, x, 1).indices.tolist() == [0]
  assert_close(clustering.kmeans(0, x, 1).centers, x, 1e-6)
  assert cholesky.rpcholesky(0, NTK, x, 1).pivots.tolist() == [0]
  assert pursuit.krr_pursuit(0, NTK, x, y, 1, 1, 0.5).indices.tolist() == [0]
  assert sampling.systematic_sample(0, scores.scores, 1).indices.tolist() == [0]


@pytest.mark.filterwarnings("ignore:scores are nearly equal")
def test_as_many_points_as_rows(x64):
  x, y = data()
  assert sorted(clustering.kmeans_plusplus(0, x, N).indices.tolist()) == list(range(N))
  assert float(clustering.kmeans(0, x, N).inertia) < 1e-20
  assert float(cholesky.rpcholesky(0, NTK, x, N).residual_trace) < 1e-8
  assert sorted(pursuit.krr_pursuit(0, NTK, x, y, N, N, 0.5).indices.tolist()) == list(range(N))
  sample = sampling.systematic_sample(0, scores_of(x, y).scores, N)
  assert sorted(sample.indices.tolist()) == list(range(N)) and (sample.weights == 1).all()
  for call in (
    lambda: clustering.kmeans_plusplus(0, x, N + 1),
    lambda: cholesky.rpcholesky(0, NTK, x, N + 1),
    lambda: pursuit.krr_pursuit(0, NTK, x, y, N, N + 1, 0.5),
    lambda: sampling.systematic_sample(0, jnp.ones(N), N + 1),
  ):
    with pytest.raises(ValueError, match="expected at most"):
      call()
  # Landmarks are capped at all rows, and then the scores are exact.
  capped = sensitivity.approximate_krr_sensitivities(0, NTK, x, y, 0.5, 10 * N)
  assert_close(capped.scores, scores_of(x, y).scores, 1e-6)


def test_constant_labels(x64):
  x, _ = data()
  # Centered labels of one class are all equal, which is an ordinary fit.
  same = jnp.broadcast_to(jnp.asarray([2 / 3, -1 / 3, -1 / 3]), (N, C))
  assert int(scores_of(x, same).status) == Status.OK
  # Without labels to fit only leverage is left.
  none = scores_of(x, jnp.zeros((N, C)))
  assert_close(none.scores, leverage.ridge_leverage_scores(NTK(x, None), 0.5), 1e-10)
  assert float(none.label_mass) == 0


@FLOAT64_IS_SLOW
def test_duplicate_rows(dtype):
  x, y = data(dtype, 8)
  x, y = jnp.concatenate([x, x, x]), jnp.concatenate([y, y, y])
  scores = scores_of(x, y)
  assert_close(scores.scores[:8], scores.scores[8:16], 1e-4)
  assert len(set((clustering.kmeans_plusplus(0, x, 8).indices % 8).tolist())) == 8
  result = cholesky.rpcholesky(0, NTK, x, 20)
  assert int(result.count) == 8 and set(result.pivots[8:].tolist()) == {-1}
  chosen = pursuit.krr_pursuit(0, NTK, x, y, 24, 8, 0.5)
  assert int(chosen.status) == Status.OK and len(set((chosen.indices % 8).tolist())) == 8
  short = pursuit.krr_pursuit(0, NTK, x, y, 24, 12, 0.5)
  assert int(short.status) == Status.NOT_POSITIVE_DEFINITE and (short.indices[8:] == -1).all()


def test_rows_with_nan():
  x, y = data(np.float32)
  bad = x.at[3, 1].set(jnp.nan)
  for call in (
    lambda: clustering.kmeans_plusplus(0, bad, 3),
    lambda: clustering.kmeans(0, bad, 3),
    lambda: cholesky.rpcholesky(0, NTK, bad, 3),
    lambda: pursuit.krr_pursuit(0, NTK, bad, y, 9, 3, 0.5),
    lambda: sensitivity.approximate_krr_sensitivities(0, NTK, bad, y, 0.5, 6),
    lambda: scores_of(bad, y),
    lambda: sensitivity.lightweight_sensitivities(bad),
  ):
    with pytest.raises(ValueError, match="expected finite values"):
      call()
  # Transformed functions cannot raise, so they return a status.
  parts = jax.jit(lambda x: sensitivity.krr_sensitivity_scores(NTK(x, None), y, 0.5))(bad)
  assert int(parts.status) == Status.NOT_FINITE and np.isnan(np.asarray(parts.scores)).all()


def test_no_recompilation_across_keys_and_ridges(x64):
  x, y = data()
  calls = [
    lambda s: cholesky.rpcholesky(s, NTK, x, 5),
    lambda s: pursuit.krr_pursuit(s, NTK, x, y, 9, 3, 0.5 + s),
    lambda s: sensitivity.approximate_krr_sensitivities(s, NTK, x, y, 0.5 + s, 6),
  ]
  caches = [cholesky._rpcholesky, pursuit._krr_pursuit, sensitivity_cores.landmark_scores]
  for call, cache in zip(calls, caches):
    call(0)
    before = cache._cache_size()
    call(1)
    call(2)
    assert cache._cache_size() == before
