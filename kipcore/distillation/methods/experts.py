"""Experts of MTT: the parameters of networks trained on the targets, after every epoch."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Shaped

from kipcore import augment, blocks, checks, keys, krr
from kipcore.distillation import samplers
from kipcore.distillation.features import cross_entropy, outputs, training_outputs
from kipcore.distillation.method import Sampler
from kipcore.distillation.targets import Targets, arrange_targets
from kipcore.functional import NetworkLike, as_network
from kipcore.types import Array, ArrayLike, Integer, LossInfo, Status

_BLOCK = 500
# Time between two calls of `progress` within an epoch, and the steps before the first.
_PROGRESS_SECONDS, _FIRST_STEPS = 10.0, 8


class ExpertState(NamedTuple):
  """The training of an expert between two steps: all that the remaining ones depend on.

  Attributes:
    step: steps done.
    parameters: `(p,)` current parameters.
    velocity: `(p,)` of the momentum.
    sampler: arrays of the state of the sampler.
    trajectory: `(epochs done + 1, p)` parameters at the start and after each epoch.
    accuracies: validation accuracy after each epoch; empty without validation rows.
  """

  step: int
  parameters: Float[ArrayLike, " p"]
  velocity: Float[ArrayLike, " p"]
  sampler: tuple[Shaped[ArrayLike, "..."], ...]
  trajectory: Float[ArrayLike, "points p"]
  accuracies: tuple[float, ...] = ()


class ExpertArray:
  """Experts `(experts, points, p)` in memory or on disk; equal only to the same array."""

  def __init__(self, array: np.ndarray):
    self.array = array

  def __eq__(self, other):
    return isinstance(other, ExpertArray) and self.array is other.array

  def __hash__(self):
    return id(self.array)

  @classmethod
  def of(cls, trajectories: Float[ArrayLike, "experts points p"]) -> "ExpertArray":
    """The experts of an array or a memory map, which stays on disk; ValueError unless it has three axes."""
    array = trajectories if isinstance(trajectories, np.ndarray) else np.asarray(trajectories)
    checks.rank("trajectories", array, 3)
    return cls(array)

  def read(self, expert: Array, points: Array, dtype: Any) -> Float[Array, "k p"]:
    """The parameters `(k, p)` of an expert, an index, at `(k,)` points, read when the compiled program runs."""
    array = self.array
    # As bytes: callbacks run on a thread of their own, where a 64-bit mode set by a `with` block is off.
    like = jax.ShapeDtypeStruct(
      (points.shape[0], array.shape[2], jnp.dtype(dtype).itemsize), jnp.uint8
    )

    def content(index) -> np.ndarray:
      # No other use of JAX here: its threads may all be waiting for this callback.
      which, *at = np.asarray(index)
      return np.asarray(array[which, at], dtype).view(np.uint8).reshape(like.shape)

    # A callback, so that the trajectories are not constants of the compiled program.
    index = jnp.concatenate([expert[None], points])
    raw = jax.pure_callback(content, like, index, vmap_method="sequential")
    return jax.lax.bitcast_convert_type(raw, dtype)


def flat_parameters(
  module: NetworkLike, x: Float[ArrayLike, "n ..."]
) -> tuple[int, Callable[[Float[Array, " p"]], Any]]:
  """The number p of parameters of a network for rows like those of `x`, and the function from `(p,)` to variables.

  Raises:
    ValueError: for a network with variables other than parameters (batch norm).
  """
  shapes = as_network(module).parameters_only(x)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  flat, unravel = ravel_pytree(zeros)
  return flat.shape[0], lambda vector: {"params": unravel(vector)}


def train_expert(
  key: Any,
  module: NetworkLike,
  x: Float[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  num_epochs: int,
  learning_rate: float = 0.01,
  batch_size: int = 256,
  sampler: Sampler = samplers.Uniform(),
  momentum: float = 0.0,
  augmentation: str = "",
  validation: tuple[Float[ArrayLike, "m ..."], Float[ArrayLike, "m c"]] | None = None,
  patience: Integer = 0,
  start: ExpertState | None = None,
  progress: Callable[[ExpertState], None] | None = None,
) -> Float[Array, "points p"]:
  """Trains one network by SGD on the cross-entropy of hard labels and keeps its parameters after every epoch.

      v <- momentum v + grad mean_i(w_i CE(f(x_i), class of y_i)),   theta <- theta - learning_rate v

  The sampler draws the batch of each step, as in the distillation loop. Its predictions are softmax(f) - 1/c, so that
  "residual_norm" is the norm of the gradient in the logits (EL2N); other scores are heuristics. An epoch is
  ceil(n / batch_size) steps for every sampler. Calls with equal modules, samplers and sizes compile once.
  Published settings: 100 experts of 50 epochs, rate 0.01, no momentum, batch 256, with DSA (`augment.DSA`).
  Differences from the published code: rows are drawn at each step instead of permuted once per epoch, one transform serves
  all images of a step (same expected gradient, more variance), and initial weights are Gaussian (He) instead of uniform.

  Training can be interrupted: a call with the same arguments and the last state that `progress` received continues from
  there, with the result of an uninterrupted call, bit for bit.

  Args:
    key: random key (or int seed) of this expert.
    module: the network, without batch norm; any that `as_network` accepts. Its dropout is active.
    x: `(n, ...)` rows, floating host array, in any order.
    y: `(n, c)` labels; the largest entry of a row is its class.
    num_epochs: >= 1.
    learning_rate: > 0.
    batch_size: rows per step; n if there are fewer.
    sampler: any sampler with `refresh_every` 0.
    momentum: in [0, 1].
    augmentation: names for `augment.random_augmentation`, one transform per step; "" for none.
    validation: rows and labels whose accuracy is recorded after every epoch; None for none.
    patience: end training when this many epochs in a row have not improved the validation accuracy; 0 for never.
    start: a state of the same training to continue from; None for the beginning.
    progress: called with the state after every epoch, and every few seconds within an epoch.

  Returns:
    `(num_epochs + 1, p)`, or fewer rows if training ended early: parameters at the start and after each epoch, flattened by
    `ravel_pytree`, in the dtype of `x`.

  Raises:
    NumericalError: if training diverged.
    ValueError, TypeError: for shapes that disagree, integers, numbers out of range, batch norm, a sampler with a refresh,
      patience without validation rows, or a state of another training.

  References:
    Cazenavette et al. (2022), MTT, section 3.1.
  """
  checks.floating("x", x)
  network = as_network(module)
  network.check_outputs(x, "y", y)
  num_epochs = checks.positive_int("num_epochs", num_epochs)
  batch_size = checks.positive_int("batch_size", batch_size)
  learning_rate = checks.number("learning_rate", learning_rate, 0, above=True)
  momentum = checks.number("momentum", momentum, 0, 1)
  patience = checks.integer("patience", patience, 0)
  augment.random_augmentation(augmentation)
  if sampler.refresh_every:
    raise ValueError(f"sampler: expected refresh_every = 0, got {sampler.refresh_every}")
  if validation is not None:
    checks.same_rows("validation[0]", validation[0], "validation[1]", validation[1])
    if not len(validation[0]):
      raise ValueError("validation: expected at least one row, got none")
  elif patience:
    raise ValueError(f"patience: expected 0 without validation rows, got {patience}")
  size, _ = flat_parameters(network, x)
  key = keys.canonical_key(key)
  targets = jax.tree.map(
    lambda a: jnp.asarray(a[0]), arrange_targets(x, y, 1, keys.stream(key, "arrange"))
  )
  static = (network, sampler, augmentation, min(batch_size, x.shape[0]))
  rates = jnp.asarray([learning_rate, momentum], targets.x.dtype)
  epoch_steps = math.ceil(x.shape[0] / static[-1])
  first = _first(network, key, targets.x[:1])
  fresh = sampler.init(targets.class_counts, x.shape[0])
  leaves, structure = jax.tree.flatten(fresh)
  if start is None:
    zero = np.zeros_like(first)
    start = ExpertState(0, first, zero, tuple(map(np.asarray, leaves)), np.asarray(first)[None])
  _check_state(start, size, leaves, epoch_steps)
  strong = lambda array: jnp.asarray(np.asarray(array))
  state = (
    strong(start.parameters),
    strong(start.velocity),
    jax.tree.unflatten(structure, map(strong, start.sampler)),
  )
  step, walk, accuracies = start.step, list(np.asarray(start.trajectory)), list(start.accuracies)
  count = _FIRST_STEPS
  while len(walk) <= num_epochs and not _finished(accuracies, patience):
    end = len(walk) * epoch_steps
    last = end if progress is None else min(step + count, end)
    began = time.perf_counter()
    state = jax.block_until_ready(
      _train(*static, key, targets, rates, state, jnp.int32(step), jnp.int32(last))
    )
    rate = (last - step) / max(time.perf_counter() - began, 1e-9)
    count, step = min(max(int(_PROGRESS_SECONDS * rate), 1), 4 * count), last
    if step == end:
      walk.append(np.asarray(state[0]))
      checks.raise_for_status(
        "training of an expert", Status.OK if np.isfinite(walk[-1]).all() else Status.NOT_FINITE
      )
      if validation is not None:
        accuracies.append(float(_accuracy(network, state[0], *map(jnp.asarray, validation))))
    if progress is not None:
      sampler_state = tuple(map(np.asarray, jax.tree.leaves(state[2])))
      parameters, velocity = map(np.asarray, state[:2])
      progress(
        ExpertState(step, parameters, velocity, sampler_state, np.stack(walk), tuple(accuracies))
      )
  return jnp.asarray(np.stack(walk))


def _finished(accuracies: list[float], patience: int) -> bool:
  """Whether the last `patience` epochs have not improved the best accuracy."""
  return (
    bool(patience and accuracies) and len(accuracies) - 1 - int(np.argmax(accuracies)) >= patience
  )


def _check_state(state: ExpertState, size: int, leaves: list, epoch_steps: int) -> None:
  checks.shape("start.parameters", state.parameters, (size,))
  checks.shape("start.velocity", state.velocity, (size,))
  checks.shape("start.trajectory", state.trajectory, (None, size))
  shapes = [np.shape(leaf) for leaf in leaves]
  if (found := [np.shape(array) for array in state.sampler]) != shapes:
    raise ValueError(f"start.sampler: expected arrays of shapes {shapes}, got {found}")
  low = (len(state.trajectory) - 1) * epoch_steps
  if not low <= state.step < low + epoch_steps:
    raise ValueError(
      f"start.step: expected {low} to {low + epoch_steps - 1} after {len(state.trajectory) - 1} epochs, got {state.step}"
    )


@functools.partial(jax.jit, static_argnums=0)
def _first(module, key, row):
  return ravel_pytree(module.init(keys.stream(key, "init"), row)["params"])[0]


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(module, theta, x, y):
  _, variables = flat_parameters(module, x)
  logits = blocks.map_row_blocks(
    lambda rows: outputs(module, variables(theta.astype(x.dtype)), rows), x, _BLOCK
  )
  return krr.accuracy(logits, y)


@functools.partial(jax.jit, static_argnums=range(4))
def _train(module, sampler, augmentation, size, key, targets: Targets, rates, state, first, last):
  """The state (parameters, velocity, sampler) after the steps from `first` to `last`, whose number is not static."""
  rate, momentum = rates
  num_classes = targets.y.shape[1]
  _, variables = flat_parameters(module, targets.x)

  def step(i, state):
    theta, velocity, sampler_state = state
    step_key = keys.at_step(keys.stream(key, "step"), i)
    indices, weights = sampler.draw(keys.stream(step_key, "draw"), sampler_state, size)
    x, y = targets.x[indices], targets.y[indices]
    x = augment.random_augmentation(augmentation)(keys.stream(step_key, "augment"))(x)

    def loss(theta):
      logits = training_outputs(module, variables(theta), x, keys.stream(step_key, "dropout"))
      per_example = cross_entropy(logits, y)
      return jnp.mean(weights.astype(y.dtype) * per_example), (
        per_example,
        jax.nn.softmax(logits) - 1 / num_classes,
      )

    gradient, (per_example, predictions) = jax.grad(loss, has_aux=True)(theta)
    info = LossInfo(
      per_example, predictions, krr.accuracy(predictions, y), jnp.zeros((), jnp.int32)
    )
    velocity = momentum * velocity + gradient
    return theta - rate * velocity, velocity, sampler.update(sampler_state, indices, y, info)

  return jax.lax.fori_loop(first, last, step, state)
