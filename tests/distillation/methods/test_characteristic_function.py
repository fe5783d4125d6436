"""NCFM: loss against NumPy, experts, gradient, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import check_image_gradient, image_problem, image_rows, same_on_devices

import kipcore
from kipcore import keys
from kipcore.distillation import importance, loop
from kipcore.distillation.method import Batch
from kipcore.distillation.methods import experts
from kipcore.distillation.methods.characteristic_function import NCFMOptions, ncfm
from kipcore.types import Support

C, F = 3, 7
rows, problem = image_rows, image_problem


def net(convolutional=False):
  arch = kipcore.conv_net(1) if convolutional else kipcore.fc(1)
  return kipcore.network(arch, 4, C, norm="instance" if convolutional else "none", softplus=20.0)


def walks(module, x, count=2, points=3):
  size, _ = experts.flat_parameters(module, x)
  return np.cumsum(0.4 * np.random.default_rng(5).normal(size=(count, points, size)), axis=1)


def forward(variables, x):
  """Features and outputs of `net()`."""
  theta = jax.tree.map(np.asarray, variables["params"])
  hidden = x.reshape(len(x), -1) @ theta["layer_1"]["kernel"] + theta["bias_1"]
  phi = np.logaddexp(0, 20 * hidden) / 20
  return phi, phi @ theta["layer_3"]["kernel"] + theta["bias_3"]


@pytest.mark.parametrize(
  "batch_labels, support_labels, both",
  [
    ([0, 2, 1, 1, 0, 1, 1, 1, 2, 1], [2, 0, 1, 1], [0, 1, 2]),
    ([0, 1, 1, 0, 1, 1, 1, 1, 1, 1], [2, 0, 2, 1], [0, 1]),
  ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_loss_equals_numpy_with_weights_and_absent_classes(
  batch_labels, support_labels, both, trained, x64
):
  (x, y), (xs, ys) = rows(np.array(batch_labels)), rows(np.array(support_labels), seed=1)
  weights, key = np.random.default_rng(3).uniform(0.2, 2, 10), jax.random.key(1)
  options = NCFMOptions(F, 0.7, "")
  method = ncfm(net(), walks(net(), jnp.asarray(x)) if trained else None, options)
  params = method.init_params(Support(jnp.asarray(xs), jnp.asarray(ys)))
  aux = method.init_aux(jax.random.key(0), params)
  value, info = method.loss(
    params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.asarray(weights), key
  )

  (phi_t, _), (phi_s, _) = forward(aux["network"], x), forward(aux["network"], xs)
  t = np.asarray(jax.random.normal(keys.stream(key, "frequencies"), (F, phi_t.shape[1])))
  waves = lambda phi: np.exp(1j * (phi / np.linalg.norm(phi, axis=1, keepdims=True)) @ t.T)
  expected = 0.0
  for k in both:
    real, own = y.argmax(1) == k, ys.argmax(1) == k
    mean = np.average(waves(phi_t[real]), axis=0, weights=weights[real])
    expected += 300 / 2**0.5 * np.abs(mean - waves(phi_s[own]).mean(0)).mean()
  if trained:
    _, logits = forward(aux["trained"], xs)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(xs)), ys.argmax(1)]
    expected += 0.7 * sum(losses[ys.argmax(1) == k].mean() for k in set(ys.argmax(1)))
  np.testing.assert_allclose(value, expected, rtol=1e-11)
  assert info.predictions.shape == y.shape and info.status == 0


def test_networks_lie_between_the_ends_of_an_expert(x64):
  x, y = map(jnp.asarray, rows(np.array([0, 1, 2])))
  made = walks(net(), x)
  method = ncfm(net(), made)
  params = method.init_params(Support(x, y))
  flat = lambda variables: jax.flatten_util.ravel_pytree(variables["params"])[0]
  shares, chosen = [], set()
  for seed in range(12):
    aux = method.update_aux(jax.random.key(seed), params, None, 0)
    trained, network = flat(aux["trained"]), flat(aux["network"])
    (expert,) = [i for i in range(2) if np.array_equal(made[i, -1], trained)]
    line = made[expert, 0] - made[expert, -1]
    share = np.vdot(network - trained, line) / np.vdot(line, line)
    np.testing.assert_allclose(network, trained + share * line, rtol=1e-10, atol=1e-12)
    shares.append(share)
    chosen.add(expert)
  assert chosen == {0, 1} and 0 <= min(shares) < 0.3 and 0.7 < max(shares) <= 1


def test_gradient_equals_finite_differences(x64):
  """Through instance norm, pooling, augmentation, both terms."""
  support, x, y = problem(np.float64, n=20)
  made = walks(net(True), jnp.asarray(x))
  check_image_gradient(ncfm(net(True), made, NCFMOptions(F)), support, x, y, 4)


def test_support_equal_to_the_data_has_loss_and_gradient_zero(x64):
  """With augmentation too: both sides get the same transform."""
  x, y = map(jnp.asarray, rows(np.array([0, 1, 2, 0, 1, 2, 2])))
  method = ncfm(net(), options=NCFMOptions(F))
  params = method.init_params(Support(x, y))
  aux = method.init_aux(jax.random.key(0), params)
  f = jax.jit(
    jax.value_and_grad(
      lambda images, batch_x, key: method.loss(
        {**params, "x": images}, aux, Batch(batch_x, y), jnp.full(7, 3.0), key
      )[0]
    )
  )
  for seed in range(3):
    value, slope = f(x, x, jax.random.key(seed))
    assert value < 1e-12 and np.isfinite(slope).all()
    assert f(x, x[::-1], jax.random.key(seed))[0] > 1


def test_rows_without_features_have_a_finite_gradient():
  """In float32, where the square of their norm underflows."""
  x, y = (jnp.asarray(a, jnp.float32) for a in rows(np.array([0, 1, 2])))
  method = ncfm(net(), options=NCFMOptions(F, augmentation=""))
  params = method.init_params(Support(x, y))
  aux = method.init_aux(jax.random.key(0), params)
  aux["network"]["params"]["bias_1"] -= 2.0  # features of 1e-19
  loss = lambda images: method.loss(
    {**params, "x": images}, aux, Batch(x[::-1], y), jnp.ones(3, jnp.float32), jax.random.key(1)
  )[0]
  assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


@pytest.mark.slow
def test_loss_and_gradient_do_not_depend_on_the_number_of_devices(x64):
  support, x, y = problem(np.float64, n=21)
  method = ncfm(net(), walks(net(), jnp.asarray(x)), NCFMOptions(F))
  same_on_devices(method, support, x, y, rtol=1e-11, num_steps=2)


def test_distilling_lowers_the_loss_under_unseen_networks():
  support, x, y = problem()
  plain = ncfm(net(), options=NCFMOptions(256, augmentation=""))
  distiller = loop.Distiller(plain, importance.sampler("uniform"), optax.adam(0.05), 30)
  result = loop.distill(0, distiller, support, x, y, 150)

  @jax.jit
  def loss(images, key):
    params = {"x": images, "y": support.y}
    aux = plain.init_aux(key, params)
    return plain.loss(params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.ones(len(x)), key)[0]

  before, after = (
    np.mean([loss(s, jax.random.key(k)) for k in range(100, 108)])
    for s in (support.x, result.support.x)
  )
  assert after < 0.85 * before


@pytest.mark.parametrize(
  "shape, message",
  [
    ((3, 4), "trajectories: expected an array with 3 dimensions"),
    ((1, 1, 9), "at least one expert with at least 2 points, got shape"),
    ((1, 2, 9), "trajectories: expected shape"),
  ],
)
def test_trajectories_of_another_shape_are_named(shape, message):
  support, _, _ = problem()
  with pytest.raises(ValueError, match=message):
    ncfm(net(), np.zeros(shape)).init_params(support)
