"""The only importer of neural_tangents: its kernels on current JAX, and ours as its layers.

neural-tangents 0.6.5, the last release, imports names that JAX has moved since. They
are supplied while it is being imported, and taken away again. Its `experimental`
package, which imports TensorFlow and holds nothing we use, is left out.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable

from kipcore import linalg
from kipcore.architectures import (
  Architecture,
  AvgPool,
  Conv,
  Dense,
  Erf,
  Flatten,
  Gelu,
  GlobalAvgPool,
  Identity,
  LeakyRelu,
  Relu,
)
from kipcore.types import KernelFn

_MOVED_TO_EXTEND = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")


def import_neural_tangents() -> types.ModuleType:
  """The module `neural_tangents`, importable on current JAX; call it instead of `import`.

  Kernels (dense, convolutional, pooling; jit, grad) and the Jacobian-contraction
  empirical NTK work; structured derivatives do not.

  Returns:
    The module; `neural_tangents.stax` is an attribute of it.

  Raises:
    ImportError: if it is not installed, or JAX moved further names.
  """
  if "neural_tangents" in sys.modules:
    return sys.modules["neural_tangents"]
  with _names_of_old_jax():
    return importlib.import_module("neural_tangents")


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
    # Used only as a key of a table of derivative rules that nothing looks up any more.
    supply(jax.interpreters.ad, "zeros_like_p", object())
    stand_ins = {"neural_tangents.experimental": types.ModuleType("neural_tangents.experimental")}
    if not _importable("jax.util"):
      stand_ins["jax.util"] = util = types.ModuleType("jax.util")
      util.safe_map, util.safe_zip = _safe_map, _safe_zip
    for name, module in stand_ins.items():
      sys.modules[name] = module
      undo.callback(sys.modules.pop, name)
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


def from_stax(kernel_fn: Callable, get: str = "ntk") -> KernelFn:
  """A `neural_tangents.stax` kernel as a kipcore kernel.

  Args:
    kernel_fn: the third of a stax triple, called as `kernel_fn(x1, x2, get)`.
    get: "ntk" or "nngp".

  Returns:
    `kernel_fn(x1, x2=None) -> (n1, n2)`. The whole covariance of the batch is in memory
    for convolutional networks with pooling; block it with `gram(..., block_size=...)`.

  Raises:
    ValueError: for another `get`.
  """
  if get not in ("ntk", "nngp"):
    raise ValueError(f"get: expected 'ntk' or 'nngp', got {get!r}")

  def kernel(x1, x2=None):
    with linalg.permissive_promotion():
      return kernel_fn(x1, x2, get).astype(x1.dtype)

  return kernel


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
  last = len(arch.layers) - 1

  def layer_of(i, layer):
    match layer:
      case Dense():
        return stax.Dense(num_outputs if i == last else width, layer.w_std, layer.b_std)
      case Conv():
        return stax.Conv(width, (layer.size, layer.size), (1, 1), "SAME", layer.w_std, layer.b_std)
      case AvgPool():
        return stax.AvgPool((layer.size, layer.size), (layer.size, layer.size), "VALID")
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
      case Flatten():
        return stax.Flatten()

  return stax.serial(*(layer_of(i, layer) for i, layer in enumerate(arch.layers)))
