"""Gradient matching (DC, DSA): the support gives a network, class by class, the training gradients that the data give it."""

import dataclasses

import jax
import jax.numpy as jnp

from kipcore import augment, checks, keys
from kipcore.distillation.features import (
  class_weights,
  draw_networks,
  features,
  outputs,
  ridge_loss_info,
)
from kipcore.distillation.method import Batch, Method, Params, sum_over_devices, value_equal
from kipcore.networks import Network
from kipcore.types import Array, Support

_EPS, _TRAIN_BATCH = 1e-6, 256
_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclasses.dataclass(frozen=True)
class GradientMatchingOptions:
  """Choices of DC and DSA.

  Attributes:
    outer_steps: steps after which the network is redrawn; None for `published_loops`.
    inner_steps: passes over the support that train the network after each step; None for `published_loops`.
    network_rate: learning rate of that training, plain SGD.
    augmentation: names for `augment.random_augmentation`, "" for none (DC). `dsa` sets it.
  """

  outer_steps: int | None = None
  inner_steps: int | None = None
  network_rate: float = 0.01
  augmentation: str = ""


def published_loops(images_per_class: float) -> tuple[int, int]:
  """`(outer_steps, inner_steps)` of the nearest published number of images per class, of 1, 10, 20, 30, 40, 50."""
  return _LOOPS[min(_LOOPS, key=lambda published: abs(published - images_per_class))]


def class_gradients(objective, theta, x: Array, y: Array, weights: Array):
  """sum_{t in k} w_t grad_theta objective_t for every class k, each row differentiated once.

  Rows are sorted by class and cut into chunks of one class each, over which a scan goes. So memory is that of a chunk and of
  c gradients, and time that of b rows plus at most c partly filled chunks (not c times b). Differentiable in x.

  Args:
    objective: `(theta, x (q, ...), weights (q,), class) -> scalar`, the weighted sum over rows of that class.
    theta: tree of parameters.
    x: `(b, ...)` rows.
    y: `(b, c)` labels; the largest of a row is its class.
    weights: `(b,)`.

  Returns:
    The tree of theta with leading axis c, zero for classes without rows.
  """
  b, c = y.shape
  labels = jnp.argmax(y, axis=1).astype(jnp.int32)
  order = jnp.argsort(labels)
  counts = jnp.sum(
    labels[None, :] == jnp.arange(c, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32
  )
  # Of equal classes each is one chunk; of large ones four, so that unequal ones leave little of their last chunk empty.
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


def distance(real, made) -> Array:
  """Sum over layers and output units of 1 - cos of their weight gradients, for every class.

      cos = <r, s> / (|r| |s| + 1e-6),   r, s all weights into one unit or channel (the last axis)

  Biases and scales of norms, which have one axis, do not count. A unit without gradient adds the constant 1.

  Args:
    real: tree of `(c, ..., out)` gradients.
    made: the same tree.

  Returns:
    `(c,)`, in [0, 2 units].

  Source: Zhao, Mopuri, Bilen 2021 (DC), "Gradient matching loss"; the 1e-6 is the published code's.
  """

  def norm(a):
    squares = jnp.sum(a * a, axis=1)
    positive = (
      squares > 0
    )  # at 0, where dead units are, the square root has no derivative; 0 is taken
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)

  total = 0.0
  for r, s in zip(jax.tree.leaves(real), jax.tree.leaves(made)):
    if r.ndim > 2:
      r, s = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (r, s))
      total += jnp.sum(1 - jnp.sum(r * s, axis=1) / (norm(r) * norm(s) + _EPS), axis=1)
  return total


