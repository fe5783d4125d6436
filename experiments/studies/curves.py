"""Accuracy of trained networks against target evaluations: `python -m experiments.studies.curves --data_dir=DIR`.

Each method runs with uniform and k-means starts and with uniform and loss-dependent targets; networks are trained on the set
under the protocol of the method after a few steps and at the end. Finished runs are kept in the result file, so that a second
call continues. Writes experiments/results/curves.json and curves.png; about 3 minutes per run on one core.
"""

import json
import pathlib

import numpy as np
from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_integer("num_seeds", 3, "Seeds of each arm.", lower_bound=1)
flags.DEFINE_integer("networks", 2, "Networks trained on each set.", lower_bound=1)
flags.DEFINE_list("only", [], "Names of settings to run, such as mnist-frepo; all if empty.")
flags.DEFINE_string("output", "experiments/results/curves.json", "Result file.")

_COMMON = dict(test_rows=2000, log_test_accuracy=False)
# name -> (settings, steps after which networks are trained)
SETTINGS = {
  "mnist-frepo": (dict(dataset="mnist", method="frepo", steps=300), (0, 10, 30, 100, 300)),
  "mnist-ratbptt": (dict(dataset="mnist", method="ratbptt", steps=150), (0, 10, 30, 150)),
}
ARMS = {
  "uniform start, uniform targets": dict(init="uniform", sampler="uniform"),
  "k-means start, uniform targets": dict(init="kmeans", sampler="uniform"),
  "uniform start, targets by loss": dict(init="uniform", sampler="cross_entropy"),
  "k-means start, targets by loss": dict(init="kmeans", sampler="cross_entropy"),
}


def curve_of(settings: dict, steps: tuple[int, ...], seed: int, networks: int) -> dict:
  """Target evaluations and mean accuracy of networks at some steps of a run."""
  from kipcore.cli import recipes
  from kipcore.cli.runs import comparison, pipeline, trained_networks

  config = recipes.resolve(**_COMMON, **settings, seed=seed, network_seeds=networks)
  data = comparison.loaded(config)
  start = pipeline.start(config, data)
  batch, found = pipeline.batch_size_of(config, data), {}

  def score(step, support, record):
    scores = trained_networks.scores(config, data, support)
    found[step] = scores["network_test_accuracy_mean"]

  outcome = pipeline.distill(config, data, start.support, log_steps=steps, callback=score)
  extra = start.target_evaluations + outcome.target_evaluations - config.steps * batch
  evaluations = [extra + step * batch if step else 0 for step in steps]
  return {
    "seed": seed,
    "evaluations": evaluations,
    "accuracies": [found[step] for step in steps],
    "protocol": config.protocol,
    "width": config.width,
    "seconds": outcome.seconds,
  }


def panels(settings: dict) -> dict:
  """The lines of the figure: panel -> arm -> (target evaluations, mean, deviation) in percent."""
  titles = {"mnist": "MNIST", "frepo": "FRePo", "ratbptt": "RaT-BPTT"}
  found: dict = {}
  for name, arms in settings.items():
    panel = found.setdefault(", ".join(titles[part] for part in name.split("-")), {})
    for arm, runs in arms.items():
      values = 100 * np.array([run["accuracies"][1:] for run in runs])
      spread = values.std(0, ddof=1) if len(runs) > 1 else np.zeros(values.shape[1])
      panel[arm] = list(zip(runs[0]["evaluations"][1:], values.mean(0), spread))
  return found


def main():
  from kipcore.cli.folder import run_folder
  from kipcore.report import pictures

  output = pathlib.Path(FLAGS.output)
  results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"settings": {}}
  for name, (settings, steps) in SETTINGS.items():
    if FLAGS.only and name not in FLAGS.only:
      continue
    for seed in range(FLAGS.num_seeds):
      for arm, changes in ARMS.items():
        runs = results["settings"].setdefault(name, {}).setdefault(arm, [])
        if any(run["seed"] == seed for run in runs):
          continue
        given = {**settings, **changes, "data_dir": FLAGS.data_dir}
        runs.append(curve_of(given, steps, seed, FLAGS.networks))
        results["environment"] = run_folder.environment()
        run_folder.write_json(output, results)
        shown = " ".join(f"{100 * accuracy:.1f}" for accuracy in runs[-1]["accuracies"])
        print(f"{name}, {arm}, seed {seed}: {shown}", flush=True)
  pictures.save_comparison(
    output.with_suffix(".png"),
    panels(results["settings"]),
    "target evaluations",
    "test accuracy, %",
    log_x=True,
  )


if __name__ == "__main__":
  common.launch(main)
