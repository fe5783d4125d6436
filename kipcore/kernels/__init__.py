"""Kernels: the NTK and NNGP of architectures, RBF, linear, and any `neural_tangents.stax` kernel.

Kernels are frozen dataclasses with value equality, and pytrees whose leaves are their hyperparameters
(`bandwidth`; `w_std`, `b_std` and `slope` of the layers; the factors of multiples). They are compiled once
per shape, for all values of the hyperparameters, and can be added and multiplied.

They take floating rows. Half precision is computed, and returned, in float32; integers are rejected,
because pixels from 0 to 255 and pixels from 0 to 1 have different kernels. Only `empirical_ntk_fn` passes
rows of any dtype on, to a function that knows what they mean.
"""

import dataclasses

import jax.numpy as jnp

from kipcore import checks, linalg, pytrees
from kipcore.architectures import Architecture
from kipcore.kernels import conv, dense
from kipcore.kernels.base import Kernel, ProductKernel, ScaledKernel, SumKernel
from kipcore.kernels.finite import EmpiricalNTK, empirical_ntk_fn
from kipcore.kernels.stax import StaxKernel, from_stax
from kipcore.types import Array, ArrayLike, Number, RealLike

__all__ = [
  "EmpiricalNTK",
  "Kernel",
  "LinearKernel",
  "NetworkKernel",
  "ProductKernel",
  "RBFKernel",
  "ScaledKernel",
  "StaxKernel",
  "SumKernel",
  "empirical_ntk_fn",
  "from_stax",
  "linear_fn",
  "nngp_fn",
  "ntk_fn",
  "rbf_fn",
]


@pytrees.record("arch")
@dataclasses.dataclass(frozen=True)
class NetworkKernel(Kernel):
  """The infinite-width kernel of an architecture, `(x1, x2=None) -> (n1, n2)`.

  Hashable and comparable by value, and a pytree whose leaves are the numbers of the architecture. Made
  by `ntk_fn` and `nngp_fn`.

  Attributes:
    arch: the architecture.
    get: "ntk" or "nngp".
    tile_elements: numbers per tile of a convolutional kernel, of which a few arrays are held at a
      time, but at least what one pair of images needs after its first pooling. None for 2^18 on
      CPU and 2^25 elsewhere.
    precision: "float32", or "tensorfloat32" or "bfloat16" for the first products, of images or
      patches rounded to that type and summed in float32; everything after them is float32. The
      result is the exact kernel of the rounded inputs, hence positive semi-definite; entries
      change by about 1e-4 or 1e-3 of the largest. float64 inputs ignore it.
  """

  arch: Architecture
  get: str
  tile_elements: int | None = None
  precision: str = "float32"

  def __post_init__(self):
    if not isinstance(self.arch, Architecture):
      raise TypeError(f"arch: expected an Architecture, got a {type(self.arch).__name__}")
    checks.one_of("get", self.get, ("ntk", "nngp"))
    checks.one_of("precision", self.precision, linalg.PRECISIONS)
    if self.tile_elements is not None:
      size = checks.positive_int("tile_elements", self.tile_elements)
      object.__setattr__(self, "tile_elements", size)

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    module = conv.conv_kernel if self.arch.convolutional else dense.dense_kernel
    return module(self, x1, x2)

  def _diagonal(self, x: Array) -> Array:
    return (conv.conv_diag if self.arch.convolutional else dense.dense_diag)(self, x)

  def _rows(self, name: str, x: ArrayLike) -> Array:
    x = super()._rows(name, x)
    if self.arch.convolutional:
      self.arch.check_images(name, x)
    elif x.ndim < 2:
      raise ValueError(f"{name}: expected rows (n, ...), got shape {x.shape}")
    return x


