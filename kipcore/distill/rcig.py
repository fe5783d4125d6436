"""RCIG: kernel ridge regression on linearised networks, with the implicit gradient of what they learned from the support."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from kipcore import checks, keys, krr, linalg
from kipcore.distill.features import draw_networks, features
from kipcore.distill.method import Batch, LossInfo, Method, Params, across
from kipcore.networks import Network
from kipcore.types import Array, Support


class RCIGOptions(NamedTuple):
  """Choices of RCIG.

  Attributes:
    pool_size, pool_steps, max_age, pool_rate: networks; Adam steps after each step on the one that was used, and their
      rate; steps after which it is drawn anew.
    inner_steps, inner_rate: Adam steps on the tangent parameters, from 0, and their rate (ours: no published one is known to us).
    inverse_steps: conjugate gradient steps for the inverse Hessian; 0 leaves the direct gradient alone.
    l2: ridge of the last layer for each row of the support; absolute, since K is not scaled.
    clip: whether the implicit gradient of each parameter is cut to the norm of the direct one.
    decay: of the average of the parameters, which is the result.
    initial_temperature: where the temperature starts.
  """

  pool_size: int = 30
  pool_steps: int = 1
  max_age: int = 100
  pool_rate: float = 5e-5
  inner_steps: int = 20
  inner_rate: float = 5e-5
  inverse_steps: int = 20
  hessian: str = "exact"
  l2: float = 5e-4
  clip: bool = True
  decay: float = 0.99
  initial_temperature: float = 1.0


class RCIGState(NamedTuple):
  """`networks`, their `adam` states and `age`, all stacked; the `index` of the one in use; `average` of the parameters."""

  networks: Any
  adam: Any
  age: Array
  index: Array
  average: Params


def rcig(module: Network, options: RCIGOptions = RCIGOptions()) -> Method:
  """Learns images and labels through one linearised network of a pool at a time.

      h_w(x) = h(x) + J_h(x) w,   K = h_w(S) h_w(S)^T,   P = h_w(T) h_w(S)^T (K + r I)^{-1} y_s,   r = m l2
      outer:  mean_t(w_t CE(softmax(temperature P_t), class of t)) - mean_s min(top1 - top2 of y_s, 1 / (2c))
      inner:  F(w) = 1/2 tr(y_s^T (K + r I)^{-1} y_s) + 1/2 ||w||^2
      gradient = d outer / dS - (d^2 F / dw dS)^T (d^2 F / dw^2)^{-1} d outer / dw

  h is what the readout sees, J_h its Jacobian in the parameters. r F is the least of 1/2 ||h_w(S) V - y_s||^2 +
  r/2 (||V||^2 + ||w||^2) over readouts V; its scale changes neither minimum nor gradient. The gradient is that of
  the bilevel problem where w is a strict local minimum of F and the solve is exact. After few steps it is a heuristic, and so is
  the clipping. F is not convex in w, as V depends on it: the solve ends at a direction of curvature <= 0.

  Published: AdaBelief 3e-3 (temperature 3e-2), 1024 targets, 1 to 15 pool steps, ConvNet with softplus of beta 60:
  `networks.network(conv_net(3), 128, c, softplus=60.0)`. Ours differs in that conjugate gradients stand for 20 Adam steps with a
  tuned rate (they need no rate and find the same limit), the norms for the clipping are taken for images and labels apart,
  pool networks descend F of themselves (w = 0), ages start staggered, and all devices share one gradient before it is clipped.

  Args:
    module: the network, without batch norm.
    options: see `RCIGOptions`.

  Returns:
    A `Method` that learns `x`, `y` and `log_temperature`; its support is their debiased moving average.

  Raises:
    ValueError, TypeError: for counts below 1, rates, ridge or temperature <= 0, a decay outside [0, 1), or batch norm.

  Source: Loo, Hasani, Lechner, Rus 2023 (RCIG), section 3.
  """
  for name in ("pool_size", "pool_steps", "max_age", "inner_steps"):
    checks.positive_int(name, getattr(options, name))
  for name in ("pool_rate", "inner_rate", "l2", "initial_temperature"):
    checks.positive(name, getattr(options, name))
  checks.non_negative("inverse_steps", options.inverse_steps)
  if not 0 <= options.decay < 1:
    raise ValueError(f"decay: expected a value in [0, 1), got {options.decay}")
  checks.one_of("module.norm", module.norm, ("none", "instance"))

  def profile(hidden: Array, y: Array) -> Array:
    fit = krr.krr_fit(linalg.matmul(hidden, hidden.T), y, options.l2 * y.shape[0])
    return 0.5 * jnp.sum(y * fit.dual)

  def init_params(support: Support) -> Params:
    return {"x": support.x, "y": support.y,
            "log_temperature": jnp.asarray(math.log(options.initial_temperature), support.x.dtype)}

  def loss(params: Params, aux: RCIGState, batch: Batch, weights: Array, key: Array):
    theta, unravel = ravel_pytree(_pick(aux.networks, aux.index))
    fixed = jax.lax.stop_gradient(params)

    def hidden(w, x):
      value, change = jax.jvp(lambda t: features(module, unravel(t), x), (theta,), (w,))
      return value + change

    def inner(w, p):
      return profile(hidden(w, p["x"]), p["y"]) + 0.5 * jnp.sum(w * w)

    def outer(p, w):
      phi = hidden(w, p["x"])
      fit = krr.krr_fit(linalg.matmul(phi, phi.T), p["y"], options.l2 * phi.shape[0])
      predictions = krr.krr_predict(fit, linalg.matmul(hidden(w, batch.x), phi.T))
      per_example = optax.softmax_cross_entropy_with_integer_labels(
          jnp.exp(p["log_temperature"]) * predictions, jnp.argmax(batch.y, axis=1))
      top = jax.lax.top_k(p["y"], 2)[0]
      margin = jnp.mean(jnp.minimum(top[:, 0] - top[:, 1], 0.5 / top.dtype.type(p["y"].shape[1])))
      info = LossInfo(per_example, predictions, krr.accuracy(predictions, batch.y), fit.status)
      return jnp.mean(weights * per_example) - margin, info

    w = _descend(optax.adam(options.inner_rate), lambda w: inner(w, fixed), jnp.zeros_like(theta), options.inner_steps)[0]
    (value, info), slopes = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(fixed, w)
    # Clipping is not linear, so the whole batch's gradients come first.
    devices = across(batch, 1)
    value, (direct, slope) = jax.tree.map(lambda a: a / devices, across(batch, (value, slopes)))
    def curvature(u):
      if options.hessian == "exact":
        return jax.jvp(lambda t: jax.grad(inner)(t, fixed), (w,), (u,))[1]
      phi = hidden(w, fixed["x"])
      fit = krr.krr_fit(linalg.matmul(phi, phi.T), fixed["y"], options.l2 * phi.shape[0])
      V = linalg.matmul(phi.T, fit.dual)
      return jax.grad(lambda t: profile(phi, linalg.matmul(hidden(t, fixed["x"]) - hidden(0*t, fixed["x"]), V)))(u) + u

    v = _solve(curvature, slope, options.inverse_steps)
    implicit = jax.grad(lambda p: -jax.jvp(lambda t: inner(t, p), (w,), (v,))[1])(fixed)
    total = jax.tree.map(lambda d, i: d + (_clipped(i, d) if options.clip else i), direct, implicit)
    # Zero, with the gradient wanted.
    return value + sum(jnp.sum(total[name] * (params[name] - fixed[name])) for name in params), info

  def draw_index(key: Array) -> Array:
    return jax.random.randint(keys.stream(key, "index"), (), 0, options.pool_size, jnp.int32)

  def init_aux(key: Array, params: Params) -> RCIGState:
    networks = draw_networks(keys.stream(key, "networks"), module, params["x"], options.pool_size)
    age = jnp.arange(options.pool_size, dtype=jnp.int32) * options.max_age // options.pool_size
    return RCIGState(networks, jax.vmap(optax.adam(options.pool_rate).init)(networks), age, draw_index(key), params)

  def update_aux(key: Array, params: Params, aux: RCIGState, step: Array) -> RCIGState:
    adam, i = optax.adam(options.pool_rate), aux.index
    used = _descend(adam, lambda net: profile(features(module, net, params["x"]), params["y"]),
                    _pick(aux.networks, i), options.pool_steps, _pick(aux.adam, i))
    new = _pick(draw_networks(keys.stream(key, "networks"), module, params["x"], 1), 0)
    old = aux.age[i] + options.pool_steps >= options.max_age
    networks, states = jax.tree.map(lambda pool, a, b: pool.at[i].set(jnp.where(old, a, b)),
                                    (aux.networks, aux.adam), (new, adam.init(new)), used)
    age = aux.age.at[i].set(jnp.where(old, 0, aux.age[i] + options.pool_steps))
    average = jax.tree.map(lambda a, p: a + (p - a) * ((1 - options.decay) / (1 - options.decay ** (step + 1).astype(p.dtype))),
                           aux.average, params)
    return RCIGState(networks, states, age, draw_index(key), average)

  return Method("rcig", init_params, lambda params, aux: Support(aux.average["x"], aux.average["y"]),
                lambda params: {"x": 1, "y": 1, "log_temperature": 10}, loss, init_aux, update_aux)


def _pick(stacked, i):
  return jax.tree.map(lambda a: a[i], stacked)


def _descend(optimizer, function, start, steps: int, state=None):
  """Steps of an optimiser: the parameters, and its state."""

  def step(_, carry):
    with linalg.permissive_promotion():
      updates, state = optimizer.update(jax.grad(function)(carry[0]), carry[1])
      return optax.apply_updates(carry[0], updates), state

  return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start) if state is None else state))


def _solve(product, b: Array, steps: int) -> Array:
  """Conjugate gradients for H v = b from v = 0; it rests once a direction has curvature <= 0, or b is met."""

  def step(_, carry):
    v, r, p, norm = carry
    image = product(p)
    curvature = jnp.sum(p * image)
    length = jnp.where(curvature > 0, norm / curvature, 0)
    r = r - length * image
    new = jnp.sum(r * r)
    return v + length * p, r, jnp.where(length > 0, r + new / norm * p, 0), new

  return jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(b), b, b, jnp.sum(b * b)))[0]


def _clipped(a: Array, reference: Array) -> Array:
  size, limit = jnp.sqrt(jnp.sum(a * a)), jnp.sqrt(jnp.sum(reference * reference))
  return a * jnp.minimum(1, limit / jnp.maximum(size, jnp.finfo(a.dtype).tiny))
