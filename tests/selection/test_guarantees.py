"""Theorems' sizes, and certificates of weighted subsets on problems small enough to know the truth."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, assert_close

from kipcore.selection import certificate, guarantees, sampling

RIDGE = 30.0


def heavy_tailed(n, seed=0):
  """Rows of heavy-tailed length, the bias-free two-layer ReLU tangent kernel, and three smooth targets with noise."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 10)) * rng.standard_t(1.5, size=(n, 1))
  norms = np.linalg.norm(x, axis=1)
  cosine = np.clip(x @ x.T / np.outer(norms, norms), -1, 1)
  angle = np.arccos(cosine)
  k = np.outer(norms, norms) * (np.sin(angle) + 2 * (np.pi - angle) * cosine) / np.pi
  return x, k, np.tanh(x[:, :3]) + 0.1 * rng.normal(size=(n, 3))


def closed_form(k, y, ridge):
  """Exact scores, F* and effective dimension, in float64."""
  inverse = np.linalg.inv(k + ridge * np.eye(len(k)))
  dual, leverage = inverse @ y, 1 - ridge * np.diag(inverse)
  best = ridge * np.sum(y * dual)
  return leverage + (ridge * dual**2 @ np.ones(y.shape[1])) * ridge / best, best, leverage.sum()


def objective(k, y, ridge, dual, weights=None):
  losses = np.sum((k @ dual - y) ** 2, axis=1)
  return np.sum(losses if weights is None else weights * losses) + ridge * np.sum(dual * (k @ dual))


def errors_of(bank, scores, m, draws, seed=0, **options):
  """Errors `(draws, q)` of weighted subsets drawn by the scores."""
  draw = lambda key: certificate.query_errors(
    bank, *sampling.sensitivity_sample(key, scores, m, **options)
  )
  return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(seed), draws)))


def bank_of(k, y, ridge=RIDGE, **options):
  return certificate.query_bank(0, jnp.asarray(k), None, jnp.asarray(y), ridge, **options)


def rbf(x1, x2=None):
  x2 = x1 if x2 is None else x2
  return jnp.exp(-0.5 * jnp.sum((x1[:, None] - x2[None]) ** 2, axis=-1) / 9)


def test_guarantee_at_inverts_sample_size():
  for theorem in guarantees.THEOREMS:
    for epsilon in (0.05, 0.3, 0.9):
      m = guarantees.sample_size(40.0, 35.0, epsilon, 0.1, theorem)
      assert isinstance(m, int)
      reached = guarantees.guarantee_at(m, 40.0, 35.0, 0.1, theorem)
      assert reached <= epsilon * (1 + 1e-9)
      # One draw fewer does not do, so m is the least (where the size is not set by the spectral part).
      if theorem != "krr_optimum" or epsilon < 0.3:
        assert guarantees.guarantee_at(m - 1, 40.0, 35.0, 0.1, theorem) > epsilon * (1 - 1e-9)
    base, double, safer = (
      guarantees.sample_size(t, 35.0, 0.1, delta, theorem)
      for t, delta in ((40.0, 0.1), (80.0, 0.1), (40.0, 0.01))
    )
    assert double >= 2 * base - 1 and safer > base
  strong = [guarantees.sample_size(40.0, 35.0, e, 0.1) for e in (0.02, 0.01)]
  optimum = [guarantees.sample_size(40.0, 35.0, e, 0.1, "krr_optimum") for e in (0.002, 0.001)]
  assert 3.9 < strong[1] / strong[0] < 4.1 and 1.9 < optimum[1] / optimum[0] < 2.1


def test_sample_sizes_match_direct_formulas():
  log = math.log(20)
  assert guarantees.sample_size(10, 1, 0.5, 0.1, "single_query") == math.ceil(
    80 * (1 + 1 / 6) * log
  )
  assert guarantees.sample_size(10, 6, 0.5, 0.1) == math.ceil(320 * (1 + 1 / 12) * math.log(1000))
  assert guarantees.guarantee_at(50, 40.0, 35.0) == math.inf
  assert guarantees.guarantee_at(50, 40.0, 35.0, theorem="krr_optimum") == math.inf


