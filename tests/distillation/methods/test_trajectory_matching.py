"""MTT: its loss and gradients, its experts, and their files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, check_gradient, everything, slow_except

import kipcore
from kipcore import augment, keys, networks
from kipcore.distillation import importance, loop, samplers
from kipcore.distillation.method import Batch
from kipcore.distillation.methods import experts, trajectory_matching
from kipcore.distillation.methods.trajectory_matching import TrajectoryMatchingOptions
from kipcore.io import trajectories
from kipcore.types import Support

BETA, WIDTH, C, D = 20.0, 5, 3, 4
MODULE = networks.network(kipcore.fc(1), WIDTH, C, softplus=BETA)
OPTIONS = TrajectoryMatchingOptions(3, 2, 2, 256, "", 0.1)


def data(n=23, dtype=np.float64, seed=0):
  """Unordered rows of three classes."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, C, n)
  x = rng.normal(size=(C, D))[labels] + 0.7 * rng.normal(size=(n, D))
  return x.astype(dtype), (np.eye(C)[labels] - 1 / C).astype(dtype)


def some_experts(dtype=np.float64, count=2, epochs=4, x=None, y=None, **options):
  x, y = data(dtype=dtype) if x is None else (x, y)
  train = functools.partial(
    experts.train_expert,
    module=MODULE,
    x=x,
    y=y,
    num_epochs=epochs,
    learning_rate=0.1,
    batch_size=5,
  )
  return np.stack([train(i, **options) for i in range(count)])


@pytest.fixture(scope="module")
def small():
  """Support, targets and experts in float32, created once."""
  x, y = data(60, np.float32)
  return Support(jnp.asarray(x[:6]), jnp.asarray(y[:6])), x, y, some_experts(x=x, y=y)


# Explicit network: softplus(BETA z) / BETA between two dense layers; flat order is that of the
# sorted names.
def unflatten(theta):
  sizes = [(WIDTH,), (C,), (D, WIDTH), (WIDTH, C)]
  parts = np.split(theta, np.cumsum([np.prod(s) for s in sizes])[:-1])
  return [part.reshape(size) for part, size in zip(parts, sizes)]


def forward(theta, x):
  b1, b2, w1, w2 = unflatten(theta)
  z = x @ w1 + b1
  hidden = np.logaddexp(0, BETA * z) / BETA
  logits = hidden @ w2 + b2
  softmax = np.exp(logits - logits.max(1, keepdims=True))
  return z, hidden, softmax / softmax.sum(1, keepdims=True)


def gradient(theta, x, y, weights):
  """Explicit gradient of sum_i weights_i CE(f(x_i), class of y_i)."""
  _, _, _, w2 = unflatten(theta)
  z, hidden, softmax = forward(theta, x)
  error = weights[:, None] * (softmax - np.eye(C)[y.argmax(1)])
  back = error @ w2.T / (1 + np.exp(-BETA * z))
  return np.concatenate(
    [back.sum(0), error.sum(0), (x.T @ back).ravel(), (hidden.T @ error).ravel()]
  )


def matching_loss(x, log_rate, y, start, goal, batches):
  theta = start
  for rows in batches:
    theta = theta - np.exp(log_rate) * gradient(
      theta, x[rows], y[rows], np.full(len(rows), 1 / len(rows))
    )
  return np.sum((theta - goal) ** 2) / np.sum((start - goal) ** 2)


