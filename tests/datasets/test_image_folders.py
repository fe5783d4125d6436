"""Datasets that are folders of images."""

import io

import numpy as np
import pytest
from PIL import Image

from kipcore.datasets import DatasetError, load_dataset


def write(folder, counts, size=(5, 4), mode="RGB", suffix=".png"):
  """`counts[name]` images per class; all pixels of image i have the value i."""
  for name, count in counts.items():
    (folder / name).mkdir(parents=True)
    for i in range(count):
      Image.new(mode, size, i if len(mode) == 1 else (i,) * len(mode)).save(
        folder / name / f"{i:03d}{suffix}"
      )
  return folder


def test_every_fifth_image_per_class_is_in_the_test_split(tmp_path):
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
def test_two_splits_and_gray_images(tmp_path, test):
  write(tmp_path / "train", {"a": 3, "b": 2}, mode="L")
  write(tmp_path / test, {"b": 1}, mode="1")
  data = load_dataset(f"{tmp_path}/", validation_fraction=0)
  assert (
    data.x_train.shape == (5, 4, 5, 1)
    and data.x_test.shape == (1, 4, 5, 1)
    and data.y_test.tolist() == [1]
  )


def test_jpeg_gray_and_transparent_images_become_color_with_a_note(tmp_path):
  write(tmp_path / "a", {"x": 5, "y": 5}, suffix=".JPEG")
  for mode, name in (("L", "gray"), ("RGBA", "clear"), ("P", "palette")):
    Image.new(mode, (5, 4)).save(tmp_path / "a" / "x" / f"{name}.png")
  data = load_dataset(str(tmp_path / "a"), validation_fraction=0)
  assert (
    data.x_train.shape[1:] == (4, 5, 3)
    and "clear.png" in data.note
    and "gray images were read as color" in data.note
  )


PATTERN = np.random.default_rng(5).integers(0, 256, (4, 5, 3), np.uint8)


def folder_with(tmp_path, *names, **save):
  """Writes five uniform images per class and PATTERN as `names` in class x; returns its pixels."""
  write(tmp_path / "a", {"x": 5, "y": 5})
  for name in names:
    Image.fromarray(PATTERN).save(tmp_path / "a" / "x" / name, **save)
  return tmp_path / "a"


def last_of_x(folder, number=1):
  """The last rows of class x and the note; names after 004.png put row 5 and later in training."""
  data = load_dataset(str(folder), validation_fraction=0)
  return data.x_train[data.y_train == 0][-number:], data.note


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
  from PIL import ImageOps

  folder = write(tmp_path / "a", {"x": 5, "y": 5})
  # Pixels such that the displayed image is 5 x 4 for every orientation.
  stored = PATTERN.swapaxes(0, 1) if orientation > 4 else PATTERN
  exif = Image.Exif()
  exif[0x0112] = orientation
  lossless = {"lossless": True} if suffix == ".webp" else {}
  path = folder / "x" / f"z{suffix}"
  Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **lossless)
  rows, _ = last_of_x(folder)
  with Image.open(path) as image:
    np.testing.assert_array_equal(rows[0], np.asarray(ImageOps.exif_transpose(image)))
  if suffix in (".png", ".tif"):  # independently of Pillow: the eight symmetries of a rectangle
    turned = {
      1: stored,
      2: stored[:, ::-1],
      3: stored[::-1, ::-1],
      4: stored[::-1],
      5: stored.swapaxes(0, 1),
      6: np.rot90(stored, -1),
      7: np.rot90(stored, 2).swapaxes(0, 1),
      8: np.rot90(stored),
    }
    np.testing.assert_array_equal(rows[0], turned[orientation])


def test_a_rotated_copy_is_the_same_image(tmp_path):
  folder = folder_with(tmp_path, "y1.png")
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(np.ascontiguousarray(np.rot90(PATTERN))).save(folder / "x" / "y2.png", exif=exif)
  rows, note = last_of_x(folder, 2)
  np.testing.assert_array_equal(rows[0], rows[1])
  assert "1 images such as y2.png rotated" in note


