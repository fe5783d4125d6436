"""RCIG: head, direct and implicit gradients of the bilevel problem, clipping, devices, runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, enable_x64, same_on_devices, slow_except

import kipcore
from kipcore import krr, networks
from kipcore.distillation import importance, loop
from kipcore.distillation.features import features
from kipcore.distillation.method import Batch
from kipcore.distillation.methods import rcig
from kipcore.types import Support

M, C, T = 4, 3, 12
NETWORK = networks.network(kipcore.fc(1, activation="erf"), 4, C)
# Close to the minimum of the inner problem, with an implicit gradient that is clipped for the
# images but not for the labels.
QUICK = rcig.RCIGOptions(
  pool_size=3, max_age=4, pool_rate=1e-2, inner_steps=40, inner_rate=3e-2, l2=0.1
)
CONVERGED = dataclasses.replace(
  QUICK,
  inner_steps=3000,
  inner_rate=1e-2,
  inverse_steps=40,
  l2=5e-3,
  clip=False,
  initial_temperature=3.0,
)


def problem(dtype=np.float64, n=96, seed=0):
  rng = np.random.default_rng(seed)
  means, labels = rng.normal(size=(C, 2, 2, 1)), np.arange(n) % C
  x = (1.5 * means[labels] + 0.7 * rng.normal(size=(n, 2, 2, 1))).astype(dtype)
  y = (np.eye(C)[labels] - 1 / C).astype(dtype)
  return (
    Support(jnp.asarray(x[:M]), jnp.asarray(y[:M] + 0.05 * rng.normal(size=(M, C)).astype(dtype))),
    x,
    y,
  )


class Setting:
  """One method, its state, one batch; float64."""

  def __init__(self, options):
    support, x, y = problem()
    self.method = rcig.rcig(NETWORK, options)
    self.params, self.options = self.method.init_params(support), options
    self.aux = jax.jit(self.method.init_aux)(jax.random.key(0), self.params)
    self.batch = Batch(jnp.asarray(x[-T:]), jnp.asarray(y[-T:]))
    self.weights = jnp.asarray(np.random.default_rng(1).uniform(0, 2, T))
    self.net = jax.tree.map(lambda a: a[self.aux.pool.chosen], self.aux.pool.variables)
    # The aux is an argument, because constant folding would take longer than the computation.
    self.graded = jax.jit(
      jax.value_and_grad(
        lambda p, aux: self.method.loss(p, aux, self.batch, self.weights, None), has_aux=True
      )
    )

  def loss(self, params=None):
    return self.graded(self.params if params is None else params, self.aux)


@pytest.fixture(scope="module")
def quick():
  with enable_x64(True):
    yield Setting(QUICK)


@pytest.fixture(scope="module")
def converged():
  with enable_x64(True):
    yield Setting(CONVERGED)


def reference(setting):
  """Inner and outer objective of one erf layer, as functions of (x, y, log temperature, w)."""
  net = setting.net["params"]
  weight, bias = net["layer_1"]["kernel"], net["bias_1"]
  d, p = weight.shape
  targets = setting.batch.x.reshape(T, d)

  def hidden(x, w):
    z = x @ weight + bias[None, :]
    return jax.lax.erf(z) + 2 / jnp.sqrt(jnp.pi) * jnp.exp(-z * z) * (x @ w[:d] + w[d][None, :])

  def solved(x, y, w):
    h = hidden(x.reshape(M, d), w)
    return h, jnp.linalg.solve(h @ h.T + setting.options.l2 * M * jnp.eye(M), y)

  def inner(x, y, w):
    return 0.5 * jnp.vdot(y, solved(x, y, w)[1]) + 0.5 * jnp.vdot(w, w)

  def outer(x, y, log_temperature, w):
    h, dual = solved(x, y, w)
    z = jnp.exp(log_temperature) * hidden(targets, w) @ h.T @ dual
    ce = jax.nn.logsumexp(z, axis=1) - z[jnp.arange(T), jnp.argmax(setting.batch.y, axis=1)]
    top = jnp.sort(y, axis=1)
    return jnp.mean(setting.weights * ce) - jnp.mean(
      jnp.minimum(top[:, -1] - top[:, -2], 1 / (2 * C))
    )

  def adam(x, y):
    """Explicit inner loop of the method."""

    def step(i, carry):
      w, m, v = carry
      g, t = slope(x, y, w), i + 1.0
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      return (
        w - setting.options.inner_rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8),
        m,
        v,
      )

    zeros = jnp.zeros((d + 1, p))
    return jax.lax.fori_loop(0, setting.options.inner_steps, step, (zeros, zeros, zeros))[0]

  slope = jax.jit(jax.grad(inner, argnums=2))
  hessian = jax.jit(jax.hessian(inner, argnums=2))

  def newton(x, y, w):
    for _ in range(30):
      h = hessian(x, y, w).reshape(w.size, w.size)
      w = w - jnp.linalg.solve(h, slope(x, y, w).ravel()).reshape(w.shape)
    return w

  return hidden, jax.jit(outer), adam, newton, slope, hessian


def test_head_is_kernel_ridge_regression_on_the_features(x64, quick):
  """At an inner rate of 1e-30, the head equals KRR on the initial features, also in NumPy."""
  still = Setting(dataclasses.replace(QUICK, inner_rate=1e-30))
  info = jax.jit(
    lambda aux: still.method.loss(still.params, aux, still.batch, still.weights, None)[1]
  )(still.aux)
  phi_s, phi_t = (
    np.asarray(features(NETWORK, still.net, x)) for x in (still.params["x"], still.batch.x)
  )
  y = np.asarray(still.params["y"])
  fit = krr.krr_fit(jnp.asarray(phi_s @ phi_s.T), still.params["y"], QUICK.l2 * M)
  np.testing.assert_allclose(
    info.predictions, krr.krr_predict(fit, jnp.asarray(phi_t @ phi_s.T)), rtol=1e-9
  )
  expected = phi_t @ phi_s.T @ np.linalg.solve(phi_s @ phi_s.T + QUICK.l2 * M * np.eye(M), y)
  np.testing.assert_allclose(info.predictions, expected, rtol=1e-9)
  (_, moved), _ = quick.loss()
  assert np.abs(moved.predictions - expected).max() > 1e-3
  assert info.status == 0
  np.testing.assert_allclose(
    info.accuracy, np.mean(expected.argmax(1) == np.asarray(still.batch.y).argmax(1))
  )


def test_value_and_direct_gradient_equal_finite_differences_at_fixed_w(x64):
  setting = Setting(dataclasses.replace(QUICK, inverse_steps=0, initial_temperature=3.0))
  _, outer, adam, *_ = reference(setting)
  p = setting.params
  w = adam(p["x"], p["y"])
  (value, _), gradient = setting.loss()
  np.testing.assert_allclose(value, outer(p["x"], p["y"], p["log_temperature"], w), rtol=1e-9)
  compare(gradient, p, lambda q: outer(q["x"], q["y"], q["log_temperature"], w), rtol=1e-6)


def compare(gradient, params, function, rtol, h=1e-5):
  """Slopes along two random directions per parameter."""
  rng = np.random.default_rng(2)
  for name in params:
    for _ in range(2):
      v = jnp.asarray(rng.normal(size=params[name].shape))
      ahead, behind = (function({**params, name: params[name] + s * h * v}) for s in (1, -1))
      np.testing.assert_allclose(
        jnp.vdot(gradient[name], v), (ahead - behind) / (2 * h), rtol=rtol, atol=1e-9, err_msg=name
      )


def test_gradient_is_that_of_the_bilevel_problem(x64, converged):
  """Finite differences of the outer loss with the inner problem solved again by Newton's method."""
  _, outer, adam, newton, slope, hessian = reference(converged)
  p = converged.params
  (value, _), gradient = converged.loss()
  from_adam = adam(p["x"], p["y"])
  w = newton(p["x"], p["y"], from_adam)
  assert_close(from_adam, w, rtol=1e-6)
  assert jnp.abs(slope(p["x"], p["y"], w)).max() < 1e-10
  assert jnp.linalg.eigvalsh(hessian(p["x"], p["y"], w).reshape(w.size, w.size))[0] > 0
  np.testing.assert_allclose(value, outer(p["x"], p["y"], p["log_temperature"], w), rtol=1e-5)
  compare(
    gradient,
    p,
    lambda q: outer(q["x"], q["y"], q["log_temperature"], newton(q["x"], q["y"], w)),
    rtol=1e-5,
  )
  for i, name in enumerate("xy"):
    direct = jax.grad(outer, argnums=i)(p["x"], p["y"], p["log_temperature"], w)
    assert jnp.linalg.norm(gradient[name] - direct) > 0.05 * jnp.linalg.norm(gradient[name])


