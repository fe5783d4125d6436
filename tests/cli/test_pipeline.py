"""Runs from data to files: the run folder, the artifact, and errors for invalid input."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from binaries import run_binary
from helpers import enable_x64, slow_except

import kipcore
from kipcore.cli import recipes
from kipcore.cli.config import DataConfig, DistillConfig, EvaluateConfig, SelectConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.folder import lock, run_folder
from kipcore.cli.runs import evaluation, pipeline, selection
from kipcore.io import atomic

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = dict(steps=30, num_devices=1)


def write_npz(path, classes=43, shape=(6, 6, 3), train=400, test=80, seed=0, **changes):
  """Unbalanced color images: class k has its own mean color, and its share decreases in k."""
  rng = np.random.default_rng(seed)
  share = 1.0 / (1 + np.arange(classes))
  means = rng.uniform(40, 215, (classes, 1, 1, shape[-1]))

  def split(n):
    y = np.concatenate(
      [np.arange(classes).repeat(2), rng.choice(classes, n - 2 * classes, p=share / share.sum())]
    )
    x = np.clip(means[y] + rng.normal(0, 10, (n, *shape)), 0, 255).astype(np.uint8)
    return x, y

  arrays = dict(
    zip(("x_train", "y_train", "x_test", "y_test"), (*split(train), *split(max(test, 2 * classes))))
  )
  arrays.update(changes)
  np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
  return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A short run on digits, read by several tests."""
  folder = tmp_path_factory.mktemp("run")
  return pipeline.run_distill(DistillConfig(**QUICK), str(folder), verbose=False)


def names_its_files(folder):
  """The README of a run folder has a line for each file."""
  text = (folder / "README.txt").read_text()
  for path in folder.iterdir():
    assert f"\n  {path.name} " in text and run_folder.RUN_FILES[path.name] in text, path.name


def test_a_run_writes_all_of_its_files(run):
  folder, result = run
  names = {
    "README.txt",
    "config.json",
    "metrics.jsonl",
    "result.json",
    "distilled.npz",
    "start.npz",
    "importance.npz",
    "images.png",
    "learning_curve.png",
    "report.html",
  }
  assert {p.name for p in folder.iterdir()} == names < set(run_folder.RUN_FILES)
  names_its_files(folder)
  assert json.loads((folder / "result.json").read_text()) == result
  contract = {
    "dataset",
    "method",
    "init",
    "sampler",
    "seed",
    "support_size",
    "steps",
    "target_evaluations",
    "init_test_accuracy",
    "test_accuracy",
    "random_baseline_test_accuracy",
    "wall_seconds",
    "compile_seconds",
  }
  assert contract <= set(result)
  rows = 1437 - round(
    0.1 * 1437
  )  # of digits, a fifth for testing and a tenth of the rest for validation
  assert result["support_size"] == 10 and abs(result["target_evaluations"] - 30 * 1000 - rows) <= 10
  assert result["sampler"] == "cross_entropy" and result["importance_gain"] >= 1
  assert result["test_accuracy"] > result["random_baseline_test_accuracy"]
  config = json.loads((folder / "config.json").read_text())
  assert (
    config["dataset"] == "digits" and config["environment"]["versions"]["jax"] == jax.__version__
  )
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [0, 1, 2, 5, 10, 20, 30]
  assert all("validation_accuracy" in line for line in lines) and "test_accuracy" not in lines[0]


def test_pictures_show_the_images(run):
  from matplotlib.image import imread

  folder, _ = run
  grid, curve = imread(folder / "images.png"), imread(folder / "learning_curve.png")
  assert grid.shape[0] > 200 and grid.shape[1] > 400 and grid.std() > 0.1
  assert curve.shape[1] > 800 and 0.5 < curve.mean() < 1


def test_the_artifact_is_plain_numpy_in_pixel_space(run):
  folder, _ = run
  with np.load(folder / "distilled.npz", allow_pickle=False) as file:
    images, labels, metadata = file["images"], file["labels"], json.loads(str(file["metadata"]))
  assert images.shape == (10, 8, 8, 1) and labels.shape == (10, 10)
  assert -20 < images.min() and 10 < images.max() < 40, "digits are stored in 0..16"
  assert metadata["label_convention"]["offset"] == 0.1
  assert metadata["ridge"] == {"kind": "fraction of tr(K_ss) / m", "value": 1e-6}
  assert metadata["architecture"]["name"] == "fc1" and metadata["dataset"]["hashes"]["test"]


