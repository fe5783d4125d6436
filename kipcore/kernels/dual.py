"""Duals of activations: expectations over Gaussian pre-activations, with finite derivatives.

For (u, v) ~ N(0, [[v1, k], [k, v2]]) the dual of phi is E[phi(u) phi(v)], and the NTK
also needs E[phi'(u) phi'(v)].
"""

import math

import jax
import jax.numpy as jnp

from kipcore.architectures import Erf, Gelu, Identity, LeakyRelu, Relu
from kipcore.types import Array, Number

# arccos(c) = sqrt(1 - c) P(c) for c in [0, 1], with an absolute error of 2e-8 in float32
# (Abramowitz and Stegun, eq. 4.4.46) and 4e-16 in float64 (Chebyshev interpolation).
_ARCCOS = {
  "float32": (
    1.5707963050,
    -0.2145988016,
    0.0889789874,
    -0.0501743046,
    0.0308918810,
    -0.0170881256,
    0.0066700901,
    -0.0012624911,
  ),
  "float64": (
    1.5707963267948966,
    -0.21460183660253215,
    0.08904862254567095,
    -0.05079281442482,
    0.03368128419820402,
    -0.024374292512162273,
    0.018671958702090468,
    -0.014883927266844121,
    0.012205172350434557,
    -0.010182448444547632,
    0.008496676982508333,
    -0.006887801715407704,
    0.005196357325687018,
    -0.0034612920073868736,
    0.0019215381528283615,
    -0.0008342962828464806,
    0.000261516310274601,
    -5.210377275943756e-05,
    4.922039806842804e-06,
  ),
}


def _arccos(c: Array) -> Array:
  """Arccos on [-1, 1] by a polynomial, several times faster than XLA's on CPU."""
  a = jnp.abs(c)
  coefficients = _ARCCOS.get(c.dtype.name, _ARCCOS["float32"])
  series = jnp.full_like(a, coefficients[-1])
  for coefficient in coefficients[-2::-1]:
    series = series * a + coefficient
  acute = _root(1.0 - a) * series
  return jnp.where(c < 0, math.pi - acute, acute)


