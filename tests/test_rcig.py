"""RCIG: its head, its direct and implicit gradients against the bilevel problem solved apart, clipping, devices, runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kipcore
from kipcore import krr, networks
from kipcore.distill import importance, loop, rcig
from kipcore.distill.features import features
from kipcore.distill.method import Batch
from kipcore.types import Support
from helpers import assert_close, enable_x64, same_on_devices

M, C, T = 4, 3, 12
L2 = 5e-3
NETWORK = networks.network(kipcore.fc(1, activation="erf"), 4, C)
# Not to convergence, but cheap; a large ridge, so that float32 is enough.
QUICK = rcig.RCIGOptions(pool_size=3, max_age=4, pool_rate=1e-2, inner_steps=3, inner_rate=1e-2, inverse_steps=5, l2=1e-2)
CONVERGED = QUICK._replace(inner_steps=3000, inverse_steps=40, l2=L2, clip=False, initial_temperature=3.0)


def problem(dtype=np.float64, n=96, seed=0):
  rng = np.random.default_rng(seed)
  means, labels = rng.normal(size=(C, 2, 2, 1)), np.arange(n) % C
  x = (1.5 * means[labels] + 0.7 * rng.normal(size=(n, 2, 2, 1))).astype(dtype)
  y = (np.eye(C)[labels] - 1 / C).astype(dtype)
  return Support(jnp.asarray(x[:M]), jnp.asarray(y[:M] + 0.05 * rng.normal(size=(M, C)).astype(dtype))), x, y


class Setting:
  """One method, its state, one batch; float64."""

  def __init__(self, options):
    support, x, y = problem()
    self.method = rcig.rcig(NETWORK, options)
    self.params, self.options = self.method.init_params(support), options
    self.aux = jax.jit(self.method.init_aux)(jax.random.key(0), self.params)
    self.batch = Batch(jnp.asarray(x[-T:]), jnp.asarray(y[-T:]))
    self.weights = jnp.asarray(np.random.default_rng(1).uniform(0, 2, T))
    self.net = jax.tree.map(lambda a: a[self.aux.index], self.aux.networks)
    # The aux is an argument: constants would be folded, which takes longer than the work.
    self.graded = jax.jit(jax.value_and_grad(
        lambda p, aux: self.method.loss(p, aux, self.batch, self.weights, None), has_aux=True))

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
  """Inner and outer objective of a hidden layer of erf units, written out: functions of (x, y, log temperature, w)."""
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
    return jnp.mean(setting.weights * ce) - jnp.mean(jnp.minimum(top[:, -1] - top[:, -2], 1 / (2 * C)))

  def adam(x, y):
    """The inner loop of the method, by hand."""
    w, m, v = jnp.zeros((d + 1, p)), 0.0, 0.0
    for t in range(1, setting.options.inner_steps + 1):
      g = slope(x, y, w)
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      w = w - setting.options.inner_rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w

  slope = jax.jit(jax.grad(inner, argnums=2))
  hessian = jax.jit(jax.hessian(inner, argnums=2))

  def newton(x, y, w):
    for _ in range(30):
      h = hessian(x, y, w).reshape(w.size, w.size)
      w = w - jnp.linalg.solve(h, slope(x, y, w).ravel()).reshape(w.shape)
    return w

  return hidden, jax.jit(outer), adam, newton, slope, hessian


def test_head_is_kernel_ridge_regression_on_the_features(x64, quick):
  """Without inner steps' effect (rate 1e-30) h_w = h: the library's KRR, and NumPy's."""
  still = Setting(QUICK._replace(inner_rate=1e-30))
  (_, info), _ = still.loss()
  phi_s, phi_t = (np.asarray(features(NETWORK, still.net, x)) for x in (still.params["x"], still.batch.x))
  y = np.asarray(still.params["y"])
  fit = krr.krr_fit(jnp.asarray(phi_s @ phi_s.T), still.params["y"], QUICK.l2 * M)
  np.testing.assert_allclose(info.predictions, krr.krr_predict(fit, jnp.asarray(phi_t @ phi_s.T)), rtol=1e-9)
  expected = phi_t @ phi_s.T @ np.linalg.solve(phi_s @ phi_s.T + QUICK.l2 * M * np.eye(M), y)
  np.testing.assert_allclose(info.predictions, expected, rtol=1e-9)
  (_, moved), _ = quick.loss()
  assert np.abs(moved.predictions - expected).max() > 1e-3
  assert info.status == 0 and info.accuracy == np.mean(expected.argmax(1) == np.asarray(still.batch.y).argmax(1))


