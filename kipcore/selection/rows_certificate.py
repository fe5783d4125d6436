"""Measured error of weighted rows of any data: MMD to all rows, and errors of models trained on them."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from kipcore import blocks, checks, keys
from kipcore.kernels import rbf_fn
from kipcore.kernels.gram import gram_diag, gram_matvec
from kipcore.selection import rows as row_selection
from kipcore.selection import sampling, streamed_rows
from kipcore.types import ArrayLike, KernelFn

# Models are trained for rows of at most this many numbers, because ridge regression needs their square.
MODEL_COLUMNS = 4096
MODELS = ("ridge", "logistic")
_TEST_FRACTION = 0.2
_LOGISTIC_STEPS = 200
_PADDED = 1024  # numbers of rows are rounded up to a multiple, for fewer compilations


@dataclasses.dataclass(frozen=True)
class RowsCertificate:
  """Measured error of weighted rows, as plain Python values.

  "All" are models trained on all rows, "random" those trained on as many rows drawn in proportion to
  the weights. Errors are None if they were not measured.

  Attributes:
    num_rows: n.
    num_samples: m.
    total_weight, selected_weight: sums of the weights of all rows and of the selected rows.
    mmd: maximum mean discrepancy between all rows and the selected rows, both with weights of sum 1.
    random_mmd: root mean square of the MMD of m rows drawn in proportion to the weights.
    exact: whether all rows were used for `mmd` and `logistic_error_all`. Otherwise
      `measured_rows` were drawn, and `mmd` is too large: its mean square is that of the MMD plus
      random_mmd^2 m / measured_rows.
    measured_rows: see `exact`.
    held_out: whether the test rows are rows of x that were not selected; otherwise they were given.
    num_test_rows: rows on which the errors were measured.
    error: what the errors are: "error rate", or "squared error" divided by the variance of the targets.
    ridge_error, ridge_error_all, ridge_error_random: of ridge regression.
    logistic_error, logistic_error_all, logistic_error_random: of logistic regression, for classes.
  """

  num_rows: int
  num_samples: int
  total_weight: float
  selected_weight: float
  mmd: float
  random_mmd: float
  exact: bool
  measured_rows: int
  held_out: bool
  num_test_rows: int = 0
  error: str | None = None
  ridge_error: float | None = None
  ridge_error_all: float | None = None
  ridge_error_random: float | None = None
  logistic_error: float | None = None
  logistic_error_all: float | None = None
  logistic_error_random: float | None = None

  def as_dict(self) -> dict:
    """The fields as a dictionary that can be written as JSON."""
    return dataclasses.asdict(self)


class _Weights(NamedTuple):
  """What each of some rows counts in the MMD and in the training sets of the models.

  Attributes:
    rows: `(k,)` ascending indices of all rows that are read; the other arrays are `(k,)`, too.
    population: weights of all rows, or numbers of draws.
    selected, random: weights of the selected rows, and numbers of draws of as many random ones.
    train: `population` without the test rows.
    test: weights of the test rows.
  """

  rows: np.ndarray
  population: np.ndarray
  selected: np.ndarray
  random: np.ndarray
  train: np.ndarray
  test: np.ndarray


def measure_rows(
  key,
  x: Any,
  y: Shaped[ArrayLike, "n ..."] | None,
  indices: Int[ArrayLike, " m"],
  weights: Float[ArrayLike, " m"],
  *,
  input_weights: Float[ArrayLike, " n"] | None = None,
  x_test: Float[ArrayLike, "t ..."] | None = None,
  y_test: Shaped[ArrayLike, "t ..."] | None = None,
  kernel_fn: KernelFn | None = None,
  transform: Callable | None = None,
  penalty=1e-3,
  max_rows: int = 20_000,
  block_size: int = 4096,
) -> RowsCertificate:
  """Measures what weighted rows, such as those of `select`, lose against all rows.

      MMD^2 = || sum_i u_i k(x_i, .) / sum_i u_i - sum_j w_j k(x_{i_j}, .) / sum_j w_j ||^2

  For labels, ridge regression (on one-hot labels for classes) and, for classes, logistic regression of
  scikit-learn are trained on the weighted rows, on all rows, and on as many random rows. Columns are
  standardized with the moments of all rows; the penalty is `penalty` per unit of weight, without the
  intercept. Errors are weighted means over test rows.

  Without `x_test` a fifth of the rows that were not selected (at most max_rows / 2) is held out of all
  three models. The selection may have depended on these rows, and rows like the selected ones are missing
  among them, which matters if a large part of the rows is selected. For an unbiased error, split the
  rows before the selection and pass `x_test`.

  Everything here is measured, nothing is proved. For f in the kernel's space the error of the weighted
  mean is at most ||f|| MMD (exact, by the Cauchy-Schwarz inequality).

  Args:
    key: random key (or int seed) of held-out rows, random rows and samples.
    x: `(n, ...)` rows: an array, or an object with `shape` that supports slices and ascending integer
      arrays as indices. It is read three times, in blocks; about 1.5 max_rows + 2 m rows are held.
    y: labels as for `select`, or None for the MMD alone.
    indices: `(m,)` selected rows.
    weights: `(m,)` their weights, >= 0.
    input_weights: `(n,)` weights u of all rows; None for 1.
    x_test, y_test: `(t, ...)` rows and their labels that are not among x; transformed already.
    kernel_fn: kernel of the MMD; None for `rbf_fn` with bandwidth sqrt(tr Cov(x)), as in `select`.
    transform: function that converts a block of `x` to floating rows; None if they are floating.
    penalty: > 0.
    max_rows: with more rows, the MMD and logistic regression use this many draws of rows instead of
      all. Ridge regression always uses all rows.
    block_size: number of rows that are read at a time.

  Returns:
    `RowsCertificate`. Cost: (max_rows + m)^2 kernel entries, n d^2 operations for d columns, and one
    logistic regression on max_rows rows. Rows of more than MODEL_COLUMNS numbers have no models.

  Raises:
    ValueError, TypeError: for invalid rows, labels or weights as `select`, indices out of range, or one
      of `x_test` and `y_test` without the other.

  Example:
    >>> x = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    >>> chosen = kipcore.select(0, x, size=20, strategy="kernel_thinning")
    >>> measured = kipcore.measure_rows(0, x, None, chosen.indices, chosen.weights)
    >>> measured.exact, measured.mmd < 0.3 * measured.random_mmd
    (True, True)
  """
  checks.positive("penalty", penalty)
  max_rows, block_size = checks.positive_ints(max_rows=max_rows, block_size=block_size)
  given = x_test is not None
  if given != (y_test is not None) or (given and y is None):
    raise ValueError("expected x_test and y_test together, and only with y")
  n, exact = x.shape[0], x.shape[0] <= max_rows
  mass = row_selection.input_weights(input_weights, n)
  indices, own = _subset(indices, weights, n)
  read = lambda part: streamed_rows.read_block(x, part, transform)
  moments = streamed_rows.moments_of(read, n, mass, block_size)
  used = _draw(key, mass, indices, own, not given and y is not None, max_rows)
  points = read(used.rows)
  if kernel_fn is None:
    kernel_fn = rbf_fn(float(np.sqrt(moments.variance.sum())) or 1.0)
  found: dict[str, Any] = _discrepancies(
    kernel_fn, points, used, indices.size, None if exact else max_rows
  )
  if y is not None and points[0].size <= MODEL_COLUMNS:
    tested = _test_rows(x_test, points) if given else points[used.test > 0]
    found |= _errors(read, points, tested, used, mass, moments, y, y_test, penalty, block_size)
  return RowsCertificate(
    num_rows=n,
    num_samples=indices.size,
    total_weight=float(mass.sum()),
    selected_weight=float(own.sum()),
    exact=exact,
    measured_rows=n if exact else max_rows,
    held_out=not given,
    **found,
  )


def _subset(indices, weights, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices, ascending, and their weights in float64."""
  indices = np.asarray(indices)
  checks.rank("indices", indices, 1)
  if indices.dtype.kind not in "iu" or not indices.size:
    raise ValueError(
      f"indices: expected at least one integer, got shape {indices.shape} of {indices.dtype}"
    )
  checks.in_range("indices", indices, 0, n - 1)
  checks.weights("weights", weights, indices.size, jnp.float32)
  weights = np.asarray(weights, np.float64)
  if not weights.any():
    raise ValueError("weights: expected at least one value > 0, got zeros")
  order = np.argsort(indices, kind="stable")
  return indices[order], weights[order]


