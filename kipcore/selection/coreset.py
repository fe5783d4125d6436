"""Selection of weighted rows or synthetic points by a named strategy.

`select_coreset` documents which strategies have proved guarantees.
"""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from kipcore import checks, keys
from kipcore.evaluation import krr as krr_evaluation
from kipcore.kernels.gram import gram_diag
from kipcore.selection import pursuit, sampling, sensitivity
from kipcore.selection import strategies as strategies_of_groups
from kipcore.selection.score_ridge import (
  AUTO_KAPPA,
  landmark_score_ridge,
  score_ridge_for_dimension,
)
from kipcore.types import Array, ArrayLike, KernelFn, NumericalError, Support

STRATEGIES = (
  "uniform",
  "krr_sensitivity",
  "kmeans",
  "kmedoids",
  "kmeans_plusplus",
  "krr_pursuit",
  "noise",
  "auto",
  "leverage",
  "herding",
  "k_center",
)
# Candidates of "auto". Noise is excluded because it cannot win, and strategies by score because
# they need their weights.
AUTO_CANDIDATES = ("uniform", "kmeans", "kmedoids", "kmeans_plusplus", "krr_pursuit")
NEEDS_KERNEL = ("krr_sensitivity", "leverage", "krr_pursuit", "auto")
# Ridge of objectives over all n rows (pursuit, label solve), as a fraction of the mean diagonal.
# The value is close to the best ridge for regression on all rows of natural image datasets.
OBJECTIVE_RIDGE = 0.1
_OBJECTIVE_ROWS = 10_000
EXACT_ROWS = 3_000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coreset:
  """Selected rows or synthetic points, grouped by class.

  Attributes:
    x: `(m, ...)` inputs.
    y: labels as given, `(m, c)` or (of `select`) `(m,)`, and `(m, 0)` without labels; the weights
      are not absorbed.
    indices: `(m,)` int32 rows of the data; -1 for synthetic points (centroids, noise).
    weights: `(m,)`, the number of rows that each point represents. 1 / (inclusion probability) for
      uniform, krr_sensitivity and leverage, so that weighted sums are unbiased; cluster sizes for
      kmeans and kmedoids, which sum to n; otherwise equal shares of the class, without a guarantee
      (`select` documents its own).
    strategy: the strategy; for "auto", the winning candidate. Static under `jit`.
    ridge: absolute score ridge of krr_sensitivity and leverage, otherwise None. For "auto" of
      `select`, the ridge at which the weighted regression on the points had the smallest error.
    scores: `SensitivityScores` of krr_sensitivity and leverage, otherwise None.
    objectives: for "auto", the measured objective of each candidate that could be fitted.
    kernel_fn: the kernel that `select` used, if any. Static under `jit`.
  """

  x: Float[Array, "m ..."]
  y: Shaped[Array, "m ..."]
  indices: Int[ArrayLike, " m"]
  weights: Float[Array, " m"]
  strategy: str = dataclasses.field(metadata={"static": True})
  ridge: float | Array | None = None
  scores: sensitivity.SensitivityScores | None = None
  objectives: dict = dataclasses.field(default_factory=dict)
  kernel_fn: KernelFn | None = dataclasses.field(default=None, metadata={"static": True})


