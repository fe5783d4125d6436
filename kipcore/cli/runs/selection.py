"""A selection: scores, points, weights, the measured certificate, and test accuracies."""

import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kipcore import checks, keys, krr
from kipcore.cli import clock
from kipcore.cli.config import LARGEST, SMALLEST, SelectConfig, validate
from kipcore.cli.cost import estimate, progress
from kipcore.cli.cost.estimate import Part
from kipcore.cli.errors import UsageError, usage
from kipcore.cli.folder import lock, outputs, readme, reporting, run_folder
from kipcore.cli.runs import experts, loading, pipeline
from kipcore.distillation.methods import expert_labels
from kipcore.evaluation import ranking
from kipcore.report import pictures
from kipcore.selection import absorb, certificate, coreset, crops
from kipcore.types import Support

# With more rows the dual lower bound on F*, which evaluates every kernel entry, is replaced by that of the scores.
_DUAL_ROWS = 10_000
# Compilation, and the files of the run with the import of matplotlib.
_COMPILING_SECONDS, _FILES_SECONDS = 12.0, 5.0


_RDED = "rded"


class Plan(NamedTuple):
  """A checked selection: data, as many random rows, score ridge, name of the folder."""

  data: pipeline.Data
  baseline: Support
  score_ridge: float | str
  name: str


def plan(config: SelectConfig) -> Plan:
  """Loads the data and checks everything before anything is written.

  Args:
    config: settings of the selection.

  Returns:
    A plan.

  Raises:
    UsageError: for invalid settings or data.
  """
  validate(config)
  score_ridge = _score_ridge(config.score_ridge)
  with usage():
    checks.one_of("--strategy", config.strategy, (*coreset.STRATEGIES, _RDED))
    checks.one_of("--labels", config.labels or "class", ("class", "expert"))
  data = pipeline.load(config)
  if _needs_expert(config):
    experts.check_validation(data)
    experts.rows_of(config, data)
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
  """Seconds and bytes of the parts of a selection of m points."""
  work = estimate.of_selection(
    config.strategy,
    data.x_train.shape[0],
    m,
    data.x_train[0].size,
    data.raw.num_classes,
    data.x_test.shape[0],
    _DUAL_ROWS,
  )
  seconds = estimate.seconds_of(work, data.kernel_fn, data.x_train, measure)
  seconds.append(
    Part("compiling, artifact, pictures and report", _COMPILING_SECONDS + _FILES_SECONDS)
  )
  return seconds, estimate.memory_of_selection(data, m, data.x_train.dtype)


def run_select(
  config: SelectConfig, output_dir: str | None = None, overwrite: bool = False, verbose: bool = True
) -> tuple[pathlib.Path, dict]:
  """Scores all rows, selects, certifies, and writes the run folder.

  Args:
    config: all settings.
    output_dir: run folder; None for a new one under runs/.
    overwrite: whether to replace the files of an earlier run there.
    verbose: whether to print a summary.

  Returns:
    The folder, and the content of `result.json`.

  Raises:
    UsageError: for invalid settings, data or folders.
    NumericalError: if a computation failed.
  """
  planned = plan(config)
  with lock.new_folder(output_dir, planned.name, overwrite) as folder:
    return folder, _run(config, planned, folder, verbose)


