"""Convolutional kernels: unusual layers and sizes, tiles, memory, precision, transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, slow_except
from kernel_reference import images, neural_tangents_kernel, value_and_gradient

import kipcore
from kipcore import linalg
from kipcore.architectures import (
  Architecture,
  AvgPool,
  Conv,
  Dense,
  Flatten,
  Gelu,
  GlobalAvgPool,
  Relu,
  architecture,
)
from kipcore.kernels import NetworkKernel, covariance

UNUSUAL = {
  "pooled pixels": (
    AvgPool(2),
    Conv(3),
    Conv(3),
    Relu(),
    Conv(1),
    AvgPool(2),
    Relu(),
    Flatten(),
    Dense(),
  ),
  "1x1 first": (Conv(1), Conv(3), Relu(), GlobalAvgPool(), Dense(), Gelu(), Dense()),
  "only an average": (GlobalAvgPool(), Dense()),
  "wide windows": (Conv(5), Relu(), AvgPool(3), Flatten(), Dense()),
  "wide later": (Conv(5), Conv(5), Relu(), AvgPool(2), Conv(3), Relu(), Flatten(), Dense()),
  "two pools": (Conv(3), AvgPool(2), AvgPool(2), Relu(), Flatten(), Dense(), Relu(), Dense()),
}


@pytest.mark.parametrize(
  "name, get",
  slow_except(
    [(name, "ntk") for name in UNUSUAL] + [("1x1 first", "nngp"), ("two pools", "nngp")],
    ("only an average", "ntk"),
    ("wide windows", "ntk"),
  ),
)
def test_unusual_layers_equal_neural_tangents(name, get, x64):
  """On 7 x 5 images, whose rows and columns the windows do not divide."""
  arch = Architecture("unusual", UNUSUAL[name])
  x1, x2 = images(np.float64, shape=(7, 5, 2))
  x1 = x1[[0, 3]]
  for other in (None, x2):
    expected = neural_tangents_kernel(arch, get, x1, other)
    for a, b in zip(value_and_gradient(NetworkKernel(arch, get), jnp.asarray(x1), other), expected):
      assert_close(a, b, rtol=1e-10)


@pytest.mark.parametrize("name", slow_except(["conv2", "conv2_vec", "myrtle5"], "conv2_vec"))
@pytest.mark.parametrize(
  "n, tile", slow_except([(1, None), (2, None), (5, 500), (6, 500)], (1, None), (5, 500))
)
def test_symmetric_half_equals_all_pairs(name, n, tile, x64):
  """Even, odd, one and two rows; also in tiles that divide neither the images nor the pairs."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6, 4, 1)))
  kernel = jax.jit(NetworkKernel(architecture(name), "ntk", tile))
  one, two = kernel(x[:n]), kernel(x[:n], x[:n])
  off = ~np.eye(n, dtype=bool)
  np.testing.assert_allclose(np.asarray(one)[off], np.asarray(two)[off], rtol=1e-12)
  # At an angle of 0 the arc cosine loses half of the digits.
  np.testing.assert_allclose(one, two, rtol=1e-6)
  np.testing.assert_array_equal(one, one.T)


def test_duplicated_rescaled_and_constant_images():
  """Equal images have equal rows, bias-free kernels are homogeneous, constant images are valid."""
  x, _ = images(np.float32, 5, shape=(8, 8, 3))
  x[4] = 0.7
  kernel = jax.jit(NetworkKernel(architecture("conv2"), "ntk"))
  k = np.asarray(kernel(jnp.asarray(x)), np.float64)
  np.testing.assert_allclose(k[0, 3:], k[1, 3:], rtol=1e-5)
  np.testing.assert_allclose(k[0, 1], k[0, 0], rtol=2e-3)
  assert np.isfinite(k).all() and np.linalg.eigvalsh(k).min() > -1e-5 * k.trace()
  free = NetworkKernel(kipcore.conv_net(2, b_std=0.0), "ntk")
  assert_close(
    free(2.0 * jnp.asarray(x), 0.5 * jnp.asarray(x[2:])),
    free(jnp.asarray(x), jnp.asarray(x[2:])),
    rtol=1e-5,
  )


