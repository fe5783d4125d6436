"""Checkpoints of a run on disk, from which it resumes with bit-identical results.

Orbax writes each checkpoint under a temporary name and renames it, so that a run that is killed while
writing resumes from the previous one. Each contains its format, the settings of the run, and checksums.
Nothing is unpickled.
"""

import contextlib
import hashlib
import json
import pathlib
import warnings
from typing import Any

import jax
import numpy as np

from kipcore.distillation.snapshot import Snapshot
from kipcore.types import KipcoreError

FORMAT = "kipcore-checkpoint"
FORMAT_VERSION = 1


class CheckpointError(KipcoreError, ValueError):
  """A checkpoint cannot be written or read, or belongs to another run."""


class Checkpoints:
  """The latest checkpoints of one run, in one folder.

  With several processes, all of them call the same methods and share the folder; only the first writes.

  Attributes:
    folder: absolute path.
  """

  def __init__(
    self,
    folder,
    settings: dict[str, Any],
    keep: int = 2,
    defaults: dict[str, Any] | None = None,
  ):
    """Opens the folder, creating it if needed.

    Args:
      folder: path.
      settings: JSON-compatible; a run can resume from a checkpoint only with equal settings.
      keep: number of checkpoints to keep, >= 1.
      defaults: values of settings that a checkpoint of an earlier version does not have.

    Raises:
      ValueError: for keep < 1.
      CheckpointError: if the folder cannot be created or read.
    """
    if not isinstance(keep, int) or keep < 1:
      raise ValueError(f"keep: expected an integer >= 1, got {keep!r}")
    self.folder, self._settings = pathlib.Path(folder).absolute(), settings
    self._defaults = defaults or {}
    ocp = _orbax()
    # Processes do not wait for each other: the first writes what all of them have.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=False,
      enable_async_checkpointing=False,
      multiprocessing_options=alone,
    )
    with self._one_fault("a folder for checkpoints"):
      self.folder.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(self.folder, options=options)

  def steps(self) -> list[int]:
    """The steps with complete checkpoints, ascending."""
    with self._one_fault("readable checkpoints"):
      self._manager.reload()
      return sorted(self._manager.all_steps())

  def save(self, snapshot: Snapshot) -> None:
    """Writes a checkpoint unless one of that step exists, and deletes the oldest beyond `keep`.

    Raises:
      CheckpointError: if it cannot be written; earlier checkpoints are unchanged.
    """
    if jax.process_index() != 0:
      return
    about = {
      **snapshot._asdict(),
      "format": FORMAT,
      "format_version": FORMAT_VERSION,
      "settings": self._settings,
      "arrays": [_facts(array) for array in snapshot.arrays],
    }
    about["sha256"] = _checksum(about)
    # One array of bytes: orbax does not support empty arrays and some dtypes.
    content = np.frombuffer(
      b"".join(array.tobytes() for array in snapshot.arrays) + b"\0", np.uint8
    )
    ocp = _orbax()
    with self._one_fault("a checkpoint to be written"):
      if snapshot.step in self._manager.all_steps():
        return  # Runs with equal settings have bit-identical checkpoints.
      self._manager.save(
        snapshot.step,
        force=True,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave({"content": content}), about=ocp.args.JsonSave(about)
        ),
      )

  def restore(self, step: int | None = None) -> Snapshot:
    """Reads a checkpoint and verifies its checksums.

    Args:
      step: which one; None for the last complete one: damaged later ones are reported in a warning and deleted.

    Returns:
      `Snapshot`.

    Raises:
      CheckpointError: if there is none, or it is damaged, of a newer format, or of a run with other
        settings; the message names the differences.
    """
    steps = self.steps()
    if not steps or step is not None and step not in steps:
      raise CheckpointError(
        f"{self.folder}: expected a checkpoint{'' if step is None else f' of step {step}'}, found "
        f"{'those of ' + ', '.join(map(str, steps)) if steps else 'none'}"
      )
    faults = {}
    for candidate in reversed(steps) if step is None else [step]:
      try:
        about, leaves = self._read(candidate)
        break
      except CheckpointError as error:
        faults[candidate] = error
    else:
      raise next(iter(faults.values()))
    known = {k: v for k, v in self._defaults.items() if k in self._settings}
    differing = differences({**known, **about["settings"]}, self._settings)
    if differing:
      raise CheckpointError(
        f"{self.folder}: expected the settings that its run began with; " + "; ".join(differing)
      )
    for damaged, fault in faults.items():
      warnings.warn(f"{fault}; resuming from step {candidate}", stacklevel=2)
      with self._one_fault("a damaged checkpoint to be deleted"):
        self._manager.delete(damaged)
    return Snapshot(
      leaves, *(about[name] for name in ("step", "num_devices", "history", "seconds"))
    )

  def _read(self, step: int) -> tuple[dict, list[np.ndarray]]:
    ocp = _orbax()
    with self._one_fault(f"a whole checkpoint of step {step}"):
      stored = self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(), about=ocp.args.JsonRestore()),
      )
      about, content = stored.about, np.asarray(stored.state["content"])
      if about["format"] != FORMAT or about["format_version"] > FORMAT_VERSION:
        raise ValueError(
          f"format {about['format']} version {about['format_version']}, which is newer than {FORMAT_VERSION}"
        )
      if _checksum(about) != about["sha256"]:
        raise ValueError("metadata checksum mismatch")
      return about, _read_leaves(about["arrays"], content)

  def discard(self, after: int) -> None:
    """Deletes the checkpoints of steps later than `after`, which the run will repeat."""
    if jax.process_index() == 0:
      with self._one_fault("checkpoints to be deleted"):
        for step in self.steps():
          if step > after:
            self._manager.delete(step)

  def close(self) -> None:
    """Closes the folder."""
    self._manager.close()

  @contextlib.contextmanager
  def _one_fault(self, what: str):
    """Converts any exception of the block to a `CheckpointError` with a one-line message."""
    try:
      yield
    except CheckpointError:
      raise
    except Exception as error:  # file systems, orbax and TensorStore raise many types
      text = " ".join(f"{type(error).__name__}: {error}".split())
      text = (
        text if len(text) <= 300 else f"{text[:140]} ... {text[-150:]}"
      )  # the cause is in the last line
      raise CheckpointError(f"{self.folder}: expected {what}, got {text}") from error


