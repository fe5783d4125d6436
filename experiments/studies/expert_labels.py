"""Labels of an expert on selected images: `python -m experiments.studies.expert_labels --data_dir=DIR --experts_dir=EXPERTS`.

Selects images of each dataset in five ways, trains the same networks on them with the labels of an expert (the first seed
also with class labels), and scores the networks on the test rows. The expert is trained once per dataset, and its epoch chosen on
validation rows once per size, for random images. Networks have the protocol `soft`, with a number of steps that two CPU cores can do.
Writes experiments/results/expert_labels.json after every cell; a second start continues with the cells that are missing.
"""

import json
import pathlib
import time

import numpy as np
from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_string("experts_dir", "runs/experts", "Folder of the experts, one file per dataset.")
flags.DEFINE_integer("num_seeds", 3, "Seeds of selections and networks.", lower_bound=1)
flags.DEFINE_list("only", [], "Datasets, sizes or selections to run, as mnist-10; all if empty.")
flags.DEFINE_integer("train_rows", 0, "Training rows to use; 0 for all.", lower_bound=0)
flags.DEFINE_integer("test_rows", 0, "Test rows to score; 0 for all.", lower_bound=0)
flags.DEFINE_integer("expert_epochs", 15, "Most epochs of the expert.", lower_bound=1)
flags.DEFINE_integer("width", 32, "Channels of the networks and of the expert.", lower_bound=1)
flags.DEFINE_integer("steps", 0, "Steps of each network; 0 for those of STEPS.", lower_bound=0)
flags.DEFINE_string("output", "experiments/results/expert_labels.json", "Result file.")

# Dataset -> preprocessing.
DATASETS = {"mnist": "standardize", "cifar10": "zca"}
# Images per class -> optimizer steps of each network.
STEPS = {1: 1000, 10: 500, 50: 500}
SELECTIONS = ("uniform", "kmeans", "kmedoids", "krr_sensitivity", "rded")
# Images per class -> networks per epoch from which the epoch of the expert is chosen.
STUDENTS = {1: 3, 10: 1, 50: 1}
_VALIDATION_ROWS = 2000


def settings() -> dict:
  """What must not differ between the cells of a file."""
  names = ("train_rows", "test_rows", "expert_epochs", "width", "steps")
  return {
    **{name: FLAGS[name].value for name in names},
    "architecture": "conv3",
    "protocol": "soft",
    "datasets": DATASETS,
    "steps_by_size": {str(size): steps for size, steps in STEPS.items()},
    "students_by_size": {str(size): students for size, students in STUDENTS.items()},
    "validation_rows": _VALIDATION_ROWS,
  }


def wanted(cell: str) -> bool:
  """Whether `--only` names a cell, or the first parts of its name."""
  return not FLAGS.only or any(f"{cell}-".startswith(f"{name}-") for name in FLAGS.only)


def config_of(dataset: str, size: int, seed: int):
  """Settings of a selection; the data, and so the expert, are those of seed 0 for all."""
  from kipcore.cli.config import SelectConfig

  return SelectConfig(
    dataset=dataset,
    data_dir=FLAGS.data_dir,
    preprocess=DATASETS[dataset],
    architecture="conv3",
    score_architecture="fc1",
    images_per_class=size,
    train_rows=FLAGS.train_rows,
    test_rows=FLAGS.test_rows,
    width=FLAGS.width,
    expert_epochs=FLAGS.expert_epochs,
    labels="expert",
    seed=seed,
  )


def points_of(selection: str, config, data, expert):
  """Images and class labels of a selection."""
  from kipcore.cli.runs import selection as runs
  from kipcore.selection import coreset
  from kipcore.types import Support

  if selection == "rded":
    chosen = runs.by_losses(config, data, expert)
    return Support(chosen.x, chosen.y)
  chosen = coreset.select_coreset(
    config.seed, data.x_train, data.y_train, config.images_per_class, selection, data.score_kernel
  )
  x = coreset.scaled_to_rows(chosen.x, data.x_train) if selection == "kmeans" else chosen.x
  return Support(x, chosen.y)


