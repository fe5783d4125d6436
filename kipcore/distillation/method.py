"""The interfaces of distillation methods and target samplers.

A method defines what is learned and the loss; a sampler defines which targets the next batch
contains; an initialization (`selection.coreset`) defines the start. The loop (`loop`) combines any
method with any sampler.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, Int

from kipcore.types import Array, Support

Params = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch of targets.

  Attributes:
    x: `(t, ...)` inputs.
    y: `(t, c)` labels.
    axis_name: the mapped device axis over which the batch is divided, None on one device. Static
      under `jit`. Methods whose loss is not a mean over targets sum over it (`sum_over_devices`).
  """

  x: Float[Array, "t ..."]
  y: Float[Array, "t c"]
  axis_name: str | None = dataclasses.field(default=None, metadata={"static": True})


class LossInfo(NamedTuple):
  """What a loss reports besides its value.

  Attributes:
    per_example: `(t,)` unweighted losses.
    predictions: `(t, c)` in the convention of the labels; samplers compute scores from them.
    accuracy: scalar in [0, 1] on the batch.
    status: int32 scalar, `types.Status`.
  """

  per_example: Float[Array, " t"]
  predictions: Float[Array, "t c"]
  accuracy: Float[Array, ""]
  status: Int[Array, ""]


class _SameObject:
  """Wraps an argument that is not hashable; equal only to wrappers of the same object."""

  def __init__(self, value):
    self.value = value

  def __eq__(self, other):
    return isinstance(other, _SameObject) and self.value is other.value

  def __hash__(self):
    return id(self.value)

  def __repr__(self):
    return f"<{type(self.value).__name__}>"


def _hashable(value) -> Hashable:
  try:
    hash(value)
  except TypeError:
    return _SameObject(value)
  return value


class _ByValue:
  """Equality by constructor and arguments, for records of functions; by their functions otherwise."""

  built_by: tuple | None

  def _identity(self) -> tuple:
    if self.built_by is not None:
      return self.built_by
    return tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]

  def __eq__(self, other):
    return type(self) is type(other) and self._identity() == other._identity()

  def __hash__(self):
    return hash(self._identity())

  def __repr__(self):
    if self.built_by is None:
      return f"{type(self).__name__}({self.name!r})"  # type: ignore[attr-defined]
    name, arguments = self.built_by
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments)})"


def value_equal(constructor):
  """Decorates a constructor of a `Method` or `Sampler`: equal arguments give equal results.

  `jit` and `pmap` then reuse what they compiled for an equal method or sampler. Arguments that are
  not hashable, such as arrays, are compared by identity.
  """
  signature = inspect.signature(constructor)

  @functools.wraps(constructor)
  def construct(*args, **kwargs):
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = tuple((name, _hashable(value)) for name, value in bound.arguments.items())
    return dataclasses.replace(
      constructor(*args, **kwargs), built_by=(constructor.__qualname__, arguments)
    )

  return construct


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Method(_ByValue):
  """A distillation method: a frozen record of pure functions.

  Methods from the constructors of this package (`kip`, `dm`, ...) are equal if their arguments are;
  other methods are equal if their functions are the same objects.

  Attributes:
    name: for logs and artifacts.
    init_params: `support -> params`, a dict of arrays with everything that is learned.
    support: `(params, aux) -> Support`, the current distilled set.
    trainable: `params -> {name: factor}`: the learning rate of each parameter as a factor of that of
      the optimizer (True is 1); parameters with 0 or False stay constant.
    loss: `(params, aux, batch, weights, key) -> (scalar, LossInfo)`. For methods with a loss per target
      the scalar is mean(weights * per_example); other methods document their use of the weights.
    init_aux: `(key, params) -> aux`: random networks, a pool of networks, expert parameters, or ().
    update_aux: `(key, params, aux, step) -> aux`: redraw or train them after a step.
    built_by: set by constructors; determines equality.

  Keys are the same on every device, so that `aux` is too.
  """

  name: str
  init_params: Callable[[Support], Params]
  support: Callable[[Params, Any], Support]
  trainable: Callable[[Params], dict[str, float]]
  loss: Callable[..., tuple[Array, LossInfo]]
  init_aux: Callable[[Array, Params], Any] = lambda key, params: ()
  update_aux: Callable[..., Any] = lambda key, params, aux, step: aux
  built_by: tuple | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sampler(_ByValue):
  """A sampling distribution of target batches: a frozen record of pure functions.

  Rows are grouped by class (`targets.arrange_targets`). Equality is that of `Method`.

  Attributes:
    name: for logs and artifacts.
    init: `(class_counts (c,) int32, capacity) -> state`, from the number of rows of each class, in order,
      and the number of row slots, padding included.
    draw: `(key, state, size) -> (indices (size,), weights (size,))`; the sampler documents the
      expectation of mean(w_i f_i) over a draw.
    update: `(state, indices, labels (size, c), LossInfo) -> state` after each step.
    refresh_every: steps after which the loop scores all rows and passes them to `update`; 0: never.
    metrics: `state -> {name: array}`, quantities to log; means over the devices are recorded.
    scores: `state -> (capacity,)`, the latest score of each row, NaN without one; None if rows have no scores.
    regroup: `(state, before, scores (capacity,)) -> state`: an initial state with the scores of a run on
      another number of devices, whose states `before` have a leading axis; None if there is nothing to keep.
    built_by: set by constructors; determines equality.
  """

  name: str
  init: Callable[[Array, int], Any]
  draw: Callable[[Array, Any, int], tuple[Array, Array]]
  update: Callable[..., Any] = lambda state, indices, labels, info: state
  refresh_every: int = 0
  metrics: Callable[[Any], dict[str, Array]] = lambda state: {}
  scores: Callable[[Any], Array] | None = None
  regroup: Callable[[Any, Any, Array], Any] | None = None
  built_by: tuple | None = None


def sum_over_devices(batch: Batch, sums):
  """Sums over the devices that share a batch; the identity on one device.

  Args:
    batch: the part of the batch on this device.
    sums: tree of additive arrays, such as weighted sums over the targets of each class.

  Returns:
    A tree of the same structure.
  """
  return sums if batch.axis_name is None else jax.lax.psum(sums, batch.axis_name)
