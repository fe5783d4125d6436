"""Start and sampler, apart and together: `python -m experiments.ablation --data_dir=DIR`.

Every arm of a setting gets the same number of target evaluations (batches and scoring
passes) and the same seeds. An arm is where to start, which targets to draw, with which
exponent, uniform share and batch. Choices are made by validation accuracy; test accuracy is
reported beside it. Writes experiments/results/ablation.json, arm by arm:

  final       accuracy at the end
  area        mean of the accuracy over the target evaluations, 0 to all
  reaches     target evaluations until the mean final accuracy of uniform/uniform, or null

Hours on two cores for all of it; --only=mnist-1/ runs one setting.
"""

import dataclasses
import json
import pathlib
import tempfile

from absl import flags
import numpy as np

from experiments import flags as common
from experiments.config import DistillConfig

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Where TFDS keeps its prepared datasets.")
flags.DEFINE_integer("num_seeds", 5, "Seeds of each arm.", lower_bound=1)
flags.DEFINE_string("only", "", "Run the arms whose names (setting/arm) contain this, anew; else those that the file lacks.")
flags.DEFINE_string("output", "experiments/results/ablation.json", "Result file.")

# dataset-images per class -> (config, target evaluations)
_MNIST = dict(dataset="mnist", learning_rate=0.04)
SETTINGS = {
    "mnist-1": (DistillConfig(**_MNIST, images_per_class=1), 4_000_000),
    "mnist-10": (DistillConfig(**_MNIST, images_per_class=10), 4_000_000),
    "fashion_mnist-1": (DistillConfig(dataset="fashion_mnist", images_per_class=1), 2_000_000),
    "fashion_mnist-10": (DistillConfig(dataset="fashion_mnist", images_per_class=10), 2_000_000),
    "cifar10-1": (DistillConfig(dataset="cifar10", images_per_class=1), 2_000_000),
    "cifar10-10": (DistillConfig(dataset="cifar10", images_per_class=10), 2_000_000),
}
_CE = dict(sampler="cross_entropy")
# What changes from uniform start and uniform targets in batches of 2,000.
ARMS = {
    "uniform/uniform": {},
    "kmeans/uniform": dict(init="kmeans"),
    "uniform/cross_entropy": _CE,
    "kmeans/cross_entropy": dict(_CE, init="kmeans"),
    "kmeans/residual_norm": dict(sampler="residual_norm", init="kmeans"),
    "kmeans/cross_entropy e=0": dict(_CE, init="kmeans", weight_exponent=0.0),
    "kmeans/cross_entropy e=1": dict(_CE, init="kmeans", weight_exponent=1.0),
    "kmeans/cross_entropy g=0.1": dict(_CE, init="kmeans", uniform_mix=0.1),
    "kmeans/uniform b=500": dict(init="kmeans", target_batch_size=500),
    "kmeans/cross_entropy b=500": dict(_CE, init="kmeans", target_batch_size=500),
}
REFERENCE = "uniform/uniform"


def arm_config(setting: DistillConfig, changes: dict, evaluations: int) -> DistillConfig:
  """The config of an arm, with as many steps as the evaluations pay for."""
  config = dataclasses.replace(setting, **{"init": "uniform", "target_batch_size": 2000, **changes})
  return dataclasses.replace(config, steps=evaluations // config.target_batch_size, log_test_accuracy=True)


def run(config: DistillConfig) -> dict:
  """One run: accuracies in percent at the logged target evaluations, and the cost."""
  from experiments import pipeline, run_folder
  with tempfile.TemporaryDirectory() as folder:
    _, result = pipeline.run_distill(config, folder, verbose=False)
    lines = run_folder.read_metrics(pathlib.Path(folder))
  curve = {"evaluations": [line["step"] * config.target_batch_size for line in lines],
           **{kind: [100 * line[f"{kind}_accuracy"] for line in lines] for kind in ("validation", "test")}}
  return {"seed": config.seed, "final": 100 * result["test_accuracy"], "final_validation": curve["validation"][-1],
          "area": area(curve["evaluations"], curve["test"]), "target_evaluations": result["target_evaluations"],
          "step_seconds": result["step_seconds"], "curve": curve}


def area(evaluations, accuracy) -> float:
  """The mean of a piecewise linear curve over its range."""
  x, y = np.asarray(evaluations, float), np.asarray(accuracy, float)
  return float(np.sum(0.5 * (y[1:] + y[:-1]) * np.diff(x)) / (x[-1] - x[0]))


def reaches(curve: dict, accuracy: float) -> float | None:
  """Target evaluations at which the curve first reaches an accuracy, by linear interpolation."""
  x, y = np.asarray(curve["evaluations"], float), np.asarray(curve["test"], float)
  above = np.flatnonzero(y >= accuracy)
  if not above.size:
    return None
  i = above[0]
  return float(x[i] if i == 0 else x[i - 1] + (accuracy - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def summarise(arms: dict) -> dict:
  """Mean and deviation of each arm of a setting, and how soon it reaches the reference."""
  goal = np.mean([r["final"] for r in arms[REFERENCE]]) if REFERENCE in arms else None
  table = {}
  for name, runs in arms.items():
    row = {}
    for key in ("final", "final_validation", "area"):
      values = [r[key] for r in runs]
      row[key] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
    if goal is not None:
      found = [reaches(r["curve"], goal) for r in runs]
      row["reaches"] = None if None in found else float(np.mean(found))
    table[name] = row
  return table


def main() -> None:
  """Runs the arms, and writes the result file after each."""
  from experiments import run_folder
  environment = run_folder.environment()  # of the code that runs, whatever happens to the tree meanwhile
  path = pathlib.Path(FLAGS.output)
  settings = json.loads(path.read_text())["settings"] if path.exists() else {}
  for name, (setting, evaluations) in SETTINGS.items():
    for arm, changes in ARMS.items():
      known = settings.setdefault(name, {"arms": {}})
      if FLAGS.only not in f"{name}/{arm}" or (not FLAGS.only and arm in known["arms"]):
        continue
      config = arm_config(dataclasses.replace(setting, data_dir=FLAGS.data_dir), changes, evaluations)
      runs = [run(dataclasses.replace(config, seed=seed)) for seed in range(FLAGS.num_seeds)]
      known["arms"][arm] = runs
      known.setdefault("configs", {})[arm] = {**dataclasses.asdict(config), "seed": None, "data_dir": None,
                                              "commit": environment["commit"]}
      known["summary"] = summarise(known["arms"])
      row = known["summary"][arm]
      print(f"{name} {arm}: {row['final']['mean']:.2f} (area {row['area']['mean']:.2f}), "
            f"{np.mean([r['step_seconds'] for r in runs]):.0f} s", flush=True)
      run_folder.write_json(path, {"environment": environment, "settings": {k: v for k, v in settings.items() if v["arms"]}})


if __name__ == "__main__":
  common.launch(main)
