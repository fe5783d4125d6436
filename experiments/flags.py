"""Flags that the binaries share, and how every binary starts and ends.

Exit status: 0 on success; 2 with one line on a wrong flag, file or value; 3 with one
line where the numbers failed (with advice); a traceback is a defect of ours.
"""

import os
import sys

from absl import app, flags, logging

from experiments.config import DataConfig, DistillConfig

FLAGS = flags.FLAGS
_DEFAULT = DataConfig()


def define_common() -> None:
  """Flags of every binary that loads a dataset and builds a kernel."""
  flags.DEFINE_string("dataset", _DEFAULT.dataset, "'digits' (embedded), a TFDS image-classification name (mnist, cifar10, ...), "
                      "or a path to an .npz with x_train, y_train, x_test, y_test.")
  flags.DEFINE_string("data_dir", _DEFAULT.data_dir, "Where TFDS keeps its prepared datasets; TFDS's own default if not given.")
  flags.DEFINE_string("architecture", _DEFAULT.architecture, "fc1, fc2, ..., conv1, conv2, ... (with _vec: no pooling, _gap: global "
                      "average pooling), myrtle5, myrtle7, myrtle10; then _gelu, _erf, _leaky_relu or _identity, if not ReLU.")
  flags.DEFINE_enum("kernel", _DEFAULT.kernel, ["ntk", "nngp"], "Which infinite-width kernel of the architecture.")
  flags.DEFINE_string("score_architecture", _DEFAULT.score_architecture, "The network whose kernel scores sets; --architecture if not given.")
  flags.DEFINE_enum("precision", _DEFAULT.precision, ["float32", "tensorfloat32", "bfloat16"], "What the factors of the kernel's first "
                    "products are rounded to, while distilling; sums and scores stay in float32.")
  flags.DEFINE_integer("images_per_class", _DEFAULT.images_per_class, "Distilled (or selected) images of each class.", lower_bound=1)
  flags.DEFINE_enum("preprocess", _DEFAULT.preprocess,
                    ["none", "standardize", "zca", "zca_kip", "zca_rfad", "zca_dcbench", "zca_absolute"],
                    "Fitted on training rows; see kipcore.preprocess for what each ZCA is.")
  flags.DEFINE_float("validation_fraction", _DEFAULT.validation_fraction, "Share of the training rows kept for validation; 0 for none.",
                     lower_bound=0.0, upper_bound=0.9)
  flags.DEFINE_integer("test_rows", _DEFAULT.test_rows, "Score on the first so many test rows (for slow kernels); 0 for all.",
                       lower_bound=0)
  flags.DEFINE_integer("seed", _DEFAULT.seed, "Root of every random stream.", lower_bound=0)
  flags.DEFINE_integer("num_devices", _DEFAULT.num_devices, "Devices to map the work over; 0 for all local ones.", lower_bound=0)
  define_output()


def define_output() -> None:
  """Flags of every binary that writes a run folder."""
  flags.DEFINE_string("output_dir", None, "Run folder; by default a new one under runs/, named after the run.")
  flags.DEFINE_bool("overwrite", False, "Replace the files of an earlier run in --output_dir.")
  flags.DEFINE_bool("x64", _DEFAULT.x64, "float64 throughout: slower, for small ridges and large supports.")


def define_distributed() -> None:
  """The flag of binaries whose work is mapped over devices."""
  flags.DEFINE_string("distributed", "", "Several processes as one run, all started with the same flags but INDEX: 'auto' where the "
                      "platform knows them (TPU pods, SLURM), or ADDRESS:PORT,COUNT,INDEX with the address of process 0.")


def define_networks() -> None:
  """Flags of methods that learn through finite networks."""
  default = DistillConfig()
  flags.DEFINE_enum("preset", default.preset, ["cpu", "published"], "Settings of a method through finite networks: at a size for a few CPU "
                    "cores, or as published.")
  flags.DEFINE_string("options", default.options, "The method's own options, name=value,name=value; see its Options class.")
  flags.DEFINE_integer("width", default.width, "Channels or units of finite networks.", lower_bound=1)
  flags.DEFINE_enum("optimizer", default.optimizer, ["adam", "adabelief", "lamb", "sgd"], "Of the images; sgd has momentum 0.5.")
  flags.DEFINE_integer("network_seeds", default.network_seeds, "Finite networks trained on the result, scored on the test rows.",
                       lower_bound=0)
  flags.DEFINE_integer("network_steps", default.network_steps, "Optimiser steps of each of them.", lower_bound=1)
  flags.DEFINE_string("experts", default.experts, "File (.npy) of the experts that mtt imitates, trained where it is absent; by default in the "
                      "run folder.")
  flags.DEFINE_integer("num_experts", default.num_experts, "Experts to train.", lower_bound=1)
  flags.DEFINE_integer("expert_epochs", default.expert_epochs, "Epochs of each.", lower_bound=1)
  flags.DEFINE_integer("expert_rows", default.expert_rows, "Training rows that experts see, evenly spaced; 0 for all.", lower_bound=0)


def join_processes(text: str) -> int:
  """Joins the processes that `--distributed` names; this one's index, 0 for the one that writes files.

  Raises:
    UsageError: for text of another form, or processes that do not find one another.
  """
  if not text:
    return 0
  import jax
  from experiments.errors import UsageError
  where = {}
  if text != "auto":
    parts = text.split(",")
    if len(parts) != 3 or ":" not in parts[0] or not all(p.isdecimal() for p in parts[1:]) or int(parts[2]) >= int(parts[1]):
      raise UsageError(f"--distributed: expected 'auto' or ADDRESS:PORT,COUNT,INDEX with INDEX < COUNT, got {text!r}")
    where = dict(zip(("coordinator_address", "num_processes", "process_id"), (parts[0], int(parts[1]), int(parts[2]))))
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs alone; others have their own
  try:
    jax.distributed.initialize(**where)
  except (RuntimeError, ValueError) as error:
    raise UsageError(f"--distributed={text}: {error}") from error
  return jax.process_index()


def launch(main) -> None:
  """Runs `main()` after parsing the flags, with the exit statuses above."""
  # TensorFlow, where TFDS needs it, is to stay silent.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # After each factorisation OpenBLAS's threads wait busily and take the cores from XLA's: steps on CPU took twice as long.
  os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
  # --help is to show the shared flags as well.
  for flag in FLAGS.flags_by_module_dict().get(__name__, ()):
    FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(lambda argv: _run(main), flags_parser=_parse)


def _parse(argv):
  try:
    rest = FLAGS(argv)
  except flags.Error as error:
    _end(2, str(error))
  if len(rest) > 1:
    _end(2, f"expected flags only, got {' '.join(rest[1:])!r}")
  return rest


def _run(main) -> None:
  logging.set_verbosity(logging.WARNING)  # not which accelerators JAX did not find
  import jax
  if "x64" in FLAGS:
    jax.config.update("jax_enable_x64", FLAGS.x64)
  from kipcore.types import NumericalError
  from experiments.errors import UsageError
  try:
    main()
  except UsageError as error:
    _end(2, str(error))
  except NumericalError as error:
    _end(3, str(error))
  except OSError as error:
    _end(2, str(error))


def _end(status: int, message: str) -> None:
  print("error: " + " ".join(message.split()), file=sys.stderr)
  sys.exit(status)
