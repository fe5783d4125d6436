"""Run folders: unique names, the lock, the recorded commit, signals, and commands after failed ones."""

import contextlib
import datetime
import fcntl
import importlib
import os
import pathlib
import pkgutil
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import kipcore
from kipcore.cli.config import CheckpointConfig, DistillConfig, SelectConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.folder import lock, resume, run_folder
from kipcore.cli.runs import evaluation, loading, pipeline, selection

pytestmark = pytest.mark.usefixtures("module_without_pictures")

QUICK = dict(steps=3, num_devices=1, init="uniform", solve_labels=False, validation_fraction=0.0)
QUICK |= dict(sampler="uniform", target_batch_size=50, test_rows=50, train_rows=200)


def test_runs_that_start_in_the_same_second_get_different_folders(tmp_path, monkeypatch):
  class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls(2026, 1, 2, 3, 4, 5)

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(run_folder.datetime, "datetime", Clock)
  with contextlib.ExitStack() as stack:
    folders = [stack.enter_context(lock.new_folder(None, "name", False)) for _ in range(3)]
    assert [path.name for path in folders] == [
      f"20260102-030405-name{number}" for number in ("", "-2", "-3")
    ]


def test_a_folder_is_locked_by_one_of_three_processes(tmp_path, monkeypatch):
  """A holds the lock; B has opened the file; A deletes it and ends; C locks a new file; then B gets the deleted one."""
  a, c = lock.lock_folder(tmp_path), lock.lock_folder(tmp_path)
  a.__enter__()
  flock, interleaved = fcntl.flock, []

  def delayed(file, operation):
    if not interleaved:
      interleaved.append(True)
      a.__exit__(None, None, None)
      c.__enter__()
    return flock(file, operation)

  monkeypatch.setattr(fcntl, "flock", delayed)
  with pytest.raises(UsageError, match="another run is writing to"):
    with lock.lock_folder(tmp_path):
      pytest.fail("two runs hold the lock of a folder")
  assert interleaved and (tmp_path / ".lock").exists()
  c.__exit__(None, None, None)
  assert not list(tmp_path.iterdir())
  with lock.lock_folder(tmp_path):
    assert (tmp_path / ".lock").exists()


def test_a_lock_removes_a_folder_that_it_created_and_that_ends_up_empty(tmp_path):
  with lock.lock_folder(tmp_path / "new" / "run"):
    pass
  assert not (tmp_path / "new" / "run").exists()
  with lock.lock_folder(tmp_path):
    pass
  assert tmp_path.exists()


