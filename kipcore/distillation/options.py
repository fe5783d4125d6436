"""Validation of the options of methods: scalars become Python numbers, so that equal options are equal and hashable."""

from collections.abc import Mapping, Sequence
from typing import Any

from kipcore import checks


def validate(
  options: Any,
  *,
  positive: Sequence[str] = (),
  non_negative: Sequence[str] = (),
  counts: Mapping[str, int] | None = None,
  choices: Mapping[str, Sequence[str]] | None = None,
  flags: Sequence[str] = (),
) -> None:
  """Checks the fields of a frozen dataclass and replaces NumPy scalars; for its `__post_init__`.

  Args:
    options: the instance. A field whose default is None may be None.
    positive: names of finite numbers > 0.
    non_negative: names of finite numbers >= 0.
    counts: names of integers, with their least value.
    choices: names of strings, with the valid ones.
    flags: names of booleans.

  Raises:
    ValueError, TypeError: for the first field that is invalid.
  """
  fields = type(options).__dataclass_fields__

  def given(name):
    return getattr(options, name) is not None or fields[name].default is not None

  def assign(name, value):
    object.__setattr__(options, name, value)

  for name in positive:
    if given(name):
      assign(name, checks.number(name, getattr(options, name), 0, above=True))
  for name in non_negative:
    if given(name):
      value = checks.number(name, getattr(options, name), 0)
      checks.finite(name, value)
      assign(name, value)
  for name, least in (counts or {}).items():
    if given(name):
      assign(name, checks.integer(name, getattr(options, name), least))
  for name, known in (choices or {}).items():
    checks.one_of(name, getattr(options, name), known)
  for name in flags:
    assign(name, checks.flag(name, getattr(options, name)))
