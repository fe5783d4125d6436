"""Tolerances by dtype, the 64-bit switch, and small random problems."""

import gzip
import os
import pathlib

import jax
import numpy as np
import pytest

# Relative error that sums of a few hundred products may show.
RTOL = {"float32": 1e-5, "float64": 1e-10}

SHARED_DATA = pathlib.Path(
    os.environ.get("KIPCORE_TEST_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"))


def enable_x64(on: bool):
  """A context manager that sets JAX's 64-bit switch; its home moved between versions."""
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(on)
  from jax.experimental import enable_x64 as experimental_enable_x64
  return experimental_enable_x64(on)


def standard_promotion():
  """A context for foreign libraries that rely on dtype and rank promotion."""
  import contextlib
  stack = contextlib.ExitStack()
  stack.enter_context(jax.numpy_dtype_promotion("standard"))
  stack.enter_context(jax.numpy_rank_promotion("allow"))
  return stack


def assert_close(actual, expected, rtol, atol=0.0):
  """Largest difference over the largest magnitude of `expected` is at most `rtol` (plus `atol`)."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  error = np.max(np.abs(actual - expected), initial=0.0)
  scale = np.max(np.abs(expected), initial=0.0)
  assert error <= rtol * scale + atol, f"error {error:.3g} of {scale:.3g} is over {rtol:.1g}"


def needs(path: pathlib.Path):
  """Skips the test, with the reason, where a data file is absent."""
  if not path.exists():
    pytest.skip(f"needs {path.name}, which is absent")
  return path


def read_idx(path):
  """The array of a gzipped IDX file (MNIST)."""
  raw = gzip.open(path).read()
  shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
  return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
