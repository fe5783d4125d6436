"""Scores of rows on disk are those of the same rows in memory, and certified."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, assert_close, slow_except

from kipcore import keys
from kipcore.kernels import rbf_fn
from kipcore.selection import sensitivity_cores, streaming
from kipcore.selection.sensitivity import Guarantee, krr_sensitivity_scores
from kipcore.selection.streaming import stream_krr_sensitivities
from kipcore.types import Status

KERNEL = rbf_fn(2.0)


def problem(dtype, n=230, d=5, c=3):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, d)) * np.where(rng.random((n, 1)) < 0.05, 3.0, 1.0)
  y = np.eye(c)[rng.integers(0, c, n)] - 1 / c
  return x.astype(dtype), y.astype(dtype)


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("block_size", slow_except([50, 230, 1000], 50))
@FLOAT64_IS_SLOW
def test_file_and_array_give_the_same_scores(dtype, tmp_path, refine, block_size):
  x, y = problem(dtype)
  x.tofile(tmp_path / "x.bin")
  mapped = np.memmap(tmp_path / "x.bin", dtype, "r", shape=x.shape)
  ours = stream_krr_sensitivities(
    0, KERNEL, mapped, y, 0.5, 40, block_size=block_size, refine=refine
  )
  landmarks = jnp.sort(jax.random.permutation(keys.canonical_key(0), 230)[:40])
  order = jnp.arange(230, dtype=jnp.int32)
  parts = sensitivity_cores.landmark_scores(
    KERNEL,
    jnp.asarray(x),
    jnp.asarray(y),
    jnp.asarray(0.5, dtype),
    jnp.ones(230, dtype),
    landmarks,
    order,
    block_size,
    refine,
  )
  rtol = 20 * RTOL[dtype.name]
  assert int(ours.status) == Status.OK and ours.guarantee == Guarantee.OVER_ESTIMATE
  assert ours.scores.dtype == dtype
  assert_close(ours.scores, jnp.minimum(parts[0], 1), rtol)
  assert_close(ours.objective, parts[2], rtol)
  assert_close(ours.effective_dimension_lower, parts[3], rtol)


def test_never_below_the_exact_scores(x64):
  x, y = problem(np.float64)
  exact = krr_sensitivity_scores(KERNEL(jnp.asarray(x), None), jnp.asarray(y), 0.5)
  for seed in range(5):
    ours = stream_krr_sensitivities(seed, KERNEL, x, y, 0.5, 60, block_size=64)
    assert (np.asarray(ours.scores) >= np.asarray(exact.scores) * (1 - 1e-9)).all()
    assert float(ours.total) < 3 * float(exact.total)


def test_transform_is_applied_to_pixels(x64):
  rng = np.random.default_rng(1)
  pixels = rng.integers(0, 256, size=(90, 6), dtype=np.uint8)
  _, y = problem(np.float64, 90)
  scale = lambda block: block / 64.0
  ours = stream_krr_sensitivities(0, KERNEL, pixels, y, 0.5, 30, transform=scale, block_size=32)
  assert_close(
    ours.scores,
    stream_krr_sensitivities(0, KERNEL, scale(pixels), y, 0.5, 30, block_size=32).scores,
    1e-12,
  )


def test_steps_are_compiled_once(x64):
  x, y = problem(np.float64)
  stream_krr_sensitivities(0, KERNEL, x, y, 0.5, 40, block_size=50)
  before = streaming._second_pass._cache_size()
  stream_krr_sensitivities(1, KERNEL, x[:190], y[:190], 0.7, 40, block_size=50)
  assert streaming._second_pass._cache_size() == before


def test_invalid_input_raises():
  x, y = problem(np.float32)
  bad = x.copy()
  bad[120, 2] = np.nan
  with pytest.raises(ValueError, match="rows 100 to 149"):
    stream_krr_sensitivities(0, KERNEL, bad, y, 0.5, 20, block_size=50)
  with pytest.raises(ValueError, match=r"y: expected shape \(230, c\)"):
    stream_krr_sensitivities(0, KERNEL, x, y[:-1], 0.5, 20)
  with pytest.raises(TypeError, match="x: expected"):
    stream_krr_sensitivities(0, KERNEL, (x * 10).astype(np.uint8), y, 0.5, 20)
  with pytest.raises(ValueError, match="ridge"):
    stream_krr_sensitivities(0, KERNEL, x, y, 0.0, 20)
  with pytest.raises(ValueError, match="num_landmarks"):
    stream_krr_sensitivities(0, KERNEL, x, y, 0.5, 0)
