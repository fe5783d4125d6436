"""The study of selected rows on small problems: its models, other packages, cells and tables."""

import json
import types

import numpy as np
import pytest
from helpers import standard_promotion
from sklearn.linear_model import Ridge

from experiments.docs import tables
from experiments.studies import selection, selection_data, selection_models, selection_packages

N = 120


def rows(classes: bool) -> selection_data.Rows:
  """Small training and test sets with two classes or real targets."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(N + 40, 3)).astype(np.float32)
  y = x[:, 0] + 0.1 * rng.normal(size=N + 40).astype(np.float32)
  y = (y > 0.3).astype(np.int32) if classes else y
  return selection_data.Rows(x[:N], y[:N], x[N:], y[N:])


@pytest.fixture(autouse=True)
def promotion():
  """The default of JAX, which optax and other packages need."""
  with standard_promotion():
    yield


@pytest.fixture
def study(tmp_path, monkeypatch):
  """The study on the small problem, as a function of `--strategies`; returns the content of its file."""
  monkeypatch.setattr(selection_data, "DATASETS", {"small": None})
  monkeypatch.setattr(selection_data, "load", lambda *_: rows(True))
  monkeypatch.setattr(selection, "FRACTIONS", (0.001, 0.1))
  monkeypatch.setitem(selection_models.NETWORK, "steps", 5)
  values = {
    "output": tmp_path / "result.json",
    "datasets": [],
    "fractions": [],
    "data_dir": None,
    "train_rows": 0,
  }

  def run(*strategies, num_seeds=2):
    chosen = types.SimpleNamespace(**values, strategies=strategies, num_seeds=num_seeds)
    monkeypatch.setattr(selection, "FLAGS", chosen)
    selection.main()
    return json.loads(values["output"].read_text())

  return run


def test_cells_are_added_and_never_repeated(study, capsys):
  first = study("uniform")
  assert list(first["cells"]) == ["small/all", "small/uniform/0.001", "small/uniform/0.1"]
  assert first["cells"]["small/uniform/0.001"] is None  # less than one row per class
  second = study("uniform", "sklearn_minibatch_kmeans", "sklearn_nystroem")
  assert all(second["cells"][name] == cell for name, cell in first["cells"].items())
  cell = second["cells"]["small/sklearn_minibatch_kmeans/0.1"]
  assert cell["size"] == 12 and [run["seed"] for run in cell["runs"]] == [0, 1]
  assert set(selection_models.MODELS) < set(cell["runs"][0])
  assert set(second["cells"]["small/sklearn_nystroem/0.1"]["runs"][0]) == {
    "seed",
    "seconds",
    "ridge",
  }
  table = tables.selection_table(second).splitlines()
  assert [line.split(" | ")[1] for line in table[2:5]] == list(selection_models.MODELS)
  assert table[2].startswith("| small, 12 of 120 | ridge | ") and table[2].count("±") == 3
  lines = tables.selection_strategies_table(second).splitlines()
  assert lines[2].startswith("| `sklearn_minibatch_kmeans` | 3 | ")
  with pytest.raises(ValueError, match="output: .* has the settings"):
    study("uniform", num_seeds=1)


def test_packages_that_are_not_installed_are_skipped(study, monkeypatch, capsys):
  absent = {"absent_method": ("package_that_does_not_exist", None)}
  monkeypatch.setattr(selection_packages, "SELECTIONS", absent)
  monkeypatch.setattr(selection_packages, "NAMES", ("absent_method",))
  content = study("absent_method", "uniform")
  assert not any("absent" in name for name in content["cells"])
  line = "absent_method: skipped, because package_that_does_not_exist is not installed\n"
  assert capsys.readouterr().out.count(line) == 1


def test_ridge_regression_is_that_of_scikit_learn():
  data, weights = rows(False), np.random.default_rng(1).random(N)
  found = selection_models.errors(0, data.x, data.y, weights, data)["ridge"]
  model = Ridge(alpha=selection_models.PENALTY * weights.sum())
  predicted = model.fit(data.x, data.y, sample_weight=weights).predict(data.x_test)
  np.testing.assert_allclose(
    found, np.mean((predicted - data.y_test) ** 2) / np.var(data.y_test), rtol=1e-5
  )


@pytest.mark.parametrize("classes", [False, True])
def test_the_network_reads_weights_as_numbers_of_equal_rows(classes, monkeypatch):
  monkeypatch.setitem(selection_models.NETWORK, "steps", 50)
  data = rows(classes)
  counts = np.arange(40) % 4
  _, targets = selection_models.coded(data.y[:40], data)
  train = lambda x, y, weights: selection_models.network_outputs(0, x, y, weights, data)
  weighted = train(data.x[:40], targets, counts.astype(float))
  x, y = (np.repeat(a, counts, axis=0) for a in (data.x[:40], targets))
  np.testing.assert_allclose(weighted, train(x, y, np.ones(len(x))), atol=1e-4)
  assert np.abs(weighted - train(data.x[:40], targets, np.ones(40))).max() > 0.01


@pytest.mark.parametrize("classes", [False, True])
def test_centers_have_the_mean_target_or_most_frequent_class_of_their_cluster(classes):
  data = rows(classes)
  x, y, weights = selection_packages.select("sklearn_minibatch_kmeans", 0, data, 10)
  nearest = np.argmin(((data.x[:, None] - x) ** 2).sum(axis=2), axis=1)
  np.testing.assert_array_equal(weights, np.bincount(nearest, minlength=len(x)))
  for center in range(len(x)):
    members = data.y[nearest == center]
    if classes:
      assert y[center] == np.bincount(members).argmax()
    else:
      np.testing.assert_allclose(y[center], members.mean(), rtol=1e-4)


@pytest.mark.parametrize("name", selection_packages.SELECTIONS)
@pytest.mark.parametrize("classes", [False, True])
def test_selections_of_other_packages(name, classes):
  if selection_packages.missing(name):
    pytest.skip(f"{selection_packages.missing(name)} is not installed")
  data = rows(classes)
  x, y, weights = selection_packages.select(name, 0, data, 12)
  assert x.shape == (12, 3) and y.shape == (12,)
  assert len(np.unique(x, axis=0)) == 12
  np.testing.assert_allclose(weights.sum(), N)
  if classes:  # the weights of a class are the numbers of its rows
    np.testing.assert_allclose(np.bincount(y, weights=weights), np.bincount(data.y))
