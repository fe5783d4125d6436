"""What a run is told: frozen configs, whose defaults are those of the flags. Imports nothing heavy."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What loading needs; see the flags of the same names."""

  dataset: str = "digits"
  data_dir: str | None = None
  architecture: str = "fc1"
  kernel: str = "ntk"
  score_architecture: str = ""
  precision: str = "float32"
  images_per_class: int = 1
  preprocess: str = "standardize"
  train_rows: int = 0
  validation_fraction: float = 0.1
  test_rows: int = 0
  seed: int = 0
  num_devices: int = 0
  x64: bool = False


@dataclasses.dataclass(frozen=True)
class DistillConfig(DataConfig):
  """What `run_distill` needs besides."""

  method: str = "kip"
  preset: str = "cpu"
  options: str = ""
  width: int = 128
  optimizer: str = "adam"
  network_seeds: int = 0
  network_steps: int = 1000
  experts: str = ""
  num_experts: int = 100
  expert_epochs: int = 50
  expert_rows: int = 0
  init: str = "kmeans"
  sampler: str = "cross_entropy"
  uniform_mix: float = 0.5
  weight_exponent: float = 0.25
  least_gain: float = 1.1
  refresh_every: int = 0
  steps: int = 1000
  target_batch_size: int = 0
  target_block_size: int = 0
  learning_rate: float = 0.04
  schedule: str = "cosine"
  relative_ridge: float = 1e-6
  loss: str = "mse"
  learn_labels: bool = True
  solve_labels: bool = True
  log_test_accuracy: bool = False
  measure_gain: bool = False


@dataclasses.dataclass(frozen=True)
class SelectConfig(DataConfig):
  """What `run_select` needs besides."""

  strategy: str = "krr_sensitivity"
  score_ridge: str = "auto"
  relative_ridge: float = 1e-6


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """What `run_evaluate` needs besides an artifact."""

  evaluators: tuple = ("krr",)
  baselines: tuple = ("uniform", "kmeans", "herding", "k_center", "leverage", "full")
  num_seeds: int = 5
  seed: int = 0
  width: int = 128
  network_steps: int = 1000
  full_rows: int = 5000
  test_rows: int = 0
  dataset: str | None = None
  data_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """The grid of `run_compare`."""

  methods: tuple = ("kip", "rfad", "frepo", "rcig", "dm", "dc", "dsa", "mtt")
  inits: tuple = ("uniform", "kmeans")
  samplers: tuple = ("uniform", "cross_entropy")
  num_seeds: int = 3
  seed: int = 0
  evaluations: int = 0
  network_seeds: int = 2
  preset: str = "cpu"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What a run does for its own survival.

  Attributes:
    checkpoint_seconds: between checkpoints; 0 for none but at a stop and at a failure.
    resume: go on from the last checkpoint.
    retries: times to step back to a checkpoint, at half the rate, where numbers fail.
    shared: folder of the checkpoints' folder where it is not the run's: of processes that keep nothing else.
  """

  checkpoint_seconds: float = 60.0
  resume: bool = False
  retries: int = 0
  shared: str | None = None


def from_flags(kind: type, values):
  """A config of that kind from parsed flags."""
  plain = lambda value: tuple(value) if isinstance(value, list) else value
  return kind(
    **{field.name: plain(getattr(values, field.name)) for field in dataclasses.fields(kind)}
  )


def given_flags(kind: type, values) -> dict:
  """The fields of a config that the user set, from parsed flags."""
  names = [field.name for field in dataclasses.fields(kind) if field.name in values]
  return {name: values[name].value for name in names if values[name].present}
