"""The distillation loop: pure steps, mapped over devices, driven from the host.

Target rows are divided over the devices; what is learned is replicated. Each device
draws its share of the batch from its own rows, and gradients are averaged. Every
random draw depends on (key, step, device) alone, so a run can be continued from any
state and equals an uninterrupted one.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kipcore import checks, keys, linalg
from kipcore.devices import AXIS, Axis, device_axis, pmap
from kipcore.distillation import snapshot
from kipcore.distillation.method import Batch, Method, Params, Sampler
from kipcore.distillation.optimizers import adam  # noqa: F401, where callers look for it
from kipcore.distillation.snapshot import CheckpointPolicy, Snapshot, default_log_steps
from kipcore.distillation.targets import Targets, arrange_targets
from kipcore.types import Array, NumericalError, Status, Support

_MAX_STEPS = 1000  # in one call to the devices


class Distiller(NamedTuple):
  """The fixed parts of a run.

  Attributes:
    method: what to learn, e.g. `kip.kip(kernel_fn)`.
    sampler: which targets to learn from, e.g. `samplers.uniform()`.
    optimizer: any optax transformation, over the trainable part of the parameters.
    batch_size: targets a step, over all devices.
  """

  method: Method
  sampler: Sampler
  optimizer: optax.GradientTransformation
  batch_size: int


class DistillState(NamedTuple):
  """What the next step needs. `step` is the number of steps done; `rate_scale`, 1 at first, multiplies all updates."""

  params: Params
  opt_state: Any
  aux: Any
  sampler: Any
  step: Array
  rate_scale: Array


class DistillInfo(NamedTuple):
  """What a reader wants to log of a step, all scalars; `accuracy` is of the batch, before the update."""

  loss: Array
  accuracy: Array
  gradient_norm: Array
  status: Array


class DistillResult(NamedTuple):
  """`support` learned, final `state` (of the first device), `history` (a dict a logged step), `compile_seconds`.

  `state.step` says whether all steps were done, or `CheckpointPolicy.stop` ended the run before.

  `seconds` is the time of the steps, without compilation and callbacks. `scores` `(n,)` has the sampler's latest score
  of each target row, in the order of `x_target`, NaN where a row was never drawn; None for a sampler without scores.
  """

  support: Support
  state: DistillState
  history: list
  compile_seconds: float
  seconds: float
  scores: np.ndarray | None = None


def distill_init(
  key, distiller: Distiller, support: Support, class_counts: Array, capacity: int
) -> DistillState:
  """The state before the first step.

  Args:
    key: root key (or int seed).
    distiller: fixed parts of the run.
    support: starting inputs `(m, ...)` and labels `(m, c)`, floating.
    class_counts: `(c,)` rows of each class among the targets.
    capacity: rows of `Targets.x`, padding included.

  Returns:
    `DistillState`.

  Raises:
    ValueError, TypeError: for inputs and labels that disagree, or integers.
  """
  checks.same_rows("support.x", support.x, "support.y", support.y)
  checks.floating("support.x", support.x)
  checks.floating("support.y", support.y)
  params = distiller.method.init_params(support)
  opt_state = _optimizer(distiller, params).init(params)
  aux = distiller.method.init_aux(keys.stream(key, "aux"), params)
  return DistillState(
    params,
    opt_state,
    aux,
    distiller.sampler.init(class_counts, capacity),
    jnp.zeros((), jnp.int32),
    jnp.ones((), jax.tree.leaves(params)[0].dtype),
  )


def distill_step(
  key, distiller: Distiller, state: DistillState, targets: Targets, axis_name: str | None = None
) -> tuple[DistillState, DistillInfo]:
  """One update; pure, so that callers can jit, scan or map it.

  Args:
    key: root key, the same at every step.
    distiller: fixed parts of the run.
    state: from `distill_init` or the step before.
    targets: this device's rows, without the device axis.
    axis_name: name of the mapped device axis, None on one device.

  Returns:
    The next state, and `DistillInfo`.
  """
  num_devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
  step_key = keys.at_step(keys.stream(key, "step"), state.step)
  device_key = keys.at_step(step_key, 0 if axis_name is None else jax.lax.axis_index(axis_name))
  size = -(-distiller.batch_size // num_devices)
  state = _refresh(keys.stream(step_key, "loss"), distiller, state, targets, size, axis_name)
  indices, weights = distiller.sampler.draw(keys.stream(device_key, "draw"), state.sampler, size)
  batch = Batch(targets.x[indices], targets.y[indices], axis_name)
  weights = weights.astype(targets.y.dtype) * targets.share

  def loss_fn(params):
    return distiller.method.loss(params, state.aux, batch, weights, keys.stream(step_key, "loss"))

  (loss, info), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  means, status = (loss, info.accuracy, gradient), info.status
  if axis_name is not None:
    means = jax.lax.pmean(means, axis_name)
    status = jax.lax.pmax(status, axis_name)
  loss, accuracy, gradient = means
  norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
  with linalg.permissive_promotion():
    updates, opt_state = _optimizer(distiller, state.params).update(
      gradient, state.opt_state, state.params
    )
    params = optax.apply_updates(
      state.params, jax.tree.map(lambda update: state.rate_scale * update, updates)
    )
  aux = distiller.method.update_aux(keys.stream(step_key, "aux"), params, state.aux, state.step)
  sampler = distiller.sampler.update(state.sampler, indices, batch.y, info)
  # A failed factorization makes the loss NaN as well: the first cause is the one to report.
  not_finite = (status == Status.OK) & ~(jnp.isfinite(loss) & jnp.isfinite(norm))
  status = jnp.where(not_finite, Status.NOT_FINITE, status)
  return (
    DistillState(params, opt_state, aux, sampler, state.step + 1, state.rate_scale),
    DistillInfo(loss, accuracy, norm, status),
  )


def _refresh(
  key, distiller: Distiller, state: DistillState, targets: Targets, size: int, axis_name
) -> DistillState:
  """On the sampler's schedule, but not before the first step: all rows scored, in blocks of `size`."""
  every, capacity = distiller.sampler.refresh_every, targets.x.shape[0]
  if not every:
    return state

  def block(sampler, first):
    # The last block begins early enough to be whole; a row scored twice has the same score.
    rows = jnp.minimum(first, max(capacity - size, 0)) + jnp.arange(
      min(size, capacity), dtype=jnp.int32
    )
    batch = Batch(targets.x[rows], targets.y[rows], axis_name)
    weights = jnp.ones(rows.shape, targets.y.dtype)
    _, info = distiller.method.loss(state.params, state.aux, batch, weights, key)
    return distiller.sampler.update(sampler, rows, batch.y, info), None

  def score_all(sampler):
    return jax.lax.scan(block, sampler, jnp.arange(0, capacity, size, dtype=jnp.int32))[0]

  due = (state.step > 0) & (state.step % every == 0)
  return state._replace(
    sampler=jax.lax.cond(due, score_all, lambda sampler: sampler, state.sampler)
  )


