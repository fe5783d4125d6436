"""`select`: weights are multiplicities, labels of every kind, sizes, and what `auto` measures."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, slow_except

import kipcore
from kipcore.selection import clustering, coreset, duplicates, representatives, rows

RNG = np.random.default_rng(0)
N, M = 60, 12
CLASSES = np.arange(N) % 10 // 4  # of 24, 24 and 12 rows
X = (RNG.normal(size=(N, 3)) + 2 * np.eye(3)[CLASSES]).astype("f4")
REAL = (X @ np.array([1.0, -1.0, 0.5]) + 0.1 * RNG.normal(size=N)).astype("f4")
COUNTS = RNG.integers(0, 4, N)
COPIES = np.repeat(np.arange(N), COUNTS)
UNBIASED = ("uniform", "leverage", "krr_sensitivity", "lightweight")
LABELS = {"classes": CLASSES, "real": REAL, "none": None}
CASES = [
  *(("classes", strategy) for strategy in rows.STRATEGIES),
  *(
    ("real", strategy)
    for strategy in ("krr_sensitivity", "herding", "kernel_herding", "kernel_thinning")
  ),
  *(("none", strategy) for strategy in ("uniform", "leverage", "lightweight", "k_center")),
]


def of(array, index):
  return None if array is None else array[index]


# `auto` chooses among other strategies.
@pytest.mark.parametrize(
  "kind, strategy", slow_except(CASES, *(case for case in CASES if case[1] != "auto"))
)
def test_repeated_rows_equal_weighted_rows(kind, strategy):
  """Rows with their counts as weights give the rows and weights of as many copies, and a valid result."""
  y = LABELS[kind]
  weighted = kipcore.select(0, X, y, M, strategy=strategy, weights=COUNTS.astype("f4"))
  repeated = kipcore.select(0, X[COPIES], of(y, COPIES), M, strategy=strategy)
  np.testing.assert_array_equal(COPIES[repeated.indices], weighted.indices)
  assert_close(repeated.weights, weighted.weights, 1e-6)
  chosen, w = weighted.indices, np.asarray(weighted.weights)
  assert len(set(chosen.tolist())) == M and (COUNTS[chosen] > 0).all() and (w > 0).all()
  np.testing.assert_array_equal(weighted.x, X[chosen])
  assert weighted.y.shape == ((M, 0) if y is None else (M,))
  if y is not None:
    np.testing.assert_array_equal(weighted.y, y[chosen])
  if kind == "classes":
    mass = np.bincount(CLASSES, weights=COUNTS)
    quotas = np.bincount(CLASSES[chosen])
    assert (np.diff(CLASSES[chosen]) >= 0).all() and np.abs(
      quotas - M * mass / mass.sum()
    ).max() < 1
    if weighted.strategy not in UNBIASED:
      assert_close(np.bincount(CLASSES[chosen], weights=w), mass, 1e-5)
  if weighted.scores is not None:  # of all rows as given; copies share the score of their row
    assert weighted.ridge > 0
    total = np.bincount(COPIES, weights=repeated.scores.scores, minlength=N)
    assert_close(total, weighted.scores.scores, 1e-5)
    assert_close(total.sum(), weighted.scores.total, 1e-5)
  uses = strategy == "auto" or strategy in rows.USES_KERNEL
  assert (weighted.kernel_fn is not None) == uses


def test_scaled_input_weights_scale_the_weights_of_the_result():
  u = COUNTS.astype("f4")
  one, ten = (
    kipcore.select(0, X, REAL, M, strategy="krr_sensitivity", weights=scale * u)
    for scale in (1, 10)
  )
  np.testing.assert_array_equal(one.indices, ten.indices)
  assert_close(ten.weights, 10 * np.asarray(one.weights), 1e-4)
  assert_close(ten.ridge, 10 * one.ridge, 1e-3)


def test_scores_of_weighted_rows_are_sums_over_copies(x64):
  """Without merging: the automatic ridge, the sensitivities and those of k-means."""
  x, y, u = X.astype("f8"), REAL[:, None].astype("f8"), COUNTS.astype("f8")
  kernel, live = kipcore.rbf_fn(2.0), np.flatnonzero(COUNTS)
  weighted = coreset.score_rows(0, x[live], y[live], M, kernel, "auto", jnp.asarray(u[live]))
  copies = coreset.score_rows(0, x[COPIES], y[COPIES], M, kernel)
  assert_close(weighted[0], copies[0], 1e-6)
  sums = lambda scores: np.bincount(COPIES, weights=scores, minlength=N)[live]
  assert_close(sums(copies[1].scores), weighted[1].scores, 1e-6)
  light = kipcore.lightweight_sensitivities
  assert_close(sums(light(x[COPIES])), light(x[live], u[live]), 1e-10)


def test_pursuit_with_weights_is_that_of_copies(x64):
  x, y, u = X.astype("f8"), np.eye(3)[CLASSES] - 1 / 3, COUNTS.astype("f8")
  pool, kernel = np.arange(0, N, 3), kipcore.rbf_fn(2.0)
  quota = np.array([1, 3, 2])
  weighted = kipcore.krr_pursuit(0, kernel, x, y, pool, 6, 0.1, quota=quota, weights=u)
  copies = kipcore.krr_pursuit(
    0, kernel, x[COPIES], y[COPIES], x[pool], 6, 0.1, quota=quota, classes=CLASSES[pool]
  )
  np.testing.assert_array_equal(weighted.indices, pool[np.asarray(copies.indices)])
  assert_close(weighted.objectives, copies.objectives, 1e-8)
  np.testing.assert_array_equal(np.bincount(CLASSES[np.asarray(weighted.indices)]), quota)


@pytest.mark.parametrize("with_targets", [False, True])
def test_kernel_herding_minimizes_the_mmd_greedily(with_targets, x64):
  x, u = X[:20].astype("f8"), COUNTS[:20] + 1.0
  t = REAL[:20, None].astype("f8") if with_targets else None
  k = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 8)
  k = k * (1 + REAL[:20, None] * REAL[None, :20]) if with_targets else k
  mean, chosen = u / u.sum(), []
  for size in range(1, 6):

    def mmd2(i):
      w = np.bincount([*chosen, i], minlength=20) / size - mean
      return w @ k @ w

    chosen.append(min((i for i in range(20) if i not in chosen), key=mmd2))
  found = kipcore.kernel_herding(kipcore.rbf_fn(2.0), x, 5, weights=u, targets=t)
  assert found.tolist() == chosen
  if not with_targets:  # with the linear kernel: herding
    linear = kipcore.kernel_herding(kipcore.linear_fn(), x - u @ x / u.sum(), 5, weights=u)
    assert linear.tolist() == representatives.herding(x, 5, weights=u).tolist()


def test_stratified_sample_with_weights_is_unbiased():
  u, f = jnp.asarray(COUNTS, "f4"), RNG.normal(size=N) + 2
  scores = jnp.asarray(RNG.uniform(0.1, 1, N).astype("f4")) * u
  totals = []
  for seed in range(100):
    sample = kipcore.stratified_sample(
      seed, scores, CLASSES, M, uniform_mix=0.1, replace=False, input_weights=u
    )
    totals.append(np.sum(np.asarray(sample.weights) * f[np.asarray(sample.indices)]))
  error = np.std(totals) / np.sqrt(100)
  assert abs(np.mean(totals) - COUNTS @ f) < 4 * error and error < 0.05 * abs(COUNTS @ f)


def test_unused_clusters_have_no_rows():
  """With `count` below the number of centers, the first ones are a fixed point of Lloyd's algorithm."""
  result = clustering.padded_kmeans(
    kipcore.keys.canonical_key(0), jnp.asarray(X), 6, jnp.asarray(COUNTS, "f4"), 4, 2, 1
  )
  nearest = ((X[:, None] - np.asarray(result.centers)[None, :4]) ** 2).sum(-1).argmin(1)
  np.testing.assert_array_equal(result.assignment, nearest)
  means = [np.average(X[nearest == c], axis=0, weights=COUNTS[nearest == c]) for c in range(4)]
  assert_close(result.centers[:4], means, 1e-4)


