"""A run between two steps, on the host: taken from the devices, and laid out over them again.

Every random draw of a run depends on (key, step, device) alone. So a snapshot needs no generator, and a run that goes on from
one on as many devices equals the uninterrupted run bit for bit. On another number of devices rows are dealt out anew, with
their scores; the mathematics is the same, the draws are not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from kipcore.devices import AXIS, Axis, pmap
from kipcore.distillation.method import Sampler
from kipcore.distillation.targets import deal_rows, gather_rows, scatter_rows


class Snapshot(NamedTuple):
  """What the steps to come need, in host memory.

  Attributes:
    arrays: the leaves of the `DistillState`, in their order; those of the sampler `(D, ...)`, of all devices.
    step: steps done.
    num_devices: D.
    history: what was logged so far.
    seconds: the time of the steps so far.
  """

  arrays: list[np.ndarray]
  step: int
  num_devices: int
  history: list
  seconds: float


class CheckpointPolicy(NamedTuple):
  """When and how a loop keeps snapshots.

  Attributes:
    save: called with a `Snapshot`, in every process; an exception of it ends the loop.
    seconds: at most so long between two of them, give or take a call to the devices; 0 for one after every call.
    stop: asked between calls; once it says True in one process, all of them save a snapshot and end.
  """

  save: Callable[[Snapshot], None]
  seconds: float = 60.0
  stop: Callable[[], bool] = lambda: False


def default_log_steps(num_steps: int) -> list[int]:
  """Early and then ever rarer steps, for a readable curve: 1, 2, 5, 10, 20, 50, 100, then 20 more."""
  early = [s for s in (1, 2, 5, 10, 20, 50, 100) if s <= num_steps]
  stride = max(100, -(-num_steps // 2000) * 100)
  return early + list(range(stride, num_steps + 1, stride))


def scale_learning_rate(snapshot: Snapshot, factor: float) -> Snapshot:
  """The snapshot with all updates to come multiplied by a factor more, for a run whose numbers failed after it.

  Args:
    snapshot: from before the failure.
    factor: in (0, 1].

  Returns:
    `Snapshot`.

  Raises:
    ValueError: for a factor out of range.
  """
  if not 0 < factor <= 1:
    raise ValueError(f"factor: expected a number in (0, 1], got {factor}")
  *others, rate_scale = snapshot.arrays  # the last field of the state
  return snapshot._replace(arrays=[*others, np.asarray(factor * rate_scale, rate_scale.dtype)])


def take(state, axis: Axis, history: list, seconds: float) -> Snapshot:
  """The snapshot of a mapped state, every leaf of which has a leading axis over the local devices."""
  once = jax.tree.map(lambda leaf: np.asarray(leaf[0]), state._replace(sampler=()))
  arrays = jax.tree.leaves(once._replace(sampler=_of_all_devices(state.sampler, axis)))
  return Snapshot(arrays, int(once.step), axis.size, [dict(line) for line in history], seconds)


def row_scores(state, sampler: Sampler, axis: Axis, labels: np.ndarray, key) -> np.ndarray | None:
  """The sampler's latest score of each row, `(n,)` in their first order, NaN where it has none; None where rows have no scores.

  Args:
    state: the mapped state of a run.
    sampler, axis, labels, key: as for `lay_out`.
  """
  if sampler.scores is None:
    return None
  return _scores_in_order(
    _of_all_devices(state.sampler, axis), sampler, deal_rows(labels, axis.size, key)
  )


def _of_all_devices(tree, axis: Axis):
  """Leaves `(D, ...)` on the host, of the devices of other processes too."""
  if axis.local != axis.size:
    tree = jax.tree.map(lambda leaf: leaf[0], pmap(_gather, axis)(tree))
  return jax.tree.map(np.asarray, tree)


def _gather(tree):
  return jax.lax.all_gather(tree, AXIS)


def _scores_in_order(states, sampler: Sampler, shards) -> np.ndarray:
  return gather_rows(shards, np.asarray(jax.vmap(sampler.scores)(states)))


def lay_out(snapshot: Snapshot, fresh, sampler: Sampler, axis: Axis, labels: np.ndarray, key):
  """The mapped state of a snapshot.

  Args:
    snapshot: of the same run, on any number of devices.
    fresh: the mapped state of its beginning, on these devices.
    sampler: of the run.
    axis: these devices.
    labels: `(n,)` classes of the target rows.
    key: with which they were dealt out.

  Returns:
    A state like `fresh`.

  Raises:
    ValueError: for a snapshot of another run: other parameters, shapes or dtypes.
  """
  structure = jax.tree.structure(fresh)
  if structure.num_leaves != len(snapshot.arrays):
    raise ValueError(
      f"snapshot: expected the {structure.num_leaves} arrays of this run, got {len(snapshot.arrays)}"
    )
  saved = jax.tree.unflatten(structure, snapshot.arrays)
  learned, first = saved._replace(sampler=()), fresh._replace(sampler=())
  _check_alike(learned, jax.tree.map(lambda leaf: leaf[0], first))
  state = jax.tree.map(lambda leaf, value: np.broadcast_to(value, leaf.shape), first, learned)
  if snapshot.num_devices == axis.size:
    mine = jax.tree.map(lambda leaf: leaf[axis.own], saved.sampler)
    _check_alike(mine, fresh.sampler)
    return state._replace(sampler=mine)
  if sampler.regroup is None:
    return state._replace(sampler=fresh.sampler)
  shards = deal_rows(labels, snapshot.num_devices, key)
  capacity = jax.eval_shape(jax.vmap(sampler.scores), saved.sampler).shape
  if capacity != (len(shards), max(map(len, shards))):
    raise ValueError(
      f"snapshot: expected scores of {len(shards)} devices with {max(map(len, shards))} rows, got shape {capacity}"
    )
  slots = jax.eval_shape(jax.vmap(sampler.scores), fresh.sampler).shape[1]
  scores = scatter_rows(
    deal_rows(labels, axis.size, key), _scores_in_order(saved.sampler, sampler, shards), slots
  )[axis.own]
  return state._replace(
    sampler=jax.vmap(sampler.regroup, (0, None, 0))(fresh.sampler, saved.sampler, scores)
  )


def _check_alike(tree, like) -> None:
  """ValueError where an array has not the shape or dtype of its counterpart."""
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like)):
    if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
      raise ValueError(
        f"snapshot: expected {jax.tree_util.keystr(path)} of this run, {other.dtype} {other.shape}, got {leaf.dtype} {leaf.shape}"
      )
