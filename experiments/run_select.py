"""Runs `kipcore-select` from a clone: `python -m experiments.run_select`."""

from kipcore.cli.select import run

if __name__ == "__main__":
  run()
