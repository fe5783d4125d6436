"""Flags that the binaries share, and how every binary starts and ends.

Exit status: 0 on success; 2 with one line on a wrong flag, file or value; 3 with one
line where the numbers failed or memory ran out (with advice); 4 where another process of the run was
lost; 130 after Ctrl-C; 143 after SIGTERM, at a checkpoint; a traceback is a defect of ours.
"""

import contextlib
import faulthandler
import functools
import inspect
import os
import sys

from absl import app, flags, logging

from kipcore.cli import help_text
from kipcore.cli.config import CheckpointConfig, DataConfig, DistillConfig
from kipcore.cli.help_text import first, group  # noqa: F401, for the binaries

FLAGS = flags.FLAGS
_DEFAULT = DataConfig()
# After so long without a sign of a process the others give it up; where a connection breaks they know at once.
HEARTBEAT_SECONDS = 20
_NO_MEMORY = "--dry_run says what each takes; less by --target_batch_size, --images_per_class, --train_rows, --test_rows or --width"


def define_common() -> None:
  """Flags of every binary that loads a dataset and builds a kernel."""
  group("Data")
  flags.DEFINE_string(
    "dataset",
    _DEFAULT.dataset,
    "digits (embedded), a TFDS name (mnist, cifar10, ...), a path to an .npz with x_train, "
    "y_train, x_test, y_test, or a folder with a folder of PNG or JPEG images for each class (or train/ and test/ of them).",
  )
  flags.DEFINE_string(
    "data_dir",
    _DEFAULT.data_dir,
    "Where TFDS keeps its prepared datasets; TFDS's own default if not given.",
  )
  flags.DEFINE_integer(
    "images_per_class",
    _DEFAULT.images_per_class,
    "Distilled (or selected) images of each class.",
    lower_bound=1,
  )
  flags.DEFINE_enum(
    "preprocess",
    _DEFAULT.preprocess,
    ["none", "standardize", "zca", "zca_kip", "zca_rfad", "zca_dcbench", "zca_absolute"],
    "Fitted on training rows; see kipcore.preprocess for what each ZCA is.",
  )
  flags.DEFINE_integer(
    "train_rows",
    _DEFAULT.train_rows,
    "Learn from so many training rows, a random part of each class, validation included; the "
    "others are never held in memory. 0 for all.",
    lower_bound=0,
  )
  flags.DEFINE_float(
    "validation_fraction",
    _DEFAULT.validation_fraction,
    "Share of the training rows kept for validation; 0 for none.",
    lower_bound=0.0,
    upper_bound=0.9,
  )
  flags.DEFINE_integer(
    "test_rows",
    _DEFAULT.test_rows,
    "Score on the first so many test rows (for slow kernels); 0 for all.",
    lower_bound=0,
  )
  flags.DEFINE_integer("seed", _DEFAULT.seed, "Root of every random stream.", lower_bound=0)
  group("Kernel")
  flags.DEFINE_string(
    "architecture",
    _DEFAULT.architecture,
    "The network: fc1, fc2, ..., conv1, conv2, ... (with _vec: no pooling, _gap: "
    "global average pooling), myrtle5, myrtle7, myrtle10; then _gelu, _erf, _leaky_relu or _identity, if not ReLU.",
  )
  flags.DEFINE_enum(
    "kernel", _DEFAULT.kernel, ["ntk", "nngp"], "Which infinite-width kernel of the architecture."
  )
  flags.DEFINE_string(
    "score_architecture",
    _DEFAULT.score_architecture,
    "The network whose kernel scores sets; --architecture if not given.",
  )
  flags.DEFINE_enum(
    "precision",
    _DEFAULT.precision,
    ["float32", "tensorfloat32", "bfloat16"],
    "What the factors of the kernel's first "
    "products are rounded to, while distilling; sums and scores stay in float32.",
  )
  define_output()
  flags.DEFINE_bool(
    "dry_run",
    False,
    "Load the data, check everything, and print what would be done, how long it would take, how much "
    "memory, and where; write nothing.",
  )
  flags.DEFINE_integer(
    "num_devices",
    _DEFAULT.num_devices,
    "Devices to map the work over; 0 for all local ones.",
    lower_bound=0,
  )


def define_output() -> None:
  """Flags of every binary that writes a run folder."""
  group("Output and devices")
  flags.DEFINE_string(
    "output_dir", None, "Run folder; by default a new one under runs/, named after the run."
  )
  flags.DEFINE_bool("overwrite", False, "Replace the files of an earlier run in --output_dir.")
  flags.DEFINE_bool(
    "x64", _DEFAULT.x64, "float64 throughout: slower, for small ridges and large supports."
  )


def define_checkpoints() -> None:
  """What a run does for its own survival."""
  group("Runs that go on")
  flags.DEFINE_bool(
    "resume",
    False,
    "Go on with the run of --output_dir (or the newest under runs/ that did not finish) from its last "
    "checkpoint, bit for bit; its flags need not be said again.",
  )
  flags.DEFINE_float(
    "checkpoint_seconds",
    CheckpointConfig().checkpoint_seconds,
    "Time between checkpoints; 0 for none but at SIGTERM and failures.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    "retries",
    0,
    "Times to step back to a checkpoint, at half the rate, where numbers fail.",
    lower_bound=0,
  )


