"""Time and memory of a distillation, part by part: initialization, scores and a few steps are run and timed.

Parts that take long or do not fit into memory are estimated instead.
"""

import contextlib
import math
import pathlib
import time

import jax
import numpy as np

from kipcore import keys
from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig
from kipcore.cli.cost import estimate
from kipcore.cli.cost.estimate import Part, Work
from kipcore.cli.runs import direct, experts, pipeline, trained_networks
from kipcore.distillation import loop
from kipcore.distillation.methods import experts as in_experts

# Parts that are expected to take longer are estimated, not run.
_LONGEST_SECONDS = 10.0
_STEPS_SECONDS, _EXPERT_ROWS, _ROWS = 1.5, 512, 4000
# Calls that take less are repeated: the first one contains overhead that later ones do not have.
_SHORT_SECONDS = 1.0
# Artifact, pictures and report, including the import of matplotlib.
FILES_SECONDS = 4.0


class _StopMeasuring(Exception):
  """All measurements are done."""


def distillation(config: DistillConfig, planned: pipeline.Plan) -> tuple[list, list]:
  """Seconds and bytes of the parts of a run.

  Args:
    config: settings of the run.
    planned: its data and sizes.

  Returns:
    Parts in seconds, and parts in bytes on each device.
  """
  data, sizes, kernel_fn = planned.data, planned.sizes, planned.data.score_kernel
  pair_seconds, _ = estimate.seconds_per_pair(kernel_fn, data.x_train, gradient=False)
  rate = estimate.operations_per_second(data.x_train.dtype)
  seconds, support, compiling = [], planned.baselines[0], 0.0
  work = estimate.of_initialization(
    config.init, len(data.x_train), sizes.support, data.x_train[0].size, data.y_train.shape[1]
  )
  expected = (work + Work(sizes.solved * sizes.support)).seconds(pair_seconds, rate)
  if expected < _LONGEST_SECONDS:
    expected, compiled, found = _apart(lambda: pipeline.start(config, data))
    compiling, support = compiling + compiled, found.support
  seconds.append(Part(f"initialization ({config.init})", expected))
  expected, compiled = _scores(config, planned, support, pair_seconds)
  compiling += compiled
  seconds.append(
    Part(f"scores of random {pipeline.noun(data)}, initialization, progress and result", expected)
  )
  stored = [Part("training and test rows", estimate.rows_bytes(data))]
  if config.labels == "expert" and not recipes.RECIPES[config.method].experts:
    seconds += _label_expert(config, data, support)
  if not recipes.has_loop(config):
    seconds.append(Part(config.method, _direct(config, planned, support, pair_seconds, rate)))
    stored.append(Part("kernel and feature matrices", _matrices(config, planned)))
  else:
    own, compiled, stored = _loop(config, planned, support)
    compiling += compiled
    seconds += own
    stored.append(Part("test rows", data.x_test.nbytes + data.y_test.nbytes))
  if config.network_seeds:
    expected, compiled = _networks(config, data, support)
    compiling += compiled
    seconds.append(Part(f"{config.network_seeds} networks to score the result", expected))
  seconds.append(Part("compiling", compiling))
  seconds.append(Part("artifact, pictures and report", FILES_SECONDS))
  return seconds, [part for part in stored if part.amount]


def _timed(call):
  started = time.perf_counter()
  out = call()
  return time.perf_counter() - started, out


def _apart(call) -> tuple:
  """Seconds without compilation, seconds of compilation, and the outcome; a short call is made twice."""
  compiling = [0.0]

  def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event.startswith("/jax/core/compile/") and "trace" not in event:  # traces are nested
      compiling[0] += duration_secs

  jax.monitoring.register_event_duration_secs_listener(heard)
  try:
    first, out = _timed(call)
  finally:
    jax.monitoring.unregister_event_duration_listener(heard)
  if first - compiling[0] > _SHORT_SECONDS:
    return first - compiling[0], compiling[0], out
  again, out = _timed(call)
  return again, max(first - again, 0.0), out


def _scores(config, planned, support, pair_seconds) -> tuple[float, float]:
  data, sizes = planned.data, planned.sizes
  rows = (
    estimate.logged_rows(config, sizes) if recipes.has_loop(config) else sizes.scores * sizes.test
  )
  expected = rows * sizes.support * pair_seconds
  if expected > _LONGEST_SECONDS:
    return expected, 0.0
  again, compiled, _ = _apart(lambda: pipeline.score(config, data, support))
  times = 2 if sizes.validation and recipes.has_loop(config) else 1  # once for each number of rows
  return again * rows / sizes.test, times * compiled