@pytest.mark.parametrize("syn_batch, num_steps", slow_except([(256, 3), (2, 4)], (2, 4)))
def test_loss_and_gradients_equal_a_student_by_hand(syn_batch, num_steps, x64):
  """With batches of 2 of 5 rows, step 3 has a single row and step 4 starts a new permutation."""
  x, y = data()
  method = trajectory_matching.mtt(
    MODULE, some_experts(), dataclasses.replace(OPTIONS, syn_batch=syn_batch, syn_steps=num_steps)
  )
  params = method.init_params(Support(jnp.asarray(x[:5]), jnp.asarray(y[:5])))
  aux, key = method.init_aux(jax.random.key(1), params), jax.random.key(2)
  batch, weights = Batch(jnp.asarray(x), jnp.asarray(y)), jnp.ones((23,))
  loss = jax.jit(lambda params: method.loss(params, aux, batch, weights, key))
  (value, info), slopes = jax.value_and_grad(loss, has_aux=True)(params)

  passes = [
    np.asarray(jax.random.permutation(keys.at_step(keys.stream(key, "order"), i), 5))
    for i in range(2)
  ]
  batches = [p[i : i + syn_batch] for p in passes for i in range(0, 5, syn_batch)][:num_steps]
  batches = [np.arange(5)] * num_steps if syn_batch > 5 else batches
  by_hand = lambda x, log_rate: matching_loss(x, log_rate, y[:5], *np.asarray(aux), batches)
  np.testing.assert_allclose(value, by_hand(x[:5], np.log(0.1)), rtol=1e-10)
  assert 0 < value < 1.5 and info.predictions.shape == y.shape and info.status == 0

  h, expected = 1e-5, np.zeros((5, D))
  for i, j in np.ndindex(5, D):
    ahead, behind = x[:5].copy(), x[:5].copy()
    ahead[i, j], behind[i, j] = ahead[i, j] + h, behind[i, j] - h
    expected[i, j] = (by_hand(ahead, np.log(0.1)) - by_hand(behind, np.log(0.1))) / (2 * h)
  assert_close(slopes["x"], expected, rtol=1e-6)
  slope = (by_hand(x[:5], np.log(0.1) + h) - by_hand(x[:5], np.log(0.1) - h)) / (2 * h)
  np.testing.assert_allclose(slopes["log_rate"], slope, rtol=1e-6)


@pytest.mark.slow
def test_augmented_gradient_of_a_convolutional_network(x64):
  """Against finite differences, through four student steps with one transform each."""
  module = networks.network(kipcore.conv_net(1), 4, C, norm="instance")
  rng = np.random.default_rng(0)
  support = Support(jnp.asarray(rng.normal(size=(4, 8, 8, 1))), jnp.asarray(data(4)[1]))
  size, _ = experts.flat_parameters(module, support.x)
  walk = np.cumsum(0.3 * rng.normal(size=(1, 3, size)), axis=1)
  plain, augmented = (
    trajectory_matching.mtt(module, walk, TrajectoryMatchingOptions(4, 1, 1, 3, names, 0.1))
    for names in ("", augment.DSA)
  )
  params = plain.init_params(support)
  aux, batch = plain.init_aux(jax.random.key(0), params), Batch(support.x, support.y)
  loss = jax.jit(lambda params, key: augmented.loss(params, aux, batch, jnp.ones((4,)), key)[0])
  key, other = jax.random.key(1), jax.random.key(2)
  values = (
    loss(params, key),
    loss(params, other),
    plain.loss(params, aux, batch, jnp.ones((4,)), key)[0],
  )
  assert np.isfinite(values).all() and len(set(map(float, values))) == 3
  check_gradient(lambda params: loss(params, key), params, ("x", "log_rate"), h=1e-6, rtol=1e-5)


def test_losses_of_unchanged_student_and_of_student_equal_to_expert(x64):
  """With full batches an epoch is one step, so the data themselves lead the student to the expert.

  Fewer steps end farther from it.
  """
  x, y = data()
  rate, epochs = 0.2, 6
  walk = experts.train_expert(0, MODULE, x, y, epochs, rate, batch_size=99)[None]
  losses = []
  for num_steps in (0, 3, 6):
    method = trajectory_matching.mtt(
      MODULE, walk, TrajectoryMatchingOptions(num_steps, epochs, 0, 256, "", rate)
    )
    params = method.init_params(Support(jnp.asarray(x), jnp.asarray(y)))
    aux = method.init_aux(jax.random.key(0), params)
    assert np.array_equal(aux, walk[0, [0, epochs]])
    losses.append(
      float(
        method.loss(
          params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.ones((23,)), jax.random.key(1)
        )[0]
      )
    )
  assert losses[0] == 1 and losses[-1] < 1e-20 and (np.diff(losses) < 0).all()


