"""A distillation run: data, initialization, distillation, scores, artifact, pictures and report."""

import contextlib
import dataclasses
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kipcore import checks, kernels, keys, krr
from kipcore.architectures import architecture
from kipcore.cli import clock, recipes
from kipcore.cli.config import (
  CheckpointConfig,
  DataConfig,
  DistillConfig,
  SelectConfig,
  validate,
)
from kipcore.cli.cost import estimate, planner, progress
from kipcore.cli.errors import Stopped, UsageError, usage
from kipcore.cli.folder import animation as animations
from kipcore.cli.folder import event_log, lock, outputs, readme, reporting, run_folder
from kipcore.cli.folder.resume import RunCheckpoints, StopSignals, stop_signals
from kipcore.cli.runs import direct, experts, fitting, loading, saved_sets, trained_networks
from kipcore.cli.runs.direct import Outcome
from kipcore.cli.runs.loading import Data, load, prepare  # noqa: F401, for callers
from kipcore.distillation import importance, loop, method, optimizers
from kipcore.evaluation import krr as krr_evaluation
from kipcore.evaluation import protocols
from kipcore.io import trajectories
from kipcore.selection import absorb, coreset
from kipcore.types import Support

_BASELINE_DRAWS = 3
_VALIDATION_ROWS = 2000
# Fewer rows per image than this do not determine its label.
_ROWS_PER_LABEL = 10


def random_support(key, data: Data, images_per_class: int) -> Support:
  """Class-balanced random real rows: the baseline of every result."""
  with usage():
    rows = coreset.class_balanced_indices(
      key, data.raw.y_train, images_per_class, data.raw.num_classes
    )
  return Support(jnp.asarray(data.x_train[rows]), jnp.asarray(data.y_train[rows]))


class Start(NamedTuple):
  """The initialization of a run: coreset, support made of it, and target evaluations that it took."""

  coreset: coreset.Coreset
  support: Support
  target_evaluations: int = 0


def start(config: DistillConfig, data: Data) -> Start:
  """The initial support: with its weights absorbed, or with optimal labels if labels are learned; classes for expert labels.

  For methods through finite networks, synthetic points get the norm of the rows, unless they come from a file.
  """
  # Methods through finite networks have no kernel; that of the score is cheap at their CPU settings.
  kernel_fn = data.kernel_fn if recipes.RECIPES[config.method].kernel else data.score_kernel
  classes = recipes.RECIPES[config.method].hard_labels or config.labels == "expert"
  with usage():
    if from_file := saved_sets.is_file(config.init):
      chosen = saved_sets.coreset_of(config, data, classes)
    else:
      chosen = coreset.select_coreset(
        config.seed,
        data.x_train,
        data.y_train,
        config.images_per_class,
        config.init,
        kernel_fn,
        config.relative_ridge,
      )
  synthetic = not from_file and (chosen.indices < 0).all()
  if not recipes.RECIPES[config.method].kernel and synthetic:
    chosen = dataclasses.replace(chosen, x=coreset.scaled_to_rows(chosen.x, data.x_train))
  support = Support(chosen.x, chosen.y)
  if stride := label_stride(config, data, support.x.shape[0]):
    x, y = data.x_train[::stride], data.y_train[::stride]
    return Start(chosen, with_solved_labels(config, data, support, x, y), x.shape[0])
  if chosen.ridge is not None and not classes:
    used = krr.relative_ridge(kernel_fn.diag(chosen.x), config.relative_ridge)
    support, _ = absorb.absorb_weights(kernel_fn, chosen, chosen.ridge, used)
  return Start(chosen, support)