@pytest.mark.parametrize(
  "bad, match",
  [
    (dict(epsilon=1.0), "epsilon"),
    (dict(epsilon=0.0), "epsilon"),
    (dict(delta=1.0), "delta"),
    (dict(total_sensitivity=0.0), "total_sensitivity"),
    (dict(dimension=-1.0), "dimension"),
    (dict(theorem="x"), "theorem"),
  ],
)
def test_sample_size_rejects_invalid_input(bad, match):
  with pytest.raises(ValueError, match=match):
    guarantees.sample_size(
      **{**dict(total_sensitivity=5.0, dimension=4.0, epsilon=0.5, delta=0.1), **bad}
    )


def test_measured_errors_are_within_the_guarantees(x64):
  """At the size of a theorem, far fewer than delta of the draws exceed its epsilon, over all queries of the bank."""
  _, k, y = heavy_tailed(200)
  ridge = 3000.0
  scores, best, dimension = closed_form(k, y, ridge)
  assert np.linalg.eigvalsh(k)[-1] > ridge
  bank = bank_of(k, y, ridge)
  m = guarantees.sample_size(scores.sum(), dimension, 0.5, 0.1)
  assert np.mean(errors_of(bank, jnp.asarray(scores), m, 100).max(1) > 0.5) <= 0.1
  m = guarantees.sample_size(scores.sum(), dimension, 0.2, 0.1, "krr_optimum")
  ratios = []
  for seed in range(20):
    indices, weights = map(np.asarray, sampling.sensitivity_sample(seed, jnp.asarray(scores), m))
    w = np.bincount(indices, weights=weights, minlength=200)
    ratios.append(
      objective(k, y, ridge, np.linalg.solve(w[:, None] * k + ridge * np.eye(200), w[:, None] * y))
      / best
    )
  assert np.mean(np.array(ratios) > 1.2) <= 0.1 and min(ratios) >= 1


def test_weighted_objective_is_unbiased(x64):
  """Mean of F_S(W) over 2,000 draws within 4 standard errors, for 5 W, with and without replacement."""
  _, k, y = heavy_tailed(100)
  scores, _, _ = closed_form(k, y, RIDGE)
  rng = np.random.default_rng(1)
  duals = [
    np.linalg.solve(k + RIDGE * np.eye(100), y + s * rng.normal(size=y.shape))
    for s in (0, 0.1, 1, 3, 10)
  ]
  losses = np.stack([np.sum((k @ a - y) ** 2, axis=1) for a in duals], axis=1)
  for replace in (True, False):
    draw = lambda key: sampling.sensitivity_sample(key, jnp.asarray(scores), 30, replace=replace)
    indices, weights = map(
      np.asarray, jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 2000))
    )
    sums = np.einsum("dm,dmq->dq", weights, losses[indices])
    assert np.all(np.abs(sums.mean(0) - losses.sum(0)) <= 4 * sums.std(0, ddof=1) / np.sqrt(2000))


def test_sensitivity_beats_uniform_on_heavy_tails(x64):
  """400 rows, 150 draws: the worst error over the bank is at most 0.6 of that of uniform draws, mixed or not."""
  _, k, y = heavy_tailed(400)
  scores, _, _ = closed_form(k, y, RIDGE)
  bank, scores = bank_of(k, y), jnp.asarray(scores)
  uniform, exact, mixed = (
    errors_of(bank, s, 150, 60, uniform_mix=g).max(1).mean()
    for s, g in ((jnp.ones(400), 0.0), (scores, 0.0), (scores, 0.1))
  )
  assert exact <= 0.6 * uniform and mixed <= 0.6 * uniform


def test_error_decreases_as_the_inverse_square_root_of_the_size(x64):
  _, k, y = heavy_tailed(200)
  scores, _, _ = closed_form(k, y, RIDGE)
  bank, sizes = bank_of(k, y), [50, 200, 800]
  errors = [errors_of(bank, jnp.asarray(scores), m, 80, seed=m).mean() for m in sizes]
  assert -0.6 <= np.polyfit(np.log(sizes), np.log(errors), 1)[0] <= -0.4


