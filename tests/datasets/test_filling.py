"""Rows that are added to small classes, and the part of a class that is for testing."""

import numpy as np
import pytest

from kipcore.datasets import fill_classes, load_dataset


@pytest.fixture
def small(tmp_path):
  """Classes of 5, 2 and 1 rows of 8 x 6 pixels, all different."""
  rng, y = np.random.default_rng(0), np.array([0, 1, 0, 2, 0, 1, 0, 0])
  x = rng.integers(0, 256, (8, 8, 6, 3), np.uint8)
  np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
  return load_dataset(str(tmp_path / "a.npz"), validation_fraction=0)


@pytest.mark.parametrize("fill", ["repeat", "augment"])
def test_every_class_gets_the_least_number_of_rows(small, fill):
  filled = fill_classes(small, 4, fill)
  assert np.bincount(filled.y_train).tolist() == [5, 4, 4]
  sources = filled.train_sources
  assert sources[:8].tolist() == list(range(8)) and sources[8:].tolist() == [1, 5, 3, 3, 3]
  assert np.array_equal(filled.y_train, small.y_train[sources])
  assert np.array_equal(filled.x_train[:8], small.x_train) and filled.x_train.dtype == np.uint8
  assert filled.hashes["train"] != small.hashes["train"]
  assert filled.hashes["test"] == small.hashes["test"]
  assert "5 " in filled.note and "added to 2 of 3 classes, which had fewer than 4" in filled.note
  same = np.array_equal(filled.x_train, small.x_train[sources])
  assert same == (fill == "repeat")


def test_augmented_rows_depend_on_the_seed_alone(small):
  one, same, other = (fill_classes(small, 6, "augment", seed).x_train for seed in (1, 1, 2))
  assert np.array_equal(one, same) and not np.array_equal(one, other)
  # Two copies of the single row of class 2 are different.
  assert not np.array_equal(one[-1], one[-2])


def test_nothing_changes_if_every_class_is_large_enough(small):
  assert fill_classes(small, 1, "repeat") is small and small.train_sources is None


def test_outside_of_an_image_is_the_mean_color_of_its_border(small):
  # A bright square on an even background: whatever is shifted in has the color of the background.
  x = np.full((8, 9, 9, 1), 200, np.float32)
  x[:, 3:6, 3:6] = 40
  filled = fill_classes(small._replace(x_train=x), 40, "augment").x_train[8:]
  border = np.concatenate([filled[:, 0].ravel(), filled[:, -1].ravel()])
  np.testing.assert_allclose(border, 200, atol=1e-3)
  assert (filled.min(axis=(1, 2, 3)) >= 40 - 1e-3).all() and (filled[:, 4, 4] < 100).all()
  assert filled.dtype == np.float32 and np.ptp(filled.mean(axis=(1, 2, 3))) > 1


def test_wrong_arguments_are_named(small):
  with pytest.raises(ValueError, match="fill: expected one of repeat, augment; got 'copy'"):
    fill_classes(small, 4, "copy")
  with pytest.raises(ValueError, match="images_per_class: expected"):
    fill_classes(small, 0, "repeat")
  flat = small._replace(x_train=small.x_train.reshape(8, -1))
  with pytest.raises(
    ValueError, match=r"fill: expected images for augment, got rows of shape \(144,\)"
  ):
    fill_classes(flat, 4, "augment")
  assert fill_classes(flat, 4, "repeat").x_train.shape == (13, 144)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9])
def test_test_rows_are_evenly_spaced_in_each_class(fraction):
  from kipcore.datasets import _Pick

  labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [40, 7, 100]))
  train, test = _Pick("a", 0, 0, fraction)(labels, cut=True)
  assert sorted([*train, *test]) == list(range(147))
  for c, count in enumerate((40, 7, 100)):
    ranks = np.flatnonzero(np.isin(np.flatnonzero(labels == c), test))
    assert abs(len(ranks) - fraction * count) < 1 and 0 not in ranks
    gaps = np.diff(ranks)
    assert not gaps.size or set(gaps) <= {int(1 / fraction), int(np.ceil(1 / fraction))}
  if fraction == 0.2:
    assert np.flatnonzero(np.isin(np.flatnonzero(labels == 2), test)).tolist() == list(
      range(4, 100, 5)
    )


def test_the_fraction_applies_only_without_a_test_split(small, tmp_path):
  path = str(tmp_path / "a.npz")
  assert load_dataset(path, test_fraction=0.5).hashes["test"] == small.hashes["test"]
  assert "test_fraction=0.5 has no effect" in load_dataset(path, test_fraction=0.5).note
  digits = load_dataset("digits", test_fraction=0.5)
  assert abs(len(digits.y_test) - 1797 / 2) < 10 and "test is 50 % of each class" in digits.note
