"""The scikit-learn interface: estimator checks, and selected rows in front of estimators with sample weights."""

import numpy as np
import pytest
from helpers import assert_close
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import kipcore
from kipcore.sklearn import CoresetEstimator, CoresetSampler

X, Y = make_classification(300, 6, n_informative=4, random_state=0)
REAL = X @ np.arange(6.0) + 0.1 * np.random.default_rng(0).normal(size=300)


# All rows are selected, so that nothing is compiled for the many shapes of the checks.
@pytest.mark.parametrize(
  "estimator",
  [
    CoresetSampler(0.999, "uniform", random_state=0),
    CoresetEstimator(
      LogisticRegression(tol=1e-8), CoresetSampler(0.999, "uniform", random_state=0)
    ),
  ],
  ids=["sampler", "estimator"],
)
@pytest.mark.filterwarnings("ignore")
def test_estimator_checks(estimator):
  results = check_estimator(estimator, on_fail=None, on_skip=None)
  failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
  assert not failed and sum(r["status"] == "passed" for r in results) > 40


def test_the_sampler_returns_what_select_returns():
  sampler = CoresetSampler(30, strategy="uniform", random_state=3)
  points, labels = sampler.fit_resample(X, np.array(["no", "yes"])[Y])
  seed = int(np.random.RandomState(3).randint(2**31 - 1))
  chosen = kipcore.select(seed, X, Y, 30, strategy="uniform")
  np.testing.assert_array_equal(sampler.sample_indices_, chosen.indices)
  np.testing.assert_array_equal(points, X[chosen.indices])  # of the type of X, unchanged
  assert (
    points.dtype == X.dtype
    and labels.tolist() == np.array(["no", "yes"])[Y][chosen.indices].tolist()
  )
  assert_close(sampler.sample_weight_, chosen.weights, 1e-6)
  assert sampler.get_params()["size"] == 30 and sampler.n_features_in_ == 6
  no_labels = CoresetSampler(30, "uniform", random_state=3).fit_resample(X.tolist())
  assert len(no_labels[0]) == 30 and no_labels[1] is None


def test_models_of_weighted_rows_are_close_to_that_of_all_rows():
  """The documented uses: fit with the weights, or put `CoresetEstimator` into a pipeline."""
  sampler = CoresetSampler(60, "lightweight", random_state=0)
  points, labels = sampler.fit_resample(X, Y)
  model = LogisticRegression().fit(points, labels, sample_weight=sampler.sample_weight_)
  full = LogisticRegression().fit(X, Y)
  assert model.score(X, Y) > full.score(X, Y) - 0.1 > 0.6
  both = CoresetEstimator(LogisticRegression(), sampler).fit(X, Y)
  assert_close(both.predict_proba(X), model.predict_proba(X), 1e-6)
  assert both.classes_.tolist() == [0, 1] and both.score(X, Y) == model.score(X, Y)
  pipeline = make_pipeline(StandardScaler(), both)
  assert cross_val_score(pipeline, X, Y, cv=2).mean() > 0.6


def test_input_weights_and_regression_targets():
  sampler = CoresetSampler(20, "uniform", task="regression", random_state=0)
  weights = np.where(np.arange(300) < 200, 0.0, 2.0)
  sampler.fit_resample(X, np.round(REAL), sample_weight=weights)
  assert sampler.sample_indices_.min() >= 200
  assert_close(sampler.sample_weight_, np.full(20, 10.0), 1e-5)
  assert CoresetSampler(0.1, "uniform").fit(X, REAL).sample_indices_.size == 30
  regression = CoresetEstimator(Ridge(), CoresetSampler(30, "uniform", random_state=0))
  assert regression.fit(X, REAL).score(X, REAL) > 0.9
  assert not hasattr(regression, "predict_proba")


@pytest.mark.parametrize(
  "sampler, message",
  [
    (
      CoresetSampler(301),
      "size: expected at most the number of rows of positive weight, 300, got 301",
    ),
    (CoresetSampler(1.5), r"size: expected a number of rows or a fraction in \(0, 1\), got 1.5"),
    (CoresetSampler(True), "size: expected a positive integer, got True"),
    (CoresetSampler(9, kernel="cubic"), "kernel: expected one of rbf, linear"),
    (CoresetSampler(9, strategy="all"), "strategy: expected one of"),
    (CoresetSampler(9, task="rank"), "task: expected one of"),
  ],
)
def test_invalid_parameters(sampler, message):
  with pytest.raises((ValueError, TypeError), match=message):
    sampler.fit(X, Y)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(y=0 * Y), "y: expected at least 2 classes, got only class 0; omit y to select without"),
    (dict(y=0.5 + 0 * REAL), "y: expected targets that differ, got the constant 0.5; omit y"),
    (dict(y=np.where(REAL > 0, np.nan, REAL)), "NaN"),
    (dict(X=np.where(X > 0, np.nan, X)), "NaN"),
    (dict(X=np.full((300, 2), "text")), "could not convert string"),
    (dict(sample_weight=np.zeros(300)), "at least one non-zero number"),
    (dict(sample_weight=-np.ones(300)), "weights: expected values >= 0"),
  ],
)
def test_invalid_data(change, message):
  """Constant targets and a single class are refused with the remedy; others as scikit-learn does."""
  with pytest.raises((ValueError, TypeError), match=message):
    CoresetSampler(9, "uniform").fit(**{"X": X, "y": Y, **change})