def accuracy(config, data, support) -> float:
  """Test accuracy of one network trained on a set."""
  from kipcore.evaluation import networks

  (found,) = networks.evaluate_network(
    config.seed,
    data.kernel_fn.arch,
    support,
    data.x_test,
    data.y_test,
    1,
    FLAGS.width,
    FLAGS.steps or STEPS[config.images_per_class],
    protocol="soft",
  )
  return float(found)


def chosen_epoch(config, data, expert) -> dict:
  """The epoch of the expert for a number of images, chosen for random ones on validation rows."""
  from kipcore import keys
  from kipcore.distillation.methods import expert_labels

  started = time.perf_counter()
  choice = expert_labels.choose_expert(
    keys.stream(config.seed, "expert epoch"),
    expert.module,
    expert.trajectory,
    points_of("uniform", config, data, expert).x,
    data.x_validation[:_VALIDATION_ROWS],
    data.y_validation[:_VALIDATION_ROWS],
    data.kernel_fn.arch,
    width=FLAGS.width,
    num_steps=FLAGS.steps or STEPS[config.images_per_class],
    num_seeds=STUDENTS[config.images_per_class],
  )
  return {
    "epoch": choice.epoch,
    "epochs": len(expert.trajectory) - 1,
    "validation_accuracies": {str(epoch): value for epoch, value in choice.accuracies.items()},
    "seconds": time.perf_counter() - started,
  }


def expert_of(dataset: str, data, found: dict):
  """The expert of a dataset, trained unless its file exists; its accuracy on all test rows is recorded."""
  from kipcore.cli.runs import experts
  from kipcore.distillation.methods import expert_labels

  folder, started = pathlib.Path(FLAGS.experts_dir), time.perf_counter()
  folder.mkdir(parents=True, exist_ok=True)
  expert = experts.label_expert(config_of(dataset, 1, 0), data, folder / f"{dataset}.npy")
  if dataset not in found["experts"]:
    labels = expert_labels.expert_labels(expert.module, expert.trajectory[-1], data.x_test)
    correct = np.argmax(np.asarray(labels), axis=1) == np.argmax(data.y_test, axis=1)
    found["experts"][dataset] = {
      "epochs": len(expert.trajectory) - 1,
      "last_test_accuracy": float(np.mean(correct)),
      "seconds": time.perf_counter() - started,
    }
  return expert


def main():
  from kipcore.cli.folder import run_folder
  from kipcore.cli.runs import experts, pipeline

  output = pathlib.Path(FLAGS.output)
  found = {"config": settings(), "experts": {}, "epochs": {}, "cells": {}}
  if output.exists():
    found = json.loads(output.read_text(encoding="utf-8"))
    if found["config"] != settings():
      raise ValueError(
        f"output: expected a file with the settings {settings()}, got {output} with {found['config']}"
      )
  environment = run_folder.environment()
  for dataset in DATASETS:
    cells = [
      (f"{dataset}-{size}-{selection}-{seed}", size, selection, seed)
      for size in STEPS
      for selection in SELECTIONS
      for seed in range(FLAGS.num_seeds)
    ]
    missing = [cell for cell in cells if wanted(cell[0]) and cell[0] not in found["cells"]]
    if not missing:
      continue
    data = pipeline.load(config_of(dataset, 1, 0))
    expert = expert_of(dataset, data, found)
    for name, size, selection, seed in missing:
      config, group = config_of(dataset, size, seed), f"{dataset}-{size}"
      if group not in found["epochs"]:
        found["epochs"][group] = chosen_epoch(config_of(dataset, size, 0), data, expert)
        run_folder.write_json(output, {**found, "environment": environment})
      started = time.perf_counter()
      support = points_of(selection, config, data, expert)
      labeled = experts.labeled(expert, found["epochs"][group]["epoch"], support.x)
      scores = {"class": accuracy(config, data, support)} if seed == 0 else {}
      scores["expert"] = accuracy(config, data, labeled)
      found["cells"][name] = {
        "test_accuracy": scores,
        "seconds": time.perf_counter() - started,
        "commit": environment["commit"],
      }
      run_folder.write_json(output, {**found, "environment": environment})
      print(
        name,
        *(f"{labels} {100 * value:.1f}" for labels, value in scores.items()),
        f"({found['cells'][name]['seconds']:.0f} s)",
        flush=True,
      )


if __name__ == "__main__":
  common.launch(main)
