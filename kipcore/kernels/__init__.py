"""Kernels: an architecture's NTK and NNGP, simple kernels, and any `neural_tangents.stax` kernel."""

import dataclasses

import jax.numpy as jnp

from kipcore import checks, linalg
from kipcore.architectures import Architecture, AvgPool
from kipcore.kernels import conv, dense
from kipcore.kernels.stax import from_stax
from kipcore.types import Array

__all__ = [
  "NetworkKernel",
  "RBFKernel",
  "LinearKernel",
  "from_stax",
  "linear_fn",
  "nngp_fn",
  "ntk_fn",
  "rbf_fn",
]


@dataclasses.dataclass(frozen=True)
class NetworkKernel:
  """The infinite-width kernel of an architecture, as a function `(x1, x2=None) -> (n1, n2)`.

  Hashable, so that it can be a static argument of `jax.jit`. Made by `ntk_fn` and
  `nngp_fn`.

  Attributes:
    arch: the architecture.
    get: "ntk" or "nngp".
    tile_elements: numbers that convolutional kernels work on at a time (a few arrays of this size are
      held); None for what suits the default backend: 2^18 on CPU, 2^25 elsewhere. No less than
      what one pair of images needs behind its first pooling.
    precision: "float32", or "tensorfloat32" or "bfloat16" for the first products, of images or patches
      rounded to that type and summed in float32; everything behind them stays float32. The result
      is the exact kernel of the rounded inputs, so it stays positive semi-definite; entries move by some
      1e-4 or 1e-3 of the largest. float64 inputs ignore it.
  """

  arch: Architecture
  get: str
  tile_elements: int | None = None
  precision: str = "float32"

  def __post_init__(self):
    checks.one_of("get", self.get, ("ntk", "nngp"))
    checks.one_of("precision", self.precision, linalg.PRECISIONS)
    if self.tile_elements is not None:
      checks.positive_int("tile_elements", self.tile_elements)

  def __call__(self, x1: Array, x2: Array | None = None) -> Array:
    self._check("x1", x1)
    if x2 is not None:
      self._check("x2", x2)
      if x1.shape[1:] != x2.shape[1:]:
        raise ValueError(f"expected rows of one shape, got x1 {x1.shape} and x2 {x2.shape}")
    n1, n2 = x1.shape[0], x1.shape[0] if x2 is None else x2.shape[0]
    if n1 == 0 or n2 == 0:
      return jnp.zeros((n1, n2), x1.dtype)
    if self.arch.convolutional:
      return conv.conv_kernel(self, x1, x2)
    return dense.dense_kernel(self, x1, x2)

  def diag(self, x: Array) -> Array:
    """K(x_i, x_i), `(n,)`, exactly."""
    self._check("x", x)
    if x.shape[0] == 0:
      return jnp.zeros((0,), x.dtype)
    if self.arch.convolutional:
      return conv.conv_diag(self, x)
    return dense.dense_diag(self, x)

  def _check(self, name: str, x: Array) -> None:
    checks.floating(name, x)
    if not self.arch.convolutional:
      if x.ndim < 2:
        raise ValueError(f"{name}: expected rows (n, ...), got shape {x.shape}")
      return
    if x.ndim != 4:
      raise ValueError(f"{name}: expected NHWC images for {self.arch.name}, got shape {x.shape}")
    side = min(x.shape[1:3])
    for layer in self.arch.layers:
      if isinstance(layer, AvgPool):
        side //= layer.size
    if side < 1:
      raise ValueError(
        f"{name}: expected larger images, got shape {x.shape[1:]}, too small for the pooling of {self.arch.name}"
      )


