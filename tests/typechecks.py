"""Checks the annotations of kipcore with beartype at runtime, for calls that return.

jaxtyping's import hook wraps each function twice with the type checker: once around an empty
function with its parameters, called before the function itself, and once around a function that
also takes the result, called after it. Only the second is checked here (arguments and result), so
invalid input still meets the errors of the library.
"""

import inspect

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

_CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))


def after_call(function):
  """Type checker for `jaxtyping.jaxtyped` that checks arguments and result only after the call."""
  takes_result = any(name.startswith("ret") for name in _keyword_only(function))
  return _CHECKED(function) if takes_result else function


def _keyword_only(function) -> list[str]:
  parameters = inspect.signature(function).parameters.values()
  return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


# Packages whose annotations are complete; `selection` and `distillation` still have plain arrays
# where NumPy is accepted.
ARRAY_PACKAGES = (
  "kipcore.linalg",
  "kipcore.blocks",
  "kipcore.preprocess",
  "kipcore.krr",
  "kipcore.kernels",
  "kipcore.networks",
  "kipcore.evaluation",
)


def install(*packages: str):
  """Checks every module of the packages that is imported from now on."""
  return install_import_hook(packages or ARRAY_PACKAGES, "typechecks.after_call")
