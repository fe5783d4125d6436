"""Chooses points of a dataset without distilling, and measures what they lose.

Writes the chosen points, their weights and scores, certificate.json (what a weighted ridge
regression on them is measured, and promised, to lose) and pictures.

Examples:
  kipcore-select
      ten of the embedded digits by their sensitivity
  kipcore-select --dataset=mnist --images_per_class=50 --strategy=kmedoids
      500 images of MNIST
"""

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.config import SelectConfig, from_flags

FLAGS = flags.FLAGS
_DEFAULT = SelectConfig()

common.group("Selection")
flags.DEFINE_string(
  "strategy",
  _DEFAULT.strategy,
  "Real rows: krr_sensitivity, leverage, uniform, kmedoids, kmeans_plusplus, herding, "
  "k_center, krr_pursuit; made points, without a certificate: kmeans, noise; or auto, the best by measure.",
)
flags.DEFINE_string(
  "score_ridge",
  _DEFAULT.score_ridge,
  "Absolute ridge of the scores, or auto: by effective dimension.",
)
flags.DEFINE_float(
  "relative_ridge",
  _DEFAULT.relative_ridge,
  "Ridge of the regression on the points, as a fraction of its mean diagonal.",
)
common.define_common()
common.first("dataset", "data_dir", "images_per_class", "strategy", "seed", "output_dir", "dry_run")


def main() -> None:
  """Builds the config from the flags and runs it."""
  from kipcore.cli.runs import dry_run, selection

  run = dry_run.of_selection if FLAGS.dry_run else selection.run_select
  run(from_flags(SelectConfig, FLAGS), FLAGS.output_dir, FLAGS.overwrite)


def run() -> None:
  """The console script."""
  common.launch(main)


if __name__ == "__main__":
  run()
