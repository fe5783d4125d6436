"""Published sets of other authors, scored with the kernels and networks of kipcore.

`python -m experiments.studies.published_sets --peers_dir=DIR --images=FILE.npz`

DIR contains rfad_cifar10_1ipc.npz (best.npz of RFAD's cifar10/1) and rcig_cifar10_1ipc.msgpack
(checkpoint_15000 of RCIG's cifar10_1), with ten images each. FILE.npz contains x_train, y_train,
x_test and y_test of CIFAR-10 with the original pixels. Each set is read by `load_published`, and
the test rows are transformed with its publisher's preprocessing, fitted on the training rows.
RFAD's set is evaluated by ridge regression under exact convolutional kernels, RCIG's set by finite
networks. Writes experiments/results/published_sets.json after each part. About 16 minutes on two
busy cores.
"""

import json
import math
import pathlib
import time

import numpy as np
from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.errors import UsageError, usage

FLAGS = flags.FLAGS

flags.DEFINE_string("peers_dir", None, "Folder of the published sets.")
flags.DEFINE_string("images", None, "CIFAR-10 or a subset of it, as an .npz file.")
flags.DEFINE_integer(
  "num_seeds", 3, "Number of networks of each kind except those of published width.", lower_bound=1
)
flags.DEFINE_string(
  "only", "", "Measure the parts whose names contain this; the others stay in the file."
)
flags.DEFINE_string("output", "experiments/results/published_sets.json", "Result file.")

FILES = {"rfad": "rfad_cifar10_1ipc.npz", "rcig": "rcig_cifar10_1ipc.msgpack"}
# Networks and their training on the whole set at each step.
# The steps for ten images, which their mirror images do not change.
_PUBLISHED = dict(w_std=1.0, b_std=0.0, width=128, width_growth=2, num_steps=1000, protocol="rcig")
_HALVED = dict(w_std=1.0, b_std=0.0, width=64, width_growth=2, num_steps=500, learning_rate=3e-4)
_OURS = {**_HALVED, "w_std": math.sqrt(2), "b_std": 0.1, "width_growth": 1}
_RCIG = "53.9 (published: five networks, all test rows)"
# name -> (set, settings of the evaluator, reference test accuracy in percent)
PARTS = {
  "rfad_conv3_nngp": (
    "rfad",
    dict(kernel="nngp"),
    "62.0 (another implementation of the kernel, on the first 1,000 test rows)",
  ),
  "rfad_conv3_ntk": (
    "rfad",
    dict(kernel="ntk"),
    "60.7 (another implementation of the kernel, on the first 1,000 test rows)",
  ),
  "rcig_network_as_wide_as_published": (
    "rcig",
    dict(mirrored=True, num_seeds=5, **_PUBLISHED),
    _RCIG,
  ),
  "rcig_network_half_as_wide": ("rcig", dict(mirrored=True, **_HALVED), _RCIG),
  "rcig_network_without_mirror_images": ("rcig", dict(mirrored=False, **_HALVED), _RCIG),
  "rcig_network_default_weights": ("rcig", dict(mirrored=True, **_OURS), _RCIG),
}
NOTES = {
  "rfad": "ridge regression on ten images under the kernel of 3 x (conv 3x3, ReLU, 2x2 average "
  "pool), "
  "flatten, dense, with weights of variance 2 / fan_in, biases of deviation 0.1, the ridge stored "
  "in the "
  "file (0.005 tr(K) / m) and one-hot labels minus 1/10",
  "rcig": "RCIG trains 3 x (conv 3x3, ReLU, 2x2 average pool) with 128, 256, 512 channels, initial "
  "weights "
  "of variance 1 / fan_in and zero biases, by Adam at 1e-4 after a warm-up of 500 steps, on the "
  "ten images "
  "and their mirror images, and scores the outputs on all test rows. Here: whitening by the given "
  "training "
  "rows, only the given test rows, and the width, steps and rate of `judge`; without a `protocol`, no "
  "warm-up and outputs minus those at initialization",
}


