"""Strict numerics for the whole suite: 8 simulated devices, no silent promotion."""

import atexit
import os
import pathlib
import shutil
import tempfile

import xla_flags

os.environ.setdefault("XLA_FLAGS", xla_flags.known())
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
# Workers and commands started by tests share a compilation cache during one run of the suite.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kipcore-compiled-")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

if "KIPCORE_CACHE_DIR" not in os.environ:
  os.environ["KIPCORE_CACHE_DIR"] = tempfile.mkdtemp(prefix="kipcore-cache-")
  atexit.register(shutil.rmtree, os.environ["KIPCORE_CACHE_DIR"], ignore_errors=True)

import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_platforms", "cpu")
# Collectives of simulated devices block threads; programs that are in flight together have deadlocked and crashed XLA.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

import typechecks  # noqa: E402

typechecks.install()

from helpers import enable_x64  # noqa: E402  (imports kipcore)


def pytest_addoption(parser):
  parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config, items):
  """Deselects tests marked slow, unless `--slow` is given or a test is named by its node id."""
  if config.getoption("--slow") or any("::" in argument for argument in config.args):
    return
  slow = [item for item in items if item.get_closest_marker("slow")]
  config.hook.pytest_deselected(items=slow)
  items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
  """Runs the test twice: in float32 with the 64-bit switch off, in float64 with it on."""
  with enable_x64(request.param == "float64"):
    yield jnp.dtype(request.param)


@pytest.fixture
def x64():
  """Runs the test with the 64-bit switch on."""
  with enable_x64(True):
    yield


def empty_pictures():
  """Runs write empty pictures and charts: drawing takes most of a small run, and few tests look at them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    patch.setattr("kipcore.report.pictures.panels", lambda figure: [b"<svg/>"])
    yield


without_pictures = pytest.fixture(empty_pictures)
module_without_pictures = pytest.fixture(empty_pictures, scope="module")


@pytest.fixture(scope="module", autouse=True)
def forget_compilations():
  """Drops compiled functions before they exhaust the memory maps of a process (65,530)."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if not maps.exists() or maps.read_text().count("\n") > 25_000:
    jax.clear_caches()
