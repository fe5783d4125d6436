"""Eager checks at the public edge: shape, dtype and range, "expected ..., got ...".

Checks of shape and dtype look at nothing but shape and dtype and so also work on
traced arrays. Checks of values (`finite`) belong to the host and skip tracers.
"""

import difflib

import jax
import jax.numpy as jnp
import numpy as np

from kipcore.types import NumericalError, Status

_ADVICE = {
  Status.MAX_STEPS: "it reached the step limit before it converged; allow more steps or a looser tolerance",
  Status.NOT_POSITIVE_DEFINITE: (
    "the matrix is not positive definite at this precision; use a larger ridge "
    "(relative 1e-4 or more in float32), or float64 (--x64), and remove duplicate rows"
  ),
  Status.NOT_FINITE: "it contains NaN or infinity; check the inputs, or lower the learning rate",
}


def is_traced(x) -> bool:
  """True if `x` is an abstract value inside a transformation, so has no values to check."""
  return isinstance(x, jax.core.Tracer)


def rank(name: str, x, *expected: int) -> None:
  """Raises ValueError unless `x.ndim` is one of `expected`."""
  if np.ndim(x) not in expected:
    raise ValueError(
      f"{name}: expected an array with {' or '.join(map(str, expected))} dimensions, got shape {np.shape(x)}"
    )


def square(name: str, x) -> None:
  """Raises ValueError unless `x` is `(n, n)`."""
  rank(name, x, 2)
  if x.shape[0] != x.shape[1]:
    raise ValueError(f"{name}: expected a square matrix, got shape {x.shape}")


def shape(name: str, x, expected: tuple) -> None:
  """Raises ValueError unless `x.shape` equals `expected`, where None stands for any size."""
  got = np.shape(x)
  if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got)):
    wanted = tuple("any" if e is None else e for e in expected)
    raise ValueError(f"{name}: expected shape {wanted}, got {got}")


def array(name: str, x) -> None:
  """Raises TypeError unless `x` is an array, which lists are not."""
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    raise TypeError(f"{name}: expected an array, got a {type(x).__name__}; convert it first")


def same_rows(name1: str, x1, name2: str, x2) -> None:
  """Raises ValueError unless both arrays have the same leading size."""
  array(name1, x1)
  array(name2, x2)
  if x1.shape[:1] != x2.shape[:1] or not x1.shape:
    raise ValueError(
      f"expected {name1} and {name2} to have the same number of rows, got shapes {x1.shape} and {x2.shape}"
    )


def floating(name: str, x) -> None:
  """Raises TypeError unless `x` has a floating dtype."""
  array(name, x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}; convert it first")


def positive(name: str, value) -> None:
  """Raises ValueError unless the concrete number or array is > 0 everywhere; tracers pass."""
  if not is_traced(value) and not np.all(np.asarray(value) > 0):
    raise ValueError(f"{name}: expected values > 0, got {np.min(np.asarray(value))}")


def non_negative(name: str, value) -> None:
  """Raises ValueError unless the concrete number or array is >= 0 everywhere; tracers pass."""
  if not is_traced(value) and not np.all(np.asarray(value) >= 0):
    raise ValueError(f"{name}: expected values >= 0, got {np.min(np.asarray(value))}")


def in_range(name: str, value, low, high) -> None:
  """Raises ValueError unless `low <= value <= high`; tracers pass."""
  if not is_traced(value) and not np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)):
    raise ValueError(f"{name}: expected a value in [{low}, {high}], got {value}")


def positive_int(name: str, value) -> None:
  """Raises unless `value` is an integer >= 1."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(f"{name}: expected a positive integer, got {value!r}")
  if value < 1:
    raise ValueError(f"{name}: expected a positive integer, got {value}")


def finite(name: str, x) -> None:
  """Raises ValueError if a concrete array holds NaN or infinity; tracers pass."""
  if is_traced(x):
    return
  good = np.isfinite(np.asarray(x))
  if not good.all():
    bad = ~good
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
      f"{name}: expected finite values, got {int(bad.sum())} NaN or infinite, the first at index {first}"
    )


def one_of(name: str, value, choices) -> None:
  """Raises ValueError unless `value` is among `choices`."""
  if value not in choices:
    raise ValueError(
      f"{name}: expected one of {', '.join(map(str, choices))}; got {value!r}{did_you_mean(value, choices)}"
    )


def did_you_mean(value, choices) -> str:
  """The choice that looks most like a wrong value, as the end of a message; "" where none does."""
  close = difflib.get_close_matches(str(value), map(str, choices), n=1)
  return f" (did you mean {close[0]}?)" if close else ""


def raise_for_status(what: str, status) -> None:
  """Raises NumericalError, with advice, unless the (concrete) status is OK.

  Args:
    what: what was computed, e.g. "kernel ridge regression at step 7".
    status: scalar or array of `Status` values; the worst one counts.
  """
  worst = Status(int(np.max(np.asarray(status))))
  if worst is not Status.OK:
    raise NumericalError(f"{what} failed ({worst.name}): {_ADVICE[worst]}")


def one_line(thing, length: int = 300) -> str:
  """The text of a thing on one line of readable length, without what a terminal might obey."""
  text = "".join(c if c.isprintable() else "?" for c in " ".join(str(thing).split()))
  return text[:length] + "..." * (len(text) > length)