def _run(config: SelectConfig, planned: Plan, folder: pathlib.Path, verbose: bool) -> dict:
  """`run_select` in a locked folder."""
  started = clock.start()
  write = print if verbose else (lambda text: None)
  working = functools.partial(progress.working, shown=verbose)
  data, baseline, score_ridge, _ = planned
  for line in loading.notes(data):
    write(line)
  run_folder.write_config(folder, config, dataset_hashes=data.raw.hashes)
  x, y, m = jnp.asarray(data.x_train), jnp.asarray(data.y_train), baseline.x.shape[0]
  if expected := estimate.worth_reporting(*expectation(config, data, m)):
    write(expected)
  expert: Any = None
  if _needs_expert(config):
    with working("training an expert"):
      expert = _expert(config, data, folder)
  with usage(), working(f"selecting points ({config.strategy}) and scoring all rows"):
    chosen = (
      by_losses(config, data, expert)
      if config.strategy == _RDED
      else coreset.select_coreset(
        config.seed,
        x,
        y,
        config.images_per_class,
        config.strategy,
        data.kernel_fn,
        config.relative_ridge,
        score_ridge,
      )
    )
    ridge, scores = (
      (chosen.ridge, chosen.scores)
      if chosen.scores is not None
      else coreset.score_rows(config.seed, x, y, m, data.kernel_fn, score_ridge)
    )
  support, labeled, recorded = Support(chosen.x, chosen.y), {}, {}
  if config.labels == "expert":
    with working("choosing the epoch of the expert"):
      labeling = _labeling(config, data, expert, chosen.x, folder)
    labeled = {
      "class_labels_test_accuracy": support,
      "expert_random_baseline_test_accuracy": labeling.of(baseline.x),
    }
    support, recorded = labeling.of(chosen.x), labeling.result()
  used = krr.relative_ridge(data.kernel_fn.diag(chosen.x), config.relative_ridge)
  with working("solving for labels"):
    solved = krr.label_solve_rows(
      data.kernel_fn, chosen.x, x, y, float(used), coreset.objective_ridge(data.kernel_fn, x)
    )
  checks.raise_for_status("solving for the labels of the selected points", solved.status)
  with working("measuring the certificate"):
    certified = _certify(config, data.kernel_fn, x, y, ridge, chosen, scores)
  with working("scoring test rows"):
    scored = {
      "test_accuracy": support,
      "weighted_test_accuracy": _weighted(config, data, chosen, ridge),
      "solved_labels_test_accuracy": Support(chosen.x, solved.labels),
      "random_baseline_test_accuracy": baseline,
      "random_baseline_weighted_test_accuracy": _weighted(
        config, data, _as_coreset(data, baseline), ridge
      ),
      **labeled,
    }
    accuracies = {name: pipeline.score(config, data, each) for name, each in scored.items()}
  result = {
    "dataset": config.dataset,
    "strategy": config.strategy,
    "chosen_strategy": chosen.strategy,
    "seed": config.seed,
    "support_size": m,
    "labels": config.labels or "class",
    **recorded,
    "score_ridge": ridge,
    "d_eff": float(scores.effective_dimension),
    "d_eff_lower": float(scores.effective_dimension_lower),
    "total_sensitivity": float(scores.total),
    "label_mass": float(scores.label_mass),
    "max_over_mean_score": float(scores.max_over_mean),
    "second_moment": float(scores.second_moment),
    "scores_are": "exact" if scores.guarantee == 0 else "certified upper bounds",
    "measured_epsilon": certified.get("measured_epsilon"),
    "objective_ratio": certified.get("objective_ratio"),
    "objectives": chosen.objectives,
    **accuracies,
    **pipeline.scored_by(config),
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
  outputs.write_selection(folder, data, chosen, scores.scores)
  run_folder.write_json(folder / "result.json", result)
  reporting.write_report(folder)
  readme.of_selection(folder, config, result)
  write(_summary(folder, data, result))
  return result


def _needs_expert(config: SelectConfig) -> bool:
  return config.labels == "expert" or config.strategy == _RDED


def _expert(config: SelectConfig, data: pipeline.Data, folder: pathlib.Path) -> experts.Expert:
  """The expert of the file, or of the run folder."""
  path = config.experts or folder / "experts.npy"
  try:
    return experts.label_expert(config, data, path)
  except BaseException:
    if not config.experts:  # another run has another folder
      run_folder.discard_experts(folder)
    raise


def by_losses(config: SelectConfig, data: pipeline.Data, expert: experts.Expert) -> coreset.Coreset:
  """Crops of the pixels with the lowest loss of the expert after its last epoch, preprocessed."""
  dtype = data.x_train.dtype
  prepared = lambda pixels: jnp.asarray(data.preprocess.apply(np.asarray(pixels), dtype))
  chosen = crops.rded(
    config.seed,
    np.asarray(data.raw.x_train, dtype),
    data.y_train,
    config.images_per_class,
    lambda pixels, y: expert_labels.expert_losses(
      expert.module, expert.trajectory[-1], prepared(pixels), y
    ),
  )
  return dataclasses.replace(chosen, x=prepared(chosen.x))


def _labeling(
  config: SelectConfig, data: pipeline.Data, expert: experts.Expert, x, folder: pathlib.Path
) -> experts.ExpertLabels:
  """The labels at the epoch that teaches networks of the run's architecture best."""
  students = ranking.NetworkEvaluator(
    data.kernel_fn.arch,
    config.width,
    None,
    num_steps=config.network_steps or None,
    protocol="soft",
  )
  choice = experts.choose(config, data, expert, x, students, folder)
  return experts.ExpertLabels(expert, choice, expert.target_evaluations)


def _score_ridge(text: str):
  if text == "auto":
    return "auto"
  try:
    value = float(text)
  except ValueError:
    raise UsageError(f"--score_ridge: expected 'auto' or a number, got {text!r}") from None
  if not SMALLEST <= value <= LARGEST:
    raise UsageError(
      f"--score_ridge: expected 'auto' or a number from {SMALLEST:g} to {LARGEST:g}, got {text}"
    )
  return value


def _certify(config, kernel_fn, x, y, ridge, chosen, scores) -> dict:
  """The measured certificate, or the reason why there is none."""
  if (chosen.indices < 0).any():
    return {
      "note": f"{chosen.strategy} returns synthetic points, not a weighted subset of rows, so there is no certificate"
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
    # The scores have a certified lower bound on F* of their own.
    content["objective_lower"], content["objective_ratio"] = (
      lower,
      content["objective_subset"] / lower,
    )
  return content


def _as_coreset(data: pipeline.Data, support: Support) -> coreset.Coreset:
  """Class-balanced rows as a coreset, each with the weight of its share of its class."""
  classes = np.asarray(jnp.argmax(support.y, axis=1))
  counts = np.bincount(data.raw.y_train, minlength=data.raw.num_classes)
  weights = counts[classes] / np.bincount(classes, minlength=counts.size)[classes]
  rows = np.full(classes.size, -1, np.int32)
  return coreset.Coreset(
    support.x, support.y, rows, jnp.asarray(weights, support.x.dtype), "uniform"
  )


def _weighted(config: SelectConfig, data: pipeline.Data, chosen: coreset.Coreset, ridge) -> Support:
  """The weighted regression on a coreset, at the ridge of the scores, as labels for an unweighted one."""
  used = krr.relative_ridge(data.kernel_fn.diag(chosen.x), config.relative_ridge)
  return absorb.absorb_weights(data.kernel_fn, chosen, ridge, used)[0]


def _summary(folder, data: pipeline.Data, result: dict) -> str:
  kind, m = pipeline.noun(data), result["support_size"]
  accuracy, random = result["test_accuracy"], result["random_baseline_test_accuracy"]
  percent = lambda name: f"{100 * result[name]:.1f} %"
  lines = [
    f"{m} {kind} selected by {result['chosen_strategy']}: {100 * accuracy:.2f} % test accuracy, "
    f"{pipeline.compared(accuracy, random)} {m} random ones ({100 * random:.1f} %)",
    f"weighted regression: {percent('weighted_test_accuracy')}, random "
    f"{percent('random_baseline_weighted_test_accuracy')}; with labels solved on all rows: "
    f"{percent('solved_labels_test_accuracy')}",
    f"effective dimension {result['d_eff']:.1f}, total sensitivity {result['total_sensitivity']:.1f}, "
    f"max / mean score {result['max_over_mean_score']:.2f}",
  ]
  if "expert_epoch" in result:
    lines.insert(
      1,
      f"with labels of an expert after epoch {result['expert_epoch']} of {result['expert_epochs']}; with class labels: "
      f"{percent('class_labels_test_accuracy')}, random ones with expert labels: "
      f"{percent('expert_random_baseline_test_accuracy')}",
    )
  if accuracy < random:
    lines.append(f"warning: the selection is worse than random {kind}; try another --strategy")
  scores = next(i for i, line in enumerate(lines) if line.startswith("effective dimension"))
  if result["measured_epsilon"] is not None:
    lines[scores] += f", measured epsilon {result['measured_epsilon']:.2f}"
  if result["objective_ratio"] is not None:
    lines[scores] += f", F/F* at most {result['objective_ratio']:.2f}"
  lines.append(f"{result['wall_seconds']:.1f} s in total")
  files = ", ".join(run_folder.visible_files(folder))
  return "\n".join([*lines, f"written to {folder}: {files}"])
