"""Tests that pass as the suite compiles also pass as users compile: at XLA's default optimization level."""

import os
import pathlib
import subprocess
import sys

import pytest
from helpers import slow_except

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOME = "test_equals_scikit_learn or test_label_solve_is_the_minimizer"


@pytest.mark.parametrize(
  "tests", slow_except(["", SOME], SOME), ids=lambda tests: "some" if tests else "all"
)
def test_ridge_regression_passes_at_the_default_level(tests):
  env = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTEST_ADDOPTS": "",
  }
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-q",
      "-p",
      "no:cacheprovider",
      "-k",
      tests,
      "tests/test_krr.py",
    ],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert " passed" in done.stdout
