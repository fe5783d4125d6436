"""Selection without distillation: scores, points, weights, and the measured certificate."""

import functools
import pathlib
import time
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kipcore import checks, keys, krr
from kipcore.cli.config import SelectConfig
from kipcore.cli.cost import estimate, progress
from kipcore.cli.errors import UsageError, usage
from kipcore.cli.folder import outputs, readme, reporting, run_folder
from kipcore.cli.runs import pipeline
from kipcore.report import pictures
from kipcore.selection import absorb, certificate, coreset
from kipcore.types import Support

# Beyond this the dual lower bound on F*, which evaluates every kernel entry, is left to the scores.
_DUAL_ROWS = 10_000


class Plan(NamedTuple):
  """A selection that has been checked: its data, as many random rows, the score ridge, and the name of its folder."""

  data: pipeline.Data
  baseline: Support
  score_ridge: float | str
  name: str


def plan(config: SelectConfig) -> Plan:
  """Loads the data and checks everything, before anything is written.

  Raises:
    UsageError: for anything that the user can mend.
  """
  score_ridge = _score_ridge(config.score_ridge)
  with usage():
    coreset.checks.one_of("strategy", config.strategy, coreset.STRATEGIES)
    coreset.checks.positive("relative_ridge", config.relative_ridge)
  data = pipeline.load(config)
  baseline = pipeline.random_support(
    keys.stream(config.seed, "baseline 0"), data, config.images_per_class
  )
  return Plan(
    data,
    baseline,
    score_ridge,
    f"{outputs.slug(config.dataset)}-{config.strategy}-ipc{config.images_per_class}-seed{config.seed}",
  )


def expectation(
  config: SelectConfig, data: pipeline.Data, m: int, measure: bool = False
) -> tuple[list, list]:
  """Seconds and bytes of the parts of a selection of m points; see `estimate.seconds_of`."""
  work = estimate.of_selection(
    config.strategy,
    data.x_train.shape[0],
    m,
    data.x_train[0].size,
    data.raw.num_classes,
    data.x_test.shape[0],
    _DUAL_ROWS,
  )
  return estimate.seconds_of(
    work, data.kernel_fn, data.x_train, measure
  ), estimate.memory_of_selection(data, m, data.x_train.dtype)


