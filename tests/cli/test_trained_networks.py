"""Networks that score a run: each is kept as soon as it is trained, and an interrupted run continues with the next one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import kipcore
from kipcore.cli import recipes
from kipcore.cli.config import CheckpointConfig
from kipcore.cli.errors import Stopped
from kipcore.cli.folder.resume import StopSignals
from kipcore.cli.runs import pipeline, trained_networks
from kipcore.evaluation import networks
from kipcore.types import Support

TINY = dict(
  dataset="digits",
  method="dm",
  architecture="conv1",
  width=4,
  steps=2,
  target_batch_size=20,
  network_steps=5,
  network_seeds=3,
  test_rows=40,
)


@pytest.fixture()
def trained(monkeypatch):
  """The number of networks that were trained; another one is refused after `limit` of them."""

  class Count:
    number, limit = 0, 100

  original = networks._train_and_score

  def counted(*arguments):
    if Count.number == Count.limit:
      raise KeyboardInterrupt
    Count.number += 1
    return original(*arguments)

  monkeypatch.setattr(networks, "_train_and_score", counted)
  return Count


def test_known_networks_are_not_trained_again(trained):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(30, 4)).astype(np.float32), np.eye(3, dtype=np.float32)[np.arange(30) % 3]
  support = Support(jnp.asarray(x[:6]), jnp.asarray(y[:6]))
  score = lambda **known: kipcore.evaluate_network(
    0, kipcore.fc(1), support, x, y, 3, 8, 5, **known
  )
  expected, known = score(), {}
  np.testing.assert_array_equal(score(known=known), expected)
  assert known == dict(enumerate(map(float, expected))) and trained.number == 6
  known[1], known[7] = 0.25, 0.5
  np.testing.assert_array_equal(score(known=known), [expected[0], 0.25, expected[2]])
  assert trained.number == 6
  del known[2]
  np.testing.assert_array_equal(score(known=known)[2], expected[2])
  assert trained.number == 7


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_is_interrupted_while_networks_train_continues_with_the_next_one(
  tmp_path, trained
):
  whole = pipeline.run_distill(recipes.resolve(**TINY), str(tmp_path / "whole"), verbose=False)[1]
  assert trained.number == 3 + 2 + 2  # the result, random images and the initial ones
  folder, trained.number, trained.limit = tmp_path / "cut", 0, 4
  checkpoints = CheckpointConfig(checkpoint_seconds=1e-6)
  with pytest.raises(KeyboardInterrupt):
    pipeline.run_distill(
      recipes.resolve(**TINY), str(folder), False, False, checkpoints=checkpoints
    )
  assert sorted(map(len, json.loads((folder / "network_scores.json").read_text()).values())) == [
    1,
    3,
  ]
  trained.limit, resumed = 100, CheckpointConfig(checkpoint_seconds=1e-6, resume=True)
  result = pipeline.run_distill(
    recipes.resolve(**TINY), str(folder), verbose=False, checkpoints=resumed
  )[1]
  assert trained.number == 7
  names = [name for name in whole if "network" in name]
  assert {name: result[name] for name in names} == {name: whole[name] for name in names}
  assert not (folder / "network_scores.json").exists()


def test_a_signal_stops_after_the_network_whose_accuracy_is_kept(tmp_path):
  config = recipes.resolve(**TINY)
  support = Support(jnp.zeros((2, 3)), jnp.ones((2, 2)))
  stop, lines = StopSignals(), []
  kept = trained_networks.KeptScores(tmp_path, stop, lines.append)
  known = kept.of(config, support, "result")
  known[0] = 0.5
  stop.number = 15
  with pytest.raises(Stopped, match="--resume continues with the next one") as raised:
    known[1] = 0.75
  assert raised.value.status == 128 + 15 and not lines
  again = trained_networks.KeptScores(tmp_path, StopSignals())
  assert dict(again.of(config, support, "result")) == {0: 0.5, 1: 0.75}
  # Of another set, or under another protocol, nothing is known.
  assert not again.of(config, Support(support.x + 1, support.y), "result")
  assert not again.of(recipes.resolve(**{**TINY, "protocol": "dc"}), support, "result")
  # A file that was cut is as none.
  (tmp_path / "network_scores.json").write_text('{"a": {"0"')
  assert not trained_networks.KeptScores(tmp_path, stop).of(config, support, "result")


def test_networks_that_take_long_are_printed(tmp_path, monkeypatch):
  monkeypatch.setattr(trained_networks, "_SILENT_SECONDS", 0.0)
  lines = []
  kept = trained_networks.KeptScores(tmp_path, StopSignals(), lines.append)
  kept.of(recipes.resolve(**TINY), Support(jnp.zeros((2, 3)), jnp.ones((2, 2))), "result")[1] = 0.5
  assert lines[0].startswith("network 2 of 3 trained on the result: 50.0 % test accuracy (")
