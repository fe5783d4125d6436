"""Experts of MTT: the parameters of networks trained on the targets, after every epoch."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from kipcore import augment, checks, keys, krr, linalg
from kipcore.distillation import samplers
from kipcore.distillation.features import cross_entropy, outputs
from kipcore.distillation.method import Sampler
from kipcore.distillation.targets import Targets, arrange_targets
from kipcore.networks import Network
from kipcore.types import Array, ArrayLike, LossInfo, Status


def flat_parameters(
  module: Network, x: Float[ArrayLike, "n ..."]
) -> tuple[int, Callable[[Float[Array, " p"]], Any]]:
  """The number p of parameters of a network for rows like those of `x`, and the function from `(p,)` to variables.

  Raises:
    ValueError: for a network with variables other than parameters (batch norm).
  """
  row = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
  with linalg.permissive_promotion():
    shapes = jax.eval_shape(module.init, jax.random.key(0), row)
  if set(shapes) != {"params"}:
    raise ValueError(
      f"module: expected a network without other variables than parameters, got {', '.join(sorted(shapes))}"
    )
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["params"])
  flat, unravel = ravel_pytree(zeros)
  return flat.shape[0], lambda vector: {"params": unravel(vector)}


def train_expert(
  key: Any,
  module: Network,
  x: Float[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  num_epochs: int,
  learning_rate: float = 0.01,
  batch_size: int = 256,
  sampler: Sampler = samplers.Uniform(),
  momentum: float = 0.0,
  augmentation: str = "",
) -> Float[Array, "points p"]:
  """Trains one network by SGD on the cross-entropy of hard labels and keeps its parameters after every epoch.

      v <- momentum v + grad mean_i(w_i CE(f(x_i), class of y_i)),   theta <- theta - learning_rate v

  The sampler draws the batch of each step, as in the distillation loop. Its predictions are softmax(f) - 1/c, so that
  "residual_norm" is the norm of the gradient in the logits (EL2N); other scores are heuristics. An epoch is
  ceil(n / batch_size) steps for every sampler. Calls with equal modules, samplers and sizes compile once.
  Published settings: 100 experts of 50 epochs, rate 0.01, no momentum, batch 256, with DSA (`augment.DSA`).
  Differences from the published code: rows are drawn at each step instead of permuted once per epoch, one transform serves
  all images of a step (same expected gradient, more variance), and initial weights are Gaussian (He) instead of uniform.

  Args:
    key: random key (or int seed) of this expert.
    module: the network, without batch norm.
    x: `(n, ...)` rows, floating host array, in any order.
    y: `(n, c)` labels; the largest entry of a row is its class.
    num_epochs: >= 1.
    learning_rate: > 0.
    batch_size: rows per step; n if there are fewer.
    sampler: any sampler with `refresh_every` 0.
    momentum: in [0, 1].
    augmentation: names for `augment.random_augmentation`, one transform per step; "" for none.

  Returns:
    `(num_epochs + 1, p)`: parameters at the start and after each epoch, flattened by `ravel_pytree`, in the dtype of `x`.

  Raises:
    NumericalError: if training diverged.
    ValueError, TypeError: for shapes that disagree, integers, numbers out of range, batch norm, or a sampler with a refresh.

  References:
    Cazenavette et al. (2022), MTT, section 3.1.
  """
  checks.shape("y", y, (None, module.num_outputs))
  checks.floating("x", x)
  num_epochs = checks.positive_int("num_epochs", num_epochs)
  batch_size = checks.positive_int("batch_size", batch_size)
  learning_rate = checks.number("learning_rate", learning_rate, 0, above=True)
  momentum = checks.number("momentum", momentum, 0, 1)
  augment.random_augmentation(augmentation)
  if sampler.refresh_every:
    raise ValueError(f"sampler: expected refresh_every = 0, got {sampler.refresh_every}")
  flat_parameters(module, x)
  key = keys.canonical_key(key)
  targets = jax.tree.map(
    lambda a: jnp.asarray(a[0]), arrange_targets(x, y, 1, keys.stream(key, "arrange"))
  )
  static = (module, sampler, augmentation, num_epochs, min(batch_size, x.shape[0]))
  rates = jnp.asarray([learning_rate, momentum], targets.x.dtype)
  trajectory = _train(*static, key, targets, rates)
  checks.raise_for_status(
    "training of an expert", Status.OK if np.isfinite(trajectory[-1]).all() else Status.NOT_FINITE
  )
  return trajectory


@functools.partial(jax.jit, static_argnums=range(5))
def _train(module, sampler, augmentation, num_epochs, size, key, targets: Targets, rates):
  rate, momentum = rates
  num_rows, num_classes = targets.y.shape
  num_steps = math.ceil(num_rows / size)
  _, variables = flat_parameters(module, targets.x)
  with linalg.permissive_promotion():
    start = ravel_pytree(module.init(keys.stream(key, "init"), targets.x[:1])["params"])[0]

  def step(state, i):
    theta, velocity, sampler_state = state
    step_key = keys.at_step(keys.stream(key, "step"), i)
    indices, weights = sampler.draw(keys.stream(step_key, "draw"), sampler_state, size)
    x, y = targets.x[indices], targets.y[indices]
    x = augment.random_augmentation(augmentation)(keys.stream(step_key, "augment"))(x)

    def loss(theta):
      logits = outputs(module, variables(theta), x)
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
    return (
      theta - rate * velocity,
      velocity,
      sampler.update(sampler_state, indices, y, info),
    ), None

  def epoch(state, i):
    state, _ = jax.lax.scan(step, state, i * num_steps + jnp.arange(num_steps, dtype=jnp.int32))
    return state, state[0]

  first = (start, jnp.zeros_like(start), sampler.init(targets.class_counts, num_rows))
  _, trajectory = jax.lax.scan(epoch, first, jnp.arange(num_epochs, dtype=jnp.int32))
  return jnp.concatenate([start[None], trajectory])
