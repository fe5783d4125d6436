"""The distillation loop: pure steps, mapped over devices and driven from the host.

Target rows are divided over the devices; everything learned is replicated. Each device draws its
share of the batch from its own rows, and gradients are averaged. Every random draw depends only on
(key, step, device), so a run can be resumed from any state and equals an uninterrupted one.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from kipcore import blocks, checks, keys, linalg
from kipcore.devices import AXIS, device_axis, first, over_devices
from kipcore.distillation import snapshot
from kipcore.distillation.method import Batch, Method, Params, Sampler
from kipcore.distillation.optimizers import Optimizer
from kipcore.distillation.snapshot import CheckpointPolicy, Snapshot, default_log_steps
from kipcore.distillation.targets import Targets, arrange_targets
from kipcore.types import Array, ArrayLike, Integer, NumericalError, Status, Support

_MAX_STEPS = 1000  # per call to the devices
_LEAST_EXPONENT = 1e-3  # the unbiased weights cannot be recovered from a smaller power of them


@dataclasses.dataclass(frozen=True)
class Distiller:
  """The constant parts of a run. Hashable; equal distillers share one compilation.

  Attributes:
    method: what is learned and how, such as `kip(kernel_fn)`.
    sampler: which targets to learn from, such as `sampler("cross_entropy")`.
    optimizer: an optax transformation for the trainable parameters. Optax transformations compare by
      identity, so pass the same object to share a compilation.
    batch_size: targets per step, over all devices.
  """

  method: Method
  sampler: Sampler
  optimizer: Optimizer
  batch_size: Integer

  def __post_init__(self):
    object.__setattr__(self, "batch_size", checks.integer("batch_size", self.batch_size, 1))


class DistillState(NamedTuple):
  """The input of the next step.

  Attributes:
    params: learned arrays by name.
    opt_state: state of the optimizer.
    aux: networks or other state of the method.
    sampler: state of the sampler.
    step: int32 scalar, steps done.
    rate_scale: scalar factor of all updates, initially 1.
  """

  params: Params
  opt_state: Any
  aux: Any
  sampler: Any
  step: Int[Array, "..."]
  rate_scale: Float[Array, "..."]


class DistillInfo(NamedTuple):
  """Scalars to log after a step.

  Attributes:
    loss: of the batch.
    accuracy: before the update, in [0, 1]: the estimate for all rows from the batch, sum_t w_t correct_t / sum_t w_t with
      unbiased importance weights. If the sampler has no weights, that of the batch.
    gradient_norm: Euclidean norm over all parameters.
    status: int32, `types.Status`.
  """

  loss: Float[Array, "..."]
  accuracy: Float[Array, "..."]
  gradient_norm: Float[Array, "..."]
  status: Int[Array, "..."]


class DistillResult(NamedTuple):
  """The result of a run.

  Attributes:
    support: the distilled set.
    state: final state, on the first device; `state.step` is less than `num_steps` if
      `CheckpointPolicy.stop` ended the run.
    history: one dictionary per logged step.
    compile_seconds: time of compilation.
    seconds: time of the steps, without compilation and callbacks.
    scores: `(n,)` latest score of each target row in the order of `x_target`, NaN for rows never
      drawn; None for a sampler without scores.
  """

  support: Support
  state: DistillState
  history: list
  compile_seconds: float
  seconds: float
  scores: np.ndarray | None = None


def distill_init(
  key, distiller: Distiller, support: Support, class_counts: Int[Array, " c"], capacity: int
) -> DistillState:
  """The state before the first step.

  Args:
    key: root key (or int seed).
    distiller: constant parts of the run.
    support: initial inputs `(m, ...)` and labels `(m, c)`, floating.
    class_counts: `(c,)` rows of each class among the targets.
    capacity: number of rows of `Targets.x`, padding included.

  Returns:
    `DistillState`.

  Raises:
    ValueError, TypeError: if inputs and labels disagree or are not floating.
  """
  checks.same_rows("support.x", support.x, "support.y", support.y)
  checks.floating("support.x", support.x)
  checks.floating("support.y", support.y)
  checks.rank("support.y", support.y, 2)
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
  """One update; pure, so that it can be jitted, scanned or mapped.

  A step whose status is not OK returns the state that it was given, so the last valid state is kept.

  Args:
    key: root key, the same at every step.
    distiller: constant parts of the run.
    state: from `distill_init` or the previous step.
    targets: the rows of this device, without the device axis.
    axis_name: name of the mapped device axis, None on one device.

  Returns:
    The next state, and `DistillInfo`.
  """
  return _distill_step(keys.canonical_key(key), distiller, state, targets, axis_name)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _distill_step(key, distiller, state, targets, axis_name):
  num_devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
  step_key = keys.at_step(keys.stream(key, "step"), state.step)
  device_key = keys.at_step(step_key, 0 if axis_name is None else jax.lax.axis_index(axis_name))
  size = -(-distiller.batch_size // num_devices)
  given_sampler = state.sampler
  state = _refresh(keys.stream(step_key, "loss"), distiller, state, targets, size, axis_name)
  indices, weights = distiller.sampler.draw(keys.stream(device_key, "draw"), state.sampler, size)
  batch = Batch(targets.x[indices], targets.y[indices], axis_name)
  exponent = distiller.sampler.weight_exponent
  weights = weights.astype(targets.y.dtype)
  unbiased = (weights ** (1 / exponent) if exponent > _LEAST_EXPONENT else weights) * targets.share
  weights = weights * targets.share

  def loss_fn(params):
    return distiller.method.loss(params, state.aux, batch, weights, keys.stream(step_key, "loss"))

  (loss, info), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  correct = jnp.argmax(info.predictions, axis=1) == jnp.argmax(batch.y, axis=1)
  mass = jnp.mean(unbiased)
  means = loss, jnp.mean(jnp.where(correct, unbiased, 0)), mass, gradient
  status = info.status
  if axis_name is not None:
    means = jax.lax.pmean(means, axis_name)
    status = jax.lax.pmax(status, axis_name)
  loss, correct_mass, mass, gradient = means
  accuracy = correct_mass / jnp.where(mass > 0, mass, 1)
  norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
  with linalg.permissive_promotion():
    updates, opt_state = _optimizer(distiller, state.params).update(
      gradient, state.opt_state, state.params
    )
    params = optax.apply_updates(
      state.params, jax.tree.map(lambda update: state.rate_scale * update, updates)
    )
  # A failed factorization makes the loss NaN as well: the first cause is reported.
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  for leaf in jax.tree.leaves(params):
    finite &= jnp.all(jnp.isfinite(leaf))
  status = jnp.where((status == Status.OK) & ~finite, Status.NOT_FINITE, status)
  ok = status == Status.OK
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
  )
  # `cond` and not `where`: networks and scores are large, and are updated in place.
  aux = jax.lax.cond(
    ok,
    lambda aux: distiller.method.update_aux(keys.stream(step_key, "aux"), params, aux, state.step),
    lambda aux: aux,
    state.aux,
  )
  sampler = jax.lax.cond(
    ok,
    lambda: distiller.sampler.update(state.sampler, indices, batch.y, info),
    lambda: given_sampler,
  )
  step = state.step + ok.astype(state.step.dtype)
  return (
    DistillState(params, opt_state, aux, sampler, step, state.rate_scale),
    DistillInfo(loss, accuracy, norm, status),
  )


def _refresh(
  key, distiller: Distiller, state: DistillState, targets: Targets, size: int, axis_name
) -> DistillState:
  """Scores all rows in blocks of `size`, on the schedule of the sampler but not before the first step."""
  every, capacity = distiller.sampler.refresh_every, targets.x.shape[0]
  if not every:
    return state

  def block(sampler, rows, present):
    del present  # a row scored twice has the same score
    batch = Batch(targets.x[rows], targets.y[rows], axis_name)
    weights = jnp.ones(rows.shape, targets.y.dtype)
    _, info = distiller.method.loss(state.params, state.aux, batch, weights, key)
    return distiller.sampler.update(sampler, rows, batch.y, info), None

  def score_all(sampler):
    rows = jnp.arange(capacity, dtype=jnp.int32)
    return blocks.scan_row_blocks(block, sampler, rows, size)[0]

  due = (state.step > 0) & (state.step % every == 0)
  return state._replace(
    sampler=jax.lax.cond(due, score_all, lambda sampler: sampler, state.sampler)
  )


def scoring_evaluations(distiller: Distiller, num_rows: int, num_steps: int) -> int:
  """Number of target evaluations that refreshes of the sampler add to `num_steps` batches.

  Args:
    distiller: constant parts of the run.
    num_rows: number of target rows.
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
  x_target: Float[ArrayLike, "n ..."],
  y_target: Float[ArrayLike, "n c"],
  num_steps: Integer,
  devices: Sequence[jax.Device] | None = None,
  log_steps: Sequence[int] | None = None,
  callback: Callable[[int, Support, dict], None] | None = None,
  progress: Callable[[int], None] | None = None,
  compiled: Callable[[Any], None] | None = None,
  checkpoint_policy: CheckpointPolicy | None = None,
  resume: Snapshot | None = None,
  keeping: CheckpointPolicy | None = None,
  mapping: str = "pmap",
) -> DistillResult:
  """Distills: `num_steps` updates of the support.

  Args:
    key: root key (or int seed); equal keys on equal numbers of devices give equal runs.
    distiller: constant parts of the run.
    support: where to start, `(m, ...)` and `(m, c)`.
    x_target: `(n, ...)` rows to learn from, floating host or device array.
    y_target: `(n, c)` labels in the convention of `support.y`.
    num_steps: >= 0.
    devices: one entry per shard; None for the first local device. With several processes
      (`jax.distributed.initialize`), every process calls this with the same arguments and None,
      and all devices of all processes take part.
    log_steps: steps after which to log; None for `default_log_steps(num_steps)`.
    callback: called as `callback(step, support, record)` at logged steps, the first (0) and the
      last included; `record` has the fields of `DistillInfo` and the metrics of the sampler, and the
      callback may add to it.
    progress: called with the number of steps done, about once per second.
    compiled: called once with the compiled steps (`jax.stages.Compiled`, whose `memory_analysis`
      reports the memory per device) before the first step; with one process only.
    checkpoint_policy: when and how to save snapshots, and whether to stop; None for neither.
    resume: a snapshot of a run with the same arguments to continue from. On the same number of
      devices the result equals that of the uninterrupted run bit for bit.
    keeping: deprecated name of `checkpoint_policy`.
    mapping: how steps are mapped over the devices: "pmap" by `jax.pmap`, "shard_map" by `jax.shard_map` (one process only).
      The results are equal.

  Returns:
    `DistillResult`.

  Raises:
    NumericalError: if a step met a failed factorization or a value that is not finite; it names the step.
    ValueError: for shapes that disagree, fewer rows than devices, devices or shard_map with several processes, an unknown
      mapping, or a snapshot of another run.
  """
  if keeping is not None:
    warnings.warn("keeping is deprecated: use checkpoint_policy", DeprecationWarning, stacklevel=2)
    checkpoint_policy = keeping
  axis = device_axis(devices, mapping)
  num_steps = checks.integer("num_steps", num_steps, 0)
  checks.rank("support.y", support.y, 2)
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
    state = snapshot.restore(resume, state, distiller.sampler, axis, *dealt)
    history, done, seconds = [dict(line) for line in resume.history], resume.step, resume.seconds
    if done > num_steps:
      raise ValueError(
        f"resume: expected a snapshot of at most {num_steps} steps, got one of {done}"
      )
  mapped: Any = over_devices(_run_steps, axis, donate_argnums=(2,), static_broadcasted_argnums=(0,))
  run = functools.partial(mapped, distiller)
  started = time.perf_counter()
  raw_key = np.broadcast_to(jax.random.key_data(key), (axis.local, *jax.random.key_data(key).shape))
  # Placed on the devices once: otherwise every call would copy, and the second would recompile.
  place = over_devices(_identity, axis)
  raw_key, state, targets = place((raw_key, state, targets))
  if compiled is not None:
    run = mapped.lower(distiller, raw_key, state, targets, axis.every(0), axis.every(0)).compile()
    compiled(run)
  # A call with no steps only compiles.
  state, _, _, metrics = jax.block_until_ready(
    run(raw_key, state, targets, axis.every(0), axis.every(0))
  )
  compile_seconds = time.perf_counter() - started

  def result():
    final, scores = first(state), snapshot.row_scores(state, distiller.sampler, axis, *dealt)
    return DistillResult(
      distiller.method.support(final.params, final.aux),
      final,
      history,
      compile_seconds,
      seconds,
      scores,
    )

  pace, saved_at, due = 1, time.monotonic(), False
  for stop in log_steps:
    if resume is not None and stop <= resume.step:
      continue  # already in the history
    while done < stop:
      stop_requested = checkpoint_policy is not None and checkpoint_policy.stop()
      overdue = (
        checkpoint_policy is not None and time.monotonic() - saved_at >= checkpoint_policy.seconds
      )
      started = time.perf_counter()
      state, infos, (count, due), metrics = run(
        raw_key,
        state,
        targets,
        axis.every(0 if stop_requested else min(stop - done, pace)),
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
        saved_at, due = time.monotonic(), False
      _raise_if_failed(infos, done)
      if not count:
        return result()
      record = {
        name: float(value[-1]) for name, value in infos._asdict().items() if name != "status"
      }
      # About one second of work per call: Python is not a bottleneck, and progress is visible.
      pace = int(min(max(count / elapsed, 1), 2 * pace, _MAX_STEPS))
      if progress is not None:
        progress(done)
    logged = {name: np.asarray(value)[0].tolist() for name, value in metrics.items()}
    record = {"step": done, "seconds": seconds, **record, **logged}
    if callback is not None:
      callback(done, distiller.method.support(first(state.params), first(state.aux)), record)
    history.append(record)
    if checkpoint_policy is not None and (due or done == num_steps):
      checkpoint_policy.save(snapshot.take(state, axis, history, seconds))
      saved_at = time.monotonic()
  return result()


def _run_steps(distiller: Distiller, raw_key, state, targets, count, due):
  """Steps on one device of the axis; called through `over_devices`.

  The number of steps is an argument, so one compilation serves every distance between two logged
  steps, and every run of an equal distiller.
  """
  key = jax.random.wrap_key_data(raw_key)
  # Processes differ in speed and may request different numbers of steps; one that must stop requests none.
  count, due = jax.lax.pmin(count, AXIS), jax.lax.pmax(due, AXIS)

  def body(loop):
    i, state, infos, _ = loop
    state, info = distill_step(key, distiller, state, targets, AXIS)
    infos = jax.tree.map(
      lambda buffer, value: buffer.at[i].set(value.astype(buffer.dtype)), infos, info
    )
    return i + 1, state, infos, info.status

  dtype = jax.tree.leaves(state.params)[0].dtype
  zeros = jnp.zeros((_MAX_STEPS,), dtype)
  infos = DistillInfo(zeros, zeros, zeros, jnp.zeros((_MAX_STEPS,), jnp.int32))
  more = lambda loop: (loop[0] < count) & (loop[3] == Status.OK)
  count, state, infos, _ = jax.lax.while_loop(
    more, body, (jnp.int32(0), state, infos, jnp.int32(Status.OK))
  )
  return state, infos, (count, due), jax.lax.pmean(distiller.sampler.metrics(state.sampler), AXIS)


def _identity(tree):
  return tree


def _optimizer(distiller: Distiller, params: Params) -> optax.GradientTransformation:
  """The optimizer, with its updates scaled by the factor of the method for each parameter."""
  factors = {name: float(factor) for name, factor in distiller.method.trainable(params).items()}
  # Only `init` and `update` are required of the optimizer, so that it may be hashable by value.
  optimizer = optax.GradientTransformation(distiller.optimizer.init, distiller.optimizer.update)
  scaled = {
    f: optax.chain(optimizer, optax.scale(f)) if f else optax.set_to_zero()
    for f in set(factors.values())
  }
  return optax.multi_transform(scaled, factors)


def _raise_if_failed(infos: DistillInfo, done: int) -> None:
  """Raises NumericalError if the last step failed."""
  if not infos.status.size or infos.status[-1] == Status.OK:
    return
  loss, norm, status = infos.loss[-1], infos.gradient_norm[-1], Status(int(infos.status[-1]))
  what = f"distillation at step {done + 1}"
  if status is Status.NOT_FINITE and np.isfinite(loss) and np.isfinite(norm):
    raise NumericalError(
      f"{what} failed ({status.name}): the loss ({loss:.6g}) and the gradient norm ({norm:.6g}) are "
      "finite, but the updated parameters are not; lower the learning rate"
    )
  try:
    checks.raise_for_status(what, status)
  except NumericalError as error:
    raise NumericalError(f"{error} (loss {loss:.6g}, gradient norm {norm:.6g})") from None
