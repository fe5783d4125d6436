"""`measure_rows`: the MMD is a double sum, models are those of scikit-learn, memory is that of blocks."""

import numpy as np
import pytest
from helpers import assert_close
from sklearn.linear_model import LogisticRegression, Ridge

import kipcore
from kipcore.selection import rows_certificate

RNG = np.random.default_rng(0)
N, M, T = 60, 12, 40
X = (RNG.normal(size=(N + T, 3)) * [1.0, 3.0, 10.0] + 5).astype("f4")
REAL = ((X - 5) @ np.array([1.0, -1.0, 0.5]) + RNG.normal(size=N + T)).astype("f4")
CLASSES = (REAL > np.quantile(REAL, 0.3)).astype(int) + (REAL > np.quantile(REAL, 0.7))
MASS = RNG.integers(0, 4, N).astype("f4")
INDICES = RNG.permutation(np.flatnonzero(MASS))[:M]
WEIGHTS = RNG.uniform(0.5, 2, M).astype("f4")


class Blocks:
  """Rows that remember the largest slice that was read."""

  def __init__(self, x):
    self.x, self.shape, self.most = x, x.shape, 0

  def __getitem__(self, part):
    if isinstance(part, slice):
      self.most = max(self.most, part.stop - part.start)
    return self.x[part]


def moments(mass):
  mean = np.average(X[:N].astype("f8"), axis=0, weights=mass)
  return mean, np.sqrt(np.average((X[:N] - mean) ** 2, axis=0, weights=mass))


def shares(indices, weights, mass):
  u, w = mass.astype("f8"), np.bincount(indices, weights=weights, minlength=N)
  return u / u.sum(), w / w.sum()


def gram(mass):
  bandwidth = np.sqrt((moments(mass)[1] ** 2).sum())
  x = X[:N].astype("f8")
  return np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / (2 * bandwidth**2))


def test_mmd_is_the_double_sum():
  found = kipcore.measure_rows(0, X[:N], None, INDICES, WEIGHTS, input_weights=MASS)
  u, w = shares(INDICES, WEIGHTS, MASS)
  k = gram(MASS)
  assert_close(found.mmd, np.sqrt((u - w) @ k @ (u - w)), 1e-4)
  assert_close(found.random_mmd, np.sqrt((u @ np.diag(k) - u @ k @ u) / M), 1e-4)
  assert found.exact and found.ridge_error is None and found.num_test_rows == 0
  assert (found.num_rows, found.num_samples, found.measured_rows) == (N, M, N)
  assert_close([found.total_weight, found.selected_weight], [MASS.sum(), WEIGHTS.sum()], 1e-6)


def test_the_mean_square_of_the_mmd_of_random_rows_is_the_one_reported():
  k, u = gram(np.ones(N)), np.full(N, 1 / N)
  drawn = RNG.integers(0, N, (4000, M))
  w = np.stack([np.bincount(row, minlength=N) / M for row in drawn]) - u
  squares = np.einsum("si,ij,sj->s", w, k, w)
  found = kipcore.measure_rows(0, X[:N], None, INDICES, WEIGHTS)
  error = squares.std() / np.sqrt(len(squares))
  assert abs(found.random_mmd**2 - squares.mean()) < 4 * error


def test_mmd_from_draws_of_the_rows_is_too_large_by_a_known_amount():
  low = np.argsort(REAL[:N])[:M]
  u, w = shares(low, WEIGHTS, MASS)
  square = (u - w) @ gram(MASS) @ (u - w)
  found = [
    kipcore.measure_rows(seed, X[:N], None, low, WEIGHTS, input_weights=MASS, max_rows=50)
    for seed in range(30)
  ]
  excess = [one.random_mmd**2 * M / 50 for one in found]
  squares = np.array([one.mmd**2 for one in found]) - excess
  assert not found[0].exact and found[0].measured_rows == 50 and squares.std() > 0
  assert abs(squares.mean() - square) < 4 * squares.std() / np.sqrt(30) < 0.5 * square
  exact = kipcore.measure_rows(0, X[:N], None, low, WEIGHTS, input_weights=MASS)
  spread = np.std([one.random_mmd**2 for one in found]) / np.sqrt(30)
  assert abs(np.mean([one.random_mmd**2 for one in found]) - exact.random_mmd**2) < 4 * spread