def select_coreset(
  key,
  x: Float[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  images_per_class: int,
  strategy: str = "auto",
  kernel_fn: KernelFn | None = None,
  relative_ridge: float = 1e-6,
  score_ridge: float | str = "auto",
  num_candidates: int = 2000,
) -> Coreset:
  """Selects `images_per_class` points of each class.

  Strategies:
    uniform: distinct rows, drawn uniformly.
    krr_sensitivity: rows drawn systematically within each class, in proportion to (upper bounds on)
      the sensitivities of kernel ridge regression at the score ridge. The weights are
      1 / (inclusion probability), so weighted sums of any function are unbiased. `sample_size`
      proves error bounds for large m and draws with replacement, but not for a few images per
      class.
    leverage: the same with leverage scores, which do not depend on the labels.
    kmeans: centroids of each class (synthetic). The k-means cost is bounded by the seeding. That
      centroids are a good initialization for distillation is an empirical observation.
    kmedoids: the distinct rows nearest to these centroids.
    kmeans_plusplus: the k-means++ seeds of each class.
    herding, k_center: deterministic selection within each class, see `representatives`.
    krr_pursuit: greedy minimization of the ridge regression objective over all rows
      (`krr_pursuit`).
    noise: standard normal values.
    auto: the candidate of AUTO_CANDIDATES with the smallest `measured_objective`, the error rate of
      ridge regression on the given rows (at most 10,000 of them). By this measure it is never worse
      than uniform with the same key. Candidates that cannot be computed are skipped.

  If a class has fewer distinct rows than `images_per_class`, points are repeated and a warning is
  issued. Equal points share their weight.

  Args:
    key: random key (or int seed).
    x: `(n, ...)` floating rows, preprocessed.
    y: `(n, c)` labels; the index of the largest entry of a row is its class.
    images_per_class: number of points per class, >= 1.
    strategy: see above.
    kernel_fn: the kernel; required by krr_sensitivity, leverage, krr_pursuit and auto.
    relative_ridge: ridge at which "auto" compares candidates, as a fraction of tr(K_ss) / m.
    score_ridge: absolute ridge of the scores, or "auto" for the ridge at which the effective
      dimension is about `score_ridge.AUTO_KAPPA` m. At the training ridge all scores would be
      nearly equal.
    num_candidates: pool size of krr_pursuit, at most n.

  Returns:
    `Coreset`.

  Raises:
    ValueError, TypeError: for an unknown strategy, a missing kernel, a class with fewer rows than
      `images_per_class`, inconsistent shapes, integer arrays, or NaN or infinite values.
  """
  checks.one_of("strategy", strategy, STRATEGIES)
  checks.same_rows("x", x, "y", y)
  checks.rank("y", y, 2)
  for name, array in (("x", x), ("y", y)):
    checks.floating(name, array)
    checks.finite(name, array)
  if kernel_fn is None and strategy in NEEDS_KERNEL:
    raise ValueError(f"kernel_fn: expected a kernel for strategy {strategy!r}, got None")
  x, y = jnp.asarray(x), jnp.asarray(y)
  labels, num_classes = np.asarray(jnp.argmax(y, axis=1)), y.shape[1]
  images_per_class, num_candidates = checks.positive_ints(
    images_per_class=images_per_class, num_candidates=num_candidates
  )
  stream = keys.stream(key, "coreset")
  uniform = class_balanced_indices(stream, labels, images_per_class, num_classes)
  if strategy != "noise":
    _warn_of_repeats(x, labels, images_per_class)
  if strategy == "auto":
    return _best(key, x, y, images_per_class, kernel_fn, relative_ridge, num_candidates)
  share = jnp.repeat(
    jnp.asarray(np.bincount(labels, minlength=num_classes) / images_per_class, x.dtype),
    images_per_class,
  )
  if strategy == "uniform":
    return _rows(x, y, uniform, share, strategy)
  if strategy == "noise":
    noise = jax.random.normal(keys.stream(stream, "noise"), (uniform.size, *x.shape[1:]), x.dtype)
    return Coreset(noise, y[uniform], np.full(uniform.size, -1, np.int32), share, strategy)
  if strategy == "krr_pursuit":
    return _pursue(
      stream, x, y, images_per_class, kernel_fn, max(num_candidates, uniform.size), share
    )
  if strategy in ("krr_sensitivity", "leverage"):
    return _by_scores(stream, x, y, labels, uniform.size, kernel_fn, score_ridge, strategy)
  if strategy in ("herding", "k_center"):
    quotas = np.full(num_classes, images_per_class)
    chosen = np.concatenate(strategies_of_groups.greedy(strategy, x, labels, quotas))
    return dataclasses.replace(_rows(x, y, chosen, 1.0, strategy), weights=share)
  return _cluster(stream, x, y, labels, images_per_class, strategy)[0]


def scaled_to_rows(
  points: Float[ArrayLike, "m ..."], rows: Float[ArrayLike, "n ..."]
) -> Float[Array, "m ..."]:
  """Points with the root mean square norm of rows: p_i sqrt(mean_j ||x_j||^2) / ||p_i||.

  A centroid is shorter than the rows that it averages, by a factor of 20 for whitened CIFAR-10, because what
  distinguishes them cancels. Networks without normalization do not learn from such points beside real rows. A heuristic.

  Args:
    points: points; points of norm 0 are unchanged.
    rows: preprocessed rows of the same shape.

  Returns:
    `(m, ...)` points.

  Raises:
    ValueError, TypeError: for shapes that differ, empty or integer arrays.
  """
  points, rows = jnp.asarray(points), jnp.asarray(rows)
  for name, array in (("points", points), ("rows", rows)):
    checks.floating(name, array)
  checks.shape("points", points, (len(points), *rows.shape[1:]))
  return _scaled_to_rows(points, rows)


@jax.jit
def _scaled_to_rows(points, rows):
  lengths = jnp.sqrt(jnp.sum(jnp.square(points.reshape(len(points), -1)), axis=1))
  common = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(rows.reshape(len(rows), -1)), axis=1)))
  factors = jnp.where(lengths > 0, common / jnp.where(lengths > 0, lengths, 1), 1)
  return points * factors.reshape(-1, *(1,) * (points.ndim - 1))


