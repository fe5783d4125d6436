"""Runs with labels of an expert: its file, its interruption, the choice of its epoch, and what is recorded."""

import dataclasses
import json

import numpy as np
import pytest

import kipcore
from kipcore.cli import recipes
from kipcore.cli.config import CheckpointConfig, SelectConfig
from kipcore.cli.errors import Stopped, UsageError
from kipcore.cli.runs import experts, pipeline, selection
from kipcore.io import trajectories

pytestmark = pytest.mark.usefixtures("module_without_pictures")

TINY = dict(
  width=4,
  steps=2,
  target_batch_size=40,
  network_steps=30,
  network_seeds=2,
  test_rows=100,
  num_devices=1,
  architecture="fc1",
  expert_epochs=3,
  labels="expert",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """A file of experts of the digits, made by a run."""
  path = tmp_path_factory.mktemp("experts") / "digits.npy"
  config = recipes.resolve(**TINY)
  experts.label_expert(config, pipeline.load(config), path)
  return path


def test_labels_follow_from_the_flags():
  assert not recipes.resolve(labels="class").learn_labels
  assert recipes.resolve(method="kip", labels="learned").learn_labels
  assert recipes.resolve(method="dm", labels="expert").protocol == "soft"
  assert recipes.resolve(method="dm", labels="expert", protocol="dc").protocol == "dc"
  assert recipes.resolve(method="dm", labels="class").protocol == "dsa"
  assert not recipes.resolve(labels="expert", learn_labels=False).learn_labels
  for given, message in (
    (dict(method="dm", labels="learned"), "expected class or expert with --method=dm"),
    (dict(method="rcig", labels="class"), "expected learned or expert with --method=rcig"),
    (dict(method="label_solve", labels="expert"), "expected none with --method=label_solve"),
    (dict(labels="class", learn_labels=True), "expected learned or expert with --learn_labels"),
    (dict(labels="learned", learn_labels=False), "expected class or expert with --nolearn_labels"),
  ):
    with pytest.raises(UsageError, match=f"--labels: {message}.*, got {given['labels']}"):
      recipes.resolve(**given)


def test_an_interrupted_expert_is_resumed_with_equal_bytes(file, tmp_path, monkeypatch):
  config = recipes.resolve(**TINY)
  data, path = pipeline.load(config), tmp_path / "again.npy"
  with pytest.raises(Stopped, match="of expert 1 of 1; --resume continues"):
    experts.label_expert(config, data, path, lambda: True)
  assert not path.exists() and (tmp_path / "again.npy.partial" / "0.npz").exists()
  other = dataclasses.replace(config, expert_epochs=4)
  with pytest.raises(UsageError, match="expert_epochs is 3, expected 4"):
    experts.label_expert(other, data, path)
  found = experts.label_expert(config, data, path)
  assert path.read_bytes() == file.read_bytes()
  assert path.with_suffix(".json").read_bytes() == file.with_suffix(".json").read_bytes()
  assert sorted(each.name for each in tmp_path.iterdir()) == ["again.json", "again.npy"]
  assert found.trajectory.shape[0] == 4 and found.module.norm == "instance"


def test_experts_of_other_rows_are_refused(file):
  config = recipes.resolve(**TINY, seed=1)
  with pytest.raises(UsageError, match="experts of another run: train_hash"):
    experts.label_expert(config, pipeline.load(config), file)
  config = recipes.resolve(**TINY, preprocess="none")
  with pytest.raises(UsageError, match="preprocess is 'standardize', expected 'none'"):
    experts.label_expert(config, pipeline.load(config), file)
  config = recipes.resolve(**TINY, validation_fraction=0.0)
  with pytest.raises(UsageError, match="--validation_fraction: expected more than 0"):
    pipeline.plan(config)


@pytest.mark.parametrize(
  "method",
  [
    "ratbptt",
    pytest.param("dm", marks=pytest.mark.slow),
    pytest.param("kip", marks=pytest.mark.slow),
  ],
)
def test_the_start_and_the_result_have_expert_labels(method, file, tmp_path, capsys):
  settings = dict(TINY, steps=0) if method == "ratbptt" else TINY
  config = recipes.resolve(method=method, experts=str(file), images_per_class=2, **settings)
  folder, result = pipeline.run_distill(config, str(tmp_path / "run"))
  walk = trajectories.load_trajectories(file).array[0]
  module = kipcore.network(kipcore.fc(1), 4, 10, norm="instance")
  data = pipeline.load(config)
  begun = pipeline.start(config, data).support
  expected = kipcore.expert_labels(module, walk[result["expert_epoch"]], begun.x)
  stored = kipcore.load_artifact(folder / "distilled.npz")
  if method == "ratbptt":  # without a step
    np.testing.assert_allclose(stored.labels, expected, atol=1e-4)
  elif method == "dm":  # the finished images
    moved = kipcore.expert_labels(module, walk[result["expert_epoch"]], stored.support)
    np.testing.assert_allclose(stored.labels, moved, atol=1e-6)
    assert not np.allclose(stored.labels, expected)
  accuracies = result["expert_validation_accuracies"]
  assert set(accuracies) == {"1", "2", "3"} and result["expert_epochs"] == 3
  assert accuracies[str(result["expert_epoch"])] == max(accuracies.values())
  assert result["labels"] == "expert"
  assert result["network_protocol"] == ("default" if method == "kip" else "soft")
  keys = ("init", "random_baseline", "expert_init", "expert_random_baseline")
  assert all(0 < result[f"{key}_network_test_accuracy_mean"] <= 1 for key in keys)
  page, out = (folder / "report.html").read_text(), capsys.readouterr().out
  assert "networks trained on random real data with expert labels" in page
  if method == "ratbptt":
    assert "20 random real images with expert labels (" in out
    assert "(kmeans, expert labels)" in out
  assert "--labels=expert" in (folder / "README.txt").read_text()
  assert not (folder / "experts.npy").exists()


@pytest.mark.slow
def test_an_interrupted_run_continues_its_expert(tmp_path, monkeypatch, file):
  """The run folder keeps the unfinished expert; the resumed run reads it and the choice of the epoch."""
  config = recipes.resolve(**TINY)
  save = trajectories.save_expert_state

  def interrupted(*arguments):
    save(*arguments)
    raise KeyboardInterrupt

  monkeypatch.setattr(trajectories, "save_expert_state", interrupted)
  with pytest.raises(KeyboardInterrupt):
    pipeline.run_distill(config, str(tmp_path / "run"), verbose=False)
  monkeypatch.undo()
  assert (tmp_path / "run" / "experts.npy.partial" / "0.npz").exists()
  with pytest.raises(UsageError, match="contains an unfinished run; --resume continues it"):
    pipeline.run_distill(config, str(tmp_path / "run"), verbose=False)
  resumed = CheckpointConfig(resume=True)
  folder, result = pipeline.run_distill(
    config, str(tmp_path / "run"), verbose=False, checkpoints=resumed
  )
  assert (folder / "experts.npy").read_bytes() == file.read_bytes()
  assert not (folder / "experts.npy.partial").exists()
  choice = json.loads((folder / "expert_choice.json").read_text())
  assert choice["epoch"] == result["expert_epoch"]
  whole, _ = pipeline.run_distill(config, str(tmp_path / "whole"), verbose=False)
  first, second = (kipcore.load_artifact(each / "distilled.npz") for each in (folder, whole))
  assert first.labels.tobytes() == second.labels.tobytes()


@pytest.mark.slow
def test_the_experts_of_mtt_label_its_images(tmp_path):
  settings = dict(TINY, architecture="conv1", expert_rows=100, expert_epochs=5, num_experts=2)
  config = recipes.resolve(method="mtt", **settings)
  folder, result = pipeline.run_distill(config, str(tmp_path / "run"), verbose=False)
  stored = kipcore.load_artifact(folder / "distilled.npz")
  assert trajectories.load_trajectories(folder / "experts.npy").array.shape[:2] == (2, 6)
  assert len(np.unique(stored.labels)) > 20 and result["network_protocol"] == "soft"
  with pytest.raises(UsageError, match="--patience: expected 0 with 2 experts"):
    pipeline.run_distill(
      dataclasses.replace(config, patience=2), str(tmp_path / "other"), verbose=False
    )


@pytest.mark.parametrize("strategy", [pytest.param("kmedoids", marks=pytest.mark.slow), "rded"])
def test_a_selection_has_expert_labels(strategy, file, tmp_path, capsys):
  names = ("width", "network_steps", "expert_epochs", "architecture", "labels", "num_devices")
  config = SelectConfig(
    strategy=strategy,
    images_per_class=2,
    experts=str(file),
    **{name: TINY[name] for name in names},
  )
  folder, result = selection.run_select(config, str(tmp_path / "run"))
  stored = kipcore.load_artifact(folder / "distilled.npz")
  walk = trajectories.load_trajectories(file).array[0]
  module = kipcore.network(kipcore.fc(1), 4, 10, norm="instance")
  expected = kipcore.expert_labels(module, walk[result["expert_epoch"]], stored.support)
  np.testing.assert_allclose(stored.labels, expected, atol=1e-6)
  for name in ("class_labels", "expert_random_baseline"):
    assert 0 < result[f"{name}_test_accuracy"] <= 1
  assert result["labels"] == "expert" and result["chosen_strategy"] == strategy
  out, page = capsys.readouterr().out, (folder / "report.html").read_text()
  assert f"with labels of an expert after epoch {result['expert_epoch']} of 3" in out
  assert "random real data with expert labels" in page
  if strategy == "rded":  # the loss of the selected crops is below that of the rows
    data = pipeline.load(config)
    classes = np.repeat(np.eye(10, dtype=np.float32), 2, axis=0)
    chosen = kipcore.expert_losses(module, walk[-1], stored.support, classes)
    rows = kipcore.expert_losses(module, walk[-1], data.x_train, data.y_train)
    assert np.mean(chosen) < np.quantile(rows, 0.1)


def test_invalid_labels_of_a_selection_are_named(tmp_path):
  with pytest.raises(UsageError, match="--labels: expected one of class, expert"):
    selection.run_select(SelectConfig(labels="learned"), str(tmp_path / "run"))
  with pytest.raises(UsageError, match="--validation_fraction: expected more than 0"):
    selection.run_select(
      SelectConfig(strategy="rded", validation_fraction=0.0), str(tmp_path / "run")
    )
