"""Memory: block sizes, and runs that are refused because they would not fit."""

import contextlib
import math

import jax

from kipcore.cli.cost import estimate
from kipcore.cli.errors import OutOfMemory, UsageError

# Arrays of the size of a block of the kernel matrix that a step of KIP with a dense kernel needs at once,
# at most, for up to five layers (tests/cli/test_planner.py compares it with XLA's memory analysis).
_ARRAYS_PER_BLOCK = 40
# Bytes of the arrays of a block. A constant: the order of summation, and so the result, depends on the
# problem alone, not on the memory that happens to be free.
BLOCK_BYTES = 1e9
_FEWEST_ROWS = 8
# Flags that reduce the memory of scores and initializations.
FEWER_ROWS = "--images_per_class, --train_rows or --test_rows"


def free_bytes() -> float:
  """Free memory of the first device; infinite if unknown."""
  available = estimate.available_bytes()
  held = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
  return math.inf if available is None else available - held


def block_rows(rows: int, support: int, itemsize: int) -> int:
  """How many rows of a `(rows, support)` kernel matrix to compute at a time; 0 for all of them.

  Args:
    rows: rows of the matrix.
    support: columns of the matrix.
    itemsize: bytes of an entry.

  Returns:
    A power of two, or 0.
  """
  fit = BLOCK_BYTES / (_ARRAYS_PER_BLOCK * support * itemsize)
  return 0 if rows <= fit else max(_FEWEST_ROWS, 2 ** int(math.log2(max(fit, 1))))


def check_rows(raw, itemsize: int, devices: int, test_rows: int = 0) -> None:
  """Raises UsageError if the preprocessed rows of a dataset do not fit into memory.

  Args:
    raw: the `Dataset` as read.
    itemsize: bytes of a preprocessed number.
    devices: number of devices that share the training rows.
    test_rows: number of test rows that are used; 0 for all.
  """
  size, one_memory = itemsize * raw.x_train[0].size, jax.default_backend() == "cpu"
  train, tests = len(raw.x_train) + len(raw.x_validation), test_rows or len(raw.x_test)
  # As preprocessed, and once more for devices that share main memory; other devices hold a share each.
  a_row, others = (2 * size, 2 * size * tests) if one_memory else (size / devices, size * tests)
  needed, free = train * a_row + others, free_bytes()
  if needed <= free:
    return
  fit = int((0.9 * free - others) / a_row)
  remedy = (
    f"--train_rows={fit} uses a subset of each class"
    if fit > 0
    else "--train_rows and --test_rows use a subset of them"
  )
  raise UsageError(
    f"--dataset: expected rows that fit into {estimate.memory(free)} of free memory, got {estimate.memory(needed)}: {train:,} training "
    f"and {tests:,} test rows of {estimate.memory(size)} each, preprocessed and on the devices; {remedy}"
  )


def check_steps(compiled, kernel: bool) -> None:
  """Raises OutOfMemory, before the first step, if the steps need more working memory than is free.

  Args:
    compiled: the compiled steps.
    kernel: whether they use kernel matrices, not networks.
  """
  planned = compiled.memory_analysis()
  free = free_bytes()
  if planned is None or planned.temp_size_in_bytes <= free:
    return
  parts = ", ".join(
    f"{part.name} {estimate.memory(part.amount)}"
    for part in estimate.memory_of_steps(compiled, kernel)
  )
  raise OutOfMemory(
    f"a step needs {estimate.memory(planned.temp_size_in_bytes)} of working memory, and {estimate.memory(free)} are free ({parts}); reduce "
    + (
      "--target_block_size or --images_per_class"
      if kernel
      else "--target_batch_size, --width or --images_per_class"
    )
  )


@contextlib.contextmanager
def part(name: str, remedy: str = "--dry_run shows what each part needs"):
  """Raises OutOfMemory, with the part of the run and what helps, if memory runs out in the block."""
  try:
    yield
  except MemoryError as error:
    raise OutOfMemory(
      f"out of memory in {name} ({str(error) or 'MemoryError'}); {remedy}"
    ) from error
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise OutOfMemory(
      f"out of memory in {name} ({str(error).splitlines()[0]}); {remedy}"
    ) from error
