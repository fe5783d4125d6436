"""Architectures as `flax.linen` modules of finite width, and a residual network for evaluation."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from kipcore import checks, linalg
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
  Window,
)
from kipcore.convolution import convolve
from kipcore.kernels.covariance import patches
from kipcore.types import Array, ArrayLike, IntLike, RealLike

NORMS = ("none", "instance", "batch")
_MAX_WIDTH = 2**20


class Network(nn.Module):
  """The network of an architecture: `(n, ...) -> (n, num_outputs)`.

  Both parameterizations draw the same function at initialization. "ntk" keeps unit normal
  parameters and multiplies them by w_std / sqrt(fan_in) and b_std, so its empirical NTK converges
  to `ntk_fn(arch)` as the width grows. "standard" draws them at that scale, which is the usual
  choice for training.

  Attributes:
    arch: the architecture.
    width: units or channels of every layer except the readout.
    num_outputs: units of the readout.
    parameterization: "standard" or "ntk".
    norm: layer after each convolution: "none", "instance" (the ConvNet of DC, DM and MTT) or
      "batch" (FRePo; its running means are the collection `batch_stats`). `ntk_fn` does not
      describe networks with a norm.
    width_growth: factor of the channels after each pool, and from each convolution with a stride on.
    softplus: if positive, softplus(beta x) / beta with this beta replaces ReLU (RCIG, which
      differentiates its gradients).
  """

  arch: Architecture
  width: int = 128
  num_outputs: int = 10
  parameterization: str = "standard"
  norm: str = "none"
  width_growth: int = 1
  softplus: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[ArrayLike, "n ..."], features: bool = False, train: bool = False
  ) -> Float[Array, "n p"]:
    """Apply the network.

    Args:
      x: `(n, ...)` rows, NHWC for convolutions.
      features: whether to return the inputs of the readout, `(n, p)`, instead of its outputs.
      train: whether batch norm uses the statistics of the batch.

    Returns:
      `(n, num_outputs)`, or `(n, p)`.
    """
    h = jnp.asarray(x)
    if self.arch.convolutional:
      self.arch.check_images("x", h)
    *hidden, readout = self.arch.layers
    h, width = self._sequence(hidden, "", h, self.width, train)
    return h if features else self._linear(str(len(hidden)), readout, self.num_outputs, h)

  def _sequence(
    self, layers: Sequence, prefix: str, h: Array, width: int, train: bool
  ) -> tuple[Array, int]:
    """The outputs of layers, and the width of those that follow; the prefix precedes names of parameters."""
    for i, layer in enumerate(layers):
      name = f"{prefix}{i}"
      match layer:
        case Flatten():
          h = h.reshape(h.shape[0], -1)
        case Relu():
          h = nn.softplus(self.softplus * h) / self.softplus if self.softplus else nn.relu(h)
        case LeakyRelu():
          h = nn.leaky_relu(h, layer.slope)
        case Erf():
          h = jax.lax.erf(h)
        case Gelu():
          h = nn.gelu(h, approximate=False)
        case AvgPool() | SumPool():
          h = pool(h, layer)
          width = width * self.width_growth
        case GlobalAvgPool():
          h = jnp.mean(h, axis=(1, 2))
        case GlobalSumPool():
          h = jnp.sum(h, axis=(1, 2))
        case Dense():
          h = self._linear(name, layer, width, h)
        case Conv():
          width = width * (self.width_growth if layer.stride > 1 else 1)
          h = self._normalized(name, self._linear(name, layer, width, h), train)
        case Residual():
          branch, after = self._sequence(layer.branch, f"{name}_branch_", h, width, train)
          h, width = self._sequence(layer.shortcut, f"{name}_shortcut_", h, width, train)
          if branch.shape != h.shape:
            raise ValueError(
              f"arch: expected a branch and a shortcut with equal shapes, got {branch.shape} and {h.shape} for {layer!r}"
            )
          h, width = branch + h, max(width, after)
        case Identity():
          pass
        case _:
          raise TypeError(f"arch: expected layers that networks have, got {layer!r}")
    return h, width

  def features(self, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n p"]:
    """The inputs of the readout `(n, p)`, with running means in batch norm."""
    return self(x, features=True)

  def _normalized(self, i: str, x: Array, train: bool) -> Array:
    if self.norm == "none":
      return x
    norm: Any = nn.InstanceNorm
    if self.norm == "batch":
      norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
    with linalg.permissive_promotion():
      return norm(
        epsilon=1e-5, param_dtype=x.dtype, force_float32_reductions=False, name=f"norm_{i}"
      )(x)

  def _linear(self, i: str, layer: Dense | Conv, features: int, x: ArrayLike) -> Array:
    size = layer.size if isinstance(layer, Conv) else 1
    weight_scale, bias_scale = layer.w_std / (x.shape[-1] * size**2) ** 0.5, layer.b_std
    ntk = self.parameterization == "ntk"
    init, name = nn.initializers.normal(1.0 if ntk else weight_scale), f"layer_{i}"
    if isinstance(layer, Conv):
      y = Convolution(features, size, init, layer.stride, layer.padding, name=name)(x)
    else:
      y = nn.Dense(features, use_bias=False, param_dtype=x.dtype, kernel_init=init, name=name)(x)
    bias = self.param(
      f"bias_{i}", nn.initializers.normal(1.0 if ntk else bias_scale), (features,), x.dtype
    )
    bias = jnp.expand_dims(bias, range(x.ndim - 1))
    return (y * weight_scale + bias * bias_scale) if ntk else y + bias


class Convolution(nn.Module):
  """`convolve_windows` with a learned kernel `(size, size, channels, features)`."""

  features: int
  size: int
  kernel_init: Callable
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: Float[ArrayLike, "n h w c"]) -> Float[Array, "n _ _ features"]:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, x.dtype)
    return convolve_windows(x, kernel, Window(self.size, self.stride, self.padding))


def convolve_windows(
  x: Float[ArrayLike, "n h w c"], kernel: Float[ArrayLike, "size size c features"], window: Window
) -> Float[Array, "n _ _ features"]:
  """Convolution of `(n, h, w, c)` with `(size, size, c, features)` on the windows of an image.

  With a stride or another padding, it is one matrix product of patches on CPUs, as the derivatives of XLA's
  own convolution are slow inside a loop there.
  """
  if window.stride == 1 and window.padding == "SAME" and window.size % 2:
    return convolve(x, kernel)
  x, kernel = jnp.asarray(x), jnp.asarray(kernel)
  if jax.default_backend() != "cpu" and window.padding != "CIRCULAR":
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (window.stride, window.stride),
      window.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
  pixels = jnp.concatenate(patches(x, window), axis=-1)
  n, h, w, c = pixels.shape
  return (pixels.reshape(-1, c) @ kernel.reshape(c, -1)).reshape(n, h, w, -1)


def pool(x: Float[ArrayLike, "n h w c"], layer: AvgPool | SumPool) -> Float[Array, "n _ _ c"]:
  """Mean or sum over the windows of a pooling layer."""
  if isinstance(layer, AvgPool) and layer.disjoint:
    return average_pool(x, layer.size)
  total = functools.reduce(jnp.add, patches(jnp.asarray(x), layer.window))
  return total / layer.size**2 if isinstance(layer, AvgPool) else total


def average_pool(x: Float[ArrayLike, "n h w c"], size: int) -> Float[Array, "n _ _ c"]:
  """Mean over disjoint windows of `(n, h, w, c)`; remaining rows and columns are dropped."""
  h, w = (length // size * size for length in x.shape[1:3])
  x = jnp.asarray(x)[:, :h, :w]
  # Sums of strided slices, because XLA on CPUs is slow at reductions over short axes and at their derivatives.
  rows = functools.reduce(operator.add, (x[:, i::size] for i in range(size)))
  return functools.reduce(operator.add, (rows[:, :, j::size] for j in range(size))) / size**2


def network(
  arch: Architecture,
  width: IntLike = 128,
  num_outputs: IntLike = 10,
  parameterization: str = "standard",
  norm: str = "none",
  width_growth: IntLike = 1,
  softplus: RealLike = 0.0,
) -> Network:
  """The Flax module of an architecture.

  Args:
    arch: the architecture.
    width: units or channels of every layer except the readout, >= 1.
    num_outputs: units of the readout, >= 1.
    parameterization: "standard" (usual for training) or "ntk"; see `Network`.
    norm: "none", "instance" or "batch".
    width_growth: factor of the channels after each pool and from each convolution with a stride on, >= 1.
    softplus: 0 for ReLU, or the beta > 0 of the softplus that replaces it.

  Returns:
    A `flax.linen` module; `init(key, x)` and `apply(variables, x)` with x `(n, ...)`
    (NHWC for convolutions) give `(n, num_outputs)`.

  Raises:
    ValueError, TypeError: for a width, growth or number of outputs that is not a positive integer,
      a negative softplus, or an unknown parameterization or norm.
  """
  width = checks.positive_int("width", width)
  checks.in_range("width", width, 1, _MAX_WIDTH)
  num_outputs = checks.positive_int("num_outputs", num_outputs)
  checks.one_of("parameterization", parameterization, ("standard", "ntk"))
  checks.one_of("norm", norm, NORMS)
  width_growth = checks.positive_int("width_growth", width_growth)
  beta = checks.scalar("softplus", softplus)
  checks.non_negative("softplus", beta)
  checks.finite("softplus", beta)
  return Network(arch, width, num_outputs, parameterization, norm, width_growth, beta)


class ResNet(nn.Module):
  """Residual network of basic blocks: `(n, h, w, c) -> (n, num_outputs)`.

      stem: 3x3 convolution, norm, ReLU
      block: x <- ReLU(shortcut(x) + norm(conv(ReLU(norm(conv(x))))))
      shortcut: identity, or a 1x1 convolution if the number of channels changes
      between stages: 2x2 average pool, twice the channels
      end: global average, dense

  Average pools replace strides. Norms are instance norms, because batch norm is meaningless for ten
  images.

  Attributes:
    width: channels of the first stage.
    num_outputs: units of the readout.
    blocks: basic blocks per stage; (2, 2, 2, 2) is the depth of ResNet-18.

  References:
    He et al. (CVPR 2016), section 3 and figure 5 (left), adapted to small images.
  """

  width: int = 32
  num_outputs: int = 10
  blocks: Sequence[int] = (1, 1, 1)

  @nn.compact
  def __call__(self, x: Float[ArrayLike, "n h w c"]) -> Float[Array, "n num_outputs"]:
    """Outputs `(n, num_outputs)` of images `(n, h, w, c)`."""
    with linalg.permissive_promotion():
      x = nn.relu(self._norm("stem_norm", self._convolution("stem", self.width, 3, x)))
      for stage, count in enumerate(self.blocks):
        features = self.width * 2**stage
        if stage and min(x.shape[1:3]) > 1:
          x = average_pool(x, 2)
        for block in range(count):
          x = self._block(f"stage_{stage}_block_{block}", features, x)
      return nn.Dense(self.num_outputs, param_dtype=x.dtype, name="readout")(
        jnp.mean(x, axis=(1, 2))
      )

  def _block(self, name: str, features: int, x: ArrayLike) -> Array:
    y = nn.relu(self._norm(f"{name}_norm_0", self._convolution(f"{name}_0", features, 3, x)))
    y = self._norm(f"{name}_norm_1", self._convolution(f"{name}_1", features, 3, y))
    if x.shape[-1] != features:
      x = self._convolution(f"{name}_shortcut", features, 1, x)
    return nn.relu(x + y)

  def _convolution(self, name: str, features: int, size: int, x: ArrayLike) -> Array:
    return Convolution(features, size, nn.initializers.he_normal(), name=name)(x)

  def _norm(self, name: str, x: ArrayLike) -> Array:
    return nn.InstanceNorm(
      epsilon=1e-5, param_dtype=x.dtype, force_float32_reductions=False, name=name
    )(x)