def ntk_fn(arch: Architecture, precision: str = "float32") -> NetworkKernel:
  """The neural tangent kernel of an architecture at infinite width.

  Theta(x, x') = lim E <df(x)/dtheta, df(x')/dtheta> in the NTK parameterization, for
  one output. Homogeneous of degree 2 in the inputs only if every b_std is 0.

  Args:
    arch: from `fc`, `conv_net`, `myrtle`, `architecture`, or an `Architecture`.
    precision: "float32", "tensorfloat32" or "bfloat16"; see `NetworkKernel`.

  Returns:
    A `NetworkKernel`: `kernel_fn(x1, x2=None) -> (n1, n2)`, jittable, differentiable
    (also at coincident and parallel rows, see `kernels.dual.relu_dual`), with
    `kernel_fn.diag(x) -> (n,)`. Dense architectures take rows `(n, ...)` of any shape,
    convolutional ones NHWC images.

  Raises:
    ValueError, TypeError: at the call, for inputs of the wrong rank, size or dtype.

  Source: Jacot, Gabriel, Hongler 2018; Arora et al. 2019 for convolutions.

  Example:
    >>> kernel_fn = kipcore.ntk_fn(kipcore.fc(1, b_std=0.0))
    >>> x = jnp.asarray([[3.0, 4.0], [6.0, 8.0]])
    >>> print(
    ...   np.asarray(kernel_fn(x)).round(2)
    ... )  # without biases homogeneous: twice the row, twice the kernel
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

  Source: Lee et al. 2018; Novak et al. 2019 for convolutions.

  Example:
    >>> arch, x = kipcore.fc(1, b_std=0.0), jnp.asarray([[3.0, 4.0], [6.0, 8.0]])
    >>> nngp, ntk = (np.asarray(kernel(arch)(x)) for kernel in (kipcore.nngp_fn, kipcore.ntk_fn))
    >>> print(np.diag(ntk / nngp).round(3))  # half of the NTK comes from the readout alone
    [2. 2.]
  """
  return NetworkKernel(arch, "nngp", precision=precision)


@dataclasses.dataclass(frozen=True)
class RBFKernel:
  """exp(-||x - x'||^2 / (2 bandwidth^2)); see `rbf_fn`."""

  bandwidth: float

  def __call__(self, x1: Array, x2: Array | None = None) -> Array:
    x1 = x1.reshape(x1.shape[0], -1)
    x2 = x1 if x2 is None else x2.reshape(x2.shape[0], -1)
    norms1, norms2 = jnp.sum(x1 * x1, axis=1), jnp.sum(x2 * x2, axis=1)
    squared = norms1[:, None] + norms2[None, :] - 2.0 * linalg.matmul(x1, x2.T)
    return jnp.exp(jnp.maximum(squared, 0.0) * (-0.5 / self.bandwidth**2))

  def diag(self, x: Array) -> Array:
    """Ones, `(n,)`."""
    return jnp.ones(x.shape[0], x.dtype)


@dataclasses.dataclass(frozen=True)
class LinearKernel:
  """<x, x'>; see `linear_fn`."""

  def __call__(self, x1: Array, x2: Array | None = None) -> Array:
    x1 = x1.reshape(x1.shape[0], -1)
    x2 = x1 if x2 is None else x2.reshape(x2.shape[0], -1)
    return linalg.matmul(x1, x2.T)

  def diag(self, x: Array) -> Array:
    """||x_i||^2, `(n,)`."""
    x = x.reshape(x.shape[0], -1)
    return jnp.sum(x * x, axis=1)


def rbf_fn(bandwidth: float) -> RBFKernel:
  """The Gaussian kernel exp(-||x - x'||^2 / (2 bandwidth^2)) on flattened rows.

  Args:
    bandwidth: length scale > 0, in the units of the inputs.

  Returns:
    `kernel_fn(x1, x2=None) -> (n1, n2)`, with `diag`.

  Raises:
    ValueError: for a bandwidth that is not positive.

  Example:
    >>> kernel_fn = kipcore.rbf_fn(2.0)
    >>> print(
    ...   np.asarray(kernel_fn(jnp.asarray([[0.0], [2.0]]))).round(4)
    ... )  # exp(-1/2) a bandwidth apart
    [[1.     0.6065]
     [0.6065 1.    ]]
  """
  checks.positive("bandwidth", bandwidth)
  return RBFKernel(float(bandwidth))


def linear_fn() -> LinearKernel:
  """The kernel <x, x'> on flattened rows.

  Returns:
    `kernel_fn(x1, x2=None) -> (n1, n2)`, with `diag`.
  """
  return LinearKernel()
