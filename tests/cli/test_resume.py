"""Interrupted runs: stopped, killed, with concurrent runs, a full disk or changed data."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from binaries import free_port

import kipcore
from kipcore.cli import recipes
from kipcore.cli.config import CheckpointConfig, DistillConfig
from kipcore.cli.errors import Stopped, UsageError
from kipcore.cli.folder import lock, resume
from kipcore.cli.runs import pipeline

pytestmark = pytest.mark.usefixtures("module_without_pictures")

CONFIG = DistillConfig(steps=40, target_batch_size=60, num_devices=1, refresh_every=10)
EVERY = CheckpointConfig(checkpoint_seconds=1e-9)
RESUME = dataclasses.replace(EVERY, resume=True)


@contextlib.contextmanager
def stopped_after(calls: int):
  """Stops a run after the given number of device calls."""
  left = [calls]

  class Signals(resume.StopSignals):
    def __call__(self):
      left[0] -= 1
      return left[0] < 0

  @contextlib.contextmanager
  def signals():
    yield Signals()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, "stop_signals", signals)
    yield


def artifact(folder) -> bytes:
  return pathlib.Path(folder, "distilled.npz").read_bytes()


def untimed(folder) -> list:
  lines = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
  return [
    {name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines
  ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run."""
  return pipeline.run_distill(CONFIG, str(tmp_path_factory.mktemp("whole") / "run"), verbose=False)[
    0
  ]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stopped") / "run"
  with (
    stopped_after(4),
    pytest.raises(Stopped, match="stopped at step [1-9][0-9]* of 40; --resume"),
  ):
    pipeline.run_distill(CONFIG, str(folder), verbose=False, checkpoints=EVERY)
  return folder


@pytest.fixture
def interrupted(stopped, tmp_path):
  """A copy of the folder of a stopped run."""
  return shutil.copytree(stopped, tmp_path / "run")


def test_a_resumed_run_writes_identical_bytes(interrupted, whole):
  assert not (interrupted / "result.json").exists() and (interrupted / "checkpoints").exists()
  folder, result = pipeline.run_distill(CONFIG, str(interrupted), verbose=False, checkpoints=RESUME)
  assert artifact(folder) == artifact(whole) and untimed(folder) == untimed(whole)
  assert not (folder / "checkpoints").exists() and not (folder / ".lock").exists()
  with pytest.raises(UsageError, match="is already finished"):
    pipeline.run_distill(CONFIG, str(interrupted), verbose=False, checkpoints=RESUME)


OPTIONS = {
  "mtt": "syn_steps=2,max_start_epoch=1",
  "ncfm": "num_frequencies=8",
  "frepo": "pool_size=2",
  "ratbptt": "unroll=4,window=2",
  "both": "unroll=4,window=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mtt", "ncfm", "frepo", "ratbptt", "both"])
def test_methods_with_experts_networks_and_unrolled_training_resume(tmp_path, method):
  config = recipes.resolve(
    method=method,
    architecture="conv1",
    width=8,
    steps=6,
    target_batch_size=20,
    num_experts=1,
    expert_epochs=2,
    expert_rows=40,
    network_seeds=0,
    test_rows=50,
    num_devices=1,
    options=OPTIONS[method],
  )
  folder, _ = pipeline.run_distill(config, str(tmp_path / "whole"), verbose=False)
  with stopped_after(2), pytest.raises(Stopped):
    pipeline.run_distill(config, str(tmp_path / "run"), verbose=False, checkpoints=EVERY)
  began = resume.config_of(tmp_path / "run", {})
  pipeline.run_distill(began, str(tmp_path / "run"), verbose=False, checkpoints=RESUME)
  assert untimed(folder) == untimed(tmp_path / "run")
  first, second = (
    kipcore.load_artifact(each / "distilled.npz") for each in (folder, tmp_path / "run")
  )
  assert (
    first.support.tobytes() == second.support.tobytes()
    and first.labels.tobytes() == second.labels.tobytes()
  )


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(interrupted, whole):
  config = resume.config_of(interrupted, {"num_devices": 3})
  pipeline.run_distill(config, str(interrupted), verbose=False, checkpoints=RESUME)
  ends = [untimed(folder)[-1] for folder in (interrupted, whole)]
  assert ends[0]["step"] == ends[1]["step"] == 40 and ends[0]["loss"] == pytest.approx(
    ends[1]["loss"], rel=0.5
  )


