"""Runs that go on: what is kept of one, when it is to stop, and its folder, to which no second run may write.

`run_distill --resume` goes on with the run of a folder from its last checkpoint. The flags are those that it began with;
one that is given again and differs is refused, but for those that change nothing of what is computed.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import Stopped, UsageError, usage
from kipcore.distillation.snapshot import CheckpointPolicy, Snapshot, scale_learning_rate
from kipcore.io import checkpoint
from kipcore.types import NumericalError

FOLDER = "checkpoints"
# What may differ when a run goes on: where things are, and on how many devices (the mathematics is the same, the draws are not).
FREE = ("data_dir", "num_devices", "experts")


def config_of(folder, given: dict) -> DistillConfig:
  """The config that a run began with, with the free ones of the flags that are given now.

  Args:
    folder: of the run.
    given: flags that the user set.

  Raises:
    UsageError: for a folder without a run, or flags that differ from those of the run; all are named.
  """
  try:
    recorded = json.loads(pathlib.Path(folder, "config.json").read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(DistillConfig)}
    began = DistillConfig(**{name: value for name, value in recorded.items() if name in known})
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise UsageError(
      f"--resume: expected the folder of a run of run_distill, got {folder} ({error})"
    ) from error
  if "method" not in recorded:
    raise UsageError(
      f"--resume: the run of {folder} ended before it recorded its flags; begin it again, with --overwrite"
    )
  before = dataclasses.asdict(began)
  differing = checkpoint.differences(
    {name: before[name] for name in given if name not in FREE},
    {name: value for name, value in given.items() if name not in FREE},
  )
  if differing:
    raise UsageError(
      f"--resume: expected the flags that the run of {folder} began with; " + "; ".join(differing)
    )
  return dataclasses.replace(
    began, **{name: value for name, value in given.items() if name in FREE}
  )


def unfinished(output_dir: str | None) -> pathlib.Path:
  """The folder to go on with: as named, or the newest under runs/ that has a config and not all of its files."""
  if output_dir:
    return pathlib.Path(output_dir)
  found = [
    path.parent
    for path in pathlib.Path("runs").glob("*/config.json")
    if not (path.parent / "README.txt").exists()
  ]
  if not found:
    raise UsageError(
      "--resume: expected --output_dir, or a run under runs/ that did not finish; found none"
    )
  return max(found, key=lambda path: path.stat().st_mtime)


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder while the block runs; UsageError where another process does. A process that dies lets go of it."""
  path = folder / ".lock"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    opened = open(path, "a+b")
  except OSError as error:
    raise UsageError(
      f"--output_dir: cannot write to {folder} ({error.strerror or error})"
    ) from error
  with opened as file:
    with contextlib.suppress(ImportError):  # not on Windows
      import fcntl

      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        raise UsageError(
          f"--output_dir: another run is writing to {folder}; choose another folder, or wait for its end"
        ) from error
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
  """Whether SIGTERM came, as schedulers send before they take a machine away; a second one ends the process at once."""
  came = threading.Event()

  def note(number, frame):
    came.set()
    signal.signal(number, signal.SIG_DFL)

  if threading.current_thread() is not threading.main_thread():
    yield came.is_set
    return
  before = signal.signal(signal.SIGTERM, note)
  try:
    yield came.is_set
  finally:
    signal.signal(signal.SIGTERM, before)


class Keeper:
  """The checkpoints of one run: opened when they are first needed, deleted when the run has its result."""

  def __init__(self, folder: pathlib.Path, config: DistillConfig, hashes: dict, seconds: float):
    """Nothing is opened yet.

    Args:
      folder: of the run.
      config: of the run.
      hashes: of its dataset, which must be the same when it goes on.
      seconds: between checkpoints; 0 for none but at a stop and at a failure.
    """
    settings = {
      name: value for name, value in dataclasses.asdict(config).items() if name not in FREE
    }
    self._folder, self._seconds = folder / FOLDER, seconds or float("inf")
    self._settings = json.loads(json.dumps({**settings, "dataset_hashes": hashes}))
    self._open = None

  @property
  def _checkpoints(self) -> checkpoint.Checkpoints:
    self._open = self._open or checkpoint.Checkpoints(self._folder, self._settings)
    return self._open

  def last(self) -> Snapshot | None:
    """The snapshot to go on from; None where the run was ended before its first; UsageError where it is of other settings."""
    with usage():
      return (
        self._checkpoints.restore() if self._folder.exists() and self._checkpoints.steps() else None
      )

  def carry(
    self,
    distill: Callable,
    last: Snapshot | None,
    stop: Callable[[], bool],
    retries: int,
    rewind: Callable[[list], None],
    say: Callable[[str], None],
  ):
    """Distills, from a snapshot or from the beginning, and steps back where numbers fail.

    Args:
      distill: of the keywords `keeping` and `resume` of `loop.distill`.
      last: the snapshot, or None.
      stop: whether the run is to stop.
      retries: times to step back, each at half the rate.
      rewind: told the history when it steps back.
      say: told what happens.

    Returns:
      What `distill` returns.

    Raises:
      NumericalError: of the last try, with what can be done about it.
    """
    earlier = []  # the last snapshot that is not of a failure

    def save(snapshot):
      with usage():
        self._checkpoints.save(snapshot)
      earlier[:] = [*earlier[-1:], snapshot]

    for left in range(retries, -1, -1):
      try:
        return distill(checkpoint_policy=CheckpointPolicy(save, self._seconds, stop), resume=last)
      except NumericalError as error:
        if not left:
          raise NumericalError(
            f"{error}\nThe state before that step is kept in {self._folder}. What helps, in this order: --retries=3 "
            "(back to an earlier checkpoint, at half the rate), a smaller --learning_rate, a larger --relative_ridge, --x64."
          ) from error
        failed = earlier.pop()
        back = (
          earlier[-1] if earlier else last if last is not None and last.step < failed.step else None
        )
        back = self._beginning(distill) if back is None else back
        last = scale_learning_rate(back, 0.5)
        self._checkpoints.discard(last.step)
        rewind(last.history)
        say(f"{error}: back to step {last.step}, at half the rate")

  def _beginning(self, distill: Callable) -> Snapshot:
    """The snapshot of no steps."""
    caught = []
    with contextlib.suppress(Stopped):
      distill(
        checkpoint_policy=CheckpointPolicy(caught.append, float("inf"), lambda: True), resume=None
      )
    return caught[0]

  def done(self) -> None:
    """The run has its result: nothing is to go on."""
    if self._open is not None:
      self._open.close()
    if jax.process_index() == 0:
      shutil.rmtree(self._folder, ignore_errors=True)
