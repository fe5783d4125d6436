"""Ablation of start and target sampler: `python -m experiments.studies.ablation --data_dir=DIR`.

All arms of a setting get the same seeds and the same number of target evaluations (batches, scoring
passes and the solve for the labels of the start). An arm is an initialization and a sampler with
its exponent, uniform share and batch size. Choices are made by validation accuracy on MNIST and
CIFAR-10; test accuracy is also reported. Writes experiments/results/ablation.json after each arm:

  final       accuracy at the end
  area        mean accuracy over all target evaluations
  reaches     target evaluations until the mean final accuracy of uniform/uniform, or null

All settings take about an hour on two cores; --only=mnist-1/ runs one setting.
"""

import dataclasses
import functools
import json
import pathlib

import numpy as np
from absl import flags

from experiments.docs.tables import DEFAULT, REFERENCE
from kipcore.cli import flags as common
from kipcore.cli.config import DistillConfig

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_integer("num_seeds", 5, "Seeds of each arm.", lower_bound=1)
flags.DEFINE_string(
  "only",
  "",
  "Rerun the arms whose names (setting/arm) contain this; by default, run arms missing from the "
  "file.",
)
flags.DEFINE_string("output", "experiments/results/ablation.json", "Result file.")

_KMEANS = dict(init="kmeans")
_CE = dict(_KMEANS, sampler="cross_entropy")
# Changes relative to a uniform start with one-hot labels and uniform targets.
ARMS = {
  REFERENCE: {},
  "kmeans/uniform": _KMEANS,
  "kmeans solved/uniform": dict(_KMEANS, solve_labels=True),
  "uniform/cross_entropy": dict(sampler="cross_entropy"),
  "kmeans/cross_entropy": _CE,
  DEFAULT: dict(_CE, solve_labels=True),
  "kmeans/cross_entropy e=0": dict(_CE, weight_exponent=0.0),
  "kmeans/cross_entropy e=0.5": dict(_CE, weight_exponent=0.5),
  "kmeans/cross_entropy e=1": dict(_CE, weight_exponent=1.0),
  "kmeans/cross_entropy e=0.5 g=0.1": dict(_CE, weight_exponent=0.5, uniform_mix=0.1),
  "kmeans/cross_entropy e=0.5 refreshed": dict(_CE, weight_exponent=0.5, refresh_every=500),
  "kmeans/squared_error": dict(_KMEANS, sampler="squared_error"),
  "kmeans/margin": dict(_KMEANS, sampler="margin"),
  "kmeans/residual_norm e=0.5 always": dict(
    _KMEANS, sampler="residual_norm", weight_exponent=0.5, least_gain=1.0
  ),
  "kmeans/cross_entropy e=0.5 always": dict(_CE, weight_exponent=0.5, least_gain=1.0),
  "kmeans/cross_entropy e=1 always": dict(_CE, weight_exponent=1.0, least_gain=1.0),
  "kmeans/uniform b=250": dict(_KMEANS, target_batch_size=250),
  "kmeans/cross_entropy e=0.5 b=250": dict(_CE, weight_exponent=0.5, target_batch_size=250),
  "kmeans/uniform b=4000": dict(_KMEANS, target_batch_size=4000),
  "kmeans/cross_entropy e=0.5 b=4000": dict(_CE, weight_exponent=0.5, target_batch_size=4000),
}
_PARTS = tuple(ARMS)[:6]
_EXPONENTS = tuple(f"kmeans/cross_entropy e={e}" for e in (0, 0.5, 1))
_FOUR = (REFERENCE, "kmeans/uniform", "kmeans/cross_entropy", DEFAULT)
# If importance sampling switches itself off (CIFAR-10), its results are bit-identical to those of
# the uniform sampler, so only the arms that never switch it off are run.
_OFF = (REFERENCE, "kmeans/uniform", DEFAULT)
# (dataset, images per class) -> (target evaluations, arms)
SETTINGS = {
  ("mnist", 1): (
    2_000_000,
    tuple(name for name in ARMS if not name.startswith("kmeans/cross") or "always" not in name),
  ),
  ("mnist", 10): (2_000_000, (*_PARTS, *_EXPONENTS)),
  ("cifar10", 1): (1_000_000, (*_OFF, *(name for name in ARMS if "always" in name))),
  ("cifar10", 10): (1_000_000, (*_OFF, "kmeans/cross_entropy e=0.5 always")),
  ("fashion_mnist", 1): (2_000_000, _FOUR),
  ("fashion_mnist", 10): (2_000_000, _FOUR),
}