def test_conjugate_gradients_solve_and_stop_at_negative_curvature(x64):
  rng = np.random.default_rng(0)
  q, b = np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.normal(size=6)
  positive = q @ np.diag([1.0, 2, 3, 5, 8, 13]) @ q.T
  for steps in (6, 40):
    np.testing.assert_allclose(
      rcig._conjugate_gradients(lambda u: positive @ u, jnp.asarray(b), steps),
      np.linalg.solve(positive, b),
      rtol=1e-8,
    )
  assert not rcig._conjugate_gradients(lambda u: -u, jnp.asarray(b), 5).any()
  # The first direction is good and the second is not: the first step is what remains.
  bent = np.diag([1.0, -0.5])
  first = rcig._conjugate_gradients(lambda u: bent @ u, jnp.asarray([1.0, 0.5]), 1)
  np.testing.assert_allclose(first, np.array([1.0, 0.5]) * 1.25 / 0.875)
  np.testing.assert_allclose(
    rcig._conjugate_gradients(lambda u: bent @ u, jnp.asarray([1.0, 0.5]), 9), first
  )


def test_implicit_part_is_clipped_to_the_norm_of_the_direct_one(x64, quick):
  """The implicit part by dense solves, at the w of the inner steps."""
  _, outer, adam, _, slope, hessian = reference(quick)
  x, y, t = (quick.params[name] for name in ("x", "y", "log_temperature"))
  w, (_, gradient) = adam(x, y), quick.loss()
  v = np.linalg.solve(
    hessian(x, y, w).reshape(w.size, w.size), jax.grad(outer, argnums=3)(x, y, t, w).ravel()
  )
  for i, (name, binds) in enumerate((("x", True), ("y", False))):
    mixed = np.asarray(jax.jacobian(slope, argnums=i)(x, y, w)).reshape(w.size, -1)
    implicit, direct = -v @ mixed, np.asarray(jax.grad(outer, argnums=i)(x, y, t, w)).ravel()
    size, limit = np.linalg.norm(implicit), np.linalg.norm(direct)
    assert size > 0.1 * limit and (size > limit) == binds
    np.testing.assert_allclose(
      gradient[name].ravel(), direct + implicit * min(1, limit / size), rtol=1e-5, atol=1e-8
    )


