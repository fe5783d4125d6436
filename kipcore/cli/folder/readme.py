"""README.txt of a run folder: what each file is, how to load it, and the commands that reproduce and score it."""

import csv
import dataclasses
import io
import pathlib
import shlex

import jax

from kipcore.cli import recipes
from kipcore.cli.config import (
  CompareConfig,
  DataConfig,
  DistillConfig,
  RowsConfig,
  SelectConfig,
)
from kipcore.cli.folder.run_folder import RUN_FILES
from kipcore.io import atomic

_KINDS = {
  ".png": "a picture",
  ".html": "a page for a browser",
  ".json": "JSON",
  ".npz": "NumPy arrays",
  ".npy": "a NumPy array",
}
_FOLDERS = {"tensorboard": "event files, for TensorBoard"}


def of_distillation(folder: pathlib.Path, config: DistillConfig, result: dict) -> None:
  """Writes the README of a distillation.

  Args:
    folder: folder of the run, with all other files in it.
    config: its settings, as given.
    result: content of `result.json`.
  """
  how = f"{result['method']}, {result['steps']:,} steps" if result["steps"] else result["method"]
  title = (
    f"{result['support_size']} distilled examples of {result['dataset']} ({how}): "
    f"{100 * result['test_accuracy']:.2f} % test accuracy, {100 * result['random_baseline_test_accuracy']:.2f} % "
    "for as many random real ones."
  )
  write(folder, title, distillation_command(config, folder))


def of_selection(folder: pathlib.Path, config: SelectConfig, result: dict) -> None:
  """Writes the README of a selection; arguments as those of `of_distillation`."""
  title = (
    f"{result['support_size']} points of {result['dataset']} selected by {result['chosen_strategy']}: "
    f"{100 * result['test_accuracy']:.2f} % test accuracy, {100 * result['random_baseline_test_accuracy']:.2f} % "
    "for as many random ones."
  )
  write(folder, title, selection_command(config, folder))


def of_comparison(folder: pathlib.Path, config: CompareConfig, shared: dict, cells: int) -> None:
  """Writes the README of a comparison.

  Args:
    folder: folder of the run, with all other files in it.
    config: the grid.
    shared: settings of every cell that were given.
    cells: number of cells.
  """
  write(
    folder,
    f"{cells} cells: methods {', '.join(config.methods)}; initializations {', '.join(config.inits)}; samplers {', '.join(config.samplers)}.",
    comparison_command(config, shared, folder),
  )


def write(folder: pathlib.Path, title: str, command: str) -> None:
  """Writes the text, from the files in the folder."""
  found = sorted(
    path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
  )
  names = [
    *(name for name in RUN_FILES if name in found or name == "README.txt"),
    *(name for name in found if name not in RUN_FILES),
  ]
  folders = [name for name in _FOLDERS if (folder / name).is_dir()]
  width = max(map(len, (*names, *folders)))
  lines = [
    title,
    "Paths are relative to the folder in which the run was started.",
    "",
    "Files",
    *(
      f"  {name:<{width}}  {RUN_FILES.get(name) or _KINDS.get(pathlib.Path(name).suffix, 'data')}"
      for name in names
    ),
    *(f"  {name + '/':<{width}}  {_FOLDERS[name]}" for name in folders),
  ]
  artifact = folder / "distilled.npz"
  if artifact.name in names:
    lines += [
      "",
      "Load the artifact",
      "  import kipcore",
      f"  stored = kipcore.load_artifact({str(artifact)!r})",
      "  stored.images, stored.labels       # in the units of the dataset; one-hot minus 1/classes, or learned",
      '  stored.metadata["dataset"]         # its name, classes and hashes',
      "  stored.evaluate(x_test, y_test)    # rows as the dataset stores them, integer classes",
      "  stored.preprocess.apply(x_test)    # preprocessed, as the model receives them",
      "Load it without kipcore",
      "  import numpy",
      f'  examples = numpy.load({str(artifact)!r}, allow_pickle=False)["images"]',
    ]
  lines += ["", "Reproduce it", f"  {command}"]
  if jax.process_count() > 1:
    lines.append(f"  in each of {jax.process_count()} processes, with --distributed")
  if artifact.name in names:
    lines += [
      "Score it next to other sets of its size",
      f"  kipcore-evaluate --artifact={shlex.quote(str(artifact))}",
    ]
  atomic.write_atomically(folder / "README.txt", ("\n".join(lines) + "\n").encode())


def distillation_command(config: DistillConfig, folder=None) -> str:
  """The command of a config: the flags that differ from the method's settings."""
  chosen = {"method": config.method}
  if config.preset != DistillConfig().preset:
    chosen["preset"] = config.preset
  changed = {**chosen, **_changed(config, recipes.resolve(**chosen))}
  changed.pop("teach", None)  # follows from the method
  return _command("kipcore-distill", changed, folder)


def selection_command(config: SelectConfig, folder=None) -> str:
  """The command of a selection."""
  return _command("kipcore-select", _changed(config, SelectConfig()), folder)


def rows_command(config: RowsConfig, folder=None) -> str:
  """The command of a selection of rows."""
  return _command("kipcore-select", _changed(config, RowsConfig()), folder)


def comparison_command(config: CompareConfig, shared: dict, folder=None) -> str:
  """The command of a comparison; settings without a flag of their own are passed by `--set`."""
  known = {field.name for field in dataclasses.fields(DataConfig)} - {"seed"}
  changed = {
    **_changed(config, CompareConfig()),
    **{name: value for name, value in shared.items() if name in known},
  }
  own = {field.name for field in dataclasses.fields(CompareConfig)}
  if others := [f"{name}={value}" for name, value in shared.items() if name not in known | own]:
    changed["set"] = tuple(others)
  return _command("kipcore-compare", changed, folder)


def _changed(config, base) -> dict:
  pairs = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
  return {name: value for name, value in pairs if value != getattr(base, name)}


def _command(binary: str, changed: dict, folder) -> str:
  """A command with its flags, and a folder named after the old one, if any."""
  given = [_flag(name, value) for name, value in changed.items() if value is not None]
  where = [] if folder is None else [f"--output_dir={shlex.quote(f'{folder}-again')}"]
  return " ".join([binary, *given, *where])


def _flag(name: str, value) -> str:
  if isinstance(value, bool):
    return f"--{name}" if value else f"--no{name}"
  if isinstance(value, (tuple, list)):
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(value)
    value = text.getvalue()
  return f"--{name}={shlex.quote(str(value))}"
