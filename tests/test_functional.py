"""Networks of users: equal to kipcore's own where they are the same, with dropout and batch norm, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import assert_close, check_image_gradient, image_problem, standard_promotion

import kipcore
from kipcore.evaluation import networks, protocols

C, WIDTH = 3, 4
ROW = np.zeros((1, 8, 8, 1))
STD = 2**0.5


def reference(norm):
  return kipcore.network(kipcore.conv_net(1), WIDTH, C, norm=norm)


class Linen(nn.Module):
  """The network of `reference`, with the same names, so that flax draws the same parameters."""

  norm: str = "none"

  @nn.compact
  def __call__(self, x, train: bool = False, readout: bool = True):
    init, dtype = nn.initializers.normal, x.dtype
    options = dict(use_bias=False, param_dtype=dtype)
    x = nn.Conv(WIDTH, (3, 3), kernel_init=init(STD / 3), name="layer_0", **options)(x)
    x = x + self.param("bias_0", init(0.1), (WIDTH,), dtype)
    if self.norm == "batch":
      x = nn.BatchNorm(not train, 0.9, 1e-5, param_dtype=dtype, name="norm_0")(x)
    if self.norm == "instance":
      x = nn.InstanceNorm(epsilon=1e-5, param_dtype=dtype, name="norm_0")(x)
    x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2)).reshape(x.shape[0], -1)
    if not readout:
      return x
    x = nn.Dense(C, kernel_init=init(STD / x.shape[1] ** 0.5), name="layer_4", **options)(x)
    return x + self.param("bias_4", init(0.1), (C,), dtype)


class NNX(nnx.Module):
  """The network of `reference`, with the parameters that it draws from the same key."""

  def __init__(self, norm, *, rngs):
    theta = reference(norm).init(rngs.default.key.get_value(), jnp.asarray(ROW))["params"]
    options = dict(param_dtype=jnp.float64, rngs=rngs)
    self.conv = nnx.Conv(1, WIDTH, (3, 3), **options)
    self.dense = nnx.Linear(16 * WIDTH, C, **options)
    for layer, i in ((self.conv, 0), (self.dense, 4)):
      layer.kernel.set_value(theta[f"layer_{i}"]["kernel"])
      layer.bias.set_value(theta[f"bias_{i}"])
    make = {
      "batch": lambda: nnx.BatchNorm(WIDTH, momentum=0.9, epsilon=1e-5, **options),
      "instance": lambda: nnx.GroupNorm(WIDTH, WIDTH, epsilon=1e-5, **options),
      "none": lambda: nnx.identity,
    }
    self.norm = make[norm]()

  def features(self, x):
    x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
    return x.reshape(x.shape[0], -1)

  def __call__(self, x):
    return self.dense(self.features(x))


def pair(norm):
  def features(theta, x):
    kernel, axes = theta["layer_0"]["kernel"], ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
    x = x + theta["bias_0"]
    if norm == "instance":
      mean = jnp.mean(x, axis=(1, 2), keepdims=True)
      x = (x - mean) / jnp.sqrt(jnp.var(x, axis=(1, 2), keepdims=True) + 1e-5)
      x = x * theta["norm_0"]["scale"] + theta["norm_0"]["bias"]
    x = jax.nn.relu(x).reshape(-1, 4, 2, 4, 2, WIDTH)
    return jnp.mean(x, axis=(2, 4)).reshape(x.shape[0], -1)

  def apply(theta, x):
    return features(theta, x) @ theta["layer_4"]["kernel"] + theta["bias_4"]

  init = lambda key, x: reference(norm).init(key, x)["params"]
  return kipcore.as_network((init, apply), features)


KINDS = {
  "linen": lambda norm: kipcore.as_network(
    Linen(norm), lambda module, x: module(x, readout=False)
  ),
  "nnx": lambda norm: functools.partial(NNX, norm),
  "pair": pair,
}
METHODS = {
  "frepo": lambda net: kipcore.frepo(net, kipcore.FRePoOptions(pool_size=1, flip=True)),
  "dm": lambda net: kipcore.dm(net, kipcore.DMOptions("")),
  "rat_bptt": lambda net: kipcore.rat_bptt(
    net, kipcore.RaTBPTTOptions(3, 2, inner_rate=0.1, learn_rate=True, augmentation="")
  ),
  "dc": lambda net: kipcore.dc(net, kipcore.GradientMatchingOptions(3, 2, 0.1)),
  "dsa": lambda net: kipcore.dsa(net, kipcore.GradientMatchingOptions(3, 2, 0.1)),
  "rfad": lambda net: kipcore.rfad(net, kipcore.RFADOptions(num_networks=2)),
}
CASES = [
  *((name, kind, "instance") for name in ("dm", "rat_bptt") for kind in KINDS),
  ("dc", "linen", "instance"),
  ("dc", "nnx", "instance"),
  ("dsa", "pair", "instance"),
  ("frepo", "linen", "batch"),
  ("frepo", "nnx", "batch"),
  ("frepo", "pair", "none"),
  ("rfad", "nnx", "none"),
]


def losses(method):
  """The loss, what it reports and its gradient, after an update of the first networks."""
  support, x, y = image_problem(np.float64, n=12)
  batch, weights = kipcore.Batch(jnp.asarray(x), jnp.asarray(y)), jnp.linspace(0.5, 2.0, len(x))

  @jax.jit
  def updated(params):
    aux = method.init_aux(jax.random.key(0), params)
    aux = method.update_aux(jax.random.key(1), params, aux, jnp.int32(0))
    loss = lambda params: method.loss(params, aux, batch, weights, jax.random.key(2))
    return jax.value_and_grad(loss, has_aux=True)(params)

  return updated(method.init_params(support))


@functools.cache
def expected(name, norm):
  return losses(METHODS[name](reference(norm)))


@pytest.mark.parametrize("name, kind, norm", CASES)
def test_losses_and_gradients_are_those_of_the_same_network_of_kipcore(name, kind, norm, x64):
  with standard_promotion():
    found = losses(METHODS[name](KINDS[kind](norm)))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected(name, norm)), strict=True):
    assert_close(a, b, 1e-8, 1e-12)
