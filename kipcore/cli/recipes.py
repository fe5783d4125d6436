"""Methods by name: how each is built from a config, and its settings, as published and for a few CPU cores."""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kipcore import checks
from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import UsageError, usage

PRESETS = ("cpu", "published")
# The method that --teach chooses.
TEACH = {"network": "ratbptt", "kernel": "kip", "both": "both"}
# The method for networks where --minutes is too short for that of TEACH.
CHEAPER = "frepo"
# Methods whose set is for a kernel, the one of the run or that of their own networks.
FOR_KERNELS = ("kip", "label_solve", "krr_closed_form", "rfad")


class Problem(NamedTuple):
  """What a method depends on besides the config: kernel with its architecture, number of classes, experts `(experts, points, p)`."""

  kernel_fn: Any
  num_classes: int
  experts: Any = None


class Recipe(NamedTuple):
  """How a method is built, and its settings.

  Attributes:
    build: `(config, problem, options) -> Method`; None for a method without a loop.
    options: the options class of the method, as "module:class" in kipcore.distillation.methods; "" for none.
    published: config fields of the published settings.
    cpu: those that differ for a few CPU cores.
    cpu_options: options that differ from the published ones for a few CPU cores.
    kernel: whether the method, and so its initialization, uses the kernel of the run's architecture.
    hard_labels: whether the labels are classes, which are not changed.
    norm: normalization of the networks that the method trains and that score its images.
    w_std: standard deviation of their initial weights, times 1/sqrt(fan_in), with biases 0; None for that of the architecture.
    experts: whether the method needs experts.
  """

  build: Callable[..., Any] | None
  options: str = ""
  published: dict = {}
  cpu: dict = {}
  cpu_options: dict = {}
  kernel: bool = False
  hard_labels: bool = False
  norm: str = "none"
  w_std: float | None = None
  experts: bool = False


def module_of(config: DistillConfig, problem: Problem, **changes):
  """The network that a method trains: the run's architecture with the method's normalization."""
  from kipcore.networks import network

  recipe, arch = RECIPES[config.method], problem.kernel_fn.arch
  return network(
    arch if recipe.w_std is None else arch.with_stds(recipe.w_std),
    config.width,
    problem.num_classes,
    **{"norm": recipe.norm, **changes},
  )


def _kip(config, problem, options):
  from kipcore.distillation.methods import kip

  return kip.kip(
    problem.kernel_fn,
    kip.KIPOptions(
      config.relative_ridge,
      config.loss,
      config.learn_labels,
      block_size=config.target_block_size or None,
    ),
  )


def _rfad(config, problem, options):
  from kipcore.distillation.methods import rfad

  return rfad.rfad(
    module_of(config, problem),
    dataclasses.replace(
      options,
      relative_ridge=config.relative_ridge,
      loss=config.loss,
      learn_labels=config.learn_labels,
    ),
  )


def _frepo(config, problem, options):
  from kipcore.distillation.methods import frepo

  return frepo.frepo(
    module_of(config, problem, norm="batch", width_growth=2),
    dataclasses.replace(options, learn_labels=config.learn_labels),
  )


def _rcig(config, problem, options):
  from kipcore.distillation.methods import rcig

  return rcig.rcig(module_of(config, problem, softplus=60.0), options)


def _dm(config, problem, options):
  from kipcore.distillation.methods import distribution_matching

  return distribution_matching.dm(module_of(config, problem), options)


def _matching(config, problem, options):
  from kipcore.distillation.methods import gradient_matching

  return getattr(gradient_matching, config.method)(module_of(config, problem), options)


def _ratbptt(config, problem, options):
  from kipcore.distillation.methods import ratbptt

  return ratbptt.rat_bptt(
    module_of(config, problem), dataclasses.replace(options, learn_labels=config.learn_labels)
  )


def _both(config, problem, options):
  from kipcore import kernels
  from kipcore.architectures import architecture
  from kipcore.distillation.methods import combined, kip

  network = dataclasses.replace(options, loss="squared_error")
  name = config.score_architecture or problem.kernel_fn.arch.name
  # The loss of kip is a mean over classes, that of networks a sum.
  return combined.combined(
    _ratbptt(config, problem, network),
    kip.kip(
      kernels.NetworkKernel(architecture(name), config.kernel),
      kip.KIPOptions(config.relative_ridge, learn_labels=config.learn_labels),
    ),
    weights=(1.0, float(problem.num_classes)),
  )


