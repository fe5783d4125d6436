"""Trajectory matching (MTT): training on the support moves a network as some epochs on the data moved an expert."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import augment, checks, keys
from kipcore.distillation.features import cross_entropy, features, outputs, ridge_loss_info
from kipcore.distillation.method import Batch, Method, Params, value_equal
from kipcore.distillation.methods.experts import flat_parameters
from kipcore.networks import Network
from kipcore.types import Array, Support


@dataclasses.dataclass(frozen=True)
class TrajectoryMatchingOptions:
  """Choices of MTT.

  Attributes:
    syn_steps: N, SGD steps of the student on the support.
    expert_epochs: M, epochs of the expert that they should equal.
    max_start_epoch: the largest epoch t from which both start.
    syn_batch: support rows a step; all of them if there are fewer.
    augmentation: names for `augment.random_augmentation`, a new transform every student step; "" for none.
    initial_rate: where the student's learning rate starts.
    rate_factor: learning rate of its logarithm as a factor of the optimizer's; 0 to keep it.
  """

  syn_steps: int = 20
  expert_epochs: int = 3
  max_start_epoch: int = 25
  syn_batch: int = 256
  augmentation: str = augment.DSA
  initial_rate: float = 0.01
  rate_factor: float = 1e-4


@value_equal
def mtt(
  module: Network, trajectories, options: TrajectoryMatchingOptions = TrajectoryMatchingOptions()
) -> Method:
  """Matches N steps of a student on the support to M epochs of an expert on the data.

      theta_0 = theta*_t,   theta_{i+1} = theta_i - rate grad CE(support rows of step i; theta_i)
      loss = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2

  A new expert and epoch t, uniform on 0 .. max_start_epoch, at every step. The gradient flows through all student steps into
  the images and log(rate); each step is recomputed on the way back, so that N parameter vectors are kept and no activations.
  The rows of a step are a minibatch of a random permutation, a new one when it is used up; its last batch may be smaller.
  The loss does not look at the targets: a sampler acts on MTT through the experts (`experts.train_expert`). Targets are only
  read, by ridge regression in the features at theta*_t, for logs and samplers.

  Published: images by SGD of rate 1000 and momentum 0.5 for 5000 steps; the student's rate itself by SGD of rate 1e-5. Ours is
  its logarithm, which cannot turn negative: a step changes the rate by rate_factor * 1000 * rate^2 times the same derivative,
  and 1e-4 makes the two equal at the starting rate 0.01. Optimizers that normalize, such as Adam, need a factor near 1.
  Ours also differs in that experts are drawn with replacement, t may be max_start_epoch itself (as in the paper; the code stops
  before), one transform serves all images of a step (the code draws its parameters for each image), and seeds repeat.

  Args:
    module: the experts' network; `networks.network(conv_net(3), 128, c, norm="instance")`.
    trajectories: `(experts, epochs + 1, p)`, an array or a memory map (`trajectories.load_trajectories(path).array`), which
      stays on disk: each step reads two vectors of p. On several processes each needs the same file.
    options: see `TrajectoryMatchingOptions`.

  Returns:
    A `Method` that learns `x` and `log_rate`; labels stay, of which the largest of a row is its class.

  Raises:
    ValueError, TypeError: for an option out of range, an unknown augmentation, batch norm, or trajectories that are too short
      or of another network (the last two when the support is seen).

  Source: Cazenavette et al. 2022 (MTT), eq. 2 and algorithm 1.
  """
  num_steps, num_epochs, last_start = (
    options.syn_steps,
    options.expert_epochs,
    options.max_start_epoch,
  )
  for name in ("syn_steps", "max_start_epoch", "rate_factor"):
    checks.non_negative(name, getattr(options, name))
  for name in ("expert_epochs", "syn_batch"):
    checks.positive_int(name, getattr(options, name))
  checks.positive("initial_rate", options.initial_rate)
  random_augmentation = augment.random_augmentation(options.augmentation)
  trajectories = np.asarray(trajectories)  # Of a memory map: the same map.
  checks.rank("trajectories", trajectories, 3)
  if trajectories.shape[0] < 1 or trajectories.shape[1] <= last_start + num_epochs:
    raise ValueError(
      f"trajectories: expected {last_start + num_epochs + 1} points or more (max_start_epoch + expert_epochs + 1) "
      f"of one expert or more, got shape {trajectories.shape}"
    )

  def init_params(support: Support) -> Params:
    size, _ = flat_parameters(module, support.x)
    checks.shape("trajectories", trajectories, (None, None, size))
    checks.shape("support.y", support.y, (None, module.num_outputs))
    return {
      "x": support.x,
      "y": support.y,
      "log_rate": jnp.asarray(math.log(options.initial_rate), support.x.dtype),
    }

  def draw(key: Array, params: Params) -> Array:
    """The expert at t and at t + M, `(2, p)`: read by a callback, so that they are no constants of the program."""
    dtype = params["x"].dtype
    # As bytes: a callback has a thread of its own, in which a 64-bit mode that was turned on for a `with` block is off.
    like = jax.ShapeDtypeStruct((2, trajectories.shape[2], dtype.itemsize), jnp.uint8)

    def read(index) -> np.ndarray:
      expert, start = np.asarray(
        index
      )  # And nothing else of JAX: its threads may all be waiting for this callback.
      return (
        trajectories[expert, [start, start + num_epochs]]
        .astype(dtype)
        .view(np.uint8)
        .reshape(like.shape)
      )

    expert = jax.random.randint(keys.stream(key, "expert"), (), 0, trajectories.shape[0], jnp.int32)
    start = jax.random.randint(keys.stream(key, "start"), (), 0, last_start + 1, jnp.int32)
    content = jax.pure_callback(read, like, jnp.stack([expert, start]), vmap_method="sequential")
    return jax.lax.bitcast_convert_type(content, dtype)

  def student_batches(key: Array, num_rows: int, dtype):
    """Rows and their weights for each step, `(N, b)` both; rows of weight 0 fill the last batch of a permutation."""
    size = min(options.syn_batch, num_rows)
    per_pass = -(-num_rows // size)
    passes = jnp.arange(-(-num_steps // per_pass), dtype=jnp.int32)
    orders = jax.vmap(lambda i: jax.random.permutation(keys.at_step(key, i), num_rows))(
      passes
    ).astype(jnp.int32)
    rows = jnp.pad(orders, ((0, 0), (0, per_pass * size - num_rows)), constant_values=-1).reshape(
      -1, size
    )[:num_steps]
    kept = (rows >= 0).astype(dtype)
    return rows, kept / jnp.sum(kept, axis=1, keepdims=True)

  def loss(params: Params, aux: Array, batch: Batch, weights: Array, key: Array):
    del weights
    (start, goal), (x, y) = aux, (params["x"], params["y"])
    _, variables = flat_parameters(module, x)
    augmentations = keys.stream(key, "augment")

    @functools.partial(
      jax.checkpoint, prevent_cse=False
    )  # Inside a scan nothing can be merged across passes.
    def step(theta, inputs):
      i, rows, share = inputs
      images = random_augmentation(keys.at_step(augmentations, i))(x[rows])
      mean = lambda theta: jnp.sum(
        share * cross_entropy(outputs(module, variables(theta), images), y[rows])
      )
      return theta - jnp.exp(params["log_rate"]) * jax.grad(mean)(theta), None

    plan = (
      jnp.arange(num_steps, dtype=jnp.int32),
      *student_batches(keys.stream(key, "order"), x.shape[0], x.dtype),
    )
    end, _ = jax.lax.scan(step, start, plan)
    value = jnp.sum((end - goal) ** 2) / jnp.sum((start - goal) ** 2)
    phi_s, phi_t = (features(module, variables(start), rows) for rows in (x, batch.x))
    return value, ridge_loss_info(phi_s, y, phi_t, batch)

  return Method(
    "mtt",
    init_params,
    lambda params, aux: Support(params["x"], params["y"]),
    lambda params: {"x": 1, "y": 0, "log_rate": options.rate_factor},
    loss,
    draw,
    lambda key, params, aux, step: draw(key, params),
  )