def test_labels_are_read_by_their_type():
  hot = np.eye(3, dtype="f4")[CLASSES]
  for y in (CLASSES, hot, hot.astype(int), hot.astype(bool), hot - 1 / 3, CLASSES.astype(np.int8)):
    labels = rows.read_labels(y, N)
    np.testing.assert_array_equal(labels.classes, CLASSES)
  assert rows.read_labels(np.array([7, 3]), 2).names.tolist() == [3, 7]
  assert rows.read_labels(CLASSES > 0, N).names.tolist() == [False, True]
  for y in (REAL, CLASSES.astype("f4"), np.stack([REAL, -REAL], 1), 2 * hot, hot[:, :1]):
    assert rows.read_labels(y, N).real.shape == (N, y.size // N)
  half = jnp.asarray(X, jnp.bfloat16)
  assert kipcore.select(0, half, CLASSES, M, strategy="uniform").x.dtype == jnp.float32
  by_type = [kipcore.select(0, X, y, M, strategy="uniform") for y in (CLASSES, hot)]
  np.testing.assert_array_equal(by_type[0].indices, by_type[1].indices)
  assert by_type[1].y.shape == (M, 3)


@pytest.mark.parametrize(
  "kwargs, quotas",
  [
    (dict(size=15), [6, 6, 3]),
    (dict(size=15, allocation="balanced"), [5, 5, 5]),
    (dict(size=50, allocation="balanced"), [19, 19, 12]),  # the smallest class has 12 rows
    (dict(size_per_class=2), [2, 2, 2]),
  ],
)
def test_sizes_of_classes(kwargs, quotas):
  limit, per_class = kwargs.get("size", kwargs.get("size_per_class")), "size" not in kwargs
  allocation = kwargs.get("allocation", "proportional")
  found = rows.class_sizes(CLASSES, np.ones(N), limit, per_class, allocation, None)
  assert found.tolist() == quotas


def test_weights_of_classes_of_one_size():
  chosen = kipcore.select(0, X, CLASSES, size_per_class=4, strategy="uniform")
  assert np.bincount(CLASSES[chosen.indices]).tolist() == [4, 4, 4]
  assert_close(np.bincount(CLASSES[chosen.indices], weights=chosen.weights), [24, 24, 12], 1e-5)


def test_sizes_by_sensitivity_follow_the_scores():
  chosen = kipcore.select(0, X, CLASSES, M, strategy="krr_sensitivity", allocation="sensitivity")
  totals = np.bincount(CLASSES, weights=chosen.scores.scores)
  expected = M * totals / totals.sum()
  assert np.abs(np.bincount(CLASSES[chosen.indices]) - expected).max() < 1


def test_all_distinct_rows_are_kept_if_there_are_too_few():
  x, y = np.repeat(X[:6], 5, axis=0), np.repeat([0, 0, 0, 0, 1, 1], 5)
  with pytest.warns(UserWarning, match="number of distinct rows, got 8"):
    chosen = kipcore.select(0, x, y, 8, strategy="krr_sensitivity")
  assert (
    chosen.indices.tolist() == [0, 5, 10, 15, 20, 25] and (np.asarray(chosen.weights) == 5).all()
  )
  with pytest.warns(UserWarning, match="of each class"):
    chosen = kipcore.select(0, x, y, size_per_class=3, strategy="uniform")
  assert np.bincount(y[chosen.indices]).tolist() == [3, 2]
  assert_close(chosen.weights, [20 / 3] * 3 + [5] * 2, 1e-5)


@pytest.mark.parametrize("kind", ["classes", "real"])
def test_auto_is_not_worse_than_uniform_by_its_measure(kind):
  y, u = LABELS[kind], COUNTS / COUNTS.sum()
  chosen = kipcore.select(0, X, y, M, weights=COUNTS.astype("f4"))
  assert set(chosen.objectives) == set(rows.AUTO_CANDIDATES) and chosen.ridge > 0
  assert chosen.objectives[chosen.strategy] == min(chosen.objectives.values())
  # The same error by weighted ridge regression in float64.
  x, points = X.astype("f8"), np.asarray(chosen.x, "f8")
  if kind == "classes":
    targets = np.eye(3)[CLASSES] - 1 / 3
  else:
    targets = (REAL - u @ REAL)[:, None] / np.sqrt(u @ (REAL - u @ REAL) ** 2)
  width = chosen.kernel_fn.bandwidth
  k = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * width**2))
  fitted = k(points, points) + chosen.ridge * np.diag(1 / np.asarray(chosen.weights, "f8"))
  predicted = k(x, points) @ np.linalg.solve(fitted, targets[chosen.indices])
  if kind == "classes":
    lost = predicted.argmax(1) != CLASSES
  else:
    lost = ((predicted - targets) ** 2).sum(1)
  assert_close(chosen.objectives[chosen.strategy], u @ lost, 1e-4)
  assert width == pytest.approx(np.sqrt(u @ ((X - u @ X) ** 2).sum(1)), rel=1e-5)


