"""The only importer of neural_tangents: its kernels on current JAX, and architectures as its layers.

neural-tangents 0.6.5, the last release, imports names that JAX has moved since. They are supplied
during its import and removed afterwards. Its `experimental` package, which imports TensorFlow and
is not used here, is left out.
"""

import contextlib
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable

import jax

from kipcore import checks, linalg, pytrees
from kipcore.architectures import (
  Architecture,
  AvgPool,
  Conv,
  Dense,
  Erf,
  Flatten,
  Gelu,
  GlobalAvgPool,
  GlobalSumPool,
  Identity,
  LeakyRelu,
  Relu,
  Residual,
  SumPool,
)
from kipcore.kernels.base import Kernel
from kipcore.types import Array

_MOVED_TO_EXTEND = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")


def import_neural_tangents() -> types.ModuleType:
  """Import `neural_tangents` on current JAX; use this instead of an import statement.

  Kernels (dense, convolutional, pooling; jit, grad) and the Jacobian-contraction
  empirical NTK work; structured derivatives do not.

  Returns:
    The module; `neural_tangents.stax` is an attribute of it.

  Raises:
    ImportError: if it is not installed, or JAX has moved more names.
  """
  if module := sys.modules.get("neural_tangents"):
    return module
  try:
    with _names_of_old_jax():
      return importlib.import_module("neural_tangents")
  except ModuleNotFoundError as error:
    if error.name != "neural_tangents":
      raise
    raise ModuleNotFoundError(
      f"expected neural-tangents to be installed, got {error}; pip install 'kipcore[neural-tangents]'",
      name=error.name,
    ) from error


@contextlib.contextmanager
def _names_of_old_jax():
  import jax.core
  import jax.extend.core
  import jax.interpreters.ad

  with contextlib.ExitStack() as undo:

    def supply(module, name, value):
      if not hasattr(module, name):
        setattr(module, name, value)
        undo.callback(delattr, module, name)

    for name in _MOVED_TO_EXTEND:
      supply(jax.core, name, getattr(jax.extend.core, name))
    # Only a key in a table of derivative rules that nothing reads anymore.
    supply(jax.interpreters.ad, "zeros_like_p", object())
    stand_ins = {"neural_tangents.experimental": types.ModuleType("neural_tangents.experimental")}
    if not _importable("jax.util"):
      stand_ins["jax.util"] = types.ModuleType("jax.util")
    for name, module in stand_ins.items():
      sys.modules[name] = module
      undo.callback(sys.modules.pop, name)
    # JAX 0.7 has the module without these two.
    supply(sys.modules["jax.util"], "safe_map", _safe_map)
    supply(sys.modules["jax.util"], "safe_zip", _safe_zip)
    yield


def _importable(name: str) -> bool:
  try:
    importlib.import_module(name)
    return True
  except ImportError:
    return False


def _safe_zip(*sequences):
  return list(zip(*sequences, strict=True))


def _safe_map(fn, *sequences):
  return [fn(*items) for items in _safe_zip(*map(list, sequences))]


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class StaxKernel(Kernel):
  """A `neural_tangents.stax` kernel; equal if `kernel_fn` is the same object. See `from_stax`."""

  kernel_fn: Callable
  get: str = "ntk"

  def __post_init__(self):
    checks.one_of("get", self.get, ("ntk", "nngp"))
    if not callable(self.kernel_fn):
      raise TypeError(f"kernel_fn: expected a function, got a {type(self.kernel_fn).__name__}")

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    with linalg.permissive_promotion():
      return self.kernel_fn(x1, x2, self.get).astype(x1.dtype)

  def _diagonal(self, x: Array) -> Array:
    return jax.vmap(lambda row: self._matrix(row[None], None)[0, 0])(x)


def from_stax(kernel_fn: Callable, get: str = "ntk") -> StaxKernel:
  """A `neural_tangents.stax` kernel as a kipcore kernel.

  Args:
    kernel_fn: the third of a stax triple, called as `kernel_fn(x1, x2, get)`; it must work under
      `jit`.
    get: "ntk" or "nngp".

  Returns:
    `kernel_fn(x1, x2=None) -> (n1, n2)`. For convolutional networks with pooling, the covariance
    of the whole batch is in memory; use `gram(..., block_size=...)`.

  Raises:
    ValueError: for another `get`.
    TypeError: if `kernel_fn` is not callable.
  """
  return StaxKernel(kernel_fn, get)


def to_stax(arch: Architecture, width: int = 1, num_outputs: int = 1) -> tuple:
  """The architecture as a `neural_tangents.stax` triple `(init_fn, apply_fn, kernel_fn)`.

  Args:
    arch: the architecture.
    width: units or channels of the finite realization (`init_fn`, `apply_fn`); the
      kernel does not depend on it.
    num_outputs: units of the readout.

  Returns:
    `(init_fn, apply_fn, kernel_fn)` in the NTK parameterization, NHWC.
  """
  stax = import_neural_tangents().stax
  *hidden, readout = arch.layers

  def layer_of(layer, units=width):
    match layer:
      case Dense():
        return stax.Dense(units, layer.w_std, layer.b_std)
      case Conv():
        return stax.Conv(units, *window_of(layer), layer.w_std, layer.b_std)
      case AvgPool():
        return stax.AvgPool(*window_of(layer))
      case SumPool():
        return stax.SumPool(*window_of(layer))
      case Relu():
        return stax.Relu()
      case LeakyRelu():
        return stax.LeakyRelu(layer.slope)
      case Erf():
        return stax.Erf()
      case Gelu():
        return stax.Gelu()
      case Identity():
        return stax.Identity()
      case GlobalAvgPool():
        return stax.GlobalAvgPool()
      case GlobalSumPool():
        return stax.GlobalSumPool()
      case Flatten():
        return stax.Flatten()
      case Residual():
        paths = [
          stax.serial(*map(layer_of, p)) if p else stax.Identity()
          for p in (layer.branch, layer.shortcut)
        ]
        return stax.serial(stax.FanOut(2), stax.parallel(*paths), stax.FanInSum())
      case _:
        raise TypeError(f"arch: expected layers that neural_tangents.stax has, got {layer!r}")

  def window_of(layer):
    return (layer.size,) * 2, (layer.stride,) * 2, layer.padding

  return stax.serial(*map(layer_of, hidden), layer_of(readout, num_outputs))
