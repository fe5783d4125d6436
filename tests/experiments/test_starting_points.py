"""Initializations have the expected accuracy on real digits, and the experiment runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SHARED_DATA, needs, read_idx

import kipcore
from experiments.docs import tables
from experiments.studies import starting_points
from kipcore.cli.config import SelectConfig
from kipcore.selection import coreset
from kipcore.types import Support

NTK = kipcore.ntk_fn(kipcore.fc(1))


@pytest.fixture(scope="module")
def mnist():
  """3,000 training rows of MNIST and its test rows."""
  folder = needs(SHARED_DATA / "mnist")
  images, labels, x_test, y_test = (
    read_idx(folder / f"{name}-ubyte.gz")[:n]
    for name, n in (
      ("train-images-idx3", 3000),
      ("train-labels-idx1", 3000),
      ("t10k-images-idx3", 10_000),
      ("t10k-labels-idx1", 10_000),
    )
  )
  fitted = kipcore.fit_preprocess(images[..., None], "standardize")
  prepare = lambda x, y: (
    jnp.asarray(fitted.apply(x[..., None])).reshape(len(x), -1),
    jnp.asarray(kipcore.one_hot_centered(y, 10)),
  )
  return *prepare(images, labels), *prepare(x_test, y_test)


def accuracy(support, x, y):
  return float(kipcore.evaluate_krr(NTK, support, x, y, relative_ridge=1e-6).accuracy)


@pytest.mark.parametrize("per_class, least", [(1, 0.75), (10, 0.86)])
def test_class_centroids_of_mnist(mnist, per_class, least):
  x, y, *test = mnist
  chosen = kipcore.select_coreset(0, x, y, per_class, "kmeans")
  assert accuracy(Support(chosen.x, chosen.y), *test) >= least


def test_solved_labels_of_random_rows_of_mnist(mnist):
  x, y, *test = mnist
  scores = []
  for seed in range(3):
    chosen = kipcore.select_coreset(seed, x, y, 10, "uniform")
    used = float(kipcore.relative_ridge(NTK.diag(chosen.x), 1e-6))
    solved = kipcore.label_solve_rows(NTK, chosen.x, x, y, used, coreset.objective_ridge(NTK, x))
    scores.append(accuracy(Support(chosen.x, solved.labels), *test))
  assert np.mean(scores) >= 0.86


@pytest.mark.slow
def test_the_experiment_measures_every_strategy(tmp_path):
  config = SelectConfig(dataset="digits", images_per_class=2, validation_fraction=0.0)
  data = starting_points.load(config, 300)
  assert data.x_train.shape[0] == data.y_train.shape[0] == 300
  cell = starting_points.measure(data, config, range(2), 60)
  assert set(cell["summary"]) == set(starting_points.STRATEGIES) and len(cell["runs"]) == 2
  for run in cell["runs"]:
    by_strategy = run["strategies"]
    best = by_strategy["auto"]["chosen"]
    assert by_strategy["auto"]["one_hot"] == by_strategy[best]["one_hot"]
    chosen = kipcore.select_coreset(
      run["seed"], data.x_train, data.y_train, 2, "auto", data.kernel_fn, num_candidates=60
    )
    assert chosen.strategy == best
    assert chosen.objectives == {
      name: by_strategy[name]["objective"] for name in coreset.AUTO_CANDIDATES
    }
  cells = {
    f"digits-fc1-{20 * k}": {**cell, "config": dataclasses.asdict(config), "training_rows": 300}
    for k in (1, 2)
  }
  starting_points.save_picture(tmp_path / "picture.png", cells)
  assert (tmp_path / "picture.png").stat().st_size > 10_000
  table = tables.starting_points_table(
    {"cells": cells, "environment": {"hardware": {"cpu_cores": 2}, "versions": {"jax": "x"}}}
  )
  assert f"{cell['summary']['auto']['one_hot']['mean']:.1f}" in table