def _mtt(config, problem, options):
  from kipcore.distillation.methods import trajectory_matching

  return trajectory_matching.mtt(module_of(config, problem), problem.experts, options)


def _ncfm(config, problem, options):
  from kipcore.distillation.methods import characteristic_function

  return characteristic_function.ncfm(module_of(config, problem), problem.experts, options)


_NETWORKS = dict(architecture="conv3", relative_ridge=5e-3, schedule="constant", solve_labels=False)
_CPU = dict(
  width=32,
  steps=200,
  target_batch_size=250,
  score_architecture="fc1",
  test_rows=2000,
  network_seeds=2,
)
_FIXED = dict(
  _NETWORKS, learn_labels=False, width=128, optimizer="sgd", network_seeds=5, protocol="dsa"
)
# Training of networks on the set, unrolled: ratbptt, alone or together with a kernel.
_UNROLLED = dict(
  architecture="auto",
  sampler="uniform",
  width=128,
  optimizer="adam_clipped",
  learning_rate=1e-3,
  network_seeds=5,
)
_UNROLLED_CPU = dict(_CPU, learning_rate=0.01, schedule="cosine", steps=400, target_batch_size=0)
_UNROLLED_OPTIONS = dict(unroll=60, window=30, inner_rate=3e-3, augmentation="")
RECIPES = {
  "kip": Recipe(_kip, kernel=True),
  "label_solve": Recipe(None, kernel=True),
  "krr_closed_form": Recipe(None, "closed_form:ClosedFormOptions", dict(init="uniform")),
  "rfad": Recipe(
    _rfad,
    "rfad:RFADOptions",
    dict(
      _NETWORKS,
      width=256,
      loss="cross_entropy",
      learn_labels=False,
      optimizer="adabelief",
      learning_rate=1e-3,
      steps=10_000,
      target_batch_size=5120,
      network_seeds=5,
      protocol="kip",
    ),
    dict(_CPU, learning_rate=0.02, steps=800),
    dict(num_networks=2),
  ),
  "frepo": Recipe(
    _frepo,
    "frepo:FRePoOptions",
    dict(
      _NETWORKS,
      width=128,
      optimizer="lamb",
      learning_rate=3e-4,
      schedule="cosine",
      steps=500_000,
      target_batch_size=1024,
      network_seeds=5,
      protocol="frepo",
    ),
    dict(_CPU, learning_rate=0.01, schedule="cosine", steps=1000),
    dict(relative_ridge=1e-4),
    w_std=1.0,
  ),
  "rcig": Recipe(
    _rcig,
    "rcig:RCIGOptions",
    dict(
      _NETWORKS,
      width=128,
      optimizer="adabelief",
      learning_rate=3e-3,
      steps=10_000,
      target_batch_size=1024,
      network_seeds=5,
      protocol="rcig",
    ),
    dict(_CPU, learning_rate=0.02, steps=150),
    # As good on MNIST as 20 steps of each, in half the time.
    dict(pool_size=10, inner_steps=5, inverse_steps=5),
    w_std=1.0,
  ),
  "dm": Recipe(
    _dm,
    "distribution_matching:DMOptions",
    dict(_FIXED, learning_rate=1.0, steps=20_000, target_batch_size=2560),
    _CPU,
    hard_labels=True,
    norm="instance",
  ),
  "dc": Recipe(
    _matching,
    "gradient_matching:GradientMatchingOptions",
    dict(_FIXED, learning_rate=0.1, steps=1000, target_batch_size=2560, protocol="dc"),
    dict(_CPU, learning_rate=1.0, steps=100),
    hard_labels=True,
    norm="instance",
  ),
  "dsa": Recipe(
    _matching,
    "gradient_matching:GradientMatchingOptions",
    dict(_FIXED, learning_rate=0.1, steps=1000, target_batch_size=2560),
    dict(_CPU, learning_rate=1.0, steps=100),
    hard_labels=True,
    norm="instance",
  ),
  "ratbptt": Recipe(
    _ratbptt,
    "ratbptt:RaTBPTTOptions",
    dict(
      {**_NETWORKS, **_UNROLLED},
      learn_labels=False,
      steps=60_000,
      target_batch_size=5000,
      protocol="soft",
    ),
    dict(_UNROLLED_CPU, learn_labels=True),
    _UNROLLED_OPTIONS,
    norm="instance",
  ),
  "both": Recipe(
    _both,
    "ratbptt:RaTBPTTOptions",
    dict(
      **_UNROLLED,
      score_architecture="fc1",
      solve_labels=False,
      steps=10_000,
      target_batch_size=1000,
      protocol="frepo",
    ),
    _UNROLLED_CPU,
    _UNROLLED_OPTIONS,
    norm="instance",
  ),
  "mtt": Recipe(
    _mtt,
    "trajectory_matching:TrajectoryMatchingOptions",
    dict(_FIXED, learning_rate=1000.0, steps=5000, target_batch_size=256, patience=0),
    dict(_CPU, steps=60, num_experts=4, expert_epochs=6, expert_rows=5000),
    # At a rate of 0.01 a student trained on ten images overshoots, and the first update undoes the initialization.
    dict(syn_steps=10, expert_epochs=1, max_start_epoch=4, initial_rate=0.003),
    hard_labels=True,
    norm="instance",
    experts=True,
  ),
  "ncfm": Recipe(
    _ncfm,
    "characteristic_function:NCFMOptions",
    dict(
      _FIXED,
      optimizer="adam",
      learning_rate=0.04,
      steps=20_000,
      target_batch_size=10_240,
      num_experts=20,
      expert_epochs=60,
      patience=0,
    ),
    dict(_CPU, num_experts=4, expert_epochs=6, expert_rows=5000),
    dict(num_frequencies=1024),
    hard_labels=True,
    norm="instance",
    experts=True,
  ),
}
METHODS = tuple(RECIPES)


