"""A selection of rows of a file: `kipcore-select --input=FILE`."""

import contextlib
import math
import pathlib
import re
import time
from typing import Any, NamedTuple

import numpy as np

from kipcore import blocks, checks
from kipcore.cli import clock
from kipcore.cli.config import RowsConfig, validate
from kipcore.cli.cost import estimate, progress
from kipcore.cli.errors import UsageError, usage
from kipcore.cli.folder import lock, outputs, readme, reporting, run_folder
from kipcore.datasets import row_files
from kipcore.selection import rows, rows_certificate, streamed_rows
from kipcore.types import DatasetError

# With more bytes of rows, "auto" chooses a strategy that reads them in blocks.
AUTO_BYTES = 2**30
_BLOCK_ROWS = 4096
_CERTIFICATE_BYTES = 2**26  # of rows that are held for the certificate
# What `result.json` contains of the certificate.
_MEASURED = (
  "mmd",
  "random_mmd",
  "error",
  *(f"{m}_error{of}" for m in rows_certificate.MODELS for of in ("", "_all", "_random")),
)


class Plan(NamedTuple):
  """A checked selection: the open file, the strategy, whether rows are read in blocks, and bytes of all rows as floats."""

  file: row_files.RowFile
  strategy: str
  streamed: bool
  num_bytes: int
  size: int
  name: str


def plan(config: RowsConfig) -> Plan:
  """Opens the file and checks everything that needs no pass over the rows.

  Args:
    config: settings of the selection.

  Returns:
    A plan.

  Raises:
    UsageError: for invalid settings or data.
  """
  validate(config)
  with _file_errors():
    checks.one_of("--strategy", config.strategy, rows.STRATEGIES)
    file = row_files.open_rows(
      config.input,
      config.target or None,
      config.input_weights or None,
      config.input_labels or None,
      config.ignore,
      config.task,
    )
    n = file.x.shape[0]
    mass = rows.input_weights(file.weights, n)
    labels = rows.read_labels(file.y, n, mass > 0)
    rows.check_labels(config.strategy, labels)
    size = rows.check_size(
      labels, mass, config.size or None, config.size_per_class or None, config.allocation
    )
  num_bytes = math.prod(file.x.shape) * (8 if config.x64 else 4)
  strategy = config.strategy
  if strategy == "auto" and num_bytes > AUTO_BYTES:
    strategy = "lightweight"
  streamed = strategy in streamed_rows.STRATEGIES
  available = estimate.available_bytes()
  if not streamed and available is not None and 4 * num_bytes > available:
    raise UsageError(
      f"--strategy: expected one that reads rows in blocks ({', '.join(streamed_rows.STRATEGIES)}), got {strategy}, "
      f"which needs about {4 * num_bytes / 2**30:.1f} GiB of {available / 2**30:.1f} GiB that are available"
    )
  name = f"{outputs.slug(config.input)}-{config.strategy}-{size}-seed{config.seed}"
  return Plan(file, strategy, streamed, num_bytes, size, name)