@pytest.mark.parametrize(
  "sampler",
  [samplers.class_balanced(), importance.importance("residual_norm", least_gain=1.0)],
  ids=lambda s: s.name,
)
def test_expert_equals_a_plain_training_loop(sampler, x64):
  """Batches and weights are from the sampler, which gets softmax - 1/c; gradients are explicit."""
  x, y = data()
  num_epochs, rate, momentum, size = 3, 0.1, 0.5, 5
  walk = experts.train_expert(7, MODULE, x, y, num_epochs, rate, size, sampler, momentum)
  key = jax.random.key(7)
  targets = loop.arrange_targets(x, y, 1, keys.stream(key, "arrange"))
  x, y = targets.x[0], targets.y[0]
  draw, update = jax.jit(sampler.draw, static_argnums=2), jax.jit(sampler.update)
  state = sampler.init(jnp.asarray(targets.class_counts[0]), 23)
  theta, velocity, seen, weighted = np.asarray(walk[0]), 0, [], set()
  for i in range(num_epochs * 5):
    step_key = keys.at_step(keys.stream(key, "step"), i)
    rows, weights = draw(keys.stream(step_key, "draw"), state, size)
    rows, weights = np.asarray(rows), np.asarray(weights, np.float64)
    softmax = forward(theta, x[rows])[2]
    info = kipcore.LossInfo(
      jnp.zeros((size,)), jnp.asarray(softmax - 1 / C), jnp.zeros(()), jnp.zeros((), jnp.int32)
    )
    state = update(state, jnp.asarray(rows), jnp.asarray(y[rows]), info)
    velocity = momentum * velocity + gradient(theta, x[rows], y[rows], weights / size)
    theta = theta - rate * velocity
    weighted |= set(weights)
    if (i + 1) % 5 == 0:
      seen.append(theta)
  assert walk.shape == (num_epochs + 1, theta.size)
  assert_close(walk[1:], np.stack(seen), rtol=1e-9)
  assert (len(weighted) > 1) == (sampler.name == "residual_norm")
  assert np.array_equal(
    walk, experts.train_expert(7, MODULE, *data(), num_epochs, rate, size, sampler, momentum)
  )


def test_experts_also_learn_from_misclassified_rows(small):
  _, x, y, walks = small
  hard = experts.train_expert(
    0, MODULE, x, y, 12, 0.2, 10, importance.sampler("cross_entropy", least_gain=1.0)
  )

  def cross_entropy(theta):
    return -np.mean(
      np.log(forward(np.asarray(theta, np.float64), x)[2][np.arange(60), y.argmax(1)])
    )

  assert cross_entropy(hard[-1]) < 0.6 * cross_entropy(hard[0]) and cross_entropy(
    walks[0, -1]
  ) < 0.8 * cross_entropy(walks[0, 0])
  assert np.array_equal(hard[0], walks[0, 0]) and not np.array_equal(hard[1], walks[0, 1])


def test_one_compilation_serves_all_experts(small):
  _, x, y, _ = small
  before = experts._train._cache_size()
  a, b = (
    experts.train_expert(seed, MODULE, x, y, 5, rate, 7) for seed, rate in ((0, 0.1), (1, 0.05))
  )
  assert experts._train._cache_size() == before + 1 and not np.array_equal(a, b)


@pytest.mark.parametrize(
  "sampler", [samplers.uniform(), importance.importance("residual_norm", least_gain=1.0)]
)
def test_an_interrupted_expert_continues_with_equal_bits(sampler, small, tmp_path, monkeypatch):
  """At any number of steps, also within an epoch, and through the file of its state."""
  _, x, y, _ = small
  arguments = (3, MODULE, x, y, 4, 0.2, 7, sampler, 0.9)
  monkeypatch.setattr(experts, "_FIRST_STEPS", 2)
  monkeypatch.setattr(experts, "_PROGRESS_SECONDS", 0.0)
  whole = experts.train_expert(*arguments, validation=(x[:20], y[:20]))
  path, seen = tmp_path / "state.npz", []

  class Interruption(Exception):
    pass

  def interrupted(state):
    trajectories.save_expert_state(path, state, {"seed": 3})
    seen.append(state.step)
    if len(seen) in (2, 15):
      raise Interruption

  start = None
  for _ in range(2):
    with pytest.raises(Interruption):
      experts.train_expert(
        *arguments, validation=(x[:20], y[:20]), start=start, progress=interrupted
      )
    start, about = trajectories.load_expert_state(path)
    assert about == {"seed": 3}
  assert seen[1] % 9 and len(start.trajectory) < 5
  last = []
  rest = experts.train_expert(
    *arguments, validation=(x[:20], y[:20]), start=start, progress=last.append
  )
  assert rest.tobytes() == whole.tobytes() and last[0].step > start.step
  # A finished training is returned without a step.
  done = experts.train_expert(*arguments, start=last[-1], progress=lambda state: 1 / 0)
  assert done.tobytes() == whole.tobytes()
  accuracies = [
    np.mean(forward(np.asarray(theta, np.float64), x[:20])[2].argmax(1) == y[:20].argmax(1))
    for theta in whole[1:]
  ]
  np.testing.assert_allclose(last[-1].accuracies, accuracies, rtol=1e-6)


