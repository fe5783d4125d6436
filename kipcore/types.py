"""Types shared by all modules."""

import enum
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
# Scalars: Python or NumPy numbers, or arrays of rank 0; booleans are rejected (see `checks`).
RealLike = float | np.floating | np.integer | ArrayLike
IntLike = int | np.integer | ArrayLike


class Status(enum.IntEnum):
  """How a traced computation ended; the host reads it with `checks.raise_for_status`.

  Exceptions cannot be raised inside a compiled function on every backend, so a
  failure travels as a value. When several parts each have a status, the largest
  is kept.
  """

  OK = 0
  MAX_STEPS = 1
  NOT_POSITIVE_DEFINITE = 2
  NOT_FINITE = 3


class KipcoreError(Exception):
  """Base class of the errors that kipcore defines; the message is one line."""


class NumericalError(KipcoreError, ArithmeticError):
  """A computation ended with a `Status` other than `OK`."""


class DatasetError(KipcoreError, ValueError):
  """The data are unavailable or unusable."""


@runtime_checkable
class KernelFn(Protocol):
  """A positive semi-definite kernel, `kernel_fn(x1, x2=None) -> (n1, n2)`.

  `x1` is `(n1, ...)`, `x2` is `(n2, ...)` or None for "with itself". It must be a
  pure function of its arguments, so that it can be jitted and differentiated. It
  may offer `diag(x) -> (n,)`, which `gram_diag` then uses.
  """

  def __call__(self, x1: Array, x2: Array | None = None) -> Array: ...


class Support(NamedTuple):
  """A distilled (or selected) set, in the space that the kernel sees.

  Attributes:
    x: `(m, ...)` inputs.
    y: `(m, c)` labels, in the convention of the targets (`preprocess.one_hot_centered`).
  """

  x: Array
  y: Array
