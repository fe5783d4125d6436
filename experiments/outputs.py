"""The files of a run about its result: artefact and pictures."""

import dataclasses
import pathlib

import numpy as np

from kipcore import artifact, report
from experiments import run_folder


def write_artifact(folder, config, data, support, result: dict) -> None:
  """`distilled.npz` with everything that `run_evaluate` needs."""
  x = np.asarray(support.x)
  metadata = {
      "dataset": {"name": config.dataset, "num_classes": data.raw.num_classes, "hashes": data.raw.hashes,
                  "class_names": list(data.raw.class_names) if data.raw.class_names else None, "note": data.raw.note,
                  "validation_fraction": config.validation_fraction, "test_rows": data.x_test.shape[0]},
      "config": dataclasses.asdict(config),
      "environment": run_folder.environment(),
      "result": result,
  }
  artifact.save_artifact(folder / "distilled.npz", artifact.Artifact(
      data.preprocess.invert(x, x.dtype), np.asarray(support.y), x, data.preprocess, data.score_kernel.arch,
      data.score_kernel.get, config.relative_ridge, metadata))


def write_pictures(folder, data, start, support, history: list, result: dict) -> None:
  """`images.png`, start and end side by side, where rows are images, and `learning_curve.png`, where there was a loop."""
  if support.x.ndim == 4 and support.x.shape[-1] in (1, 3):
    before, after = (data.preprocess.invert(np.asarray(s.x)) for s in (start, support))
    report.save_image_grid(folder / "images.png", before, after, np.argmax(np.asarray(start.y), axis=1),
                           pixel_range(data), data.raw.class_names)
  if history:
    report.save_learning_curve(folder / "learning_curve.png", history, {
        "random real images (test)": result["random_baseline_test_accuracy"],
        "distilled (test)": result["test_accuracy"]})


def pixel_range(data) -> tuple[float, float]:
  """(black, white) of a dataset, for pictures."""
  return float(np.min(data.raw.x_train)), float(np.max(data.raw.x_train))


def slug(dataset: str) -> str:
  """A dataset's name as part of a file name."""
  return pathlib.Path(dataset).stem
