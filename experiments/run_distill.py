"""Distils a dataset: `python -m experiments.run_distill`.

With no flag it learns one image a class of the embedded digits in a few seconds.
MNIST, 10 images a class, 97 % and more, about a minute on two cores:

  python -m experiments.run_distill --dataset=mnist --images_per_class=10 --steps=4000
"""

import tempfile

from absl import flags

from experiments import flags as common
from experiments.config import DistillConfig, given_flags

FLAGS = flags.FLAGS
_DEFAULT = DistillConfig()

common.define_common()
common.define_distributed()
common.define_networks()
flags.DEFINE_string("method", _DEFAULT.method, "kip, label_solve (real images, best labels), krr_closed_form; through finite networks: rfad, "
                    "frepo, rcig, dm, dc, dsa, mtt. Flags not given take the method's settings.")
flags.DEFINE_string("init", _DEFAULT.init, "Where to start: uniform (class-balanced real rows), krr_sensitivity, kmeans "
                    "(centroids), kmedoids, kmeans_plusplus, krr_pursuit, noise, or auto (the best by measure).")
flags.DEFINE_string("sampler", _DEFAULT.sampler, "Which targets to learn from next: uniform or class_balanced, or in proportion "
                    "to a loss: cross_entropy, squared_error, residual_norm, margin.")
flags.DEFINE_float("uniform_mix", _DEFAULT.uniform_mix, "Share of uniform draws of a sampler by loss.", lower_bound=0.0,
                   upper_bound=1.0)
flags.DEFINE_float("weight_exponent", _DEFAULT.weight_exponent, "Of the weights of a sampler by loss: 1 for an unbiased mean, "
                   "0 for none.", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_float("least_gain", _DEFAULT.least_gain, "A sampler by loss draws uniformly while importance would lower the second "
                   "moment of a draw by less than this factor; 1 for (almost) never.", lower_bound=1.0)
flags.DEFINE_integer("refresh_every", _DEFAULT.refresh_every, "Steps after which a sampler by loss scores all rows anew, at the cost "
                     "of as many target evaluations; 0 for never.", lower_bound=0)
flags.DEFINE_integer("steps", _DEFAULT.steps, "Optimiser steps.", lower_bound=0)
flags.DEFINE_integer("target_batch_size", _DEFAULT.target_batch_size, "Targets a step, over all devices; 0 for 1,000 or all of fewer.",
                     lower_bound=0)
flags.DEFINE_float("learning_rate", _DEFAULT.learning_rate, "Peak rate of the optimiser, in units of the preprocessed inputs.")
flags.DEFINE_enum("schedule", _DEFAULT.schedule, ["cosine", "constant"], "Rate over the steps; cosine falls to zero.")
flags.DEFINE_float("relative_ridge", _DEFAULT.relative_ridge, "Ridge as a fraction of the mean diagonal of the support's kernel.")
flags.DEFINE_enum("loss", _DEFAULT.loss, ["mse", "cross_entropy"], "cross_entropy learns a temperature as well.")
flags.DEFINE_bool("learn_labels", _DEFAULT.learn_labels, "Learn the labels of the distilled images too.")
flags.DEFINE_bool("solve_labels", _DEFAULT.solve_labels, "Where labels are learned, start from the best ones for the starting images, at "
                  "the cost of one evaluation of each training row (of a tenth of the run's target evaluations at most).")
flags.DEFINE_bool("log_test_accuracy", _DEFAULT.log_test_accuracy, "Also log test accuracy during the run (recorded, never chosen by).")
flags.DEFINE_bool("measure_gain", _DEFAULT.measure_gain, "Distil a second time, with uniform targets and as many target evaluations, "
                  "and say what the sampler gained.")


def main() -> None:
  """Builds the config from the flags and runs it."""
  index = common.join_processes(FLAGS.distributed)
  from experiments import methods, pipeline
  config = methods.resolve(**given_flags(DistillConfig, FLAGS))
  if index == 0:
    pipeline.run_distill(config, FLAGS.output_dir, FLAGS.overwrite)
    return
  # The other processes do the same work and keep nothing.
  with tempfile.TemporaryDirectory() as folder:
    pipeline.run_distill(config, folder, verbose=False)


if __name__ == "__main__":
  common.launch(main)
