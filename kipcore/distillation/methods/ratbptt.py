"""RaT-BPTT: the loss of a network after training on the set, differentiated through a window of that training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from kipcore import augment, keys, krr, linalg
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import (
  draw_network,
  network_of_method,
  outputs,
  training_outputs,
)
from kipcore.distillation.method import Batch, Method, Params, compiled
from kipcore.evaluation.protocols import label_distribution
from kipcore.functional import FunctionalNetwork, NetworkLike
from kipcore.types import Array, Flag, Integer, LossInfo, Real, Support

LOSSES = ("cross_entropy", "squared_error")
# Share of the uniform distribution in the initial learned labels, whose logits are then finite.
_SMOOTHING = 0.1
# Of soft labels, which are not smoothed.
_LEAST_PROBABILITY = 1e-5


@dataclasses.dataclass(frozen=True)
class RaTBPTTOptions:
  """Options of RaT-BPTT; the defaults are the published values for CIFAR-10.

  Attributes:
    unroll: the most training steps of a network.
    window: its last steps, through which the gradient flows; at most `unroll`.
    inner_rate: Adam learning rate of the network.
    inner_batch_size: support rows in a training step; all rows if there are fewer.
    loss: "cross_entropy" (with labels as `label_distribution`) or "squared_error", of the training and of the targets.
    learn_labels: whether the labels are learned (published for CIFAR-100).
    learn_rate: whether `inner_rate` is learned, on a logarithmic scale.
    augmentation: names for `augment.random_augmentation`, applied to the support and to the targets; "" for none.
    eps_root: added to the second moments of Adam. Its gradient is infinite at a second moment of 0 otherwise, which inactive units have.
  """

  unroll: Integer = 200
  window: Integer = 60
  inner_rate: Real = 1e-3
  inner_batch_size: Integer = 500
  loss: str = "cross_entropy"
  learn_labels: Flag = False
  learn_rate: Flag = False
  augmentation: str = "flip_rotate"
  eps_root: Real = 1e-10

  def __post_init__(self):
    option_checks.validate(
      self,
      positive=("inner_rate", "eps_root"),
      counts={"unroll": 1, "window": 1, "inner_batch_size": 1},
      choices={"loss": LOSSES},
      flags=("learn_labels", "learn_rate"),
    )
    augment.random_augmentation(self.augmentation)
    if self.window > self.unroll:
      raise ValueError(f"window: expected at most unroll = {self.unroll} steps, got {self.window}")


@dataclasses.dataclass(frozen=True)
class RaTBPTT(Method):
  """The method of `rat_bptt`; it has no auxiliary state."""

  module: FunctionalNetwork
  options: RaTBPTTOptions

  name = "ratbptt"

  def init_params(self, support: Support) -> Params:
    self.module.parameters_only(support.x)
    self.module.check_outputs(support.x, "support.y", support.y)
    params = {"x": support.x, "y": support.y}
    if self.options.loss == "cross_entropy":
      labels = label_distribution(support.y)
      params["y"] = _logits(support.y) if self.options.learn_labels else labels
    if self.options.learn_rate:
      params["log_rate"] = jnp.zeros((), support.x.dtype)
    return params

  def support(self, params: Params, aux: Any) -> Support:
    return Support(params["x"], self._labels(params["y"]))

  def trainable(self, params: Params) -> dict[str, float]:
    learned = {"x": 1.0, "y": float(self.options.learn_labels)}
    return {**learned, "log_rate": 1.0} if self.options.learn_rate else learned

  @compiled()
  def loss(
    self, params: Params, aux: Any, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    options = self.options
    last = jax.random.randint(
      keys.stream(key, "window"), (), options.window, options.unroll + 1, jnp.int32
    )
    theta = self._trained(params, last, key)
    transform = augment.random_augmentation(options.augmentation)(keys.stream(key, "targets"))
    out = outputs(self.module, theta, transform(batch.x))
    classes = jnp.argmax(batch.y, axis=1)
    if options.loss == "cross_entropy":
      per_example = optax.softmax_cross_entropy_with_integer_labels(out, classes)
      predictions = jax.nn.softmax(out) - 1 / out.shape[1]
    else:
      per_example, predictions = 0.5 * jnp.sum((out - batch.y) ** 2, axis=1), out
    value = jnp.mean(weights.astype(per_example.dtype) * per_example)
    info = LossInfo(
      per_example, predictions, krr.accuracy(predictions, batch.y), jnp.zeros((), jnp.int32)
    )
    return value, jax.lax.stop_gradient(info)

  def _labels(self, y: Array) -> Array:
    """The labels that networks are trained with, in the convention of the targets."""
    if self.options.loss == "squared_error":
      return y
    return (jax.nn.softmax(y) if self.options.learn_labels else y) - 1 / y.shape[1]

  def _trained(self, params: Params, last: Array, key: Any) -> Any:
    """The variables of a new network after `last` steps; the gradient flows through the last `window` of them."""
    window = self.options.window
    variables = draw_network(keys.stream(key, "network"), self.module, params["x"])
    state = variables, optax.scale_by_adam().init(variables)
    step = self._step(key)
    fixed = jax.lax.stop_gradient(params)
    state = jax.lax.fori_loop(0, last - window, lambda i, state: step(fixed, state, i), state)
    state = jax.lax.stop_gradient(state)

    def remembered(state, i):
      return step(params, state, i), None

    steps = last - window + jnp.arange(window, dtype=jnp.int32)
    (variables, _), _ = jax.lax.scan(jax.checkpoint(remembered), state, steps)
    return variables

  def _step(self, key: Any) -> Callable[[Params, Any, Array], Any]:
    """One Adam step of the network on the support, as a function of the parameters, its state and the step."""
    options = self.options
    adam = optax.scale_by_adam(eps_root=options.eps_root)
    draw = augment.random_augmentation(options.augmentation)
    dropout = keys.stream(key, "dropout")

    def step(params, state, i):
      variables, opt_state = state
      x, y = params["x"], self._labels(params["y"])
      if x.shape[0] > options.inner_batch_size:
        order = jax.random.permutation(keys.at_step(keys.stream(key, "rows"), i), x.shape[0])
        x, y = (a[order[: options.inner_batch_size]] for a in (x, y))
      x = draw(keys.at_step(keys.stream(key, "augment"), i))(x)

      def error(variables):
        out = training_outputs(self.module, variables, x, keys.at_step(dropout, i))
        if options.loss == "squared_error":
          return jnp.mean(0.5 * jnp.sum((out - y) ** 2, axis=1))
        return jnp.mean(optax.softmax_cross_entropy(out, y + 1 / y.shape[1]))

      with linalg.permissive_promotion():
        updates, opt_state = adam.update(jax.grad(error)(variables), opt_state)
        rate = options.inner_rate
        if options.learn_rate:
          rate = rate * jnp.exp(params["log_rate"])
        variables = jax.tree.map(lambda v, u: (v - rate * u).astype(v.dtype), variables, updates)
      return variables, opt_state

    return step


def rat_bptt(module: NetworkLike, options: RaTBPTTOptions = RaTBPTTOptions()) -> Method:
  """The loss on the targets of a network trained on the set, through a random window of its training.

      theta_{i+1} = theta_i - rate Adam(grad_theta mean_s l(f_theta(x_s), y_s)),   theta_0 random
      N uniform on {window, ..., unroll},   loss = mean_t w_t l(f_{theta_N}(x_t), class of t)

  l is the cross-entropy, or half the squared error to centered labels. Each step draws a new network and a new N;
  the gradient flows through the last `window` steps only, with theta_{N - window} constant (truncated backpropagation),
  and through second moments of Adam. With window = unroll it is the exact gradient of the loss. `per_example` and
  `predictions`, which samplers by loss score, are those of the trained network.
  Published settings: ConvNet of depth 3 with 128 channels and instance norm, 5,000 targets, Adam 1e-3 for the images, the
  norm of the gradient clipped to twice its moving average (optimizer "adam_clipped"), up to 60,000 steps.
  Differences from the published code: one transform serves all images of a step (published: one per image), and
  learned labels are distributions.

  Args:
    module: the network, without batch norm; `networks.network(conv_net(3), 128, c, norm="instance")`, or any that
      `as_network` accepts. Its dropout is active in the training.
    options: see `RaTBPTTOptions`.

  Returns:
    A `Method` that learns `x`, and labels and learning rate if requested.

  Raises:
    ValueError, TypeError: for batch norm, or as `as_network`.

  References:
    Feng, Vedantam, Kempe (ICLR 2024), Embarrassingly Simple Dataset Distillation, algorithm 1.
  """
  network = network_of_method(module, ("none", "instance"), needs_features=False)
  return RaTBPTT(network, options)


def _logits(y: Array) -> Array:
  """Logits to be learned: soft labels, centered distributions, are kept up to the least probability; other labels are smoothed."""
  p, labels = y + 1 / y.shape[1], label_distribution(y)
  distribution = (jnp.min(p, axis=1) > -_LEAST_PROBABILITY) & (
    jnp.abs(jnp.sum(p, axis=1) - 1) < _LEAST_PROBABILITY
  )
  soft = (distribution & (jnp.max(p, axis=1) < 1 - _LEAST_PROBABILITY))[:, None]
  smoothed = (1 - _SMOOTHING) * labels + _SMOOTHING / labels.shape[1]
  return jnp.log(jnp.where(soft, jnp.maximum(labels, _LEAST_PROBABILITY), smoothed))
