"""The files of a run about its result: artifact and pictures."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from kipcore import krr
from kipcore.cli.folder import run_folder
from kipcore.io import artifact, npz
from kipcore.report import pictures

HARDEST = 40  # training images that are kept of a run


def write_artifact(folder, config, data, support, result: dict) -> None:
  """`distilled.npz` with everything that `run_evaluate` needs, and no times: equal runs write equal bytes."""
  x, settings = np.asarray(support.x), dataclasses.asdict(config)
  if "experts" in settings:  # whose folder is the run's own
    settings["experts"] = pathlib.Path(settings["experts"]).name
  metadata = {
    "dataset": {
      "name": config.dataset,
      "num_classes": data.raw.num_classes,
      "hashes": data.raw.hashes,
      "class_names": list(data.raw.class_names) if data.raw.class_names else None,
      "note": data.raw.note,
      "pixel_max": data.raw.pixel_max,
      "pixel_range": pixel_range(data),
      "validation_fraction": config.validation_fraction,
      "test_rows": data.x_test.shape[0],
    },
    "config": settings,
    "environment": run_folder.environment(),
    "result": {
      name: value
      for name, value in result.items()
      if not name.endswith(("_seconds", "_memory_bytes"))
    },
  }
  artifact.save_artifact(
    folder / "distilled.npz",
    artifact.Artifact(
      data.preprocess.invert(x, x.dtype),
      np.asarray(support.y),
      x,
      data.preprocess,
      data.score_kernel.arch,
      data.score_kernel.get,
      config.relative_ridge,
      metadata,
    ),
  )


def write_pictures(folder, data, start, classes, support, history: list, result: dict) -> None:
  """`images.png`, start and end side by side, where rows are images, and `learning_curve.png`, where there was a loop.

  `start.npz` has the start itself: `images` in pixel space, `labels`, and the `classes` `(m,)` that they were chosen for, of which
  solved labels may disagree.
  """
  save_arrays(
    folder / "start.npz",
    images=data.preprocess.invert(np.asarray(start.x)),
    labels=np.asarray(start.y),
    classes=classes,
  )
  if support.x.ndim == 4 and support.x.shape[-1] in (1, 3):
    before, after = (data.preprocess.invert(np.asarray(s.x)) for s in (start, support))
    pictures.save_image_grid(
      folder / "images.png", before, after, classes, pixel_range(data), data.raw.class_names
    )
  if history:
    pictures.save_learning_curve(
      folder / "learning_curve.png",
      history,
      {
        "random real images (test)": result["random_baseline_test_accuracy"],
        "distilled (test)": result["test_accuracy"],
      },
    )


def write_importance(folder, config, data, support, scores) -> None:
  """`importance.npz`, where the sampler has seen rows: those of all training rows, the images of the highest, and their `predicted` classes.

  These are of kernel ridge regression on the support, as test accuracy is.
  """
  if scores is None or not np.isfinite(scores).any():
    return
  hardest, predicted = hardest_rows(config, data, support, scores)
  save_arrays(
    folder / "importance.npz",
    scores=scores,
    labels=data.raw.y_train,
    hardest=hardest,
    images=data.raw.x_train[hardest],
    predicted=predicted,
  )


def hardest_rows(
  config, data, support, scores, number: int = HARDEST
) -> tuple[np.ndarray, np.ndarray]:
  """Training rows with the highest known scores, in that order, and the classes that ridge regression on the support gives them."""
  known = np.flatnonzero(np.isfinite(scores))
  hardest = known[np.argsort(-scores[known], kind="stable")[:number]]
  k_ss, k_ts = (
    data.score_kernel(support.x, None),
    data.score_kernel(jnp.asarray(data.x_train[hardest]), support.x),
  )
  fit = krr.krr_fit(k_ss, support.y, krr.relative_ridge(k_ss, config.relative_ridge))
  return hardest, np.argmax(np.asarray(krr.krr_predict(fit, k_ts)), axis=1)


def save_arrays(path: pathlib.Path, **arrays) -> None:
  """An `.npz` file of a run with its checksums; its format goes by its name."""
  npz.save_checked(path, arrays, f"kipcore-{path.stem}", 1)


def load_arrays(path: pathlib.Path, *names: str) -> list[np.ndarray]:
  """Arrays of a file that `save_arrays` wrote; `npz.NpzError` for one that is not whole."""
  arrays, _ = npz.load_checked(path, f"kipcore-{path.stem}", 1, names)
  return [arrays[name] for name in names]


def pixel_range(data) -> tuple[float, float]:
  """(black, white) of a dataset, for pictures."""
  return float(np.min(data.raw.x_train)), float(np.max(data.raw.x_train))


def slug(dataset: str) -> str:
  """A dataset's name as part of a file name."""
  return pathlib.Path(dataset).stem
