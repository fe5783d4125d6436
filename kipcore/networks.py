"""An architecture realised as a `flax.linen` module of finite width."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from kipcore import checks, linalg
from kipcore.architectures import (
    Architecture, AvgPool, Conv, Dense, Erf, Flatten, Gelu, GlobalAvgPool, LeakyRelu, Relu)
from kipcore.types import Array


class Network(nn.Module):
  """The network of an architecture: `(n, ...) -> (n, num_outputs)`.

  At initialisation both parameterisations draw the same function. "ntk" keeps unit
  normal parameters and multiplies them by w_std / sqrt(fan_in) and b_std, so that
  its empirical NTK converges to `ntk_fn(arch)` as the width grows; "standard" draws
  them at that scale, which is what is usually trained.

  Attributes:
    arch: the architecture.
    width: units or channels of every layer but the readout.
    num_outputs: units of the readout.
    parameterization: "standard" or "ntk".
  """

  arch: Architecture
  width: int = 128
  num_outputs: int = 10
  parameterization: str = "standard"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    last = len(self.arch.layers) - 1
    for i, layer in enumerate(self.arch.layers):
      match layer:
        case Flatten():
          x = x.reshape(x.shape[0], -1)
        case Relu():
          x = nn.relu(x)
        case LeakyRelu():
          x = nn.leaky_relu(x, layer.slope)
        case Erf():
          x = jax.lax.erf(x)
        case Gelu():
          x = nn.gelu(x, approximate=False)
        case AvgPool():
          with linalg.permissive_promotion():
            x = nn.avg_pool(x, (layer.size, layer.size), (layer.size, layer.size))
        case GlobalAvgPool():
          x = jnp.mean(x, axis=(1, 2))
        case Dense():
          x = self._linear(i, layer, self.num_outputs if i == last else self.width, x)
        case Conv():
          x = self._linear(i, layer, self.width, x)
    return x

  def _linear(self, i: int, layer, features: int, x: Array) -> Array:
    size = layer.size if isinstance(layer, Conv) else 1
    weight_scale, bias_scale = layer.w_std / (x.shape[-1] * size**2)**0.5, layer.b_std
    ntk = self.parameterization == "ntk"
    options = dict(
        features=features, use_bias=False, param_dtype=x.dtype, name=f"layer_{i}",
        kernel_init=nn.initializers.normal(1.0 if ntk else weight_scale))
    if isinstance(layer, Conv):
      y = nn.Conv(kernel_size=(size, size), padding="SAME", **options)(x)
    else:
      y = nn.Dense(**options)(x)
    bias = self.param(f"bias_{i}", nn.initializers.normal(1.0 if ntk else bias_scale), (features,), x.dtype)
    bias = jnp.expand_dims(bias, range(x.ndim - 1))
    return (y * weight_scale + bias * bias_scale) if ntk else y + bias


def network(arch: Architecture, width: int = 128, num_outputs: int = 10, parameterization: str = "standard") -> Network:
  """The Flax module of an architecture.

  Args:
    arch: the architecture.
    width: units or channels of every layer but the readout, >= 1.
    num_outputs: units of the readout, >= 1.
    parameterization: "standard" (usual for training) or "ntk"; see `Network`.

  Returns:
    A `flax.linen` module; `init(key, x)` and `apply(variables, x)` with x `(n, ...)`
    (NHWC for convolutions) give `(n, num_outputs)`.

  Raises:
    ValueError, TypeError: for a width or number of outputs below 1, or another
      parameterisation.
  """
  checks.positive_int("width", width)
  checks.positive_int("num_outputs", num_outputs)
  checks.one_of("parameterization", parameterization, ("standard", "ntk"))
  return Network(arch, width, num_outputs, parameterization)
