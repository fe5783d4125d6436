"""Estimates before a long run."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import slow_except

import kipcore
from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig, SelectConfig
from kipcore.cli.cost import estimate
from kipcore.cli.runs import measure, pipeline, selection, trained_networks
from kipcore.evaluation import ranking
from kipcore.evaluation.protocols import PROTOCOLS
from kipcore.networks import ResNet

pytestmark = pytest.mark.usefixtures("module_without_pictures")

SMALL = dict(architecture="conv1", images_per_class=1, test_rows=20, seed=0)


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.04, "0.0 s"),
    (59.0, "59.0 s"),
    (150.0, "2.5 min"),
    (5 * 3600, "5.0 h"),
    (86_400 * 3, "3.0 days"),
  ],
)
def test_durations_as_text(seconds, text):
  assert estimate.duration(seconds) == text


def test_pairs_are_counted():
  """K(3, 5), eight images with themselves, and half of K(3, 3)."""
  assert estimate.pairs(3, 5) == 15 + 8 and estimate.pairs(3, 5, symmetric=True) == 15 + 8 + 6


@pytest.mark.slow
def test_costly_runs_print_an_estimate_before_they_start(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(estimate, "WORTH_SECONDS", 0.0)
  config = DistillConfig(**SMALL, steps=2, target_batch_size=30, precision="bfloat16")
  _, result = pipeline.run_distill(config, str(tmp_path), verbose=True)
  out = capsys.readouterr().out
  found = re.search(
    r"estimate: ([\d,]+) pairs of images per step, ([\d.e-]+) ms each: ([\d.e-]+) s per step", out
  )
  assert found and int(found[1]) == 10 * 30 + 10 + 30 + 55
  assert float(found[3]) == pytest.approx(395e-3 * float(found[2]), rel=0.02)
  assert out.index("estimate") < out.index("random real images")
  # Scores use the exact kernel, whatever the precision of the steps.
  data = pipeline.load(config)
  assert data.kernel_fn.precision == "bfloat16"
  exact = pipeline.load(DistillConfig(**SMALL, target_batch_size=30))
  support = pipeline.start(config, exact).support
  assert pipeline.score(config, data, support) == pipeline.score(config, exact, support)


def test_cheap_runs_print_no_estimate():
  planned, chosen = pipeline.plan(DistillConfig()), selection.plan(SelectConfig())
  assert estimate.of_distillation(DistillConfig(), planned.data, planned.sizes) is None
  assert estimate.worth_reporting(*selection.expectation(SelectConfig(), chosen.data, 10)) is None


def test_a_selection_prints_an_estimate_before_it_starts(tmp_path, capsys, monkeypatch):
  class Stop(Exception):
    pass

  def stop(*_, **__):
    raise Stop

  monkeypatch.setattr(selection.coreset, "select_coreset", stop)
  monkeypatch.setattr(estimate, "seconds_per_pair", lambda *_, **__: (1e-4, 0))
  with pytest.raises(Stop):
    selection.run_select(SelectConfig(**SMALL, strategy="krr_sensitivity"), str(tmp_path))
  rows = pipeline.load(SelectConfig(**SMALL)).x_train.shape[0]
  found = re.search(
    r"estimate: about ([\d.]+) min \(points \(krr_sensitivity\) ([\d.]+) min",
    capsys.readouterr().out,
  )
  assert found and float(found[1]) > float(found[2]) == pytest.approx(rows**2 * 1e-4 / 60, rel=0.2)


def test_work_is_additive():
  work = estimate.of_scores(1000, 10)
  assert work.pairs == 1000**2, "few rows are scored exactly"
  assert (work + estimate.Work(5.0, 7.0)).seconds(1.0, 1.0) == pytest.approx(
    work.seconds(1.0, 1.0) + 12.0
  )
  assert estimate.of_scores(100_000, 10).pairs < 0.1 * 100_000**2


def test_networks_are_estimated_without_training_one(monkeypatch):
  config = recipes.resolve(
    method="dm", architecture="conv1", width=4, network_seeds=3, network_steps=40
  )
  data = pipeline.load(config)
  support = pipeline.random_support(0, data, 1)
  rows = []
  monkeypatch.setattr(
    estimate, "of_network", lambda how, _, count: rows.append((how, count)) or (2.0, 5.0)
  )
  monkeypatch.setattr(trained_networks.networks, "evaluate_network", None)
  # Three networks on the result, and two on each of the sets that it is compared with.
  assert measure._networks(config, data, support) == ((3 + 2 * 2) * 2.0, 5.0)
  ((how, count),) = rows
  assert (how.width, how.protocol, how.num_steps, count) == (4, "dsa", 40, len(data.x_test))


@pytest.mark.parametrize(
  "network", slow_except([kipcore.conv_net(1), ResNet(4, 10)], kipcore.conv_net(1))
)
def test_seconds_of_a_network_grow_with_its_steps_and_the_scored_rows(network, monkeypatch):
  monkeypatch.setattr(estimate, "_timed", lambda call: call() and 0.01)
  support = kipcore.Support(jnp.ones((20, 8, 8, 1)), jnp.ones((20, 10)))
  seconds = lambda steps, rows, **how: estimate.of_network(
    ranking.NetworkEvaluator(network, 4, num_steps=steps, **how), support, rows
  )[0]
  assert seconds(300, 0) == pytest.approx(3.0)
  assert seconds(None, 0, protocol="dc") == pytest.approx(0.01 * PROTOCOLS["dc"].num_steps(20))
  assert seconds(300, 3000) == pytest.approx(3.0 + 2 * 3000 * 0.01 / (3 * 20))


def test_a_long_call_is_timed_without_repeating_it(monkeypatch):
  calls, clock = [], iter([0.0, 5.0, 0.0, 0.5, 0.0, 0.2])
  monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
  assert measure._apart(lambda: calls.append(0) or "long") == (5.0, 0.0, "long")
  assert measure._apart(lambda: calls.append(0) or "short") == (0.2, 0.3, "short")
  assert len(calls) == 1 + 2


def test_compilation_is_not_counted_as_time_of_a_long_call(monkeypatch):
  monkeypatch.setattr(measure, "_SHORT_SECONDS", -1.0)
  run, compiled, _ = measure._apart(lambda: jax.jit(lambda x: jnp.sin(x) + 1.25)(jnp.ones(7)))
  assert compiled > 0 and run >= 0
