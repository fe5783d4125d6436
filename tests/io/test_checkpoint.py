"""Interrupted and failed runs resume from snapshots, bit for bit on the same number of devices."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import resumes_exactly, slow_except, untimed

import kipcore
from kipcore.distillation.methods.kip import KIP

DEVICES = jax.devices()


def problem(n=203):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, n)
  x = (rng.normal(size=(n, 6)) + 1.5 * np.eye(3, 6)[labels]).astype(np.float32)
  y = np.asarray(kipcore.one_hot_centered(labels, 3))
  rows = kipcore.class_balanced_indices(0, labels, 2, 3)
  return kipcore.Support(jnp.asarray(x[rows]), jnp.asarray(y[rows])), x, y


METHOD = kipcore.kip(
  kipcore.ntk_fn(kipcore.fc(1)), kipcore.KIPOptions(relative_ridge=1e-3, learn_labels=True)
)


def distiller(sampler="cross_entropy", batch_size=48):
  sampler = (
    kipcore.sampler(sampler, least_gain=1.0, refresh_every=7)
    if isinstance(sampler, str)
    else sampler
  )
  return kipcore.Distiller(
    METHOD, sampler, optax.adam(optax.cosine_decay_schedule(0.02, 30)), batch_size
  )


@pytest.fixture(scope="module")
def kept():
  """The snapshots of a run on two devices after every call, and its result."""
  snapshots = []
  support, x, y = problem()
  result = kipcore.distill(
    0,
    distiller(),
    support,
    x,
    y,
    20,
    devices=DEVICES[:2],
    checkpoint_policy=kipcore.CheckpointPolicy(snapshots.append, 0.0),
  )
  return snapshots, result


@pytest.mark.parametrize(
  "num_devices, sampler",
  slow_except(
    [
      (n, sampler)
      for n in (1, 3)
      for sampler in ("uniform", "class_balanced", "cross_entropy", "squared_error", "margin")
    ],
    (1, "class_balanced"),
    (3, "cross_entropy"),
  ),
)
def test_resumed_run_is_bit_identical_to_uninterrupted_run(sampler, num_devices):
  resumes_exactly(distiller(sampler), *problem(), DEVICES[:num_devices], num_steps=12)


def test_snapshots_do_not_change_the_run_and_contain_all_scores(kept):
  snapshots, result = kept
  support, x, y = problem()
  plain = kipcore.distill(0, distiller(), support, x, y, 20, devices=DEVICES[:2])
  np.testing.assert_array_equal(plain.support.x, result.support.x)
  assert [s.step for s in snapshots] == sorted({s.step for s in snapshots}) and snapshots[
    -1
  ].step == 20
  assert snapshots[-1].num_devices == 2 and untimed(snapshots[-1].history) == untimed(plain.history)
  resumed = kipcore.distill(
    0, distiller(), support, x, y, 20, devices=DEVICES[:2], resume=snapshots[0]
  )
  np.testing.assert_array_equal(resumed.scores, plain.scores)


def test_stops_at_requested_step_and_resumes(kept):
  support, x, y = problem()
  asked, snapshots = iter([False, False, True]), []
  checkpoint_policy = kipcore.CheckpointPolicy(snapshots.append, 1e9, lambda: next(asked))
  stopped = kipcore.distill(
    0, distiller(), support, x, y, 20, devices=DEVICES[:2], checkpoint_policy=checkpoint_policy
  )
  assert [s.step for s in snapshots] == [int(stopped.state.step)] == [2]
  resumed = kipcore.distill(
    0, distiller(), support, x, y, 20, devices=DEVICES[:2], resume=snapshots[0]
  )
  np.testing.assert_array_equal(resumed.support.x, kept[1].support.x)


@pytest.mark.parametrize("num_devices", slow_except([1, 3], 3))
def test_resume_on_other_device_count_keeps_scores(kept, num_devices):
  """Rows are redistributed with their known scores, which draws follow from the second step on."""
  snapshots, result = kept
  support, x, y = problem()
  before, caught = snapshots[-2], []
  checkpoint_policy = kipcore.CheckpointPolicy(caught.append, 1e9, lambda: True)
  moved = kipcore.distill(
    0,
    distiller(),
    support,
    x,
    y,
    20,
    devices=DEVICES[:num_devices],
    resume=before,
    checkpoint_policy=checkpoint_policy,
  )
  there = kipcore.distill(
    0,
    distiller(),
    support,
    x,
    y,
    20,
    devices=DEVICES[:2],
    resume=before,
    checkpoint_policy=checkpoint_policy,
  )
  np.testing.assert_array_equal(moved.scores, there.scores)
  assert np.isfinite(moved.scores).sum() > 100
  np.testing.assert_array_equal(moved.support.x, there.support.x)
  done = kipcore.distill(
    0, distiller(), support, x, y, 20, devices=DEVICES[:num_devices], resume=before
  )
  assert (
    int(done.state.step) == 20
    and abs(done.history[-1]["loss"] / result.history[-1]["loss"] - 1) < 0.5
  )


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s, x, y: (kipcore.Support(s.x[:3], s.y[:3]), x, y, 20), "snapshot: expected"),
    (lambda s, x, y: (s, x[:100], y[:100], 20), "snapshot: expected"),
    (lambda s, x, y: (s, x, y, 3), "at most 3 steps"),
  ],
)
def test_a_snapshot_of_another_run_is_refused(kept, change, message):
  support, x, y, steps = change(*problem())
  with pytest.raises(ValueError, match=message):
    kipcore.distill(0, distiller(), support, x, y, steps, devices=DEVICES[:2], resume=kept[0][-1])


def test_failed_step_keeps_previous_state():
  """A NaN loss at the fifth step is reported, and the snapshot is that of four steps."""
  support, x, y = problem()

  @dataclasses.dataclass(frozen=True)
  class Failing(KIP):
    def loss(self, params, aux, batch, weights, key):
      value, info = super().loss(params, (), batch, weights, key)
      return jnp.where(aux >= 4, jnp.nan, 1.0) * value, info

    def init_aux(self, key, params):
      return jnp.int32(0)

    def update_aux(self, key, params, aux, step):
      return aux + 1

  method = Failing(METHOD.kernel_fn, METHOD.options)
  snapshots = []
  failing = dataclasses.replace(distiller("uniform"), method=method)
  with pytest.raises(kipcore.NumericalError, match="step 5 .*NOT_FINITE"):
    kipcore.distill(
      0,
      failing,
      support,
      x,
      y,
      20,
      devices=DEVICES[:1],
      checkpoint_policy=kipcore.CheckpointPolicy(snapshots.append),
    )
  four = kipcore.distill(0, failing, support, x, y, 4, devices=DEVICES[:1])
  assert [s.step for s in snapshots] == [4]
  assert all(
    np.array_equal(np.ravel(a), np.ravel(b))
    for a, b in zip(snapshots[0].arrays, jax.tree.leaves(four.state), strict=True)
  )


def test_diverging_run_finishes_with_smaller_learning_rate():
  """Gradient descent on sum x^4 diverges; at a millionth of the rate, the resumed run does not."""
  support, x, y = problem()

  @dataclasses.dataclass(frozen=True)
  class Quartic(KIP):
    def loss(self, params, aux, batch, weights, key):
      return jnp.sum(params["x"] ** 4), super().loss(params, aux, batch, weights, key)[1]

  wild = kipcore.Distiller(
    Quartic(METHOD.kernel_fn, METHOD.options), kipcore.sampler("uniform"), optax.sgd(1.0), 48
  )
  snapshots = []
  with pytest.raises(kipcore.NumericalError):
    kipcore.distill(
      0,
      wild,
      support,
      x,
      y,
      200,
      devices=DEVICES[:1],
      checkpoint_policy=kipcore.CheckpointPolicy(snapshots.append, 0.0),
    )
  slower = kipcore.scale_learning_rate(snapshots[0], 1e-6)
  done = kipcore.distill(0, wild, support, x, y, 200, devices=DEVICES[:1], resume=slower)
  assert int(done.state.step) == 200 and float(done.state.rate_scale) == np.float32(1e-6)
  with pytest.raises(ValueError, match="factor: expected"):
    kipcore.scale_learning_rate(snapshots[0], 0.0)


def test_checkpoints_round_trip_bit_for_bit_and_only_newest_are_kept(kept, tmp_path):
  snapshots, _ = kept
  checkpoints = kipcore.Checkpoints(tmp_path / "kept", {"seed": 0}, keep=2)
  for snapshot in snapshots:
    checkpoints.save(snapshot)
  assert checkpoints.steps() == [s.step for s in snapshots[-2:]]
  for step, snapshot in zip(checkpoints.steps(), snapshots[-2:]):
    read = kipcore.Checkpoints(tmp_path / "kept", {"seed": 0}).restore(step)
    assert [(a.dtype, a.shape, a.tobytes()) for a in read.arrays] == [
      (a.dtype, a.shape, a.tobytes()) for a in snapshot.arrays
    ]
    assert read[1:] == snapshot[1:]
  support, x, y = problem()
  read = checkpoints.restore(checkpoints.steps()[0])
  resumed = kipcore.distill(0, distiller(), support, x, y, 20, devices=DEVICES[:2], resume=read)
  np.testing.assert_array_equal(resumed.support.x, kept[1].support.x)


def test_unusable_checkpoints_raise_one_line_errors(kept, tmp_path):
  snapshots, _ = kept
  with pytest.raises(ValueError, match="keep: expected"):
    kipcore.Checkpoints(tmp_path / "kept", {}, keep=0)
  checkpoints = kipcore.Checkpoints(tmp_path / "kept", {"learning_rate": 0.1, "seed": 0})
  with pytest.raises(kipcore.CheckpointError, match="found none"):
    checkpoints.restore()
  for snapshot in snapshots[-2:]:
    checkpoints.save(snapshot)
  with pytest.raises(
    kipcore.CheckpointError, match="learning_rate: 0.1 then, 0.2 now; steps: 'nothing' then, 3 now"
  ):
    kipcore.Checkpoints(tmp_path / "kept", {"learning_rate": 0.2, "seed": 0, "steps": 3}).restore()
  # A setting that an earlier version did not have counts as its default.
  newer = {"learning_rate": 0.1, "seed": 0, "teach": ""}
  read = kipcore.Checkpoints(tmp_path / "kept", newer, defaults={"teach": "", "other": 1}).restore()
  assert read.step == snapshots[-1].step
  with pytest.raises(kipcore.CheckpointError, match="teach: '' then, 'network' now"):
    kipcore.Checkpoints(
      tmp_path / "kept", {**newer, "teach": "network"}, defaults={"teach": ""}
    ).restore()
  with pytest.raises(kipcore.CheckpointError, match="of step 7, found those of"):
    checkpoints.restore(7)
  (tmp_path / "file").write_text("")
  with pytest.raises(kipcore.CheckpointError, match="a folder for checkpoints"):
    kipcore.Checkpoints(tmp_path / "file", {})


def test_damaged_checkpoint_falls_back_to_previous(kept, tmp_path):
  snapshots, _ = kept
  first, last = snapshots[-2:]
  rng = np.random.default_rng(0)
  for attempt, cut in enumerate((True, False)):
    checkpoints = kipcore.Checkpoints(tmp_path / str(attempt), {})
    for snapshot in (first, last):
      checkpoints.save(snapshot)
    files = [
      path
      for path in (tmp_path / str(attempt) / str(last.step)).rglob("*")
      if path.is_file() and "/d/" in str(path)
    ]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    for at in rng.integers(len(content) // 4, len(content) // 2, 200):
      content[at] ^= 85
    largest.write_bytes(content[: len(content) // 2] if cut else content)
    with pytest.warns(UserWarning, match=f"whole checkpoint of step {last.step}"):
      read = checkpoints.restore()
    assert read.step == first.step and checkpoints.steps() == [first.step]


def test_failed_write_stops_the_run_and_keeps_existing_files(kept, tmp_path, monkeypatch):
  snapshots, _ = kept
  checkpoints = kipcore.Checkpoints(tmp_path / "kept", {})
  checkpoints.save(snapshots[0])
  before = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
  support, x, y = problem()

  def full(*_, **__):
    raise OSError(28, os.strerror(28))

  monkeypatch.setattr(os, "rename", full)
  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(kipcore.CheckpointError, match="to be written, got OSError.*No space left"):
    kipcore.distill(
      0,
      distiller(),
      support,
      x,
      y,
      20,
      devices=DEVICES[:2],
      checkpoint_policy=kipcore.CheckpointPolicy(checkpoints.save, 0.0),
      resume=snapshots[0],
    )
  monkeypatch.undo()
  assert all(path.read_bytes() == content for path, content in before.items())
  again = kipcore.Checkpoints(tmp_path / "kept", {})
  assert again.steps() == [snapshots[0].step] and json.dumps(again.restore().history)
