"""One set for a kernel and for networks: `python -m experiments.studies.teach --data_dir=DIR`.

Distills one image per class for kernel ridge regression, for networks, and for both, at the settings of the command for a few CPU
cores, and scores every result by both models. Finished runs in --runs_dir are read instead of repeated. Writes
experiments/results/teach.json after every run.
"""

import json
import pathlib

from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_string("runs_dir", "runs/teach", "Folder of the runs.")
flags.DEFINE_list("datasets", ["mnist"], "Datasets to run.")
flags.DEFINE_integer("steps", 0, "Steps of each run; 0 for those of the preset.", lower_bound=0)
flags.DEFINE_string("output", "experiments/results/teach.json", "Result file.")

# What the set is for -> settings.
GOALS = {
  "kernel": dict(method="kip", architecture="fc1", width=32, network_seeds=2, test_rows=2000),
  "network": dict(method="ratbptt"),
  "both": dict(method="both"),
}
# Every result is scored by networks under the same protocol.
_PROTOCOL = "frepo"
_KEPT = (
  "method",
  "steps",
  "target_evaluations",
  "test_accuracy",
  "network_scored_by",
  "network_test_accuracy",
  "network_test_accuracy_mean",
  "random_baseline_network_test_accuracy_mean",
  "init_network_test_accuracy_mean",
  "test_rows",
  "wall_seconds",
)


def main():
  from kipcore.cli import recipes
  from kipcore.cli.folder import run_folder
  from kipcore.cli.runs import pipeline

  output, environment = pathlib.Path(FLAGS.output), run_folder.environment()
  found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"runs": {}}
  for dataset in FLAGS.datasets:
    for goal, settings in GOALS.items():
      folder = pathlib.Path(FLAGS.runs_dir) / f"{dataset}_{goal}"
      if (folder / "README.txt").exists():  # the last file of a run
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
      else:
        given = dict(settings, dataset=dataset, data_dir=FLAGS.data_dir, protocol=_PROTOCOL)
        given |= {"steps": FLAGS.steps} if FLAGS.steps else {}
        result = pipeline.run_distill(recipes.resolve(**given), str(folder), overwrite=True)[1]
      found["runs"][f"{dataset}-{goal}"] = {
        "commit": environment["commit"],
        **{key: result[key] for key in _KEPT if key in result},
      }
      run_folder.write_json(output, {**found, "environment": environment})


if __name__ == "__main__":
  common.launch(main)
