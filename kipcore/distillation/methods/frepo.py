"""FRePo: ridge regression on the features of a pool of networks that are trained on the support as it changes."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kipcore import checks, keys, krr, linalg
from kipcore.distillation.features import draw_networks, features
from kipcore.distillation.method import Batch, LossInfo, Method, Params, value_equal
from kipcore.networks import Network
from kipcore.types import Array, Support


@dataclasses.dataclass(frozen=True)
class FRePoOptions:
  """Choices of FRePo, at their published values.

  Attributes:
    pool_size: networks that are trained side by side, one of them used at a step.
    max_age: training steps after which a network is drawn anew; the first ones start at different ages.
    network_rate: rate of Adam for the networks.
    network_batch_size: rows of the support in a training step, all of fewer.
    relative_ridge: ridge as a fraction of tr(K_ss) / m.
    learn_labels: whether the labels are learned.
    flip: the support has its mirror images beside it, with the same labels (published for CIFAR-10; not for MNIST).
  """

  pool_size: int = 10
  max_age: int = 100
  network_rate: float = 3e-4
  network_batch_size: int = 1000
  relative_ridge: float = 1e-6
  learn_labels: bool = True
  flip: bool = False


class Pool(NamedTuple):
  """`variables` and `opt_state` of all networks, stacked; their `age` `(pool_size,)`; the one `chosen` for the next step."""

  variables: dict
  opt_state: optax.OptState
  age: Array
  chosen: Array


def label_margin(y: Array, bound: float) -> Array:
  """mean_s min(largest - second largest label of s, bound), scalar: how sure labels are, up to the bound."""
  top = jax.lax.top_k(y, 2)[0]
  return jnp.mean(jnp.minimum(top[:, 0] - top[:, 1], bound))


@value_equal
def frepo(module: Network, options: FRePoOptions = FRePoOptions()) -> Method:
  """Ridge regression on learned features, with the networks' training left out of the gradient.

      K(a, b) = phi(a) . phi(b),   P = K_ts (K_ss + ridge I)^{-1} y_s
      loss = mean_t w_t 1/2 sum_c (P_tc - y_tc)^2 - label_margin(y_s, 1/c)

  phi is what the readout of the chosen network sees, batch norm by its running means. After each step that network
  takes one Adam step on the mean squared error on the support (batch norm by the batch), and another one is chosen.
  Labels start divided by sqrt(c / 10). Published: ConvNet of depth 3, 128, 256, 512 channels, batch norm; LAMB of rate 3e-4
  (cosine); 1,024 targets, 500,000 steps. Ours differs in that the choice of network repeats with the seed, and that on several
  devices all train the same networks (published: different ones, whose gradients are averaged). The published ridge is an
  absolute value, which hides a matrix of the wrong sign; here that fails with a status.

  Args:
    module: the network; `networks.network(conv_net(3), 128, c, norm="batch", width_growth=2)`.
    options: see `FRePoOptions`.

  Returns:
    A `Method` that learns `x` and `y`.

  Raises:
    ValueError, TypeError: for numbers out of range.

  Source: Zhou, Nezhadarya, Ba 2022 (FRePo), algorithm 1 and section 3.
  """
  for name in ("pool_size", "max_age", "network_batch_size"):
    checks.positive_int(name, getattr(options, name))
  for name in ("relative_ridge", "network_rate"):
    checks.positive(name, getattr(options, name))
  optimizer = optax.adam(options.network_rate)

  def init_params(support: Support) -> Params:
    return {"x": support.x, "y": support.y / math.sqrt(support.y.shape[1] / 10)}

  def mirrored(params: Params) -> tuple[Array, Array]:
    x, y = params["x"], params["y"]
    return (
      (jnp.concatenate([x, x[:, :, ::-1]]), jnp.concatenate([y, y])) if options.flip else (x, y)
    )

  def loss(params: Params, aux: Pool, batch: Batch, weights: Array, key: Array):
    variables = jax.tree.map(lambda a: a[aux.chosen], aux.variables)
    x, y = mirrored(params)
    phi_s, phi_t = features(module, variables, x), features(module, variables, batch.x)
    k_ss = linalg.matmul(phi_s, phi_s.T)
    fit = krr.krr_fit(k_ss, y, krr.relative_ridge(k_ss, options.relative_ridge))
    predictions = krr.krr_predict(fit, linalg.matmul(phi_t, phi_s.T))
    per_example = 0.5 * jnp.sum((predictions - batch.y) ** 2, axis=1)
    value = jnp.mean(weights.astype(per_example.dtype) * per_example) - label_margin(
      params["y"], 1 / y.shape[1]
    )
    info = LossInfo(per_example, predictions, krr.accuracy(predictions, batch.y), fit.status)
    return value, jax.lax.stop_gradient(info)

  def drawn(key: Array, params: Params, count: int):
    variables = draw_networks(key, module, params["x"], count)
    return variables, jax.vmap(optimizer.init)(variables["params"])

  def init_aux(key: Array, params: Params) -> Pool:
    age = jnp.arange(options.pool_size, dtype=jnp.int32) * (options.max_age // options.pool_size)
    chosen = jax.random.randint(keys.stream(key, "choice"), (), 0, options.pool_size)
    return Pool(*drawn(keys.stream(key, "draw"), params, options.pool_size), age, chosen)

  def trained(key: Array, params: Params, variables, opt_state):
    x, y = mirrored(params)
    rows = jax.random.permutation(key, x.shape[0])[: options.network_batch_size]

    def error(weights):
      out, moved = module.apply(
        {**variables, "params": weights}, x[rows], train=True, mutable=["batch_stats"]
      )
      return jnp.mean(jnp.sum((out - y[rows]) ** 2, axis=1)), moved

    gradient, moved = jax.grad(error, has_aux=True)(variables["params"])
    updates, opt_state = optimizer.update(gradient, opt_state, variables["params"])
    return {
      **variables,
      **moved,
      "params": optax.apply_updates(variables["params"], updates),
    }, opt_state

  def update_aux(key: Array, params: Params, aux: Pool, step: Array) -> Pool:
    i, age = aux.chosen, aux.age[aux.chosen] + 1
    one = jax.tree.map(lambda a: a[i], (aux.variables, aux.opt_state))
    with linalg.permissive_promotion():
      one = jax.lax.cond(
        age > options.max_age,
        lambda: jax.tree.map(lambda a: a[0], drawn(keys.stream(key, "draw"), params, 1)),
        lambda: trained(keys.stream(key, "rows"), params, *one),
      )
    variables, opt_state = jax.tree.map(
      lambda a, b: a.at[i].set(b), (aux.variables, aux.opt_state), one
    )
    chosen = jax.random.randint(keys.stream(key, "choice"), (), 0, options.pool_size)
    return Pool(
      variables, opt_state, aux.age.at[i].set(jnp.where(age > options.max_age, 0, age)), chosen
    )

  return Method(
    "frepo",
    init_params,
    lambda params, aux: Support(params["x"], params["y"]),
    lambda params: {"x": 1, "y": options.learn_labels},
    loss,
    init_aux,
    update_aux,
  )
