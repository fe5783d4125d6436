"""Scores a saved artefact on its test split: `python -m experiments.run_evaluate --artifact=RUN/distilled.npz`."""

import json

from absl import flags
import jax

from experiments import errors
from experiments import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string("artifact", None, "The distilled.npz of a run; without it, the newest under runs/.")
flags.DEFINE_list("evaluators", ["krr"], "krr, network, or both.")
flags.DEFINE_integer("num_seeds", 5, "Networks to train.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Root of their random streams.", lower_bound=0)
flags.DEFINE_string("dataset", None, "Another name or path of the same dataset.")
flags.DEFINE_string("data_dir", None, "Where TFDS keeps its prepared datasets.")
flags.DEFINE_string("output", None, "A JSON file to write the result to.")


def main() -> None:
  """Loads, scores, prints."""
  from kipcore import artifact
  from experiments import evaluation, run_folder
  with errors.usage():
    path = FLAGS.artifact or run_folder.newest("distilled.npz")
    stored = artifact.load_artifact(path)
    # The digits of the record come back only at the precision that made them.
    jax.config.update("jax_enable_x64", stored.support.dtype == "float64")
  result = {"artifact": str(path), **evaluation.run_evaluate(
      stored, FLAGS.data_dir, FLAGS.evaluators, FLAGS.num_seeds, FLAGS.seed, FLAGS.dataset)}
  if FLAGS.output:
    run_folder.write_json(FLAGS.output, result)
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  common.launch(main)
