"""Result files of a run: artifact, pictures and arrays."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from kipcore import krr
from kipcore.cli.folder import run_folder
from kipcore.io import artifact, npz
from kipcore.report import pictures

HARDEST = 40  # number of training images that are stored


def write_artifact(folder, config, data, support, result: dict) -> None:
  """`distilled.npz` with everything that an evaluation needs, without times, so that equal runs write equal bytes."""
  x, settings = np.asarray(support.x), dataclasses.asdict(config)
  if "experts" in settings:  # a path, which may differ between equal runs
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
  """`images.png` (start and end side by side) for images, and `learning_curve.png` if there are logged steps.

  `start.npz` contains the start: `images` in pixel space, `labels`, and the intended `classes` `(m,)`, which may differ
  from the largest label if labels were solved for.
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
      reference_lines(result),
    )


def write_selection(folder, data, chosen, scores) -> None:
  """`selection.npz`; if `--fill` added rows, with `sources`: the row that each row is or was made of."""
  sources = data.raw.train_sources
  save_arrays(
    folder / "selection.npz",
    indices=chosen.indices,
    weights=chosen.weights,
    scores=scores,
    **({} if sources is None else {"sources": sources}),
  )


def reference_lines(result: dict) -> dict[str, float]:
  """The horizontal lines of the learning curve."""
  return {
    "distilled, test": result["test_accuracy"],
    "random real data, test": result["random_baseline_test_accuracy"],
  }


def compared_networks(
  result: dict, random: str = "random real data", initial: str = "the initialization"
) -> dict[str, float]:
  """Accuracies of networks trained on the sets that a result is compared with, by what to call the sets."""
  names = {
    "random_baseline": random,
    "init": initial,
    "expert_random_baseline": f"{random} with expert labels",
    "expert_init": f"{initial} with expert labels",
  }
  scores = {name: f"{key}_network_test_accuracy_mean" for key, name in names.items()}
  return {name: result[key] for name, key in scores.items() if key in result}


def write_importance(folder, config, data, support, scores) -> None:
  """`importance.npz`, if the sampler has scores: scores of all training rows, and the images with the highest ones.

  Their `predicted` classes are those of kernel ridge regression on the support.
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
  """Training rows with the highest known scores, in that order, and their predicted classes."""
  known = np.flatnonzero(np.isfinite(scores))
  hardest = known[np.argsort(-scores[known], kind="stable")[:number]]
  k_ss, k_ts = (
    data.score_kernel(support.x, None),
    data.score_kernel(jnp.asarray(data.x_train[hardest]), support.x),
  )
  fit = krr.krr_fit(k_ss, support.y, krr.relative_ridge(k_ss, config.relative_ridge))
  return hardest, np.argmax(np.asarray(krr.krr_predict(fit, k_ts)), axis=1)


def save_arrays(path: pathlib.Path, **arrays) -> None:
  """Writes an `.npz` file with checksums; its format is named after the file."""
  npz.save_checked(path, arrays, f"kipcore-{path.stem}", 1)


def load_arrays(path: pathlib.Path, *names: str) -> list[np.ndarray]:
  """Arrays of a file that `save_arrays` wrote; `npz.NpzError` if it is damaged."""
  arrays, _ = npz.load_checked(path, f"kipcore-{path.stem}", 1, names)
  return [arrays[name] for name in names]


def pixel_range(data) -> tuple[float, float]:
  """(black, white) of a dataset, for pictures."""
  return float(np.min(data.raw.x_train)), float(np.max(data.raw.x_train))


def slug(dataset: str) -> str:
  """A dataset's name as part of a file name."""
  return pathlib.Path(dataset).stem
