"""Shared parts of the methods that learn through finite networks: draws, features, and what samplers look at."""

import jax
import jax.numpy as jnp
import optax

from kipcore import krr, linalg
from kipcore.distillation.method import Batch, LossInfo
from kipcore.networks import Network
from kipcore.types import Array

# Ridge, as a fraction of the mean diagonal, of predictions that only samplers and logs look at.
_READING_RIDGE = 1e-3


def draw_networks(key: Array, module: Network, x: Array, num_networks: int):
  """Variables of `num_networks` random networks, stacked along a leading axis, for rows like those of `x`."""
  with linalg.permissive_promotion():
    return jax.vmap(lambda k: module.init(k, x[:1]))(jax.random.split(key, num_networks))


def features(module: Network, variables, x: Array) -> Array:
  """What the readout of one network sees, `(n, p)`; batch norm by its running means."""
  with linalg.permissive_promotion():
    return module.apply(variables, x, features=True)


def outputs(module: Network, variables, x: Array) -> Array:
  """`(n, c)`; batch norm by its running means."""
  with linalg.permissive_promotion():
    return module.apply(variables, x)


def cross_entropy(logits: Array, y: Array) -> Array:
  """`(n,)`, against the class of each row of `y`."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(y, axis=1))


def class_weights(y: Array, weights: Array | None = None) -> Array:
  """`(c, n)`: the weight of each row for its own class, whose label is the largest of its row; 0 for other classes."""
  one_hot = jax.nn.one_hot(jnp.argmax(y, axis=1), y.shape[1], dtype=y.dtype, axis=0)
  return one_hot if weights is None else one_hot * weights[None, :]


def ridge_loss_info(
  phi_support: Array, y_support: Array, phi_batch: Array, batch: Batch
) -> LossInfo:
  """`LossInfo` of ridge regression from the support to the batch in given features; no gradient.

  For methods without predictions of their own: how badly the distilled set, read through the network
  at hand, predicts each target, which is what samplers by loss draw by. A heuristic. The status is OK even where
  this regression failed: samplers then keep their scores, and the method's own loss is what must be finite.
  """
  phi_s, phi_t = (jax.lax.stop_gradient(phi) for phi in (phi_support, phi_batch))
  k_ss = linalg.matmul(phi_s, phi_s.T)
  fit = krr.krr_fit(
    k_ss, jax.lax.stop_gradient(y_support), krr.relative_ridge(k_ss, _READING_RIDGE)
  )
  predictions = linalg.matmul(phi_t, linalg.matmul(phi_s.T, fit.dual.astype(phi_s.dtype)))
  per_example = 0.5 * jnp.mean((predictions - batch.y) ** 2, axis=1)
  return LossInfo(
    per_example, predictions, krr.accuracy(predictions, batch.y), jnp.zeros((), jnp.int32)
  )
