"""Distribution matching (DM): the support has the class means of the data in random networks' features."""

import dataclasses

import jax
import jax.numpy as jnp

from kipcore import augment, keys, linalg
from kipcore.distillation.features import class_weights, draw_networks, features, ridge_loss_info
from kipcore.distillation.method import Batch, Method, Params, sum_over_devices, value_equal
from kipcore.networks import Network
from kipcore.types import Array, Support


@dataclasses.dataclass(frozen=True)
class DMOptions:
  """`augmentation`: names for `augment.random_augmentation`, "" for none."""

  augmentation: str = augment.DSA


@value_equal
def dm(module: Network, options: DMOptions = DMOptions()) -> Method:
  """Matches the mean feature of each class under a new random network at every step.

      loss = sum_c || sum_{t in c} w_t phi(x_t) / sum_{t in c} w_t  -  mean_{s in c} phi(x_s) ||^2

  phi is what the readout of the network sees; targets and support go through the same random augmentation.
  Weights act within a class, so they change which rows make its mean; with weights 1 / (N p_t) it is the usual
  consistent (not unbiased) ratio estimate of the class mean. A class without targets in a batch is left out. On several
  devices the sums are taken over all of them, so that loss and gradient are those of the whole batch.
  Published: 20,000 steps, SGD of rate 1 and momentum 0.5, 256 targets of each class, ConvNet of depth 3, 128
  channels and instance norm. Ours differs in that one augmentation is drawn for all classes of a step (published: one for each
  class), weights are Gaussian (He) and not uniform, and seeds repeat.

  Args:
    module: the network; `networks.network(conv_net(3), 128, c, norm="instance")`.
    options: see `DMOptions`.

  Returns:
    A `Method` that learns `x`; labels stay.

  Raises:
    ValueError: for an unknown augmentation.

  Source: Zhao and Bilen 2023 (DM), eq. 6.
  """
  augmented = augment.random_augmentation(options.augmentation)

  def loss(params: Params, aux, batch: Batch, weights: Array, key: Array):
    transform = augmented(keys.stream(key, "augment"))
    phi_s, phi_t = (
      features(module, aux, transform(params["x"])),
      features(module, aux, transform(batch.x)),
    )
    per_class = class_weights(batch.y, weights)
    sums, mass = jax.lax.stop_gradient(
      sum_over_devices(batch, (linalg.matmul(per_class, phi_t), jnp.sum(per_class, axis=1)))
    )
    own = class_weights(params["y"])
    count = jnp.sum(own, axis=1)
    real = sums / jnp.maximum(mass, jnp.finfo(mass.dtype).tiny)[:, None]
    made = linalg.matmul(own, phi_s) / jnp.maximum(count, 1)[:, None]
    both = ((mass > 0) & (count > 0)).astype(phi_s.dtype)
    value = jnp.sum(both * jnp.sum((real - made) ** 2, axis=1))
    return value, ridge_loss_info(phi_s, params["y"], phi_t, batch)

  def redraw(key: Array, params: Params):
    return jax.tree.map(lambda a: a[0], draw_networks(key, module, params["x"], 1))

  return Method(
    "dm",
    lambda support: {"x": support.x, "y": support.y},
    lambda params, aux: Support(params["x"], params["y"]),
    lambda params: {"x": 1, "y": 0},
    loss,
    redraw,
    lambda key, params, aux, step: redraw(key, params),
  )