def scoring_evaluations(distiller: Distiller, num_rows: int, num_steps: int) -> int:
  """Target evaluations that refreshes of the sampler add to `num_steps` batches.

  Args:
    distiller: fixed parts of the run.
    num_rows: all target rows.
    num_steps: steps of the run.

  Returns:
    A number of rows.
  """
  every = distiller.sampler.refresh_every
  return max(num_steps - 1, 0) // every * num_rows if every else 0


def distill(
  key,
  distiller: Distiller,
  support: Support,
  x_target,
  y_target,
  num_steps: int,
  devices: Sequence[jax.Device] | None = None,
  log_steps: Sequence[int] | None = None,
  callback: Callable[[int, Support, dict], None] | None = None,
  progress: Callable[[int], None] | None = None,
  compiled: Callable[[Any], None] | None = None,
  checkpoint_policy: CheckpointPolicy | None = None,
  resume: Snapshot | None = None,
) -> DistillResult:
  """Distills: `num_steps` updates of the support towards the targets.

  Args:
    key: root key (or int seed); equal keys on equal numbers of devices give equal runs.
    distiller: fixed parts of the run.
    support: where to start, `(m, ...)` and `(m, c)`.
    x_target: `(n, ...)` rows to learn from, floating host or device array.
    y_target: `(n, c)` labels in the convention of `support.y`.
    num_steps: >= 0.
    devices: one entry a shard; None for the first local device alone. Where several processes
      run (`jax.distributed.initialize`), every process calls this with the same arguments, all
      devices of all of them take part, and None is the only choice.
    log_steps: steps after which to log; None for `default_log_steps(num_steps)`.
    callback: called as `callback(step, support, record)` at logged steps, the first (0) and
      the last included; it may add to `record`, which has what `DistillInfo` has and the sampler's metrics.
    progress: called with the number of steps done, about once a second.
    compiled: called once with the compiled steps (`jax.stages.Compiled`, whose `memory_analysis` says what a device needs)
      before the first of them; where one process runs.
    checkpoint_policy: when and how to keep snapshots of the run, and whether it is to stop; None for neither.
    resume: a snapshot of a run with the same arguments, to go on from: on as many devices the result is that of the
      uninterrupted run, bit for bit.

  Returns:
    `DistillResult`.

  Raises:
    NumericalError: if a step met a failed factorization or a value that is not finite;
      it names the step.
    ValueError: for shapes that disagree, fewer rows than devices, devices beside several processes, or a snapshot of
      another run.
  """
  axis = device_axis(devices)
  if num_steps < 0:
    raise ValueError(f"num_steps: expected an integer >= 0, got {num_steps}")
  checks.positive_int("batch_size", distiller.batch_size)
  checks.shape("x_target", x_target, (None, *support.x.shape[1:]))
  checks.shape("y_target", y_target, (None, support.y.shape[1]))
  log_steps = sorted(
    {0, num_steps, *(default_log_steps(num_steps) if log_steps is None else log_steps)}
  )
  key = keys.canonical_key(key)
  dealt = np.argmax(np.asarray(y_target), axis=1), keys.stream(key, "arrange")
  targets = arrange_targets(x_target, y_target, axis.size, dealt[1], axis.own)
  init = jax.vmap(lambda counts: distill_init(key, distiller, support, counts, targets.x.shape[1]))
  state = init(jnp.asarray(targets.class_counts))
  history, done, seconds, record = [], 0, 0.0, {}
  if resume is not None:
    state = snapshot.lay_out(resume, state, distiller.sampler, axis, *dealt)
    history, done, seconds = [dict(line) for line in resume.history], resume.step, resume.seconds
    if done > num_steps:
      raise ValueError(
        f"resume: expected a snapshot of at most {num_steps} steps, got one of {done}"
      )
  run = _mapped(distiller, axis)
  started = time.perf_counter()
  raw_key = np.broadcast_to(jax.random.key_data(key), (axis.local, *jax.random.key_data(key).shape))
  # Placed on their devices once: otherwise every call would copy, and the second would compile anew.
  place = pmap(lambda tree: tree, axis)
  raw_key, state, targets = place((raw_key, state, targets))
  if compiled is not None:
    run = run.lower(raw_key, state, targets, axis.every(0), axis.every(0)).compile()
    compiled(run)
  # A call of no steps compiles, and nothing more.
  state, _, _, metrics = jax.block_until_ready(
    run(raw_key, state, targets, axis.every(0), axis.every(0))
  )
  compile_seconds = time.perf_counter() - started

  def ended():
    final, scores = _first(state), snapshot.row_scores(state, distiller.sampler, axis, *dealt)
    return DistillResult(
      distiller.method.support(final.params, final.aux),
      final,
      history,
      compile_seconds,
      seconds,
      scores,
    )

  pace, kept, due = 1, time.monotonic(), False
  for stop in log_steps:
    if resume is not None and stop <= resume.step:
      continue  # It is in the history.
    while done < stop:
      asked = checkpoint_policy is not None and checkpoint_policy.stop()
      overdue = (
        checkpoint_policy is not None and time.monotonic() - kept >= checkpoint_policy.seconds
      )
      started = time.perf_counter()
      state, infos, (count, due), metrics = run(
        raw_key,
        state,
        targets,
        axis.every(0 if asked else min(stop - done, pace)),
        axis.every(overdue),
      )
      count, due = int(np.asarray(count)[0]), bool(np.asarray(due)[0])
      infos = jax.tree.map(lambda a: np.asarray(a)[0, :count], infos)
      elapsed = time.perf_counter() - started
      seconds += elapsed
      done += int(np.sum(infos.status == Status.OK))
      if checkpoint_policy is not None and (
        not count or infos.status[-1] != Status.OK or due and done < stop
      ):
        checkpoint_policy.save(snapshot.take(state, axis, history, seconds))
        kept, due = time.monotonic(), False
      _raise_if_failed(infos, done)
      if not count:
        return ended()
      record = {
        name: float(value[-1]) for name, value in infos._asdict().items() if name != "status"
      }
      # About a second of work in a call: Python is no bottleneck, and progress is seen.
      pace = int(min(max(count / elapsed, 1), 2 * pace, _MAX_STEPS))
      if progress is not None:
        progress(done)
    logged = {name: np.asarray(value)[0].tolist() for name, value in metrics.items()}
    record = {"step": done, "seconds": seconds, **record, **logged}
    if callback is not None:
      callback(done, distiller.method.support(_first(state.params), _first(state.aux)), record)
    history.append(record)
    if checkpoint_policy is not None and (due or done == num_steps):
      checkpoint_policy.save(snapshot.take(state, axis, history, seconds))
      kept = time.monotonic()
  return ended()