@value_equal
def dc(module: Network, options: GradientMatchingOptions = GradientMatchingOptions()) -> Method:
  """Dataset condensation with gradient matching.

      loss = sum_c distance(g_c, h_c)
      g_c = grad_theta sum_{t in c} w_t CE(net(x_t), c) / sum_{t in c} w_t,   h_c = grad_theta mean_{s in c} CE(net(x_s), c)

  The network is redrawn every `outer_steps` steps; between, after each step, it is trained on the support with hard labels
  (the class of a row; labels are not learned) in batches of up to 256 rows. The support is differentiated through h_c,
  a second derivative, and not through that training. Weights act within a class as in `distribution_matching.dm`; a class
  without targets or without support is left out. On several devices the sums of g_c are taken over all of them.
  Samplers see `features.ridge_loss_info` of the rows as they are, without augmentation.
  Published: 1000 networks, so 1000 `outer_steps` steps; SGD of rate 0.1 and momentum 0.5; 256 targets of each class
  ("class_balanced"); ConvNet of depth 3, 128 channels and instance norm; start from noise (DC) or from data (DSA).
  Ours differs in that numbers of images per class other than the six published take the loops of the nearest, and do not
  exit; all classes of a step come in one batch; weights are Gaussian (He) and not uniform; batches of the training have
  equal sizes, the last filled up with rows of the first; with augmentation all rows of such a batch are transformed alike
  (published: one operation, but parameters for each row); seeds repeat.

  Args:
    module: `networks.network(conv_net(3), 128, c, norm="instance")`; batch norm would need statistics of its own.
    options: see `GradientMatchingOptions`.

  Returns:
    A `Method` that learns `x`; its aux is the network's variables.

  Raises:
    ValueError, TypeError: for batch norm, steps below 1, a rate <= 0, or an unknown augmentation.

  Source: Zhao, Mopuri, Bilen 2021 (DC), algorithm 1; Zhao and Bilen 2021 (DSA), algorithm 1. The training is plain SGD as in
  the later published code; the first version had momentum 0.5.
  """
  checks.one_of("norm", module.norm, ("none", "instance"))
  checks.positive("network_rate", options.network_rate)
  for name in ("outer_steps", "inner_steps"):
    if getattr(options, name) is not None:
      checks.positive_int(name, getattr(options, name))
  draw_transform = augment.random_augmentation(options.augmentation)

  def cross_entropies(theta, x: Array, labels: Array) -> Array:
    logits = outputs(module, {"params": theta}, x)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]

  def loss(params: Params, aux, batch: Batch, weights: Array, key: Array):
    theta = aux["params"]

    def objective(theta, x, weights, k):
      # As published, each class has its own transform, which its targets and its support share.
      x = draw_transform(keys.at_step(keys.stream(key, "augment"), k))(x)
      return jnp.sum(weights * cross_entropies(theta, x, jnp.full(x.shape[:1], k)))

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
    made, in_support = mean_gradients(
      params["x"], params["y"], jnp.ones(params["x"].shape[:1], params["x"].dtype)
    )
    value = jnp.sum(jnp.where(in_batch & in_support, distance(real, made), 0))
    phi_s, phi_t = (features(module, aux, jax.lax.stop_gradient(x)) for x in (params["x"], batch.x))
    return value, ridge_loss_info(phi_s, params["y"], phi_t, batch)

  def redraw(key: Array, params: Params):
    return jax.tree.map(lambda a: a[0], draw_networks(key, module, params["x"], 1))

  def train(key: Array, params: Params, aux, passes: int):
    x, labels = params["x"], jnp.argmax(params["y"], axis=1)
    batches = -(-x.shape[0] // _TRAIN_BATCH)

    def descend(theta, draw):
      rows, batch_key = draw
      x_batch = draw_transform(batch_key)(x[rows])
      gradient = jax.grad(lambda theta: jnp.mean(cross_entropies(theta, x_batch, labels[rows])))(
        theta
      )
      return jax.tree.map(lambda a, g: a - options.network_rate * g, theta, gradient), None

    def one_pass(theta, i):
      order_key, augment_key = (
        keys.stream(keys.at_step(key, i), name) for name in ("order", "augment")
      )
      order = jnp.resize(
        jax.random.permutation(order_key, x.shape[0]), (batches, -(-x.shape[0] // batches))
      )
      return jax.lax.scan(descend, theta, (order, jax.random.split(augment_key, batches)))[0], None

    return {"params": jax.lax.scan(one_pass, aux["params"], jnp.arange(passes, dtype=jnp.int32))[0]}

  def update_aux(key: Array, params: Params, aux, step: Array):
    outer, inner = published_loops(params["y"].shape[0] / params["y"].shape[1])
    outer, inner = options.outer_steps or outer, options.inner_steps or inner
    # Every branch has a stream of its own: a key is used once.
    return jax.lax.cond(
      (step + 1) % outer == 0,
      lambda: redraw(keys.stream(key, "redraw"), params),
      lambda: train(keys.stream(key, "train"), params, aux, inner),
    )

  return Method(
    "dc",
    lambda support: {"x": support.x, "y": support.y},
    lambda params, aux: Support(params["x"], params["y"]),
    lambda params: {"x": 1, "y": 0},
    loss,
    redraw,
    update_aux,
  )


@value_equal
def dsa(module: Network, options: GradientMatchingOptions = GradientMatchingOptions()) -> Method:
  """`dc` with differentiable siamese augmentation: all of `augment.DSA`, alike for targets and support of a class.

  Args:
    module: as for `dc`.
    options: as for `dc`, but for the augmentation.

  Returns:
    A `Method`.

  Raises:
    ValueError, TypeError: as `dc`.

  Source: Zhao and Bilen 2021 (DSA), eq. 7.
  """
  return dataclasses.replace(
    dc(module, dataclasses.replace(options, augmentation=augment.DSA)), name="dsa"
  )