def test_an_expert_stops_when_its_validation_accuracy_does_not_improve(small):
  _, x, y, _ = small
  states = []
  arguments = (0, MODULE, x, y, 30, 0.5, 20)
  full = experts.train_expert(*arguments, validation=(x, y), progress=states.append)
  accuracies = states[-1].accuracies
  for patience in (1, 3):
    found = experts.train_expert(*arguments, validation=(x, y), patience=patience)
    best, wanted = -1.0, 30
    for epoch, accuracy in enumerate(accuracies, 1):
      if accuracy > best:
        best, last = accuracy, epoch
      if epoch - last >= patience:
        wanted = epoch
        break
    assert wanted < 30 and len(found) == wanted + 1
    assert np.array_equal(found, full[: wanted + 1])


def test_states_of_another_training_are_refused(small, tmp_path):
  _, x, y, _ = small
  states = []
  experts.train_expert(0, MODULE, x, y, 2, 0.1, 20, progress=states.append)
  state = states[-1]
  for changed, message in (
    (state._replace(parameters=state.parameters[:-1]), "start.parameters: expected shape"),
    (state._replace(step=100), "start.step: expected 6 to 8 after 2 epochs, got 100"),
    (state._replace(sampler=()), "start.sampler: expected arrays of shapes"),
  ):
    with pytest.raises(ValueError, match=message):
      experts.train_expert(0, MODULE, x, y, 2, 0.1, 20, start=changed)
  with pytest.raises(ValueError, match="patience: expected 0 without validation rows, got 2"):
    experts.train_expert(0, MODULE, x, y, 2, patience=2)
  (tmp_path / "state.npz").write_bytes(b"no archive")
  with pytest.raises(trajectories.TrajectoriesError, match="expected the unfinished training"):
    trajectories.load_expert_state(tmp_path / "state.npz")


def test_augmented_experts_see_transformed_images():
  module = networks.network(kipcore.conv_net(1), 4, C)
  x, y = (
    np.random.default_rng(0).normal(size=(9, 8, 8, 1)).astype(np.float32),
    data(9, np.float32)[1],
  )
  plain, flipped = (
    experts.train_expert(0, module, x, y, 2, 0.1, 9, augmentation=names) for names in ("", "color")
  )
  assert np.array_equal(plain[0], flipped[0]) and not np.array_equal(plain[1], flipped[1])


def test_diverging_expert_is_reported(small):
  _, x, y, _ = small
  with pytest.raises(kipcore.NumericalError, match="training of an expert failed .NOT_FINITE"):
    experts.train_expert(0, MODULE, x, y, 8, 1e38, 10)


def distiller(
  walks,
  sampler,
  optimizer=optax.sgd(0.3, momentum=0.5),
  options=dataclasses.replace(OPTIONS, rate_factor=0.1),
):
  return loop.Distiller(trajectory_matching.mtt(MODULE, walks, options), sampler, optimizer, 16)


@pytest.mark.slow
def test_runs_do_not_depend_on_devices_or_expert_storage(small, tmp_path, x64):
  """Expert files are read by a callback in a loop on 8 devices; equal seeds give equal bits."""
  x, y, walks = small[1].astype(np.float64), small[2].astype(np.float64), small[3]
  support = Support(jnp.asarray(x[:6]), jnp.asarray(y[:6]))
  trajectories.save_trajectories(tmp_path / "e.npy", walks, {})
  on_disk = trajectories.load_trajectories(tmp_path / "e.npy").array
  runs = [
    loop.distill(0, distiller(source, everything()), support, x, y, 4, devices=jax.devices()[:d])
    for source, d in ((walks, 1), (on_disk, 2), (on_disk, 8), (walks, 8))
  ]
  for other in runs[1:3]:
    np.testing.assert_allclose(
      [r["loss"] for r in other.history[1:]], [r["loss"] for r in runs[0].history[1:]], rtol=1e-9
    )
    assert_close(other.support.x, runs[0].support.x, rtol=1e-9)
  assert np.array_equal(runs[2].support.x, runs[3].support.x)


