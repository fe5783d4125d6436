"""DM: loss against NumPy, gradient, weights, absent classes, augmentation, devices, seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
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
from kipcore.distillation.methods.distribution_matching import DMOptions, dm
from kipcore.types import Support

C = 3
rows, problem = image_rows, image_problem


def net(convolutional=False):
  arch = kipcore.conv_net(1) if convolutional else kipcore.fc(1)
  return kipcore.network(arch, 4, C, norm="instance" if convolutional else "none", softplus=20.0)


@pytest.mark.parametrize(
  "batch_labels, support_labels, both",
  [
    ([0, 2, 1, 1, 0, 1, 1, 1, 2, 1], [2, 0, 1, 1], [0, 1, 2]),
    ([0, 1, 1, 0, 1, 1, 1, 1, 1, 1], [2, 0, 2, 1], [0, 1]),
    ([0, 2, 1, 1, 0, 1, 1, 1, 2, 1], [1, 1, 2, 1], [1, 2]),
  ],
)
def test_loss_equals_numpy_with_weights_and_absent_classes(batch_labels, support_labels, both, x64):
  (x, y), (xs, ys) = rows(np.array(batch_labels)), rows(np.array(support_labels), seed=1)
  weights = np.random.default_rng(3).uniform(0.2, 2, 10)
  method = dm(net(), DMOptions(""))
  params = method.init_params(Support(jnp.asarray(xs), jnp.asarray(ys)))
  aux = method.init_aux(jax.random.key(0), params)
  value, info = method.loss(
    params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.asarray(weights), jax.random.key(1)
  )

  theta = aux["params"]
  w, b = np.asarray(theta["layer_1"]["kernel"]), np.asarray(theta["bias_1"])
  phi_t, phi_s = (np.log1p(np.exp(20 * (a.reshape(len(a), -1) @ w + b))) / 20 for a in (x, xs))
  expected = 0.0
  for k in both:
    t, s = y.argmax(1) == k, ys.argmax(1) == k
    expected += np.sum((np.average(phi_t[t], axis=0, weights=weights[t]) - phi_s[s].mean(0)) ** 2)
  np.testing.assert_allclose(value, expected, rtol=1e-11)
  assert info.predictions.shape == y.shape and info.per_example.shape == (10,) and info.status == 0
  # Predictions for samplers: ridge regression on the support in these features.
  k_ss = phi_s @ phi_s.T
  dual = np.linalg.solve(k_ss + 1e-3 * np.trace(k_ss) / 4 * np.eye(4), ys)
  assert_close(info.predictions, phi_t @ phi_s.T @ dual, rtol=1e-8)


def test_gradient_equals_finite_differences(x64):
  """Through instance norm, pooling and augmentation."""
  support, x, y = problem(np.float64, n=20)
  check_image_gradient(dm(net(True)), support, x, y, 4)


def test_support_equal_to_the_data_has_loss_zero(x64):
  """With augmentation too: both sides get the same transform."""
  x, y = map(jnp.asarray, rows(np.array([0, 1, 2, 0, 1, 2, 2])))
  method = dm(net())
  params = method.init_params(Support(x, y))
  aux = method.init_aux(jax.random.key(0), params)
  f = jax.jit(
    lambda key, batch_x: method.loss(params, aux, Batch(batch_x, y), jnp.full(7, 3.0), key)[0]
  )
  for seed in range(4):
    assert f(jax.random.key(seed), x) < 1e-20 < 1e-3 < f(jax.random.key(seed), x[::-1])


def test_loss_and_gradient_do_not_depend_on_the_number_of_devices(x64):
  """Two steps, including uneven shards and classes missing on a device."""
  support, x, y = problem(np.float64, n=21)
  same_on_devices(dm(net()), support, x, y, rtol=1e-11, num_steps=2)


@pytest.mark.parametrize("sampler", slow_except(["uniform", "cross_entropy"], "uniform"))
def test_distilling_teaches(sampler):
  """The loss under networks unseen in the run falls; equal seeds give equal results; float32."""
  support, x, y = problem()
  method = dm(net())
  distiller = loop.Distiller(method, importance.sampler(sampler), optax.sgd(0.3, momentum=0.5), 30)
  runs = [
    loop.distill(seed, distiller, support, x, y, 60)
    for seed in ((0, 0, 1) if sampler == "uniform" else (0,))
  ]
  if sampler == "uniform":
    assert np.array_equal(runs[0].support.x, runs[1].support.x) and not np.array_equal(
      runs[0].support.x, runs[2].support.x
    )
  assert np.array_equal(runs[0].support.y, support.y)
  plain = dm(net(), DMOptions(""))

  @jax.jit
  def loss(x_support, key):
    params = {"x": x_support, "y": support.y}
    aux = plain.init_aux(key, params)
    return plain.loss(
      params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.ones(len(x)), jax.random.key(0)
    )[0]

  before, after = (
    np.mean([loss(s, jax.random.key(k)) for k in range(100, 108)])
    for s in (support.x, runs[0].support.x)
  )
  assert after < 0.5 * before


def test_each_step_has_its_own_network():
  support, _, _ = problem()
  method = dm(net())
  params = method.init_params(support)
  first = method.init_aux(jax.random.key(0), params)
  second = method.update_aux(jax.random.key(1), params, first, 0)
  assert not np.allclose(
    first["params"]["layer_1"]["kernel"], second["params"]["layer_1"]["kernel"]
  )


def test_unknown_augmentation_is_named():
  with pytest.raises(ValueError, match="augmentation: expected names of color"):
    dm(net(), DMOptions("blur"))
