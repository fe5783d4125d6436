"""The two interfaces of distillation: `Method` (what is learned) and `Sampler` (which targets are drawn).

Both are configurations: immutable, hashable and compared by value, so that `jax.jit` compiles once for equal ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Float, Int

from kipcore.types import Array, Integer, LossInfo, Support

Params = dict[str, Array]


def compiled(*static: str) -> Callable:
  """Decorator of a method of a configuration: it is compiled once per shape and value of the configuration.

  Without it, a call outside `jit` compiles each `cond`, `scan` or `map` over a closure again.

  Args:
    static: names of arguments that are numbers, such as sizes.
  """
  return functools.partial(jax.jit, static_argnames=("self", *static))


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["x", "y"], meta_fields=["axis_name"]
)
@dataclasses.dataclass(frozen=True)
class Batch:
  """Targets of one step on one device.

  Attributes:
    x: `(t, ...)` inputs.
    y: `(t, c)` labels.
    axis_name: name of the mapped device axis over which the batch is divided, None on one device. It is
      static metadata of the pytree. Methods whose loss is not a mean over targets use it through `sum_over_devices`.
  """

  x: Array
  y: Array
  axis_name: str | None = None


class _Functions:
  """Instances hold functions in place of methods; they are immutable and equal if their entries are."""

  def __setattr__(self, name, value):
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

  def __eq__(self, other):
    return type(self) is type(other) and vars(self) == vars(other)

  def __hash__(self):
    return hash((type(self), *vars(self).items()))

  def __repr__(self):
    return f"{type(self).__bases__[1].__name__}(name={vars(self)['name']!r})"


class Method:
  """A distillation method: what is learned, and the loss that it is learned by.

  Subclass it as a frozen dataclass, whose fields are the settings. Only `loss` has no default; the others learn the
  inputs and keep the labels. Alternatively build one from functions that have the signatures of these methods,
  `Method(name, init_params, support, trainable, loss, init_aux=None, update_aux=None)`; two such methods are equal
  if they have the same functions. All methods are pure, and keys are the same on every device.

  Attributes:
    name: used in logs and artifacts.

  Example:
    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class ClassMeans(kipcore.Method):
    ...   scale: float = 1.0
    ...   name = "class_means"
    ...
    ...   def loss(self, params, aux, batch, weights, key):
    ...     per_example = self.scale * jnp.sum((batch.x - batch.y @ params["x"]) ** 2, axis=1)
    ...     zero = jnp.zeros(())
    ...     info = kipcore.LossInfo(per_example, batch.y, zero, jnp.int32(0))
    ...     return jnp.mean(weights * per_example), info
    >>> ClassMeans() == ClassMeans(), ClassMeans() == ClassMeans(2.0)
    (True, False)
  """

  name: str = "method"

  def __new__(cls, *args, **kwargs):
    return object.__new__(_FunctionMethod if cls is Method else cls)

  def init_params(self, support: Support) -> Params:
    """Everything that the method learns, as a dict of arrays."""
    return {"x": support.x, "y": support.y}

  def support(self, params: Params, aux: Any) -> Support:
    """The distilled set; the inverse of `init_params`."""
    return Support(params["x"], params["y"])

  def trainable(self, params: Params) -> Mapping[str, float]:
    """The learning rate of each parameter as a multiple of the optimizer's; 0 or False keeps it constant."""
    return {name: float(name == "x") for name in params}

  def loss(
    self,
    params: Params,
    aux: Any,
    batch: Batch,
    weights: Float[Array, " t"],
    key: Any,
  ) -> tuple[Float[Array, ""], LossInfo]:
    """The loss of a batch with importance weights.

    Methods like KIP return mean(weights * per_example); others document how the weights act.
    """
    raise NotImplementedError(f"{type(self).__name__}.loss is not implemented")

  def init_aux(self, key: Array, params: Params) -> Any:
    """Auxiliary state: random networks, a pool of networks, or () for none."""
    return ()

  def update_aux(self, key: Array, params: Params, aux: Any, step: Integer) -> Any:
    """The auxiliary state after step number `step`, e.g. with networks redrawn or trained."""
    return aux


