"""The folder of a run: config.json, metrics.jsonl, result.json, written atomically."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess

import jax

import kipcore
from kipcore.cli.errors import UsageError
from kipcore.io import atomic

# What a run may write, and what each file is.
RUN_FILES = {
  "README.txt": "this text",
  "config.json": "every setting of the run, versions and hardware",
  "result.json": "what was measured: accuracies, seconds, target evaluations",
  "metrics.jsonl": "a line of JSON for each logged step",
  "distilled.npz": "the artifact: images in pixel space, labels, preprocessing, kernel, ridge, and the papers of the run",
  "start.npz": "the images that it started from, in pixel space, and their labels",
  "importance.npz": "the sampler's latest score of each training row (NaN: never drawn), and the images with the highest",
  "images.png": "what the images look like, beside those they started from",
  "learning_curve.png": "accuracy over the steps",
  "report.html": "all of it on one page, for a browser",
  "selection.npz": "indices of the chosen rows (-1 for made points), their weights, and the scores of all training rows",
  "certificate.json": "what a weighted regression on the chosen points is measured, and promised, to lose",
  "certificate.png": "the scores, and where the chosen points lie among them",
  "experts.npy": "trajectories of the networks that mtt imitates",
  "experts.json": "how they were trained",
  "cells.csv": "a line for each cell of the grid",
  "comparison.md": "the table: mean and deviation over seeds, and what each start and sampler gained",
  "comparison.png": "the same as bars",
}


def planned(output_dir: str | None, name: str, overwrite: bool) -> pathlib.Path:
  """The folder that `create` would make; nothing is written.

  Raises:
    UsageError: where it holds a run and `overwrite` is False, or cannot be written.
  """
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
  path = pathlib.Path(output_dir or f"runs/{stamp}-{name}")
  found = [file for file in RUN_FILES if (path / file).exists()]
  if found and not overwrite:
    raise UsageError(
      f"--output_dir: {path} already holds a run ({', '.join(found)}); choose another, or --overwrite"
    )
  above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
  if not (above.is_dir() and os.access(above, os.W_OK)):
    raise UsageError(
      f"--output_dir: cannot write to {path} ({above} is {'not writable' if above.is_dir() else 'a file'})"
    )
  return path


def create(output_dir: str | None, name: str, overwrite: bool) -> pathlib.Path:
  """A folder that can be written and holds no earlier run.

  Raises:
    UsageError: where it holds a run and `overwrite` is False, or cannot be written.
  """
  path = planned(output_dir, name, overwrite)
  try:
    path.mkdir(parents=True, exist_ok=True)
    for file in RUN_FILES:
      (path / file).unlink(missing_ok=True)
    for file in path.glob("tensorboard/events.out.tfevents.*"):
      file.unlink()
    atomic.write_atomically(path / "config.json", b"{}")
  except OSError as error:
    raise UsageError(f"--output_dir: cannot write to {path} ({error.strerror or error})") from error
  return path


def check_file(flag: str, path: str | None) -> None:
  """UsageError unless a file of that name, where there is one, can be written."""
  above = pathlib.Path(path or ".").absolute().parent
  if path and not (above.is_dir() and os.access(above, os.W_OK)):
    raise UsageError(
      f"{flag}: expected a file in a folder that exists and can be written, got {path}"
    )


def newest(name: str) -> pathlib.Path:
  """The latest file of that name under runs/; UsageError where there is none."""
  found = sorted(pathlib.Path("runs").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
  if not found:
    raise UsageError(
      f"--artifact: expected a file, or a run under runs/ that holds a {name}; found none"
    )
  return found[-1]


def write_json(path, content: dict) -> None:
  """Writes a JSON file atomically."""
  atomic.write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_config(path: pathlib.Path, config, **resolved) -> None:
  """`config.json`: every resolved value, versions and hardware."""
  write_json(
    path / "config.json", {**dataclasses.asdict(config), **resolved, "environment": environment()}
  )


def append_metrics(path: pathlib.Path, record: dict) -> None:
  """One more line of `metrics.jsonl`."""
  with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write(json.dumps(record) + "\n")


def write_metrics(path: pathlib.Path, history: list[dict]) -> None:
  """`metrics.jsonl` as it was at a checkpoint: lines of steps that come again are dropped."""
  atomic.write_atomically(
    path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode()
  )


def read_metrics(path: pathlib.Path) -> list[dict]:
  """The lines of `metrics.jsonl`; none where the run logged no step."""
  if not (path / "metrics.jsonl").exists():
    return []
  return [
    json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  ]


def peak_memory() -> dict[str, int]:
  """Bytes that the process, and the busiest of its devices, held at most; what nobody tells is left out."""
  found = {}
  with contextlib.suppress(ImportError):  # not on Windows
    import resource

    # In kilobytes, but on macOS.
    unit = 1 if platform.system() == "Darwin" else 1024
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  statistics = [device.memory_stats() or {} for device in jax.local_devices()]
  if on_devices := [one["peak_bytes_in_use"] for one in statistics if "peak_bytes_in_use" in one]:
    found["device_peak_memory_bytes"] = max(on_devices)
  return found


def process_bytes(name: str) -> int:
  """A size of this process as Linux counts it, such as VmRSS (what it holds) or VmData (what it asked for); OSError elsewhere."""
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
  """The commit of the source tree, marked where it has local changes; None outside a checkout."""
  root = pathlib.Path(__file__).resolve().parents[3]
  try:
    out = subprocess.run(
      ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
    return out.stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