@functools.lru_cache(maxsize=8)
def _mapped(distiller: Distiller, axis: Axis):
  """Steps on every device at once.

  The number of steps is an argument, so one compilation serves every distance between
  two logged steps, and every run of the same distiller.
  """

  def run(raw_key, state, targets, count, due):
    key = jax.random.wrap_key_data(raw_key)
    # Processes differ in speed, and so in how many steps they ask for; one that is to stop asks for none.
    count, due = jax.lax.pmin(count, AXIS), jax.lax.pmax(due, AXIS)

    def body(carry):
      i, state, infos, _ = carry
      after, info = distill_step(key, distiller, state, targets, AXIS)
      # The state before a step that fails is what there is to go on from.
      state = jax.tree.map(
        lambda new, old: jnp.where(info.status == Status.OK, new, old), after, state
      )
      infos = jax.tree.map(
        lambda buffer, value: buffer.at[i].set(value.astype(buffer.dtype)), infos, info
      )
      return i + 1, state, infos, info.status

    dtype = jax.tree.leaves(state.params)[0].dtype
    zeros = jnp.zeros((_MAX_STEPS,), dtype)
    infos = DistillInfo(zeros, zeros, zeros, jnp.zeros((_MAX_STEPS,), jnp.int32))
    going = lambda carry: (carry[0] < count) & (carry[3] == Status.OK)
    count, state, infos, _ = jax.lax.while_loop(
      going, body, (jnp.int32(0), state, infos, jnp.int32(Status.OK))
    )
    return state, infos, (count, due), jax.lax.pmean(distiller.sampler.metrics(state.sampler), AXIS)

  return pmap(run, axis, donate_argnums=(1,))


def _first(tree):
  """The copy of the first device."""
  return jax.tree.map(lambda a: a[0], tree)


def _optimizer(distiller: Distiller, params: Params) -> optax.GradientTransformation:
  """The optimizer, its updates scaled by the method's factor for each parameter."""
  factors = {name: float(factor) for name, factor in distiller.method.trainable(params).items()}
  scaled = {
    f: optax.chain(distiller.optimizer, optax.scale(f)) if f else optax.set_to_zero()
    for f in set(factors.values())
  }
  return optax.multi_transform(scaled, factors)


def _raise_if_failed(infos: DistillInfo, done: int) -> None:
  if infos.status.size and infos.status[-1] != Status.OK:
    try:
      checks.raise_for_status(f"distillation at step {done + 1}", infos.status[-1])
    except NumericalError as error:
      raise NumericalError(
        f"{error} (loss {infos.loss[-1]:.6g}, gradient norm {infos.gradient_norm[-1]:.6g})"
      ) from None
