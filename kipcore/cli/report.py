"""Writes report.html of a run anew, from the files of its folder; nothing is computed.

Examples:
  kipcore-report
      of the newest run under runs/, in its folder
  kipcore-report --run=experiments/results/compare_mnist --output=mnist.html
      of a comparison, to another place
"""

import csv
import pathlib

from absl import flags

from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string(
  "run",
  None,
  "Folder of a distillation, selection or comparison; by default the newest under runs/.",
)
flags.DEFINE_string("output", None, "The file; by default report.html in that folder.")


def write(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Finds out what kind of run it is and writes its report; UsageError where it is none, or not finished."""
  from kipcore.cli.errors import UsageError
  from kipcore.cli.folder import reporting
  from kipcore.cli.runs import comparison

  if not path.parent.is_dir():
    raise UsageError(f"--output: expected a file in a folder that exists, got {path}")
  try:
    if (folder / "cells.csv").exists():
      rows = list(csv.DictReader((folder / "cells.csv").read_text(encoding="utf-8").splitlines()))
      comparison.write_report(folder, rows, path)
    else:
      reporting.write_report(folder, path)
  except (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
  ) as error:  # JSON of any form
    raise UsageError(
      f"--run: expected the folder of a finished run, got {folder} ({error!r})"
    ) from error


def main() -> None:
  """Writes the report and says where it is."""
  from kipcore.cli.errors import UsageError

  runs = sorted(pathlib.Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
  if not (FLAGS.run or runs):
    raise UsageError("--run: expected the folder of a run, got none, and there is none under runs/")
  folder = pathlib.Path(FLAGS.run or runs[-1].parent)
  path = pathlib.Path(FLAGS.output or folder / "report.html")
  write(folder, path)
  print(path)


def run() -> None:
  """The console script."""
  common.launch(main)


if __name__ == "__main__":
  run()