def class_balanced_indices(key, labels, per_class: int, num_classes: int) -> np.ndarray:
  """Distinct rows of each class, drawn uniformly and grouped by class.

  Args:
    key: random key (or int seed).
    labels: `(n,)` integers in [0, num_classes).
    per_class: rows per class, >= 1.
    num_classes: c.

  Returns:
    `(c * per_class,)` int indices.

  Raises:
    ValueError: if a class has fewer rows than `per_class`; the message names the class.
  """
  per_class, num_classes = checks.positive_ints(per_class=per_class, num_classes=num_classes)
  labels = np.asarray(labels)
  checks.rank("labels", labels, 1)
  counts = np.bincount(labels, minlength=num_classes)
  short = np.flatnonzero(counts < per_class)
  if short.size:
    raise ValueError(
      f"images_per_class: expected at most the {counts[short].min()} rows of the smallest class, "
      f"got {per_class} ({short.size} of {num_classes} classes are smaller, the first is {short[0]})"
    )
  order = np.asarray(jax.random.permutation(keys.canonical_key(key), labels.shape[0]))
  return np.concatenate([order[labels[order] == c][:per_class] for c in range(num_classes)])


def _rows(x, y, rows, weights, strategy, **extra) -> Coreset:
  """Real rows, grouped by class."""
  rows = np.asarray(rows, np.int32)
  order = np.argsort(np.asarray(jnp.argmax(y[rows], axis=1)), kind="stable")
  weights = jnp.broadcast_to(jnp.asarray(weights, x.dtype), rows.shape)[order]
  return Coreset(x[rows[order]], y[rows[order]], rows[order], weights, strategy, **extra)


def _cluster(key, x, y, labels, per_class, *strategies) -> list[Coreset]:
  """Centroids, medoids or seeds of k-means per class."""
  classes = np.unique(labels)
  quotas = np.full(classes.size, per_class)
  targets = jnp.concatenate(
    [jnp.broadcast_to(y[labels == c][0], (per_class, y.shape[1])) for c in classes]
  )
  coresets = []
  for strategy, found in strategies_of_groups.cluster(key, x, labels, quotas, strategies).items():
    points, indices, masses = zip(*found)
    coresets.append(
      Coreset(
        jnp.concatenate(points).reshape(-1, *x.shape[1:]),
        targets,
        np.concatenate(indices),
        jnp.concatenate(masses),
        strategy,
      )
    )
  return coresets


