"""RaT-BPTT: its loss by training written out, its gradient, truncation, labels, learning rate, devices, learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import check_gradient, image_problem, same_on_devices, slow_except, standard_promotion

import kipcore
from kipcore import keys
from kipcore.distillation.features import draw_network
from kipcore.distillation.method import Batch
from kipcore.distillation.methods.ratbptt import RaTBPTTOptions, rat_bptt

C = 3
SHORT = RaTBPTTOptions(unroll=5, window=5, inner_rate=0.02, augmentation="", eps_root=1e-6)


def net(convolutional=False):
  arch = kipcore.conv_net(1) if convolutional else kipcore.fc(1)
  return kipcore.network(arch, 4, C, norm="instance" if convolutional else "none", softplus=20.0)


def setup(options, dtype=np.float64, convolutional=False, n=20):
  support, x, y = image_problem(dtype, n=n)
  method = rat_bptt(net(convolutional), options)
  weights = jnp.asarray(np.random.default_rng(4).uniform(0, 2, n), dtype)
  return method, support, Batch(jnp.asarray(x), jnp.asarray(y)), weights


@pytest.mark.parametrize("loss", slow_except(["cross_entropy", "squared_error"], "squared_error"))
def test_loss_equals_training_written_out(loss, x64):
  """Adam by its formula, full batches, and the loss of the trained network on the targets."""
  options = dataclasses.replace(SHORT, loss=loss)
  method, support, batch, weights = setup(options)
  key = jax.random.key(3)
  value, info = method.loss(method.init_params(support), None, batch, weights, key)

  module = net()
  theta = draw_network(keys.stream(key, "network"), module, support.x)
  labels = support.y if loss == "squared_error" else support.y + 1 / C

  def error(theta):
    out = module.apply(theta, support.x)
    if loss == "squared_error":
      return jnp.mean(0.5 * jnp.sum((out - labels) ** 2, axis=1))
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(out), axis=1))

  m = v = jax.tree.map(jnp.zeros_like, theta)
  for t in range(1, 6):
    g = jax.grad(error)(theta)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
    theta = jax.tree.map(
      lambda p, m, v, t=t: (
        p - 0.02 * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t) + 1e-6) + 1e-8)
      ),
      theta,
      m,
      v,
    )
  out = module.apply(theta, batch.x)
  if loss == "squared_error":
    rows, predictions = 0.5 * jnp.sum((out - batch.y) ** 2, axis=1), out
  else:
    rows = -jnp.sum(jax.nn.log_softmax(out) * (batch.y + 1 / C), axis=1)
    predictions = jax.nn.softmax(out) - 1 / C
  np.testing.assert_allclose(value, jnp.mean(weights * rows), rtol=1e-10)
  np.testing.assert_allclose(info.per_example, rows, rtol=1e-10)
  np.testing.assert_allclose(info.predictions, predictions, rtol=1e-9, atol=1e-12)
  correct = np.argmax(out, 1) == np.argmax(batch.y, 1)
  np.testing.assert_allclose(info.accuracy, np.mean(correct), rtol=1e-6)


@pytest.mark.parametrize("loss", slow_except(["cross_entropy", "squared_error"], "squared_error"))
def test_full_unroll_gradient_equals_finite_differences(loss, x64):
  """Through instance norm, pooling, augmentation and five steps of Adam: images, labels and learning rate."""
  options = dataclasses.replace(
    SHORT, loss=loss, learn_labels=True, learn_rate=True, augmentation="flip_rotate"
  )
  method, support, batch, weights = setup(options, convolutional=True)
  params = method.init_params(support)
  loss_of = jax.jit(lambda p, key: method.loss(p, None, batch, weights, key)[0])
  for seed in range(2):
    f = functools.partial(loss_of, key=jax.random.key(seed))
    check_gradient(f, params, rtol=2e-6)
    assert all(np.any(g != 0) for g in jax.tree.leaves(jax.grad(f)(params)))


def test_truncated_gradient_is_that_of_training_from_a_constant_network(x64):
  """The value does not depend on the window; the gradient is that of the last steps, and tends to the full one."""
  method, support, batch, weights = setup(SHORT)
  params, key = method.init_params(support), jax.random.key(5)
  results = {}
  for window in (1, 4, 5):
    # A window below the unroll has a random end; both ends are forced to the last step.
    each = rat_bptt(net(), dataclasses.replace(SHORT, window=window))

    def loss(p, each=each):
      theta = each._trained(p, jnp.int32(5), key)
      out = net().apply(theta, batch.x)
      return jnp.mean(optax.softmax_cross_entropy(out, batch.y + 1 / C))

    results[window] = jax.jit(jax.value_and_grad(loss))(params)
  assert np.ptp([value for value, _ in results.values()]) < 1e-12
  gradients = {window: gradient["x"] for window, (_, gradient) in results.items()}
  far, near = (np.linalg.norm(gradients[w] - gradients[5]) for w in (1, 4))
  assert 0 < near < far

  # One step written out from the network after four.
  one = rat_bptt(net(), dataclasses.replace(SHORT, window=1))
  step = one._step(key)
  state = draw_network(keys.stream(key, "network"), net(), support.x)
  state = state, optax.scale_by_adam().init(state)
  for i in range(4):
    state = step(params, state, jnp.int32(i))

  def last(x):
    theta, _ = step({**params, "x": x}, state, jnp.int32(4))
    with standard_promotion():
      return jnp.mean(optax.softmax_cross_entropy(net().apply(theta, batch.x), batch.y + 1 / C))

  np.testing.assert_allclose(jax.grad(last)(support.x), gradients[1], rtol=1e-9, atol=1e-14)


def test_window_ends_are_uniform():
  options = dataclasses.replace(SHORT, unroll=4, window=2)
  method, support, batch, weights = setup(options, np.float32)
  seen = []
  network = draw_network(jax.random.key(0), method.module, support.x)

  class Recorded(type(method)):
    def _trained(self, params, last, key):
      jax.debug.callback(lambda value: seen.append(int(value)), last)  # `loss` is compiled
      return network

  recorded, params = Recorded(method.module, options), method.init_params(support)
  for seed in range(60):
    recorded.loss(params, None, batch, weights, jax.random.key(seed))
  jax.effects_barrier()
  counts = np.bincount(seen, minlength=5)
  assert counts[:2].sum() == 0 and (counts[2:] >= 10).all()


def test_labels_are_distributions_and_given_ones_are_kept():
  support, _, _ = image_problem(np.float32)
  soft = jax.nn.softmax(3 * support.y) - 1 / C
  for learn in (False, True):
    method = rat_bptt(net(), dataclasses.replace(SHORT, learn_labels=learn))
    params = method.init_params(kipcore.Support(support.x, soft))
    labels = method.support(params, None).y
    np.testing.assert_allclose(np.sum(labels, axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(labels, soft, atol=1e-6)
    # The logits of classes are finite only if they are smoothed.
    classes = method.support(method.init_params(support), None).y
    np.testing.assert_allclose(classes, (0.9 if learn else 1.0) * support.y, atol=1e-6)
    assert method.trainable(params)["y"] == float(learn)


def test_float32_gradient_is_finite_with_inactive_units():
  """ReLU units that no image activates have second moments of zero."""
  support, x, y = image_problem(np.float32)
  options = dataclasses.replace(SHORT, eps_root=1e-10, unroll=12, window=12)
  method = rat_bptt(kipcore.network(kipcore.fc(1), 64, C), options)
  batch = Batch(jnp.asarray(x), jnp.asarray(y))
  params = method.init_params(support._replace(x=jnp.abs(support.x)))
  gradient = jax.grad(
    lambda p: method.loss(p, None, batch, jnp.ones(len(x)), jax.random.key(0))[0]
  )(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_loss_and_gradient_do_not_depend_on_the_number_of_devices(x64):
  support, x, y = image_problem(np.float64, n=21)
  options = dataclasses.replace(SHORT, window=3)
  same_on_devices(rat_bptt(net(), options), support, x, y, rtol=1e-9, num_steps=2)


def test_distilling_teaches_new_networks():
  support, x, y = image_problem(np.float32)
  options = dataclasses.replace(SHORT, unroll=20, window=10, learn_labels=True)
  method = rat_bptt(net(), options)
  distiller = kipcore.Distiller(method, kipcore.sampler("cross_entropy"), optax.adam(0.05), 90)
  result = kipcore.distill(0, distiller, support, x, y, 120)

  @jax.jit
  def loss(params, key):
    batch = Batch(jnp.asarray(x), jnp.asarray(y))
    return method.loss(params, None, batch, jnp.ones(len(x)), key)[0]

  before, after = (
    np.mean([loss(params, jax.random.key(k)) for k in range(100, 108)])
    for params in (method.init_params(support), result.state.params)
  )
  assert after < 0.9 * before


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(window=6), "window: expected at most unroll = 5"),
    (dict(loss="hinge"), "loss: expected one of cross_entropy"),
    (dict(inner_rate=0.0), "inner_rate: expected a finite number > 0"),
    (dict(augmentation="blur"), "augmentation: expected names"),
  ],
)
def test_invalid_options_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SHORT, **change)


def test_batch_norm_is_rejected():
  with pytest.raises(ValueError, match="module.norm"):
    rat_bptt(kipcore.network(kipcore.conv_net(1), 4, C, norm="batch"))