def label_stride(config: DistillConfig, data: Data, support_size: int) -> int:
  """Stride of the training rows from which the initial labels are solved; 0 if they are not solved.

  Evenly spaced rows, so that expensive kernels and short runs spend at most a tenth of their target
  evaluations on it.
  """
  solved = config.solve_labels and config.labels != "expert"
  if not (config.method == "kip" and config.learn_labels and solved):
    return 0
  rows = data.x_train.shape[0]
  stride = -(-rows // max(config.steps * batch_size_of(config, data) // 10, 1))
  return stride if rows // stride >= _ROWS_PER_LABEL * support_size else 0


def with_solved_labels(config, data: Data, support: Support, x, y) -> Support:
  """The support with the labels that fit the given rows best (`krr.label_solve`)."""
  used = krr.relative_ridge(data.kernel_fn.diag(support.x), config.relative_ridge)
  solution = krr.label_solve_rows(
    data.kernel_fn,
    support.x,
    jnp.asarray(x),
    jnp.asarray(y),
    float(used),
    coreset.objective_ridge(data.kernel_fn, jnp.asarray(x)),
  )
  checks.raise_for_status("solving for the initial labels", solution.status)
  return Support(support.x, solution.labels)


def distill(config: DistillConfig, data: Data, support: Support, **hooks) -> Outcome:
  """Runs the method of the config from an initial support; `hooks` are those of `loop.distill`."""
  if not recipes.has_loop(config):
    return direct.METHODS[config.method](config, data, support)
  batch_size = batch_size_of(config, data)
  policy = hooks.get("checkpoint_policy")
  stop = () if policy is None else (policy.stop,)
  problem, evaluations = recipes.Problem(data.kernel_fn, data.y_train.shape[1]), 0
  if recipes.RECIPES[config.method].experts:
    evaluations = experts.prepare(config, data, sampler_of(config), config.experts, *stop)
    with usage():
      known = trajectories.load_trajectories(config.experts)
    problem = problem._replace(experts=known.array)
  with usage():
    distiller = recipes.distiller_of(config, problem, sampler_of(config), batch_size)
  result = loop.distill(
    config.seed,
    distiller,
    support,
    data.x_train,
    data.y_train,
    config.steps,
    devices=devices_of(config) if jax.process_count() == 1 else None,
    **hooks,
  )
  if int(result.state.step) < config.steps:
    raise Stopped(
      f"stopped at step {int(result.state.step)} of {config.steps}; --resume continues from there"
    )
  evaluations += config.steps * batch_size + loop.scoring_evaluations(
    distiller, data.x_train.shape[0], config.steps
  )
  gain = result.history[-1].get("importance_gain")
  return Outcome(
    result.support,
    result.history,
    evaluations,
    result.compile_seconds,
    result.seconds,
    gain,
    scores=result.scores,
  )


def uniform_targets(config: DistillConfig, data: Data, support: Support, evaluations: int) -> float:
  """Test accuracy of the same run with uniform targets and as many target evaluations."""
  steps = evaluations // batch_size_of(config, data)
  outcome = distill(dataclasses.replace(config, sampler="uniform", steps=steps), data, support)
  return score(config, data, outcome.support)


def sampler_of(config: DistillConfig) -> method.Sampler:
  """The sampler of the config."""
  return importance.sampler(
    config.sampler,
    config.uniform_mix,
    config.weight_exponent,
    config.least_gain,
    config.refresh_every,
  )


def batch_size_of(config: DistillConfig, data: Data) -> int:
  """Targets per step: as given, or 1,000 (250 for the default methods of networks), or all rows if there are fewer."""
  rows = data.x_train.shape[0]
  if config.target_batch_size > rows:
    raise UsageError(
      f"--target_batch_size: expected at most the {rows} training rows, got {config.target_batch_size}"
    )
  default = 1000 if config.method in recipes.FOR_KERNELS else 250
  return config.target_batch_size or min(default, rows)


def devices_of(config: DataConfig) -> list:
  """The devices to use: those of this process, or all if there are several processes."""
  if jax.process_count() > 1:
    if config.num_devices:
      raise UsageError(
        f"--num_devices: expected 0 with --distributed, which uses all devices, got {config.num_devices}"
      )
    return jax.devices()
  found = jax.local_devices()
  if not 0 <= config.num_devices <= len(found):
    raise UsageError(
      f"--num_devices: expected at most the {len(found)} local devices (0 for all), got {config.num_devices}"
    )
  return found[: config.num_devices or len(found)]


def score(
  config: DistillConfig | SelectConfig, data: Data, support: Support, x=None, y=None
) -> float:
  """Accuracy of kernel ridge regression on a support, on the test rows or the given ones; raises if the fit fails."""
  x, y = (data.x_test, data.y_test) if x is None else (x, y)
  result = krr_evaluation.evaluate_krr(
    data.score_kernel, support, x, y, relative_ridge=config.relative_ridge
  )
  checks.raise_for_status("kernel ridge regression on the support", result.status)
  return float(result.accuracy)


def shown_rows(config: DistillConfig) -> int:
  """Number of validation rows to score during a run: at most the test rows."""
  return min(_VALIDATION_ROWS, config.test_rows or _VALIDATION_ROWS)


def label_with_expert(
  config: DistillConfig, data: Data, x, folder: pathlib.Path, stop: StopSignals, shown: bool
) -> experts.ExpertLabels:
  """The expert of a run with `--labels=expert`, trained unless its file exists, at the epoch that is best for images `x`."""
  try:
    with stop.at_checkpoints(), progress.working("training an expert", shown=shown):
      if recipes.RECIPES[config.method].experts:  # which serve as well
        experts.prepare(config, data, sampler_of(config), config.experts, stop)
      expert = experts.label_expert(config, data, config.experts, stop)
  except Stopped as error:
    raise Stopped(str(error), stop.status) from None
  students = trained_networks.evaluator(config, data)
  with progress.working("choosing the epoch of the expert", shown=shown):
    choice = experts.choose(config, data, expert, x, students, folder)
  own = 0 if recipes.RECIPES[config.method].experts else expert.target_evaluations
  return experts.ExpertLabels(expert, choice, own)


class Plan(NamedTuple):
  """A checked run: data, devices, targets per step, random real images, sizes, name of the folder, targets per block, and the settings with what depends on the data."""

  data: Data
  devices: list
  batch: int
  baselines: list[Support]
  sizes: estimate.Sizes
  name: str
  block: int
  config: DistillConfig


def plan(config: DistillConfig, data: Data | None = None) -> Plan:
  """Loads the data, unless they are given, and checks everything before anything is written.

  Args:
    config: settings of the run.
    data: its data, if they are loaded already.

  Returns:
    A plan.

  Raises:
    UsageError: for invalid settings or data.
  """
  devices = devices_of(config)
  check(config)
  data = load(config) if data is None else data
  config = dataclasses.replace(config, architecture=data.kernel_fn.arch.name)
  if config.labels == "expert":
    experts.check_validation(data)
    experts.rows_of(config, data)
  batch = batch_size_of(config, data) if recipes.has_loop(config) else data.x_train.shape[0]
  baselines = [
    random_support(keys.stream(config.seed, f"baseline {draw}"), data, config.images_per_class)
    for draw in range(_BASELINE_DRAWS)
  ]
  m = baselines[0].x.shape[0]
  stride, validation = (
    label_stride(config, data, m),
    min(shown_rows(config), data.x_validation.shape[0]),
  )
  sizes = estimate.Sizes(
    m,
    batch,
    data.x_train.shape[0] // stride if stride else 0,
    data.x_test.shape[0],
    _BASELINE_DRAWS + 2,
    validation,
    len(devices),
  )
  name = f"{outputs.slug(config.dataset)}-{config.method}-{config.architecture}-ipc{config.images_per_class}-seed{config.seed}"
  dense = config.method == "kip" and not data.kernel_fn.arch.convolutional  # others work in tiles
  block = config.target_block_size or (
    planner.block_rows(-(-batch // len(devices)), m, data.x_train.itemsize) if dense else 0
  )
  # Another size of the blocks is another order of summation, so a resumed run keeps it.
  config = dataclasses.replace(config, target_block_size=block)
  return Plan(data, devices, batch, baselines, sizes, name, block, config)


def description(config: DistillConfig, planned: Plan) -> str:
  """Two lines that describe the run."""
  data, devices = planned.data, planned.devices
  kernel = f"the {config.kernel} of {config.score_architecture or config.architecture}"
  through = (
    f"with {kernel}"
    if recipes.RECIPES[config.method].kernel
    else f"through {config.architecture} networks of width {config.width}, scored with {kernel}"
  )
  return (
    f"{config.dataset}: {data.x_train.shape[0]:,} training, {data.x_validation.shape[0]:,} validation, "
    f"{data.x_test.shape[0]:,} test {rows_of(data)}, {data.raw.num_classes} classes\n"
    f"{config.method} {through}: {planned.sizes.support} {noun(data)} "
    f"({config.images_per_class} per class), {config.steps if recipes.has_loop(config) else 0} steps of {planned.batch} targets "
    f"on {len(devices)} {devices[0].platform} device(s)"
    + (f", {planned.block} at a time" if planned.block else "")
  )


def run_distill(
  config: DistillConfig,
  output_dir: str | None = None,
  overwrite: bool = False,
  verbose: bool = True,
  tensorboard: bool = False,
  checkpoints: CheckpointConfig = CheckpointConfig(),
  cheaper: DistillConfig | None = None,
  animation: bool = False,
) -> tuple[pathlib.Path, dict]:
  """Distills, scores, and writes the run folder.

  Args:
    config: all settings.
    output_dir: run folder; None for a new one under runs/.
    overwrite: whether to replace the files of an earlier run there.
    verbose: whether to print progress and a summary.
    tensorboard: whether to write event files as well.
    checkpoints: when to write checkpoints, and whether to resume from the last one in `output_dir`.
    cheaper: settings with another method, used if `config.minutes` is too short for that of `config`; None for none.
    animation: whether to write `animation.gif` as well.

  Returns:
    The folder, and the content of `result.json`.

  Raises:
    UsageError: for invalid settings, data or folders.
    NumericalError: if a computation failed.
    Stopped: after Ctrl-C or SIGTERM, at a checkpoint.
  """
  started = clock.start()
  event_log.require(tensorboard)
  planned = plan(config)
  if checkpoints.resume:
    config = dataclasses.replace(config, architecture=planned.config.architecture)
    folder = pathlib.Path(output_dir or "")
    with lock.lock_folder(folder), run_folder.releasing(folder, new=False), stop_signals() as stop:
      if (folder / "README.txt").exists():  # the last of its files
        raise UsageError(f"--resume: the run of {folder} is already finished")
      return _run(
        config, planned, folder, verbose, tensorboard, checkpoints, stop, started, animation
      )
  if config.minutes:
    planned = fitting.fitted(planned, started, verbose, cheaper)
  with lock.new_folder(output_dir, planned.name, overwrite) as folder, stop_signals() as stop:
    return _run(
      planned.config, planned, folder, verbose, tensorboard, checkpoints, stop, started, animation
    )


def _run(
  config: DistillConfig,
  planned: Plan,
  folder: pathlib.Path,
  verbose: bool,
  tensorboard: bool,
  checkpoints: CheckpointConfig,
  stop: StopSignals,
  started: float,
  animation: bool,
) -> tuple[pathlib.Path, dict]:
  """`run_distill` in a locked folder."""
  write = (lambda text: tqdm.write(text, file=sys.stdout)) if verbose else (lambda text: None)
  data, _, batch, baselines, sizes, *_ = planned
  given, has_loop, m = config, recipes.has_loop(config), sizes.support
  kept = RunCheckpoints(
    pathlib.Path(checkpoints.shared or folder),
    config,
    data.raw.hashes,
    checkpoints.checkpoint_seconds,
  )
  last = kept.last() if checkpoints.resume else None
  events = event_log.EventLog(folder if tensorboard else None)
  recipe = recipes.RECIPES[config.method]
  if (recipe.experts or config.labels == "expert") and not config.experts:
    config = dataclasses.replace(config, experts=str(folder / "experts.npy"))
  if checkpoints.resume:
    run_folder.write_metrics(folder, last.history if last else [])
    write(f"resuming from step {last.step if last else 0} of {config.steps}")
  if checkpoints.shared or last is None:
    run_folder.write_config(
      folder,
      config,
      support_size=m,
      resolved_target_batch_size=batch,
      resolved_num_devices=sizes.devices,
      dataset_hashes=data.raw.hashes,
      note=data.raw.note,
    )
  write("\n".join([*loading.notes(data), description(config, planned)]))
  if expected := estimate.of_distillation(config, data, sizes):
    write(expected)
  with progress.working(
    f"scoring random real {noun(data)}", shown=verbose, remedy=planner.FEWER_ROWS
  ):
    baseline = [score(config, data, random) for random in baselines]
  with progress.working(
    f"initialization ({config.init})", shown=verbose, remedy=planner.FEWER_ROWS
  ):
    chosen, support, evaluations = start(config, data)
  labels_text = ", solved labels" if evaluations else ""
  others, labeling = {"init": support, "random_baseline": baselines[0]}, None
  if config.labels == "expert":
    labeling = label_with_expert(config, data, support.x, folder, stop, verbose)
    evaluations += labeling.target_evaluations
    others["expert_init"] = labeling.of(support.x)
    others["expert_random_baseline"] = labeling.of(baselines[0].x)
    accuracy = labeling.choice.accuracies[labeling.choice.epoch]
    write(
      f"labels of an expert after epoch {labeling.choice.epoch} of {len(labeling.expert.trajectory) - 1}, which teaches "
      f"networks best: {100 * accuracy:.1f} % accuracy on validation rows"
    )
    if not recipes.RECIPES[config.method].hard_labels:
      support, labels_text = others["expert_init"], ", expert labels"
  init_accuracy = score(config, data, support)
  # During a run, sets are scored by ridge regression. Where they are for networks, the printed accuracies say so.
  by_kernel = (
    "" if recipe.kernel else f" ({config.score_architecture or config.architecture} kernel)"
  )
  write(
    f"random real {noun(data)}: {100 * np.mean(baseline):.1f} % test accuracy{by_kernel} (mean of {_BASELINE_DRAWS} draws); "
    f"initial {noun(data)} ({chosen.strategy}{labels_text}): {100 * init_accuracy:.1f} %"
  )
  movie = animations.Animation(folder if animation else None, data, chosen.y)
  validation = data.x_validation[: sizes.validation], data.y_validation[: sizes.validation]
  with progress.Steps(
    config.steps if has_loop else 0,
    config.method,
    loop.default_log_steps(config.steps),
    write if verbose else None,
    recipes.RECIPES[config.method].kernel,
  ) as bar:

    def callback(step, current, record):
      if sizes.validation:
        record["validation_accuracy"] = score(config, data, current, *validation)
      if config.log_test_accuracy:
        record["test_accuracy"] = score(config, data, current)
      run_folder.append_metrics(folder, record)
      events.scalars(record)
      movie.add(step, current.x)
      bar.logged(step)
      if "loss" in record:
        shown = "  ".join(
          f"batch {100 * v:.1f} %"
          if k == "accuracy"
          else f"{k.removesuffix('_accuracy')}{by_kernel} {100 * v:.1f} %"
          for k, v in record.items()
          if k.endswith("accuracy")
        )
        write(
          f"step {step:>6}/{config.steps}  loss {record['loss']:.5f}  {shown}  ({record['seconds']:.1f} s)"
        )

    hooks = (
      dict(
        callback=callback,
        progress=bar.advance,
        compiled=bar.compiled if jax.process_count() == 1 else None,
      )
      if has_loop
      else {}
    )
    outcome = kept.run(
      lambda **policy: distill(config, data, support, **hooks, **policy),
      last,
      stop,
      checkpoints.retries,
      lambda history: run_folder.write_metrics(folder, history),
      write,
    )

  if labeling is not None and recipes.RECIPES[config.method].hard_labels:
    outcome = outcome._replace(support=labeling.of(outcome.support.x))
  with progress.working("scoring", shown=verbose, remedy=planner.FEWER_ROWS):
    test_accuracy = score(config, data, outcome.support)
  scored = trained_networks.KeptScores(folder, stop, write) if jax.process_count() == 1 else None
  waiting = stop.at_checkpoints() if scored is not None else contextlib.nullcontext()
  with waiting, progress.working("training networks on the result", shown=verbose):
    networks = trained_networks.scores(config, data, outcome.support, others, scored)
  measured = {}
  if config.measure_gain and has_loop:
    measured["uniform_targets_test_accuracy"] = uniform_targets(
      config, data, support, outcome.target_evaluations
    )
  result = {
    "dataset": config.dataset,
    "method": config.method,
    "teach": config.teach or recipes.taught_by(config.method),
    "init": config.init,
    "sampler": config.sampler,
    "labels": labels_of(config),
    "architecture": config.architecture,
    "kernel": config.kernel,
    "seed": config.seed,
    "support_size": m,
    "steps": config.steps if has_loop else 0,
    "target_evaluations": evaluations + outcome.target_evaluations,
    "init_test_accuracy": init_accuracy,
    "test_accuracy": test_accuracy,
    **measured,
    **networks,
    **scored_by(config),
    **({} if labeling is None else labeling.result()),
    "importance_gain": outcome.importance_gain,
    **outcome.own,
    "random_baseline_test_accuracy": float(np.mean(baseline)),
    "random_baseline_test_accuracy_std": float(np.std(baseline, ddof=1)),
    "test_rows": data.x_test.shape[0],
    "wall_seconds": time.perf_counter() - started,
    "compile_seconds": outcome.compile_seconds,
    "step_seconds": outcome.seconds,
    **run_folder.peak_memory(),
  }
  with progress.working("writing artifact, pictures and report", shown=verbose):
    outputs.write_artifact(folder, config, data, outcome.support, result)
    movie.finish()
    outputs.write_pictures(
      folder,
      data,
      support,
      np.argmax(np.asarray(chosen.y), axis=1),
      outcome.support,
      outcome.history,
      result,
    )
    outputs.write_importance(folder, config, data, outcome.support, outcome.scores)
    result["wall_seconds"] = time.perf_counter() - started  # all but writing the report
    run_folder.write_json(folder / "result.json", result)
    reporting.write_report(folder)
  events.close(result["steps"], [folder / "images.png", folder / "learning_curve.png"])
  readme.of_distillation(folder, given, result)
  kept.done()
  if scored is not None:
    scored.done()
  write(_summary(folder, config, data, result))
  return folder, result


def labels_of(config: DistillConfig) -> str:
  """What the labels of a result are: class, learned or expert."""
  if config.labels:
    return config.labels
  recipe = recipes.RECIPES[config.method]
  fixed = recipe.hard_labels or not (config.learn_labels or config.method == "rcig")
  return "class" if recipes.has_loop(config) and fixed else "learned"


def noun(data: Data) -> str:
  """What the rows of a dataset are called."""
  return "images" if data.x_train.ndim == 4 else "points"


def rows_of(data: Data) -> str:
  """What the rows of a dataset are, with their size."""
  shape = data.x_train.shape[1:]
  return f"points of {shape[0]} features" if len(shape) == 1 else f"rows of shape {shape}"


def scored_by(config: DistillConfig | SelectConfig) -> dict:
  """The models that scored a result, for `result.json`."""
  score_architecture = config.score_architecture or config.architecture
  found: dict = {
    "scored_by": f"kernel ridge regression with the {config.kernel.upper()} of {score_architecture}",
    "score_architecture": score_architecture,
    "relative_ridge": config.relative_ridge,
  }
  if isinstance(config, DistillConfig) and config.network_seeds:
    found["network_scored_by"] = (
      f"{config.architecture} networks of width {config.network_width or config.width}, protocol {config.protocol}"
    )
    if config.network_steps:
      found["network_scored_by"] += f" with {config.network_steps:,} steps"
  return found


def check(config: DistillConfig) -> None:
  """Raises UsageError for settings that are invalid for any data."""
  validate(config)
  with usage():
    checks.one_of("--method", config.method, recipes.METHODS)
    saved_sets.check(config.init)
    checks.one_of("--protocol", config.protocol, tuple(protocols.PROTOCOLS))
    sampler_of(config)
    recipes.options_of(config)
    recipes.check_labels(config)
    if recipes.has_loop(config) and not recipes.RECIPES[config.method].experts:
      arch = architecture(loading.architecture_of(config))
      kernel_fn = kernels.NetworkKernel(arch, config.kernel)
      recipes.built(config, recipes.Problem(kernel_fn, 2))
    optimizers.NamedOptimizer(config.optimizer, config.learning_rate, config.steps, config.schedule)


def _summary(folder, config: DistillConfig, data: Data, result: dict) -> str:
  m, accuracy, initial = (
    result["support_size"],
    result["test_accuracy"],
    result["init_test_accuracy"],
  )
  random, changed = (
    result["random_baseline_test_accuracy"],
    result["steps"] or not recipes.has_loop(config),
  )
  kind = noun(data)
  lines = [""]
  leads = result.get("teach", "kernel") != "kernel" and "network_test_accuracy_mean" in result
  if leads:
    lines += _network_summary(result, m, kind) + [""]
  lines[-1] = (
    f"{'ridge regression on the ' if leads else ''}{m} distilled {kind}: {100 * accuracy:.2f} % test accuracy"
  )
  if changed:
    lines[-1] += f", {compared(accuracy, initial)} the initial {kind} ({100 * initial:.2f} %)"
  else:
    lines[-1] = f"{m} initial {kind}, not distilled (0 steps): {100 * accuracy:.2f} % test accuracy"
  lines[-1] += f", {compared(accuracy, random)} {m} random real {kind} ({100 * random:.1f} %)"
  if changed and accuracy < initial and not leads:
    lines.append(
      f"warning: the result is worse than the initial {kind}; try a smaller --learning_rate, other "
      "--steps or a larger --relative_ridge"
    )
  elif accuracy < random and not leads:
    lines.append(f"warning: the result is worse than random real {kind}")
  gain = result["importance_gain"]
  if gain is not None and result["steps"]:
    drawn = (
      "sampled by loss"
      if gain >= config.least_gain
      else f"below {config.least_gain:g}, so sampled uniformly"
    )
    lines.append(f"targets by {result['sampler']}: importance gain {gain:.1f} at the end, {drawn}")
  if "uniform_targets_test_accuracy" in result:
    uniform = result["uniform_targets_test_accuracy"]
    lines.append(
      f"with uniform targets and as many evaluations: {100 * uniform:.2f} % "
      f"(the sampler changed the result by {100 * (accuracy - uniform):+.2f} points)"
    )
  if "network_test_accuracy_mean" in result and not leads:
    lines.append(
      f"networks trained on it: {100 * result['network_test_accuracy_mean']:.2f} % "
      f"({result['network_scored_by']})"
    )
  lines.append(
    f"{result['wall_seconds']:.1f} s in total, of which {result['compile_seconds']:.1f} s compiling the "
    "step"
  )
  return "\n".join([*lines, f"written to {folder}: {', '.join(run_folder.visible_files(folder))}"])


def _network_summary(result: dict, m: int, kind: str) -> list[str]:
  """The accuracy of networks trained on the result, next to the other sets under the same protocol."""
  own = result["network_test_accuracy_mean"]
  spread = result.get("network_test_accuracy_std")
  deviation = "" if spread is None else f" (standard deviation {100 * spread:.2f} points)"
  others = outputs.compared_networks(result, f"{m} random real {kind}", f"the initial {kind}")
  compare = ", ".join(
    f"{compared(own, other)} {name} ({100 * other:.1f} %)" for name, other in others.items()
  )
  lines = [
    f"networks trained on the {m} distilled {kind}: {100 * own:.2f} % test accuracy{deviation}, {compare}",
    f"  by {result['network_scored_by']}",
  ]
  lines += [
    f"warning: networks learn less from the result than from {name}"
    for name, other in others.items()
    if own < other
  ]
  return lines


def compared(accuracy: float, other: float) -> str:
  """An accuracy relative to another, as in "1.2 points below"."""
  points = 100 * (accuracy - other)
  return f"{abs(points):.1f} points {'over' if points >= 0 else 'below'}"
