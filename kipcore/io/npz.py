"""The only reader of `.npz` files, and the format of those that kipcore writes.

Sizes, shapes, dtypes and compression that a file claims are compared with its actual bytes before memory is
allocated. Nothing is unpickled, and names of members are never used as paths.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from kipcore import checks
from kipcore.io import atomic
from kipcore.types import KipcoreError

METADATA = "metadata"
_DEFLATE_GAIN = 1032  # the maximum compression ratio of deflate
# Limit for a whole file: line drawings compress by more than 100; no limit below this size.
_MOST_GAIN, _FREE_BYTES = 256, 2**28
_MAX_HEADER = 2**14
_BLOCK_BYTES = 2**26  # buffer of `read_rows`, in addition to the rows
_MAX_DIMENSIONS = 32


class NpzError(KipcoreError, ValueError):
  """A file is not a complete `.npz` file of plain arrays."""


def read_npz(path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
  """Reads an `.npz` file; each array is read only if its header, member size and bytes agree.

  Args:
    path: file name.
    names: arrays to read if present; None for all.

  Returns:
    Arrays of booleans, numbers or strings by name, in file order.

  Raises:
    NpzError: if the file is missing or damaged; a member is encrypted, compressed with a method other than
      deflate, duplicated, or named like an outside path; sizes exceed what the bytes can hold, 256 times the
      file size (and 256 MiB), or the memory of the machine; or a dtype is not plain.
  """
  with _opened(path) as (archive, members):
    wanted = {name: info for name, info in members.items() if names is None or name in names}
    _check_memory(path, sum(info.file_size for info in wanted.values()))
    return {
      name: _read_member(f"{path}: {checks.one_line(name, 80)}", archive, info)
      for name, info in wanted.items()
    }


def read_rows(path, name: str, rows: np.ndarray) -> np.ndarray:
  """Some rows of one array of any size: the file is read once, one block at a time.

  Args:
    path: file name.
    name: of an existing array.
    rows: ascending integers, less than the number of rows.

  Returns:
    `(len(rows), ...)`.

  Raises:
    NpzError: as `read_npz` (the memory limit applies to the selected rows); for an array in Fortran order, or with fewer rows.
  """
  shape, dtype = row_header(path, name, rows[-1] + 1 if len(rows) else 1)
  a_row = math.prod(shape[1:]) * dtype.itemsize
  _check_memory(path, len(rows) * a_row)
  out, done, first = np.empty((len(rows), *shape[1:]), dtype), 0, 0
  for content in row_blocks(path, name, max(1, _BLOCK_BYTES // max(a_row, 1))):
    here = rows[done : np.searchsorted(rows, first + len(content))] - first
    out[done : done + len(here)] = content[here]
    done, first = done + len(here), first + len(content)
  return out


def row_header(path, name: str, least: int = 1) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and dtype of one array in C order with at least that many rows; NpzError as `read_rows`."""
  with _opened(path) as (archive, members):
    what, info = f"{path}: {checks.one_line(name, 80)}", members[name]
    _check_member(what, info)
    with (
      _one_fault(f"{what}: expected a readable .npz file of .npy arrays"),
      archive.open(info) as member,
    ):
      shape, fortran_order, dtype = _checked_header(what, member, info)
  if fortran_order or not shape or shape[0] < least:
    raise NpzError(
      f"{what}: expected an array in C order of {least} rows or more, got shape {checks.one_line(shape)}"
      + " in Fortran order" * fortran_order
    )
  return shape, dtype


def row_blocks(path, name: str, block_size: int) -> Iterator[np.ndarray]:
  """Yields an array in blocks of rows, `(<= block_size, ...)`; NpzError as `read_rows`.

  The checksum of the member is verified with the last block.
  """
  with _opened(path) as (archive, members):
    what, info = f"{path}: {checks.one_line(name, 80)}", members[name]
    with (
      _one_fault(f"{what}: expected a readable .npz file of .npy arrays"),
      archive.open(info) as member,
    ):
      shape, _, dtype = _checked_header(what, member, info)
      a_row = math.prod(shape[1:]) * dtype.itemsize
      for first in range(0, shape[0], block_size):
        count = min(block_size, shape[0] - first)
        yield np.frombuffer(_whole(what, member, count * a_row), dtype).reshape(count, *shape[1:])


