"""Distribution matching (DM): match the class means of support and data in the features of random networks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import augment, keys, linalg
from kipcore.distillation.features import (
  check_no_statistics,
  class_weights,
  draw_network,
  features,
  network_of_method,
  ridge_loss_info,
)
from kipcore.distillation.method import Batch, Method, Params, compiled, sum_over_devices
from kipcore.functional import FunctionalNetwork, NetworkLike
from kipcore.types import Array, Integer, LossInfo, Support


@dataclasses.dataclass(frozen=True)
class DMOptions:
  """Options of DM.

  Attributes:
    augmentation: names for `augment.random_augmentation`; "" for none.
  """

  augmentation: str = augment.DSA

  def __post_init__(self):
    augment.random_augmentation(self.augmentation)


@dataclasses.dataclass(frozen=True)
class DM(Method):
  """The method of `dm`; its auxiliary state is the variables of one network."""

  module: FunctionalNetwork
  options: DMOptions

  name = "dm"

  def init_params(self, support: Support) -> Params:
    check_no_statistics(self.module, support.x)
    return super().init_params(support)

  @compiled()
  def loss(
    self, params: Params, aux: Any, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    transform = augment.random_augmentation(self.options.augmentation)(keys.stream(key, "augment"))
    phi_s = features(self.module, aux, transform(params["x"]))
    phi_t = features(self.module, aux, transform(batch.x))
    per_class = class_weights(batch.y, weights)
    sums, mass = jax.lax.stop_gradient(
      sum_over_devices(batch, (linalg.matmul(per_class, phi_t), jnp.sum(per_class, axis=1)))
    )
    one_hot = class_weights(params["y"])
    count = jnp.sum(one_hot, axis=1)
    real = sums / jnp.maximum(mass, jnp.finfo(mass.dtype).tiny)[:, None]
    synthetic = linalg.matmul(one_hot, phi_s) / jnp.maximum(count, 1)[:, None]
    both = ((mass > 0) & (count > 0)).astype(phi_s.dtype)
    value = jnp.sum(both * jnp.sum((real - synthetic) ** 2, axis=1))
    return value, ridge_loss_info(phi_s, params["y"], phi_t, batch)

  @compiled()
  def init_aux(self, key: Array, params: Params) -> Any:
    return draw_network(key, self.module, params["x"])

  @compiled()
  def update_aux(self, key: Array, params: Params, aux: Any, step: Integer) -> Any:
    return draw_network(key, self.module, params["x"])


def dm(module: NetworkLike, options: DMOptions = DMOptions()) -> Method:
  """Matches the mean feature of each class under a new random network at every step.

      loss = sum_c || sum_{t in c} w_t phi(x_t) / sum_{t in c} w_t  -  mean_{s in c} phi(x_s) ||^2

  phi are the inputs of the network's readout; targets and support have the same random augmentation. Weights act
  within a class; with weights 1 / (N p_t) the weighted mean is the usual consistent (not unbiased) ratio estimate of
  the class mean. Classes without targets in a batch are left out. On several devices the sums run over all of them.
  The loss is not a sum over targets, so samplers by loss score a target by ridge regression from the support in the features
  phi (`features.ridge_loss_info`); the targets drawn then form the class means.
  Published settings: 20,000 steps, SGD with rate 1 and momentum 0.5, 256 targets per class, ConvNet of depth 3 with 128
  channels and instance norm. Differences from the published code: one augmentation per step (published: one per class),
  and Gaussian (He) instead of uniform initial weights.

  Args:
    module: the network; `networks.network(conv_net(3), 128, c, norm="instance")`, or any that `as_network` accepts, with
      features. Its dropout is never active.
    options: see `DMOptions`.

  Returns:
    A `Method` that learns `x`; labels are constant.

  Raises:
    ValueError, TypeError: for a network of a user with batch norm, whose running statistics a random network has not learned,
      or without features, or as `as_network`.

  References:
    Zhao and Bilen (2023), DM, eq. 6.
  """
  return DM(network_of_method(module), options)