def differences(before: dict, now: dict) -> list[str]:
  """The differences between two settings, one text per name."""
  absent = "nothing"
  return [
    f"{name}: {before.get(name, absent)!r} then, {now.get(name, absent)!r} now"
    for name in sorted({*before, *now})
    if before.get(name, absent) != now.get(name, absent)
  ]


def _checksum(about: dict) -> str:
  text = json.dumps(
    {name: value for name, value in about.items() if name != "sha256"}, sort_keys=True
  )
  return hashlib.sha256(text.encode()).hexdigest()


def _facts(leaf: np.ndarray) -> dict:
  return {
    "shape": list(leaf.shape),
    "dtype": leaf.dtype.name,
    "sha256": hashlib.sha256(leaf.tobytes()).hexdigest(),
  }


def _read_leaves(facts: list[dict], content: np.ndarray) -> list[np.ndarray]:
  """The arrays in the bytes; ValueError if sizes or checksums do not match."""
  dtypes = [np.dtype(_dtype(fact["dtype"])) for fact in facts]
  sizes = [
    dtype.itemsize * int(np.prod(fact["shape"], dtype=np.int64))
    for dtype, fact in zip(dtypes, facts)
  ]
  if content.dtype != np.uint8 or content.ndim != 1 or content.size != sum(sizes) + 1:
    raise ValueError(f"expected {sum(sizes) + 1} bytes, got {content.size}")
  leaves, at = [], 0
  for fact, dtype, size in zip(facts, dtypes, sizes):
    part = content[at : at + size].tobytes()
    if hashlib.sha256(part).hexdigest() != fact["sha256"]:
      raise ValueError("an array does not have its checksum")
    leaves.append(np.frombuffer(part, dtype).reshape(fact["shape"]))
    at += size
  return leaves


def _dtype(name: str):
  """A dtype of NumPy, or one that JAX adds."""
  try:
    return np.dtype(name)
  except TypeError:
    import ml_dtypes

    return getattr(ml_dtypes, name)


def _orbax():
  """orbax.checkpoint, imported when the first checkpoint is used."""
  import orbax.checkpoint

  return orbax.checkpoint