def _warn_of_repeats(x, labels, per_class: int) -> None:
  """Issues a warning if a class has fewer distinct rows than requested points."""
  flat = np.asarray(x).reshape(x.shape[0], -1)
  few = {}
  for c in np.unique(labels):
    seen = set()
    for row in flat[labels == c]:
      seen.add(row.tobytes())
      if len(seen) >= per_class:
        break
    else:
      few[int(c)] = len(seen)
  if few:
    c, distinct = next(iter(few.items()))
    warnings.warn(
      f"images_per_class: expected at most the number of distinct rows of each class, got {per_class} for "
      f"{distinct} distinct rows of class {c} ({len(few)} such classes); points are repeated",
      UserWarning,
      stacklevel=3,
    )


def objective_ridge(kernel_fn: KernelFn, x: Array) -> float:
  """Absolute ridge of objectives over all rows: OBJECTIVE_RIDGE times the mean kernel diagonal.

  The mean is taken over at most 2,000 evenly spaced rows.

  Args:
    kernel_fn: the kernel.
    x: `(n, ...)` rows.

  Returns:
    The absolute ridge, a float.
  """
  stride = max(1, x.shape[0] // 1000)
  return float(OBJECTIVE_RIDGE * jnp.mean(gram_diag(kernel_fn, x[::stride])))


def _pursue(key, x, y, per_class, kernel_fn, num_candidates, share) -> Coreset:
  m = per_class * y.shape[1]
  result = pursuit.krr_pursuit(
    keys.stream(key, "pursuit"),
    kernel_fn,
    x,
    y,
    min(num_candidates, x.shape[0]),
    m,
    objective_ridge(kernel_fn, x),
    quota=per_class,
  )
  checks.raise_for_status(
    "krr_pursuit (are there enough distinct rows of each class?)", result.status
  )
  return dataclasses.replace(_rows(x, y, result.indices, 1.0, "krr_pursuit"), weights=share)


def num_score_columns(num_rows: int, num_samples: int) -> int:
  """Number of kernel columns that `score_rows` evaluates: landmarks, or all rows if n is small."""
  return num_rows if num_rows <= EXACT_ROWS else min(num_rows, max(2 * num_samples, 1000))


def score_rows(
  key,
  x: Array,
  y: Array,
  num_samples: int,
  kernel_fn: KernelFn,
  score_ridge="auto",
  weights: Array | None = None,
) -> tuple[float, sensitivity.SensitivityScores]:
  """Ridge regression sensitivities of all rows: exact for n <= 3,000, otherwise upper bounds.

  Args:
    key: random key (or int seed) for the landmarks.
    x, y, kernel_fn, score_ridge: as in `select_coreset`.
    num_samples: m, for the automatic ridge.
    weights: `(n,)` input weights >= 0, or None for 1.

  Returns:
    The absolute score ridge, and `SensitivityScores`.

  Raises:
    ValueError: for a score ridge <= 0.
    NumericalError: if a factorization fails.
  """
  n, num_samples = x.shape[0], checks.positive_int("num_samples", num_samples)
  num_landmarks = num_score_columns(n, num_samples)
  k = kernel_fn(x, None) if n <= EXACT_ROWS else None
  if score_ridge == "auto":
    target = min(max(AUTO_KAPPA * num_samples, 2.0), 0.5 * n)
    chosen = (
      score_ridge_for_dimension(k, target, weights)
      if k is not None
      else landmark_score_ridge(
        keys.stream(key, "ridge"), kernel_fn, x, target, num_landmarks, weights
      )
    )
    ridge = float(chosen.ridge)
    checks.finite(
      "ridge of the scores (x may contain numbers that are too large for the kernel)", ridge
    )
  else:
    checks.positive("score_ridge", score_ridge)
    ridge = float(score_ridge)
  if k is not None:
    scores = sensitivity.krr_sensitivity_scores(k, y, ridge, weights)
  else:
    scores = sensitivity.approximate_krr_sensitivities(
      keys.stream(key, "landmarks"), kernel_fn, x, y, ridge, num_landmarks, weights
    )
  checks.raise_for_status("krr_sensitivities", scores.status)
  return ridge, scores


def _by_scores(key, x, y, labels, m, kernel_fn, score_ridge, strategy) -> Coreset:
  ridge, scores = score_rows(key, x, y, m, kernel_fn, score_ridge)
  probabilities = scores.leverage if strategy == "leverage" else scores.scores
  sample = sampling.stratified_sample(
    keys.stream(key, "sample"), probabilities, labels, m, uniform_mix=0.1, replace=False
  )
  return _rows(x, y, sample.indices, sample.weights, strategy, ridge=ridge, scores=scores)


def measured_objective(
  kernel_fn: KernelFn, coreset: Coreset, x: ArrayLike, y: ArrayLike, relative_ridge: float = 1e-6
) -> float:
  """Error rate on the given rows of ridge regression on a coreset, the criterion of "auto".

  The squared error is less suitable: with few points the scale of the predictions is wrong, and a
  candidate with predictions near zero can have the smallest squared error.

  Args:
    kernel_fn: the kernel.
    coreset: a candidate; its weights are not used.
    x: `(n, ...)` rows; more than 10,000 are subsampled evenly.
    y: `(n, c)` labels.
    relative_ridge: ridge as a fraction of tr(K_ss) / m.

  Returns:
    The error rate; infinity if the kernel matrix cannot be factorized.
  """
  stride = max(1, -(-x.shape[0] // _OBJECTIVE_ROWS))
  result = krr_evaluation.evaluate_krr(
    kernel_fn,
    Support(coreset.x, coreset.y),
    x[::stride],
    y[::stride],
    relative_ridge=relative_ridge,
  )
  return 1.0 - float(result.accuracy) if int(result.status) == 0 else float("inf")


def auto_candidates(
  key,
  x: ArrayLike,
  y: ArrayLike,
  images_per_class: int,
  kernel_fn: KernelFn,
  num_candidates: int = 2000,
) -> dict[str, Coreset]:
  """The candidates of "auto": coresets of `select_coreset` for AUTO_CANDIDATES and the same key.

  Args:
    key, x, y, images_per_class, kernel_fn, num_candidates: as in `select_coreset`.

  Returns:
    Coresets by strategy, without candidates that cannot be computed. kmeans and kmedoids share one
    clustering.

  Raises:
    ValueError: as `select_coreset`.
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  select = lambda strategy: select_coreset(
    key, x, y, images_per_class, strategy, kernel_fn, num_candidates=num_candidates
  )
  found = {"uniform": select("uniform")}
  labels = np.asarray(jnp.argmax(y, axis=1))
  names = ("kmeans", "kmedoids", "kmeans_plusplus")
  found.update(
    zip(names, _cluster(keys.stream(key, "coreset"), x, y, labels, images_per_class, *names))
  )
  with contextlib.suppress(NumericalError):
    found["krr_pursuit"] = select("krr_pursuit")
  return found


def _best(key, x, y, per_class, kernel_fn, relative_ridge, num_candidates) -> Coreset:
  best: Coreset | None = None
  objectives: dict[str, float] = {}
  for strategy, candidate in auto_candidates(
    key, x, y, per_class, kernel_fn, num_candidates
  ).items():
    objective = measured_objective(kernel_fn, candidate, x, y, relative_ridge)
    if objective < min(objectives.values(), default=float("inf")):
      best = candidate
    if np.isfinite(objective):
      objectives[strategy] = objective
  if best is None:
    raise ValueError(
      "auto: no candidate has a kernel matrix that can be factorized; increase relative_ridge"
    )
  return dataclasses.replace(best, objectives=objectives)
