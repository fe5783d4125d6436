"""What a distillation method and a target sampler are: small tuples of pure functions.

A method says what a distilled set should be good for; a sampler says which targets
to learn from next; an initializer (`coreset.py`) says where to start. The loop
(`loop.py`) joins any of the one with any of the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kipcore.types import Array, Support

Params = dict[str, Array]


class Batch(NamedTuple):
  """Targets: inputs `(t, ...)` and labels `(t, c)`.

  `axis_name` is the mapped device axis over which a batch is divided, None on one device; methods
  whose loss is no mean over targets sum their statistics over it (`across`).
  """

  x: Array
  y: Array
  axis_name: str | None = None


class LossInfo(NamedTuple):
  """What a loss reports beside its value.

  Attributes:
    per_example: `(t,)` unweighted losses.
    predictions: `(t, c)` in the convention of the labels, which samplers score.
    accuracy: scalar in [0, 1] on the batch.
    status: int32 scalar, `types.Status`.
  """

  per_example: Array
  predictions: Array
  accuracy: Array
  status: Array


class Method(NamedTuple):
  """A distillation method.

  Attributes:
    name: for logs and artifacts.
    init_params: `support -> params`, a dict of arrays: all that the method learns.
    support: `(params, aux) -> Support`, the inverse.
    trainable: `params -> {name: factor}`: the learning rate of each as a factor of the
      optimizer's (True is 1); what is 0 or False stays as it is.
    loss: `(params, aux, batch, weights, key) -> (scalar, LossInfo)`. Of KIP-like methods the scalar is
      mean(weights * per_example); others weigh the targets in their own way and say how.
    init_aux: `(key, params) -> aux`: random networks, a pool, expert checkpoints, or ().
    update_aux: `(key, params, aux, step) -> aux`: redraw or train them, after the step was taken.

  Keys are the same on every device, so that `aux` is.
  """

  name: str
  init_params: Callable[[Support], Params]
  support: Callable[[Params, Any], Support]
  trainable: Callable[[Params], dict[str, float]]
  loss: Callable[..., tuple[Array, LossInfo]]
  init_aux: Callable[[Array, Params], Any] = lambda key, params: ()
  update_aux: Callable[..., Any] = lambda key, params, aux, step: aux


class Sampler(NamedTuple):
  """A law of target batches. Rows are grouped by class: see `targets.arrange_targets`.

  Attributes:
    name: for logs and artifacts.
    init: `(class_counts (c,) int32, capacity) -> state`: rows of each class, in order, and
      the number of row slots, padding included.
    draw: `(key, state, size) -> (indices (size,), weights (size,))`; mean(w_i f_i) over
      the draw has the expectation that the sampler documents.
    update: `(state, indices, labels (size, c), LossInfo) -> state` after each step.
    refresh_every: steps after which the loop scores all rows and passes them to `update`; 0 for never.
    metrics: `state -> {name: array}`, what is to be logged of a state; means over the devices are recorded.
    scores: `state -> (capacity,)`, the latest score of each row, NaN where it has none; None where rows have no scores.
    regroup: `(state, before, scores (capacity,)) -> state`: a first state with what was known before on another number of
      devices, the states of which `before` holds with a leading axis; None where there is nothing to keep.
  """

  name: str
  init: Callable[[Array, int], Any]
  draw: Callable[[Array, Any, int], tuple[Array, Array]]
  update: Callable[..., Any] = lambda state, indices, labels, info: state
  refresh_every: int = 0
  metrics: Callable[[Any], dict[str, Array]] = lambda state: {}
  scores: Callable[[Any], Array] | None = None
  regroup: Callable[[Any, Any, Array], Any] | None = None


def across(batch: Batch, sums):
  """Sums over the devices that share a batch; the identity on one device.

  Args:
    batch: of this device.
    sums: arrays that add up, such as weighted sums over the targets of each class.

  Returns:
    The same tree.
  """
  return sums if batch.axis_name is None else jax.lax.psum(sums, batch.axis_name)