def test_weights_of_one_hot_labels_can_be_absorbed():
  chosen = kipcore.select(0, X, np.eye(3, dtype="f4")[CLASSES], M, strategy="krr_sensitivity")
  support, _ = kipcore.absorb_weights(chosen.kernel_fn, chosen, chosen.ridge, 1e-2)
  fit = kipcore.krr_fit(chosen.kernel_fn(support.x), support.y, 1e-2)
  weighted = kipcore.krr_fit(chosen.kernel_fn(chosen.x), chosen.y, chosen.ridge / chosen.weights)
  assert_close(fit.dual, weighted.dual, 1e-2)
  with pytest.raises(ValueError, match="one-hot or real labels"):
    kipcore.absorb_weights(
      chosen.kernel_fn, dataclasses.replace(chosen, y=chosen.y[:, 0]), 1.0, 1.0
    )


U = np.ones(N, "f4")


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(strategy="best"), "strategy: expected one of"),
    (dict(strategy="krr_sensitivity", y=None), "y: expected labels for strategy 'krr_sensitivity'"),
    (dict(strategy="krr_pursuit", y=None), "strategies without labels are auto, uniform, leverage"),
    (dict(size=N + 1), "size: expected at most the number of rows of positive weight, 60, got 61"),
    (dict(size=11, weights=np.eye(N, dtype="f4")[:10].sum(0)), "positive weight, 10, got 11"),
    (dict(size=2), "size: expected at least one row for each of 3 classes, got 2"),
    (dict(size=0), "size: expected a positive integer, got 0"),
    (dict(size=None), "expected either size or size_per_class"),
    (dict(size_per_class=3), "expected either size or size_per_class"),
    (dict(size=None, size_per_class=13), "at most the 12 rows of the smallest class, 2, got 13"),
    (dict(size=None, size_per_class=2, y=REAL), "size_per_class: expected y with classes"),
    (dict(allocation="balanced", y=REAL), "allocation: expected 'proportional' unless"),
    (dict(allocation="equal"), "allocation: expected one of"),
    (dict(weights=0 * U), "weights: expected at least one value > 0, got zeros"),
    (dict(weights=-U), "weights: expected values >= 0, got -1"),
    (dict(weights=U[:3]), r"weights: expected shape \(60,\)"),
    (dict(weights=np.nan * U), "weights: expected finite values"),
    (dict(y=0 * CLASSES), "y: expected at least 2 classes, got only class 0"),
    (dict(y=3 + 0 * REAL), "y: expected targets that differ, got the constant 3.0"),
    (dict(y=np.where(REAL > 0, REAL, np.nan)), "y: expected finite values, got"),
    (dict(y=CLASSES.astype(str)), "y: expected floats .* or integers .*, got <U"),
    (dict(y=CLASSES[:9]), r"y: expected shape \(60,\)"),
    (dict(y=np.stack([CLASSES, CLASSES], 1)), "y: expected one-hot rows or floats"),
    (dict(x=X.astype(int)), "x: expected a floating dtype"),
    (dict(x=X.astype(str)), "x: expected a floating dtype, got <U"),
    (dict(x=X[:, 0]), "x: expected at least one row"),
    (dict(x=np.where(X > 0, X, np.inf)), "x: expected finite values"),
  ],
)
def test_invalid_input_is_one_line(change, message):
  with pytest.raises((ValueError, TypeError), match=message) as error:
    kipcore.select(0, **{"x": X, "y": CLASSES, "size": M, "strategy": "uniform", **change})
  assert "\n" not in str(error.value)


