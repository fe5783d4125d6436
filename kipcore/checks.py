"""Eager validation of arguments; messages have the form "NAME: expected ..., got ...".

Checks of shape and dtype also work on traced arrays. Checks of values skip tracers, whose values
are unknown. Booleans are not accepted as numbers.
"""

import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kipcore.types import Array, NumericalError, Status

_CHUNK = 1 << 18  # entries that `finite` checks at a time

_ADVICE = {
  Status.MAX_STEPS: "it reached the step limit before it converged; allow more steps or a looser tolerance",
  Status.NOT_POSITIVE_DEFINITE: (
    "the matrix is not positive definite at this precision; use a larger ridge "
    "(relative 1e-4 or more in float32), or float64 (--x64), and remove duplicate rows"
  ),
  Status.NOT_FINITE: "it contains NaN or infinity; check the inputs, or lower the learning rate",
}


def is_traced(x) -> bool:
  """Whether `x` is an abstract value inside a transformation, without values to check."""
  return isinstance(x, jax.core.Tracer)


def rank(name: str, x, *expected: int) -> None:
  """Raise ValueError unless `x.ndim` is one of `expected`."""
  if np.ndim(x) not in expected:
    raise ValueError(
      f"{name}: expected an array with {' or '.join(map(str, expected))} dimensions, got shape {np.shape(x)}"
    )


def square(name: str, x) -> None:
  """Raise ValueError unless `x` is `(n, n)`."""
  rank(name, x, 2)
  if x.shape[0] != x.shape[1]:
    raise ValueError(f"{name}: expected a square matrix, got shape {x.shape}")


def shape(name: str, x, expected: tuple) -> None:
  """Raise ValueError unless `x.shape` equals `expected`, where None stands for any size."""
  got = np.shape(x)
  if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got)):
    wanted = tuple("any" if e is None else e for e in expected)
    raise ValueError(f"{name}: expected shape {wanted}, got {got}")


def array(name: str, x) -> None:
  """Raise TypeError unless `x` is an array; lists are not."""
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise TypeError(f"{name}: expected an array, got a {type(x).__name__}; convert it first")


def same_rows(name1: str, x1, name2: str, x2) -> None:
  """Raise ValueError unless both arrays have the same leading size."""
  array(name1, x1)
  array(name2, x2)
  if x1.shape[:1] != x2.shape[:1] or not x1.shape:
    raise ValueError(
      f"expected {name1} and {name2} to have the same number of rows, got shapes {x1.shape} and {x2.shape}"
    )


def floating(name: str, x) -> None:
  """Raise TypeError unless `x` has a real floating dtype; integers are ambiguous and rejected."""
  array(name, x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}; convert it first")


def real(name: str, value) -> None:
  """Raise TypeError unless `value` is a real number or an array of them; booleans are not."""
  dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
  if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
    got = repr(value) if np.ndim(value) == 0 else f"dtype {dtype}"
    raise TypeError(f"{name}: expected a real number, got {got}")


def scalar(name: str, value) -> Any:
  """A Python float from a Python or NumPy number or 0-d array; a traced scalar is returned as is.

  Raises:
    TypeError: for a boolean or another type.
    ValueError: for an array that is not 0-d.
  """
  real(name, value)
  if np.ndim(value):
    raise ValueError(f"{name}: expected a scalar, got shape {np.shape(value)}")
  return value if is_traced(value) else float(value)


def positive(name: str, value) -> None:
  """Raise ValueError unless the number or array is finite and > 0 everywhere; tracers pass."""
  real(name, value)
  if not is_traced(value) and not np.all(np.asarray(value) > 0):
    raise ValueError(f"{name}: expected values > 0, got {np.min(np.asarray(value))}")
  if not is_traced(value) and not np.all(np.asarray(value) < np.inf):
    raise ValueError(f"{name}: expected finite values > 0, got {np.max(np.asarray(value))}")


def non_negative(name: str, value) -> None:
  """Raise ValueError unless the number or array is >= 0 everywhere; tracers pass."""
  real(name, value)
  if not is_traced(value) and not np.all(np.asarray(value) >= 0):
    raise ValueError(f"{name}: expected values >= 0, got {np.min(np.asarray(value))}")


def in_range(name: str, value, low, high) -> None:
  """Raise ValueError unless `low <= value <= high`; tracers pass."""
  real(name, value)
  if not is_traced(value) and not np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)):
    raise ValueError(f"{name}: expected a value in [{low}, {high}], got {value}")


def integer(name: str, value, least: int | None = None) -> int:
  """A Python int from a Python or NumPy integer or a 0-d integer array, not a boolean.

  Raises:
    TypeError: for anything else, which includes traced values.
    ValueError: for an integer below `least`.
  """
  wanted = {None: "an integer", 1: "a positive integer"}.get(least, f"an integer >= {least}")
  valid = isinstance(value, int) and not isinstance(value, bool)  # of any size
  if not valid and not is_traced(value) and np.ndim(value) == 0:
    valid = np.asarray(value).dtype.kind in "iu"
  if not valid:
    raise TypeError(f"{name}: expected {wanted}, got {value!r}")
  if least is not None and int(value) < least:
    raise ValueError(f"{name}: expected {wanted}, got {int(value)}")
  return int(value)