@pytest.mark.slow
def test_loss_and_gradient_do_not_depend_on_the_number_of_devices(x64):
  support, x, y = problem(n=29)
  same_on_devices(rcig.rcig(NETWORK, QUICK), support, x, y)


def test_average_weights_the_past_without_initial_bias(x64, quick):
  method, aux, start = quick.method, quick.aux, quick.params
  assert np.array_equal(method.support(start, aux).x, start["x"])
  update = jax.jit(method.update_aux)
  path = [jax.tree.map(lambda a: a * (2.0 + i), start) for i in range(4)]
  for i, params in enumerate(path):
    aux = update(jax.random.key(i), params, aux, jnp.asarray(i, jnp.int32))
  weights = 0.99 ** np.arange(4)[::-1]
  for name, value in (
    ("x", method.support(path[-1], aux).x),
    ("y", method.support(path[-1], aux).y),
  ):
    expected = sum(w * np.asarray(p[name]) for w, p in zip(weights, path)) / weights.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_pool_trains_the_active_network_and_redraws_old_ones(x64, quick):
  update, aux, params = jax.jit(quick.method.update_aux), quick.aux, quick.params
  objective = lambda net: quick_objective(quick, net)
  assert list(aux.pool.age) == [0, 1, 2]
  drawn = 0
  for i in range(12):
    before, aux = aux, update(jax.random.key(i), params, aux, jnp.asarray(i, jnp.int32))
    j, old = int(before.pool.chosen), int(before.pool.age[before.pool.chosen]) + 1 >= 4
    drawn += old
    age = np.asarray(before.pool.age) + (np.arange(3) == j)
    assert list(aux.pool.age) == list(np.where(age >= 4, 0, age))
    assert int(aux.pool.opt_state[0].count[j]) == (
      0 if old else int(before.pool.opt_state[0].count[j]) + 1
    )
    for a, b in zip(jax.tree.leaves(before.pool.variables), jax.tree.leaves(aux.pool.variables)):
      assert all(np.array_equal(a[k], b[k]) for k in range(3) if k != j)
    was, now = (
      objective(jax.tree.map(lambda a: a[j], state.pool.variables)) for state in (before, aux)
    )
    assert now != was and (old or now < was)
  assert 0 < drawn < 12


