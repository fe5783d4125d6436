"""Distills a dataset into a few images that teach a model almost as well.

Examples:
  kipcore-distill
      ten images of the embedded digits, in a few seconds
  kipcore-distill --dataset=mnist --images_per_class=10 --steps=4000
      97 % and more on MNIST, about a minute on two cores
  kipcore-distill --dataset=mnist --method=dm --dry_run
      what that would do, take and need; nothing is written
"""

import dataclasses
import tempfile

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.config import CheckpointConfig, DistillConfig, given_flags

FLAGS = flags.FLAGS

common.define_method()
common.define_sampler()
common.define_networks()
common.define_common()
flags.DEFINE_bool(
  "tensorboard",
  False,
  "Also write event files for TensorBoard, under tensorboard/ of the run folder.",
)
common.define_checkpoints()
common.define_distributed()
common.first(
  "dataset",
  "data_dir",
  "images_per_class",
  "method",
  "init",
  "sampler",
  "steps",
  "seed",
  "output_dir",
  "dry_run",
)


def main() -> None:
  """Builds the config from the flags and runs it."""
  index = common.join_processes(FLAGS.distributed)
  import jax

  from kipcore.cli import recipes
  from kipcore.cli.folder import event_log, resume
  from kipcore.cli.runs import dry_run, pipeline

  event_log.require(FLAGS.tensorboard)
  output_dir, given = FLAGS.output_dir, given_flags(DistillConfig, FLAGS)
  if FLAGS.resume:
    output_dir = str(resume.unfinished(output_dir))
  config = resume.config_of(output_dir, given) if FLAGS.resume else recipes.resolve(**given)
  jax.config.update("jax_enable_x64", config.x64)
  upkeep = CheckpointConfig(FLAGS.checkpoint_seconds, FLAGS.resume, FLAGS.retries)
  if FLAGS.dry_run:
    dry_run.of_distillation(config, output_dir, FLAGS.overwrite or FLAGS.resume)
  elif index == 0:
    pipeline.run_distill(
      config, output_dir, FLAGS.overwrite, tensorboard=FLAGS.tensorboard, upkeep=upkeep
    )
  else:  # the other processes do the same work and keep nothing
    with tempfile.TemporaryDirectory() as folder:
      pipeline.run_distill(
        config, folder, verbose=False, upkeep=dataclasses.replace(upkeep, shared=output_dir)
      )


def run() -> None:
  """The console script."""
  common.launch(main)


if __name__ == "__main__":
  run()