def positive_int(name: str, value) -> int:
  """`integer`, with ValueError unless it is >= 1."""
  return integer(name, value, 1)


def positive_ints(**values) -> list[int]:
  """`positive_int` of several arguments, by name."""
  return [positive_int(name, value) for name, value in values.items()]


def optional_positive_int(name: str, value) -> int | None:
  """`positive_int`, or None."""
  return None if value is None else positive_int(name, value)


def weights(name: str, value, n: int, dtype) -> Array:
  """Weights `(n,)` in `dtype`: finite, >= 0 and of exactly that shape."""
  array(name, value)
  real(name, value)
  shape(name, value, (n,))
  finite(name, value)
  non_negative(name, value)
  return jnp.asarray(value, dtype)


def finite(name: str, x) -> None:
  """Raise ValueError if a concrete array holds NaN or infinity; tracers pass."""
  if is_traced(x):
    return
  x = np.asarray(x)
  if not _all_finite(x):
    bad = ~np.isfinite(x)
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
      f"{name}: expected finite values, got {int(bad.sum())} NaN or infinite, the first at index {first}"
    )


def _all_finite(x: np.ndarray) -> bool:
  """Whether all entries are finite, in parts whose masks stay in the cache."""
  if not x.flags.c_contiguous:
    return bool(np.isfinite(x).all())
  flat = x.reshape(-1)
  return all(np.isfinite(flat[i : i + _CHUNK]).all() for i in range(0, flat.size, _CHUNK))


def one_of(name: str, value, choices) -> None:
  """Raise ValueError unless `value` is among `choices`."""
  if value not in choices:
    raise ValueError(
      f"{name}: expected one of {', '.join(map(str, choices))}; got {value!r}{did_you_mean(value, choices)}"
    )


def did_you_mean(value, choices) -> str:
  """The choice most similar to a wrong value, as the end of a message; "" if there is none."""
  close = difflib.get_close_matches(str(value), map(str, choices), n=1)
  return f" (did you mean {close[0]}?)" if close else ""


def raise_for_status(what: str, status) -> None:
  """Raise NumericalError, with advice, unless the (concrete) status is OK.

  Args:
    what: what was computed, e.g. "kernel ridge regression at step 7".
    status: scalar or array of `Status` values; the largest one counts.
  """
  worst = Status(int(np.max(np.asarray(status))))
  if worst is not Status.OK:
    raise NumericalError(f"{what} failed ({worst.name}): {_ADVICE[worst]}")


def one_line(thing, length: int = 300) -> str:
  """The text of an object on one line of limited length, without control characters."""
  text = "".join(c if c.isprintable() else "?" for c in " ".join(str(thing).split()))
  return text[:length] + "..." * (len(text) > length)


class _ByIdentity:
  """A callable that is hashed and compared by identity."""

  def __init__(self, fn):
    self.fn = fn

  def __eq__(self, other):
    return isinstance(other, _ByIdentity) and self.fn is other.fn

  def __hash__(self):
    return id(self.fn)

  def __call__(self, *args):
    return self.fn(*args)

  def __getattr__(self, name):
    return getattr(self.fn, name)


def hashable(fn) -> Any:
  """A callable as a static argument of `jit`: itself, or compared by identity if not hashable."""
  try:
    hash(fn)
  except TypeError:
    return _ByIdentity(fn)
  return fn


def number(
  name: str, value, low: float = -np.inf, high: float = np.inf, above: bool = False
) -> float:
  """The value as a float; raises unless it is a real scalar (not a bool or NaN) in the range.

  Args:
    name: of the argument.
    value: a Python or NumPy number, or an array without dimensions.
    low, high: bounds, inclusive; an infinite value passes only if its bound is infinite.
    above: whether `low` itself is out of range, and infinity too.
  """
  got = float(scalar(name, value))
  if above:
    if not low < got < np.inf or got > high:
      bound = "" if high == np.inf else f" and <= {high:g}"
      raise ValueError(f"{name}: expected a finite number > {low:g}{bound}, got {got}")
  elif not low <= got <= high:
    wanted = f"a number >= {low:g}" if high == np.inf else f"a value in [{low}, {high}]"
    raise ValueError(f"{name}: expected {wanted}, got {got}")
  return got


def flag(name: str, value) -> bool:
  """The value as a bool; raises TypeError unless it is a boolean scalar."""
  if np.ndim(value) or np.asarray(value).dtype.kind != "b":
    raise TypeError(f"{name}: expected True or False, got {value!r}")
  return bool(value)