class _FunctionMethod(_Functions, Method):
  """A `Method` built from functions."""

  def __init__(
    self,
    name: str,
    init_params: Callable[[Support], Params],
    support: Callable[[Params, Any], Support],
    trainable: Callable[[Params], Mapping[str, float]],
    loss: Callable[..., tuple[Array, LossInfo]],
    init_aux: Callable[[Array, Params], Any] | None = None,
    update_aux: Callable[..., Any] | None = None,
  ):
    optional = {"init_aux": init_aux, "update_aux": update_aux}
    vars(self).update(
      name=name,
      init_params=init_params,
      support=support,
      trainable=trainable,
      loss=loss,
      **{name: function for name, function in optional.items() if function is not None},
    )


class Sampler:
  """A sampling distribution of target batches, over rows that are grouped by class (`arrange_targets`).

  Subclass it as a frozen dataclass, or build one from functions that have the signatures of these methods,
  `Sampler(name, init, draw, update=None, refresh_every=0, metrics=None, scores=None, regroup=None)`.
  All methods are pure.

  Attributes:
    name: used in logs and artifacts.
    refresh_every: steps after which the loop scores all rows and passes them to `update`; 0 for never.
    weight_exponent: the weights are unbiased ones to this power; the logged accuracy undoes it. 0 for no weights.
  """

  name: str = "sampler"
  refresh_every: int = 0
  weight_exponent: float = 1.0

  def __new__(cls, *args, **kwargs):
    return object.__new__(_FunctionSampler if cls is Sampler else cls)

  def init(self, class_counts: Int[Array, " c"], capacity: int) -> Any:
    """The first state, from the rows of each class, in order, and the number of rows with padding."""
    raise NotImplementedError(f"{type(self).__name__}.init is not implemented")

  def draw(
    self, key: Array, state: Any, size: int
  ) -> tuple[Int[Array, " size"], Float[Array, " size"]]:
    """Indices and weights of a batch; the sampler documents the expectation of mean(w_i f_i)."""
    raise NotImplementedError(f"{type(self).__name__}.draw is not implemented")

  def update(
    self, state: Any, indices: Int[Array, " t"], labels: Float[Array, "t c"], info: LossInfo
  ) -> Any:
    """The state after a step on the rows `indices`."""
    return state

  def metrics(self, state: Any) -> dict[str, Array]:
    """What is logged; means over the devices are recorded."""
    return {}

  def scores(self, state: Any) -> Float[Array, " capacity"] | None:
    """The latest score of each row, NaN for rows without one; None if the sampler does not keep scores."""
    return None

  def regroup(self, state: Any, previous: Any, scores: Float[Array, " capacity"]) -> Any:
    """A first state with the scores of a run on another number of devices.

    Args:
      state: of `init`.
      previous: the states of the devices before, with a leading device axis.
      scores: of this device's rows, NaN for rows without one.
    """
    return state


class _FunctionSampler(_Functions, Sampler):
  """A `Sampler` built from functions."""

  def __init__(
    self,
    name: str,
    init: Callable[[Array, int], Any],
    draw: Callable[[Array, Any, int], tuple[Array, Array]],
    update: Callable[..., Any] | None = None,
    refresh_every: int = 0,
    metrics: Callable[[Any], dict[str, Array]] | None = None,
    scores: Callable[[Any], Array] | None = None,
    regroup: Callable[[Any, Any, Array], Any] | None = None,
  ):
    optional = {"update": update, "metrics": metrics, "scores": scores, "regroup": regroup}
    vars(self).update(
      name=name,
      init=init,
      draw=draw,
      refresh_every=refresh_every,
      **{name: function for name, function in optional.items() if function is not None},
    )


def sum_over_devices(batch: Batch, sums: Any) -> Any:
  """Sums a tree of arrays over the devices that share a batch; the identity on one device."""
  return sums if batch.axis_name is None else jax.lax.psum(sums, batch.axis_name)