def test_the_artifact_reproduces_the_recorded_accuracy_exactly(run):
  folder, result = run
  stored = kipcore.load_artifact(folder / "distilled.npz")
  again = evaluation.run_evaluate(stored, EvaluateConfig(baselines=()))
  assert again["test_accuracy"] == result["test_accuracy"] == again["recorded_test_accuracy"]
  raw = kipcore.datasets.load_dataset("digits")
  assert float(stored.evaluate(raw.x_test, raw.y_test).accuracy) == result["test_accuracy"]
  np.testing.assert_allclose(stored.preprocess.apply(stored.images), stored.support, atol=1e-4)


def test_networks_are_evaluated_on_the_artifact(run):
  stored = kipcore.load_artifact(run[0] / "distilled.npz")
  result = evaluation.run_evaluate(stored, EvaluateConfig(("network",), (), num_seeds=2))
  assert len(result["network_test_accuracy"]) == 2 and result["network_test_accuracy_mean"] > 0.3


@pytest.mark.usefixtures("without_pictures")
def test_equal_seeds_give_equal_bytes_and_float64_artifacts(tmp_path, x64):
  config = DistillConfig(
    x64=True, steps=3, num_devices=2, target_batch_size=100, loss="cross_entropy", preprocess="zca"
  )
  runs = [pipeline.run_distill(config, str(tmp_path / name), verbose=False) for name in "ab"]
  a, b = (kipcore.load_artifact(folder / "distilled.npz") for folder, _ in runs)
  assert a.support.dtype == np.float64 and np.array_equal(a.support, b.support)
  first, second = ((folder / "distilled.npz").read_bytes() for folder, _ in runs)
  assert first == second
  with pytest.raises(ValueError, match="64-bit"):
    with enable_x64(False):
      a.evaluate(np.zeros((1, 8, 8, 1)), np.zeros(1, int))


@pytest.mark.slow
def test_unbalanced_color_images_of_43_classes_from_a_file(tmp_path):
  path = write_npz(tmp_path / "signs.npz")
  config = DistillConfig(dataset=path, **QUICK)
  folder, result = pipeline.run_distill(config, str(tmp_path / "run"), verbose=False)
  assert result["support_size"] == 43 and result["test_accuracy"] > 0.3
  assert (folder / "images.png").exists()


@pytest.mark.parametrize(
  "changes",
  [
    dict(method="label_solve"),
    dict(init="noise"),
    pytest.param(dict(sampler="class_balanced", images_per_class=3), marks=pytest.mark.slow),
    pytest.param(
      dict(architecture="conv1", steps=2, test_rows=40, target_batch_size=20),
      marks=pytest.mark.slow,
    ),
    pytest.param(dict(kernel="nngp", steps=5), marks=pytest.mark.slow),
    pytest.param(
      dict(validation_fraction=0.0, steps=0, log_test_accuracy=True), marks=pytest.mark.slow
    ),
  ],
)
@pytest.mark.usefixtures("without_pictures")
def test_all_choices_run(changes, tmp_path):
  config = DistillConfig(**{**QUICK, **changes})
  _, result = pipeline.run_distill(config, str(tmp_path), verbose=False)
  assert 0 <= result["test_accuracy"] <= 1 and np.isfinite(result["init_test_accuracy"])
  if changes.get("steps") == 0:
    assert result["test_accuracy"] == result["init_test_accuracy"]


@pytest.mark.parametrize("init", ["kmeans", "noise", "kmedoids"])
def test_synthetic_points_of_methods_through_networks_have_the_norm_of_the_rows(init):
  config = recipes.resolve(method="frepo", init=init, num_devices=1)
  data = pipeline.load(config)
  chosen, support, _ = pipeline.start(config, data)
  norms = np.linalg.norm(np.asarray(support.x).reshape(10, -1), axis=1)
  rows = np.sqrt(np.mean(np.sum(data.x_train.reshape(len(data.x_train), -1) ** 2, axis=1)))
  assert np.allclose(norms, rows, rtol=1e-5) == (init != "kmedoids")
  # The kernel method starts from the points as they are.
  kernel = dataclasses.replace(config, method="kip", solve_labels=False)
  plain = np.asarray(pipeline.start(kernel, data).support.x)
  np.testing.assert_allclose(
    support.x / norms.reshape(-1, 1, 1, 1),
    plain / np.linalg.norm(plain.reshape(10, -1), axis=1).reshape(-1, 1, 1, 1),
    rtol=1e-5,
    atol=1e-7,
  )


