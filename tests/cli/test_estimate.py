"""Estimates before a long run."""

import re

import pytest

from kipcore.cli.config import DistillConfig, SelectConfig
from kipcore.cli.cost import estimate
from kipcore.cli.runs import pipeline, selection

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
