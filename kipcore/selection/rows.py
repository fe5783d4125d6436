"""Selection of weighted rows from any data: unlabeled, with real targets, or with classes."""

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from kipcore import blocks, checks, keys, linalg
from kipcore.kernels import rbf_fn
from kipcore.kernels.gram import gram_diag
from kipcore.selection import (
  coreset,
  draws,
  duplicates,
  pursuit,
  representatives,
  sampling,
  sensitivity,
  strategies,
  thinning,
)
from kipcore.selection.coreset import Coreset
from kipcore.types import Array, ArrayLike, KernelFn, NumericalError

STRATEGIES = (
  "auto",
  "uniform",
  "leverage",
  "krr_sensitivity",
  "lightweight",
  "kmedoids",
  "kmeans_plusplus",
  "herding",
  "kernel_herding",
  "kernel_thinning",
  "k_center",
  "krr_pursuit",
)
NEEDS_LABELS = ("krr_sensitivity", "krr_pursuit")
USES_KERNEL = ("leverage", "krr_sensitivity", "kernel_herding", "kernel_thinning", "krr_pursuit")
# Rows of equal weight within a class.
_EQUAL_WEIGHTS = ("herding", "kernel_herding", "kernel_thinning")
ALLOCATIONS = ("proportional", "balanced", "sensitivity")
# Share of draws by weight alone in strategies by score, which bounds the weights of rows.
UNIFORM_MIX = 0.1
# Candidates of "auto" with labels, the first of which wins ties.
AUTO_CANDIDATES = ("kmedoids", "uniform")
# "auto" considers a strategy only up to this number of operations (about a minute on two cores).
AUTO_OPERATIONS = 3e12
# Ridges at which "auto" measures a candidate, per row and relative to the mean kernel diagonal.
AUTO_RIDGES = (1e-4, 1e-2, 1.0)
_OBJECTIVE_ROWS = 10_000
_LLOYD_STEPS = 30
_POOL = 2000
_BLOCK_NUMBERS = 2**22


class Labels(NamedTuple):
  """Labels of rows: `classes` `(n,)`, indices into `names`, or `real` `(n, q)`, or neither."""

  classes: np.ndarray | None = None
  names: np.ndarray = np.empty(0)
  real: np.ndarray | None = None


@dataclasses.dataclass
class Problem:
  """Distinct rows of positive weight, and what the strategies need.

  Attributes:
    x: `(k, ...)` rows as the kernel sees them.
    points: `(k, p)` vectors whose distances strategies by distance compare.
    targets: `(k, c)` centered regression targets; `(k, 1)` zeros without labels.
    groups: `(k,)` int class codes; zeros without classes.
    weights: `(k,)` float64.
    kernel_fn: the kernel for `x`.
    kind: of the labels: "classes", "real" or "none".
  """

  x: Array
  points: Array
  targets: Array
  groups: np.ndarray
  weights: np.ndarray
  kernel_fn: KernelFn
  kind: str


class Chosen(NamedTuple):
  """Positions in the problem `(m,)`, their weights `(m,)`, and what the scores say."""

  rows: np.ndarray
  weights: Array
  ridge: float | None = None
  scores: sensitivity.SensitivityScores | None = None