def test_sampling_by_nearly_equal_scores_is_as_good_as_uniform(x64):
  """Points of a sphere: scores are flat, and sampling by them is as good as uniform, within noise."""
  rng = np.random.default_rng(3)
  x = rng.normal(size=(300, 4))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  k = np.exp(-2 * np.sum((x[:, None] - x[None]) ** 2, axis=-1))
  y = np.sin(3 * x[:, :1])
  scores, _, _ = closed_form(k, y, 30.0)
  assert scores.max() / scores.min() < 1.5
  bank = bank_of(k, y, 30.0)
  a, b = (errors_of(bank, s, 100, 200).mean(1) for s in (jnp.asarray(scores), jnp.ones(300)))
  assert a.mean() <= b.mean() + 3 * np.hypot(a.std(), b.std()) / np.sqrt(200)


def test_wrong_labels_are_not_oversampled(x64):
  """10 % wrong labels: a drawn sample has at most 1.3 times their share, the top by label term over 90 %."""
  rng = np.random.default_rng(4)
  n, classes = 400, rng.integers(0, 4, 400)
  x = 3 * np.eye(6)[classes] + 0.5 * rng.normal(size=(n, 6))
  wrong = rng.permutation(n) < n // 10
  labels = np.where(wrong, (classes + 1 + rng.integers(0, 3, n)) % 4, classes)
  y = np.eye(4)[labels] - 0.25
  k = np.exp(-np.sum((x[:, None] - x[None]) ** 2, axis=-1) / 2)
  ridge = 1.0
  scores, _, _ = closed_form(k, y, ridge)
  residuals = np.sum((y - k @ np.linalg.solve(k + ridge * np.eye(n), y)) ** 2, axis=1)
  draw = lambda key: sampling.sensitivity_sample(key, jnp.asarray(scores), 100).indices
  indices = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(5), 200)))
  assert wrong[indices].mean() <= 1.3 * wrong.mean()
  assert wrong[np.argsort(-residuals)[:30]].mean() > 0.9


def test_certificate_matches_direct_formulas(x64):
  """Exact case: F*, F(W_S), effective dimension and the errors equal NumPy's; JSON round trip; key decides."""
  _, k, y = heavy_tailed(150)
  scores, best, dimension = closed_form(k, y, RIDGE)
  sample = sampling.sensitivity_sample(0, jnp.asarray(scores), 120)
  weights = sample.weights.at[0].set(0)
  found = certificate.measure_coreset(
    1,
    jnp.asarray(k),
    None,
    jnp.asarray(y),
    RIDGE,
    sample.indices,
    weights,
    total_sensitivity=scores.sum(),
  )
  w = np.bincount(np.asarray(sample.indices), weights=np.asarray(weights), minlength=150)
  dual = np.linalg.solve(w[:, None] * k + RIDGE * np.eye(150), w[:, None] * y)
  value = objective(k, y, RIDGE, dual)
  assert found.exact and found.num_samples == 120 and found.num_queries == 92
  assert_close(found.objective_lower, best, 1e-9)
  assert_close(found.objective_reference, best, 1e-9)
  assert_close(found.objective_subset, value, 1e-9)
  assert_close(found.objective_ratio, value / best, 1e-9)
  assert_close(
    [found.effective_dimension_lower, found.effective_dimension_upper], [dimension] * 2, 1e-8
  )
  assert_close(found.label_mass, scores.sum() - dimension, 1e-8)
  optimum = np.linalg.solve(k + RIDGE * np.eye(150), y)
  assert_close(
    found.epsilon_at_optimum, abs(objective(k, y, RIDGE, optimum, w) / best - 1), 0, 1e-9
  )
  assert found.measured_epsilon >= found.epsilon_at_optimum and found.promised_epsilon is None
  assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()
  again = certificate.measure_coreset(
    1,
    jnp.asarray(k),
    None,
    jnp.asarray(y),
    RIDGE,
    sample.indices,
    weights,
    total_sensitivity=scores.sum(),
  )
  assert again == found


