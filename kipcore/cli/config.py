"""All settings of the commands: frozen dataclasses from which flags, help and validation are generated.

A new setting is one line: a field made by `setting`. This module imports nothing heavy.
"""

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from kipcore.cli.errors import UsageError

# Titles of the groups of flags, in the order in which help shows them.
GRID = "Grid"
METHOD = "Method (defaults are those of kip; --dry_run shows those of other methods)"
INITIALIZATION = "Initialization"
SELECTION = "Selection"
ROWS = "Rows of a file (--input, instead of a dataset of images; uses --strategy, --preprocess, --seed and --x64)"
SAMPLING = "Target sampling"
NETWORKS = "Finite networks (used by ratbptt, both, rfad, frepo, rcig, dm, dc, dsa, mtt and ncfm, and to score the result)"
SETS = "Sets to score"
EVALUATION = "Evaluation"
EXPORT = "Export"
REPORT = "Report"
DATA = "Data"
KERNEL = "Kernel"
OUTPUT = "Output and devices"
CHECKPOINTS = "Checkpointing and resume"
GROUPS: tuple[str, ...] = (
  GRID,
  METHOD,
  INITIALIZATION,
  SELECTION,
  ROWS,
  SAMPLING,
  NETWORKS,
  SETS,
  EVALUATION,
  EXPORT,
  REPORT,
  DATA,
  KERNEL,
  OUTPUT,
  CHECKPOINTS,
)

_INT32 = 2**31 - 1
# Positive numbers beyond these limits overflow or underflow in products in float32.
SMALLEST, LARGEST = 1e-30, 1e30
_PREPROCESSING = (
  "none",
  "standardize",
  "zca",
  "zca_kip",
  "zca_rfad",
  "zca_dcbench",
  "zca_absolute",
)
# Defaults and texts of settings of several commands.
_DATA_DIR = None, "Folder of prepared TFDS datasets; TFDS's own default if not given.", DATA
_ARTIFACT = None, "File distilled.npz of a run; by default that of the newest run under runs/."


