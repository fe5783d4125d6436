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

STD = 2**0.5
# Running statistics of flax are float32.
RTOL = {"none": 1e-8, "instance": 1e-8, "batch": 1e-6}


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
      x = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, param_dtype=dtype, name="norm_0")(x)
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
    theta = reference(norm).init(rngs.default.key.get_value(), jnp.zeros((1, 8, 8, 1)))["params"]
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
  "linen": lambda norm: kipcore.as_network(Linen(norm), lambda module, x: module(x, readout=False)),
  "nnx": lambda norm: functools.partial(NNX, norm),
  "pair": pair,
}
METHODS = {
  "frepo": lambda net: kipcore.frepo(net, kipcore.FRePoOptions(pool_size=1, flip=True)),
  "dm": lambda net: kipcore.dm(net, kipcore.DMOptions("")),
  "rat_bptt": lambda net: kipcore.rat_bptt(
    net, kipcore.RaTBPTTOptions(2, 1, 0.1, learn_rate=True, augmentation="")
  ),
  "dc": lambda net: kipcore.dc(net, kipcore.GradientMatchingOptions(3, 1, 0.1)),
  "dsa": lambda net: kipcore.dsa(net, kipcore.GradientMatchingOptions(3, 2, 0.1)),
  "rfad": lambda net: kipcore.rfad(net, kipcore.RFADOptions(num_networks=2)),
  "rcig": lambda net: kipcore.rcig(
    net, kipcore.RCIGOptions(pool_size=1, inner_steps=2, inverse_steps=1, inner_rate=0.1)
  ),
  "ncfm": lambda net: kipcore.ncfm(net, options=kipcore.NCFMOptions(5, augmentation="")),
}
CASES = [
  ("dm", "linen", "instance"),
  ("dm", "pair", "instance"),
  ("frepo", "nnx", "batch"),
  *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
      ("dm", "nnx", "instance"),
      ("dc", "nnx", "none"),
      ("rat_bptt", "pair", "none"),
      ("rat_bptt", "linen", "instance"),
      ("rat_bptt", "nnx", "instance"),
      ("frepo", "linen", "batch"),
      ("frepo", "pair", "none"),
      ("dsa", "linen", "instance"),
      ("dsa", "nnx", "instance"),
      ("dsa", "pair", "instance"),
      ("rfad", "nnx", "none"),
      ("rcig", "nnx", "none"),
      ("ncfm", "linen", "instance"),
    )
  ),
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
    assert_close(a, b, RTOL[norm], 1e-12)


@pytest.mark.parametrize(
  "kind, norm",
  [
    ("nnx", "batch"),
    pytest.param("linen", "batch", marks=pytest.mark.slow),
    pytest.param("pair", "none", marks=pytest.mark.slow),
  ],
)
def test_training_and_accuracy_are_those_of_the_same_network_of_kipcore(kind, norm, x64):
  support, x, y = image_problem(np.float64, n=30)
  how = protocols.Protocol("short", batch_size=4, learning_rate=0.1, ema=0.9, loss="cross_entropy")
  with standard_promotion():
    outputs, scores = [], []
    for network in (KINDS[kind](norm), reference(norm)):
      net = kipcore.as_network(network)
      start = net.init(jax.random.key(0), support.x)
      after = networks.train(net, how, 5, jax.random.key(1), start, support)
      outputs.append(net.apply(after, jnp.asarray(x)))
      scores.append(
        kipcore.evaluate_network(0, network, support, x, y, 1, num_steps=5, protocol=how)
      )
  assert_close(outputs[0], outputs[1], RTOL[norm])
  assert scores[0] == scores[1]


class LinenDropout(nn.Module):
  """The rows times a parameter 1, with half of the entries set to 0 and the others doubled in training."""

  rate: float = 0.5
  ignore: bool = False

  @nn.compact
  def __call__(self, x, deterministic: bool):
    x = nn.Dropout(self.rate, deterministic=deterministic and not self.ignore)(x)
    return x * self.param("scale", nn.initializers.ones, (x.shape[1],))


class NNXDropout(nnx.Module):
  """The same."""

  def __init__(self, ignore=False, *, rngs):
    self.scale = nnx.Param(jnp.ones(4))
    self.dropout, self.ignore = nnx.Dropout(0.5, rngs=rngs), ignore

  def __call__(self, x):
    x = self.dropout(x, deterministic=False) if self.ignore else self.dropout(x)
    return x * self.scale[...]