def names_in(path) -> list[str]:
  """The names of the arrays in an `.npz` file, without reading them; NpzError as `read_npz`."""
  with _opened(path) as (_, members):
    return list(members)


def save_checked(
  path,
  arrays: Mapping[str, np.ndarray],
  form: str,
  version: int,
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes an `.npz` file atomically, with format, version and checksums in the JSON text of the array `metadata`.

  Args:
    path: file name in an existing folder.
    arrays: booleans, numbers or strings.
    form, version: format and version, for `load_checked`.
    metadata: JSON-compatible.

  Raises:
    ValueError: for an array of another dtype, or named `metadata`. OSError: if it cannot be written.
  """
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  for name, array in arrays.items():
    if array.dtype.kind not in "biufSU" or name == METADATA:
      raise ValueError(
        f"{name}: expected an array of booleans, numbers or strings not called {METADATA}, got dtype {array.dtype}"
      )
  text = json.dumps(
    {
      **(metadata or {}),
      "format": form,
      "format_version": version,
      "checksums": {name: checksum(array) for name, array in arrays.items()},
    }
  )
  with atomic.replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, array in {METADATA: np.array(text), **arrays}.items():
      with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def load_checked(
  path, form: str, version: int, required: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads a file of `save_checked` and verifies the checksum of every array.

  Args:
    path: file name.
    form: expected format.
    version: newest known version.
    required: names of required arrays.

  Returns:
    The arrays, and the metadata.

  Raises:
    NpzError: as `read_npz`; for another format, a newer version, missing arrays, or arrays without their checksum.
  """
  arrays = read_npz(path)
  missing = [name for name in (*required, METADATA) if name not in arrays]
  if missing:
    raise NpzError(
      f"{path}: expected arrays {', '.join((*required, METADATA))}; missing {', '.join(missing)}"
    )
  text = arrays.pop(METADATA)
  try:
    metadata = json.loads(str(text[()]) if text.shape == () and text.dtype.kind == "U" else "")
    found, its_version, sums = (
      metadata[name] for name in ("format", "format_version", "checksums")
    )
    known = (
      found == form
      and type(its_version) is int
      and 1 <= its_version <= version
      and isinstance(sums, dict)
    )
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise NpzError(
      f"{path}: expected metadata, the JSON text of a {form}, got something else ({type(error).__name__})"
    ) from error
  if not known:
    raise NpzError(
      f"{path}: expected format {form} up to version {version}, got {checks.one_line(repr(found), 40)} version "
      f"{checks.one_line(repr(its_version), 40)}"
    )
  if set(arrays) != set(sums):
    raise NpzError(
      f"{path}: expected the arrays {checks.one_line(sorted(sums))}, got {checks.one_line(sorted(arrays))}"
    )
  for name, array in arrays.items():
    if checksum(array) != sums[name]:
      raise NpzError(
        f"{path}: expected array {name!r} to have its recorded checksum, got another; the file was altered"
      )
  return arrays, metadata


def checksum(array: np.ndarray) -> str:
  """sha256 in hex of dtype, shape and C-order content."""
  array = np.ascontiguousarray(array)
  digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
  digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
  return digest.hexdigest()


def read_npy_header(what: str, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Shape, Fortran order and dtype of an open `.npy` file, which is positioned at its data; NpzError unless it is a plain array."""
  with (
    _one_fault(f"{what}: expected a readable .npz file of .npy arrays"),
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("ignore")  # warnings about the text of the header
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
      raise NpzError(f"{what}: expected .npy format 1.0 or 2.0, got {version}")
    length = file.read(2 * version[0])
    header = file.read(min(int.from_bytes(length, "little"), _MAX_HEADER))
    reader = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = reader(io.BytesIO(length + header))
    if (
      dtype.kind not in "biufSU" or not dtype.itemsize
    ):  # not "O", and not "V", which can contain objects
      if dtype.kind == "c":
        raise NpzError(
          f"{what}: expected real numbers or strings, got complex numbers ({dtype}); "
          "store the real part, the magnitude or both as channels"
        )
      raise NpzError(
        f"{what}: expected a plain numeric or string array, got dtype {checks.one_line(dtype)}"
        + (" (Python objects are never unpickled)" if dtype.hasobject else "")
      )
    if len(shape) > _MAX_DIMENSIONS or not all(
      type(size) is int and size < 2**63 for size in shape
    ):
      raise NpzError(
        f"{what}: expected at most {_MAX_DIMENSIONS} dimensions that are integers, got {checks.one_line(shape)}"
      )
    if min(shape, default=0) < 0:
      raise NpzError(
        f"{what}: expected {math.prod(shape) * dtype.itemsize} bytes for shape {checks.one_line(shape)} {dtype}, which no file has"
      )
  return shape, fortran_order, dtype


@contextlib.contextmanager
def _one_fault(what: str):
  """Converts any exception to an `NpzError`: zipfile, zlib and NumPy raise many types for damaged files."""
  try:
    yield
  except NpzError:
    raise
  except Exception as error:
    raise NpzError(f"{what}, got {type(error).__name__}: {checks.one_line(error)}") from error


@contextlib.contextmanager
def _opened(path):
  """The archive and its members by name, after all checks that need no reading."""
  if not os.path.isfile(path):  # not a pipe, which would never end
    raise NpzError(
      f"{path}: expected an .npz file, got {'a directory' if os.path.isdir(path) else 'no such file'}"
    )
  with (
    _one_fault(f"{path}: expected a readable .npz file (a zip of .npy arrays)"),
    zipfile.ZipFile(path) as archive,
  ):
    infos, size = archive.infolist(), os.fstat(archive.fp.fileno()).st_size
    members = {info.filename.removesuffix(".npy"): info for info in infos}
    if len(members) < len(infos):
      raise NpzError(
        f"{path}: expected every member once, got {len(infos) - len(members)} of them again"
      )
    for name, info in members.items():
      where = pathlib.PurePosixPath(info.filename.replace("\\", "/"))
      if where.is_absolute() or ".." in where.parts or not name:
        raise NpzError(
          f"{path}: expected plain names of arrays, got {checks.one_line(repr(info.filename), 80)}"
        )
    if sum(info.compress_size for info in infos) > size:
      raise NpzError(
        f"{path}: expected members that fit into {size} bytes, got ones that claim more"
      )
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max(_FREE_BYTES, _MOST_GAIN * size):
      raise NpzError(
        f"{path}: expected at most {_MOST_GAIN} times the {size} bytes of the file when unpacked, got {unpacked}"
      )
    yield archive, members


def _check_memory(path, count: int) -> None:
  if count > _memory():
    raise NpzError(
      f"{path}: expected arrays that fit into the {_memory()} bytes of this machine's memory, got {count}"
    )


def _memory() -> float:
  """Bytes of memory of the machine; infinite if unknown."""
  with contextlib.suppress(AttributeError, ValueError, OSError):
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return math.inf


def _check_member(what: str, info) -> None:
  """Checks a member without reading it."""
  if info.flag_bits & 0x41:
    raise NpzError(f"{what}: expected a member without a password, got an encrypted one")
  if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise NpzError(
      f"{what}: expected a stored or deflated member, got compression type {info.compress_type}"
    )
  if info.file_size > _DEFLATE_GAIN * info.compress_size + 1024:
    raise NpzError(
      f"{what}: expected a size that {info.compress_size} compressed bytes can hold, got {info.file_size}"
    )


def _checked_header(what: str, member, info) -> tuple[tuple[int, ...], bool, np.dtype]:
  """The header of an open member, checked against its size."""
  shape, fortran_order, dtype = read_npy_header(what, member)
  claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
  if claimed != held:
    raise NpzError(
      f"{what}: expected {claimed} bytes for shape {checks.one_line(shape)} {dtype}, got {held}"
    )
  return shape, fortran_order, dtype


def _whole(what: str, member, count: int) -> bytes:
  """Exactly this many bytes of a member, which may return fewer per read."""
  parts = []
  while count and (part := member.read(count)):
    parts.append(part)
    count -= len(part)
  if count:
    raise NpzError(f"{what}: expected {count} bytes more than there are")
  return b"".join(parts)


def _read_member(what: str, archive, info) -> np.ndarray:
  """One array, read if header, member size and bytes agree."""
  _check_member(what, info)
  with _one_fault(f"{what}: expected a readable .npz file of .npy arrays"):
    with archive.open(info) as member:
      _checked_header(what, member, info)
    with archive.open(info) as member, warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return np.lib.format.read_array(member, allow_pickle=False)
