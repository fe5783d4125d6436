"""What `--help` and `--version` print: the binary's docstring, then its flags in groups, with defaults."""

import platform
import shutil
import textwrap

from absl import flags

_WIDTH, _LEFT = 100, 26
_LIBRARIES = ("absl", "orbax")  # that have flags of their own; orbax where it is imported
HELP = ("--help", "-help", "-h", "--h", "-?", "--helpshort", "--helpfull", "-helpfull")
VERSION = ("--version", "-version")


def requested(argv: list[str], module) -> str | None:
  """The text that the arguments ask for instead of work; it wins over flags that are wrong.

  Args:
    argv: the command line, program name first.
    module: of the binary, run or imported.

  Returns:
    A text, None where none is asked for.
  """
  given = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
  if any(argument in VERSION for argument in given):
    return version()
  wanted = [argument for argument in given if argument in HELP]
  return of(module, any("full" in argument for argument in wanted)) if wanted else None


def version() -> str:
  """Our version, and those of what decides numbers."""
  import jax

  import kipcore

  return f"kipcore {kipcore.__version__}, JAX {jax.__version__}, Python {platform.python_version()}"


def commands(module) -> list[str]:
  """How the binary can be called: as a console script, where it is one, and as a module."""
  spec = getattr(module, "__spec__", None)
  name = spec.name if spec else module.__name__
  script = [f"kipcore-{name.rpartition('.run_')[2]}"] if ".run_" in name else []
  return [*script, f"python -m {name}"]


def of(module, everything: bool = False) -> str:
  """The help: what the binary does, examples, flags.

  Args:
    module: of the binary, whose docstring says what it does.
    everything: with the flags of libraries, which log and debug.

  Returns:
    Lines of 100 columns at most, less in a narrower terminal.
  """
  width = min(_WIDTH, max(shutil.get_terminal_size((_WIDTH, 24)).columns, 60))
  lines = [
    (module.__doc__ or "").strip(),
    "",
    *textwrap.wrap(
      f"Usage: {', or '.join(commands(module))}, then flags: --name=value, in any "
      "order, none of them needed.",
      width,
    ),
  ]
  for title, names in groups(everything):
    lines += ["", *textwrap.wrap(title, width)]
    for name in names:
      lines += _flag(flags.FLAGS[name], width)
  lines += [
    "",
    *textwrap.wrap(
      "Also: --help, --helpfull (with the flags of libraries), --version, --flagfile=FILE (flags from a file, one a "
      "line).",
      width,
    ),
  ]
  return "\n".join(lines)


_marks: list[tuple[str, int]] = []
_first: list[str] = []


def first(*names: str) -> None:
  """The flags that most people set: they stand before all groups, in this order."""
  _first[:] = names


def group(title: str) -> None:
  """Flags defined from here on stand under this title."""
  _marks.append((title, len(flags.FLAGS)))


def groups(everything: bool = False) -> list[tuple[str, list[str]]]:
  """Titles and the names of their flags: the main ones, groups in the order of definition, and those of libraries, where wanted."""
  own, others = {"Main flags": list(_first)} if _first else {}, []
  for position, name in enumerate(flags.FLAGS):
    flag = flags.FLAGS[name]
    if flag.name != name or name in _first:
      continue
    if (flags.FLAGS.find_module_defining_flag(name) or "absl").startswith(_LIBRARIES):
      others.append(name)
      continue
    title = next((title for title, first in reversed(_marks) if first <= position), "Flags")
    own.setdefault(title, []).append(name)
  return [*own.items(), *([("Flags of libraries", others)] if everything else [])]


def _flag(flag, width: int) -> list[str]:
  """A flag with its kind of value on the left, what it does and its default on the right."""
  value = "=" + _kind(flag)
  left = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}{value}"
  text = " ".join((flag.help or "").split()).removeprefix(
    f"<{_kind(flag)}>: "
  )  # as absl begins the help of an enum
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
  kinds = {"int": "N", "float": "X", "comma separated list of strings": "A,B,..."}
  values = getattr(flag.parser, "enum_values", None)
  return "|".join(values) if values else kinds.get(flag.flag_type(), "TEXT")
