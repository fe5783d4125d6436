"""What models lose when they are trained on selected rows: `python -m experiments.studies.selection`.

For each dataset, strategy of `kipcore.select`, size (a fraction of the training rows) and seed: the
test error of ridge regression and of logistic regression (for classes) trained on the weighted
rows, next to those of all rows, and the seconds of the selection. Errors are error rates (balanced
ones for imbalanced classes) and, for real targets, squared errors divided by the variance of the
test targets. Writes experiments/results/selection.json after each cell, and continues a file that
exists. Without --data_dir, only datasets that need no files are measured.
"""

import json
import pathlib
import time
import warnings

import numpy as np
from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

FRACTIONS = (0.001, 0.01, 0.1)
# Penalty of both models per unit of weight, for standardized columns.
PENALTY = 1e-3
# Strategies skip cells with more rows than these, whose cost is quadratic in the number of rows.
LARGEST = {"kernel_herding": 20_000}


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
  flags.DEFINE_list("datasets", [], "Datasets to measure; all that are available by default.")
  flags.DEFINE_list("strategies", [], "Strategies to measure; all by default.")
  flags.DEFINE_integer("num_seeds", 5, "Seeds of each cell.", lower_bound=1)
  flags.DEFINE_integer("train_rows", 0, "Training rows of each dataset at most; 0 for all.", 0)
  flags.DEFINE_string("output", "experiments/results/selection.json", "Result file.")


def _images(name: str, wrong: float = 0.0):
  """Pixels of a TFDS dataset as vectors, a fraction of the training labels replaced by others."""
  from kipcore.datasets import load_dataset

  data = load_dataset(name, FLAGS.data_dir, 0.0)
  x, x_test = (a.reshape(len(a), -1).astype(np.float32) for a in (data.x_train, data.x_test))
  y = np.array(data.y_train)
  rng = np.random.default_rng(0)
  flipped = rng.random(len(y)) < wrong
  y[flipped] = (y[flipped] + rng.integers(1, 10, flipped.sum())) % 10
  order = rng.permutation(len(y))
  return x[order], y[order], x_test, data.y_test


def _diabetes():
  from sklearn.datasets import load_diabetes

  x, y = load_diabetes(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(y))
  test, train = order[:100], order[100:]
  return x[train], y[train], x[test], y[test]


def _friedman(n: int = 20_000, noise: float = 1.0):
  from sklearn.datasets import make_friedman1

  x, y = make_friedman1(n + 2000, 10, noise=noise, random_state=0)
  return x[2000:], y[2000:], x[:2000], y[:2000]


def _heavy_tailed(n: int = 20_000):
  """A linear target of columns with Student's t distribution (3 degrees of freedom), and such noise."""
  rng = np.random.default_rng(0)
  x = rng.standard_t(3, (n + 2000, 10))
  y = x @ rng.normal(size=10) + rng.standard_t(3, n + 2000)
  return x[2000:], y[2000:], x[:2000], y[:2000]


def _imbalanced(n: int = 20_000):
  """Two classes, 100 : 1."""
  from sklearn.datasets import make_classification

  x, y = make_classification(
    n + 10_000, 20, n_informative=8, weights=[100 / 101], flip_y=0.0, class_sep=0.8, random_state=0
  )
  return x[10_000:], y[10_000:], x[:10_000], y[:10_000]


def _duplicates(n: int = 20_000):
  """2,000 distinct rows of Friedman's function, repeated with frequencies of a power law."""
  x, y, x_test, y_test = _friedman(2000)
  rng = np.random.default_rng(1)
  p = 1 / np.arange(1, 2001)
  rows = rng.choice(2000, n, p=p / p.sum())
  return x[rows], y[rows], x_test, y_test


# name -> (loader, whether it needs --data_dir)
DATASETS = {
  "digits": (lambda: _images("digits"), False),
  "diabetes": (_diabetes, False),
  "friedman": (_friedman, False),
  "heavy_tailed": (_heavy_tailed, False),
  "imbalanced": (_imbalanced, False),
  "duplicates": (_duplicates, False),
  "mnist": (lambda: _images("mnist"), True),
  "mnist_wrong_labels": (lambda: _images("mnist", 0.1), True),
  "cifar10": (lambda: _images("cifar10"), True),
}


def load(name: str, train_rows: int):
  """A dataset with standardized columns, in float32; real targets are float32, classes integers."""
  x, y, x_test, y_test = DATASETS[name][0]()
  keep = slice(None, train_rows or None)
  x, y = x[keep], y[keep]
  mean, std = x.mean(axis=0), x.std(axis=0)
  std = np.where(std > 1e-6 * std.max(), std, 1)
  kind = np.float32 if y.dtype.kind == "f" else np.int32
  x, x_test = (((a - mean) / std).astype(np.float32) for a in (x, x_test))
  return x, y.astype(kind), x_test, y_test.astype(kind)


