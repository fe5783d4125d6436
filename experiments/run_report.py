"""Runs `kipcore-report` from a clone: `python -m experiments.run_report`."""

from kipcore.cli.report import run

if __name__ == "__main__":
  run()
