"""Interrupted runs: checkpoints and signals that stop a run.

`kipcore-distill --resume` continues the run of a folder from its last checkpoint. Its settings are
those that it started with; a flag that is given again and differs is refused, except for those that
do not change what is computed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

import jax

from kipcore.cli import config as configs
from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import Stopped, UsageError, usage
from kipcore.cli.folder.run_folder import CHECKPOINTS
from kipcore.distillation.snapshot import CheckpointPolicy, Snapshot, scale_learning_rate
from kipcore.io import checkpoint
from kipcore.types import NumericalError

# Settings that may differ in a resumed run: locations, and the number of devices (which changes the draws alone).
FREE = ("data_dir", "num_devices", "experts")


def config_of(folder, given: dict) -> DistillConfig:
  """The config that a run started with, updated by the free settings that are given now.

  Args:
    folder: folder of the run.
    given: settings that the user gave.

  Returns:
    A config.

  Raises:
    UsageError: for a folder without a run, or settings that differ; all of them are named.
  """
  path = pathlib.Path(folder, "config.json")
  wanted = "--resume: expected the folder of a run of kipcore-distill, got"
  try:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(DistillConfig)}
    started = DistillConfig(**{name: value for name, value in recorded.items() if name in known})
  except OSError as error:
    raise UsageError(f"{wanted} {folder} ({path.name}: {error.strerror})") from error
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise UsageError(f"{wanted} {folder}, whose {path.name} is not that of a run") from error
  if "method" not in recorded:
    raise UsageError(
      f"--resume: the run of {folder} ended before it recorded its settings; start it again without "
      "--resume"
    )
  configs.validate(started)
  before = dataclasses.asdict(started)
  differing = checkpoint.differences(
    {name: before[name] for name in given if name not in FREE},
    {name: value for name, value in given.items() if name not in FREE},
  )
  if differing:
    raise UsageError(
      f"--resume: expected the settings that the run of {folder} started with; "
      + "; ".join(differing)
    )
  free = {name: value for name, value in given.items() if name in FREE}
  return dataclasses.replace(started, **free)


def unfinished(output_dir: str | None) -> pathlib.Path:
  """The folder to resume: as given, or that of the newest unfinished run under runs/."""
  if output_dir:
    return pathlib.Path(output_dir)
  found = [
    path.parent
    for path in pathlib.Path("runs").glob("*/config.json")
    if not (path.parent / "README.txt").exists()
  ]
  if not found:
    raise UsageError(
      "--resume: expected --output_dir or an unfinished run under runs/; found neither"
    )
  return max(found, key=lambda path: path.stat().st_mtime)


class StopSignals:
  """SIGTERM (sent by schedulers) and SIGINT (Ctrl-C), which stop a run at its next checkpoint.

  Outside of `at_checkpoints`, Ctrl-C interrupts at once. A second signal ends the process.
  """

  def __init__(self):
    self.number: int | None = None
    self._waiting = False

  def __call__(self) -> bool:
    """Whether a signal has arrived."""
    return self.number is not None

  @property
  def status(self) -> int:
    """Exit status of the process."""
    return 128 + (self.number or signal.SIGTERM)

  @contextlib.contextmanager
  def at_checkpoints(self):
    """While the block runs, Ctrl-C stops the run at its next checkpoint."""
    self._waiting = True
    try:
      yield
    finally:
      self._waiting = False

  def note(self, number, frame) -> None:
    """The signal handler."""
    if number == signal.SIGINT and not self._waiting:
      raise KeyboardInterrupt("interrupted before the first checkpoint")
    self.number = number
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if number == signal.SIGINT:
      text = "stopping at the next checkpoint; press Ctrl-C again to stop now"
      os.write(2, f"\n{text}\n".encode())  # of the process: a signal handler must not use buffers


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
  """Handles SIGTERM and SIGINT while the block runs, in the main thread."""
  stop = StopSignals()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  before = {n: signal.signal(n, stop.note) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class RunCheckpoints:
  """The checkpoints of one run: opened when first needed, deleted when the run has finished."""

  def __init__(
    self, folder: pathlib.Path, config: DistillConfig, hashes: Mapping[str, str], seconds: float
  ):
    """Opens nothing.

    Args:
      folder: folder of the run.
      config: its settings.
      hashes: hashes of its dataset, which must be the same when it is resumed.
      seconds: time between checkpoints; 0 for checkpoints only when it is stopped or fails.
    """
    settings = {
      name: value for name, value in dataclasses.asdict(config).items() if name not in FREE
    }
    self._folder, self._seconds = folder / CHECKPOINTS, seconds or float("inf")
    self._settings = json.loads(json.dumps({**settings, "dataset_hashes": dict(hashes)}))
    self._open: checkpoint.Checkpoints | None = None

  @property
  def _checkpoints(self) -> checkpoint.Checkpoints:
    if self._open is None:
      defaults = json.loads(json.dumps(dataclasses.asdict(DistillConfig())))
      self._open = checkpoint.Checkpoints(self._folder, self._settings, defaults=defaults)
    return self._open

  def last(self) -> Snapshot | None:
    """The snapshot to resume from; None if there is none; UsageError if it has other settings."""
    with usage():
      return (
        self._checkpoints.restore() if self._folder.exists() and self._checkpoints.steps() else None
      )

  def run(
    self,
    distill: Callable,
    last: Snapshot | None,
    stop: StopSignals,
    retries: int,
    rewind: Callable[[list], None],
    write: Callable[[str], None],
  ):
    """Distills from a snapshot or from the beginning, and returns to a checkpoint after a failure.

    Args:
      distill: takes the keywords `checkpoint_policy` and `resume` of `loop.distill`.
      last: the snapshot, or None.
      stop: signals that stop the run.
      retries: how many times to return, each time with half the learning rate.
      rewind: called with the history when it returns.
      write: prints a line.

    Returns:
      What `distill` returns.

    Raises:
      NumericalError: of the last attempt, with advice.
      Stopped: after a signal.
    """
    earlier: list[Snapshot] = []  # the last two snapshots; that of a failure is the second

    def save(snapshot):
      with usage():
        self._checkpoints.save(snapshot)
      earlier[:] = [*earlier[-1:], snapshot]

    for left in range(retries, -1, -1):
      try:
        policy = CheckpointPolicy(save, self._seconds, stop)
        with stop.at_checkpoints():
          return distill(checkpoint_policy=policy, resume=last)
      except Stopped as error:
        raise Stopped(str(error), stop.status) from None
      except NumericalError as error:
        if not left:
          kept = (
            f"The state before that step is kept in {self._folder}; --resume --retries=3 returns to an "
            "earlier checkpoint with half the learning rate. "
            if earlier
            else ""
          )
          raise NumericalError(
            f"{str(error).rstrip('.')}. {kept}Otherwise try, in this order: a smaller --learning_rate, a "
            "larger --relative_ridge, --x64."
          ) from error
        failed = earlier.pop()
        back = (
          earlier[-1] if earlier else last if last is not None and last.step < failed.step else None
        )
        back = self._beginning(distill) if back is None else back
        last = scale_learning_rate(back, 0.5)
        self._checkpoints.discard(last.step)
        rewind(last.history)
        write(f"{error}: returning to step {last.step} with half the learning rate")

  def _beginning(self, distill: Callable) -> Snapshot:
    """The snapshot before the first step."""
    caught: list[Snapshot] = []
    with contextlib.suppress(Stopped):
      distill(
        checkpoint_policy=CheckpointPolicy(caught.append, float("inf"), lambda: True), resume=None
      )
    return caught[0]

  def done(self) -> None:
    """Deletes the checkpoints of a run that has finished."""
    if self._open is not None:
      self._open.close()
    if jax.process_index() == 0:
      shutil.rmtree(self._folder, ignore_errors=True)
