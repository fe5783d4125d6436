"""Importance samplers of target batches, which favor rows that the distilled set predicts badly.

The score of a row measures how badly the distilled set predicts it. Batches are drawn in proportion
to the scores, mixed with the uniform distribution. The drawn rows update their scores at no cost,
since their loss was computed anyway.
Stale scores of other rows increase the variance but do not bias the result, because each row is
weighted by the probability it was drawn with. The distribution is therefore rebuilt only
occasionally: a rebuild takes several passes over all rows, whereas a draw from a prepared
distribution is cheap.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from kipcore import checks
from kipcore.distillation import samplers
from kipcore.distillation.method import LossInfo, Sampler, compiled
from kipcore.selection import draws
from kipcore.types import Array, Flag, Integer, Real

# Golden-section steps for the log temperature; they shrink the interval [-4, 8] to less than
# 1/1000.
_SECTION_STEPS = 20
_LOG_TEMPERATURES = (-4.0, 8.0)
_CALIBRATION_ROWS = 1000
# The distribution is rebuilt after a quarter of the rows were scored, which costs a few rows per
# target.
_REBUILDS_PER_PASS = 4


class ImportanceState(NamedTuple):
  """State of an importance sampler.

  Attributes:
    scores: `(capacity,)` >= 0, the latest score of each row; 0 for rows that are not `known`.
    known: `(capacity,)` bool, whether the row was drawn (or scored) before.
    base: `(capacity,)` weights u of the rows in the mean loss; 0 for padding.
    class_counts: `(c,)` int32.
    log_temperature: scalar, log temperature of the cross-entropy.
    plan: the prepared distribution, for batches of `batch_size` targets.
    gain: n sum p^2 of that distribution without its uniform part; 1 before the first rebuild.
    batch_size: int32; 0 before the first rebuild.
    fresh: int32, targets scored since the last rebuild.
    rebuilds: int32, distributions built so far.
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
  rebuilds: Array


def squared_error(
  predictions: Float[Array, "t c"], labels: Float[Array, "t c"]
) -> Float[Array, " t"]:
  """||P_t - y_t||^2, `(t,)`."""
  return jnp.sum((predictions - labels) ** 2, axis=1)


def residual_norm(
  predictions: Float[Array, "t c"], labels: Float[Array, "t c"]
) -> Float[Array, " t"]:
  """||P_t - y_t||, `(t,)`: for the squared loss, a proxy of the norm of the row's gradient."""
  return jnp.sqrt(squared_error(predictions, labels))


def margin(predictions: Float[Array, "t c"], labels: Float[Array, "t c"]) -> Float[Array, " t"]:
  """max(0, 1 - (prediction of the true class - best other prediction)), `(t,)`."""
  true = labels == jnp.max(labels, axis=1, keepdims=True)
  best_other = jnp.max(jnp.where(true, -jnp.inf, predictions), axis=1)
  own = jnp.max(jnp.where(true, predictions, -jnp.inf), axis=1)
  return jnp.maximum(1 - (own - best_other), 0)


