"""Random draws of rows: argument checks, probabilities, and draws with and without replacement.

Draws with replacement invert the cumulative distribution in two levels. Draws without replacement
are systematic. They represent probabilities as integer multiples of 2^-32 with wrap-around
arithmetic, so rounding affects neither the sample size nor the inclusion probabilities, in float32
or float64. Both methods take a few passes over the rows and do not sort. `sampling` computes
weighted samples from these draws.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks, linalg
from kipcore.types import Array

# Up to this number of draws, the float32 sum of the inclusion probabilities has an error below 1/2.
_MAX_DRAWS_FLOAT32 = 2**16
_LARGEST_UNITS = 2**32 - 1
_SPREADS = 16


def draw_rows(key: Array, scores: Array, num_draws: int) -> Array:
  """Independent draws with P(i) = scores_i / sum(scores), `(num_draws,)` int32.

  Cost: O(n + num_draws log n).
  Draws a block of about sqrt(n) rows and then a row in it, each with its own uniform variate, so
  that float32 only has to resolve about sqrt(n) probabilities. Rows of score 0 are never drawn.
  """
  width = 1 << (max(scores.shape[0] - 1, 1).bit_length() + 1) // 2
  rows = jnp.pad(scores / jnp.max(scores), (0, -scores.shape[0] % width)).reshape(-1, width)
  within = _increasing(jnp.cumsum(rows, axis=1), rows > 0)
  blocks = _increasing(jnp.cumsum(within[:, -1]), within[:, -1] > 0)
  key_block, key_row = jax.random.split(key)
  block = _search(
    blocks[None], jnp.zeros((num_draws,), jnp.int32), _below(key_block, blocks[-1:], num_draws)
  )
  row = _search(within, block, _below(key_row, within[block, -1], num_draws))
  return block * width + row


def draw_few_rows(uniforms: Array, weights: Array) -> Array:
  """Variant of `draw_rows` for a few draws from weights that change with every call.

  It sums the weights once and scans one block per draw. `uniforms` `(num_draws, 2)` are uniform
  variates on [0, 1). Memory: num_draws sqrt(n) entries.
  """
  n = weights.shape[0]
  width = max(1, math.isqrt(n))
  table = jnp.pad(weights, (0, -n % width)).reshape(-1, width)
  block = _invert(jnp.sum(table, axis=1)[None], uniforms[:, :1])
  row = _invert(table[block], uniforms[:, 1:])
  return jnp.minimum(block * width + row, n - 1)


def _invert(masses: Array, uniform: Array) -> Array:
  """The first positive entry of each row whose cumulative mass exceeds uniform * total."""
  cumulative, positive = jnp.cumsum(masses, axis=1), masses > 0
  # A parallel cumulative sum may not be monotone in the last bit. The mask still excludes entries
  # of zero mass.
  hit = (cumulative > uniform * cumulative[:, -1:]) & positive
  last = masses.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
  return jnp.where(hit.any(axis=1), jnp.argmax(hit, axis=1), last).astype(jnp.int32)


def _increasing(cumulative, positive):
  """Makes a parallel cumulative sum monotone, and exactly constant over entries of zero mass."""
  return jax.lax.cummax(jnp.where(positive, cumulative, 0), axis=cumulative.ndim - 1)


def _below(key, tops, num_draws):
  """Uniform variates on [0, top), `(num_draws,)`, strictly below the top even after rounding."""
  draws = jax.random.uniform(key, (num_draws,), tops.dtype) * tops
  return jnp.minimum(draws, jnp.nextafter(tops, jnp.zeros_like(tops)))


def _search(table, row, values):
  """The first column of the sorted row `table[row]` above the value, by bisection."""
  columns = table.shape[1]
  flat = table.reshape(-1)
  found = jnp.zeros_like(row)
  for step in (1 << s for s in reversed(range(max(columns - 1, 1).bit_length()))):
    probe = jnp.minimum(found + step, columns - 1)
    found = jnp.where((flat[row * columns + probe - 1] <= values) & (probe > found), probe, found)
  return found


def check_scores(scores, num_samples, uniform_mix, input_weights, name="scores", allow_zeros=False):
  """The checked scores, number of samples and input weights (ones for None)."""
  scores = jnp.asarray(scores)
  checks.rank(name, scores, 1)
  checks.floating(name, scores)
  num_samples = checks.positive_int("num_samples", num_samples)
  if scores.shape[0] < 1:
    raise ValueError(f"{name}: expected at least one row, got none")
  checks.finite(name, scores)
  checks.non_negative(name, scores)
  checks.in_range("uniform_mix", uniform_mix, 0, 1)
  if not allow_zeros and not checks.is_traced(scores) and not np.any(np.asarray(scores) > 0):
    raise ValueError(f"{name}: expected at least one value > 0, got zeros")
  if input_weights is None:
    return scores, num_samples, jnp.ones_like(scores)
  input_weights = jnp.asarray(input_weights, scores.dtype)
  checks.shape("input_weights", input_weights, scores.shape)
  checks.finite("input_weights", input_weights)
  checks.non_negative("input_weights", input_weights)
  return scores, num_samples, input_weights


def check_distinct(
  scores, num_samples, uniform_mix, input_weights, name="scores", allow_zeros=False
):
  """Raises an error unless `num_samples` distinct rows can be drawn."""
  if num_samples > scores.shape[0]:
    raise ValueError(
      f"num_samples: expected at most the number of rows, {scores.shape[0]}, got {num_samples}"
    )
  if num_samples > _MAX_DRAWS_FLOAT32 and linalg.widest_dtype(scores.dtype) != jnp.float64:
    raise ValueError(
      f"num_samples: expected at most {_MAX_DRAWS_FLOAT32} in float32, got {num_samples}; use float64"
    )
  if any(map(checks.is_traced, (scores, uniform_mix, input_weights))):
    return
  mix, rows = np.asarray(uniform_mix), np.asarray(scores)
  possible = ((mix < 1) & (rows > 0)) | ((mix > 0) & (np.asarray(input_weights) > 0))
  if possible.sum() < num_samples and not (allow_zeros and not rows.any()):
    raise ValueError(
      f"{name}: expected at least {num_samples} rows of positive probability, got {possible.sum()}; "
      "use a positive uniform_mix"
    )


def class_quotas(classes, rooms, totals, num_samples, replace):
  """Number of draws per class, `(C,)`.

  Equal if `totals` is None, otherwise proportional to the totals with at least 1 per class. Without
  replacement, the number is at most that of the available rows (`rooms`).
  """
  if num_samples < classes.size:
    raise ValueError(
      f"num_samples: expected at least one for each of {classes.size} classes, got {num_samples}"
    )
  if totals is None:
    if num_samples % classes.size:
      raise ValueError(
        f"num_samples: expected a multiple of the number of classes, {classes.size}, got {num_samples}"
      )
    quotas = np.full(classes.size, num_samples // classes.size)
  else:
    limit = np.full(classes.size, num_samples) if replace else rooms
    if limit.sum() < num_samples:
      raise ValueError(
        f"num_samples: expected at most the rows of positive score, {limit.sum()}, got {num_samples}"
      )
    quotas = np.ones(classes.size, np.int64)
    # Each draw goes to the class that is furthest below its share, i.e. has the highest quotient.
    for _ in range(num_samples - classes.size):
      quotas[np.argmax(np.where(quotas < limit, totals / (quotas + 0.5), -1))] += 1
  if not replace and (quotas > rooms).any():
    worst = np.argmax(quotas - rooms)
    raise ValueError(
      f"class {classes[worst]}: expected at least {quotas[worst]} rows to draw, got {rooms[worst]}"
    )
  return quotas


def count(mask):
  """Number of true entries; int32 with or without 64-bit mode."""
  return jnp.sum(mask, dtype=jnp.int32)


def total(x):
  """Sum of a vector by tree reduction, which is accurate in float32 for millions of rows."""
  while x.shape[0] > 16:
    x = jnp.sum(jnp.pad(x, (0, -x.shape[0] % 16)).reshape(-1, 16), axis=1)
  return jnp.sum(x)


def law(scores, input_weights, mix, power=None):
  """Probabilities `(n,)` in the widest dtype, and whether the scores are valid (uniform if not)."""
  scores, input_weights, mix = (
    v.astype(linalg.widest_dtype(v.dtype)) for v in (scores, input_weights, mix)
  )
  good = jnp.isfinite(scores).all() & (scores >= 0).all()
  top = jnp.max(scores)
  if power is not None:
    scores = jnp.where(top > 0, (scores / top) ** power.astype(scores.dtype), 1)
  else:
    scores, good = scores / top, good & (top > 0)
  p = (1 - mix) * (scores / total(scores)) + mix * (input_weights / total(input_weights))
  good &= jnp.isfinite(p).all()
  return jnp.where(good, p, 1 / p.shape[0]), good


def _inclusion_units(p, b):
  """Inclusion probabilities pi = min(1, c p) with sum b.

  Returns `units`, uint32 multiples of 2^-32 for rows with pi < 1, and `always`, a mask of the rows
  with pi = 1. The units sum exactly to a multiple of 2^32. A row with 0 < pi < 1 has at least one
  unit.
  """
  n, dtype = p.shape[0], p.dtype
  positive = p > 0

  def scaled(always):
    free = jnp.where(always, 0, p)
    return free * ((b - count(always)).astype(dtype) / total(free))

  def grow(state):
    more = state[0] | (scaled(state[0]) >= 1)
    return more, jnp.any(more != state[0])

  always, _ = jax.lax.while_loop(
    lambda s: s[1], grow, (positive & (count(positive) <= b), jnp.bool_(True))
  )
  # Corrections for rounding: rows that exactly fill the remaining draws are certain, and if b rows
  # seem certain although more rows have p > 0, the lightest of them is not.
  always |= positive & (count(positive) - count(always) <= b - count(always))
  full = (count(always) == b) & (count(positive) > b)
  lightest = jnp.argmin(jnp.where(always, p, jnp.inf))
  always &= ~(full & (jnp.arange(n) == lightest))
  free = positive & ~always
  below_one = 1 - max(2.0**-32, float(jnp.finfo(dtype).epsneg))
  units = jnp.rint(jnp.minimum(scaled(always), below_one) * 2.0**32).astype(jnp.uint32)
  units = jnp.where(free, jnp.maximum(units, 1), 0).astype(jnp.uint32)
  missing = jax.lax.bitcast_convert_type(-jnp.sum(units, dtype=jnp.uint32), jnp.int32)

  def spread(state):
    units, missing, step = state
    room = jnp.where(
      free, jnp.where(missing > 0, jnp.uint32(_LARGEST_UNITS) - units, units - 1), 0
    ).astype(jnp.uint32)
    wide = room.astype(dtype)
    roomy = free & (wide >= 0.5 * total(wide) / count(free).astype(dtype))
    shares, amount = (
      jnp.maximum(count(roomy), 1).astype(jnp.uint32),
      jnp.abs(missing).astype(jnp.uint32),
    )
    rank = _prefix_sum(roomy.astype(jnp.uint32)) - 1
    take = amount // shares + (rank < amount % shares).astype(jnp.uint32)
    take = jnp.where(roomy, jnp.minimum(take, room), 0).astype(jnp.uint32)
    left = (amount - jnp.sum(take, dtype=jnp.uint32)).astype(jnp.int32)
    return jnp.where(missing > 0, units + take, units - take), jnp.sign(missing) * left, step + 1

  units, _, _ = jax.lax.while_loop(
    lambda s: (s[1] != 0) & (s[2] < _SPREADS), spread, (units, missing, jnp.int32(0))
  )
  return units, always


def _prefix_sum(x):
  """Inclusive prefix sums of integers; wrap-around makes them exact modulo 2^32 in any order."""
  width = 1 << (max(x.shape[0] - 1, 1).bit_length() + 1) // 2
  within = jnp.cumsum(
    jnp.pad(x, (0, -x.shape[0] % width)).reshape(-1, width), axis=1, dtype=x.dtype
  )
  before = jnp.cumsum(within[:, -1], dtype=x.dtype) - within[:, -1]
  return (within + before[:, None]).reshape(-1)[: x.shape[0]]


def _scrambled(words, log_size):
  """A bijection of 0 .. 2^log_size - 1 keyed by six words (odd multiplications and xor-shifts)."""
  i = jnp.arange(2**log_size, dtype=jnp.uint32)
  for r in range(3):
    i = (i * (words[2 * r] | 1) + words[2 * r + 1]) & jnp.uint32(2**log_size - 1)
    i ^= i >> ((log_size + 1) // 2) if log_size else 0
  return i


class Plan(NamedTuple):
  """A prepared systematic draw: many batches from the same probabilities, each in O(b log n).

  Attributes:
    order: `(2^k,)` int32, the rows in the order of the draw, with 2^k >= n.
    whole, part: `(2^k,)` int32 and uint32, the cumulative inclusion probability up to and including
      each position: the integer part, and the fraction in units of 2^-32.
    inclusion: `(n,)`, inclusion probability of each row, in the dtype of the probabilities.
  """

  order: Array
  whole: Array
  part: Array
  inclusion: Array


def plan(words, p, b) -> Plan:
  """Prepares draws of b distinct rows with inclusion probabilities min(1, c p).

  `words` `(6,)` uint32 determine the order of the rows; `b` may be traced.
  """
  n = p.shape[0]
  units, always = _inclusion_units(p, b)
  log_size = (n - 1).bit_length()
  order = _scrambled(words, log_size)
  ordered = jnp.pad(units, (0, 2**log_size - n))[order]
  part = _prefix_sum(ordered)
  whole = _prefix_sum(
    ((part < ordered) | jnp.pad(always, (0, 2**log_size - n))[order]).astype(jnp.int32)
  )
  return Plan(
    order.astype(jnp.int32), whole, part, jnp.where(always, 1, units.astype(p.dtype) * 2.0**-32)
  )


def no_plan(n: int, dtype) -> Plan:
  """A plan of the right shapes, for states that do not have one yet; its values are not used."""
  size = 2 ** (n - 1).bit_length()
  zeros = jnp.zeros((size,), jnp.int32)
  return Plan(zeros, zeros, zeros.astype(jnp.uint32), jnp.ones((n,), dtype))


def pick(prepared: Plan, start, size):
  """Indices `(size,)` and their inclusion probabilities for a uniform uint32 start.

  Selects the rows at which start + (cumulative inclusion probability) reaches 1, 2, ..., with
  the start in units of 2^-32.
  """
  last = prepared.order.shape[0] - 1
  passed = lambda i: prepared.whole[i] + (prepared.part[i] + start < start).astype(jnp.int32)
  wanted, slots = jnp.arange(1, size + 1, dtype=jnp.int32), jnp.zeros((size,), jnp.int32)
  for step in (1 << s for s in reversed(range(last.bit_length()))):
    probe = slots + step
    slots = jnp.where(
      (probe <= last) & (passed(jnp.minimum(probe, last) - 1) < wanted), probe, slots
    )
  indices = jnp.minimum(prepared.order[slots], prepared.inclusion.shape[0] - 1)
  return indices, prepared.inclusion[indices]


def systematic(key, p, size, b):
  """Indices `(size,)`, of which the first b are valid, and their inclusion probabilities."""
  words = jax.random.bits(key, (7,), jnp.uint32)
  return pick(plan(words[:6], p, b), words[6], size)