def run_select(
  config: SelectConfig, output_dir: str | None = None, overwrite: bool = False, verbose: bool = True
) -> tuple[pathlib.Path, dict]:
  """Scores all rows, selects, certifies, and writes the run folder.

  Args:
    config: all choices.
    output_dir: run folder; None for a new one under runs/.
    overwrite: replace the files of an earlier run there.
    verbose: print a summary.

  Returns:
    The folder, and the content of `result.json`.

  Raises:
    UsageError: for anything that the user can mend; NumericalError where numbers failed.
  """
  started = time.perf_counter()
  say = print if verbose else (lambda text: None)
  working = functools.partial(progress.working, shown=verbose)
  data, baseline, score_ridge, name = plan(config)
  folder = run_folder.create(output_dir, name, overwrite)
  run_folder.write_config(folder, config, dataset_hashes=data.raw.hashes)
  x, y, m = jnp.asarray(data.x_train), jnp.asarray(data.y_train), baseline.x.shape[0]
  if expected := estimate.worth_reporting(*expectation(config, data, m)):
    say(expected)
  with usage(), working(f"choosing points ({config.strategy}) and scoring all rows"):
    chosen = coreset.select_coreset(
      config.seed,
      x,
      y,
      config.images_per_class,
      config.strategy,
      data.kernel_fn,
      config.relative_ridge,
      score_ridge,
    )
    ridge, scores = (
      (chosen.ridge, chosen.scores)
      if chosen.scores is not None
      else coreset.score_rows(config.seed, x, y, m, data.kernel_fn, score_ridge)
    )
  used = krr.relative_ridge(data.kernel_fn.diag(chosen.x), config.relative_ridge)
  support = Support(chosen.x, chosen.y)
  if chosen.ridge is not None:
    support, _ = absorb.absorb_weights(data.kernel_fn, chosen, ridge, used)
  with working("solving for labels"):
    solved = krr.label_solve_rows(
      data.kernel_fn, chosen.x, x, y, float(used), coreset.objective_ridge(data.kernel_fn, x)
    )
  checks.raise_for_status("solving for the labels of the points", solved.status)
  with working("measuring the certificate"):
    certified = _certify(config, data.kernel_fn, x, y, ridge, chosen, scores)
  with working("scoring test rows"):
    accuracies = [
      pipeline.score(config, data, each)
      for each in (support, Support(chosen.x, solved.labels), baseline)
    ]
  result = {
    "dataset": config.dataset,
    "strategy": config.strategy,
    "chosen_strategy": chosen.strategy,
    "seed": config.seed,
    "support_size": m,
    "score_ridge": ridge,
    "d_eff": float(scores.effective_dimension),
    "d_eff_lower": float(scores.effective_dimension_lower),
    "total_sensitivity": float(scores.total),
    "label_mass": float(scores.label_mass),
    "max_over_mean_score": float(scores.max_over_mean),
    "second_moment": float(scores.second_moment),
    "scores_are": "exact" if scores.guarantee == 0 else "certified over-estimates",
    "measured_epsilon": certified.get("measured_epsilon"),
    "objective_ratio": certified.get("objective_ratio"),
    "objectives": chosen.objectives,
    **dict(
      zip(
        ("test_accuracy", "solved_labels_test_accuracy", "random_baseline_test_accuracy"),
        accuracies,
      )
    ),
  }
  run_folder.write_json(folder / "certificate.json", certified)
  pictures.save_scores(
    folder / "certificate.png", np.asarray(scores.scores), chosen.indices, certified
  )
  images = data.preprocess.invert(np.asarray(chosen.x))
  if images.ndim == 4 and images.shape[-1] in (1, 3):
    pictures.save_image_grid(
      folder / "images.png",
      data.preprocess.invert(np.asarray(baseline.x)),
      images,
      np.argmax(np.asarray(chosen.y), axis=1),
      outputs.pixel_range(data),
      data.raw.class_names,
      titles=("random", chosen.strategy),
    )
  result.update(wall_seconds=time.perf_counter() - started, **run_folder.peak_memory())
  outputs.write_artifact(folder, config, data, support, result)
  outputs.save_arrays(
    folder / "selection.npz", indices=chosen.indices, weights=chosen.weights, scores=scores.scores
  )
  run_folder.write_json(folder / "result.json", result)
  reporting.write_report(folder)
  readme.of_selection(folder, config, result)
  say(_summary(folder, result))
  return folder, result


def _score_ridge(text: str):
  if text == "auto":
    return "auto"
  try:
    value = float(text)
  except ValueError:
    raise UsageError(f"--score_ridge: expected 'auto' or a number, got {text!r}") from None
  if not value > 0 or not np.isfinite(value):
    raise UsageError(f"--score_ridge: expected a finite number > 0, got {text}")
  return value


def _certify(config, kernel_fn, x, y, ridge, chosen, scores) -> dict:
  """The measured certificate, or why there is none."""
  if (chosen.indices < 0).any():
    return {
      "note": f"{chosen.strategy} makes points that are not rows: no weighted subset, so no certificate"
    }
  measured = certificate.measure_coreset(
    config.seed,
    kernel_fn,
    x,
    y,
    ridge,
    chosen.indices,
    chosen.weights,
    num_landmarks=min(1000, x.shape[0]),
    dual_steps=1 if x.shape[0] <= _DUAL_ROWS else 0,
    total_sensitivity=float(scores.total),
  )
  content = measured.as_dict()
  lower = float(scores.objective)
  if content["objective_lower"] is None and lower > 0:
    # The scores come with a certified lower bound on F* of their own.
    content["objective_lower"], content["objective_ratio"] = (
      lower,
      content["objective_subset"] / lower,
    )
  return content


def _summary(folder, result: dict) -> str:
  epsilon, ratio = result["measured_epsilon"], result["objective_ratio"]
  certified = (
    ""
    if epsilon is None
    else f"; measured epsilon {epsilon:.2f}"
    + (f", F/F* at most {ratio:.2f}" if ratio is not None else "")
  )
  return (
    f"{result['support_size']} points by {result['chosen_strategy']}: "
    f"{100 * result['test_accuracy']:.1f} % test accuracy ({100 * result['solved_labels_test_accuracy']:.1f} % with "
    f"solved labels), random {100 * result['random_baseline_test_accuracy']:.1f} %\n"
    f"effective dimension {result['d_eff']:.1f}, total sensitivity {result['total_sensitivity']:.1f}, "
    f"max / mean score {result['max_over_mean_score']:.2f}{certified}\nwritten to {folder}: "
    + ", ".join(sorted(file.name for file in folder.iterdir()))
  )
