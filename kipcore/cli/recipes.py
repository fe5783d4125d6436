"""Methods by name: how each is built from a config, and its settings, published and at CPU size."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from kipcore import checks
from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import UsageError, usage

PRESETS = ("cpu", "published")


class Problem(NamedTuple):
  """What a method needs to know of the data: the kernel with its architecture, the classes, and the file of MTT's experts."""

  kernel_fn: Any
  num_classes: int
  experts: str = ""


class Recipe(NamedTuple):
  """A method under a name.

  Attributes:
    build: `(config, problem, options) -> distill.method.Method`; None for a method without a loop.
    options: the method's own options, "room:class" in kipcore.distill, "" for none.
    published: config fields of the published settings.
    cpu: those that differ at a size for a few CPU cores.
    cpu_options: options that differ from the published ones there.
    kernel: whether the method works through the kernel of the run's architecture, and so starts by it.
    hard_labels: whether the labels of the support are classes, which stay as they are.
    norm: of the networks that the method learns through, and that judge its images.
  """

  build: Callable | None
  options: str = ""
  published: dict = {}
  cpu: dict = {}
  cpu_options: dict = {}
  kernel: bool = False
  hard_labels: bool = False
  norm: str = "none"


def module_of(config: DistillConfig, problem: Problem, **changes):
  """The network that a method learns through: the run's architecture, with the method's norm."""
  from kipcore.networks import network

  return network(
    problem.kernel_fn.arch,
    config.width,
    problem.num_classes,
    **{"norm": RECIPES[config.method].norm, **changes},
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


def _mtt(config, problem, options):
  from kipcore.distillation.methods import trajectory_matching
  from kipcore.io import trajectories

  return trajectory_matching.mtt(
    module_of(config, problem), trajectories.load_trajectories(problem.experts).array, options
  )


_NETWORKS = dict(architecture="conv3", relative_ridge=5e-3, schedule="constant", solve_labels=False)
_CPU = dict(
  width=32,
  steps=200,
  target_batch_size=250,
  score_architecture="fc1",
  test_rows=2000,
  network_seeds=2,
  network_steps=300,
)
_FIXED = dict(_NETWORKS, learn_labels=False, width=128, optimizer="sgd", network_seeds=5)
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
    ),
    dict(_CPU, learning_rate=0.02),
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
    ),
    dict(_CPU, learning_rate=0.01),
    dict(relative_ridge=1e-4),
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
    ),
    dict(_CPU, learning_rate=0.02, steps=60),
    dict(pool_size=10),
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
    dict(_FIXED, learning_rate=0.1, steps=1000, target_batch_size=2560),
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
  "mtt": Recipe(
    _mtt,
    "trajectory_matching:TrajectoryMatchingOptions",
    dict(_FIXED, learning_rate=1000.0, steps=5000, target_batch_size=256),
    dict(_CPU, steps=60, num_experts=4, expert_epochs=6, expert_rows=5000),
    # At rate 0.01 a student of ten images overshoots, and the first update of the images undoes the start.
    dict(syn_steps=10, expert_epochs=1, max_start_epoch=4, initial_rate=0.003),
    hard_labels=True,
    norm="instance",
  ),
}
METHODS = tuple(RECIPES)


def has_loop(config: DistillConfig) -> bool:
  """Whether the method learns step by step."""
  return RECIPES[config.method].build is not None


def resolve(**given) -> DistillConfig:
  """The config of what was asked, on the method's settings of the preset, on the defaults.

  Raises:
    UsageError: for an unknown method or preset.
  """
  default = DistillConfig()
  method, preset = given.get("method", default.method), given.get("preset", default.preset)
  with usage():
    for name, value, known in (("method", method, METHODS), ("preset", preset, PRESETS)):
      checks.one_of(name, value, known)
  recipe = RECIPES[method]
  settings = {**recipe.published, **(recipe.cpu if preset == "cpu" else {}), **given}
  return dataclasses.replace(default, **settings)


def options_of(config: DistillConfig):
  """The method's own options: published, at CPU size, or as `--options` says; None for methods without.

  Raises:
    UsageError: for an unknown option, or a value of another type.
  """
  recipe = RECIPES[config.method]
  texts = [part for part in config.options.split(",") if part]
  if not recipe.options:
    if texts:
      raise UsageError(
        f"--options: expected none for --method={config.method}, got {config.options!r}"
      )
    return None
  room, name = recipe.options.split(":")
  options = getattr(importlib.import_module(f"kipcore.distillation.methods.{room}"), name)()
  options = dataclasses.replace(options, **(recipe.cpu_options if config.preset == "cpu" else {}))
  return dataclasses.replace(options, **parsed("--options", texts, dataclasses.asdict(options)))


def parsed(flag: str, texts: list[str], defaults: dict) -> dict:
  """name=value texts, each value in the type of its default.

  Raises:
    UsageError: for an unknown name, or a value of another type.
  """
  given = {}
  for text in texts:
    name, _, value = text.partition("=")
    if name not in defaults:
      raise UsageError(
        f"{flag}: expected names among {', '.join(defaults)}; got {name!r}{checks.did_you_mean(name, defaults)}"
      )
    kind = str if defaults[name] is None else type(defaults[name])
    try:
      given[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
      raise UsageError(
        f"{flag}: expected {name} to be of type {kind.__name__}, got {value!r}"
      ) from None
  return given


def distiller_of(config: DistillConfig, problem: Problem, sampler, batch_size: int):
  """The constant parts of a run. Equal settings give equal distillers, which share a compilation.

  Raises:
    UsageError, ValueError: for options and numbers out of range.
  """
  from kipcore.distillation import loop, optimizers

  method = RECIPES[config.method].build(config, problem, options_of(config))
  optimizer = optimizers.NamedOptimizer(
    config.optimizer, config.learning_rate, config.steps, config.schedule
  )
  return loop.Distiller(method, sampler, optimizer, batch_size)
