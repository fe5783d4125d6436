"""Duals of activations: expectations over Gaussian pre-activations, with derivatives that stay finite.

For (u, v) ~ N(0, [[v1, k], [k, v2]]) the dual of phi is E[phi(u) phi(v)], and the NTK
also needs E[phi'(u) phi'(v)].
"""

import math

import jax
import jax.numpy as jnp

from kipcore.types import Array

# arccos(c) = sqrt(1 - c) P(c) for c in [0, 1], absolute error 2e-8: Abramowitz & Stegun, eq. 4.4.46.
_ARCCOS = (1.5707963050, -0.2145988016, 0.0889789874, -0.0501743046, 0.0308918810, -0.0170881256, 0.0066700901,
           -0.0012624911)


def _arccos(c: Array) -> Array:
  """arccos on [-1, 1]; in float32 a polynomial, some five times faster than XLA's on CPU."""
  if c.dtype != jnp.float32:
    return jnp.arccos(c)
  a = jnp.abs(c)
  series = jnp.full_like(a, _ARCCOS[-1])
  for coefficient in _ARCCOS[-2::-1]:
    series = series * a + coefficient
  acute = jnp.sqrt(1.0 - a) * series
  return jnp.where(c < 0, math.pi - acute, acute)


def _angle(k: Array, v1: Array, v2: Array):
  """(s, c, sin): s = sqrt(v1 v2), c = clip(k / s), and the sine of the angle between the two.

  Where s = 0 the angle is taken as a right angle, as neural-tangents does. Cosines
  within rounding of +-1 count as exactly parallel: their sine is noise.
  """
  s = jnp.sqrt(v1) * jnp.sqrt(v2)
  c = jnp.where(s > 0, k / jnp.where(s > 0, s, 1.0), 0.0)
  # 4 eps is an angle of 7e-4 in float32, 3e-8 in float64.
  parallel = jnp.abs(c) >= 1.0 - 2.0 * jnp.finfo(c.dtype).eps
  c = jnp.where(parallel, jnp.sign(c), c)
  return s, c, jnp.sqrt((1.0 - c) * (1.0 + c))


@jax.custom_jvp
def relu_dual(k: Array, v1: Array, v2: Array) -> tuple[Array, Array]:
  """Duals of ReLU and of its step derivative: the arc-cosine kernels of order 1 and 0.

      E[relu(u) relu(v)]   = s / (2 pi) (sin t + (pi - t) cos t)
      E[relu'(u) relu'(v)] = (pi - t) / (2 pi)          s = sqrt(v1 v2), cos t = k / s

  At t = 0 the derivative of the second is infinite, and automatic differentiation
  gives NaN there. It is a cone: differentiable in every direction along which the
  two points stay parallel, with slope 0, so the derivative returned there is 0. This
  is exact for a point with itself, and the mean of the one-sided slopes otherwise.

  Args:
    k: covariance, any shape.
    v1, v2: variances >= 0 that broadcast against `k` (equal rank).

  Returns:
    The two duals, of the shape of `k`. At v1 v2 = 0 they are 0 and 1/4.

  Source: Cho & Saul 2009, eq. 3 and 6.
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


def relu_dual_diag(v: Array) -> tuple[Array, float]:
  """The duals of ReLU for a point with itself, exactly: v / 2 and 1 / 2."""
  return 0.5 * v, 0.5
