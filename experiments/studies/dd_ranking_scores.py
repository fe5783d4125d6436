"""Scores of DD-Ranking 0.2.0, by its own package, next to ours: `python -m experiments.studies.dd_ranking_scores`.

The package requires PyTorch and NumPy 1, so it runs in an interpreter of its own: --python=VENV/bin/python, after
`pip install ddranking` there. It scores the set of --artifact, as many random real images and the k-means centers, with
hard labels (and with --soft also with soft labels and a teacher), on a CPU. DD-Ranking trains 10 networks for each score
and draw, so --num_epochs, --num_eval, --train_rows and --test_rows decide how long it takes. The rows are those of
kipcore's dataset, which DD-Ranking need not know. Writes experiments/results/dd_ranking.json.
"""

import json
import pathlib
import subprocess
import tempfile
import time

import numpy as np
from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string("artifact", None, "The `distilled.npz` of a run.")
flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_string("python", "python3", "Interpreter in which ddranking is installed.")
flags.DEFINE_integer("num_eval", 5, "Draws of each score.", lower_bound=1)
flags.DEFINE_integer(
  "num_epochs",
  300,
  "Epochs of each network; a test every 10, with soft labels every 20.",
  lower_bound=20,
)
flags.DEFINE_integer(
  "full_epochs", 20, "Epochs of the network on all training rows.", lower_bound=1
)
flags.DEFINE_integer("train_rows", 0, "Training rows, evenly spaced; 0 for all.", lower_bound=0)
flags.DEFINE_integer("test_rows", 0, "Test rows, the first ones; 0 for all.", lower_bound=0)
flags.DEFINE_bool("soft", False, "Also the score with soft labels.")
flags.DEFINE_string(
  "protocol", "dc", "Protocol of our networks; see --protocol of kipcore-evaluate."
)
flags.DEFINE_integer("num_seeds", 5, "Networks of our evaluation per set.", lower_bound=1)
flags.DEFINE_integer("width", 128, "Channels of our networks.", lower_bound=1)
flags.DEFINE_integer(
  "network_steps", 0, "Steps of our networks; 0 for the protocol's.", lower_bound=0
)
flags.DEFINE_string("output", "experiments/results/dd_ranking.json", "Result file.")

NOTES = (
  "score = (e^a - e^-1) / (e - e^-1), a = (gain over random images - gap to all data) / 2",
  "DD-Ranking 0.2.0 inserts percentages: 'as_fractions' is the score of the same means as fractions, as in its paper",
  "DD-Ranking keeps the best test accuracy over epochs and over five learning rates; our accuracy is that after the last step",
  "DD-Ranking's seeds come from the clock; ours are 0, 1, ...",
  "DD-Ranking's gap is that of hard labels, also in the score with soft labels",
)


