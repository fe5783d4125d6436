"""`--dry_run`: loads the data, checks all settings, and prints estimates of time and memory; writes nothing."""

import dataclasses
import sys
import time

import jax
from tqdm import tqdm

from kipcore.cli.config import CompareConfig, DistillConfig, EvaluateConfig, SelectConfig
from kipcore.cli.cost import estimate, progress
from kipcore.cli.cost.estimate import Part
from kipcore.cli.folder import readme, run_folder
from kipcore.cli.runs import comparison, evaluation, loading, measure, pipeline, selection

_READING = "reading and preprocessing the data"


def of_distillation(
  config: DistillConfig,
  output_dir: str | None = None,
  overwrite: bool = False,
  resume: bool = False,
) -> None:
  """Prints what `pipeline.run_distill` would do with the same arguments; raises the same UsageError."""
  started = time.perf_counter()
  planned = pipeline.plan(config)
  config = planned.config
  folder = run_folder.planned(output_dir, planned.name, overwrite or resume)
  reading = Part(_READING, time.perf_counter() - started)
  print("\n".join([*loading.notes(planned.data), pipeline.description(config, planned)]))
  print(_settings(config))
  process = _Process(planned.data)
  with progress.working(f"measuring {config.method}"):
    seconds, stored = measure.distillation(config, planned)
  _print([reading, *seconds], process.with_program(stored))
  _end(readme.distillation_command(config), folder)


def of_selection(
  config: SelectConfig, output_dir: str | None = None, overwrite: bool = False
) -> None:
  """Prints what `selection.run_select` would do with the same arguments; raises the same UsageError."""
  started = time.perf_counter()
  planned = selection.plan(config)
  folder = run_folder.planned(output_dir, planned.name, overwrite)
  reading, data, m = (
    Part(_READING, time.perf_counter() - started),
    planned.data,
    planned.baseline.x.shape[0],
  )
  print(
    f"{config.dataset}: {data.x_train.shape[0]:,} training, {data.x_test.shape[0]:,} test {pipeline.rows_of(data)}, "
    f"{data.raw.num_classes} classes\n{m} points ({config.images_per_class} per class) by {config.strategy}, scores with the "
    f"{config.kernel} of {config.architecture}"
  )
  own = _Process(data)
  with progress.working("measuring the kernel"):
    seconds, stored = selection.expectation(config, data, m, measure=True)
  _print([reading, *seconds], own.with_program(stored))
  _end(readme.selection_command(config), folder)


def of_comparison(
  config: CompareConfig, shared: dict, output_dir: str | None = None, overwrite: bool = False
) -> None:
  """Prints what `comparison.run_compare` would do with the same arguments; measures a cell of each method."""
  resolved = comparison.plan(config, shared)
  _, known = comparison.opened(config, resolved, output_dir, overwrite)
  done = {comparison.cell_of(row) for row in known or ()}
  missing = {cell: each for cell, each in resolved.items() if cell not in done}
  folder = output_dir if known is not None else run_folder.planned(output_dir, "compare", overwrite)
  print(
    f"{len(resolved)} cells, {len(resolved) - len(missing)} of them finished: {len(config.methods)} methods x {len(config.inits)} initializations x "
    f"{len(config.samplers)} samplers x {config.num_seeds} seeds (methods without a loop: one sampler)"
  )
  seconds, stored = [], []
  for method in dict.fromkeys(cell.method for cell in missing):
    own = [each for cell, each in missing.items() if cell.method == method]
    with progress.working(f"measuring {method}"):
      planned = pipeline.plan(own[-1], comparison.loaded(own[-1]))
      planned = planned._replace(sizes=planned.sizes._replace(validation=0, scores=2))
      process = _Process(planned.data)
      parts, memory = measure.distillation(own[-1], planned)
    samplers = {other.sampler for other in own}
    # Cells with the same sampler share compilation, and with the same seed also the experts.
    shared_parts = {
      "compiling": len(samplers),
      "experts": len({(other.sampler, other.seed) for other in own}),
      "artifact": 1,
    }
    times = [
      next((count for name, count in shared_parts.items() if name in part.name), len(own))
      for part in parts
    ]
    each = sum(part.amount for part, count in zip(parts, times) if count == len(own))
    seconds.append(
      Part(
        f"{method}: {len(own)} cells of {estimate.duration(each)}, and shared parts",
        sum(count * part.amount for part, count in zip(parts, times)),
      )
    )
    stored.append(Part(method, sum(part.amount for part in process.with_program(memory))))
    tqdm.write(f"{method}: {_settings(own[-1])}", file=sys.stdout)
  if missing:
    _print(seconds, stored, None)
  _end(readme.comparison_command(config, shared), folder)