def select(
  key,
  x: Float[ArrayLike, "n ..."],
  y: Shaped[ArrayLike, "n ..."] | None = None,
  size: int | None = None,
  size_per_class: int | None = None,
  strategy: str = "auto",
  kernel_fn: KernelFn | None = None,
  weights: Float[ArrayLike, " n"] | None = None,
  allocation: str = "proportional",
) -> Coreset:
  """Selects weighted rows that represent all rows: sum_j w_j f(x_{i_j}) approximates sum_i u_i f(x_i).

  Labels are read by their type. Integers and booleans `(n,)` are classes, and so are `(n, c)`
  one-hot labels (one entry per row is larger than the others by 1, e.g. centered by 1/c). Other
  floats `(n,)` or `(n, q)` are real targets. With classes, rows are selected within each class. With
  real targets, distances include them: ||x - x'||^2 / tr Cov(x) + ||y - y'||^2 / tr Cov(y).

  Input weights u are multiplicities: a row with u = 10 counts as ten equal rows. Equal rows with
  equal labels are merged first, so both give the same result, and no row is selected twice.

  Strategies (S: needs labels; K: uses the kernel):
    uniform: drawn in proportion to u. Unbiased.
    leverage (K): drawn by ridge leverage scores. Unbiased.
    krr_sensitivity (S, K): drawn by (upper bounds on) the sensitivities of kernel ridge regression
      on centered labels. Unbiased; `sample_size` states what draws with replacement guarantee.
    lightweight: drawn by `lightweight_sensitivities` of k-means. Unbiased.
    kmedoids: the rows nearest to the centers of k-means, with the weights of the clusters. For a
      function with Lipschitz constant L, the error of the weighted sum is at most L times the
      weighted sum of the distances of all rows to their medoids.
    kmeans_plusplus: seeds of greedy k-means++.
    herding, kernel_herding (K), k_center: see `representatives`; deterministic.
    kernel_thinning (K): see `kernel_thinning`; with real targets under the kernel with targets, of a
      pool of at most 8,192 rows of each class (or 4 times its size).
    krr_pursuit (S, K): greedy minimization of the ridge regression objective (`krr_pursuit`) over a
      random pool of at most 2,000 rows.
    auto: without labels kmedoids, or lightweight where k-means would be slow. With labels the
      candidate of AUTO_CANDIDATES with the smallest error of weighted ridge regression, measured on
      the given rows (at most 10,000) as error rate (classes) or squared error (real targets), at the
      best of AUTO_RIDGES. Candidates that would take more than AUTO_OPERATIONS are skipped.

  Weights of unbiased strategies are u / (inclusion probability). herding, kernel_herding and
  kernel_thinning give equal weights within a class. kmeans_plusplus, k_center and krr_pursuit give
  each point the weight of the rows nearest to it. Without unbiasedness, the weights of a class sum to
  the weight of its rows.

  Args:
    key: random key (or int seed).
    x: `(n, ...)` floating rows. Distances and the default kernel compare them as they are, so
      columns with different units should be standardized.
    y: labels or None, see above.
    size: m, the number of rows in total; exactly one of `size` and `size_per_class`.
    size_per_class: number of rows of each class.
    strategy: see above.
    kernel_fn: the kernel of strategies marked K and of "auto"; None for `rbf_fn` with bandwidth
      sqrt(tr Cov(x)), at which the mean of ||x - x'||^2 / (2 bandwidth^2) is 1.
    weights: `(n,)` input weights u >= 0, or None for 1. Rows of weight 0 are not selected.
    allocation: how `size` is divided among classes: "proportional" to their weight, "balanced", or
      by "sensitivity", in proportion to their total sensitivity for kernel ridge regression. Each
      class has at least one row, and at most its distinct rows.

  Returns:
    `Coreset` with m real rows, grouped by class. If there are fewer distinct rows than requested,
    all of them are returned with their weights, which loses nothing, and a warning is issued.

  Raises:
    ValueError, TypeError: for an unknown strategy or allocation, a strategy that needs labels
      without them, labels with a single value, a size above the number of rows, weights that are
      negative or all zero, inconsistent shapes, integer rows, or NaN or infinite values.
    NumericalError: if a factorization fails.

  Example:
    >>> x = np.repeat(np.asarray([[0.0], [1.0], [5.0]], np.float32), (10, 20, 30), axis=0)
    >>> chosen = kipcore.select(0, x, size=3, strategy="kmedoids")
    >>> sorted(zip(chosen.x.ravel().tolist(), chosen.weights.tolist()))
    [(0.0, 10.0), (1.0, 20.0), (5.0, 30.0)]
  """
  checks.one_of("strategy", strategy, STRATEGIES)
  checks.one_of("allocation", allocation, ALLOCATIONS)
  if checks.is_traced(x) or checks.is_traced(y) or checks.is_traced(weights):
    raise TypeError("select: expected concrete arrays, got traced ones; call it outside jit")
  checks.floating("x", x)
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(f"x: expected at least one row (n, ...), got shape {x.shape}")
  values = linalg.at_least_float32(jnp.asarray(x))
  checks.finite("x", values)  # also without float64, in which numbers can be larger
  n = x.shape[0]
  mass = input_weights(weights, n)
  labels = read_labels(y, n, mass > 0)
  check_labels(strategy, labels)
  limit = check_size(labels, mass, size, size_per_class, allocation)
  rows_as_given = np.asarray(values)
  merged = duplicates.merge_rows(
    [a for a in (rows_as_given, labels.classes, labels.real) if a is not None], mass
  )
  problem, used_kernel = _problem(rows_as_given, labels, merged, kernel_fn)
  stream = keys.stream(key, "select")
  quotas = class_sizes(
    problem.groups,
    problem.weights,
    limit,
    size_per_class is not None,
    allocation,
    lambda: _scores(stream, problem, limit)[1].scores,
  )
  objectives: dict[str, float] = {}
  if strategy == "auto":
    strategy, chosen, objectives = _best(stream, problem, quotas)
  else:
    chosen = _choose(stream, problem, quotas, strategy)
  order = np.argsort(problem.groups[chosen.rows], kind="stable")
  rows = merged.rows[chosen.rows[order]].astype(np.int32)
  dtype = values.dtype
  return Coreset(
    jnp.asarray(rows_as_given[rows]),
    jnp.zeros((rows.size, 0), dtype) if y is None else jnp.asarray(np.asarray(y)[rows]),
    rows,
    jnp.asarray(np.asarray(chosen.weights)[order], dtype),
    strategy,
    ridge=chosen.ridge,
    scores=None if chosen.scores is None else _scores_of_all(chosen.scores, merged, mass),
    objectives=objectives,
    kernel_fn=used_kernel if strategy in USES_KERNEL or objectives else None,
  )


