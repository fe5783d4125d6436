"""Kills runs at random moments, and compares what they end with after they go on: `python -m experiments.survival`.

Every trial starts a run of `run_distill`, sends it SIGKILL after a random time, resumes it until it ends, and compares the
bytes of its artefact with those of a run that nobody touched. Checkpoints are written as often as there is a call to
the devices, so that many kills meet one that is being written; four of five kills fall between the first checkpoint and
the last step, the others anywhere. Writes experiments/results/survival.json. Half an hour on two cores.
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

from experiments import flags as common
from experiments.config import DistillConfig, Upkeep

FLAGS = flags.FLAGS

flags.DEFINE_integer("kills", 100, "Runs to kill.", lower_bound=1)
flags.DEFINE_integer("steps", 3000, "Steps of each run.", lower_bound=1)
flags.DEFINE_string("signal", "KILL", "KILL, or TERM, after which a run must stop by itself at a checkpoint.")
flags.DEFINE_string("output", "experiments/results/survival.json", "Result file.")


def start(config: DistillConfig, folder, resume: bool) -> int:
  """Begins a run in a process of its own, which has all modules but no device yet; its number."""
  sys.stdout.flush()
  process = os.fork()
  if process:
    return process
  status = 1
  try:
    from experiments import pipeline
    from experiments.errors import Stopped
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
      try:
        pipeline.run_distill(config, str(folder), upkeep=Upkeep(1e-9, resume=resume))
        status = 0
      except Stopped:
        status = 143
  finally:
    os._exit(status)


def ended(process: int) -> int:
  """The exit status of a run, 128 and more where a signal ended it."""
  code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
  return code if code >= 0 else 128 - code


def content(folder: pathlib.Path) -> str:
  """What a run ended with: the bytes of its artefact, and its log without times."""
  digest = hashlib.sha256((folder / "distilled.npz").read_bytes())
  for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
    digest.update(json.dumps({name: value for name, value in json.loads(line).items() if name != "seconds"}).encode())
  return digest.hexdigest()


def stepping(process: int, folder: pathlib.Path) -> tuple[float, float]:
  """Seconds after which a run that nobody touches has a checkpoint, and after which it needs none any more."""
  begun, first, last = time.perf_counter(), None, None
  while not (found := os.waitpid(process, os.WNOHANG))[0]:
    there = any(path.name.isdigit() for path in folder.glob("checkpoints/*"))
    now = time.perf_counter() - begun
    first, last = (first or now, now) if there else (first, last)
    time.sleep(0.005)
  assert_zero(found[1])
  return first, last


def trial(config, folder: pathlib.Path, seconds: float, number: int) -> dict:
  """A run that is sent a signal after so many seconds, and goes on until it ends."""
  process = start(config, folder, resume=False)
  time.sleep(seconds)
  with contextlib.suppress(ProcessLookupError):
    os.kill(process, number)
  record = {"after_seconds": round(seconds, 2), "status": ended(process)}
  kept = [path.name for path in folder.glob("checkpoints/*")]
  record |= {"checkpoints": sorted(int(name) for name in kept if name.isdigit()), "being_written": sum(not name.isdigit() for name in kept)}
  if (folder / "config.json").exists() and (folder / "config.json").read_text() != "{}" and not (folder / "result.json").exists():
    record["resumed"] = ended(start(config, folder, resume=True))
  return record


def main() -> None:
  """All trials."""
  import matplotlib.pyplot  # noqa: F401: what every run imports, once
  import orbax.checkpoint  # noqa: F401
  import sklearn.datasets  # noqa: F401
  import kipcore.checkpoint  # noqa: F401
  from experiments import pipeline, run_folder  # noqa: F401
  config = DistillConfig(steps=FLAGS.steps, target_batch_size=250, num_devices=1)
  rng, trials = random.Random(0), []
  with tempfile.TemporaryDirectory() as top:
    top = pathlib.Path(top)
    # Runs that find what the first one compiled: kills meet work, not compilation.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(top / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    assert_zero(ended(start(config, top / "first", resume=False)))
    first, last = stepping(start(config, top / "whole", resume=False), top / "whole")
    wanted = content(top / "whole")
    for i in range(FLAGS.kills):
      folder = top / f"run{i}"
      record = trial(config, folder, rng.uniform(first, last) if i % 5 else rng.uniform(0.0, last), getattr(signal, f"SIG{FLAGS.signal}"))
      record["same_bytes"] = (folder / "distilled.npz").exists() and content(folder) == wanted
      trials.append(record)
      print(i, record, flush=True)
  killed = [t for t in trials if t["status"] == 128 + getattr(signal, f"SIG{FLAGS.signal}")]
  summary = {"killed": len(killed), "ended_before_the_signal": len(trials) - len(killed), "resumed": sum("resumed" in t for t in killed),
             "from_a_checkpoint": sum(bool(t["checkpoints"]) for t in killed), "while_one_was_written": sum(t["being_written"] > 0 for t in killed),
             "same_bytes": sum(t["same_bytes"] for t in killed), "seconds_to_the_first_checkpoint": first,
             "seconds_to_the_last_step": last}
  print(json.dumps(summary, indent=2))
  environment = run_folder.environment()
  path = pathlib.Path(FLAGS.output)
  known = json.loads(path.read_text()) if path.exists() else {}
  run_folder.write_json(path, {**known, "environment": environment, "config": dataclasses.asdict(config),
                               FLAGS.signal: {"summary": summary, "trials": trials}})


def assert_zero(status: int) -> None:
  """RuntimeError where a run that nobody touched failed."""
  if status:
    raise RuntimeError(f"expected a run to end with status 0, got {status}")


if __name__ == "__main__":
  common.launch(main)
