"""The state of a run between two steps, on the host: saved from the devices and restored to them.

Every random draw of a run is a function of (key, step, device). So a snapshot needs no random state, and a run that
resumes on the same number of devices is bit-identical to the uninterrupted one. On another number of devices the rows and
their scores are redistributed: the distributions are the same, the draws are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kipcore import checks
from kipcore.devices import AXIS, Axis, first, over_devices
from kipcore.distillation.method import Sampler
from kipcore.distillation.targets import deal_rows, gather_rows, scatter_rows


class Snapshot(NamedTuple):
  """The state of a run, in host memory.

  Attributes:
    arrays: the leaves of the `DistillState`, in order; those of the sampler have a leading axis over all D devices.
    step: steps done.
    num_devices: D.
    history: the records logged so far.
    seconds: time of the steps so far.
  """

  arrays: list[np.ndarray]
  step: int
  num_devices: int
  history: list
  seconds: float


class CheckpointPolicy(NamedTuple):
  """When and how the loop saves snapshots.

  Attributes:
    save: called with a `Snapshot`, in every process; its exceptions end the loop.
    seconds: interval between snapshots, to within one call to the devices; 0 for one after every call.
    stop: called between calls to the devices; if it returns True in one process, all processes save a snapshot and end.
  """

  save: Callable[[Snapshot], None]
  seconds: float = 60.0
  stop: Callable[[], bool] = lambda: False


def default_log_steps(num_steps: int) -> list[int]:
  """Increasingly sparse steps for a learning curve: 1, 2, 5, 10, 20, 50, 100, then about 20 more."""
  early = [s for s in (1, 2, 5, 10, 20, 50, 100) if s <= num_steps]
  stride = max(100, -(-num_steps // 2000) * 100)
  return early + list(range(stride, num_steps + 1, stride))


def scale_learning_rate(snapshot: Snapshot, factor: float) -> Snapshot:
  """Returns the snapshot with all later updates multiplied by a factor, to resume before a numerical failure.

  Args:
    snapshot: from before the failure.
    factor: in (0, 1].

  Returns:
    `Snapshot`.

  Raises:
    ValueError, TypeError: for a factor out of range.
  """
  factor = checks.number("factor", factor, 0, 1, above=True)
  *others, rate_scale = snapshot.arrays  # the last field of the state
  return snapshot._replace(arrays=[*others, np.asarray(factor * rate_scale, rate_scale.dtype)])


def take(state: Any, axis: Axis, history: list, seconds: float) -> Snapshot:
  """Copies a mapped state, whose leaves have a leading axis over the local devices, to the host."""
  once = jax.tree.map(np.asarray, first(state._replace(sampler=())))
  arrays = jax.tree.leaves(once._replace(sampler=_of_all_devices(state.sampler, axis)))
  return Snapshot(arrays, int(once.step), axis.size, [dict(line) for line in history], seconds)


def row_scores(
  state: Any, sampler: Sampler, axis: Axis, labels: np.ndarray, key: Any
) -> np.ndarray | None:
  """The sampler's latest score of each row, `(n,)` in the original order.

  NaN for rows without a score; None if the sampler does not keep scores.

  Args:
    state: the mapped state of a run.
    sampler, axis, labels, key: as for `lay_out`.
  """
  return _scores_in_order(
    _of_all_devices(state.sampler, axis), sampler, deal_rows(labels, axis.size, key)
  )


def _of_all_devices(tree: Any, axis: Axis) -> Any:
  """Leaves `(D, ...)` on the host, including those of other processes."""
  if axis.local != axis.size:
    tree = first(over_devices(_gather, axis)(tree))
  return jax.tree.map(np.asarray, tree)


def _gather(tree: Any) -> Any:
  return jax.lax.all_gather(tree, AXIS)


def _scores_in_order(states: Any, sampler: Sampler, shards: list[np.ndarray]) -> np.ndarray | None:
  scores = jax.vmap(sampler.scores)(states)
  return None if scores is None else gather_rows(shards, np.asarray(scores))


def restore(
  snapshot: Snapshot, fresh: Any, sampler: Sampler, axis: Axis, labels: np.ndarray, key: Any
) -> Any:
  """The mapped state of a snapshot.

  Args:
    snapshot: of the same run, on any number of devices.
    fresh: the mapped initial state of the run on these devices.
    sampler: of the run.
    axis: these devices.
    labels: `(n,)` classes of the target rows.
    key: with which they were distributed.

  Returns:
    A state like `fresh`.

  Raises:
    ValueError: for a snapshot of another run: other parameters, shapes or dtypes.
  """
  structure: Any = jax.tree.structure(fresh)
  if structure.num_leaves != len(snapshot.arrays):
    raise ValueError(
      f"snapshot: expected the {structure.num_leaves} arrays of this run, got {len(snapshot.arrays)}"
    )
  saved = jax.tree.unflatten(structure, snapshot.arrays)
  learned, initial = saved._replace(sampler=()), fresh._replace(sampler=())
  _check_same_types(learned, jax.tree.map(lambda leaf: leaf[0], initial))
  state = jax.tree.map(lambda leaf, value: np.broadcast_to(value, leaf.shape), initial, learned)
  if snapshot.num_devices == axis.size:
    mine = jax.tree.map(lambda leaf: leaf[axis.own], saved.sampler)
    _check_same_types(mine, fresh.sampler)
    return state._replace(sampler=mine)
  found = jax.eval_shape(jax.vmap(sampler.scores), saved.sampler)
  if found is None:
    return state._replace(sampler=fresh.sampler)
  shards, capacity = deal_rows(labels, snapshot.num_devices, key), found.shape
  if capacity != (len(shards), max(map(len, shards))):
    raise ValueError(
      f"snapshot: expected scores of shape {(len(shards), max(map(len, shards)))}, got {capacity}"
    )
  slots = jax.eval_shape(jax.vmap(sampler.scores), fresh.sampler).shape[1]
  in_order: Any = _scores_in_order(saved.sampler, sampler, shards)
  scores: Any = scatter_rows(deal_rows(labels, axis.size, key), in_order, slots)[axis.own]
  return state._replace(
    sampler=jax.vmap(sampler.regroup, (0, None, 0))(fresh.sampler, saved.sampler, scores)
  )


def _check_same_types(tree: Any, like: Any) -> None:
  """Raises ValueError if the shape or dtype of an array differs from its counterpart's."""
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like)):
    if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
      raise ValueError(
        f"snapshot: expected {jax.tree_util.keystr(path)} of this run, {other.dtype} {other.shape}, got {leaf.dtype} {leaf.shape}"
      )
