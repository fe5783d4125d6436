"""Sets that teach networks: `python -m experiments.studies.networks --data_dir=DIR --runs_dir=RUNS`.

Distills each dataset with RaT-BPTT or FRePo through the command's own pipeline and scores it by training five networks on all test
rows, next to random real images and to the initialization under the same protocol. Runs are resumed from their checkpoints.
Writes experiments/results/networks.json and the pictures in experiments/results/networks/; jobs that --only excludes keep their results in the file. Ten to forty minutes per
job on two cores.
"""

import json
import pathlib
import shutil

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.config import CheckpointConfig

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_string("runs_dir", "runs/networks", "Folder of the runs.")
flags.DEFINE_integer("num_seeds", 1, "Seeds of each job.", lower_bound=1)
flags.DEFINE_list("only", [], "Names of jobs to run; all if empty.")
flags.DEFINE_string("output", "experiments/results/networks.json", "Result file.")

_SCORED = dict(network_seeds=5, test_rows=0, checkpoint_seconds=60.0)
_RATBPTT = dict(method="ratbptt", **_SCORED)
_FREPO = dict(method="frepo", sampler="uniform", target_batch_size=256, **_SCORED)
# name -> (settings, goal and published accuracy of networks in percent)
JOBS = {
  "mnist_1": (dict(_RATBPTT, dataset="mnist", steps=1500), "92 (FRePo 93.0)"),
  "mnist_10": (
    dict(_FREPO, dataset="mnist", images_per_class=10, steps=1000),
    "97.5 (FRePo 98.6)",
  ),
  "fashion_mnist_1": (
    dict(_RATBPTT, dataset="fashion_mnist", sampler="cross_entropy", steps=2000),
    "74 (FRePo 75.6)",
  ),
  # With the sampler of MNIST and more steps.
  "fashion_mnist_1_uniform": (
    dict(_RATBPTT, dataset="fashion_mnist", steps=3000),
    "74 (FRePo 75.6)",
  ),
  # With the method of CIFAR-10.
  "fashion_mnist_1_frepo": (
    dict(_FREPO, dataset="fashion_mnist", steps=2000),
    "74 (FRePo 75.6)",
  ),
  "fashion_mnist_10": (
    dict(_FREPO, dataset="fashion_mnist", images_per_class=10, steps=1000),
    "85 (FRePo 86.2)",
  ),
  "fashion_mnist_10_wide": (
    dict(_FREPO, dataset="fashion_mnist", images_per_class=10, width=64, steps=1200),
    "85 (FRePo 86.2)",
  ),
  "mnist_10_wide": (
    dict(_FREPO, dataset="mnist", images_per_class=10, width=64, steps=1000),
    "97.5 (FRePo 98.6)",
  ),
  "cifar10_1": (
    dict(_FREPO, dataset="cifar10", preprocess="zca", width=64, steps=1500, options="flip=True"),
    "42 (FRePo 46.8, RaT-BPTT 53.2)",
  ),
  # The same from real images, which shorter and narrower runs learn more from.
  "cifar10_1_sensitivity": (
    dict(
      _FREPO,
      dataset="cifar10",
      preprocess="zca",
      init="krr_sensitivity",
      width=64,
      steps=1500,
      options="flip=True",
    ),
    "42 (FRePo 46.8, RaT-BPTT 53.2)",
  ),
  "cifar10_10": (
    dict(
      _FREPO,
      dataset="cifar10",
      preprocess="zca",
      images_per_class=10,
      width=64,
      steps=2000,
      options="flip=True",
    ),
    "58 (FRePo 65.5, RaT-BPTT 69.4)",
  ),
}
# `--minutes=5` as users run it: two networks score the result on 2,000 test rows within the five minutes.
JOBS |= {
  f"{dataset}_1_in_5_minutes": (dict(dataset=dataset, minutes=5.0, checkpoint_seconds=60.0), goal)
  for dataset, goal in (
    ("mnist", "88"),
    ("fashion_mnist", "above the others"),
    ("cifar10", "above the others"),
  )
}
_KEPT = (
  "method",
  "init",
  "sampler",
  "steps",
  "target_evaluations",
  "network_scored_by",
  "network_protocol",
  "network_test_accuracy",
  "network_test_accuracy_mean",
  "network_test_accuracy_std",
  "random_baseline_network_test_accuracy_mean",
  "init_network_test_accuracy_mean",
  "test_rows",
  "wall_seconds",
)


def run_job(settings: dict, seed: int, folder: pathlib.Path) -> dict:
  """The result of one run, from its folder if it is finished."""
  from kipcore.cli import recipes
  from kipcore.cli.folder import resume
  from kipcore.cli.runs import pipeline

  given = {name: value for name, value in settings.items() if name != "checkpoint_seconds"}
  checkpoints = CheckpointConfig(checkpoint_seconds=settings["checkpoint_seconds"])
  if (folder / "README.txt").exists():  # the last file of a run
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
  if (folder / "config.json").exists():
    config = resume.config_of(str(folder), {})
    checkpoints = CheckpointConfig(checkpoint_seconds=settings["checkpoint_seconds"], resume=True)
  else:
    given |= {"seed": seed, "data_dir": FLAGS.data_dir}
    config = recipes.resolve(**given)
  return pipeline.run_distill(
    config, str(folder), checkpoints=checkpoints, cheaper=recipes.cheaper(given)
  )[1]


def result_commit(folder: pathlib.Path) -> str | None:
  """The commit of the code that made a run."""
  return json.loads((folder / "config.json").read_text(encoding="utf-8"))["environment"]["commit"]


def main():
  from kipcore.cli.folder import run_folder

  output = pathlib.Path(FLAGS.output)
  found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"jobs": {}}
  for name, (settings, reference) in JOBS.items():
    if FLAGS.only and name not in FLAGS.only:
      continue
    runs = []
    for seed in range(FLAGS.num_seeds):
      result = run_job(settings, seed, pathlib.Path(FLAGS.runs_dir) / f"{name}_seed{seed}")
      commit = result_commit(pathlib.Path(FLAGS.runs_dir) / f"{name}_seed{seed}")
      runs.append(
        {"seed": seed, "commit": commit, **{key: result[key] for key in _KEPT if key in result}}
      )
    pictures = output.with_suffix("")
    pictures.mkdir(exist_ok=True)
    shutil.copyfile(
      pathlib.Path(FLAGS.runs_dir) / f"{name}_seed0" / "images.png", pictures / f"{name}.png"
    )
    found["jobs"][name] = {"settings": settings, "goal": reference, "runs": runs}
    found["environment"] = run_folder.environment()
    run_folder.write_json(output, found)
    accuracies = [100 * run["network_test_accuracy_mean"] for run in runs]
    print(name, [f"{a:.2f}" for a in accuracies], "goal", reference)


if __name__ == "__main__":
  common.launch(main)
