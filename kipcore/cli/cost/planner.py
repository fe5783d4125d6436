"""Memory: how much is worked on at a time, what is refused before it is begun, and what is said where it ran out all the same."""

import contextlib
import math

import jax

from kipcore.cli.cost import estimate
from kipcore.cli.errors import OutOfMemory, UsageError

# Arrays as large as a block of the kernel matrix that are alive at once in a step of KIP through a dense kernel, forward and back; at
# most, for up to five layers (tests/test_planner.py compares it with XLA's own plan).
_ARRAYS_OF_A_BLOCK = 40
# Share of the free memory that such a block may take: the rest is for the solves, the rows, and others on the machine.
_SHARE = 0.25
_FEWEST_ROWS = 8
# Flags that make scores and starts need less.
FEWER_ROWS = "--images_per_class, --train_rows or --test_rows"


def free_bytes() -> float:
  """Memory of the first device that nothing holds yet; infinite where nobody tells."""
  available = estimate.available_bytes()
  held = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
  return math.inf if available is None else available - held


def rows_at_a_time(rows: int, support: int, itemsize: int) -> int:
  """Of a kernel matrix `(rows, support)`, how many rows to work on at a time; 0 for all, where they fit.

  Powers of two, so that a little more or less free memory seldom changes them.
  """
  fit = _SHARE * free_bytes() / (_ARRAYS_OF_A_BLOCK * support * itemsize)
  return 0 if rows <= fit else max(_FEWEST_ROWS, 2 ** int(math.log2(max(fit, 1))))


def check_rows(raw, itemsize: int, devices: int, test_rows: int = 0) -> None:
  """UsageError where the preprocessed rows of a dataset cannot be held: in main memory, and on the devices, each of which has a share.

  Args:
    raw: the `Dataset` as read.
    itemsize: bytes of a preprocessed number.
    devices: that share the training rows.
    test_rows: that are used; 0 for all.
  """
  size, one_memory = itemsize * raw.x_train[0].size, jax.default_backend() == "cpu"
  train, tests = len(raw.x_train) + len(raw.x_validation), test_rows or len(raw.x_test)
  # As preprocessed, and once more for the devices, where these have the same memory; else a share of them for each.
  a_row, others = (2 * size, 2 * size * tests) if one_memory else (size / devices, size * tests)
  needed, free = train * a_row + others, free_bytes()
  if needed <= free:
    return
  fit = int((0.9 * free - others) / a_row)
  remedy = (
    f"--train_rows={fit} learns from a part of each class"
    if fit > 0
    else "--train_rows and --test_rows take a part of them"
  )
  raise UsageError(
    f"expected rows that fit into the {estimate.memory(free)} that are free, got {estimate.memory(needed)}: {train:,} training and {tests:,} "
    f"test rows of {estimate.memory(size)} each, as preprocessed and for the devices; {remedy}"
  )


def check_steps(compiled, kernel: bool) -> None:
  """OutOfMemory, before the first step, where the steps need more working memory than is free.

  Args:
    compiled: the steps, whose plan XLA tells.
    kernel: whether they work through kernel matrices, else through networks.
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
    f"a step needs {estimate.memory(planned.temp_size_in_bytes)} of working memory, and {estimate.memory(free)} are free ({parts}); less by "
    + (
      "--target_block_size, --images_per_class"
      if kernel
      else "--target_batch_size, --width, --images_per_class"
    )
  )


@contextlib.contextmanager
def part(name: str, remedy: str = "--dry_run says what each part takes"):
  """Names the part of a run in which memory ran out, and what helps: `OutOfMemory`."""
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
