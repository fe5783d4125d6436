"""Protocols: losses, schedules and steps by formula, training written out, batch norm, averages, tuning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import image_problem, slow_except

import kipcore
from kipcore import linalg
from kipcore.evaluation import networks, protocols
from kipcore.evaluation.protocols import PROTOCOLS, Protocol


def test_losses_equal_numpy(x64):
  rng = np.random.default_rng(0)
  outputs, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
  p = np.maximum(y + 0.25, 0)
  p /= p.sum(1, keepdims=True)
  log_softmax = lambda z: z - np.log(np.exp(z).sum(1, keepdims=True))
  expected = {
    "squared_error": np.mean((outputs - y) ** 2, axis=1),
    "cross_entropy": -log_softmax(outputs)[np.arange(6), y.argmax(1)],
    "soft_cross_entropy": -np.sum(p * log_softmax(outputs / 4.0), axis=1),
  }
  for loss, rows in expected.items():
    how = Protocol("p", loss=loss, temperature=4.0)
    got = how.row_losses(jnp.asarray(outputs), jnp.asarray(y))
    np.testing.assert_allclose(got, rows, rtol=1e-12)
  np.testing.assert_allclose(protocols.label_distribution(jnp.asarray(y)), p, rtol=1e-12)
  centered = p - 0.25
  np.testing.assert_allclose(protocols.label_distribution(jnp.asarray(centered)), p, atol=1e-12)
  assert np.all(protocols.label_distribution(jnp.full((1, 4), -3.0)) == 0.25)


@pytest.mark.parametrize(
  "name, size, steps",
  [
    ("frepo", 10, 1000),
    ("frepo", 100, 2000),
    ("frepo", 150, 20_000),
    ("frepo", 500, 5000),
    ("frepo", 9000, 40_000),
    ("rcig", 10, 1000),
    ("rcig", 100, 2000),
    ("dc", 10, 300),
    ("dc", 257, 600),
    ("dsa", 500, 2000),
  ],
)
def test_number_of_steps_as_published(name, size, steps):
  assert PROTOCOLS[name].num_steps(size) == steps


def rates(how, num_steps):
  """The rate at each step, from the updates of plain SGD on a constant gradient of 1."""
  plain = dataclasses.replace(how, optimizer="sgd", momentum=0.0, weight_decay=0.0)
  with linalg.permissive_promotion():
    transformation = plain.transformation(num_steps)

    def step(state, _):
      update, state = transformation.update(jnp.ones(()), state, jnp.zeros(()))
      return state, -update

    return np.array(jax.lax.scan(step, transformation.init(jnp.zeros(())), length=num_steps)[1])


def test_schedules_as_published(x64):
  step = rates(PROTOCOLS["dc"], 300)
  np.testing.assert_allclose(step, np.where(np.arange(300) < 150, 0.01, 0.001), rtol=1e-9)
  frepo = rates(PROTOCOLS["frepo"], 6000)
  np.testing.assert_allclose(frepo[:500], 3e-4 * np.arange(500) / 500, rtol=2e-5, atol=1e-12)
  cosine = 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * np.arange(5500) / 5500))
  np.testing.assert_allclose(frepo[500:], 3e-4 * cosine, rtol=1e-6)
  assert np.argmax(rates(PROTOCOLS["rcig"], 1000)) == 500
  # A warm-up takes at most half of a short training.
  assert np.argmax(rates(PROTOCOLS["frepo"], 100)) == 50


def test_training_equals_sgd_written_out(x64):
  """Cross-entropy, momentum, weight decay and the moving average, by their formulas."""
  support, x, y = image_problem(np.float64, n=200)
  how = Protocol(
    "p",
    loss="cross_entropy",
    optimizer="sgd",
    learning_rate=0.1,
    schedule="step",
    steps=((1, 8),),
    weight_decay=0.02,
    ema=0.7,
  )
  module = kipcore.network(kipcore.fc(1), 8, 3)
  start = module.init(jax.random.key(0), support.x[:1])
  with linalg.permissive_promotion():
    got = networks.train(module, how, 8, jax.random.key(1), start, support)
  classes = np.argmax(support.y, axis=1)

  def loss(p):
    log_p = jax.nn.log_softmax(module.apply(p, support.x))
    return -jnp.mean(log_p[np.arange(len(classes)), classes])

  theta = average = start
  velocity = jax.tree.map(jnp.zeros_like, theta)
  for i in range(8):
    gradient = jax.tree.map(lambda g, p: g + 0.02 * p, jax.grad(loss)(theta), theta)
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
    rate = 0.1 if i < 4 else 0.01
    theta = jax.tree.map(lambda p, v, rate=rate: p - rate * v, theta, velocity)
    average = jax.tree.map(lambda a, p: 0.7 * a + 0.3 * p, average, theta)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(average)):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_batch_norm_statistics_follow_the_batches():
  support, x, y = image_problem(np.float32)
  module = kipcore.network(kipcore.conv_net(1), 4, 3, norm="batch")
  start = module.init(jax.random.key(0), support.x[:1])
  how = dataclasses.replace(PROTOCOLS["default"], subtract_initial=False)
  with linalg.permissive_promotion():
    after = networks.train(module, how, 30, jax.random.key(1), start, support)
  (mean,) = [
    leaf for path, leaf in jax.tree_util.tree_leaves_with_path(after["batch_stats"])
    if "mean" in str(path)
  ]  # fmt: skip
  assert np.any(mean != 0)
  score = kipcore.evaluate_network(
    0, kipcore.conv_net(1), support, x, y, 1, 4, 30, protocol="frepo", norm="batch"
  )
  assert 0 < score[0] <= 1


def test_networks_are_those_of_the_protocol(monkeypatch):
  made = []
  network = kipcore.network
  monkeypatch.setattr(
    networks.networks,
    "network",
    lambda *args, **kwargs: made.append(network(*args, **kwargs)) or made[-1],
  )
  x = np.random.default_rng(0).normal(size=(6, 4, 4, 3)).astype(np.float32)
  support = kipcore.Support(x, np.eye(6, 3, dtype=np.float32))
  for protocol in ("frepo", "dsa", "default"):
    kipcore.evaluate_network(
      0, kipcore.conv_net(1), support, x, support.y, 1, 2, 2, protocol=protocol
    )
  assert [module.width_growth for module in made] == [2, 1, 1]
  assert [module.arch for module in made] == [
    kipcore.conv_net(1, 1.0, 0.0),
    kipcore.conv_net(1, 3**-0.5, 0.0),
    kipcore.conv_net(1),
  ]


def test_cutmix_mixes_images_and_labels_by_area(x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 7, 2)))
  y = jnp.eye(5)
  areas = []
  for seed in range(200):
    key = jax.random.key(seed)
    mixed, labels = protocols.cutmix(key, x, y)
    order = jax.random.permutation(jax.random.split(key, 3)[0], 5)
    taken = np.any(np.asarray(mixed != x), axis=(0, 3))
    np.testing.assert_array_equal(mixed, np.where(taken[None, :, :, None], x[order], x))
    share = taken.mean()
    np.testing.assert_allclose(labels, (1 - share) * y + share * y[order], atol=1e-12)
    areas.append(share)
  assert min(areas) < 0.05 and max(areas) > 0.6


@pytest.mark.parametrize("name", slow_except(sorted(PROTOCOLS), "default", "rcig", "soft"))
def test_every_named_protocol_trains_a_network(name):
  """The loss of the support falls to less than half, and the command's entry point accepts the name."""
  support, x, y = image_problem(np.float32)
  how = protocols.protocol(name, 1)
  module = kipcore.network(kipcore.conv_net(1), 16, 3, norm=how.norm)
  start = module.init(jax.random.key(0), support.x[:1])
  with linalg.permissive_promotion():
    after = networks.train(module, how, 600, jax.random.key(1), start, support, 0.02)
    offset = module.apply(start, support.x) if how.subtract_initial else 0.0
    before, now = (
      np.mean(how.row_losses(module.apply(v, support.x) - offset, support.y))
      for v in (start, after)
    )
  assert now < 0.5 * before
  scores = kipcore.evaluate_network(0, kipcore.conv_net(1), support, x, y, 1, 8, 5, protocol=name)
  assert scores.shape == (1,)


