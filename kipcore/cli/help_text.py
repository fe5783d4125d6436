"""What `--help` and `--version` print: the command's docstring, then its flags in groups, with defaults."""

import platform
import shutil
import sys
import textwrap

from kipcore.cli import config

_WIDTH, _LEFT = 100, 26
HELP = ("--help", "-help", "-h", "--h", "-?", "--helpshort", "--helpfull", "-helpfull")
VERSION = ("--version", "-version")


def requested(argv: list[str], module, values, titles=None) -> str | None:
  """The text that the arguments request instead of work; takes precedence over invalid flags.

  Args:
    argv: the command line, program name first.
    module: module of the command.
    values: its flags.
    titles: titles and names of flags; None for one group of all.

  Returns:
    A text, or None if none is requested.
  """
  given = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
  if any(argument in VERSION for argument in given):
    return version()
  if not any(argument in HELP for argument in given):
    return None
  return of(module, values, titles or [("Flags", _own(values))])


def version() -> str:
  """Versions of kipcore, JAX and Python."""
  import jax

  import kipcore

  return f"kipcore {kipcore.__version__}, JAX {jax.__version__}, Python {platform.python_version()}"


def commands(module) -> list[str]:
  """How a command can be started: as a console script, and from a clone if it was started so."""
  name_of = lambda module: getattr(getattr(module, "__spec__", None), "name", module.__name__)
  name, program = name_of(module), name_of(sys.modules["__main__"])
  if not name.startswith("kipcore.cli."):
    return [f"python -m {name}"]
  clone = [f"python -m {program}"] if program.startswith("experiments.") else []
  return [f"kipcore-{name.rpartition('.')[2]}", *clone]


def of(module, values, titles: list[tuple[str, list[str]]]) -> str:
  """The help: what the command does, examples, flags.

  Args:
    module: module whose docstring describes the command.
    values: its flags.
    titles: titles and names of flags.

  Returns:
    Lines of at most 100 columns, fewer in a narrower terminal.
  """
  width = min(_WIDTH, max(shutil.get_terminal_size((_WIDTH, 24)).columns, 60))
  usage = f"Usage: {' or '.join(commands(module))}, then any flags, as --name=value."
  lines = [(module.__doc__ or "").strip(), "", *textwrap.wrap(usage, width)]
  for title, names in titles:
    lines += ["", *textwrap.wrap(title, width)]
    for name in names:
      lines += _flag(values[name], width)
  also = "Also: --help, --version, --flagfile=FILE (read flags from a file, one per line)."
  return "\n".join([*lines, "", *textwrap.wrap(also, width)])


def groups(settings: dict, main_flags: tuple[str, ...] = ()) -> list[tuple[str, list[str]]]:
  """Titles and names of flags: the main ones, then the groups of the settings."""
  found = [("Main flags", list(main_flags))] if main_flags else []
  for title in config.GROUPS:
    names = [
      name
      for name, field in settings.items()
      if field.metadata["group"] == title and name not in main_flags
    ]
    found += [(title, names)] if names else []
  return found


def _own(values) -> list[str]:
  """Flags that the program defines itself, not those of absl and other libraries."""
  libraries = ("absl", "orbax")
  module_of = lambda name: values.find_module_defining_flag(name) or "absl"
  return [
    name
    for name in values
    if values[name].name == name and not module_of(name).startswith(libraries)
  ]


def _flag(flag, width: int) -> list[str]:
  """A flag with its type on the left, its help and default on the right."""
  left = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}={_kind(flag)}"
  text = " ".join((flag.help or "").split()).removeprefix(f"<{_kind(flag)}>: ")  # absl's enums
  default = flag.default
  if flag.boolean:
    default = "yes" if default else "no"
  elif isinstance(default, (list, tuple)):
    default = ",".join(map(str, default))
  if default not in (None, ""):
    text += f" Default:\N{NO-BREAK SPACE}{default}."
  right = [
    line.replace("\N{NO-BREAK SPACE}", " ")
    for line in textwrap.wrap(text, width - _LEFT, break_on_hyphens=False)
  ]
  if len(left) > _LEFT - 2:
    return [left, *(" " * _LEFT + line for line in right)]
  return [left.ljust(_LEFT) + right[0], *(" " * _LEFT + line for line in right[1:])]


def _kind(flag) -> str:
  """How the value of a flag is written."""
  names = {"int": "N", "float": "X", "comma separated list of strings": "A,B,..."}
  field = getattr(flag.parser, "field", None)
  choices = field.metadata["choices"] if field else getattr(flag.parser, "enum_values", None)
  return "|".join(choices) if choices else names.get(flag.flag_type(), "TEXT")
