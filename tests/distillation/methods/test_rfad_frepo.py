"""RFAD and FRePo: limit kernels, losses against NumPy, finite differences, and pools."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import check_gradient, same_on_devices, slow_except, standard_promotion

import kipcore
from kipcore.distillation import features, importance, loop
from kipcore.distillation.method import Batch
from kipcore.distillation.methods import frepo, rfad
from kipcore.networks import network

ARCH = kipcore.conv_net(1, activation="gelu")


def problem(dtype=np.float64, n=30, m=6, c=3, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.sort(rng.integers(0, c, n))
  x = (rng.normal(size=(c, 4, 4, 2))[labels] + 0.5 * rng.normal(size=(n, 4, 4, 2))).astype(dtype)
  y = (np.eye(c)[labels] - 1 / c).astype(dtype)
  rows = np.concatenate([np.flatnonzero(labels == k)[: m // c] for k in range(c)])
  return kipcore.Support(jnp.asarray(x[rows]), jnp.asarray(y[rows])), x, y


def krr(k_ss, k_ts, y, relative):
  m = len(k_ss)
  return k_ts @ np.linalg.solve(k_ss + relative * np.trace(k_ss) / m * np.eye(m), y)


@pytest.mark.parametrize(
  "arch", slow_except([kipcore.fc(1), kipcore.conv_net(1)], kipcore.fc(1)), ids=lambda a: a.name
)
def test_random_feature_kernel_converges_to_the_nngp(arch, x64):
  """One hidden layer: unbiased at any width, so the error falls as 1 / sqrt(M) without a floor."""
  _, x, _ = problem()
  module, exact = network(arch, 4), np.asarray(kipcore.nngp_fn(arch)(x[:6]))

  @jax.jit
  def estimate(key):
    variables = features.draw_networks(key, module, x, 256)
    phi = [
      rfad.random_features(module, jax.tree.map(lambda a: a[:count], variables), x[:6])
      for count in (4, 16, 64, 256)
    ]
    return jnp.stack([rfad.random_feature_kernel(module, p, p) for p in phi])

  found = np.asarray(jax.lax.map(estimate, jax.random.split(jax.random.key(0), 200)))
  errors = np.sqrt(np.mean((found - exact) ** 2, axis=(0, 2, 3)))
  slope = np.polyfit(np.log([4, 16, 64, 256]), np.log(errors), 1)[0]
  assert abs(slope + 0.5) < 0.06, errors
  assert np.abs(found[:, -1].mean(0) - exact).max() < 0.02 * exact.max()


@pytest.mark.parametrize("loss", slow_except(["mse", "cross_entropy"], "cross_entropy"))
def test_rfad_loss_equals_numpy_and_gradient_finite_differences(loss, x64):
  support, x, y = problem()
  module = network(ARCH, 3, 3)
  method = rfad.rfad(module, rfad.RFADOptions(2, 1, 1e-2, loss, True))
  rng = np.random.default_rng(3)
  params = method.init_params(support)
  params["transform"] = params["transform"] + 0.1 * jnp.asarray(
    rng.normal(size=params["transform"].shape)
  )
  params["log_scale"] = jnp.asarray(0.7)
  aux = method.init_aux(jax.random.key(1), params)
  weights = jnp.asarray(rng.uniform(0, 2, len(x)))
  f = jax.jit(lambda p: method.loss(p, aux, Batch(jnp.asarray(x), jnp.asarray(y)), weights, None))
  value, info = f(params)

  images = (np.asarray(support.x).reshape(6, -1) @ np.asarray(params["transform"]).T).reshape(
    support.x.shape
  )
  phi = lambda z: np.concatenate(
    [np.asarray(module.apply(jax.tree.map(lambda a: a[i], aux), z, features=True)) for i in (0, 1)],
    1,
  )
  kernel = lambda a, b: 2 * a @ b.T / a.shape[1] + 0.01
  p = krr(
    kernel(phi(images), phi(images)), kernel(phi(x), phi(images)), np.asarray(support.y), 1e-2
  )
  z = np.exp(0.7) * p
  expected = (
    0.5 * ((p - y) ** 2).mean(1)
    if loss == "mse"
    else np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y.argmax(1)]
  )
  np.testing.assert_allclose(info.per_example, expected, rtol=1e-9)
  np.testing.assert_allclose(value, np.mean(weights * expected), rtol=1e-9)
  np.testing.assert_allclose(method.support(params, aux).x, images, rtol=1e-12)
  check_gradient(lambda p: f(p)[0], params)


def test_rfad_networks_are_redrawn_on_schedule():
  support, _, _ = problem(np.float32)
  method = rfad.rfad(network(ARCH, 3, 3), rfad.RFADOptions(2, redraw_every=3))
  params = method.init_params(support)
  aux, key = method.init_aux(jax.random.key(0), params), jax.random.key(1)
  kept = [
    all(
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(aux),
        jax.tree.leaves(
          method.update_aux(jax.random.fold_in(key, step), params, aux, jnp.asarray(step))
        ),
      )
    )
    for step in range(6)
  ]
  assert kept == [True, True, False, True, True, False]


@pytest.mark.parametrize("norm, flip", [("batch", False), ("none", True)])
def test_frepo_loss_equals_numpy_and_gradient_finite_differences(norm, flip, x64):
  support, x, y = problem()
  module = network(ARCH, 3, 3, norm=norm)
  method = frepo.frepo(module, frepo.FRePoOptions(pool_size=2, relative_ridge=1e-2, flip=flip))
  params = method.init_params(support)
  np.testing.assert_allclose(params["y"], np.asarray(support.y) / np.sqrt(3 / 10), rtol=1e-12)
  params["y"] = params["y"] + 0.2 * jnp.asarray(
    np.random.default_rng(5).normal(size=params["y"].shape)
  )
  aux = method.init_aux(jax.random.key(1), params)
  weights = jnp.asarray(np.random.default_rng(3).uniform(0, 2, len(x)))
  f = jax.jit(lambda p: method.loss(p, aux, Batch(jnp.asarray(x), jnp.asarray(y)), weights, None))
  value, info = f(params)

  variables = jax.tree.map(lambda a: a[aux.chosen], aux.variables)
  phi = lambda z: np.asarray(module.apply(variables, z, features=True))
  images, labels = np.asarray(params["x"]), np.asarray(params["y"])
  if flip:
    images, labels = np.concatenate([images, images[:, :, ::-1]]), np.concatenate([labels, labels])
  p = krr(phi(images) @ phi(images).T, phi(x) @ phi(images).T, labels, 1e-2)
  expected = 0.5 * ((p - y) ** 2).sum(1)
  ordered = np.sort(np.asarray(params["y"]), axis=1)
  margin = np.minimum(ordered[:, -1] - ordered[:, -2], 1 / 3).mean()
  np.testing.assert_allclose(info.per_example, expected, rtol=1e-9)
  np.testing.assert_allclose(value, np.mean(weights * expected) - margin, rtol=1e-9)
  check_gradient(lambda p: f(p)[0], params)


def test_frepo_pool_trains_one_network_and_redraws_old_ones(x64):
  """A training step is Adam on the mean squared error, batch norm by the batch; the others stay."""
  support, _, _ = problem()
  module = network(ARCH, 3, 3, norm="batch")
  method = frepo.frepo(module, frepo.FRePoOptions(pool_size=2, max_age=4))
  params = method.init_params(support)
  pool = method.init_aux(jax.random.key(0), params)
  assert pool.age.tolist() == [0, 2]
  pool = pool._replace(chosen=jnp.asarray(1, jnp.int32))
  step = jax.jit(lambda key, pool: method.update_aux(key, params, pool, 0))
  after = step(jax.random.key(1), pool)
  assert after.age.tolist() == [0, 3]

  one = jax.tree.map(lambda a: a[1], pool.variables)
  error = lambda w: jnp.mean(
    jnp.sum(
      (
        module.apply({**one, "params": w}, support.x, train=True, mutable=["batch_stats"])[0]
        - params["y"]
      )
      ** 2,
      axis=1,
    )
  )
  adam = optax.adam(3e-4)
  with standard_promotion():
    updates, _ = adam.update(jax.grad(error)(one["params"]), adam.init(one["params"]))
  expected = optax.apply_updates(one["params"], updates)
  moved = jax.tree.map(lambda a: a[1], after.variables)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), moved["params"], expected
  )
  assert not np.array_equal(
    jax.tree.leaves(moved["batch_stats"])[0], jax.tree.leaves(one["batch_stats"])[0]
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after.variables, pool.variables
  )

  old = after._replace(age=jnp.asarray([0, 4], jnp.int32), chosen=jnp.asarray(1, jnp.int32))
  fresh = step(jax.random.key(2), old)
  assert fresh.age.tolist() == [0, 0]
  assert np.abs(np.asarray(fresh.opt_state[0].mu["layer_0"]["kernel"][1])).max() == 0


@pytest.mark.parametrize("name", slow_except(["rfad", "frepo"], "frepo"))
def test_same_seed_same_run_that_learns_on_any_devices(name):
  support, x, y = problem(np.float32, n=120)
  module = network(ARCH, 8, 3, norm="batch" if name == "frepo" else "none")
  method = (
    rfad.rfad(module, rfad.RFADOptions(2))
    if name == "rfad"
    else frepo.frepo(module, frepo.FRePoOptions(3, relative_ridge=1e-3))
  )
  distiller = loop.Distiller(method, importance.sampler("cross_entropy"), optax.adam(0.05), 60)
  runs = [loop.distill(0, distiller, support, x, y, 40) for _ in range(2)]
  assert np.array_equal(runs[0].support.x, runs[1].support.x)
  assert runs[0].history[-1]["loss"] < 0.7 * runs[0].history[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rfad", "frepo"])
def test_one_step_is_the_same_on_any_number_of_devices(name, x64):
  support, x, y = problem(n=43)
  module = network(ARCH, 3, 3)
  same_on_devices(
    rfad.rfad(module, rfad.RFADOptions(2))
    if name == "rfad"
    else frepo.frepo(module, frepo.FRePoOptions(2)),
    support,
    x,
    y,
  )


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: rfad.rfad(m, rfad.RFADOptions(num_networks=0)), "num_networks"),
    (lambda m: rfad.rfad(m, rfad.RFADOptions(redraw_every=0)), "redraw_every"),
    (lambda m: rfad.rfad(m, rfad.RFADOptions(loss="hinge")), "expected one of mse, cross_entropy"),
    (lambda m: rfad.rfad(m.clone(norm="batch")), "norm: expected one of none"),
    (lambda m: frepo.frepo(m, frepo.FRePoOptions(pool_size=0)), "pool_size"),
    (lambda m: frepo.frepo(m, frepo.FRePoOptions(relative_ridge=0.0)), "relative_ridge"),
    (lambda m: network(ARCH, norm="layer"), "norm: expected one of none, instance, batch"),
    (lambda m: network(ARCH, softplus=-1.0), "softplus"),
    (lambda m: network(ARCH, width_growth=0), "width_growth"),
  ],
)
def test_wrong_options_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(network(ARCH, 3, 3))
