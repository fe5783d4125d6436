"""Generates flags from the configs, and starts and ends every command.

Exit status: 0 on success; 2 for an invalid flag, file or value; 3 if a computation failed
numerically or memory ran out; 4 if another process of the run died; 130 after Ctrl-C; 143 after
SIGTERM. Each failure prints one line to the error stream; a traceback is a bug.
"""

import contextlib
import faulthandler
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from kipcore.cli import clock, config, help_text
from kipcore.cli.errors import OutOfMemory, Stopped, UsageError

# Processes give another one up after this time without a sign of it; closed connections are noticed at once.
HEARTBEAT_SECONDS = 20
_LESS_MEMORY = (
  "--dry_run shows what each part needs; reduce --target_batch_size, --images_per_class, "
  "--train_rows, --test_rows or --width"
)


class _Parser(flags.ArgumentParser):
  """Parses the text of a flag by the rules of its setting."""

  syntactic_help = ""

  def __init__(self, field):
    self.field = field

  def parse(self, argument):
    """The value; ValueError if it is not valid."""
    try:
      value = _CONVERT[config.type_of(self.field)](argument)
    except (TypeError, ValueError, OverflowError):
      value = argument
    config.check(self.field, value)
    return value

  def flag_type(self) -> str:
    """Name of the type."""
    return config.type_of(self.field).__name__


_CONVERT = {str: str, int: int, float: float}


def define(values: flags.FlagValues, *kinds: type) -> None:
  """Defines a flag for each setting of the configs."""
  for name, field in config.settings(*kinds).items():
    text, kind = field.metadata["help"], config.type_of(field)
    default: Any = field.default if field.metadata["shows_default"] else None
    options: Any = (default, text, values)
    if kind is bool:
      flags.DEFINE_bool(name, *options)
    elif kind is tuple:
      flags.DEFINE_list(name, list(default), text, values)
    else:
      flags.DEFINE(_Parser(field), name, *options)


def binary(main: Callable, *kinds: type, main_flags: tuple[str, ...] = ()) -> Callable[[], None]:
  """The function behind a console script.

  Args:
    main: takes the parsed flags; the docstring of its module is the first part of the help.
    kinds: configs whose settings are the flags.
    main_flags: names that help shows first.

  Returns:
    A function without arguments, which may be called several times in a process.
  """

  def run() -> None:
    values = flags.FlagValues()
    define(values, *kinds)
    groups = help_text.groups(config.settings(*kinds), main_flags)
    launch(lambda: main(values), values, sys.modules[main.__module__], groups)

  return run


def join_processes(text: str) -> int:
  """Joins the processes that `--distributed` names.

  Args:
    text: value of the flag.

  Returns:
    The index of this process; 0 for the one that writes files.

  Raises:
    UsageError: if the text is malformed or the processes cannot reach each other.
  """
  if not text:
    return 0
  import jax

  addresses: dict[str, Any] = {}
  if text != "auto":
    parts = text.split(",")
    if (
      len(parts) != 3
      or ":" not in parts[0]
      or not all(part.isdecimal() for part in parts[1:])
      or int(parts[2]) >= int(parts[1])
    ):
      raise UsageError(
        "--distributed: expected 'auto' or ADDRESS:PORT,COUNT,INDEX with INDEX < COUNT, got "
        f"{text!r}"
      )
    names = ("coordinator_address", "num_processes", "process_id")
    addresses = dict(zip(names, (parts[0], int(parts[1]), int(parts[2]))))
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # CPUs only
  if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
    addresses["heartbeat_timeout_seconds"] = HEARTBEAT_SECONDS
  faulthandler.disable()  # JAX ends a process by abort(), after a message of its own
  try:
    jax.distributed.initialize(**addresses)
  except (RuntimeError, ValueError) as error:
    raise UsageError(f"--distributed={text}: {_one_line(error)}") from error
  return jax.process_index()


def launch(main: Callable[[], None], values=flags.FLAGS, module=None, groups=None) -> None:
  """Parses the flags and runs `main()`, with the exit statuses above.

  Args:
    main: the work.
    values: flags to parse.
    module: module whose docstring is the first part of the help; by default the program.
    groups: titles and names of flags for the help; by default one group of all.
  """
  clock.mark_process_start()
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no log messages of TensorFlow
  # Idle OpenBLAS threads spin and compete with those of XLA: steps on CPU took twice as long.
  os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
  with _ignore_closed_pipe():
    _parse(values, module or sys.modules["__main__"], groups)
    _run(main, values)


@contextlib.contextmanager
def _ignore_closed_pipe():
  """Ends silently if the reader of the output closes it, as in `... --help | head`."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _parse(values, module, groups) -> None:
  argv = sys.argv
  if text := help_text.requested(argv, module, values, groups):
    print(text)
    sys.exit(0)
  if values is not flags.FLAGS:
    flags.FLAGS(argv[:1])  # libraries may read theirs
  try:
    rest = values(argv)
  except flags.Error as error:
    _end(2, flag_error(error))
  if len(rest) > 1:
    _end(2, f"expected flags only, as --name=value, got {' '.join(rest[1:])!r}")


def flag_error(error: flags.Error) -> str:
  """The message of a flag that cannot be parsed."""
  text = str(error).replace(" ?", "?")
  if isinstance(error, flags.UnrecognizedFlagError):
    return f"{text} (--help lists all flags)"
  if found := re.match(r"flag --(\w+)=(.*): \('Non-boolean argument", text, flags=re.S):
    return f"--{found[1]}: expected true or false, got {found[2]!r}"
  text = text.replace("invalid literal for int() with base 10:", "expected an integer, got")
  text = text.replace("could not convert string to float:", "expected a number, got")
  return re.sub(r"^flag --(\w+)=.*: (expected .*)$", r"--\1: \2", text, flags=re.S)


def _run(main, values=flags.FLAGS) -> None:
  logging.set_verbosity(logging.WARNING)  # not which accelerators JAX did not find
  try:
    import jax

    if "x64" in values:
      jax.config.update("jax_enable_x64", values.x64)
    from kipcore.cli.cost import planner
    from kipcore.types import NumericalError

    try:
      with planner.part("this command", _LESS_MEMORY):
        main()
    except UsageError as error:
      _end(2, str(error))
    except (NumericalError, OutOfMemory) as error:
      _end(3, str(error))
    except Stopped as error:
      _end(error.status, str(error))
    except (RuntimeError, ValueError) as error:
      words = ("Gloo", "coordination service", "heartbeat")
      if jax.process_count() == 1 or not any(word in str(error) for word in words):
        raise
      _end(
        4,
        "a process of this run died, so the run stopped; start all processes with --resume to "
        f"continue from the last checkpoint ({str(error).splitlines()[0]:.200})",
      )
  except KeyboardInterrupt as interrupt:
    _end(130, str(interrupt) or "interrupted")
  except BrokenPipeError:  # an OSError, but not an invalid file
    raise
  except OSError as error:
    _end(2, describe(error))


def describe(error: OSError) -> str:
  """An operating-system error with its file, without Python's syntax."""
  reason = error.strerror or _one_line(error)
  return f"{error.filename}: {reason}" if error.filename else reason


def _one_line(text) -> str:
  return " ".join(str(text).split())


def _end(status: int, message: str) -> None:
  print("error: " + _one_line(message), file=sys.stderr, flush=True)
  jax = sys.modules.get("jax")
  if jax is not None and jax.distributed.is_initialized():
    sys.stdout.flush()
    os._exit(status)  # a regular exit would wait for processes that died, or wait for this one
  sys.exit(status)