@pytest.mark.parametrize("kind", ["real", "classes"])
def test_errors_are_those_of_scikit_learn(kind):
  """On given test rows, from blocks of rows with a transform and input weights."""
  y = REAL if kind == "real" else CLASSES
  source = Blocks(2 * X[:N] + 1)
  found = kipcore.measure_rows(
    0,
    source,
    y[:N],
    INDICES,
    WEIGHTS,
    input_weights=MASS,
    x_test=X[N:],
    y_test=y[N:],
    transform=lambda block: (block - 1) / 2,
    penalty=0.1,
    block_size=7,
  )
  assert source.most == 7 and found.num_test_rows == T and not found.held_out
  mean, std = moments(MASS)
  z = (X - mean) / std
  hot = np.eye(3)[CLASSES]
  variance = np.average((REAL[:N] - np.average(REAL[:N], weights=MASS)) ** 2, weights=MASS)
  for suffix, rows, weights in (("", INDICES, WEIGHTS), ("_all", np.arange(N), MASS)):
    ridge = Ridge(alpha=0.1 * weights.sum())
    if kind == "real":
      ridge.fit(z[rows], REAL[rows], sample_weight=weights)
      expected = np.mean((ridge.predict(z[N:]) - REAL[N:]) ** 2) / variance
    else:
      ridge.fit(z[rows], hot[rows], sample_weight=weights)
      expected = np.mean(ridge.predict(z[N:]).argmax(1) != CLASSES[N:])
      logistic = LogisticRegression(C=1 / (0.1 * weights.sum()))
      logistic.fit(z[rows], CLASSES[rows], sample_weight=weights)
      assert_close(
        getattr(found, f"logistic_error{suffix}"), 1 - logistic.score(z[N:], CLASSES[N:]), 1e-6
      )
    assert_close(getattr(found, f"ridge_error{suffix}"), expected, 1e-4)
  assert found.error == ("squared error" if kind == "real" else "error rate")
  assert (found.logistic_error is None) == (kind == "real")


def test_all_rows_have_no_mmd_and_equal_errors():
  live = RNG.permutation(np.flatnonzero(MASS))
  for y in (REAL, CLASSES):
    found = kipcore.measure_rows(
      0, X[:N], y[:N], live, MASS[live], input_weights=MASS, x_test=X[N:], y_test=y[N:]
    )
    assert found.mmd < 1e-6 < found.random_mmd
    assert_close(found.ridge_error, found.ridge_error_all, 1e-10)
    assert found.logistic_error == found.logistic_error_all


def test_held_out_rows_are_in_no_training_set(monkeypatch):
  """A fifth of the rows that were not selected; their labels enter only the errors."""
  trained = []
  sums = rows_certificate.ridge_sums
  monkeypatch.setattr(
    rows_certificate, "ridge_sums", lambda x, t, w: trained.append((x, w)) or sums(x, t, w)
  )
  found = kipcore.measure_rows(0, X[:N], CLASSES[:N], INDICES, WEIGHTS, block_size=N)
  assert found.held_out and found.num_test_rows == (N - M) // 5
  (_, everything), *others = trained
  assert (everything == 0).sum() == found.num_test_rows and (everything[INDICES] > 0).all()
  assert all((weights[everything == 0] == 0).all() for _, weights in others)
  assert 0 <= found.ridge_error <= 1 and 0 <= found.logistic_error_random <= 1
  assert found.as_dict()["num_test_rows"] == found.num_test_rows
  whole = kipcore.measure_rows(0, X[:N], REAL[:N], np.arange(N), np.ones(N, "f4"))
  assert whole.num_test_rows == 0 and whole.ridge_error is None


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(indices=INDICES + N), "indices: expected a value in"),
    (dict(indices=WEIGHTS), "indices: expected at least one integer"),
    (dict(weights=-WEIGHTS), "weights: expected values >= 0"),
    (dict(weights=0 * WEIGHTS), "weights: expected at least one value > 0, got zeros"),
    (dict(x_test=X[N:]), "expected x_test and y_test together"),
    (dict(x_test=X[N:, :2], y_test=REAL[N:]), "x_test: expected shape"),
    (dict(y=np.ones(N, "f4")), "y: expected targets that differ"),
    (dict(penalty=0.0), "penalty: expected"),
    (dict(max_rows=0), "max_rows: expected a positive integer"),
    (dict(input_weights=0 * MASS), "weights: expected at least one value > 0"),
    (dict(x=np.where(X[:N] > 0, X[:N], np.nan)), "x: expected finite values"),
  ],
)
def test_invalid_input(change, message):
  arguments = {"x": X[:N], "y": REAL[:N], "indices": INDICES, "weights": WEIGHTS, **change}
  with pytest.raises((ValueError, TypeError), match=message):
    kipcore.measure_rows(0, **arguments)
