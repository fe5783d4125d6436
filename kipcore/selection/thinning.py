"""Kernel thinning: distinct rows with equal weights whose mean embedding is that of all rows.

The split of Dwivedi and Mackey halves a sequence of rows again and again. All rounds, groups of rows
and sizes share one compilation, and kernel entries are computed in blocks of a fixed size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import blocks, checks, keys, linalg, pytrees
from kipcore.kernels.gram import gram_diag
from kipcore.selection import representatives, sampling, strategies
from kipcore.types import Array, ArrayLike, KernelFn

# At most this many rows are thinned, or 4 m if that is larger.
POOL_ROWS = 8192
_BLOCK = 256  # rows; even, so that pairs do not cross blocks
_DELTA = 0.5  # probability of failure in the thresholds of the split, as in `goodpoints`
_SWAP_BLOCK = 1024


class _Pool(NamedTuple):
  """Rows that are thinned, padded.

  Attributes:
    rows: `(p,)` their indices.
    present: `(p,)`, False for padding.
    mean: `(p,)` the mean embedding of all rows of the group, at the rows of the pool.
    sequence: `(m 2^g,)` positions in the pool.
    rounds: g.
  """

  rows: np.ndarray
  present: np.ndarray
  mean: Array
  sequence: np.ndarray
  rounds: int


def kernel_thinning(
  key,
  kernel_fn: KernelFn,
  x: ArrayLike,
  num_rows: int,
  weights: ArrayLike | None = None,
  targets: ArrayLike | None = None,
) -> Array:
  """Selects m rows with equal weights of small maximum mean discrepancy (MMD) to all weighted rows.

      MMD^2 = || (1/m) sum_j k(x_{i_j}, .) - sum_i u_i k(x_i, .) / sum_i u_i ||^2

  1. Pool: rows drawn without replacement in proportion to u, with weights u / (inclusion probability);
     all rows if there are at most max(POOL_ROWS, 4 m).
  2. Sequence: m 2^g positions of the pool by systematic resampling in random order, where g >= 1 is
     log2(pool / m) rounded. A row with the share q of the weight appears floor or ceil(q m 2^g) times;
     with equal weights, and a pool of m 2^g rows, each appears once.
  3. Split (KT-SPLIT): g rounds, in each of which the pairs of every sequence are divided over two
     halves by random signs that balance the halves. The result is 2^g sequences of m rows.
  4. Swap (KT-SWAP): of these and every 2^g-th row of the sequence the one with the smallest MMD to all
     rows. Then each of its rows in turn is replaced by the row of the pool, not yet selected, that
     minimizes this MMD. The rows are distinct, so that one row cannot represent more than 1/m of the
     weight.

  The split uses the kernel itself ("target" thinning). Proved for the split of a sequence of n
  distinct random rows: with probability 1 - delta, the mean over its half-sequences of any fixed
  function of the kernel's space has an error of order sqrt(log(n / delta)) / m, where that of random
  rows is of order 1 / sqrt(m); and the MMD is of this order up to a factor that depends on the kernel
  and the radius of the rows. Not proved: weights, a pool of fewer than m^2 rows, distinct rows.

  With targets t the kernel is k(x, x') (1 + <t, t'>), as in `kernel_herding`.

  Args:
    key: random key (or int seed).
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` floating rows.
    num_rows: m, at most the number of rows of positive weight.
    weights: `(n,)` weights u >= 0 of the rows; None for 1.
    targets: `(n, q)` floating targets, centered and scaled; None for none.

  Returns:
    `(m,)` int32 distinct indices. Cost for p rows in the pool: about p (n + 2 p + 4 m) kernel entries;
    memory is linear in n.

  Raises:
    ValueError, TypeError: for rows or targets that are not finite floats, or fewer than m rows of
      positive weight.

  References:
    Dwivedi and Mackey, Kernel thinning (JMLR 2024), algorithms 1 and 2; Generalized kernel thinning
    (ICLR 2022), theorems 1 and 2 for the target kernel. Thinning of a subsample is the first step of
    Compress++ (Shetty, Dwivedi and Mackey, ICLR 2022), which we do not use otherwise.

  Example:
    >>> x = np.random.default_rng(0).normal(size=(512, 2)).astype(np.float32)
    >>> rows = kipcore.kernel_thinning(0, kipcore.rbf_fn(1.0), x, 16)
    >>> bool(np.abs(x[rows].mean(axis=0) - x.mean(axis=0)).max() < 0.1)
    True
  """
  checks.floating("x", x)
  checks.finite("x", x)
  x, num_rows = jnp.asarray(x), checks.positive_int("num_rows", num_rows)
  mass = np.ones(x.shape[0])
  if weights is not None:
    mass = np.asarray(checks.weights("weights", weights, x.shape[0], x.dtype), np.float64)
  live = np.flatnonzero(mass > 0)
  if num_rows > live.size:
    raise ValueError(
      f"num_rows: expected at most the number of rows of positive weight, {live.size}, got {num_rows}"
    )
  if targets is not None:
    targets = representatives.checked_targets(targets, x)[live]
  groups, quotas = np.zeros(live.size, np.int64), np.array([num_rows])
  (found,) = thin_groups(key, kernel_fn, x[live], groups, quotas, mass[live], targets)
  return jnp.asarray(live[found], jnp.int32)


def thin_groups(key, kernel_fn, x, groups, quotas, weights, targets=None) -> list[np.ndarray]:
  """`kernel_thinning` of the rows of each group, for checked input.

  Args:
    key: random key.
    kernel_fn: see `types.KernelFn`.
    x: `(n, ...)` rows.
    groups: `(n,)` integers in 0..C-1, without gaps.
    quotas: `(C,)` number of rows of each group, at most the number of its rows.
    weights: `(n,)` float64 weights > 0.
    targets: `(n, q)`, or None.

  Returns:
    The indices of the rows of each group.
  """
  kernel_fn, most = pytrees.argument(kernel_fn), int(quotas.max())
  pools = [
    _pool(keys.at_step(keys.stream(key, "thinning"), c), kernel_fn, x, targets, *group, int(m))
    for c, (group, m) in enumerate(zip(strategies.padded_groups(groups, weights, x.dtype), quotas))
  ]
  # The longest sequence and its evenly spaced rows, in whole blocks.
  longest = max(pool.sequence.size + int(m) for pool, m in zip(pools, quotas))
  length = -(-longest // _BLOCK) * _BLOCK
  chosen = []
  for c, (pool, m) in enumerate(zip(pools, quotas)):
    positions = _thin(
      keys.at_step(keys.stream(key, "split"), c),
      kernel_fn,
      most,
      x[pool.rows],
      None if targets is None else targets[pool.rows],
      jnp.asarray(pool.present),
      pool.mean,
      jnp.asarray(np.resize(pool.sequence, length), jnp.int32),
      jnp.int32(m),
      jnp.int32(pool.rounds),
    )
    chosen.append(pool.rows[np.asarray(positions)[:m]])
  return chosen


def _pool(key, kernel_fn, x, targets, rows, padded, mass, m: int) -> _Pool:
  """The pool of a group with its rows, the padded ones and their weights."""
  size = max(POOL_ROWS, 4 * m)
  members = np.arange(min(padded.size, size))
  count, weights = min(rows.size, size), np.asarray(mass, np.float64)[members]
  if rows.size > size:
    drawn = sampling.sensitivity_sample(
      keys.stream(key, "pool"), mass, size, input_weights=mass, replace=False
    )
    members, weights = np.asarray(drawn.indices), np.asarray(drawn.weights, np.float64)
  chosen = padded[members]
  of = lambda index: None if targets is None else targets[index]
  mean = representatives.mean_embedding(
    kernel_fn, x[chosen], x[padded], mass / jnp.sum(mass), of(chosen), of(padded)
  )
  rounds = max(1, round(float(np.log2(count / m))))
  random = np.asarray(jax.random.uniform(keys.stream(key, "order"), (members.size + 1,)))
  sequence = _resample(weights[:count], m << rounds, random)
  return _Pool(chosen, np.arange(members.size) < count, mean, sequence, rounds)


def _resample(weights: np.ndarray, length: int, random: np.ndarray) -> np.ndarray:
  """`length` indices by systematic resampling of weighted rows in random order."""
  order = np.argsort(random[: weights.size], kind="stable")
  ends = np.cumsum(weights[order])
  places = (np.arange(length) + float(random[-1])) * (ends[-1] / length)
  return order[np.minimum(np.searchsorted(ends, places, side="right"), weights.size - 1)]


@functools.partial(jax.jit, static_argnames="most")
def _thin(key, kernel_fn, most, x, targets, present, mean, sequence, m, rounds):
  """Positions `(most,)` in the pool, of which the first m are selected."""
  entries = functools.partial(_entries, kernel_fn, x, targets)
  length = m << rounds
  place = jnp.arange(sequence.size, dtype=jnp.int32)
  order = _split(key, entries, sequence, length, rounds)
  # The evenly spaced rows follow as one more part.
  even = sequence[jnp.clip((place - length) << rounds, 0, length - 1)]
  order = jnp.where(place < length, order, even)
  start = m * _best_part(entries, order, m, length + m, mean)
  chosen = order[jnp.minimum(start + place[:most], sequence.size - 1)]
  scale = 1.0 if targets is None else 1 + jnp.sum(targets**2, axis=1)
  diagonal = gram_diag(kernel_fn, x).astype(x.dtype) * scale
  return _swap(entries, chosen, m, present, diagonal, mean)


def _entries(kernel_fn, x, targets, rows, columns):
  """Kernel entries of rows and columns, both positions in the pool, with targets."""
  k = kernel_fn(x[rows], x[columns]).astype(x.dtype)
  return k if targets is None else k * (1 + linalg.matmul(targets[rows], targets[columns].T))


def _split(key, entries, order, length, rounds):
  """KT-SPLIT: every round divides each part of the sequence into halves, one after the other."""
  place = jnp.arange(order.size, dtype=jnp.int32)

  def halve(i, order):
    part = length >> i
    # 2 log(2 / delta_i) in the notation of the paper.
    factor = 2 * jnp.log((2 / _DELTA) * (part * rounds).astype(jnp.float32))
    random = jax.random.uniform(keys.at_step(key, i), (order.size // 2,))
    signs = _signs(entries, order, part, length, factor, random)
    half = jnp.where(signs > 0, 0, part // 2)
    target = place - place % part + place % part // 2 + half
    return order.at[jnp.where(place < length, target, place)].set(order)

  return jax.lax.fori_loop(0, rounds, halve, order)


def _signs(entries, order, part, length, factor, random):
  """+1 for the positions of the first half of their part, -1 for the second half."""
  dtype = jax.eval_shape(entries, order[:1], order[:1]).dtype

  def block(b, carry):
    signs, variance = carry
    # The first half minus the second one, so far, as a function at the rows of the block.
    balance = _sums(entries, order, signs, part, b, b * _BLOCK // part * part // _BLOCK, b)
    k = _block_entries(entries, order, part, b, b)

    def pair(q, carry):
      balance, own, variance = carry
      i = 2 * q
      variance = jnp.where((b * _BLOCK + i) % part == 0, 0, variance)
      difference = k[i] - k[i + 1]
      norm = jnp.maximum(difference[i] - difference[i + 1], 0)
      bound = jnp.maximum(jnp.sqrt(variance * norm * factor.astype(dtype)), norm)
      bound = jnp.where(bound > 0, bound, 1)
      growth = jnp.maximum(0.5 + (norm / (2 * bound) - 1) * variance / bound, 0)
      variance = jnp.where(variance == 0, norm, variance + 2 * norm * growth)
      chance = 0.5 * (1 - (balance[i] - balance[i + 1]) / bound)
      first = random[b * (_BLOCK // 2) + q].astype(dtype) < chance
      sign = jnp.where(first, 1, -1).astype(dtype)
      own = jax.lax.dynamic_update_slice_in_dim(own, jnp.stack([sign, -sign]), i, 0)
      return balance + sign * difference, own, variance

    start = balance, jnp.zeros((_BLOCK,), dtype), variance
    _, own, variance = jax.lax.fori_loop(0, _BLOCK // 2, pair, start)
    return jax.lax.dynamic_update_slice_in_dim(signs, own, b * _BLOCK, 0), variance

  start = jnp.zeros(order.shape, dtype), jnp.zeros((), dtype)
  return jax.lax.fori_loop(0, -(-length // _BLOCK), block, start)[0]


def _best_part(entries, order, part, length, mean):
  """The part of the sequence with the smallest MMD to all rows."""
  last = order.size // _BLOCK
  ones = jnp.ones(order.shape, mean.dtype)

  def block(b, sums):
    first, end = b * _BLOCK // part * part, ((b + 1) * _BLOCK - 1) // part * part + part
    end = jnp.minimum(-(-end // _BLOCK), last)
    own = _sums(entries, order, ones, part, b, first // _BLOCK, end)
    return jax.lax.dynamic_update_slice_in_dim(sums, own, b * _BLOCK, 0)

  sums = jax.lax.fori_loop(0, last, block, jnp.zeros(order.shape, mean.dtype))
  place = jnp.arange(order.size, dtype=jnp.int32)
  terms = jnp.where(place < length, sums / part.astype(mean.dtype) - 2 * mean[order], 0)
  totals = jnp.zeros(order.shape, mean.dtype).at[place // part].add(terms)
  return jnp.argmin(jnp.where(place < length // part, totals, jnp.inf)).astype(jnp.int32)


def _sums(entries, order, values, part, b, first, end):
  """sum_q k(p, q) values[q] for p in block b, over q of the same part in blocks first to end - 1."""

  def add(c, total):
    k = _block_entries(entries, order, part, b, c)
    return total + linalg.matmul(k, _block(values, c)[:, None])[:, 0]

  return jax.lax.fori_loop(first, end, add, jnp.zeros((_BLOCK,), values.dtype))


def _block_entries(entries, order, part, b, c):
  """Kernel entries of two blocks of the sequence, 0 for rows of different parts."""
  inside = jnp.arange(_BLOCK, dtype=jnp.int32)
  of = lambda i: (i * _BLOCK + inside) // part
  return jnp.where(of(b)[:, None] == of(c)[None], entries(_block(order, b), _block(order, c)), 0)


def _block(values, b):
  return jax.lax.dynamic_slice_in_dim(values, b * _BLOCK, _BLOCK)


def _swap(entries, chosen, m, present, diagonal, mean):
  """KT-SWAP: replaces each chosen row by the row, not yet chosen, that minimizes the MMD."""
  every = jnp.arange(present.size, dtype=jnp.int32)
  used = (every[: chosen.size] < m).astype(mean.dtype)
  column = lambda i: entries(every, i[None])[:, 0]
  total = blocks.map_row_blocks(
    lambda rows: linalg.matmul(entries(rows, chosen), used[:, None])[:, 0], every, _SWAP_BLOCK
  )
  counts = jnp.zeros(present.shape, jnp.int32).at[chosen].add(used.astype(jnp.int32))

  def replace(i, carry):
    chosen, counts, total = carry
    old = chosen[i]
    counts, total = counts.at[old].add(-1), total - column(old)
    loss = (2 * total + diagonal) / m.astype(mean.dtype) - 2 * mean
    new = jnp.argmin(jnp.where(present & (counts == 0), loss, jnp.inf)).astype(chosen.dtype)
    return chosen.at[i].set(new), counts.at[new].add(1), total + column(new)

  return jax.lax.fori_loop(0, m, replace, (chosen, counts, total))[0]
