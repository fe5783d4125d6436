"""README.txt of a run folder: what each file is, how to load it, and the commands that make and score it again."""

import csv
import dataclasses
import io
import pathlib
import shlex

import jax

from kipcore.cli import recipes
from kipcore.cli.config import CompareConfig, DataConfig, DistillConfig, SelectConfig
from kipcore.cli.folder.run_folder import RUN_FILES
from kipcore.io import atomic

_KINDS = {
  ".png": "a picture",
  ".html": "a page for a browser",
  ".json": "JSON",
  ".npz": "arrays of NumPy",
  ".npy": "an array of NumPy",
}
_FOLDERS = {"tensorboard": "event files, for TensorBoard"}


def of_distillation(folder: pathlib.Path, config: DistillConfig, result: dict) -> None:
  """Writes the README of a run of `run_distill`.

  Args:
    folder: its folder, with all other files in it.
    config: as asked for.
    result: content of `result.json`.
  """
  how = f"{result['method']}, {result['steps']:,} steps" if result["steps"] else result["method"]
  title = (
    f"{result['support_size']} distilled images of {result['dataset']} ({how}): "
    f"{100 * result['test_accuracy']:.2f} % test accuracy, {100 * result['random_baseline_test_accuracy']:.2f} % "
    "for as many random real images."
  )
  write(folder, title, distillation_command(config, folder))


def of_selection(folder: pathlib.Path, config: SelectConfig, result: dict) -> None:
  """Writes the README of a run of `run_select`; arguments as those of `of_distillation`."""
  title = (
    f"{result['support_size']} points of {result['dataset']} chosen by {result['chosen_strategy']}: "
    f"{100 * result['test_accuracy']:.2f} % test accuracy, {100 * result['random_baseline_test_accuracy']:.2f} % "
    "for as many random ones."
  )
  write(folder, title, selection_command(config, folder))


def of_comparison(folder: pathlib.Path, config: CompareConfig, shared: dict, cells: int) -> None:
  """Writes the README of a grid.

  Args:
    folder: its folder, with all other files in it.
    config: the grid.
    shared: settings of every cell that were asked for.
    cells: how many there are.
  """
  write(
    folder,
    f"{cells} cells: {', '.join(config.methods)}, from {', '.join(config.inits)}, with targets by {', '.join(config.samplers)}.",
    comparison_command(config, shared, folder),
  )


def write(folder: pathlib.Path, title: str, command: str) -> None:
  """The text, from the files that are there."""
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
    "Paths are as seen from where the run was started.",
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
      "  stored.images, stored.labels       # in pixel space; one-hot minus 1/classes, or learned",
      '  stored.metadata["dataset"]         # its name, classes and hashes',
      "  stored.evaluate(x_test, y_test)    # images as stored, integer classes",
      "  stored.preprocess.apply(x_test)    # as the model saw them",
      "or without kipcore",
      "  import numpy",
      f'  images = numpy.load({str(artifact)!r}, allow_pickle=False)["images"]',
    ]
  lines += ["", "Make it again", f"  {command}"]
  if jax.process_count() > 1:
    lines.append(f"in each of {jax.process_count()} processes, with --distributed.")
  if artifact.name in names:
    lines += [
      "Score it again, beside other sets of its size",
      f"  python -m experiments.run_evaluate --artifact={shlex.quote(str(artifact))}",
    ]
  atomic.write_atomically(folder / "README.txt", ("\n".join(lines) + "\n").encode())


def distillation_command(config: DistillConfig, folder=None) -> str:
  """The command line of a config: the flags that differ from the method's settings."""
  chosen = {name: getattr(config, name) for name in ("method", "preset")}
  changed = {
    **_changed(config, recipes.resolve(**chosen)),
    **{k: v for k, v in chosen.items() if v != getattr(DistillConfig(), k)},
  }
  return _command("run_distill", changed, folder)


def selection_command(config: SelectConfig, folder=None) -> str:
  """The command line of a config of `run_select`."""
  return _command("run_select", _changed(config, SelectConfig()), folder)


def comparison_command(config: CompareConfig, shared: dict, folder=None) -> str:
  """The command line of a grid; settings that `run_compare` has no flag for go by `--set`."""
  known = {field.name for field in dataclasses.fields(DataConfig)} - {"seed"}
  changed = {
    **_changed(config, CompareConfig()),
    **{name: value for name, value in shared.items() if name in known},
  }
  own = {field.name for field in dataclasses.fields(CompareConfig)}
  if others := [f"{name}={value}" for name, value in shared.items() if name not in known | own]:
    changed["set"] = tuple(others)
  return _command("run_compare", changed, folder)


def _changed(config, base) -> dict:
  pairs = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
  return {name: value for name, value in pairs if value != getattr(base, name)}


def _command(binary: str, changed: dict, folder) -> str:
  """Flags in the order of the config's fields; the folder with a new name beside the old one, None for no folder."""
  given = [_flag(name, value) for name, value in changed.items() if value is not None]
  where = [] if folder is None else [f"--output_dir={shlex.quote(f'{folder}-again')}"]
  return " ".join([f"python -m experiments.{binary}", *given, *where])


def _flag(name: str, value) -> str:
  if isinstance(value, bool):
    return f"--{name}" if value else f"--no{name}"
  if isinstance(value, (tuple, list)):
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(value)
    value = text.getvalue()
  return f"--{name}={shlex.quote(str(value))}"
