"""Importance samplers: exact distributions and weights, score updates, and the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, image_problem, slow_except
from scipy import optimize, special

import kipcore
from kipcore.distillation import importance, loop, samplers
from kipcore.distillation.method import LossInfo
from kipcore.distillation.methods import kip
from kipcore.types import NumericalError, Support

COUNTS = jnp.asarray([30, 50, 11, 0], jnp.int32)
CAPACITY = 97  # 91 rows and some padding


def scored(sampler, uniform_mix, size, seed=0, share=0.7):
  """A state with heavy-tailed scores, some unknown, and a distribution for batches of a size."""
  rng = np.random.default_rng(seed)
  scores = rng.pareto(1.2, CAPACITY).astype(np.float32)
  known = (rng.random(CAPACITY) < share) & (np.arange(CAPACITY) < 91)
  state = sampler.init(COUNTS, CAPACITY)
  state = state._replace(
    scores=jnp.asarray(np.where(known, scores, 0), jnp.float32), known=jnp.asarray(known)
  )
  return importance.with_distribution(state, uniform_mix, size)


@pytest.mark.parametrize("balanced", [False, True])
def test_full_weights_are_unbiased_for_all_scores(balanced):
  sampler = importance.importance(
    uniform_mix=0.3, weight_exponent=1.0, least_gain=1.0, balanced=balanced
  )
  state = scored(sampler, 0.3, 12)
  values = jnp.asarray(
    np.random.default_rng(1).normal(size=CAPACITY) + np.repeat([0, 3, -5, 9], [30, 50, 11, 6]),
    jnp.float32,
  )

  @jax.jit
  def estimate(key):
    rows, weights = sampler.draw(key, state, 12)
    return jnp.mean(weights * values[rows]), rows, weights

  means, rows, weights = jax.vmap(estimate)(jax.random.split(jax.random.key(0), 4000))
  exact = np.asarray(values[:91], np.float64)
  expected = (
    np.mean([exact[:30].mean(), exact[30:80].mean(), exact[80:].mean()])
    if balanced
    else exact.mean()
  )
  error = float(jnp.std(means)) / np.sqrt(4000)
  assert abs(float(jnp.mean(means)) - expected) < 4 * error
  assert int(rows.max()) < 91  # padding is never drawn
  assert all(len(set(batch)) == 12 for batch in np.asarray(rows[:50]).tolist())
  assert (
    float(weights.max())
    <= 1 / 0.3 * (11 if balanced else 1) / (3 / 91 * 91 if balanced else 1) * 1.001
  )


@pytest.mark.parametrize("exponent", slow_except([0.25, 1.0], 0.25))
def test_logged_accuracy_estimates_that_of_all_rows(exponent):
  """Hard rows are drawn far more often; the mean of the logged accuracy is still that of all rows."""
  support, x, y = image_problem(np.float32, n=300)
  method = kipcore.kip(kipcore.ntk_fn(kipcore.fc(1)), kipcore.KIPOptions(relative_ridge=1e-3))
  sampler = importance.importance("squared_error", 0.3, exponent, 1.0, refresh_every=1, power=4.0)
  distiller = kipcore.Distiller(method, sampler, optax.sgd(1e-12), 60)
  logs = list(range(2, 90))
  history = kipcore.distill(0, distiller, support, x, y, 90, log_steps=logs).history
  logged = [line["accuracy"] for line in history if line["step"] in logs]
  fit = kipcore.evaluate_krr(method.kernel_fn, support, x, y, relative_ridge=1e-3)
  assert 0.3 < float(fit.accuracy) < 0.95  # neither all nor no rows are correct
  assert (
    abs(np.mean(logged) - float(fit.accuracy)) < 4 * np.std(logged) / np.sqrt(len(logged)) + 0.01
  )


@pytest.mark.filterwarnings("error")
def test_weights_of_a_vanishing_exponent_do_not_overflow():
  support, x, y = image_problem(np.float32, n=60)
  method = kipcore.kip(kipcore.ntk_fn(kipcore.fc(1)), kipcore.KIPOptions(relative_ridge=1e-3))
  sampler = importance.importance("squared_error", 0.3, 1e-46, 1.0)
  distiller = kipcore.Distiller(method, sampler, optax.sgd(1e-3), 20)
  assert 0 <= kipcore.distill(0, distiller, support, x, y, 2).history[-1]["accuracy"] <= 1


def test_distribution_matches_its_documentation(x64):
  sampler = importance.importance(uniform_mix=0.25)
  state = scored(sampler, 0.25, 12)
  law = importance.sampling_distribution(state, 0.25)
  known, scores = np.asarray(state.known), np.asarray(state.scores, np.float64)
  s = np.where(known, scores, scores[known].mean())[:91]
  p = s / s.sum()
  assert_close(law.probabilities[:91], 0.75 * p + 0.25 / 91, 1e-5)
  assert float(jnp.sum(law.probabilities[91:])) == 0
  assert_close(law.gain, 91 * (p**2).sum(), 1e-5)
  squared = importance.sampling_distribution(state, 0.25, 2.0)
  p2 = s**2 / (s**2).sum()
  assert_close(squared.probabilities[:91], 0.75 * p2 + 0.25 / 91, 1e-5)
  assert_close(squared.gain, 91 * (p2**2).sum(), 1e-5)
  # Batches of 12 distinct rows: min(1, c p) with c such that it sums to 12.
  pi, law = (
    np.asarray(state.plan.inclusion, np.float64),
    np.asarray(law.probabilities[:91], np.float64),
  )
  c = optimize.brentq(lambda c: np.minimum(1, c * law).sum() - 12, 1, 1e6)
  assert_close(pi[:91], np.minimum(1, c * law), 1e-4)
  assert not pi[91:].any() and (pi == 1).sum() > 0


def test_distribution_is_rebuilt_after_a_quarter_of_the_rows_is_scored():
  sampler = importance.importance("squared_error", uniform_mix=0.2, least_gain=1.0)
  labels, predictions = (
    jnp.zeros((10, 4)),
    jnp.asarray(np.random.default_rng(0).pareto(1.0, (10, 4)), jnp.float32),
  )
  state, rows = sampler.init(COUNTS, CAPACITY), jnp.arange(10, dtype=jnp.int32)
  made, update = [], jax.jit(sampler.update)
  for step in range(7):
    state = update(state, rows + 10 * step, labels, info(predictions * (step + 1)))
    made.append(int(state.rebuilds))
  assert made == [0, 0, 1, 1, 1, 2, 2]  # 30 is the first count above a quarter of 91 rows
  assert int(jnp.sum(state.known)) == 70
  # The last scored row enters the distribution only at the rebuild.
  assert not np.array_equal(
    importance.with_distribution(state, 0.2, 10).plan.inclusion, state.plan.inclusion
  )


def test_exponent_is_a_power_of_the_weights():
  full, half, none = (
    importance.importance(weight_exponent=e, least_gain=1.0) for e in (1.0, 0.5, 0.0)
  )
  key, state = jax.random.key(3), scored(full, 0.5, 20)
  (rows, w), (rows_half, w_half), (_, w_none) = (s.draw(key, state, 20) for s in (full, half, none))
  assert (rows == rows_half).all()
  assert_close(w_half, jnp.sqrt(w), 1e-6)
  assert (w_none == 1).all()


@pytest.mark.parametrize("balanced", slow_except([False, True], True))
def test_flat_scores_draw_like_the_plain_sampler(balanced):
  ours = importance.importance(balanced=balanced)
  plain = samplers.class_balanced() if balanced else samplers.uniform()
  counts = jnp.asarray([30, 50, 11], jnp.int32)
  state = ours.init(counts, CAPACITY)
  flat = state._replace(scores=jnp.where(state.base > 0, 0.5, 0.0), known=state.base > 0)
  key = jax.random.key(5)
  expected = plain.draw(key, plain.init(counts, CAPACITY), 20)
  for before in (
    state,
    flat,
    state._replace(known=state.base > 0),
  ):  # nothing known, all equal, all zero
    for got, want in zip(
      ours.draw(key, importance.with_distribution(before, 0.5, 20), 20), expected
    ):
      np.testing.assert_array_equal(got, want)
  heavy = importance.with_distribution(flat._replace(scores=flat.scores.at[7].set(100.0)), 0.5, 20)
  # A distribution is valid for batches of one size.
  for got, want in zip(
    ours.draw(key, heavy, 19), plain.draw(key, plain.init(counts, CAPACITY), 19)
  ):
    np.testing.assert_array_equal(got, want)
  assert not np.array_equal(ours.draw(key, heavy, 20)[0], expected[0])
  # With all rows or more, there is nothing to choose.
  assert np.isfinite(np.asarray(ours.draw(key, heavy, 200)[1])).all()


def info(predictions):
  t = predictions.shape[0]
  return LossInfo(jnp.zeros(t), predictions, jnp.zeros(()), jnp.int32(0))


def test_scores_follow_their_definitions():
  rng = np.random.default_rng(0)
  labels = np.eye(4, dtype=np.float32)[rng.integers(0, 3, 40)] - 0.25
  predictions = (0.6 * labels + 0.2 * rng.normal(size=labels.shape)).astype(np.float32)
  own = predictions[labels > 0]
  other = np.where(labels > 0, -np.inf, predictions).max(1)
  expected = {
    "squared_error": ((predictions - labels) ** 2).sum(1),
    "residual_norm": np.linalg.norm(predictions - labels, axis=1),
    "margin": np.maximum(1 - own + other, 0),
  }
  rows = jnp.asarray(rng.permutation(91)[:40], jnp.int32)
  for name, values in expected.items():
    sampler = importance.importance(name)
    state = sampler.update(
      sampler.init(COUNTS, CAPACITY), rows, jnp.asarray(labels), info(jnp.asarray(predictions))
    )
    assert_close(state.scores[rows], values, 1e-5)
    assert int(state.known.sum()) == 40
  mine = importance.importance(lambda p, y: jnp.abs(p - y).sum(axis=1))
  state = mine.update(
    mine.init(COUNTS, CAPACITY), rows, jnp.asarray(labels), info(jnp.asarray(predictions))
  )
  assert_close(state.scores[rows], np.abs(predictions - labels).sum(1), 1e-5)


def test_temperature_is_optimal(x64):
  rng = np.random.default_rng(0)
  labels = np.eye(5)[rng.integers(0, 5, 300)] - 0.2
  predictions = 0.3 * labels + 0.1 * rng.normal(size=labels.shape)
  weights = rng.random(300)

  def mean(log_b):
    z = np.exp(log_b) * predictions
    return np.sum(weights * (special.logsumexp(z, axis=1) - z[labels > 0]))

  best = optimize.minimize_scalar(mean, bounds=(-4, 8), method="bounded", options={"xatol": 1e-8}).x
  got = float(
    importance.calibrated_temperature(
      jnp.asarray(predictions), jnp.asarray(labels), jnp.asarray(weights)
    )
  )
  assert abs(got - best) < 2e-3
  # Always right predictions favor the largest b (from e^4 on, their loss rounds to 0), always wrong
  # ones the smallest.
  assert float(importance.calibrated_temperature(jnp.asarray(labels), jnp.asarray(labels))) > 4
  assert float(importance.calibrated_temperature(jnp.asarray(-labels), jnp.asarray(labels))) < -3.9


def test_calibration_makes_cross_entropy_informative():
  """Theory: for ten classes at b = 1, losses of right and wrong predictions differ by only 1.68."""
  labels = np.eye(10, dtype=np.float32)[np.arange(200) % 10] - 0.1
  predictions = labels.copy()
  predictions[:10] = labels[np.arange(1, 11)]  # a twentieth is wrong
  sampler = importance.importance("cross_entropy")
  state = sampler.init(jnp.full((10,), 20, jnp.int32), 200)
  rows = jnp.arange(200, dtype=jnp.int32)
  flat = optax.softmax_cross_entropy_with_integer_labels(
    jnp.asarray(predictions), jnp.argmax(jnp.asarray(labels), axis=1)
  )
  assert float(200 * jnp.sum(flat**2) / jnp.sum(flat) ** 2) < 1.03
  update = jax.jit(sampler.update)
  for _ in range(40):
    state = update(state, rows, jnp.asarray(labels), info(jnp.asarray(predictions)))
  assert float(importance.sampling_distribution(state, 0.0).gain) > 5


@pytest.mark.slow
def test_two_million_rows_never_draw_a_row_of_score_zero():
  n, size = 2_000_000, 1000
  scores = np.where(np.arange(n) % 2, np.random.default_rng(0).pareto(1.5, n), 0).astype(np.float32)
  sampler = importance.importance("squared_error", uniform_mix=0.0, weight_exponent=1.0)
  state = sampler.init(jnp.asarray([n // 2, n // 2], jnp.int32), n)
  state = importance.with_distribution(
    state._replace(scores=jnp.asarray(scores), known=state.base > 0), 0.0, size
  )
  rows, weights = jax.jit(jax.vmap(lambda key: sampler.draw(key, state, size)))(
    jax.random.split(jax.random.key(0), 300)
  )
  assert (scores[np.asarray(rows)] > 0).all()
  assert all(len(set(batch)) == size for batch in np.asarray(rows[:20]).tolist())
  # mean(w f) estimates the mean of f over the rows that can be drawn. Here f is 1, and the score,
  # whose estimate varies only by rows drawn with certainty.
  means = np.asarray(jnp.mean(weights, axis=1), np.float64)
  assert abs(means.mean() - 0.5) < 4 * means.std() / np.sqrt(300)
  drawn = np.asarray(jnp.mean(weights * scores[rows], axis=1), np.float64)
  assert_close(drawn.mean(), scores.mean(dtype=np.float64), 1e-3)


def test_nan_scores_are_ignored():
  sampler = importance.importance("squared_error")
  rows, labels = jnp.arange(5, dtype=jnp.int32), jnp.zeros((5, 4))
  predictions = jnp.ones((5, 4)).at[2, 1].set(jnp.nan)
  state = sampler.update(sampler.init(COUNTS, CAPACITY), rows, labels, info(predictions))
  np.testing.assert_array_equal(state.known[:6], [True, True, False, True, True, False])
  assert np.isfinite(np.asarray(state.scores)).all()


def problem(n=240, c=3, d=6, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, c, n)
  x = (1.5 * np.eye(c, d)[labels] + 0.5 * rng.normal(size=(n, d))).astype(np.float32)
  y = (np.eye(c)[labels] - 1 / c).astype(np.float32)
  first = [np.flatnonzero(labels == k)[:2] for k in range(c)]
  return Support(jnp.asarray(x[np.concatenate(first)]), jnp.asarray(y[np.concatenate(first)])), x, y


KERNEL = kipcore.ntk_fn(kipcore.fc(1))


def distiller(sampler, batch_size=40):
  method = kip.kip(KERNEL, kip.KIPOptions(1e-3, learn_labels=True))
  return loop.Distiller(method, sampler, optax.adam(0.02), batch_size)


@pytest.mark.parametrize(
  "score, num_devices",
  slow_except(
    [
      (score, n)
      for score in ("cross_entropy", "squared_error", "residual_norm", "margin")
      for n in (1, 8)
    ],
    ("cross_entropy", 1),
    ("squared_error", 8),
  ),
)
def test_the_loop_learns_with_every_score(score, num_devices):
  support, x, y = problem()
  d = distiller(importance.importance(score, least_gain=1.0))
  result = loop.distill(0, d, support, x, y, 60, devices=jax.devices()[:num_devices])
  before, after = (
    float(kipcore.evaluate_krr(KERNEL, s, x, y, relative_ridge=1e-3).loss)
    for s in (support, result.support)
  )
  assert after < 0.9 * before
  assert int(result.state.sampler.known.sum()) > (200 if num_devices == 1 else 25)
  again = loop.distill(0, d, support, x, y, 60, devices=jax.devices()[:num_devices])
  np.testing.assert_array_equal(result.support.x, again.support.x)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 8])
def test_gradient_is_the_same_on_any_number_of_devices_when_all_rows_are_drawn(num_devices):
  """With unbiased weights and batches of all rows, (uneven) sharding does not change the result."""
  support, x, y = problem(n=203)
  d = distiller(importance.importance("squared_error", weight_exponent=1.0), batch_size=203)
  one, other = (
    loop.distill(0, d, support, x, y, 1, devices=jax.devices()[:n]).history[-1]
    for n in (1, num_devices)
  )
  for name in ("loss", "gradient_norm"):
    assert abs(other[name] - one[name]) <= 2e-5 * abs(one[name])


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_refresh_scores_every_row_with_the_current_set(num_devices):
  support, x, y = problem(n=203)
  d = distiller(importance.importance("squared_error", refresh_every=5), batch_size=24)
  devices = jax.devices()[:num_devices]
  before = loop.distill(0, d, support, x, y, 5, devices=devices)
  # Step 6 refreshes all scores after five steps, and then updates those of its own batch.
  after = loop.distill(0, d, support, x, y, 6, devices=devices)
  targets = jax.tree.map(
    lambda a: a[0],
    loop.arrange_targets(
      x, y, num_devices, kipcore.keys.stream(kipcore.keys.canonical_key(0), "arrange")
    ),
  )
  rows = int(targets.class_counts.sum())
  known = np.asarray(after.state.sampler.known)[:rows]
  assert known.all() and (
    num_devices == 8 or not np.asarray(before.state.sampler.known)[:rows].all()
  )
  k = KERNEL(before.support.x, None)
  fit = kipcore.krr_fit(k, before.support.y, kipcore.relative_ridge(k, 1e-3))
  expected = np.sum(
    (
      np.asarray(kipcore.krr_predict(fit, KERNEL(jnp.asarray(targets.x), before.support.x)))
      - targets.y
    )
    ** 2,
    axis=1,
  )[:rows]
  assert_close(np.asarray(after.state.sampler.scores)[:rows], expected, 1e-3)
  assert (
    loop.scoring_evaluations(d, 203, 5) == 0 and loop.scoring_evaluations(d, 203, 11) == 2 * 203
  )


def test_bad_input():
  with pytest.raises(ValueError, match="score: expected one of"):
    importance.importance("entropy")
  with pytest.raises(TypeError, match="score: expected a name or a callable"):
    importance.importance(3)
  with pytest.raises(ValueError, match="uniform_mix"):
    importance.importance(uniform_mix=1.5)
  with pytest.raises(ValueError, match="least_gain: expected a number >= 1"):
    importance.importance(least_gain=float("nan"))
  with pytest.raises(ValueError, match="sampler: expected one of uniform"):
    importance.sampler("best")
  support, x, y = problem()
  with pytest.raises(
    ValueError, match=r"score: expected one value per target, shape \(40,\), got \(40, 3\)"
  ):
    loop.distill(0, distiller(importance.importance(lambda p, y: p - y)), support, x, y, 2)
  with pytest.raises(ValueError, match="x: expected finite values, got 240 NaN"):
    loop.distill(
      0, distiller(importance.importance()), support, np.where(np.arange(6) == 1, np.nan, x), y, 2
    )
  with pytest.raises(NumericalError, match="step 1"):  # losses that are not numbers
    loop.distill(
      0,
      distiller(importance.importance()),
      support._replace(y=jnp.full_like(support.y, jnp.nan)),
      x,
      y,
      2,
    )
