"""What a weighted subset promises by theorem, and what it is measured to do.

Throughout F(W) = sum_i ||W^T phi_i - y_i||^2 + ridge ||W||^2 over all n rows, and F_S(W) is
the same with the weighted rows of the subset and *the same* ridge. The theorems speak of
draws with replacement with p_i = s_i / t, where s_i is at least the sensitivity of row i and
t = sum s_i; after mixing a share g of uniform draws, use t / (1 - g).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks, keys, linalg
from kipcore.gram import gram_diag, map_row_blocks
from kipcore.types import Array

THEOREMS = ("krr", "krr_optimum", "pseudo_dimension", "single_query")
_CG_TINY = 1e-30


def sample_size(
    total_sensitivity, dimension, epsilon, delta, theorem: str = "krr", *, constant: float = 1.0) -> int:
  """Draws (with replacement) that a theorem asks for, with failure probability at most delta.

  With t = `total_sensitivity`, d = `dimension`, e = `epsilon`:

  "krr": |F_S(W) / F(W) - 1| <= e for all W, any number of outputs, with d = effective dimension:
      m >= (8 t / e^2) (1 + e / 6) ln((16 d + 4) / delta).
      F_S - F is a quadratic, a cross and a constant term; each is within e / 2 by, in turn, Tropp's
      intrinsic matrix Bernstein inequality (2015, Theorem 7.7.1), Pinelis' vector Bernstein
      inequality (1994, Theorem 3.3) and Bernstein's. Needs s_i >= krr sensitivity, and a largest
      kernel eigenvalue of at least the ridge (the intrinsic dimension is then at most 2 d).
  "krr_optimum": F(W_S) <= (1 + e) F* for the minimiser W_S of F_S alone:
      m >= max((28 t / 3) ln(32 d / delta), (8 t / e) (1 + sqrt(e) / 6) ln(4 / delta)). The two first
      tools with e = 1/2 and sqrt(e) / 2; leverage scores would do for s_i if no row's residual
      dominates. Same assumptions.
  "single_query": |F_S / F - 1| <= e for one query fixed before the draw (Bernstein); any loss, d unused:
      m >= (2 t / e^2) (1 + e / 3) ln(2 / delta).
  "pseudo_dimension": all queries of any loss whose ranges have (pseudo-)dimension d:
      m >= constant (t / e^2) (d ln t + ln(1 / delta)) (Feldman and Langberg 2011; Braverman, Feldman
      and Lang 2016). The papers leave the constant open: with the default 1 this is an order of
      magnitude, no promise. For a kernel d can be n, where it says nothing.

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
    num_samples: int, total_sensitivity, dimension, delta=0.1, theorem: str = "krr", *, constant: float = 1.0) -> float:
  """The epsilon that `num_samples` draws promise by a theorem: the inverse of `sample_size`.

  Args:
    num_samples: m.
    total_sensitivity, dimension, delta, theorem, constant: as for `sample_size`.

  Returns:
    epsilon; `math.inf` where the theorem promises nothing at this size (for statements on
    |F_S / F - 1|, from epsilon = 1 on).

  Raises:
    ValueError: as `sample_size`.
  """
  _check_theorem(total_sensitivity, dimension, delta, theorem)
  checks.positive_int("num_samples", num_samples)
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
    objective_subset: F(W_S), W_S the minimiser of F_S.
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
    key, kernel, x: Array | None, y: Array, ridge, *, num_landmarks: int = 1024, num_queries: int = 30,
    block_size: int = 1024) -> QueryBank:
  """The bank of `measure_coreset`, which documents it, for measuring many subsets on one bank.

  Args:
    key, kernel, x, y, ridge, num_landmarks, num_queries, block_size: as for `measure_coreset`.

  Returns:
    `QueryBank`, with 2 + 3 `num_queries` queries (fewer where n < `num_queries`).

  Raises:
    ValueError, TypeError: wrong shapes or values.
  """
  problem = _prepare(key, kernel, x, y, ridge, num_landmarks, num_queries, block_size)
  return _bank(*problem, num_queries, block_size)


def query_errors(bank: QueryBank, indices: Array, weights: Array) -> Array:
  """|F_S(W) / F(W) - 1| for each query of the bank, `(q,)`; for `jit` and `vmap` over subsets."""
  subset = linalg.matmul(weights.astype(bank.losses.dtype)[None], bank.losses[indices])[0]
  return jnp.abs((subset + bank.penalties) / (jnp.sum(bank.losses, axis=0) + bank.penalties) - 1)


