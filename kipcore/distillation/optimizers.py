"""Optimizers of the published methods, by name and hashable by value, for the commands."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import optax

from kipcore import checks
from kipcore.types import Integer, Real

# SGD with momentum 0.5 is the optimizer of DC, DSA, DM and MTT.
OPTIMIZERS = {
  "adam": optax.adam,
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
    name: "adam", "adabelief" (RFAD, RCIG), "lamb" (FRePo) or "sgd" (momentum 0.5: DC, DSA, DM, MTT).
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
    num_steps = checks.count("num_steps", self.num_steps)
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
