"""Memory growth of a long run: `python -m experiments.robustness.soak`.

Runs 20,000 steps on digits with frequent checkpoints. Records the memory of the process and the
number of compilations after each device call. Writes experiments/results/soak.json and soak.png.
Exits with status 3 if, after the first tenth of the steps, memory grew by more than 5 % or anything
was compiled.
"""

import dataclasses
import pathlib
import tempfile
from unittest import mock

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.config import CheckpointConfig, DistillConfig

FLAGS = flags.FLAGS
flags.DEFINE_integer("steps", 20_000, "Steps of the run.", lower_bound=100)
flags.DEFINE_string(
  "output", "experiments/results/soak.json", "Result file; the picture is in the same folder."
)

_GROWTH, _POINTS = 1.05, 200


def watched(config: DistillConfig) -> list[tuple[int, int, int]]:
  """Completed steps, bytes and compilations after each device call of a run."""
  import jax

  from kipcore.cli.cost import progress
  from kipcore.cli.folder import run_folder
  from kipcore.cli.runs import pipeline

  points, compiled, advance = [], [], progress.Steps.advance
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: (
      compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
  )

  def noted(steps, done):
    points.append((done, run_folder.process_bytes("VmRSS"), len(compiled)))
    advance(steps, done)

  with tempfile.TemporaryDirectory() as folder, mock.patch.object(progress.Steps, "advance", noted):
    pipeline.run_distill(
      config, folder + "/run", verbose=False, checkpoints=CheckpointConfig(checkpoint_seconds=1.0)
    )
  return points


def summary(points: list[tuple[int, int, int]]) -> dict:
  """Growth over the points after the first tenth of the steps."""
  steps = points[-1][0]
  late = [point for point in points if point[0] >= steps / 10]
  halves = [
    [size for step, size, _ in late if (step > 0.55 * steps) == second] for second in (False, True)
  ]
  return {
    "steps": steps,
    "calls": len(points),
    "bytes_at_a_tenth": late[0][1],
    "bytes_at_the_end": late[-1][1],
    "most_bytes": max(size for _, size, _ in late),
    "growth": late[-1][1] / late[0][1],
    "mean_bytes_of_halves": [sum(half) / len(half) for half in halves],
    "compilations_in_all": points[-1][2],
    "compilations_after_a_tenth": points[-1][2] - late[0][2],
  }


def main() -> None:
  """Runs the test and writes the result file and the picture."""
  import matplotlib.pyplot as plt

  from kipcore.cli.folder import run_folder
  from kipcore.types import NumericalError

  config = DistillConfig(steps=FLAGS.steps, target_batch_size=250)
  environment = run_folder.environment()
  points = watched(config)
  found = summary(points)
  shown = points[:: max(1, len(points) // _POINTS)]
  run_folder.write_json(
    FLAGS.output,
    {
      "environment": environment,
      "config": dataclasses.asdict(config),
      "summary": found,
      "points": [dict(zip(("step", "bytes", "compilations"), point)) for point in shown],
    },
  )
  figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
  axes.plot([step for step, *_ in points], [size / 2**20 for _, size, _ in points])
  axes.set(
    xlabel="completed steps",
    ylabel="process memory, MiB",
    ylim=(0, 1.2 / 2**20 * found["most_bytes"]),
  )
  figure.savefig(pathlib.Path(FLAGS.output).with_suffix(".png"), dpi=120)
  print(found)
  if found["growth"] > _GROWTH or found["compilations_after_a_tenth"]:
    raise NumericalError(
      f"expected growth by at most a factor of {_GROWTH} and no compilation after a tenth of the "
      f"steps, got {found}"
    )


if __name__ == "__main__":
  common.launch(main)
