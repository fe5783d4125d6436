"""Test accuracy of finite networks trained on a support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Float, Shaped

from kipcore import augment, blocks, checks, keys, krr, linalg, networks
from kipcore.architectures import Architecture, Conv
from kipcore.evaluation.krr import check_support
from kipcore.types import ArrayLike, IntLike, RealLike, Status, Support


def evaluate_network(
  key,
  arch: Architecture | nn.Module,
  support: Support,
  x: Shaped[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  num_seeds: IntLike = 5,
  width: IntLike = 512,
  num_steps: IntLike = 1000,
  learning_rate: RealLike | None = None,
  batch_size: IntLike = 256,
  norm: str = "none",
  augmentation: str = "",
) -> Float[np.ndarray, " num_seeds"]:
  """Train finite networks on the support and score them on held-out rows.

  Each network minimizes the mean squared error on the labels of the support with Adam and a
  cosine schedule, on all of the support or on batches of it. Its prediction is its output minus
  its output at initialization: with few training rows the random initial function would otherwise
  dominate. The test rows are used for nothing but the final score.

  Args:
    key: random key (or integer seed).
    arch: the architecture; NHWC inputs for a convolutional one. Or any Flax module
      `(n, ...) -> (n, c)`, such as `networks.ResNet`, that is hashable and has no state other than
      parameters; `width` and `norm` are then ignored.
    support: inputs `(m, ...)` and labels `(m, c)`.
    x: `(n, ...)` test rows.
    y: `(n, c)` test labels; the largest entry of a row is its class.
    num_seeds: number of networks, each with its own initialization and batches.
    width: units or channels.
    num_steps: optimizer steps.
    learning_rate: peak rate; None for 1e-3, or 1e-4 for an architecture of dense layers alone,
      which 1e-3 overfits to a few images.
    batch_size: support rows per step, at most m.
    norm: "none", or "instance" after each convolution, as DC, DM and MTT evaluate.
    augmentation: names of `augment.random_augmentation` joined with "_" (`augment.DSA` for all of
      them); each step applies a random one of them to its batch. "" for none.

  Returns:
    `(num_seeds,)` accuracies in [0, 1].

  Raises:
    ValueError, TypeError: for shapes that do not match, empty or integer arrays, NaN or infinity,
      a number out of range, or an unknown norm or augmentation.
    NumericalError: if training met values that are not finite.
  """
  check_support(support, x, y)
  for name, array in (("support.x", support.x), ("support.y", support.y)):
    checks.finite(name, array)
  num_seeds = checks.positive_int("num_seeds", num_seeds)
  num_steps = checks.positive_int("num_steps", num_steps)
  batch_size = min(checks.positive_int("batch_size", batch_size), support.x.shape[0])
  checks.one_of("norm", norm, ("none", "instance"))
  augment.random_augmentation(augmentation)
  if learning_rate is None:
    dense = isinstance(arch, Architecture) and not any(
      isinstance(layer, Conv) for layer in arch.layers
    )
    learning_rate = 1e-4 if dense else 1e-3
  checks.positive("learning_rate", learning_rate)
  module = (
    arch
    if isinstance(arch, nn.Module)
    else networks.network(arch, width, support.y.shape[1], norm=norm)
  )
  stream = keys.stream(key, "evaluate_network")
  x, y = jnp.asarray(x), jnp.asarray(y)
  rate = jnp.asarray(checks.scalar("learning_rate", learning_rate), support.x.dtype)
  options = (module, num_steps, batch_size, augmentation, jax.default_backend())
  with linalg.permissive_promotion():
    scores = np.array(
      [
        _train_and_score(*options, keys.at_step(stream, seed), support, x, y, rate)
        for seed in range(num_seeds)
      ]
    )
  if not np.isfinite(scores).all():
    checks.raise_for_status("training of a finite network", Status.NOT_FINITE)
  return scores


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _train_and_score(
  module, num_steps, batch_size, augmentation, backend, key, support, x, y, learning_rate
):
  start = params = module.init(keys.stream(key, "init"), support.x[:1])
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
  m, draw = support.x.shape[0], augment.random_augmentation(augmentation)
  # The initial outputs on the support, which are the same at every step if the batch is.
  initial = module.apply(start, support.x) if batch_size == m and not augmentation else None

  def step(carry, i):
    params, opt_state = carry
    rows = jax.random.permutation(keys.at_step(keys.stream(key, "batch"), i), m)[:batch_size]
    x_batch = draw(keys.at_step(keys.stream(key, "augment"), i))(support.x[rows])
    offset = module.apply(start, x_batch) if initial is None else initial[rows]
    loss = lambda p: jnp.mean((module.apply(p, x_batch) - (support.y[rows] + offset)) ** 2)
    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  steps = jnp.arange(num_steps, dtype=jnp.int32)
  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), steps)
  block_size = 100 if backend == "cpu" else 1000  # fits the caches of a CPU
  predictions = blocks.map_row_blocks(
    lambda block: module.apply(params, block) - module.apply(start, block), x, block_size
  )
  # NaN if any prediction is not finite: argmax would return an arbitrary class.
  return jnp.where(jnp.isfinite(predictions).all(), krr.accuracy(predictions, y), jnp.nan)
