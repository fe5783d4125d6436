"""Rows of files that may be larger than memory: `.npy`, `.npz`, Parquet and CSV.

Labels and weights are read whole, rows in blocks. Every problem with a file is a `DatasetError` of
one line. Parquet and CSV need pyarrow (`kipcore[arrow]`).
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kipcore import checks
from kipcore.io import atomic, npz
from kipcore.types import DatasetError

FORMATS = (".npy", ".npz", ".parquet", ".csv")
TASKS = ("auto", "classification", "regression")
ROW, WEIGHT = "coreset_row", "coreset_weight"
_BLOCK_ROWS = 4096
# Bytes of a CSV file that are parsed at a time, which a row must fit into. A few blocks are read ahead.
_CSV_BYTES = 2**20


class RowFile(NamedTuple):
  """An open file of rows.

  Attributes:
    x: `(n, ...)` rows, with `shape`, indexed by slices and ascending integer arrays.
    y: `(n,)` or `(n, q)` labels as `kipcore.select` takes them, or None.
    class_names: names of the classes, if y are their codes; otherwise None.
    weights: `(n,)` float64, or None.
    columns: names of the columns of x; None for arrays.
    save: `save(folder, rows, weights)` writes ascending rows with their weights and row numbers, and
      returns the name of the file.
  """

  x: Any
  y: np.ndarray | None
  class_names: tuple[str, ...] | None
  weights: np.ndarray | None
  columns: tuple[str, ...] | None
  save: Callable[[pathlib.Path, np.ndarray, np.ndarray], str]


class SequentialRows:
  """Rows of a file that can only be read from start to end, with the interface of an array."""

  def __init__(self, shape: tuple[int, ...], read: Callable[[], Iterator[np.ndarray]]):
    """Rows of `shape`, of which `read()` yields blocks from the first row on."""
    self.shape = shape
    self._read = read
    self._position = 0
    self._blocks: Iterator[np.ndarray] | None = None
    self._rest = np.empty((0, *shape[1:]))

  def __getitem__(self, part) -> np.ndarray:
    """Rows of a slice or of ascending indices; the next rows after a slice need no new pass."""
    if isinstance(part, slice):
      start, stop, _ = part.indices(self.shape[0])
      return self._slice(start, stop)
    wanted, found, first = np.asarray(part), [], 0
    for block in self._read():
      low, high = np.searchsorted(wanted, (first, first + len(block)))
      found.append(block[wanted[low:high] - first])
      first += len(block)
      if high == len(wanted):
        break
    return np.concatenate(found)

  def _slice(self, start: int, stop: int) -> np.ndarray:
    if start != self._position or self._blocks is None:
      blocks = self._read()
      self._position, self._rest = 0, next(blocks)
      self._blocks = blocks
      for _ in range(0, start, _BLOCK_ROWS):
        self._take(min(_BLOCK_ROWS, start - self._position), blocks)
    return self._take(stop - start, self._blocks)

  def _take(self, count: int, blocks: Iterator[np.ndarray]) -> np.ndarray:
    parts, missing = [self._rest[:count]], count - len(self._rest)
    self._rest = self._rest[count:]
    while missing > 0:
      block = next(blocks, None)
      if block is None:
        raise DatasetError(f"expected {missing} rows more than the file has; it changed meanwhile")
      parts.append(block[:missing])
      self._rest, missing = block[missing:], missing - len(block)
    self._position += count
    if self._position == self.shape[0]:  # closes the file
      self._blocks = None
    return np.concatenate(parts)


def open_rows(
  path: str | os.PathLike,
  target: str | None = None,
  weights: str | None = None,
  labels: str | None = None,
  ignore: Sequence[str] = (),
  task: str = "auto",
) -> RowFile:
  """Opens a file of rows; the rows themselves are not read yet.

  Args:
    path: `.npy` (rows `(n, ...)`, memory-mapped), `.npz` (arrays `x`, and optionally `y` and
      `weights`), `.parquet` or `.csv` (numeric columns, with a header).
    target: column of the labels, for tables.
    weights: column of the weights; for `.npy` a `.npy` file.
    labels: `.npy` file of the labels, for `.npy`.
    ignore: columns that are not used, and written back with the rows.
    task: whether labels are classes ("classification") or real targets ("regression"); "auto":
      classes if they are integers, booleans or text, real targets if they are floats.

  Returns:
    `RowFile`.

  Raises:
    DatasetError: for a missing, damaged or unsupported file, unknown columns, text columns, no
      numeric columns, or labels or weights that are missing (NaN or empty).
    ValueError: for an unknown task.
  """
  checks.one_of("task", task, TASKS)
  path = os.path.expanduser(os.fspath(path))
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in FORMATS:
    raise DatasetError(f"{path}: expected a file of type {', '.join(FORMATS)}, got {suffix!r}")
  if not os.path.isfile(path):
    raise DatasetError(
      f"{path}: expected a file, got {'a directory' if os.path.isdir(path) else 'no such file'}"
    )
  table = suffix in (".parquet", ".csv")
  for name, value, use in (
    ("target", target, table),
    ("ignore", ignore, table),
    ("labels", labels, suffix == ".npy"),
    ("weights", weights, suffix != ".npz"),
  ):
    if value and not use:
      raise DatasetError(f"{path}: expected no {name} for this type of file, got {value!r}")
  try:
    if table:
      return _open_table(path, suffix, target, weights, tuple(ignore), task)
    opened = _open_npz(path) if suffix == ".npz" else _open_npy(path, labels, weights)
  except npz.NpzError as error:
    raise DatasetError(str(error)) from error
  x, y, mass = opened
  if len(x.shape) < 2 or 0 in x.shape:
    raise DatasetError(f"{path}: expected rows (n, ...), got shape {tuple(x.shape)}")
  y, names = _labels(f"{path}: labels", y, task, x.shape[0])
  mass = _weights(f"{path}: weights", mass, x.shape[0])

  def save(folder: pathlib.Path, rows: np.ndarray, found: np.ndarray) -> str:
    arrays = {"x": x[rows], "weights": found, "rows": rows}
    if opened[1] is not None:
      arrays["y"] = np.asarray(opened[1])[rows]
    npz.save_checked(folder / "selected.npz", arrays, "kipcore-selected", 1)
    return "selected.npz"

  return RowFile(x, y, names, mass, None, save)


def _open_npz(path: str):
  names = npz.names_in(path)
  if "x" not in names:
    raise DatasetError(
      f"{path}: expected an array x of rows, found {checks.one_line(', '.join(sorted(names)[:20])) or 'nothing'}"
    )
  shape, dtype = npz.row_header(path, "x")
  _numeric(f"{path}: x", dtype)
  others = npz.read_npz(path, ("y", "weights"))
  rows = SequentialRows(shape, lambda: npz.row_blocks(path, "x", _BLOCK_ROWS))
  return rows, others.get("y"), others.get("weights")


def _open_npy(path: str, labels, weights):
  x = _mapped(path)
  _numeric(path, x.dtype)
  return x, *(
    None if name is None else np.array(_mapped(os.path.expanduser(name)))
    for name in (labels, weights)
  )


def _mapped(path: str) -> np.ndarray:
  """A memory-mapped `.npy` file, after the checks of its header; nothing is unpickled."""
  if not os.path.isfile(path):
    raise DatasetError(f"{path}: expected an .npy file, got no such file")
  with _one_fault(path), open(path, "rb") as file:
    shape, _, dtype = npz.read_npy_header(path, file)
    held, claimed = (
      os.path.getsize(path) - file.tell(),
      int(np.prod(shape, dtype=object)) * dtype.itemsize,
    )
    if held < claimed:
      raise DatasetError(f"{path}: expected {claimed} bytes for shape {shape} {dtype}, got {held}")
    if not claimed:
      raise DatasetError(f"{path}: expected at least one row, got shape {shape}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _numeric(what: str, dtype: np.dtype) -> None:
  if dtype.kind not in "biuf":
    raise DatasetError(f"{what}: expected numbers, got {dtype}")


def _labels(what: str, y, task: str, n: int):
  """Labels for `select`, and class names or None."""
  if y is None:
    return None, None
  y = np.asarray(y)
  if y.ndim == 2 and y.shape[1] == 1:
    y = y[:, 0]
  if y.ndim not in (1, 2) or y.shape[0] != n:
    raise DatasetError(f"{what}: expected one for each of {n} rows, got shape {y.shape}")
  if y.dtype.kind == "f":
    _complete(what, np.isnan(y).reshape(n, -1).any(axis=1))
  classes = y.dtype.kind in "USbiu" if task == "auto" else task == "classification"
  if not classes and y.dtype.kind in "US":
    raise DatasetError(f"{what}: expected numbers for regression, got text")
  if not classes:
    return y.astype(np.float64), None
  if y.ndim == 2:
    return y, None  # one-hot
  names, codes = np.unique(y, return_inverse=True)
  return codes, tuple(checks.one_line(name, 80) for name in names.tolist())


def _weights(what: str, weights, n: int):
  """Weights in float64; `select` checks their signs."""
  if weights is None:
    return None
  weights = np.asarray(weights)
  if weights.shape not in ((n,), (n, 1)) or weights.dtype.kind not in "biuf":
    raise DatasetError(
      f"{what}: expected one number for each of {n} rows, got {weights.dtype} {weights.shape}"
    )
  weights = weights.reshape(n).astype(np.float64)
  _complete(what, np.isnan(weights))
  return weights


def _complete(what: str, missing: np.ndarray) -> None:
  if missing.any():
    raise DatasetError(
      f"{what}: expected a value in every row, got NaN or none in {int(missing.sum())} rows, the first row {int(missing.argmax())}"
    )


@contextlib.contextmanager
def _one_fault(path: str):
  """Converts any exception of a reader to a one-line `DatasetError`."""
  try:
    yield
  except (DatasetError, npz.NpzError):
    raise
  except Exception as error:
    raise DatasetError(
      f"{path}: expected a readable file, got {type(error).__name__}: {checks.one_line(error)}"
    ) from error


def _pyarrow():
  try:
    import pyarrow.csv
    import pyarrow.parquet
  except ImportError as error:
    raise DatasetError(
      "Parquet and CSV files need pyarrow: pip install 'kipcore[arrow]'"
    ) from error
  return pyarrow


def _open_table(path, suffix, target, weights, ignore, task) -> RowFile:
  pa = _pyarrow()
  with _one_fault(path):
    schema = _schema(pa, path, suffix)
  used = [name for name in (target, weights) if name]
  known = list(schema.names)
  if len(set(known)) < len(known):
    raise DatasetError(f"{path}: expected different names of columns, got {checks.one_line(known)}")
  for name in (*used, *ignore):
    if name not in known:
      raise DatasetError(
        f"{path}: expected a column {name!r}, got {checks.one_line(', '.join(known))}{checks.did_you_mean(name, known)}"
      )
  for name in (ROW, WEIGHT):
    if name in known:
      raise DatasetError(f"{path}: expected no column {name!r}, which is written; rename it")
  columns = tuple(name for name in known if name not in (*used, *ignore))
  types = {name: schema.field(name).type for name in known}
  text = [name for name in columns if not _is_number(pa, types[name])]
  if text:
    raise DatasetError(
      f"{path}: expected numeric columns, got {types[text[0]]} in {checks.one_line(', '.join(text))}; ignore or encode them"
    )
  if not columns:
    raise DatasetError(
      f"{path}: expected at least one numeric column besides {', '.join((*used, *ignore)) or 'nothing'}, got none"
    )
  # All numbers of a column become float64, also where a CSV file starts with integers or blanks.
  kinds = {name: pa.float64() for name in columns}
  if weights:
    kinds[weights] = pa.float64()

  def batches(names) -> Iterator[Any]:
    with _one_fault(path):
      yield from _batches(pa, path, suffix, list(names), kinds)

  read: dict[str, list] = {name: [] for name in used}
  n = 0
  for batch in batches(used or columns[:1]):
    n += batch.num_rows
    for name in used:
      column = batch.column(batch.schema.get_field_index(name))
      # Only the codes of text stay in memory.
      read[name].append(column.dictionary_encode() if _is_text(pa, column.type) else column)
  if not n:
    raise DatasetError(f"{path}: expected at least one row, got none")
  y, names = None, None
  if target:
    what, values = f"{path}: column {target!r}", pa.chunked_array(read[target])
    _complete(what, values.is_null().to_numpy())
    if pa.types.is_dictionary(values.type) and _is_text(pa, values.type.value_type):
      y, names = _text_labels(what, values, task)
    else:
      y, names = _labels(what, _target(pa, what, values), task, n)
  mass = None
  if weights:
    values = pa.chunked_array(read[weights]).to_numpy()
    mass = _weights(f"{path}: column {weights!r}", values, n)

  def rows() -> Iterator[np.ndarray]:
    first = 0
    for batch in batches(columns):
      block = np.empty((batch.num_rows, len(columns)))
      for i, name in enumerate(columns):
        values = batch.column(batch.schema.get_field_index(name)).cast(pa.float64())
        block[:, i] = values.to_numpy(zero_copy_only=False)
      bad = np.argwhere(~np.isfinite(block))
      if bad.size:
        row, column = bad[0]
        raise DatasetError(
          f"{path}: column {columns[column]!r}: expected finite numbers, got NaN, infinity or none in row {first + row}"
        )
      first += batch.num_rows
      yield block

  def save(folder: pathlib.Path, chosen: np.ndarray, found: np.ndarray) -> str:
    parts, first = [], 0
    for batch in batches(known):
      low, high = np.searchsorted(chosen, (first, first + batch.num_rows))
      if high > low:
        parts.append(batch.take(pa.array(chosen[low:high] - first)))
      first += batch.num_rows
    table = pa.Table.from_batches(parts)
    table = table.append_column(ROW, pa.array(chosen, pa.int64()))
    table = table.append_column(WEIGHT, pa.array(found, pa.float64()))
    name = f"selected{suffix}"
    with atomic.replacing(folder / name) as file:
      if suffix == ".csv":
        pa.csv.write_csv(table, file)
      else:
        pa.parquet.write_table(table, file)
    return name

  return RowFile(SequentialRows((n, len(columns)), rows), y, names, mass, columns, save)


def _is_number(pa, kind) -> bool:
  return (
    pa.types.is_floating(kind)
    or pa.types.is_integer(kind)
    or pa.types.is_boolean(kind)
    or pa.types.is_null(kind)
  )


def _is_text(pa, kind) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _text_labels(what: str, values, task: str) -> tuple[np.ndarray, tuple[str, ...]]:
  """`_labels` of text with a dictionary, from its codes alone."""
  if task == "regression":
    raise DatasetError(f"{what}: expected numbers for regression, got text")
  chunks = values.unify_dictionaries().chunks
  codes = np.concatenate([chunk.indices.to_numpy() for chunk in chunks])
  words = np.asarray(chunks[0].dictionary.to_pylist(), np.str_)
  names, place = np.unique(words, return_inverse=True)
  used = np.zeros(names.size, bool)
  used[place[codes]] = True
  place = (np.cumsum(used) - 1)[place]
  return place[codes], tuple(checks.one_line(name, 80) for name in names[used].tolist())


def _target(pa, what: str, values) -> np.ndarray:
  """The values of a column of labels as NumPy: integers, booleans or floats."""
  kind = values.type
  if pa.types.is_dictionary(kind):
    values, kind = values.cast(kind.value_type), kind.value_type
  if not _is_number(pa, kind):
    raise DatasetError(f"{what}: expected numbers or text, got {kind}")
  return values.to_numpy()


def _schema(pa, path: str, suffix: str):
  if suffix == ".parquet":
    with pa.parquet.ParquetFile(path) as file:
      return file.schema_arrow
  with pa.csv.open_csv(path) as reader:
    return reader.schema


def _batches(pa, path: str, suffix: str, names: list[str], kinds: dict) -> Iterator[Any]:
  """Record batches of some columns, from the first row on."""
  if suffix == ".parquet":
    # With `pre_buffer`, the buffers of all earlier batches stay in memory.
    with pa.parquet.ParquetFile(path, pre_buffer=False) as file:
      yield from file.iter_batches(_BLOCK_ROWS, columns=names)
    return
  options = pa.csv.ConvertOptions(
    include_columns=names,
    column_types={name: kind for name, kind in kinds.items() if name in names},
    strings_can_be_null=True,
  )
  reading = pa.csv.ReadOptions(block_size=_CSV_BYTES)
  with pa.csv.open_csv(path, reading, convert_options=options) as reader:
    yield from reader
