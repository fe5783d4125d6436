"""Gradient matching (DC, DSA): match, class by class, the training gradients of a network on support and data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import augment, keys
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import (
  class_weights,
  draw_network,
  network_of_method,
  outputs,
  ridge_loss_info,
  scored_features,
  training_outputs,
)
from kipcore.distillation.method import Batch, Method, Params, compiled, sum_over_devices
from kipcore.functional import FunctionalNetwork, NetworkLike
from kipcore.types import Array, Integer, LossInfo, Real, Support

_EPS, _TRAIN_BATCH = 1e-6, 256
_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclasses.dataclass(frozen=True)
class GradientMatchingOptions:
  """Options of DC and DSA.

  Attributes:
    outer_steps: steps after which the network is redrawn; None for `published_loops`.
    inner_steps: passes over the support that train the network after each step; None for `published_loops`.
    network_rate: learning rate of that training (SGD without momentum).
    augmentation: names for `augment.random_augmentation`; "" for none (DC). `dsa` sets it.
  """

  outer_steps: Integer | None = None
  inner_steps: Integer | None = None
  network_rate: Real = 0.01
  augmentation: str = ""

  def __post_init__(self):
    option_checks.validate(
      self, positive=("network_rate",), counts={"outer_steps": 1, "inner_steps": 1}
    )
    augment.random_augmentation(self.augmentation)


def published_loops(images_per_class: float) -> tuple[int, int]:
  """`(outer_steps, inner_steps)` of the nearest published number of images per class (1, 10, 20, 30, 40, 50)."""
  return _LOOPS[min(_LOOPS, key=lambda published: abs(published - images_per_class))]


def class_gradients(
  objective: Callable[..., Array],
  theta: Any,
  x: Float[Array, "b ..."],
  y: Float[Array, "b c"],
  weights: Float[Array, " b"],
) -> Any:
  """Computes sum_{t in k} w_t grad_theta objective_t for every class k, differentiating each row once.

  A scan runs over chunks of rows of one class: memory for one chunk and c gradients, time for b rows and at most c
  partly filled chunks. Differentiable in x.

  Args:
    objective: `(theta, x (q, ...), weights (q,), class) -> scalar`, the weighted sum over rows of one class.
    theta: tree of parameters.
    x: `(b, ...)` rows.
    y: `(b, c)` labels; the largest entry of a row is its class.
    weights: `(b,)`.

  Returns:
    A tree like `theta` with leading axis c; zero for classes without rows.
  """
  b, c = y.shape
  labels = jnp.argmax(y, axis=1).astype(jnp.int32)
  order = jnp.argsort(labels)
  counts = jnp.sum(
    labels[None, :] == jnp.arange(c, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32
  )
  # One chunk per class if classes are small; four if they are large, so that the last chunks are mostly full.
  per_class = -(-b // c)
  size = max(min(per_class, 64), -(-per_class // 4))
  chunks = -(-counts // size)
  ends, starts = jnp.cumsum(chunks, dtype=jnp.int32), jnp.cumsum(counts, dtype=jnp.int32) - counts

  def add_chunk(sums, j):
    k = jnp.minimum(jnp.searchsorted(ends, j, side="right").astype(jnp.int32), c - 1)
    place = (j - ends[k] + chunks[k]) * size + jnp.arange(size, dtype=jnp.int32)
    inside = place < counts[k]
    rows = order[jnp.minimum(starts[k] + place, b - 1)]
    chunk_weights = jnp.where(inside, weights[rows], jnp.zeros((), weights.dtype))
    gradient = jax.lax.cond(
      jnp.any(inside),
      lambda rows: jax.grad(objective)(theta, x[rows], chunk_weights, k),
      lambda rows: jax.tree.map(jnp.zeros_like, theta),
      rows,
    )
    return jax.tree.map(lambda total, g: total.at[k].add(g), sums, gradient), None

  zeros = jax.tree.map(lambda leaf: jnp.zeros((c, *leaf.shape), leaf.dtype), theta)
  most = (b + c * (size - 1)) // size  # the largest sum of ceil(counts / size)
  return jax.lax.scan(add_chunk, zeros, jnp.arange(most, dtype=jnp.int32))[0]


def distance(real: Any, synthetic: Any) -> Float[Array, " c"]:
  """The sum over layers and output units of 1 - cos of their weight gradients, for every class.

      cos = <r, s> / (|r| |s| + 1e-6),   r, s all weights into one unit or channel (the last axis)

  Parameters with one axis (biases, scales of norms) are left out. A unit without gradient adds the constant 1.

  Args:
    real: tree of `(c, ..., out)` gradients.
    synthetic: a tree of the same shapes.

  Returns:
    `(c,)`, in [0, 2 units].

  References:
    Zhao, Mopuri, Bilen (2021), DC, "Gradient matching loss"; 1e-6 as in the published code.
  """

  def norm(a):
    squares = jnp.sum(a * a, axis=1)
    positive = squares > 0  # the derivative of the square root is set to 0 at 0 (dead units)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)

  total: Any = 0.0
  for r, s in zip(jax.tree.leaves(real), jax.tree.leaves(synthetic)):
    if r.ndim > 2:
      r, s = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (r, s))
      total += jnp.sum(1 - jnp.sum(r * s, axis=1) / (norm(r) * norm(s) + _EPS), axis=1)
  return total


@dataclasses.dataclass(frozen=True)
class GradientMatching(Method):
  """The method of `dc` and `dsa`; its auxiliary state is the variables of one network."""

  module: FunctionalNetwork
  options: GradientMatchingOptions
  name: str = "dc"

  def init_params(self, support: Support) -> Params:
    self.module.parameters_only(support.x)
    return super().init_params(support)

  @compiled()
  def loss(
    self, params: Params, aux: Any, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    theta = aux["params"]

    def objective(theta, x, weights, k):
      # As published, each class has its own transform, shared by its targets and its support.
      x = self._transform(keys.at_step(keys.stream(key, "augment"), k))(x)
      return jnp.sum(
        weights
        * _cross_entropies(outputs(self.module, {"params": theta}, x), jnp.full(x.shape[:1], k))
      )

    def mean_gradients(x, y, weights, total=lambda sums: sums):
      mass = jnp.sum(class_weights(y.astype(x.dtype), weights), axis=1)
      sums, mass = total((class_gradients(objective, theta, x, y, weights), mass))
      one = jnp.where(mass > 0, mass, 1)
      return jax.tree.map(lambda a: a / jnp.expand_dims(one, range(1, a.ndim)), sums), mass > 0

    real, in_batch = jax.lax.stop_gradient(
      mean_gradients(
        batch.x, batch.y, weights.astype(batch.x.dtype), lambda sums: sum_over_devices(batch, sums)
      )
    )
    synthetic, in_support = mean_gradients(
      params["x"], params["y"], jnp.ones(params["x"].shape[:1], params["x"].dtype)
    )
    value = jnp.sum(jnp.where(in_batch & in_support, distance(real, synthetic), 0))
    phi_s, phi_t = (
      scored_features(self.module, aux, jax.lax.stop_gradient(x)) for x in (params["x"], batch.x)
    )
    return value, ridge_loss_info(phi_s, params["y"], phi_t, batch)

  @compiled()
  def init_aux(self, key: Array, params: Params) -> Any:
    return draw_network(key, self.module, params["x"])

  @compiled()
  def update_aux(self, key: Array, params: Params, aux: Any, step: Integer) -> Any:
    outer, inner = published_loops(params["y"].shape[0] / params["y"].shape[1])
    outer, inner = self.options.outer_steps or outer, self.options.inner_steps or inner
    # Each branch has its own stream: a key is used once.
    return jax.lax.cond(
      (step + 1) % outer == 0,
      lambda: self.init_aux(keys.stream(key, "redraw"), params),
      lambda: self._train(keys.stream(key, "train"), params, aux, inner),
    )

  def _transform(self, key: Array) -> Callable[[Array], Array]:
    return augment.random_augmentation(self.options.augmentation)(key)

  def _train(self, key: Array, params: Params, aux: Any, passes: int) -> Any:
    """The network after `passes` passes of SGD over the support."""
    x, labels = params["x"], jnp.argmax(params["y"], axis=1)
    batches = -(-x.shape[0] // _TRAIN_BATCH)

    def descend(theta, draw):
      rows, batch_key, dropout = draw
      x_batch = self._transform(batch_key)(x[rows])

      def mean(theta):
        out = training_outputs(self.module, {"params": theta}, x_batch, dropout)
        return jnp.mean(_cross_entropies(out, labels[rows]))

      gradient = jax.grad(mean)(theta)
      return jax.tree.map(lambda a, g: a - self.options.network_rate * g, theta, gradient), None

    def one_pass(theta, i):
      order_key, *others = (
        keys.stream(keys.at_step(key, i), name) for name in ("order", "augment", "dropout")
      )
      order = jnp.resize(
        jax.random.permutation(order_key, x.shape[0]), (batches, -(-x.shape[0] // batches))
      )
      draws = (order, *(jax.random.split(other, batches) for other in others))
      return jax.lax.scan(descend, theta, draws)[0], None

    return {"params": jax.lax.scan(one_pass, aux["params"], jnp.arange(passes, dtype=jnp.int32))[0]}


def dc(module: NetworkLike, options: GradientMatchingOptions = GradientMatchingOptions()) -> Method:
  """Dataset condensation with gradient matching.

      loss = sum_c distance(g_c, h_c)
      g_c = grad_theta sum_{t in c} w_t CE(net(x_t), c) / sum_{t in c} w_t,   h_c = grad_theta mean_{s in c} CE(net(x_s), c)

  The network is redrawn every `outer_steps` steps; after each other step it is trained on the support with hard labels in
  batches of up to 256 rows. The gradient flows through h_c (a second derivative), not through that training. Weights act
  within a class, as in `dm`; classes without targets or without support are left out. On several devices the sums of g_c
  run over all of them. Samplers score the targets without augmentation (`features.ridge_loss_info`).
  Published settings: 1000 networks, so 1000 `outer_steps` steps; SGD with rate 0.1 and momentum 0.5; 256 targets per class
  ("class_balanced"); ConvNet of depth 3 with 128 channels and instance norm; start from noise (DC) or data (DSA).
  Differences from the published code: other numbers of images per class use the loops of the nearest published one; one
  batch has all classes; Gaussian (He) instead of uniform initial weights; training batches have equal sizes; one transform
  serves all rows of a training batch (published: parameters for each row).

  Args:
    module: `networks.network(conv_net(3), 128, c, norm="instance")`, or any network that `as_network` accepts, whose weights
      have the outputs of a layer on their last axis; batch norm is not supported. Dropout is active in its training,
      not in the gradients that are matched. Samplers score the outputs of a network without features.
    options: see `GradientMatchingOptions`.

  Returns:
    A `Method` that learns `x`.

  Raises:
    ValueError, TypeError: for batch norm, or as `as_network`.

  References:
    Zhao, Mopuri, Bilen (2021), DC, algorithm 1; Zhao and Bilen (2021), DSA, algorithm 1. Training is plain SGD, as in
    the later published code; the first version had momentum 0.5.
  """
  return GradientMatching(_network(module), options)


def dsa(
  module: NetworkLike, options: GradientMatchingOptions = GradientMatchingOptions()
) -> Method:
  """`dc` with differentiable siamese augmentation, `augment.DSA`.

  Args:
    module: as for `dc`.
    options: as for `dc`, except for the augmentation, which is replaced.

  Returns:
    A `Method`.

  Raises:
    ValueError, TypeError: as `dc`.

  References:
    Zhao and Bilen (2021), DSA, eq. 7.
  """
  return GradientMatching(
    _network(module), dataclasses.replace(options, augmentation=augment.DSA), name="dsa"
  )


def _network(module: NetworkLike) -> FunctionalNetwork:
  return network_of_method(module, ("none", "instance"), needs_features=False)


def _cross_entropies(logits: Array, labels: Array) -> Array:
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