@pytest.mark.parametrize(
  "name, options",
  [
    ("z.webp", {"lossless": True}),
    ("z.WEBP", {}),
    ("z.bmp", {}),
    ("z.tif", {}),
    ("z.TIFF", {"compression": "tiff_lzw"}),
    ("z.gif", {}),
    ("z.jpeg", {}),
  ],
)
def test_every_format_is_read_as_pillow_reads_it(tmp_path, name, options):
  folder = folder_with(tmp_path, name, **options)
  rows, note = last_of_x(folder)
  with Image.open(folder / "x" / name) as image:
    np.testing.assert_array_equal(rows[0], np.asarray(image.convert("RGB")))
  assert "skipped" not in note


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_only_the_first_frame_is_read(tmp_path, suffix):
  folder = write(tmp_path / "a", {"x": 5, "y": 5})
  frames = [Image.new("RGB", (5, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
  lossless = {"lossless": True} if suffix == "webp" else {}
  frames[0].save(folder / "x" / f"z.{suffix}", save_all=True, append_images=frames[1:], **lossless)
  rows, note = last_of_x(folder)
  assert (
    rows[0] == [255, 0, 0]
  ).all() and f"first frame was read of 1 images such as z.{suffix}" in note


def test_palette_alpha_and_cmyk_conversion(tmp_path, recwarn):
  folder = write(tmp_path / "a", {"x": 5, "y": 5})
  image = Image.fromarray(PATTERN)
  palette = image.quantize(8)
  palette.save(folder / "x" / "za.png", transparency=bytes([0, 128]))
  alpha = image.convert("RGBA")
  alpha.putalpha(0)
  alpha.save(folder / "x" / "zb.png")
  image.convert("CMYK").save(folder / "x" / "zc.tif")
  rows, note = last_of_x(folder, 3)
  np.testing.assert_array_equal(rows[0], np.asarray(palette.convert("RGB")))
  np.testing.assert_array_equal(rows[1], PATTERN)  # the color of fully transparent pixels
  np.testing.assert_array_equal(rows[2], np.asarray(image.convert("CMYK").convert("RGB")))
  assert "transparency of 2 images such as za.png" in note and "zc.tif converted from CMYK" in note
  assert not recwarn.list


def test_gray_images_with_alpha_stay_gray(tmp_path):
  folder = write(tmp_path / "a", {"x": 5, "y": 5}, mode="L")
  Image.fromarray(PATTERN[..., 0]).convert("LA").save(folder / "x" / "z.png")
  rows, note = last_of_x(folder)
  np.testing.assert_array_equal(rows[0, ..., 0], PATTERN[..., 0])
  assert rows.shape[-1] == 1 and "transparency of 1 images" in note


def png_of_16_bits() -> bytes:
  """A 16-bit RGB PNG, which Pillow cannot write and reads as 8-bit."""
  import struct
  import zlib

  chunk = lambda kind, content: (
    struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
  )
  lines = b"".join(b"\0" + bytes(6 * 5) for _ in range(4))
  header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(lines))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["I;16", "color"])
def test_more_than_8_bits_are_rejected(tmp_path, mode, suffix):
  folder = write(tmp_path / "a", {"x": 5, "y": 5})
  path = folder / "x" / f"z.{suffix}"
  if mode == "color" and suffix == "png":
    path.write_bytes(png_of_16_bits())
    with Image.open(path) as image:
      assert image.mode == "RGB"  # so its mode does not show it
  else:
    Image.new("I;16" if mode == "I;16" else "F" if suffix == "tif" else "RGB", (5, 4)).save(path)
  with pytest.raises(DatasetError, match=f"z.{suffix}: expected 8 bits a channel"):
    load_dataset(str(folder))


def test_everything_skipped_is_counted(tmp_path):
  folder = write(tmp_path / "a", {"x": 5, "y": 5, ".cache": 1})
  (folder / "README").write_text("")
  for name in ("one.txt", "two.txt", "three.svg", ".hidden.png"):
    (folder / "x" / name).write_text("")
  (folder / "y" / "more.png").mkdir()
  note = load_dataset(str(folder), validation_fraction=0).note
  assert "7 files or folders were skipped" in note
  for kind in ("2 .txt", "2 hidden", "1 .svg", "1 folder", "1 without suffix"):
    assert kind in note


def test_folders_next_to_the_splits_are_counted(tmp_path):
  for split in ("train", "test", "val"):
    write(tmp_path / split, {"x": 2, "y": 2})
  note = load_dataset(f"{tmp_path}/", validation_fraction=0).note
  assert "1 files or folders were skipped (1 folder val)" in note


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
    (lambda f: broken(f / "dog" / "z.png"), "z.png: expected an image .PNG, JPEG"),
    (lambda f: broken(f / "dog" / "z.png", cut_short()), "z.png: expected a whole image"),
    (
      lambda f: Image.new("I;16", (5, 4)).save(f / "dog" / "z.png"),
      "z.png: expected 8 bits a channel",
    ),
    (lambda f: (f / "cat").rename(f / "train"), "beside train, got none"),
    (
      lambda f: [p.unlink() for c in f.iterdir() for p in sorted(c.iterdir())[4:]],
      "pets: expected a test split, or a class with at least 5 rows.*got 4 at most",
    ),
  ],
)
def test_unusable_folders_are_named(tmp_path, spoil, message):
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


def test_prepared_tfds_folder_is_not_an_image_folder(tmp_path, monkeypatch):
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
