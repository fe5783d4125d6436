"""RCIG: ridge regression on linearized networks, with the implicit gradient of their training on the support."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from kipcore import checks, keys, krr, linalg
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import (
  cross_entropy,
  draw_networks,
  features,
  network_of_method,
)
from kipcore.distillation.method import Batch, Method, Params, compiled, sum_over_devices
from kipcore.distillation.methods.frepo import Pool, label_margin, training_set
from kipcore.functional import FunctionalNetwork, NetworkLike
from kipcore.types import Array, Flag, Integer, LossInfo, Real, Support


@dataclasses.dataclass(frozen=True)
class RCIGOptions:
  """Options of RCIG; published values, except `inner_rate` and `initial_temperature`, which are not published.

  Attributes:
    pool_size: networks in the pool; each step uses one of them.
    pool_steps: Adam steps of that network after each step (published: 1 to 15).
    pool_rate: their learning rate.
    max_age: such steps after which a network is redrawn; the first networks start at different ages.
    inner_steps: Adam steps of the tangent parameters, from 0.
    inner_rate: their learning rate.
    inverse_steps: conjugate-gradient steps for the inverse Hessian; 0 for the direct gradient only.
    l2: ridge per support row, absolute: K + l2 m I.
    clip: whether the implicit gradient of each parameter is clipped to the norm of the direct one.
    decay: of the moving average of images and labels, which is the result; in [0, 1).
    initial_temperature: first value of the temperature.
    flip: whether the support is extended by its mirror images with the same labels.
  """

  pool_size: Integer = 30
  pool_steps: Integer = 1
  pool_rate: Real = 5e-5
  max_age: Integer = 100
  inner_steps: Integer = 20
  inner_rate: Real = 3e-4
  inverse_steps: Integer = 20
  l2: Real = 5e-4
  clip: Flag = True
  decay: Real = 0.99
  initial_temperature: Real = 1.0
  flip: Flag = False

  def __post_init__(self):
    option_checks.validate(
      self,
      positive=("pool_rate", "inner_rate", "l2", "initial_temperature"),
      non_negative=("decay",),
      counts={"pool_size": 1, "pool_steps": 1, "max_age": 1, "inner_steps": 1, "inverse_steps": 0},
      flags=("clip", "flip"),
    )
    checks.in_range("decay", self.decay, 0, 1 - 1e-9)


class RCIGState(NamedTuple):
  """The `pool` of networks, as in FRePo, and the moving `average` of the parameters."""

  pool: Pool
  average: Params


@dataclasses.dataclass(frozen=True)
class RCIG(Method):
  """The method of `rcig`; its auxiliary state is an `RCIGState`."""

  module: FunctionalNetwork
  options: RCIGOptions

  name = "rcig"

  def init_params(self, support: Support) -> Params:
    self.module.parameters_only(support.x)
    log_temperature = jnp.asarray(math.log(self.options.initial_temperature), support.x.dtype)
    return {"x": support.x, "y": support.y, "log_temperature": log_temperature}

  def support(self, params: Params, aux: RCIGState) -> Support:
    return Support(aux.average["x"], aux.average["y"])

  def trainable(self, params: Params) -> dict[str, float]:
    return {"x": 1.0, "y": 1.0, "log_temperature": 10.0}

  @compiled()
  def loss(
    self,
    params: Params,
    aux: RCIGState,
    batch: Batch,
    weights: Float[Array, " t"],
    key: Any,
  ) -> tuple[Float[Array, ""], LossInfo]:
    options = self.options
    theta, unravel = ravel_pytree(_row(aux.pool.variables, aux.pool.chosen))
    fixed = jax.lax.stop_gradient(params)

    def phi(w, x):
      """Features of the linearized network with tangent parameters w."""
      value, tangent = jax.jvp(lambda t: features(self.module, unravel(t), x), (theta,), (w,))
      return value + tangent

    def inner(w, p):
      x, y = training_set(p, options.flip)
      return self._ridge_loss(phi(w, x), y) + 0.5 * jnp.sum(w * w)

    def outer(p, w):
      x, y = training_set(p, options.flip)
      phi_s = phi(w, x)
      fit = self._regress(phi_s, y)
      predictions = krr.krr_predict(fit, linalg.matmul(phi(w, batch.x), phi_s.T))
      per_example = cross_entropy(jnp.exp(p["log_temperature"]) * predictions, batch.y)
      value = jnp.mean(weights.astype(per_example.dtype) * per_example) - label_margin(
        p["y"], 0.5 / batch.y.shape[1]
      )
      accuracy = krr.accuracy(predictions, batch.y)
      return value, LossInfo(per_example, predictions, accuracy, fit.status)

    adam = optax.adam(options.inner_rate)
    w, _ = _minimize(
      adam,
      lambda w: inner(w, fixed),
      jnp.zeros_like(theta),
      adam.init(theta),
      options.inner_steps,
    )
    (value, info), slopes = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(fixed, w)
    # Averaged over devices before clipping, which is not linear.
    devices = sum_over_devices(batch, 1)
    value, (direct, slope) = jax.tree.map(
      lambda a: a / devices, sum_over_devices(batch, (value, slopes))
    )
    v = _conjugate_gradients(
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
    # The second term is zero; its gradient is the sum of both gradients.
    return value + sum(
      jnp.sum((direct[name] + implicit[name]) * (params[name] - fixed[name])) for name in params
    ), info

  @compiled()
  def init_aux(self, key: Array, params: Params) -> RCIGState:
    options = self.options
    variables = draw_networks(keys.stream(key, "draw"), self.module, params["x"], options.pool_size)
    age = jnp.arange(options.pool_size, dtype=jnp.int32) * options.max_age // options.pool_size
    opt_state = jax.vmap(optax.adam(options.pool_rate).init)(variables)
    return RCIGState(Pool(variables, opt_state, age, self._choose(key)), params)

  @compiled()
  def update_aux(self, key: Array, params: Params, aux: RCIGState, step: Integer) -> RCIGState:
    options, adam = self.options, optax.adam(self.options.pool_rate)
    variables, opt_state, age, i = aux.pool
    too_old = age[i] + options.pool_steps >= options.max_age
    fresh = draw_networks(keys.stream(key, "draw"), self.module, params["x"], 1)
    x, y = training_set(params, options.flip)
    trained = _minimize(
      adam,
      lambda net: self._ridge_loss(features(self.module, net, x), y),
      _row(variables, i),
      _row(opt_state, i),
      options.pool_steps,
    )
    variables, opt_state = jax.tree.map(
      lambda a, b, c: a.at[i].set(jnp.where(too_old, b, c)),
      (variables, opt_state),
      _row((fresh, jax.vmap(adam.init)(fresh)), 0),
      trained,
    )
    age = age.at[i].set(jnp.where(too_old, 0, age[i] + options.pool_steps))
    share = (1 - options.decay) / (
      1 - options.decay ** jnp.asarray(step + 1).astype(params["x"].dtype)
    )
    average = jax.tree.map(lambda a, p: a + share * (p - a), aux.average, params)
    return RCIGState(Pool(variables, opt_state, age, self._choose(key)), average)

  def _regress(self, phi: Array, y: Array) -> krr.KRRFit:
    return krr.krr_fit(linalg.matmul(phi, phi.T), y, self.options.l2 * y.shape[0])

  def _ridge_loss(self, phi: Array, y: Array) -> Array:
    """1/2 tr(y^T (K + l2 m I)^{-1} y)."""
    return 0.5 * jnp.sum(y * self._regress(phi, y).dual)

  def _choose(self, key: Array) -> Array:
    return jax.random.randint(keys.stream(key, "choice"), (), 0, self.options.pool_size)


def rcig(module: NetworkLike, options: RCIGOptions = RCIGOptions()) -> Method:
  """Learns images and labels through the linearized networks of a pool, whose readout is solved for.

      phi_w(x) = phi(x) + J(x) w,   K = phi_w(S) phi_w(S)^T,   P = phi_w(T) phi_w(S)^T (K + l2 m I)^{-1} y_s
      outer(S, w) = mean_t w_t CE(softmax(temperature P_t), class of t) - label_margin(y_s, 1 / (2c))
      inner(S, w) = 1/2 tr(y_s^T (K + l2 m I)^{-1} y_s) + 1/2 |w|^2
      gradient = d outer / dS - (d^2 inner / dw dS)^T (d^2 inner / dw^2)^{-1} d outer / dw     after inner_steps on w

  phi are the inputs of the readout and J is its Jacobian in the parameters. Proved: if w is a strict minimum of `inner`
  and the solve is exact, this is the gradient of the bilevel problem. Heuristic: few inner steps, clipping, and the solve,
  which stops at a direction of non-positive curvature. On several devices the gradient is that of the whole batch.
  Published settings: AdaBelief with rate 3e-3 (temperature 3e-2), 1,024 targets, ConvNet with softplus (beta 60) for ReLU.
  Differences from the published method: conjugate gradients replace 20 tuned Adam steps. Our own choices, where nothing is
  published: the ridge on w, that pool networks minimize `inner` at w = 0, and that images and labels are clipped separately.

  Args:
    module: the network, without batch norm; `networks.network(conv_net(3), 128, c, softplus=60.0)`, or any that
      `as_network` accepts, with features. Its dropout is never active.
    options: see `RCIGOptions`.

  Returns:
    A `Method` that learns `x`, `y` and `log_temperature`; its support is the bias-corrected moving average.

  Raises:
    ValueError, TypeError: for batch norm or a network without features, or as `as_network`.

  References:
    Loo, Hasani, Lechner, Rus (2023), RCIG, section 3.
  """
  return RCIG(network_of_method(module, ("none", "instance")), options)


def _row(stacked: Any, i: int | Array) -> Any:
  return jax.tree.map(lambda a: a[i], stacked)


def _minimize(
  optimizer: optax.GradientTransformation,
  function: Callable[[Any], Array],
  start: Any,
  opt_state: Any,
  steps: int,
) -> tuple[Any, Any]:
  """The parameters and the state of the optimizer after `steps`."""

  def step(_, state):
    with linalg.permissive_promotion():
      updates, new_state = optimizer.update(jax.grad(function)(state[0]), state[1])
      return optax.apply_updates(state[0], updates), new_state

  return jax.lax.fori_loop(0, steps, step, (start, opt_state))


def _conjugate_gradients(product: Callable[[Array], Array], b: Array, steps: int) -> Array:
  """Conjugate gradients for H v = b from v = 0; they stop at a solution or at non-positive curvature."""

  def step(_, state):
    v, r, p, norm = state
    image = product(p)
    curvature = jnp.sum(p * image)
    length = jnp.where(curvature > 0, norm / curvature, 0)
    r = r - length * image
    new = jnp.sum(r * r)
    return v + length * p, r, jnp.where(length > 0, r + new / norm * p, 0), new

  return jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(b), b, b, jnp.sum(b * b)))[0]
