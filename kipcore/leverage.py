"""Ridge leverage scores: exact, from features, from landmarks; and the ridge by effective dimension.

For a kernel matrix K with input weights u (default 1) write K_u = U^{1/2} K U^{1/2}
and phi_i for the features of row i of K_u. The ridge leverage score of row i is

  tau_i = phi_i^T G^{-1} phi_i = (K_u (K_u + ridge I)^{-1})_ii,   G = sum_j phi_j phi_j^T + ridge I,

in [0, 1], and their sum is the effective dimension d_eff(ridge). `ridge` is always
absolute, as in K + ridge I (Alaoui and Mahoney, NeurIPS 2015, and the BLESS code of
Rudi et al. 2018 agree; the paper of Rudi et al. multiplies by n).

At a ridge far below tr K / n every score is nearly 1 and sampling by it is uniform
sampling, so scores want a ridge of their own: `score_ridge_for_dimension`.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from kipcore import checks, keys, linalg
from kipcore.gram import gram_diag
from kipcore.types import Array, KernelFn, Status

# float32 scores err by about 1e-7 * condition number; below this fraction of tr K / n they mean nothing.
FLOAT32_RIDGE_FLOOR = 1e-4
# `auto` asks for d_eff = AUTO_KAPPA * (number of samples); 0.5 to 1 is sensible, the choice of 1 is heuristic.
AUTO_KAPPA = 1.0
# Scores whose largest is below this multiple of their mean sample like the uniform law.
FLAT_RATIO = 1.05

_PANELS = 4


class ScoreRidge(NamedTuple):
  """A ridge for scoring, chosen by effective dimension.

  Attributes:
    ridge: absolute, scalar.
    effective_dimension: d_eff at that ridge; an upper bound where landmarks were used.
    effective_dimension_lower: lower bound on it; equal to the former for a full spectrum.
    converged: bool, whether `effective_dimension` met the target to the tolerance.
    status: int32, `Status`; `MAX_STEPS` where the target could not be met.
  """

  ridge: Array
  effective_dimension: Array
  effective_dimension_lower: Array
  converged: Array
  status: Array


class LeverageBounds(NamedTuple):
  """lower <= tau <= upper, each `(n,)`."""

  lower: Array
  upper: Array


def ridge_leverage_scores(k: Array, ridge, weights: Array | None = None) -> Array:
  """Exact ridge leverage scores, tau_i = 1 - ridge ((K_u + ridge I)^{-1})_ii.

  Args:
    k: `(n, n)` kernel matrix, symmetric positive semi-definite.
    ridge: absolute, scalar > 0.
    weights: `(n,)` input weights >= 0, or None for 1.

  Returns:
    `(n,)` in [0, 1], in the dtype of `k`; NaN where the factorisation fails. In
    float32 (64-bit switch off) they agree with float64 to 1e-3 for ridge >= 1e-2 tr K / n.

  Raises:
    ValueError: for shapes that do not fit, a ridge <= 0, or a ridge below
      1e-4 tr K / n when only float32 is available (NaN on a traced path).
  """
  k, ridge, root = prepare_matrix(k, ridge, weights)
  return _exact(k, ridge, root).astype(k.dtype)


def effective_dimension(k: Array, ridge, weights: Array | None = None) -> Array:
  """d_eff = tr K_u (K_u + ridge I)^{-1}, the sum of `ridge_leverage_scores`; same arguments and errors."""
  return jnp.sum(ridge_leverage_scores(k, ridge, weights))


def feature_leverage_scores(z: Array, ridge, weights: Array | None = None, block_size: int | None = None) -> Array:
  """Scores of the kernel Z Z^T, u_i z_i^T (Z^T U Z + ridge I)^{-1} z_i, from a D x D matrix.

  Exact for this feature map. For a factor of a kernel matrix K with Z Z^T <= K they
  are lower bounds of the scores of K.

  Args:
    z: `(n, D)` features.
    ridge: absolute, scalar > 0.
    weights: `(n,)` input weights >= 0, or None.
    block_size: rows at a time.

  Returns:
    `(n,)` in [0, 1]; NaN where the factorisation fails.

  Raises:
    ValueError: as `ridge_leverage_scores`.
  """
  checks.rank("z", z, 2)
  ridge, root = prepare_rows("z", z, ridge, weights)
  check_precision(ridge, lambda: jnp.mean(root**2 * jnp.sum(z.astype(root.dtype) ** 2, axis=1)), z.dtype)
  return _feature_leverage(z, ridge, root, block_size or z.shape[0]).astype(z.dtype)


def landmark_leverage_scores(kernel_fn: KernelFn, x: Array, landmarks: Array, ridge, weights: Array | None = None,
                             landmark_weights: Array | None = None, block_size: int | None = None) -> Array:
  """Leverage scores against the landmarks S alone, in one pass over rows and no n x n matrix.

  With M = K_SS + ridge diag(1/w) and t_i = (k_ii - k_iS M^{-1} k_Si) / ridge:

    w = None:  tau_i <= t_i / (1 + t_i) outside S, tau_i <= 1 - ridge (M^{-1})_ii in S.
               Proved, for every S: they are the exact scores within S and i, and
               leaving rows out shrinks G. For uniform S their expected sum is at
               most (n + 1) d_eff / (|S| + 1).
    w given:   t_i in [tau_i / (1 + e), tau_i / (1 - e)] if the weighted landmarks
               approximate G to (1 -+ e) in the Loewner order; nothing otherwise.

  Args:
    kernel_fn: see `types.KernelFn`; hashable.
    x: `(n, ...)` rows.
    landmarks: `(s,)` distinct indices into `x`.
    ridge: absolute, scalar > 0.
    weights: `(n,)` input weights >= 0, or None.
    landmark_weights: `(s,)` weights > 0 (one over a selection probability), or None.
    block_size: rows at a time.

  Returns:
    `(n,)`; NaN where the factorisation fails.

  Raises:
    ValueError: as `ridge_leverage_scores`, and for repeated landmarks.

  Source: the one-pass form of Musco and Musco (NeurIPS 2017), section 3, and of Cohen
  et al. (ITCS 2015), theorem 4 (uniform sampling); t / (1 + t) is Sherman-Morrison.
  """
  ridge, root = prepare_rows("x", x, ridge, weights)
  landmarks = prepare_landmarks(landmarks, x.shape[0])
  check_precision(ridge, lambda: jnp.mean(weighted_diagonal(kernel_fn, x, root)), x.dtype)
  if landmark_weights is not None:
    checks.shape("landmark_weights", landmark_weights, landmarks.shape)
    checks.positive("landmark_weights", landmark_weights)
    landmark_weights = jnp.asarray(landmark_weights, root.dtype)
  return _landmark_leverage(kernel_fn, x, root, landmarks, landmark_weights, ridge, block_size).astype(x.dtype)


def low_rank_leverage_bounds(factor: Array, k_diag: Array, ridge, residual_norm=None) -> LeverageBounds:
  """Bounds on the leverage scores of K from a factor with F F^T <= K, e.g. a partial Cholesky factor.

  With E = K - F F^T, ||E|| <= residual_norm, c = residual_norm / ridge, and tau^(l) the
  scores of F F^T at ridge l:

    tau^(ridge) <= tau_i <= (c + tau^_i((1 + c) ridge)) / (1 + c)
    tau_i <= t / (1 + t),  t = h / (1 - a h) + E_ii / ((1 - q) ridge),
    h = f_i^T (a F^T F + ridge I)^{-1} f_i,  a = q / (q + c),  any q in (0, 1).

  Both upper bounds are proved and the smaller is returned. The first is operator
  monotonicity of x / (x + ridge). The second: phi = (f, b) with <b_i, b_j> = E_ij, and
  phi phi^T >= a f f^T - (q ridge / residual_norm) b b^T for every row but i; it adds the
  row's own residual instead of the worst. q minimises the sum over a grid.

  Args:
    factor: `(n, k)` with F F^T <= K.
    k_diag: `(n,)` diagonal of K.
    ridge: absolute, scalar > 0.
    residual_norm: upper bound on the spectral norm of E; None for its trace.

  Returns:
    `LeverageBounds`.

  Raises:
    ValueError: for shapes that do not fit or a ridge <= 0.
  """
  checks.rank("factor", factor, 2)
  ridge, _ = prepare_rows("factor", factor, ridge, None)
  checks.shape("k_diag", k_diag, (factor.shape[0],))
  z = factor.astype(ridge.dtype)
  residual = jnp.maximum(jnp.asarray(k_diag, ridge.dtype) - jnp.sum(z**2, axis=1), 0)
  norm = jnp.sum(residual) if residual_norm is None else jnp.asarray(residual_norm, ridge.dtype)
  return LeverageBounds(*(b.astype(factor.dtype) for b in _low_rank_bounds(z, residual, norm, ridge)))


def score_ridge_for_dimension(k: Array, target, weights: Array | None = None) -> ScoreRidge:
  """The ridge at which d_eff(ridge) = target, by bisection on its logarithm.

  Unique, because d_eff falls strictly from rank K to 0. To score for m samples take
  target = `AUTO_KAPPA` * m: the guarantees of leverage sampling want m above
  d_eff log d_eff, and a far larger d_eff gives flat scores (heuristic).

  Args:
    k: `(n, n)` kernel matrix, or `(n,)` its eigenvalues.
    target: d_eff wanted, 0 < target < n.
    weights: `(n,)` input weights, with a matrix only.

  Returns:
    `ScoreRidge`; `converged` says whether d_eff is within 1e-6 of the target,
    relatively (float64; 1e-4 in float32). It is not where the target is over the rank.

  Raises:
    ValueError: for a target outside (0, n) or shapes that do not fit.
  """
  checks.rank("k", k, 1, 2)
  checks.floating("k", k)
  _check_target(target, k.shape[0])
  wide = linalg.widest_dtype(k.dtype)
  values = k.astype(wide)
  if k.ndim == 2:
    checks.square("k", k)
    values = _spectrum(values, prepare_weights(weights, k.shape[0], wide))
  elif weights is not None:
    raise ValueError("weights: expected None with eigenvalues, got an array; weight the matrix instead")
  return _bisect_ridge(values, jnp.zeros((), wide), jnp.asarray(target, wide))


def landmark_score_ridge(key, kernel_fn: KernelFn, x: Array, target, num_landmarks: int,
                         weights: Array | None = None, block_size: int = 1024) -> ScoreRidge:
  """A ridge at which d_eff is at most the target, from landmarks and no n x n matrix.

  With sigma the eigenvalues of the Nystrom approximation from uniform landmarks and T the
  trace it misses, sum sigma / (sigma + ridge) <= d_eff <= that + T / ridge (proved). The
  upper bound is put on the target; the lower is returned beside it.

  Args:
    key: random key of the landmarks.
    kernel_fn, x, weights: as `landmark_leverage_scores`.
    target: bound on d_eff, 0 < target < n.
    num_landmarks: s; capped at n.
    block_size: rows at a time.

  Returns:
    `ScoreRidge`.

  Raises:
    ValueError: as `score_ridge_for_dimension`.
  """
  n = x.shape[0]
  _check_target(target, n)
  checks.positive_int("num_landmarks", num_landmarks)
  ridge, root = prepare_rows("x", x, 1.0, weights)
  landmarks = jax.random.permutation(keys.canonical_key(key), n)[:num_landmarks].astype(jnp.int32)
  values, tail = _nystrom_spectrum(kernel_fn, x, root, landmarks, min(block_size, n))
  return _bisect_ridge(values, tail, jnp.asarray(target, ridge.dtype))


def warn_if_flat(max_over_mean) -> None:
  """Warns on the host where the largest score is under 1.05 times the mean; tracers pass."""
  if not checks.is_traced(max_over_mean) and float(max_over_mean) < FLAT_RATIO:
    warnings.warn(
        f"scores are flat (largest / mean = {float(max_over_mean):.3f}): sampling by them is uniform sampling; "
        "score with a larger ridge, see score_ridge_for_dimension", stacklevel=4)


# What the sensitivity room shares: validated inputs in the working dtype, and weighted kernel blocks.


def prepare_weights(weights, n: int, dtype) -> Array:
  """Square roots of the weights, `(n,)`, ones for None."""
  if weights is None:
    return jnp.ones((n,), dtype)
  checks.shape("weights", weights, (n,))
  checks.non_negative("weights", weights)
  return jnp.sqrt(jnp.asarray(weights, dtype))


def prepare_rows(name: str, x, ridge, weights) -> tuple[Array, Array]:
  """(ridge, root weights) in the widest dtype, checked."""
  checks.floating(name, x)
  if x.ndim < 2 or x.shape[0] < 1:
    raise ValueError(f"{name}: expected at least one row (n, ...), got shape {x.shape}")
  checks.rank("ridge", ridge, 0)
  checks.positive("ridge", ridge)
  wide = linalg.widest_dtype(x.dtype)
  return jnp.asarray(ridge, wide), prepare_weights(weights, x.shape[0], wide)


def prepare_matrix(k, ridge, weights):
  """(k, ridge, root weights), checked."""
  checks.square("k", k)
  ridge, root = prepare_rows("k", k, ridge, weights)
  check_precision(ridge, lambda: jnp.mean(root**2 * jnp.diagonal(k).astype(root.dtype)), k.dtype)
  return k, ridge, root


def prepare_landmarks(landmarks, n: int) -> Array:
  """Distinct indices `(s,)` as int32."""
  checks.rank("landmarks", landmarks, 1)
  if not checks.is_traced(landmarks):
    values = np.asarray(landmarks)
    checks.in_range("landmarks", values, 0, n - 1)
    if len(np.unique(values)) != len(values) or not len(values):
      raise ValueError("landmarks: expected at least one index and none twice; use landmark_weights for multiples")
  return jnp.asarray(landmarks).astype(jnp.int32)


def check_precision(ridge, mean_diagonal, dtype) -> None:
  """Raises where float32 cannot carry the ridge; `mean_diagonal` is a thunk, run in float32 only."""
  if linalg.widest_dtype(dtype) == jnp.float64 or checks.is_traced(ridge):
    return
  mean = mean_diagonal()
  if not checks.is_traced(mean) and float(ridge) < FLOAT32_RIDGE_FLOOR * float(mean):
    raise ValueError(
        f"ridge: expected at least {FLOAT32_RIDGE_FLOOR:g} tr K / n = {FLOAT32_RIDGE_FLOOR * float(mean):.3g} "
        f"in float32, got {float(ridge):.3g}; switch 64-bit on, or score with a larger ridge")


def weighted_block(kernel_fn: KernelFn, xa, root_a, xb=None, root_b=None) -> Array:
  """U_a^{1/2} K(xa, xb) U_b^{1/2} in the dtype of the roots; a row of weight 0 plays no part."""
  k = kernel_fn(xa, xb).astype(root_a.dtype)
  return root_a[:, None] * k * (root_a if xb is None else root_b)[None, :]


def weighted_diagonal(kernel_fn: KernelFn, x, root) -> Array:
  """u_i k(x_i, x_i), `(n,)`."""
  return root**2 * gram_diag(kernel_fn, x).astype(root.dtype)


def split_blocks(block_size: int | None, x, *others):
  """Blocks of rows: `x` padded by its last row, the others (roots and weighted labels) by zeros."""
  n = x.shape[0]
  size = min(block_size or n, n)
  pad = -(-n // size) * size - n
  x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (pad, *x.shape[1:]))])
  others = [jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)) for a in others]
  return tuple(a.reshape(-1, size, *a.shape[1:]) for a in (x, *others))


def join_blocks(out, n: int):
  """The inverse of `split_blocks` for a pytree of results."""
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], out)


def scoring_factor(k: Array, ridge: Array) -> linalg.Factor:
  """Factor of K + ridge I whose status also tells a ridge that float32 cannot carry."""
  f = linalg.factor(k, ridge)
  if f.lower.dtype == jnp.float64:
    return f
  low = ridge < FLOAT32_RIDGE_FLOOR * jnp.trace(k).astype(ridge.dtype) / k.shape[0]
  return f._replace(status=jnp.where(low, jnp.maximum(f.status, Status.NOT_POSITIVE_DEFINITE), f.status))


def factor_leverage(f: linalg.Factor, ridge: Array) -> Array:
  """1 - ridge diag((L L^T)^{-1}), NaN on failure.

  L^{-1} is taken in column panels: those on the right need the trailing part of L only.
  """
  m = f.lower.shape[0]
  size = -(-m // _PANELS)
  diagonal = []
  for start in range(0, m, size):
    eye = jnp.eye(m - start, min(size, m - start), dtype=f.lower.dtype)
    diagonal.append(jnp.sum(solve_triangular(f.lower[start:, start:], eye, lower=True) ** 2, axis=0))
  tau = jnp.clip(1 - ridge * jnp.concatenate(diagonal), 0, 1)
  return jnp.where(f.status == Status.OK, tau, jnp.nan)


def feature_fit(z, root, y, ridge, block_size):
  """Scores `(n,)`, squared residuals of the weighted ridge fit `(n,)`, its objective, status.

  `y` is already weighted, `(n, c)`.
  """
  blocks = split_blocks(block_size, z, root, y)
  rows = lambda block: block[0].astype(root.dtype) * block[1][:, None]
  d, c = z.shape[1], y.shape[1]

  def add(total, block):
    zw = rows(block)
    return (total[0] + linalg.matmul(zw.T, zw), total[1] + linalg.matmul(zw.T, block[2])), None

  zero = jnp.zeros((d, d), root.dtype), jnp.zeros((d, c), root.dtype)
  (moment, cross), _ = jax.lax.scan(add, zero, blocks)
  f = linalg.factor(moment, ridge)
  w = linalg.solve(f, cross)

  def score(block):
    zw = rows(block)
    return jnp.sum(linalg.whiten(f, zw.T) ** 2, axis=0), jnp.sum((block[2] - linalg.matmul(zw, w)) ** 2, axis=1)

  tau, residual2 = join_blocks(jax.lax.map(score, blocks), z.shape[0])
  return jnp.clip(tau, 0, 1), residual2, jnp.sum(residual2) + ridge * jnp.sum(w**2), f.status


def landmark_fit(kernel_fn, x, root, y, landmarks, landmark_weights, ridge, block_size):
  """Exact scores and squared residuals of each row i in the problem of the rows S and i alone.

  `y` is already weighted. Returns the scores, the squared residuals, the optima of
  those problems, each `(n,)`, and a status. With landmark weights the scores are t_i.
  """
  xs, rs, ys = x[landmarks], root[landmarks], y[landmarks]
  k_ss = weighted_block(kernel_fn, xs, rs)
  if landmark_weights is None:
    f = scoring_factor(k_ss, ridge)
  else:
    f = linalg.factor(k_ss, ridge / landmark_weights)
  dual = linalg.solve(f, ys)

  def score(block):
    xb, rb, yb = block
    k = weighted_block(kernel_fn, xb, rb, xs, rs)
    seen = jnp.sum(linalg.whiten(f, k.T) ** 2, axis=0)
    t = jnp.maximum(weighted_diagonal(kernel_fn, xb, rb) - seen, 0) / ridge
    return t, jnp.sum((yb - linalg.matmul(k, dual)) ** 2, axis=1)

  t, error2 = join_blocks(jax.lax.map(score, split_blocks(block_size, x, root, y)), x.shape[0])
  if landmark_weights is not None:
    return t, error2, error2, f.status
  optimum = ridge * jnp.sum(ys * dual)
  tau = (t / (1 + t)).at[landmarks].set(factor_leverage(f, ridge))
  residual2 = (error2 / (1 + t) ** 2).at[landmarks].set(ridge**2 * jnp.sum(dual**2, axis=1))
  return tau, residual2, (optimum + error2 / (1 + t)).at[landmarks].set(optimum), f.status


def nystrom_factor(kernel_fn, xs, rs) -> linalg.Factor:
  """Factor of K_SS with a jitter at rounding level; features V = K_nS L^{-T} have V V^T <= K."""
  k_ss = weighted_block(kernel_fn, xs, rs)
  return linalg.factor(k_ss, 4 * jnp.finfo(k_ss.dtype).eps * jnp.trace(k_ss))


def kept_share(share, ridge, residual_norm):
  """The a of `low_rank_leverage_bounds` for its q = `share`."""
  return share * ridge / (share * ridge + jnp.maximum(residual_norm, jnp.finfo(share.dtype).tiny))


def best_share(values, tail, ridge, residual_norm) -> Array:
  """The q of `low_rank_leverage_bounds` with the least sum; `values` are eigenvalues of F^T F."""
  share = jnp.linspace(0.0, 0.98, 99, dtype=ridge.dtype)
  kept = kept_share(share, ridge, residual_norm)
  sums = jnp.sum(values[None, :] / (kept[:, None] * values[None, :] + ridge), axis=1) + tail / ((1 - share) * ridge)
  return share[jnp.argmin(sums)]


def corrected(h, residual, kept, share, ridge) -> Array:
  """The second upper bound of `low_rank_leverage_bounds` from its h and E_ii."""
  t = h / jnp.maximum(1 - kept * h, jnp.finfo(h.dtype).tiny) + residual / ((1 - share) * ridge)
  return t / (1 + t)


_exact = jax.jit(lambda k, ridge, root: factor_leverage(
    scoring_factor(root[:, None] * k.astype(root.dtype) * root[None, :], ridge), ridge))


@functools.partial(jax.jit, static_argnames="block_size")
def _feature_leverage(z, ridge, root, block_size):
  return feature_fit(z, root, jnp.zeros((z.shape[0], 1), root.dtype), ridge, block_size)[0]


@functools.partial(jax.jit, static_argnames=("kernel_fn", "block_size"))
def _landmark_leverage(kernel_fn, x, root, landmarks, landmark_weights, ridge, block_size):
  y = jnp.zeros((x.shape[0], 1), root.dtype)
  tau, _, _, status = landmark_fit(kernel_fn, x, root, y, landmarks, landmark_weights, ridge, block_size)
  return jnp.where(status == Status.OK, tau, jnp.nan)


@jax.jit
def _low_rank_bounds(z, residual, norm, ridge):
  moment = linalg.matmul(z.T, z)

  def scores(kept, level):
    return jnp.sum(linalg.whiten(linalg.factor(kept * moment, level), z.T) ** 2, axis=0)

  c = norm / ridge
  share = best_share(jnp.maximum(jnp.linalg.eigvalsh(moment), 0), jnp.sum(residual), ridge, norm)
  kept = kept_share(share, ridge, norm)
  one = jnp.ones_like(ridge)
  monotone = (c + scores(one, (1 + c) * ridge)) / (1 + c)
  return scores(one, ridge), jnp.minimum(monotone, corrected(scores(kept, ridge), residual, kept, share, ridge))


@jax.jit
def _spectrum(k, root):
  return jnp.linalg.eigvalsh(root[:, None] * k * root[None, :])


@functools.partial(jax.jit, static_argnames=("kernel_fn", "block_size"))
def _nystrom_spectrum(kernel_fn, x, root, landmarks, block_size):
  xs, rs = x[landmarks], root[landmarks]
  f = nystrom_factor(kernel_fn, xs, rs)

  def add(total, block):
    v = linalg.whiten(f, weighted_block(kernel_fn, *block, xs, rs).T)
    missed = jnp.sum(weighted_diagonal(kernel_fn, *block)) - jnp.sum(v**2)
    return (total[0] + linalg.matmul(v, v.T), total[1] + missed), None

  zero = jnp.zeros_like(f.lower), jnp.zeros((), root.dtype)
  (moment, tail), _ = jax.lax.scan(add, zero, split_blocks(block_size, x, root))
  return jnp.linalg.eigvalsh(moment), jnp.maximum(tail, 0)


@jax.jit
def _bisect_ridge(values, tail, target):
  values = jnp.maximum(values, 0)
  lower_dimension = lambda ridge: jnp.sum(values / (values + ridge))
  dimension = lambda ridge: lower_dimension(ridge) + tail / ridge
  # d_eff <= tr K / ridge, so the upper end is at or below the target.
  trace = jnp.sum(values) + tail
  high = jnp.log(trace / target)
  # Eigenvalues below n eps times the largest are rounding, and so is a ridge there.
  low = jnp.log(jnp.max(values) * values.shape[0] * jnp.finfo(values.dtype).eps)

  def halve(_, ends):
    middle = 0.5 * (ends[0] + ends[1])
    above = dimension(jnp.exp(middle)) > target
    return jnp.where(above, middle, ends[0]), jnp.where(above, ends[1], middle)

  ridge = jnp.exp(jax.lax.fori_loop(0, 80, halve, (low, high))[1])
  reached = dimension(ridge)
  converged = jnp.abs(reached - target) <= (1e-6 if values.dtype == jnp.float64 else 1e-4) * target
  status = jnp.where(jnp.isfinite(reached), jnp.where(converged, Status.OK, Status.MAX_STEPS), Status.NOT_FINITE)
  return ScoreRidge(ridge, reached, lower_dimension(ridge), converged, status.astype(jnp.int32))


def _check_target(target, n: int) -> None:
  checks.rank("target", target, 0)
  if not checks.is_traced(target) and not 0 < float(target) < n:
    raise ValueError(f"target: expected an effective dimension in (0, {n}), got {target}")