def test_all_jax_transformations(x64):
  """vmap, forward mode and forward over reverse agree with loops and differences."""
  rng = np.random.default_rng(0)
  x, v = (jnp.asarray(rng.normal(size=(2, 5, 4, 1))) for _ in range(2))
  other = jnp.asarray(rng.normal(size=(3, 5, 4, 1)))
  kernel = NetworkKernel(architecture("conv1"), "ntk")
  f = jax.jit(lambda x: jnp.sum(jnp.sin(kernel(x, other))))
  gradient = jax.jit(jax.grad(f))
  h = 1e-5
  np.testing.assert_allclose(jax.jvp(f, (x,), (v,))[1], jnp.vdot(gradient(x), v), rtol=1e-10)
  curvature = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
  assert_close(jax.jvp(gradient, (x,), (v,))[1], curvature, rtol=1e-5)
  stack = jnp.stack([x, 2 * x])
  assert_close(
    jax.jit(jax.vmap(lambda x: kernel(x, other)))(stack),
    jnp.stack([kernel(x, other), kernel(2 * x, other)]),
    rtol=1e-12,
  )


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 4, 5, 4)], ids=["diagonal", "whole"])
@pytest.mark.parametrize("size", slow_except([1, 3, 5], 1, 3))
def test_box_equals_its_definition_and_is_its_own_adjoint(shape, size, x64):
  rng = np.random.default_rng(0)
  k, other = rng.normal(size=shape), rng.normal(size=shape)
  r, padded = size // 2, np.pad(k, [(0, 0)] + [(size // 2,) * 2] * (k.ndim - 1))
  expected = (
    sum(
      np.roll(padded, (d, e) * (k.ndim // 2), axis=tuple(range(1, k.ndim)))
      for d in range(-r, r + 1)
      for e in range(-r, r + 1)
    )
    / size**2
  )
  crop = (slice(None),) + (slice(r, r + 5), slice(r, r + 4)) * (k.ndim // 2)
  box = lambda k: covariance.box(k, size)
  assert_close(box(jnp.asarray(k)), expected[crop], rtol=1e-13)
  np.testing.assert_allclose(
    np.vdot(other, box(jnp.asarray(k))), np.vdot(box(jnp.asarray(other)), k), rtol=1e-11
  )
  for tangent in (
    jax.jvp(box, (jnp.asarray(k),), (jnp.asarray(other),))[1],
    jax.vjp(box, jnp.asarray(k))[1](jnp.asarray(other))[0],
  ):
    assert_close(tangent, box(jnp.asarray(other)), rtol=1e-13)


def test_pool_drops_remaining_rows_and_columns(x64):
  k = np.random.default_rng(0).normal(size=(2, 5, 4, 5, 4))
  expected = k[:, :4, :, :4].reshape(2, 2, 2, 2, 2, 2, 2, 2, 2).mean(axis=(2, 4, 6, 8))
  pool = lambda k: covariance.pool(k, 2)
  assert_close(pool(jnp.asarray(k)), expected, rtol=1e-13)
  other = np.random.default_rng(1).normal(size=expected.shape)
  back = jax.vjp(pool, jnp.asarray(k))[1](jnp.asarray(other))[0]
  np.testing.assert_allclose(np.vdot(back, k), np.vdot(other, expected), rtol=1e-12)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs():
  """Forward and backward scratch memory for 576 and 2,304 pairs of 16x16 images."""
  kernel = NetworkKernel(architecture("conv2"), "ntk", tile_elements=1 << 15)

  def scratch(n):
    x = jax.ShapeDtypeStruct((n, 16, 16, 3), jnp.float32)
    fn = jax.jit(lambda a, b: jax.grad(lambda a: jnp.sum(kernel(a, b)))(a))
    return fn.lower(x, x).compile().memory_analysis().temp_size_in_bytes

  images_bytes = 24 * 16 * 16 * 3 * 4
  assert scratch(48) - scratch(24) < 4 * images_bytes


@pytest.mark.parametrize("name", slow_except(["fc2", "conv2", "conv2_vec"], "fc2", "conv2_vec"))
def test_narrow_products_have_the_stated_error(name):
  """The kernel of rounded inputs is positive semi-definite up to float32 rounding."""
  x = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
  x[1] = x[0]
  exact = np.asarray(kipcore.ntk_fn(architecture(name))(jnp.asarray(x)), np.float64)
  errors = {}
  for precision in linalg.PRECISIONS:
    k = np.asarray(kipcore.ntk_fn(architecture(name), precision)(jnp.asarray(x)), np.float64)
    errors[precision] = np.abs(k / exact - 1).max()
    assert np.linalg.eigvalsh(k).min() > -1e-4 * k.trace() / len(k)
  assert errors["float32"] == 0 < errors["tensorfloat32"] < 1e-3 < 10 * errors["tensorfloat32"]
  assert errors["tensorfloat32"] < errors["bfloat16"] < 1e-2


def test_float64_ignores_the_precision(x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 1)))
  for name in ("fc1", "conv1"):
    np.testing.assert_array_equal(
      *(kipcore.ntk_fn(architecture(name), p)(x) for p in ("float32", "bfloat16"))
    )


@pytest.mark.slow
def test_batched_products_give_equal_results(x64, monkeypatch):
  """The computation on accelerators, tiles as one batch, equals that of single pairs."""
  x1, x2 = (jnp.asarray(x) for x in images(np.float64, 5, 4))
  expected = [NetworkKernel(architecture("conv2"), "ntk", tile)(x1, x2) for tile in (900, None)]
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  for tile, k in zip((900, None), expected):
    assert_close(NetworkKernel(architecture("conv2"), "ntk", tile)(x1, x2), k, rtol=1e-13)


@pytest.mark.parametrize("name", ["fc2", pytest.param("conv1", marks=pytest.mark.slow)])
def test_gram_over_devices_equals_gram_on_one(name, x64):
  """8 simulated devices; rows not divisible by them, fewer rows than devices, one row, no row."""
  x, other = (jnp.asarray(a) for a in images(np.float64, 11, 3))
  kernel = NetworkKernel(architecture(name), "ntk")
  for n in (11, 3, 1):
    for block_size in (None, 1):
      assert_close(
        kipcore.gram(kernel, x[:n], other, block_size, jax.devices()),
        kernel(x[:n], other),
        rtol=1e-13,
      )
    assert_close(
      kipcore.gram(kernel, x[:n], None, None, jax.devices()[:2]), kernel(x[:n]), rtol=1e-7
    )
  assert kipcore.gram(kernel, x[:0], other, None, jax.devices()).shape == (0, 3)


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: kipcore.ntk_fn(kipcore.fc(1), "float16"),
      "precision: expected one of float32, tensorfloat32, bfloat16",
    ),
    (lambda: NetworkKernel(kipcore.fc(1), "both"), "get: expected one of ntk, nngp"),
    (lambda: NetworkKernel(kipcore.fc(1), "ntk", 0), "tile_elements"),
  ],
)
def test_wrong_options_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