@pytest.mark.parametrize("sampler", slow_except(["uniform", "cross_entropy"], "cross_entropy"))
def test_distilling_teaches(small, sampler):
  support, x, y, walks = small
  d = distiller(walks, importance.sampler(sampler))
  result = loop.distill(0, d, support, x, y, 60)
  start = d.method.init_params(support)
  loss = jax.jit(
    lambda params, aux: d.method.loss(
      params, aux, Batch(jnp.asarray(x), jnp.asarray(y)), jnp.ones((60,)), jax.random.key(0)
    )[0]
  )
  draw = jax.jit(lambda key: d.method.init_aux(key, start))
  draws = [draw(jax.random.key(i)) for i in range(12)]
  before, after = (
    np.mean([loss(params, aux) for aux in draws]) for params in (start, result.state.params)
  )
  assert after < 0.7 * before
  assert (
    np.array_equal(result.support.y, support.y)
    and result.state.params["log_rate"] != start["log_rate"]
  )


def test_all_experts_and_starts_are_drawn_and_none_is_a_program_constant(small):
  support, _, _, walks = small
  method = trajectory_matching.mtt(MODULE, walks, OPTIONS)
  params = method.init_params(support)
  draw = jax.jit(lambda key: method.update_aux(key, params, None, 0))
  pairs = {np.asarray(draw(key)).tobytes() for key in jax.random.split(jax.random.key(0), 60)}
  assert pairs == {walks[e, [t, t + 2]].tobytes() for e in range(2) for t in range(3)}
  jaxpr = jax.make_jaxpr(draw)(jax.random.key(0))
  assert "pure_callback" in str(jaxpr) and walks[0, 0].size * 2 < walks.size
  assert all(np.size(c) < walks.size for c in jaxpr.consts)
  many = jax.vmap(lambda key: method.init_aux(key, params))(jax.random.split(jax.random.key(1), 3))
  assert many.shape == (3, 2, walks.shape[2])


def test_unchanging_experts_are_a_reported_failure(small):
  support, x, y, walks = small
  with pytest.raises(kipcore.NumericalError, match="distillation at step 1 failed .NOT_FINITE"):
    loop.distill(0, distiller(np.ones_like(walks), samplers.uniform()), support, x, y, 2)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_files_round_trip_bit_for_bit(kind, tmp_path):
  path, rng = tmp_path / "experts.npy", np.random.default_rng(0)
  walks = rng.normal(size=(12, 3, 7)).astype(kind)
  alive = []

  def one_by_one():
    for walk in walks:
      alive.append(sorted(p.name for p in tmp_path.iterdir()))
      yield walk

  trajectories.save_trajectories(path, one_by_one(), {"architecture": "FC1", "seed": 0})
  loaded = trajectories.load_trajectories(path)
  assert (
    isinstance(loaded.array, np.memmap) and loaded.array.mode == "r" and loaded.array.dtype == kind
  )
  assert np.array_equal(loaded.array, walks) and np.array_equal(np.load(path), walks)
  assert loaded.metadata["architecture"] == "FC1" and loaded.metadata["shape"] == [12, 3, 7]
  assert all("experts.npy" not in names and len(names) == 1 for names in alive)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["experts.json", "experts.npy"]
  trajectories.save_trajectories(path, walks[:2] + 1, {})
  assert np.array_equal(trajectories.load_trajectories(path).array, walks[:2] + 1)


def test_failed_save_keeps_the_old_files(tmp_path):
  path, walks = tmp_path / "experts.npy", np.ones((2, 3, 4))
  trajectories.save_trajectories(path, walks, {"seed": 1})

  def interrupted():
    yield walks[0]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    trajectories.save_trajectories(path, interrupted(), {"seed": 2})
  for wrong, message in (
    ([], "at least one"),
    ([walks[0], walks[0, :2]], r"\[1\]: expected shape \(3, 4\)"),
    ([walks[0], walks[0].astype(np.float32)], "in float64 like the first"),
    ([walks[0, 0]], "epochs . 1, p"),
    ([walks[0].astype(int)], "float32 or float64"),
    ([walks[0] * np.nan], r"\[0\]: expected finite"),
  ):
    with pytest.raises(ValueError, match=message):
      trajectories.save_trajectories(path, wrong, {})
  with pytest.raises(TypeError):
    trajectories.save_trajectories(path, iter(()), {"seed": object()})
  assert np.array_equal(trajectories.load_trajectories(path).array, walks)
  assert (
    trajectories.load_trajectories(path).metadata["seed"] == 1
    and len(list(tmp_path.iterdir())) == 2
  )


