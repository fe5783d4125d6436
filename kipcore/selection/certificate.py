"""What a weighted subset is measured to do: a bank of fixed queries, and a certificate.

F, F_S and the theorems that a certificate quotes are those of `guarantees`. The measured
error is over the queries of the bank alone: it can refute a promise and cannot prove one.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import blocks, checks, keys, linalg
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
  """What a weighted subset was measured to do; all fields are Python numbers.

  Attributes:
    num_rows, num_samples, num_landmarks: n, m (repeats included) and the rows that span the queries.
    ridge: absolute.
    exact: whether the landmarks are all rows, so that nothing below is a bracket.
    measured_epsilon: max |F_S(W) / F(W) - 1| over the bank. A lower bound on the supremum over
      all W: it can refute a promise and cannot prove one.
    epsilon_at_optimum: the same at the best W in the span of the landmarks.
    mean_epsilon: mean over the bank.
    num_queries: size of the bank.
    objective_subset: F(W_S), W_S the minimizer of F_S.
    objective_reference: the least F found (at the optimum over the landmark span).
    objective_lower: certified lower bound on F* (up to rounding), or None where it was not asked for.
    objective_ratio: F(W_S) / objective_lower, an upper bound on F(W_S) / F*; or None.
    effective_dimension_lower, effective_dimension_upper: bracket of tr K (K + ridge)^{-1}.
    label_mass: ||R||^2 / F at the reference: the labels' part of the total sensitivity.
    promised_epsilon: `guarantee_at` for the total handed in, by the theorem "krr"; None if there was
      none, or if the theorem promises nothing.
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
    """The fields by name, ready for JSON."""
    return dataclasses.asdict(self)


class QueryBank(NamedTuple):
  """Fixed queries W with their losses, on which subsets are compared; the second is the optimum.

  Attributes:
    losses: `(n, q)`, ||W^T phi_i - y_i||^2.
    penalties: `(q,)`, ridge ||W||^2.
    residual_energy: scalar, ||R||^2 at the optimum over the landmark span.
    dimension_lower, dimension_upper: scalars that bracket the effective dimension.
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
  """The bank of `measure_coreset`, which documents it, for measuring many subsets on one bank.

  Args:
    key, kernel, x, y, ridge, num_landmarks, num_queries, block_size: as for `measure_coreset`.

  Returns:
    `QueryBank`, with 2 + 3 `num_queries` queries (fewer where n < `num_queries`).

  Raises:
    ValueError, TypeError: wrong shapes or values.
  """
  num_landmarks, num_queries, block_size = checks.positive_ints(
    num_landmarks=num_landmarks, num_queries=num_queries, block_size=block_size
  )
  problem = _prepare(key, kernel, x, y, ridge, num_landmarks, block_size)
  return _bank(*problem, num_queries, block_size)


def query_errors(bank: QueryBank, indices: Array, weights: Array) -> Array:
  """|F_S(W) / F(W) - 1| for each query of the bank, `(q,)`; for `jit` and `vmap` over subsets."""
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
  """Measures |F_S / F - 1| over a bank of queries, and F(W_S) / F*, of a weighted subset.

  Queries are W = sum over landmarks of phi_l alpha_l^T; landmarks are all rows where n <= `num_landmarks`
  (then nothing is lost: the supremum over W is one over the span of the rows), else uniform random
  rows. F, F_S and F(W_S) are exact for each such W. The bank: zero, the optimum W*, random
  W* + G^{-1/2} N with tr U^T G U between F*/100 and 100 F*, and for the rows of top sensitivity
  the query at which that sensitivity is attained, W* - G^{-1} phi_i r_i^T F* / ||r_i||^2 (r = y minus the
  prediction), and one far along the same direction. The bank depends on the key and the data, not on the subset.

  F* is exact for all rows. Otherwise any dual vector a gives F* >= ridge (2 <a, Y> - <a, (K + ridge) a>);
  `dual_steps` steps of conjugate gradients from the landmark fit, each of which evaluates all n^2 kernel
  entries in row blocks, but holds a block alone.

  A host function: it compiles its parts, returns numbers and cannot itself be transformed.

  Args:
    key: a random key or an int seed.
    kernel: `kernel_fn` (see `types.KernelFn`; hashable), or the matrix `(n, n)`.
    x: `(n, ...)` rows, or None with a matrix.
    y: `(n, c)` labels.
    ridge: absolute > 0, the same in F and F_S.
    indices, weights: `(m,)` the subset; repeats and zero weights are allowed.
    num_landmarks: memory is a few `(num_landmarks, num_landmarks)` and `(block_size, num_landmarks)`.
    num_queries: of each of the three kinds.
    dual_steps: steps for the lower bound; 0 leaves it out (with landmarks short of all rows).
    total_sensitivity: t of the draw, for `promised_epsilon`.
    delta: failure probability of that promise.
    block_size: rows at a time.

  Returns:
    `Certificate`.

  Raises:
    ValueError, TypeError: wrong shapes or values.
    NumericalError: where a factorization failed.

  Source: the queries and the bound follow from F(W* + U) = F* + tr U^T G U, G = Phi^T Phi + ridge I.

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
  """F at the optimum of the subset, and the status of its solve."""

  value: Array
  status: Array


@functools.partial(jax.jit, static_argnames=("kernel_fn", "block_size"))
def _basis(kernel_fn, data, landmarks, block_size):
  k = kernel_entries(kernel_fn, data.operand, landmarks, landmarks).astype(data.y.dtype)
  # At rounding level, only so that near-duplicate landmarks have a factor; F is evaluated without it.
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
  """`linalg.unwhiten` of a stack `(q, l, c)`, as one solve."""
  flat = linalg.unwhiten(f, b.transpose(1, 0, 2).reshape(b.shape[1], -1))
  return flat.reshape(b.shape[1], b.shape[0], b.shape[2]).transpose(1, 0, 2)


@functools.partial(jax.jit, static_argnames=("kernel_fn", "num_queries", "block_size"))
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
  # tr U^T G U = leverage ||r||^2 for a pull: scaled so that the quadratic term is 100 F* and decides.
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
  # The true ||W||^2 = <alpha, K alpha>, so the jitter of the basis does not enter.
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


@functools.partial(jax.jit, static_argnames=("kernel_fn", "block_size"))
def _subset_objective(kernel_fn, data, indices, weights, block_size):
  roots = jnp.sqrt(weights)[:, None]
  k = kernel_entries(kernel_fn, data.operand, indices, indices).astype(weights.dtype)
  # Symmetric scaling instead of a ridge / w_j: zero weights and repeated rows need no special case.
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
  """Checks; gives `(kernel_fn or None, key of the bank, data, landmarks, basis)`."""
  y = jnp.asarray(y)
  checks.rank("y", y, 2)
  checks.floating("y", y)
  checks.finite("y", y)
  checks.positive("ridge", ridge)
  n = y.shape[0]
  if not callable(kernel):
    checks.shape("kernel", kernel, (n, n))
  elif x is None:
    raise ValueError("x: expected rows beside a kernel function, got None")
  else:
    checks.same_rows("x", x, "y", y)
  kernel_fn, operand = (kernel, jnp.asarray(x)) if callable(kernel) else (None, jnp.asarray(kernel))
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