def measure(published, judge: dict, data, x_test) -> dict:
  """Accuracies of a set in percent: one for a kernel, one per seed for networks."""
  import kipcore
  from kipcore import checks

  y_test = np.asarray(kipcore.one_hot_centered(data.y_test, data.num_classes))
  if "kernel" in judge:
    kernel_fn = {"nngp": kipcore.nngp_fn, "ntk": kipcore.ntk_fn}[judge["kernel"]](
      kipcore.conv_net(3)
    )
    result = kipcore.evaluate_krr(
      kernel_fn, published.support(), x_test, y_test, relative_ridge=published.relative_ridge
    )
    checks.raise_for_status("ridge regression", result.status)
    return {"accuracy_percent": 100 * float(result.accuracy)}
  arch = kipcore.conv_net(3, judge["w_std"], judge["b_std"])
  module = kipcore.network(
    arch, judge["width"], data.num_classes, width_growth=judge["width_growth"]
  )
  scores = 100 * kipcore.evaluate_network(
    0,
    module,
    published.support(judge["mirrored"]),
    x_test,
    y_test,
    num_seeds=judge.get("num_seeds", FLAGS.num_seeds),
    num_steps=judge.get("num_steps"),
    learning_rate=judge.get("learning_rate"),
    # The mirror images are rows of the set.
    augmentation="",
    protocol=judge.get("protocol", "default"),
  )
  return {
    "accuracy_percent": float(scores.mean()),
    "std_percent": float(scores.std(ddof=1)) if len(scores) > 1 else None,
    "accuracies_percent": scores.tolist(),
  }


def load():
  """Published sets of the selected parts, their preprocessed test rows, and the data.

  Raises:
    UsageError: for missing flags or files.
  """
  import kipcore
  from kipcore import datasets

  if not FLAGS.peers_dir or not FLAGS.images:
    raise UsageError(
      "expected both --peers_dir and --images, got "
      + ("one of them" if FLAGS.peers_dir or FLAGS.images else "neither")
    )
  wanted = {PARTS[name][0] for name in PARTS if FLAGS.only in name}
  if not wanted:
    raise UsageError(f"--only: expected part of one of {', '.join(PARTS)}; got {FLAGS.only!r}")
  with usage():
    if not FLAGS.images.lower().endswith(".npz"):
      raise UsageError(f"--images: expected an .npz file, got {FLAGS.images}")
    data = datasets.load_dataset(FLAGS.images, validation_fraction=0.0)
    sets = {
      kind: kipcore.load_published(pathlib.Path(FLAGS.peers_dir, FILES[kind]), kind)
      for kind in FILES
      if kind in wanted
    }
    for published in sets.values():
      if published.labels.shape[1] != data.num_classes:
        raise UsageError(
          f"--images: expected {published.labels.shape[1]} classes, got {data.num_classes}"
        )
    tests = {
      kind: published.fit_preprocess(data.x_train, pixel_max=data.pixel_max).apply(data.x_test)
      for kind, published in sets.items()
    }
  return sets, tests, data


def main() -> None:
  """Measures the parts and writes the result file after each."""
  from kipcore.cli.folder import run_folder

  # Read before the runs, because the working tree may change during them.
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  parts = json.loads(path.read_text())["parts"] if path.exists() else {}
  sets, tests, data = load()
  for name, (kind, judge, reference) in PARTS.items():
    if FLAGS.only not in name:
      continue
    start, published = time.perf_counter(), sets[kind]
    measured = measure(published, judge, data, tests[kind])
    seconds = time.perf_counter() - start
    print(
      f"{name}: {measured['accuracy_percent']:.2f} % ({reference}), {seconds:.0f} s", flush=True
    )
    parts[name] = {
      "reference_percent": reference,
      **measured,
      "judge": judge,
      "note": NOTES[kind],
      "seconds": seconds,
      "commit": environment["commit"],
      "set": {
        **published.source,
        "images": len(published.images),
        "preprocess": published.preprocess,
        "labels": published.labels_note,
        "relative_ridge": published.relative_ridge,
        "temperature": published.temperature,
      },
      "training_rows": len(data.x_train),
      "test_rows": len(data.x_test),
      "hashes": dict(data.hashes),
    }
    parts = {key: parts[key] for key in PARTS if key in parts}
    run_folder.write_json(path, {"environment": environment, "parts": parts})


if __name__ == "__main__":
  common.launch(main)
