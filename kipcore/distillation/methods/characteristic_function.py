"""Characteristic-function matching (NCFM without its sampling network): match the distributions of features of each class."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import augment, checks, keys, linalg
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import (
  check_no_statistics,
  class_weights,
  cross_entropy,
  draw_network,
  features,
  network_of_method,
  outputs,
  ridge_loss_info,
)
from kipcore.distillation.method import Batch, Method, Params, compiled, sum_over_devices
from kipcore.distillation.methods.experts import ExpertArray, flat_parameters
from kipcore.functional import FunctionalNetwork, NetworkLike
from kipcore.types import Array, ArrayLike, Integer, LossInfo, Real, Support

# Factor of the published code.
_SCALE = 300 / 2**0.5


@dataclasses.dataclass(frozen=True)
class NCFMOptions:
  """Options of NCFM.

  Attributes:
    num_frequencies: F, random frequencies per step.
    calibration: weight of the cross-entropy of the trained network on the support; without trajectories there is none.
    augmentation: names for `augment.random_augmentation`, one transform per step; "" for none.
  """

  num_frequencies: Integer = 4096
  calibration: Real = 1.0
  augmentation: str = augment.DSA

  def __post_init__(self):
    option_checks.validate(self, non_negative=("calibration",), counts={"num_frequencies": 1})
    augment.random_augmentation(self.augmentation)


def characteristic_distance(
  real: tuple[Float[Array, "c f"], Float[Array, "c f"]],
  synthetic: tuple[Float[Array, "c f"], Float[Array, "c f"]],
) -> Float[Array, " c"]:
  """The mean over frequencies of |real - synthetic|, for every class.

  Args:
    real: real and imaginary part of the characteristic function of each class at each frequency.
    synthetic: the same.

  Returns:
    `(c,)`, in [0, 2]. Its gradient is 0 where both are equal.
  """
  squares = sum((a - b) ** 2 for a, b in zip(real, synthetic))
  apart = squares > 0
  return jnp.mean(jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0), axis=1)


@dataclasses.dataclass(frozen=True)
class NCFM(Method):
  """The method of `ncfm`; its auxiliary state is the variables of a network, and of the trained network that it lies on the way to."""

  module: FunctionalNetwork
  trajectories: ExpertArray | None
  options: NCFMOptions

  name = "ncfm"

  def init_params(self, support: Support) -> Params:
    if self.trajectories is not None:
      size, _ = flat_parameters(self.module, support.x)
      checks.shape("trajectories", self.trajectories.array, (None, None, size))
    self.module.check_outputs(support.x, "support.y", support.y)
    check_no_statistics(self.module, support.x)
    return {"x": support.x, "y": support.y}

  def trainable(self, params: Params) -> dict[str, float]:
    return {"x": 1.0, "y": 0.0}

  @compiled()
  def init_aux(self, key: Array, params: Params) -> Any:
    if self.trajectories is None:
      return {"network": draw_network(key, self.module, params["x"])}
    count, points, _ = self.trajectories.array.shape
    expert = jax.random.randint(keys.stream(key, "expert"), (), 0, count, jnp.int32)
    dtype = params["x"].dtype
    ends = jnp.array([0, points - 1], jnp.int32)
    initial, trained = self.trajectories.read(expert, ends, dtype)
    share = jax.random.uniform(keys.stream(key, "share"), (), dtype)
    _, variables = flat_parameters(self.module, params["x"])
    return {
      "network": variables(share * initial + (1 - share) * trained),
      "trained": variables(trained),
    }

  @compiled()
  def update_aux(self, key: Array, params: Params, aux: Any, step: Integer) -> Any:
    return self.init_aux(key, params)

  @compiled()
  def loss(
    self, params: Params, aux: Any, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    transform = augment.random_augmentation(self.options.augmentation)(keys.stream(key, "augment"))
    images = transform(params["x"])
    phi_s = features(self.module, aux["network"], images)
    phi_t = jax.lax.stop_gradient(features(self.module, aux["network"], transform(batch.x)))
    frequencies = jax.random.normal(
      keys.stream(key, "frequencies"),
      (self.options.num_frequencies, phi_s.shape[1]),
      phi_s.dtype,
    )
    sums = lambda phi, w: _sums_of_waves(linalg.matmul(_unit(phi), frequencies.T), w)
    of_targets, of_support = class_weights(batch.y, weights), class_weights(params["y"])
    real, mass = sum_over_devices(batch, (sums(phi_t, of_targets), jnp.sum(of_targets, axis=1)))
    count = jnp.sum(of_support, axis=1)
    mean = lambda parts, n: tuple(
      a / jnp.maximum(n, jnp.finfo(n.dtype).tiny)[:, None] for a in parts
    )
    distances = characteristic_distance(mean(real, mass), mean(sums(phi_s, of_support), count))
    value = _SCALE * jnp.sum(jnp.where((mass > 0) & (count > 0), distances, 0))
    if "trained" in aux and self.options.calibration:
      losses = cross_entropy(outputs(self.module, aux["trained"], images), params["y"])
      of_classes = linalg.matmul(of_support, losses[:, None])[:, 0] / jnp.maximum(count, 1)
      value = value + self.options.calibration * jnp.sum(of_classes)
    return value, ridge_loss_info(phi_s, params["y"], phi_t, batch)


def _unit(phi: Float[Array, "n p"]) -> Float[Array, "n p"]:
  """Rows divided by their norm; zero if it is at most 1e-12, where its derivative would overflow."""
  squares = jnp.sum(phi * phi, axis=1, keepdims=True)
  positive = squares > 1e-24
  return phi * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, squares, 1)), 0)


def _sums_of_waves(
  phases: Float[Array, "n f"], weights: Float[Array, "c n"]
) -> tuple[Float[Array, "c f"], Float[Array, "c f"]]:
  return linalg.matmul(weights, jnp.cos(phases)), linalg.matmul(weights, jnp.sin(phases))


def ncfm(
  module: NetworkLike,
  trajectories: Float[ArrayLike, "experts points p"] | None = None,
  options: NCFMOptions = NCFMOptions(),
) -> Method:
  """Matches the characteristic functions of the features of each class, at random frequencies.

      C_real(t) = sum_i w_i exp(i t . phi_i) / sum_i w_i,   phi = features / |features|,   t ~ N(0, I)
      loss = 300 / sqrt(2) sum_c mean_t |C_real,c(t) - C_support,c(t)| + calibration sum_c mean_{s in c} CE(x_s; trained)

  phi are the inputs of the readout. With trajectories, each step draws an expert and uses the network at
  share theta_0 + (1 - share) theta_T, share uniform on [0, 1], of its parameters at the start and at the end of its
  training; CE is the cross-entropy of the network at theta_T. Without them, each step draws a random network, as DM does, and
  there is no calibration. The first term estimates, from F frequencies, a distance of the two distributions of features,
  not only of their means (a mean embedding with a Gaussian kernel). Weights act within a class, as in `dm`; samplers by loss
  score a target by ridge regression from the support in the features.

  This is the published loss at equal weights of amplitude and phase, whose weighted sum is |C_real - C_support|^2 / 2.
  Differences from the published code: no learned network that chooses the frequencies (its ablation has none either), one
  transform per step instead of one per class, one optimizer step for both terms, pixels are not clipped, and an image is one
  image, not four of half the size. Published settings: 20 experts of 60 epochs, 1,024 targets per class, AdamW with
  rate 0.01 for 20,000 steps, ConvNet of depth 3 with 128 channels and instance norm.

  Args:
    module: the experts' network; `networks.network(conv_net(3), 128, c, norm="instance")`, or any that `as_network`
      accepts, with features. Its dropout is never active.
    trajectories: `(experts, epochs + 1, p)`, as for `mtt`; None for random networks.
    options: see `NCFMOptions`.

  Returns:
    A `Method` that learns `x`; labels are constant, and their largest entry is the class.

  Raises:
    ValueError, TypeError: for trajectories without two points or of another network (checked when the support is known), batch
      norm or missing features, or as `as_network`.

  References:
    Wang et al. (CVPR 2025), "Dataset Distillation with Neural Characteristic Function", eqs. 4 to 7.
  """
  network = network_of_method(module)
  if trajectories is None:
    return NCFM(network, None, options)
  read = ExpertArray.of(trajectories)
  if read.array.shape[0] < 1 or read.array.shape[1] < 2:
    raise ValueError(
      f"trajectories: expected at least one expert with at least 2 points, got shape {read.array.shape}"
    )
  return NCFM(network, read, options)
