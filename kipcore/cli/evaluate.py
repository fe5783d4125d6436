"""Scores a saved set on its test split, beside other sets of its size.

Prints a table to the error stream, and the result as JSON to the output.

Examples:
  kipcore-evaluate
      the newest run under runs/, by kernel ridge regression, to the last digit as it was recorded
  kipcore-evaluate --artifact=RUN/distilled.npz --evaluators=krr,network:resnet --baselines=uniform
      also by finite networks trained on it, and on as many random images
"""

import dataclasses
import json
import sys

from absl import flags

from kipcore.cli import errors
from kipcore.cli import flags as common
from kipcore.cli.config import EvaluateConfig, from_flags

FLAGS = flags.FLAGS
_DEFAULT = EvaluateConfig()

common.group("What is scored")
flags.DEFINE_string(
  "artifact", None, "The distilled.npz of a run; without it, the newest under runs/."
)
flags.DEFINE_list(
  "baselines",
  list(_DEFAULT.baselines),
  "Sets of the same size to score beside it: uniform, uniform_solved (with solved "
  "labels), kmeans, herding, k_center, leverage; and full, all training rows. Empty for none.",
)
flags.DEFINE_integer(
  "full_rows",
  _DEFAULT.full_rows,
  "Training rows of the set 'full', evenly spaced; 0 for all.",
  lower_bound=0,
)
common.group("By what")
flags.DEFINE_list(
  "evaluators",
  list(_DEFAULT.evaluators),
  "krr[:ARCHITECTURE[:nngp]] (ridge regression; alone: the artifact's own kernel) "
  "and network[:ARCHITECTURE|mlp|convnet|resnet[:dsa]] (finite networks; dsa: with augmentation); or all.",
)
flags.DEFINE_integer(
  "num_seeds", _DEFAULT.num_seeds, "Networks of each set, and draws of random ones.", lower_bound=1
)
flags.DEFINE_integer("seed", _DEFAULT.seed, "Root of their random streams.", lower_bound=0)
flags.DEFINE_integer(
  "width", _DEFAULT.width, "Channels or units of finite networks.", lower_bound=1
)
flags.DEFINE_integer(
  "network_steps", _DEFAULT.network_steps, "Optimizer steps of each network.", lower_bound=1
)
common.group("Data and output")
flags.DEFINE_integer(
  "test_rows",
  _DEFAULT.test_rows,
  "Score on the first so many test rows; 0 for as many as the run did.",
  lower_bound=0,
)
flags.DEFINE_string("dataset", None, "Another name or path of the same dataset.")
flags.DEFINE_string("data_dir", None, "Where TFDS keeps its prepared datasets.")
flags.DEFINE_string("output", None, "A JSON file to write the result to.")


def main() -> None:
  """Loads, scores, prints."""
  import jax

  from kipcore.cli.folder import run_folder
  from kipcore.cli.runs import evaluation
  from kipcore.io import artifact

  with errors.usage():
    path = FLAGS.artifact or run_folder.newest("distilled.npz")
    stored = artifact.load_artifact(path)
    # The digits of the record come back only at the precision that made them.
    jax.config.update("jax_enable_x64", stored.support.dtype == "float64")
    run_folder.check_file("--output", FLAGS.output)
  config = from_flags(EvaluateConfig, FLAGS)
  config = (
    dataclasses.replace(config, evaluators=evaluation.ALL_EVALUATORS)
    if config.evaluators == ("all",)
    else config
  )
  result = {
    "artifact": str(path),
    **evaluation.run_evaluate(stored, config, evaluation.print_entry),
  }
  if FLAGS.output:
    run_folder.write_json(FLAGS.output, {**result, "environment": run_folder.environment()})
  print("\n" + result.pop("markdown") + "\n", file=sys.stderr)
  print(
    json.dumps(
      {name: value for name, value in result.items() if name != "table" and value != {}}, indent=2
    )
  )


def run() -> None:
  """The console script."""
  common.launch(main)


if __name__ == "__main__":
  run()