def read_labels(y, n: int, live: np.ndarray | None = None) -> Labels:
  """The labels of n rows, as `select` documents.

  Args:
    y: labels or None.
    n: number of rows.
    live: `(n,)` mask of the rows of positive weight; None for all.

  Returns:
    `Labels`.

  Raises:
    ValueError, TypeError: for labels of another shape or type, with NaN, or with a single value in
      rows of positive weight.
  """
  if y is None:
    return Labels()
  checks.array("y", y)
  y = np.asarray(y)
  if y.ndim not in (1, 2) or y.shape[0] != n or 0 in y.shape:
    raise ValueError(f"y: expected shape ({n},) or ({n}, q) to match x, got {y.shape}")
  if y.dtype.kind == "V" or not (jnp.issubdtype(y.dtype, jnp.floating) or y.dtype.kind in "biu"):
    raise TypeError(f"y: expected floats (real targets) or integers (classes), got {y.dtype}")
  if y.dtype.kind not in "biu":
    y = y.astype(np.promote_types(y.dtype, np.float32) if y.dtype.kind == "f" else np.float32)
    checks.finite("y", y)
  if y.ndim == 2 and (one_hot(y) or y.dtype.kind in "biu"):
    if not one_hot(y):
      raise ValueError(
        f"y: expected one-hot rows or floats, got integers of shape {y.shape}; convert real targets to floats"
      )
    y = np.argmax(y, axis=1)
  if y.dtype.kind in "biu":
    names, classes = np.unique(y, return_inverse=True)
    used = np.unique(classes if live is None else classes[live])
    if used.size < 2:
      raise ValueError(
        f"y: expected at least 2 classes, got only class {names[used[0]]}; omit y to select without labels"
      )
    return Labels(classes=classes, names=names)
  y = y.reshape(n, -1)
  used = y if live is None else y[live]
  if (used == used[:1]).all():
    value = used[0].tolist()
    raise ValueError(
      f"y: expected targets that differ, got the constant {value[0] if len(value) == 1 else value}; "
      "omit y to select without labels"
    )
  return Labels(real=y)


