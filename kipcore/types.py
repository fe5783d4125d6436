"""Types and exceptions shared by all modules."""

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
# Scalars: Python or NumPy numbers, or arrays of rank 0; booleans are rejected (see `checks`).
RealLike = float | np.floating | np.integer | ArrayLike
IntLike = int | np.integer | ArrayLike

# A number of a record that is a pytree: concrete, or traced by a transformation.
Number = float | Array

# Scalar arguments: NumPy scalars and arrays without dimensions are accepted and converted (`checks`).
if TYPE_CHECKING:
  Integer = int
  Real = float
  Flag = bool
else:
  Integer = int | np.integer | ArrayLike
  Real = float | int | np.floating | np.integer | ArrayLike
  Flag = bool | np.bool_ | ArrayLike


class Status(enum.IntEnum):
  """How a traced computation ended; the host reads it with `checks.raise_for_status`.

  Compiled functions cannot raise exceptions on every backend, so they return a
  status. The status of several parts is the largest of theirs.
  """

  OK = 0
  MAX_STEPS = 1
  NOT_POSITIVE_DEFINITE = 2
  NOT_FINITE = 3


class KipcoreError(Exception):
  """Base class of the exceptions that kipcore defines."""


class NumericalError(KipcoreError, ArithmeticError):
  """A computation ended with a `Status` other than `OK`."""


class DatasetError(KipcoreError, ValueError):
  """The dataset is unavailable or invalid; the message is one line."""


@runtime_checkable
@runtime_checkable
class KernelFn(Protocol):
  """A positive semi-definite kernel, `kernel_fn(x1, x2=None) -> (n1, n2)`.

  `x1` is `(n1, ...)`; `x2` is `(n2, ...)`, or None for `x1`. The kernel must be a pure function
  of its arguments, which `jax.jit` and `jax.grad` can transform. If it has a method `diag(x) -> (n,)`,
  `gram_diag` uses it.
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


class LossInfo(NamedTuple):
  """What a loss reports in addition to its value.

  Attributes:
    per_example: `(t,)` unweighted losses.
    predictions: `(t, c)` in the convention of the labels; samplers score them.
    accuracy: scalar in [0, 1] on the batch.
    status: int32 scalar, a `Status`.
  """

  per_example: Float[Array, " t"]
  predictions: Float[Array, "t c"]
  accuracy: Float[Array, ""]
  status: Int[Array, ""]
