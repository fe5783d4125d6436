"""Configurations as pytrees: records whose numbers are leaves, and functions as arguments of `jit`.

The numbers of a record (a kernel's bandwidth, a layer's w_std) are leaves, so that one compiled program
serves all values, and `grad` and `vmap` reach them. The other fields are static. Records with concrete
numbers are hashable and equal by value; they can be static arguments, too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from kipcore import checks

_Record = TypeVar("_Record")


def record(*leaves: str) -> Callable[[type[_Record]], type[_Record]]:
  """Class decorator that makes a frozen dataclass a pytree with value equality.

  Transformations build instances from arbitrary leaves (tracers, batches, shapes), without `__init__`
  and its validation.

  Args:
    leaves: names of the fields that are numbers, arrays or pytrees of them; the others are static and
      must be hashable.
  """

  def decorate(cls: type[_Record]) -> type[_Record]:
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    static = [name for name in fields if name not in leaves]

    def flatten(node):
      return [getattr(node, n) for n in leaves], tuple(getattr(node, n) for n in static)

    def flatten_with_keys(node):
      children, aux = flatten(node)
      return list(zip(map(jax.tree_util.GetAttrKey, leaves), children, strict=True)), aux

    def unflatten(aux, children):
      node = object.__new__(cls)
      for name, value in (*zip(static, aux, strict=True), *zip(leaves, children, strict=True)):
        object.__setattr__(node, name, value)
      return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    cls.__eq__ = _equal  # type: ignore[assignment,method-assign]
    cls.__hash__ = _hash  # type: ignore[assignment,method-assign]
    return cls

  return decorate


def _equal(a, b) -> Any:
  if type(a) is not type(b):
    return NotImplemented
  (leaves_a, structure_a), (leaves_b, structure_b) = map(jax.tree.flatten, (a, b))
  same: bool = structure_a == structure_b  # type: ignore[operator]
  return same and all(
    x is y or _value(x) == _value(y) for x, y in zip(leaves_a, leaves_b, strict=True)
  )


def _hash(a) -> int:
  leaves, structure = jax.tree.flatten(a)
  if any(map(checks.is_traced, leaves)):
    raise TypeError(
      f"{type(a).__name__}: expected concrete numbers in order to hash it, got traced ones; pass it as an "
      "argument that is not static"
    )
  return hash((structure, *map(_value, leaves)))


def _value(leaf) -> Any:
  """Something hashable that is equal for equal values, whatever their type."""
  if checks.is_traced(leaf):
    return id(leaf)
  if not isinstance(leaf, (int, float, np.ndarray, np.generic, jax.Array)):
    return leaf
  array = np.asarray(leaf)
  return float(array) if array.ndim == 0 else (array.shape, array.astype(np.float64).tobytes())


@record()
@dataclasses.dataclass(frozen=True)
class Static:
  """A function as a pytree without leaves: as an argument of `jit` it is compared by value.

  Attributes:
    fn: hashable.
  """

  fn: Callable

  def __call__(self, *args):
    return self.fn(*args)

  def __getattr__(self, name):
    if name.startswith("__") or name == "fn":
      raise AttributeError(name)
    return getattr(self.fn, name)


def argument(fn: Any) -> Any:
  """A function, such as a kernel, as an argument of a jitted function.

  Args:
    fn: a callable. One that is a pytree of numbers and arrays is returned as it is; any other becomes
      `Static`, by identity if it is not hashable.

  Returns:
    A callable pytree.
  """
  leaves = jax.tree.leaves(fn)
  if len(leaves) == 1 and leaves[0] is fn or not all(map(_numeric, leaves)):
    return Static(checks.hashable(fn))
  return fn


def _numeric(leaf) -> bool:
  return isinstance(leaf, (int, float, np.generic, np.ndarray, jax.Array))
