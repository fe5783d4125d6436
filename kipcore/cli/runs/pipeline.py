"""The one path of the data: dataset, preprocessing, start, distillation, artifact, evaluation, pictures."""

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
from kipcore.cli import recipes
from kipcore.cli.config import CheckpointConfig, DataConfig, DistillConfig
from kipcore.cli.cost import estimate, planner, progress
from kipcore.cli.errors import Stopped, UsageError, usage
from kipcore.cli.folder import event_log, outputs, readme, reporting, run_folder
from kipcore.cli.folder.resume import Keeper, alone, stop_signals
from kipcore.cli.runs import direct, experts
from kipcore.cli.runs.direct import Outcome
from kipcore.cli.runs.loading import Data, load, prepare  # noqa: F401, for callers
from kipcore.distillation import importance, loop, method, optimizers
from kipcore.evaluation import krr as krr_evaluation
from kipcore.evaluation import networks as network_evaluation
from kipcore.selection import absorb, coreset
from kipcore.types import Support

_BASELINE_DRAWS = 3
_VALIDATION_ROWS = 2000
# Fewer rows than this for each image do not determine its label.
_ROWS_A_LABEL = 10


def random_support(key, data: Data, images_per_class: int) -> Support:
  """Class-balanced random real rows: the baseline of every result."""
  with usage():
    rows = coreset.class_balanced_indices(
      key, data.raw.y_train, images_per_class, data.raw.num_classes
    )
  return Support(jnp.asarray(data.x_train[rows]), jnp.asarray(data.y_train[rows]))


class Start(NamedTuple):
  """Where a run starts: the coreset of its init, the support made of it, and the target evaluations that took."""

  coreset: coreset.Coreset
  support: Support
  target_evaluations: int = 0


def start(config: DistillConfig, data: Data) -> Start:
  """The support of the config's init: with its weights absorbed, or with labels solved for where they are learned."""
  # Methods through finite networks have no kernel of their own; that of the score is cheap at their CPU-size settings.
  kernel_fn = data.kernel_fn if recipes.RECIPES[config.method].kernel else data.score_kernel
  with usage():
    chosen = coreset.select_coreset(
      config.seed,
      data.x_train,
      data.y_train,
      config.images_per_class,
      config.init,
      kernel_fn,
      config.relative_ridge,
    )
  support = Support(chosen.x, chosen.y)
  if stride := label_stride(config, data, support.x.shape[0]):
    x, y = data.x_train[::stride], data.y_train[::stride]
    return Start(chosen, with_solved_labels(config, data, support, x, y), x.shape[0])
  if chosen.ridge is not None and not recipes.RECIPES[config.method].hard_labels:
    used = krr.relative_ridge(kernel_fn.diag(chosen.x), config.relative_ridge)
    support, _ = absorb.absorb_weights(kernel_fn, chosen, chosen.ridge, used)
  return Start(chosen, support)


