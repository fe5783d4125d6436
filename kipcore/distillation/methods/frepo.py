"""FRePo: ridge regression on the features of a pool of networks that are trained on the support."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from kipcore import keys, krr, linalg
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import draw_networks, features, network_of_method
from kipcore.distillation.method import Batch, Method, Params, compiled
from kipcore.functional import FunctionalNetwork, NetworkLike
from kipcore.types import Array, Flag, Integer, LossInfo, Real, Support


@dataclasses.dataclass(frozen=True)
class FRePoOptions:
  """Options of FRePo; the defaults are the published values.

  Attributes:
    pool_size: networks in the pool; each step uses and trains one of them.
    max_age: training steps after which a network is redrawn; the first networks start at different ages.
    network_rate: Adam learning rate of the networks.
    network_batch_size: support rows in a training step; all rows if there are fewer.
    relative_ridge: ridge as a fraction of tr(K_ss) / m.
    learn_labels: whether the labels are learned.
    flip: whether the support is extended by its mirror images with the same labels (published for CIFAR-10, not
      for MNIST).
  """

  pool_size: Integer = 10
  max_age: Integer = 100
  network_rate: Real = 3e-4
  network_batch_size: Integer = 1000
  relative_ridge: Real = 1e-6
  learn_labels: Flag = True
  flip: Flag = False

  def __post_init__(self):
    option_checks.validate(
      self,
      positive=("network_rate", "relative_ridge"),
      counts={"pool_size": 1, "max_age": 1, "network_batch_size": 1},
      flags=("learn_labels", "flip"),
    )


class Pool(NamedTuple):
  """A pool of networks.

  Attributes:
    variables: of all networks, stacked.
    opt_state: of all networks, stacked.
    age: `(pool_size,)` int32 training steps since each was drawn.
    chosen: int32 scalar, the network of the next step.
  """

  variables: Any
  opt_state: Any
  age: Array
  chosen: Array


def label_margin(y: Float[Array, "m c"], bound: float) -> Float[Array, ""]:
  """The mean over rows of min(largest - second largest label, bound)."""
  top = jax.lax.top_k(y, 2)[0]
  return jnp.mean(jnp.minimum(top[:, 0] - top[:, 1], bound))


def training_set(params: Params, flip: bool) -> tuple[Array, Array]:
  """Images and labels that networks learn from: the support, with its mirror images if requested."""
  x, y = params["x"], params["y"]
  if not flip:
    return x, y
  return jnp.concatenate([x, x[:, :, ::-1]]), jnp.concatenate([y, y])


@dataclasses.dataclass(frozen=True)
class FRePo(Method):
  """The method of `frepo`; its auxiliary state is a `Pool`."""

  module: FunctionalNetwork
  options: FRePoOptions

  name = "frepo"

  def init_params(self, support: Support) -> Params:
    self.module.check_outputs(support.x, "support.y", support.y)
    return {"x": support.x, "y": support.y / math.sqrt(support.y.shape[1] / 10)}

  def trainable(self, params: Params) -> dict[str, float]:
    return {"x": 1.0, "y": float(self.options.learn_labels)}

  @compiled()
  def loss(
    self, params: Params, aux: Pool, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    variables = jax.tree.map(lambda a: a[aux.chosen], aux.variables)
    x, y = training_set(params, self.options.flip)
    phi_s, phi_t = features(self.module, variables, x), features(self.module, variables, batch.x)
    k_ss = linalg.matmul(phi_s, phi_s.T)
    fit = krr.krr_fit(k_ss, y, krr.relative_ridge(k_ss, self.options.relative_ridge))
    predictions = krr.krr_predict(fit, linalg.matmul(phi_t, phi_s.T))
    per_example = 0.5 * jnp.sum((predictions - batch.y) ** 2, axis=1)
    value = jnp.mean(weights.astype(per_example.dtype) * per_example) - label_margin(
      params["y"], 1 / y.shape[1]
    )
    info = LossInfo(per_example, predictions, krr.accuracy(predictions, batch.y), fit.status)
    return value, jax.lax.stop_gradient(info)

  @compiled()
  def init_aux(self, key: Array, params: Params) -> Pool:
    options = self.options
    age = jnp.arange(options.pool_size, dtype=jnp.int32) * (options.max_age // options.pool_size)
    drawn = self._draw(keys.stream(key, "draw"), params, options.pool_size)
    return Pool(*drawn, age, self._choose(key))

  @compiled()
  def update_aux(self, key: Array, params: Params, aux: Pool, step: Integer) -> Pool:
    i, age = aux.chosen, aux.age[aux.chosen] + 1
    one = jax.tree.map(lambda a: a[i], (aux.variables, aux.opt_state))
    with linalg.permissive_promotion():
      one = jax.lax.cond(
        age > self.options.max_age,
        lambda: jax.tree.map(lambda a: a[0], self._draw(keys.stream(key, "draw"), params, 1)),
        lambda: self._train(key, params, *one),
      )
    variables, opt_state = jax.tree.map(
      lambda a, b: a.at[i].set(b), (aux.variables, aux.opt_state), one
    )
    age = jnp.where(age > self.options.max_age, 0, age)
    return Pool(variables, opt_state, aux.age.at[i].set(age), self._choose(key))

  def _choose(self, key: Array) -> Array:
    return jax.random.randint(keys.stream(key, "choice"), (), 0, self.options.pool_size)

  def _draw(self, key: Array, params: Params, count: int) -> tuple[Any, Any]:
    variables = draw_networks(key, self.module, params["x"], count)
    return variables, jax.vmap(optax.adam(self.options.network_rate).init)(variables["params"])

  def _train(self, key: Array, params: Params, variables: Any, opt_state: Any) -> tuple[Any, Any]:
    """One Adam step of a network on the support."""
    x, y = training_set(params, self.options.flip)
    order = jax.random.permutation(keys.stream(key, "rows"), x.shape[0])
    rows = order[: self.options.network_batch_size]

    def error(weights):
      out, updated = self.module.train(
        {**variables, "params": weights}, x[rows], keys.stream(key, "dropout")
      )
      return jnp.mean(jnp.sum((out - y[rows]) ** 2, axis=1)), updated

    gradient, updated = jax.grad(error, has_aux=True)(variables["params"])
    optimizer = optax.adam(self.options.network_rate)
    updates, opt_state = optimizer.update(gradient, opt_state, variables["params"])
    weights = optax.apply_updates(variables["params"], updates)
    return {**variables, **updated, "params": weights}, opt_state


def frepo(module: NetworkLike, options: FRePoOptions = FRePoOptions()) -> Method:
  """Ridge regression on learned features; the gradient does not flow through the training of the networks.

      K(a, b) = phi(a) . phi(b),   P = K_ts (K_ss + ridge I)^{-1} y_s
      loss = mean_t w_t 1/2 sum_c (P_tc - y_tc)^2 - label_margin(y_s, 1/c)

  phi are the inputs of the readout of the chosen network; batch norm uses its running means. After each step that network
  takes one Adam step on the mean squared error on the support (batch norm uses the batch), and another is chosen.
  Labels start divided by sqrt(c / 10). Published settings: ConvNet of depth 3 with 128, 256, 512 channels and batch norm;
  LAMB with rate 3e-4 (cosine); 1,024 targets; 500,000 steps.
  Differences from the published code: on several devices all devices train the same networks (published: different ones,
  whose gradients are averaged), and a negative regularized matrix fails with a status (published: its absolute value is used).

  Args:
    module: the network; `networks.network(conv_net(3), 128, c, norm="batch", width_growth=2)`, or any that `as_network`
      accepts, with features. Its dropout is active in the training steps only.
    options: see `FRePoOptions`.

  Returns:
    A `Method` that learns `x`, and `y` if requested.

  Raises:
    ValueError, TypeError: as `as_network`, and for a network without features.

  References:
    Zhou, Nezhadarya, Ba (2022), FRePo, algorithm 1 and section 3.
  """
  return FRePo(network_of_method(module), options)