def errors(x, y, weights, x_test, y_test) -> dict[str, float]:
  """Test errors of the models trained on weighted rows."""
  from sklearn.linear_model import LogisticRegression, Ridge
  from sklearn.metrics import balanced_accuracy_score

  total = float(np.sum(weights))
  ridge = Ridge(alpha=PENALTY * total)
  if y.dtype.kind == "f":
    predicted = ridge.fit(x, y, sample_weight=weights).predict(x_test)
    return {"ridge": float(np.mean((predicted - y_test) ** 2) / np.var(y_test))}
  classes = np.unique(y)
  hot = (y[:, None] == classes[None]).astype(np.float32)
  predicted = classes[ridge.fit(x, hot, sample_weight=weights).predict(x_test).argmax(axis=1)]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about steps; the limit is the same for every set
    model = LogisticRegression(C=1 / (PENALTY * total), max_iter=100)
    logistic = model.fit(x, y, sample_weight=weights).predict(x_test)
  score = lambda labels: 1 - float(balanced_accuracy_score(y_test, labels))
  return {"ridge": score(predicted), "logistic": score(logistic)}


def measure(name: str, strategy: str, fraction: float, num_seeds: int, data) -> dict | None:
  """One cell: errors and seconds by seed; None if the size is below one row or one per class."""
  import kipcore

  x, y, x_test, y_test = data
  size = round(fraction * len(y))
  if size < 2 or (y.dtype.kind != "f" and size < len(np.unique(y))):
    return None
  if len(y) > LARGEST.get(strategy, len(y)):
    return None
  runs = []
  for seed in range(num_seeds):
    start = time.perf_counter()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)  # nearly equal scores; few distinct rows
      chosen = kipcore.select(seed, x, y, size, strategy=strategy)
    weights = np.asarray(chosen.weights)
    seconds = time.perf_counter() - start
    measured = errors(x[chosen.indices], y[chosen.indices], weights, x_test, y_test)
    runs.append({"seed": seed, "seconds": seconds, "chosen": chosen.strategy, **measured})
  return {"size": size, "runs": runs}


def main() -> None:
  """Measures the missing cells and writes the result file after each."""
  from kipcore.cli.errors import UsageError
  from kipcore.cli.folder import run_folder
  from kipcore.selection import rows

  # Read before the runs, because the working tree may change during them.
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  settings = {"penalty": PENALTY, "train_rows": FLAGS.train_rows, "num_seeds": FLAGS.num_seeds}
  content = json.loads(path.read_text()) if path.exists() else {"settings": settings, "cells": {}}
  if content["settings"] != settings:
    raise UsageError(
      f"--output: {path} has the settings {content['settings']}, got {settings}; choose another file"
    )
  cells = content["cells"]
  available = [name for name, (_, files) in DATASETS.items() if FLAGS.data_dir or not files]
  for name in FLAGS.datasets or available:
    strategies = [
      strategy
      for strategy in FLAGS.strategies or rows.STRATEGIES
      if any(f"{name}/{strategy}/{fraction}" not in cells for fraction in FRACTIONS)
    ]
    if not strategies:
      continue
    data = load(name, FLAGS.train_rows)
    if f"{name}/all" not in cells:
      cells[f"{name}/all"] = {
        "size": len(data[1]),
        "runs": [errors(*data[:2], np.ones(len(data[1])), *data[2:])],
      }
    for strategy in strategies:
      for fraction in FRACTIONS:
        cell = f"{name}/{strategy}/{fraction}"
        if cell in cells:
          continue
        measured = measure(name, strategy, fraction, FLAGS.num_seeds, data)
        cells[cell] = measured and {**measured, "commit": environment["commit"]}
        run_folder.write_json(
          path, {"environment": environment, "settings": settings, "cells": cells}
        )
        if measured:
          print(cell, measured["size"], _text(measured["runs"]), flush=True)


def _text(runs: list[dict]) -> str:
  """Mean and standard error of the errors, and the seconds of the last seed."""
  parts = []
  for model in ("ridge", "logistic"):
    values = [run[model] for run in runs if model in run]
    if values:
      error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
      parts.append(f"{model} {np.mean(values):.4f} +- {error:.4f}")
  return ", ".join([*parts, f"{runs[-1]['seconds']:.2f} s, {runs[-1]['chosen']}"])


if __name__ == "__main__":
  define_flags()
  common.launch(main)
