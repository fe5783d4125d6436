"""Pictures of distilled images: `python -m experiments.docs.gallery --data_dir=DIR`.

Uses the default recipe of `run_distill` (FC1) on several datasets and sizes. Writes each picture to
experiments/results/gallery with a JSON file of the same name, which contains its caption, config,
accuracies, seconds and environment. Takes four minutes on two cores; needs MNIST, Fashion-MNIST and
CIFAR-10 prepared by TFDS.
"""

import dataclasses
import functools
import io
import pathlib
import time
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments.docs import tables
from kipcore.cli import flags as common
from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import UsageError

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
flags.DEFINE_list("only", [], "Names of the pictures to make; empty for all.")
flags.DEFINE_integer("steps", 2000, "Optimizer steps of each run.", lower_bound=0)
flags.DEFINE_string(
  "output_dir", "experiments/results/gallery", "Folder of the pictures and their JSON files."
)

HARDEST = 20  # images
# Picture -> kind, dataset, images per class. Pictures of the same dataset or run are adjacent, so
# that each is loaded or run once.
PICTURES = {
  "mnist_10": ("images", "mnist", 10),
  "mnist_1": ("images", "mnist", 1),
  "mnist_hardest": ("hardest", "mnist", 1),
  "mnist_starts": ("starts", "mnist", 1),
  "fashion_mnist_1": ("images", "fashion_mnist", 1),
  "fashion_mnist_hardest": ("hardest", "fashion_mnist", 1),
  "cifar10_10": ("images", "cifar10", 10),
  "cifar10_1": ("images", "cifar10", 1),
  "cifar10_hardest": ("hardest", "cifar10", 1),
  "cifar10_starts": ("starts", "cifar10", 1),
}


class Run(NamedTuple):
  """A run: data, `pipeline.Start`, `Outcome`, accuracies in percent, and JSON content."""

  data: tuple
  start: tuple
  outcome: tuple
  start_percent: float
  distilled_percent: float
  random_percent: float
  record: dict

  def images(self) -> tuple[np.ndarray, np.ndarray]:
    """Start and distilled images in pixel space."""
    return tuple(
      self.data.preprocess.invert(np.asarray(s.x))
      for s in (self.start.support, self.outcome.support)
    )


@functools.lru_cache(maxsize=1)
def _data(dataset: str, data_dir: str | None):
  from kipcore.cli.runs import pipeline

  return pipeline.load(DistillConfig(dataset=dataset, data_dir=data_dir))


@functools.lru_cache(maxsize=2)
def run(config: DistillConfig) -> Run:
  """Distills and scores; results are cached per config."""
  from kipcore import keys
  from kipcore.cli.runs import pipeline

  started = time.perf_counter()
  pipeline.check(config)
  data = _data(config.dataset, config.data_dir)
  percent = lambda support: 100 * pipeline.score(config, data, support)
  random = [
    percent(
      pipeline.random_support(
        keys.stream(config.seed, f"baseline {draw}"), data, config.images_per_class
      )
    )
    for draw in range(3)
  ]
  start = pipeline.start(config, data)
  outcome = pipeline.distill(config, data, start.support)
  scores = {
    "random_real_percent": float(np.mean(random)),
    "random_real_percent_std": float(np.std(random, ddof=1)),
    "start_percent": percent(start.support),
    "distilled_percent": percent(outcome.support),
  }
  record = {
    "config": {**dataclasses.asdict(config), "data_dir": None},
    "note": data.raw.note,
    "support_size": start.support.x.shape[0],
    "training_rows": data.x_train.shape[0],
    "test_rows": data.x_test.shape[0],
    "target_evaluations": start.target_evaluations + outcome.target_evaluations,
    **scores,
    "step_seconds": outcome.seconds,
    "compile_seconds": outcome.compile_seconds,
    "wall_seconds": time.perf_counter() - started,
  }
  return Run(
    data,
    start,
    outcome,
    scores["start_percent"],
    scores["distilled_percent"],
    scores["random_real_percent"],
    record,
  )


def title_of(config: DistillConfig) -> str:
  """Dataset and size in words."""
  number = {1: "one image"}.get(config.images_per_class, f"{config.images_per_class} images")
  return f"{tables.TITLES.get(config.dataset, config.dataset)}, {number} per class"


def images(config: DistillConfig, path: pathlib.Path) -> dict:
  """Draws the start above (or next to) the distilled images.

  Args:
    config: config of the run.
    path: PNG file name.

  Returns:
    Content of the JSON file except the environment; accuracies in percent.
  """
  from kipcore.cli.folder import outputs
  from kipcore.report import pictures

  made = run(config)
  name = "class means" if config.images_per_class == 1 else "k-means centers"
  titles = (
    f"start, {name}: {made.start_percent:.1f} %",
    f"distilled, {config.steps:,} steps: {made.distilled_percent:.1f} %",
  )
  pictures.save_image_grid(
    path,
    *made.images(),
    np.argmax(np.asarray(made.start.coreset.y), axis=1),
    outputs.pixel_range(made.data),
    made.data.raw.class_names,
    titles,
  )
  caption = (
    f"{title_of(config)}: test accuracy of kernel ridge regression (NTK of FC1) on random real "
    "images of the same number "
    f"{made.random_percent:.1f} %, on the start with its best labels {made.start_percent:.1f} %, "
    "on the distilled images "
    f"{made.distilled_percent:.1f} %, after {config.steps:,} steps in {made.outcome.seconds:.0f} s."
  )
  return {"caption": caption, **made.record}


