"""Fuzzes all readers of files and settings for crashes, hangs, partial files and silent NaN.

Within two seconds, each malformed example must either be read with a valid result or be refused
with the documented error, whose message is one line that states what was expected. Writes the
counts.

Examples:
  python -m experiments.robustness.fuzz --examples=12000
      12,000 examples in total for all targets; about five minutes on two busy cores
  python -m experiments.robustness.fuzz --seconds=600 --only=published
      ten minutes of the targets whose names contain "published", without the result file
"""

import contextlib
import json
import math
import pathlib
import signal
import sys
import tempfile
import time
import traceback
import warnings

from absl import flags

from experiments.robustness.fuzz_targets import Defect, Target, targets
from kipcore.cli import flags as common

FLAGS = flags.FLAGS
_BATCH = 250  # examples per target and round with --seconds


def limit_memory(number: int = 2**32) -> None:
  """Limits further allocations to `number` bytes if the system supports it; then MemoryError."""
  with contextlib.suppress(ImportError, OSError, ValueError, AttributeError):
    import resource

    from kipcore.cli.folder import run_folder

    resource.setrlimit(
      resource.RLIMIT_DATA,
      (run_folder.process_bytes("VmData") + number, resource.getrlimit(resource.RLIMIT_DATA)[1]),
    )


@contextlib.contextmanager
def _limited(seconds: float):
  """Raises `Defect` in the block after `seconds`, if signals reach it."""

  def late(*_):
    raise Defect(f"no result after {seconds:g} s")

  before = signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def outcome(target: Target, payload) -> str:
  """Returns "read" or "refused"; raises `Defect` for any other outcome."""
  with (
    tempfile.TemporaryDirectory(prefix="fuzz") as folder,
    warnings.catch_warnings(record=True) as heard,
  ):
    warnings.simplefilter("always")
    try:
      with _limited(target.seconds):
        target.attempt(pathlib.Path(folder), payload)
      found = "read"
    except target.errors as error:
      text = str(error).replace(folder, "")
      if (
        "\n" in text
        or len(text) > 1500
        or "expected" not in text
        and not isinstance(error, OSError)
      ):
        raise Defect(f"unclear message {text[:200]!r}") from error
      found = "refused"
    if heard:
      raise Defect(f"{heard[0].category.__name__}: {str(heard[0].message)[:150]}")
  return found


def attack(target: Target, examples: int, seed: int = 0) -> dict:
  """Counts of outcomes, and the smallest payload found for each kind of defect."""
  import hypothesis

  counts, defects = {"examples": 0, "read": 0, "refused": 0}, {}

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=examples,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(target.payloads)
  def one(payload):
    counts["examples"] += 1
    try:
      counts[outcome(target, payload)] += 1
    except Exception as error:  # any exception is a finding
      frame = traceback.extract_tb(error.__traceback__)[-1]
      name = f"{type(error).__name__} at {pathlib.Path(frame.filename).name}:{frame.lineno}: {str(error)[:200]}"
      if isinstance(error, Defect):
        name = str(error)
      shown = repr(payload)
      if name not in defects or len(shown) < len(defects[name]):
        defects[name] = shown[:2000]

  one()
  return {**counts, "defects": defects}


def define_flags() -> None:
  """Defines the flags of this program; modules that import this one have their own."""
  flags.DEFINE_integer("examples", 12_000, "Total examples of all targets.", lower_bound=1)
  flags.DEFINE_float(
    "seconds",
    0.0,
    "Run for about this many seconds and ignore --examples; 0 to count examples.",
    lower_bound=0.0,
  )
  flags.DEFINE_string(
    "only", "", "Attack only targets whose names contain this; the result file is not written."
  )
  flags.DEFINE_integer("seed", 0, "Seed of the examples.", lower_bound=0)
  flags.DEFINE_string("output", "experiments/results/fuzz.json", "Result file.")


def main() -> None:
  """Attacks every target; prints and writes counts and defects."""
  from kipcore.cli.errors import UsageError
  from kipcore.cli.folder import run_folder

  environment = run_folder.environment()
  path, started, results = pathlib.Path(FLAGS.output), time.perf_counter(), {}
  with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
    chosen = {
      name: target for name, target in targets(pathlib.Path(folder)).items() if FLAGS.only in name
    }
    if not chosen:
      raise UsageError(
        f"--only: expected part of one of {', '.join(targets(pathlib.Path(folder)))}; got "
        f"{FLAGS.only!r}"
      )
    limit_memory()
    share, turn = math.ceil(FLAGS.examples / len(chosen)), 0
    while turn == 0 or time.perf_counter() - started < FLAGS.seconds:
      for name, target in chosen.items():
        count = min(_BATCH if FLAGS.seconds else share, target.most)
        found = attack(target, count, FLAGS.seed + turn)
        known = results.setdefault(name, {"examples": 0, "read": 0, "refused": 0, "defects": {}})
        results[name] = {
          **{key: known[key] + found[key] for key in ("examples", "read", "refused")},
          "defects": {**known["defects"], **found["defects"]},
        }
        print(
          f"{name}: "
          + ", ".join(f"{results[name][key]} {key}" for key in ("examples", "read", "refused")),
          flush=True,
        )
        for defect, payload in found["defects"].items():
          print(f"  DEFECT {defect}\n    {payload[:400]}", flush=True)
      turn += 1
  total = {
    key: sum(each[key] for each in results.values()) for key in ("examples", "read", "refused")
  }
  total["defects"] = sum(len(each["defects"]) for each in results.values())
  print(json.dumps(total))
  if not FLAGS.only:
    guided = json.loads(path.read_text()).get("coverage_guided") if path.exists() else None
    run_folder.write_json(
      path,
      {
        "environment": environment,
        "seconds": time.perf_counter() - started,
        "total": total,
        "targets": results,
        "coverage_guided": guided,
        **run_folder.peak_memory(),
      },
    )
  sys.exit(1 if total["defects"] else 0)


if __name__ == "__main__":
  define_flags()
  common.launch(main)