def _draw(key, mass, indices, own, hold_out: bool, max_rows: int) -> _Weights:
  """Held-out rows, random rows and, if there are more than `max_rows`, draws of all rows."""
  n = mass.size
  draws = lambda name, weights, count: np.bincount(
    sampling.sensitivity_sample(
      keys.stream(key, name), jnp.asarray(weights / weights.max(), jnp.float32), count
    ).indices,
    minlength=n,
  )
  selected = np.bincount(indices, weights=own, minlength=n)
  test = np.zeros(n)
  if hold_out:
    free = np.flatnonzero((mass > 0) & (np.bincount(indices, minlength=n) == 0))
    count = min(int(_TEST_FRACTION * free.size), max_rows // 2)
    order = np.asarray(jax.random.permutation(keys.stream(key, "test"), free.size))
    test[free[order[:count]]] = mass[free[order[:count]]]
  population = mass if n <= max_rows else draws("rows", mass, max_rows)
  random = draws("random", np.where(test > 0, 0, mass), indices.size)
  train = np.where(test > 0, 0, population)
  rows = np.flatnonzero((population > 0) | (selected > 0) | (random > 0) | (test > 0))
  return _Weights(rows, *(a[rows] for a in (population, selected, random, train, test)))


def _discrepancies(kernel_fn, points, used: _Weights, m: int, num_draws: int | None) -> dict:
  """The MMD of the selected rows, and the root mean square of that of random ones."""
  size = -(-used.rows.size // _PADDED) * _PADDED
  pad = lambda a: np.concatenate([a, np.zeros(size - a.size)])
  population = pad(used.population / used.population.sum())
  difference = population - pad(used.selected / used.selected.sum())
  points = jnp.asarray(blocks.pad_rows(points, size))
  columns = jnp.asarray(np.stack([difference, population], axis=1), points.dtype)
  products = np.asarray(gram_matvec(kernel_fn, points, points, columns), np.float64)
  diagonal = population @ np.asarray(gram_diag(kernel_fn, points), np.float64)
  square, mean = difference @ products[:, 0], population @ products[:, 1]
  if num_draws is not None:
    mean -= (diagonal - mean) / max(num_draws - 1, 1)  # without the pairs of a draw and itself
  return {
    "mmd": float(np.sqrt(max(float(square), 0.0))),
    "random_mmd": float(np.sqrt(max(float(diagonal - mean), 0.0) / m)),
  }


def _errors(
  read, points, tested, used: _Weights, mass, moments, y, y_test, penalty, block_size
) -> dict:
  """Errors of both models on the test rows, as fields of the certificate."""
  n, given = mass.size, y_test is not None
  y = np.concatenate([np.asarray(y), np.asarray(y_test)]) if given else np.asarray(y)
  every = np.concatenate([mass, np.zeros(y.shape[0] - n)])
  labels = row_selection.read_labels(y, y.shape[0], every > 0)
  codes, targets = row_selection.groups_and_targets(
    labels, np.arange(every.size), every / every.sum(), np.float64
  )
  test = np.arange(n, every.size) if given else used.rows[used.test > 0]
  shares = np.ones(test.size) if given else mass[test]
  if not test.size:
    return {}
  center, scale = streamed_rows.standardization(moments)
  columns = lambda block: (block.reshape(len(block), -1) - center) / scale
  points, tested = columns(points), columns(tested)
  classes = labels.classes is not None

  def error(predicted) -> float:
    if classes:
      lost = predicted != codes[test]
    else:
      lost = np.sum((predicted - targets[test]) ** 2, axis=1)
    return float(shares @ lost / shares.sum())

  train = mass.copy()
  train[used.rows[used.test > 0]] = 0
  parts = blocks.row_slices(n, block_size)
  everything = (ridge_sums(columns(read(part)), targets[part], train[part]) for part in parts)
  sets = {"": used.selected, "_random": used.random}
  sums = {
    "_all": functools.reduce(lambda a, b: tuple(map(np.add, a, b)), everything),
    **{name: ridge_sums(points, targets[used.rows], weights) for name, weights in sets.items()},
  }
  found: dict[str, Any] = {
    "num_test_rows": int(test.size),
    "error": "error rate" if classes else "squared error",
  }
  for name, terms in sums.items():
    coefficients, intercept = ridge_solution(terms, penalty)
    predicted = tested @ coefficients + intercept
    found[f"ridge_error{name}"] = error(predicted.argmax(axis=1) if classes else predicted)
  if classes:
    for name, weights in {**sets, "_all": used.train}.items():
      live = weights > 0
      model = logistic_regression(points[live], codes[used.rows[live]], weights[live], penalty)
      found[f"logistic_error{name}"] = error(model(tested))
  return found


def ridge_sums(x, targets, weights) -> tuple[Any, ...]:
  """Sums of the weights, columns, targets and their products over rows, for ridge regression."""
  weighted = weights[:, None] * x
  return (
    weights.sum(),
    weighted.sum(axis=0),
    weights @ targets,
    weighted.T @ x,
    weighted.T @ targets,
  )


def ridge_solution(sums: tuple[Any, ...], penalty: float) -> tuple[np.ndarray, np.ndarray]:
  """Coefficients `(d, c)` and intercept `(c,)` of ridge regression, from the sums over rows."""
  total = sums[0]
  x, targets, squares, products = (a / total for a in sums[1:])
  covariance = squares - np.outer(x, x) + penalty * np.eye(x.size)
  coefficients = np.linalg.solve(covariance, products - np.outer(x, targets))
  return coefficients, targets - x @ coefficients


def logistic_regression(x, codes, weights, penalty) -> Callable[[np.ndarray], np.ndarray]:
  """Prediction of classes by logistic regression; constant if there is a single class."""
  from sklearn.linear_model import LogisticRegression

  if (codes == codes[0]).all():
    return lambda rows: np.full(len(rows), codes[0])
  model = LogisticRegression(C=1 / (penalty * weights.sum()), max_iter=_LOGISTIC_STEPS)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about steps; their limit is the same for every set
    return model.fit(x, codes, sample_weight=weights).predict


def _test_rows(x_test, points) -> np.ndarray:
  """Test rows of the shape of the others, checked."""
  checks.floating("x_test", x_test)
  checks.finite("x_test", x_test)
  checks.shape("x_test", x_test, (None, *points.shape[1:]))
  return np.asarray(x_test)
