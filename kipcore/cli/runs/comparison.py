"""A grid of methods, initializations, samplers and seeds: cells, table and figure."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import pathlib
import sys
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kipcore import checks
from kipcore.cli import recipes
from kipcore.cli.config import CompareConfig, DataConfig, DistillConfig, validate
from kipcore.cli.cost import estimate, progress
from kipcore.cli.errors import UsageError, usage
from kipcore.cli.folder import lock, outputs, readme, reporting, run_folder
from kipcore.cli.runs import pipeline, trained_networks
from kipcore.io import atomic, npz
from kipcore.report import pictures
from kipcore.types import NumericalError

FIELDS = (
  "dataset",
  "method",
  "init",
  "sampler",
  "seed",
  "steps",
  "target_evaluations",
  "init_test_accuracy",
  "test_accuracy",
  "network_test_accuracy",
  "importance_gain",
  "compile_seconds",
  "step_seconds",
  "wall_seconds",
  "error",
)
SCORES = {"test_accuracy": "kernel ridge regression", "network_test_accuracy": "finite networks"}
_MOST_CELLS = 10_000
# The images of a method, initialization and sampler: one for each of the first classes, of its first seed.
_IMAGES = "images.npz"
_MOST_IMAGES = 10


class Cell(NamedTuple):
  """One run of the grid."""

  method: str
  init: str
  sampler: str
  seed: int


def cells_of(config: CompareConfig) -> list[Cell]:
  """The cells of a grid, in an order in which those that share a compilation are adjacent; one sampler for methods without a loop."""
  cells = []
  for method in config.methods:
    samplers = config.samplers if recipes.RECIPES[method].build else config.samplers[:1]
    cells += [
      Cell(method, init, sampler, config.seed + i)
      for sampler, init, i in itertools.product(samplers, config.inits, range(config.num_seeds))
    ]
  return cells


def run_compare(
  config: CompareConfig, shared: dict, output_dir: str | None, overwrite: bool
) -> pathlib.Path:
  """Runs the missing cells of a folder, and writes table and figure after each.

  Args:
    config: the grid.
    shared: settings of every cell that the user gave.
    output_dir: folder; None for a new one under runs/.
    overwrite: whether to replace the cells of another grid.

  Returns:
    The folder.

  Raises:
    UsageError: for invalid settings, or a folder whose cells have other settings.
    KeyboardInterrupt: after Ctrl-C, with the command that continues.
  """
  resolved = plan(config, shared)
  grid, known = opened(config, resolved, output_dir, overwrite)
  if set(resolved) - {cell_of(row) for row in known or ()}:
    loaded(next(iter(resolved.values())))  # before the folder is made: a dataset may be missing
  with contextlib.ExitStack() as stack:
    if known is None:
      folder = stack.enter_context(lock.new_folder(output_dir, "compare", overwrite))
    else:
      folder = pathlib.Path(output_dir or "")
      stack.enter_context(lock.lock_folder(folder))
      stack.enter_context(run_folder.releasing(folder, new=False))
    run_folder.write_json(folder / "config.json", {**grid, "environment": run_folder.environment()})
    rows = {cell_of(row): row for row in known or ()}
    try:
      _run_cells(resolved, rows, folder)
    except KeyboardInterrupt:
      done = sum(cell in rows for cell in resolved)
      raise KeyboardInterrupt(
        f"interrupted after {done} of {len(resolved)} cells"
        + (f"; the same command with --output_dir={folder} runs the others" if done else "")
      ) from None
    _write(folder, list(rows.values()))
    readme.of_comparison(folder, config, shared, len(rows))
  files = ", ".join(run_folder.visible_files(folder))
  print(f"{markdown(list(rows.values()))}\n\nwritten to {folder}: {files}")
  return folder


def _run_cells(resolved: dict, rows: dict, folder: pathlib.Path) -> None:
  """Runs the cells that have no row yet, and adds their rows."""
  with tqdm(
    total=len(resolved),
    desc="cells",
    initial=sum(cell in rows for cell in resolved),
    disable=None,
    leave=False,
    bar_format="{desc}: {n_fmt}/{total_fmt}|{bar}| [{elapsed}{postfix}]",
  ) as bar:
    for cell, cell_config in resolved.items():
      if cell in rows:
        continue
      # Experts do not depend on the initialization: cells with the same sampler and seed share them.
      experts = (
        str(folder / f"experts-{cell.method}-{cell.sampler}-{cell.seed}.npy")
        if recipes.RECIPES[cell.method].experts
        else ""
      )
      row = run_cell(dataclasses.replace(cell_config, experts=experts))
      if (shown := row.pop("images", None)) is not None:
        _add_images(folder, cell, *shown)
      rows[cell] = row
      _write(folder, list(rows.values()))
      row, missing = rows[cell], [other for other in resolved if other not in rows]
      left = f", {estimate.duration(seconds_left(rows, missing))} left" if missing else ""
      bar.set_postfix_str(left.removeprefix(", "), refresh=False)
      bar.update()
      scores = ", ".join(
        f"{100 * float(row[key]):.1f} % ({name})" for key, name in SCORES.items() if row[key] != ""
      )
      tqdm.write(
        f"{len(resolved) - len(missing)} of {len(resolved)}{left}  "
        + "  ".join(cell[:3])
        + f"  seed {cell.seed}: {row['error'] or scores}",
        file=sys.stdout,
      )


def plan(config: CompareConfig, shared: dict) -> dict[Cell, DistillConfig]:
  """The cells of a grid with their configs; raises UsageError unless all are valid."""
  validate(config)
  with usage():
    for name in config.methods:
      checks.one_of("--methods", name, recipes.METHODS)
    cells = len(config.methods) * len(config.inits) * len(config.samplers) * config.num_seeds
    if not 1 <= cells <= _MOST_CELLS:
      raise UsageError(
        f"expected a grid of 1 to {_MOST_CELLS:,} cells (methods x inits x samplers x num_seeds), got {cells}"
      )
  resolved = {cell: config_of(config, shared, cell) for cell in cells_of(config)}
  for cell_config in resolved.values():
    pipeline.check(cell_config)
    if cell_config.labels == "expert":
      raise UsageError(
        "--set: expected labels=class or labels=learned, got labels=expert, which only kipcore-distill has"
      )
  return resolved


def seconds_left(rows: dict, missing: list[Cell]) -> float:
  """Expected time of the missing cells: the mean of the cells of their method, or of all."""
  seconds: dict[str, list[float]] = {}
  for cell, row in rows.items():
    seconds.setdefault(cell.method, []).append(float(row["wall_seconds"]))
  overall = float(np.mean([value for values in seconds.values() for value in values]))
  return sum(
    float(np.mean(seconds[cell.method])) if cell.method in seconds else overall for cell in missing
  )


def config_of(config: CompareConfig, shared: dict, cell: Cell) -> DistillConfig:
  """The config of a cell."""
  base = recipes.resolve(
    **{
      **shared,
      "preset": config.preset,
      "method": cell.method,
      "init": cell.init,
      "sampler": cell.sampler,
      "seed": cell.seed,
      "solve_labels": False,
      "network_seeds": config.network_seeds,
    }
  )
  if not config.evaluations or not recipes.has_loop(base):
    return base
  batch = base.target_batch_size or 1000
  return dataclasses.replace(base, steps=max(config.evaluations // batch, 1))


def cell_of(row: dict) -> Cell:
  """The cell of a row of cells.csv."""
  return Cell(row["method"], row["init"], row["sampler"], int(row["seed"]))


def run_cell(config: DistillConfig) -> dict:
  """Runs a cell; returns its row of cells.csv, with the message of a numerical failure under `error`.

  For a dataset of images, `images` has one distilled image of each of the first classes in uint8, and names of the
  classes.
  """
  started = time.perf_counter()
  row: dict = dict.fromkeys(FIELDS, "")
  row.update(
    dataset=config.dataset,
    **{name: getattr(config, name) for name in ("method", "init", "sampler", "seed")},
  )
  data = loaded(config)
  try:
    start = pipeline.start(config, data)
    row["init_test_accuracy"] = pipeline.score(config, data, start.support)
    with progress.Steps(
      config.steps if recipes.has_loop(config) else 0, config.method, write=lambda line: None
    ) as bar:
      outcome = pipeline.distill(
        config,
        data,
        start.support,
        callback=lambda step, *_: bar.logged(step),
        progress=bar.advance,
      )
    row.update(
      steps=config.steps if recipes.has_loop(config) else 0,
      target_evaluations=start.target_evaluations + outcome.target_evaluations,
      test_accuracy=pipeline.score(config, data, outcome.support),
      compile_seconds=round(outcome.compile_seconds, 2),
      step_seconds=round(outcome.seconds, 2),
      importance_gain="" if outcome.importance_gain is None else outcome.importance_gain,
    )
    if pipeline.noun(data) == "images" and data.x_train.shape[-1] in (1, 3):
      row["images"] = _first_of_each_class(data, start.coreset.y, outcome.support.x)
    row["network_test_accuracy"] = trained_networks.scores(config, data, outcome.support).get(
      "network_test_accuracy_mean", ""
    )
  except NumericalError as error:
    row["error"] = " ".join(str(error).split())
  row["wall_seconds"] = round(time.perf_counter() - started, 2)
  return row


def _first_of_each_class(data: pipeline.Data, y, x) -> tuple[np.ndarray, list[str]]:
  """Distilled images `(k, h, w, c)` in uint8, from black to white of the dataset, and their classes."""
  classes, first = np.unique(np.argmax(np.asarray(y), axis=1), return_index=True)
  first = first[:_MOST_IMAGES]
  pixels = np.asarray(data.preprocess.invert(np.asarray(x[first])), np.float64)
  black, white = outputs.pixel_range(data)
  levels = np.rint(255 * np.clip((pixels - black) / (white - black), 0, 1)).astype(np.uint8)
  names = data.raw.class_names or [str(c) for c in range(data.raw.num_classes)]
  return levels, [str(names[c]) for c in classes[: len(first)]]


def _add_images(folder: pathlib.Path, cell: Cell, images: np.ndarray, classes: list[str]) -> None:
  """Adds the images of a cell to `images.npz`, unless it has those of another seed."""
  known = images_of(folder)
  name = cell[:3]
  if name in known:
    return
  known[name] = (cell.seed, images, classes)
  outputs.save_arrays(
    folder / _IMAGES,
    names=np.array(list(known)),
    seeds=np.array([seed for seed, _, _ in known.values()]),
    images=np.stack([each for _, each, _ in known.values()]),
    classes=np.array([each for _, _, each in known.values()]),
  )


def images_of(folder: pathlib.Path) -> dict[tuple, tuple[int, np.ndarray, list[str]]]:
  """{(method, init, sampler): (seed, images in uint8, classes)} of `images.npz`; empty without it, or if it is damaged."""
  try:
    names, seeds, images, classes = outputs.load_arrays(
      folder / _IMAGES, "names", "seeds", "images", "classes"
    )
  except (npz.NpzError, OSError):
    return {}
  return {
    tuple(map(str, name)): (int(seed), each, list(map(str, of_each)))
    for name, seed, each, of_each in zip(names, seeds, images, classes)
  }


def loaded(config: DistillConfig) -> pipeline.Data:
  """The data of a cell, shared with earlier cells."""
  return _loaded(_data_fields(config))


def _data_fields(config: DistillConfig) -> DistillConfig:
  """The settings that determine the data, so that cells share them."""
  # The number of images matters only for the rows that --fill adds.
  unused = {"num_devices"} if config.fill else {"num_devices", "images_per_class"}
  names = {field.name for field in dataclasses.fields(DataConfig)} - unused
  return DistillConfig(**{name: getattr(config, name) for name in names})


@functools.lru_cache(maxsize=4)
def _loaded(config: DistillConfig):
  return pipeline.load(config)


def opened(
  config: CompareConfig, resolved: dict, output_dir, overwrite: bool
) -> tuple[dict, list[dict] | None]:
  """Content for config.json, and the rows in the folder; None if it does not contain a grid. Writes nothing.

  A grid may be extended, but the settings of its cells may not change.

  Args:
    config: the grid.
    resolved: its cells with their configs.
    output_dir: folder, or None.
    overwrite: whether to ignore what it contains.

  Raises:
    UsageError: for a folder that contains something else.
  """
  # The location of the data is not part of a cell.
  named = [
    {name: value for name, value in dataclasses.asdict(c).items() if name != "data_dir"}
    for c in resolved.values()
  ]
  grid: dict = {"grid": dataclasses.asdict(config), "cells": named}
  path = pathlib.Path(output_dir or "") / "config.json"
  if not output_dir or not path.exists() or overwrite:
    return grid, None
  try:
    cells = json.loads(path.read_text(encoding="utf-8")).get("cells", ())
    before = {cell_of(cell): cell for cell in cells}
  except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
    before = {}
  if not before:
    raise UsageError(
      f"--output_dir: {output_dir} contains a run that is not a comparison; choose another folder, or --overwrite"
    )
  default = dataclasses.asdict(DistillConfig())  # of settings added since
  for cell in grid["cells"]:
    old = {**default, **before.pop(cell_of(cell), cell)}
    changed = [name for name in cell if old.get(name) != cell[name]]
    if changed:
      raise UsageError(
        f"--output_dir: {output_dir} contains another grid, whose cells have {changed[0]}={old.get(changed[0])!r}, not "
        f"{cell[changed[0]]!r}; choose another folder, or --overwrite"
      )
  grid["cells"] += list(before.values())
  cells = path.parent / "cells.csv"
  return grid, list(csv.DictReader(io.StringIO(cells.read_text()))) if cells.exists() else []


def _write(folder: pathlib.Path, rows: list[dict]) -> None:
  text = io.StringIO()
  writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  atomic.write_atomically(folder / "cells.csv", text.getvalue().encode())
  atomic.write_atomically(folder / "comparison.md", (markdown(rows) + "\n").encode())
  panels = {name: _bars(rows, key) for key, name in SCORES.items()}
  pictures.save_bars(
    folder / "comparison.png",
    {name: bars for name, bars in panels.items() if bars},
    "test accuracy, %",
  )
  write_report(folder, rows)


def write_report(folder: pathlib.Path, rows: list[dict], path: pathlib.Path | None = None) -> None:
  """Writes `report.html` of a grid, or the file `path`, from its config.json and the rows of cells.csv."""
  panels = {name: _bars(rows, key) for key, name in SCORES.items()}
  failed = {", ".join(map(str, cell_of(row))): row["error"] for row in rows if row["error"]}
  reporting.write_comparison(folder, markdown(rows), panels, failed, images_of(folder), path)


def arms(rows: list[dict], key: str) -> dict:
  """{(method, init, sampler): {seed: percent}} of the rows that have the score, in the order of the grid."""
  found: dict = {}
  for row in rows:
    if row[key] != "" and not row["error"]:
      found.setdefault((row["method"], row["init"], row["sampler"]), {})[int(row["seed"])] = (
        100 * float(row[key])
      )
  return found


def mean_and_deviation(values) -> tuple[float, float | None]:
  """Mean and standard deviation over seeds, None for a single one."""
  values = list(values)
  return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def differences(arm: dict, plain: dict) -> list[float]:
  """The differences of the seeds that both have."""
  return [arm[seed] - plain[seed] for seed in sorted(arm.keys() & plain.keys())]


def gain(arm: dict, plain: dict) -> tuple[float, float | None]:
  """Mean of the differences over the seeds that both have, and its standard error."""
  found = differences(arm, plain)
  mean, deviation = mean_and_deviation(found)
  return mean, None if deviation is None else deviation / math.sqrt(len(found))


def shown(values, sign: str = "", standard_error: bool = False) -> str:
  """The mean of some values with its standard deviation or error; two values themselves.

  Args:
    values: one per seed.
    sign: "+" to show the sign of positive numbers.
    standard_error: whether to show the standard error of the mean.

  Returns:
    Text such as `61.2 ± 0.4`, or `60.9 and 61.5`.
  """
  values = list(values)
  if len(values) == 2:  # a deviation of two would be too uncertain
    return " and ".join(f"{value:{sign}.1f}" for value in values)
  mean, spread = mean_and_deviation(values)
  if spread is None:
    return f"{mean:{sign}.1f}"
  return f"{mean:{sign}.1f} ± {spread / math.sqrt(len(values)) if standard_error else spread:.1f}"


def markdown(rows: list[dict]) -> str:
  """The table: accuracies by method, initialization and sampler, and gains over the first of these; then what its numbers are."""
  lines = [
    "| method | initialization | sampler | "
    + " | ".join(f"{name}, % | gained" for name in SCORES.values())
    + " | evaluations | seconds |",
    "| --- " * (5 + 2 * len(SCORES)) + "|",
  ]
  scored = {key: arms(rows, key) for key in SCORES}
  for name in dict.fromkeys((row["method"], row["init"], row["sampler"]) for row in rows):
    own = [row for row in rows if (row["method"], row["init"], row["sampler"]) == name]
    cells = []
    for found in scored.values():
      plain = next((arm for arm in found if arm[0] == name[0]), None)
      cells.append(shown(found[name].values()) if name in found else "")
      shared = name in found and name != plain and found[name].keys() & found[plain].keys()
      cells.append(shown(differences(found[name], found[plain]), "+", True) if shared else "")
    failed = sum(bool(row["error"]) for row in own)
    evaluations = next(
      (f"{int(row['target_evaluations']):,}" for row in own if not row["error"]), ""
    )
    seconds = f"{np.median([float(row['step_seconds'] or 0) for row in own]):.0f}" + (
      f" ({failed} failed)" if failed else ""
    )
    lines.append("| " + " | ".join((*name, *cells, evaluations, seconds)) + " |")
  return "\n".join([*lines, "", _note(scored)])


def _note(scored: dict) -> str:
  """A line that says what the numbers of the table are."""
  counts = {len(arm) for found in scored.values() for arm in found.values()}
  interval = (
    "a ± b: mean and standard deviation over seeds, for gains the standard error of the mean; "
  )
  pair = "a and b: the values of two seeds, because a deviation of two is too uncertain; "
  return (
    interval * bool(max(counts, default=0) > 2)
    + pair * (2 in counts)
    + "gained: difference to the first initialization and sampler of the same method, over the same seeds; "
    "seconds: time of the steps, median over seeds."
  )


def _bars(rows: list[dict], key: str) -> dict:
  """{method: {initialization/sampler: (mean, deviation)}}, for the figure; of two seeds, half of their difference."""
  bars: dict = {}
  for (method, init, sampler), values in arms(rows, key).items():
    mean, deviation = mean_and_deviation(values.values())
    if len(values) == 2:
      deviation = abs(np.subtract(*values.values())) / 2
    bars.setdefault(method, {})[f"{init} / {sampler}"] = (mean, deviation or 0.0)
  return bars
