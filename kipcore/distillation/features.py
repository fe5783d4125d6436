"""Shared parts of the methods that learn through finite networks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from kipcore import krr, linalg
from kipcore.distillation.method import Batch
from kipcore.networks import Network
from kipcore.types import Array, ArrayLike, LossInfo

# Ridge, as a fraction of the mean diagonal, of the predictions that samplers and logs use.
_RELATIVE_RIDGE = 1e-3


def draw_networks(
  key: Array, module: Network, x: Float[ArrayLike, "n ..."], num_networks: int
) -> Any:
  """Draws the variables of `num_networks` random networks for inputs like `x`, stacked along a leading axis."""
  with linalg.permissive_promotion():
    return jax.vmap(lambda k: module.init(k, x[:1]))(jax.random.split(key, num_networks))


def draw_network(key: Array, module: Network, x: Float[ArrayLike, "n ..."]) -> Any:
  """Draws the variables of one random network for inputs like `x`."""
  return jax.tree.map(lambda a: a[0], draw_networks(key, module, x, 1))


def features(module: Network, variables: Any, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n p"]:
  """The inputs of the network's readout; batch norm uses its running means."""
  with linalg.permissive_promotion():
    phi: Any = module.apply(variables, x, features=True)
  return phi


def outputs(module: Network, variables: Any, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n c"]:
  """The outputs of the network; batch norm uses its running means."""
  with linalg.permissive_promotion():
    out: Any = module.apply(variables, x)
  return out


def cross_entropy(logits: Float[Array, "n c"], y: Float[Array, "n c"]) -> Float[Array, " n"]:
  """The cross-entropy of each row with the class of its label, its largest entry."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(y, axis=1))


def class_weights(
  y: Float[Array, "n c"], weights: Float[Array, " n"] | None = None
) -> Float[Array, "c n"]:
  """The weight of each row for its own class, the largest entry of its label; 0 for other classes."""
  one_hot = jax.nn.one_hot(jnp.argmax(y, axis=1), y.shape[1], dtype=y.dtype, axis=0)
  return one_hot if weights is None else one_hot * weights[None, :]


def ridge_loss_info(
  phi_support: Float[Array, "m p"],
  y_support: Float[Array, "m c"],
  phi_batch: Float[Array, "t p"],
  batch: Batch,
) -> LossInfo:
  """`LossInfo` of ridge regression from the support to the batch in given features, without gradient.

  For methods without predictions of their own, so that samplers can score the targets (a heuristic). The status
  is always OK: if this regression fails, samplers keep their scores, and the loop checks the method's loss.
  """
  phi_s, phi_t = (jax.lax.stop_gradient(phi) for phi in (phi_support, phi_batch))
  k_ss = linalg.matmul(phi_s, phi_s.T)
  fit = krr.krr_fit(
    k_ss, jax.lax.stop_gradient(y_support), krr.relative_ridge(k_ss, _RELATIVE_RIDGE)
  )
  predictions = linalg.matmul(phi_t, linalg.matmul(phi_s.T, fit.dual.astype(phi_s.dtype)))
  per_example = 0.5 * jnp.mean((predictions - batch.y) ** 2, axis=1)
  return LossInfo(
    per_example, predictions, krr.accuracy(predictions, batch.y), jnp.zeros((), jnp.int32)
  )