def test_settings_that_differ_are_refused_with_the_difference(interrupted):
  assert (
    resume.config_of(interrupted, {"steps": 40, "data_dir": "elsewhere"}).data_dir == "elsewhere"
  )
  with pytest.raises(UsageError, match="learning_rate: 0.04 then, 0.1 now; seed: 0 then, 3 now"):
    resume.config_of(interrupted, {"seed": 3, "learning_rate": 0.1})
  with pytest.raises(UsageError, match="expected the folder of a run of kipcore-distill"):
    resume.config_of(interrupted / "checkpoints", {})
  (interrupted / "config.json").write_text("{}")
  with pytest.raises(UsageError, match="ended before it recorded its settings; start it again"):
    resume.config_of(interrupted, {})
  with pytest.raises(UsageError, match="steps: 40 then, 50 now"):  # also without the command line
    pipeline.run_distill(
      dataclasses.replace(CONFIG, steps=50), str(interrupted), verbose=False, checkpoints=RESUME
    )


def test_changed_data_are_refused(tmp_path):
  rng = np.random.default_rng(0)
  arrays = dict(
    x_train=rng.integers(0, 255, (60, 3, 3, 1)).astype(np.uint8),
    y_train=np.arange(60) % 2,
    x_test=rng.integers(0, 255, (6, 3, 3, 1)).astype(np.uint8),
    y_test=np.arange(6) % 2,
  )
  np.savez(tmp_path / "a.npz", **arrays)
  config = DistillConfig(
    dataset=str(tmp_path / "a.npz"), steps=20, target_batch_size=10, num_devices=1
  )
  with stopped_after(3), pytest.raises(Stopped):
    pipeline.run_distill(config, str(tmp_path / "run"), verbose=False, checkpoints=EVERY)
  arrays["x_train"][0] += 1
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(UsageError, match="dataset_hashes.*train"):
    pipeline.run_distill(config, str(tmp_path / "run"), verbose=False, checkpoints=RESUME)
  (tmp_path / "a.npz").unlink()  # the file is gone
  with pytest.raises(UsageError, match="expected an .npz file, got no such file"):
    pipeline.run_distill(config, str(tmp_path / "run"), verbose=False, checkpoints=RESUME)
  assert list((tmp_path / "run" / "checkpoints").iterdir()), "the checkpoints are kept"


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoints(interrupted, whole, monkeypatch):
  """Once there is space again, the run resumes from the last checkpoint."""
  kept = sorted(path.name for path in (interrupted / "checkpoints").iterdir())

  def full(*_, **__):
    raise OSError(28, os.strerror(28))

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", full)
    patch.setattr(os, "replace", full)
    with pytest.raises((UsageError, OSError), match="No space left"):
      pipeline.run_distill(CONFIG, str(interrupted), verbose=False, checkpoints=RESUME)
  with monkeypatch.context() as patch:  # the error of tensorstore
    patch.setattr(
      kipcore.Checkpoints,
      "save",
      lambda *_: (_ for _ in ()).throw(
        kipcore.CheckpointError("expected a checkpoint to be written")
      ),
    )
    with pytest.raises(UsageError, match="expected a checkpoint to be written"):
      pipeline.run_distill(CONFIG, str(interrupted), verbose=False, checkpoints=RESUME)
  assert set(kept) <= {path.name for path in (interrupted / "checkpoints").iterdir()}
  assert artifact(
    pipeline.run_distill(CONFIG, str(interrupted), verbose=False, checkpoints=RESUME)[0]
  ) == artifact(whole)


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path):
  with lock.lock_folder(tmp_path / "run"):
    with pytest.raises(UsageError, match="another run is writing to .*run; choose another folder"):
      pipeline.run_distill(CONFIG, str(tmp_path / "run"), verbose=False)
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path):
  (tmp_path / "file").write_text("")
  started = time.monotonic()
  with pytest.raises(UsageError, match="--output_dir: cannot write to .*file"):
    pipeline.run_distill(
      dataclasses.replace(CONFIG, steps=10**6), str(tmp_path / "file" / "run"), verbose=False
    )
  assert time.monotonic() - started < 60


def test_backward_clock_has_no_effect(tmp_path, whole, monkeypatch):
  now = [1e9]

  def back():
    now[0] -= 3600.0
    return now[0]

  monkeypatch.setattr(time, "time", back)
  folder, result = pipeline.run_distill(
    CONFIG, str(tmp_path / "run"), verbose=False, checkpoints=EVERY
  )
  assert artifact(folder) == artifact(whole) and result["wall_seconds"] > 0


