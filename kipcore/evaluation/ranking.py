"""Distilled sets beside their baselines: every set under every kernel and network, with intervals and scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax import linen as nn

from kipcore import checks, keys
from kipcore.architectures import Architecture
from kipcore.evaluation import krr as krr_evaluation
from kipcore.evaluation import networks as network_evaluation
from kipcore.types import Array, KernelFn, Support


class KernelEvaluator(NamedTuple):
  """Ridge regression with `kernel_fn`, its ridge `relative_ridge` of tr(K_ss) / m."""

  kernel_fn: KernelFn
  relative_ridge: float = 1e-6


class NetworkEvaluator(NamedTuple):
  """Finite networks trained on the set; the fields are arguments of `evaluate.evaluate_network`."""

  network: Architecture | nn.Module
  width: int = 128
  norm: str = "none"
  augmentation: str = ""
  num_steps: int = 1000
  learning_rate: float | None = None


class EvaluationEntry(NamedTuple):
  """One set under one evaluator.

  Attributes:
    set: name of the set.
    evaluator: name of the evaluator.
    accuracies: in [0, 1], one a seed; a single one where nothing was drawn.
    mean: of them.
    half_width: half of the 95 % interval of the mean, by Student's t over the seeds; None for a single value.
  """

  set: str
  evaluator: str
  accuracies: tuple[float, ...]
  mean: float
  half_width: float | None


class RankingScores(NamedTuple):
  """What a set is worth beside random rows and all data; accuracies as shares, `label_robust` in [0, 1]."""

  gain_over_random: float
  gap_to_full: float
  label_robust: float


def evaluation_table(
  key,
  sets: Mapping[str, Sequence[Support]],
  evaluators: Mapping[str, KernelEvaluator | NetworkEvaluator],
  x: Array,
  y: Array,
  num_seeds: int = 5,
  relative_ridges: Mapping[str, float] | None = None,
  progress: Callable[[EvaluationEntry], None] | None = None,
) -> list[EvaluationEntry]:
  """Scores every set under every evaluator on rows that none of them has seen.

  Seed s trains network s on support s of the set, or on its only one. Ridge regression draws nothing, so a set
  of one support has one value there. No step, rate or seed is chosen by looking at the test rows.

  Args:
    key: random key (or int seed) of the networks.
    sets: supports by name: one, or `num_seeds` of them where the set itself is drawn.
    evaluators: by name.
    x, y: test rows `(n, ...)` and labels `(n, c)`.
    num_seeds: networks (and draws) of each set.
    relative_ridges: by name of a set, in the place of the evaluator's.
    progress: called with each entry.

  Returns:
    `EvaluationEntry` list, set by set.

  Raises:
    ValueError: for a set with another number of supports, or shapes that disagree.
    NumericalError: where ridge regression failed; it names set and evaluator.
  """
  checks.positive_int("num_seeds", num_seeds)
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
  """Half of Student's t interval of a mean; None for fewer than two values.

      t_{n-1, (1 + confidence) / 2} s / sqrt(n)

  Args:
    values: independent, about normal.
    confidence: in (0, 1).

  Returns:
    A number in their units, or None.
  """
  from scipy import stats  # slow to import

  n = len(values)
  if n < 2:
    return None
  return float(stats.t.ppf(0.5 + confidence / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def ranking_scores(
  distilled: float, random: float, full: float, weight: float = 0.5
) -> RankingScores:
  """Gain over random rows, gap to all data, and both as one score.

      label_robust = (e^a - e^-1) / (e - e^-1),  a = weight (distilled - random) - (1 - weight) (full - distilled)

  The score lies in [0, 1], the values at a = -1 and a = 1; 0.27 is a set that gains nothing and lacks nothing.
  Here all three accuracies are under one evaluator; DD-Ranking, which calls the score LRS, takes the gap with hard labels.

  Args:
    distilled: accuracy of the set, in [0, 1].
    random: of as many class-balanced random rows.
    full: of all data.
    weight: of the gain, in [0, 1].

  Returns:
    `RankingScores`.

  Raises:
    ValueError: for an accuracy or weight outside [0, 1].

  Source: Li et al., DD-Ranking (arXiv 2505.13300).
  """
  for name, value in (
    ("distilled", distilled),
    ("random", random),
    ("full", full),
    ("weight", weight),
  ):
    if not 0.0 <= value <= 1.0:
      raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
  gain, gap = distilled - random, full - distilled
  score = (math.exp(weight * gain - (1.0 - weight) * gap) - math.exp(-1.0)) / (
    math.e - math.exp(-1.0)
  )
  return RankingScores(gain, gap, score)


def markdown(table: Sequence[EvaluationEntry]) -> str:
  """A line a set, a column an evaluator: mean and half of the 95 % interval, in percent.

  Args:
    table: of `evaluation_table`.

  Returns:
    A markdown table.
  """
  evaluators = list(dict.fromkeys(entry.evaluator for entry in table))
  cells = {(entry.set, entry.evaluator): shown(entry.mean, entry.half_width) for entry in table}
  lines = [
    "| set | " + " | ".join(f"`{name}`" for name in evaluators) + " |",
    "| --- " * (1 + len(evaluators)) + "|",
  ]
  for name in dict.fromkeys(entry.set for entry in table):
    lines.append(
      f"| {name} | " + " | ".join(cells.get((name, how), "") for how in evaluators) + " |"
    )
  return "\n".join(lines)


def shown(mean: float, spread: float | None) -> str:
  """A share with what it is uncertain by, in percent.

  Args:
    mean: in [0, 1].
    spread: of the same units, or None.

  Returns:
    Text such as `61.2 ± 0.4`.
  """
  return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
