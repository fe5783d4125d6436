"""Optimizers by name, at the settings that published methods use."""

import optax

from kipcore import checks

# Names of `optimizer`, with what distinguishes them.
OPTIMIZERS = {
  "adam": optax.adam,
  "adabelief": optax.adabelief,
  "lamb": optax.lamb,
  "sgd": lambda rate: optax.sgd(rate, momentum=0.5),
}
SCHEDULES = ("constant", "cosine")


def optimizer(
  name: str, learning_rate: float, num_steps: int, schedule: str = "constant"
) -> optax.GradientTransformation:
  """An optimizer with a constant rate or one that falls along a cosine to zero.

  Args:
    name: "adam", "adabelief" (RFAD, RCIG), "lamb" (FRePo) or "sgd" (momentum 0.5: DC, DSA, DM, MTT).
    learning_rate: > 0.
    num_steps: length of the schedule.
    schedule: "constant" or "cosine".

  Returns:
    An optax transformation.

  Raises:
    ValueError: for a rate <= 0, an unknown optimizer or schedule.
  """
  checks.one_of("optimizer", name, tuple(OPTIMIZERS))
  checks.positive("learning_rate", learning_rate)
  checks.one_of("schedule", schedule, SCHEDULES)
  rate = (
    optax.cosine_decay_schedule(learning_rate, max(num_steps, 1))
    if schedule == "cosine"
    else learning_rate
  )
  return OPTIMIZERS[name](rate)


def adam(
  learning_rate: float, num_steps: int, schedule: str = "constant"
) -> optax.GradientTransformation:
  """Adam with a constant rate or one that falls along a cosine to zero.

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
