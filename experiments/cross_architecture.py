"""Default artefacts in other hands: `python -m experiments.cross_architecture --data_dir=DIR`.

Distils with the default flags, and scores the set and its baselines under other kernels and on finite networks:
every baseline under the cheap evaluators, the most telling ones under the costly ones. Writes
experiments/results/cross_architecture.json, dataset by dataset. About half an hour on two cores.
"""

import dataclasses
import json
import pathlib
import tempfile

from absl import flags

from experiments import flags as common
from experiments.config import DistillConfig, EvaluateConfig

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Where TFDS keeps its prepared datasets.")
flags.DEFINE_list("datasets", ["mnist", "fashion_mnist", "cifar10"], "Datasets to measure.")
flags.DEFINE_string("output", "experiments/results/cross_architecture.json", "Result file; other datasets in it stay.")

_ALL = ("uniform", "uniform_solved", "kmeans", "herding", "k_center", "leverage", "full")
# What is scored under what, at sizes for two cores. Networks on one image a class need width more than depth.
PARTS = {
    "kernels and MLP, every baseline": EvaluateConfig(("krr", "krr:fc1:nngp", "krr:fc3", "krr:conv3_vec", "network:mlp"), _ALL, width=512,
                                                      test_rows=2000),
    "convolutional networks": EvaluateConfig(("network:convnet", "network:convnet:dsa"), ("uniform", "uniform_solved", "kmeans"), width=32,
                                             network_steps=500, test_rows=2000),
    "residual network": EvaluateConfig(("network:resnet",), ("uniform", "uniform_solved", "kmeans"), width=16, network_steps=300, test_rows=2000),
    "convolutional network, all data": EvaluateConfig(("network:convnet",), ("full",), width=32, network_steps=500, test_rows=2000, full_rows=0),
}


def measure(dataset: str, data_dir: str | None) -> dict:
  """One dataset: the run, and its table."""
  from kipcore import artifact
  from experiments import evaluation, pipeline
  with tempfile.TemporaryDirectory() as folder:
    path, result = pipeline.run_distill(DistillConfig(dataset=dataset, data_dir=data_dir), folder, overwrite=True)
    stored = artifact.load_artifact(path / "distilled.npz")
  table = {}
  for config in PARTS.values():
    config = dataclasses.replace(config, data_dir=data_dir)
    for entry in evaluation.run_evaluate(stored, config, evaluation.print_entry)["table"]:
      table[entry["set"], entry["evaluator"]] = entry
  entries = [evaluation.ranking.EvaluationEntry(**entry) for entry in table.values()]
  return {"result": result, "note": stored.metadata["dataset"]["note"], "table": list(table.values()), "scores": evaluation.scores_of(entries)}


def main() -> None:
  """Measures the datasets, and writes the result file after each."""
  from experiments import run_folder
  environment = run_folder.environment()  # of the code that runs, whatever happens to the tree meanwhile
  path = pathlib.Path(FLAGS.output)
  measured = json.loads(path.read_text())["datasets"] if path.exists() else {}
  for dataset in FLAGS.datasets:
    measured[dataset] = {"commit": environment["commit"], **measure(dataset, FLAGS.data_dir)}
    parts = {name: {**dataclasses.asdict(config), "data_dir": None} for name, config in PARTS.items()}
    run_folder.write_json(path, {"environment": environment, "parts": parts, "datasets": measured})


if __name__ == "__main__":
  common.launch(main)
