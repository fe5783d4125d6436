"""Sets for exact convolutional kernels, from coarse to fine: `python -m experiments.studies.exact_kernels --data_dir=DIR`.

Five phases: the initialization; a cheap method through finite networks; labels solved under the exact kernel; steps of KIP
under the exact kernel with few targets each; labels solved again. After each phase ridge regression under that kernel is
scored on test rows. Relative ridge and schedules were chosen on validation rows of MNIST and CIFAR-10.
A phase is skipped if its file exists in --runs_dir, so that a second start continues after the last one. Writes
experiments/results/exact_kernels.json after every phase.
"""

import dataclasses
import json
import pathlib
import time

import numpy as np
from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_string("runs_dir", "runs/exact_kernels", "Folder of the sets after each phase.")
flags.DEFINE_integer("num_seeds", 1, "Seeds of each job.", lower_bound=1)
flags.DEFINE_list("only", [], "Names of jobs to run; all if empty.")
flags.DEFINE_integer("test_rows", 2000, "Test rows to score.", lower_bound=1)
flags.DEFINE_integer("networks", 2, "Networks trained on the final images.", lower_bound=0)
flags.DEFINE_string("output", "experiments/results/exact_kernels.json", "Result file.")

PHASES = ("start", "warm", "solve", "steps", "solve_again")
_WARM = dict(method="frepo", sampler="uniform", target_batch_size=256)
_EXACT = dict(
  method="kip",
  architecture="conv3",
  kernel="ntk",
  relative_ridge=5e-3,
  learning_rate=0.02,
  schedule="cosine",
  target_batch_size=60,
)
# name -> (settings of the data, of the cheap method, of the exact steps, training rows from which labels are solved)
JOBS = {
  "mnist_1": (dict(dataset="mnist"), dict(_WARM, steps=1000), dict(_EXACT, steps=100), 5000),
  "fashion_mnist_1": (
    dict(dataset="fashion_mnist"),
    dict(_WARM, steps=1000),
    dict(_EXACT, steps=100),
    5000,
  ),
  "cifar10_1": (
    dict(dataset="cifar10", preprocess="zca"),
    dict(_WARM, steps=1500, width=64, options="flip=True"),
    dict(_EXACT, steps=100),
    2000,
  ),
  "mnist_10": (
    dict(dataset="mnist", images_per_class=10),
    dict(_WARM, steps=1000),
    dict(_EXACT, steps=50),
    2000,
  ),
}


def resolved(settings: dict, data: dict, seed: int):
  """The config of a phase."""
  from kipcore.cli import recipes

  return recipes.resolve(
    **{**data, **settings, "data_dir": FLAGS.data_dir, "seed": seed, "test_rows": FLAGS.test_rows}
  )


def solve(config, data, support, rows: int):
  """The support with the labels that fit some training rows best under the exact kernel."""
  from kipcore.cli.runs import pipeline

  drawn = np.random.default_rng(config.seed).choice(len(data.x_train), rows, False)
  return pipeline.with_solved_labels(
    config, data, support, data.x_train[drawn], data.y_train[drawn]
  )


def run_job(name: str, seed: int, record) -> None:
  """Runs the phases of a job that have no file yet; `record(phase, result)` keeps what was measured."""
  from kipcore.cli.runs import pipeline
  from kipcore.types import Support

  about, warm, exact, rows = JOBS[name]
  warm, exact = resolved(warm, about, seed), resolved(exact, about, seed)
  cheap_data, data = pipeline.load(warm), pipeline.load(exact)
  folder = pathlib.Path(FLAGS.runs_dir) / f"{name}_seed{seed}"
  folder.mkdir(parents=True, exist_ok=True)
  work = {
    "start": lambda _: pipeline.start(warm, cheap_data).support,
    "warm": lambda support: pipeline.distill(warm, cheap_data, support).support,
    "solve": lambda support: solve(exact, data, support, rows),
    "steps": lambda support: pipeline.distill(exact, data, support).support,
    "solve_again": lambda support: solve(exact, data, support, rows),
  }
  support = None
  for phase in PHASES:
    path, started = folder / f"{phase}.npz", time.perf_counter()
    if path.exists():
      with np.load(path) as file:
        support = Support(file["x"], file["y"])
      continue
    support = work[phase](support)
    seconds = time.perf_counter() - started
    found = {"accuracy": pipeline.score(exact, data, support), "seconds": seconds}
    m, batch = len(support.x), exact.target_batch_size
    pairs = {"steps": exact.steps * m * (batch + m)}
    found["kernel_pairs"] = pairs.get(phase, m * rows if "solve" in phase else 0)
    record(phase, found)
    np.savez(path, x=support.x, y=support.y)
    print(
      f"{name} seed {seed} {phase}: {100 * found['accuracy']:.2f} % ({seconds:.0f} s)", flush=True
    )
  if FLAGS.networks:
    record("networks", trained(warm, cheap_data, support))


def trained(config, data, support) -> dict:
  """Accuracy of networks trained on a set under the protocol of the cheap method."""
  from kipcore.cli.runs import trained_networks

  started = time.perf_counter()
  config = dataclasses.replace(config, network_seeds=FLAGS.networks)
  scores = trained_networks.scores(config, data, support)
  return {
    "accuracies": scores["network_test_accuracy"],
    "protocol": config.protocol,
    "width": config.width,
    "seconds": time.perf_counter() - started,
  }


def main():
  from kipcore.cli.folder import run_folder

  output, environment = pathlib.Path(FLAGS.output), run_folder.environment()
  found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"jobs": {}}
  for name, settings in JOBS.items():
    if FLAGS.only and name not in FLAGS.only:
      continue
    for seed in range(FLAGS.num_seeds):
      job = found["jobs"].setdefault(f"{name}_seed{seed}", {"phases": {}})
      keys = ("data", "warm", "steps", "label_rows")
      job.update(settings=dict(zip(keys, settings)), test_rows=FLAGS.test_rows)

      def record(phase, result, job=job):
        job["phases"][phase] = {**result, "commit": environment["commit"]}
        run_folder.write_json(output, {**found, "environment": environment})

      run_job(name, seed, record)


if __name__ == "__main__":
  common.launch(main)
