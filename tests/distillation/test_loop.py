"""The KIP method and the loop: gradients, unbiased batches, devices, continuation, failures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, assert_close, check_gradient, same_on_devices

import kipcore
from kipcore.distillation import importance, loop, samplers
from kipcore.distillation.method import Batch
from kipcore.distillation.methods import kip
from kipcore.distillation.optimizers import NamedOptimizer
from kipcore.kernels.stax import to_stax
from kipcore.types import Support


def problem(dtype=np.float32, n=200, m=6, c=3, d=8, seed=0):
  rng = np.random.default_rng(seed)
  means = 0.8 * rng.normal(size=(c, d))
  labels = np.sort(rng.integers(0, c, n))
  x = (means[labels] + rng.normal(size=(n, d))).astype(dtype)
  y = (np.eye(c)[labels] - 1 / c).astype(dtype)
  rows = np.concatenate([np.flatnonzero(labels == k)[: m // c] for k in range(c)])
  return Support(jnp.asarray(x[rows]), jnp.asarray(y[rows])), x, y


def distiller(
  options=kip.KIPOptions(relative_ridge=1e-3),
  batch_size=60,
  sampler="uniform",
  rate=0.05,
  kernel=kipcore.ntk_fn(kipcore.fc(1)),
):
  return loop.Distiller(
    kip.kip(kernel, options), importance.sampler(sampler), optax.adam(rate), batch_size
  )


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_loss_equals_numpy_and_gradient_finite_differences(loss, x64):
  support, x, y = problem(np.float64)
  kernel = kipcore.ntk_fn(kipcore.fc(2))
  method = kip.kip(kernel, kip.KIPOptions(1e-3, loss, True, 7.0))
  params = method.init_params(support)
  weights = jnp.asarray(np.random.default_rng(1).uniform(0, 2, 50))
  batch = Batch(jnp.asarray(x[::4]), jnp.asarray(y[::4]))
  f = jax.jit(lambda p: method.loss(p, (), batch, weights, None)[0])

  k_ss, k_ts = np.asarray(kernel(support.x)), np.asarray(kernel(batch.x, support.x))
  p = k_ts @ np.linalg.solve(k_ss + 1e-3 * np.trace(k_ss) / 6 * np.eye(6), np.asarray(support.y))
  if loss == "mse":
    expected = 0.5 * ((p - np.asarray(batch.y)) ** 2).mean(1)
  else:
    z = 7.0 * p
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(50), np.asarray(batch.y).argmax(1)]
  value, info = method.loss(params, (), batch, weights, None)
  np.testing.assert_allclose(info.per_example, expected, rtol=1e-9)
  np.testing.assert_allclose(value, np.mean(weights * expected), rtol=1e-9)

  check_gradient(f, params)


@FLOAT64_IS_SLOW
def test_only_requested_parameters_are_learned(dtype):
  support, x, y = problem(dtype)
  for options, learned in (
    (kip.KIPOptions(1e-3), {"x"}),
    (kip.KIPOptions(1e-3, learn_labels=True), {"x", "y"}),
    (kip.KIPOptions(1e-3, "cross_entropy"), {"x", "log_temperature"}),
  ):
    result = loop.distill(0, distiller(options), support, x, y, 3)
    start = distiller(options).method.init_params(support)
    changed = {
      name for name, value in result.state.params.items() if not np.array_equal(value, start[name])
    }
    assert changed == learned


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@FLOAT64_IS_SLOW
def test_distilling_teaches(loss, dtype):
  support, x, y = problem(dtype, n=400, m=3)
  options = kip.KIPOptions(1e-3, loss, True)
  result = loop.distill(1, distiller(options), support, x, y, 150)
  kernel = kipcore.ntk_fn(kipcore.fc(1))
  before, after = (
    kipcore.evaluate_krr(kernel, s, x, y, relative_ridge=1e-3) for s in (support, result.support)
  )
  assert after.accuracy > before.accuracy + 0.05
  assert result.history[-1]["loss"] < 0.7 * result.history[1]["loss"]
  assert [r["step"] for r in result.history] == [0, 1, 2, 5, 10, 20, 50, 100, 150]


def test_follows_the_neural_tangents_kernel_step_for_step(x64):
  support, x, y = problem(np.float64)
  arch = kipcore.fc(1)
  ours = loop.distill(0, distiller(), support, x, y, 30)
  theirs = loop.distill(0, distiller(kernel=kipcore.from_stax(to_stax(arch)[2])), support, x, y, 30)
  for a, b in zip(ours.history, theirs.history):
    assert a["step"] == b["step"] and abs(a.get("loss", 0) - b.get("loss", 0)) < 1e-9
  assert_close(ours.support.x, theirs.support.x, rtol=1e-7)


def test_loss_and_gradient_of_a_batch_do_not_depend_on_the_number_of_devices(x64):
  """One SGD step on all rows: all device counts see the same targets, also in uneven shards."""
  support, x, y = problem(np.float64, n=203)
  same_on_devices(distiller().method, support, x, y, rtol=1e-12, counts=(1, 2, 8))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_runs_are_determined_by_the_seed(num_devices):
  support, x, y = problem()
  runs = [
    loop.distill(seed, distiller(), support, x, y, 12, devices=jax.devices()[:num_devices])
    for seed in (0, 0, 1)
  ]
  assert np.array_equal(runs[0].support.x, runs[1].support.x)
  assert not np.array_equal(runs[0].support.x, runs[2].support.x)


@FLOAT64_IS_SLOW
def test_mapped_loop_equals_plain_steps(dtype):
  """`distill` on one device is `distill_step` under a Python loop."""
  support, x, y = problem(dtype)
  d, key = distiller(), jax.random.key(3)
  result = loop.distill(key, d, support, x, y, 7)
  targets = jax.tree.map(
    lambda a: jnp.asarray(a[0]), loop.arrange_targets(x, y, 1, kipcore.keys.stream(key, "arrange"))
  )
  state = loop.distill_init(key, d, support, targets.class_counts, targets.x.shape[0])
  step = jax.jit(lambda s: loop.distill_step(key, d, s, targets))
  for _ in range(7):
    state, info = step(state)
  assert state.step == 7 and info.status == 0
  assert_close(result.support.x, state.params["x"], rtol=10 * RTOL[dtype.name])


def test_arranged_shards_contain_every_row_once():
  _, x, y = problem(n=203)
  targets = loop.arrange_targets(x, y, 8, jax.random.key(0))
  counts = targets.class_counts.sum(1)
  rows = np.concatenate([targets.x[d, : counts[d]] for d in range(8)])
  assert sorted(map(tuple, rows)) == sorted(map(tuple, x))
  assert counts.max() - counts.min() <= 1 and np.isclose(targets.share.mean(), 1.0)
  for d in range(8):
    labels = targets.y[d, : counts[d]].argmax(1)
    assert (np.diff(labels) >= 0).all() and (
      np.bincount(labels, minlength=3) == targets.class_counts[d]
    ).all()


@pytest.mark.parametrize("size", [1, 7, 50, 203, 300])
def test_uniform_draw_is_unbiased_and_distinct(size):
  n = 203
  f = np.random.default_rng(0).normal(size=n) + 3
  sampler = samplers.uniform()
  keys = jax.random.split(jax.random.key(0), 2000)
  indices, weights = jax.vmap(lambda k: sampler.draw(k, jnp.asarray(n, jnp.int32), size))(keys)
  indices, weights = np.asarray(indices), np.asarray(weights, np.float64)
  assert indices.min() >= 0 and indices.max() < n
  if size <= n:
    assert all(len(set(row)) == size for row in indices[:50])
  means = (weights * f[indices]).mean(1)
  assert abs(means.mean() - f.mean()) < 4 * means.std() / np.sqrt(len(means)) + 1e-6
  frequency = np.bincount(indices.ravel(), minlength=n) / indices.size
  assert frequency.min() > 0


def test_class_balanced_draw_gives_each_class_its_share():
  counts = jnp.asarray([5, 100, 3], jnp.int32)
  indices, weights = samplers.class_balanced().draw(jax.random.key(0), counts, 20)
  labels = np.searchsorted(np.cumsum([5, 100, 3]), np.asarray(indices), side="right")
  assert (np.bincount(labels) == [7, 7, 6]).all() and (np.asarray(weights) == 1).all()
  keys = jax.random.split(jax.random.key(1), 200)
  many = jax.jit(jax.vmap(lambda key: samplers.class_balanced().draw(key, counts, 20)[0]))(keys)
  seen = set(np.asarray(many).ravel().tolist())
  assert seen == set(range(108))


def test_a_failure_names_the_step():
  support, x, y = problem()
  with pytest.raises(kipcore.NumericalError, match=r"distillation at step \d+ failed .*NOT_FINITE"):
    loop.distill(0, distiller(rate=1e30), support, x, y, 50)
  repeated = Support(jnp.concatenate([support.x] * 2), jnp.concatenate([support.y] * 2))
  with pytest.raises(
    kipcore.NumericalError, match=r"step 1 failed \(NOT_POSITIVE_DEFINITE\).*larger ridge"
  ):
    loop.distill(0, distiller(kip.KIPOptions(1e-12), kernel=kipcore.linear_fn()), repeated, x, y, 5)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda s, x, y: loop.distill(0, distiller(), s, x[:, :3], y, 1), "x_target: expected shape"),
    (lambda s, x, y: loop.distill(0, distiller(), s, x, y[:, :2], 1), "y_target: expected shape"),
    (lambda s, x, y: loop.distill(0, distiller(), s, x[:9], y, 1), "same number of rows"),
    (lambda s, x, y: loop.distill(0, distiller(), s, x, y, -1), "num_steps"),
    (lambda s, x, y: loop.distill(0, distiller(batch_size=0), s, x, y, 1), "batch_size"),
    (
      lambda s, x, y: loop.distill(0, distiller(), Support(s.x, s.y[:2]), x, y, 1),
      "same number of rows",
    ),
    (
      lambda s, x, y: loop.distill(0, distiller(), s, x[:3], y[:3], 1, devices=jax.devices()),
      "3 rows for 8 devices",
    ),
    (
      lambda s, x, y: kip.kip(kipcore.linear_fn(), kip.KIPOptions(relative_ridge=0.0)),
      "relative_ridge",
    ),
    (
      lambda s, x, y: kip.kip(kipcore.linear_fn(), kip.KIPOptions(loss="hinge")),
      "expected one of mse, cross_entropy",
    ),
    (lambda s, x, y: importance.sampler("best"), "expected one of uniform, class_balanced"),
    (lambda s, x, y: NamedOptimizer("adam", -1.0, 3), "learning_rate"),
    (lambda s, x, y: NamedOptimizer("adam", 1.0, 3, "linear"), "schedule"),
  ],
)
def test_wrong_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(*problem())


def test_networks_learn_from_a_support():
  support, x, y = problem(n=300, m=30)
  options = dict(num_seeds=2, width=64, num_steps=200, learning_rate=1e-2)
  accuracy = kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, **options)
  assert accuracy.shape == (2,) and accuracy.min() > 0.55 and accuracy[0] != accuracy[1]
  again = kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, **options)
  assert np.array_equal(accuracy, again)


def test_blockwise_evaluation_equals_evaluation_at_once(dtype):
  support, x, y = problem(dtype)
  kernel = kipcore.ntk_fn(kipcore.fc(1))
  whole = kipcore.evaluate_krr(kernel, support, x, y, ridge=0.01)
  blocks = kipcore.evaluate_krr(kernel, support, x, y, ridge=0.01, block_size=7)
  assert whole.accuracy == blocks.accuracy
  np.testing.assert_allclose(whole.loss, blocks.loss, rtol=10 * RTOL[dtype.name])
  with pytest.raises(ValueError, match="one of ridge and relative_ridge"):
    kipcore.evaluate_krr(kernel, support, x, y)
