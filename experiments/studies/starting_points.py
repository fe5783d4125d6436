"""Comparison of initializations: `python -m experiments.studies.starting_points --data_dir=DIR`.

For each dataset, size and initialization, over several seeds: test accuracy of ridge regression on
the selected points without distillation, with one-hot labels and with labels solved on all training
rows. Uses all training rows of MNIST, Fashion-MNIST and CIFAR-10 with the NTK of FC1, and 1,000
rows of MNIST with that of a convolutional network. Writes experiments/results/starting_points.json
after each cell, and starting_points.png. About an hour on two cores.
"""

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags

from experiments.docs import tables
from kipcore.cli import flags as common
from kipcore.cli.config import SelectConfig

FLAGS = flags.FLAGS

# Initializations of distillation. Leverage, herding and k-center are baselines in the tables of
# run_evaluate.
STRATEGIES = (
  "uniform",
  "krr_sensitivity",
  "kmeans",
  "kmedoids",
  "kmeans_plusplus",
  "krr_pursuit",
  "noise",
  "auto",
)
# name -> (config, number of training rows (0 for all), candidates of the pursuit)
_FC1 = {
  f"{dataset}-fc1-{10 * per_class}": (
    SelectConfig(dataset=dataset, images_per_class=per_class),
    0,
    2000,
  )
  for dataset in ("mnist", "fashion_mnist", "cifar10")
  for per_class in (1, 10, 50)
}
_CONV = {
  f"mnist-conv2_vec-{10 * per_class}": (
    SelectConfig(
      dataset="mnist", architecture="conv2_vec", images_per_class=per_class, test_rows=1000
    ),
    1000,
    300,
  )
  for per_class in (1, 10)
}
CELLS = {**_FC1, **_CONV}


def measure(data, config: SelectConfig, seeds, num_candidates: int) -> dict:
  """Measures one cell: accuracies in percent per strategy and seed, and the measured objective."""
  import jax.numpy as jnp

  from kipcore import krr
  from kipcore.cli.runs import pipeline
  from kipcore.selection import absorb, coreset
  from kipcore.types import Support

  x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
  fit_ridge = coreset.objective_ridge(data.kernel_fn, x)
  runs = []
  for seed in seeds:
    by_strategy = {}
    coresets = coreset.auto_candidates(
      seed, x, y, config.images_per_class, data.kernel_fn, num_candidates
    )
    for strategy in STRATEGIES:
      if strategy not in (*coresets, "auto"):
        coresets[strategy] = coreset.select_coreset(
          seed, x, y, config.images_per_class, strategy, data.kernel_fn
        )
    for strategy, chosen in coresets.items():
      used = float(krr.relative_ridge(data.kernel_fn.diag(chosen.x), config.relative_ridge))
      solved = krr.label_solve_rows(data.kernel_fn, chosen.x, x, y, used, fit_ridge)
      run = {
        "one_hot": 100 * pipeline.score(config, data, Support(chosen.x, chosen.y)),
        "solved": 100 * pipeline.score(config, data, Support(chosen.x, solved.labels)),
      }
      if chosen.ridge is not None:
        absorbed, _ = absorb.absorb_weights(data.kernel_fn, chosen, chosen.ridge, used)
        run["weights_in_labels"] = 100 * pipeline.score(config, data, absorbed)
      if strategy in coreset.AUTO_CANDIDATES:
        run["objective"] = coreset.measured_objective(
          data.kernel_fn, chosen, x, y, config.relative_ridge
        )
      by_strategy[strategy] = run
    # The choice of select_coreset(strategy="auto") for this seed, without repeating the selections.
    best = min(coreset.AUTO_CANDIDATES, key=lambda name: by_strategy[name]["objective"])
    by_strategy["auto"] = {**by_strategy[best], "chosen": best}
    runs.append({"seed": seed, "strategies": by_strategy})
    print(
      f"  seed {seed}: "
      + ", ".join(f"{k} {v['one_hot']:.1f}/{v['solved']:.1f}" for k, v in by_strategy.items()),
      flush=True,
    )
  return {
    "runs": runs,
    "summary": {name: summary([run["strategies"][name] for run in runs]) for name in STRATEGIES},
  }


def summary(runs: list[dict]) -> dict:
  """Mean and sample deviation over seeds of every value of a strategy."""
  keys = [key for key, value in runs[0].items() if isinstance(value, float)]
  content = {
    key: {
      "mean": float(np.mean([run[key] for run in runs])),
      "std": float(np.std([run[key] for run in runs], ddof=1)) if len(runs) > 1 else None,
    }
    for key in keys
  }
  if "chosen" in runs[0]:
    content["chosen"] = [run["chosen"] for run in runs]
  return content


def load(config: SelectConfig, num_rows: int):
  """The data of a cell, with `num_rows` evenly spaced training rows unless that is 0."""
  from kipcore.cli.runs import pipeline

  data = pipeline.load(config)
  step = data.x_train.shape[0] // num_rows if num_rows else 1
  rows = slice(None, num_rows * step or None, step)
  return data._replace(x_train=data.x_train[rows], y_train=data.y_train[rows])


def save_picture(path, cells: dict) -> None:
  """Plots accuracy against the number of points, with one line per strategy.

  Each dataset and network has a row of two panels. Noise, which has chance accuracy with one-hot
  labels, is only in the table.
  """
  from kipcore.report import pictures

  panels = {}
  for name, cell in cells.items():
    dataset, network, points = name.rsplit("-", 2)
    for kind, labels in (("one_hot", "one-hot labels"), ("solved", "solved labels")):
      panel = panels.setdefault(f"{tables.TITLES.get(dataset, dataset)}, {network}, {labels}", {})
      for strategy in STRATEGIES:
        if strategy != "noise":
          entry = cell["summary"][strategy][kind]
          panel.setdefault(strategy, []).append((int(points), entry["mean"], entry["std"] or 0.0))
  pictures.save_comparison(path, panels, "number of points", "test accuracy, %", log_x=True)


def define_flags() -> None:
  """Defines the flags of this program; modules that import this one have their own."""
  flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
  flags.DEFINE_integer("num_seeds", 5, "Seeds of each cell.", lower_bound=1)
  flags.DEFINE_string(
    "only",
    "",
    "Remeasure the cells whose names contain this; by default, measure the missing cells.",
  )
  flags.DEFINE_string(
    "output",
    "experiments/results/starting_points.json",
    "Result file; the picture is in the same folder.",
  )


def main() -> None:
  """Measures the cells and writes the result file after each."""
  from kipcore.cli.folder import run_folder

  # Read before the runs, because the working tree may change during them.
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  cells = json.loads(path.read_text())["cells"] if path.exists() else {}
  for name, (config, num_rows, num_candidates) in CELLS.items():
    if FLAGS.only not in name or (not FLAGS.only and name in cells):
      continue
    print(name, flush=True)
    config = dataclasses.replace(config, data_dir=FLAGS.data_dir, validation_fraction=0.0)
    data = load(config, num_rows)
    cell = measure(data, config, range(FLAGS.num_seeds), num_candidates)
    cells[name] = {
      "config": {**dataclasses.asdict(config), "data_dir": None, "num_candidates": num_candidates},
      "training_rows": data.x_train.shape[0],
      "test_rows": data.x_test.shape[0],
      "note": data.raw.note,
      "commit": environment["commit"],
      **cell,
    }
    cells = {key: cells[key] for key in CELLS if key in cells}
    run_folder.write_json(path, {"environment": environment, "cells": cells})
    save_picture(path.with_suffix(".png"), cells)


if __name__ == "__main__":
  define_flags()
  common.launch(main)
