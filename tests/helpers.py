"""Tolerances by dtype, the 64-bit switch, and small random problems."""

import gzip
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kipcore

# Relative error of sums of a few hundred products.
RTOL = {"float32": 1e-5, "float64": 1e-10}

SHARED_DATA = pathlib.Path(
  os.environ.get(
    "KIPCORE_TEST_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
  )
)


def enable_x64(on: bool):
  """A context manager for JAX's 64-bit switch; its module depends on the version."""
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(on)
  from jax.experimental import enable_x64 as experimental_enable_x64

  return experimental_enable_x64(on)


def standard_promotion():
  """A context manager for external libraries that rely on dtype and rank promotion."""
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


def slow_except(values, *kept) -> list:
  """Parameters of a test of which only `kept` run by default; the others are marked slow."""
  return [
    value
    if value in kept
    else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
    for value in values
  ]


# The fixture `dtype` for tests whose float64 takes long; other tests cover it.
FLOAT64_IS_SLOW = pytest.mark.parametrize(
  "dtype", slow_except(["float32", "float64"], "float32"), indirect=True
)


def needs(path: pathlib.Path):
  """Skips the test, with the reason, if a data file is absent."""
  if not path.exists():
    pytest.skip(f"needs {path.name}, which is absent")
  return path


def read_idx(path):
  """The array of a gzipped IDX file (MNIST)."""
  raw = gzip.open(path).read()
  shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
  return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def check_gradient(f, params: dict, names=None, h: float = 1e-5, rtol: float = 1e-6) -> None:
  """Compares a float64 gradient in a dict with central differences in random directions."""
  gradient = jax.grad(f)(params)
  for name in names or params:
    v = jnp.asarray(np.random.default_rng(2).normal(size=params[name].shape))
    ahead, behind = (f({**params, name: params[name] + s * h * v}) for s in (1, -1))
    np.testing.assert_allclose(
      jnp.vdot(gradient[name], v), (ahead - behind) / (2 * h), rtol=rtol, atol=1e-10, err_msg=name
    )


def check_image_gradient(method, support, x, y, num_keys: int) -> None:
  """Compares the float64 image gradient of a method's loss with central differences."""
  params = method.init_params(support)
  aux = method.init_aux(jax.random.key(0), params)
  batch, weights = (
    kipcore.Batch(jnp.asarray(x), jnp.asarray(y)),
    jnp.asarray(np.random.default_rng(4).uniform(0, 2, len(x))),
  )
  f = jax.jit(
    jax.value_and_grad(lambda x, key: method.loss({**params, "x": x}, aux, batch, weights, key)[0])
  )
  for seed in range(num_keys):
    key, h = jax.random.key(seed), 1e-5
    v = jnp.asarray(np.random.default_rng(seed).normal(size=support.x.shape))
    slope = (f(support.x + h * v, key)[0] - f(support.x - h * v, key)[0]) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(f(support.x, key)[1], v), slope, rtol=1e-6)
    assert abs(slope) > 1e-3


def everything() -> kipcore.Sampler:
  """A sampler that takes all rows of its shard, padded with weight 0 to the requested size."""

  def draw(key, n, size):
    i = jnp.arange(size, dtype=jnp.int32)
    return jnp.minimum(i, n - 1), jnp.where(i < n, size / n.astype(jnp.float64), 0.0)

  return kipcore.Sampler(
    "everything", lambda counts, capacity: jnp.sum(counts, dtype=jnp.int32), draw
  )


def same_on_devices(
  method, support, x, y, rtol: float = 1e-10, num_steps: int = 1, counts=(1, 8)
) -> None:
  """SGD steps on all rows give equal float64 losses and images on each device count, and resume."""
  distiller = kipcore.Distiller(method, everything(), optax.sgd(0.1), len(x))
  runs = [
    kipcore.distill(0, distiller, support, x, y, num_steps, devices=jax.devices()[:d])
    for d in counts
  ]
  assert not np.array_equal(runs[0].support.x, support.x)
  for other in runs[1:]:
    np.testing.assert_allclose(other.history[-1]["loss"], runs[0].history[-1]["loss"], rtol=rtol)
    assert_close(other.support.x, runs[0].support.x, rtol=rtol)
  resumes_exactly(distiller, support, x, y, jax.devices()[: counts[-1]])


def resumes_exactly(distiller, support, x, y, devices, num_steps: int = 3) -> None:
  """A run resumed from any of its snapshots is bit-identical to the uninterrupted run."""
  snapshots = []
  checkpoint_policy = kipcore.CheckpointPolicy(snapshots.append, seconds=0.0)
  whole = kipcore.distill(
    0,
    distiller,
    support,
    x,
    y,
    num_steps,
    devices=devices,
    log_steps=range(num_steps),
    checkpoint_policy=checkpoint_policy,
  )
  assert [s.step for s in snapshots] == list(range(1, num_steps + 1))
  for snapshot in snapshots[::2]:
    resumed = kipcore.distill(
      0,
      distiller,
      support,
      x,
      y,
      num_steps,
      devices=devices,
      log_steps=range(num_steps),
      resume=snapshot,
    )
    assert jax.tree.all(
      jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), resumed.state, whole.state)
    )
    assert untimed(resumed.history) == untimed(whole.history)


def untimed(history) -> list:
  """The log without seconds."""
  return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


def image_rows(labels, dtype=np.float64, seed=0, num_classes=3):
  """8 x 8 images whose mean depends on their class in `labels`, and their centered labels."""
  rng = np.random.default_rng(seed)
  means = np.random.default_rng(9).normal(size=(num_classes, 8, 8, 1))
  x = 0.5 * means[labels] + rng.normal(size=(len(labels), 8, 8, 1))
  return x.astype(dtype), (np.eye(num_classes)[labels] - 1 / num_classes).astype(dtype)


def image_problem(dtype=np.float32, n=90, per_class=2):
  """A support of such images, and target rows with unbalanced classes."""
  x, y = image_rows(np.random.default_rng(1).integers(0, 3, n), dtype)
  support = image_rows(np.repeat(np.arange(3), per_class), dtype, seed=2)
  return kipcore.Support(*map(jnp.asarray, support)), x, y
