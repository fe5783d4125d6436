"""Datasets that are folders of images."""

import io

import numpy as np
import pytest
from PIL import Image

from kipcore.datasets import DatasetError, load_dataset


def write(folder, counts, size=(5, 4), mode="RGB", suffix=".png"):
  """So many images of each class, the pixels of image i all i."""
  for name, count in counts.items():
    (folder / name).mkdir(parents=True)
    for i in range(count):
      Image.new(mode, size, i if len(mode) == 1 else (i,) * len(mode)).save(
        folder / name / f"{i:03d}{suffix}"
      )
  return folder


def test_every_fifth_image_of_a_class_is_for_testing(tmp_path):
  write(tmp_path / "pets", {"dog": 12, "cat": 5, ".cache": 3})
  (tmp_path / "pets" / "LICENSE").write_text("")
  (tmp_path / "pets" / "cat" / "notes.txt").write_text("")
  data = load_dataset(str(tmp_path / "pets"), validation_fraction=0)
  assert (
    data.class_names == ("cat", "dog")
    and data.x_train.dtype == np.uint8
    and data.x_train.shape == (14, 4, 5, 3)
    and data.pixel_max == 255
  )
  # File names decide the order: cat 0..4, dog 0..11.
  np.testing.assert_array_equal(data.x_test[:, 0, 0, 0], [4, 4, 9])
  np.testing.assert_array_equal(data.y_test, [0, 1, 1])
  np.testing.assert_array_equal(
    data.x_train[:, 3, 4, 2], [0, 1, 2, 3, 0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
  )
  assert "every fifth" in data.note


@pytest.mark.parametrize("test", ["test", "val"])
def test_two_splits_and_grey_images(tmp_path, test):
  write(tmp_path / "train", {"a": 3, "b": 2}, mode="L")
  write(tmp_path / test, {"b": 1}, mode="1")
  data = load_dataset(f"{tmp_path}/", validation_fraction=0)
  assert (
    data.x_train.shape == (5, 4, 5, 1)
    and data.x_test.shape == (1, 4, 5, 1)
    and data.y_test.tolist() == [1]
  )


def test_jpeg_grey_and_transparent_images_become_color_and_that_is_said(tmp_path):
  write(tmp_path / "a", {"x": 5, "y": 5}, suffix=".JPEG")
  for mode, name in (("L", "gray"), ("RGBA", "clear"), ("P", "palette")):
    Image.new(mode, (5, 4)).save(tmp_path / "a" / "x" / f"{name}.png")
  data = load_dataset(str(tmp_path / "a"), validation_fraction=0)
  assert (
    data.x_train.shape[1:] == (4, 5, 3)
    and "clear.png" in data.note
    and "gray images were read as color" in data.note
  )


def broken(path, content=b"no image"):
  path.write_bytes(content)


def cut_short() -> bytes:
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)).save(file, "PNG")
  return file.getvalue()[:-30]


@pytest.mark.parametrize(
  "spoil, message",
  [
    (
      lambda f: [p.unlink() for p in (f / "cat").iterdir()],
      "in each class folder, got none in cat",
    ),
    (
      lambda f: Image.new("RGB", (9, 4)).save(f / "dog" / "z.png"),
      "z.png: expected all images of one size, got 9 x 4, where .*000.png is 5 x 4",
    ),
    (lambda f: broken(f / "dog" / "z.png"), "z.png: expected a PNG or JPEG image"),
    (lambda f: broken(f / "dog" / "z.png", cut_short()), "z.png: expected a whole image"),
    (
      lambda f: Image.new("I;16", (5, 4)).save(f / "dog" / "z.png"),
      "z.png: expected 8 bits a channel",
    ),
    (lambda f: (f / "cat").rename(f / "train"), "beside train, got none"),
    (
      lambda f: [p.unlink() for c in f.iterdir() for p in sorted(c.iterdir())[4:]],
      "expected 5 images of a class or more.*got 4 at most",
    ),
  ],
)
def test_folders_that_cannot_be_used_are_named(tmp_path, spoil, message):
  folder = write(tmp_path / "pets", {"cat": 6, "dog": 6})
  spoil(folder)
  with pytest.raises(DatasetError, match=message) as caught:
    load_dataset(str(folder))
  assert "\n" not in str(caught.value)


def test_test_classes_must_be_known(tmp_path):
  write(tmp_path / "train", {"a": 2})
  write(tmp_path / "test", {"b": 2})
  with pytest.raises(DatasetError, match="the first 'b'"):
    load_dataset(f"{tmp_path}/")
  with pytest.raises(DatasetError, match="no such folder"):
    load_dataset(f"{tmp_path}/absent/")


def test_what_tfds_prepared_is_no_folder_of_images(tmp_path, monkeypatch):
  from kipcore.datasets import image_folders

  (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert image_folders.is_named("mnist")
  (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").write_text("{}")
  assert (
    not image_folders.is_named("mnist")
    and not image_folders.is_named("cifar10")
    and image_folders.is_named("./mnistt")
  )
