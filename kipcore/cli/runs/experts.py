"""The expert trajectories of MTT: trained once, stored with the run, read from disk."""

import pathlib

import numpy as np

from kipcore import keys
from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import UsageError, usage
from kipcore.distillation.methods import experts
from kipcore.io import trajectories

_BATCH = 256


def prepare(config: DistillConfig, data, sampler, path) -> int:
  """Trains the experts of a run and writes them to a file, unless it exists.

  Args:
    config: settings of the run.
    data: its data; of which `--expert_rows` evenly spaced rows are used.
    sampler: sampler of the rows that the experts are trained on.
    path: `.npy` file.

  Returns:
    Target evaluations of their training.

  Raises:
    UsageError: if the file contains the experts of another run.
  """
  if config.expert_rows > len(data.x_train):
    raise UsageError(
      f"--expert_rows: expected at most the {len(data.x_train)} training rows, got {config.expert_rows}"
    )
  rows = np.linspace(0, len(data.x_train) - 1, config.expert_rows or len(data.x_train)).astype(int)
  module = recipes.module_of(config, recipes.Problem(data.kernel_fn, data.y_train.shape[1]))
  augmentation = recipes.options_of(config).augmentation
  names = (
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
  about = {
    **{name: getattr(config, name) for name in names},
    "rows": len(rows),
    "augmentation": augmentation,
    "norm": module.norm,
    "architecture": module.arch.to_json(),
    "train_hash": data.raw.hashes["train"],
  }
  with usage():
    if pathlib.Path(path).exists():
      known = trajectories.load_trajectories(path, verify=False).metadata  # mtt verifies them
      different = [name for name in about if known.get(name) != about[name]]
      if different:
        raise UsageError(
          f"--experts: {path} contains the experts of another run: {different[0]} is {known.get(different[0])!r}, "
          f"expected {about[different[0]]!r}"
        )
    else:
      x, y = data.x_train[rows], data.y_train[rows]
      trained = (
        experts.train_expert(
          keys.stream(config.seed, f"expert {i}"),
          module,
          x,
          y,
          config.expert_epochs,
          batch_size=_BATCH,
          sampler=sampler,
          augmentation=augmentation,
        )
        for i in range(config.num_experts)
      )
      trajectories.save_trajectories(path, trained, about)
  batch = min(_BATCH, len(rows))
  return config.num_experts * config.expert_epochs * -(-len(rows) // batch) * batch
