"""Methods by name: settings, options, every method with every kind of initialization and sampler, and the grid."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import slow_except

import kipcore
from kipcore.cli import recipes
from kipcore.cli.config import CompareConfig, DistillConfig, EvaluateConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.runs import comparison, evaluation, pipeline

TINY = dict(
  architecture="conv1",
  score_architecture="fc1",
  width=4,
  steps=2,
  target_batch_size=40,
  network_seeds=1,
  network_steps=20,
  test_rows=100,
  num_devices=1,
)
EXPERTS = dict(num_experts=1, expert_epochs=5, expert_rows=100)
# Every initialization and sampler is used by some method.
PAIRS = {
  "kip": ("krr_pursuit", "margin"),
  "rfad": ("krr_sensitivity", "cross_entropy"),
  "frepo": ("kmedoids", "residual_norm"),
  "rcig": ("kmeans_plusplus", "squared_error"),
  "dm": ("krr_sensitivity", "class_balanced"),
  "dc": ("noise", "cross_entropy"),
  "dsa": ("kmeans", "uniform"),
  "ratbptt": ("kmeans", "cross_entropy"),
  "both": ("kmedoids", "uniform"),
  "mtt": ("uniform", "margin"),
  "ncfm": ("kmeans", "margin"),
}


@pytest.mark.parametrize(
  "method",
  slow_except(PAIRS, "mtt"),
)
@pytest.mark.usefixtures("without_pictures")
def test_every_method_runs_by_name_and_writes_its_artifact(method, tmp_path):
  """The artifact reproduces the recorded score, and hard labels are unchanged."""
  init, sampler = PAIRS[method]
  settings = {**TINY, **EXPERTS, "architecture": "fc1" if method == "kip" else TINY["architecture"]}
  config = recipes.resolve(method=method, init=init, sampler=sampler, **settings)
  folder, result = pipeline.run_distill(config, str(tmp_path), verbose=False)
  assert (result["method"], result["init"], result["sampler"], result["steps"]) == (
    method,
    init,
    sampler,
    2,
  )
  assert np.isfinite(result["test_accuracy"]) and 0 < result["network_test_accuracy_mean"] <= 1
  assert result["target_evaluations"] == 2 * 40 + (
    5 * 100
    if recipes.RECIPES[method].experts
    else result["target_evaluations"] - 80
    if method == "kip"
    else 0
  )
  stored = kipcore.load_artifact(folder / "distilled.npz")
  assert stored.images.shape == (10, 8, 8, 1)
  again = evaluation.run_evaluate(stored, EvaluateConfig(baselines=()))
  assert again["test_accuracy"] == result["test_accuracy"]
  if recipes.RECIPES[method].hard_labels:
    np.testing.assert_allclose(
      np.sort(stored.labels, axis=1)[:, ::9], [[-0.1, 0.9]] * 10, rtol=1e-5
    )
  assert (folder / "experts.npy").exists() == recipes.RECIPES[method].experts


@pytest.mark.usefixtures("without_pictures")
def test_closed_form_is_scored_in_its_features(tmp_path):
  _, result = pipeline.run_distill(
    recipes.resolve(method="krr_closed_form", options="feature_map=fcnn"),
    str(tmp_path),
    verbose=False,
  )
  assert result["feature_map_test_accuracy"] > 0.9 > result["init_test_accuracy"]
  assert result["full_model_error"] < 1e-2 and result["steps"] == 0


def test_settings_default_to_those_of_the_method():
  assert recipes.resolve(method="kip") == DistillConfig(teach="kernel")
  published, small = (
    recipes.resolve(method="dm", preset=preset) for preset in ("published", "cpu")
  )
  assert (published.learning_rate, published.steps, published.width, published.optimizer) == (
    1.0,
    20_000,
    128,
    "sgd",
  )
  assert small.steps < 1000 and small.width < 128 and small.architecture == "conv3"
  assert recipes.resolve(method="dm", steps=7, init="noise") == dataclasses.replace(
    small, steps=7, init="noise"
  )
  options = recipes.options_of(recipes.resolve(method="frepo", options="pool_size=3,flip=true"))
  assert options.pool_size == 3 and options.flip is True
  assert (
    recipes.options_of(recipes.resolve(method="rfad", preset="published")) == kipcore.RFADOptions()
  )


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(method="best"), "--method: expected one of kip"),
    (dict(method="dm", preset="huge"), "--preset: expected one of cpu, published"),
    (dict(method="kip", options="a=1"), "--options: expected none for --method=kip"),
    (dict(method="dm", options="pool=1"), "expected names among augmentation"),
    (dict(method="frepo", options="pool_size=many"), "expected pool_size to be an integer"),
    (dict(method="frepo", options="flip=2"), "expected flip to be true or false"),
    (dict(method="dm", options="augmentation=blur"), "augmentation: expected names of"),
    (dict(method="frepo", options="pool_size=0"), "pool_size"),
    (dict(method="dc", optimizer="lion"), "optimizer: expected one of"),
    (dict(method="rfad", loss="hinge"), "loss: expected one of"),
  ],
)
def test_invalid_settings_are_named_before_any_work(given, message, tmp_path):
  with pytest.raises(UsageError, match=message):
    pipeline.run_distill(recipes.resolve(**given), str(tmp_path), verbose=False)
  assert not list(tmp_path.iterdir())


GRID = CompareConfig(
  methods=("label_solve", "dm"),
  inits=("uniform", "kmeans"),
  samplers=("uniform",),
  num_seeds=2,
  network_seeds=1,
)
SHARED = {name: value for name, value in TINY.items() if name != "network_seeds"} | {
  "architecture": "fc1"
}


def cells(folder):
  with open(folder / "cells.csv", newline="") as file:
    return list(csv.DictReader(file))


def test_every_combination_is_a_cell_and_methods_without_steps_have_one_sampler():
  found = comparison.cells_of(dataclasses.replace(GRID, samplers=("uniform", "cross_entropy")))
  assert len(set(found)) == len(found) == 2 * 2 + 2 * 2 * 2
  assert {cell.sampler for cell in found if cell.method == "dm"} == {"uniform", "cross_entropy"}
  assert {cell.sampler for cell in found if cell.method == "label_solve"} == {"uniform"}


def test_a_grid_writes_a_table_and_continues_with_missing_cells(tmp_path, monkeypatch, capsys):
  whole = comparison.run_compare(GRID, SHARED, str(tmp_path / "whole"), False)
  rows = cells(whole)
  assert len(rows) == 2 * 2 + 2 * 2
  assert {row["target_evaluations"] for row in rows if row["method"] == "dm"} == {"80"}
  text = (whole / "comparison.md").read_text()
  assert text in capsys.readouterr().out + "\n" and text.count("\n") == 2 + 2 + 2 + 2
  assert "±" not in text and "a and b: the values of two seeds" in text
  assert (
    json.loads((whole / "config.json").read_text())["environment"]["versions"]["jax"]
    == jax.__version__
  )
  assert (whole / "comparison.png").stat().st_size > 5000
  shown = comparison.images_of(whole)
  assert set(shown) == {cell[:3] for cell in comparison.cells_of(GRID)}
  for seed, images, classes in shown.values():
    assert seed == GRID.seed and images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
    assert classes == list("0123456789") and images.std() > 10
  assert (whole / "report.html").read_text().count("data:image/png") == 10 * len(shown)

  ran = []

  def stopping(config):
    if len(ran) == 3:
      raise KeyboardInterrupt
    ran.append(config)
    return real(config)

  real = comparison.run_cell
  monkeypatch.setattr(comparison, "run_cell", stopping)
  with pytest.raises(KeyboardInterrupt):
    comparison.run_compare(GRID, SHARED, str(tmp_path / "cut"), False)
  assert len(cells(tmp_path / "cut")) == 3
  ran.clear()
  monkeypatch.setattr(comparison, "run_cell", lambda config: ran.append(config) or real(config))
  comparison.run_compare(GRID, SHARED, str(tmp_path / "cut"), False)
  assert len(ran) == 5
  timeless = lambda rows: [
    {k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows
  ]
  assert timeless(cells(tmp_path / "cut")) == timeless(rows)
  with pytest.raises(UsageError, match="contains another grid, whose cells have steps=2, not 3"):
    comparison.run_compare(GRID, {**SHARED, "steps": 3}, str(tmp_path / "cut"), False)
  # A folder written before one of the settings existed.
  recorded = json.loads((tmp_path / "cut" / "config.json").read_text())
  for cell in recorded["cells"]:
    del cell["train_rows"]
  (tmp_path / "cut" / "config.json").write_text(json.dumps(recorded))
  ran.clear()
  comparison.run_compare(
    dataclasses.replace(GRID, num_seeds=3, methods=("label_solve",)),
    SHARED,
    str(tmp_path / "cut"),
    False,
  )
  assert [config.seed for config in ran] == [2, 2] and len(cells(tmp_path / "cut")) == 10


def test_gains_are_paired_and_failures_are_counted():
  row = dict.fromkeys(comparison.FIELDS, "") | dict(
    method="dm", init="uniform", sampler="uniform", target_evaluations="80", error=""
  )
  rows = [row | dict(seed=str(s), test_accuracy=str(0.5 + 0.1 * s)) for s in range(3)]
  rows += [
    row | dict(init="kmeans", seed=str(s), test_accuracy=str(0.52 + 0.1 * s)) for s in range(2)
  ]
  rows += [row | dict(init="kmeans", seed="2", error="step 3 failed")]
  found = comparison.arms(rows, "test_accuracy")
  plain, arm = found.values()
  mean, error = comparison.gain(arm, plain)
  assert abs(mean - 2) < 1e-9 and error < 1e-9
  first, last, _, note = comparison.markdown(rows).splitlines()[2:]
  assert "60.0 ± 10.0" in first and "52.0 and 62.0 | +2.0 and +2.0" in last
  assert "(1 failed)" in last
  assert note.startswith("a ± b: mean and standard deviation") and "two seeds" in note
  assert comparison.shown([50.0, 60.0, 70.0], standard_error=True) == "60.0 ± 5.8"


def test_a_numerical_failure_becomes_a_row_of_the_table():
  config = recipes.resolve(method="dm", **{**TINY, "learning_rate": 1e30})
  assert "NOT_FINITE" in comparison.run_cell(config)["error"]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(methods=("dm", "best")), "--methods: expected one of kip"),
    (dict(inits=("best",)), "init: expected one of"),
    (dict(samplers=("uniform", "best")), "sampler: expected one of"),
    (dict(preset="huge"), "--preset: expected one of"),
  ],
)
def test_invalid_grids_are_named_before_any_cell(changes, message, tmp_path):
  with pytest.raises(UsageError, match=message):
    comparison.run_compare(
      dataclasses.replace(GRID, **changes), SHARED, str(tmp_path / "new"), False
    )
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  "text, message", [("stepz=3", "expected names among"), ("steps=many", "to be an integer")]
)
def test_invalid_fields_of_a_grid_are_named(text, message):
  with pytest.raises(UsageError, match=message):
    recipes.parsed("--set", [text], dataclasses.asdict(DistillConfig()))
  assert recipes.parsed(
    "--set", ["steps=3", "learn_labels=true"], dataclasses.asdict(DistillConfig())
  ) == {"steps": 3, "learn_labels": True}
