"""Residual blocks, strides, paddings and sum pooling: kernels, finite networks, descriptions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_architectures
from helpers import RTOL, assert_close, standard_promotion

import kipcore
from kipcore import networks
from kipcore.architectures import (
  PADDINGS,
  Architecture,
  AvgPool,
  Conv,
  Dense,
  Erf,
  Flatten,
  GlobalAvgPool,
  GlobalSumPool,
  Identity,
  Relu,
  Residual,
  SumPool,
  Window,
  nested,
)
from kipcore.evaluation.networks import _is_dense
from kipcore.kernels import NetworkKernel, finite
from kipcore.kernels.stax import import_neural_tangents

# All new layers, on images of at least 6 x 5 pixels.
MIXED = Architecture(
  "mixed",
  (
    Conv(2, padding="VALID"),
    Residual(
      (Relu(), Conv(3, stride=2, padding="CIRCULAR"), Residual((Relu(), Conv(1)))),
      (AvgPool(1, 2, "SAME"),),
    ),
    SumPool(2, 1),
    GlobalSumPool(),
    Dense(),
    Residual((Relu(), Dense())),
    Relu(),
    Dense(),
  ),
)


def block(stride=1, projection=False):
  branch = (Relu(), Conv(3, 1.3, 0.1, stride), Relu(), Conv(3, 1.3, 0.1))
  return Residual(branch, (Conv(3, 1.3, 0.1, stride),) if projection else ())


@pytest.mark.parametrize(
  "seed", [pytest.param(i, marks=() if i == 4 else pytest.mark.slow) for i in range(30)]
)
def test_random_architectures_equal_neural_tangents(seed, x64):
  """Values and gradients; `random_architectures.py` compares any number of them."""
  assert max(random_architectures.errors(seed)) < 1e-9


def test_a_wide_residual_network_equals_that_of_neural_tangents(x64):
  """Against a network in stax layers: one group: a strided block with a projection, and one without."""
  stax = import_neural_tangents().stax
  conv = lambda stride=1: stax.Conv(1, (3, 3), (stride, stride), "SAME", 1.3, 0.1)

  def stax_block(stride=1, projection=False):
    branch = stax.serial(stax.Relu(), conv(stride), stax.Relu(), conv())
    shortcut = conv(stride) if projection else stax.Identity()
    return stax.serial(stax.FanOut(2), stax.parallel(branch, shortcut), stax.FanInSum())

  theirs = stax.serial(
    conv(),
    *(stax_block(2, True), stax_block()),
    *(stax.AvgPool((2, 2), (2, 2)), stax.Flatten(), stax.Dense(1, 1.3, 0.1)),
  )[2]
  blocks = (block(2, True), block())
  arch = Architecture("wide", (Conv(3, 1.3, 0.1), *blocks, AvgPool(), Flatten(), Dense(1.3, 0.1)))
  x1, x2 = (jnp.asarray(np.random.default_rng(n).normal(size=(n, 5, 4, 2))) for n in (1, 2))
  assert_close(kipcore.ntk_fn(arch)(x1, x2), kipcore.from_stax(theirs)(x1, x2), rtol=1e-10)


@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)], indirect=True
)
def test_diagonal_and_symmetry_in_tiles(dtype):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 5, 2)), dtype)
  k = NetworkKernel(MIXED, "ntk", tile_elements=300)(x)
  assert_close(kipcore.ntk_fn(MIXED).diag(x), jnp.diagonal(k), rtol=RTOL[dtype.name])
  assert_close(k, k.T, rtol=RTOL[dtype.name])
  assert np.linalg.eigvalsh(np.asarray(k, np.float64)).min() > -1e-5 * np.trace(k)


@pytest.mark.slow
def test_batched_products_give_equal_results(x64, monkeypatch):
  """The computation on accelerators, tiles as one batch, equals that of single pairs."""
  x1, x2 = (jnp.asarray(np.random.default_rng(n).normal(size=(n, 6, 5, 2))) for n in (3, 4))
  expected = [NetworkKernel(MIXED, "ntk", tile)(x1, x2) for tile in (900, None)]
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  for tile, k in zip((900, None), expected, strict=True):
    assert_close(NetworkKernel(MIXED, "ntk", tile)(x1, x2), k, rtol=1e-13)


def test_gradients_by_the_numbers_of_a_block_are_finite_differences(x64):
  """Also of layers inside residual blocks, in the dense part."""
  arch = Architecture(
    "dense",
    (Flatten(), Dense(1.2, 0.3), Residual((Erf(), Dense(0.8, 0.2)), (Dense(1.1, 0.4),)), Dense()),
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
  f = jax.jit(lambda kernel: jnp.sum(jnp.sin(kernel(x, x[:2] + 1))))
  leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, kipcore.ntk_fn(arch)))
  assert [float(leaf) for leaf in leaves[2:6]] == [0.8, 0.2, 1.1, 0.4]
  gradient = jax.tree.leaves(jax.jit(jax.grad(f))(jax.tree.unflatten(structure, leaves)))
  for i, slope in enumerate(gradient):
    ahead, behind = (
      f(jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + h, *leaves[i + 1 :]]))
      for h in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("padding", PADDINGS)
def test_windows_are_those_of_xla(padding):
  for n in range(1, 9):
    for size in range(1, 6):
      for stride in range(1, 4):
        window = Window(size, stride, padding)
        name = "VALID" if padding == "VALID" else "SAME"
        ((low, high),) = jax.lax.padtype_to_pads((n,), (size,), (stride,), name)
        assert window.pads(n) == (low, high)
        assert window.count(n) == max(0, (n + low + high - size) // stride + 1)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_finite_layers_equal_those_of_stax(padding, backend, monkeypatch):
  """Convolution and poolings of 7 x 5 images by the code of either backend."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  stax = import_neural_tangents().stax
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 7, 5, 3)), jnp.float32)
  for size, stride in ((1, 2), (2, 1), (3, 2), (4, 3)):
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 2)), jnp.float32)
    window = (size, size), (stride, stride), padding
    with standard_promotion():
      conv = stax.Conv(2, *window, 1.0, None)[1]((kernel, None), x) * (size**2 * 3) ** 0.5
      mean, total = (layer(*window)[1]((), x) for layer in (stax.AvgPool, stax.SumPool))
    assert_close(
      networks.convolve_windows(x, kernel, Window(size, stride, padding)), conv, rtol=1e-5
    )
    pools = (outputs(layer(size, stride, padding), x) for layer in (AvgPool, SumPool))
    for found, expected in zip(pools, (mean, total), strict=True):
      assert_close(found, expected, rtol=1e-5)


