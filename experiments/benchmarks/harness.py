"""Shared code of the benchmarks: MNIST, timing, memory, and jobs in separate processes."""

import contextlib
import json
import multiprocessing
import pathlib
import re
import resource
import sys
import threading
import time

import numpy as np
from absl import flags

FLAGS = flags.FLAGS


def define_flags(name: str) -> None:
  """Defines the flags of a benchmark, which determines the name of its result file."""
  flags.DEFINE_string("data_dir", None, "Folder of the prepared TFDS datasets.")
  flags.DEFINE_string(
    "only", "", "Run the jobs whose names contain this; the others stay in the file."
  )
  flags.DEFINE_string("output", f"experiments/results/benchmark_{name}.json", "Result file.")


def mnist(data_dir):
  """Standardized flat MNIST rows, centered labels, classes, raw data and preprocessing."""
  import jax.numpy as jnp

  from kipcore import datasets, preprocess

  raw = datasets.load_dataset("mnist", data_dir, validation_fraction=0.0)
  fitted = preprocess.fit_preprocess(raw.x_train, "standardize", raw.pixel_max)
  x = jnp.asarray(fitted.apply(raw.x_train).reshape(len(raw.x_train), -1))
  y = preprocess.one_hot_centered(raw.y_train, raw.num_classes)
  return x, jnp.asarray(y), np.asarray(raw.y_train), raw, fitted


def x64():
  """A context manager that enables 64-bit floats; its module depends on the version of JAX."""
  import jax

  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(True)
  from jax.experimental import enable_x64

  return enable_x64(True)


def timed(fn) -> tuple[float, object]:
  """Seconds until the result is ready, and the result."""
  import jax

  started = time.perf_counter()
  out = jax.block_until_ready(fn())
  return time.perf_counter() - started, out


def peak_gb() -> float:
  """Peak memory of this process in GB, including mapped files."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@contextlib.contextmanager
def private_peak():
  """Yields a list that on exit contains the peak private memory (GB), without mapped files."""
  seen, done = [0.0], threading.Event()

  def watch():
    while not done.is_set():
      status = pathlib.Path("/proc/self/status").read_text()
      seen[0] = max(seen[0], int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1e6)
      done.wait(0.05)

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield seen
  finally:
    done.set()
    thread.join()


def _child(name, jobs, argv, pipe):
  FLAGS(argv)
  pipe.send(jobs[name](FLAGS.data_dir))


def run(jobs: dict) -> None:
  """Runs the jobs, functions of the data folder, in new processes; writes the file after each."""
  from kipcore.cli.folder import run_folder

  path = pathlib.Path(FLAGS.output)
  results = json.loads(path.read_text())["jobs"] if path.exists() else {}
  environment = run_folder.environment()
  for name in jobs:
    if FLAGS.only not in name:
      continue
    print(name, flush=True)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(name, jobs, sys.argv, there), daemon=True)
    child.start()
    there.close()
    try:
      results[name] = {"commit": environment["commit"], **here.recv()}
    except EOFError:
      raise OSError(f"the job {name} ended without a result") from None
    child.join()
    run_folder.write_json(path, {"environment": environment, "jobs": results})
