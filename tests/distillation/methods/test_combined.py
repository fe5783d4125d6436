"""Sums of methods: the loss and its gradient are the weighted sums, and parameters are shared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import image_problem, same_on_devices

import kipcore
from kipcore import keys
from kipcore.distillation.method import Batch

C = 3
OPTIONS = kipcore.RaTBPTTOptions(
  unroll=4, window=2, inner_rate=0.02, loss="squared_error", learn_labels=True, augmentation=""
)


def parts():
  network = kipcore.network(kipcore.fc(1), 4, C, softplus=20.0)
  kernel = kipcore.ntk_fn(kipcore.fc(1))
  return (
    kipcore.rat_bptt(network, OPTIONS),
    kipcore.kip(kernel, kipcore.KIPOptions(relative_ridge=1e-3, learn_labels=True)),
    kipcore.frepo(kipcore.network(kipcore.fc(1), 4, C, norm="batch")),
  )


def test_loss_and_gradient_are_weighted_sums(x64):
  support, x, y = image_problem(np.float64, n=20)
  methods, weights = parts(), (1.0, 3.0, 0.5)
  method = kipcore.combined(*methods, weights=weights)
  params = method.init_params(support)
  aux = method.init_aux(jax.random.key(0), params)
  batch = Batch(jnp.asarray(x), jnp.asarray(y))
  row_weights = jnp.asarray(np.random.default_rng(0).uniform(0, 2, 20))
  key = jax.random.key(7)

  def loss(p):
    return method.loss(p, aux, batch, row_weights, key)[0]

  def expected(p):
    return sum(
      w * m.loss(p, a, batch, row_weights, keys.stream(key, f"method {i}"))[0]
      for i, (m, a, w) in enumerate(zip(methods, aux, weights))
    )

  for got, want in zip(
    jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params)),
    jax.tree.leaves(jax.jit(jax.value_and_grad(expected))(params)),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
  info = method.loss(params, aux, batch, row_weights, key)[1]
  first = methods[0].loss(params, aux[0], batch, row_weights, keys.stream(key, "method 0"))[1]
  np.testing.assert_array_equal(info.predictions, first.predictions)


def test_a_failed_part_is_reported():
  """Two equal images have no factorization at a ridge of rounding size."""
  support, x, y = image_problem(np.float32, n=20)
  equal = support._replace(x=jnp.broadcast_to(support.x[:1], support.x.shape))
  ill = kipcore.kip(kipcore.linear_fn(), kipcore.KIPOptions(relative_ridge=1e-30))
  method = kipcore.combined(parts()[0], ill)
  params = method.init_params(equal)
  aux = method.init_aux(jax.random.key(0), params)
  batch = Batch(jnp.asarray(x), jnp.asarray(y))
  info = method.loss(params, aux, batch, jnp.ones(20), jax.random.key(1))[1]
  assert info.status == kipcore.Status.NOT_POSITIVE_DEFINITE


@pytest.mark.slow
def test_runs_on_devices_and_learns(x64):
  support, x, y = image_problem(np.float64, n=21)
  same_on_devices(kipcore.combined(*parts()[:2]), support, x, y, rtol=1e-9, num_steps=2)


def test_methods_are_equal_by_value_and_rates_are_the_largest():
  assert kipcore.combined(*parts()) == kipcore.combined(*parts())
  fixed = kipcore.rat_bptt(
    kipcore.network(kipcore.fc(1), 4, C), dataclasses.replace(OPTIONS, learn_labels=False)
  )
  support, x, y = image_problem(np.float32)
  method = kipcore.combined(fixed, parts()[1])
  params = method.init_params(support)
  assert method.trainable(params) == {"x": 1.0, "y": 1.0, "log_temperature": 0.0}


def test_distilling_lowers_both_losses():
  """Of two kernels, on all targets."""
  support, x, y = image_problem(np.float32)
  other = kipcore.kip(kipcore.rbf_fn(5.0), kipcore.KIPOptions(relative_ridge=1e-3))
  method = kipcore.combined(parts()[1], other)
  distiller = kipcore.Distiller(method, kipcore.sampler("uniform"), optax.adam(0.02), 30)
  result = kipcore.distill(0, distiller, support, x, y, 60)
  batch = Batch(jnp.asarray(x), jnp.asarray(y))
  start = method.init_params(support)
  aux = method.init_aux(jax.random.key(5), start)
  for each, own in zip(method.methods, aux):
    before, after = (
      each.loss(params, own, batch, jnp.ones(len(x)), jax.random.key(6))[0]
      for params in (start, result.state.params)
    )
    assert after < 0.9 * before


def test_wrong_numbers_are_named():
  with pytest.raises(ValueError, match="methods: expected at least one"):
    kipcore.combined()
  with pytest.raises(ValueError, match="got 2 and 1 weights"):
    kipcore.combined(*parts()[:2], weights=(1.0,))
