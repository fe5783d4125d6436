"""Runs `kipcore-export` from a clone: `python -m experiments.run_export`."""

from kipcore.cli.export import run

if __name__ == "__main__":
  run()