def test_a_diverging_run_ends_with_advice(tmp_path, monkeypatch):
  """A learning rate that is far too large."""
  wild = dataclasses.replace(
    CONFIG, learning_rate=1e18, schedule="constant", steps=60, refresh_every=0
  )
  with pytest.raises(
    kipcore.NumericalError,
    match="(?s)distillation at step [0-9]+.*The state before that step is kept.*--retries=3.*--x64",
  ):
    pipeline.run_distill(wild, str(tmp_path / "a"), verbose=False, checkpoints=EVERY)
  assert (tmp_path / "a" / "checkpoints").exists()


# --- processes that are killed ---


def environment(devices: int = 1) -> dict:
  return {
    **os.environ,
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
    "CUDA_VISIBLE_DEVICES": "",
  }


def binary(*arguments, devices: int = 1) -> subprocess.Popen:
  root = pathlib.Path(__file__).resolve().parents[2]
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.run_distill", *arguments],
    cwd=root,
    env=environment(devices),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def wait_for(path: pathlib.Path, process) -> None:
  """Waits for the first checkpoint."""
  deadline = time.monotonic() + 120
  while not any(child.name.isdigit() for child in path.glob("*")):
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
    time.sleep(0.02)


@pytest.mark.parametrize(
  "number, status",
  [
    pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
  ],
)
def test_a_killed_command_resumes_with_identical_results(tmp_path, number, status):
  flags = ["--method=kip", "--steps=100", "--target_batch_size=60", "--checkpoint_seconds=0.000001"]
  process = binary(*flags, f"--output_dir={tmp_path / 'run'}")
  wait_for(tmp_path / "run" / "checkpoints", process)
  process.send_signal(number)
  out = process.communicate(timeout=120)[0]
  assert process.returncode == status, out
  assert number == signal.SIGKILL or "stopped at step" in out and "Traceback" not in out
  assert (number == signal.SIGINT) == ("press Ctrl-C again" in out)
  again = binary("--resume", f"--output_dir={tmp_path / 'run'}")
  out = again.communicate(timeout=240)[0]
  assert again.returncode == 0 and "resuming from step" in out, out
  expected, _ = pipeline.run_distill(
    DistillConfig(steps=100, target_batch_size=60, num_devices=1),
    str(tmp_path / "whole"),
    verbose=False,
  )
  first, second = (
    kipcore.load_artifact(each / "distilled.npz") for each in (tmp_path / "run", expected)
  )
  assert (
    first.support.tobytes() == second.support.tobytes()
    and first.labels.tobytes() == second.labels.tobytes()
  )


@pytest.mark.slow
def test_killed_process_stops_the_others_and_all_resume(tmp_path):
  """Of two processes on loopback one is killed: the other ends with status 4, and both resume."""
  flags = [
    "--method=kip",
    "--steps=150",
    "--target_batch_size=60",
    "--sampler=uniform",
    "--checkpoint_seconds=0.000001",
    f"--output_dir={tmp_path / 'run'}",
  ]

  def pair(*arguments):
    port = free_port()
    return [binary(*arguments, f"--distributed=127.0.0.1:{port},2,{index}") for index in range(2)]

  first, second = pair(*flags)
  wait_for(tmp_path / "run" / "checkpoints", first)
  second.kill()
  killed = time.monotonic()
  out = first.communicate(timeout=120)[0]
  assert time.monotonic() - killed < 60 and first.returncode == 4, out
  assert (
    "a process of this run died" in out
    and "Traceback" not in out
    and not (tmp_path / "run" / "result.json").exists()
  )
  second.communicate()
  both = pair("--resume", f"--output_dir={tmp_path / 'run'}")
  outs = [process.communicate(timeout=240)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0] and "resuming from step" in outs[0], (
    outs
  )
  single, _ = pipeline.run_distill(
    DistillConfig(steps=150, target_batch_size=60, sampler="uniform", num_devices=2),
    str(tmp_path / "single"),
    verbose=False,
  )
  found = [
    kipcore.load_artifact(folder / "distilled.npz").support for folder in (tmp_path / "run", single)
  ]
  np.testing.assert_allclose(*found, rtol=1e-2, atol=1e-2)
