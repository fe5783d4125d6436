"""Public functions compile once per shape: a call with equal kernels and new data is cached."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import standard_promotion

import kipcore
from kipcore.kernels import StaxKernel, finite
from kipcore.kernels.stax import to_stax

COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
  """A list that gets one entry per program compiled within the context."""
  found = []

  def listen(event, duration, **_):
    if event == COMPILATION:
      found.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def rows(seed, n=12, shape=(5,)):
  return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def images(seed, n=6):
  return jnp.asarray(rows(seed, n, (8, 8, 1)))


def problem(seed):
  """Support, rows and labels, as JAX arrays."""
  x, y = jnp.asarray(rows(seed)), jnp.asarray(rows(seed + 1, shape=(3,)))
  return kipcore.Support(x[:4], y[:4]), x, y


class Unhashable:
  """A kernel of a user that compares by value but cannot be hashed."""

  __hash__ = None

  def __init__(self):
    self.fn = kipcore.rbf_fn(1.0)

  def __eq__(self, other):
    return isinstance(other, Unhashable)

  def __call__(self, x1, x2=None):
    return self.fn(x1, x2)


UNHASHABLE, USER_KERNEL = Unhashable(), lambda x1, x2=None: kipcore.rbf_fn(2.0)(x1, x2)
STAX = to_stax(kipcore.fc(1))[2]
MODULE = kipcore.network(kipcore.fc(1), 8, 3)
KERNELS = {
  "ntk": lambda: kipcore.ntk_fn(kipcore.fc(2)),
  "nngp": lambda: kipcore.nngp_fn(kipcore.fc(2)),
  "rbf": lambda: kipcore.rbf_fn(1.0),
  "linear": kipcore.linear_fn,
  "stax": lambda: kipcore.from_stax(STAX),
  "function": lambda: USER_KERNEL,
  "unhashable": lambda: UNHASHABLE,
}


def calls_of(kernel):
  """Calls of every function that takes a kernel, each with a new kernel and the data of a seed."""
  return {
    "call": lambda seed: kernel()(jnp.asarray(rows(seed)), jnp.asarray(rows(seed, 3))),
    "call with itself": lambda seed: kernel()(jnp.asarray(rows(seed))),
    "diag": lambda seed: kernel().diag(jnp.asarray(rows(seed))),
    "gram": lambda seed: kipcore.gram(kernel(), rows(seed), rows(seed, 3)),
    "gram with itself, blocks": lambda seed: kipcore.gram(kernel(), rows(seed), None, 5),
    "gram on devices": lambda seed: kipcore.gram(
      kernel(), rows(seed), rows(seed, 3), None, jax.devices()[:2]
    ),
    "gram_diag": lambda seed: kipcore.gram_diag(kernel(), rows(seed)),
    "gram_diag, blocks": lambda seed: kipcore.gram_diag(kernel(), rows(seed), 5),
    "gram_matvec": lambda seed: kipcore.gram_matvec(kernel(), rows(seed), rows(1, 3), rows(2, 3)),
    "gram_matvec, blocks": lambda seed: kipcore.gram_matvec(
      kernel(), rows(seed), rows(1, 3), rows(2, 3), 5
    ),
    "label_solve_rows": lambda seed: kipcore.label_solve_rows(
      kernel(), problem(seed)[0].x, *problem(seed)[1:], 0.1 + seed, block_size=5
    ),
    "evaluate_krr": lambda seed: kipcore.evaluate_krr(
      kernel(), *problem(seed), relative_ridge=0.1 + seed, block_size=5
    ),
    "evaluate_krr, absolute": lambda seed: kipcore.evaluate_krr(
      kernel(), *problem(seed), ridge=0.1 + seed
    ),
  }


def kernel_cases():
  for name, kernel in KERNELS.items():
    for call in calls_of(kernel):
      if name in ("function", "unhashable") and call.startswith(("call", "diag")):
        continue  # a user function runs unjitted
      yield pytest.param(name, call, id=f"{name}-{call}")


OTHERS = {
  "convolutional kernel": lambda seed: kipcore.ntk_fn(kipcore.conv_net(2))(
    images(seed), images(seed)[:3]
  ),
  "convolutional diag": lambda seed: kipcore.ntk_fn(kipcore.conv_net(2)).diag(images(seed)),
  "empirical_ntk": lambda seed: finite.empirical_ntk(
    MODULE.apply, MODULE.init(jax.random.key(0), rows(0)), jnp.asarray(rows(seed))
  ),
  "krr_fit": lambda seed: kipcore.krr_fit(gram(seed), jnp.asarray(rows(seed)), 0.1 + seed),
  "krr_predict": lambda seed: kipcore.krr_predict(fit(seed), gram(seed)),
  "krr_loss": lambda seed: kipcore.krr_loss(fit(seed), gram(seed), rows(seed), np.ones(12, "f4")),
  "relative_ridge": lambda seed: kipcore.relative_ridge(gram(seed), 0.1 + seed),
  "label_solve": lambda seed: kipcore.label_solve(gram(seed), gram(seed), rows(seed), 0.1 + seed),
  "one_hot_centered": lambda seed: kipcore.one_hot_centered(np.arange(5) % (seed + 1), 7),
  "apply a preprocess": lambda seed: PREPROCESS.apply(jnp.asarray(rows(seed))),
  "invert a preprocess": lambda seed: PREPROCESS.invert(jnp.asarray(rows(seed))),
  "evaluate_network": lambda seed: kipcore.evaluate_network(
    seed, kipcore.fc(1), *problem(seed), num_seeds=1, width=8, num_steps=2, learning_rate=0.1 + seed
  ),
  "network": lambda seed: kipcore.network(kipcore.fc(1), 8).init(jax.random.key(seed), rows(seed)),
}
PREPROCESS = kipcore.fit_preprocess(rows(0), "zca")


def gram(seed):
  return kipcore.rbf_fn(1.0)(jnp.asarray(rows(seed)))


def fit(seed):
  return kipcore.krr_fit(gram(seed), jnp.asarray(rows(seed)), 0.5)


def check(call):
  with standard_promotion():
    with compilations() as first:
      jax.block_until_ready(call(0))
    with compilations() as second:
      jax.block_until_ready(call(1))
  assert not second, f"the second call compiled {len(second)} programs (the first: {len(first)})"


@pytest.mark.parametrize("name, call", list(kernel_cases()))
def test_functions_of_kernels_compile_once(name, call):
  check(calls_of(KERNELS[name])[call])


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_compile_once(name):
  check(OTHERS[name])


def test_a_new_shape_and_a_new_kernel_are_counted():
  """The counter works, so the tests above can fail."""
  for kernel, n in (
    (kipcore.rbf_fn(7.0), 12),
    (kipcore.rbf_fn(8.0), 12),
    (kipcore.rbf_fn(8.0), 13),
  ):
    with compilations() as found:
      kernel(jnp.asarray(rows(0, n)))
    assert found


def test_kernels_compare_by_value():
  for name, kernel in KERNELS.items():
    if name not in ("function", "unhashable"):
      assert kernel() == kernel() and hash(kernel()) == hash(kernel()), name
  assert kipcore.rbf_fn(1.0) != kipcore.rbf_fn(2.0)
  assert kipcore.ntk_fn(kipcore.fc(1)) != kipcore.nngp_fn(kipcore.fc(1))
  assert StaxKernel(STAX) != StaxKernel(to_stax(kipcore.fc(1))[2])


def test_gram_matvec_does_not_store_the_matrix():
  """The scratch memory of the default block size is that of a block, forward and backward."""
  n = 8192

  def scratch(fn):
    x, v = jax.ShapeDtypeStruct((n, 4), jnp.float32), jax.ShapeDtypeStruct((n, 2), jnp.float32)
    return jax.jit(fn).lower(x, v).compile().memory_analysis().temp_size_in_bytes

  kernel = kipcore.rbf_fn(1.0)
  product = lambda x, v: kipcore.gram_matvec(kernel, x, x, v)
  assert scratch(product) < n * n * 4 / 2
  assert scratch(jax.grad(lambda x, v: jnp.sum(product(x, v)))) < 2 * n * n * 4


def test_kernels_that_close_over_traced_values_are_differentiable(x64):
  """The derivative by the bandwidth of a user's kernel, outside and inside jit and vmap."""
  x = jnp.asarray(rows(0), jnp.float64)

  def total(bandwidth):
    kernel = lambda x1, x2=None: jnp.exp(
      -jnp.sum((x1[:, None] - (x1 if x2 is None else x2)[None]) ** 2, axis=-1) / bandwidth
    )
    product = kipcore.gram_matvec(kernel, x, x, x, 5)
    return jnp.sum(kipcore.gram(kernel, x, None, 5) ** 2) + jnp.sum(product * x)

  slope = (total(3.0 + 1e-5) - total(3.0 - 1e-5)) / 2e-5
  for gradient in (jax.grad(total), jax.jit(jax.grad(total))):
    np.testing.assert_allclose(gradient(3.0), slope, rtol=1e-7)
  np.testing.assert_allclose(jax.vmap(jax.grad(total))(jnp.array([3.0]))[0], slope, rtol=1e-7)


def test_kernels_map_over_devices():
  """A kernel and `gram` give equal results inside and outside pmap."""
  kernel, x = kipcore.ntk_fn(kipcore.fc(1)), jnp.asarray(rows(0, 8)).reshape(2, 4, 5)
  mapped = jax.pmap(lambda a: kernel(a, x[0]) + kipcore.gram(kernel, a, x[0], 3))(x)
  expected = jnp.stack([2 * kernel(a, x[0]) for a in x])
  np.testing.assert_allclose(mapped, expected, rtol=1e-5)
