"""The folder of a run: config.json, metrics.jsonl, result.json, written atomically."""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess

import jax

import kipcore
from kipcore import files
from experiments.errors import UsageError

RUN_FILES = ("config.json", "metrics.jsonl", "result.json", "distilled.npz", "images.png", "learning_curve.png", "certificate.json",
             "certificate.png", "selection.npz", "experts.npy", "experts.json", "cells.csv", "comparison.md", "comparison.png")


def create(output_dir: str | None, name: str, overwrite: bool) -> pathlib.Path:
  """A folder that can be written and holds no earlier run.

  Raises:
    UsageError: where it holds a run and `overwrite` is False, or cannot be written.
  """
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
  path = pathlib.Path(output_dir or f"runs/{stamp}-{name}")
  try:
    path.mkdir(parents=True, exist_ok=True)
    found = [file for file in RUN_FILES if (path / file).exists()]
    if found and not overwrite:
      raise UsageError(f"--output_dir: {path} already holds a run ({', '.join(found)}); choose another, or --overwrite")
    for file in found:
      (path / file).unlink()
    files.write_atomically(path / "config.json", b"{}")
  except OSError as error:
    raise UsageError(f"--output_dir: cannot write to {path} ({error.strerror or error})") from error
  return path


def newest(name: str) -> pathlib.Path:
  """The latest file of that name under runs/; UsageError where there is none."""
  found = sorted(pathlib.Path("runs").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
  if not found:
    raise UsageError(f"--artifact: expected a file, or a run under runs/ that holds a {name}; found none")
  return found[-1]


def write_json(path, content: dict) -> None:
  """Writes a JSON file atomically."""
  files.write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_config(path: pathlib.Path, config, **resolved) -> None:
  """`config.json`: every resolved value, versions and hardware."""
  write_json(path / "config.json", {**dataclasses.asdict(config), **resolved, "environment": environment()})


def append_metrics(path: pathlib.Path, record: dict) -> None:
  """One more line of `metrics.jsonl`."""
  with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write(json.dumps(record) + "\n")


def read_metrics(path: pathlib.Path) -> list[dict]:
  """The lines of `metrics.jsonl`; none where the run logged no step."""
  if not (path / "metrics.jsonl").exists():
    return []
  return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def environment() -> dict:
  """Versions, commit and hardware."""
  import flax
  import jaxlib
  import numpy
  import optax
  modules = {"jax": jax, "jaxlib": jaxlib, "flax": flax, "optax": optax, "numpy": numpy, "kipcore": kipcore}
  device = jax.local_devices()[0]
  return {
      "versions": {"python": platform.python_version(), **{n: m.__version__ for n, m in modules.items()}},
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
  root = pathlib.Path(__file__).resolve().parents[1]
  try:
    out = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
                         capture_output=True, text=True, timeout=10, check=True)
    return out.stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