def outputs(layer, x):
  """The features of a network that consists of a layer."""
  module = kipcore.network(Architecture("one", (layer, Flatten(), Dense())))
  h = module.apply({}, x, features=True)
  n, (h_out, w_out) = x.shape[0], (layer.window.count(side) for side in x.shape[1:3])
  return h.reshape(n, h_out, w_out, -1)


@pytest.mark.slow
def test_monte_carlo_of_flax_networks_matches_the_kernel():
  """The mean over random networks is within 5 standard errors (and 3 % for the finite width)."""
  x = np.random.default_rng(3).normal(size=(2, 6, 5, 2)).astype(np.float32)
  one, many = (kipcore.network(MIXED, 128, c, parameterization="ntk") for c in (1, 64))

  @jax.jit
  def draw(key):
    ntk = finite.empirical_ntk(one.apply, one.init(key, x), x)
    return ntk, finite.empirical_nngp(many.apply, many.init(key, x), x)

  with standard_promotion():
    ntks, nngps = zip(*(draw(key) for key in jax.random.split(jax.random.key(0), 100)), strict=True)
  for draws, exact in ((ntks, kipcore.ntk_fn(MIXED)), (nngps, kipcore.nngp_fn(MIXED))):
    draws, exact = np.asarray(draws, np.float64), np.asarray(exact(jnp.asarray(x)), np.float64)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - exact) < 5 * error + 0.03 * np.abs(exact)).all()
    assert np.abs(draws.mean(0) - exact).max() < 0.1 * np.abs(exact).max()


