"""Compares starts, targets, methods and seeds in one table and figure.

Writes cells.csv (a line a cell), comparison.md and comparison.png into --output_dir. A run that
was stopped goes on where it stood, and a grid may grow by methods, starts, samplers and seeds;
cells of another config are refused. All cells of a method have the same number of target
evaluations. Nothing is chosen by test accuracy: every setting is the method's own, or a flag.

Examples:
  kipcore-compare --dataset=mnist --methods=dm --output_dir=runs/dm
      what the two ideas do to a method, in a few minutes on two cores
  kipcore-compare --methods=kip,frepo --num_seeds=1 --set=steps=100,width=16 --dry_run
      the cells of a small grid on the digits, and what they would take
"""

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.config import CompareConfig, DistillConfig, from_flags, given_flags

FLAGS = flags.FLAGS
_DEFAULT = CompareConfig()

common.group("Grid")
flags.DEFINE_list(
  "methods", list(_DEFAULT.methods), "Methods of the grid; see --method of run_distill."
)
flags.DEFINE_list(
  "inits", list(_DEFAULT.inits), "Starts; the first one is what the others are compared with."
)
flags.DEFINE_list(
  "samplers",
  list(_DEFAULT.samplers),
  "Samplers of targets; the first one is what the others are compared with.",
)
flags.DEFINE_integer(
  "num_seeds", _DEFAULT.num_seeds, "Seeds of each cell, from --seed on.", lower_bound=1
)
flags.DEFINE_integer(
  "evaluations",
  _DEFAULT.evaluations,
  "Target evaluations of each cell; 0 for the method's own steps and batch.",
  lower_bound=0,
)
flags.DEFINE_integer(
  "network_seeds", _DEFAULT.network_seeds, "Finite networks trained on each result.", lower_bound=0
)
flags.DEFINE_enum(
  "preset",
  _DEFAULT.preset,
  ["cpu", "published"],
  "Settings of the methods: at a size for a few CPU cores, or as published.",
)
flags.DEFINE_list(
  "set",
  [],
  "Further settings of every cell, name=value for flags of run_distill, e.g. steps=500,width=16.",
)
common.define_common()
common.first(
  "dataset",
  "data_dir",
  "images_per_class",
  "methods",
  "inits",
  "samplers",
  "num_seeds",
  "output_dir",
  "dry_run",
)


def main() -> None:
  """Builds the grid from the flags and runs it."""
  import dataclasses

  from kipcore.cli import recipes
  from kipcore.cli.runs import comparison, dry_run

  shared = {
    name: value for name, value in given_flags(DistillConfig, FLAGS).items() if name != "preset"
  }
  shared.update(recipes.parsed("--set", FLAGS.set, dataclasses.asdict(DistillConfig())))
  run = dry_run.of_comparison if FLAGS.dry_run else comparison.run_compare
  run(from_flags(CompareConfig, FLAGS), shared, FLAGS.output_dir, FLAGS.overwrite)


def run() -> None:
  """The console script."""
  common.launch(main)


if __name__ == "__main__":
  run()