def define_distributed() -> None:
  """The flag of binaries whose work is mapped over devices."""
  flags.DEFINE_string(
    "distributed",
    "",
    "Several processes as one run, all started with the same flags but INDEX: 'auto' where the "
    "platform knows them (TPU pods, SLURM), or ADDRESS:PORT,COUNT,INDEX with the address of process 0.",
  )


def define_method() -> None:
  """Flags of the method and of its start."""
  default = DistillConfig()
  group("Method (defaults are those of kip; other methods bring their own, which --dry_run shows)")
  flags.DEFINE_string(
    "method",
    default.method,
    "kip, label_solve (real images, best labels), krr_closed_form; through finite networks: rfad, "
    "frepo, rcig, dm, dc, dsa, mtt.",
  )
  flags.DEFINE_enum(
    "preset",
    default.preset,
    ["cpu", "published"],
    "Settings of a method through finite networks, where not given: at a "
    "size for a few CPU cores, or as published.",
  )
  flags.DEFINE_string(
    "options",
    default.options,
    "The method's own options, name=value,name=value; a wrong name lists them.",
  )
  flags.DEFINE_integer("steps", default.steps, "Optimizer steps.", lower_bound=0)
  flags.DEFINE_enum(
    "optimizer",
    default.optimizer,
    ["adam", "adabelief", "lamb", "sgd"],
    "Of the images; sgd has momentum 0.5.",
  )
  flags.DEFINE_float(
    "learning_rate",
    default.learning_rate,
    "Peak rate of the optimizer, in units of the preprocessed inputs.",
  )
  flags.DEFINE_enum(
    "schedule",
    default.schedule,
    ["cosine", "constant"],
    "Rate over the steps; cosine falls to zero.",
  )
  flags.DEFINE_float(
    "relative_ridge",
    default.relative_ridge,
    "Ridge as a fraction of the mean diagonal of the support's kernel.",
  )
  flags.DEFINE_enum(
    "loss", default.loss, ["mse", "cross_entropy"], "cross_entropy learns a temperature as well."
  )
  flags.DEFINE_bool(
    "learn_labels", default.learn_labels, "Learn the labels of the distilled images too."
  )
  flags.DEFINE_bool(
    "log_test_accuracy",
    default.log_test_accuracy,
    "Also log test accuracy during the run (recorded, never chosen by).",
  )
  group("Where to start")
  flags.DEFINE_string(
    "init",
    default.init,
    "Real rows: uniform, krr_sensitivity, leverage, kmedoids, kmeans_plusplus, herding, k_center, "
    "krr_pursuit; made points: kmeans (centroids of each class), noise; or auto, the best by measure.",
  )
  flags.DEFINE_bool(
    "solve_labels",
    default.solve_labels,
    "Where labels are learned, start from the best ones for the starting images, at "
    "the cost of one evaluation of each training row (of a tenth of the run's target evaluations at most).",
  )


def define_sampler() -> None:
  """Flags of the law of targets."""
  default = DistillConfig()
  group("Which targets (training rows) to learn from next")
  flags.DEFINE_string(
    "sampler",
    default.sampler,
    "uniform or class_balanced, or in proportion to a loss: cross_entropy, squared_error, "
    "residual_norm, margin.",
  )
  flags.DEFINE_integer(
    "target_batch_size",
    default.target_batch_size,
    "Targets a step, over all devices; 0 for 1,000 or all of fewer.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    "target_block_size",
    default.target_block_size,
    "Targets whose kernel kip holds at a time, at the price of computing it twice; "
    "0 for all of a step, or as many as fit.",
    lower_bound=0,
  )
  flags.DEFINE_float(
    "uniform_mix",
    default.uniform_mix,
    "Share of uniform draws of a sampler by loss.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "weight_exponent",
    default.weight_exponent,
    "Of the weights of a sampler by loss: 1 for an unbiased mean, 0 for none.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "least_gain",
    default.least_gain,
    "A sampler by loss draws uniformly while importance would lower the second "
    "moment of a draw by less than this factor; 1 for (almost) never.",
    lower_bound=1.0,
  )
  flags.DEFINE_integer(
    "refresh_every",
    default.refresh_every,
    "Steps after which a sampler by loss scores all rows anew, at the cost "
    "of as many target evaluations; 0 for never.",
    lower_bound=0,
  )
  flags.DEFINE_bool(
    "measure_gain",
    default.measure_gain,
    "Distill a second time, with uniform targets and as many target evaluations, "
    "and say what the sampler gained.",
  )