def taught_by(method: str) -> str:
  """The model that the sets of a method are for: network, kernel or both."""
  return method if method == "both" else "kernel" if method in FOR_KERNELS else "network"


def has_loop(config: DistillConfig) -> bool:
  """Whether the method is iterative."""
  return RECIPES[config.method].build is not None


def resolve(**given) -> DistillConfig:
  """The config of the given settings; others are those of the method's preset, then the defaults.

  Args:
    **given: settings by name.

  Returns:
    A config.

  Raises:
    UsageError: for an unknown method or preset.
  """
  default = DistillConfig()
  goal = given.get("teach") or ("" if "method" in given else "network")
  if goal and "method" in given and goal != taught_by(given["method"]):
    raise UsageError(
      f"--teach: expected {taught_by(given['method'])} or none with --method={given['method']}, got {goal}"
    )
  method = given.get("method") or TEACH.get(goal, default.method)
  given = {**given, "method": method, "teach": taught_by(method)}
  preset = given.get("preset", default.preset)
  with usage():
    for name, value, known in (("method", method, METHODS), ("preset", preset, PRESETS)):
      checks.one_of(f"--{name}", value, known)
  recipe = RECIPES[method]
  settings = {**recipe.published, **(recipe.cpu if preset == "cpu" else {})}
  labels = given.get("labels", "")
  if labels in ("class", "learned"):
    settings["learn_labels"] = labels == "learned"
  if labels == "expert" and recipe.hard_labels:
    settings["protocol"] = "soft"  # those of hard labels learn from the largest entry alone
  config = dataclasses.replace(default, **{**settings, **given})
  check_labels(config)
  return config


def cheaper(given: dict) -> DistillConfig | None:
  """The settings for networks with the method whose steps are cheapest, if the user left the choice of the method; else None."""
  if "method" in given or "options" in given or taught_by(resolve(**given).method) != "network":
    return None
  return resolve(**{**given, "method": CHEAPER})


def check_labels(config: DistillConfig) -> None:
  """Raises UsageError for `--labels` that a method cannot have, or that contradict `--learn_labels`."""
  recipe, flag, found = RECIPES[config.method], f"--method={config.method}", config.labels
  if not found:
    return
  expected = ""
  if not has_loop(config):
    expected = f"none with {flag}, which computes the labels"
  elif recipe.hard_labels and found == "learned":
    expected = f"class or expert with {flag}, which does not learn labels"
  elif config.method == "rcig" and found == "class":
    expected = f"learned or expert with {flag}, which always learns labels"
  elif found == "class" and config.learn_labels and not recipe.hard_labels:
    expected = "learned or expert with --learn_labels"
  elif found == "learned" and not config.learn_labels:
    expected = "class or expert with --nolearn_labels"
  if expected:
    raise UsageError(f"--labels: expected {expected}, got {found}")


_LOOP: tuple[str, ...] = ("steps", "optimizer", "learning_rate", "schedule", "target_batch_size")
_LOOP += ("loss", "learn_labels", "sampler", "log_test_accuracy")
_BY_LOSS = ("uniform_mix", "weight_exponent", "least_gain", "refresh_every", "measure_gain")
_EXPERTS = ("experts", "expert_epochs", "expert_rows", "patience")


