"""Kills and resumes runs at random times: `python -m experiments.robustness.survival`.

Each trial starts `run_distill`, sends it SIGKILL after a random time, resumes it until it
completes, and compares the bytes of its artifact with those of an uninterrupted run. Checkpoints
are written after every device call, so that many kills occur during a write. Four of five kills
occur shortly after the checkpoint of a random step, the others at any time. Writes
experiments/results/survival.json. Half an hour on two cores.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.config import CheckpointConfig, DistillConfig

FLAGS = flags.FLAGS

flags.DEFINE_integer("kills", 100, "Runs to kill.", lower_bound=1)
flags.DEFINE_integer("steps", 3000, "Steps of each run.", lower_bound=1)
flags.DEFINE_string(
  "signal", "KILL", "KILL, or TERM, after which a run must stop by itself at a checkpoint."
)
flags.DEFINE_string("output", "experiments/results/survival.json", "Result file.")


def start(config: DistillConfig, folder, resume: bool) -> int:
  """Starts a run in a forked process with all modules imported but no device; returns its id."""
  sys.stdout.flush()
  process = os.fork()
  if process:
    return process
  status = 1
  try:
    from kipcore.cli.errors import Stopped
    from kipcore.cli.runs import pipeline

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
      try:
        pipeline.run_distill(config, str(folder), checkpoints=CheckpointConfig(1e-9, resume=resume))
        status = 0
      except Stopped:
        status = 143
  finally:
    os._exit(status)


def ended(process: int) -> int:
  """The exit status of a run: 128 plus the signal number if a signal terminated it."""
  code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
  return code if code >= 0 else 128 - code


def content(folder: pathlib.Path) -> str:
  """Digest of the results of a run: the bytes of its artifact and its log without times."""
  digest = hashlib.sha256((folder / "distilled.npz").read_bytes())
  for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    digest.update(
      json.dumps(
        {name: value for name, value in json.loads(line).items() if name != "seconds"}
      ).encode()
    )
  return digest.hexdigest()


def newest(folder: pathlib.Path) -> int:
  """The step of the newest checkpoint, or -1 if there is none."""
  return max(
    (int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()), default=-1
  )


def trial(config, folder: pathlib.Path, step: int, seconds: float, number: int) -> dict:
  """Interrupts a run after a checkpoint and resumes it until it completes.

  Args:
    config, folder: config and folder of the run.
    step: wait until the checkpoint of this or a later step; -1 for the start of the run.
    seconds: time between this checkpoint and the signal.
    number: signal number.

  Returns:
    Record of the trial.
  """
  process = start(config, folder, resume=False)
  begun = time.perf_counter()
  while newest(folder) < step and not (done := os.waitpid(process, os.WNOHANG))[0]:
    time.sleep(0.002)
  if newest(folder) < step:
    raise RuntimeError(
      f"expected a run that reaches its checkpoint of step {step}, got one that ended with "
      f"{done[1]}"
    )
  time.sleep(seconds)
  record = {"after_seconds": round(time.perf_counter() - begun, 2)}
  with contextlib.suppress(ProcessLookupError):
    os.kill(process, number)
  status = ended(process)
  kept = [path.name for path in folder.glob("checkpoints/*")]
  record |= {
    "status": status,
    "checkpoint": newest(folder),
    "being_written": sum(not name.isdigit() for name in kept),
  }
  if not (folder / "README.txt").exists():
    record["resumed"] = ended(start(config, folder, resume=True))
  return record


def main() -> None:
  """Runs all trials and writes the result file."""
  import orbax.checkpoint  # noqa: F401
  import sklearn.datasets  # noqa: F401

  import kipcore.io.checkpoint  # noqa: F401
  from kipcore.cli.folder import run_folder
  from kipcore.cli.runs import pipeline  # noqa: F401

  config = DistillConfig(steps=FLAGS.steps, target_batch_size=250, num_devices=1)
  rng, trials = random.Random(0), []
  with tempfile.TemporaryDirectory() as top:
    top = pathlib.Path(top)
    # Later runs use the compilation cache of the first, so that kills do not occur during
    # compilation.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(top / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for name in ("first", "whole"):
      begun = time.perf_counter()
      assert_zero(ended(start(config, top / name, resume=False)))
      seconds = time.perf_counter() - begun
    wanted = content(top / "whole")
    for i in range(FLAGS.kills):
      folder = top / f"run{i}"
      # Four of five kills are between checkpoints or during a write, the others at any time.
      moment = (
        (rng.randrange(FLAGS.steps - 200), rng.uniform(0.0, 0.3))
        if i % 5
        else (-1, rng.uniform(0.0, seconds))
      )
      record = trial(config, folder, *moment, getattr(signal, f"SIG{FLAGS.signal}"))
      record["same_bytes"] = (folder / "distilled.npz").exists() and content(folder) == wanted
      trials.append(record)
      print(i, record, flush=True)
  killed = [t for t in trials if t["status"] == 128 + getattr(signal, f"SIG{FLAGS.signal}")]
  summary = {
    "killed": len(killed),
    "ended_before_the_signal": len(trials) - len(killed),
    "resumed": sum("resumed" in t for t in killed),
    "from_a_checkpoint": sum(t["checkpoint"] >= 0 for t in killed),
    "while_one_was_written": sum(t["being_written"] > 0 for t in killed),
    "same_bytes": sum(t["same_bytes"] for t in killed),
    "seconds_of_a_run": seconds,
  }
  print(json.dumps(summary, indent=2))
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  known = json.loads(path.read_text()) if path.exists() else {}
  run_folder.write_json(
    path,
    {
      **known,
      "environment": environment,
      "config": dataclasses.asdict(config),
      FLAGS.signal: {"summary": summary, "trials": trials},
    },
  )


def assert_zero(status: int) -> None:
  """RuntimeError if an uninterrupted run failed."""
  if status:
    raise RuntimeError(f"expected a run to end with status 0, got {status}")


if __name__ == "__main__":
  common.launch(main)
