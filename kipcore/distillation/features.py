"""Shared parts of the methods that learn through finite networks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from kipcore import checks, krr, linalg
from kipcore.distillation.method import Batch
from kipcore.functional import FunctionalNetwork, NetworkLike, as_network
from kipcore.networks import NORMS, Network
from kipcore.types import Array, ArrayLike, LossInfo

# Ridge, as a fraction of the mean diagonal, of the predictions that samplers and logs use.
_RELATIVE_RIDGE = 1e-3


def network_of_method(
  module: NetworkLike, norms: Sequence[str] = NORMS, needs_features: bool = True
) -> FunctionalNetwork:
  """The network of a method as functions.

  Args:
    module: a network of any library.
    norms: the norms that a network of `networks.network` may have; variables of others are checked when the rows are known.
    needs_features: whether the method cannot do without features.

  Raises:
    ValueError, TypeError: for another norm or kind of network, or missing features.
  """
  network = as_network(module)
  if needs_features:
    network.check_features()
  own = own_network(network)
  if own is not None:
    checks.one_of("module.norm", own.norm, norms)
  return network


def own_network(module: NetworkLike) -> Network | None:
  """The network of `networks.network` behind a network, None for those of users."""
  found = getattr(as_network(module), "module", None)
  return found if isinstance(found, Network) else None


def check_no_statistics(network: FunctionalNetwork, x: Float[ArrayLike, "n ..."]) -> None:
  """Raise ValueError for a network of a user with running statistics, which are arbitrary before its training."""
  if own_network(network) is None:
    network.parameters_only(x)


def draw_networks(
  key: Array, module: NetworkLike, x: Float[ArrayLike, "n ..."], num_networks: int
) -> Any:
  """Draws the variables of `num_networks` random networks for inputs like `x`, stacked along a leading axis."""
  network = as_network(module)
  return jax.vmap(lambda k: network.init(k, x[:1]))(jax.random.split(key, num_networks))


def draw_network(key: Array, module: NetworkLike, x: Float[ArrayLike, "n ..."]) -> Any:
  """Draws the variables of one random network for inputs like `x`."""
  return jax.tree.map(lambda a: a[0], draw_networks(key, module, x, 1))


def features(
  module: NetworkLike, variables: Any, x: Float[ArrayLike, "n ..."]
) -> Float[Array, "n p"]:
  """The inputs of the network's readout; batch norm uses its running means."""
  return as_network(module).features(variables, x)


def scored_features(
  module: NetworkLike, variables: Any, x: Float[ArrayLike, "n ..."]
) -> Float[Array, "n p"]:
  """The features for `ridge_loss_info`, or the outputs of a network that does not say what its features are."""
  network = as_network(module)
  return (network.apply if network.features_of is None else network.features)(variables, x)


def outputs(
  module: NetworkLike, variables: Any, x: Float[ArrayLike, "n ..."]
) -> Float[Array, "n c"]:
  """The outputs of the network; batch norm uses its running means."""
  return as_network(module).apply(variables, x)


def training_outputs(
  module: NetworkLike, variables: Any, x: Float[ArrayLike, "n ..."], key: Array
) -> Float[Array, "n c"]:
  """The outputs in training of a network that has parameters only; the key is for dropout."""
  return as_network(module).train(variables, x, key)[0]


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
