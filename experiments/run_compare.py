"""Start x targets x method x seed in one table: `python -m experiments.run_compare`.

Writes cells.csv (a line a cell), comparison.md and comparison.png into --output_dir. A run that was stopped goes on where it
stood, and a grid may grow by methods, starts, samplers and seeds; cells of another config are refused. All cells of a method have the same number of target evaluations. Nothing is
chosen by test accuracy: every setting is the method's own, or a flag.

What the two ideas do to a method, on MNIST, in a few minutes on two cores:

  python -m experiments.run_compare --dataset=mnist --methods=dm --output_dir=runs/dm
"""

from absl import flags

from experiments import flags as common
from experiments.config import CompareConfig, DistillConfig, from_flags, given_flags

FLAGS = flags.FLAGS
_DEFAULT = CompareConfig()

common.define_common()
flags.DEFINE_list("methods", list(_DEFAULT.methods), "Methods of the grid; see --method of run_distill.")
flags.DEFINE_list("inits", list(_DEFAULT.inits), "Starts; the first one is what the others are compared with.")
flags.DEFINE_list("samplers", list(_DEFAULT.samplers), "Samplers of targets; the first one is what the others are compared with.")
flags.DEFINE_integer("num_seeds", _DEFAULT.num_seeds, "Seeds of each cell, from --seed on.", lower_bound=1)
flags.DEFINE_integer("evaluations", _DEFAULT.evaluations, "Target evaluations of each cell; 0 for the method's own steps and batch.",
                     lower_bound=0)
flags.DEFINE_integer("network_seeds", _DEFAULT.network_seeds, "Finite networks trained on each result.", lower_bound=0)
flags.DEFINE_enum("preset", _DEFAULT.preset, ["cpu", "published"], "Settings of the methods.")
flags.DEFINE_list("set", [], "Further fields of every cell's config, name=value, e.g. steps=500,width=16.")


def main() -> None:
  """Builds the grid from the flags and runs it."""
  import dataclasses
  from experiments import comparison, methods
  shared = {name: value for name, value in given_flags(DistillConfig, FLAGS).items() if name != "preset"}
  comparison.run_compare(from_flags(CompareConfig, FLAGS), {**shared, **methods.parsed("--set", FLAGS.set, dataclasses.asdict(DistillConfig()))}, FLAGS.output_dir, FLAGS.overwrite)


if __name__ == "__main__":
  common.launch(main)