def git(folder, *arguments) -> str:
  identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
  command = ["git", "-C", str(folder), *identity, *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_is_recorded_only_if_the_repository_is_that_of_kipcore(tmp_path, monkeypatch):
  def installed_at(folder):
    (folder / "kipcore").mkdir(parents=True)
    (folder / "kipcore" / "__init__.py").write_text("")
    monkeypatch.setattr(kipcore, "__file__", str(folder / "kipcore" / "__init__.py"))

  user = tmp_path / "user"
  installed_at(user / ".venv" / "site-packages")
  git(user, "init", "-q")
  git(user, "commit", "-q", "--allow-empty", "-m", "work of a user")
  assert run_folder.environment()["commit"] is None
  installed_at(user)  # at the root, not tracked
  assert run_folder.environment()["commit"] is None
  own = tmp_path / "own"
  installed_at(own)
  assert run_folder.environment()["commit"] is None, "no repository"
  git(own, "init", "-q")
  git(own, "add", ".")
  git(own, "commit", "-q", "-m", "kipcore")
  assert run_folder.environment()["commit"] == git(own, "rev-parse", "HEAD")
  (own / "kipcore" / "__init__.py").write_text("changed")
  assert run_folder.environment()["commit"].endswith("-dirty")
  assert run_folder.environment()["versions"]["kipcore"] == kipcore.__version__


def test_signals_stop_a_run_at_its_next_checkpoint():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with resume.stop_signals() as stop:
    with pytest.raises(KeyboardInterrupt, match="before the first checkpoint"):
      os.kill(os.getpid(), signal.SIGINT)
      signal.pause()
    assert not stop()
    with stop.at_checkpoints():
      os.kill(os.getpid(), signal.SIGINT)
      assert stop() and stop.status == 130
      with pytest.raises(KeyboardInterrupt):  # a second one does not wait
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
  with resume.stop_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and stop.status == 143
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- after a failed command the corrected one works ---


def test_a_failed_run_can_be_replaced_or_resumed(tmp_path):
  folder = str(tmp_path / "run")
  often = CheckpointConfig(checkpoint_seconds=1e-9)
  wild = DistillConfig(**QUICK, learning_rate=1e25, schedule="constant")
  with pytest.raises(kipcore.NumericalError, match=r"[^.]\. The state before that step is kept in"):
    pipeline.run_distill(wild, folder, verbose=False, checkpoints=often)
  assert run_folder.planned(folder, "", False) == pathlib.Path(folder)
  config = DistillConfig(**QUICK)
  _, result = pipeline.run_distill(config, folder, verbose=False)
  assert result["test_accuracy"] > 0.1
  names = set(os.listdir(folder))
  assert not names & {run_folder.FAILED, run_folder.CHECKPOINTS, ".lock"}
  with pytest.raises(UsageError, match="already contains a run"):
    pipeline.run_distill(config, folder, verbose=False)
  _, again = pipeline.run_distill(config, folder, overwrite=True, verbose=False)
  assert again["test_accuracy"] == result["test_accuracy"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left"), ValueError()])
def test_a_run_that_ends_before_its_first_checkpoint_leaves_nothing(tmp_path, monkeypatch, error):
  def fail(*_, **__):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(pipeline, "start", fail)
    with pytest.raises(type(error)):
      pipeline.run_distill(DistillConfig(**QUICK), str(tmp_path / "run"), verbose=False)
    patch.setattr(selection.coreset, "select_coreset", fail)
    with pytest.raises((type(error), UsageError)):
      selection.run_select(SelectConfig(), str(tmp_path / "selection"), verbose=False)
  assert not list(tmp_path.iterdir())


def test_a_run_with_checkpoints_is_not_replaced_silently(tmp_path):
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  with pytest.raises(UsageError, match="unfinished run; --resume continues it, --overwrite"):
    run_folder.planned(str(tmp_path), "", False)
  (tmp_path / run_folder.FAILED).write_text("")
  for overwrite in (False, True):
    assert run_folder.planned(str(tmp_path), "", overwrite) == tmp_path
  with lock.new_folder(str(tmp_path), "", False):
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json"}


# --- messages ---


def test_networks_that_do_not_fit_the_rows_are_named_with_their_flag(tmp_path):
  rng = np.random.default_rng(0)
  arrays = dict(x_train=rng.normal(size=(40, 6)), y_train=np.arange(40) % 2)
  arrays |= dict(x_test=rng.normal(size=(10, 6)), y_test=np.arange(10) % 2)
  np.savez(tmp_path / "vectors.npz", **arrays)
  vectors = str(tmp_path / "vectors.npz")
  for flag in ("architecture", "score_architecture"):
    config = DistillConfig(**{"dataset": vectors, flag: "conv3"})
    message = rf"^--{flag}=conv3: expected a dataset of images .* got rows of shape \(6,\)"
    with pytest.raises(UsageError, match=message):
      loading.load(config)
  with pytest.raises(UsageError, match="^--architecture: expected fc1"):
    loading.load(DistillConfig(architecture="resnet"))
  with pytest.raises(UsageError, match="^--images_per_class: expected at most the 20 rows"):
    pipeline.plan(DistillConfig(dataset=vectors, images_per_class=21, validation_fraction=0.0))


def test_images_with_channels_first_are_reported(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.integers(0, 255, (40, 3, 8, 8)).astype(np.uint8)
  arrays = dict(x_train=x, y_train=np.arange(40) % 2, x_test=x[:10], y_test=np.arange(10) % 2)
  np.savez(tmp_path / "a.npz", **arrays)
  data = loading.load(DistillConfig(dataset=str(tmp_path / "a.npz")))
  (line,) = loading.notes(data)
  assert "3 x 8 pixels with 8 channels" in line and "transpose(0, 2, 3, 1)" in line
  np.savez(tmp_path / "b.npz", **{**arrays, "x_train": x[:, 0], "x_test": x[:10, 0]})
  assert loading.notes(loading.load(DistillConfig(dataset=str(tmp_path / "b.npz")))) == []


def test_a_misspelled_network_of_an_evaluation_lists_the_names():
  with pytest.raises(
    ValueError, match="^--evaluators=network:foo: expected mlp, convnet, resnet, "
  ):
    evaluation.evaluator_of("network:foo", None, DistillConfig(score_architecture="fc1"), None)


def test_a_result_below_its_start_is_reported_as_such(tmp_path):
  data = loading.load(DistillConfig())
  result = dict(support_size=10, test_accuracy=0.09, init_test_accuracy=0.5, steps=3)
  result |= dict(random_baseline_test_accuracy=0.6, importance_gain=None, wall_seconds=1.0)
  result |= dict(compile_seconds=0.1)
  text = pipeline._summary(tmp_path, DistillConfig(), data, result)
  assert "9.00 % test accuracy, 41.0 points below the initial images" in text
  assert "51.0 points below 10 random real images" in text
  assert re.search(r"^warning: the result is worse than the initial images", text, flags=re.M)
  zero = dict(result, steps=0, test_accuracy=0.5)
  text = pipeline._summary(tmp_path, DistillConfig(), data, zero)
  assert "10 initial images, not distilled (0 steps): 50.00 % test accuracy" in text
  assert "distilled images" not in text.replace("not distilled", "")


def test_the_modules_of_the_commands_import_together_and_define_no_global_flags():
  code = (
    "import importlib, pkgutil, sys; from absl import flags; before = set(flags.FLAGS); "
    "import kipcore.cli; "
    "[importlib.import_module(m.name) for m in pkgutil.walk_packages(kipcore.cli.__path__, "
    "'kipcore.cli.')]; new = {n for n in set(flags.FLAGS) - before "
    "if 'kipcore' in (flags.FLAGS.find_module_defining_flag(n) or '')}; sys.exit(bool(new))"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
  for info in pkgutil.iter_modules(importlib.import_module("kipcore.cli").__path__):
    assert importlib.import_module(f"kipcore.cli.{info.name}").__doc__
