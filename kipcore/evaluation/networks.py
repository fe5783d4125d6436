"""Test accuracy of finite networks trained on a support."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from kipcore import augment, checks, keys, krr, linalg, networks
from kipcore.architectures import Architecture, Conv
from kipcore.evaluation.krr import check_support
from kipcore.kernels.gram import map_row_blocks
from kipcore.types import Array, Status, Support


def evaluate_network(
  key,
  arch: Architecture | nn.Module,
  support: Support,
  x: Array,
  y: Array,
  num_seeds: int = 5,
  width: int = 512,
  num_steps: int = 1000,
  learning_rate: float | None = None,
  batch_size: int = 256,
  norm: str = "none",
  augmentation: str = "",
) -> np.ndarray:
  """Trains finite networks on the support and scores them on rows they have not seen.

  Each network minimizes the mean squared error on the support's labels with Adam and a
  cosine schedule, on all of the support or on batches of it. What it predicts is its
  output minus its output at initialization: on a handful of points the random function
  that it starts from would otherwise drown what it learned. No step is chosen by looking
  at the test rows.

  Args:
    key: random key (or int seed).
    arch: the architecture; NHWC inputs for a convolutional one. Or any Flax module `(n, ...) -> (n, c)`, such as
      `resnet.ResNet`, which is hashable and has no state but parameters; `width` and `norm` are then its own.
    support: inputs `(m, ...)` and labels `(m, c)`.
    x, y: test rows `(n, ...)` and labels `(n, c)`.
    num_seeds: networks, each with its own initialization and batches.
    width: units or channels.
    num_steps: optimizer steps.
    learning_rate: peak rate; None for 1e-3, or 1e-4 for an architecture of dense layers alone: Adam moves all of their weights
      by the rate, and on a few images 1e-3 moves them further than those images warrant.
    batch_size: support rows a step; all of them if there are fewer.
    norm: "none", or "instance" after each convolution, as DC, DM and MTT evaluate.
    augmentation: names of `distill.augment.random_augmentation` joined with "_" (`augment.DSA` for all of them): each step one of
      these, drawn anew, is done to the images of the batch; "" for none.

  Returns:
    `(num_seeds,)` accuracies in [0, 1].

  Raises:
    ValueError, TypeError: for shapes that disagree, no rows, integers, NaN or infinity, an unknown norm or augmentation.
    NumericalError: where training met values that are not finite.
  """
  check_support(support, x, y)
  for name, array in (("support.x", support.x), ("support.y", support.y)):
    checks.finite(name, array)
  checks.positive_int("num_seeds", num_seeds)
  checks.one_of("norm", norm, ("none", "instance"))
  augment.random_augmentation(augmentation)
  module = (
    arch
    if isinstance(arch, nn.Module)
    else networks.network(arch, width, support.y.shape[1], norm=norm)
  )
  stream = keys.stream(key, "evaluate_network")
  x, y = jnp.asarray(x), jnp.asarray(y)
  if learning_rate is None:
    dense = isinstance(arch, Architecture) and not any(
      isinstance(layer, Conv) for layer in arch.layers
    )
    learning_rate = 1e-4 if dense else 1e-3
  rate = jnp.asarray(learning_rate, support.x.dtype)
  batch_size = min(batch_size, support.x.shape[0])
  with linalg.permissive_promotion():
    scores = np.array(
      [
        _train_and_score(
          module,
          num_steps,
          batch_size,
          augmentation,
          keys.at_step(stream, seed),
          support,
          x,
          y,
          rate,
        )
        for seed in range(num_seeds)
      ]
    )
  if not np.isfinite(scores).all():
    checks.raise_for_status("training of a finite network", Status.NOT_FINITE)
  return scores


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train_and_score(
  module, num_steps, batch_size, augmentation, key, support, x, y, learning_rate
):
  start = params = module.init(keys.stream(key, "init"), support.x[:1])
  optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)
  opt_state = optimizer.init(params)
  m, draw = support.x.shape[0], augment.random_augmentation(augmentation)
  # What the network is at its start, which is not to be learned; the same at every step where the batch is.
  known = module.apply(start, support.x) if batch_size == m and not augmentation else None

  def step(carry, i):
    params, opt_state = carry
    rows = jax.random.permutation(keys.at_step(keys.stream(key, "batch"), i), m)[:batch_size]
    x_batch = draw(keys.at_step(keys.stream(key, "augment"), i))(support.x[rows])
    y_batch = support.y[rows] + (module.apply(start, x_batch) if known is None else known[rows])
    loss = lambda p: jnp.mean((module.apply(p, x_batch) - y_batch) ** 2)
    phase = i.astype(learning_rate.dtype) / num_steps
    opt_state.hyperparams["learning_rate"] = learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * phase))
    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, _), _ = jax.lax.scan(step, (params, opt_state), jnp.arange(num_steps, dtype=jnp.int32))
  # Blocks that stay in the caches of a CPU.
  block_size = 100 if jax.default_backend() == "cpu" else 1000
  predictions = map_row_blocks(
    lambda block: module.apply(params, block) - module.apply(start, block), x, block_size
  )
  # Where the largest of NaN is, is no prediction.
  return jnp.where(jnp.isfinite(predictions).all(), krr.accuracy(predictions, y), jnp.nan)
