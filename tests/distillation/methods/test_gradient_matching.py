"""DC and DSA: per-class gradients, distance and its gradient, network schedule, devices, seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
  FLOAT64_IS_SLOW,
  RTOL,
  assert_close,
  check_image_gradient,
  image_problem,
  image_rows,
  same_on_devices,
  slow_except,
)

import kipcore
from kipcore.distillation import importance, loop
from kipcore.distillation.method import Batch
from kipcore.distillation.methods import gradient_matching as gm
from kipcore.types import Support

C = 3
rows, problem = image_rows, image_problem


def net(convolutional=False):
  arch = kipcore.conv_net(1) if convolutional else kipcore.fc(1)
  return kipcore.network(arch, 4, C, norm="instance" if convolutional else "none", softplus=20.0)


def numpy_gradients(theta, x, y, weights, k):
  """Mean cross-entropy gradient of class k for a softplus network with one hidden layer."""
  own = y.argmax(1) == k
  x, w = x[own].reshape(own.sum(), -1), weights[own] / weights[own].sum()
  w1, b1, w2, b2 = (
    np.asarray(theta[a][b] if b else theta[a])
    for a, b in (("layer_1", "kernel"), ("bias_1", 0), ("layer_3", "kernel"), ("bias_3", 0))
  )
  z = 20 * (x @ w1 + b1)
  hidden, slope = np.log1p(np.exp(z)) / 20, 1 / (1 + np.exp(-z))
  logits = hidden @ w2 + b2
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  delta = w[:, None] * (p - np.eye(C)[k])
  return x.T @ (delta @ w2.T * slope), hidden.T @ delta


def numpy_distance(real, made):
  total = 0.0
  for r, s in zip(real, made):
    for i in range(r.shape[1]):
      total += 1 - r[:, i] @ s[:, i] / (np.linalg.norm(r[:, i]) * np.linalg.norm(s[:, i]) + 1e-6)
  return total


@pytest.mark.parametrize(
  "batch_labels, support_labels, both",
  [
    ([0, 2, 1, 1, 0, 1, 1, 1, 2, 1], [2, 0, 1, 1], [0, 1, 2]),
    ([0, 1, 1, 0, 1, 1, 1, 1, 1, 1], [2, 0, 2, 1], [0, 1]),
    ([0, 2, 1, 1, 0, 1, 1, 1, 2, 1], [1, 1, 2, 1], [1, 2]),
  ],
)
def test_loss_equals_numpy_with_unequal_and_absent_classes(batch_labels, support_labels, both, x64):
  (x, y), (xs, ys) = rows(np.array(batch_labels)), rows(np.array(support_labels), seed=1)
  weights = np.random.default_rng(3).uniform(0.2, 2, len(x))
  method = gm.dc(net())
  params = method.init_params(Support(jnp.asarray(xs), jnp.asarray(ys)))
  aux = method.init_aux(jax.random.key(0), params)
  value, info = jax.jit(method.loss)(
    params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.asarray(weights), jax.random.key(1)
  )
  expected = sum(
    numpy_distance(
      numpy_gradients(aux["params"], x, y, weights, k),
      numpy_gradients(aux["params"], xs, ys, np.ones(len(xs)), k),
    )
    for k in both
  )
  np.testing.assert_allclose(value, expected, rtol=1e-9)
  assert info.predictions.shape == y.shape and info.per_example.shape == (10,) and info.status == 0


@pytest.mark.parametrize(
  "make, convolutional", slow_except([(gm.dc, False), (gm.dsa, True)], (gm.dc, False))
)
def test_gradient_equals_finite_differences(make, convolutional, x64):
  support, x, y = problem(np.float64, n=20)
  check_image_gradient(make(net(convolutional)), support, x, y, 3)


@pytest.mark.parametrize("b", slow_except([1, 7, 300], 1, 7))
def test_class_gradients_equal_one_gradient_per_class(b, x64):
  """Any counts, including absent and multi-chunk classes; also a second derivative."""
  rng, c = np.random.default_rng(b), 4
  x, weights, theta = (
    jnp.asarray(rng.normal(size=(b, 3))),
    jnp.asarray(rng.uniform(size=b)),
    jnp.asarray(rng.normal(size=3)),
  )
  objective = lambda theta, x, w, k: (k + 1).astype(jnp.float64) * jnp.sum(w * jnp.sin(x @ theta))
  chunked = jax.jit(lambda x, y: gm.class_gradients(objective, theta, x, y, weights))
  through = jax.jit(
    jax.grad(lambda x, y: jnp.sum(jnp.cos(gm.class_gradients(objective, theta, x, y, weights))))
  )
  for labels in (
    rng.integers(0, c, b),
    np.full(b, 3),
    np.zeros(b, int),
    np.where(np.arange(b) == b // 2, 1, 2),
    np.sort(rng.choice([0, 3], b)),
    rng.permutation(np.arange(b) % c),
  ):
    y = jnp.asarray(np.eye(c)[labels] - 0.25)

    @jax.jit
    def plain(x):
      return jnp.stack(
        [
          jax.grad(objective)(theta, x[labels == k], weights[labels == k], jnp.asarray(k))
          for k in range(c)
        ]
      )

    assert_close(chunked(x, y), plain(x), rtol=1e-11)
    assert_close(through(x, y), jax.vjp(plain, x)[1](-jnp.sin(plain(x)))[0], rtol=1e-11)


def test_support_equal_to_the_data_has_distance_zero(x64):
  """With augmentation too: a class gets the same transform on both sides."""
  x, y = map(jnp.asarray, rows(np.array([0, 1, 2, 0, 1, 2, 2])))
  method = gm.dsa(net(True))
  params = method.init_params(Support(x, y))
  aux = method.init_aux(jax.random.key(0), params)
  f = jax.jit(
    lambda key, batch_x: method.loss(params, aux, Batch(batch_x, y), jnp.full(7, 3.0), key)[0]
  )
  for seed in range(4):
    # The 1e-6 added to the product of norms leaves a small distance.
    assert abs(f(jax.random.key(seed), x)) < 1e-3 < 0.1 < f(jax.random.key(seed), x[::-1])


def test_distance_of_opposite_parallel_and_dead_units():
  """Biases do not count; a unit without gradient adds 1, and its derivative is finite."""
  r = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
  tree = lambda a: {"bias": jnp.ones((2, 7), jnp.float32), "kernel": jnp.asarray(a)}
  assert_close(gm.distance(tree(r), tree(2 * r)), np.zeros(2), 0, atol=1e-5)
  assert_close(gm.distance(tree(r), tree(-r)), np.full(2, 8), rtol=1e-5)
  dead = np.concatenate([r[..., :3], np.zeros((2, 3, 5, 1), np.float32)], axis=-1)
  assert_close(gm.distance(tree(r), tree(dead)), np.ones(2), rtol=1e-5)
  gradient = jax.grad(lambda a: jnp.sum(gm.distance(tree(r), tree(a))))(jnp.asarray(dead))
  assert np.isfinite(gradient).all() and np.isclose(
    gm.distance(tree(dead), tree(dead))[0], 1, atol=1e-5
  )


@pytest.mark.parametrize(
  "images, loops",
  [
    (1, (1, 1)),
    (10, (10, 50)),
    (20, (20, 25)),
    (30, (30, 20)),
    (40, (40, 15)),
    (50, (50, 10)),
    (3, (1, 1)),
    (12, (10, 50)),
    (0.4, (1, 1)),
    (100, (50, 10)),
  ],
)
def test_published_loops(images, loops):
  assert gm.published_loops(images) == loops


def test_network_is_trained_between_redraws(x64):
  """One pass equals an explicit gradient step; every third step draws a new network."""
  support, _, _ = problem(np.float64)
  method = gm.dc(net(), gm.GradientMatchingOptions(3, 1, 0.5))
  params = method.init_params(support)
  update = jax.jit(method.update_aux)
  aux = method.init_aux(jax.random.key(0), params)
  x, y = np.asarray(support.x), np.asarray(support.y)
  for step in (0, 1, 3, 4):
    trained = update(jax.random.key(step), params, aux, jnp.asarray(step, jnp.int32))
    gradients = [numpy_gradients(aux["params"], x, y, np.ones(6), k) for k in range(C)]
    for layer, name in ((0, "layer_1"), (1, "layer_3")):
      expected = aux["params"][name]["kernel"] - 0.5 * np.mean(
        [g[layer] for g in gradients], axis=0
      )
      assert_close(trained["params"][name]["kernel"], expected, rtol=1e-12)
    aux = trained
  drawn = update(jax.random.key(5), params, aux, jnp.asarray(5, jnp.int32))
  others = [update(jax.random.key(s), params, aux, jnp.asarray(2, jnp.int32)) for s in (5, 6)]
  assert_close(
    drawn["params"]["layer_1"]["kernel"], others[0]["params"]["layer_1"]["kernel"], rtol=0
  )
  assert not np.allclose(
    drawn["params"]["layer_1"]["kernel"], others[1]["params"]["layer_1"]["kernel"]
  )


def test_training_of_the_network_in_several_batches_lowers_its_loss():
  """700 rows are three batches of 234; augmented."""
  support, _, _ = problem(per_class=234)
  method = gm.dsa(net(), gm.GradientMatchingOptions(100, 5, 0.05))
  params = method.init_params(Support(support.x[:700], support.y[:700]))
  aux = method.init_aux(jax.random.key(0), params)
  update = jax.jit(method.update_aux)
  trained = update(jax.random.key(1), params, aux, jnp.asarray(0, jnp.int32))
  labels = jnp.argmax(params["y"], axis=1)
  before, after = (
    float(
      jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(gm.outputs(net(), a, params["x"]), labels)
      )
    )
    for a in (aux, trained)
  )
  assert after < 0.8 * before
  again = update(jax.random.key(1), params, aux, jnp.asarray(0, jnp.int32))
  assert jax.tree.all(jax.tree.map(np.array_equal, again, trained))


@pytest.mark.slow
def test_loss_and_gradient_do_not_depend_on_the_number_of_devices(x64):
  """Two steps with network training between, uneven shards and classes missing on a device."""
  support, x, y = problem(np.float64, n=21)
  same_on_devices(
    gm.dc(net(), gm.GradientMatchingOptions(5, 1)), support, x, y, rtol=1e-11, num_steps=2
  )


@functools.cache
def teaching(make, sampler):
  """One distiller for several tests, which compiles once."""
  method = make(net(), gm.GradientMatchingOptions(5, 2))
  return loop.Distiller(method, importance.sampler(sampler), optax.sgd(0.3, momentum=0.5), 30)


def test_equal_seeds_repeat():
  support, x, y = problem()
  distiller = teaching(gm.dc, "uniform")
  runs = [loop.distill(seed, distiller, support, x, y, 5) for seed in (0, 0, 1)]
  assert np.array_equal(runs[0].support.x, runs[1].support.x) and not np.array_equal(
    runs[0].support.x, runs[2].support.x
  )
  assert np.array_equal(runs[0].support.y, support.y)


@pytest.mark.parametrize(
  "make, sampler", slow_except([(gm.dc, "uniform"), (gm.dsa, "cross_entropy")], (gm.dc, "uniform"))
)
def test_distilling_teaches(make, sampler):
  """The loss under networks unseen in the run falls; float32."""
  support, x, y = problem()
  result = loop.distill(0, teaching(make, sampler), support, x, y, 80)
  plain = gm.dc(net())

  @jax.jit
  def loss(x_support, key):
    params = {"x": x_support, "y": support.y}
    aux = plain.init_aux(key, params)
    return plain.loss(
      params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.ones(len(x)), jax.random.key(0)
    )[0]

  before, after = (
    np.mean([loss(s, jax.random.key(k)) for k in range(100, 108)])
    for s in (support.x, result.support.x)
  )
  assert after < 0.8 * before


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: gm.dc(kipcore.network(kipcore.conv_net(1), 4, C, norm="batch")),
      "norm: expected one of none, instance",
    ),
    (lambda: gm.dc(net(), gm.GradientMatchingOptions(network_rate=0.0)), "network_rate"),
    (lambda: gm.dc(net(), gm.GradientMatchingOptions(outer_steps=0)), "outer_steps"),
    (lambda: gm.dc(net(), gm.GradientMatchingOptions(inner_steps=-1)), "inner_steps"),
    (
      lambda: gm.dc(net(), gm.GradientMatchingOptions(augmentation="blur")),
      "augmentation: expected names",
    ),
  ],
)
def test_wrong_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@FLOAT64_IS_SLOW
def test_names_and_dtypes(dtype):
  support, x, y = problem(dtype, n=12)
  assert [make(net()).name for make in (gm.dc, gm.dsa)] == ["dc", "dsa"]
  method = gm.dc(net())
  params = method.init_params(support)
  aux = method.init_aux(jax.random.key(0), params)
  value, gradient = jax.jit(
    jax.value_and_grad(
      lambda p: method.loss(
        p, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.ones(12, dtype), jax.random.key(0)
      )[0]
    )
  )(params)
  assert value.dtype == dtype and gradient["x"].dtype == dtype and np.isfinite(gradient["x"]).all()
  assert_close(gradient["y"], np.zeros_like(y[:6]), rtol=RTOL[dtype.name])
