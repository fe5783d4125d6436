"""scikit-learn interface of `kipcore.select`: a sampler, and an estimator that is fitted on its rows.

Import it as `kipcore.sklearn`; `import kipcore` does not import scikit-learn.
"""

from numbers import Integral, Real

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from kipcore import checks
from kipcore.kernels import linear_fn
from kipcore.selection import rows

__all__ = ["CoresetEstimator", "CoresetSampler"]

_KERNELS = ("rbf", "linear")
_TASKS = ("auto", "classification", "regression")


class CoresetSampler(BaseEstimator):
  """Selects weighted rows with `kipcore.select`, with the interface of imbalanced-learn's samplers.

  The rows are for estimators that accept sample weights: fit them with
  `sample_weight=sampler.sample_weight_`, or use `CoresetEstimator`.

  Parameters:
    size: number of rows, or a fraction in (0, 1) of the rows given (at least one for each class).
    strategy: see `kipcore.select`.
    kernel: "rbf" (bandwidth sqrt(tr Cov(X))), "linear", or a function as `kipcore.types.KernelFn`.
    random_state: int, RandomState or None, as in scikit-learn.
    allocation: how `size` is divided among classes, see `kipcore.select`.
    task: "classification" (y are classes of any type), "regression", or "auto", which reads y as
      scikit-learn's `type_of_target`: floats that are not all integers are real targets.

  Attributes:
    sample_indices_: `(m,)` selected rows, in the order of the result.
    sample_weight_: `(m,)` float64, the number of rows that each one represents.
    strategy_: the strategy; for "auto", the one that was chosen.
    n_features_in_, feature_names_in_: as in scikit-learn.
  """

  def __init__(
    self,
    size=0.1,
    strategy="auto",
    kernel="rbf",
    random_state=None,
    allocation="proportional",
    task="auto",
  ):
    self.size = size
    self.strategy = strategy
    self.kernel = kernel
    self.random_state = random_state
    self.allocation = allocation
    self.task = task

  def fit(self, X, y=None, sample_weight=None):
    """Selects rows of X; see `fit_resample`.

    Args:
      X: `(n, d)` numbers, an array or a data frame.
      y: `(n,)` or `(n, q)` classes or targets, or None.
      sample_weight: `(n,)` weights >= 0 of the rows, or None.

    Returns:
      The sampler itself.

    Raises:
      ValueError, TypeError: for invalid parameters or data; see `kipcore.select`.
    """
    options = {"dtype": [np.float64, np.float32], "ensure_min_samples": 2}
    if y is None:
      data, labels = validate_data(self, X, **options), None
    else:
      data, labels = validate_data(self, X, y, multi_output=True, y_numeric=False, **options)
      labels = self._labels(np.asarray(labels))
    if sample_weight is not None:
      sample_weight = _check_sample_weight(sample_weight, data, dtype=np.float64)
    if not callable(self.kernel):
      checks.one_of("kernel", self.kernel, _KERNELS)
    seed = int(check_random_state(self.random_state).randint(2**31 - 1))
    chosen = rows.select(
      seed,
      data,
      labels,
      self._size(len(data) if sample_weight is None else np.sum(sample_weight > 0), labels),
      strategy=self.strategy,
      kernel_fn={"rbf": None, "linear": linear_fn()}.get(self.kernel, self.kernel)
      if isinstance(self.kernel, str)
      else self.kernel,
      weights=sample_weight,
      allocation=self.allocation,
    )
    self.sample_indices_ = np.asarray(chosen.indices, np.int64)
    self.sample_weight_ = np.asarray(chosen.weights, np.float64)
    self.strategy_ = chosen.strategy
    return self

  def fit_resample(self, X, y=None, sample_weight=None):
    """Selects rows.

    Args:
      X: `(n, d)` numbers, an array or a data frame.
      y: `(n,)` or `(n, q)` classes or targets, or None.
      sample_weight: `(n,)` weights >= 0 of the rows, or None.

    Returns:
      `(X_resampled, y_resampled)`, of the types of X and y (None for None). The weights are
      `sample_weight_`.

    Raises:
      ValueError, TypeError: as `fit`.
    """
    self.fit(X, y, sample_weight)
    return self._rows(X), self._rows(y)

  def _rows(self, data):
    """The selected rows of an array, a data frame, a list, or another object that is an array."""
    if data is None:
      return None
    if not isinstance(data, (list, np.ndarray)) and not hasattr(data, "iloc"):
      data = np.asarray(data)
    return _safe_indexing(data, self.sample_indices_)

  def _labels(self, y: np.ndarray) -> np.ndarray:
    """Class codes as integers, or real targets as floats."""
    checks.one_of("task", self.task, _TASKS)
    kind = self.task
    if kind == "auto":
      real = type_of_target(y, input_name="y").startswith("continuous")
      kind = "regression" if real else "classification"
    if kind == "regression":
      return y.astype(np.float64)
    if y.ndim == 2 and y.shape[1] > 1:  # one-hot, or several labels of each row
      y = np.unique(y, axis=0, return_inverse=True)[1]
    return np.unique(y, return_inverse=True)[1].reshape(-1)

  def _size(self, n: int, labels) -> int:
    """The number of rows."""
    fraction = isinstance(self.size, Real) and not isinstance(self.size, (Integral, bool))
    if not fraction:
      return checks.positive_int("size", self.size)
    if not 0 < self.size < 1:
      raise ValueError(
        f"size: expected a number of rows or a fraction in (0, 1), got {self.size!r}"
      )
    classes = 1 if labels is None or labels.dtype.kind == "f" else int(labels.max()) + 1
    return min(n, max(round(self.size * n), classes))


