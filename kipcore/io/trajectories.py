"""Expert trajectories on disk: `experts.npy`, memory-mapped, with metadata in `experts.json`.

Such a file has several gigabytes. It is written one expert at a time and never read as a whole. Nothing is
unpickled.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kipcore.distillation.methods.experts import ExpertState
from kipcore.io import atomic, npz
from kipcore.types import KipcoreError

FORMAT = "kipcore-trajectories"
FORMAT_VERSION = 1
STATE_FORMAT = "kipcore-expert-state"
STATE_VERSION = 1


class TrajectoriesError(KipcoreError, ValueError):
  """Files are not complete trajectories with metadata."""


class Trajectories(NamedTuple):
  """`array` `(experts, epochs + 1, p)`, memory-mapped and read-only, and the `metadata` it was saved with."""

  array: np.memmap
  metadata: dict


def save_trajectories(path, trajectories: Iterable, metadata: dict) -> None:
  """Writes trajectories one at a time; an incomplete pair of files does not load.

  Args:
    path: file name that ends in `.npy`; the metadata file has the same name with `.json`.
    trajectories: arrays `(epochs + 1, p)`, float32 or float64, of equal shape: an array `(experts, epochs + 1, p)`, or a generator
      that trains one expert after the other, so that only one is in memory.
    metadata: JSON-compatible dict: architecture, data, seeds, how the experts were trained.

  Raises:
    ValueError: for another file name, no trajectories, or a wrong shape or dtype or values that are not finite.
      Existing files are then unchanged.
    TypeError: for metadata that JSON cannot represent, before the first trajectory is requested.
    OSError: if the files cannot be written.
  """
  path, beside = _pair(path)
  json.dumps(metadata)
  with atomic.replacing(path) as file:
    sums: list[str] = []
    first = None
    for trajectory in trajectories:
      trajectory = np.ascontiguousarray(trajectory)
      if first is None:
        first = np.empty((0, *trajectory.shape), trajectory.dtype)
        _write_header(file, first.shape, first.dtype)
      _check(trajectory, len(sums), first)
      file.write(trajectory.data)
      sums.append(hashlib.sha256(trajectory.data).hexdigest())
    if first is None:
      raise ValueError("trajectories: expected at least one, got none")
    shape = (len(sums), *first.shape[1:])
    file.seek(0)
    _write_header(file, shape, first.dtype)
    # Last: a crash after this line may leave an array without metadata, but never with wrong metadata.
    beside.unlink(missing_ok=True)
  record = {
    **metadata,
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "shape": shape,
    "dtype": first.dtype.name,
    "sha256": sums,
  }
  atomic.write_atomically(beside, json.dumps(record, indent=2).encode())


def load_trajectories(path, verify: bool = True) -> Trajectories:
  """Opens files of `save_trajectories`; only the parts in use are in memory.

  Args:
    path: file name that ends in `.npy`.
    verify: read everything once and verify the checksums; False to check sizes only.

  Returns:
    `Trajectories` with a memory-mapped array.

  Raises:
    TrajectoriesError: if files are missing, truncated, altered, of another kind or a newer format, or do not
      match.
  """
  path, beside = _pair(path)
  for file in (path, beside):
    if not file.is_file():
      raise TrajectoriesError(
        f"{file}: expected trajectories with metadata beside them, found no such file"
      )
  try:
    metadata = json.loads(beside.read_text(encoding="utf-8"))
    kind, version, shape, dtype, sums = (
      metadata[name] for name in ("format", "format_version", "shape", "dtype", "sha256")
    )
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise TrajectoriesError(
      f"{beside}: expected the metadata of trajectories, got something else ({repr(error)[:200]})"
    ) from error
  if kind != FORMAT or type(version) is not int or not 1 <= version <= FORMAT_VERSION:
    raise TrajectoriesError(
      f"{beside}: expected format {FORMAT} up to version {FORMAT_VERSION}, got {kind!r:.40}, {version!r:.40}"
    )
  try:
    with open(path, "rb") as file:
      found, fortran_order, stored = npz.read_npy_header(str(path), file)
      start = file.tell()
    size = path.stat().st_size
    if (
      fortran_order
      or stored.name not in ("float32", "float64")
      or start + math.prod(found) * stored.itemsize != size
      or 0 in found
    ):
      raise npz.NpzError(f"{size} bytes for shape {found} {stored}")
    if (
      list(found) != shape
      or len(found) != 3
      or stored.name != dtype
      or not isinstance(sums, list)
      or len(sums) != found[0]
    ):
      raise TrajectoriesError(
        f"{path}: expected an array of shape {shape!r:.60} in {dtype!r:.20}, as its metadata say, got another"
      )
    array = np.memmap(path, stored, "r", start, found)
  except (OSError, npz.NpzError) as error:
    raise TrajectoriesError(
      f"{path}: expected a whole .npy file, got one that does not open ({error})"
    ) from error
  for i, expert in enumerate(array if verify else ()):
    if hashlib.sha256(expert.data).hexdigest() != sums[i]:
      raise TrajectoriesError(
        f"{path}: expected expert {i} to have its recorded checksum, got another; the file was altered"
      )
    if not np.isfinite(expert).all():
      raise TrajectoriesError(f"{path}: expected finite values, got others in expert {i}")
  return Trajectories(array, metadata)


def save_expert_state(path, state: ExpertState, metadata: dict) -> None:
  """Writes the unfinished training of an expert, atomically.

  Args:
    path: file name that ends in `.npz`.
    state: what `train_expert` gives to its argument `progress`.
    metadata: JSON-compatible dict: architecture, data, seeds, how the expert is trained.

  Raises:
    OSError: if the file cannot be written.
  """
  arrays: dict = {
    "step": state.step,
    "parameters": state.parameters,
    "velocity": state.velocity,
    "trajectory": state.trajectory,
    "accuracies": np.asarray(state.accuracies, np.float64),
    **{f"sampler_{i}": array for i, array in enumerate(state.sampler)},
  }
  npz.save_checked(path, arrays, STATE_FORMAT, STATE_VERSION, {"about": metadata})


def load_expert_state(path) -> tuple[ExpertState, dict]:
  """Reads a file of `save_expert_state`.

  Args:
    path: file name.

  Returns:
    The state, for the argument `start` of `train_expert`, and the metadata.

  Raises:
    TrajectoriesError: for a damaged file, or one of another kind or a newer format.
  """
  names = ("step", "parameters", "velocity", "trajectory", "accuracies")
  try:
    arrays, metadata = npz.load_checked(path, STATE_FORMAT, STATE_VERSION, names)
    count = sum(name.startswith("sampler_") for name in arrays)
    state = ExpertState(
      int(arrays["step"]),
      arrays["parameters"],
      arrays["velocity"],
      tuple(arrays[f"sampler_{i}"] for i in range(count)),
      arrays["trajectory"],
      tuple(arrays["accuracies"].tolist()),
    )
    return state, dict(metadata["about"])
  except (npz.NpzError, KeyError, TypeError, ValueError) as error:
    raise TrajectoriesError(
      f"{path}: expected the unfinished training of an expert, got something else ({repr(error)[:200]})"
    ) from error


def _pair(path) -> tuple[pathlib.Path, pathlib.Path]:
  path = pathlib.Path(path)
  if path.suffix != ".npy":
    raise TrajectoriesError(f"{path}: expected a file name that ends in .npy")
  return path, path.with_suffix(".json")


def _write_header(file, shape: tuple, dtype: np.dtype) -> None:
  """Writes the header of an `.npy` file; NumPy pads it, so its length does not depend on the first axis."""
  description = {
    "descr": np.lib.format.dtype_to_descr(dtype),
    "fortran_order": False,
    "shape": shape,
  }
  np.lib.format.write_array_header_1_0(file, description)


def _check(trajectory: np.ndarray, index: int, first: np.ndarray) -> None:
  name = f"trajectories[{index}]"
  if trajectory.ndim != 2 or 0 in trajectory.shape:
    raise ValueError(f"{name}: expected shape (epochs + 1, p), got {trajectory.shape}")
  if trajectory.dtype not in (np.float32, np.float64):
    raise ValueError(f"{name}: expected float32 or float64, got {trajectory.dtype}")
  if trajectory.shape != first.shape[1:] or trajectory.dtype != first.dtype:
    raise ValueError(
      f"{name}: expected shape {first.shape[1:]} in {first.dtype} like the first, got {trajectory.shape} "
      f"in {trajectory.dtype}"
    )
  if not np.isfinite(trajectory).all():
    raise ValueError(f"{name}: expected finite values")
