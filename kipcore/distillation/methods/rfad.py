"""Random feature approximation (RFAD): KIP under the kernel of a few random finite networks, redrawn as it goes."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kipcore import checks, krr, linalg
from kipcore.distillation.features import cross_entropy, draw_networks, features
from kipcore.distillation.method import Batch, LossInfo, Method, Params, value_equal
from kipcore.networks import Network
from kipcore.types import Array, Support


@dataclasses.dataclass(frozen=True)
class RFADOptions:
  """Choices of RFAD, at their published values.

  Attributes:
    num_networks: M, networks whose features make the kernel.
    redraw_every: steps after which all of them are drawn anew.
    relative_ridge: ridge as a fraction of tr(K_ss) / m.
    loss: "cross_entropy" of the predictions times a learned scale (Platt), or "mse".
    learn_labels: whether the labels are learned.
    learn_transform: whether a d x d matrix on the flattened images of the support is learned.
  """

  num_networks: int = 8
  redraw_every: int = 1
  relative_ridge: float = 5e-3
  loss: str = "cross_entropy"
  learn_labels: bool = False
  learn_transform: bool = True


def random_features(module: Network, variables, x: Array) -> Array:
  """Features of M networks side by side, scaled so that their products are means over networks and units.

  Args:
    module: the network.
    variables: M stacked draws, `features.draw_networks`.
    x: `(n, ...)` rows.

  Returns:
    `(n, M p)`, with p what the readout of one network sees.
  """
  phi = jax.lax.map(jax.checkpoint(lambda one: features(module, one, x)), variables)
  num_networks, n, p = phi.shape
  return jnp.swapaxes(phi, 0, 1).reshape(n, num_networks * p) / math.sqrt(num_networks * p)


def random_feature_kernel(module: Network, phi1: Array, phi2: Array) -> Array:
  """The kernel of M random networks, an estimate of the NNGP of their architecture.

      K(x1, x2) = w_std^2 / (M p) sum_m phi_m(x1) phi_m(x2)^T + b_std^2

  with phi_m what the readout of network m sees, p numbers, and w_std, b_std the readout's. The deviation falls as
  1 / sqrt(M); below the last hidden layer a finite width also leaves a bias of order 1 / width.

  Args:
    module: a network without norm layers, for which the limit is known.
    phi1: `(n1, M p)` from `random_features`.
    phi2: `(n2, M p)`.

  Returns:
    `(n1, n2)`.

  Source: Loo et al. 2022 (RFAD), section 3; there with w_std^2 = 2 and b_std^2 = 0.01.
  """
  readout = module.arch.layers[-1]
  return readout.w_std**2 * linalg.matmul(phi1, phi2.T) + readout.b_std**2


@value_equal
def rfad(module: Network, options: RFADOptions = RFADOptions()) -> Method:
  """KIP with `random_feature_kernel`, on support images A x.

      P = K_ts (K_ss + ridge I)^{-1} y_s,   loss_t = CE(softmax(e^k P_t)) or 1/2 mean_c (P_tc - y_tc)^2

  A starts as the identity and k at 0. The support is A x, so nobody needs A later. The networks of a step are the same for
  targets and support and on every device. Published: ConvNet of depth 3 with 256 channels and no norm, 5,120 uniform
  targets, AdaBelief of rate 1e-3, for A 5e-5 and for k 1e-2. Ours differs in that float32 stays float32 (unless JAX's
  64-bit switch is on), batches come from the sampler instead of four blocks that may overlap, and equal seeds give equal networks.

  Args:
    module: the network; `networks.network(conv_net(3), 256, c)`.
    options: see `RFADOptions`.

  Returns:
    A `Method` that learns `x`, `transform` (A, absent if not asked), `log_scale` (k, for cross-entropy) and `y` (if asked).

  Raises:
    ValueError: for numbers out of range, an unknown loss, or a network with a norm.

  Source: Loo, Hasani, Amini, Rus 2022 (RFAD), sections 3 and 4.
  """
  checks.positive_int("num_networks", options.num_networks)
  checks.positive_int("redraw_every", options.redraw_every)
  checks.positive("relative_ridge", options.relative_ridge)
  checks.one_of("loss", options.loss, ("mse", "cross_entropy"))
  checks.one_of("norm", module.norm, ("none",))

  def init_params(support: Support) -> Params:
    params = {"x": support.x, "y": support.y, "log_scale": jnp.zeros((), support.x.dtype)}
    if options.learn_transform:
      params["transform"] = jnp.eye(math.prod(support.x.shape[1:]), dtype=support.x.dtype)
    return params

  def images(params: Params) -> Array:
    x = params["x"]
    return (
      linalg.matmul(x.reshape(x.shape[0], -1), params["transform"].T).reshape(x.shape)
      if "transform" in params
      else x
    )

  def trainable(params: Params) -> dict[str, float]:
    factors = {
      "x": 1,
      "y": options.learn_labels,
      "log_scale": 10 * (options.loss == "cross_entropy"),
      "transform": 0.05,
    }
    return {name: factors[name] for name in params}

  def loss(params: Params, aux, batch: Batch, weights: Array, key: Array):
    phi_s, phi_t = (
      random_features(module, aux, images(params)),
      random_features(module, aux, batch.x),
    )
    k_ss, k_ts = (
      random_feature_kernel(module, phi_s, phi_s),
      random_feature_kernel(module, phi_t, phi_s),
    )
    fit = krr.krr_fit(k_ss, params["y"], krr.relative_ridge(k_ss, options.relative_ridge))
    predictions = krr.krr_predict(fit, k_ts)
    if options.loss == "mse":
      per_example = 0.5 * jnp.mean((predictions - batch.y) ** 2, axis=1)
    else:
      per_example = cross_entropy(jnp.exp(params["log_scale"]) * predictions, batch.y)
    info = LossInfo(per_example, predictions, krr.accuracy(predictions, batch.y), fit.status)
    return jnp.mean(weights.astype(per_example.dtype) * per_example), jax.lax.stop_gradient(info)

  def draw(key: Array, params: Params):
    return draw_networks(key, module, params["x"], options.num_networks)

  def update_aux(key: Array, params: Params, aux, step: Array):
    return jax.lax.cond(
      (step + 1) % options.redraw_every == 0, lambda: draw(key, params), lambda: aux
    )

  return Method(
    "rfad",
    init_params,
    lambda params, aux: Support(images(params), params["y"]),
    trainable,
    loss,
    draw,
    update_aux,
  )