def one_hot(y: np.ndarray) -> bool:
  """Whether one entry of every row is larger by 1 than the others, which are all equal."""
  if y.shape[1] < 2:
    return False
  y = y.astype(np.float64)
  low = y.min()
  return bool(
    (np.abs(y.max(axis=1) - low - 1) <= 1e-5).all()
    and (np.count_nonzero(y - low > 1e-5, axis=1) == 1).all()
  )


def check_labels(strategy: str, labels: Labels) -> None:
  """Raises ValueError if a strategy needs labels and there are none."""
  if strategy in NEEDS_LABELS and labels.classes is None and labels.real is None:
    others = ", ".join(name for name in STRATEGIES if name not in NEEDS_LABELS)
    raise ValueError(
      f"y: expected labels for strategy {strategy!r}, got None; strategies without labels are {others}"
    )


def check_size(labels: Labels, mass: np.ndarray, size, size_per_class, allocation: str) -> int:
  """The checked size, or size per class.

  Raises:
    ValueError, TypeError: unless exactly one of them is a positive integer that the rows allow.
  """
  if (size is None) == (size_per_class is None):
    raise ValueError(
      f"expected either size or size_per_class, got size={size} and size_per_class={size_per_class}"
    )
  live = mass > 0
  if size is None:
    limit = checks.positive_int("size_per_class", size_per_class)
    if labels.classes is None:
      raise ValueError("size_per_class: expected y with classes, got none; use size")
    counts = np.bincount(labels.classes[live], minlength=labels.names.size)
    if counts.min() < limit:
      raise ValueError(
        f"size_per_class: expected at most the {counts.min()} rows of the smallest class, "
        f"{labels.names[counts.argmin()]}, got {limit}"
      )
  else:
    limit = checks.positive_int("size", size)
    if limit > live.sum():
      raise ValueError(
        f"size: expected at most the number of rows of positive weight, {live.sum()}, got {limit}"
      )
    num_classes = 1 if labels.classes is None else np.unique(labels.classes[live]).size
    if limit < num_classes:
      raise ValueError(
        f"size: expected at least one row for each of {num_classes} classes, got {limit}"
      )
  if allocation != "proportional" and (labels.classes is None or size is None):
    raise ValueError(
      f"allocation: expected 'proportional' unless size is divided among classes, got {allocation!r}"
    )
  return limit


def input_weights(weights, n: int) -> np.ndarray:
  """The weights in float64; ones for None."""
  if weights is None:
    return np.ones(n)
  checks.weights("weights", weights, n, jnp.float32)
  weights = np.asarray(weights, np.float64)
  if not weights.any():
    raise ValueError("weights: expected at least one value > 0, got zeros")
  return weights


def _problem(x, labels: Labels, merged, kernel_fn) -> tuple[Problem, KernelFn]:
  """The problem of the distinct rows, and the kernel for rows as given.

  NumPy, because eager operations of JAX are compiled for each shape.
  """
  kept, share = x[merged.rows], merged.weights / merged.weights.sum()
  rows = kept.reshape(kept.shape[0], -1)
  scale = _spread(rows, share)
  groups, targets = groups_and_targets(labels, merged.rows, share, x.dtype)
  kind = "none" if labels.classes is None else "classes"
  points = rows
  if labels.real is not None:
    kind, points = "real", np.concatenate([rows / scale, targets], axis=1)
  problem = Problem(
    jnp.asarray(kept),
    jnp.asarray(points),
    jnp.asarray(targets),
    groups,
    merged.weights,
    rbf_fn(1.0),
    kind,
  )
  if kernel_fn is None:
    # Rows are scaled instead of the kernel, which is compiled once for all bandwidths.
    return dataclasses.replace(problem, x=jnp.asarray(kept / scale)), rbf_fn(scale)
  kernel_fn = checks.hashable(kernel_fn)
  return dataclasses.replace(problem, kernel_fn=kernel_fn), kernel_fn