def _root(x: Array) -> Array:
  """Square root with derivative 0 at x = 0, so second derivatives of the duals are finite at parallel rows."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def _angle(k: Array, v1: Array, v2: Array):
  """(s, c, sin): s = sqrt(v1 v2), c = clip(k / s), and the sine of the angle between the two.

  If s = 0 the angle is a right angle, as in neural-tangents. Cosines within rounding of +-1 count
  as exactly parallel, because their sine is noise.
  """
  s = jnp.sqrt(v1) * jnp.sqrt(v2)
  c = jnp.where(s > 0, k / jnp.where(s > 0, s, 1.0), 0.0)
  # 4 eps is an angle of 7e-4 in float32, 3e-8 in float64.
  parallel = jnp.abs(c) >= 1.0 - 2.0 * jnp.finfo(c.dtype).eps
  c = jnp.where(parallel, jnp.sign(c), c)
  return s, c, _root((1.0 - c) * (1.0 + c))


@jax.custom_jvp
def relu_dual(k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
  """Duals of ReLU and of its step derivative: the arc-cosine kernels of order 1 and 0.

      E[relu(u) relu(v)]   = s / (2 pi) (sin t + (pi - t) cos t)
      E[relu'(u) relu'(v)] = (pi - t) / (2 pi)          s = sqrt(v1 v2), cos t = k / s

  At t = 0 the derivative of the second is infinite. It is a cone: differentiable with slope 0 along
  directions in which the points stay parallel. The derivative returned there is 0, which is exact
  for a point with itself and the mean of the one-sided slopes otherwise.

  Args:
    k: covariance, any shape.
    v1, v2: variances >= 0 of equal rank that broadcast against `k`.

  Returns:
    The two duals, in the shape of `k`. At v1 v2 = 0 they are 0 and 1/4.

  References:
    Cho and Saul (2009), eq. 3 and 6.
  """
  s, c, sin = _angle(k, v1, v2)
  rest = (math.pi - _arccos(c)) * (0.5 / math.pi)
  return s * (sin * (0.5 / math.pi) + rest * c), rest


@relu_dual.defjvp
def _relu_dual_jvp(primals, tangents):
  k, v1, v2 = primals
  dk, dv1, dv2 = tangents
  s, c, sin = _angle(k, v1, v2)
  rest = (math.pi - _arccos(c)) * (0.5 / math.pi)
  inverse_s = jnp.where(s > 0, 1.0 / jnp.where(s > 0, s, 1.0), 0.0)
  inverse_sin = jnp.where(sin > 0, 1.0 / jnp.where(sin > 0, sin, 1.0), 0.0)
  log_v = _relative(dv1, v1) + _relative(dv2, v2)  # = 2 d log s
  order1 = rest * dk + (0.25 / math.pi) * s * sin * log_v
  order0 = (0.5 / math.pi) * inverse_sin * (dk * inverse_s - 0.5 * c * log_v)
  return (s * (sin * (0.5 / math.pi) + rest * c), rest), (order1, order0)


def _relative(dv: Array, v: Array) -> Array:
  return jnp.where(v > 0, dv / jnp.where(v > 0, v, 1.0), 0.0)


def leaky_relu_dual(k: Array, v1: Array, v2: Array, slope: Number) -> tuple[Array, Array]:
  """Duals of max(x, 0) + a min(x, 0) for any slope a.

      E[phi(u) phi(v)] = (1 - a)^2 E[relu(u) relu(v)] + a k,  and its derivative by k

  because phi(x) = (1 - a) relu(x) + a x and E[relu(u) v] = k / 2.
  """
  value, derivative = relu_dual(k, v1, v2)
  return (1 - slope) ** 2 * value + slope * k, (1 - slope) ** 2 * derivative + slope


def erf_dual(k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
  """Duals of erf.

      E[erf(u) erf(v)]   = 2 / pi arcsin(2 k / sqrt((1 + 2 v1)(1 + 2 v2)))
      E[erf'(u) erf'(v)] = 4 / pi / sqrt((1 + 2 v1)(1 + 2 v2) - 4 k^2)

  Args and returns: as for `relu_dual`.

  References:
    Williams (1997), eq. 11.
  """
  m = (1 + 2 * v1) * (1 + 2 * v2)
  return (2 / math.pi) * jnp.arcsin(2 * k / jnp.sqrt(m)), (4 / math.pi) / jnp.sqrt(m - 4 * k * k)


def gelu_dual(k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
  """Duals of x Phi(x), with Phi the normal distribution function (exact GELU).

  With m = (1 + v1)(1 + v2), D = m - k^2, p = 1/4 + arcsin(k / sqrt m) / (2 pi) and q = 1 / (2 pi sqrt D):

      E[phi(u) phi(v)] = k p + q r,    r = v1 v2 - k^2 + k^2 / (1 + v1) + k^2 / (1 + v2)
      E[phi'(u) phi'(v)] = its derivative by k (Price's theorem)

  by Gaussian integration by parts. Args and returns: as for `relu_dual`.
  """
  m = (1 + v1) * (1 + v2)
  d = m - k * k
  p = 0.25 + jnp.arcsin(k / jnp.sqrt(m)) * (0.5 / math.pi)
  q = (0.5 / math.pi) / jnp.sqrt(d)
  slope = 1 / (1 + v1) + 1 / (1 + v2) - 1
  r = v1 * v2 + slope * k * k
  return k * p + q * r, p + q * k * (1 + 2 * slope + r / d)


def activation(layer, k: Array, v1: Array, v2: Array):
  """The duals of an activation record; None stands for the identity.

  Args:
    layer: `Relu`, `LeakyRelu`, `Erf`, `Gelu`, `Identity` or None.
    k, v1, v2: as for `relu_dual`.

  Returns:
    E[phi(u) phi(v)], and E[phi'(u) phi'(v)] (a number if it is constant).
  """
  match layer:
    case Relu():
      return relu_dual(k, v1, v2)
    case LeakyRelu():
      return leaky_relu_dual(k, v1, v2, layer.slope)
    case Erf():
      return erf_dual(k, v1, v2)
    case Gelu():
      return gelu_dual(k, v1, v2)
    case Identity() | None:
      return k, 1.0
  raise TypeError(f"expected an activation, got {layer!r}")


def activation_diag(layer, v: Array):
  """`activation` of a point with itself, exactly: for ReLU v / 2 and 1 / 2."""
  match layer:
    case Relu():
      return 0.5 * v, 0.5
    case LeakyRelu():
      second = 0.5 * (1 + layer.slope**2)
      return second * v, second
  return activation(layer, v, v, v)
