"""Reader for `torch.save` files that needs no torch and runs no code from the file.

Such a file is a zip archive of a pickle, which describes containers and tensors, and one member
with the raw numbers of each storage. A pickle can call any Python function. This reader resolves
only the few names that tensors, storages, ordered dicts and NumPy values need, to inert stand-ins.
It rejects the file at any other name, before looking it up.
"""

import collections
import io
import math
import os
import pathlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_MAX_PICKLE_BYTES = 2**26  # only of the layout, which contains no tensor data
_MAX_DEPTH = 100  # of nested containers
# The magic number of files from before torch 1.6.
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_DTYPES = {
  "Float": "f4",
  "Double": "f8",
  "Half": "f2",
  "BFloat16": "bfloat16",
  "Long": "i8",
  "Int": "i4",
  "Short": "i2",
  "Char": "i1",
  "Byte": "u1",
  "Bool": "?",
  "ComplexFloat": "c8",
  "ComplexDouble": "c16",
}


class _Refused(ValueError):
  """Content that is not supported; the message is complete except for the path."""


class _Stand(NamedTuple):
  """The immutable callable that replaces a name in the pickle."""

  build: Callable

  def __call__(self, *args):
    return self.build(*args)


class _StorageType(NamedTuple):
  dtype: str


class _Dtype:
  """The stand-in for a pickled `numpy.dtype`; supports only plain numbers."""

  def __init__(self, code, *_):
    self.code, self.order = str(code), "="

  def __setstate__(self, state):
    self.order = str(state[1])

  @property
  def numpy(self) -> np.dtype:
    if not re.fullmatch("[biufc](1|2|4|8|16)", self.code) or self.order not in ("<", ">", "=", "|"):
      raise _Refused(f"expected NumPy values that are numbers, got dtype {self.code[:40]!r}")
    return np.dtype(self.code).newbyteorder(self.order)


class _Array:
  """The stand-in for a pickled `numpy.ndarray`, whose content is set later."""

  def __init__(self, *_):
    self.value = None

  def __setstate__(self, state):
    _, shape, dtype, fortran_order, content = state
    self.value = np.frombuffer(content, dtype.numpy).reshape(
      shape, order="F" if fortran_order else "C"
    )


def _scalar(dtype, content):
  """One NumPy number from its bytes."""
  return np.frombuffer(content, dtype.numpy).reshape(())[()]


def _encode(text, encoding):
  """Decodes the representation of bytes in pickle protocol 2."""
  if encoding != "latin1":
    raise _Refused(f"expected bytes encoded as latin1, got {encoding!r:.40}")
  return text.encode("latin1")


def _tensor(storage, offset, size, stride, *_):
  """A view of a storage, never outside it or larger than it.

  `offset` and `stride` count numbers, not bytes.
  """
  if (
    not isinstance(storage, np.ndarray)
    or storage.ndim != 1
    or len(size) != len(stride)
    or not all(type(i) is int and i >= 0 for i in (offset, *size, *stride))
  ):
    raise _Refused(
      "expected a tensor with a storage, offset, size and stride, got "
      f"{(offset, size, stride)!r:.100}"
    )
  numbers, last = math.prod(size), offset + sum((n - 1) * s for n, s in zip(size, stride))
  if numbers > len(storage) or numbers and last >= len(storage):
    raise _Refused(
      f"expected tensors within their storage (saved as x.contiguous()), got size {tuple(size)}, "
      f"stride {tuple(stride)} "
      f"and offset {offset} in {len(storage)} numbers"
    )
  if not numbers:
    return np.empty(size, storage.dtype)
  step = storage.itemsize
  return np.ndarray(size, storage.dtype, storage, offset * step, [s * step for s in stride])


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_STANDS = {
  ("collections", "OrderedDict"): _Stand(lambda *items: collections.OrderedDict(*items)),
  ("torch._utils", "_rebuild_tensor"): _Stand(_tensor),
  ("torch._utils", "_rebuild_tensor_v2"): _Stand(_tensor),
  ("torch._utils", "_rebuild_parameter"): _Stand(lambda tensor, *_: tensor),
  ("torch", "Size"): _Stand(lambda *sizes: tuple(*sizes)),
  **{("torch", f"{name}Storage"): _StorageType(dtype) for name, dtype in _DTYPES.items()},
  ("torch.storage", "UntypedStorage"): _StorageType("u1"),
  ("numpy", "dtype"): _Stand(_Dtype),
  ("numpy", "ndarray"): _Stand(_Array),
  **{(module, "scalar"): _Stand(_scalar) for module in _NUMPY},
  **{(module, "_reconstruct"): _Stand(_Array) for module in _NUMPY},
  ("_codecs", "encode"): _Stand(_encode),
  **{(module, "bytes"): _Stand(lambda: b"") for module in ("__builtin__", "builtins")},
}


class _Unpickler(pickle.Unpickler):
  """Unpickler of the layout; `read_storage(key, dtype, size)` returns a flat array."""

  def __init__(self, file, read_storage):
    super().__init__(file)
    self._read_storage = read_storage

  def find_class(self, module, name):
    """The stand-in for a name; imports nothing."""
    if (module, name) not in _STANDS:
      raise _Refused(
        "expected tensors, numbers and containers of them, got a file that asks for "
        f"{module}.{name}, which is not run".replace("\n", " ")[:300]
      )
    return _STANDS[module, name]

  def persistent_load(self, pid):
    """The array of a storage."""
    kind, storage_type, key, _, size = pid
    if (
      kind != "storage"
      or not isinstance(storage_type, _StorageType)
      or type(size) is not int
      or size < 0
    ):
      raise _Refused(f"expected the record of a storage, got {pid!r:.100}")
    return self._read_storage(str(key), storage_type.dtype, size)


