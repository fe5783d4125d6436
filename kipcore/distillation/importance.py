"""Samplers that draw the targets from which there is most to learn.

Every row keeps a score of how badly the distilled set predicts it. A batch is drawn in
proportion to the scores, mixed with the uniform law, and the drawn rows bring their scores
up to date for free: the loss was computed anyway. Scores of the other rows are stale, which
costs variance and not correctness, because a row is weighted by the probability it was
really drawn with. For the same reason the law need not be made anew at every step: that takes
several passes over all rows, a draw from a prepared law almost nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kipcore import checks
from kipcore.distillation import samplers
from kipcore.distillation.method import LossInfo, Sampler, value_equal
from kipcore.selection import draws
from kipcore.types import Array

# Golden-section steps of the temperature: the interval e^-4 .. e^8 shrinks to a thousandth of its logarithm.
_SECTION_STEPS = 20
_LOG_TEMPERATURES = (-4.0, 8.0)
_CALIBRATION_ROWS = 1000
# The law is made anew whenever this part of the rows was scored since: a cost of a few rows a target.
_LAWS_A_PASS = 4


class ImportanceState(NamedTuple):
  """What an importance sampler knows of its rows.

  Attributes:
    scores: `(capacity,)` >= 0, the latest score of each row; 0 until `known`.
    known: `(capacity,)` bool, whether the row was drawn (or scored) before.
    base: `(capacity,)` weights u of the rows in the mean that is learned from; 0 for padding.
    class_counts: `(c,)` int32.
    log_temperature: scalar, of cross-entropy.
    plan: the law in use, prepared for batches of `batch_size` targets.
    gain: n sum p^2 of that law without its uniform share; 1 while there is no law.
    batch_size: int32; 0 while there is no law.
    fresh: int32, targets scored since the law was made.
    laws: int32, laws made so far.
  """

  scores: Array
  known: Array
  base: Array
  class_counts: Array
  log_temperature: Array
  plan: draws.Plan
  gain: Array
  batch_size: Array
  fresh: Array
  laws: Array


def squared_error(predictions: Array, labels: Array) -> Array:
  """||P_t - y_t||^2, `(t,)`."""
  return jnp.sum((predictions - labels) ** 2, axis=1)


def residual_norm(predictions: Array, labels: Array) -> Array:
  """||P_t - y_t||, `(t,)`: for the squared loss, what is nearest to the norm of the row's gradient."""
  return jnp.sqrt(squared_error(predictions, labels))


def margin(predictions: Array, labels: Array) -> Array:
  """max(0, 1 - (prediction of the true class - best other)), `(t,)`: 0 for rows that are safely right."""
  true = labels == jnp.max(labels, axis=1, keepdims=True)
  best_other = jnp.max(jnp.where(true, -jnp.inf, predictions), axis=1)
  own = jnp.max(jnp.where(true, predictions, -jnp.inf), axis=1)
  return jnp.maximum(1 - (own - best_other), 0)


def calibrated_temperature(
  predictions: Array, labels: Array, weights: Array | None = None
) -> Array:
  """The logarithm of the temperature b that minimizes the mean of CE(softmax(b P), class).

  Ridge regression of one-hot labels does not give logits: at b = 1 a perfect prediction has almost
  the loss of a wrong one and every law by cross-entropy is nearly uniform. The mean is convex in b;
  golden sections of log b in [-4, 8].

  Args:
    predictions: `(t, c)`.
    labels: `(t, c)`; the largest entry of a row is its class.
    weights: `(t,)` >= 0, or None for ones.

  Returns:
    Scalar.
  """
  classes = jnp.argmax(labels, axis=1)
  weights = (
    jnp.ones(classes.shape, predictions.dtype)
    if weights is None
    else weights.astype(predictions.dtype)
  )

  def mean(log_b):
    return jnp.sum(
      weights
      * optax.softmax_cross_entropy_with_integer_labels(jnp.exp(log_b) * predictions, classes)
    )

  ratio = (5**0.5 - 1) / 2

  def shrink(_, ends):
    low, high = ends
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    left = mean(a) < mean(b)
    return jnp.where(left, low, a), jnp.where(left, b, high)

  ends = tuple(jnp.asarray(end, predictions.dtype) for end in _LOG_TEMPERATURES)
  low, high = jax.lax.fori_loop(0, _SECTION_STEPS, shrink, ends)
  return 0.5 * (low + high)