def unused(config: DistillConfig, given: dict) -> list[str]:
  """Notes on the given flags that have no effect with the others.

  Args:
    config: settings of the run.
    given: settings that the user gave.

  Returns:
    A line per reason.
  """
  recipe, loop = RECIPES[config.method], has_loop(config)
  by_loss = loop and config.sampler not in ("uniform", "class_balanced")
  through_networks = loop and not recipe.kernel
  method = f"--method={config.method}"
  rules: tuple[tuple[tuple[str, ...], str], ...] = (
    (() if loop else _LOOP, method),
    (() if by_loss else _BY_LOSS, f"--sampler={config.sampler}" if loop else method),
    (() if recipe.experts or config.labels == "expert" else _EXPERTS, method),
    (() if recipe.experts else ("num_experts",), method),
    (() if config.method == "kip" else ("target_block_size",), method),
    (() if config.method == "kip" and config.learn_labels else ("solve_labels",), method),
    (("solve_labels",) if config.labels == "expert" else (), "--labels=expert"),
    (("learn_labels",) if recipe.hard_labels else (), f"{method}, whose labels are the classes"),
    (() if config.method in ("kip", "rfad") or not loop else ("loss",), method),
    (() if config.network_seeds else ("network_steps", "network_width"), "--network_seeds=0"),
    (
      () if through_networks or config.network_seeds or config.labels == "expert" else ("width",),
      f"{method} and --network_seeds=0",
    ),
    (() if recipe.published else ("preset",), method),
  )
  lines = []
  for names, reason in rules:
    if found := [f"--{name}" for name in names if name in given]:
      verb = "has" if len(found) == 1 else "have"
      lines.append(f"note: {', '.join(found)} {verb} no effect with {reason}")
  return lines


def options_of(config: DistillConfig):
  """The method's options: published or for a few CPU cores, then as in `--options`; None if it has none.

  Raises:
    UsageError: for an unknown option or a value of another type.
  """
  recipe = RECIPES[config.method]
  texts = [part for part in config.options.split(",") if part]
  if not recipe.options:
    if texts:
      raise UsageError(
        f"--options: expected none for --method={config.method}, got {config.options!r}"
      )
    return None
  module, name = recipe.options.split(":")
  options = getattr(importlib.import_module(f"kipcore.distillation.methods.{module}"), name)()
  options = dataclasses.replace(options, **(recipe.cpu_options if config.preset == "cpu" else {}))
  return dataclasses.replace(options, **parsed("--options", texts, dataclasses.asdict(options)))


def parsed(flag: str, texts: list[str], defaults: dict) -> dict:
  """Parses name=value texts, each value with the type of its default.

  Args:
    flag: flag that the texts belong to, for messages.
    texts: the texts.
    defaults: valid names with their defaults.

  Returns:
    Values by name.

  Raises:
    UsageError: for an unknown name or a value of another type.
  """
  given: dict[str, Any] = {}
  for text in texts:
    name, _, value = text.partition("=")
    if name not in defaults:
      raise UsageError(
        f"{flag}: expected names among {', '.join(defaults)}; got {name!r}{checks.did_you_mean(name, defaults)}"
      )
    kind = str if defaults[name] is None else type(defaults[name])
    try:
      given[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
      if kind is float and not math.isfinite(given[name]):
        raise ValueError(value)
    except (KeyError, ValueError):
      wanted = {bool: "true or false", int: "an integer", float: "a finite number"}[kind]
      raise UsageError(f"{flag}: expected {name} to be {wanted}, got {value!r}") from None
  return given


def built(config: DistillConfig, problem: Problem):
  """The method of a config; UsageError if it has no loop."""
  build = RECIPES[config.method].build
  if build is None:
    raise UsageError(f"--method: expected a method with a loop, got {config.method}")
  return build(config, problem, options_of(config))


def distiller_of(config: DistillConfig, problem: Problem, sampler, batch_size: int):
  """The constant parts of a run. Equal settings give equal distillers, which share a compilation.

  Args:
    config: settings of the run.
    problem: what the method depends on besides.
    sampler: sampler of targets.
    batch_size: targets per step.

  Returns:
    A `Distiller`.

  Raises:
    UsageError, ValueError: for options and numbers out of range.
  """
  from kipcore.distillation import loop, optimizers

  method = built(config, problem)
  optimizer = optimizers.NamedOptimizer(
    config.optimizer, config.learning_rate, config.steps, config.schedule
  )
  return loop.Distiller(method, sampler, optimizer, batch_size)