def measure_coreset(
    key, kernel, x: Array | None, y: Array, ridge, indices: Array, weights: Array, *, num_landmarks: int = 1024,
    num_queries: int = 30, dual_steps: int = 1, total_sensitivity=None, delta: float = 0.1,
    block_size: int = 1024) -> Certificate:
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
    NumericalError: where a factorisation failed.

  Source: the queries and the bound follow from F(W* + U) = F* + tr U^T G U, G = Phi^T Phi + ridge I.
  """
  indices, weights = _check_subset(y, indices, weights)
  problem = _prepare(key, kernel, x, y, ridge, num_landmarks, num_queries, block_size)
  kernel_fn, _, data, landmarks, basis = problem
  bank = _bank(*problem, num_queries, block_size)
  subset = _subset_objective(kernel_fn, data, indices, weights.astype(data.y.dtype), block_size)
  checks.raise_for_status("the measurement of a subset", jnp.maximum(bank.status, subset.status))
  errors = np.asarray(query_errors(bank, indices, weights), np.float64)
  reference = float(jnp.sum(bank.losses[:, 1]) + bank.penalties[1])
  n, exact, lower = y.shape[0], landmarks.shape[0] == y.shape[0], None
  if exact:
    lower = float(_exact_lower(kernel_fn, data))
  elif dual_steps:
    lower = float(_dual_lower(kernel_fn, data, landmarks, basis, dual_steps, block_size))
  value = float(subset.value)
  promised = math.inf
  dimension_upper = float(bank.dimension_upper)
  if total_sensitivity is not None:
    promised = guarantee_at(indices.shape[0], total_sensitivity, dimension_upper, delta)
  return Certificate(
      num_rows=n, num_samples=indices.shape[0], num_landmarks=landmarks.shape[0], ridge=float(ridge), exact=exact,
      measured_epsilon=float(errors.max()), epsilon_at_optimum=float(errors[1]), mean_epsilon=float(errors.mean()),
      num_queries=errors.size, objective_subset=value, objective_reference=min(reference, value),
      objective_lower=lower, objective_ratio=None if not lower or lower <= 0 else value / lower,
      effective_dimension_lower=float(bank.dimension_lower), effective_dimension_upper=dimension_upper,
      label_mass=float(bank.residual_energy) / reference,
      promised_epsilon=promised if math.isfinite(promised) else None)


class _Data(NamedTuple):
  """Rows or a kernel matrix, labels and the ridge, as one traced argument."""

  operand: Array
  y: Array
  ridge: Array


class _Basis(NamedTuple):
  """Coordinates z = L^{-1} k(landmarks, x): factors of K_LL and of G = Z^T Z + ridge, W* in them, and traces."""

  chol: linalg.Factor
  normal: linalg.Factor
  optimum: Array
  dimension: Array
  residual: Array
  status: Array


class _Objective(NamedTuple):
  """F at the optimum of the subset, and the status of its solve."""

  value: Array
  status: Array


def _entries(kernel_fn, operand, rows, columns):
  """Kernel entries between two lists of rows."""
  return operand[rows][:, columns] if kernel_fn is None else kernel_fn(operand[rows], operand[columns])


def _sum_blocks(fn, y, block_size):
  """Sums of `fn(rows, fresh)` over blocks of rows; `fresh` `(b, 1)` is 0 where an earlier block had the row."""
  n = y.shape[0]
  size = min(block_size, n)

  def of(start):
    # The last block is moved back to end at n.
    rows = jnp.minimum(start, n - size) + jnp.arange(size, dtype=jnp.int32)
    return fn(rows, (rows >= start).astype(y.dtype)[:, None])

  starts = jnp.arange(0, n, size, dtype=jnp.int32)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of, starts[0]))
  return jax.lax.scan(lambda total, start: (jax.tree.map(jnp.add, total, of(start)), None), zeros, starts)[0]


def _coordinates(kernel_fn, data, landmarks, chol, rows):
  """Z of some rows, `(b, l)`."""
  return linalg.whiten(chol, _entries(kernel_fn, data.operand, landmarks, rows)).T.astype(data.y.dtype)


@functools.partial(jax.jit, static_argnames=("kernel_fn", "block_size"))
def _basis(kernel_fn, data, landmarks, block_size):
  k = _entries(kernel_fn, data.operand, landmarks, landmarks).astype(data.y.dtype)
  # At rounding level, only so that near-duplicate landmarks have a factor; F is evaluated without it.
  jitter = 10.0 * k.shape[0] * jnp.finfo(k.dtype).eps * jnp.mean(jnp.diagonal(k))
  chol = linalg.factor(k, jitter)

  def products_of(rows, fresh):
    z = _coordinates(kernel_fn, data, landmarks, chol, rows) * fresh
    return linalg.matmul(z.T, z), linalg.matmul(z.T, data.y[rows])

  products, targets = _sum_blocks(products_of, data.y, block_size)
  normal = linalg.factor(products, data.ridge)
  dimension = k.shape[0] - data.ridge * jnp.sum(linalg.inverse_diagonal(normal))
  if kernel_fn is None:
    diagonal = jnp.diagonal(data.operand)
  else:
    diagonal = gram_diag(kernel_fn, data.operand, block_size)
  residual = jnp.maximum(jnp.sum(diagonal.astype(k.dtype)) - jnp.trace(products), 0)
  status = jnp.maximum(chol.status, normal.status)
  return _Basis(chol, normal, linalg.solve(normal, targets), dimension, residual, status)


def _unwhiten_all(f, b):
  """`linalg.unwhiten` of a stack `(q, l, c)`, as one solve."""
  flat = linalg.unwhiten(f, b.transpose(1, 0, 2).reshape(b.shape[1], -1))
  return flat.reshape(b.shape[1], b.shape[0], b.shape[2]).transpose(1, 0, 2)


@functools.partial(jax.jit, static_argnames=("kernel_fn", "num_queries", "block_size"))
def _bank(kernel_fn, key, data, landmarks, basis, num_queries, block_size):
  n, c = data.y.shape
  rows = jnp.arange(n, dtype=jnp.int32)
  blocks = lambda fn: map_row_blocks(fn, rows, block_size)

  def scores(block):
    z = _coordinates(kernel_fn, data, landmarks, basis.chol, block)
    leverage = jnp.sum(linalg.whiten(basis.normal, z.T) ** 2, axis=0)
    return leverage, data.y[block] - linalg.matmul(z, basis.optimum)

  leverage, residuals = blocks(scores)
  energy = jnp.sum(residuals**2, axis=1)
  best = jnp.sum(energy) + data.ridge * jnp.sum(basis.optimum**2)
  _, top = jax.lax.top_k(leverage + energy / best, min(num_queries, n))
  z_top = _coordinates(kernel_fn, data, landmarks, basis.chol, top)
  pulls = linalg.solve(basis.normal, z_top.T).T[:, :, None] * residuals[top][:, None, :]
  floor = jnp.finfo(best.dtype).tiny
  sharp = best / jnp.maximum(energy[top], floor)
  # tr U^T G U = leverage ||r||^2 for a pull: scaled so that the quadratic term is 100 F* and decides.
  far = 10 * jnp.sqrt(best / jnp.maximum(leverage[top] * energy[top], floor))
  start = basis.optimum[None]
  key_noise, key_size = jax.random.split(key)
  noise = jax.random.normal(key_noise, (num_queries, landmarks.shape[0] * c), best.dtype)
  sizes = 10.0 ** jax.random.uniform(key_size, (num_queries, 1), best.dtype, -1, 1) * jnp.sqrt(best)
  noise = (noise * sizes / jnp.linalg.norm(noise, axis=1, keepdims=True)).reshape(num_queries, -1, c)
  moved = start + _unwhiten_all(basis.normal, noise)
  pulled = [start - pulls * scale[:, None, None] for scale in (sharp, far)]
  queries = jnp.concatenate([jnp.zeros_like(start), start, moved, *pulled])
  queries = jnp.where(jnp.isfinite(queries), queries, 0)
  # The true ||W||^2 = <alpha, K alpha>, so the jitter of the basis does not enter.
  k = _entries(kernel_fn, data.operand, landmarks, landmarks).astype(best.dtype)
  flat = _unwhiten_all(basis.chol, queries).transpose(1, 0, 2).reshape(landmarks.shape[0], -1)
  penalties = data.ridge * jnp.sum((flat * linalg.matmul(k, flat)).reshape(-1, queries.shape[0], c), axis=(0, 2))

  def losses(block):
    predicted = linalg.matmul(_entries(kernel_fn, data.operand, block, landmarks).astype(flat.dtype), flat)
    return jnp.sum((predicted.reshape(-1, queries.shape[0], c) - data.y[block][:, None, :]) ** 2, axis=2)

  dimension_upper = basis.dimension
  if landmarks.shape[0] < n:
    dimension_upper = basis.dimension + basis.residual / data.ridge
  return QueryBank(blocks(losses), penalties, jnp.sum(energy), basis.dimension, dimension_upper, basis.status)


@functools.partial(jax.jit, static_argnames=("kernel_fn", "block_size"))
def _subset_objective(kernel_fn, data, indices, weights, block_size):
  roots = jnp.sqrt(weights)[:, None]
  k = _entries(kernel_fn, data.operand, indices, indices).astype(weights.dtype)
  # Symmetric scaling instead of a ridge / w_j: zero weights and repeated rows need no special case.
  f = linalg.factor(roots * k * roots.T, data.ridge)
  dual = roots * linalg.solve(f, roots * data.y[indices])

  def loss(block):
    predicted = linalg.matmul(_entries(kernel_fn, data.operand, block, indices).astype(dual.dtype), dual)
    return jnp.sum((predicted - data.y[block]) ** 2, axis=1)

  losses = map_row_blocks(loss, jnp.arange(data.y.shape[0], dtype=jnp.int32), block_size)
  return _Objective(jnp.sum(losses) + data.ridge * jnp.sum(dual * linalg.matmul(k, dual)), f.status)


@functools.partial(jax.jit, static_argnames="kernel_fn")
def _exact_lower(kernel_fn, data):
  rows = jnp.arange(data.y.shape[0], dtype=jnp.int32)
  f = linalg.factor(_entries(kernel_fn, data.operand, rows, rows).astype(data.y.dtype), data.ridge)
  return data.ridge * jnp.sum(data.y * linalg.solve(f, data.y))


@functools.partial(jax.jit, static_argnames=("kernel_fn", "steps", "block_size"))
def _dual_lower(kernel_fn, data, landmarks, basis, steps, block_size):
  """The dual value after preconditioned conjugate gradients on (K + ridge) a = Y, column by column."""
  rows = jnp.arange(data.y.shape[0], dtype=jnp.int32)

  def system(v):
    def block(r):
      entries = lambda columns: _entries(kernel_fn, data.operand, r, columns).astype(v.dtype)
      return _sum_blocks(lambda columns, fresh: linalg.matmul(entries(columns), v[columns] * fresh), v, block_size)

    return map_row_blocks(block, rows, block_size) + data.ridge * v

  def precondition(v):
    # (Z Z^T + ridge)^{-1} v = (v - Z G^{-1} Z^T v) / ridge, two passes over (n, l) entries.
    z = lambda r: _coordinates(kernel_fn, data, landmarks, basis.chol, r)
    inner = _sum_blocks(lambda r, fresh: linalg.matmul(z(r).T, v[r] * fresh), v, block_size)
    inner = linalg.solve(basis.normal, inner)
    return (v - map_row_blocks(lambda r: linalg.matmul(z(r), inner), rows, block_size)) / data.ridge

  def step(_, state):
    gain, residual, direction, slope = state
    image = system(direction)
    curvature = jnp.sum(direction * image, axis=0)
    length = slope / jnp.maximum(curvature, _CG_TINY)
    # A step of conjugate gradients raises the dual objective of its column by slope^2 / curvature.
    residual = residual - length[None] * image
    lifted = precondition(residual)
    new = jnp.sum(residual * lifted, axis=0)
    return gain + length * slope, residual, lifted + (new / jnp.maximum(slope, _CG_TINY))[None] * direction, new

  first = precondition(data.y)
  state = (jnp.zeros((data.y.shape[1],), data.y.dtype), data.y, first, jnp.sum(data.y * first, axis=0))
  return data.ridge * jnp.sum(jax.lax.fori_loop(0, steps, step, state)[0])


def _bernstein(t, d, delta, theorem):
  """m = rate / eps^2 (1 + slope eps) log, as (rate, slope, log)."""
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


def _prepare(key, kernel, x, y, ridge, num_landmarks, num_queries, block_size):
  """Checks; gives `(kernel_fn or None, key of the bank, data, landmarks, basis)`."""
  for name, value in (("num_landmarks", num_landmarks), ("num_queries", num_queries), ("block_size", block_size)):
    checks.positive_int(name, value)
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
  data = _Data(operand, y.astype(dtype), jnp.asarray(ridge, dtype))
  return kernel_fn, key_bank, data, landmarks, _basis(kernel_fn, data, landmarks, block_size)


def _check_subset(y, indices, weights):
  indices, weights = jnp.asarray(indices), jnp.asarray(weights)
  checks.rank("y", y, 2)
  checks.rank("indices", indices, 1)
  checks.shape("weights", weights, indices.shape)
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise TypeError(f"indices: expected integers, got {indices.dtype}")
  if not indices.size:
    raise ValueError("indices: expected at least one row, got none")
  checks.in_range("indices", indices, 0, y.shape[0] - 1)
  checks.floating("weights", weights)
  checks.finite("weights", weights)
  checks.non_negative("weights", weights)
  return indices.astype(jnp.int32), weights
