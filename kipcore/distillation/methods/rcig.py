"""RCIG: ridge regression on linearized networks, with the implicit gradient of what these learn from the support."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from kipcore import checks, keys, krr, linalg
from kipcore.distillation.features import cross_entropy, draw_networks, features
from kipcore.distillation.method import (
  Batch,
  LossInfo,
  Method,
  Params,
  sum_over_devices,
  value_equal,
)
from kipcore.distillation.methods.frepo import Pool, label_margin
from kipcore.networks import Network
from kipcore.types import Array, Support


@dataclasses.dataclass(frozen=True)
class RCIGOptions:
  """Choices of RCIG, at their published values where these are known to us (not the inner rate and the first temperature).

  Attributes:
    pool_size: networks, one of them used at a step.
    pool_steps, pool_rate: Adam steps of that network after each step (published: 1 to 15), and their rate.
    max_age: such steps after which it is drawn anew; the first networks count from different ages.
    inner_steps, inner_rate: Adam steps of the tangent parameters, from 0, and their rate.
    inverse_steps: of conjugate gradients, for the inverse Hessian; 0 leaves the direct gradient alone.
    l2: absolute ridge for each row of the support: K + l2 m I.
    clip: whether the implicit gradient of images, and of labels, is cut to the norm of the direct one.
    decay: of the moving average of images and labels, which is the result.
    initial_temperature: where the temperature starts.
  """

  pool_size: int = 30
  pool_steps: int = 1
  pool_rate: float = 5e-5
  max_age: int = 100
  inner_steps: int = 20
  inner_rate: float = 3e-4
  inverse_steps: int = 20
  l2: float = 5e-4
  clip: bool = True
  decay: float = 0.99
  initial_temperature: float = 1.0


class RCIGState(NamedTuple):
  """The `pool` of networks, as FRePo has it, and the moving `average` of the parameters."""

  pool: Pool
  average: Params


@value_equal
def rcig(module: Network, options: RCIGOptions = RCIGOptions()) -> Method:
  """Learns images and labels through one linearized network of a pool at a time, whose readout is solved for.

      phi_w(x) = phi(x) + J(x) w,   K = phi_w(S) phi_w(S)^T,   P = phi_w(T) phi_w(S)^T (K + l2 m I)^{-1} y_s
      outer(S, w) = mean_t w_t CE(softmax(temperature P_t), class of t) - label_margin(y_s, 1 / (2c))
      inner(S, w) = 1/2 tr(y_s^T (K + l2 m I)^{-1} y_s) + 1/2 |w|^2
      gradient = d outer / dS - (d^2 inner / dw dS)^T (d^2 inner / dw^2)^{-1} d outer / dw     after inner_steps on w

  phi is what the readout sees, J its Jacobian in the parameters; K is not scaled. l2 m times `inner` is the least over
  readouts V of 1/2 |phi_w(S) V - y_s|^2 + l2 m / 2 (|V|^2 + |w|^2). Where w is a strict minimum and the solve exact, this is the
  gradient of the bilevel problem. The rest is heuristic: few steps, clipping, and that `inner` is convex near its minima
  only (at w = 0 it is often not). The solve ends at a direction of curvature <= 0, so far from a minimum little more than the direct
  gradient may remain. On several devices the gradient is that of the whole batch. Published: AdaBelief 3e-3 (temperature 3e-2),
  1,024 targets, ConvNet with softplus of beta 60 for ReLU. Ours differs in that conjugate gradients, which need no rate, stand for
  20 Adam steps with a tuned one, and in what is ours for want of a published value: the ridge on w, that pool networks
  descend `inner` at w = 0, that images and labels are clipped apart.

  Args:
    module: the network, without batch norm; `networks.network(conv_net(3), 128, c, softplus=60.0)`.
    options: see `RCIGOptions`.

  Returns:
    A `Method` that learns `x`, `y` and `log_temperature`; its support is the moving average without bias to the start.

  Raises:
    ValueError, TypeError: for numbers out of range, or batch norm.

  Source: Loo, Hasani, Lechner, Rus 2023 (RCIG), section 3.
  """
  for name in ("pool_size", "pool_steps", "max_age", "inner_steps"):
    checks.positive_int(name, getattr(options, name))
  for name in ("pool_rate", "inner_rate", "l2", "initial_temperature"):
    checks.positive(name, getattr(options, name))
  checks.non_negative("inverse_steps", options.inverse_steps)
  checks.in_range("decay", options.decay, 0, 1 - 1e-9)
  checks.one_of("module.norm", module.norm, ("none", "instance"))
  pool_adam, inner_adam = optax.adam(options.pool_rate), optax.adam(options.inner_rate)

  def regress(phi: Array, y: Array) -> krr.KRRFit:
    return krr.krr_fit(linalg.matmul(phi, phi.T), y, options.l2 * y.shape[0])

  def ridge_loss(phi: Array, y: Array) -> Array:
    return 0.5 * jnp.sum(y * regress(phi, y).dual)

  def init_params(support: Support) -> Params:
    log_temperature = jnp.asarray(math.log(options.initial_temperature), support.x.dtype)
    return {"x": support.x, "y": support.y, "log_temperature": log_temperature}

  def loss(params: Params, aux: RCIGState, batch: Batch, weights: Array, key: Array):
    theta, unravel = ravel_pytree(_row(aux.pool.variables, aux.pool.chosen))
    fixed = jax.lax.stop_gradient(params)

    def phi(w, x):
      return sum(jax.jvp(lambda t: features(module, unravel(t), x), (theta,), (w,)))

    def inner(w, p):
      return ridge_loss(phi(w, p["x"]), p["y"]) + 0.5 * jnp.sum(w * w)

    def outer(p, w):
      phi_s = phi(w, p["x"])
      fit = regress(phi_s, p["y"])
      predictions = krr.krr_predict(fit, linalg.matmul(phi(w, batch.x), phi_s.T))
      per_example = cross_entropy(jnp.exp(p["log_temperature"]) * predictions, batch.y)
      value = jnp.mean(weights.astype(per_example.dtype) * per_example) - label_margin(
        p["y"], 0.5 / batch.y.shape[1]
      )
      return value, LossInfo(
        per_example, predictions, krr.accuracy(predictions, batch.y), fit.status
      )

    w, _ = _descend(
      inner_adam,
      lambda w: inner(w, fixed),
      jnp.zeros_like(theta),
      inner_adam.init(theta),
      options.inner_steps,
    )
    (value, info), slopes = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(fixed, w)
    # Of all devices before it is clipped, which is not linear.
    devices = sum_over_devices(batch, 1)
    value, (direct, slope) = jax.tree.map(
      lambda a: a / devices, sum_over_devices(batch, (value, slopes))
    )
    v = _solve(
      lambda u: jax.jvp(lambda t: jax.grad(inner)(t, fixed), (w,), (u,))[1],
      slope,
      options.inverse_steps,
    )
    implicit = jax.grad(lambda p: -jax.jvp(lambda t: inner(t, p), (w,), (v,))[1])(fixed)
    if options.clip:
      norm, tiny = jnp.linalg.norm, jnp.finfo(theta.dtype).tiny
      implicit = jax.tree.map(
        lambda i, d: i * jnp.minimum(1, norm(d) / jnp.maximum(norm(i), tiny)), implicit, direct
      )
    # The second term is zero and has the gradient.
    return value + sum(
      jnp.sum((direct[name] + implicit[name]) * (params[name] - fixed[name])) for name in params
    ), info

  def choose(key: Array) -> Array:
    return jax.random.randint(keys.stream(key, "choice"), (), 0, options.pool_size)

  def init_aux(key: Array, params: Params) -> RCIGState:
    variables = draw_networks(keys.stream(key, "draw"), module, params["x"], options.pool_size)
    age = jnp.arange(options.pool_size, dtype=jnp.int32) * options.max_age // options.pool_size
    return RCIGState(Pool(variables, jax.vmap(pool_adam.init)(variables), age, choose(key)), params)

  def update_aux(key: Array, params: Params, aux: RCIGState, step: Array) -> RCIGState:
    variables, opt_state, age, i = aux.pool
    old, fresh = (
      age[i] + options.pool_steps >= options.max_age,
      draw_networks(keys.stream(key, "draw"), module, params["x"], 1),
    )
    trained = _descend(
      pool_adam,
      lambda net: ridge_loss(features(module, net, params["x"]), params["y"]),
      *_row((variables, opt_state), i),
      options.pool_steps,
    )
    pool = jax.tree.map(
      lambda a, b, c: a.at[i].set(jnp.where(old, b, c)),
      (variables, opt_state),
      _row((fresh, jax.vmap(pool_adam.init)(fresh)), 0),
      trained,
    )
    share = (1 - options.decay) / (1 - options.decay ** (step + 1).astype(params["x"].dtype))
    average = jax.tree.map(lambda a, p: a + share * (p - a), aux.average, params)
    return RCIGState(
      Pool(*pool, age.at[i].set(jnp.where(old, 0, age[i] + options.pool_steps)), choose(key)),
      average,
    )

  return Method(
    "rcig",
    init_params,
    lambda params, aux: Support(aux.average["x"], aux.average["y"]),
    lambda params: {"x": 1, "y": 1, "log_temperature": 10},
    loss,
    init_aux,
    update_aux,
  )


def _row(stacked, i):
  return jax.tree.map(lambda a: a[i], stacked)


def _descend(optimizer, function, start, opt_state, steps: int):
  """The parameters and the state of the optimizer after `steps`."""

  def step(_, carry):
    with linalg.permissive_promotion():
      updates, state = optimizer.update(jax.grad(function)(carry[0]), carry[1])
      return optax.apply_updates(carry[0], updates), state

  return jax.lax.fori_loop(0, steps, step, (start, opt_state))


def _solve(product, b: Array, steps: int) -> Array:
  """Conjugate gradients for H v = b from v = 0, which stay where they are once b is met or a direction has curvature <= 0."""

  def step(_, carry):
    v, r, p, norm = carry
    image = product(p)
    curvature = jnp.sum(p * image)
    length = jnp.where(curvature > 0, norm / curvature, 0)
    r = r - length * image
    new = jnp.sum(r * r)
    return v + length * p, r, jnp.where(length > 0, r + new / norm * p, 0), new

  return jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(b), b, b, jnp.sum(b * b)))[0]
