"""Scores a saved set on its test split, next to other sets of the same size.

Prints a table to the error stream, and the result as JSON to the output.

Examples:
  kipcore-evaluate
      the newest run under runs/, by kernel ridge regression; reproduces the recorded accuracy
  kipcore-evaluate --artifact=RUN/distilled.npz --evaluators=krr,network:resnet --baselines=uniform
      also by finite networks trained on it, and on as many random images
"""

import dataclasses
import json
import shlex
import sys

from kipcore.cli import errors, flags
from kipcore.cli.config import EvaluateConfig, ScoreConfig, from_flags


def main(values) -> None:
  """Loads, scores, prints."""
  import jax

  from kipcore.cli.folder import run_folder
  from kipcore.cli.runs import evaluation
  from kipcore.io import artifact

  with errors.usage():
    path = values.artifact or run_folder.newest("distilled.npz")
    stored = artifact.load_artifact(path)
    # The recorded digits are reproduced only at the precision that produced them.
    jax.config.update("jax_enable_x64", stored.support.dtype == "float64")
    run_folder.check_file("--output", values.output)
  config = from_flags(EvaluateConfig, values)
  if config.evaluators == ("all",):
    config = dataclasses.replace(config, evaluators=evaluation.ALL_EVALUATORS)
  if values.dry_run:
    from kipcore.cli.runs import dry_run

    arguments = [
      argument for argument in sys.argv[1:] if not argument.lstrip("-").startswith("dry_run")
    ]
    dry_run.of_evaluation(
      stored, config, shlex.join(["kipcore-evaluate", *arguments]), values.output
    )
    return
  result = {
    "artifact": str(path),
    **evaluation.run_evaluate(stored, config, evaluation.print_progress),
  }
  if values.output:
    run_folder.write_json(values.output, {**result, "environment": run_folder.environment()})
  print("\n" + result.pop("markdown") + "\n", file=sys.stderr)
  shown = {name: value for name, value in result.items() if name != "table" and value != {}}
  print(json.dumps(shown, indent=2))


run = flags.binary(
  main, ScoreConfig, EvaluateConfig, main_flags=("artifact", "evaluators", "dry_run")
)

if __name__ == "__main__":
  run()
