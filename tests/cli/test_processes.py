"""Two processes on loopback compute the same distillation as one process with as many devices."""

import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from binaries import ROOT, free_port

import kipcore
from kipcore.distillation import importance, loop
from kipcore.distillation.methods import kip
from kipcore.types import Support


def problem():
  """203 rows of three classes, which is divisible by none of the device counts."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 203)
  x = (1.5 * np.eye(3, 6)[labels] + 0.5 * rng.normal(size=(203, 6))).astype(np.float32)
  y = (np.eye(3)[labels] - 1 / 3).astype(np.float32)
  rows = np.concatenate([np.flatnonzero(labels == k)[:2] for k in range(3)])
  return Support(x[rows], y[rows]), x, y


def run(devices=None):
  support, x, y = problem()
  method = kip.kip(kipcore.ntk_fn(kipcore.fc(1)), kip.KIPOptions(1e-3, learn_labels=True))
  distiller = loop.Distiller(
    method, importance.importance("squared_error", least_gain=1.0), optax.adam(0.02), 42
  )
  return loop.distill(0, distiller, support, x, y, 6, devices=devices, log_steps=[1, 6])


def worker(index: int, port: str, path: str) -> None:
  """Runs in each process; writes its arrays for the test."""
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
  assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
  with pytest.raises(ValueError, match="devices: expected None"):
    run(jax.local_devices())
  result = run()
  np.savez(
    path, x=result.support.x, y=result.support.y, loss=[r["loss"] for r in result.history[1:]]
  )


def test_two_processes_equal_one(tmp_path):
  here = os.path.dirname(os.path.abspath(__file__))
  code = "import sys, test_processes as t; t.worker(int(sys.argv[1]), *sys.argv[2:])"
  env = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here), str(ROOT)]),
    "CUDA_VISIBLE_DEVICES": "",
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
  }
  port = str(free_port())
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", code, str(i), port, str(tmp_path / f"{i}.npz")],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [w.communicate(timeout=240)[0] for w in workers]
  finally:
    for w in workers:
      w.kill()
  assert [w.returncode for w in workers] == [0, 0], "\n".join(outputs)
  single = run(jax.devices()[:4])
  for i in range(2):
    with np.load(tmp_path / f"{i}.npz") as got:
      np.testing.assert_allclose(got["x"], single.support.x, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(got["y"], single.support.y, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(got["loss"], [r["loss"] for r in single.history[1:]], rtol=1e-5)