def read_torch_file(path) -> Any:
  """Reads a `.pt` or `.pth` file of `torch.save` (zip format, torch 1.6 or newer) using only NumPy.

  Runs no code from the file. Dicts, lists, tuples, numbers, strings, and NumPy numbers and arrays
  are returned unchanged. Tensors, parameters and storages become read-only NumPy views of their
  storage, with the same strides and shared memory. The dtype of bfloat16 tensors is
  `ml_dtypes.bfloat16`.

  Args:
    path: file name.

  Returns:
    Nested containers with NumPy arrays.

  Raises:
    ValueError: for a file that is missing, damaged, compressed, or in the format from before torch
      1.6; a file that asks for functions or classes other than those of tensors, storages, ordered
      dicts and NumPy values; or tensors that exceed their storage, or storages that exceed the
      file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: expected a torch.save file, found no such file")
  try:
    with open(path, "rb") as file:
      if file.read(len(LEGACY)) == LEGACY:
        raise _Refused(
          "expected the zip format of torch.save, got the format from before torch 1.6; if "
          "you trust the file, convert it with torch: "
          "torch.save(torch.load(OLD, map_location='cpu', weights_only=False), NEW)"
        )
    with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
      warnings.simplefilter("ignore")  # about invalid text in the pickle
      return _read(archive, os.path.getsize(path))
  except _Refused as error:
    raise ValueError(f"{path}: {error}") from error
  except Exception as error:  # damaged pickles and archives can raise any exception
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise ValueError(
      f"{path}: expected a complete torch.save file, got one that cannot be read ({what})"
    ) from error


def _read(archive, file_size: int):
  """The content of an open archive."""
  members = {info.filename: info for info in archive.infolist()}
  layouts = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
  if len(layouts) != 1:
    raise _Refused(
      "expected one data.pkl, as torch.save writes, got "
      f"{', '.join(list(members)[:5]) or 'an empty archive'}"
    )
  if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
    raise _Refused("expected members that are not compressed, as torch.save writes them")
  # Then no two members share bytes, and all members fit into memory if the file does.
  if sum(info.file_size for info in members.values()) > file_size:
    raise _Refused(f"expected members that fit into {file_size} bytes, got larger ones")
  layout, root = layouts[0], layouts[0].removesuffix("data.pkl")
  if members[layout].file_size > _MAX_PICKLE_BYTES:
    raise _Refused(
      f"expected a layout of at most {_MAX_PICKLE_BYTES} bytes, got {members[layout].file_size}"
    )
  order = archive.read(members[root + "byteorder"]) if root + "byteorder" in members else b"little"
  if order not in (b"little", b"big"):
    raise _Refused(f"expected byte order little or big, got {order!r:.40}")
  storages = {}

  def read_storage(key, dtype, size):
    if (key, dtype) not in storages:
      info = members.get(f"{root}data/{key}")
      if info is None:
        raise _Refused(f"expected the storage {key[:40]!r}, found no such member")
      numbers = _numbers(archive.read(info), dtype, "<" if order == b"little" else ">")
      storages[key, dtype] = numbers
    if len(storages[key, dtype]) != size:
      raise _Refused(
        f"expected {size} numbers in storage {key[:40]!r}, got {len(storages[key, dtype])}"
      )
    return storages[key, dtype]

  content = archive.read(members[layout])
  # The unpickler reserves memory for the largest memo index, regardless of the file size.
  if any(
    op.name.endswith("PUT") and (arg or 0) > len(content)
    for op, arg, _ in pickletools.genops(content)
  ):
    raise _Refused("expected memo indices within the length of the layout, got larger ones")
  return _resolve(_Unpickler(io.BytesIO(content), read_storage).load(), {}, 0)


def _numbers(content: bytes, dtype: str, order: str) -> np.ndarray:
  """The read-only flat array of a storage, in native byte order."""
  if dtype == "bfloat16":
    import ml_dtypes

    bits = _numbers(content, "u2", order)
    return bits.view(ml_dtypes.bfloat16)
  stored = np.dtype(dtype).newbyteorder(order)  # type: ignore[arg-type]
  if len(content) % stored.itemsize:
    raise _Refused(
      f"expected whole numbers of {stored.itemsize} bytes in a storage, got {len(content)} bytes"
    )
  numbers = np.frombuffer(content, stored).astype(stored.newbyteorder("="), copy=False)
  numbers.setflags(write=False)
  return numbers


def _resolve(value, done: dict, depth: int):
  """The value with stand-ins replaced by NumPy arrays; ValueError for recursive containers."""
  if depth > _MAX_DEPTH:
    raise _Refused(
      f"expected at most {_MAX_DEPTH} levels of nested containers, got more or a recursive "
      "container"
    )
  if isinstance(value, _Array):
    if value.value is None:
      raise _Refused("expected NumPy arrays with content, got one without")
    return value.value
  if isinstance(value, (_Dtype, _Stand, _StorageType)):
    raise _Refused(
      "expected tensors, numbers and containers of them, got a "
      f"{type(value).__name__.strip('_').lower()}"
    )
  if not isinstance(value, (dict, list, tuple)):
    return value
  if id(value) not in done:  # resolve shared parts only once
    new: dict | list | tuple
    if isinstance(value, dict):
      new = type(value)((key, _resolve(item, done, depth + 1)) for key, item in value.items())
    else:
      new = type(value)(_resolve(item, done, depth + 1) for item in value)
    done[id(value)] = value, new
  return done[id(value)][1]
