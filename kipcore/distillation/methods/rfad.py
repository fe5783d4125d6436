"""Random feature approximation (RFAD): KIP with the kernel of a few random finite networks, which are redrawn during the run."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import krr, linalg
from kipcore.architectures import Dense
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import (
  cross_entropy,
  draw_networks,
  features,
  network_of_method,
  own_network,
)
from kipcore.distillation.method import Batch, Method, Params, compiled
from kipcore.functional import FunctionalNetwork, NetworkLike, as_network
from kipcore.types import Array, ArrayLike, Flag, Integer, LossInfo, Real, Support


@dataclasses.dataclass(frozen=True)
class RFADOptions:
  """Options of RFAD; the defaults are the published values.

  Attributes:
    num_networks: M, networks whose features define the kernel.
    redraw_every: steps after which all networks are redrawn.
    relative_ridge: ridge as a fraction of tr(K_ss) / m.
    loss: "cross_entropy" of the predictions times a learned scale (Platt), or "mse".
    learn_labels: whether the labels are learned.
    learn_transform: whether a d x d matrix on the flattened images of the support is learned.
  """

  num_networks: Integer = 8
  redraw_every: Integer = 1
  relative_ridge: Real = 5e-3
  loss: str = "cross_entropy"
  learn_labels: Flag = False
  learn_transform: Flag = True

  def __post_init__(self):
    option_checks.validate(
      self,
      positive=("relative_ridge",),
      counts={"num_networks": 1, "redraw_every": 1},
      choices={"loss": ("mse", "cross_entropy")},
      flags=("learn_labels", "learn_transform"),
    )


def random_features(
  module: NetworkLike, variables: Any, x: Float[ArrayLike, "n ..."]
) -> Float[Array, "n features"]:
  """Concatenated features of M networks, scaled so that inner products are means over networks and units.

  Args:
    module: the network.
    variables: M stacked draws, `features.draw_networks`.
    x: `(n, ...)` rows.

  Returns:
    `(n, M p)`, with p the number of inputs of one readout.
  """
  return _random_features(as_network(module), variables, x)


@functools.partial(jax.jit, static_argnums=0)
def _random_features(module, variables, x):
  phi = jax.lax.map(jax.checkpoint(lambda one: features(module, one, x)), variables)
  num_networks, n, p = phi.shape
  return jnp.swapaxes(phi, 0, 1).reshape(n, num_networks * p) / math.sqrt(num_networks * p)


def random_feature_kernel(
  module: NetworkLike, phi1: Float[Array, "n1 features"], phi2: Float[Array, "n2 features"]
) -> Float[Array, "n1 n2"]:
  """The kernel of M random networks, an estimate of the NNGP kernel of their architecture.

      K(x1, x2) = w_std^2 / (M p) sum_m phi_m(x1) phi_m(x2)^T + b_std^2

  with phi_m the p inputs of the readout of network m, and w_std, b_std of the readout. The standard deviation is
  proportional to 1 / sqrt(M); the finite width of earlier layers also leaves a bias of order 1 / width.

  Args:
    module: a network without normalization layers, for which the limit is known. For a network of a user, whose
      readout is unknown, w_std^2 = 2 and b_std^2 = 0.01.
    phi1: `(n1, M p)` from `random_features`.
    phi2: `(n2, M p)`.

  Returns:
    `(n1, n2)`.

  References:
    Loo et al. (2022), RFAD, section 3, with w_std^2 = 2 and b_std^2 = 0.01.
  """
  own = own_network(module)
  readout = Dense() if own is None else own.arch.layers[-1]
  return _random_feature_kernel(readout.w_std**2, readout.b_std**2, phi1, phi2)


@jax.jit
def _random_feature_kernel(w_variance, b_variance, phi1, phi2):
  return w_variance * linalg.matmul(phi1, phi2.T) + b_variance


@dataclasses.dataclass(frozen=True)
class RFAD(Method):
  """The method of `rfad`."""

  module: FunctionalNetwork
  options: RFADOptions

  name = "rfad"

  def init_params(self, support: Support) -> Params:
    self.module.parameters_only(support.x)
    params = {"x": support.x, "y": support.y, "log_scale": jnp.zeros((), support.x.dtype)}
    if self.options.learn_transform:
      params["transform"] = jnp.eye(math.prod(support.x.shape[1:]), dtype=support.x.dtype)
    return params

  def support(self, params: Params, aux: Any) -> Support:
    return Support(_images(params), params["y"])

  def trainable(self, params: Params) -> dict[str, float]:
    factors = {
      "x": 1.0,
      "y": float(self.options.learn_labels),
      "log_scale": 10.0 * (self.options.loss == "cross_entropy"),
      "transform": 0.05,
    }
    return {name: factors[name] for name in params}

  @compiled()
  def loss(
    self, params: Params, aux: Any, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    phi_s = random_features(self.module, aux, _images(params))
    phi_t = random_features(self.module, aux, batch.x)
    k_ss = random_feature_kernel(self.module, phi_s, phi_s)
    k_ts = random_feature_kernel(self.module, phi_t, phi_s)
    fit = krr.krr_fit(k_ss, params["y"], krr.relative_ridge(k_ss, self.options.relative_ridge))
    predictions = krr.krr_predict(fit, k_ts)
    if self.options.loss == "mse":
      per_example = 0.5 * jnp.mean((predictions - batch.y) ** 2, axis=1)
    else:
      per_example = cross_entropy(jnp.exp(params["log_scale"]) * predictions, batch.y)
    info = LossInfo(per_example, predictions, krr.accuracy(predictions, batch.y), fit.status)
    return jnp.mean(weights.astype(per_example.dtype) * per_example), jax.lax.stop_gradient(info)

  @compiled()
  def init_aux(self, key: Array, params: Params) -> Any:
    return draw_networks(key, self.module, params["x"], self.options.num_networks)

  @compiled()
  def update_aux(self, key: Array, params: Params, aux: Any, step: Integer) -> Any:
    return jax.lax.cond(
      (step + 1) % self.options.redraw_every == 0,
      lambda: self.init_aux(key, params),
      lambda: aux,
    )


def rfad(module: NetworkLike, options: RFADOptions = RFADOptions()) -> Method:
  """KIP with `random_feature_kernel`, on transformed support images A x.

      P = K_ts (K_ss + ridge I)^{-1} y_s,   loss_t = CE(softmax(e^k P_t)) or 1/2 mean_c (P_tc - y_tc)^2

  A starts as the identity and k at 0; the resulting support is A x. The networks of a step are the same for targets
  and support and on every device. Published settings: ConvNet of depth 3 with 256 channels and no normalization,
  5,120 uniform targets, AdaBelief with rate 1e-3 (5e-5 for A, 1e-2 for k).
  Differences from the published code: no conversion to float64, and batches come from the sampler.

  Args:
    module: the network; `networks.network(conv_net(3), 256, c)`, or any that `as_network` accepts, with features.
    options: see `RFADOptions`.

  Returns:
    A `Method` that learns `x`, `transform` (A, if requested), `log_scale` (k, for cross-entropy) and `y` (if requested).

  Raises:
    ValueError, TypeError: for a network with normalization or without features, or as `as_network`.

  References:
    Loo, Hasani, Amini, Rus (2022), RFAD, sections 3 and 4.
  """
  return RFAD(network_of_method(module, ("none",)), options)


def _images(params: Params) -> Array:
  """The support images A x."""
  x = params["x"]
  if "transform" not in params:
    return x
  return linalg.matmul(x.reshape(x.shape[0], -1), params["transform"].T).reshape(x.shape)
