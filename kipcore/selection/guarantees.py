"""What holds by theorem: how many draws a promise takes, and lower bounds on the least objective.

Throughout F(W) = sum_i ||W^T phi_i - y_i||^2 + ridge ||W||^2 over all n rows, and F_S(W) is
the same with the weighted rows of the subset and *the same* ridge. The theorems speak of
draws with replacement with p_i = s_i / t, where s_i is at least the sensitivity of row i and
t = sum s_i; after mixing a share g of uniform draws, use t / (1 - g). The lower bounds on
F* = min F are by duality, and `certificate` sets them beside what a subset is measured to do.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import blocks, checks, linalg
from kipcore.types import Array

THEOREMS = ("krr", "krr_optimum", "pseudo_dimension", "single_query")
_CG_TINY = 1e-30


def sample_size(
  total_sensitivity, dimension, epsilon, delta, theorem: str = "krr", *, constant: float = 1.0
) -> int:
  """Draws (with replacement) that a theorem asks for, with failure probability at most delta.

  With t = `total_sensitivity`, d = `dimension`, e = `epsilon`:

  - "krr": |F_S(W) / F(W) - 1| <= e for all W and any number of outputs, with d the effective dimension, from
    m >= (8 t / e^2) (1 + e / 6) ln((16 d + 4) / delta). F_S - F is a quadratic, a cross and a constant term; each is
    within e / 2 by, in turn, Tropp's intrinsic matrix Bernstein inequality (2015, Theorem 7.7.1), Pinelis' vector
    Bernstein inequality (1994, Theorem 3.3) and Bernstein's. Needs s_i >= krr sensitivity, and a largest kernel
    eigenvalue of at least the ridge (the intrinsic dimension is then at most 2 d).
  - "krr_optimum": F(W_S) <= (1 + e) F* for the minimizer W_S of F_S alone, from
    m >= max((28 t / 3) ln(32 d / delta), (8 t / e) (1 + sqrt(e) / 6) ln(4 / delta)). The two first tools with e = 1/2
    and sqrt(e) / 2; leverage scores would do for s_i if no row's residual dominates. Same assumptions.
  - "single_query": |F_S / F - 1| <= e for one query fixed before the draw (Bernstein), any loss, d unused, from
    m >= (2 t / e^2) (1 + e / 3) ln(2 / delta).
  - "pseudo_dimension": all queries of any loss whose ranges have (pseudo-)dimension d, from
    m >= constant (t / e^2) (d ln t + ln(1 / delta)) (Feldman and Langberg 2011; Braverman, Feldman and Lang 2016). The
    papers leave the constant open: with the default 1 this is an order of magnitude, no promise. For a kernel d can be
    n, where it says nothing.

  The first three constants follow from the named inequalities by our own derivation.

  Args:
    total_sensitivity: t > 0, the sum of the scores drawn from.
    dimension: d > 0.
    epsilon: in (0, 1); above 0 for "krr_optimum".
    delta: in (0, 1).
    theorem: one of `THEOREMS`.
    constant: of "pseudo_dimension".

  Returns:
    The least m, an int >= 1.

  Raises:
    ValueError: for values out of range or an unknown theorem.

  Example:
    >>> kipcore.sample_size(total_sensitivity=50, dimension=40, epsilon=0.5, delta=0.1)
    15202
    >>> kipcore.sample_size(
    ...   total_sensitivity=50, dimension=40, epsilon=0.5, delta=0.1, theorem="single_query"
    ... )
    1399
  """
  _check_theorem(total_sensitivity, dimension, delta, theorem)
  if not epsilon > 0 or (theorem != "krr_optimum" and epsilon >= 1):
    raise ValueError(f"epsilon: expected a value in (0, 1), got {epsilon}")
  t, d = float(total_sensitivity), float(dimension)
  if theorem == "pseudo_dimension":
    m = constant * t / epsilon**2 * (d * max(math.log(t), 1.0) - math.log(delta))
  elif theorem == "krr_optimum":
    root = math.sqrt(epsilon)
    m = max(_half_spectrum(t, d, delta), 8 * t / epsilon * (1 + root / 6) * math.log(4 / delta))
  else:
    rate, slope, log = _bernstein(t, d, delta, theorem)
    m = rate / epsilon**2 * (1 + slope * epsilon) * log
  return max(1, math.ceil(m * (1 - 1e-12)))


def guarantee_at(
  num_samples: int,
  total_sensitivity,
  dimension,
  delta=0.1,
  theorem: str = "krr",
  *,
  constant: float = 1.0,
) -> float:
  """The epsilon that `num_samples` draws promise by a theorem: the inverse of `sample_size`.

  Args:
    num_samples: m.
    total_sensitivity, dimension, delta, theorem, constant: as for `sample_size`.

  Returns:
    epsilon; `math.inf` where the theorem promises nothing at this size (for statements on
    |F_S / F - 1|, from epsilon = 1 on).

  Raises:
    ValueError: as `sample_size`.

  Example:
    >>> round(kipcore.guarantee_at(15202, total_sensitivity=50, dimension=40), 3)
    0.5
    >>> kipcore.guarantee_at(500, total_sensitivity=50, dimension=40)  # too few for any promise
    inf
  """
  _check_theorem(total_sensitivity, dimension, delta, theorem)
  num_samples = checks.positive_int("num_samples", num_samples)
  m, t, d = num_samples, float(total_sensitivity), float(dimension)
  if theorem == "krr_optimum":
    root = _root(8 * t * math.log(4 / delta) / m, 1 / 6)
    return root**2 if m >= _half_spectrum(t, d, delta) else math.inf
  if theorem == "pseudo_dimension":
    epsilon = math.sqrt(constant * t / m * (d * max(math.log(t), 1.0) - math.log(delta)))
  else:
    rate, slope, log = _bernstein(t, d, delta, theorem)
    epsilon = _root(rate * log / m, slope)
  return epsilon if epsilon < 1 else math.inf


def _bernstein(t, d, delta, theorem):
  """M = rate / eps^2 (1 + slope eps) log, as (rate, slope, log)."""
  if theorem == "krr":
    return 8 * t, 1 / 6, math.log((16 * max(d, 0.5) + 4) / delta)
  return 2 * t, 1 / 3, math.log(2 / delta)


def _half_spectrum(t, d, delta):
  """Draws after which G_S >= G / 2, with probability 1 - delta / 2."""
  return 28 * t / 3 * math.log(32 * max(d, 0.5) / delta)


def _root(a, slope):
  """The epsilon with epsilon^2 = a (1 + slope epsilon)."""
  return 0.5 * (a * slope + math.sqrt((a * slope) ** 2 + 4 * a))


def _check_theorem(total_sensitivity, dimension, delta, theorem):
  checks.one_of("theorem", theorem, THEOREMS)
  checks.positive("total_sensitivity", total_sensitivity)
  checks.positive("dimension", dimension)
  if not 0 < delta < 1:
    raise ValueError(f"delta: expected a value in (0, 1), got {delta}")


class Data(NamedTuple):
  """Rows or a kernel matrix, labels and the ridge, as one traced argument."""

  operand: Array
  y: Array
  ridge: Array


class Basis(NamedTuple):
  """Coordinates z = L^{-1} k(landmarks, x): factors of K_LL and of G = Z^T Z + ridge, W* in them, and traces."""

  chol: linalg.Factor
  normal: linalg.Factor
  optimum: Array
  dimension: Array
  residual: Array
  status: Array


def kernel_entries(kernel_fn, operand, rows, columns):
  """Kernel entries between two lists of rows."""
  return (
    operand[rows][:, columns] if kernel_fn is None else kernel_fn(operand[rows], operand[columns])
  )


def coordinates(kernel_fn, data, landmarks, chol, rows):
  """Z of some rows, `(b, l)`."""
  return linalg.whiten(chol, kernel_entries(kernel_fn, data.operand, landmarks, rows)).T.astype(
    data.y.dtype
  )


@functools.partial(jax.jit, static_argnames="kernel_fn")
def exact_lower(kernel_fn, data):
  """F* = ridge <Y, (K + ridge)^{-1} Y>, from the whole matrix: for n rows that fit as landmarks."""
  rows = jnp.arange(data.y.shape[0], dtype=jnp.int32)
  f = linalg.factor(
    kernel_entries(kernel_fn, data.operand, rows, rows).astype(data.y.dtype), data.ridge
  )
  return data.ridge * jnp.sum(data.y * linalg.solve(f, data.y))


@functools.partial(jax.jit, static_argnames=("kernel_fn", "steps", "block_size"))
def dual_lower(kernel_fn, data, landmarks, basis, steps, block_size):
  """F* is at least the dual value after preconditioned conjugate gradients on (K + ridge) a = Y, column by column."""
  rows = jnp.arange(data.y.shape[0], dtype=jnp.int32)

  def system(v):
    def block(r):
      entries = lambda columns: kernel_entries(kernel_fn, data.operand, r, columns).astype(v.dtype)
      product = lambda columns, present: linalg.matmul(
        entries(columns), jnp.where(present[:, None], v[columns], 0)
      )
      return blocks.sum_row_blocks(product, rows, block_size)

    return blocks.map_row_blocks(block, rows, block_size) + data.ridge * v

  def precondition(v):
    # (Z Z^T + ridge)^{-1} v = (v - Z G^{-1} Z^T v) / ridge, two passes over (n, l) entries.
    z = lambda r: coordinates(kernel_fn, data, landmarks, basis.chol, r)
    product = lambda r, present: linalg.matmul(z(r).T, jnp.where(present[:, None], v[r], 0))
    inner = linalg.solve(basis.normal, blocks.sum_row_blocks(product, rows, block_size))
    outer = blocks.map_row_blocks(lambda r: linalg.matmul(z(r), inner), rows, block_size)
    return (v - outer) / data.ridge

  def step(_, state):
    gain, residual, direction, slope = state
    image = system(direction)
    curvature = jnp.sum(direction * image, axis=0)
    length = slope / jnp.maximum(curvature, _CG_TINY)
    # A step of conjugate gradients raises the dual objective of its column by slope^2 / curvature.
    residual = residual - length[None] * image
    lifted = precondition(residual)
    new = jnp.sum(residual * lifted, axis=0)
    return (
      gain + length * slope,
      residual,
      lifted + (new / jnp.maximum(slope, _CG_TINY))[None] * direction,
      new,
    )

  first = precondition(data.y)
  state = (
    jnp.zeros((data.y.shape[1],), data.y.dtype),
    data.y,
    first,
    jnp.sum(data.y * first, axis=0),
  )
  return data.ridge * jnp.sum(jax.lax.fori_loop(0, steps, step, state)[0])
