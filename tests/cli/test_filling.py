"""`--fill` and `--test_fraction` in runs and in the evaluation of their artifacts."""

import numpy as np
import pytest

from kipcore import Support, load_artifact
from kipcore.cli.config import DistillConfig, EvaluateConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.folder import outputs
from kipcore.cli.runs import comparison, evaluation, loading, pipeline
from kipcore.selection import coreset


def test_filled_classes_in_a_run_and_its_evaluation(tmp_path):
  rng, y = np.random.default_rng(0), np.repeat([0, 1, 2], [12, 10, 2])
  x = rng.integers(0, 256, (24, 4, 4, 1), np.uint8)
  np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:6], y_test=np.arange(6) % 3)
  common = dict(dataset=str(tmp_path / "a.npz"), validation_fraction=0.0, images_per_class=4)
  with pytest.raises(UsageError, match="the 2 rows of the smallest class, 2, got 4; --fill="):
    loading.load(DistillConfig(**common))
  config = DistillConfig(**common, fill="augment", seed=3)
  data = loading.load(config)
  assert data.x_train.shape == (26, 4, 4, 1) and "2 shifted" in loading.notes(data)[0]
  # The preprocessing is that of the rows of the dataset.
  plain = loading.load(DistillConfig(**{**common, "images_per_class": 1}))
  assert np.array_equal(data.x_train[:24], plain.x_train)
  assert np.array_equal(data.x_test, plain.x_test)
  support = pipeline.random_support(0, data, 4)
  outputs.write_artifact(tmp_path, config, data, support, {})
  again = evaluation.prepare(
    load_artifact(tmp_path / "distilled.npz"), EvaluateConfig(baselines=())
  )
  assert np.array_equal(again.data.x_train, data.x_train)
  chosen = coreset.select_coreset(0, data.x_train, data.y_train, 4, "uniform")
  outputs.write_selection(tmp_path, data, chosen, np.zeros(26))
  indices, sources = outputs.load_arrays(tmp_path / "selection.npz", "indices", "sources")
  assert sources.tolist() == [*range(24), 22, 23] and indices.max() >= 24
  assert np.array_equal(y[sources[indices]], np.argmax(chosen.y, axis=1))


def test_cells_of_a_comparison_have_the_filled_rows(tmp_path):
  rng, y = np.random.default_rng(0), np.repeat([0, 1], [12, 2])
  x = rng.integers(0, 256, (14, 4, 4, 1), np.uint8)
  np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:6], y_test=np.arange(6) % 2)
  common = dict(dataset=str(tmp_path / "a.npz"), validation_fraction=0.0, images_per_class=4)
  for fill, rows in (("repeat", 16), ("", 14)):
    assert len(comparison.loaded(DistillConfig(**common, fill=fill)).x_train) == rows


def test_the_test_fraction_is_part_of_the_artifact(tmp_path):
  config = DistillConfig(test_fraction=0.5)
  data = loading.load(config)
  assert abs(len(data.x_test) - 1797 / 2) < 10
  outputs.write_artifact(tmp_path, config, data, Support(data.x_train[:10], data.y_train[:10]), {})
  stored = load_artifact(tmp_path / "distilled.npz")
  again = evaluation.prepare(stored, EvaluateConfig(baselines=()))
  assert np.array_equal(again.data.x_test, data.x_test)