def test_merging_equals_numpy_for_any_hash(monkeypatch):
  x = RNG.integers(-1, 2, (N, 2)) * 1.0
  x[x == 0] *= RNG.choice([-1.0, 1.0], (x == 0).sum())  # zeros of both signs
  y = RNG.integers(0, 2, N)
  both = np.column_stack([x + 0.0, y])
  distinct = np.unique(both[COUNTS > 0], axis=0)
  merged = duplicates.merge_rows([x, y], COUNTS.astype("f8"))
  assert len(merged.rows) == len(distinct) and (np.diff(merged.rows) > 0).all()
  for row, mass in zip(merged.rows, merged.weights):
    assert mass == COUNTS[(both == both[row]).all(1)].sum()
  live = COUNTS > 0
  assert (merged.place[~live] == -1).all()
  np.testing.assert_array_equal(both[merged.rows[merged.place[live]]], both[live])
  zeros = np.zeros((N, 2), np.uint64)
  monkeypatch.setattr(duplicates, "row_hashes", lambda array, seed: zeros)
  collided = duplicates.merge_rows([x, y], COUNTS.astype("f8"))  # equal hashes, rows are compared
  np.testing.assert_array_equal(both[collided.rows[collided.place[live]]], both[live])
  assert collided.weights.sum() == COUNTS.sum()