def test_labels_are_solved_within_a_tenth_of_the_evaluations():
  data = pipeline.load(DistillConfig(**QUICK))
  rows = data.x_train.shape[0]

  def started(**changes):
    config = DistillConfig(**{**QUICK, "images_per_class": 2, **changes})
    start = pipeline.start(config, data)
    return (
      start.target_evaluations,
      pipeline.score(config, data, start.support, data.x_train, data.y_train),
      start.support,
    )

  plain, solved = started(solve_labels=False), started()
  assert plain[0] == 0 and solved[0] == rows and solved[1] > plain[1]
  np.testing.assert_array_equal(plain[2].x, solved[2].x)
  # At most a tenth of the evaluations: every third row; none if those are too few for 20 labels.
  fewer = started(steps=5)
  assert rows / 4 < fewer[0] <= 500 and fewer[1] > plain[1]
  for changes in (dict(steps=1), dict(steps=0), dict(learn_labels=False)):
    assert started(**changes)[0] == 0
  # Without solved labels, weights are absorbed into the labels.
  assert not np.allclose(
    started(init="krr_sensitivity", solve_labels=False)[2].y,
    started(init="uniform", solve_labels=False)[2].y,
  )


@pytest.mark.usefixtures("without_pictures")
def test_the_measured_gain_over_uniform_targets_is_reported(tmp_path, capsys):
  config = DistillConfig(**{**QUICK, "measure_gain": True})
  _, result = pipeline.run_distill(config, str(tmp_path), verbose=True)
  uniform = dataclasses.replace(config, sampler="uniform", measure_gain=False)
  data = pipeline.load(uniform)
  again = pipeline.distill(uniform, data, pipeline.start(uniform, data).support)
  assert result["uniform_targets_test_accuracy"] == pipeline.score(uniform, data, again.support)
  assert "with uniform targets and as many evaluations" in capsys.readouterr().out


@pytest.mark.usefixtures("without_pictures")
def test_label_solve_improves_on_its_initialization(tmp_path):
  config = DistillConfig(method="label_solve", images_per_class=10)
  _, result = pipeline.run_distill(config, str(tmp_path), verbose=False)
  assert result["test_accuracy"] > result["init_test_accuracy"] and result["steps"] == 0


WRONG = [
  (dict(dataset="mnits"), "mnits"),
  (dict(dataset="{tmp}/absent.npz"), "absent.npz"),
  (dict(architecture="resnet"), "architecture"),
  (dict(architecture="conv4"), "too small for the pooling"),
  (dict(init="best"), "init: expected one of"),
  (dict(sampler="best"), "sampler: expected one of"),
  (dict(method="best"), "method: expected one of"),
  (dict(preprocess="whiten"), "whiten"),
  (dict(relative_ridge=0.0), "--relative_ridge: expected a number from"),
  (dict(relative_ridge=-1.0), "--relative_ridge: expected a number from"),
  (dict(learning_rate=0.0), "learning_rate"),
  (dict(images_per_class=1000), "images_per_class"),
  (dict(target_batch_size=10**6), "target_batch_size"),
  (dict(num_devices=100), "num_devices"),
]


@pytest.mark.parametrize("changes, message", WRONG)
def test_invalid_values_are_named_and_nothing_is_written(changes, message, tmp_path):
  changes = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
  with pytest.raises(UsageError, match=message) as error:
    pipeline.run_distill(
      DistillConfig(**{**QUICK, **changes}), str(tmp_path / "run"), verbose=False
    )
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "distilled.npz").exists()


@pytest.mark.parametrize(
  "strategy", ["krr_sensitivity", "kmeans", pytest.param("auto", marks=pytest.mark.slow)]
)
def test_selection_writes_points_scores_and_certificate(strategy, tmp_path):
  config = SelectConfig(strategy=strategy, images_per_class=5, num_devices=1)
  folder, result = selection.run_select(config, str(tmp_path), verbose=False)
  assert {
    "d_eff",
    "total_sensitivity",
    "max_over_mean_score",
    "measured_epsilon",
    "objective_ratio",
  } <= set(result)
  assert abs(result["d_eff"] - 50) < 1 and 50 <= result["total_sensitivity"] <= 51.1
  names_its_files(folder)
  certified = json.loads((folder / "certificate.json").read_text())
  made = strategy == "kmeans" or result["chosen_strategy"] == "kmeans"
  assert ("note" in certified) == made
  if not made:
    assert 0 < result["measured_epsilon"] and 1 <= result["objective_ratio"]
  again = evaluation.run_evaluate(
    kipcore.load_artifact(folder / "distilled.npz"), EvaluateConfig(baselines=())
  )
  assert again["test_accuracy"] == result["test_accuracy"]
  assert (folder / "certificate.png").stat().st_size > 5000
  with pytest.raises(UsageError, match="score_ridge"):
    selection.run_select(SelectConfig(score_ridge="-1"), str(tmp_path / "bad"))


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(x_train=None), "x_train"),
    (dict(x_test=np.full((86, 6, 6, 3), np.nan, np.float32)), "NaN"),
    (dict(y_train=np.full(400, -1)), "y_train"),
    (dict(y_test=np.full(86, 43)), "43"),
    (dict(y_train=np.zeros(3, int)), "y_train"),
  ],
)
def test_invalid_files_are_named(changes, message, tmp_path):
  path = write_npz(tmp_path / "bad.npz", **changes)
  with pytest.raises(UsageError, match=message) as error:
    pipeline.load(DataConfig(dataset=path))
  assert "bad.npz" in str(error.value) and "\n" not in str(error.value)


