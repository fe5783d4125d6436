"""Installation and tests under several versions of Python and JAX: `python -m experiments.robustness.versions`.

For each set of versions: a new virtual environment with these versions, kipcore installed into it from this checkout, the
packages that this changed, a short part of the test suite and one run of the installed command. Packages come from the index that pip uses. Writes
experiments/results/versions.json; sets that are not named in --sets keep their earlier results. Exits with status 3 if a set failed.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from typing import Any, NamedTuple
from xml.etree import ElementTree

from absl import flags

from kipcore.cli import flags as common
from kipcore.types import NumericalError

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).resolve().parents[2]
_COPIED = ("kipcore", "tests", "experiments", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
_TOOLS = ("pytest", "hypothesis", "beartype")
# Kernels, ridge regression, the loop, devices, primitives of our own, flags.
TESTS = (
  "tests/kernels/test_base.py",
  "tests/test_krr.py",
  "tests/test_convolution.py",
  "tests/distillation/test_loop.py",
  "tests/test_devices.py",
  "tests/cli/test_settings.py",
)
COMMAND = ("kipcore-distill", "--teach=kernel", "--steps=20", "--test_rows=200")
# Of the packages whose versions are shown.
SHOWN = ("jax", "flax", "optax", "numpy", "absl-py")


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_list("sets", [], "Names of the sets to run; empty for all.")
  flags.DEFINE_string(
    "path", "", "Folders with pythonX.Y, separated by colons, before those of PATH."
  )
  flags.DEFINE_string("output", "experiments/results/versions.json", "Result file.")


class Versions(NamedTuple):
  """A set of versions.

  Attributes:
    python: version of Python, two numbers.
    packages: requirements that are installed before kipcore.
  """

  python: str
  packages: tuple[str, ...]


# Colab's TPU runtime (August 2026) as far as it concerns kipcore; TensorFlow is not installed there.
_COLAB = (
  "jax==0.7.2 jaxlib==0.7.2 flax==0.11.2 optax==0.2.8 numpy==2.1.3 absl-py==1.4.0 scipy==1.16.3 ml_dtypes==0.6.0 "
  "orbax-checkpoint==0.12.4 scikit-learn==1.6.1 matplotlib==3.10.0 pillow==12.3.0 safetensors==0.8.0 Jinja2==3.1.6 "
  "MarkupSafe==3.0.3 tqdm==4.67.3 protobuf==7.35.1 tensorflow-datasets==4.9.10"
)
_OLDEST = "jax==0.6.1 jaxlib==0.6.1 flax==0.10.6 optax==0.2.4 numpy==2.0.2 absl-py==1.4.0"
_NEWEST = "jax flax optax numpy absl-py"
SETS = {
  "lower bounds": Versions("3.11", tuple(_OLDEST.split())),
  "Colab TPU": Versions("3.13", tuple(_COLAB.split())),
  "Colab TPU on 3.11": Versions("3.11", tuple(_COLAB.split())),
  "newest on 3.11": Versions("3.11", tuple(_NEWEST.split())),
  "newest on 3.12": Versions("3.12", tuple(_NEWEST.split())),
  "newest on 3.13": Versions("3.13", tuple(_NEWEST.split())),
}


def changes(before: dict[str, str], after: dict[str, str]) -> dict:
  """Packages that the installation added besides kipcore, and those that it replaced with their versions before and after."""
  return {
    "added": sorted(set(after) - set(before) - {"kipcore"}),
    "replaced": {
      name: [version, after.get(name)]
      for name, version in before.items()
      if after.get(name) != version
    },
  }


def outcome(versions: Versions, folder: pathlib.Path) -> dict:
  """Installs and tests kipcore with these versions in an empty folder."""
  source, python = folder / "source", folder / "environment" / "bin" / "python"
  source.mkdir()
  for name in _COPIED:  # builds would write into the checkout
    (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, source / name)
  _run([_interpreter(versions.python), "-m", "venv", folder / "environment"])
  install = [python, "-m", "pip", "install", "-q", "--no-compile"]
  _run([*install, *versions.packages])
  before, size = _packages(python), _megabytes(folder / "environment")
  _run([*install, source])
  after = _packages(python)
  found: dict[str, Any] = {
    "python": _run(
      [python, "-c", "import platform; print(platform.python_version())"]
    ).stdout.strip(),
    "versions": {name: after[name] for name in SHOWN},
    **changes(before, after),
    "megabytes": [size, _megabytes(folder / "environment")],
  }
  kept = folder / "constraints.txt"
  kept.write_text("\n".join(f"{name}=={version}" for name, version in after.items()))
  _run([*install, "-c", kept, *_TOOLS])
  return found | {"tests": _tests(python, source), "command": _command(python.parent)}


def _interpreter(version: str) -> str:
  path = os.pathsep.join(filter(None, (FLAGS.path, os.environ.get("PATH", ""))))
  found = shutil.which(f"python{version}", path=path)
  if found is None:
    raise FileNotFoundError(f"expected python{version} in --path or PATH, got none")
  return found


def _run(command) -> subprocess.CompletedProcess:
  """A process that must succeed."""
  done = subprocess.run(
    list(map(str, command)), env=_environment(), capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {done.stderr[-2000:]}")
  return done


def _packages(python) -> dict[str, str]:
  listed = json.loads(_run([python, "-m", "pip", "list", "--format=json"]).stdout)
  return {package["name"].lower().replace("_", "-"): package["version"] for package in listed}


def _megabytes(folder: pathlib.Path) -> int:
  return round(sum(p.lstat().st_size for p in folder.rglob("*")) / 1e6)


def _environment() -> dict[str, str]:
  """Without the paths and settings of the process that runs the sets."""
  own = ("PYTHONPATH", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "VIRTUAL_ENV")
  return {name: value for name, value in os.environ.items() if name not in own}


def _tests(python, source: pathlib.Path) -> dict:
  """Numbers of passed and failed tests, names of the failed ones, and seconds."""
  report = source / "tests.xml"
  options = ("-q", "-p", "no:cacheprovider", "-k", "not neural_tangents", f"--junitxml={report}")
  done = subprocess.run(
    [python, "-m", "pytest", *options, *TESTS],
    cwd=source,
    env=_environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  if not report.exists():
    raise RuntimeError(
      f"pytest ended with status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
  (suite,) = ElementTree.parse(report).getroot()
  bad = [
    case for case in suite if case.find("failure") is not None or case.find("error") is not None
  ]
  return {
    "passed": int(suite.get("tests")) - len(bad) - int(suite.get("skipped")),
    "skipped": int(suite.get("skipped")),
    "failed": [f"{case.get('classname')}.{case.get('name')}" for case in bad],
    "seconds": round(float(suite.get("time"))),
    "output": done.stdout[-4000:] if bad else "",
  }


def _command(scripts: pathlib.Path) -> dict:
  """Exit status of one run of the installed command, its test accuracy and seconds."""
  folder, (name, *arguments), started = scripts.parent / "run", COMMAND, time.perf_counter()
  done = subprocess.run(
    [scripts / name, *arguments, f"--output_dir={folder}"],
    cwd=scripts.parent,
    env=_environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  result = json.loads((folder / "result.json").read_text()) if not done.returncode else {}
  return {
    "status": done.returncode,
    "test_accuracy": result.get("test_accuracy"),
    "seconds": round(time.perf_counter() - started),
    "output": done.stderr[-2000:] if done.returncode else "",
  }


def main() -> None:
  """Runs the sets and writes the result file after each of them."""
  from kipcore.cli.folder import run_folder

  environment, path = run_folder.environment(), pathlib.Path(FLAGS.output)
  results = json.loads(path.read_text())["sets"] if path.exists() else {}
  failed = []
  for name in FLAGS.sets or SETS:
    with tempfile.TemporaryDirectory() as folder:
      found = outcome(SETS[name], pathlib.Path(folder))
    results[name] = {"commit": environment["commit"], **found}
    ordered = {known: results[known] for known in SETS if known in results}
    run_folder.write_json(
      path, {"environment": environment, "tests": TESTS, "command": COMMAND, "sets": ordered}
    )
    print(f"{name}: {found}", flush=True)
    if found["tests"]["failed"] or found["command"]["status"]:
      failed.append(name)
  if failed:
    raise NumericalError(f"expected all tests and commands to succeed, but not with {failed}")


if __name__ == "__main__":
  define_flags()
  common.launch(main)