def test_channels_grow_at_pools_and_strides():
  blocks = (Conv(3), block(2, True), block(), block(2, True), GlobalAvgPool(), Dense())
  module = kipcore.network(Architecture("wide", blocks), width=4, width_growth=2, norm="batch")
  x = jnp.zeros((1, 8, 8, 3))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  assert shapes["layer_3_branch_3"]["kernel"].shape == (3, 3, 16, 16)
  assert shapes["layer_3_shortcut_0"]["kernel"].shape == (3, 3, 8, 16)
  assert shapes["layer_5"]["kernel"].shape == (16, 10) and "norm_3_shortcut_0" in shapes


def test_descriptions_are_values_and_json():
  copy = Architecture.from_json(MIXED.to_json())
  assert copy == MIXED and hash(copy) == hash(MIXED)
  arch = MIXED.with_stds(0.5)
  assert {layer.w_std for layer in nested(arch.layers) if isinstance(layer, (Dense, Conv))} == {0.5}
  assert Residual((Conv(3),)) != Residual((Conv(3, stride=2),)) and AvgPool(3) == AvgPool(3, 3)
  assert not _is_dense(Architecture("a", (Residual((Conv(3),), (Conv(1),)), Flatten(), Dense())))


def test_defaults_are_left_out_of_json():
  """So that earlier versions read the files of architectures that they know."""
  layers = json.loads(kipcore.conv_net(1).to_json())["layers"]
  assert layers[0].keys() == {"layer", "size", "w_std", "b_std"}
  assert layers[2] == {"layer": "AvgPool", "size": 2}


def build(*layers):
  return Architecture("a", (*layers, Flatten(), Dense()))


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: build(Conv(3), Residual((Relu(),))), "branch whose last activation is followed"),
    (lambda: build(Conv(3), Residual((AvgPool(1),))), "branch whose last activation is followed"),
    (
      lambda: build(Conv(3), Residual((Residual((Conv(3),)),), (Conv(1),))),
      "branch whose last activation is followed",
    ),
    (lambda: build(Residual((Conv(3),))), "shortcut with Gaussian outputs"),
    (lambda: build(Conv(3), Relu(), Residual((Conv(3),))), "shortcut with Gaussian outputs"),
    (lambda: build(Residual((Relu(), Conv(3)), (Conv(3),))), "whose inputs are not Gaussian"),
    (lambda: build(Conv(3), Residual((Flatten(), Dense()))), "outside of residual blocks"),
    (lambda: build(Conv(3), Residual((Dense(),))), "wrong side of Flatten"),
    (lambda: build(Conv(3), Residual(("Conv",))), "expected records among"),
    (lambda: build(Conv(3), SumPool(0)), "expected a size and a stride >= 1"),
    (lambda: build(Conv(3, stride=0)), "expected a size and a stride >= 1"),
    (lambda: Conv(3, padding="REFLECT"), "padding of Conv: expected one of SAME, VALID, CIRCULAR"),
    (lambda: kernel(build(Conv(3), block(2))), "a branch and a shortcut with equal image sizes"),
    (lambda: network(build(Conv(3), block(2))), "a branch and a shortcut with equal image sizes"),
    (
      lambda: network(
        build(Conv(3), Residual((Conv(3, stride=2),), (AvgPool(2),))), width_growth=2
      ),
      "a branch and a shortcut with equal shapes",
    ),
    (lambda: kernel(build(Conv(7, padding="VALID"))), "too small for the pooling and convolutions"),
    (
      lambda: network(build(Conv(7, padding="VALID"))),
      "too small for the pooling and convolutions",
    ),
    (
      lambda: Architecture.from_json('{"name": "a", "layers": [{"layer": "Residual"}]}'),
      "expected the JSON of an architecture",
    ),
  ],
)
def test_wrong_descriptions_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def kernel(arch):
  return kipcore.ntk_fn(arch)(jnp.zeros((1, 6, 6, 1)))


def network(arch, **options):
  module = kipcore.network(arch, 4, **options)
  return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 6, 6, 1)))


def test_an_identity_shortcut_may_be_written_out(x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 1)))
  archs = [build(Conv(3), Residual((Relu(), Conv(3)), path)) for path in ((), (Identity(),))]
  np.testing.assert_array_equal(*(kipcore.nngp_fn(arch)(x) for arch in archs))