def arm_config(
  dataset: str, images_per_class: int, evaluations: int, changes: dict, num_rows: int
) -> DistillConfig:
  """The config of an arm, with the number of steps that the evaluations allow.

  A pass over all rows costs `num_rows` evaluations.
  """
  config = DistillConfig(
    dataset=dataset,
    images_per_class=images_per_class,
    **{
      "init": "uniform",
      "sampler": "uniform",
      "solve_labels": False,
      "target_batch_size": 1000,
      **changes,
    },
  )
  batch, every = config.target_batch_size, config.refresh_every
  left = evaluations - (num_rows if config.solve_labels else 0)
  if not every:
    return dataclasses.replace(config, steps=left // batch)
  period = every * batch + num_rows
  return dataclasses.replace(
    config, steps=left // period * every + min(left % period // batch, every)
  )


@functools.lru_cache(maxsize=1)
def _loaded(config: DistillConfig):
  import jax.numpy as jnp

  from kipcore.cli.runs import pipeline

  data = pipeline.load(config)
  # The rows that are scored at every logged step stay on the device.
  return data._replace(
    **{
      name: jnp.asarray(getattr(data, name))
      for name in ("x_validation", "y_validation", "x_test", "y_test")
    }
  )


@functools.cache
def _started(config: DistillConfig):
  from kipcore.cli.runs import pipeline

  return pipeline.start(
    config,
    _loaded(dataclasses.replace(config, images_per_class=1, init="uniform", solve_labels=False)),
  )


def load(dataset: str, images_per_class: int, changes: dict, seed: int, data_dir):
  """Data and start of a run, which the arms of a setting share."""
  data = DistillConfig(
    dataset=dataset, seed=seed, data_dir=data_dir, init="uniform", solve_labels=False
  )
  start = {name: changes[name] for name in ("init", "solve_labels") if name in changes}
  return _loaded(data), _started(
    dataclasses.replace(data, images_per_class=images_per_class, **start)
  )


def run(config: DistillConfig, data, start) -> dict:
  """Runs one arm; returns accuracies in percent at the logged target evaluations, and the cost."""
  from kipcore.cli.runs import pipeline

  evaluations, curves = [], {"validation": [], "test": []}
  pass_rows = data.x_train.shape[0] / config.refresh_every if config.refresh_every else 0

  def callback(step, current, record):
    evaluations.append(
      round(start.target_evaluations + step * (config.target_batch_size + pass_rows))
    )
    curves["validation"].append(
      round(100 * pipeline.score(config, data, current, data.x_validation, data.y_validation), 3)
    )
    curves["test"].append(round(100 * pipeline.score(config, data, current), 3))

  outcome = pipeline.distill(config, data, start.support, callback)
  return {
    "seed": config.seed,
    "final": curves["test"][-1],
    "final_validation": curves["validation"][-1],
    "area": area(evaluations, curves["test"]),
    "step_seconds": outcome.seconds,
    "target_evaluations": start.target_evaluations + outcome.target_evaluations,
    "curve": {"evaluations": evaluations, **curves},
  }


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
  return float(
    x[i] if i == 0 else x[i - 1] + (accuracy - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1])
  )


def summarize(arms: dict) -> dict:
  """Mean and deviation of each arm of a setting, and the evaluations to reach the reference."""
  goal = np.mean([r["final"] for r in arms[REFERENCE]]) if REFERENCE in arms else None
  table = {}
  for name, runs in arms.items():
    row = {}
    for key in ("final", "final_validation", "area"):
      values = [r[key] for r in runs]
      row[key] = {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
      }
    if goal is not None:
      found = [reaches(r["curve"], goal) for r in runs]
      row["reaches"] = None if None in found else float(np.mean(found))
    table[name] = row
  return table


def main() -> None:
  """Runs the arms seed by seed and writes the result file after each setting and seed."""
  from kipcore.cli.folder import run_folder

  # Read before the runs, because the working tree may change during them.
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  settings = json.loads(path.read_text())["settings"] if path.exists() else {}
  for (dataset, images_per_class), (evaluations, arms) in SETTINGS.items():
    name = f"{dataset}-{images_per_class}"
    known = settings.get(name, {"arms": {}, "configs": {}})
    wanted = [
      arm
      for arm in arms
      if FLAGS.only in f"{name}/{arm}"
      and (FLAGS.only or len(known["arms"].get(arm, ())) < FLAGS.num_seeds)
    ]
    fresh = {arm: [] if FLAGS.only else list(known["arms"].get(arm, ())) for arm in wanted}
    for seed in range(FLAGS.num_seeds if wanted else 0):
      for arm in wanted:
        if seed in (r["seed"] for r in fresh[arm]):
          continue
        data, start = load(dataset, images_per_class, ARMS[arm], seed, FLAGS.data_dir)
        config = arm_config(
          dataset, images_per_class, evaluations, ARMS[arm], data.x_train.shape[0]
        )
        fresh[arm].append(run(dataclasses.replace(config, seed=seed), data, start))
        known["configs"][arm] = {
          **dataclasses.asdict(config),
          "seed": None,
          "commit": environment["commit"],
        }
        print(
          f"{name} {arm} seed {seed}: {fresh[arm][-1]['final']:.2f} (area "
          f"{fresh[arm][-1]['area']:.2f}), "
          f"{fresh[arm][-1]['step_seconds']:.0f} s",
          flush=True,
        )
      found = {**known["arms"], **fresh}
      known.update(evaluations=evaluations, arms={arm: found[arm] for arm in arms if arm in found})
      settings[name] = {**known, "summary": summarize(known["arms"])}
      run_folder.write_json(path, {"environment": environment, "settings": settings})


if __name__ == "__main__":
  common.launch(main)
