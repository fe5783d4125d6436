"""What a distillation method and a target sampler are: small tuples of pure functions.

A method says what a distilled set should be good for; a sampler says which targets
to learn from next; an initialiser (`coreset.py`) says where to start. The loop
(`loop.py`) joins any of the one with any of the others.
"""

from typing import Any, Callable, NamedTuple

from kipcore.types import Array, Support

Params = dict[str, Array]


class Batch(NamedTuple):
  """Targets: inputs `(t, ...)` and labels `(t, c)`."""

  x: Array
  y: Array


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
    name: for logs and artefacts.
    init_params: `support -> params`, a dict of arrays: all that the method learns.
    support: `params -> Support`, the inverse.
    trainable: `params -> {name: bool}`; what is False stays as it is.
    loss: `(params, aux, batch, weights, key) -> (scalar, LossInfo)`, where the scalar is
      mean(weights * per_example).
    init_aux: `key -> aux`: random networks, a pool, expert checkpoints, or ().
    update_aux: `(key, params, aux, step) -> aux`: redraw or train them.
  """

  name: str
  init_params: Callable[[Support], Params]
  support: Callable[[Params], Support]
  trainable: Callable[[Params], dict[str, bool]]
  loss: Callable[..., tuple[Array, LossInfo]]
  init_aux: Callable[[Array], Any] = lambda key: ()
  update_aux: Callable[..., Any] = lambda key, params, aux, step: aux


class Sampler(NamedTuple):
  """A law of target batches. Rows are grouped by class: see `targets.arrange_targets`.

  Attributes:
    name: for logs and artefacts.
    init: `(class_counts (c,) int32, capacity) -> state`: rows of each class, in order, and
      the number of row slots, padding included.
    draw: `(key, state, size) -> (indices (size,), weights (size,))`; mean(w_i f_i) over
      the draw has the expectation that the sampler documents.
    update: `(state, indices, labels (size, c), LossInfo) -> state` after each step.
    refresh_every: steps after which the loop scores all rows and passes them to `update`; 0 for never.
  """

  name: str
  init: Callable[[Array, int], Any]
  draw: Callable[[Array, Any, int], tuple[Array, Array]]
  update: Callable[..., Any] = lambda state, indices, labels, info: state
  refresh_every: int = 0