def _spread(rows: np.ndarray, share: np.ndarray):
  """sqrt(tr Cov) of weighted rows, in their dtype; 1 if all are equal."""
  mean = (share.astype(rows.dtype) @ rows)[None]
  total = 0.0
  for part in blocks.row_slices(len(rows), max(1, _BLOCK_NUMBERS // rows.shape[1])):
    total += float(share[part] @ np.sum((rows[part] - mean).astype(np.float64) ** 2, axis=1))
  return rows.dtype.type(np.sqrt(total) or 1.0)


def groups_and_targets(labels: Labels, rows: np.ndarray, share: np.ndarray, dtype):
  """Class codes `(k,)` without gaps and regression targets `(k, c)` of some rows.

  One-hot labels are centered by 1/c, real ones by their mean, and divided by sqrt(tr Cov); `share`
  `(k,)` are the weights of the rows, with sum 1. Zeros without labels.
  """
  if labels.classes is not None:
    present, groups = np.unique(labels.classes[rows], return_inverse=True)
    return groups, (np.eye(present.size)[groups] - 1 / present.size).astype(dtype)
  groups = np.zeros(rows.size, np.int64)
  if labels.real is None:
    return groups, np.zeros((rows.size, 1), dtype)
  real = labels.real[rows].astype(np.float64)
  real = real - share @ real
  return groups, (real / (np.sqrt(share @ np.sum(real**2, axis=1)) or 1.0)).astype(dtype)


def class_sizes(groups, weights, limit: int, per_class: bool, allocation: str, scores):
  """Rows to select in each group, `(C,)`; a warning if there are fewer distinct rows.

  `scores()` returns sensitivities, for the allocation of that name.
  """
  rooms = np.bincount(groups)
  if limit > (rooms.min() if per_class else rooms.sum()):
    warnings.warn(
      f"size: expected at most the number of distinct rows, got {limit} (of each class, if there are classes) "
      f"for {groups.size} distinct rows; all distinct rows of such classes are selected",
      UserWarning,
      stacklevel=3,
    )
  if per_class:
    return np.minimum(limit, rooms)
  if limit >= rooms.sum():
    return rooms
  by = np.asarray(scores(), np.float64) if allocation == "sensitivity" else weights
  totals = np.ones(rooms.size) if allocation == "balanced" else np.bincount(groups, weights=by)
  return draws.class_quotas(np.arange(rooms.size), rooms, totals, limit, False)


def _scores(key, problem: Problem, num_samples: int):
  """The score ridge and the scores; without labels these are leverage scores."""
  return coreset.score_rows(
    keys.stream(key, "scores"),
    problem.x,
    problem.targets,
    num_samples,
    problem.kernel_fn,
    "auto",
    jnp.asarray(problem.weights, problem.x.dtype),
  )


def _choose(key, problem: Problem, quotas: np.ndarray, strategy: str) -> Chosen:
  """Rows of each group by a strategy other than "auto"."""
  m, ridge, scores = int(quotas.sum()), None, None
  mass = jnp.asarray(problem.weights, problem.points.dtype)
  if (quotas == np.bincount(problem.groups)).all():
    return Chosen(np.arange(m), mass)
  if strategy in ("uniform", "leverage", "krr_sensitivity", "lightweight"):
    probabilities, mix = mass, 0.0
    if strategy == "lightweight":
      probabilities = sensitivity.lightweight_sensitivities(problem.points, mass)
    elif strategy != "uniform":
      mix = UNIFORM_MIX
      ridge, scores = _scores(key, problem, m)
      probabilities = scores.leverage if strategy == "leverage" else scores.scores
    sample = draw(key, probabilities, problem.groups, quotas, mix, mass)
    return Chosen(np.asarray(sample.indices), sample.weights, ridge, scores)
  if strategy == "kmedoids":
    options = {"num_inits": 1, "max_iterations": _LLOYD_STEPS}
    found = strategies.cluster(
      key, problem.points, problem.groups, quotas, (strategy,), problem.weights, **options
    )[strategy]
    weights = jnp.concatenate([points.masses for points in found])
    return Chosen(np.concatenate([points.rows for points in found]), weights)
  rows = _by_group(key, problem, quotas, strategy)
  if strategy in _EQUAL_WEIGHTS:
    masses = np.bincount(problem.groups, weights=problem.weights)
    weights = jnp.asarray(np.repeat(masses / quotas, quotas), mass.dtype)
  else:
    weights = jnp.concatenate(
      strategies.nearest_masses(problem.points, problem.groups, rows, problem.weights)
    )
  return Chosen(np.concatenate(rows), weights)


def draw(key, scores, groups, quotas, mix, mass) -> sampling.Sample:
  """Distinct rows of each group by score, with weights u / (inclusion probability)."""
  draws.check_distinct(scores, int(quotas.max()), mix, mass)
  return sampling.draw_quotas(keys.stream(key, "sample"), scores, groups, quotas, mix, False, mass)


def _by_group(key, problem: Problem, quotas, strategy: str) -> list[np.ndarray]:
  """Rows of each group, for strategies without weights of their own."""
  data = problem.points, problem.groups, quotas
  if strategy == "kmeans_plusplus":
    found = strategies.cluster(key, *data, (strategy,), problem.weights)
    return [points.rows for points in found[strategy]]
  if strategy in ("herding", "k_center"):
    return strategies.greedy(strategy, *data, problem.weights)
  targets = problem.targets if problem.kind == "real" else None
  if strategy == "kernel_thinning":
    return thinning.thin_groups(
      key, problem.kernel_fn, problem.x, problem.groups, quotas, problem.weights, targets
    )
  if strategy == "kernel_herding":
    return [
      rows[
        np.asarray(
          representatives.padded_kernel_herding(
            problem.kernel_fn,
            int(quotas.max()),
            problem.x[padded],
            mass > 0,
            mass,
            None if targets is None else targets[padded],
          )
        )[:quota]
      ]
      for (rows, padded, mass), quota in zip(
        strategies.padded_groups(problem.groups, problem.weights, problem.x.dtype), quotas
      )
    ]
  m = int(quotas.sum())
  result = pursuit.krr_pursuit(
    keys.stream(key, "pursuit"),
    problem.kernel_fn,
    problem.x,
    problem.targets,
    min(max(_POOL, m), problem.weights.size),
    m,
    coreset.objective_ridge(problem.kernel_fn, problem.x),
    quota=jnp.asarray(np.resize(quotas, problem.targets.shape[1]))
    if problem.kind == "classes"
    else None,
    weights=jnp.asarray(problem.weights, problem.x.dtype),
  )
  checks.raise_for_status("krr_pursuit", result.status)
  chosen = np.asarray(result.indices)
  return [chosen[problem.groups[chosen] == c] for c in range(quotas.size)]


def _operations(problem: Problem, m: int, strategy: str) -> float:
  """A rough count of the operations of a strategy."""
  n, p = problem.points.shape
  if strategy == "kmedoids":
    return 2.0 * n * m * p * (_LLOYD_STEPS / 2 + 2)
  return 0.0


def _best(key, problem: Problem, quotas) -> tuple[str, Chosen, dict[str, float]]:
  """The choice of "auto": its strategy, the rows, and the measured errors."""
  m = int(quotas.sum())
  affordable = lambda name: _operations(problem, m, name) <= AUTO_OPERATIONS
  if problem.kind == "none":
    strategy = "kmedoids" if affordable("kmedoids") else "lightweight"
    return strategy, _choose(key, problem, quotas, strategy), {}
  best: tuple[float, str, Any] = (np.inf, "", None)
  objectives: dict[str, float] = {}
  for strategy in filter(affordable, AUTO_CANDIDATES):
    try:
      chosen = _choose(key, problem, quotas, strategy)
    except NumericalError:
      continue
    error, ridge = _measured(problem, chosen)
    if error < best[0]:
      best = (error, strategy, chosen._replace(ridge=ridge))
    if np.isfinite(error):
      objectives[strategy] = error
  if best[2] is None:
    raise NumericalError(
      "auto: no candidate has a kernel matrix that can be factorized; use another strategy, or float64"
    )
  return best[1], best[2], objectives


def _measured(problem: Problem, chosen: Chosen) -> tuple[float, float]:
  """The smallest error of weighted ridge regression over AUTO_RIDGES, and the absolute ridge."""
  stride = max(1, -(-problem.weights.size // _OBJECTIVE_ROWS))
  rows = slice(None, None, stride)
  mass = jnp.asarray(problem.weights[rows], problem.x.dtype)
  support = problem.x[chosen.rows]
  # lambda / (sum of weights) = r (mean diagonal) / m
  unit = float(jnp.mean(gram_diag(problem.kernel_fn, support))) * problem.weights.sum()
  ridges = np.asarray(AUTO_RIDGES) * unit / chosen.rows.size
  errors = _weighted_errors(
    problem.kernel_fn,
    support,
    problem.targets[chosen.rows],
    chosen.weights.astype(problem.x.dtype),
    jnp.asarray(ridges, problem.x.dtype),
    problem.x[rows],
    problem.targets[rows],
    mass / jnp.sum(mass),
    problem.kind == "classes",
    max(256, min(2**23 // chosen.rows.size, 4096)),
  )
  errors = np.where(np.isfinite(errors), errors, np.inf)
  return float(errors.min()), float(ridges[errors.argmin()])


@functools.partial(jax.jit, static_argnames=("kernel_fn", "classes", "block_size"))
def _weighted_errors(kernel_fn, x, y, weights, ridges, xt, yt, ut, classes, block_size):
  """Error rate (classes) or squared error on weighted rows at each ridge; NaN if a fit fails."""
  root = jnp.sqrt(weights)[:, None]
  k = kernel_fn(x, None).astype(y.dtype)

  def fit(ridge):
    f = linalg.factor(root * k * root.T, ridge)
    return (root * linalg.solve(f, root * y).astype(y.dtype)).astype(y.dtype)

  dual = jax.lax.map(fit, ridges)

  def error(block, present):
    rows, labels, share = block
    entries = kernel_fn(rows, x).astype(y.dtype)

    def one(dual):
      predicted = linalg.matmul(entries, dual)
      if classes:
        wrong = jnp.argmax(predicted, axis=1) != jnp.argmax(labels, axis=1)
        lost = wrong.astype(y.dtype) + 0 * jnp.sum(predicted, axis=1)  # NaN if the fit failed
      else:
        lost = jnp.sum((predicted - labels) ** 2, axis=1)
      return jnp.sum(jnp.where(present, share * lost, 0))

    return jax.lax.map(one, dual)

  return blocks.sum_row_blocks(error, (xt, yt, ut), block_size)


def _scores_of_all(scores, merged, mass) -> sensitivity.SensitivityScores:
  """Scores of all rows as given: equal rows share the score in proportion to their weights."""
  place = np.maximum(merged.place, 0)
  part = np.where(merged.place >= 0, mass / merged.weights[place], 0)
  share = jnp.asarray(part, scores.scores.dtype)
  spread = lambda values: share * values[place]
  return scores._replace(
    scores=spread(scores.scores),
    leverage=spread(scores.leverage),
    label_scores=spread(scores.label_scores),
  )