def test_test_queries_attain_the_sensitivities(x64):
  """At the sharpest query of a row its share of F is its sensitivity: the closed form and the bank agree."""
  _, k, y = heavy_tailed(120)
  scores, _, _ = closed_form(k, y, RIDGE)
  bank = bank_of(k, y, num_queries=10)
  shares = np.asarray(bank.losses / (bank.losses.sum(0) + bank.penalties)[None])
  assert np.all(shares <= scores[:, None] * (1 + 1e-6))
  top = np.argsort(-scores)[:10]
  # Queries: zero, the optimum, 10 random ones, then the sharpest of the top rows.
  assert_close(np.diag(shares[top, 12:22]), scores[top], 1e-6)


def test_all_rows_have_no_error_in_float32():
  dtype = jnp.dtype("float32")
  x = jnp.asarray(np.random.default_rng(6).normal(size=(90, 3)), dtype)
  y = jnp.sin(x[:, :2])
  found = certificate.measure_coreset(
    0, rbf, x, y, 1.0, jnp.arange(90), jnp.ones(90, dtype), num_queries=5, total_sensitivity=10.0
  )
  assert found.measured_epsilon < 2e-4 and abs(found.objective_ratio - 1) < 2e-4


@FLOAT64_IS_SLOW
def test_landmarks_give_bounds_on_the_exact_values(dtype):
  """Few landmarks: the lower bound stays below F* and tightens with steps; rows are streamed in uneven blocks."""
  rng = np.random.default_rng(7)
  x = rng.normal(size=(500, 4)).astype(dtype)
  y = (np.sin(x[:, :2]) + 0.3 * rng.normal(size=(500, 2))).astype(dtype)
  wide = x.astype(np.float64)
  k = np.exp(-0.5 * np.sum((wide[:, None] - wide[None]) ** 2, axis=-1) / 9)
  scores, best, dimension = closed_form(k, y.astype(np.float64), 1.0)
  sample = sampling.sensitivity_sample(0, jnp.asarray(scores, dtype), 150)
  one, three = (
    certificate.measure_coreset(
      2,
      rbf,
      jnp.asarray(x),
      jnp.asarray(y),
      1.0,
      *sample,
      num_landmarks=30,
      num_queries=8,
      dual_steps=steps,
      block_size=128,
    )
    for steps in (1, 3)
  )
  slack = {"float32": 1e-4, "float64": 1e-9}[dtype.name]
  assert not one.exact and one.num_landmarks == 30
  assert one.objective_lower <= best * (1 + slack) and three.objective_lower <= best * (1 + slack)
  assert (
    one.objective_lower <= three.objective_lower * (1 + slack)
    and three.objective_lower > 0.999 * best
  )
  assert one.objective_ratio >= three.objective_ratio * (1 - slack)
  assert three.objective_reference >= best * (1 - slack)
  w = np.bincount(
    np.asarray(sample.indices), weights=np.asarray(sample.weights, np.float64), minlength=500
  )
  value = objective(k, y, 1.0, np.linalg.solve(w[:, None] * k + np.eye(500), w[:, None] * y))
  assert_close(one.objective_subset, value, 10 * slack)
  assert (
    one.effective_dimension_lower
    <= dimension * (1 + slack)
    <= one.effective_dimension_upper * (1 + 2 * slack)
  )


def test_measure_coreset_rejects_invalid_input():
  y, k = jnp.ones((5, 1)), jnp.eye(5)
  good = dict(key=0, kernel=k, x=None, y=y, ridge=1.0, indices=jnp.arange(2), weights=jnp.ones(2))
  for change, match in [
    (dict(ridge=0.0), "ridge"),
    (dict(kernel=rbf), "x: expected rows"),
    (dict(indices=jnp.asarray([0, 5])), "indices"),
    (dict(weights=-jnp.ones(2)), "weights"),
    (dict(weights=jnp.ones(3)), "weights"),
    (dict(y=y * jnp.nan), "y: expected finite"),
    (dict(kernel=jnp.eye(4)), "kernel"),
    (dict(num_queries=0), "num_queries"),
  ]:
    with pytest.raises(ValueError, match=match):
      certificate.measure_coreset(**{**good, **change})
  with pytest.raises(TypeError, match="integers"):
    certificate.measure_coreset(**{**good, "indices": jnp.ones(2)})