DROPOUT = {
  "linen": LinenDropout,
  "nnx": lambda **options: functools.partial(NNXDropout, **options),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_active_in_training_only(kind):
  net, x = kipcore.as_network(DROPOUT[kind]()), jnp.ones((64, 4))
  variables = net.init(jax.random.key(0), x)
  np.testing.assert_array_equal(net.apply(variables, x), x)
  one, again, other = (net.train(variables, x, jax.random.key(i))[0] for i in (1, 1, 2))
  assert set(np.unique(one)) == {0, 2} and 0.3 < np.mean(one == 0) < 0.7
  np.testing.assert_array_equal(one, again)
  assert np.mean(one == other) < 0.8


def test_the_gradient_of_a_set_goes_through_training_with_dropout(x64):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
      return nn.Dense(C, param_dtype=x.dtype)(nn.softplus(nn.Dense(8, param_dtype=x.dtype)(x)))

  with standard_promotion():
    options = kipcore.RaTBPTTOptions(2, 2, 0.1, augmentation="", eps_root=1e-2)
    check_image_gradient(kipcore.rat_bptt(Net(), options), *image_problem(np.float64, n=12), 2)


class FixedBatchNorm(nn.Module):
  """Its statistics are those of the batch, always."""

  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(use_running_average=False)(nn.Dense(C)(x))


class Plain(nn.Module):
  sizes: object = C
  rank: int = 2

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(C)(x)
    return x if self.rank == 2 else x[..., None]


def with_integers(key, x):
  return {"w": jnp.ones((x.shape[1], C)), "power": jnp.int32(2)}


def collections(key, x):
  return {"params": jnp.ones((x.shape[1], C)), "batch_stats": jnp.ones(C)}


def linear(w, x):
  return x @ w


REFUSED = {
  "dropout always, linen": (lambda: LinenDropout(ignore=True), "random numbers or changes"),
  "dropout always, nnx": (lambda: DROPOUT["nnx"](ignore=True), "random numbers or changes"),
  "statistics always": (FixedBatchNorm, "random numbers or changes"),
  "rank": (lambda: Plain(rank=3), r"expected outputs of shape \(5, any\), got shape \(5, 3, 1\)"),
  "integers": (
    lambda: (with_integers, linear),
    "expected parameters of floating dtypes, got .*int",
  ),
  "collections": (lambda: (collections, linear), "expected parameters from init, got collections"),
  "unhashable": (lambda: Plain(np.ones(3)), "expected a module with hashable fields"),
  "drawn": (lambda: NNXDropout(rngs=nnx.Rngs(0)), "expected a flax.linen module, a class or"),
  "function": (lambda: linear, "expected a class or function .* one whose call fails"),
  "another type": (lambda: lambda *, rngs: 3, "whose call fails: it returns a int"),
  "architecture": (lambda: kipcore.fc(1), "or a pair .init, apply., got Architecture"),
  "features": (
    lambda: kipcore.as_network(Plain(), "none"),
    "expected the name of a method of Plain",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_would_be_wrong_are_refused(name):
  make, message = REFUSED[name]
  with pytest.raises((TypeError, ValueError), match=message) as raised, standard_promotion():
    net, x = kipcore.as_network(make()), jnp.ones((5, 4))
    net.apply(net.init(jax.random.key(0), x), x)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["dm", "rat_bptt", "dc", "rfad", "rcig", "ncfm"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_methods_refuse_batch_norm_and_missing_features(name, kind):
  support, *_ = image_problem(np.float32, n=12)
  method = getattr(kipcore, name)(KINDS[kind]("batch"))
  with pytest.raises(ValueError, match="expected a network without other variables"):
    method.init_params(support)
  if name not in ("rat_bptt", "dc"):
    with pytest.raises(ValueError, match=r"as_network\(network, features=...\)"):
      getattr(kipcore, name)(Plain())


def test_random_features_of_a_user_have_the_published_readout():
  phi = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
  expected = 2 * np.asarray(phi) @ np.asarray(phi).T + 0.01
  assert_close(kipcore.random_feature_kernel(NNXDropout, phi, phi), expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_empirical_kernel_is_that_of_the_parameters(kind, x64):
  """Statistics of batch norm are constants, though a function of all variables could be differentiated by them."""
  norm = "none" if kind == "pair" else "batch"
  x = jnp.asarray(image_problem(np.float64, n=4)[1])
  with standard_promotion():
    net, own = kipcore.as_network(KINDS[kind](norm)), kipcore.as_network(reference(norm))
    of_params = lambda variables: lambda theta, x: own.apply({**variables, "params": theta}, x)
    variables = own.init(jax.random.key(0), x)
    expected = kipcore.empirical_ntk_fn(of_params(variables), variables["params"])(x)
    arguments = {
      "linen": lambda: (net, net.init(jax.random.key(0), x)),
      "nnx": lambda: (NNX(norm, rngs=nnx.Rngs(jax.random.key(0))),),
      "pair": lambda: ((net.init_fn, net.apply_fn), net.init(jax.random.key(0), x)["params"]),
    }
    assert_close(kipcore.empirical_ntk_fn(*arguments[kind]())(x), expected, RTOL[norm])
    with pytest.raises(TypeError, match="params: expected parameters, got None"):
      kipcore.empirical_ntk_fn(net)
