"""Measured approximation error of a weighted subset.

`guarantees` defines the objectives F and F_S and the theorem that a certificate refers to. The
error is measured on a fixed set of test queries (`QueryBank`). It is a lower bound on the error
over all queries, so it can disprove an error bound but cannot prove one.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import blocks, checks, keys, linalg, pytrees
from kipcore.kernels.gram import gram_diag
from kipcore.selection.guarantees import (
  Basis,
  Data,
  coordinates,
  dual_lower,
  exact_lower,
  guarantee_at,
  kernel_entries,
)
from kipcore.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
  """Measured approximation error of a weighted subset, as plain Python values.

  Attributes:
    num_rows: n.
    num_samples: m, including repeated rows.
    num_landmarks: number of rows that span the test queries.
    ridge: absolute.
    exact: whether all rows are landmarks. Then `objective_lower` and both effective dimensions are
      exact (up to rounding), otherwise they are bounds.
    measured_epsilon: max |F_S(W) / F(W) - 1| over the test queries, a lower bound on the supremum
      over all W.
    epsilon_at_optimum: |F_S(W) / F(W) - 1| at the best W in the span of the landmarks.
    mean_epsilon: mean of |F_S(W) / F(W) - 1| over the test queries.
    num_queries: number of test queries.
    objective_subset: F(W_S), where W_S minimizes F_S.
    objective_reference: the smaller of F(W_S) and F at the best W in the span of the landmarks.
    objective_lower: certified lower bound on F* (up to rounding); None if it was not computed.
    objective_ratio: F(W_S) / objective_lower, an upper bound on F(W_S) / F*; None if
      `objective_lower` is None or not positive.
    effective_dimension_lower, effective_dimension_upper: bounds on tr K (K + ridge I)^{-1}.
    label_mass: ||R||^2 / F at the best W in the span of the landmarks, where R are its residuals:
      the contribution of the labels to the total sensitivity.
    promised_epsilon: the error bound that the theorem "krr" of `guarantee_at` gives for the total
      sensitivity; None if no total was given or the theorem gives no bound.
  """

  num_rows: int
  num_samples: int
  num_landmarks: int
  ridge: float
  exact: bool
  measured_epsilon: float
  epsilon_at_optimum: float
  mean_epsilon: float
  num_queries: int
  objective_subset: float
  objective_reference: float
  objective_lower: float | None
  objective_ratio: float | None
  effective_dimension_lower: float
  effective_dimension_upper: float
  label_mass: float
  promised_epsilon: float | None

  def as_dict(self) -> dict:
    """The fields as a dictionary that can be written as JSON."""
    return dataclasses.asdict(self)


class QueryBank(NamedTuple):
  """A fixed set of test queries W with their losses, for comparing subsets.

  Query 0 is zero, and query 1 is the optimum over the span of the landmarks.

  Attributes:
    losses: `(n, q)`, ||W^T phi_i - y_i||^2 of each row and query.
    penalties: `(q,)`, ridge ||W||^2.
    residual_energy: scalar, ||R||^2 of the residuals at query 1.
    dimension_lower, dimension_upper: scalars, bounds on the effective dimension.
    status: int32 scalar, `Status`.
  """

  losses: Array
  penalties: Array
  residual_energy: Array
  dimension_lower: Array
  dimension_upper: Array
  status: Array


def query_bank(
  key,
  kernel,
  x: Array | None,
  y: Array,
  ridge,
  *,
  num_landmarks: int = 1024,
  num_queries: int = 30,
  block_size: int = 1024,
) -> QueryBank:
  """The test queries of `measure_coreset`, for measuring many subsets on the same queries.

  Args:
    key, kernel, x, y, ridge, num_landmarks, num_queries, block_size: as for `measure_coreset`.

  Returns:
    `QueryBank` with 2 + 3 `num_queries` queries (fewer if n < `num_queries`).

  Raises:
    ValueError, TypeError: for wrong shapes, dtypes or values.
  """
  num_landmarks, num_queries, block_size = checks.positive_ints(
    num_landmarks=num_landmarks, num_queries=num_queries, block_size=block_size
  )
  problem = _prepare(key, kernel, x, y, ridge, num_landmarks, block_size)
  return _bank(*problem, num_queries, block_size)


def query_errors(bank: QueryBank, indices: Array, weights: Array) -> Array:
  """|F_S(W) / F(W) - 1| of a subset for each test query.

  Args:
    bank: from `query_bank`.
    indices: `(m,)` rows of the subset.
    weights: `(m,)`, >= 0.

  Returns:
    `(q,)`. The function supports `jit`, and `vmap` over subsets.

  Raises:
    ValueError, TypeError: for wrong shapes, dtypes or values.
  """
  indices, weights = _check_subset(bank.losses.shape[0], indices, weights)
  subset = linalg.matmul(weights.astype(bank.losses.dtype)[None], bank.losses[indices])[0]
  return jnp.abs((subset + bank.penalties) / (jnp.sum(bank.losses, axis=0) + bank.penalties) - 1)


def measure_coreset(
  key,
  kernel,
  x: Array | None,
  y: Array,
  ridge,
  indices: Array,
  weights: Array,
  *,
  num_landmarks: int = 1024,
  num_queries: int = 30,
  dual_steps: int = 1,
  total_sensitivity=None,
  delta: float = 0.1,
  block_size: int = 1024,
) -> Certificate:
  """Measures |F_S / F - 1| on test queries, and F(W_S) / F*, for a weighted subset.

  A query is W = sum_l phi_l alpha_l^T over landmark rows l. If n <= `num_landmarks`, all rows are
  landmarks, and this form is no restriction. Otherwise the landmarks are uniform random rows. F,
  F_S and F(W_S) are exact for every query. The queries are zero, the optimum over the span of the
  landmarks, random perturbations of it, and for each row of high sensitivity the query that attains
  the sensitivity and one far along the same direction (formulas on the theory page). They depend on
  the key and the data but not on the subset.

  F* is exact if all rows are landmarks. Otherwise it is bounded from below by the dual objective
  after `dual_steps` steps of conjugate gradients. Each step evaluates all n^2 kernel entries, one
  block of rows at a time.

  The function runs on the host and returns Python numbers. It cannot be used inside `jit`, `vmap`
  or `grad`.

  Args:
    key: a random key or an int seed.
    kernel: `kernel_fn` (see `types.KernelFn`), or the matrix `(n, n)`.
    x: `(n, ...)` rows, or None with a matrix.
    y: `(n, c)` labels.
    ridge: absolute > 0, the same in F and F_S.
    indices, weights: `(m,)` rows of the subset and their weights; repeated rows and zero weights
      are allowed.
    num_landmarks: maximum number of landmarks. Memory: a few `(num_landmarks, num_landmarks)` and
      `(block_size, num_landmarks)` arrays.
    num_queries: number of random perturbations, and of rows of high sensitivity (two queries each).
    dual_steps: steps for the lower bound on F*; 0 skips the bound unless all rows are landmarks.
    total_sensitivity: sum of the scores that the subset was drawn from, for `promised_epsilon`.
    delta: failure probability of `promised_epsilon`.
    block_size: number of rows processed at a time.

  Returns:
    `Certificate`.

  Raises:
    ValueError, TypeError: for wrong shapes, dtypes or values.
    NumericalError: if a factorization fails.

  Example:
    >>> k, y = jnp.eye(4) + 1, jnp.asarray([[1.0], [1.0], [-1.0], [-1.0]])
    >>> rows = jnp.arange(4)
    >>> whole = kipcore.measure_coreset(0, k, None, y, 0.1, rows, jnp.ones(4), num_queries=3)
    >>> (
    ...   round(whole.measured_epsilon, 3),
    ...   round(whole.objective_ratio, 3),
    ... )  # all rows, once each, lose nothing
    (0.0, 1.0)
    >>> half = kipcore.measure_coreset(
    ...   0, k, None, y, 0.1, rows // 2 * 2, jnp.ones(4), num_queries=3
    ... )
    >>> half.objective_ratio > 1  # every second row, twice
    True
  """
  checks.rank("y", y, 2)
  indices, weights = _check_subset(y.shape[0], indices, weights)
  num_landmarks, num_queries, block_size = checks.positive_ints(
    num_landmarks=num_landmarks, num_queries=num_queries, block_size=block_size
  )
  dual_steps = checks.integer("dual_steps", dual_steps, 0)
  problem = _prepare(key, kernel, x, y, ridge, num_landmarks, block_size)
  kernel_fn, _, data, landmarks, basis = problem
  bank = _bank(*problem, num_queries, block_size)
  subset = _subset_objective(kernel_fn, data, indices, weights.astype(data.y.dtype), block_size)
  checks.raise_for_status("the measurement of a subset", jnp.maximum(bank.status, subset.status))
  errors = np.asarray(query_errors(bank, indices, weights), np.float64)
  reference = float(jnp.sum(bank.losses[:, 1]) + bank.penalties[1])
  n, exact, lower = y.shape[0], landmarks.shape[0] == y.shape[0], None
  if exact:
    lower = float(exact_lower(kernel_fn, data))
  elif dual_steps:
    lower = float(dual_lower(kernel_fn, data, landmarks, basis, dual_steps, block_size))
  value = float(subset.value)
  promised = math.inf
  dimension_upper = float(bank.dimension_upper)
  if total_sensitivity is not None:
    promised = guarantee_at(indices.shape[0], total_sensitivity, dimension_upper, delta)
  return Certificate(
    num_rows=n,
    num_samples=indices.shape[0],
    num_landmarks=landmarks.shape[0],
    ridge=float(ridge),
    exact=exact,
    measured_epsilon=float(errors.max()),
    epsilon_at_optimum=float(errors[1]),
    mean_epsilon=float(errors.mean()),
    num_queries=errors.size,
    objective_subset=value,
    objective_reference=min(reference, value),
    objective_lower=lower,
    objective_ratio=None if not lower or lower <= 0 else value / lower,
    effective_dimension_lower=float(bank.dimension_lower),
    effective_dimension_upper=dimension_upper,
    label_mass=float(bank.residual_energy) / reference,
    promised_epsilon=promised if math.isfinite(promised) else None,
  )


class _Objective(NamedTuple):
  """F at the minimizer of F_S, and the status of the factorization."""

  value: Array
  status: Array


@functools.partial(jax.jit, static_argnames="block_size")
def _basis(kernel_fn, data, landmarks, block_size):
  k = kernel_entries(kernel_fn, data.operand, landmarks, landmarks).astype(data.y.dtype)
  # Jitter at rounding level, so that near-duplicate landmarks can be factorized. F excludes it.
  jitter = 10.0 * k.shape[0] * jnp.finfo(k.dtype).eps * jnp.mean(jnp.diagonal(k))
  chol = linalg.factor(k, jitter)

  def products_of(rows, present):
    z = coordinates(kernel_fn, data, landmarks, chol, rows)
    z = jnp.where(present[:, None], z, 0)
    return linalg.matmul(z.T, z), linalg.matmul(z.T, data.y[rows])

  rows = jnp.arange(data.y.shape[0], dtype=jnp.int32)
  products, targets = blocks.sum_row_blocks(products_of, rows, block_size)
  normal = linalg.factor(products, data.ridge)
  dimension = k.shape[0] - data.ridge * jnp.sum(linalg.inverse_diagonal(normal))
  if kernel_fn is None:
    diagonal = jnp.diagonal(data.operand)
  else:
    diagonal = gram_diag(kernel_fn, data.operand, block_size)
  residual = jnp.maximum(jnp.sum(diagonal.astype(k.dtype)) - jnp.trace(products), 0)
  status = jnp.maximum(chol.status, normal.status)
  return Basis(chol, normal, linalg.solve(normal, targets), dimension, residual, status)


def _unwhiten_all(f, b):
  """`linalg.unwhiten` of a stack `(q, l, c)` by a single solve."""
  flat = linalg.unwhiten(f, b.transpose(1, 0, 2).reshape(b.shape[1], -1))
  return flat.reshape(b.shape[1], b.shape[0], b.shape[2]).transpose(1, 0, 2)


@functools.partial(jax.jit, static_argnames=("num_queries", "block_size"))
def _bank(kernel_fn, key, data, landmarks, basis, num_queries, block_size):
  n, c = data.y.shape
  rows = jnp.arange(n, dtype=jnp.int32)
  over_rows = lambda fn: blocks.map_row_blocks(fn, rows, block_size)

  def scores(block):
    z = coordinates(kernel_fn, data, landmarks, basis.chol, block)
    leverage = jnp.sum(linalg.whiten(basis.normal, z.T) ** 2, axis=0)
    return leverage, data.y[block] - linalg.matmul(z, basis.optimum)

  leverage, residuals = over_rows(scores)
  energy = jnp.sum(residuals**2, axis=1)
  best = jnp.sum(energy) + data.ridge * jnp.sum(basis.optimum**2)
  _, top = jax.lax.top_k(leverage + energy / best, min(num_queries, n))
  z_top = coordinates(kernel_fn, data, landmarks, basis.chol, top)
  pulls = linalg.solve(basis.normal, z_top.T).T[:, :, None] * residuals[top][:, None, :]
  floor = jnp.finfo(best.dtype).tiny
  sharp = best / jnp.maximum(energy[top], floor)
  # tr U^T G U = leverage ||r||^2 for a pull. The scale makes this term 100 F*, so it dominates.
  far = 10 * jnp.sqrt(best / jnp.maximum(leverage[top] * energy[top], floor))
  start = basis.optimum[None]
  key_noise, key_size = jax.random.split(key)
  noise = jax.random.normal(key_noise, (num_queries, landmarks.shape[0] * c), best.dtype)
  sizes = 10.0 ** jax.random.uniform(key_size, (num_queries, 1), best.dtype, -1, 1) * jnp.sqrt(best)
  noise = (noise * sizes / jnp.linalg.norm(noise, axis=1, keepdims=True)).reshape(
    num_queries, -1, c
  )
  moved = start + _unwhiten_all(basis.normal, noise)
  pulled = [start - pulls * scale[:, None, None] for scale in (sharp, far)]
  queries = jnp.concatenate([jnp.zeros_like(start), start, moved, *pulled])
  queries = jnp.where(jnp.isfinite(queries), queries, 0)
  # ||W||^2 = <alpha, K alpha> with K itself excludes the jitter of the basis.
  k = kernel_entries(kernel_fn, data.operand, landmarks, landmarks).astype(best.dtype)
  flat = _unwhiten_all(basis.chol, queries).transpose(1, 0, 2).reshape(landmarks.shape[0], -1)
  penalties = data.ridge * jnp.sum(
    (flat * linalg.matmul(k, flat)).reshape(-1, queries.shape[0], c), axis=(0, 2)
  )

  def losses(block):
    predicted = linalg.matmul(
      kernel_entries(kernel_fn, data.operand, block, landmarks).astype(flat.dtype), flat
    )
    return jnp.sum(
      (predicted.reshape(-1, queries.shape[0], c) - data.y[block][:, None, :]) ** 2, axis=2
    )

  dimension_upper = basis.dimension
  if landmarks.shape[0] < n:
    dimension_upper = basis.dimension + basis.residual / data.ridge
  return QueryBank(
    over_rows(losses), penalties, jnp.sum(energy), basis.dimension, dimension_upper, basis.status
  )


@functools.partial(jax.jit, static_argnames="block_size")
def _subset_objective(kernel_fn, data, indices, weights, block_size):
  roots = jnp.sqrt(weights)[:, None]
  k = kernel_entries(kernel_fn, data.operand, indices, indices).astype(weights.dtype)
  # Symmetric scaling instead of the ridge vector ridge / w, so that zero weights and repeated rows
  # need no special case.
  f = linalg.factor(roots * k * roots.T, data.ridge)
  dual = roots * linalg.solve(f, roots * data.y[indices])

  def loss(block):
    predicted = linalg.matmul(
      kernel_entries(kernel_fn, data.operand, block, indices).astype(dual.dtype), dual
    )
    return jnp.sum((predicted - data.y[block]) ** 2, axis=1)

  losses = blocks.map_row_blocks(loss, jnp.arange(data.y.shape[0], dtype=jnp.int32), block_size)
  return _Objective(jnp.sum(losses) + data.ridge * jnp.sum(dual * linalg.matmul(k, dual)), f.status)


def _prepare(key, kernel, x, y, ridge, num_landmarks, block_size):
  """Checks the arguments; returns `(kernel_fn or None, bank key, data, landmarks, basis)`."""
  y = jnp.asarray(y)
  checks.rank("y", y, 2)
  checks.floating("y", y)
  checks.finite("y", y)
  checks.positive("ridge", ridge)
  n = y.shape[0]
  if not callable(kernel):
    checks.shape("kernel", kernel, (n, n))
  elif x is None:
    raise ValueError("x: expected rows with a kernel function, got None")
  else:
    checks.same_rows("x", x, "y", y)
  kernel_fn = pytrees.argument(kernel) if callable(kernel) else None
  operand = jnp.asarray(kernel if kernel_fn is None else x)
  key_rows, key_bank = jax.random.split(keys.canonical_key(key))
  dtype = linalg.widest_dtype(y.dtype)
  landmarks = jnp.arange(n, dtype=jnp.int32)
  if num_landmarks < n:
    landmarks = jax.random.permutation(key_rows, landmarks)[:num_landmarks]
  data = Data(operand, y.astype(dtype), jnp.asarray(ridge, dtype))
  return kernel_fn, key_bank, data, landmarks, _basis(kernel_fn, data, landmarks, block_size)


def _check_subset(n, indices, weights):
  indices, weights = jnp.asarray(indices), jnp.asarray(weights)
  checks.rank("indices", indices, 1)
  checks.shape("weights", weights, indices.shape)
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise TypeError(f"indices: expected integers, got {indices.dtype}")
  if not indices.size:
    raise ValueError("indices: expected at least one row, got none")
  checks.in_range("indices", indices, 0, n - 1)
  checks.floating("weights", weights)
  checks.finite("weights", weights)
  checks.non_negative("weights", weights)
  return indices.astype(jnp.int32), weights
