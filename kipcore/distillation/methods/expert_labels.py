"""Labels and scores from an expert: a network trained on the full data and stopped early."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from kipcore import blocks, checks, keys
from kipcore.architectures import Architecture
from kipcore.distillation.features import outputs, own_network
from kipcore.distillation.methods.experts import flat_parameters
from kipcore.evaluation import networks as network_evaluation
from kipcore.evaluation.protocols import Protocol
from kipcore.functional import NetworkLike, as_network
from kipcore.types import Array, ArrayLike, Integer, Real, Support

_BLOCK = 500


class ExpertChoice(NamedTuple):
  """The epoch of an expert that `choose_expert` found.

  Attributes:
    epoch: index into the trajectory.
    accuracies: mean validation accuracy of students by epoch.
  """

  epoch: int
  accuracies: dict[int, float]


def expert_labels(
  module: NetworkLike,
  parameters: Float[ArrayLike, " p"],
  x: Float[ArrayLike, "n ..."],
  temperature: Real = 1.0,
) -> Float[Array, "n c"]:
  """The predictions of an expert as labels, softmax(f(x) / temperature) - 1/c.

  Args:
    module: the network of the expert.
    parameters: `(p,)`, one row of the result of `train_expert`.
    x: `(n, ...)` rows, real or learned.
    temperature: > 0; larger values make labels more uniform.

  Returns:
    `(n, c)` centered distributions; `label_distribution` gives the probabilities.

  Raises:
    ValueError, TypeError: for another number of parameters, integer rows, or a temperature <= 0.

  References:
    Qin, Deng, Alvarez-Melis (2024), A Label is Worth a Thousand Images.
  """
  temperature = checks.number("temperature", temperature, 0, above=True)
  logits = _logits(module, parameters, x)
  return jax.nn.softmax(logits / temperature) - 1 / logits.shape[1]


def expert_losses(
  module: NetworkLike,
  parameters: Float[ArrayLike, " p"],
  x: Float[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
) -> Float[Array, " n"]:
  """The cross-entropy of an expert on each row; RDED selects the rows of each class where it is lowest.

  Args:
    module: the network of the expert.
    parameters: `(p,)`, one row of the result of `train_expert`.
    x: `(n, ...)` rows.
    y: `(n, c)` labels; the largest entry of a row is its class.

  Returns:
    `(n,)` losses.

  Raises:
    ValueError, TypeError: as `expert_labels`.

  References:
    Sun et al. (CVPR 2024), RDED; here one crop per image, the image itself.
  """
  checks.same_rows("x", x, "y", y)
  logits = _logits(module, parameters, x)
  return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(jnp.asarray(y), axis=1))


def choose_expert(
  key: Any,
  module: NetworkLike,
  trajectory: Float[ArrayLike, "epochs p"],
  rows: Float[ArrayLike, "m ..."],
  x: Float[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  arch: Architecture | NetworkLike | None = None,
  epochs: Sequence[int] | None = None,
  protocol: str | Protocol = "soft",
  width: Integer = 32,
  num_steps: Integer | None = None,
  num_seeds: Integer = 1,
  norm: str | None = None,
) -> ExpertChoice:
  """The epoch whose labels teach students best, by their mean accuracy on validation rows.

  Few images want an early, soft expert; the best epoch therefore depends on their number.

  Args:
    key: random key (or int seed) of the students.
    module: the network of the expert.
    trajectory: `(epochs, p)`, from `train_expert`.
    rows: `(m, ...)` the rows to label.
    x: `(n, ...)` validation rows, on which neither the expert nor the student is trained.
    y: `(n, c)` their labels.
    arch: architecture or network of the students; None for that of the expert.
    epochs: tried indices into `trajectory`; None for 1, 2, 4, ... and the last.
    protocol: how students are trained.
    width: of the students.
    num_steps: of the students; None for those of the protocol.
    num_seeds: students per epoch.
    norm: normalization of the students; None for that of the protocol.

  Returns:
    `ExpertChoice`; of equal accuracies the earliest epoch.

  Raises:
    ValueError, TypeError: for an epoch out of range, or as `evaluate_network`.
  """
  last = trajectory.shape[0] - 1
  if arch is None:
    own = own_network(module)
    arch = module if own is None else own.arch
  if epochs is None:
    epochs = sorted({2**i for i in range(last.bit_length())} | {last})
  accuracies: dict[int, float] = {}
  for epoch in epochs:
    checks.in_range("epochs", epoch, 0, last)
    labels = expert_labels(module, trajectory[epoch], rows)
    scores = network_evaluation.evaluate_network(
      keys.stream(key, "choose_expert"),
      arch,
      Support(jnp.asarray(rows), labels),
      x,
      y,
      num_seeds,
      width,
      num_steps,
      norm=norm,
      protocol=protocol,
    )
    accuracies[int(epoch)] = float(np.mean(scores))
  return ExpertChoice(max(accuracies, key=lambda epoch: accuracies[epoch]), accuracies)


def _logits(module: NetworkLike, parameters, x) -> Array:
  module, x, parameters = as_network(module), jnp.asarray(x), jnp.asarray(parameters)
  checks.floating("x", x)
  size, variables = flat_parameters(module, x)
  checks.shape("parameters", parameters, (size,))
  return _applied(module, variables(parameters.astype(x.dtype)), x)


@functools.partial(jax.jit, static_argnums=0)
def _applied(module, variables, x):
  return blocks.map_row_blocks(lambda rows: outputs(module, variables, rows), x, _BLOCK)