def test_named_protocols_do_not_mirror_characters_or_augment_vectors():
  assert "flip" in protocols.protocol("dsa", 3).augmentation
  assert protocols.protocol("dsa", 1).augmentation == "color_crop_cutout_scale_rotate"
  assert protocols.protocol("dsa").augmentation == ""
  own = Protocol("own", augmentation="flip")
  assert protocols.protocol(own, 1) is own


def test_tune_chooses_by_validation_rows():
  support, x, y = image_problem(np.float32)
  found = networks.tune(
    0, kipcore.fc(1), support, x, y, "default", (1e30, 1e-5, 0.02), (5, 40), 2, 16
  )
  assert set(found.accuracies) == {(r, s) for r in (1e30, 1e-5, 0.02) for s in (5, 40)}
  best = max(found.accuracies.values())
  chosen = found.protocol
  assert found.accuracies[chosen.learning_rate, chosen.num_steps(1)] == best
  assert found.accuracies[1e30, 40] == 0 < best
  again = kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, 2, 16, protocol=chosen)
  np.testing.assert_allclose(np.mean(again), best, atol=1e-6)
  with pytest.raises(ValueError, match="learning_rates: expected at least one"):
    networks.tune(0, kipcore.fc(1), support, x, y, learning_rates=())


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(loss="hinge"), "loss: expected one of squared_error"),
    (dict(optimizer="lamb"), "optimizer: expected one of adam"),
    (dict(schedule="linear"), "schedule: expected one of constant"),
    (dict(norm="layer"), "norm: expected one of none"),
    (dict(learning_rate=0.0), "learning_rate: expected a finite number > 0"),
    (dict(ema=1.5), "ema: expected a value in"),
    (dict(steps=()), "steps: expected at least one pair"),
    (dict(batch_size=0), "batch_size: expected a positive integer"),
    (dict(augmentation="blur"), "augmentation: expected names"),
  ],
)
def test_invalid_settings_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    Protocol("p", **change)
  with pytest.raises(ValueError, match="protocol: expected one of default"):
    protocols.protocol("frep")


def test_moving_norm_clips_to_twice_the_average():
  from kipcore.distillation.optimizers import clip_by_moving_norm

  transformation = clip_by_moving_norm()
  state, average, total = transformation.init(jnp.zeros(2)), 0.0, 0
  for norm in (1.0, 1.0, 5.0, 0.5, 100.0):
    update, state = transformation.update(jnp.asarray([0.6 * norm, 0.8 * norm]), state)
    allowed = norm if total == 0 else min(norm, 2 * average / (1 - 0.9**total))
    np.testing.assert_allclose(update, [0.6 * allowed, 0.8 * allowed], rtol=1e-5)
    average, total = 0.9 * average + 0.1 * allowed, total + 1
  assert not np.any(transformation.update(jnp.zeros(2), state)[0])
