"""Trajectory matching (MTT): training on the support moves a network as epochs on the data moved an expert."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import augment, checks, keys
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import (
  cross_entropy,
  network_of_method,
  ridge_loss_info,
  scored_features,
  training_outputs,
)
from kipcore.distillation.method import Batch, Method, Params, compiled
from kipcore.distillation.methods.experts import ExpertArray, flat_parameters
from kipcore.functional import FunctionalNetwork, NetworkLike
from kipcore.types import Array, ArrayLike, Integer, LossInfo, Real, Support


@dataclasses.dataclass(frozen=True)
class TrajectoryMatchingOptions:
  """Options of MTT.

  Attributes:
    syn_steps: N, SGD steps of the student on the support.
    expert_epochs: M, epochs of the expert that these steps imitate.
    max_start_epoch: the largest epoch t at which both start.
    syn_batch: support rows per student step; all rows if there are fewer.
    augmentation: names for `augment.random_augmentation`, a new transform at every student step; "" for none.
    initial_rate: first value of the student's learning rate.
    rate_factor: learning rate of its logarithm as a multiple of the optimizer's; 0 keeps it constant.
  """

  syn_steps: Integer = 20
  expert_epochs: Integer = 3
  max_start_epoch: Integer = 25
  syn_batch: Integer = 256
  augmentation: str = augment.DSA
  initial_rate: Real = 0.01
  rate_factor: Real = 1e-4

  def __post_init__(self):
    option_checks.validate(
      self,
      positive=("initial_rate",),
      non_negative=("rate_factor",),
      counts={"syn_steps": 0, "max_start_epoch": 0, "expert_epochs": 1, "syn_batch": 1},
    )
    augment.random_augmentation(self.augmentation)


@dataclasses.dataclass(frozen=True)
class TrajectoryMatching(Method):
  """The method of `mtt`; its auxiliary state is the expert at t and at t + M, `(2, p)`."""

  module: FunctionalNetwork
  trajectories: ExpertArray
  options: TrajectoryMatchingOptions

  name = "mtt"

  def init_params(self, support: Support) -> Params:
    size, _ = flat_parameters(self.module, support.x)
    checks.shape("trajectories", self.trajectories.array, (None, None, size))
    self.module.check_outputs(support.x, "support.y", support.y)
    log_rate = jnp.asarray(math.log(self.options.initial_rate), support.x.dtype)
    return {"x": support.x, "y": support.y, "log_rate": log_rate}

  def trainable(self, params: Params) -> dict[str, float]:
    return {"x": 1.0, "y": 0.0, "log_rate": self.options.rate_factor}

  @compiled()
  def init_aux(self, key: Array, params: Params) -> Float[Array, "2 p"]:
    num_experts, num_epochs = self.trajectories.array.shape[0], self.options.expert_epochs
    expert = jax.random.randint(keys.stream(key, "expert"), (), 0, num_experts, jnp.int32)
    start = jax.random.randint(
      keys.stream(key, "start"), (), 0, self.options.max_start_epoch + 1, jnp.int32
    )
    points = jnp.stack([start, start + num_epochs])
    return self.trajectories.read(expert, points, params["x"].dtype)

  @compiled()
  def update_aux(self, key: Array, params: Params, aux: Any, step: Integer) -> Float[Array, "2 p"]:
    return self.init_aux(key, params)

  @compiled()
  def loss(
    self, params: Params, aux: Array, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    (start, goal), (x, y) = aux, (params["x"], params["y"])
    _, variables = flat_parameters(self.module, x)
    augmentations, dropout = keys.stream(key, "augment"), keys.stream(key, "dropout")
    augmentation = augment.random_augmentation(self.options.augmentation)

    # Inside a scan there is nothing that common-subexpression elimination could merge.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(theta, inputs):
      i, rows, share = inputs
      images = augmentation(keys.at_step(augmentations, i))(x[rows])

      def mean(theta):
        out = training_outputs(self.module, variables(theta), images, keys.at_step(dropout, i))
        return jnp.sum(share * cross_entropy(out, y[rows]))

      return theta - jnp.exp(params["log_rate"]) * jax.grad(mean)(theta), None

    steps = (
      jnp.arange(self.options.syn_steps, dtype=jnp.int32),
      *self._student_batches(keys.stream(key, "order"), x.shape[0], x.dtype),
    )
    end, _ = jax.lax.scan(step, start, steps)
    value = jnp.sum((end - goal) ** 2) / jnp.sum((start - goal) ** 2)
    phi_s, phi_t = (scored_features(self.module, variables(start), rows) for rows in (x, batch.x))
    return value, ridge_loss_info(phi_s, y, phi_t, batch)

  def _student_batches(self, key: Array, num_rows: int, dtype) -> tuple[Array, Array]:
    """Rows and their weights for each student step, both `(N, b)`; padding has weight 0."""
    num_steps, size = self.options.syn_steps, min(self.options.syn_batch, num_rows)
    per_pass = -(-num_rows // size)
    passes = jnp.arange(-(-num_steps // per_pass), dtype=jnp.int32)
    orders = jax.vmap(lambda i: jax.random.permutation(keys.at_step(key, i), num_rows))(
      passes
    ).astype(jnp.int32)
    rows = jnp.pad(orders, ((0, 0), (0, per_pass * size - num_rows)), constant_values=-1)
    rows = rows.reshape(-1, size)[:num_steps]
    kept = (rows >= 0).astype(dtype)
    return rows, kept / jnp.sum(kept, axis=1, keepdims=True)


def mtt(
  module: NetworkLike,
  trajectories: Float[ArrayLike, "experts points p"],
  options: TrajectoryMatchingOptions = TrajectoryMatchingOptions(),
) -> Method:
  """Matches N steps of a student on the support to M epochs of an expert on the data.

      theta_0 = theta*_t,   theta_{i+1} = theta_i - rate grad CE(support rows of step i; theta_i)
      loss = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2

  Each step draws an expert and an epoch t, uniform on 0 .. max_start_epoch. The gradient flows through all student steps
  into the images and log(rate). Student steps are recomputed in the backward pass, which keeps N parameter vectors and no
  activations. The rows of a step are a minibatch of a random permutation, which is renewed when it is used up.
  The loss does not depend on the targets, so a sampler affects MTT through the experts (`train_expert`). Targets are used
  by ridge regression in the features at theta*_t, for logs and samplers.

  Published settings: SGD with rate 1000 and momentum 0.5 for 5000 steps; the student's rate itself by SGD with rate 1e-5.
  Here its logarithm is learned, so that it stays positive: `rate_factor` 1e-4 gives the published step at the starting
  rate 0.01. Optimizers that normalize, such as Adam, need a factor near 1. Other differences from the published code:
  experts are drawn with replacement, t may equal max_start_epoch (as in the paper), and one transform serves all images of
  a step (published: parameters for each image).

  Args:
    module: the experts' network; `networks.network(conv_net(3), 128, c, norm="instance")`, or any that `as_network`
      accepts. Its dropout is active in the training of students. Samplers score the outputs of a network without features.
    trajectories: `(experts, epochs + 1, p)`, an array or a memory map (`load_trajectories(path).array`), which stays on
      disk: each step reads two vectors of p numbers. Several processes need the same file. Methods with different array
      objects are not equal.
    options: see `TrajectoryMatchingOptions`.

  Returns:
    A `Method` that learns `x` and `log_rate`; labels are constant, and their largest entry is the class.

  Raises:
    ValueError, TypeError: for batch norm, or trajectories that are too short or of another network (checked when the
      support is known), or as `as_network`.

  References:
    Cazenavette et al. (2022), MTT, eq. 2 and algorithm 1.
  """
  read = ExpertArray.of(trajectories)
  last = options.max_start_epoch + options.expert_epochs
  if read.array.shape[0] < 1 or read.array.shape[1] <= last:
    raise ValueError(
      f"trajectories: expected at least one expert with at least {last + 1} points "
      f"(max_start_epoch + expert_epochs + 1), got shape {read.array.shape}"
    )
  return TrajectoryMatching(network_of_method(module, needs_features=False), read, options)