def test_value_and_direct_gradient_equal_finite_differences_at_fixed_w(x64):
  setting = Setting(QUICK._replace(inverse_steps=0, initial_temperature=3.0))
  _, outer, adam, *_ = reference(setting)
  p = setting.params
  w = adam(p["x"], p["y"])
  (value, _), gradient = setting.loss()
  np.testing.assert_allclose(value, outer(p["x"], p["y"], p["log_temperature"], w), rtol=1e-9)
  compare(gradient, p, lambda q: outer(q["x"], q["y"], q["log_temperature"], w), rtol=1e-6)


def compare(gradient, params, function, rtol, h=1e-5):
  """Slopes along two random directions a parameter."""
  rng = np.random.default_rng(2)
  for name in params:
    for _ in range(2):
      v = jnp.asarray(rng.normal(size=params[name].shape))
      ahead, behind = (function({**params, name: params[name] + s * h * v}) for s in (1, -1))
      np.testing.assert_allclose(jnp.vdot(gradient[name], v), (ahead - behind) / (2 * h), rtol=rtol, atol=1e-9, err_msg=name)


def test_gradient_is_that_of_the_bilevel_problem(x64, converged):
  """Finite differences of the outer loss where the inner problem is solved anew by Newton's method."""
  _, outer, _, newton, slope, hessian = reference(converged)
  p = converged.params
  (value, _), gradient = converged.loss()
  # Gradient descent finds the basin that the inner steps from 0 fall into.
  start = jax.lax.fori_loop(0, 3000, lambda _, w: w - 0.02 * slope(p["x"], p["y"], w), jnp.zeros((5, 4)))
  w = newton(p["x"], p["y"], start)
  assert jnp.abs(slope(p["x"], p["y"], w)).max() < 1e-10
  assert jnp.linalg.eigvalsh(hessian(p["x"], p["y"], w).reshape(w.size, w.size))[0] > 0
  np.testing.assert_allclose(value, outer(p["x"], p["y"], p["log_temperature"], w), rtol=1e-5)
  compare(gradient, p, lambda q: outer(q["x"], q["y"], q["log_temperature"], newton(q["x"], q["y"], w)), rtol=1e-5)
  for i, name in enumerate("xy"):
    direct = jax.grad(outer, argnums=i)(p["x"], p["y"], p["log_temperature"], w)
    assert jnp.linalg.norm(gradient[name] - direct) > 0.05 * jnp.linalg.norm(gradient[name])


def test_conjugate_gradients_solve_and_stop_at_negative_curvature(x64):
  rng = np.random.default_rng(0)
  q, b = np.linalg.qr(rng.normal(size=(6, 6)))[0], rng.normal(size=6)
  positive = q @ np.diag([1.0, 2, 3, 5, 8, 13]) @ q.T
  for steps in (6, 40):
    np.testing.assert_allclose(rcig._solve(lambda u: positive @ u, jnp.asarray(b), steps), np.linalg.solve(positive, b), rtol=1e-8)
  assert not rcig._solve(lambda u: -u, jnp.asarray(b), 5).any()
  # The first direction is good and the second is not: the first step is what remains.
  bent = np.diag([1.0, -0.5])
  first = rcig._solve(lambda u: bent @ u, jnp.asarray([1.0, 0.5]), 1)
  np.testing.assert_allclose(first, np.array([1.0, 0.5]) * 1.25 / 0.875)
  np.testing.assert_allclose(rcig._solve(lambda u: bent @ u, jnp.asarray([1.0, 0.5]), 9), first)


def test_implicit_part_is_clipped_to_the_norm_of_the_direct_one(x64):
  parts = {name: Setting(QUICK._replace(**change)).loss()[1] for name, change in {
      "direct": dict(inverse_steps=0), "free": dict(clip=False), "clipped": dict(clip=True)}.items()}
  for name in ("x", "y"):
    direct, free, clipped = (np.asarray(parts[k][name]) for k in ("direct", "free", "clipped"))
    implicit, size = free - direct, np.linalg.norm(direct)
    np.testing.assert_allclose(clipped - direct, implicit * min(1, size / np.linalg.norm(implicit)), rtol=1e-9, atol=1e-14)
