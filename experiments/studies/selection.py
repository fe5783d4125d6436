"""What models lose when they are trained on selected rows: `python -m experiments.studies.selection`.

For each dataset, strategy of `kipcore.select` or other package, size (a fraction of the training rows)
and seed: the test errors of `selection_models` trained on the weighted rows, next to those of all rows,
and the seconds of the selection. Packages that are not installed are skipped. Writes
experiments/results/selection.json after each cell, and continues a file that exists. Without
--data_dir, only datasets that need no files are measured.
"""

import json
import pathlib
import time
import warnings

import numpy as np
from absl import flags

from experiments.studies import selection_data, selection_models, selection_packages
from experiments.studies.selection_data import Rows
from kipcore.cli import flags as common

FLAGS = flags.FLAGS

FRACTIONS = (0.001, 0.01, 0.1)
# Strategies whose rows do not depend on the seed; the network still does.
DETERMINISTIC = ("herding", "kernel_herding", "k_center", *selection_packages.DETERMINISTIC)
# Strategies skip cells with more rows, or more selected rows, than these.
LARGEST = {"kernel_herding": (20_000, 2000), "coreax_herding": (20_000, 2000)} | {
  name: (60_000, 1000) for name in ("krr_pursuit", "coreax_rpcholesky", "sklearn_nystroem")
}


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
  flags.DEFINE_list("datasets", [], "Datasets to measure; all that are available by default.")
  flags.DEFINE_list("strategies", [], "Strategies to measure; all by default.")
  flags.DEFINE_list("fractions", [], f"Fractions of the rows; {FRACTIONS} by default.")
  flags.DEFINE_integer("num_seeds", 5, "Seeds of each cell.", lower_bound=1)
  flags.DEFINE_integer("train_rows", 0, "Training rows of each dataset at most; 0 for all.", 0)
  flags.DEFINE_string("output", "experiments/results/selection.json", "Result file.")


def measure(name: str, strategy: str, fraction: float, num_seeds: int, data: Rows) -> dict | None:
  """One cell: errors and seconds by seed; None for fewer than 2 rows or one per class, or if too large."""
  n = len(data.y)
  size = round(fraction * n)
  if size < 2 or (data.has_classes and size < len(np.unique(data.y))):
    return None
  most_rows, most_selected = LARGEST.get(strategy, (n, n))
  if n > most_rows or size > most_selected:
    return None
  runs: list[dict] = []
  for seed in range(num_seeds):
    start = time.perf_counter()
    if strategy == selection_packages.NYSTROEM:
      found = {"ridge": selection_packages.nystroem_error(seed, data, size)}
      runs.append({"seed": seed, "seconds": time.perf_counter() - start, **found})
      continue
    if seed == 0 or strategy not in DETERMINISTIC:
      chosen, x, y, weights = _select(strategy, seed, data, size)
      seconds = time.perf_counter() - start
    found = selection_models.errors(seed, x, y, weights, data)
    runs.append({"seed": seed, "seconds": seconds, "chosen": chosen, **found})
  return {"size": size, "runs": runs}


def _select(strategy: str, seed: int, data: Rows, size: int):
  """The strategy that was used, and rows, labels and weights."""
  import kipcore

  if strategy in selection_packages.NAMES:
    return strategy, *selection_packages.select(strategy, seed, data, size)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # nearly equal scores; few distinct rows
    chosen = kipcore.select(seed, data.x, data.y, size, strategy=strategy)
  weights = np.asarray(chosen.weights)
  return chosen.strategy, data.x[chosen.indices], data.y[chosen.indices], weights


def available_strategies() -> list[str]:
  """All strategies whose packages are installed; prints the others."""
  from kipcore.selection import rows

  found = list(rows.STRATEGIES)
  for name in selection_packages.NAMES:
    package = selection_packages.missing(name)
    if package:
      print(f"{name}: skipped, because {package} is not installed", flush=True)
    else:
      found.append(name)
  return found


def main() -> None:
  """Measures the missing cells and writes the result file after each."""
  from kipcore.cli.errors import UsageError
  from kipcore.cli.folder import run_folder

  # Read before the runs, because the working tree may change during them.
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  settings = {
    "penalty": selection_models.PENALTY,
    "network": selection_models.NETWORK,
    "train_rows": FLAGS.train_rows,
    "num_seeds": FLAGS.num_seeds,
  }
  content = json.loads(path.read_text()) if path.exists() else {"settings": settings, "cells": {}}
  if content["settings"] != settings:
    raise UsageError(
      f"--output: {path} has the settings {content['settings']}, got {settings}; choose another file"
    )
  cells = content["cells"]
  known = available_strategies()
  for name in FLAGS.datasets or selection_data.DATASETS:
    if name in selection_data.NEEDS_FILES and not FLAGS.data_dir:
      continue
    missing = [
      (strategy, fraction)
      for strategy in FLAGS.strategies or known
      for fraction in map(float, FLAGS.fractions or FRACTIONS)
      if strategy in known and f"{name}/{strategy}/{fraction}" not in cells
    ]
    if not missing:
      continue
    data = selection_data.load(name, FLAGS.data_dir, FLAGS.train_rows)
    ones = np.ones(len(data.y))
    if f"{name}/all" not in cells:
      cells[f"{name}/all"] = {
        "size": len(data.y),
        "runs": [
          selection_models.errors(seed, data.x, data.y, ones, data)
          for seed in range(FLAGS.num_seeds)
        ],
      }
    for strategy, fraction in missing:
      cell = f"{name}/{strategy}/{fraction}"
      measured = measure(name, strategy, fraction, FLAGS.num_seeds, data)
      cells[cell] = measured and {**measured, "commit": environment["commit"]}
      run_folder.write_json(
        path, {"environment": environment, "settings": settings, "cells": cells}
      )
      if measured:
        print(cell, measured["size"], _text(measured["runs"]), flush=True)


def _text(runs: list[dict]) -> str:
  """Mean and standard error of the errors, and the seconds of the first seed."""
  parts = []
  for model in selection_models.MODELS:
    values = [run[model] for run in runs if model in run]
    if values:
      error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
      parts.append(f"{model} {np.mean(values):.4f} +- {error:.4f}")
  return ", ".join([*parts, f"{runs[0]['seconds']:.2f} s, {runs[0].get('chosen', '')}"])


if __name__ == "__main__":
  define_flags()
  common.launch(main)
