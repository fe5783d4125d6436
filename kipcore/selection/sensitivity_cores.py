"""Compiled core functions of `sensitivity`, for checked inputs and weighted labels.

Each `*_scores` function returns (scores, leverage, F* or a lower bound, lower bound on d_eff,
status).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import blocks, linalg
from kipcore.selection import scoring
from kipcore.types import Array, Status

# Number of squarings in the bound on a spectral norm by the Frobenius norm of a power.
_SQUARINGS = 3


def label_term(residual2, objective):
  """||r_i||^2 / F*, or 0 if F* is 0."""
  return jnp.where(objective > 0, residual2 / jnp.where(objective > 0, objective, 1), 0)


def _sqrt(a):
  """sqrt(a), whose derivative at 0 is 0 instead of infinite: a branch that is not taken must not add 0 * infinity to a gradient."""
  positive = a > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, a, 1)), jnp.zeros_like(a))


def joint(tau, residual2, part, bound):
  """Upper bound on s_i from a subproblem with minimum `part` and a lower bound `bound` on F*.

  The smallest value of (1 + g) (tau + ||r||^2 / (part + g bound)) over g >= 0; see the theory page.
  """
  safe = jnp.where(bound > 0, bound, 1)
  share, q = part / safe, residual2 / safe
  root = _sqrt(q * jnp.maximum(1 - share, 0))
  inside = (bound > 0) & (share < 1) & (root > share * _sqrt(tau))
  optimum = (_sqrt(jnp.maximum(1 - share, 0) * tau) + _sqrt(q)) ** 2
  return jnp.where(inside, optimum, tau + label_term(residual2, part))


def _solve_scores(k, y, ridge):
  """(tau, ||r||^2, F*, status) of weighted data, from one factorization."""
  f = scoring.score_factor(k, ridge)
  dual = linalg.solve(f, y)
  return (
    scoring.factor_leverage(f, ridge),
    ridge**2 * jnp.sum(dual**2, axis=1),
    ridge * jnp.sum(y * dual),
    f.status,
  )


@jax.jit
def exact_scores(k, y, ridge, root):
  tau, residual2, objective, status = _solve_scores(
    root[:, None] * k.astype(root.dtype) * root[None, :], y, ridge
  )
  return tau + label_term(residual2, objective), tau, objective, jnp.sum(tau), status


@functools.partial(jax.jit, static_argnames="block_size")
def feature_scores(z, y, ridge, root, block_size):
  root = jnp.ones(z.shape[:1], y.dtype) if root is None else root  # a constant, folded by XLA
  tau, residual2, objective, status = scoring.feature_fit(z, root, y, ridge, block_size)
  return tau + label_term(residual2, objective), tau, objective, jnp.sum(tau), status


@jax.jit
def blocked_scores(kernel_fn, x, y, ridge, root, index, present, bound):

  def group(block):
    rows, mask = block
    weight = jnp.where(mask, root[rows], 0)
    k = scoring.weighted_block(kernel_fn, x[rows], weight)
    tau, residual2, objective, status = _solve_scores(
      k, jnp.where(mask[:, None], y[rows], 0), ridge
    )
    return tau, residual2, jnp.full_like(tau, objective), jnp.full_like(rows, status)

  tau, residual2, part, status = jax.lax.map(group, (index, present))
  bound = jnp.maximum(bound, jnp.max(part))
  scores = joint(tau, residual2, part, bound)
  # Padding repeats a row of the group with masked value 0, so the maximum is the value of the row.
  place = lambda a: jnp.zeros_like(root).at[index].max(jnp.where(present, a, 0))
  return place(scores), place(tau), bound, jnp.zeros_like(bound), jnp.max(status)


def norm_bound(e):
  """Upper bound ||E^8||_F^{1/8} on the spectral norm of a symmetric matrix E."""
  scales = []
  for _ in range(_SQUARINGS):
    scales.append(jnp.linalg.norm(e))
    e = e / jnp.maximum(scales[-1], jnp.finfo(e.dtype).tiny)
    e = linalg.matmul(e, e)
  bound = jnp.linalg.norm(e)
  for scale in reversed(scales):
    bound = scale * jnp.sqrt(bound)
  return bound


@functools.partial(jax.jit, static_argnames=("block_size", "refine"))
def landmark_scores(kernel_fn, x, y, ridge, root, landmarks, order, block_size, refine):
  *alone, status = scoring.landmark_fit(kernel_fn, x, root, y, landmarks, None, ridge, block_size)
  if not refine:
    return (*one_pass_scores(*alone), status)
  s = nystrom_start(kernel_fn, x[landmarks], root[landmarks])

  def read(rows, present):
    """Rows, roots of weights and weighted labels of a block; padding has weight 0 and labels 0."""
    return x[rows], jnp.where(present, root[rows], 0), jnp.where(present[:, None], y[rows], 0)

  def gather(totals, rows, present):
    return nystrom_gather(kernel_fn, s, totals, *read(rows, present)), None

  totals, _ = blocks.scan_row_blocks(gather, nystrom_totals(s, y.shape[1]), order, block_size)
  fit = nystrom_fit(s, totals, ridge)

  def score(unseen, rows, present):
    tau, residual2, part = nystrom_rows(kernel_fn, s, fit, ridge, *read(rows, present))
    return unseen + part, (tau, residual2)

  unseen, of_rows = blocks.scan_row_blocks(score, jnp.zeros_like(y[0]), order, block_size)
  rows = [jnp.zeros_like(root).at[order].set(a) for a in of_rows]
  return two_pass_scores(alone, fit, *rows, unseen, ridge, status)


def one_pass_scores(tau, residual2, part):
  """Bound 1 of `approximate_krr_sensitivities`, from `scoring.landmark_optima`."""
  bound = jnp.min(part)
  return joint(tau, residual2, part, bound), tau, bound, jnp.zeros_like(bound)


def two_pass_scores(alone, fit, tau, residual2, unseen, ridge, status):
  """The smaller of bounds 1 and 2; `unseen` is sum_b <R~_b, E_bb R~_b>^{1/2} for each output."""
  reached = jnp.sum(residual2) + ridge * jnp.sum(fit.coefficients**2)
  bound = jnp.maximum(jnp.min(alone[2]), reached - jnp.sum(unseen**2) / ridge)
  gap = jnp.maximum(label_term(reached, bound) - 1, 0)
  best = jnp.minimum(alone[0], tau)
  label = (_sqrt(label_term(residual2, bound)) + _sqrt(best * gap)) ** 2
  scores = jnp.minimum(best + label, joint(*alone, bound))
  return scores, best, bound, fit.lower_dimension, jnp.maximum(status, fit.status)


class NystromStart(NamedTuple):
  """The landmarks, and the factor for the features V = K_nS L^{-T}."""

  x: Array
  root: Array
  factor: linalg.Factor


class NystromFit(NamedTuple):
  """Totals for bound 2: a and q of `low_rank_leverage_bounds`, and the fit W~ in the span of S."""

  kept: Array
  share: Array
  kept_factor: Array
  coefficients: Array
  lower_dimension: Array
  status: Array


def nystrom_start(kernel_fn, xs, rs) -> NystromStart:
  return NystromStart(xs, rs, scoring.nystrom_factor(kernel_fn, xs, rs))


def nystrom_totals(s: NystromStart, num_outputs):
  """Zeros for `nystrom_gather`: V^T V, V^T Y, tr E and a bound on ||E||, with E = K - V V^T."""
  size = s.root.shape[0]
  return tuple(
    jnp.zeros(shape, s.root.dtype) for shape in ((size, size), (size, num_outputs), (), ())
  )


def _features(kernel_fn, s, xb, rb):
  return linalg.whiten(s.factor, scoring.weighted_block(kernel_fn, xb, rb, s.x, s.root).T)


def nystrom_gather(kernel_fn, s: NystromStart, totals, xb, rb, yb):
  """Adds a block of rows to the totals."""
  v = _features(kernel_fn, s, xb, rb)
  missed = scoring.weighted_block(kernel_fn, xb, rb) - linalg.matmul(v.T, v)
  new = linalg.matmul(v, v.T), linalg.matmul(v, yb), jnp.trace(missed), norm_bound(missed)
  return jax.tree.map(jnp.add, totals, new)


def nystrom_fit(s: NystromStart, totals, ridge) -> NystromFit:
  moment, cross, tail, norm = totals
  values = jnp.maximum(jnp.linalg.eigvalsh(moment), 0)
  share = scoring.best_share(values, jnp.maximum(tail, 0), ridge, norm)
  kept = scoring.kept_share(share, ridge, norm)
  kept_factor, fit_factor = linalg.factor(kept * moment, ridge), linalg.factor(moment, ridge)
  status = jnp.maximum(s.factor.status, jnp.maximum(kept_factor.status, fit_factor.status))
  return NystromFit(
    kept,
    share,
    kept_factor.lower,
    linalg.solve(fit_factor, cross),
    jnp.sum(values / (values + ridge)),
    status,
  )


def nystrom_rows(kernel_fn, s: NystromStart, fit: NystromFit, ridge, xb, rb, yb):
  """For a block b: bounds on tau_i, squared residuals of W~, <R~_b, E_bb R~_b>^{1/2} per output."""
  v = _features(kernel_fn, s, xb, rb)
  missed = jnp.maximum(scoring.weighted_diagonal(kernel_fn, xb, rb) - jnp.sum(v**2, axis=0), 0)
  h = jnp.sum(linalg.whiten(linalg.Factor(fit.kept_factor, fit.status), v) ** 2, axis=0)
  r = yb - linalg.matmul(v.T, fit.coefficients)
  k = scoring.weighted_block(kernel_fn, xb, rb)
  unseen = jnp.sum(r * linalg.matmul(k, r), axis=0) - jnp.sum(linalg.matmul(v, r) ** 2, axis=0)
  tau = scoring.corrected(h, missed, fit.kept, fit.share, ridge)
  return tau, jnp.sum(r**2, axis=1), _sqrt(unseen)


@functools.partial(jax.jit, static_argnums=1)
def diagnose(parts, dtype):
  """The fields of `SensitivityScores`; the caller sets the guarantee."""
  scores, tau, objective, lower, status = parts
  n = scores.shape[0]
  scores = jnp.where(status == Status.OK, jnp.clip(scores, 0, 1), jnp.nan)
  tau = jnp.minimum(tau, scores)
  label = scores - tau
  total = jnp.sum(scores)
  diagnostics = (
    objective,
    total,
    jnp.sum(tau),
    lower,
    jnp.sum(label),
    n * jnp.max(scores) / total,
    n * jnp.sum((scores / total) ** 2),
  )
  floats = jax.tree.map(lambda a: a.astype(dtype), (scores, tau, label, *diagnostics))
  return (*floats, 0, status)
