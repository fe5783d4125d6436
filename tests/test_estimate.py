"""What is said before a long run."""

import re

import pytest

from experiments import estimate, pipeline, selection
from experiments.config import DistillConfig, SelectConfig

SMALL = dict(architecture="conv1", images_per_class=1, test_rows=20, seed=0)


@pytest.mark.parametrize("seconds, text", [(0.04, "0.0 s"), (59.0, "59.0 s"), (150.0, "2.5 min"), (5 * 3600, "5.0 h"),
                                           (86_400 * 3, "3.0 days")])
def test_durations_are_for_people(seconds, text):
  assert estimate.duration(seconds) == text


def test_pairs_are_counted():
  """K(3, 5), eight images with themselves, and half of K(3, 3)."""
  assert estimate.pairs(3, 5) == 15 + 8 and estimate.pairs(3, 5, symmetric=True) == 15 + 8 + 6


def test_costly_runs_say_so_before_they_start(tmp_path, capsys):
  config = DistillConfig(**SMALL, steps=2, target_batch_size=30, precision="bfloat16")
  _, result = pipeline.run_distill(config, str(tmp_path), verbose=True)
  out = capsys.readouterr().out
  found = re.search(r"estimate: ([\d,]+) pairs of images a step, ([\d.e-]+) ms each: ([\d.e-]+) s a step", out)
  assert found and int(found[1]) == 10 * 30 + 10 + 30 + 55
  assert float(found[3]) == pytest.approx(395e-3 * float(found[2]), rel=0.02)
  assert out.index("estimate") < out.index("random real images")
  # Scores are those of the exact kernel, whatever the steps used.
  data = pipeline.load(config)
  assert data.kernel_fn.precision == "bfloat16"
  exact = pipeline.load(DistillConfig(**SMALL, target_batch_size=30))
  support = pipeline.start(config, exact).support
  assert pipeline.score(config, data, support) == pipeline.score(config, exact, support)


def test_cheap_kernels_say_nothing():
  data = pipeline.load(DistillConfig())
  assert estimate.of_distillation(DistillConfig(), data, 10, 100, 0, 0, 5, 1) is None
  assert estimate.of_selection(data, 1000, 1000) is None


def test_selection_says_what_its_kernel_matrix_takes(tmp_path, capsys, monkeypatch):
  class Stop(Exception):
    pass

  def stop(*_, **__):
    raise Stop

  monkeypatch.setattr(selection.coreset, "select_coreset", stop)
  with pytest.raises(Stop):
    selection.run_select(SelectConfig(**SMALL), str(tmp_path))
  rows = pipeline.load(SelectConfig(**SMALL)).x_train.shape[0]
  assert f"estimate: {rows:,} x {rows:,} pairs of images" in capsys.readouterr().out