def setting(
  default,
  help: str,
  group: str,
  lower_bound=None,
  upper_bound=None,
  choices=None,
  shows_default: bool = True,
):
  """A field of a config that is also a flag.

  Args:
    default: default value; a tuple for a comma-separated list.
    help: text of `--help`.
    group: title under which help shows the flag.
    lower_bound: smallest valid number.
    upper_bound: largest valid number.
    choices: valid strings, if not any.
    shows_default: whether help shows the default; False if the command chooses it by other flags.

  Returns:
    A dataclass field.
  """
  metadata = dict(help=help, group=group, lower=lower_bound, upper=upper_bound, choices=choices)
  metadata["shows_default"] = shows_default
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Dataset, preprocessing and kernel."""

  dataset: str = setting(
    "digits",
    "digits (included), a TFDS name (mnist, cifar10, ...), a path to an .npz file with x_train, y_train, x_test and y_test, a folder with one folder of images per class (or train/ and test/ with such folders), or a .parquet or .arrow file, or a folder of them, as written by Hugging Face datasets.",
    DATA,
  )
  data_dir: str | None = setting(*_DATA_DIR)
  architecture: str = setting(
    "fc1",
    "Network: auto (conv3 for images of at least 16 x 16 pixels, conv2 or conv1 for smaller ones, fc1 for other rows), fc1, fc2, ..., conv1, conv2, ... (suffix _vec: no pooling, _gap: global average pooling), myrtle5, myrtle7, myrtle10; suffix _gelu, _erf, _leaky_relu or _identity for an activation other than ReLU.",
    KERNEL,
  )
  kernel: str = setting(
    "ntk", "Infinite-width kernel of the architecture.", KERNEL, choices=("ntk", "nngp")
  )
  score_architecture: str = setting(
    "", "Network whose kernel scores sets; --architecture if not given.", KERNEL
  )
  precision: str = setting(
    "float32",
    "Precision to which the factors of the kernel's first products are rounded during distillation; sums and scores stay in float32.",
    KERNEL,
    choices=("float32", "tensorfloat32", "bfloat16"),
  )
  images_per_class: int = setting(1, "Distilled or selected images per class.", DATA, 1)
  fill: str = setting(
    "",
    "How classes with fewer training rows than --images_per_class get more: repeat (copies), or augment (shifted, scaled or rotated copies). Without it such classes are an error.",
    DATA,
    choices=("", "repeat", "augment"),
  )
  preprocess: str = setting(
    "standardize",
    "Preprocessing, fitted on the training rows; kipcore.preprocess documents the variants of ZCA.",
    DATA,
    choices=_PREPROCESSING,
  )
  train_rows: int = setting(
    0,
    "Number of training rows to use, validation included: a random subset of each class; only these are kept in memory. 0 for all.",
    DATA,
    0,
  )
  validation_fraction: float = setting(
    0.1, "Fraction of the training rows held out for validation; 0 for none.", DATA, 0.0, 0.9
  )
  test_fraction: float = setting(
    0.2,
    "Fraction of each class that is for testing, evenly spaced rows, if the dataset has no labeled test split.",
    DATA,
    0.001,
    0.9,
  )
  test_rows: int = setting(
    0, "Number of test rows to score on, the first ones (for slow kernels); 0 for all.", DATA, 0
  )
  seed: int = setting(0, "Seed of all random streams.", DATA, 0, 2**63 - 1)
  num_devices: int = setting(0, "Number of devices to use; 0 for all local ones.", OUTPUT, 0)
  x64: bool = setting(
    False, "Use float64 throughout: slower, for small ridges and large supports.", OUTPUT
  )


@dataclasses.dataclass(frozen=True)
class ExpertConfig(DataConfig):
  """Labels, and the experts: networks trained on the training rows, from which mtt, ncfm and expert labels are made."""

  labels: str = setting(
    "",
    "Labels of the images: class, learned, or expert: the predictions of a network trained on the training rows, stopped at the epoch that teaches best, where labels start if they are learned. Without --labels as the method and --learn_labels say.",
    DATA,
    choices=("", "class", "learned", "expert"),
  )
  width: int = setting(128, "Channels or units per layer of finite networks.", NETWORKS, 1)
  experts: str = setting(
    "",
    "File (.npy) of the experts of mtt, ncfm, expert labels and expert scores, trained and created if it does not exist; by default in the run folder.",
    NETWORKS,
  )
  expert_epochs: int = setting(50, "Training epochs of each expert.", NETWORKS, 1)
  expert_rows: int = setting(
    0, "Number of training rows that experts are trained on, evenly spaced; 0 for all.", NETWORKS, 0
  )
  patience: int = setting(
    5,
    "End the training of an expert after this many epochs without a better accuracy on the validation rows; 0 for never.",
    NETWORKS,
    0,
  )
  network_steps: int = setting(
    0,
    "Optimizer steps of each network that scores the result, or the labels of an expert; 0 for those of the protocol.",
    NETWORKS,
    0,
  )


@dataclasses.dataclass(frozen=True)
class DistillConfig(ExpertConfig):
  """Settings of a distillation."""

  teach: str = setting(
    "",
    "Which model the set is for: network (--method=ratbptt), kernel (kip) or both; it chooses the method and leads the report. Without --teach and --method: network.",
    METHOD,
    choices=("", "network", "kernel", "both"),
  )
  minutes: float = setting(
    0.0,
    "Time for the whole run: width and steps are fitted to it by measuring this machine, and so is the method for networks, frepo where the time is too short for ratbptt, unless --method is given. 0: --width and --steps as given.",
    METHOD,
    0.0,
    1e5,
  )
  method: str = setting(
    "kip",
    "For kernels: kip, label_solve (real images with optimal labels), krr_closed_form, rfad; for networks: ratbptt (without --teach and --method), frepo, rcig, dm, dc, dsa, mtt, ncfm; for both: both.",
    METHOD,
    shows_default=False,
  )
  preset: str = setting(
    "cpu",
    "Settings of a method through finite networks, unless given: sized for a few CPU cores, or as published.",
    METHOD,
    choices=("cpu", "published"),
  )
  options: str = setting(
    "",
    "Options of the method, as name=value,name=value; an unknown name prints the valid ones.",
    METHOD,
  )
  network_width: int = setting(
    0, "Width of the networks that score the result; 0 for --width.", NETWORKS, 0
  )
  optimizer: str = setting(
    "adam",
    "Optimizer of the images; sgd has momentum 0.5, adam_clipped limits the gradient to twice the average of its norm.",
    METHOD,
    choices=("adam", "adam_clipped", "adabelief", "lamb", "sgd"),
  )
  network_seeds: int = setting(
    0,
    "Number of finite networks to train on the result and score on the test rows.",
    NETWORKS,
    0,
    10_000,
  )
  protocol: str = setting(
    "default",
    "How these networks are trained: default, kip, frepo, rcig, dc, dsa or soft (see kipcore.protocol); by default as in the paper of the method, and soft for ratbptt.",
    NETWORKS,
  )
  num_experts: int = setting(100, "Number of experts to train.", NETWORKS, 1)
  init: str = setting(
    "kmeans",
    "Real rows: uniform, krr_sensitivity, leverage, kmedoids, kmeans_plusplus, herding, k_center, krr_pursuit; synthetic points: kmeans (centroids of each class), noise; auto (the best of several, measured); or a file: an artifact (distilled.npz) or a published set, whose preprocessing and labels are converted.",
    INITIALIZATION,
  )
  sampler: str = setting(
    "cross_entropy",
    "Sampling distribution of the training rows to learn from (targets): uniform, class_balanced, or proportional to a loss: cross_entropy, squared_error, residual_norm, margin.",
    SAMPLING,
  )
  uniform_mix: float = setting(
    0.5, "Fraction of uniform draws when sampling by loss.", SAMPLING, 0.0, 1.0
  )
  weight_exponent: float = setting(
    0.25,
    "Exponent of the importance weights when sampling by loss: 1 for an unbiased mean, 0 for no weights.",
    SAMPLING,
    0.0,
    1.0,
  )
  least_gain: float = setting(
    1.1,
    "When sampling by loss, draw uniformly as long as importance sampling would lower the second moment of a draw by less than this factor; 1 for (almost) never.",
    SAMPLING,
    1.0,
    LARGEST,
  )
  refresh_every: int = setting(
    0,
    "When sampling by loss, steps between scorings of all rows, each at the cost of one target evaluation per row; 0 for never.",
    SAMPLING,
    0,
  )
  steps: int = setting(1000, "Optimizer steps.", METHOD, 0)
  target_batch_size: int = setting(
    0,
    "Targets per step, over all devices; 0 for 1,000 (250 for methods through networks), or all if there are fewer.",
    SAMPLING,
    0,
  )
  target_block_size: int = setting(
    0,
    "For kip: targets whose kernel is held in memory at a time, at the price of computing it twice; 0 to choose by problem size.",
    SAMPLING,
    0,
  )
  learning_rate: float = setting(
    0.04, "Peak learning rate, in units of the preprocessed inputs.", METHOD, SMALLEST, LARGEST
  )
  schedule: str = setting(
    "cosine",
    "Learning-rate schedule; cosine decays to zero.",
    METHOD,
    choices=("cosine", "constant"),
  )
  relative_ridge: float = setting(
    1e-6,
    "Ridge as a fraction of the mean diagonal of the support's kernel matrix.",
    METHOD,
    SMALLEST,
    1e6,
  )
  loss: str = setting(
    "mse",
    "Training loss; cross_entropy also learns a temperature.",
    METHOD,
    choices=("mse", "cross_entropy"),
  )
  learn_labels: bool = setting(True, "Also learn the labels of the distilled images.", METHOD)
  solve_labels: bool = setting(
    True,
    "If labels are learned, start from the optimal labels of the initial images, at the cost of one evaluation per training row (at most a tenth of the run's target evaluations).",
    INITIALIZATION,
  )
  log_test_accuracy: bool = setting(
    False, "Also log test accuracy during the run (never used for choices).", METHOD
  )
  measure_gain: bool = setting(
    False,
    "Run a second distillation with uniform targets and as many target evaluations, and report the difference.",
    SAMPLING,
  )


@dataclasses.dataclass(frozen=True)
class SelectConfig(ExpertConfig):
  """Settings of a selection."""

  # The best of the strategies with real rows at 10 and 100 points in experiments/results/starting_points.json.
  strategy: str = setting(
    "kmedoids",
    "Real rows: kmedoids, krr_sensitivity, leverage, uniform, kmeans_plusplus, herding, k_center, krr_pursuit; synthetic points, without a certificate: kmeans, noise, rded (random crops with the lowest loss of an expert); or auto (the best of several, measured).",
    SELECTION,
  )
  score_ridge: str = setting(
    "auto", "Absolute ridge of the scores, or auto: chosen by effective dimension.", SELECTION
  )
  relative_ridge: float = setting(
    1e-6,
    "Ridge of the regression on the points, as a fraction of the mean diagonal of their kernel matrix.",
    SELECTION,
    SMALLEST,
    1e6,
  )


@dataclasses.dataclass(frozen=True)
class RowsConfig:
  """Settings of a selection of rows of a file; some are flags of `SelectConfig` too."""

  input: str = setting(
    "",
    "File of rows: .npy (memory-mapped), .npz (arrays x, and optionally y and weights), .csv or .parquet (numeric columns; needs kipcore[arrow]). The selected rows are written with their weights and row numbers.",
    ROWS,
  )
  target: str = setting("", "Column of the labels of a table, numbers or text.", ROWS)
  input_labels: str = setting("", "For .npy rows: .npy file of their labels.", ROWS)
  input_weights: str = setting(
    "",
    "Column of a table, or .npy file, of weights >= 0: a row of weight 10 counts as ten rows.",
    ROWS,
  )
  ignore: tuple[str, ...] = setting(
    (), "Columns of a table that are not used, and written back with the rows.", ROWS
  )
  task: str = setting(
    "auto",
    "Whether labels are classes or real targets; auto: classes unless they are floats.",
    ROWS,
    choices=("auto", "classification", "regression"),
  )
  size: int = setting(0, "Number of rows to select in total; 0 for --size_per_class.", ROWS, 0)
  size_per_class: int = setting(0, "Number of rows to select of each class.", ROWS, 0)
  allocation: str = setting(
    "proportional",
    "How --size is divided among classes: proportional to their weight, balanced, or by sensitivity.",
    ROWS,
    choices=("proportional", "balanced", "sensitivity"),
  )
  strategy: str = setting(
    "auto",
    "Read in blocks: uniform, lightweight, leverage, krr_sensitivity; in memory: kmedoids, kmeans_plusplus, herding, kernel_herding, kernel_thinning, k_center, krr_pursuit; or auto.",
    ROWS,
  )
  preprocess: str = setting(
    "standardize",
    "standardize: columns with mean 0 and variance 1 (the rows are written unchanged); or none.",
    ROWS,
    choices=("standardize", "none"),
  )
  certificate: bool = setting(
    True,
    "Measure what the selection loses: the MMD to all rows, and errors of ridge and logistic regression; reads the rows three more times.",
    ROWS,
  )
  seed: int = setting(0, "Seed of all random streams.", ROWS, 0, 2**63 - 1)
  x64: bool = setting(False, "Use float64 throughout.", ROWS)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Settings of an evaluation."""

  evaluators: tuple[str, ...] = setting(
    ("krr",),
    "krr[:ARCHITECTURE[:nngp]] (kernel ridge regression; without ARCHITECTURE: the artifact's kernel) and network[:ARCHITECTURE|mlp|convnet|resnet[:dsa]][@PROTOCOL] (finite networks; dsa: with augmentation; see --protocol); or all.",
    EVALUATION,
  )
  baselines: tuple[str, ...] = setting(
    ("uniform", "kmeans", "herding", "k_center", "leverage", "full"),
    "Sets of the same size to score for comparison: uniform, uniform_solved (with solved labels), kmeans, herding, k_center, leverage; and full, all training rows. Empty for none.",
    SETS,
  )
  num_seeds: int = setting(5, "Networks per set, and draws of random sets.", EVALUATION, 1, 10_000)
  seed: int = setting(0, "Seed of the random streams.", EVALUATION, 0, 2**63 - 1)
  width: int = setting(128, "Channels or units per layer of finite networks.", EVALUATION, 1)
  protocol: tuple[str, ...] = setting(
    (),
    "Protocols by which the networks of --evaluators are trained, each in turn: default, kip, frepo, dc, dsa, soft. Default if empty.",
    EVALUATION,
  )
  tune: bool = setting(
    False,
    "Choose learning rate and length of each protocol on the distilled set by the accuracy on the validation rows of the run.",
    EVALUATION,
  )
  network_steps: int = setting(
    0, "Optimizer steps of each network; 0 for those of the protocol.", EVALUATION, 0
  )
  full_rows: int = setting(
    5000, "Training rows of the set 'full', evenly spaced; 0 for all.", SETS, 0
  )
  test_rows: int = setting(
    0, "Number of test rows to score on, the first ones; 0 for as many as the run used.", DATA, 0
  )
  dataset: str | None = setting(
    None, "Name or path of the dataset, if it differs from the recorded one.", DATA
  )
  data_dir: str | None = setting(*_DATA_DIR)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """The grid of a comparison."""

  methods: tuple[str, ...] = setting(
    ("kip", "rfad", "frepo", "rcig", "dm", "dc", "dsa", "mtt"),
    "Methods; see --method of kipcore-distill.",
    GRID,
  )
  inits: tuple[str, ...] = setting(
    ("uniform", "kmeans"), "Initializations; the others are compared with the first.", GRID
  )
  samplers: tuple[str, ...] = setting(
    ("uniform", "cross_entropy"), "Target samplers; the others are compared with the first.", GRID
  )
  num_seeds: int = setting(3, "Seeds per cell, starting at --seed.", GRID, 1)
  seed: int = setting(0, "First seed.", DATA, 0, 2**63 - 1)
  evaluations: int = setting(
    0, "Target evaluations of each cell; 0 for the method's own steps and batch size.", GRID, 0
  )
  network_seeds: int = setting(2, "Finite networks to train on each result.", GRID, 0, 10_000)
  preset: str = setting(
    "cpu",
    "Settings of the methods: sized for a few CPU cores, or as published.",
    GRID,
    choices=("cpu", "published"),
  )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints of a run, and what happens when it fails.

  `shared` is the folder of the checkpoints if it is not that of the run: for processes that keep nothing else.
  """

  checkpoint_seconds: float = setting(
    60.0,
    "Seconds between checkpoints; 0 for checkpoints only at Ctrl-C, SIGTERM and failures.",
    CHECKPOINTS,
    0.0,
    1e9,
  )
  resume: bool = setting(
    False,
    "Resume the run in --output_dir (or the newest unfinished run under runs/) from its last checkpoint, with bit-identical results; its flags need not be repeated.",
    CHECKPOINTS,
  )
  retries: int = setting(
    0,
    "How many times to return to a checkpoint, with half the learning rate, after a numerical failure.",
    CHECKPOINTS,
    0,
  )
  shared: str | None = None


@dataclasses.dataclass(frozen=True)
class OutputConfig:
  """Where a command writes."""

  output_dir: str | None = setting(
    None, "Run folder; by default a new one under runs/, named after the run.", OUTPUT
  )
  overwrite: bool = setting(False, "Replace the files of an earlier run in --output_dir.", OUTPUT)
  dry_run: bool = setting(
    False,
    "Load the data, check all settings, and print what would be done, how long it would take, how much memory it needs, and where results go; write nothing.",
    OUTPUT,
  )


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
  """Settings of `kipcore-distill` that do not change its result."""

  tensorboard: bool = setting(
    False, "Also write TensorBoard event files, in tensorboard/ of the run folder.", OUTPUT
  )
  animation: bool = setting(
    False,
    "Also write animation.gif: an image of each of the first classes at the logged steps.",
    OUTPUT,
  )
  distributed: str = setting(
    "",
    "Run as one of several processes, all started with the same flags except INDEX: 'auto' on TPU pods and SLURM, or ADDRESS:PORT,COUNT,INDEX with the address of process 0.",
    OUTPUT,
  )


@dataclasses.dataclass(frozen=True)
class CellConfig:
  """Further settings of every cell of a comparison."""

  set: tuple[str, ...] = setting(
    (),
    "Further settings of every cell, as name=value for flags of kipcore-distill, e.g. steps=500,width=16.",
    GRID,
  )


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """Files of an evaluation."""

  artifact: str | None = setting(*_ARTIFACT, SETS)
  output: str | None = setting(None, "JSON file for the result.", OUTPUT)
  dry_run: bool = setting(
    False,
    "Load the data, check all settings, and print what would be scored and how long it would take; score and write nothing.",
    OUTPUT,
  )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """Settings of an export."""

  artifact: str | None = setting(*_ARTIFACT, EXPORT)
  format: tuple[str, ...] = setting(
    ("safetensors", "png"),
    "One or more of numpy, png, safetensors, torch, tfds, and ddranking (tensors and settings for the scores of DD-Ranking).",
    EXPORT,
  )
  space: str = setting(
    "pixels",
    "pixels: as the dataset stores them; inputs: preprocessed, as a network receives them.",
    EXPORT,
    choices=("pixels", "inputs"),
  )
  pixel_max: float | None = setting(
    None,
    "Stored value of white, for artifacts that do not record it: 255 for uint8 images.",
    EXPORT,
    SMALLEST,
    LARGEST,
  )
  output_dir: str | None = setting(
    None, "Folder for the exports; by default `export` next to the artifact.", EXPORT
  )
  overwrite: bool = setting(False, "Replace earlier exports of the same names.", EXPORT)
  dry_run: bool = setting(
    False,
    "Load the artifact, check every format, and print what would be written; write nothing.",
    EXPORT,
  )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """Settings of a report."""

  run: str | None = setting(
    None,
    "Folder of a distillation, selection or comparison; by default the newest run under runs/.",
    REPORT,
  )
  output: str | None = setting(
    None, "HTML file to write; by default report.html in that folder.", REPORT
  )


def settings(*kinds: type) -> dict[str, dataclasses.Field]:
  """The fields of the configs that are flags, by name; of fields with the same name, the first."""
  found: dict[str, dataclasses.Field] = {}
  for kind in kinds:
    for field in dataclasses.fields(kind):
      if field.metadata:
        found.setdefault(field.name, field)
  return found


@functools.cache
def names() -> frozenset[str]:
  """Names of all settings."""
  kinds = [
    each for each in globals().values() if isinstance(each, type) and dataclasses.is_dataclass(each)
  ]
  return frozenset(settings(*kinds))


def type_of(field: dataclasses.Field) -> Any:
  """str, int, float, bool or tuple: the type of a setting's value if it is not None."""
  kind: Any = field.type
  if isinstance(kind, types.UnionType):
    kind = next(each for each in typing.get_args(kind) if each is not type(None))
  return typing.get_origin(kind) or kind