def ntk_fn(arch: Architecture, precision: str = "float32") -> NetworkKernel:
  """The neural tangent kernel of an architecture at infinite width.

      Theta(x, x') = lim E <df(x)/dtheta, df(x')/dtheta>

  for one output, in the NTK parameterization. It is homogeneous in each input only if every b_std
  is 0.

  Args:
    arch: from `fc`, `conv_net`, `myrtle`, `architecture`, or an `Architecture`.
    precision: "float32", "tensorfloat32" or "bfloat16"; see `NetworkKernel`.

  Returns:
    A `NetworkKernel`: `kernel_fn(x1, x2=None) -> (n1, n2)`, compiled once per shape,
    differentiable (also at equal and parallel rows, see `kernels.dual.relu_dual`), with
    `kernel_fn.diag(x) -> (n,)`. Dense architectures take rows `(n, ...)` of any shape,
    convolutional ones NHWC images.

  Raises:
    ValueError, TypeError: for an unknown precision; at the call, for inputs of the wrong rank,
      size or dtype.

  References:
    Jacot, Gabriel and Hongler (2018); Arora et al. (2019) for convolutions.

  Example:
    >>> kernel_fn = kipcore.ntk_fn(kipcore.fc(1, b_std=0.0))
    >>> x = jnp.asarray([[3.0, 4.0], [6.0, 8.0]])
    >>> print(
    ...   np.asarray(kernel_fn(x)).round(2)
    ... )  # homogeneous without biases: twice the row, twice the kernel
    [[ 50. 100.]
     [100. 200.]]
  """
  return NetworkKernel(arch, "ntk", precision=precision)


def nngp_fn(arch: Architecture, precision: str = "float32") -> NetworkKernel:
  """The covariance of the outputs of an architecture with random weights, at infinite width.

  Args:
    arch, precision: as for `ntk_fn`.

  Returns:
    As `ntk_fn`.

  References:
    Lee et al. (2018); Novak et al. (2019) for convolutions.

  Example:
    >>> arch, x = kipcore.fc(1, b_std=0.0), jnp.asarray([[3.0, 4.0], [6.0, 8.0]])
    >>> nngp, ntk = (np.asarray(kernel(arch)(x)) for kernel in (kipcore.nngp_fn, kipcore.ntk_fn))
    >>> print(np.diag(ntk / nngp).round(3))  # the readout contributes half of the NTK
    [2. 2.]
  """
  return NetworkKernel(arch, "nngp", precision=precision)


@pytrees.record("bandwidth")
@dataclasses.dataclass(frozen=True)
class RBFKernel(Kernel):
  """exp(-||x - x'||^2 / (2 bandwidth^2)) on flattened rows; see `rbf_fn`."""

  bandwidth: Number

  def __post_init__(self):
    checks.positive("bandwidth", self.bandwidth)
    object.__setattr__(self, "bandwidth", checks.scalar("bandwidth", self.bandwidth))

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    return jnp.exp(linalg.squared_distances(x1, x2) * (-0.5 / self.bandwidth**2))

  def _diagonal(self, x: Array) -> Array:
    return jnp.ones(x.shape[0], x.dtype)


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class LinearKernel(Kernel):
  """<x, x'> on flattened rows; see `linear_fn`."""

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    x1 = x1.reshape(x1.shape[0], -1)
    x2 = x1 if x2 is None else x2.reshape(x2.shape[0], -1)
    return linalg.matmul(x1, x2.T)

  def _diagonal(self, x: Array) -> Array:
    x = x.reshape(x.shape[0], -1)
    return jnp.sum(x * x, axis=1)


def rbf_fn(bandwidth: RealLike) -> RBFKernel:
  """The Gaussian kernel exp(-||x - x'||^2 / (2 bandwidth^2)) on flattened rows.

  Args:
    bandwidth: length scale > 0, in the units of the inputs; may be traced.

  Returns:
    `kernel_fn(x1, x2=None) -> (n1, n2)`, with `diag`.

  Raises:
    ValueError, TypeError: for a bandwidth that is not a positive finite number. At the call, for
      rows that do not match or are not floating.

  Example:
    >>> kernel_fn = kipcore.rbf_fn(2.0)
    >>> print(
    ...   np.asarray(kernel_fn(jnp.asarray([[0.0], [2.0]]))).round(4)
    ... )  # exp(-1/2) at distance one bandwidth
    [[1.     0.6065]
     [0.6065 1.    ]]
  """
  return RBFKernel(checks.scalar("bandwidth", bandwidth))


def linear_fn() -> LinearKernel:
  """The kernel <x, x'> on flattened rows.

  Returns:
    `kernel_fn(x1, x2=None) -> (n1, n2)`, with `diag`.
  """
  return LinearKernel()
