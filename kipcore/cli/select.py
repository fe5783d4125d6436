"""Selects points of a dataset without distillation, and measures what they lose.

Writes the selected points, their weights and scores, certificate.json (what a weighted ridge
regression on them loses, measured and guaranteed) and pictures.

Examples:
  kipcore-select
      ten of the included digits
  kipcore-select --dataset=mnist --images_per_class=50 --strategy=krr_sensitivity
      500 images of MNIST
"""

from kipcore.cli import flags
from kipcore.cli.config import OutputConfig, SelectConfig, from_flags


def main(values) -> None:
  """Builds the config from the flags and runs it."""
  from kipcore.cli.runs import dry_run, selection

  run = dry_run.of_selection if values.dry_run else selection.run_select
  run(from_flags(SelectConfig, values), values.output_dir, values.overwrite)


run = flags.binary(
  main,
  SelectConfig,
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
