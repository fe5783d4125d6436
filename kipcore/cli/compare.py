"""Compares methods, initializations, target samplers and seeds in one table and figure.

Writes cells.csv (one line per cell), comparison.md and comparison.png into --output_dir. A run
that was stopped continues with the missing cells, and a grid may be extended by methods,
initializations, samplers and seeds; cells with other settings are refused. All cells of a method
have the same number of target evaluations. Nothing is chosen by test accuracy.

Examples:
  kipcore-compare --dataset=mnist --methods=dm --output_dir=runs/dm
      what the initialization and the sampler contribute to a method, in a few minutes on two cores
  kipcore-compare --methods=kip,frepo --num_seeds=1 --set=steps=100,width=16 --dry_run
      the cells of a small grid on the digits, and how long they would take
"""

import dataclasses

from kipcore.cli import flags
from kipcore.cli.config import (
  CellConfig,
  CompareConfig,
  DataConfig,
  DistillConfig,
  OutputConfig,
  from_flags,
  given_flags,
)


def main(values) -> None:
  """Builds the grid from the flags and runs it."""
  from kipcore.cli import recipes
  from kipcore.cli.runs import comparison, dry_run

  config = from_flags(CompareConfig, values)
  own = {field.name for field in dataclasses.fields(CompareConfig)} - {"seed"}
  given = given_flags(DistillConfig, values)
  shared = {name: value for name, value in given.items() if name not in own}
  shared.update(recipes.parsed("--set", values.set, dataclasses.asdict(DistillConfig())))
  run = dry_run.of_comparison if values.dry_run else comparison.run_compare
  run(config, shared, values.output_dir, values.overwrite)


run = flags.binary(
  main,
  CompareConfig,
  CellConfig,
  DataConfig,
  OutputConfig,
  main_flags=(
    "dataset",
    "data_dir",
    "images_per_class",
    "methods",
    "inits",
    "samplers",
    "num_seeds",
    "output_dir",
    "dry_run",
  ),
)

if __name__ == "__main__":
  run()