def define_networks() -> None:
  """Flags of methods that learn through finite networks."""
  default = DistillConfig()
  group(
    "Finite networks (that rfad, frepo, rcig, dm, dc, dsa and mtt learn through, and that judge the result)"
  )
  flags.DEFINE_integer(
    "width", default.width, "Channels or units of finite networks.", lower_bound=1
  )
  flags.DEFINE_integer(
    "network_seeds",
    default.network_seeds,
    "Finite networks trained on the result, scored on the test rows.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    "network_steps", default.network_steps, "Optimizer steps of each of them.", lower_bound=1
  )
  flags.DEFINE_string(
    "experts",
    default.experts,
    "File (.npy) of the experts that mtt imitates, trained where it is absent; by default in the "
    "run folder.",
  )
  flags.DEFINE_integer("num_experts", default.num_experts, "Experts to train.", lower_bound=1)
  flags.DEFINE_integer("expert_epochs", default.expert_epochs, "Epochs of each.", lower_bound=1)
  flags.DEFINE_integer(
    "expert_rows",
    default.expert_rows,
    "Training rows that experts see, evenly spaced; 0 for all.",
    lower_bound=0,
  )


def join_processes(text: str) -> int:
  """Joins the processes that `--distributed` names; this one's index, 0 for the one that writes files.

  Raises:
    UsageError: for text of another form, or processes that do not find one another.
  """
  if not text:
    return 0
  import jax

  from kipcore.cli.errors import UsageError

  where = {}
  if text != "auto":
    parts = text.split(",")
    if (
      len(parts) != 3
      or ":" not in parts[0]
      or not all(p.isdecimal() for p in parts[1:])
      or int(parts[2]) >= int(parts[1])
    ):
      raise UsageError(
        f"--distributed: expected 'auto' or ADDRESS:PORT,COUNT,INDEX with INDEX < COUNT, got {text!r}"
      )
    where = dict(
      zip(
        ("coordinator_address", "num_processes", "process_id"),
        (parts[0], int(parts[1]), int(parts[2])),
      )
    )
  jax.config.update(
    "jax_cpu_collectives_implementation", "gloo"
  )  # for CPUs alone; others have their own
  if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
    where["heartbeat_timeout_seconds"] = HEARTBEAT_SECONDS
  faulthandler.disable()  # a process that is told to give up does so by abort(), with words of its own
  try:
    jax.distributed.initialize(**where)
  except (RuntimeError, ValueError) as error:
    raise UsageError(f"--distributed={text}: {error}") from error
  return jax.process_index()


def launch(main) -> None:
  """Runs `main()` after parsing the flags, with the exit statuses above; the same from a console script and from `python -m`."""
  # TensorFlow, where TFDS needs it, is to stay silent.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # After each factorization OpenBLAS's threads wait busily and take the cores from XLA's: steps on CPU took twice as long.
  os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
  with _ignore_closed_pipe():
    app.run(
      lambda argv: _run(main), flags_parser=functools.partial(_parse, sys.modules[main.__module__])
    )


@contextlib.contextmanager
def _ignore_closed_pipe():
  """Ends without a word where whoever read the output has seen enough, as in `... --help | head`."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _parse(module, argv):
  if text := help_text.requested(argv, module):
    print(text)
    sys.exit(0)
  try:
    rest = FLAGS(argv)
  except flags.Error as error:
    text = str(error).replace("invalid literal for int() with base 10:", "expected an integer, got")
    text = text.replace("could not convert string to float:", "expected a number, got").replace(
      " ?", "?"
    )
    _end(
      2,
      f"{text} (--help lists them all)" if isinstance(error, flags.UnrecognizedFlagError) else text,
    )
  if len(rest) > 1:
    _end(2, f"expected flags only, as --name=value, got {' '.join(rest[1:])!r}")
  return rest


def _run(main) -> None:
  logging.set_verbosity(logging.WARNING)  # not which accelerators JAX did not find
  try:
    import jax

    if "x64" in FLAGS:
      jax.config.update("jax_enable_x64", FLAGS.x64)
    from kipcore.cli.cost import planner
    from kipcore.cli.errors import OutOfMemory, Stopped, UsageError
    from kipcore.types import NumericalError

    try:
      with planner.part("a part without a name", _NO_MEMORY):
        main()
    except UsageError as error:
      _end(2, str(error))
    except (NumericalError, OutOfMemory) as error:
      _end(3, str(error))
    except Stopped as error:
      _end(143, str(error))
    except (
      RuntimeError,
      ValueError,
    ) as error:  # in the words of whoever waited for the other process
      if (
        not any(word in str(error) for word in ("Gloo", "coordination service", "heartbeat"))
        or jax.process_count() == 1
      ):
        raise
      _end(
        4,
        "a process of this run was lost, and none goes on without it; --resume, in all of them, goes on from the last checkpoint "
        f"({str(error).splitlines()[0]:.200})",
      )
  except KeyboardInterrupt:
    _end(130, "interrupted")
  except BrokenPipeError:  # an OSError, but no one's fault
    raise
  except OSError as error:
    _end(2, str(error))


def _end(status: int, message: str) -> None:
  print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
  jax = sys.modules.get("jax")
  if (
    jax is not None and jax.distributed.is_initialized()
  ):  # without a goodbye: it would wait for processes that are lost, or wait for this one
    sys.stdout.flush()
    os._exit(status)
  sys.exit(status)
