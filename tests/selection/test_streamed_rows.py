"""`stream_select`: the selection of `select`, from blocks of rows."""

import numpy as np
import pytest
from helpers import assert_close

import kipcore
from kipcore.selection import duplicates, streamed_rows

RNG = np.random.default_rng(0)
N, M = 60, 12
X = np.concatenate([RNG.normal(size=(40, 3)), RNG.normal(size=(20, 3)) + 4]).astype("f4")
REAL = (X @ np.array([1.0, -1.0, 0.5]) + 0.1 * RNG.normal(size=N)).astype("f4")
COUNTS = RNG.integers(0, 4, N).astype("f4")
COPIES = np.repeat(np.arange(N), COUNTS.astype(int))
CLASSES = np.arange(N) % 2


class Blocks:
  """Rows that remember the largest block that was read."""

  def __init__(self, x):
    self.x, self.shape, self.most = x, x.shape, 0

  def __getitem__(self, part):
    block = self.x[part]
    self.most = max(self.most, len(block))
    return block


@pytest.mark.parametrize("strategy", ["uniform", "lightweight"])
@pytest.mark.parametrize("y", [None, CLASSES, REAL], ids=["none", "classes", "real"])
def test_the_rows_are_those_of_select(strategy, y):
  source = Blocks(X)
  streamed = kipcore.stream_select(
    0, source, y, M, strategy=strategy, weights=COUNTS, block_size=25
  )
  whole = kipcore.select(0, X, y, M, strategy=strategy, weights=COUNTS)
  np.testing.assert_array_equal(streamed.indices, whole.indices)
  assert_close(streamed.weights, whole.weights, 1e-5)
  np.testing.assert_array_equal(streamed.x, whole.x)
  assert source.most == 25
  repeated = kipcore.stream_select(
    0, X[COPIES], None if y is None else y[COPIES], M, strategy=strategy, block_size=25
  )
  np.testing.assert_array_equal(COPIES[repeated.indices], streamed.indices)
  assert_close(repeated.weights, streamed.weights, 1e-5)


def test_scores_of_weighted_blocks_are_exact_if_all_rows_are_landmarks():
  """Scores, ridge, rows and weights of the in-memory function, with a transform and zero weights."""
  source = Blocks(2 * X + 1)
  streamed = kipcore.stream_select(
    0,
    source,
    REAL,
    M,
    strategy="krr_sensitivity",
    weights=COUNTS,
    transform=lambda block: (block - 1) / 2,
    block_size=25,
  )
  whole = kipcore.select(0, X, REAL, M, strategy="krr_sensitivity", weights=COUNTS)
  assert_close(streamed.ridge, whole.ridge, 1e-3)
  assert_close(streamed.scores.scores, whole.scores.scores, 1e-4)
  np.testing.assert_array_equal(streamed.indices, whole.indices)
  assert (np.asarray(streamed.scores.scores)[COUNTS == 0] == 0).all()
  assert streamed.kernel_fn.bandwidth == pytest.approx(whole.kernel_fn.bandwidth, rel=1e-5)


def test_moments_of_blocks_are_those_of_all_rows():
  moments = None
  for part in (slice(0, 7), slice(7, 30), slice(30, 60)):
    moments = streamed_rows.block_moments(moments, X[part] + 1000, COUNTS[part].astype("f8"))
  mean = np.average(X.astype("f8"), axis=0, weights=COUNTS)
  assert_close(moments.mean, np.float32(1000) + mean, 1e-6)
  variance = np.average((X - mean) ** 2, axis=0, weights=COUNTS)
  assert_close(moments.variance, variance, 1e-3)  # of float32 rows near 1000
  assert moments.total == COUNTS.sum()


def test_hashes_of_equal_rows_are_equal_and_of_others_differ():
  x = np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
  merged = duplicates.merge_hashes(duplicates.row_hashes(x, 0), np.array([1.0, 2, 3, 4, 0]))
  assert merged.rows.tolist() == [0, 2, 3] and merged.weights.tolist() == [3, 3, 4]
  assert merged.place.tolist() == [0, 0, 1, 2, -1]
  many = np.arange(20000.0).reshape(-1, 2)
  assert np.unique(duplicates.row_hashes(many, 1)[:, 0]).size == 10000


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(strategy="kmedoids"), "strategy: expected one of uniform, lightweight"),
    (dict(strategy="krr_sensitivity"), "y: expected labels for strategy"),
    (dict(size=N + 1), "size: expected at most"),
    (dict(x=np.where(np.arange(N)[:, None] == 30, np.nan, X)), "in rows 25 to 49"),
    (dict(x=X.astype(int)), "x: expected a floating dtype"),
    (dict(weights=0 * COUNTS), "weights: expected at least one value > 0"),
    (dict(y=np.ones(N, "f4")), "y: expected targets that differ"),
  ],
)
def test_invalid_input(change, message):
  with pytest.raises((ValueError, TypeError), match=message):
    kipcore.stream_select(0, **{"x": X, "size": M, "block_size": 25, **change})
