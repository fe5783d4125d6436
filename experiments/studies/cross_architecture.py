"""Default sets, other models: `python -m experiments.studies.cross_architecture --data_dir=DIR`.

Distills with the default flags and scores the set and its baselines under other kernels and finite
networks: all baselines under the cheap evaluators, the most informative ones under the expensive
ones. Writes experiments/results/cross_architecture.json after each part. About an hour on two
cores.
"""

import dataclasses
import json
import pathlib
import tempfile

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.config import DistillConfig, EvaluateConfig

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_list("datasets", ["mnist", "fashion_mnist", "cifar10"], "Datasets to measure.")
flags.DEFINE_list(
  "parts", [""], "Measure the parts whose names contain one of these; all by default."
)
flags.DEFINE_string(
  "output",
  "experiments/results/cross_architecture.json",
  "Result file; other datasets in it are kept.",
)

# Tolerance for test accuracies of artifacts that differ only in the order of sums.
_ROUNDING = 1e-3
_ALL = ("uniform", "uniform_solved", "kmeans", "herding", "k_center", "leverage", "full")
# Evaluators and baselines, at sizes for two cores. With one image per class, width matters more
# than depth.
PARTS = {
  "kernels and MLP, every baseline": EvaluateConfig(
    ("krr", "krr:fc1:nngp", "krr:fc3", "krr:conv3_vec", "network:mlp"),
    _ALL,
    width=512,
    test_rows=2000,
  ),
  "convolutional networks": EvaluateConfig(
    ("network:convnet", "network:convnet:dsa"),
    ("uniform", "uniform_solved", "kmeans"),
    width=32,
    network_steps=500,
    test_rows=2000,
  ),
  "residual network": EvaluateConfig(
    ("network:resnet",),
    ("uniform", "uniform_solved", "kmeans"),
    width=16,
    network_steps=300,
    test_rows=2000,
  ),
  "convolutional network, all data": EvaluateConfig(
    ("network:convnet",), ("full",), width=32, network_steps=500, test_rows=2000, full_rows=0
  ),
}


def distilled(dataset: str, data_dir: str | None):
  """The artifact of the default flags and its result."""
  from kipcore.cli.runs import pipeline
  from kipcore.io import artifact

  with tempfile.TemporaryDirectory() as folder:
    path, result = pipeline.run_distill(
      DistillConfig(dataset=dataset, data_dir=data_dir), folder, overwrite=True
    )
    return artifact.load_artifact(path / "distilled.npz"), result


def main() -> None:
  """Measures the datasets and writes the result file after each part, keeping the other results."""
  from kipcore.cli.folder import run_folder
  from kipcore.cli.runs import evaluation

  # Read before the runs, because the working tree may change during them.
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  parts = {name: {**dataclasses.asdict(config), "data_dir": None} for name, config in PARTS.items()}
  measured = json.loads(path.read_text())["datasets"] if path.exists() else {}
  for dataset in FLAGS.datasets:
    stored, result = distilled(dataset, FLAGS.data_dir)
    known = measured.get(dataset, {"table": [], "commits": {}})
    if (
      known["table"] and abs(known["result"]["test_accuracy"] - result["test_accuracy"]) > _ROUNDING
    ):
      known = {"table": [], "commits": {}}  # the artifact has changed
    for part, config in PARTS.items():
      if not any(name in part for name in FLAGS.parts):
        continue
      table = {(entry["set"], entry["evaluator"]): entry for entry in known["table"]}
      config = dataclasses.replace(config, data_dir=FLAGS.data_dir)
      table |= {
        (entry["set"], entry["evaluator"]): entry
        for entry in evaluation.run_evaluate(stored, config, evaluation.print_progress)["table"]
      }
      scores = evaluation.scores_of(
        [evaluation.ranking.EvaluationEntry(**entry) for entry in table.values()]
      )
      known = measured[dataset] = {
        "commits": {**known["commits"], part: environment["commit"]},
        "result": result,
        "note": stored.metadata["dataset"]["note"],
        "table": list(table.values()),
        "scores": scores,
      }
      run_folder.write_json(
        path, {"environment": environment, "parts": parts, "datasets": measured}
      )


if __name__ == "__main__":
  common.launch(main)