SAMPLERS = (
  "uniform",
  "class_balanced",
  "cross_entropy",
  "squared_error",
  "residual_norm",
  "margin",
)
SCORES = {
  "cross_entropy": None,
  "squared_error": squared_error,
  "residual_norm": residual_norm,
  "margin": margin,
}


@value_equal
def importance(
  score: str | Callable[[Array, Array], Array] = "cross_entropy",
  uniform_mix: float = 0.5,
  weight_exponent: float = 0.25,
  least_gain: float = 1.1,
  balanced: bool = False,
  refresh_every: int = 0,
  power: float = 1.0,
) -> Sampler:
  """Draws rows in proportion to what the distilled set gets wrong.

      p_i = (1 - g) u_i s_i^a / sum(u s^a) + g u_i / n,   w_i = (u_i b / (n pi_i))^e

  with s the latest known scores (a row not seen yet has the mean of those seen), a = `power`, u_i = 1 (or
  n / (c n_class), if balanced), g = `uniform_mix`, pi_i the exact inclusion probability of a systematic
  draw of b rows without replacement, and e = `weight_exponent`. e = 1: mean(w f) is unbiased for
  the mean of u f over all rows, whatever the scores. e = 0: no weights; the expected gradient is that
  of another objective, which stresses rows of high loss. Between them the emphasis is partial:
  a heuristic, which pays where the rows with high loss can be learned, and chases noise where they cannot.

  So the sampler watches the gain n sum p^2 (at g = 0), the factor by which a law proportional to
  the scores lowers the second moment of a draw: it is large while few rows hold most of the loss, and
  near 1 where nearly all rows are wrong. Below `least_gain` it draws as the uniform (or
  class-balanced) sampler does, key by key (a heuristic of ours after the rule of Katharopoulos and
  Fleuret 2018, section 3.3, who use it to decide when scoring pays).

  Law and temperature are made anew whenever a quarter of the rows has been scored since; until the first
  quarter draws are uniform. A draw must have the size of the batches that `update` saw, else it is uniform.

  Args:
    score: "cross_entropy" (at a temperature calibrated on each batch), "squared_error", "residual_norm",
      "margin", or any `(predictions (t, c), labels (t, c)) -> (t,)`, >= 0.
    uniform_mix: g in [0, 1]; above 0 weights stay below 1 / g.
    weight_exponent: e in [0, 1].
    least_gain: importance is on while the gain is at least this; 1 for (almost) always.
    balanced: learn from the mean over classes of the class means, instead of the mean over rows.
    refresh_every: steps after which all rows are scored anew, at the cost of as many target
      evaluations; 0 for never, since the drawn rows refresh themselves.
    power: a >= 0; below 1 flatter than the scores, above 1 more peaked.

  Returns:
    A `Sampler`; its state is an `ImportanceState`. A draw of b is O(b log n), a new law O(n).

  Raises:
    ValueError: for an unknown score or a number out of range.
    TypeError: for a score that is neither a name nor callable.
  """
  if isinstance(score, str):
    checks.one_of("score", score, tuple(SCORES))
  elif not callable(score):
    raise TypeError(
      f"score: expected a name or a callable (predictions, labels) -> (t,), got {score!r}"
    )
  for name, value in (("uniform_mix", uniform_mix), ("weight_exponent", weight_exponent)):
    checks.in_range(name, value, 0, 1)
  if not isinstance(refresh_every, int) or refresh_every < 0:
    raise ValueError(f"refresh_every: expected an integer >= 0, got {refresh_every!r}")
  checks.in_range("power", power, 0, 100)
  if not least_gain >= 1:
    raise ValueError(f"least_gain: expected a number >= 1, got {least_gain}")
  calibrated = isinstance(score, str) and score == "cross_entropy"
  score_fn = SCORES[score] if isinstance(score, str) else score

  def init(class_counts: Array, capacity: int) -> ImportanceState:
    ends = jnp.cumsum(class_counts, dtype=jnp.int32)
    row = jnp.arange(capacity, dtype=jnp.int32)
    base = (row < ends[-1]).astype(jnp.float32)
    if balanced:
      label = jnp.minimum(jnp.searchsorted(ends, row, side="right"), class_counts.shape[0] - 1)
      present = jnp.sum(class_counts > 0, dtype=jnp.int32)
      share = ends[-1].astype(jnp.float32) / (present * jnp.maximum(class_counts, 1)).astype(
        jnp.float32
      )
      base = base * share[label]
    zeros, none = jnp.zeros((capacity,), jnp.float32), jnp.zeros((), jnp.int32)
    log_b = jnp.full((), math.log(10.0), jnp.float32)
    return ImportanceState(
      zeros,
      zeros > 0,
      base,
      class_counts,
      log_b,
      draws.no_plan(capacity, base.dtype),
      jnp.ones((), jnp.float32),
      none,
      none,
      none,
    )

  plain = samplers.class_balanced() if balanced else samplers.uniform()

  def draw(key: Array, state: ImportanceState, size: int):
    num_rows = jnp.sum(state.class_counts, dtype=jnp.int32)

    def by_score(key):
      indices, inclusion = draws.pick(state.plan, jax.random.bits(key, (), jnp.uint32), size)
      ratio = state.base[indices] * (size / num_rows.astype(jnp.float32)) / inclusion
      return indices, ratio**weight_exponent

    def uniformly(key):
      indices, weights = plain.draw(
        key, plain.init(state.class_counts, state.scores.shape[0]), size
      )
      return indices, weights.astype(jnp.float32)

    # A batch of all rows or more leaves nothing to choose.
    by_law = (state.gain >= least_gain) & (size < num_rows) & (size == state.batch_size)
    return jax.lax.cond(by_law, by_score, uniformly, key)

  def update(
    state: ImportanceState, indices: Array, labels: Array, info: LossInfo
  ) -> ImportanceState:
    predictions, labels = info.predictions.astype(jnp.float32), labels.astype(jnp.float32)
    state = state._replace(fresh=state.fresh + indices.shape[0])
    due = state.fresh >= jnp.sum(state.class_counts, dtype=jnp.int32) // _LAWS_A_PASS
    if calibrated:
      log_b = jax.lax.cond(
        due,
        lambda: _recalibrated(state.log_temperature, predictions, labels),
        lambda: state.log_temperature,
      )
      state = state._replace(log_temperature=log_b)
      scores = optax.softmax_cross_entropy_with_integer_labels(
        jnp.exp(log_b) * predictions, jnp.argmax(labels, axis=1)
      )
    else:
      scores = score_fn(predictions, labels)
      if scores.shape != indices.shape:
        raise ValueError(
          f"score: expected one value a target, shape {indices.shape}, got {scores.shape}"
        )
    # A score that is no number leaves the old one: the loop reports the step itself.
    good = jnp.isfinite(scores) & (scores >= 0)
    place = jnp.where(good, indices, state.scores.shape[0])
    state = state._replace(
      scores=state.scores.at[place].set(scores.astype(jnp.float32), mode="drop"),
      known=state.known.at[place].set(True, mode="drop"),
    )
    return jax.lax.cond(
      due, lambda s: with_law(s, uniform_mix, indices.shape[0], power), lambda s: s, state
    )

  name = score if isinstance(score, str) else getattr(score, "__name__", "callable")
  return Sampler(
    name,
    init,
    draw,
    update,
    refresh_every,
    functools.partial(sampler_metrics, least_gain=least_gain),
    row_scores,
    regrouped,
  )