def _direct(config, planned, support, pair_seconds, rate) -> float:
  """Seconds of a method without a loop, measured on a subset of many rows."""
  data, m = planned.data, planned.sizes.support
  rows = len(data.x_train)
  if config.method == "label_solve":
    return Work(rows * m, 2.0 * rows * m**2).seconds(pair_seconds, rate)
  stride = -(-rows // _ROWS)
  part = data._replace(
    x_train=data.x_train[::stride],
    y_train=data.y_train[::stride],
    x_test=data.x_test[:_ROWS],
    y_test=data.y_test[:_ROWS],
  )
  again, compiled, _ = _apart(lambda: direct.METHODS[config.method](config, part, support))
  return compiled + again * rows / len(part.x_train)


def _matrices(config, planned) -> float:
  """Bytes of the largest arrays of a method without a loop."""
  data, block = planned.data, min(2048, len(planned.data.x_train))
  wide = planned.sizes.support
  if config.method == "krr_closed_form":
    wide = recipes.options_of(config).num_features or data.x_train[0].size
  return data.x_train.itemsize * (2.0 * block * wide + 4.0 * wide**2)


def _loop(config, planned, support) -> tuple[list, float, list]:
  """Compiles the steps and runs a few: seconds of parts, of compilation, and bytes of parts."""
  data, sizes = planned.data, planned.sizes
  seconds, on_disk = (
    _experts(config, data, support) if recipes.RECIPES[config.method].experts else ([], [])
  )
  distiller = _distiller(config, data, support, planned.batch)
  recipe, calls, stored, compiling = recipes.RECIPES[config.method], [], [], time.perf_counter()
  costly = recipe.kernel and data.kernel_fn.arch.convolutional
  compile_seconds = [0.0]

  def compiled(executable):
    compile_seconds[0] = time.perf_counter() - compiling
    stored.extend(estimate.memory_of_steps(executable, recipe.kernel))
    available = estimate.available_bytes()
    if (
      costly
      or not config.steps
      or available
      and sum(part.amount for part in stored) > 0.8 * available
    ):
      raise _StopMeasuring

  def advanced(done):
    calls.append((done, time.perf_counter()))
    if calls[-1][1] - calls[0][1] > _STEPS_SECONDS:
      raise _StopMeasuring

  with contextlib.suppress(_StopMeasuring):
    loop.distill(
      config.seed,
      distiller,
      support,
      data.x_train,
      data.y_train,
      config.steps,
      planned.devices,
      (),
      lambda step, *_: step or advanced(0),
      advanced,
      compiled,
    )
  if costly:
    one, _ = estimate.step_of_pairs(
      sizes, estimate.seconds_per_pair(data.kernel_fn, data.x_train, gradient=True)[0]
    )
  elif len(calls) > 1:  # the last call: the first ones have few steps and are slower
    (before, started), (done, ended) = calls[-2:]
    one = (ended - started) / (done - before)
  else:
    one = math.nan if config.steps else 0.0
  every = config.refresh_every
  passes = (
    (config.steps - 1) // every * len(data.x_train) / planned.batch / 2 if every else 0.0
  )  # forward only: half a step
  runs = 2 if config.measure_gain else 1
  name = f"{config.steps:,} steps of {one:.3g} s" + (
    ", twice, once with uniform targets" if runs > 1 else ""
  )
  seconds.append(Part(name, runs * (config.steps + passes) * one))
  return seconds, runs * compile_seconds[0], stored + on_disk


def _distiller(config, data, support, batch):
  problem = recipes.Problem(data.kernel_fn, data.y_train.shape[1])
  if recipes.RECIPES[config.method].experts:
    # Random experts: their values change neither time nor memory.
    size, _ = in_experts.flat_parameters(recipes.module_of(config, problem), support.x)
    walks = np.random.default_rng(0).normal(0, 0.05, (1, config.expert_epochs + 1, size))
    problem = problem._replace(experts=walks.astype(data.x_train.dtype))
  return recipes.distiller_of(config, problem, pipeline.sampler_of(config), batch)


def _experts(config, data, support) -> tuple[list, list]:
  """Seconds and disk space of the experts; no seconds if their file exists, which is then checked."""
  module = recipes.module_of(config, recipes.Problem(data.kernel_fn, data.y_train.shape[1]))
  size, _ = in_experts.flat_parameters(module, support.x)
  on_disk = [
    Part(
      "experts, on disk",
      config.num_experts * (config.expert_epochs + 1) * size * data.x_train.itemsize,
    )
  ]
  if config.experts and pathlib.Path(config.experts).exists():
    experts.prepare(config, data, pipeline.sampler_of(config), config.experts)
    return [], on_disk
  rows = min(_EXPERT_ROWS, len(data.x_train))
  train = lambda seed: in_experts.train_expert(
    keys.stream(config.seed, f"expert {seed}"),
    module,
    data.x_train[:rows],
    data.y_train[:rows],
    1,
    sampler=pipeline.sampler_of(config),
    augmentation=recipes.options_of(config).augmentation,
  )
  again, compiled, _ = _apart(lambda: train(0))
  # All steps take the same time.
  epochs = config.num_experts * config.expert_epochs
  return [
    Part(
      f"{config.num_experts} experts of {config.expert_epochs} epochs",
      compiled + epochs * again * (config.expert_rows or len(data.x_train)) / rows,
    )
  ], on_disk


def _label_expert(config, data, support) -> list:
  """Seconds of the expert of the labels, at most, unless its file exists, and of the students of all tried epochs."""
  one, compiled = estimate.of_network(
    trained_networks.evaluator(config, data), support, len(data.x_validation)
  )
  students = experts.num_students(config.expert_epochs)
  seconds = [
    Part(f"{students} networks to choose the epoch of the expert", students * one + compiled)
  ]
  if config.experts and pathlib.Path(config.experts).exists():
    experts.label_expert(config, data, config.experts)
    return seconds
  rows = min(_EXPERT_ROWS, len(data.x_train))
  part = data._replace(x_train=data.x_train[:rows], y_train=data.y_train[:rows])
  again, compiled, _ = _apart(lambda: experts.one_epoch(config, part))
  every = (config.expert_rows or len(data.x_train)) / rows
  name = f"an expert of at most {config.expert_epochs} epochs"
  return [Part(name, compiled + config.expert_epochs * again * every), *seconds]


def _networks(config, data, support) -> tuple[float, float]:
  one, compiled = estimate.of_network(
    trained_networks.evaluator(config, data), support, len(data.x_test)
  )
  others = 4 if config.labels == "expert" else 2
  networks = config.network_seeds + others * min(config.network_seeds, 2)
  return networks * one, compiled
