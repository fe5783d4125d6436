"""Which model a set is for: method, architecture, time and what a run reports first."""

import dataclasses
import time

import numpy as np
import pytest
from helpers import slow_except

from kipcore.cli import recipes
from kipcore.cli.cost.estimate import Part
from kipcore.cli.errors import UsageError
from kipcore.cli.runs import fitting, loading, measure, pipeline

pytestmark = pytest.mark.usefixtures("module_without_pictures")

TINY = dict(width=4, steps=2, target_batch_size=40, network_steps=20, test_rows=100, num_devices=1)


def test_the_goal_chooses_the_method():
  assert recipes.resolve().method == "ratbptt" and recipes.resolve().teach == "network"
  assert recipes.resolve(teach="kernel").method == "kip"
  assert recipes.resolve(teach="both").method == "both"
  assert recipes.resolve(method="rfad").teach == "kernel"
  assert recipes.resolve(method="dm", teach="network").method == "dm"
  with pytest.raises(UsageError, match="--teach: expected kernel or none with --method=kip"):
    recipes.resolve(method="kip", teach="network")


def table(tmp_path) -> str:
  """A file of 100 rows of five numbers, in two classes."""
  rng = np.random.default_rng(0)
  arrays = {
    "x_train": rng.normal(size=(100, 5)).astype(np.float32),
    "y_train": np.arange(100) % 2,
    "x_test": rng.normal(size=(20, 5)).astype(np.float32),
    "y_test": np.arange(20) % 2,
  }
  np.savez(tmp_path / "table.npz", **arrays)
  return str(tmp_path / "table.npz")


def test_automatic_architecture_follows_the_rows(tmp_path):
  config = recipes.resolve(dataset=table(tmp_path), **TINY)
  assert loading.load(config).kernel_fn.arch.name == "fc1"
  assert loading.load(recipes.resolve(**TINY)).kernel_fn.arch.name == "conv2"  # 8 x 8 pixels
  shapes = {(28, 28, 1): "conv3", (16, 40, 3): "conv3", (15, 15, 1): "conv2", (4, 4, 1): "conv1"}
  shapes |= {(2, 3, 1): "conv1", (1, 9, 1): "fc1", (9,): "fc1"}
  for shape, name in shapes.items():
    assert loading.architecture_of(config, shape) == name


@pytest.mark.slow
def test_a_run_on_a_table_uses_a_dense_network(tmp_path):
  config = recipes.resolve(dataset=table(tmp_path), **TINY)
  folder, result = pipeline.run_distill(config, str(tmp_path / "run"), verbose=False)
  assert result["architecture"] == "fc1" and result["network_protocol"] == "soft"


@pytest.mark.parametrize("method", slow_except(["ratbptt", "both", "kip"], "ratbptt"))
def test_a_run_leads_with_the_model_that_its_set_is_for(method, tmp_path, capsys):
  config = recipes.resolve(method=method, network_seeds=2, **TINY)
  config = dataclasses.replace(config, architecture="fc1")
  folder, result = pipeline.run_distill(config, str(tmp_path / "run"))
  found = [result["network_test_accuracy"], result["network_test_accuracy_mean"]]
  assert found[1] == np.mean(found[0]) and len(found[0]) == 2
  for key in ("random_baseline", "init"):
    assert 0 < result[f"{key}_network_test_accuracy_mean"] <= 1
  out = capsys.readouterr().out
  networks = out.index("networks trained on")
  ridge = out.index("10 distilled images: ")
  page = (folder / "report.html").read_text()
  if method == "kip":
    assert ridge < networks
  else:
    assert networks < ridge and "ridge regression on the 10 distilled images" in out
    assert page.index("networks trained on the distilled set") < page.index("ridge regression,")


@pytest.fixture()
def planned():
  config = recipes.resolve(minutes=2.0, **{**TINY, "width": 32, "steps": 100})
  return pipeline.plan(config)


def measured(monkeypatch, seconds_per_step, other=10.0):
  """`measure.distillation` gives these times; a step costs in proportion to the width."""
  seen = []

  def distillation(config, plan):
    seen.append(config.width)
    one = seconds_per_step * config.width / 32
    return [
      Part(f"{config.steps:,} steps of {one:.3g} s", config.steps * one),
      Part("x", other),
    ], []

  monkeypatch.setattr(measure, "distillation", distillation)
  return seen


@pytest.mark.parametrize(
  "seconds_per_step, width, steps",
  [(0.1, 32, 980), (1.0, 16, 196), (0.02, 64, 2450), (0.01, 128, 2450), (0.001, 128, 24_500)],
)
def test_steps_and_width_fit_the_minutes(monkeypatch, planned, seconds_per_step, width, steps):
  measured(monkeypatch, seconds_per_step)
  config = fitting.fitted(planned, time.perf_counter(), verbose=False).config
  assert config.width == width and config.minutes == 0
  np.testing.assert_allclose(config.steps, steps, rtol=0.02)


def test_a_cheaper_method_is_used_if_time_is_short(monkeypatch, planned):
  given = dict(minutes=2.0, dataset="digits", **{**TINY, "width": 32})
  cheaper = recipes.cheaper(given)
  assert cheaper.method == "frepo" and cheaper.minutes == 2.0 and cheaper.network_steps == 20
  measured(monkeypatch, 2.0)  # of either method
  config = fitting.fitted(planned, time.perf_counter(), False, cheaper).config
  assert (config.method, config.architecture, config.width) == ("frepo", "conv2", 16)
  assert fitting.fitted(planned, time.perf_counter(), False).config.method == "ratbptt"
  measured(monkeypatch, 0.1)
  config = fitting.fitted(planned, time.perf_counter(), False, cheaper).config
  assert config.method == "ratbptt"
  # It is not used if its scores alone take longer.
  plan = planned._replace(config=dataclasses.replace(planned.config, minutes=1e-3))
  with pytest.raises(UsageError, match="--minutes: expected more than"):
    fitting.fitted(plan, time.perf_counter(), False, dataclasses.replace(cheaper, minutes=1e-3))
  # A method that the user chose, with its options, is kept.
  assert recipes.cheaper({**given, "method": "ratbptt"}) is None
  assert recipes.cheaper({**given, "options": "window=5"}) is None
  assert recipes.cheaper({**given, "teach": "kernel"}) is None


def test_too_little_time_and_methods_without_steps_are_refused(monkeypatch, planned):
  measured(monkeypatch, 0.1, other=500.0)
  with pytest.raises(UsageError, match="--minutes: expected more than"):
    fitting.fitted(planned, time.perf_counter(), verbose=False)
  direct = planned._replace(config=recipes.resolve(method="label_solve", minutes=1.0))
  with pytest.raises(UsageError, match="--minutes: expected a method with steps"):
    fitting.fitted(direct, time.perf_counter(), verbose=False)