def run_rows(
  config: RowsConfig, output_dir: str | None = None, overwrite: bool = False, verbose: bool = True
) -> tuple[pathlib.Path, dict]:
  """Selects rows and writes the run folder.

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


def describe(config: RowsConfig, output_dir: str | None = None, overwrite: bool = False) -> None:
  """`--dry_run`: prints what `run_rows` would do; raises the same UsageError, and writes nothing."""
  planned = plan(config)
  folder = run_folder.planned(output_dir, planned.name, overwrite)
  print(
    f"{_data(config, planned)}\n{_how(planned)}\n{readme.rows_command(config)}\nwould write to {folder}"
  )


def _run(config: RowsConfig, planned: Plan, folder: pathlib.Path, verbose: bool) -> dict:
  """`run_rows` in a locked folder."""
  started = clock.start()
  write = print if verbose else (lambda text: None)
  file, n = planned.file, planned.file.x.shape[0]
  write(f"{_data(config, planned)}\n{_how(planned)}")
  run_folder.write_config(folder, config)
  dtype = np.dtype("float64" if config.x64 else "float32")
  mass = rows.input_weights(file.weights, n)
  sizes = {"size": config.size or None, "size_per_class": config.size_per_class or None}
  with _file_errors(), progress.working(f"selecting rows ({planned.strategy})", shown=verbose):
    center, scale = np.zeros(()), np.ones(())
    if config.preprocess == "standardize":
      read = lambda part: _finite(file.x, part)
      moments = streamed_rows.moments_of(read, n, mass, _BLOCK_ROWS)
      center, scale = (a.reshape(file.x.shape[1:]) for a in streamed_rows.standardization(moments))

    def transform(block) -> np.ndarray:
      with np.errstate(over="ignore"):  # reported as infinite
        return ((np.asarray(block, np.float64) - center) / scale).astype(dtype)

    common: Any = {
      **sizes,
      "strategy": planned.strategy,
      "allocation": config.allocation,
      "weights": file.weights,
    }
    source: Any = file.x
    convert: Any = transform
    if planned.streamed:
      chosen = streamed_rows.stream_select(
        config.seed, file.x, file.y, transform=transform, block_size=_BLOCK_ROWS, **common
      )
    else:
      x = np.empty(file.x.shape, dtype)
      for part in blocks.row_slices(n, _BLOCK_ROWS):
        x[part] = transform(file.x[part])
      chosen = rows.select(config.seed, x, file.y, **common)
      source, convert = x, None
    order = np.argsort(chosen.indices)
    indices = np.asarray(chosen.indices)[order].astype(np.int64)
    weights = np.asarray(chosen.weights, np.float64)[order]
    saved = file.save(folder, indices, weights)
  certified: dict[str, Any] = {}
  if config.certificate:
    with _file_errors(), progress.working("measuring the certificate", shown=verbose):
      certified = rows_certificate.measure_rows(
        config.seed,
        source,
        file.y,
        indices,
        weights,
        input_weights=file.weights,
        transform=convert,
        max_rows=int(np.clip(_CERTIFICATE_BYTES * n // planned.num_bytes, 256, 20_000)),
        block_size=_BLOCK_ROWS,
      ).as_dict()
    run_folder.write_json(folder / "certificate.json", certified)
  scores = chosen.scores
  arrays = {} if scores is None else {"scores": np.asarray(scores.scores)}
  outputs.save_arrays(folder / "selection.npz", indices=indices, weights=weights, **arrays)
  result = {
    "input": config.input,
    "rows": n,
    "columns": list(file.columns) if file.columns else None,
    "labels": _kind(file),
    "class_names": list(file.class_names) if file.class_names else None,
    "strategy": config.strategy,
    "chosen_strategy": chosen.strategy,
    "read_in_blocks": planned.streamed,
    "seed": config.seed,
    "support_size": len(indices),
    "total_weight": float(mass.sum()),
    "selected_weight": float(weights.sum()),
    "objectives": chosen.objectives,
    "ridge": chosen.ridge,
  }
  if scores is not None:
    result |= {
      "d_eff": float(scores.effective_dimension),
      "d_eff_lower": float(scores.effective_dimension_lower),
      "total_sensitivity": float(scores.total),
      "max_over_mean_score": float(scores.max_over_mean),
    }
  result |= {name: value for name, value in certified.items() if name in _MEASURED}
  result |= {"wall_seconds": time.perf_counter() - started, **run_folder.peak_memory()}
  run_folder.write_json(folder / "result.json", result)
  reporting.write_report(folder)
  title = f"{len(indices)} of {n:,} rows of {config.input} selected by {chosen.strategy}."
  readme.write(folder, title, readme.rows_command(config, folder))
  write(
    f"{title} The weights sum to {weights.sum():.6g} for rows of weight {mass.sum():.6g}.\n"
    f"{_losses(certified)}{result['wall_seconds']:.1f} s in total; the rows are in {folder / saved}"
  )
  return result


def _finite(x, part: slice) -> np.ndarray:
  """Rows in float64, checked."""
  block = np.asarray(x[part], np.float64)
  if not np.isfinite(block).all():
    raise DatasetError(
      f"rows: expected finite values, got NaN or infinite ones in rows {part.start} to {part.stop - 1}"
    )
  return block


def _losses(certified: dict) -> str:
  """The certificate in words, a line for each part that was measured."""
  lines = []
  if certified:
    lines.append(
      f"MMD to all rows {certified['mmd']:.3g}, of random rows {certified['random_mmd']:.3g}"
    )
  for model in rows_certificate.MODELS:
    own, everything, random = (
      certified.get(f"{model}_error{name}") for name in ("", "_all", "_random")
    )
    if own is not None:
      lines.append(
        f"{model} regression, {certified['error']}: {own:.4g}; on all rows {everything:.4g}, on random rows {random:.4g}"
      )
  return "".join(f"{line}\n" for line in lines)


@contextlib.contextmanager
def _file_errors():
  """`usage`, with errors of the file after the name of its flag, and labels under that name."""
  with usage():
    try:
      yield
    except DatasetError as error:
      raise ValueError(f"--input: {error}") from error
    except ValueError as error:
      raise ValueError(
        re.sub(r"^y:", "labels:", str(error)).replace("omit y", "omit them")
      ) from error


def _kind(file: row_files.RowFile) -> str:
  if file.y is None:
    return "none"
  return "real" if file.y.dtype.kind == "f" else "classes"


def _data(config: RowsConfig, planned: Plan) -> str:
  """The rows in words."""
  file = planned.file
  shape = " x ".join(map(str, file.x.shape[1:]))
  labels = {"none": "no labels", "real": "real targets", "classes": "classes"}[_kind(file)]
  if file.class_names:
    labels = f"{len(file.class_names)} classes"
  return f"{config.input}: {file.x.shape[0]:,} rows of {shape} numbers, {labels}"


def _how(planned: Plan) -> str:
  """The strategy in words."""
  where = "in blocks" if planned.streamed else "into memory"
  return (
    f"{planned.strategy}; the rows ({planned.num_bytes / 2**20:.1f} MiB as floats) are read {where}"
  )