def test_damaged_files_are_named(tmp_path):
  path, beside = tmp_path / "experts.npy", tmp_path / "experts.json"
  load = lambda: trajectories.load_trajectories(path)

  def fresh():
    trajectories.save_trajectories(path, np.ones((2, 3, 4)), {})

  def rewritten(**changes):
    fresh()
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **changes}))

  with pytest.raises(trajectories.TrajectoriesError, match="experts.npy: expected .* no such file"):
    load()
  for damage, message in (
    (lambda: beside.unlink(), "experts.json: .* no such file"),
    (lambda: path.write_bytes(path.read_bytes()[:-9]), "does not open"),
    (lambda: path.write_bytes(b""), "does not open"),
    (lambda: np.save(path, np.array([{}])), "does not open"),
    (lambda: beside.write_text("{"), "expected the metadata"),
    (lambda: beside.write_text("[]"), "expected the metadata"),
    (lambda: np.save(path, np.ones((2, 3, 5))), "as its metadata say"),
    (lambda: rewritten(dtype="float32"), "as its metadata say"),
    (lambda: rewritten(format="other"), "expected format kipcore-trajectories"),
    (lambda: rewritten(format_version=2), "up to version 1"),
  ):
    fresh()
    damage()
    with pytest.raises(trajectories.TrajectoriesError, match=message):
      load()
  with pytest.raises(trajectories.TrajectoriesError, match="ends in .npy"):
    trajectories.load_trajectories(tmp_path / "experts.npz")


BATCH_NORM = networks.network(kipcore.conv_net(1), 4, C, norm="batch")


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda s, x, y, w: trajectory_matching.mtt(MODULE, w[0]),
      "trajectories: expected an array with 3 dimensions",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(MODULE, w),
      "trajectories: expected at least one expert with at least 29 points",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, max_start_epoch=3)
      ),
      "at least 6 points",
    ),
    (lambda s, x, y, w: trajectory_matching.mtt(MODULE, w[:0], OPTIONS), "at least one expert"),
    (
      lambda s, x, y, w: trajectory_matching.mtt(MODULE, w[..., 1:], OPTIONS).init_params(s),
      "trajectories: expected shape",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(MODULE, w, OPTIONS).init_params(
        Support(s.x, s.y[:, :2])
      ),
      "support.y: expected",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, syn_steps=-1)
      ),
      "syn_steps",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, expert_epochs=0)
      ),
      "expert_epochs",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, max_start_epoch=-1)
      ),
      "max_start_epoch",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, syn_batch=0)
      ),
      "syn_batch",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, initial_rate=0.0)
      ),
      "initial_rate",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, rate_factor=-1.0)
      ),
      "rate_factor",
    ),
    (
      lambda s, x, y, w: trajectory_matching.mtt(
        MODULE, w, dataclasses.replace(OPTIONS, augmentation="mixup")
      ),
      "augmentation",
    ),
    (
      lambda s, x, y, w: experts.flat_parameters(BATCH_NORM, np.ones((2, 8, 8, 1), np.float32)),
      "batch_stats",
    ),
    (lambda s, x, y, w: experts.train_expert(0, MODULE, x, y[:, :2], 1), "y: expected shape"),
    (lambda s, x, y, w: experts.train_expert(0, MODULE, x[:5], y, 1), "same number of rows"),
    (lambda s, x, y, w: experts.train_expert(0, MODULE, x, y, 0), "num_epochs"),
    (lambda s, x, y, w: experts.train_expert(0, MODULE, x, y, 1, batch_size=0), "batch_size"),
    (lambda s, x, y, w: experts.train_expert(0, MODULE, x, y, 1, 0.0), "learning_rate"),
    (lambda s, x, y, w: experts.train_expert(0, MODULE, x, y, 1, momentum=2.0), "momentum"),
    (
      lambda s, x, y, w: experts.train_expert(0, MODULE, x, y, 1, augmentation="mixup"),
      "augmentation",
    ),
    (
      lambda s, x, y, w: experts.train_expert(
        0, MODULE, x, y, 1, sampler=importance.sampler("margin", refresh_every=3)
      ),
      "refresh_every",
    ),
  ],
)
def test_wrong_input_is_named(call, message, small):
  with pytest.raises(ValueError, match=message):
    call(*small)