def label_stride(config: DistillConfig, data: Data, support_size: int) -> int:
  """Every which training row the labels of the start are solved from, 0 for none of them.

  Evenly spaced, so that expensive kernels and short runs spend a tenth of their target evaluations at most.
  """
  if not (config.method == "kip" and config.learn_labels and config.solve_labels):
    return 0
  rows = data.x_train.shape[0]
  stride = -(-rows // max(config.steps * batch_size_of(config, data) // 10, 1))
  return stride if rows // stride >= _ROWS_A_LABEL * support_size else 0


def with_solved_labels(config, data: Data, support: Support, x, y) -> Support:
  """The support with the labels that fit the given rows best (never worse than any weights: theory of `krr.label_solve`)."""
  used = krr.relative_ridge(data.kernel_fn.diag(support.x), config.relative_ridge)
  solution = krr.label_solve_rows(
    data.kernel_fn,
    support.x,
    jnp.asarray(x),
    jnp.asarray(y),
    float(used),
    coreset.objective_ridge(data.kernel_fn, jnp.asarray(x)),
  )
  checks.raise_for_status("solving for the labels of the start", solution.status)
  return Support(support.x, solution.labels)


def distill(config: DistillConfig, data: Data, support: Support, **hooks) -> Outcome:
  """Runs the method of the config from a starting support; `hooks` are those of `loop.distill`."""
  if not recipes.has_loop(config):
    return direct.METHODS[config.method](config, data, support)
  batch_size = batch_size_of(config, data)
  evaluations = (
    experts.prepare(config, data, sampler_of(config), config.experts)
    if config.method == "mtt"
    else 0
  )
  with usage():
    problem = recipes.Problem(data.kernel_fn, data.y_train.shape[1], config.experts)
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
      f"stopped at step {int(result.state.step)} of {config.steps}, as asked; --resume goes on from there"
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
  """Test accuracy of the same run with uniform targets, for as many target evaluations."""
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
  """The target batch: as asked, or 1,000 rows or all of fewer."""
  rows = data.x_train.shape[0]
  if config.target_batch_size > rows:
    raise UsageError(
      f"--target_batch_size: expected at most the {rows} training rows, got {config.target_batch_size}"
    )
  return config.target_batch_size or min(1000, rows)


def devices_of(config: DataConfig) -> list:
  """The devices that the work is mapped over: of this process, or all of them where there are several processes."""
  if jax.process_count() > 1:
    if config.num_devices:
      raise UsageError(
        f"--num_devices: expected 0 beside --distributed, where all devices take part, got {config.num_devices}"
      )
    return jax.devices()
  found = jax.local_devices()
  if not 0 <= config.num_devices <= len(found):
    raise UsageError(
      f"--num_devices: expected at most the {len(found)} local devices (0 for all), got {config.num_devices}"
    )
  return found[: config.num_devices or len(found)]


def score(config: DistillConfig, data: Data, support: Support, x=None, y=None) -> float:
  """Test accuracy (or that on given rows) of ridge regression on a support; raises if the fit failed."""
  x, y = (data.x_test, data.y_test) if x is None else (x, y)
  result = krr_evaluation.evaluate_krr(
    data.score_kernel,
    support,
    x,
    y,
    relative_ridge=config.relative_ridge,
    block_size=planner.rows_at_a_time(x.shape[0], support.x.shape[0], x.dtype.itemsize) or None,
  )
  checks.raise_for_status("kernel ridge regression on the support", result.status)
  return float(result.accuracy)


def shown_rows(config: DistillConfig) -> int:
  """Validation rows that are scored while a run goes on: few where the test rows are."""
  return min(_VALIDATION_ROWS, config.test_rows or _VALIDATION_ROWS)


def network_scores(config: DistillConfig, data: Data, support: Support) -> dict:
  """Test accuracy of finite networks trained on a support, with the method's norm; {} where no seeds are asked for."""
  if not config.network_seeds:
    return {}
  scores = network_evaluation.evaluate_network(
    config.seed,
    data.kernel_fn.arch,
    support,
    data.x_test,
    data.y_test,
    config.network_seeds,
    config.width,
    config.network_steps,
    norm=recipes.RECIPES[config.method].norm,
  )
  return {
    "network_test_accuracy": [float(s) for s in scores],
    "network_test_accuracy_mean": float(np.mean(scores)),
  }


class Plan(NamedTuple):
  """A run that has been checked: its data, devices, targets of a step, sizes, the random real images of its baseline, and targets a block."""

  data: Data
  devices: list
  batch: int
  baselines: list[Support]
  sizes: estimate.Sizes
  name: str
  block: int


def plan(config: DistillConfig, data: Data | None = None) -> Plan:
  """Loads the data, unless they are given, and checks everything, before anything is written.

  Raises:
    UsageError: for anything that the user can mend.
  """
  devices = devices_of(config)
  check(config)
  data = load(config) if data is None else data
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
  dense = config.method == "kip" and not data.kernel_fn.arch.convolutional  # those work in tiles
  block = config.target_block_size or (
    planner.rows_at_a_time(-(-batch // len(devices)), m, data.x_train.itemsize) if dense else 0
  )
  return Plan(data, devices, batch, baselines, sizes, name, block)


def description(config: DistillConfig, planned: Plan) -> str:
  """Two lines about what will be done."""
  data, devices = planned.data, planned.devices
  kernel = f"the {config.kernel} of {config.score_architecture or config.architecture}"
  through = (
    f"with {kernel}"
    if recipes.RECIPES[config.method].kernel
    else f"through networks of {config.architecture}, {config.width} wide, scored by {kernel}"
  )
  return (
    f"{config.dataset}: {data.x_train.shape[0]:,} training, {data.x_validation.shape[0]:,} validation, "
    f"{data.x_test.shape[0]:,} test rows of shape {data.x_train.shape[1:]}, {data.raw.num_classes} classes\n"
    f"{config.method} {through}: {planned.sizes.support} images "
    f"({config.images_per_class} a class), {config.steps if recipes.has_loop(config) else 0} steps of {planned.batch} targets "
    f"on {len(devices)} {devices[0].platform} device(s)"
    + (f", {planned.block} at a time" if planned.block else "")
  )


def run_distill(
  config: DistillConfig,
  output_dir: str | None = None,
  overwrite: bool = False,
  verbose: bool = True,
  tensorboard: bool = False,
  upkeep: CheckpointConfig = CheckpointConfig(),
) -> tuple[pathlib.Path, dict]:
  """The main job: distills, scores, and writes the run folder.

  Args:
    config: all choices.
    output_dir: run folder; None for a new one under runs/.
    overwrite: replace the files of an earlier run there.
    verbose: print progress and a summary.
    tensorboard: write event files as well.
    upkeep: checkpoints, and whether to go on from the last one in `output_dir`.

  Returns:
    The folder, and the content of `result.json`.

  Raises:
    UsageError: for anything that the user can mend; NumericalError where numbers failed; Stopped after SIGTERM.
  """
  event_log.require(tensorboard)
  planned = plan(config)
  if not upkeep.resume:  # another size of block is another order of sums
    config = dataclasses.replace(config, target_block_size=planned.block)
  folder = (
    pathlib.Path(output_dir)
    if upkeep.resume
    else run_folder.planned(output_dir, planned.name, overwrite)
  )
  with alone(folder), stop_signals() as stop:
    if not upkeep.resume:
      run_folder.create(str(folder), planned.name, overwrite)
    elif (folder / "README.txt").exists():  # the last of its files
      raise UsageError(f"--resume: the run of {folder} has its result; nothing is left to do")
    return _run(config, planned, folder, verbose, tensorboard, upkeep, stop)


def _run(
  config: DistillConfig,
  planned: Plan,
  folder: pathlib.Path,
  verbose: bool,
  tensorboard: bool,
  upkeep: CheckpointConfig,
  stop,
) -> tuple:
  """`run_distill` in a folder that is its own."""
  started = time.perf_counter()
  say = (lambda text: tqdm.write(text, file=sys.stdout)) if verbose else (lambda text: None)
  data, _, batch, baselines, sizes, *_ = planned
  asked, has_loop, m = config, recipes.has_loop(config), sizes.support
  keeper = Keeper(
    pathlib.Path(upkeep.shared or folder), config, data.raw.hashes, upkeep.checkpoint_seconds
  )
  last = keeper.last() if upkeep.resume else None
  events = event_log.EventLog(folder if tensorboard else None)
  if config.method == "mtt" and not config.experts:
    config = dataclasses.replace(config, experts=str(folder / "experts.npy"))
  if upkeep.resume:
    run_folder.write_metrics(folder, last.history if last else [])
    say(f"going on from step {last.step if last else 0} of {config.steps}")
  if upkeep.shared or last is None:
    run_folder.write_config(
      folder,
      config,
      support_size=m,
      resolved_target_batch_size=batch,
      resolved_num_devices=sizes.devices,
      dataset_hashes=data.raw.hashes,
      note=data.raw.note,
    )
  say(description(config, planned))
  if expected := estimate.of_distillation(config, data, sizes):
    say(expected)
  with progress.working("scoring random real images", shown=verbose, remedy=planner.FEWER_ROWS):
    baseline = [score(config, data, random) for random in baselines]
  with progress.working(
    f"choosing the start ({config.init})", shown=verbose, remedy=planner.FEWER_ROWS
  ):
    chosen, support, evaluations = start(config, data)
    init_accuracy = score(config, data, support)
  say(
    f"random real images: {100 * np.mean(baseline):.1f} % test accuracy (mean of {_BASELINE_DRAWS} draws); "
    f"start ({chosen.strategy}{', solved labels' if evaluations else ''}): {100 * init_accuracy:.1f} %"
  )
  validation = data.x_validation[: sizes.validation], data.y_validation[: sizes.validation]
  with progress.Steps(
    config.steps if has_loop else 0,
    config.method,
    loop.default_log_steps(config.steps),
    say if verbose else None,
    recipes.RECIPES[config.method].kernel,
  ) as bar:

    def callback(step, current, record):
      if sizes.validation:
        record["validation_accuracy"] = score(config, data, current, *validation)
      if config.log_test_accuracy:
        record["test_accuracy"] = score(config, data, current)
      run_folder.append_metrics(folder, record)
      events.scalars(record)
      bar.logged(step)
      if "loss" in record:
        shown = "  ".join(
          f"{k.removesuffix('_accuracy').replace('accuracy', 'batch')} {100 * v:.1f} %"
          for k, v in record.items()
          if k.endswith("accuracy")
        )
        say(
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
    outcome = keeper.carry(
      lambda **kept: distill(config, data, support, **hooks, **kept),
      last,
      stop,
      upkeep.retries,
      lambda history: run_folder.write_metrics(folder, history),
      say,
    )

  with progress.working("scoring", shown=verbose, remedy=planner.FEWER_ROWS):
    test_accuracy = score(config, data, outcome.support)
  measured = {}
  if config.measure_gain and has_loop:
    measured["uniform_targets_test_accuracy"] = uniform_targets(
      config, data, support, outcome.target_evaluations
    )
  result = {
    "dataset": config.dataset,
    "method": config.method,
    "init": config.init,
    "sampler": config.sampler,
    "architecture": config.architecture,
    "kernel": config.kernel,
    "seed": config.seed,
    "support_size": m,
    "steps": config.steps if has_loop else 0,
    "target_evaluations": evaluations + outcome.target_evaluations,
    "init_test_accuracy": init_accuracy,
    "test_accuracy": test_accuracy,
    **measured,
    **network_scores(config, data, outcome.support),
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
    run_folder.write_json(folder / "result.json", result)
    reporting.write_report(folder)
  events.close(result["steps"], [folder / "images.png", folder / "learning_curve.png"])
  readme.of_distillation(folder, asked, result)
  keeper.done()
  say(_summary(folder, result, config.least_gain))
  return folder, result


def check(config: DistillConfig) -> None:
  """Values that are wrong whatever the data, before any work."""
  with usage():
    checks.one_of("method", config.method, recipes.METHODS)
    checks.one_of("init", config.init, coreset.STRATEGIES)
    checks.positive("relative_ridge", config.relative_ridge)
    sampler_of(config)
    options = recipes.options_of(config)
    if recipes.has_loop(config) and config.method != "mtt":  # whose experts are not there yet
      kernel_fn = kernels.NetworkKernel(architecture(config.architecture), config.kernel)
      recipes.RECIPES[config.method].build(config, recipes.Problem(kernel_fn, 2), options)
    optimizers.NamedOptimizer(config.optimizer, config.learning_rate, config.steps, config.schedule)


def _summary(folder, result: dict, least_gain: float) -> str:
  gain, importance_gain = (
    result["test_accuracy"] - result["random_baseline_test_accuracy"],
    result["importance_gain"],
  )
  sampled = ""
  if importance_gain is not None and result["steps"]:
    sampled = (
      f"targets by {result['sampler']}: importance gain {importance_gain:.1f} at the end, "
      + (
        "drawn by loss\n"
        if importance_gain >= least_gain
        else f"below {least_gain:g}, so drawn uniformly\n"
      )
    )
  if "uniform_targets_test_accuracy" in result:
    uniform = result["uniform_targets_test_accuracy"]
    sampled += (
      f"with uniform targets, as many evaluations: {100 * uniform:.2f} % "
      f"({100 * (result['test_accuracy'] - uniform):+.2f} points gained)\n"
    )
  return (
    f"\n{result['support_size']} distilled images: {100 * result['test_accuracy']:.2f} % test accuracy, "
    f"{100 * gain:+.1f} points over {result['support_size']} random real images "
    f"({100 * result['random_baseline_test_accuracy']:.1f} %)\n{sampled}"
    f"{result['wall_seconds']:.1f} s in all, {result['compile_seconds']:.1f} s of it compiling the step\n"
    f"written to {folder}: "
    + ", ".join(sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")))
  )
