"""Exported sets trained in PyTorch: `python -m experiments.studies.pytorch_check --data_dir=DIR`.

Distills two sets, scores each with the ConvNets of kipcore, exports it, and trains the same
ConvNets in plain PyTorch from the exported file (experiments/studies/pytorch_training.py). One set
has images from distribution matching with hard labels, the other has images and labels learned by
KIP. The two implementations draw different initializations, so means over networks are compared.
The check passes if the 95 % interval of their difference (Welch) contains 0, and exits with status
3 otherwise. Writes experiments/results/pytorch_check.json. About six minutes on two cores; needs
PyTorch (pip install torch).
"""

import dataclasses
import importlib.util
import pathlib
import tempfile
import time

from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string(
  "dataset", "mnist", "Images of at least 8 x 8: a TFDS name or an .npz file, as for run_distill."
)
flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
# One network in four learns badly. Eight networks may contain none of these, which makes the
# interval far too narrow.
flags.DEFINE_integer("num_seeds", 16, "Number of networks per implementation.", lower_bound=2)
flags.DEFINE_integer(
  "test_rows", 2000, "Number of test rows to score, from the first on.", lower_bound=1
)
flags.DEFINE_string("output", "experiments/results/pytorch_check.json", "Result file.")

# Name -> flags of run_distill.
SETS = {
  "dm": dict(method="dm", images_per_class=10, width=16, steps=30, network_seeds=0),
  "kip": dict(method="kip", images_per_class=10, steps=20),
}
# Settings of both implementations.
RECIPE = dict(width=16, num_steps=200, learning_rate=1e-3)


def measure(name: str) -> dict:
  """Distills a set, scores it here, exports it, and scores it in PyTorch."""
  import jax.numpy as jnp

  import kipcore
  from experiments.studies import pytorch_training
  from kipcore import datasets
  from kipcore.cli import recipes
  from kipcore.cli.runs import pipeline

  config = recipes.resolve(dataset=FLAGS.dataset, data_dir=FLAGS.data_dir, **SETS[name])
  with tempfile.TemporaryDirectory() as folder:
    path, _ = pipeline.run_distill(config, folder, overwrite=True, verbose=False)
    stored = kipcore.load_artifact(path / "distilled.npz")
    exported = pathlib.Path(folder, "distilled.pt")
    stored.export(exported, "torch")
    raw = datasets.load_dataset(FLAGS.dataset, FLAGS.data_dir)
    x_test, y_test = raw.x_test[: FLAGS.test_rows], raw.y_test[: FLAGS.test_rows]
    support = kipcore.Support(jnp.asarray(stored.support), jnp.asarray(stored.labels))
    x, y = stored.preprocess.apply(x_test), kipcore.one_hot_centered(y_test, raw.num_classes)
    started = time.perf_counter()
    # All images at each step, as in PyTorch.
    ours = kipcore.evaluate_network(
      0,
      kipcore.architecture("conv3"),
      support,
      x,
      y,
      FLAGS.num_seeds,
      **RECIPE,
      batch_size=len(stored.images),
      norm="instance",
    )
    between = time.perf_counter()
    theirs = pytorch_training.accuracies(exported, x_test, y_test, FLAGS.num_seeds, **RECIPE)
    seconds = {"kipcore": between - started, "pytorch": time.perf_counter() - between}
  return {
    "config": {**dataclasses.asdict(config), "data_dir": None},
    "seconds": seconds,
    **comparison([float(a) for a in ours], theirs),
  }


def comparison(ours: list[float], theirs: list[float]) -> dict:
  """Means of both implementations and of their difference, with 95 % intervals (Welch)."""
  import numpy as np
  from scipy import stats

  from kipcore.evaluation import ranking

  halves = {
    name: {
      "accuracies": found,
      "mean": float(np.mean(found)),
      "half_width": ranking.half_width(found),
    }
    for name, found in (("kipcore", ours), ("pytorch", theirs))
  }
  interval = stats.ttest_ind(theirs, ours, equal_var=False).confidence_interval(0.95)
  difference = halves["pytorch"]["mean"] - halves["kipcore"]["mean"]
  half_width = float(interval.high - interval.low) / 2
  return {
    **halves,
    "difference": difference,
    "difference_half_width": half_width,
    "agree": bool(abs(difference) <= half_width),
  }


def main() -> None:
  """Measures the sets and writes the result file."""
  from kipcore.cli.errors import UsageError

  if importlib.util.find_spec("torch") is None:
    raise UsageError("expected PyTorch to be installed; pip install torch")
  import torch

  # On shared cores, busy waiting of several threads makes PyTorch 20 times slower.
  torch.set_num_threads(1)
  from kipcore.cli.folder import run_folder
  from kipcore.evaluation import ranking
  from kipcore.types import NumericalError

  environment = run_folder.environment()
  environment["versions"]["torch"] = torch.__version__
  results = {}
  for name in SETS:
    results[name] = found = measure(name)
    ours, theirs = (
      ranking.shown(found[half]["mean"], found[half]["half_width"], found[half]["accuracies"])
      for half in ("kipcore", "pytorch")
    )
    print(
      f"{name}: kipcore {ours} %, PyTorch {theirs} %, difference "
      f"{ranking.shown(found['difference'], found['difference_half_width'])} points",
      flush=True,
    )
    recipe = {"architecture": "conv3", "norm": "instance", **RECIPE}
    run_folder.write_json(
      FLAGS.output,
      {
        "environment": environment,
        "recipe": recipe,
        "dataset": FLAGS.dataset,
        "test_rows": FLAGS.test_rows,
        "sets": results,
      },
    )
  if apart := [name for name, found in results.items() if not found["agree"]]:
    raise NumericalError(
      f"PyTorch and kipcore differ by more than the 95 % interval on {', '.join(apart)}"
    )


if __name__ == "__main__":
  common.launch(main)
