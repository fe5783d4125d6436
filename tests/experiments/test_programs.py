"""The programs under experiments/ as they are started."""

import importlib.util
import pathlib

import pytest
from binaries import ROOT, run_binary
from helpers import slow_except

PROGRAMS = sorted(
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for path in pathlib.Path(ROOT, "experiments").rglob("*.py")
  if "__main__" in path.read_text()
)


@pytest.mark.parametrize(
  "program",
  slow_except(
    PROGRAMS, *(name for name in PROGRAMS if "run_" in name), "experiments.robustness.survival"
  ),
)
def test_help_is_printed_without_any_work(program):
  done = run_binary(program, "--help")
  assert done.returncode == 0, done.stdout + done.stderr
  module = program.replace("experiments.run_", "kipcore.cli.")  # which the command starts
  text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
  assert " ".join(text.removeprefix('"""').split()[:3]) in " ".join(done.stdout.split())
  assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.skipif(bool(importlib.util.find_spec("atheris")), reason="atheris is installed")
def test_a_missing_fuzzing_engine_is_named_in_one_line():
  done = run_binary("experiments.robustness.fuzz_guided", "--seconds=1")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "expected atheris to be installed, got none; pip install atheris\n"
