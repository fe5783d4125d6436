"""Test accuracy of finite networks trained on a support."""

import dataclasses
import functools
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Shaped

from kipcore import augment, blocks, checks, keys, krr, linalg, networks
from kipcore.architectures import Architecture, Conv, nested
from kipcore.evaluation import protocols
from kipcore.evaluation.krr import check_support
from kipcore.evaluation.protocols import Protocol
from kipcore.functional import NetworkLike, as_network
from kipcore.types import ArrayLike, IntLike, NumericalError, RealLike, Status, Support

# Adam's default rate, 1e-3, overfits networks of dense layers to a few images.
_DENSE_RATE = 1e-4


class Tuned(NamedTuple):
  """The result of `tune`.

  Attributes:
    protocol: the chosen protocol.
    accuracies: mean validation accuracy of each (learning rate, steps) tried.
  """

  protocol: Protocol
  accuracies: dict[tuple[float, int], float]


def evaluate_network(
  key,
  arch: Architecture | NetworkLike,
  support: Support,
  x: Shaped[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  num_seeds: IntLike = 5,
  width: IntLike = 512,
  num_steps: IntLike | None = None,
  learning_rate: RealLike | None = None,
  batch_size: IntLike | None = None,
  norm: str | None = None,
  augmentation: str | None = None,
  protocol: str | Protocol = "default",
  known: MutableMapping[int, float] | None = None,
) -> Float[np.ndarray, " num_seeds"]:
  """Train finite networks on the support by a protocol and score them on held-out rows.

  The test rows are used for nothing but the final score. The default protocol minimizes the mean squared error on the
  labels with Adam and a cosine schedule, and predicts by the output minus that at initialization: with few training rows
  the random initial function would otherwise dominate.

  Args:
    key: random key (or integer seed).
    arch: the architecture; NHWC inputs for a convolutional one. Or any network that `as_network` accepts, such as
      `networks.ResNet`; `width` and `norm` are then ignored. Dropout and batch norm are active in its training.
    support: inputs `(m, ...)` and labels `(m, c)`.
    x: `(n, ...)` test rows.
    y: `(n, c)` test labels; the largest entry of a row is its class.
    num_seeds: number of networks, each with its own initialization and batches.
    width: units or channels, before the first pooling if the protocol has a `width_growth`.
    num_steps: optimizer steps; None for those of the protocol (1,000 by default).
    learning_rate: peak rate; None for that of the protocol, which by default is 1e-3, or 1e-4 for an architecture of
      dense layers only.
    batch_size: support rows per step, at most m; None for that of the protocol (256).
    norm: "none", "instance" or "batch" after each convolution; None for that of the protocol ("none").
    augmentation: names of `augment.random_augmentation` joined with "_" (`augment.DSA` for all of
      them); each step applies a random one of them to its batch. "" for none, None for those of the protocol (none).
    protocol: a name of `protocols.PROTOCOLS` or a `Protocol`: how the networks are trained. A named one augments images
      only, and images of one channel without mirror images.
    known: accuracies by the number of the network, from 0; these networks are not trained again. Those of the others are
      added, each as soon as it is known.

  Returns:
    `(num_seeds,)` accuracies in [0, 1].

  Raises:
    ValueError, TypeError: for shapes that do not match, empty or integer arrays, NaN or infinity,
      a number out of range, or an unknown protocol, norm or augmentation.
    NumericalError: if training met values that are not finite.
  """
  check_support(support, x, y)
  for name, array in (("support.x", support.x), ("support.y", support.y)):
    checks.finite(name, array)
  num_seeds = checks.positive_int("num_seeds", num_seeds)
  images = support.x.ndim == 4
  how = protocols.protocol(protocol, support.x.shape[3] if images else None)
  if how.name == "default" and learning_rate is None and _is_dense(arch):
    learning_rate = _DENSE_RATE
  if learning_rate is not None:
    checks.positive("learning_rate", learning_rate)
  steps = (
    how.num_steps(support.x.shape[0])
    if num_steps is None
    else checks.positive_int("num_steps", num_steps)
  )
  changes: dict[str, Any] = {"batch_size": batch_size, "norm": norm, "augmentation": augmentation}
  how = dataclasses.replace(
    how, **{name: value for name, value in changes.items() if value is not None}
  )
  how = dataclasses.replace(how, batch_size=min(how.batch_size, support.x.shape[0]))
  module = as_network(
    network_of(arch, how, width, support.y.shape[1]) if isinstance(arch, Architecture) else arch
  )
  module.check_outputs(support.x, "support.y", support.y)
  stream = keys.stream(key, "evaluate_network")
  x, y = jnp.asarray(x), jnp.asarray(y)
  rate = how.learning_rate if learning_rate is None else learning_rate
  rate = jnp.asarray(checks.scalar("learning_rate", rate), support.x.dtype)
  # Equal up to the rate, protocols share a compilation.
  options = (module, steps, dataclasses.replace(how, learning_rate=1.0), jax.default_backend())
  known = {} if known is None else known
  for seed in range(num_seeds):
    if seed in known:
      continue
    with linalg.permissive_promotion():
      score = float(_train_and_score(*options, keys.at_step(stream, seed), support, x, y, rate))
    if not np.isfinite(score):
      checks.raise_for_status("training of a finite network", Status.NOT_FINITE)
    known[seed] = score
  return np.array([known[seed] for seed in range(num_seeds)], support.y.dtype)


def tune(
  key,
  arch: Architecture | NetworkLike,
  support: Support,
  x: Shaped[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  protocol: str | Protocol = "default",
  learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3),
  num_steps: Sequence[int] = (),
  num_seeds: IntLike = 2,
  width: IntLike = 512,
) -> Tuned:
  """The learning rate and length of a protocol with the highest mean accuracy on validation rows.

  Args:
    key, arch, support, width: as for `evaluate_network`.
    x: `(n, ...)` validation rows, held out from the training rows; never test rows.
    y: `(n, c)` their labels.
    protocol: the protocol to tune.
    learning_rates: tried rates.
    num_steps: tried lengths; empty for that of the protocol.
    num_seeds: networks per combination.

  Returns:
    `Tuned`. Of equal accuracies the first combination is chosen; one whose training diverges counts as 0.

  Raises:
    ValueError, TypeError: as `evaluate_network`, and for empty `learning_rates`.
  """
  if not learning_rates:
    raise ValueError("learning_rates: expected at least one, got none")
  how = protocols.protocol(protocol, support.x.shape[3] if support.x.ndim == 4 else None)
  accuracies: dict[tuple[float, int], float] = {}
  for steps in num_steps or (how.num_steps(support.x.shape[0]),):
    for rate in learning_rates:
      try:
        scores = evaluate_network(
          key, arch, support, x, y, num_seeds, width, steps, rate, protocol=how
        )
      except NumericalError:
        scores = np.zeros(1)
      accuracies[float(rate), int(steps)] = float(np.mean(scores))
  rate, steps = max(accuracies, key=lambda each: accuracies[each])
  chosen = dataclasses.replace(how, learning_rate=rate, steps=((1, steps),), epochs=0)
  return Tuned(chosen, accuracies)


def network_of(
  arch: Architecture, how: Protocol, width: IntLike, num_outputs: IntLike
) -> networks.Network:
  """The network of an architecture that a protocol trains."""
  return networks.network(
    arch if how.w_std is None else arch.with_stds(how.w_std),
    width,
    num_outputs,
    norm=how.norm,
    width_growth=how.width_growth,
  )


def _is_dense(arch) -> bool:
  return isinstance(arch, Architecture) and not any(
    isinstance(layer, Conv) for layer in nested(arch.layers)
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train_and_score(module, num_steps, how, backend, key, support, x, y, learning_rate):
  start = module.init(keys.stream(key, "init"), support.x[:1])
  variables = train(module, how, num_steps, key, start, support, learning_rate)
  block_size = 100 if backend == "cpu" else 1000  # fits the caches of a CPU

  def predict(block):
    outputs = module.apply(variables, block)
    return outputs - module.apply(start, block) if how.subtract_initial else outputs

  predictions = blocks.map_row_blocks(predict, x, block_size)
  # NaN if any prediction is not finite: argmax would return an arbitrary class.
  return jnp.where(jnp.isfinite(predictions).all(), krr.accuracy(predictions, y), jnp.nan)


def train(
  module: NetworkLike,
  how: Protocol,
  num_steps: int,
  key,
  start: Any,
  support: Support,
  learning_rate=None,
) -> Any:
  """The variables of a network after training on a support; pure, for use under `jit`.

  Args:
    module: the network.
    how: the protocol.
    num_steps: optimizer steps.
    key: random key of batches and transforms.
    start: the variables of the network at the start.
    support: inputs `(m, ...)` and labels `(m, c)`.
    learning_rate: replaces the peak rate of the protocol; may be traced.

  Returns:
    Variables, with the moving average of the parameters if the protocol has one.
  """
  network = as_network(module)
  optimizer = how.transformation(num_steps, learning_rate)
  m, draw = support.x.shape[0], augment.random_augmentation(how.augmentation)
  batch_size = min(how.batch_size, m)
  varied = batch_size < m or how.augmentation or how.cutmix
  # The initial outputs on the support, which are the same at every step if the batch is.
  initial = network.apply(start, support.x) if how.subtract_initial and not varied else None
  params, state = start["params"], {k: v for k, v in start.items() if k != "params"}

  def step(carry, i):
    params, state, average, opt_state = carry
    rows = jax.random.permutation(keys.at_step(keys.stream(key, "batch"), i), m)[:batch_size]
    x_batch, y_batch = support.x[rows], support.y[rows]
    if how.cutmix:
      mix_key = keys.at_step(keys.stream(key, "cutmix"), i)
      x_batch, y_batch = protocols.cutmix(mix_key, x_batch, y_batch)
    x_batch = draw(keys.at_step(keys.stream(key, "augment"), i))(x_batch)
    if how.subtract_initial:
      offset = network.apply(start, x_batch) if initial is None else initial[rows]
      y_batch = y_batch + offset

    def loss(p):
      dropout = keys.at_step(keys.stream(key, "dropout"), i)
      outputs, new = network.train({**state, "params": p}, x_batch, dropout)
      return jnp.mean(how.row_losses(outputs, y_batch)), new

    gradient, state = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    if how.ema:
      average = jax.tree.map(lambda a, p: how.ema * a + (1 - how.ema) * p, average, params)
    return (params, state, average, opt_state), None

  steps = jnp.arange(num_steps, dtype=jnp.int32)
  carry = (params, state, params if how.ema else None, optimizer.init(params))
  (params, state, average, _), _ = jax.lax.scan(step, carry, steps)
  return {**state, "params": average if how.ema else params}
