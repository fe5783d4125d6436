"""Selects points without distilling: `python -m experiments.run_select`.

Writes the chosen points, their weights and scores, `certificate.json` (what a weighted
ridge regression on them is measured, and promised, to lose) and pictures.
"""

from absl import flags

from experiments import flags as common
from experiments.config import SelectConfig, from_flags

FLAGS = flags.FLAGS
_DEFAULT = SelectConfig()

common.define_common()
flags.DEFINE_string("strategy", _DEFAULT.strategy, "uniform, krr_sensitivity, kmeans, kmedoids, kmeans_plusplus, "
                    "krr_pursuit, noise or auto.")
flags.DEFINE_string("score_ridge", _DEFAULT.score_ridge, "Absolute ridge of the scores, or auto: by effective dimension.")
flags.DEFINE_float("relative_ridge", _DEFAULT.relative_ridge, "Ridge of the regression on the points, as a fraction of its mean diagonal.")


def main() -> None:
  """Builds the config from the flags and runs it."""
  from experiments import selection
  selection.run_select(from_flags(SelectConfig, FLAGS), FLAGS.output_dir, FLAGS.overwrite)


if __name__ == "__main__":
  common.launch(main)
