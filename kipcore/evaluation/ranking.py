"""Comparison of training sets: each set under each kernel and network, with intervals and scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from kipcore import checks, keys
from kipcore.architectures import Architecture
from kipcore.evaluation import krr as krr_evaluation
from kipcore.evaluation import networks as network_evaluation
from kipcore.evaluation.protocols import Protocol
from kipcore.functional import NetworkLike
from kipcore.types import ArrayLike, IntLike, KernelFn, RealLike, Support


class KernelEvaluator(NamedTuple):
  """Ridge regression with `kernel_fn` and a ridge of `relative_ridge` times tr(K_ss) / m."""

  kernel_fn: KernelFn
  relative_ridge: float = 1e-6


class NetworkEvaluator(NamedTuple):
  """Finite networks trained on the set; the fields are arguments of `evaluate_network`."""

  network: Architecture | NetworkLike
  width: int = 128
  norm: str | None = None
  augmentation: str | None = None
  num_steps: int | None = None
  learning_rate: float | None = None
  protocol: str | Protocol = "default"


class EvaluationEntry(NamedTuple):
  """The accuracy of one set under one evaluator.

  Attributes:
    set: name of the set.
    evaluator: name of the evaluator.
    accuracies: in [0, 1], one per seed; a single one if nothing is random.
    mean: mean of the accuracies.
    half_width: half of the 95 % confidence interval of the mean, by Student's t over the seeds;
      None for a single value.
  """

  set: str
  evaluator: str
  accuracies: tuple[float, ...]
  mean: float
  half_width: float | None


class RankingScores(NamedTuple):
  """A set compared with random rows and with all data; see `ranking_scores`.

  Attributes:
    gain_over_random: difference of accuracies, in [-1, 1].
    gap_to_full: difference of accuracies, in [-1, 1].
    label_robust: both as one score in [0, 1].
  """

  gain_over_random: float
  gap_to_full: float
  label_robust: float


def evaluation_table(
  key,
  sets: Mapping[str, Sequence[Support]],
  evaluators: Mapping[str, KernelEvaluator | NetworkEvaluator],
  x: Shaped[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  num_seeds: IntLike = 5,
  relative_ridges: Mapping[str, float] | None = None,
  progress: Callable[[EvaluationEntry], None] | None = None,
) -> list[EvaluationEntry]:
  """Score every set under every evaluator on held-out rows.

  Seed s trains network s on support s of the set, or on its only one. Ridge regression is
  deterministic, so a set of one support has one value there. The test rows are used for nothing
  but the final scores.

  Args:
    key: random key (or integer seed) of the networks.
    sets: supports by name: one, or `num_seeds` of them if the set itself is random.
    evaluators: by name.
    x: `(n, ...)` test rows.
    y: `(n, c)` test labels.
    num_seeds: number of networks (and draws) per set.
    relative_ridges: by name of a set; replaces the ridge of the evaluator.
    progress: called with each entry.

  Returns:
    List of `EvaluationEntry`, set by set.

  Raises:
    ValueError, TypeError: for a set with another number of supports, or shapes that do not match.
    NumericalError: if ridge regression failed; the message names the set and the evaluator.
  """
  num_seeds = checks.positive_int("num_seeds", num_seeds)
  for name, supports in sets.items():
    if len(supports) not in (1, num_seeds):
      raise ValueError(f"sets: expected 1 or {num_seeds} supports of {name!r}, got {len(supports)}")
  table = []
  for name, supports in sets.items():
    for how, evaluator in evaluators.items():
      if isinstance(evaluator, KernelEvaluator):
        ridge = (relative_ridges or {}).get(name, evaluator.relative_ridge)
        found = [
          krr_evaluation.evaluate_krr(evaluator.kernel_fn, support, x, y, relative_ridge=ridge)
          for support in supports
        ]
        for result in found:
          checks.raise_for_status(f"ridge regression of {name} under {how}", result.status)
        accuracies = [float(result.accuracy) for result in found]
      else:
        stream = keys.stream(key, "evaluation_table")
        accuracies = [
          float(
            network_evaluation.evaluate_network(
              keys.at_step(stream, seed),
              evaluator.network,
              supports[seed % len(supports)],
              x,
              y,
              1,
              evaluator.width,
              evaluator.num_steps,
              evaluator.learning_rate,
              norm=evaluator.norm,
              augmentation=evaluator.augmentation,
              protocol=evaluator.protocol,
            )[0]
          )
          for seed in range(num_seeds)
        ]
      table.append(
        EvaluationEntry(
          name, how, tuple(accuracies), float(np.mean(accuracies)), half_width(accuracies)
        )
      )
      if progress is not None:
        progress(table[-1])
  return table


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
  """Half the width of Student's t interval of a mean; None for fewer than two values.

      t_{n-1, (1 + confidence) / 2} s / sqrt(n)

  Args:
    values: independent and approximately normal.
    confidence: in (0, 1).

  Returns:
    A number in the units of the values, or None.
  """
  from scipy import stats  # slow to import

  n = len(values)
  if n < 2:
    return None
  return float(stats.t.ppf(0.5 + confidence / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def ranking_scores(
  distilled: RealLike, random: RealLike, full: RealLike, weight: RealLike = 0.5
) -> RankingScores:
  """The gain over random rows, the gap to all data, and both as one score.

      label_robust = (e^a - e^-1) / (e - e^-1),  a = weight (distilled - random) - (1 - weight) (full - distilled)

  The score is 0 at a = -1, 1 at a = 1, and 0.27 for a set with neither gain nor gap. All three
  accuracies are under one evaluator; DD-Ranking, which calls the score LRS, computes the gap with
  hard labels.

  Args:
    distilled: accuracy of the set, in [0, 1].
    random: accuracy of as many class-balanced random rows.
    full: accuracy of all data.
    weight: weight of the gain, in [0, 1].

  Returns:
    `RankingScores`.

  Raises:
    ValueError, TypeError: for an accuracy or weight outside [0, 1].

  References:
    Li et al. (2025), DD-Ranking, arXiv 2505.13300.
  """
  distilled, random, full, weight = (
    _share(name, value)
    for name, value in (
      ("distilled", distilled),
      ("random", random),
      ("full", full),
      ("weight", weight),
    )
  )
  gain, gap = distilled - random, full - distilled
  score = (math.exp(weight * gain - (1.0 - weight) * gap) - math.exp(-1.0)) / (
    math.e - math.exp(-1.0)
  )
  return RankingScores(gain, gap, score)


def _share(name: str, value: RealLike) -> float:
  number = checks.scalar(name, value)
  if not 0.0 <= number <= 1.0:
    raise ValueError(f"{name}: expected a number in [0, 1], got {number}")
  return number


def markdown(table: Sequence[EvaluationEntry]) -> str:
  """A Markdown table with one row per set and one column per evaluator, in percent.

  Args:
    table: result of `evaluation_table`.

  Returns:
    Means with half of their 95 % intervals, or the values of two seeds; a line below says which.
  """
  evaluators = list(dict.fromkeys(entry.evaluator for entry in table))
  cells = {
    (entry.set, entry.evaluator): shown(entry.mean, entry.half_width, entry.accuracies)
    for entry in table
  }
  lines = [
    "| set | " + " | ".join(f"`{name}`" for name in evaluators) + " |",
    "| --- " * (1 + len(evaluators)) + "|",
  ]
  for name in dict.fromkeys(entry.set for entry in table):
    lines.append(
      f"| {name} | " + " | ".join(cells.get((name, how), "") for how in evaluators) + " |"
    )
  note = spread_note([entry.accuracies for entry in table])
  return "\n".join([*lines, *(["", note] if note else [])])


def spread_note(values: Sequence[Sequence[float]]) -> str:
  """A line that says what the numbers made by `shown` are.

  Args:
    values: those of each number, one per seed.

  Returns:
    Text, or "" if no number has more than one value.
  """
  counts = {len(each) for each in values}
  parts = ["a ± b: mean and half of its 95 % confidence interval"] if max(counts) > 2 else []
  parts += ["a and b: the values of two seeds"] if 2 in counts else []
  return f"Accuracy, %; {'; '.join(parts)}." if parts else ""


def shown(mean: float, spread: float | None, values: Sequence[float] = ()) -> str:
  """A share and its uncertainty, in percent. From two values an interval is too wide to mean anything.

  Args:
    mean: in [0, 1].
    spread: in the same units, or None.
    values: those that `mean` is the mean of, if known; two of them are shown instead.

  Returns:
    Text such as `61.2 ± 0.4`, or `60.9 and 61.5`.
  """
  if len(values) == 2:
    return " and ".join(f"{100 * value:.1f}" for value in values)
  return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
