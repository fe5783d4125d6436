"""`--minutes`: fits the width and the steps of a run to a time, by measuring this machine."""

import contextlib
import dataclasses
import sys
import time

from tqdm import tqdm

from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig
from kipcore.cli.cost import estimate, progress
from kipcore.cli.errors import UsageError

# With fewer steps narrower networks learn more in the same time, with more steps wider ones.
_LEAST_STEPS, _MOST_STEPS = 150, 4000
# Below this many steps of `ratbptt`, `frepo` is better: five minutes on MNIST reach 90 %, where 338 steps of `ratbptt` reach 85 %.
_LEAST_BEFORE_CHEAPER = 800
_NARROWEST, _WIDEST = 16, 128
# Share of the time for the measured parts; the rest is what varies.
_USED = 0.9


def fitted(planned, started: float, verbose: bool = True, cheaper: DistillConfig | None = None):
  """The plan with steps and width that take `config.minutes`.

  Args:
    planned: `pipeline.Plan`.
    started: when the command started, by `time.perf_counter`.
    verbose: whether to print what was chosen.
    cheaper: settings with another method, to be used if the time suffices for too few steps; None to keep the method.

  Returns:
    A plan.

  Raises:
    UsageError: for a method without steps, or a time too short for anything but the scores.
  """
  from kipcore.cli.runs import measure, pipeline

  config = planned.config
  if not recipes.has_loop(config):
    raise UsageError(f"--minutes: expected a method with steps, got --method={config.method}")
  through_networks = not recipes.RECIPES[config.method].kernel
  widths: set[int] = set()
  while True:
    with progress.working(f"measuring {config.method} of width {config.width}", shown=verbose):
      parts, _ = measure.distillation(config, planned._replace(config=config))
    steps = [part for part in parts if part.name.startswith(f"{config.steps:,} steps")]
    one = sum(part.amount for part in steps) / max(config.steps, 1)
    other = sum(part.amount for part in parts if part not in steps)
    left = _USED * 60 * config.minutes - (time.perf_counter() - started) - other
    count = int(left / one)
    widths.add(config.width)
    if cheaper is not None and count < _LEAST_BEFORE_CHEAPER:
      if verbose:
        tqdm.write(
          f"--minutes={config.minutes:g}: time for {max(count, 0):,} steps of {config.method}; trying {cheaper.method}",
          file=sys.stdout,
        )
      cheaper = dataclasses.replace(cheaper, architecture=config.architecture)
      with contextlib.suppress(UsageError):  # too little time for its scores
        return fitted(pipeline.plan(cheaper, planned.data), started, verbose)
      return fitted(planned, started, verbose)
    wider = config.width * 2 if count > _MOST_STEPS else config.width // 2
    if not through_networks or _LEAST_STEPS <= count <= _MOST_STEPS:
      break
    if wider in widths or not _NARROWEST <= wider <= _WIDEST:
      break
    config = dataclasses.replace(config, width=wider)
  if count < 1:
    raise UsageError(
      f"--minutes: expected more than {(60 * config.minutes - left) / 60:.1f} for the scores alone, got {config.minutes:g}; "
      "reduce --network_seeds or --test_rows"
    )
  minutes = config.minutes
  # The command that repeats the run has the fitted settings.
  config = dataclasses.replace(config, steps=count, minutes=0.0)
  if verbose:
    tqdm.write(
      f"--minutes={minutes:g}: {config.steps:,} steps of {one:.3g} s"
      + (f", width {config.width}" if through_networks else "")
      + f"; {estimate.duration(other)} for everything else",
      file=sys.stdout,
    )
  return planned._replace(config=config)
