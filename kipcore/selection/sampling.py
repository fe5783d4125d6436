"""Sampling of rows by score, with weights that make weighted sums unbiased.

Rows are drawn with replacement, systematically without replacement, or by Gumbel noise.

Invalid values raise ValueError. Inside `jit` and other transformations no error can be raised. The
weights are NaN instead, so that the first loss shows the problem.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks, keys
from kipcore.selection import draws
from kipcore.types import Array, Status


class Sample(NamedTuple):
  """Drawn rows: `indices` `(m,)` int32 and `weights` `(m,)`, defined by the sampling function."""

  indices: Array
  weights: Array


class SystematicSample(NamedTuple):
  """Rows drawn without replacement.

  Attributes:
    indices: `(m,)` int32, distinct.
    weights: `(m,)`, 1 / inclusion.
    inclusion: `(m,)`, the exact probability that the row is in the sample.
    status: int32 scalar, `Status`; NOT_FINITE if the scores do not define probabilities (then the
      weights are NaN).
  """

  indices: Array
  weights: Array
  inclusion: Array
  status: Array


class MergedSample(NamedTuple):
  """Distinct rows in increasing order, followed by unused entries.

  Attributes:
    indices: `(m,)` int32; unused entries repeat the largest index.
    weights: `(m,)` summed weights; 0 in unused entries.
    num_distinct: int32 scalar; `indices[:num_distinct]` are the distinct rows.
  """

  indices: Array
  weights: Array
  num_distinct: Array


class SamplingGain(NamedTuple):
  """Measures of how far probabilities p are from uniform.

  Attributes:
    second_moment: n sum p^2, from 1 (uniform) to n. If the contributions of the rows are
      proportional to p, the second moment of one uniform draw is larger than that of a draw from p
      by this factor.
    effective_sample_size: 1 / sum p^2, from 1 to n.
    max_over_mean: n max p.
  """

  second_moment: Array
  effective_sample_size: Array
  max_over_mean: Array


def sensitivity_sample(
  key,
  scores: Array,
  num_samples: int,
  *,
  input_weights: Array | None = None,
  uniform_mix=0.0,
  replace: bool = True,
) -> Sample:
  """Draws rows by sensitivity such that E[sum_j w_j f(i_j)] = sum_i u_i f(i) for every f.

  p_i = (1 - g) s_i / sum(s) + g u_i / sum(u), with g = `uniform_mix`. With replacement,
  w = u_i / (m p_i) (Feldman and Langberg 2011), and a row that is drawn twice appears twice in the
  result (see `merge_duplicates`). Without replacement, rows are drawn as by `systematic_sample`,
  and w = u_i / P(i is drawn).

  Proved: unbiasedness and, with replacement, the sample sizes of `guarantees.sample_size` if the
  scores are at least the sensitivities u_i f_i / sum u f. For g > 0, divide the total sensitivity
  by 1 - g; the weights are then at most sum(u) / (g m). The sample sizes are not proved for
  systematic draws.

  Args:
    key: a random key or an int seed.
    scores: `(n,)`, >= 0, not all zero; sensitivities of the weighted terms u_i f_i.
    num_samples: m; without replacement at most n.
    input_weights: u `(n,)`, >= 0, or None for ones.
    uniform_mix: g in [0, 1], may be traced. Rows with p_i = 0 are never drawn.
    replace: True to draw with replacement, False for systematic draws.

  Returns:
    `Sample(indices, weights)`.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, non-finite or all-zero scores, or
      fewer rows with p_i > 0 than draws without replacement.

  Example:
    >>> scores = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    >>> sample = kipcore.sensitivity_sample(0, scores, 100)
    >>> round(
    ...   float(jnp.sum(sample.weights * scores[sample.indices])), 3
    ... )  # exact for f = scores, for any draw
    10.0
  """
  scores, num_samples, input_weights = draws.check_scores(
    scores, num_samples, uniform_mix, input_weights
  )
  if not replace:
    draws.check_distinct(scores, num_samples, uniform_mix, input_weights)
  return _sensitivity_core(
    keys.canonical_key(key),
    scores,
    input_weights,
    jnp.asarray(uniform_mix, scores.dtype),
    num_samples,
    replace,
  )


def systematic_sample(key, scores: Array, num_samples: int, *, uniform_mix=0.0) -> SystematicSample:
  """Draws b distinct rows with P(i is drawn) = pi_i = min(1, c p_i), sum_i pi_i = b, in one pass.

  The rows are arranged in a pseudo-random order. Intervals of length pi_i are placed end to end
  from a uniform start in [0, 1), and a row is drawn if its interval contains an integer (Madow
  1949). Rows with pi_i = 1 are always drawn. E[sum_j w_j f(i_j)] = sum_i f(i) with
  w_j = 1 / pi_{i_j}.

  Integer arithmetic makes the sample size exact, the rows distinct, and `inclusion` exact as a
  multiple of 2^-32 (at least one for a positive score). pi follows the scores up to the rounding of
  their dtype. The order is a keyed bijection (multiplications and shifts), not a uniform
  permutation: first-order inclusion probabilities are exact in any order, joint ones are close to
  those of a random order, and nothing is proved about the variance.

  Args:
    key: a random key or an int seed.
    scores: `(n,)`, >= 0.
    num_samples: b, at most the number of rows with p_i > 0.
    uniform_mix: g in [0, 1]: p_i = (1 - g) s_i / sum(s) + g / n.

  Returns:
    `SystematicSample`.

  Raises:
    ValueError, TypeError: as `sensitivity_sample`.
  """
  scores, num_samples, ones = draws.check_scores(scores, num_samples, uniform_mix, None)
  draws.check_distinct(scores, num_samples, uniform_mix, ones)
  return _systematic_core(
    keys.canonical_key(key), scores, jnp.asarray(uniform_mix, scores.dtype), num_samples
  )


def gumbel_sample(key, scores: Array, num_samples: int) -> Sample:
  """Successive sampling without replacement (Gumbel top-b); E[sum_j w_j f(i_j)] = sum_i f(i).

  Draws the rows with the b largest values of log p_i + Gumbel noise. With kappa the next largest
  value, w_i = 1 / (1 - exp(-exp(log p_i - kappa))) (Kool, van Hoof and Welling 2020, eq. 9: the
  Horvitz-Thompson weight given the threshold). Weights 1 / (b p_i) would be biased, because the
  inclusion probability is not b p_i. The variance is infinite at b = 1. `systematic_sample` is
  cheaper; the joint distribution of `gumbel_sample` is simpler.

  Args:
    key: a random key or an int seed.
    scores: `(n,)`, >= 0, in any scale.
    num_samples: b, at most the number of positive scores.

  Returns:
    `Sample(indices, weights)`.

  Raises:
    ValueError, TypeError: as `sensitivity_sample`.
  """
  scores, num_samples, ones = draws.check_scores(scores, num_samples, 0.0, None)
  draws.check_distinct(scores, num_samples, 0.0, ones)
  return _gumbel_core(keys.canonical_key(key), scores, num_samples)


def importance_sample(
  key, losses: Array, num_samples: int, uniform_mix=0.1, weight_exponent=1.0, *, power=1.0
) -> Sample:
  """Draws a batch of distinct rows by loss: p_i = (1 - g) l_i^power / sum(l^power) + g / n.

  The draw is systematic. The weights w_i = (b / (n pi_i))^e with e = `weight_exponent` are for a
  *mean* over the batch. At e = 1, E[(1/b) sum_j w_j f(i_j)] = (1/n) sum_i f(i) for every f, even if
  the losses are outdated, and the weights are at most 1 / g. At e = 0 all weights are 1, and the
  batch mean is a different objective that emphasizes rows of high loss. Values in between trade
  bias for variance.

  Proved: unbiasedness at e = 1. With independent draws, the variance is smallest if p is
  proportional to gradient norms instead of losses (Alain et al. 2015), so pass residual norms if
  available.

  Args:
    key: a random key or an int seed.
    losses: `(n,)`, >= 0. If all are zero, rows are drawn uniformly.
    num_samples: b <= n, and at most the number of positive losses if `uniform_mix` is 0.
    uniform_mix: g in [0, 1], may be traced.
    weight_exponent: e in [0, 1], may be traced.
    power: exponent of the losses, >= 0, may be traced; 0 gives uniform draws, and values below 1
      make the probabilities more equal.

  Returns:
    `Sample(indices, weights)`.

  Raises:
    ValueError, TypeError: for a wrong shape, dtype or range, or negative or non-finite losses.

  Example:
    >>> sample = kipcore.importance_sample(0, jnp.asarray([0.0, 0.0, 0.0, 8.0]), 2)
    >>> int(sample.indices.max())  # the row that loses most for certain, one of the others by 1/3
    3
    >>> sorted(np.asarray(sample.weights, float).round(2).tolist())
    [0.5, 1.5]
  """
  losses, num_samples, ones = draws.check_scores(
    losses, num_samples, uniform_mix, None, name="losses", allow_zeros=True
  )
  checks.in_range("weight_exponent", weight_exponent, 0, 1)
  checks.non_negative("power", power)
  draws.check_distinct(losses, num_samples, uniform_mix, ones, name="losses", allow_zeros=True)
  mix, exponent, power = (
    jnp.asarray(v, losses.dtype) for v in (uniform_mix, weight_exponent, power)
  )
  return _importance_core(keys.canonical_key(key), losses, mix, exponent, power, num_samples)


def stratified_sample(
  key,
  scores: Array,
  labels,
  num_samples: int,
  *,
  allocation: str = "equal",
  uniform_mix=0.0,
  replace: bool = True,
  input_weights: Array | None = None,
) -> Sample:
  """`sensitivity_sample` within each class, with a fixed number of draws per class.

  Draws m_c rows of class c, so that E[sum_j w_j f(i_j)] = sum_i u_i f(i). The quotas m_c are equal, or
  proportional to the total score t_c of the class. Equal quotas increase the total sensitivity by
  the factor max_c t_c m / (t m_c); for proportional quotas this factor is 1 up to rounding.

  Args:
    key: a random key or an int seed.
    scores: `(n,)`, >= 0, not all zero in any class. May be traced if the quotas are equal.
    labels: `(n,)` integers, not traced because the classes determine array shapes.
    num_samples: m, a multiple of the number of classes if the quotas are equal.
    allocation: "equal" or "proportional" (at least one draw per class, and without replacement at
      most the number of rows of the class).
    uniform_mix: g in [0, 1], share of uniform draws within each class.
    replace: True to draw with replacement, False for systematic draws.
    input_weights: u `(n,)`, >= 0, positive somewhere in each class, or None for ones.

  Returns:
    `Sample(indices, weights)`, `(m,)`, ordered by class.

  Raises:
    ValueError, TypeError: as `sensitivity_sample`, and if a class has fewer rows (or positive
      scores) than its quota in draws without replacement.
  """
  scores, num_samples, input_weights = draws.check_scores(
    scores, num_samples, uniform_mix, input_weights
  )
  checks.one_of("allocation", allocation, ("equal", "proportional"))
  if checks.is_traced(labels) or (allocation == "proportional" and checks.is_traced(scores)):
    raise TypeError(
      "expected concrete labels (and scores, for proportional quotas), got traced ones"
    )
  labels = np.asarray(labels)
  checks.shape("labels", labels, scores.shape)
  if not np.issubdtype(labels.dtype, np.integer):
    raise TypeError(f"labels: expected integers, got {labels.dtype}")
  classes, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  rooms, totals = sizes, None
  if not checks.is_traced(scores) and not checks.is_traced(input_weights):
    totals = np.bincount(labels, weights=np.asarray(scores, np.float64))
    uniform = checks.is_traced(uniform_mix) or uniform_mix > 0
    live = (np.asarray(scores) > 0) | (uniform & (np.asarray(input_weights) > 0))
    rooms = np.bincount(labels, weights=live).astype(np.int64)
    if totals.min() <= 0:
      raise ValueError(
        f"scores: expected a positive score in each class, got none in {classes[totals.argmin()]}"
      )
  quotas = draws.class_quotas(
    classes, rooms, totals if allocation == "proportional" else None, num_samples, replace
  )
  return draw_quotas(key, scores, labels, quotas, uniform_mix, replace, input_weights)


def draw_quotas(key, scores, labels, quotas, uniform_mix, replace, input_weights) -> Sample:
  """`stratified_sample` with `quotas[c]` draws of class c, for checked input; labels are 0..C-1."""
  sizes = np.bincount(labels)
  members = np.zeros((sizes.size, sizes.max()), np.int32)
  valid = np.arange(sizes.max())[None] < sizes[:, None]
  members[valid] = np.argsort(labels, kind="stable")
  taken = np.arange(quotas.max())[None] < quotas[:, None]
  mix = jnp.asarray(uniform_mix, scores.dtype)
  sample = _stratified_core(
    keys.canonical_key(key),
    scores,
    input_weights,
    members,
    valid,
    quotas.astype(np.int32),
    mix,
    int(quotas.max()),
    replace,
  )
  slots = np.flatnonzero(taken)
  return Sample(sample.indices.reshape(-1)[slots], sample.weights.reshape(-1)[slots])


def merge_duplicates(indices: Array, weights: Array) -> MergedSample:
  """Adds the weights of equal indices, with static shapes; weighted sums are unchanged.

  Args:
    indices: `(m,)` integers.
    weights: `(m,)` floating.

  Returns:
    `MergedSample`.

  Raises:
    ValueError, TypeError: for shapes or dtypes other than these, or no index at all.
  """
  indices, weights = jnp.asarray(indices), jnp.asarray(weights)
  checks.rank("indices", indices, 1)
  if not indices.size or not jnp.issubdtype(indices.dtype, jnp.integer):
    raise ValueError(
      f"indices: expected at least one integer, got shape {indices.shape} of {indices.dtype}"
    )
  checks.shape("weights", weights, indices.shape)
  checks.floating("weights", weights)
  return _merge_duplicates(indices, weights)


@jax.jit
def _merge_duplicates(indices, weights) -> MergedSample:
  order = jnp.argsort(indices)
  ordered = indices[order]
  first = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
  slot = jnp.cumsum(first.astype(jnp.int32)) - 1
  merged = jnp.full_like(ordered, ordered[-1]).at[slot].set(ordered)
  return MergedSample(merged, jnp.zeros_like(weights).at[slot].add(weights[order]), slot[-1] + 1)


def sampling_gain(scores: Array) -> SamplingGain:
  """Measures how far the probabilities p = scores / sum(scores) are from uniform.

  Args:
    scores: `(n,)`, >= 0.

  Returns:
    `SamplingGain`; `second_moment` is 1 if all scores are equal.
  """
  checks.rank("scores", scores, 1)
  n = scores.shape[0]
  p = scores / draws.total(scores)
  squares = jnp.sum(p * p)
  return SamplingGain(n * squares, 1 / squares, n * jnp.max(p))


@functools.partial(jax.jit, static_argnames=("num_samples", "replace"))
def _sensitivity_core(key, scores, input_weights, mix, num_samples, replace):
  p, good = draws.law(scores, input_weights, mix)
  if replace:
    indices = draws.draw_rows(key, p, num_samples)
    expected = num_samples * p[indices]
  else:
    indices, expected = draws.systematic(key, p, num_samples, jnp.int32(num_samples))
    good &= draws.count(p > 0) >= num_samples
  weights = (1 / expected).astype(scores.dtype) * input_weights[indices]
  return Sample(indices, jnp.where(good, weights, jnp.nan))


@functools.partial(jax.jit, static_argnames="num_samples")
def _systematic_core(key, scores, mix, num_samples):
  p, good = draws.law(scores, jnp.ones_like(scores), mix)
  indices, inclusion = draws.systematic(key, p, num_samples, jnp.int32(num_samples))
  good &= draws.count(p > 0) >= num_samples
  inclusion = jnp.where(good, inclusion, jnp.nan).astype(scores.dtype)
  status = jnp.where(good, Status.OK, Status.NOT_FINITE).astype(jnp.int32)
  return SystematicSample(indices, 1 / inclusion, inclusion, status)


@functools.partial(jax.jit, static_argnames="num_samples")
def _importance_core(key, losses, mix, exponent, power, num_samples):
  p, good = draws.law(losses, jnp.ones_like(losses), mix, power)
  indices, inclusion = draws.systematic(key, p, num_samples, jnp.int32(num_samples))
  good &= draws.count(p > 0) >= num_samples
  weights = (num_samples / losses.shape[0] / inclusion) ** exponent.astype(p.dtype)
  return Sample(indices, jnp.where(good, weights, jnp.nan).astype(losses.dtype))


@functools.partial(jax.jit, static_argnames="num_samples")
def _gumbel_core(key, scores, num_samples):
  p, good = draws.law(scores, jnp.ones_like(scores), jnp.zeros((), scores.dtype))
  log_p = jnp.log(p)
  top, indices = jax.lax.top_k(
    log_p + jax.random.gumbel(key, p.shape, p.dtype), min(num_samples + 1, p.shape[0])
  )
  threshold = top[num_samples] if num_samples < p.shape[0] else -jnp.inf
  indices = indices[:num_samples].astype(jnp.int32)
  good &= draws.count(p > 0) >= num_samples
  weights = -1 / jnp.expm1(-jnp.exp(log_p[indices] - threshold))
  return Sample(indices, jnp.where(good, weights, jnp.nan).astype(scores.dtype))


@functools.partial(jax.jit, static_argnames=("size", "replace"))
def _stratified_core(key, scores, input_weights, members, valid, quotas, mix, size, replace):

  def draw(key, rows, valid, quota):
    valid = valid.astype(scores.dtype)
    own = input_weights[rows] * valid
    p, good = draws.law(scores[rows] * valid, own, mix)
    if replace:
      places = draws.draw_rows(key, p, size)
      expected = quota.astype(p.dtype) * p[places]
    else:
      places, expected = draws.systematic(key, p, size, quota)
      good &= draws.count(p > 0) >= quota
    weights = own[places] * (1 / expected).astype(scores.dtype)
    return Sample(rows[places], jnp.where(good, weights, jnp.nan))

  return jax.vmap(draw)(jax.random.split(key, members.shape[0]), members, valid, quotas)
