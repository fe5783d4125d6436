"""Runs `kipcore-compare` from a clone: `python -m experiments.run_compare`."""

from kipcore.cli.compare import run

if __name__ == "__main__":
  run()