def quick_objective(setting, net):
  phi, y = np.asarray(features(NETWORK, net, setting.params["x"])), np.asarray(setting.params["y"])
  return 0.5 * np.vdot(y, np.linalg.solve(phi @ phi.T + QUICK.l2 * M * np.eye(M), y))


@pytest.mark.parametrize("sampler", slow_except(["uniform", "cross_entropy"], "cross_entropy"))
def test_distilling_teaches_and_repeats(sampler):
  support, x, y = problem(np.float32)
  method = rcig.rcig(
    networks.network(kipcore.fc(1), 8, C, softplus=60.0),
    dataclasses.replace(QUICK, inner_rate=3e-3, inner_steps=5, decay=0.9),
  )
  assert method.trainable(method.init_params(support)) == {"x": 1, "y": 1, "log_temperature": 10}
  distiller = loop.Distiller(method, importance.sampler(sampler), optax.adabelief(1e-2), 48)
  runs = [loop.distill(seed, distiller, support, x, y, 60, log_steps=[1]) for seed in (0, 0, 1)]
  for run in runs:
    assert run.history[-1]["loss"] < 0.7 * run.history[1]["loss"]
    assert all(
      jnp.abs(run.state.params[name] - start).max() > 0.01
      for name, start in method.init_params(support).items()
    )
    assert not np.array_equal(run.support.x, run.state.params["x"])
  assert np.array_equal(runs[0].support.x, runs[1].support.x) and not np.array_equal(
    runs[0].support.x, runs[2].support.x
  )


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(pool_size=0), "pool_size: expected"),
    (dict(pool_steps=0), "pool_steps: expected"),
    (dict(max_age=0), "max_age: expected"),
    (dict(inner_steps=0), "inner_steps: expected"),
    (dict(inverse_steps=-1), "inverse_steps: expected"),
    (dict(pool_rate=0.0), "pool_rate: expected"),
    (dict(inner_rate=-1.0), "inner_rate: expected"),
    (dict(l2=0.0), "l2: expected"),
    (dict(decay=1.0), "decay: expected"),
    (dict(initial_temperature=0.0), "initial_temperature: expected"),
  ],
)
def test_wrong_options_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    rcig.rcig(NETWORK, rcig.RCIGOptions(**change))


def test_batch_norm_is_refused():
  with pytest.raises(ValueError, match="module.norm: expected one of none, instance"):
    rcig.rcig(networks.network(kipcore.conv_net(1), 4, C, norm="batch"))


def test_flip_trains_on_the_set_with_its_mirror_images(x64):
  options = dataclasses.replace(QUICK, clip=False)
  one = Setting(dataclasses.replace(options, flip=True))
  mirror = lambda a: jnp.concatenate([a, a[:, :, ::-1]])
  whole = Setting(options)
  whole.params = {
    **one.params,
    "x": mirror(one.params["x"]),
    "y": jnp.concatenate([one.params["y"]] * 2),
  }
  whole.aux = whole.method.init_aux(jax.random.key(0), whole.params)
  (value, info), gradient = one.loss()
  (expected, _), of_whole = whole.loss()
  assert_close(value, expected, 1e-10)
  assert int(info.status) == 0
  first, second = jnp.split(of_whole["x"], 2)
  assert_close(gradient["x"], first + second[:, :, ::-1], 1e-7)
  assert_close(gradient["y"], sum(jnp.split(of_whole["y"], 2)), 1e-7)
  pools = [
    s.method.update_aux(jax.random.key(1), s.params, s.aux, 0).pool.variables for s in (one, whole)
  ]
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), *pools)
