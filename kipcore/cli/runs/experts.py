"""Experts, networks trained on the training rows: trained once, kept in a file, resumed after an interruption.

MTT imitates them, NCFM compares features of them, `--labels=expert` takes labels from one, and the selection `rded` their losses.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kipcore import architectures, augment, keys
from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig, ExpertConfig
from kipcore.cli.errors import Stopped, UsageError, usage
from kipcore.cli.folder import run_folder
from kipcore.distillation import samplers
from kipcore.distillation.methods import expert_labels, experts
from kipcore.evaluation import ranking
from kipcore.io import trajectories
from kipcore.networks import Network, network
from kipcore.types import Support

PARTIAL = ".partial"
_BATCH = 256
_NORM = "instance"
# Students per epoch from which the epoch of the labels is chosen.
_STUDENTS = 2
# Of experts for labels; those of MTT have none, as published.
_MOMENTUM = 0.9
_VALIDATION_ROWS = 2000
_NAMES = (
  "dataset",
  "seed",
  "preprocess",
  "train_rows",
  "validation_fraction",
  "width",
  "num_experts",
  "expert_epochs",
  "sampler",
  "uniform_mix",
  "weight_exponent",
  "least_gain",
)


class Expert(NamedTuple):
  """A trained network and its parameters `(epochs + 1, p)` at the start and after every epoch; target evaluations of its training."""

  module: Network
  trajectory: np.ndarray
  target_evaluations: int = 0


class ExpertLabels(NamedTuple):
  """The expert that labels the images of a run, the chosen epoch, and the target evaluations of its training."""

  expert: Expert
  choice: expert_labels.ExpertChoice
  target_evaluations: int

  def of(self, x) -> Support:
    """Images with its labels."""
    return labeled(self.expert, self.choice.epoch, x)

  def result(self) -> dict:
    """What is recorded in `result.json`."""
    return {
      "expert_epoch": self.choice.epoch,
      "expert_epochs": len(self.expert.trajectory) - 1,
      "expert_validation_accuracies": {
        str(epoch): accuracy for epoch, accuracy in self.choice.accuracies.items()
      },
    }


def prepare(
  config: DistillConfig, data, sampler, path, stop: Callable[[], bool] = lambda: False
) -> int:
  """Trains the experts of MTT or NCFM and writes them to a file, unless it exists.

  Args:
    config: settings of the run.
    data: its data; of which `--expert_rows` evenly spaced rows are used.
    sampler: sampler of the rows that the experts are trained on.
    path: `.npy` file; the progress is kept beside it, so that a second call continues.
    stop: called every few seconds; whether to end with the progress saved.

  Returns:
    Target evaluations of their training.

  Raises:
    UsageError: if the file contains the experts of another run.
    Stopped: after `stop`.
  """
  rows = rows_of(config, data)
  module = recipes.module_of(config, recipes.Problem(data.kernel_fn, data.y_train.shape[1]))
  if config.patience and config.num_experts > 1:
    raise UsageError(
      f"--patience: expected 0 with {config.num_experts} experts, which need equally many epochs, got {config.patience}"
    )
  augmentation = recipes.options_of(config).augmentation
  about = _about(config, data, module, augmentation, len(rows))
  with usage():
    if pathlib.Path(path).exists():
      known = trajectories.load_trajectories(
        path, verify=False
      ).metadata  # verified when they are used
      # Without patience the epochs of a longer training are as good.
      _check_same(path, known, about if config.patience else _without(about, "patience"))
    else:
      _train(
        config, data, rows, module, sampler, augmentation, config.num_experts, path, about, stop
      )
    epochs = trajectories.load_trajectories(path, verify=False).array.shape[1] - 1
  return config.num_experts * epochs * _evaluations(len(rows))


def label_expert(
  config: ExpertConfig, data, path, stop: Callable[[], bool] = lambda: False
) -> Expert:
  """The expert that labels or scores images: the first one of the file, trained if there is none.

  Training uses uniform targets, momentum 0.9, instance normalization and augmentation (without mirror images for one channel), and ends
  after `--patience` epochs without a better accuracy on the validation rows.

  Args:
    config: settings of the run.
    data: its data.
    path: `.npy` file; experts of MTT on the same training rows serve as well.
    stop: called every few seconds; whether to end with the progress saved.

  Returns:
    `Expert`, memory-mapped.

  Raises:
    UsageError: without validation rows, or for a file whose experts know other training rows or another preprocessing.
    Stopped: after `stop`.
  """
  check_validation(data)
  rows, path = rows_of(config, data), pathlib.Path(path)
  classes = data.y_train.shape[1]
  with usage():
    if not path.exists():
      module, augmentation = _label_network(config, data)
      about = {
        **_about(config, data, module, augmentation, len(rows)),
        "num_experts": 1,
        "sampler": "uniform",
        "momentum": _MOMENTUM,
      }
      _train(config, data, rows, module, samplers.Uniform(), augmentation, 1, path, about, stop)
    found = trajectories.load_trajectories(path)
    known = found.metadata
    wanted = {
      "train_hash": data.raw.hashes["train"],
      "preprocess": config.preprocess,
    }
    _check_same(path, known, wanted)
    try:
      arch = architectures.Architecture.from_json(known["architecture"])
      module = network(arch, int(known["width"]), classes, norm=str(known["norm"]))
      size, _ = experts.flat_parameters(module, data.x_train[:1])
    except (KeyError, TypeError, ValueError) as error:
      raise UsageError(
        f"--experts: expected {path} to record a network for the rows of the dataset, got another ({error})"
      ) from error
    if found.array.shape[2] != size:
      raise UsageError(
        f"--experts: expected {path} to hold {size:,} parameters, got {found.array.shape[2]:,}"
      )
    evaluations = (found.array.shape[1] - 1) * _evaluations(int(known.get("rows", len(rows))))
  return Expert(module, found.array[0], evaluations)


def choose(
  config: ExpertConfig,
  data,
  expert: Expert,
  rows,
  students: ranking.NetworkEvaluator,
  folder: pathlib.Path,
) -> expert_labels.ExpertChoice:
  """The epoch whose labels of the given images teach students best on validation rows.

  The choice is kept in a file of the run folder, from which an interrupted run reads it.

  Args:
    config: settings of the run.
    data: its data; test rows are not used.
    expert: the expert.
    rows: `(m, ...)` images.
    students: how the networks that learn from the labels are trained.
    folder: run folder.

  Returns:
    `ExpertChoice`.
  """
  path = folder / "expert_choice.json"
  if path.exists():
    content = json.loads(path.read_text(encoding="utf-8"))
    accuracies = {int(epoch): value for epoch, value in content["validation_accuracies"].items()}
    return expert_labels.ExpertChoice(content["epoch"], accuracies)
  with usage():
    found = expert_labels.choose_expert(
      keys.stream(config.seed, "expert epoch"),
      expert.module,
      expert.trajectory,
      rows,
      data.x_validation[:_VALIDATION_ROWS],
      data.y_validation[:_VALIDATION_ROWS],
      students.network,
      protocol=students.protocol,
      width=students.width,
      num_steps=students.num_steps,
      num_seeds=_STUDENTS,
      norm=students.norm,
    )
  run_folder.write_json(path, {"epoch": found.epoch, "validation_accuracies": found.accuracies})
  return found


def labeled(expert: Expert, epoch: int, x) -> Support:
  """Images with the labels of an expert."""
  x = jnp.asarray(x)
  labels = expert_labels.expert_labels(expert.module, expert.trajectory[epoch], x)
  return Support(x, labels.astype(x.dtype))


def num_students(epochs: int) -> int:
  """Number of networks that `choose` trains for an expert of so many epochs."""
  return _STUDENTS * (epochs.bit_length() + (epochs & (epochs - 1) > 0))


def one_epoch(config: ExpertConfig, data) -> None:
  """An epoch of the training of an expert for labels, to measure its time."""
  module, augmentation = _label_network(config, data)
  experts.train_expert(
    0, module, data.x_train, data.y_train, 1, batch_size=_BATCH, augmentation=augmentation
  )


def _label_network(config: ExpertConfig, data) -> tuple[Network, str]:
  """The network of an expert for labels, and its augmentation."""
  shape = data.x_train.shape[1:]
  names = augment.DSA.split("_") if len(shape) == 3 else []
  names = [name for name in names if shape[-1] > 1 or name != "flip"]
  arch, classes = data.kernel_fn.arch, data.y_train.shape[1]
  return network(arch, config.width, classes, norm=_NORM), "_".join(names)


def check_validation(data) -> None:
  """Raises UsageError unless there are validation rows, on which the epoch of an expert is chosen."""
  if not len(data.x_validation):
    raise UsageError(
      "--validation_fraction: expected more than 0 for experts, whose epoch is chosen on validation rows, got none"
    )


def rows_of(config: ExpertConfig, data) -> np.ndarray:
  """Indices of the training rows that experts are trained on."""
  if config.expert_rows > len(data.x_train):
    raise UsageError(
      f"--expert_rows: expected at most the {len(data.x_train)} training rows, got {config.expert_rows}"
    )
  return np.linspace(0, len(data.x_train) - 1, config.expert_rows or len(data.x_train)).astype(int)


def _about(config: ExpertConfig, data, module: Network, augmentation: str, rows: int) -> dict:
  """What distinguishes one file of experts from another."""
  default = DistillConfig()
  return {
    **{name: getattr(config, name, getattr(default, name)) for name in _NAMES},
    "rows": rows,
    "augmentation": augmentation,
    "norm": module.norm,
    "architecture": module.arch.to_json(),
    "train_hash": data.raw.hashes["train"],
    "patience": config.patience,
    "momentum": 0.0,
  }


def _check_same(path, known: dict, about: dict) -> None:
  known = {"patience": 0, "momentum": 0.0, **known}  # files of earlier versions
  different = [name for name in about if known.get(name) != about[name]]
  if different:
    raise UsageError(
      f"--experts: {path} contains the experts of another run: {different[0]} is {known.get(different[0])!r}, "
      f"expected {about[different[0]]!r}"
    )


def _without(content: dict, name: str) -> dict:
  return {key: value for key, value in content.items() if key != name}


def _evaluations(rows: int) -> int:
  """Target evaluations of an epoch."""
  batch = min(_BATCH, rows)
  return -(-rows // batch) * batch


def _train(
  config, data, rows, module, sampler, augmentation, count: int, path, about: dict, stop
) -> None:
  """Trains experts one after the other into a file; unfinished ones are in a folder beside it."""
  path = pathlib.Path(path)
  partial = path.with_name(path.name + PARTIAL)
  partial.mkdir(exist_ok=True)
  x, y = data.x_train[rows], data.y_train[rows]
  validation = (data.x_validation, data.y_validation) if config.patience else None

  def trained(i: int) -> Any:
    file, start = partial / f"{i}.npz", None
    if file.exists():
      start, known = trajectories.load_expert_state(file)
      _check_same(file, known, about)

    def progress(state: experts.ExpertState) -> None:
      trajectories.save_expert_state(file, state, about)
      if stop():
        raise Stopped(
          f"stopped in epoch {len(state.trajectory)} of {config.expert_epochs} of expert {i + 1} of {count}; "
          "--resume continues from there"
        )

    return experts.train_expert(
      keys.stream(config.seed, f"expert {i}"),
      module,
      x,
      y,
      config.expert_epochs,
      batch_size=_BATCH,
      sampler=sampler,
      momentum=about["momentum"],
      augmentation=augmentation,
      validation=validation,
      patience=config.patience if validation else 0,
      start=start,
      progress=progress,
    )

  trajectories.save_trajectories(path, map(trained, range(count)), about)
  shutil.rmtree(partial)
