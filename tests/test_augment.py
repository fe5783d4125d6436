"""Augmentations: their invariants, equal keys, gradients, and the published ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, assert_close

from kipcore import augment

NAMES = augment.DSA.split("_")


def images(dtype=np.float64, shape=(3, 8, 9, 3), seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(scope="module")
def apply():
  """Jitted once per name and shape; the key is an argument."""
  jitted = {
    name: jax.jit(
      lambda seed, x, name=name: augment.random_augmentation(name)(jax.random.key(seed))(x)
    )
    for name in [*NAMES, augment.DSA]
  }
  return lambda name, seed, x: jitted[name](seed, x)


def test_empty_names_are_the_identity_for_any_rows():
  rows = jnp.arange(6.0).reshape(2, 3)
  assert augment.random_augmentation("")(jax.random.key(0))(rows) is rows


@pytest.mark.parametrize("name", NAMES)
@FLOAT64_IS_SLOW
def test_keeps_shape_and_dtype_and_draws_one_transform_per_key(name, apply, dtype):
  """Every image gets the same transform in any batch; other keys give others; dtypes agree."""
  x = images(dtype)
  results = []
  for seed in range(12):
    y = apply(name, seed, x)
    assert y.shape == x.shape and y.dtype == dtype
    alone = apply(name, seed, x[1:2])
    assert_close(y[1:2], alone, rtol=1e-6)
    results.append(np.asarray(y))
  assert sum(not np.allclose(results[0], other) for other in results[1:]) >= 3
  assert_close(apply(name, 0, x), apply(name, 0, x), rtol=0)


def test_draws_do_not_depend_on_precision(x64, apply):
  x = images()
  for seed in range(6):
    assert_close(
      apply(augment.DSA, seed, x.astype(jnp.float32)), apply(augment.DSA, seed, x), rtol=1e-5
    )


def test_all_operations_are_drawn(x64, apply):
  x = images()
  choices = [
    int(
      jax.random.randint(augment.keys.stream(jax.random.key(s), "operation"), (), 0, 6, jnp.int32)
    )
    for s in range(40)
  ]
  assert set(choices) == set(range(6))
  for seed in range(8):
    single = augment._OPERATIONS[NAMES[choices[seed]]]
    u = jax.random.uniform(
      augment.keys.stream(jax.random.key(seed), "parameters"), (3,), jnp.float32
    )
    assert_close(apply(augment.DSA, seed, x), single(u.astype(x.dtype), x), rtol=1e-12)


def test_operations_with_identity_parameters(x64):
  x = images()
  u = jnp.full(3, 0.5)
  assert_close(augment._rotate(u, x), x, rtol=1e-14)
  assert_close(augment._crop(u, x), x, rtol=0)
  assert_close(augment._color(u, x), x, rtol=1e-14)
  one = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)
  assert_close(augment._scale(jnp.full(3, one), x), x, rtol=1e-13)
  assert_close(augment._flip(u, x), x, rtol=0)


def test_flip_is_an_involution_of_columns(x64):
  x, u = images(), jnp.full(3, 0.49)
  flipped = augment._flip(u, x)
  assert_close(flipped, np.asarray(x)[:, :, ::-1], rtol=0)
  assert_close(augment._flip(u, flipped), x, rtol=0)


def test_crop_shifts_whole_pixels_and_fills_with_zeros(x64):
  x, shifts = np.asarray(images(shape=(2, 16, 20, 1))), set()
  for a, b in np.random.default_rng(0).uniform(size=(200, 2)).tolist() + [[0.0, 0.0], [1.0, 1.0]]:
    y = np.asarray(augment._crop(jnp.asarray([a, b, 0.0]), jnp.asarray(x)))
    for rows in range(-2, 3):
      for columns in range(-3, 4):
        padded = np.pad(x, [(0, 0), (2, 2), (3, 3), (0, 0)])
        if np.array_equal(y, padded[:, 2 + rows : 18 + rows, 3 + columns : 23 + columns]):
          shifts.add((rows, columns))
          break
      else:
        continue
      break
    else:
      raise AssertionError("no shift by whole pixels within 1/8")
  # 202 draws of 35 shifts.
  assert {(-2, -3), (2, 3)} < shifts and len(shifts) > 28


def test_cutout_is_one_rectangle_of_half_of_each_side(x64):
  x = jnp.ones((1, 8, 10, 1))
  full = 0
  for a, b in np.random.default_rng(1).uniform(size=(60, 2)):
    hole = np.asarray(augment._cutout(jnp.asarray([a, b, 0.0]), x))[0, :, :, 0] == 0
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    assert hole.sum() == len(rows) * len(columns) and 2 <= len(rows) <= 4 and 2 <= len(columns) <= 5
    assert (np.diff(rows) == 1).all() and (np.diff(columns) == 1).all()
    full += len(rows) == 4 and len(columns) == 5
  assert 0 < full < 60


def test_color_by_its_formula_and_gray_images_keep_their_saturation(x64):
  x, u = np.asarray(images()), np.array([0.9, 0.3, 0.1])
  bright = x + 0.4
  gray = bright.mean(3, keepdims=True)
  saturated = 0.6 * (bright - gray) + gray
  mean = saturated.mean((1, 2, 3), keepdims=True)
  assert_close(
    augment._color(jnp.asarray(u), jnp.asarray(x)), 0.6 * (saturated - mean) + mean, rtol=1e-12
  )
  one = images(shape=(2, 5, 5, 1))
  assert_close(
    augment._color(jnp.asarray([0.9, 0.3, 0.1]), one),
    augment._color(jnp.asarray([0.9, 0.8, 0.1]), one),
    rtol=1e-13,
  )


def test_resampling_is_exact_for_linear_images_and_quarter_turns(x64):
  rows, columns = np.meshgrid(np.arange(9.0), np.arange(9.0), indexing="ij")
  x = jnp.asarray((1 + 2 * rows - 3 * columns)[None, :, :, None])
  angle = np.pi / 180 * 15 * 0.6
  y = np.asarray(augment._rotate(jnp.asarray([0.8, 0.0, 0.0]), x))[0, :, :, 0]
  r, c = rows - 4, columns - 4
  source = 4 + np.cos(angle) * r - np.sin(angle) * c, 4 + np.sin(angle) * r + np.cos(angle) * c
  expected = 1 + 2 * source[0] - 3 * source[1]
  within = (np.minimum(*source) >= 0) & (np.maximum(*source) <= 8)
  assert 40 < within.sum() < 81
  assert_close(y[within], expected[within], rtol=1e-12)
  z = images(shape=(2, 7, 7, 2))
  assert_close(
    augment._resample(z, ((0.0, -1.0), (1.0, 0.0))),
    np.rot90(np.asarray(z), 1, axes=(2, 1)),
    rtol=1e-12,
  )
  # Enlarged images come only from inside pixels; shrunk images are padded with zeros.
  big, small = (augment._scale(jnp.full(3, u), jnp.ones((1, 12, 12, 1))) for u in (0.0, 1.0))
  assert_close(big, np.ones((1, 12, 12, 1)), rtol=1e-12)
  assert float(small[0, 0, 0, 0]) == 0 and float(small[0, 6, 6, 0]) == 1


def test_gradient_equals_finite_differences(x64, apply):
  x, v, h = images(), images(seed=1), 1e-5
  gradient = jax.jit(jax.grad(lambda x, seed: jnp.sum(jnp.sin(apply(augment.DSA, seed, x)))))
  for seed in range(10):
    f = lambda x: float(jnp.sum(jnp.sin(apply(augment.DSA, seed, x))))
    slope = (f(x + h * v) - f(x - h * v)) / (2 * h)
    assert abs(float(jnp.vdot(gradient(x, seed), v)) - slope) < 1e-7 * max(1, abs(slope))


def test_wrong_input_is_named():
  with pytest.raises(
    ValueError, match="augmentation: expected names of color, crop.*got 'flip_blur'"
  ):
    augment.random_augmentation("flip_blur")
  with pytest.raises(ValueError, match=r"augmentation: expected images .*got shape \(4, 5\)"):
    augment.random_augmentation("flip")(jax.random.key(0))(jnp.zeros((4, 5)))