def of_evaluation(stored, config: EvaluateConfig, command: str, output: str | None = None) -> None:
  """Prints what `evaluation.run_evaluate` would do with the same arguments; raises the same UsageError.

  Random rows stand for the baselines, which are not made.
  """
  started = time.perf_counter()
  planned = evaluation.plan(stored, config, stand_ins=True)
  sets, data = planned.evaluation.sets, planned.evaluation.data
  print(
    f"{planned.evaluation.config.dataset}: {len(stored.images)} distilled {pipeline.noun(data)}, "
    f"{data.x_train.shape[0]:,} training, {data.x_test.shape[0]:,} test {pipeline.rows_of(data)}\n"
    f"{len(planned.todo)} scores of {', '.join(sets)} by {', '.join(planned.evaluators)}; {config.num_seeds} networks or draws "
    "each"
  )
  reading = Part(_READING, time.perf_counter() - started)
  with progress.working("measuring"):
    seconds = [
      Part(
        f"{key}: {sum(other == key for _, other in planned.todo)} sets",
        evaluation.expected_seconds(
          planned.evaluation,
          {key: each},
          [pair for pair in planned.todo if pair[1] == key],
          config,
        ),
      )
      for key, each in planned.evaluators.items()
    ]
  print("\nestimated time, without that of making the baselines" + (" and of --tune" * config.tune))
  print(estimate.listed([reading, *seconds], estimate.duration))
  place = f"the result is also written to {output}" if output else "the result is only printed"
  print(f"\nNothing was written. Without --dry_run, {place}:\n  {command}")


class _Process:
  """Memory of the process beyond the known parts, if main memory is that of the device."""

  def __init__(self, data):
    self._dataset = Part("the dataset as read and as preprocessed", estimate.dataset_bytes(data))
    self._read = self._peak()

  def with_program(self, stored: list[Part]) -> list[Part]:
    """All parts; `stored` may not have been allocated yet, and was not while reading."""
    if jax.default_backend() != "cpu":
      return stored
    rest = (
      max(self._read, self._peak() - sum(part.amount for part in stored)) - self._dataset.amount
    )
    program = Part("Python, JAX, compiled code, copies while reading", max(rest, 0.0))
    return [program, self._dataset, *stored]

  def _peak(self) -> float:
    return run_folder.peak_memory().get("peak_memory_bytes", 0.0)


def _settings(config: DistillConfig) -> str:
  """The settings that differ from the defaults, which are those of kip."""
  changed = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != field.default
    and field.name not in ("dataset", "data_dir", "method", "teach", "experts", "seed")
  }
  return "settings other than kip's defaults: " + (
    ", ".join(f"{name}={value}" for name, value in changed.items()) or "none"
  )


def _print(seconds: list[Part], stored: list[Part], total: str | None = "total") -> None:
  print("\nestimated time\n" + estimate.listed(seconds, estimate.duration))
  print("\nestimated memory per device\n" + estimate.listed(stored, estimate.memory, total))
  if available := estimate.available_bytes():
    needed = (max if total is None else sum)(
      part.amount for part in stored if not part.name.endswith("on disk")
    )
    print(
      f"  of {estimate.memory(available)} available"
      + ("; IT MAY NOT FIT" if needed > available else "")
    )


def _end(command: str, folder) -> None:
  print(f"\nNothing was written. Without --dry_run, results go to {folder}:\n  {command}")
