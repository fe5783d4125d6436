"""Selects points without distilling: `python -m experiments.run_select`.

Writes the chosen points, their weights and scores, `certificate.json` (what a weighted
ridge regression on them is measured, and promised, to lose) and pictures.
"""

import dataclasses

from absl import flags

from experiments import flags as common

FLAGS = flags.FLAGS

common.define_common()
flags.DEFINE_string("strategy", "krr_sensitivity", "uniform, krr_sensitivity, kmeans, kmedoids, kmeans_plusplus, "
                    "krr_pursuit, noise or auto.")
flags.DEFINE_string("score_ridge", "auto", "Absolute ridge of the scores, or auto: by effective dimension.")
flags.DEFINE_float("relative_ridge", 1e-6, "Ridge of the regression on the points, as a fraction of its mean diagonal.")


def main() -> None:
  """Builds the config from the flags and runs it."""
  from experiments import selection
  names = [field.name for field in dataclasses.fields(selection.SelectConfig)]
  config = selection.SelectConfig(**{name: getattr(FLAGS, name) for name in names})
  selection.run_select(config, FLAGS.output_dir, FLAGS.overwrite)


if __name__ == "__main__":
  common.launch(main)
