"""Optimizers of the published methods, by name and hashable by value, for the commands."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from kipcore import checks
from kipcore.types import Array, Integer, Real

# The published factor and decay of RaT-BPTT.
_CLIP_FACTOR, _CLIP_DECAY = 2.0, 0.9


class MovingNorm(NamedTuple):
  """The moving average of the norm of the gradient, and the number of steps."""

  average: Array
  count: Array  # type: ignore[assignment]


def clip_by_moving_norm(
  factor: float = _CLIP_FACTOR, decay: float = _CLIP_DECAY
) -> optax.GradientTransformation:
  """Scales gradients down to `factor` times the moving average of their norm, in which they then count.

  The average is corrected for its start; the first gradient passes unchanged.

  Args:
    factor: > 0.
    decay: of the average, in [0, 1).

  Returns:
    An optax transformation.
  """

  def init(params):
    dtype = jax.tree.leaves(params)[0].dtype
    return MovingNorm(jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    squares = sum(jnp.sum(u * u) for u in jax.tree.leaves(updates))
    norm = jnp.sqrt(squares).astype(state.average.dtype)
    corrected = state.average / (1 - decay ** jnp.maximum(state.count, 1).astype(norm.dtype))
    limit = jnp.where(state.count > 0, factor * corrected, norm)
    scale = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1)
    average = decay * state.average + (1 - decay) * scale * norm
    return jax.tree.map(lambda u: u * scale, updates), MovingNorm(average, state.count + 1)

  return optax.GradientTransformation(init, update)


# SGD with momentum 0.5 is the optimizer of DC, DSA, DM and MTT.
OPTIMIZERS = {
  "adam": optax.adam,
  "adam_clipped": lambda rate: optax.chain(clip_by_moving_norm(), optax.adam(rate)),
  "adabelief": optax.adabelief,
  "lamb": optax.lamb,
  "sgd": lambda rate: optax.sgd(rate, momentum=0.5),
}
SCHEDULES = ("constant", "cosine")


@runtime_checkable
class Optimizer(Protocol):
  """Anything with the `init` and `update` of an `optax.GradientTransformation`, such as that."""

  @property
  def init(self) -> Any: ...

  @property
  def update(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class NamedOptimizer:
  """An optax transformation described by its settings, so that equal settings are equal.

  Attributes:
    name: "adam", "adam_clipped" (RaT-BPTT), "adabelief" (RFAD, RCIG), "lamb" (FRePo) or "sgd" (momentum 0.5: DC, DSA, DM, MTT).
    learning_rate: > 0, the initial rate.
    num_steps: length of the cosine schedule; unused by a constant schedule.
    schedule: "constant" or "cosine" (decays to zero).
  """

  name: str
  learning_rate: Real
  num_steps: Integer
  schedule: str = "constant"

  def __post_init__(self):
    checks.one_of("optimizer", self.name, tuple(OPTIMIZERS))
    checks.one_of("schedule", self.schedule, SCHEDULES)
    rate = checks.number("learning_rate", self.learning_rate, 0, above=True)
    num_steps = checks.integer("num_steps", self.num_steps, 0)
    object.__setattr__(self, "learning_rate", rate)
    object.__setattr__(self, "num_steps", 0 if self.schedule == "constant" else num_steps)

  def transformation(self) -> optax.GradientTransformation:
    """The optax transformation."""
    rate = self.learning_rate
    if self.schedule == "cosine":
      rate = optax.cosine_decay_schedule(rate, max(self.num_steps, 1))
    return OPTIMIZERS[self.name](rate)

  def init(self, params):
    """As of an optax transformation."""
    return self.transformation().init(params)

  def update(self, updates, state, params=None):
    """As of an optax transformation."""
    return self.transformation().update(updates, state, params)


def optimizer(
  name: str, learning_rate: float, num_steps: int, schedule: str = "constant"
) -> optax.GradientTransformation:
  """Deprecated: use an optax optimizer.

  Args:
    name: "adam", "adabelief", "lamb" or "sgd" (with momentum 0.5).
    learning_rate: > 0.
    num_steps: length of the schedule.
    schedule: "constant" or "cosine".

  Returns:
    An optax transformation.

  Raises:
    ValueError: for a rate <= 0, an unknown optimizer or schedule.
  """
  return NamedOptimizer(name, learning_rate, num_steps, schedule).transformation()


def adam(
  learning_rate: float, num_steps: int, schedule: str = "constant"
) -> optax.GradientTransformation:
  """Deprecated: use `optax.adam`.

  Args:
    learning_rate: > 0.
    num_steps: length of the schedule.
    schedule: "constant" or "cosine".

  Returns:
    An optax transformation.

  Raises:
    ValueError: for a rate <= 0 or an unknown schedule.
  """
  return optimizer("adam", learning_rate, num_steps, schedule)
