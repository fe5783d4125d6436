"""`--init=FILE`: artifacts and published sets as initializations, and files that do not fit."""

import dataclasses

import numpy as np
import pytest

import kipcore
from kipcore.cli import recipes
from kipcore.cli.errors import UsageError
from kipcore.cli.runs import pipeline, saved_sets
from kipcore.preprocess import one_hot_centered

pytestmark = pytest.mark.usefixtures("module_without_pictures")

SETTINGS = dict(
  dataset="digits", method="kip", architecture="fc1", steps=1, target_batch_size=50, network_seeds=0
)
PLAIN = dict(SETTINGS, solve_labels=False)


def config_of(**changes):
  return recipes.resolve(**saved_sets.with_size({**PLAIN, **changes}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run with learned labels: its artifact and data."""
  folder = tmp_path_factory.mktemp("run")
  config = recipes.resolve(**SETTINGS, images_per_class=2, test_rows=50)
  pipeline.run_distill(config, str(folder), verbose=False)
  return folder / "distilled.npz", pipeline.load(config)


def published(path, shape=(10, 1, 8, 8), classes=10, **arrays):
  """A file of RFAD: pixels channels first, labels one-hot minus 1/c."""
  rng = np.random.default_rng(0)
  content = dict(
    images=rng.normal(size=shape).astype(np.float32),
    labels=np.eye(classes, dtype=np.float32) - 1 / classes,
    k=np.float32(1.0),
    jit=np.float32(5e-3),
  )
  np.savez(path, **{**content, **arrays})
  return path


def test_an_artifact_starts_a_run_with_its_images_and_labels(made, tmp_path):
  path, data = made
  stored = kipcore.load_artifact(path)
  config = config_of(init=str(path), test_rows=50)
  assert config.images_per_class == 2
  start = pipeline.start(config, data)
  np.testing.assert_allclose(start.support.x, stored.support, atol=1e-5)
  assert np.array_equal(start.support.y, stored.labels) and start.target_evaluations == 0
  folder, result = pipeline.run_distill(config, str(tmp_path), verbose=False)
  assert result["init"] == str(path)
  assert result["init_test_accuracy"] == stored.metadata["result"]["test_accuracy"]


def test_another_preprocessing_changes_inputs_and_not_pixels(made):
  path, _ = made
  stored, config = kipcore.load_artifact(path), config_of(init=str(path), preprocess="zca")
  data = pipeline.load(config)
  start = pipeline.start(config, data)
  assert not np.allclose(start.support.x, stored.support, atol=0.1)
  np.testing.assert_allclose(
    data.preprocess.invert(np.asarray(start.support.x)), stored.images, atol=1e-3
  )


def test_pixels_of_another_unit_are_converted(made):
  """The same dataset with white stored as 1 instead of 16."""
  path, data = made
  raw = data.raw._replace(pixel_max=data.raw.pixel_max / 16)
  config = config_of(init=str(path))
  found = saved_sets.coreset_of(config, data._replace(raw=raw), False)
  pixels = data.preprocess.invert(np.asarray(found.x))
  np.testing.assert_allclose(pixels, kipcore.load_artifact(path).images / 16, atol=1e-4)


def test_methods_with_hard_labels_take_the_classes(made):
  path, data = made
  start = pipeline.start(config_of(init=str(path), method="dm"), data)
  classes = np.argmax(kipcore.load_artifact(path).labels, axis=1)
  np.testing.assert_allclose(start.support.y, one_hot_centered(classes, 10, np.float32))


def test_labels_are_solved_unless_the_user_keeps_those_of_the_file(made):
  path, data = made
  kept = pipeline.start(config_of(init=str(path)), data)
  config = config_of(init=str(path), solve_labels=True, steps=1000)
  solved = pipeline.start(config, data)
  assert solved.target_evaluations > 0 and not np.allclose(kept.support.y, solved.support.y)
  assert np.array_equal(kept.support.x, solved.support.x)


def test_a_published_set_is_converted_to_the_preprocessing_of_the_run(made, tmp_path):
  _, data = made
  path = published(tmp_path / "set.npz")
  stored = kipcore.load_published(path)
  start = pipeline.start(config_of(init=str(path)), data)
  rows = np.concatenate([data.raw.x_train, data.raw.x_validation])
  pixels = stored.fit_preprocess(rows, pixel_max=data.raw.pixel_max).invert(stored.images)
  np.testing.assert_allclose(data.preprocess.invert(np.asarray(start.support.x)), pixels, atol=1e-3)
  np.testing.assert_allclose(start.support.y, np.eye(10) - 0.1, atol=1e-6)


def test_a_published_set_of_pixels_is_only_scaled(made, monkeypatch, tmp_path):
  """IDC, DREAM, NCFM and CIM store pixels in [0, 1]."""
  _, data = made
  stored = kipcore.load_published(published(tmp_path / "set.npz"))
  images = np.random.default_rng(0).uniform(size=stored.images.shape).astype(np.float32)
  of_pixels = dataclasses.replace(stored, kind="idc", images=images, pixels=True)
  monkeypatch.setattr(saved_sets, "read", lambda path: of_pixels)
  found = saved_sets.coreset_of(config_of(init=str(tmp_path / "set.npz")), data, False)
  pixels = data.preprocess.invert(np.asarray(found.x))
  np.testing.assert_allclose(pixels, 16 * images, atol=1e-4)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda folder: folder / "none.npz", "--init: expected a strategy or a file, found no file"),
    (lambda folder: folder, "--init: expected a strategy or a file, found no file"),
    (
      lambda folder: published(folder / "set.npz", (20, 1, 8, 8), labels=np.zeros((20, 7), "f4")),
      "--init: .*set.npz",
    ),
    (
      lambda folder: published(folder / "set.npz", (10, 1, 9, 9)),
      r"expected images \(10, 8, 8, 1\) and labels \(10, 10\) \(1 per class\), got \(10, 9, 9, 1\)",
    ),
    (
      lambda folder: published(folder / "set.npz", (6, 1, 8, 8), classes=6),
      r"expected images \(10, 8, 8, 1\) .* got \(6, 8, 8, 1\) and \(6, 6\)",
    ),
  ],
)
def test_files_that_do_not_fit_are_named_in_one_line(make, message, made, tmp_path):
  with pytest.raises(UsageError, match=message) as caught:
    config = config_of(init=str(make(tmp_path)))
    pipeline.check(config)
    pipeline.start(config, made[1])
  assert "\n" not in str(caught.value)


def test_damaged_files_and_another_number_of_images_are_named(made, tmp_path):
  path, data = made
  broken = tmp_path / "distilled.npz"
  broken.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(UsageError, match="--init: .*distilled.npz"):
    config_of(init=str(broken))
  with pytest.raises(UsageError, match=r"\(3 per class\), got \(20, 8, 8, 1\)"):
    pipeline.start(config_of(init=str(path), images_per_class=3), data)


def test_a_file_without_its_preprocessing_is_refused(made, tmp_path):
  """Sets of KIP record the whitening in their file name alone."""
  path = tmp_path / "set.npz"
  np.savez(path, images=np.zeros((10, 8, 8, 1), np.float32), labels=np.eye(10, dtype=np.float32))
  with pytest.raises(UsageError, match="determines the preprocessing of its images, got a kip"):
    pipeline.start(config_of(init=str(path)), made[1])


def test_settings_without_a_file_are_unchanged():
  for given in ({}, {"init": "noise"}, {"init": "kmeans", "images_per_class": 3}):
    assert saved_sets.with_size(given) == given


@pytest.mark.parametrize("name", ["kmean", "best", ""])
def test_unknown_strategies_are_named(name):
  with pytest.raises(
    UsageError, match="--init: expected one of uniform.*a file with a distilled set"
  ):
    pipeline.check(config_of(init=name))