class Law(NamedTuple):
  """`probabilities` `(capacity,)`, summing to 1, and the `gain` n sum p^2 of the unmixed scores."""

  probabilities: Array
  gain: Array


def _recalibrated(log_b, predictions, labels):
  """Half way from the old temperature to that of (up to 1,000 rows of) a batch."""
  stride = -(-predictions.shape[0] // _CALIBRATION_ROWS)
  fitted = calibrated_temperature(predictions[::stride], labels[::stride])
  return jnp.where(jnp.isfinite(fitted), 0.5 * (log_b + fitted), log_b)


def with_law(
  state: ImportanceState, uniform_mix, batch_size: int, power: float = 1.0
) -> ImportanceState:
  """The state with its law made from the scores as they are now; `importance` does so by itself.

  Args:
    state: the sampler's state.
    uniform_mix, power: of `importance`.
    batch_size: of the draws to come.

  Returns:
    `ImportanceState`.
  """
  law = importance_law(state, uniform_mix, power)
  num_rows = jnp.sum(state.class_counts, dtype=jnp.int32)
  # The order of a systematic draw may be any; a new one with every law keeps rows from meeting the same others.
  words = jax.random.bits(jax.random.fold_in(jax.random.key(0), state.laws), (6,), jnp.uint32)
  prepared = draws.plan(words, law.probabilities, jnp.minimum(num_rows, batch_size))
  return state._replace(
    plan=prepared,
    gain=law.gain,
    batch_size=jnp.full((), batch_size, jnp.int32),
    fresh=jnp.zeros((), jnp.int32),
    laws=state.laws + 1,
  )


def sampler_metrics(state: ImportanceState, least_gain: float) -> dict[str, Array]:
  """What is logged of an importance sampler, of the next draw by its law in use.

  Args:
    state: the sampler's state.
    least_gain: of `importance`.

  Returns:
    `importance_gain`; `effective_share`, 1 / (n sum p^2) of what rows are drawn with (1: uniformly); and `class_shares`
    `(c,)`, the part of the draws that each class gets.
  """
  by_law = (state.gain >= least_gain) & (state.batch_size > 0)
  mass = jnp.where(by_law, state.plan.inclusion, state.base)
  p = mass / draws.total(mass)
  counts = state.class_counts
  row = jnp.arange(p.shape[0], dtype=jnp.int32)
  label = jnp.minimum(
    jnp.searchsorted(jnp.cumsum(counts, dtype=jnp.int32), row, side="right"), counts.shape[0] - 1
  )
  shares = jax.ops.segment_sum(p, label, counts.shape[0], indices_are_sorted=True)
  num_rows = jnp.sum(counts, dtype=jnp.int32).astype(p.dtype)
  return {
    "importance_gain": state.gain,
    "effective_share": 1 / (num_rows * draws.total(p * p)),
    "class_shares": shares,
  }


def row_scores(state: ImportanceState) -> Array:
  """The latest score of each row, NaN where it was not seen yet, `(capacity,)`."""
  return jnp.where(state.known, state.scores, jnp.nan)


def regrouped(state: ImportanceState, before: ImportanceState, scores: Array) -> ImportanceState:
  """A first state that knows the scores of a run on other devices; its law is made at the first step.

  Args:
    state: of `init`.
    before: the states of the other devices, with a leading axis.
    scores: `(capacity,)`, NaN where a row was not seen.

  Returns:
    `ImportanceState`.
  """
  known = jnp.isfinite(scores)
  return state._replace(
    scores=jnp.where(known, scores, 0).astype(state.scores.dtype),
    known=known,
    log_temperature=jnp.mean(before.log_temperature),
    fresh=jnp.sum(state.class_counts, dtype=jnp.int32),
    laws=jnp.max(before.laws),
  )


def importance_law(state: ImportanceState, uniform_mix, power: float = 1.0) -> Law:
  """The law of the scores as they are now.

  Args:
    state: the sampler's state.
    uniform_mix, power: of `importance`.

  Returns:
    `Law`; uniform, with a gain of 1, where no score is positive.
  """
  known = state.known & (state.base > 0)
  uniform = state.base / draws.total(state.base)
  seen = draws.total(jnp.where(known, uniform, 0))
  mean = draws.total(jnp.where(known, state.scores * uniform, 0)) / jnp.where(seen > 0, seen, 1)
  # Relative to the mean score; a row not seen yet has just that.
  relative = jnp.where(known & (mean > 0), state.scores / jnp.where(mean > 0, mean, 1), 1) ** power
  by_score = relative * uniform
  mass = draws.total(by_score)
  by_score = by_score / mass
  gain = draws.total(relative / mass * by_score)
  return Law((1 - uniform_mix) * by_score + uniform_mix * uniform, gain)


def sampler(
  name: str,
  uniform_mix: float = 0.5,
  weight_exponent: float = 0.25,
  least_gain: float = 1.1,
  refresh_every: int = 0,
) -> Sampler:
  """The sampler of a name.

  Args:
    name: "uniform", "class_balanced", or a score of `importance`: "cross_entropy", "squared_error",
      "residual_norm", "margin".
    uniform_mix, weight_exponent, least_gain, refresh_every: of `importance`; the first two names do not use them.

  Returns:
    A `Sampler`.

  Raises:
    ValueError: for an unknown name or a number out of range.
  """
  checks.one_of("sampler", name, SAMPLERS)
  if name in SCORES:
    return importance(name, uniform_mix, weight_exponent, least_gain, refresh_every=refresh_every)
  return {"uniform": samplers.uniform, "class_balanced": samplers.class_balanced}[name]()