def _has(name: str):
  """Whether the estimator, fitted or not, has a method."""

  def check(self) -> bool:
    getattr(getattr(self, "estimator_", self.estimator), name)
    return True

  return check


class CoresetEstimator(MetaEstimatorMixin, BaseEstimator):
  """An estimator that is fitted on weighted rows that a `CoresetSampler` selects.

  It can be the last step of a pipeline. Prediction methods are those of the estimator.

  Parameters:
    estimator: estimator whose `fit` accepts `sample_weight`.
    sampler: `CoresetSampler`, or None for its default.

  Attributes:
    estimator_: the fitted estimator.
    sampler_: the fitted sampler.
  """

  def __init__(self, estimator, sampler=None):
    self.estimator = estimator
    self.sampler = sampler

  def fit(self, X, y=None, sample_weight=None):
    """Selects rows and fits the estimator on them.

    Args:
      X: `(n, d)` numbers.
      y: `(n,)` or `(n, q)` classes or targets, or None.
      sample_weight: `(n,)` weights >= 0 of the rows, or None.

    Returns:
      The estimator itself.

    Raises:
      ValueError, TypeError: as `CoresetSampler.fit`, and as the estimator.
    """
    self.sampler_ = CoresetSampler() if self.sampler is None else clone(self.sampler)
    points, labels = self.sampler_.fit_resample(X, y, sample_weight)
    weights = self.sampler_.sample_weight_
    self.estimator_ = clone(self.estimator).fit(points, labels, sample_weight=weights)
    return self

  @available_if(_has("predict"))
  def predict(self, X):
    """`predict` of the fitted estimator."""
    check_is_fitted(self, "estimator_")
    return self.estimator_.predict(X)

  @available_if(_has("predict_proba"))
  def predict_proba(self, X):
    """`predict_proba` of the fitted estimator."""
    check_is_fitted(self, "estimator_")
    return self.estimator_.predict_proba(X)

  @available_if(_has("decision_function"))
  def decision_function(self, X):
    """`decision_function` of the fitted estimator."""
    check_is_fitted(self, "estimator_")
    return self.estimator_.decision_function(X)

  @available_if(_has("score"))
  def score(self, X, y=None, sample_weight=None):
    """`score` of the fitted estimator."""
    check_is_fitted(self, "estimator_")
    weights = {} if sample_weight is None else {"sample_weight": sample_weight}
    return self.estimator_.score(X, y, **weights)

  @property
  def classes_(self):
    """Classes of the fitted estimator."""
    return self.estimator_.classes_

  @property
  def n_features_in_(self):
    """Number of columns."""
    return self.sampler_.n_features_in_

  def __sklearn_tags__(self):
    """Tags of the estimator: whether it is a classifier or a regressor."""
    from sklearn.utils import get_tags

    tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
    tags.estimator_type = inner.estimator_type
    tags.classifier_tags, tags.regressor_tags = inner.classifier_tags, inner.regressor_tags
    tags.target_tags = inner.target_tags
    return tags
