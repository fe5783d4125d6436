"""Proved guarantees: sample sizes for an error bound, and lower bounds on the minimum objective.

F(W) = sum_i ||W^T phi_i - y_i||^2 + ridge ||W||^2 over all n rows, and F_S(W) is the same with the
weighted rows of the subset and *the same* ridge. The theorems apply to draws with replacement with
p_i = s_i / t, where s_i is at least the sensitivity of row i and t = sum s_i. If a share g of
uniform draws is mixed in, use t / (1 - g). The lower bounds on F* = min F follow from duality;
`certificate` compares them with the measured objective of a subset.
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
  """Number of draws with replacement that a theorem requires for failure probability at most delta.

  With t = `total_sensitivity`, d = `dimension`, e = `epsilon`:

  - "krr": |F_S(W) / F(W) - 1| <= e for all W and any number of outputs, with d the effective
    dimension, from m >= (8 t / e^2) (1 + e / 6) ln((16 d + 4) / delta). Requires s_i of at least
    the kernel ridge regression sensitivity, and a largest kernel eigenvalue of at least the ridge.
  - "krr_optimum": F(W_S) <= (1 + e) F* for the minimizer W_S of F_S, from
    m >= max((28 t / 3) ln(32 d / delta), (8 t / e) (1 + sqrt(e) / 6) ln(4 / delta)). Has the same
    requirements as "krr".
  - "single_query": |F_S / F - 1| <= e for any loss and one query that is fixed before the draw,
    from m >= (2 t / e^2) (1 + e / 3) ln(2 / delta). Does not use d.
  - "pseudo_dimension": |F_S / F - 1| <= e for all queries of any loss whose ranges have
    (pseudo-)dimension d, from m >= constant (t / e^2) (d ln t + ln(1 / delta)). The references do
    not state the constant, so with the default of 1 this is an order of magnitude and not a
    guarantee. For a kernel, d can be as large as n, and then the bound is not useful.

  The constants of the first three are derived from Bernstein inequalities on the theory page.

  Args:
    total_sensitivity: t > 0, the sum of the scores that the rows are drawn from.
    dimension: d > 0.
    epsilon: in (0, 1), or any positive value for "krr_optimum".
    delta: in (0, 1).
    theorem: one of `THEOREMS`.
    constant: constant factor of "pseudo_dimension".

  Returns:
    The smallest m, an int >= 1.

  Raises:
    ValueError: for values out of range or an unknown theorem.

  References:
    Tropp 2015, theorem 7.7.1; Pinelis 1994, theorem 3.3 ("krr", "krr_optimum"). Feldman and
    Langberg 2011; Braverman, Feldman and Lang 2016 ("pseudo_dimension").

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
  """The epsilon that a theorem guarantees for `num_samples` draws: the inverse of `sample_size`.

  Args:
    num_samples: m.
    total_sensitivity, dimension, delta, theorem, constant: as for `sample_size`.

  Returns:
    epsilon, or `math.inf` if the theorem gives no bound at this size (for theorems on
    |F_S / F - 1|, if epsilon would be 1 or more).

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
  """The terms (rate, slope, log) of the sample size m = rate / eps^2 (1 + slope eps) log."""
  if theorem == "krr":
    return 8 * t, 1 / 6, math.log((16 * max(d, 0.5) + 4) / delta)
  return 2 * t, 1 / 3, math.log(2 / delta)


def _half_spectrum(t, d, delta):
  """Number of draws for which G_S >= G / 2 with probability at least 1 - delta / 2."""
  return 28 * t / 3 * math.log(32 * max(d, 0.5) / delta)


def _root(a, slope):
  """The positive solution epsilon of epsilon^2 = a (1 + slope epsilon)."""
  return 0.5 * (a * slope + math.sqrt((a * slope) ** 2 + 4 * a))


def _check_theorem(total_sensitivity, dimension, delta, theorem):
  checks.one_of("theorem", theorem, THEOREMS)
  checks.positive("total_sensitivity", total_sensitivity)
  checks.positive("dimension", dimension)
  if not 0 < delta < 1:
    raise ValueError(f"delta: expected a value in (0, 1), got {delta}")


class Data(NamedTuple):
  """Rows (or a kernel matrix), labels and the ridge, as one traced argument."""

  operand: Array
  y: Array
  ridge: Array


class Basis(NamedTuple):
  """The span of the landmarks, in the coordinates z = L^{-1} k(landmarks, x).

  Attributes:
    chol: factor L L^T of K_LL.
    normal: factor of G = Z^T Z + ridge I.
    optimum: `(l, c)`, W* in these coordinates.
    dimension: scalar, effective dimension of Z Z^T.
    residual: scalar, tr(K - Z Z^T).
    status: int32 scalar, `Status`.
  """

  chol: linalg.Factor
  normal: linalg.Factor
  optimum: Array
  dimension: Array
  residual: Array
  status: Array


def kernel_entries(kernel_fn, operand, rows, columns):
  """Kernel entries between two lists of row indices."""
  return (
    operand[rows][:, columns] if kernel_fn is None else kernel_fn(operand[rows], operand[columns])
  )


def coordinates(kernel_fn, data, landmarks, chol, rows):
  """The coordinates Z of some rows, `(b, l)`."""
  return linalg.whiten(chol, kernel_entries(kernel_fn, data.operand, landmarks, rows)).T.astype(
    data.y.dtype
  )


@jax.jit
def exact_lower(kernel_fn, data):
  """F* = ridge <Y, (K + ridge I)^{-1} Y>, from the full n x n kernel matrix."""
  rows = jnp.arange(data.y.shape[0], dtype=jnp.int32)
  f = linalg.factor(
    kernel_entries(kernel_fn, data.operand, rows, rows).astype(data.y.dtype), data.ridge
  )
  return data.ridge * jnp.sum(data.y * linalg.solve(f, data.y))


@functools.partial(jax.jit, static_argnames=("steps", "block_size"))
def dual_lower(kernel_fn, data, landmarks, basis, steps, block_size):
  """Lower bound on F*: the dual objective after preconditioned conjugate gradients."""
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
    # (Z Z^T + ridge I)^{-1} v = (v - Z G^{-1} Z^T v) / ridge, in two passes over (n, l) entries.
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
    # Each step increases the dual objective of an output by slope^2 / curvature.
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
