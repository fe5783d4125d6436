"""Preprocessing: float64 references, exact inverses, published recipes, bit-exact storage."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, SHARED_DATA, assert_close, needs
from sklearn.preprocessing import StandardScaler

from kipcore import preprocess
from kipcore.preprocess import KINDS, Preprocess, fit_preprocess

BIJECTIVE = ("none", "standardize", "zca", "zca_rfad", "zca_absolute")
WITH_UNIT_NORM = ("zca_kip", "zca_dcbench")


def color_images(n=200, side=5, seed=0):
  """uint8 images with smooth structure, so that their covariance has a wide spectrum."""
  rng = np.random.default_rng(seed)
  basis = rng.normal(size=(6, side, side, 3)).cumsum(1).cumsum(2)
  pixels = (
    np.tensordot(rng.normal(size=(n, 6)), basis, 1) * 12
    + 120
    + rng.normal(size=(n, side, side, 3)) * 6
  )
  return np.clip(pixels, 0, 255).astype(np.uint8)


def inverse_square_root(matrix, ridge):
  """(matrix + ridge I)^(-1/2) by the singular value decomposition."""
  u, s, _ = np.linalg.svd(matrix + ridge * np.eye(len(matrix)))
  return (u / np.sqrt(s)) @ u.T


def reference(kind, x_train, x):
  """Independent implementation of each recipe from its source; all need n >= d."""
  n, shape = len(x_train), x.shape
  a, b = x_train.astype(np.float64), x.astype(np.float64)
  if kind == "none":
    return b
  if kind in ("zca_dcbench", "zca_absolute"):
    a, b = a / 255, b / 255
  else:
    mean, std = a.mean((0, 1, 2)), a.std((0, 1, 2))
    a, b = (a - mean) / std, (b - mean) / std
  a, b = a.reshape(n, -1), b.reshape(len(b), -1)
  if kind == "standardize":
    return b.reshape(shape)
  if kind in WITH_UNIT_NORM:
    a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
  if kind in ("zca", "zca_absolute"):
    a, b = a - a.mean(0), b - a.mean(0)
  if kind == "zca_absolute":
    return (b @ inverse_square_root(np.cov(a.T), 0.1)).reshape(shape)
  second = a.T @ a / n
  return (b @ inverse_square_root(second, 0.1 * np.trace(second) / len(second))).reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_an_explicit_computation(kind):
  train, test = color_images(), color_images(30, seed=1)
  fitted = fit_preprocess(train, kind)
  expected = reference(kind, train, test)
  assert_close(fitted.apply(test, np.float64), expected, 1e-11)
  assert_close(fitted.apply(test), expected, 1e-5)
  assert fitted.apply(test).dtype == np.float32


@pytest.mark.parametrize("kind", BIJECTIVE)
def test_invert_undoes_apply_and_apply_undoes_invert(kind):
  train, test = color_images(), color_images(30, seed=1)
  fitted = fit_preprocess(train, kind)
  assert_close(fitted.invert(fitted.apply(test, np.float64), np.float64), test, 1e-12)
  assert np.array_equal(
    np.rint(fitted.invert(fitted.apply(test))), test
  )  # float32 recovers the exact pixels
  z = np.random.default_rng(2).normal(size=test.shape)
  assert_close(fitted.apply(fitted.invert(z, np.float64), np.float64), z, 1e-12)


@pytest.mark.parametrize("kind", WITH_UNIT_NORM)
def test_unit_norm_inverse_is_exact_up_to_brightness_and_contrast(kind):
  train, test = color_images(), color_images(30, seed=1)
  fitted = fit_preprocess(train, kind)
  z = fitted.apply(test, np.float64)
  back = fitted.invert(z, np.float64)
  assert_close(fitted.apply(back, np.float64), z, 1e-11)
  # Undo the first, affine step on both sides: the remainders differ by two numbers per image.
  first = Preprocess("custom", fitted.row_shape, fitted.steps[:1])
  was, now = (first.apply(v, np.float64).reshape(len(v), -1) for v in (test, back))
  for original, restored in zip(was, now):
    design = np.stack([original, np.ones_like(original)], 1)
    residual = np.linalg.lstsq(design, restored, rcond=None)[1]
    assert residual[0] < 1e-18 * len(original)
  # The averages are those of the training images.
  rows = first.apply(train, np.float64).reshape(len(train), -1)
  mean, norm = rows.mean(1), np.linalg.norm(rows - rows.mean(1, keepdims=True), axis=1)
  assert_close(fitted.steps[1].arrays["mean"], mean.mean(), 1e-12, atol=1e-12)
  assert_close(fitted.steps[1].arrays["divisor"], norm.mean(), 1e-12)
  assert_close(now.mean(1), np.full(len(now), mean.mean()), 1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [200, 20])
def test_whitened_covariance_and_the_symmetry_of_both_matrices(n):
  train = color_images(n)
  fitted = fit_preprocess(train, "zca")
  whitening, unwhitening = fitted.steps[-1].arrays["whitening"], fitted.steps[-1].unwhitening
  assert np.array_equal(whitening, whitening.T) and np.array_equal(unwhitening, unwhitening.T)
  assert_close(whitening @ unwhitening, np.eye(len(whitening)), 1e-12)
  before = (
    Preprocess("custom", fitted.row_shape, fitted.steps[:-1])
    .apply(train, np.float64)
    .reshape(n, -1)
  )
  after = fitted.apply(train, np.float64).reshape(n, -1)
  values, vectors = np.linalg.eigh(before.T @ before / n)
  ridge = 0.1 * values.sum() / len(values)
  assert_close(after.mean(0), np.zeros(after.shape[1]), 0, atol=1e-12)
  assert_close(after.T @ after / n, (vectors * (values / (values + ridge))) @ vectors.T, 1e-10)


def test_rank_control_changes_only_directions_without_data():
  train = color_images(20)
  d = train[0].size
  steps = ["standardize", "center"]
  free, controlled = (
    fit_preprocess(train, [*steps, ("zca", {"rank_control": on})]).steps[-1].arrays["whitening"]
    for on in (False, True)
  )
  before = fit_preprocess(train, steps).apply(train, np.float64).reshape(20, d)
  _, s, vt = np.linalg.svd(before)
  seen, unseen = vt[:19], vt[19:]
  assert s[18] > 1e-6 * s[0] and s[19] < 1e-10 * s[0]
  assert_close(unseen @ controlled, unseen, 1e-10)
  assert_close(unseen @ free, unseen / np.sqrt(0.1 * (s**2).sum() / 20 / d), 1e-9)
  assert_close(seen @ controlled, seen @ free, 1e-9)


def test_tabular_features_equal_scikit_learn_and_constant_ones_keep_std_one():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(40, 6)) * [1, 10, 1e-3, 1e6, 1, 1] + [0, 5, 0, 1e6, 0, 0]
  x[:, 4] = 0.1  # its mean in float64 is not exactly 0.1
  fitted = fit_preprocess(x, "standardize")
  assert_close(fitted.apply(x, np.float64), StandardScaler().fit_transform(x), 1e-12, atol=1e-12)
  assert fitted.steps[0].arrays["divisor"][4] == 1
  whitened = fit_preprocess(x, "zca").apply(x, np.float64)
  assert np.isfinite(whitened).all() and whitened.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "case", ["constant", "one constant image", "zero channel", "one row", "all zero", "tiny"]
)
def test_degenerate_images_give_finite_numbers_and_invert(kind, case):
  train = color_images(12).astype(np.float64)
  if case == "constant":
    train[:] = 200.3
  elif case == "one constant image":
    train[4] = 77.7
  elif case == "zero channel":
    train[..., 1] = 0
  elif case == "one row":
    train = train[:1]
  elif case == "all zero":
    train[:] = 0
  elif case == "tiny":
    train *= 1e-12
  fitted = fit_preprocess(train, kind)
  for x in (train, color_images(5, seed=9)):
    out = fitted.apply(x, np.float64)
    back = fitted.invert(out, np.float64)
    assert np.isfinite(out).all() and np.isfinite(back).all()
    if kind in BIJECTIVE:
      assert_close(back, x, 1e-10)


def test_rounding_errors_of_a_constant_image_are_not_amplified():
  levels = np.linspace(0.1, 254.9, 50)
  constant = np.broadcast_to(levels[:, None, None, None], (50, 5, 5, 3))
  assert (constant.mean((1, 2, 3)) != levels).any()
  fitted = fit_preprocess(color_images(), ["unit_norm"])
  assert np.abs(fitted.apply(constant, np.float64)).max() < 1e-9
  assert (
    np.abs(fitted.apply(jnp.asarray(constant, jnp.float32))).max() < 1e-2
  )  # 1 / sqrt(75) if it were


def test_the_scale_of_the_pixels_matters_for_the_absolute_kind_only():
  train = color_images()
  for kind in KINDS[1:]:
    as_bytes = fit_preprocess(train, kind).apply(train, np.float64)
    as_floats = fit_preprocess(train / 255.0, kind, pixel_max=1.0).apply(train / 255.0, np.float64)
    assert_close(as_floats, as_bytes, 1e-9)
    wrong = fit_preprocess(train / 255.0, kind).apply(train / 255.0, np.float64)
    assert np.allclose(wrong, as_bytes, rtol=1e-6, atol=1e-6) == (kind != "zca_absolute")


def test_a_call_within_a_trace_leaves_no_tracers_behind():
  x = np.random.default_rng(0).normal(size=(40, 2, 2, 1))
  fitted = fit_preprocess(x, "zca")
  traced = jax.jit(lambda rows: fitted.invert(fitted.apply(rows)))(jnp.asarray(x))
  eager = fitted.invert(fitted.apply(jnp.asarray(x)))
  np.testing.assert_allclose(traced, eager, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(eager, x, rtol=1e-3, atol=1e-3)


@FLOAT64_IS_SLOW
def test_jax_arrays_and_traces_agree_with_numpy(dtype):
  train, test = color_images(), color_images(8, seed=1)
  for kind in KINDS:
    fitted = fit_preprocess(train, kind)
    expected = fitted.apply(test, np.float64)
    x = jnp.asarray(test)
    eager, jitted = fitted.apply(x, dtype), jax.jit(lambda v, f=fitted: f.apply(v, dtype))(x)
    assert isinstance(eager, jax.Array) and eager.dtype == dtype
    assert_close(eager, expected, 10 * RTOL[dtype.name])
    assert_close(jitted, eager, RTOL[dtype.name])
    assert_close(
      jax.jit(lambda v, f=fitted: f.invert(v, dtype))(eager),
      fitted.invert(expected, np.float64),
      10 * RTOL[dtype.name],
    )
    one_by_one = jax.vmap(lambda v, f=fitted: f.apply(v[None], dtype)[0])(x)
    assert_close(one_by_one, eager, RTOL[dtype.name])


@FLOAT64_IS_SLOW
def test_gradients_are_finite_even_at_a_constant_image(dtype):
  fitted = fit_preprocess(color_images(), "zca_kip")
  x = jnp.full((2, 5, 5, 3), 9, dtype).at[1].set(jnp.asarray(color_images(1)[0], dtype))
  grad = jax.grad(lambda v: jnp.sum(fitted.apply(v, dtype) ** 2))(x)
  assert bool(jnp.isfinite(grad).all()) and bool(jnp.any(grad[1] != 0))


def test_row_blocks_do_not_change_the_result_and_bound_the_memory(monkeypatch):
  train = color_images(301)
  whole = {kind: fit_preprocess(train, kind) for kind in KINDS}
  monkeypatch.setattr(preprocess, "_BLOCK_NUMBERS", 75 * 20 + 3)
  for kind, fitted in whole.items():
    blocked = fit_preprocess(train, kind)
    for a, b in zip(blocked.steps, fitted.steps):
      for name in a.arrays:
        assert_close(a.arrays[name], b.arrays[name], 1e-11, atol=1e-13)
    assert_close(blocked.apply(train, np.float64), fitted.apply(train, np.float64), 1e-10)
  wide = np.zeros((20_000, 8, 8, 3), np.uint8)
  wide[::2] = 200
  tracemalloc.start()
  fitted = fit_preprocess(wide, "zca")
  fitted.apply(wide[:10])
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert (
    peak < 16 * 192**2 * 8 + 2**20
  )  # a few d x d matrices; one float64 copy of the rows would be 31 MB


@pytest.mark.parametrize("kind", [*KINDS, "custom"])
def test_storage_is_bit_exact(kind, tmp_path):
  train, test = color_images(), color_images(9, seed=1)
  steps = [("scale", {"divisor": 16.0}), "unit_norm", "center", ("zca", {"value": 0.02, "ddof": 1})]
  fitted = fit_preprocess(train, steps if kind == "custom" else kind)
  spec, arrays = fitted.to_arrays()
  np.savez(tmp_path / "a.npz", spec=json.dumps(spec), unrelated=np.ones(3), **arrays)
  with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
    again = Preprocess.from_arrays(json.loads(str(stored["spec"])), stored)
  assert (again.kind, again.row_shape) == (fitted.kind, fitted.row_shape) == (kind, (5, 5, 3))
  assert len(again.steps) == len(fitted.steps)
  for a, b in zip(again.steps, fitted.steps):
    assert (
      a.name == b.name and dict(a.settings) == dict(b.settings) and set(a.arrays) == set(b.arrays)
    )
    for name in a.arrays:
      assert (
        a.arrays[name].dtype == np.float64 and a.arrays[name].tobytes() == b.arrays[name].tobytes()
      )
  assert again.apply(test).tobytes() == fitted.apply(test).tobytes()
  assert again.invert(fitted.apply(test)).tobytes() == fitted.invert(fitted.apply(test)).tobytes()
  spec2, arrays2 = again.to_arrays()
  assert spec2 == spec and all(arrays2[k].tobytes() == arrays[k].tobytes() for k in arrays)


def test_stored_objects_are_checked():
  spec, arrays = fit_preprocess(color_images(), "zca").to_arrays()

  def broken(pattern, new_spec=None, **changes):
    changed = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=pattern) as caught:
      Preprocess.from_arrays(spec if new_spec is None else new_spec, changed)
    assert "\n" not in str(caught.value)

  def with_step(i, **changes):
    steps = [dict(step) for step in spec["steps"]]
    steps[i].update(changes)
    return {**spec, "steps": steps}

  broken("expected one of scale, .*got 'whiten'", with_step(2, name="whiten"))
  broken("expected '0_standardize_mean', got", **{"0_standardize_mean": None})
  broken("2_zca_whitening: expected shape", **{"2_zca_whitening": arrays["2_zca_whitening"][:-1]})
  broken("0_standardize_divisor: expected values > 0", **{"0_standardize_divisor": np.zeros(3)})
  broken("0_standardize_mean: expected finite", **{"0_standardize_mean": np.full(3, np.nan)})
  broken(
    "1_center_mean: expected float64, got float32",
    **{"1_center_mean": np.zeros((5, 5, 3), np.float32)},
  )
  broken("expected format 1, got 2", {**spec, "format": 2})
  broken("expected format, kind, row_shape and steps", {"format": 1})
  broken("settings of step zca", with_step(2, settings={}))
  broken(
    "regularization: expected one of",
    with_step(2, settings={**spec["steps"][2]["settings"], "regularization": "relative"}),
  )
  broken(
    "positive finite value",
    with_step(2, settings={**spec["steps"][2]["settings"], "value": float("nan")}),
  )
  broken("0_standardize_mean: expected shape", {**spec, "row_shape": [5, 5, 4]})


def test_fitted_objects_are_read_only():
  fitted = fit_preprocess(color_images(), "standardize")
  with pytest.raises(ValueError, match="read-only"):
    fitted.steps[0].arrays["mean"][0] = 1
  with pytest.raises(TypeError):
    fitted.steps[0].settings["x"] = 1
  with pytest.raises(AttributeError):
    fitted.kind = "none"


@pytest.mark.parametrize(
  "x, kind, error, pattern",
  [
    (np.ones((3, 2)), "pca", ValueError, "expected one of none, .*got 'pca'"),
    (np.ones((3, 2)), ["whiten"], ValueError, "expected one of scale"),
    (np.ones((3, 2)), [("zca", {"eps": 1})], ValueError, "settings of step zca"),
    (np.ones((3, 2)), [("scale", {"divisor": 0})], ValueError, "positive finite divisor"),
    (np.ones((3, 2)), [("zca", {"ddof": 3})], ValueError, "ddof: expected one of 0, 1"),
    (np.ones((0, 2)), "zca", ValueError, "at least one row"),
    (np.ones(3), "zca", ValueError, "at least one row"),
    (np.array([[1.0, np.inf]]), "zca", ValueError, "expected finite"),
    (np.array([["a", "b"]]), "zca", TypeError, "expected integers or floats"),
    (np.array([[1e308, -1e308], [-1e308, 1e308]]), "standardize", ValueError, "expected finite"),
    (np.array([[1e200, -1e200], [-1e200, 1e200]]), ["zca"], ValueError, "expected finite"),
    (np.zeros((1, 129, 128)), "zca", ValueError, "at most 16384 numbers per row"),
  ],
)
def test_bad_input_is_rejected(x, kind, error, pattern):
  with pytest.raises(error, match=pattern):
    fit_preprocess(x, kind)


def test_rows_of_another_shape_are_rejected_and_zero_rows_are_valid():
  fitted = fit_preprocess(color_images(), "zca")
  for x in (np.ones((2, 5, 5, 1)), np.ones((5, 5, 3)), jnp.ones((2, 75))):
    with pytest.raises(ValueError, match="expected shape"):
      fitted.apply(x)
  assert (
    fitted.apply(np.zeros((0, 5, 5, 3))).shape
    == fitted.invert(np.zeros((0, 5, 5, 3))).shape
    == (0, 5, 5, 3)
  )


@FLOAT64_IS_SLOW
def test_centered_labels_for_any_number_of_classes(dtype):
  rng = np.random.default_rng(4)
  for c in (1, 2, 10, 43, 100):
    labels = rng.integers(0, c, 30)
    for given in (labels, labels.astype(np.uint8), jnp.asarray(labels, jnp.int32)):
      y = preprocess.one_hot_centered(given, c, dtype)
      assert y.dtype == dtype
      assert_close(y, np.eye(c)[labels] - 1 / c, RTOL[dtype.name], atol=1e-7)
    assert_close(np.asarray(y, np.float64).sum(1), np.zeros(30), 0, atol=1e-5)
    assert_close(preprocess.uncenter(y), np.eye(c)[labels], RTOL[dtype.name])
    assert np.array_equal(preprocess.class_labels(y), labels)
    assert_close(
      jax.jit(lambda v, k=c: preprocess.one_hot_centered(v, k, dtype))(
        jnp.asarray(labels, jnp.int32)
      ),
      y,
      0,
    )
  assert preprocess.one_hot_centered(np.zeros(0, np.int32), 3).shape == (0, 3)


@pytest.mark.parametrize(
  "labels, c, error",
  [
    ([0, 3], 3, ValueError),
    ([-1, 0], 3, ValueError),
    ([0.0, 1.0], 3, TypeError),
    ([[0, 1]], 3, ValueError),
    ([0, 1], 0, ValueError),
    ([0, 1], 2.0, TypeError),
  ],
)
def test_bad_labels_are_rejected(labels, c, error):
  with pytest.raises(error, match="expected"):
    preprocess.one_hot_centered(np.array(labels), c)


def test_real_color_images_survive_the_round_trip():
  path = needs(SHARED_DATA / "cifar10" / "cifar10_lossless_subset.npz")
  with np.load(path, allow_pickle=False) as data:
    train, test = data["x_train"][:1000, ::4, ::4], data["x_test"][:200, ::4, ::4]
  for kind in ("zca", "zca_rfad", "zca_absolute"):
    fitted = fit_preprocess(train, kind)
    assert np.abs(fitted.invert(fitted.apply(test)) - test).max() < 0.02
    assert np.array_equal(np.rint(fitted.invert(jnp.asarray(fitted.apply(test)))), test)
