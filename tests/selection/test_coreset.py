"""One contract for every strategy, the three exact cures for weights, and what `auto` promises."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, assert_close, slow_except

import kipcore
from kipcore.selection import coreset, representatives
from kipcore.types import Support

NTK = kipcore.ntk_fn(kipcore.fc(1))


def blobs(dtype=np.float32, sizes=(60, 25, 40), side=4, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(len(sizes)), sizes)
  modes = rng.normal(size=(len(sizes), 2, side * side))
  x = 1.5 * modes[labels, rng.integers(0, 2, labels.size)] + rng.normal(
    size=(labels.size, side * side)
  )
  order = rng.permutation(labels.size)
  y = np.eye(len(sizes))[labels] - 1 / len(sizes)
  return x[order].reshape(-1, side, side, 1).astype(dtype), y[order].astype(dtype)


@pytest.mark.parametrize("strategy", coreset.STRATEGIES)
@FLOAT64_IS_SLOW
def test_every_strategy_returns_a_valid_coreset(strategy, dtype):
  x, y = blobs(dtype)
  chosen = kipcore.select_coreset(3, x, y, 4, strategy, NTK, num_candidates=40)
  assert chosen.x.shape == (12, 4, 4, 1) and chosen.y.shape == (12, 3)
  assert chosen.x.dtype == chosen.y.dtype == chosen.weights.dtype == dtype
  assert np.isfinite(chosen.x).all() and (np.asarray(chosen.weights) > 0).all()
  assert (np.asarray(chosen.y).argmax(1) == np.repeat([0, 1, 2], 4)).all()
  real = chosen.indices >= 0
  assert real.all() or not real.any()
  assert real.all() == (chosen.strategy not in ("kmeans", "noise"))
  if real.all():
    assert len(set(chosen.indices.tolist())) == 12
    assert np.array_equal(x[chosen.indices], chosen.x) and np.array_equal(
      y[chosen.indices], chosen.y
    )
  again = kipcore.select_coreset(3, x, y, 4, strategy, NTK, num_candidates=40)
  assert np.array_equal(chosen.x, again.x) and np.array_equal(chosen.weights, again.weights)
  if strategy in ("herding", "k_center"):
    for c in range(3):  # nothing is drawn: the choice within the class alone
      rows = np.flatnonzero(y.argmax(1) == c)
      assert (
        rows[np.asarray(getattr(representatives, strategy)(x[rows], 4))]
        == chosen.indices[4 * c : 4 * c + 4]
      ).all()
  elif strategy not in ("auto", "krr_pursuit"):
    other = kipcore.select_coreset(4, x, y, 4, strategy, NTK)
    assert not np.array_equal(chosen.x, other.x)


def test_kmeans_weights_count_the_rows_of_each_cluster(x64):
  x, y = blobs(np.float64)
  chosen = kipcore.select_coreset(0, x, y, 3, "kmeans")
  per_class = np.asarray(chosen.weights).reshape(3, 3).sum(1)
  assert (per_class == np.bincount(y.argmax(1))).all()
  means = (
    (np.asarray(chosen.weights)[:, None] * np.asarray(chosen.x).reshape(9, -1))
    .reshape(3, 3, -1)
    .sum(1)
  )
  expected = np.stack([x[y.argmax(1) == c].reshape(-1, 16).sum(0) for c in range(3)])
  assert_close(means, expected, rtol=1e-2)  # Lloyd stops at a tolerance


@pytest.mark.slow
def test_sensitivity_weights_are_unbiased(x64):
  x, y = blobs(np.float64)
  f = np.random.default_rng(0).normal(size=125) + 2
  totals = []
  for seed in range(200):
    chosen = kipcore.select_coreset(seed, x, y, 4, "krr_sensitivity", NTK, score_ridge=3.0)
    totals.append(np.sum(np.asarray(chosen.weights) * f[chosen.indices]))
  assert abs(np.mean(totals) - f.sum()) < 4 * np.std(totals) / np.sqrt(200)


@pytest.mark.parametrize("b_std", [0.0, 0.1])
def test_three_ways_to_absorb_weights_give_the_same_predictor(b_std, x64):
  x, y = blobs(np.float64)
  kernel = kipcore.ntk_fn(kipcore.fc(1, b_std=b_std))
  chosen = kipcore.select_coreset(0, x, y, 4, "krr_sensitivity", kernel)
  weighted = kipcore.krr_fit(kernel(chosen.x), chosen.y, chosen.ridge / chosen.weights)
  expected = kipcore.krr_predict(weighted, kernel(jnp.asarray(x), chosen.x))

  def predict(how):
    support, ridge = kipcore.absorb_weights(kernel, chosen, chosen.ridge, 1e-4, how)
    return kipcore.krr_predict(
      kipcore.krr_fit(kernel(support.x), support.y, ridge), kernel(jnp.asarray(x), support.x)
    )

  for how in ("labels", "ridge"):
    assert_close(predict(how), expected, rtol=1e-8)
  if b_std == 0.0:
    assert_close(predict("scale"), expected, rtol=1e-8)
  else:
    with pytest.raises(ValueError, match="not homogeneous"):
      predict("scale")
  assert np.abs(predict("drop") - expected).max() > 1e-3


def test_solved_labels_are_never_worse_than_the_weighted_coreset(x64):
  """F over all rows: label solve minimizes it over the span, whatever the draw and its weights."""
  x, y = blobs(np.float64)
  for seed in range(5):
    chosen = kipcore.select_coreset(seed, x, y, 4, "krr_sensitivity", NTK)
    k_ss, k_ns = NTK(chosen.x), NTK(jnp.asarray(x), chosen.x)

    def objective(c):
      return jnp.sum((k_ns @ c - y) ** 2) + chosen.ridge * jnp.sum(c * (k_ss @ c))

    weighted = kipcore.krr_fit(k_ss, chosen.y, chosen.ridge / chosen.weights).dual
    labels = kipcore.label_solve(k_ss, k_ns, jnp.asarray(y), 1e-4, chosen.ridge)
    solved = kipcore.krr_fit(k_ss, labels, 1e-4).dual
    assert objective(solved) <= objective(weighted) * (1 + 1e-9)


@FLOAT64_IS_SLOW
def test_auto_is_never_worse_than_uniform_by_its_criterion(dtype):
  x, y = blobs(dtype)
  chosen = kipcore.select_coreset(0, x, y, 2, "auto", NTK, num_candidates=40)
  assert set(chosen.objectives) == set(coreset.AUTO_CANDIDATES)
  candidates = kipcore.auto_candidates(0, x, y, 2, NTK, num_candidates=40)
  assert tuple(candidates) == coreset.AUTO_CANDIDATES
  assert chosen.objectives[chosen.strategy] == min(chosen.objectives.values())
  errors = {}
  for strategy in ("uniform", chosen.strategy):
    other = kipcore.select_coreset(0, x, y, 2, strategy, NTK, num_candidates=40)
    np.testing.assert_array_equal(other.x, candidates[strategy].x)
    result = kipcore.evaluate_krr(NTK, Support(other.x, other.y), x, y, relative_ridge=1e-6)
    errors[strategy] = 1 - float(result.accuracy)
    assert (
      errors[strategy]
      == kipcore.measured_objective(NTK, other, x, y)
      == chosen.objectives[strategy]
    )
  assert errors[chosen.strategy] <= errors["uniform"]


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x, y: kipcore.select_coreset(0, x, y, 2, "best"), "strategy: expected one of"),
    (lambda x, y: kipcore.select_coreset(0, x, y, 2, "auto"), "kernel_fn: expected a kernel"),
    (lambda x, y: kipcore.select_coreset(0, x, y, 26, "uniform"), "25 rows of the smallest class"),
    (lambda x, y: kipcore.select_coreset(0, x, y[:3], 2, "uniform"), "same number of rows"),
    (
      lambda x, y: kipcore.select_coreset(0, x, y, 2, "krr_sensitivity", NTK, score_ridge=0.0),
      "score_ridge",
    ),
  ],
)
def test_invalid_input_raises(call, message):
  with pytest.raises(ValueError, match=message):
    call(*blobs())


def repeated_rows(dtype, copies=10):
  """Four distinct rows in two classes, each repeated, and their labels."""
  rows = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype)
  labels = np.repeat([0, 0, 1, 1], copies)
  return np.repeat(rows, copies, axis=0), np.asarray(kipcore.one_hot_centered(labels, 2), dtype)


EVERY_STRATEGY = [s for s in coreset.STRATEGIES if s not in ("noise", "krr_pursuit")]


@pytest.mark.parametrize(
  "strategy",
  slow_except(
    EVERY_STRATEGY, "auto", "uniform", "kmedoids", "kmeans_plusplus", "herding", "k_center"
  ),
)
def test_duplicate_rows_keep_the_total_weight_and_issue_a_warning(strategy):
  x, y = repeated_rows("float32")
  with pytest.warns(UserWarning, match="got 5 for 2 distinct rows of class 0"):
    chosen = kipcore.select_coreset(0, x, y, 5, strategy, kipcore.ntk_fn(kipcore.fc(1)))
  assert chosen.x.shape == (10, 2)
  # Scores give unbiased weights, whose sum is random; all other weights sum to the number of rows.
  tolerance = 0.05 if strategy in ("krr_sensitivity", "leverage") else 1e-5
  np.testing.assert_allclose(np.sum(chosen.weights), len(x), rtol=tolerance)
  assert np.all(np.asarray(chosen.weights) > 0)


def test_equal_points_share_their_weight():
  x, y = repeated_rows("float32")
  with pytest.warns(UserWarning):
    chosen = kipcore.select_coreset(0, x, y, 5, "kmeans")
  for row in np.unique(x, axis=0):
    same = np.all(np.asarray(chosen.x) == row, axis=1)
    weights = np.asarray(chosen.weights)[same]
    np.testing.assert_allclose(weights.sum(), 10, rtol=1e-6)
    np.testing.assert_allclose(weights, weights[0], rtol=1e-6)


def test_enough_distinct_rows_give_no_warning():
  x, y = repeated_rows("float32")
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    kipcore.select_coreset(0, x, y, 2, "kmedoids")


@pytest.mark.parametrize("target", [2.0, 6.0, 30.0])
def test_automatic_score_ridges_are_accepted_by_the_scores(target):
  """Four distinct rows have an effective dimension of at most 4: a larger target gives a tiny ridge."""
  x, y = repeated_rows("float32")
  kernel_fn = kipcore.ntk_fn(kipcore.fc(1))
  k = kernel_fn(jnp.asarray(x))
  exact = kipcore.score_ridge_for_dimension(k, target).ridge
  assert np.isfinite(kipcore.krr_sensitivities(k, jnp.asarray(y), exact)).all()
  assert np.isfinite(kipcore.ridge_leverage_scores(k, exact)).all()
  bound = kipcore.landmark_score_ridge(0, kernel_fn, jnp.asarray(x), target, 20).ridge
  scores = kipcore.approximate_krr_sensitivities(
    0, kernel_fn, jnp.asarray(x), jnp.asarray(y), bound, 20
  )
  assert np.isfinite(scores.scores).all()


def test_auto_skips_candidates_that_fail():
  x, y = repeated_rows("float32")
  kernel_fn = kipcore.ntk_fn(kipcore.fc(1))
  with pytest.warns(UserWarning):
    with pytest.raises(kipcore.NumericalError):
      kipcore.select_coreset(0, x, y, 5, "krr_pursuit", kernel_fn)
    chosen = kipcore.select_coreset(0, x, y, 5, "auto", kernel_fn)
  assert "krr_pursuit" not in chosen.objectives and chosen.strategy in chosen.objectives


def test_coresets_can_pass_through_jit():
  x, y = repeated_rows("float32")
  chosen = kipcore.select_coreset(0, x, y, 2, "krr_sensitivity", kipcore.ntk_fn(kipcore.fc(1)))
  doubled = jax.jit(lambda c: dataclasses.replace(c, weights=2 * c.weights))(chosen)
  assert doubled.strategy == "krr_sensitivity"
  np.testing.assert_array_equal(doubled.weights, 2 * chosen.weights)
  assert all(
    isinstance(leaf, (jax.Array, np.ndarray, float, int)) for leaf in jax.tree.leaves(chosen)
  )


@pytest.mark.parametrize("offset, features", slow_except([(128.0, 300), (1000.0, 8)], (1000.0, 8)))
def test_selection_does_not_depend_on_a_common_shift(offset, features):
  """float32 rows far from the origin give the selection of the centered rows."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(120, features)).round(2)  # offsets are exact in float32 to that precision
  labels = np.arange(120) % 2
  x[labels == 1] += 1.0
  y = np.asarray(kipcore.one_hot_centered(labels, 2))
  shifted = (x + offset).astype("f4")
  centered = (shifted.astype("f8") - offset).astype("f4")
  for strategy in ("kmeans", "kmedoids", "kmeans_plusplus", "herding", "k_center"):
    here, there = (kipcore.select_coreset(0, rows, y, 4, strategy) for rows in (centered, shifted))
    np.testing.assert_array_equal(here.indices, there.indices, err_msg=strategy)
    np.testing.assert_allclose(here.weights, there.weights, err_msg=strategy)
    np.testing.assert_allclose(here.x + offset, there.x, rtol=1e-5, err_msg=strategy)


def test_scaled_points_have_the_norm_of_the_rows(dtype):
  x, y = blobs(dtype)
  centers = np.array(kipcore.select_coreset(0, x, y, 2, "kmeans").x)
  centers[1] = 0
  scaled = np.asarray(kipcore.scaled_to_rows(centers, x), np.float64)
  norms = np.linalg.norm(scaled.reshape(6, -1), axis=1)
  common = np.sqrt(np.mean(np.sum(x.reshape(len(x), -1).astype(np.float64) ** 2, axis=1)))
  assert_close(norms, np.where(np.arange(6) == 1, 0, common), 4 * np.finfo(dtype).eps)
  lengths = np.linalg.norm(centers.reshape(6, -1), axis=1).reshape(6, 1, 1, 1)
  assert_close(scaled * lengths, common * centers.astype(np.float64), 4 * np.finfo(dtype).eps)
  with pytest.raises(ValueError, match="points: expected shape"):
    kipcore.scaled_to_rows(centers[:, :2], x)
  with pytest.raises(TypeError, match="rows: expected a floating dtype"):
    kipcore.scaled_to_rows(centers, x.astype(np.int32))