def prepare(folder: pathlib.Path):
  """Writes the sets, rows and settings for DD-Ranking; returns the evaluation and its sets by name."""
  import kipcore
  from kipcore.cli.config import EvaluateConfig
  from kipcore.cli.errors import UsageError
  from kipcore.cli.runs import evaluation
  from kipcore.io import ddranking

  if not FLAGS.artifact:
    raise UsageError("--artifact: expected a file, got none")
  stored = kipcore.load_artifact(FLAGS.artifact)
  config = EvaluateConfig(
    baselines=("uniform", "kmeans"), num_seeds=1, data_dir=FLAGS.data_dir, test_rows=FLAGS.test_rows
  )
  prepared = evaluation.prepare(stored, config, evaluation.print_progress)
  data, about = prepared.data, stored.metadata["dataset"]
  invert = lambda x: np.asarray(data.preprocess.invert(np.asarray(x)))
  sets = {name: supports[0] for name, supports in prepared.sets.items()}
  for name, support in sets.items():
    pixels = stored.images if name == "distilled" else invert(support.x)
    scored = ddranking.for_ddranking(
      pixels, np.asarray(support.y), data.preprocess, data.raw.pixel_max, about
    )
    (folder / name).mkdir()
    for part, array in scored.arrays.items():
      np.save(folder / name / f"{part}.npy", array)
    settings = scored.settings
  space = ddranking.space_of(about, data.preprocess, data.raw.pixel_max, data.raw.x_train.shape[1:])
  stride = -(-len(data.x_train) // FLAGS.train_rows) if FLAGS.train_rows else 1
  for split, x, y in (
    ("train", data.raw.x_train[::stride], data.raw.y_train[::stride]),
    ("test", data.raw.x_test[: len(data.x_test)], data.raw.y_test[: len(data.x_test)]),
  ):
    whitened = (
      np.asarray(data.preprocess.apply(x)).transpose(0, 3, 1, 2) if space.whitened else None
    )
    np.save(folder / f"{split}_images.npy", space.inputs(x) if whitened is None else whitened)
    np.save(folder / f"{split}_labels.npy", y)
  settings |= {
    "num_eval": FLAGS.num_eval,
    "num_epochs": FLAGS.num_epochs,
    "step_size": max(FLAGS.num_epochs // 2, 1),
    "full_epochs": FLAGS.full_epochs,
    "soft": FLAGS.soft,
    "sets": list(sets),
    "save_path": str(folder / "scores" / "scores.csv"),
    "random_data_path": str(folder / "random"),
    "teacher_dir": str(folder / "teachers"),
  }
  (folder / "settings.json").write_text(json.dumps(settings))
  return prepared, sets, settings, stride


def ours(prepared, sets, stride: int) -> dict:
  """Accuracies and label-robust scores of our evaluation."""
  import jax.numpy as jnp

  import kipcore
  from kipcore.cli.runs import loading

  data = prepared.data
  names = dict(norm="instance", protocol=FLAGS.protocol, num_steps=FLAGS.network_steps or None)
  side = loading.architecture_of(
    prepared.config.__class__(architecture=loading.AUTO), data.x_train.shape[1:]
  )
  supports = {
    **sets,
    "full": kipcore.Support(
      jnp.asarray(data.x_train[::stride]), jnp.asarray(data.y_train[::stride])
    ),
  }
  found = {
    name: [
      float(a)
      for a in kipcore.evaluate_network(
        0,
        kipcore.architecture(side),
        support,
        data.x_test,
        data.y_test,
        FLAGS.num_seeds if name != "full" else 1,
        FLAGS.width,
        **names,
      )
    ]
    for name, support in supports.items()
  }
  mean = {name: float(np.mean(values)) for name, values in found.items()}
  scores = {
    name: kipcore.ranking_scores(mean[name], mean["uniform"], mean["full"])._asdict()
    for name in sets
  }
  return {"architecture": side, "accuracies": found, "scores": scores}


def as_fractions(scores: dict) -> float:
  """The label-robust score of DD-Ranking's means, as fractions instead of percentages."""
  gain, gap = (
    scores[f"{name}_mean"] / 100 for name in ("improvement_over_random", "hard_label_recovery")
  )
  return float((np.exp((gain - gap) / 2) - np.exp(-1)) / (np.e - np.exp(-1)))


def main() -> None:
  """Runs DD-Ranking and our evaluation and writes the result file."""
  from kipcore.cli.errors import UsageError
  from kipcore.cli.folder import run_folder

  environment = run_folder.environment()
  here = str(pathlib.Path(__file__).parent)
  program = f"import sys; sys.path.insert(0, {here!r}); import dd_ranking_worker; dd_ranking_worker.run(sys.argv[1])"
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    prepared, sets, settings, stride = prepare(folder)
    started = time.perf_counter()
    try:
      done = subprocess.run([FLAGS.python, "-c", program, folder], capture_output=True, text=True)
    except OSError as error:
      raise UsageError(
        f"--python: expected an interpreter, got {FLAGS.python} ({error})"
      ) from error
    if done.returncode:
      lines = done.stderr.strip().splitlines() or ["no message"]
      raise UsageError(
        f"--python: expected ddranking 0.2.0 to run in {FLAGS.python}, got status {done.returncode}: {lines[-1]}"
      )
    theirs = json.loads((folder / "result.json").read_text())
    seconds = {"ddranking": time.perf_counter() - started}
  for kind in ("hard", "soft"):
    for scores in theirs.get(kind, {}).values():
      scores["as_fractions"] = as_fractions(scores)
  started = time.perf_counter()
  evaluated = ours(prepared, sets, stride)
  seconds["kipcore"] = time.perf_counter() - started
  run_folder.write_json(
    FLAGS.output,
    {
      "environment": environment,
      "artifact": pathlib.Path(FLAGS.artifact).name,
      "dataset": prepared.config.dataset,
      "training_rows": -(-len(prepared.data.x_train) // stride),
      "test_rows": len(prepared.data.x_test),
      "settings": {k: v for k, v in settings.items() if not k.endswith(("_path", "_dir"))},
      "protocol": {
        "name": FLAGS.protocol,
        "width": FLAGS.width,
        "steps": FLAGS.network_steps or None,
      },
      "notes": NOTES,
      "ddranking": theirs,
      "kipcore": evaluated,
      "seconds": seconds,
    },
  )
  for name in sets:
    hard = theirs["hard"][name]
    print(
      f"{name}: DD-Ranking gain {hard['improvement_over_random_mean']:.1f}, gap {hard['hard_label_recovery_mean']:.1f} points, "
      f"score {hard['label_robust_score_mean']:.3g} (as fractions {hard['as_fractions']:.3f}); kipcore "
      f"{100 * np.mean(evaluated['accuracies'][name]):.1f} %, score {evaluated['scores'][name]['label_robust']:.3f}"
    )


if __name__ == "__main__":
  common.launch(main)