def test_a_failed_factorization_leaves_no_artifact(tmp_path):
  x = np.repeat(np.random.default_rng(0).integers(0, 255, (2, 1, 4, 4, 1)), 20, axis=1).reshape(
    40, 4, 4, 1
  )
  path = write_npz(
    tmp_path / "twins.npz",
    x_train=x.astype(np.uint8),
    y_train=np.repeat([0, 1], 20),
    x_test=x[:2].astype(np.uint8),
    y_test=np.array([0, 1]),
  )
  config = DistillConfig(
    dataset=path, images_per_class=4, relative_ridge=1e-12, steps=3, num_devices=1
  )
  with pytest.raises(kipcore.NumericalError, match="larger ridge"):
    pipeline.run_distill(config, str(tmp_path / "run"), verbose=False)
  assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_kept_without_overwrite(run, tmp_path):
  with pytest.raises(UsageError, match="already contains a run"):
    run_folder.reserve(str(run[0]), "", overwrite=False)
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="cannot write"):
    run_folder.reserve(str(tmp_path / "file"), "", overwrite=False)
  (tmp_path / "result.json").write_text("{}")
  with lock.new_folder(str(tmp_path), "", overwrite=True) as folder:
    assert folder == tmp_path and not (tmp_path / "result.json").exists()


def test_damaged_artifacts_are_refused(run, tmp_path):
  content = (run[0] / "distilled.npz").read_bytes()
  path = tmp_path / "distilled.npz"
  for size in (0, 10, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:size])
    with pytest.raises(kipcore.ArtifactError, match="distilled.npz"):
      kipcore.load_artifact(path)
  rng = np.random.default_rng(0)
  for _ in range(30):
    damaged = bytearray(content)
    damaged[rng.integers(len(content))] ^= 1 + int(rng.integers(255))
    path.write_bytes(bytes(damaged))
    try:
      stored = kipcore.load_artifact(path)
    except kipcore.ArtifactError as error:
      assert "\n" not in str(error)
    else:  # a byte that zip does not read, such as a time stamp
      assert np.array_equal(stored.support, kipcore.load_artifact(run[0] / "distilled.npz").support)
  with np.load(run[0] / "distilled.npz") as file:
    arrays = dict(file)
  np.savez(path, **{**arrays, "labels": arrays["labels"] + 1})
  with pytest.raises(kipcore.ArtifactError, match="labels.*checksum"):
    kipcore.load_artifact(path)
  np.savez(path, images=arrays["images"])
  with pytest.raises(kipcore.ArtifactError, match="missing labels, support, metadata"):
    kipcore.load_artifact(path)
  with pytest.raises(kipcore.ArtifactError, match="no such file"):
    kipcore.load_artifact(tmp_path / "absent.npz")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  atomic.write_atomically(path, b"old")

  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="No space"):
    atomic.write_atomically(path, b"new")
  assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
  "arguments",
  slow_except(
    [
      ["--no_such_flag=1"],
      ["--steps=many"],
      ["--loss=hinge"],
      ["--dataset=no_such_file.npz"],
      ["stray"],
      ["--relative_ridge=0"],
      ["--sampler=best"],
      ["--uniform_mix=2"],
      ["--distributed=here"],
    ],
    ["--no_such_flag=1"],
    ["--dataset=no_such_file.npz"],
    ["--relative_ridge=0"],
    ["--distributed=here"],
  ),
)
def test_invalid_flags_end_with_status_2_and_one_line(arguments, tmp_path):
  done = run_binary("experiments.run_distill", f"--output_dir={tmp_path}/run", *arguments)
  assert (
    done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  ), done.stderr


def test_commands_distill_and_evaluate(tmp_path):
  done = run_binary(
    "experiments.run_distill",
    f"--output_dir={tmp_path}/run",
    "--method=kip",
    "--steps=20",
    "--x64",
    "--num_devices=1",
  )
  assert done.returncode == 0, done.stderr
  assert (
    "points over 10 random real images" in done.stdout and "Unable to initialize" not in done.stderr
  )
  recorded = json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"]
  done = run_binary(
    "experiments.run_evaluate",
    f"--artifact={tmp_path}/run/distilled.npz",
    "--baselines=uniform",
    "--num_seeds=2",
  )
  assert done.returncode == 0 and json.loads(done.stdout)["test_accuracy"] == recorded, done.stderr
  done = run_binary("experiments.run_evaluate", f"--artifact={tmp_path}/run/config.json")
  assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
