"""Selects points of a dataset without distillation, and measures what they lose.

Writes the selected points, their weights and scores, certificate.json (what a weighted ridge
regression on them loses, measured and guaranteed) and pictures. With --input it selects weighted
rows of a file, with or without labels, and writes them with their weights and row numbers, and what
they lose (MMD to all rows, errors of models trained on them).

Examples:
  kipcore-select
      ten of the included digits
  kipcore-select --dataset=mnist --images_per_class=50 --strategy=krr_sensitivity
      500 images of MNIST
  kipcore-select --input=table.parquet --target=price --size=1000
      1,000 rows of a table
"""

from typing import Any

from kipcore.cli import flags
from kipcore.cli.config import OutputConfig, RowsConfig, SelectConfig, from_flags, given_flags
from kipcore.cli.errors import UsageError


def main(values) -> None:
  """Builds the config from the flags and runs it."""
  if values.input:
    return _rows(values)
  if unused := sorted({*given_flags(RowsConfig, values)} - {*given_flags(SelectConfig, values)}):
    raise UsageError(f"--{unused[0]}: expected --input=FILE with it, got none")
  from kipcore.cli.runs import dry_run, selection

  run = dry_run.of_selection if values.dry_run else selection.run_select
  run(from_flags(SelectConfig, values), values.output_dir, values.overwrite)


def _rows(values) -> None:
  """Selects rows of a file."""
  from kipcore.cli.runs import rows

  given = given_flags(RowsConfig, values)
  if unused := sorted({*given_flags(SelectConfig, values)} - {*given}):
    raise UsageError(f"--{unused[0]}: expected no such flag with --input; --help lists its flags")
  plain = lambda value: tuple(value) if isinstance(value, list) else value
  run = rows.describe if values.dry_run else rows.run_rows
  settings: Any = {name: plain(value) for name, value in given.items()}
  run(RowsConfig(**settings), values.output_dir, values.overwrite)


run = flags.binary(
  main,
  SelectConfig,
  RowsConfig,
  OutputConfig,
  main_flags=(
    "dataset",
    "data_dir",
    "images_per_class",
    "strategy",
    "seed",
    "output_dir",
    "dry_run",
  ),
)

if __name__ == "__main__":
  run()
