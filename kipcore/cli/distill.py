"""Distills a dataset into a few images that train a model almost as well as all of it.

Examples:
  kipcore-distill
      ten images of the included digits that train a network
  kipcore-distill --dataset=mnist --minutes=5
      ten images of MNIST for networks, in five minutes
  kipcore-distill --dataset=mnist --teach=kernel --images_per_class=10 --steps=4000
      for kernel ridge regression: 97 % and more on MNIST, about a minute on two cores
  kipcore-distill --dataset=mnist --method=dm --dry_run
      what that would do, how long it would take, what it needs; nothing is written
"""

import dataclasses
import sys
import tempfile

from kipcore.cli import flags
from kipcore.cli.config import (
  CheckpointConfig,
  DistillConfig,
  OutputConfig,
  ProcessConfig,
  from_flags,
  given_flags,
)


def main(values) -> None:
  """Builds the config from the flags and runs it."""
  index = flags.join_processes(values.distributed)
  import jax

  from kipcore.cli import recipes
  from kipcore.cli.folder import event_log, resume
  from kipcore.cli.runs import dry_run, pipeline, saved_sets

  event_log.require(values.tensorboard)
  output_dir, given = values.output_dir, given_flags(DistillConfig, values)
  if values.resume:
    output_dir = str(resume.unfinished(output_dir))
    config = resume.config_of(output_dir, given)
  else:
    given = saved_sets.with_size(given)
    config = recipes.resolve(**given)
  jax.config.update("jax_enable_x64", config.x64)
  checkpoints = from_flags(CheckpointConfig, values)
  for line in recipes.unused(config, given) if index == 0 else ():
    print(line, file=sys.stderr)
  if values.dry_run:
    dry_run.of_distillation(config, output_dir, values.overwrite, values.resume)
  elif index == 0:
    pipeline.run_distill(
      config,
      output_dir,
      values.overwrite,
      tensorboard=values.tensorboard,
      checkpoints=checkpoints,
      cheaper=recipes.cheaper(given),
      animation=values.animation,
    )
  else:  # the other processes do the same work and keep no files
    with tempfile.TemporaryDirectory() as folder:
      pipeline.run_distill(
        config,
        folder,
        verbose=False,
        checkpoints=dataclasses.replace(checkpoints, shared=output_dir),
      )


run = flags.binary(
  main,
  DistillConfig,
  OutputConfig,
  ProcessConfig,
  CheckpointConfig,
  main_flags=(
    "dataset",
    "data_dir",
    "images_per_class",
    "teach",
    "minutes",
    "method",
    "init",
    "sampler",
    "steps",
    "seed",
    "output_dir",
    "dry_run",
  ),
)

if __name__ == "__main__":
  run()
