"""Runs `kipcore-evaluate` from a clone: `python -m experiments.run_evaluate`."""

from kipcore.cli.evaluate import run

if __name__ == "__main__":
  run()