def calibrated_temperature(
  predictions: Float[Array, "t c"],
  labels: Float[Array, "t c"],
  weights: Float[Array, " t"] | None = None,
) -> Float[Array, ""]:
  """The logarithm of the temperature b that minimizes the mean of CE(softmax(b P), class).

  Ridge regression of one-hot labels does not return logits: at b = 1 a perfect prediction has
  almost the loss of a wrong one, and sampling by cross-entropy would be nearly uniform. The mean is
  convex in b; golden-section search of log b in [-4, 8].

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
SCORES: dict[str, Any] = {
  "cross_entropy": None,
  "squared_error": squared_error,
  "residual_norm": residual_norm,
  "margin": margin,
}


@dataclasses.dataclass(frozen=True)
class ImportanceSampler(Sampler):
  """The sampler of `importance`, which documents the fields; its state is an `ImportanceState`."""

  score: str | Callable[[Array, Array], Array] = "cross_entropy"
  uniform_mix: float = 0.5
  weight_exponent: float = 0.25
  least_gain: float = 1.1
  balanced: bool = False
  refresh_every: int = 0
  power: float = 1.0

  @property
  def name(self) -> str:  # type: ignore[override]
    """The name of the score."""
    score = self.score
    return score if isinstance(score, str) else getattr(score, "__name__", "callable")

  @property
  def _plain(self) -> Sampler:
    return samplers.class_balanced() if self.balanced else samplers.uniform()

  @compiled("capacity")
  def init(self, class_counts: Int[Array, " c"], capacity: int) -> ImportanceState:
    ends = jnp.cumsum(class_counts, dtype=jnp.int32)
    row = jnp.arange(capacity, dtype=jnp.int32)
    base = (row < ends[-1]).astype(jnp.float32)
    if self.balanced:
      label = jnp.minimum(jnp.searchsorted(ends, row, side="right"), class_counts.shape[0] - 1)
      present = jnp.sum(class_counts > 0, dtype=jnp.int32)
      share = ends[-1].astype(jnp.float32) / (present * jnp.maximum(class_counts, 1)).astype(
        jnp.float32
      )
      base = base * share[label]
    zeros, none = jnp.zeros((capacity,), jnp.float32), jnp.zeros((), jnp.int32)
    return ImportanceState(
      scores=zeros,
      known=zeros > 0,
      base=base,
      class_counts=class_counts,
      log_temperature=jnp.full((), math.log(10.0), jnp.float32),
      plan=draws.no_plan(capacity, base.dtype),
      gain=jnp.ones((), jnp.float32),
      batch_size=none,
      fresh=none,
      rebuilds=none,
    )

  @compiled("size")
  def draw(
    self, key: Array, state: ImportanceState, size: int
  ) -> tuple[Int[Array, " size"], Float[Array, " size"]]:
    num_rows = jnp.sum(state.class_counts, dtype=jnp.int32)

    def by_score(key):
      indices, inclusion = draws.pick(state.plan, jax.random.bits(key, (), jnp.uint32), size)
      ratio = state.base[indices] * (size / num_rows.astype(jnp.float32)) / inclusion
      return indices, ratio**self.weight_exponent

    def uniformly(key):
      first = self._plain.init(state.class_counts, state.scores.shape[0])
      indices, weights = self._plain.draw(key, first, size)
      return indices, weights.astype(jnp.float32)

    # A batch of all rows or more leaves nothing to choose.
    use_scores = (state.gain >= self.least_gain) & (size < num_rows) & (size == state.batch_size)
    return jax.lax.cond(use_scores, by_score, uniformly, key)

  @compiled()
  def update(
    self,
    state: ImportanceState,
    indices: Int[Array, " t"],
    labels: Float[Array, "t c"],
    info: LossInfo,
  ) -> ImportanceState:
    predictions, labels = info.predictions.astype(jnp.float32), labels.astype(jnp.float32)
    state = state._replace(fresh=state.fresh + indices.shape[0])
    due = state.fresh >= jnp.sum(state.class_counts, dtype=jnp.int32) // _REBUILDS_PER_PASS
    if self.score == "cross_entropy":
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
      score_fn = SCORES[self.score] if isinstance(self.score, str) else self.score
      scores = score_fn(predictions, labels)
      if scores.shape != indices.shape:
        raise ValueError(
          f"score: expected one value per target, shape {indices.shape}, got {scores.shape}"
        )
    # Invalid scores are ignored here: the loop reports the step itself.
    good = jnp.isfinite(scores) & (scores >= 0)
    place = jnp.where(good, indices, state.scores.shape[0])
    state = state._replace(
      scores=state.scores.at[place].set(scores.astype(jnp.float32), mode="drop"),
      known=state.known.at[place].set(True, mode="drop"),
    )
    rebuild = lambda s: with_distribution(s, self.uniform_mix, indices.shape[0], self.power)
    return jax.lax.cond(due, rebuild, lambda s: s, state)

  @compiled()
  def metrics(self, state: ImportanceState) -> dict[str, Array]:
    return sampler_metrics(state, self.least_gain)

  @compiled()
  def scores(self, state: ImportanceState) -> Float[Array, " capacity"]:
    return row_scores(state)

  @compiled()
  def regroup(
    self, state: ImportanceState, previous: ImportanceState, scores: Float[Array, " capacity"]
  ) -> ImportanceState:
    known = jnp.isfinite(scores)
    return state._replace(
      scores=jnp.where(known, scores, 0).astype(state.scores.dtype),
      known=known,
      log_temperature=jnp.mean(previous.log_temperature),
      fresh=jnp.sum(state.class_counts, dtype=jnp.int32),
      rebuilds=jnp.max(previous.rebuilds),
    )


def importance(
  score: str | Callable[[Array, Array], Array] = "cross_entropy",
  uniform_mix: Real = 0.5,
  weight_exponent: Real = 0.25,
  least_gain: Real = 1.1,
  balanced: Flag = False,
  refresh_every: Integer = 0,
  power: Real = 1.0,
) -> ImportanceSampler:
  """Draws rows in proportion to the loss of the distilled set on them.

      p_i = (1 - g) u_i s_i^a / sum(u s^a) + g u_i / n,   w_i = (u_i b / (n pi_i))^e

  s are the latest known scores (an unseen row has the mean of the seen ones), a = `power`, u_i = 1
  (or n / (c n_class) if balanced), g = `uniform_mix`, e = `weight_exponent`, and pi_i is the exact
  inclusion probability of a systematic draw of b rows without replacement.

  Proved: with e = 1, mean(w f) is unbiased for the mean of u f over all rows, whatever the scores.
  Heuristic: with e < 1 rows of high loss are emphasized. If the gain n sum p^2 (at g = 0), the
    ratio of second
  moments of uniform and score-proportional draws, is below `least_gain`, draws equal those of the
  uniform (or class-balanced) sampler.

  The distribution and the temperature are updated after a quarter of the rows have been scored;
  draws before the first update are uniform, as are draws of another size than the batches passed to
  `update`.

  Args:
    score: "cross_entropy" (at a temperature calibrated on each batch), "squared_error",
      "residual_norm", "margin", or any `(predictions (t, c), labels (t, c)) -> (t,)`, >= 0.
      Callables compare by identity.
    uniform_mix: g in [0, 1]; if g > 0, weights are at most 1 / g.
    weight_exponent: e in [0, 1].
    least_gain: >= 1; with 1, draws are (almost) always by score.
    balanced: learn the mean over classes of the class means instead of the mean over rows.
    refresh_every: number of steps between scoring passes over all rows, each of which costs one
      target evaluation per row; 0 for never.
    power: a in [0, 100]; smaller values give a flatter distribution.

  Returns:
    An `ImportanceSampler`. A draw of b rows takes O(b log n), an update of the distribution O(n).

  Raises:
    ValueError: for an unknown score or a number out of range.
    TypeError: for a score that is neither a name nor callable.

  References:
    Katharopoulos and Fleuret (2018), section 3.3, use a gain to decide when scoring pays.
  """
  if isinstance(score, str):
    checks.one_of("score", score, tuple(SCORES))
  elif not callable(score):
    raise TypeError(
      f"score: expected a name or a callable (predictions, labels) -> (t,), got {score!r}"
    )
  uniform_mix = checks.number("uniform_mix", uniform_mix, 0, 1)
  weight_exponent = checks.number("weight_exponent", weight_exponent, 0, 1)
  least_gain = checks.number("least_gain", least_gain, 1, math.inf)
  power = checks.number("power", power, 0, 100)
  refresh_every = checks.integer("refresh_every", refresh_every, 0)
  return ImportanceSampler(
    score,
    uniform_mix,
    weight_exponent,
    least_gain,
    checks.flag("balanced", balanced),
    refresh_every,
    power,
  )


class SamplingDistribution(NamedTuple):
  """`probabilities` `(capacity,)` with sum 1, and the `gain` n sum p^2 of the unmixed scores."""

  probabilities: Array
  gain: Array


def _recalibrated(log_b, predictions, labels):
  """The mean of the old log temperature and that of up to 1,000 rows of a batch."""
  stride = -(-predictions.shape[0] // _CALIBRATION_ROWS)
  fitted = calibrated_temperature(predictions[::stride], labels[::stride])
  return jnp.where(jnp.isfinite(fitted), 0.5 * (log_b + fitted), log_b)


def with_distribution(
  state: ImportanceState, uniform_mix, batch_size: int, power: float = 1.0
) -> ImportanceState:
  """The state with its distribution rebuilt from the current scores, as `update` does when due.

  Args:
    state: the sampler's state.
    uniform_mix, power: of `importance`.
    batch_size: size of the following draws.

  Returns:
    `ImportanceState`.
  """
  distribution = sampling_distribution(state, uniform_mix, power)
  num_rows = jnp.sum(state.class_counts, dtype=jnp.int32)
  # Any order is valid for a systematic draw; a new one at each rebuild varies which rows are drawn
  # together.
  words = jax.random.bits(jax.random.fold_in(jax.random.key(0), state.rebuilds), (6,), jnp.uint32)
  prepared = draws.plan(words, distribution.probabilities, jnp.minimum(num_rows, batch_size))
  return state._replace(
    plan=prepared,
    gain=distribution.gain,
    batch_size=jnp.full((), batch_size, jnp.int32),
    fresh=jnp.zeros((), jnp.int32),
    rebuilds=state.rebuilds + 1,
  )


def sampler_metrics(state: ImportanceState, least_gain: float) -> dict[str, Array]:
  """Metrics of an importance sampler: the distribution of its next draw.

  Args:
    state: the sampler's state.
    least_gain: of `importance`.

  Returns:
    `importance_gain`; `effective_share`, 1 / (n sum p^2) of the drawing probabilities p (1 if
    uniform); and `class_shares` `(c,)`, the fraction of draws in each class.
  """
  by_score_now = (state.gain >= least_gain) & (state.batch_size > 0)
  mass = jnp.where(by_score_now, state.plan.inclusion, state.base)
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
  """The latest score of each row, `(capacity,)`; NaN for rows that were not seen."""
  return jnp.where(state.known, state.scores, jnp.nan)


def sampling_distribution(
  state: ImportanceState, uniform_mix, power: float = 1.0
) -> SamplingDistribution:
  """The sampling distribution of the current scores.

  Args:
    state: the sampler's state.
    uniform_mix, power: of `importance`.

  Returns:
    `SamplingDistribution`; uniform, with a gain of 1, if no score is positive.
  """
  known = state.known & (state.base > 0)
  uniform = state.base / draws.total(state.base)
  seen = draws.total(jnp.where(known, uniform, 0))
  mean = draws.total(jnp.where(known, state.scores * uniform, 0)) / jnp.where(seen > 0, seen, 1)
  # Relative to the mean score, which unseen rows have.
  relative = jnp.where(known & (mean > 0), state.scores / jnp.where(mean > 0, mean, 1), 1) ** power
  by_score = relative * uniform
  mass = draws.total(by_score)
  by_score = by_score / mass
  gain = draws.total(relative / mass * by_score)
  return SamplingDistribution((1 - uniform_mix) * by_score + uniform_mix * uniform, gain)


def sampler(
  name: str,
  uniform_mix: Real = 0.5,
  weight_exponent: Real = 0.25,
  least_gain: Real = 1.1,
  refresh_every: Integer = 0,
) -> Sampler:
  """A sampler by name.

  Args:
    name: "uniform", "class_balanced", or a score of `importance`: "cross_entropy", "squared_error",
      "residual_norm", "margin".
    uniform_mix, weight_exponent, least_gain, refresh_every: see `importance`; ignored by "uniform"
      and "class_balanced", which do not use scores.

  Returns:
    A `Sampler`.

  Raises:
    ValueError: for an unknown name or a number out of range.
  """
  checks.one_of("sampler", name, SAMPLERS)
  if name in SCORES:
    return importance(name, uniform_mix, weight_exponent, least_gain, refresh_every=refresh_every)
  return {"uniform": samplers.uniform, "class_balanced": samplers.class_balanced}[name]()