def starts(config: DistillConfig, path: pathlib.Path) -> dict:
  """Draws random rows and class means, each with the images distilled from them; see `images`."""
  from kipcore.cli.folder import outputs
  from kipcore.report import pictures

  panels, records, parts = [], {}, []
  for init, name in (("uniform", "random images"), ("kmeans", "class means")):
    made = run(dataclasses.replace(config, init=init))
    labels = np.argmax(np.asarray(made.start.coreset.y), axis=1)
    order, names = (
      np.argsort(labels, kind="stable"),
      made.data.raw.class_names or range(made.data.raw.num_classes),
    )
    for title, x in zip(
      (
        f"start, {name}: {made.start_percent:.1f} %",
        f"distilled from them: {made.distilled_percent:.1f} %",
      ),
      made.images(),
    ):
      panels.append((title, x[order], [str(names[labels[i]]) for i in order]))
    records[init] = made.record
    parts.append(
      f"{name} {made.start_percent:.1f} %, distilled from them {made.distilled_percent:.1f} %"
    )
  pictures.save_image_rows(path, panels, outputs.pixel_range(made.data))
  return {
    "caption": f"{title_of(config)}, test accuracy of kernel ridge regression: {'; '.join(parts)}.",
    "runs": records,
  }


def hardest(config: DistillConfig, path: pathlib.Path) -> dict:
  """Draws the training images with the highest latest sampler scores; see `images`.

  Titles are the classes and the predicted classes.
  """
  from kipcore.cli.folder import outputs
  from kipcore.report import pictures

  made = run(config)
  rows, predicted = outputs.hardest_rows(
    config, made.data, made.outcome.support, made.outcome.scores, HARDEST
  )
  names = made.data.raw.class_names or range(made.data.raw.num_classes)
  labels = made.data.raw.y_train[rows]
  captions = [
    f"{names[a]}\n→ {names[b]}" if a != b else f"{names[a]}" for a, b in zip(labels, predicted)
  ]
  pictures.save_image_rows(
    path, [("", made.data.raw.x_train[rows], captions)], outputs.pixel_range(made.data)
  )
  caption = (
    f"{tables.TITLES.get(config.dataset, config.dataset)}: the training images with the largest "
    f"{config.sampler} at their latest draw, for "
    f"{made.record['support_size']} distilled images: label → predicted label."
  )
  return {
    "caption": caption,
    "hardest": [
      {
        "row": int(i),
        "score": float(made.outcome.scores[i]),
        "class": str(names[a]),
        "taken_for": str(names[b]),
      }
      for i, a, b in zip(rows, labels, predicted)
    ],
    **made.record,
  }


def shrink(path: pathlib.Path) -> None:
  """Rewrites a PNG losslessly without transparency, in grayscale if it has no color."""
  from PIL import Image  # a dependency of matplotlib

  from kipcore.io import atomic

  content = io.BytesIO()
  with Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB"))
  gray = (pixels == pixels[..., :1]).all()
  Image.fromarray(pixels[..., 0] if gray else pixels).save(content, "PNG", optimize=True)
  atomic.write_atomically(path, content.getvalue())


def main() -> None:
  """Makes the pictures, each with its JSON file."""
  from kipcore.cli.folder import run_folder

  # Read before the runs, because the working tree may change during them.
  environment = run_folder.environment()
  if unknown := sorted(set(FLAGS.only) - set(PICTURES)):
    raise UsageError(
      f"--only: expected names among {', '.join(PICTURES)}; got {', '.join(unknown)}"
    )
  folder = pathlib.Path(FLAGS.output_dir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(
      f"--output_dir: cannot write to {folder} ({error.strerror or error})"
    ) from error
  for name, (kind, dataset, per_class) in PICTURES.items():
    if FLAGS.only and name not in FLAGS.only:
      continue
    config = DistillConfig(
      dataset=dataset, data_dir=FLAGS.data_dir, images_per_class=per_class, steps=FLAGS.steps
    )
    path = folder / f"{name}.png"
    made = {"images": images, "starts": starts, "hardest": hardest}[kind](config, path)
    shrink(path)
    run_folder.write_json(
      path.with_suffix(".json"), {"environment": environment, "picture": path.name, **made}
    )
    print(made["caption"], flush=True)


if __name__ == "__main__":
  common.launch(main)
