"""The folder of a run: which files it may hold, whether it is free, and JSON files written atomically."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Iterator

import jax

import kipcore
from kipcore.cli.errors import Stopped, UsageError
from kipcore.io import atomic

# What a run may write, and what each file is.
RUN_FILES = {
  "README.txt": "this text",
  "config.json": "all settings of the run, versions and hardware",
  "result.json": "results: accuracies, seconds, target evaluations",
  "metrics.jsonl": "one line of JSON per logged step",
  "distilled.npz": "the artifact: examples in the units of the dataset, labels, preprocessing, kernel, ridge, and the metadata of the run",
  "start.npz": "the initial examples, in the units of the dataset, and their labels",
  "importance.npz": "the sampler's latest score of each training row (NaN: never drawn), and the rows with the highest scores",
  "images.npz": "of each method, initialization and sampler: the first distilled image of each class (uint8), for the report",
  "images.png": "the images, next to the initial ones",
  "animation.gif": "an image of each class at the logged steps",
  "frames.npz": "the images of animation.gif, until the run has finished",
  "learning_curve.png": "accuracy over the steps",
  "report.html": "all results on one page, for a browser",
  "selection.npz": "indices of the selected rows (-1 for synthetic points), their weights, and the scores of all training rows; with --fill also the row that each row is or was made of",
  "selected.npz": "the selected rows, their labels, weights and row numbers",
  "selected.csv": "the selected rows, with their row numbers and weights as the last columns",
  "selected.parquet": "the selected rows, with their row numbers and weights as the last columns",
  "certificate.json": "what models on the selected points lose against all rows, measured, and for images guaranteed",
  "certificate.png": "the scores, and the selected points among them",
  "experts.npy": "parameters of the networks that mtt, ncfm or expert labels learn from, after every epoch",
  "experts.json": "how they were trained",
  "expert_choice.json": "the epoch of the expert that labels the images, and the validation accuracy of students by epoch",
  "cells.csv": "one line per cell of the grid",
  "comparison.md": "the table: means over seeds, their deviations, and the gain of each initialization and sampler",
  "comparison.png": "the same as bars",
}
CHECKPOINTS = "checkpoints"
# Marks a run that failed, whose files and checkpoints a new run may replace.
FAILED = ".failed"
# Files that a run without a result may leave; a new run replaces them.
_UNFINISHED = {
  "config.json",
  "metrics.jsonl",
  "experts.npy",
  "experts.json",
  "expert_choice.json",
}
# Experts whose training is not finished.
_PARTIAL = "experts.npy.partial"


def planned(output_dir: str | None, name: str, overwrite: bool) -> pathlib.Path:
  """The folder that a run would use; nothing is written.

  A folder is occupied by a result, or by checkpoints of a run that did not fail.

  Args:
    output_dir: folder, or None for a new one under runs/.
    name: of the run, for a new folder.
    overwrite: whether an earlier run may be replaced.

  Returns:
    The folder; for a new one under runs/ its name up to a number that makes it unique.

  Raises:
    UsageError: if it is occupied or not writable.
  """
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
  path = pathlib.Path(output_dir or f"runs/{stamp}-{name}")
  if output_dir and not overwrite and not (path / FAILED).exists():
    if _checkpoints(path):
      raise UsageError(
        f"--output_dir: {path} contains an unfinished run; --resume continues it, --overwrite "
        "replaces it"
      )
    found = [file for file in RUN_FILES if file not in _UNFINISHED and (path / file).exists()]
    if found:
      raise UsageError(
        f"--output_dir: {path} already contains a run ({', '.join(found)}); choose another folder, "
        "or --overwrite"
      )
  above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
  if not (above.is_dir() and os.access(above, os.W_OK)):
    raise UsageError(
      f"--output_dir: cannot write to {path} ({above} is {'not writable' if above.is_dir() else 'a file'})"
    )
  return path


def reserve(output_dir: str | None, name: str, overwrite: bool) -> pathlib.Path:
  """The folder of a run, as `planned`; one under runs/ is created, under a name that no other run has."""
  path = planned(output_dir, name, overwrite)
  if output_dir:
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, number = path, 1
    while True:
      try:
        path.mkdir()
        return path
      except FileExistsError:
        number += 1
        path = first.with_name(f"{first.name}-{number}")
  except OSError as error:
    raise not_writable(path, error) from error


def clear(path: pathlib.Path) -> None:
  """Deletes the files of an earlier run from a folder, and checks that files can be written."""
  try:
    discard(path)
    atomic.write_atomically(path / "config.json", b"{}")
  except OSError as error:
    raise not_writable(path, error) from error


def discard(path: pathlib.Path) -> None:
  """Deletes the files of a run."""
  for file in (*RUN_FILES, FAILED):
    (path / file).unlink(missing_ok=True)
  for events in path.glob("tensorboard/events.out.tfevents.*"):
    events.unlink()
  with contextlib.suppress(OSError):  # there is none, or other files are in it
    (path / "tensorboard").rmdir()
  shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
  discard_experts(path)


def discard_experts(path: pathlib.Path) -> None:
  """Deletes the unfinished experts of a run."""
  shutil.rmtree(path / _PARTIAL, ignore_errors=True)


@contextlib.contextmanager
def releasing(path: pathlib.Path, new: bool = True) -> Iterator[None]:
  """If the block fails, leaves nothing in the folder that prevents the same or a corrected command.

  A new run without checkpoints is deleted. One with checkpoints can be resumed; if it failed because
  of its settings, it is marked, so that another run may replace it.

  Args:
    path: folder of the run.
    new: whether the run was started by this command, not resumed.
  """
  try:
    yield
  except BaseException as error:
    with contextlib.suppress(OSError):
      if new and not _checkpoints(path) and not (path / "cells.csv").exists():
        discard(path)
      elif isinstance(error, Exception) and not isinstance(error, (UsageError, OSError, Stopped)):
        (path / FAILED).write_text(f"{error}\n", encoding="utf-8")
    raise
  (path / FAILED).unlink(missing_ok=True)


def _checkpoints(path: pathlib.Path) -> bool:
  """Whether a folder holds at least one checkpoint, of the steps or of experts."""
  found = any(child.name.isdigit() for child in path.glob(f"{CHECKPOINTS}/*"))
  return found or any(path.glob(f"{_PARTIAL}/*.npz"))


def not_writable(path, error: OSError) -> UsageError:
  """The error of a folder that cannot be written."""
  return UsageError(f"--output_dir: cannot write to {path} ({error.strerror or error})")


def check_file(flag: str, path: str | None) -> None:
  """UsageError unless a file of that name, if one is given, can be written."""
  above = pathlib.Path(path or ".").absolute().parent
  if path and not (above.is_dir() and os.access(above, os.W_OK)):
    raise UsageError(f"{flag}: expected a file in an existing, writable folder, got {path}")


def newest(name: str) -> pathlib.Path:
  """The latest file of that name under runs/; UsageError if there is none."""
  found = sorted(pathlib.Path("runs").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
  if not found:
    raise UsageError(
      f"--artifact: expected a file, or a run under runs/ that contains a {name}; found none"
    )
  return found[-1]


def write_json(path, content: dict) -> None:
  """Writes a JSON file atomically."""
  atomic.write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_config(path: pathlib.Path, config, **resolved) -> None:
  """Writes `config.json`: all resolved values, versions and hardware."""
  write_json(
    path / "config.json", {**dataclasses.asdict(config), **resolved, "environment": environment()}
  )


def append_metrics(path: pathlib.Path, record: dict) -> None:
  """Appends a line to `metrics.jsonl`."""
  with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write(json.dumps(record) + "\n")


def write_metrics(path: pathlib.Path, history: list[dict]) -> None:
  """Rewrites `metrics.jsonl` as it was at a checkpoint, without the steps that will be repeated."""
  atomic.write_atomically(
    path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode()
  )


def read_metrics(path: pathlib.Path) -> list[dict]:
  """The lines of `metrics.jsonl`; none if the run logged no step."""
  if not (path / "metrics.jsonl").exists():
    return []
  return [
    json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  ]


def visible_files(path: pathlib.Path) -> list[str]:
  """Names of the files of a folder, without hidden ones."""
  return sorted(file.name for file in path.iterdir() if not file.name.startswith("."))


def peak_memory() -> dict[str, int]:
  """Peak memory of the process and of its devices in bytes; unknown values are left out."""
  found = {}
  with contextlib.suppress(ImportError):  # not on Windows
    import resource

    # Kilobytes, except on macOS.
    unit = 1 if platform.system() == "Darwin" else 1024
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  statistics = [device.memory_stats() or {} for device in jax.local_devices()]
  if on_devices := [one["peak_bytes_in_use"] for one in statistics if "peak_bytes_in_use" in one]:
    found["device_peak_memory_bytes"] = max(on_devices)
  return found


def process_bytes(name: str) -> int:
  """A size of this process in bytes, such as VmRSS (resident) or VmData (allocated); OSError except on Linux."""
  status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
  return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def environment() -> dict:
  """Versions, commit and hardware."""
  import flax
  import jaxlib
  import numpy
  import optax

  modules = {
    "jax": jax,
    "jaxlib": jaxlib,
    "flax": flax,
    "optax": optax,
    "numpy": numpy,
    "kipcore": kipcore,
  }
  device = jax.local_devices()[0]
  return {
    "versions": {
      "python": platform.python_version(),
      **{n: m.__version__ for n, m in modules.items()},
    },
    "commit": _commit(),
    "hardware": {
      "backend": device.platform,
      "device": device.device_kind,
      "local_devices": jax.local_device_count(),
      "processes": jax.process_count(),
      "cpu_cores": os.cpu_count(),
      "machine": platform.machine(),
    },
  }


def _commit() -> str | None:
  """The commit of the source tree, marked if it has local changes; None unless its repository is kipcore's own."""
  root = pathlib.Path(kipcore.__file__).resolve().parents[1]
  git = lambda *arguments: subprocess.run(
    ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
  ).stdout.strip()
  try:
    # An installed package may lie in the working tree of another project.
    if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
      return None
    git("ls-files", "--error-unmatch", "kipcore/__init__.py")
    return git("describe", "--always", "--dirty", "--abbrev=40")
  except (OSError, subprocess.SubprocessError):
    return None
