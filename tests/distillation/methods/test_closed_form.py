"""Closed-form distillation: exactness, inverses of feature maps, choice of the ridge, errors."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, enable_x64

import kipcore
from kipcore.distillation.methods.closed_form import (
  ClosedFormOptions,
  draw_map,
  feature_kernel,
  invert_map,
  krr_closed_form,
  map_features,
)
from kipcore.types import Support

MAPS = {"linear": {}, "fcnn": {"depth": 2}, "rff": {"bandwidth": 3.0}}
SHAPE = (4, 4, 1)


def problem(dtype=np.float64, n=300, c=3, noise=1.0, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(n) % c)
  x = (rng.normal(size=(c, *SHAPE))[labels] + noise * rng.normal(size=(n, *SHAPE))).astype(dtype)
  return x, (np.eye(c)[labels] - 1 / c).astype(dtype)


def options(name, **others):
  return ClosedFormOptions(feature_map=name, **{**MAPS[name], "block_size": 128, **others})


def numpy_features(feature_map, x):
  """Independent implementation, row by row."""
  rows = []
  for row in np.asarray(x, np.float64).reshape(len(x), -1):
    for a in feature_map.weights:
      row = np.asarray(a, np.float64).T @ row
      if feature_map.name == "fcnn":
        row = np.maximum(row, 0.1 * row)
    if feature_map.name == "rff":
      row = np.cos(row + np.asarray(feature_map.shift)) * np.sqrt(2 / row.size)
    rows.append(row)
  return np.array(rows)


def ridge_regression(phi, y, ridge):
  """Argmin ||phi W - y||^2 + ridge ||W||^2 as a least-squares problem, without normal equations."""
  p = phi.shape[1]
  return np.linalg.lstsq(
    np.vstack([phi, np.sqrt(ridge) * np.eye(p)]),
    np.vstack([y, np.zeros((p, y.shape[1]))]),
    rcond=None,
  )[0]


@pytest.fixture(scope="module")
def solved():
  """One problem solved under each map, with 1 and 3 images per class."""
  with enable_x64(True):
    x, y = problem()
    return (
      x,
      y,
      {(name, m): krr_closed_form(3, x, y, m, options(name)) for name in MAPS for m in (1, 3)},
    )


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("name", MAPS)
def test_distilled_set_predicts_like_all_rows(name, per_class, solved, x64):
  x, y, results = solved
  result = results[name, per_class]
  support, ridge = result.support, result.support_ridge
  assert support.x.shape == (3 * per_class, *SHAPE) and support.y.shape == (3 * per_class, 3)
  np.testing.assert_array_equal(np.asarray(support.y).argmax(1), np.repeat(np.arange(3), per_class))
  phi, phi_s = numpy_features(result.feature_map, x), numpy_features(result.feature_map, support.x)
  w = ridge_regression(phi, y, result.ridge)
  assert_close(result.weights, w, 1e-8)
  w_s = phi_s.T @ np.linalg.solve(phi_s @ phi_s.T + ridge * np.eye(len(phi_s)), support.y)
  assert_close(w_s, w, 1e-8)
  new, labels = problem(seed=5)
  assert_close(
    numpy_features(result.feature_map, new) @ w_s, numpy_features(result.feature_map, new) @ w, 1e-8
  )
  assert result.error < 1e-8 and int(result.status) == 0

  # The ridge is the stated fraction, so that scoring with this fraction gives the same model.
  np.testing.assert_allclose(ridge, 1e-6 * np.trace(phi_s @ phi_s.T) / len(phi_s), rtol=1e-6)
  kernel = feature_kernel(result.feature_map)
  for how in ({"ridge": ridge}, {"relative_ridge": 1e-6}):
    scores = kipcore.evaluate_krr(kernel, support, new, labels, **how)
    expected = (numpy_features(result.feature_map, new) @ w).argmax(1) == labels.argmax(1)
    np.testing.assert_allclose(scores.accuracy, expected.mean(), rtol=1e-12)


@pytest.mark.parametrize("relative_ridge", [1e-9, 1e-3, 0.05, 10.0])
def test_the_correction_for_the_ridge_of_the_set_is_exact(relative_ridge, x64):
  x, y = problem()
  result = krr_closed_form(3, x, y, 3, options("linear", relative_ridge=relative_ridge))
  phi_s = np.asarray(result.support.x).reshape(9, -1)
  w_s = phi_s.T @ np.linalg.solve(
    phi_s @ phi_s.T + result.support_ridge * np.eye(9), result.support.y
  )
  assert_close(w_s, result.weights, 1e-8)
  share = result.support_ridge / (np.trace(phi_s @ phi_s.T) / 9)
  if relative_ridge < 10:
    np.testing.assert_allclose(share, relative_ridge, rtol=1e-6)
  else:  # No set has this model at this ridge, so the largest feasible ridge is used.
    s = np.linalg.norm(np.asarray(result.weights) @ np.linalg.pinv(result.support.y), 2)
    np.testing.assert_allclose(result.support_ridge, 0.25 / s**2, rtol=1e-9)
    assert share < relative_ridge


def test_free_part_is_closest_to_the_start(x64):
  x, y = problem()
  rows = kipcore.class_balanced_indices(1, y.argmax(1), 3, 3)
  start = Support(jnp.asarray(x[rows]), jnp.asarray(y[rows]))
  result = krr_closed_form(3, x, y, start, options("linear", relative_ridge=1e-12))
  phi_0, phi_s, w = (
    np.asarray(a, np.float64).reshape(len(a), -1)
    for a in (start.x, result.support.x, result.weights)
  )
  # Feasible moves keep N W = 0 and Y^T N = 0 of the free part N; along all of them the distance is
  # stationary.
  p_y, p_w = y[rows] @ np.linalg.pinv(y[rows]), w @ np.linalg.pinv(w)
  move = (np.eye(9) - p_y) @ np.random.default_rng(0).normal(size=phi_s.shape) @ (np.eye(16) - p_w)
  assert abs(np.vdot(phi_s - phi_0, move)) < 1e-8 * np.linalg.norm(phi_s - phi_0) * np.linalg.norm(
    move
  )
  moved = phi_s + move
  w_moved = moved.T @ np.linalg.solve(
    moved @ moved.T + result.support_ridge * np.eye(9), result.support.y
  )
  assert_close(w_moved, w, 1e-6)


def test_predicted_labels_keep_the_start_as_seen_by_the_model(x64):
  x, y = problem()
  rows = kipcore.class_balanced_indices(1, y.argmax(1), 2, 3)
  start = Support(jnp.asarray(x[rows]), jnp.asarray(y[rows]))
  result = krr_closed_form(
    3, x, y, start, options("linear", labels="predicted", relative_ridge=1e-12)
  )
  predicted = x[rows].reshape(6, -1) @ np.asarray(result.weights)
  assert_close(result.support.y, predicted, 1e-10)
  assert_close(
    np.asarray(result.support.x).reshape(6, -1) @ np.asarray(result.weights), predicted, 1e-8
  )
  assert result.error < 1e-8


def test_uncentered_labels_and_many_outputs(x64):
  x, y = problem()
  target = np.sin(x.reshape(300, -1) @ np.random.default_rng(2).normal(size=(16, 2))) + np.array(
    [[0.5, -1.0]]
  )
  one_each = kipcore.class_balanced_indices(1, y.argmax(1), 1, 3)
  for labels, rows, criterion in (
    (y + 1 / 3, one_each, "accuracy"),
    (target, [0, 1, 2], "loss"),
    (target[:, :1], [7], "loss"),
  ):
    start = Support(jnp.asarray(x[rows]), jnp.asarray(labels[rows]))
    result = krr_closed_form(3, x, labels, start, options("fcnn", criterion=criterion))
    assert_close(
      result.weights,
      ridge_regression(numpy_features(result.feature_map, x), labels, result.ridge),
      1e-8,
    )
    assert result.error < 1e-8


def test_centered_labels_need_points_of_all_classes_but_one(x64):
  x, y = problem(c=4)
  rows = kipcore.class_balanced_indices(1, y.argmax(1), 1, 4)
  points = lambda k, y=y: Support(jnp.asarray(x[rows[:k]]), jnp.asarray(y[rows[:k]]))
  assert krr_closed_form(0, x, y, points(3), options("linear")).error < 1e-8
  with pytest.raises(ValueError, match="start: expected labels that span.*4 classes.*got 2 points"):
    krr_closed_form(0, x, y, points(2), options("linear"))
  with pytest.raises(ValueError, match="start: expected labels that span.*4 classes.*got 3 points"):
    krr_closed_form(0, x, y + 0.25, points(3, y + 0.25), options("linear"))


def test_labels_centered_in_float32_have_the_rank_of_centered_labels(x64):
  x, y = problem(c=10)
  rows = kipcore.class_balanced_indices(1, y.argmax(1), 1, 10)
  narrow = y.astype(np.float32)
  assert (
    np.abs(narrow.astype(np.float64).sum(1)).max() > 1e-9
  )  # must not count as a separate direction
  wide, rounded = (
    krr_closed_form(
      3, x, labels, Support(jnp.asarray(x[rows]), jnp.asarray(labels[rows])), options("linear")
    )
    for labels in (y, narrow)
  )
  assert_close(rounded.support.x, wide.support.x, 1e-6)


@pytest.mark.parametrize(
  "name, num_features", [("linear", None), ("fcnn", None), ("rff", None), ("rff", 9)]
)
def test_maps_and_their_inverses(name, num_features, x64):
  feature_map = draw_map(4, name, 16, MAPS[name].get("depth", 1), num_features, 3.0, jnp.float64)
  x, _ = problem(n=20)
  phi = map_features(feature_map, jnp.asarray(x))
  assert_close(phi, numpy_features(feature_map, x), 1e-12)
  near, _ = problem(n=20, seed=9)
  back = invert_map(feature_map, phi, near)
  assert back.shape == x.shape
  assert_close(map_features(feature_map, jnp.asarray(back)), phi, 1e-9)
  if name != "rff":
    assert_close(back, x, 1e-9)
  elif num_features is None:
    assert_close(invert_map(feature_map, phi, x), x, 1e-9)  # the branch closest to x is that of x
    angle = lambda rows: rows.reshape(20, -1) @ np.asarray(feature_map.weights[0])
    assert np.max(np.abs(angle(back) - angle(near))) <= np.pi * (1 + 1e-9)


def test_fourier_features_beyond_their_range_are_shrunk_with_their_labels(x64):
  x, y = problem()
  result = krr_closed_form(3, x, y, 1, options("rff"))
  assert 0 < result.scale < 1
  assert_close(result.support.y, result.scale * (np.eye(3) - 1 / 3), 1e-12)
  phi_s = numpy_features(result.feature_map, result.support.x)
  np.testing.assert_allclose(
    np.abs(phi_s).max(), np.sqrt(2 / 16), rtol=1e-9
  )  # shrunk no more than needed
  assert result.error < 1e-8


def test_random_maps_have_the_documented_kernels(x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2000)) / 2000**0.5)
  rff = feature_kernel(draw_map(0, "rff", 2000, bandwidth=0.8, dtype=jnp.float64))
  assert_close(rff(x), kipcore.rbf_fn(0.8)(x), 0.15)  # 5 standard errors of 2000 features
  assert_close(feature_kernel(draw_map(0, "linear", 2000))(x), kipcore.linear_fn()(x), 1e-12)
  (a,) = draw_map(0, "fcnn", 2000, dtype=jnp.float64).weights
  np.testing.assert_allclose(np.var(a), 1 / 2000, rtol=5e-3)


@pytest.mark.parametrize("name", MAPS)
def test_feature_kernel_equals_inner_products_of_features(name, dtype):
  kernel = feature_kernel(
    draw_map(1, name, 16, MAPS[name].get("depth", 1), bandwidth=3.0, dtype=dtype)
  )
  x = jnp.asarray(problem(dtype, n=7)[0])
  phi = numpy_features(kernel.feature_map, x)
  rtol = 1e-5 if dtype == "float32" else 1e-12
  assert_close(kernel(x), phi @ phi.T, rtol)
  assert_close(kernel(x, x[:3]), phi @ phi[:3].T, rtol)
  assert_close(kernel.diag(x), np.sum(phi**2, axis=1), rtol)
  assert kernel(x).dtype == dtype
  assert hash(kernel) == hash(feature_kernel(kernel.feature_map)) and kernel == feature_kernel(
    kernel.feature_map
  )
  # Kernels are equal by value, and there is only one linear map.
  assert (kernel == feature_kernel(draw_map(2, name, 16))) == (name == "linear")


@pytest.mark.parametrize("criterion", ["accuracy", "loss"])
def test_ridge_equals_exhaustive_search_on_held_out_rows(criterion, x64):
  x, y = problem(noise=2.5)
  result = krr_closed_form(8, x, y, 1, options("fcnn", criterion=criterion, held_out=0.2))
  held_out = result.held_out
  assert (
    len(held_out) == 60 == len(set(held_out.tolist()))
    and 0 <= held_out.min()
    and held_out.max() < 300
  )
  fit = np.setdiff1d(np.arange(300), held_out)
  phi = numpy_features(result.feature_map, x)
  accuracy, loss = [], []
  for ridge in 10.0 ** np.arange(-6, 6, 0.5):
    p = phi[held_out] @ ridge_regression(phi[fit], y[fit], ridge)
    accuracy.append(np.mean(p.argmax(1) == y[held_out].argmax(1)))
    loss.append(0.5 * np.mean((p - y[held_out]) ** 2))
  np.testing.assert_allclose(result.validation.ridges, 10.0 ** np.arange(-6, 6, 0.5), rtol=1e-12)
  np.testing.assert_allclose(result.validation.accuracy, accuracy, rtol=1e-12)
  np.testing.assert_allclose(result.validation.loss, loss, rtol=1e-8)
  assert len(set(accuracy)) > 3
  best = min(
    range(24), key=lambda i: (-accuracy[i], loss[i]) if criterion == "accuracy" else loss[i]
  )
  np.testing.assert_allclose(result.ridge, result.validation.ridges[best])


def test_held_out_rows_do_not_affect_the_candidates(x64):
  x, y = problem()
  first = krr_closed_form(8, x, y, 1, options("linear"))
  changed = x.copy()
  changed[first.held_out] = 0
  second = krr_closed_form(8, changed, y, 1, options("linear"))
  np.testing.assert_array_equal(first.held_out, second.held_out)
  # Features 0 predict 0 whatever the candidates are: the loss is that of the labels alone.
  np.testing.assert_allclose(
    second.validation.loss, 0.5 * np.mean(y[first.held_out] ** 2), rtol=1e-12
  )


def test_block_size_and_array_type_do_not_matter_and_seeds_are_reproducible(x64):
  x, y = problem()
  first = krr_closed_form(8, x, y, 2, options("rff", block_size=7))
  second = krr_closed_form(8, jnp.asarray(x), jnp.asarray(y), 2, options("rff", block_size=1000))
  assert_close(first.weights, second.weights, 1e-9)
  assert_close(first.support.x, second.support.x, 1e-7)
  again = krr_closed_form(8, x, y, 2, options("rff", block_size=7))
  np.testing.assert_array_equal(first.support.x, again.support.x)
  other = krr_closed_form(9, x, y, 2, options("rff", block_size=7))
  assert np.any(np.asarray(other.held_out) != first.held_out) and np.any(
    other.feature_map.shift != first.feature_map.shift
  )


@pytest.mark.parametrize("name", MAPS)
def test_float32_reaches_the_accuracy_of_the_full_model(name):
  with enable_x64(False):
    x, y = problem(np.float32, n=2000, noise=1.5)
    choice = dataclasses.replace(options(name, block_size=300), bandwidth=8.0)
    result = krr_closed_form(0, x[:1000], y[:1000], 1, choice)
    assert result.support.x.dtype == result.support.y.dtype == result.weights.dtype == np.float32
    scores = kipcore.evaluate_krr(
      feature_kernel(result.feature_map),
      result.support,
      x[1000:],
      y[1000:],
      ridge=result.support_ridge,
    )
  phi = numpy_features(result.feature_map, x)
  full = phi[1000:] @ ridge_regression(phi[:1000], y[:1000].astype(np.float64), result.ridge)
  expected = np.mean(full.argmax(1) == y[1000:].argmax(1))
  assert 0.6 < expected < 0.99
  assert abs(float(scores.accuracy) - expected) <= 0.005 and int(scores.status) == 0
  assert result.error < 1e-2


def test_float32_skips_ridges_below_its_rounding_error():
  with enable_x64(False):
    x, y = problem(np.float32)
    ridges = krr_closed_form(0, x, y, 1, options("linear")).validation.ridges
    floor = 10 * np.finfo(np.float32).eps * np.sum(x.astype(np.float64) ** 2) * 0.95
    assert 0.9 * floor < ridges.min() < 4 * floor and ridges.max() > 3e5
    with pytest.raises(ValueError, match="ridges: expected one of at least"):
      krr_closed_form(0, 1e6 * x, y, 1, options("linear"))


def test_wrong_arguments_are_named(x64):
  x, y = problem(n=30)
  rows = kipcore.class_balanced_indices(1, y.argmax(1), 1, 3)
  start = Support(jnp.asarray(x[rows]), jnp.asarray(y[rows]))
  wrong = {
    "feature_map: expected one of": lambda: dataclasses.replace(
      options("linear"), feature_map="relu"
    ),
    "labels: expected one of": lambda: options("linear", labels="soft"),
    "criterion: expected one of": lambda: options("linear", criterion="margin"),
    "ridges: expected a finite number > 0": lambda: options("linear", ridges=(0.0, 1.0)),
    "relative_ridge: expected a finite number > 0": lambda: options("linear", relative_ridge=0.0),
    "held_out: expected a fraction": lambda: options("linear", held_out=0.99),
    "block_size: expected a positive integer": lambda: options("linear", block_size=0),
    "depth: expected a positive integer": lambda: options("fcnn", depth=0),
    "num_features: expected at most 16": lambda: options("rff", num_features=17),
    "num_features: expected 16": lambda: options("linear", num_features=8),
    "bandwidth: expected a finite number > 0": lambda: options("rff", bandwidth=-1.0),
  }
  for match, choice in wrong.items():
    with pytest.raises(ValueError, match=match):
      krr_closed_form(0, x, y, 1, choice())
  with pytest.raises(ValueError, match="x and y to have the same number of rows"):
    krr_closed_form(0, x, y[1:], 1)
  with pytest.raises(ValueError, match="start.x: expected shape"):
    krr_closed_form(0, x, y, Support(start.x[:, :2], start.y))
  with pytest.raises(ValueError, match="start.y: expected shape"):
    krr_closed_form(0, x, y, Support(start.x, start.y[:, :2]))
  with pytest.raises(ValueError, match="criterion: expected 'loss'"):
    krr_closed_form(0, x, y[:, :1], Support(start.x, start.y[:, :1]))
  with pytest.raises(ValueError, match="images_per_class: expected at most the 10 rows"):
    krr_closed_form(0, x, y, 11)
  with pytest.raises(TypeError, match="x: expected a floating dtype"):
    krr_closed_form(0, x.astype(np.int32), y, 1)
  x[4] = np.nan
  with pytest.raises(ValueError, match="may contain NaN"):
    krr_closed_form(0, x, y, start)