def check(field: dataclasses.Field, value) -> None:
  """Raises ValueError, with what was expected, unless a value is valid for a setting."""
  kind, limits = type_of(field), field.metadata
  if value is None and field.default is None:
    return
  if kind in (int, float):
    number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    low, high = bounds(field)
    valid = number and math.isfinite(value) and low <= value <= high
  else:
    valid = isinstance(value, (list, tuple) if kind is tuple else kind)
    valid = valid and (limits["choices"] is None or value in limits["choices"])
  if not valid:
    raise ValueError(expectation_error(field, value))


def expectation_error(field: dataclasses.Field, value) -> str:
  """The message for an invalid value of a setting."""
  return f"expected {expectation(field)}, got {value!r}"


def bounds(field: dataclasses.Field) -> tuple[float, float]:
  """Smallest and largest valid number of a setting."""
  low, high = field.metadata["lower"], field.metadata["upper"]
  largest = _INT32 if type_of(field) is int else math.inf
  return -largest if low is None else low, largest if high is None else high


def expectation(field: dataclasses.Field) -> str:
  """What a value of a setting must be, in words."""
  kind = type_of(field)
  if field.metadata["choices"]:
    return f"one of {', '.join(filter(None, field.metadata['choices']))}"
  if kind not in (int, float):
    return {bool: "true or false", tuple: "a comma-separated list"}.get(kind, "text")
  low, high = bounds(field)
  return (
    f"an integer from {low} to {high:,}" if kind is int else f"a number from {low:g} to {high:g}"
  )


def validate(config) -> None:
  """Checks every setting of a config, whether it comes from flags, a file or a caller.

  Raises:
    UsageError: for the first invalid value, with the name of its flag.
  """
  for name, field in settings(type(config)).items():
    try:
      check(field, getattr(config, name))
    except ValueError as error:
      raise UsageError(f"--{name}: {error}") from None


def from_flags(kind: type, values):
  """A config of that kind from parsed flags."""
  plain = lambda value: tuple(value) if isinstance(value, list) else value
  return kind(**{name: plain(getattr(values, name)) for name in settings(kind)})


def given_flags(kind: type, values) -> dict:
  """The settings of a config that the user gave, from parsed flags."""
  return {
    name: values[name].value for name in settings(kind) if name in values and values[name].present
  }
