"""Runs `kipcore-distill` from a clone: `python -m experiments.run_distill`."""

from kipcore.cli.distill import run

if __name__ == "__main__":
  run()
