"""Rewrites report.html of a run from the files in its folder; nothing is computed.

Examples:
  kipcore-report
      for the newest run under runs/, in its folder
  kipcore-report --run=runs/compare_mnist --output=mnist.html
      for a comparison, to another file
"""

import csv
import pathlib

from kipcore.cli import flags
from kipcore.cli.config import ReportConfig
from kipcore.cli.errors import UsageError


def write(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the report of a distillation, selection or comparison.

  Args:
    folder: folder of the run.
    path: file to write.

  Raises:
    UsageError: if the folder does not hold a finished run.
  """
  from kipcore.cli.folder import reporting
  from kipcore.cli.runs import comparison

  if not path.parent.is_dir():
    raise UsageError(f"--output: expected a file in an existing folder, got {path}")
  try:
    if (folder / "cells.csv").exists():
      rows = list(csv.DictReader((folder / "cells.csv").read_text(encoding="utf-8").splitlines()))
      comparison.write_report(folder, rows, path)
    else:
      reporting.write_report(folder, path)
  except OSError as error:
    raise UsageError(
      f"--run: expected the folder of a finished run, got {folder} ({flags.describe(error)})"
    ) from error
  except (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
  ) as error:  # JSON of any form
    raise UsageError(
      f"--run: expected the folder of a finished run, got {folder}, whose files are not those of a "
      f"run ({type(error).__name__})"
    ) from error


def main(values) -> None:
  """Writes the report and prints its path."""
  runs = sorted(pathlib.Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
  if not (values.run or runs):
    raise UsageError(
      "--run: expected the folder of a run, got none, and runs/ does not contain any"
    )
  folder = pathlib.Path(values.run or runs[-1].parent)
  path = pathlib.Path(values.output or folder / "report.html")
  write(folder, path)
  print(path)


run = flags.binary(main, ReportConfig, main_flags=("run",))

if __name__ == "__main__":
  run()
