"""Image-classification data from scikit-learn, a TFDS name, a folder of images, a Parquet, Arrow or `.npz` file, checked and hashed.

Every problem with the data or its file is a `DatasetError` that names what was expected and found. A number of
training rows bounds memory: only these rows are loaded.
"""

import contextlib
import fractions
import hashlib
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kipcore import checks
from kipcore.datasets import arrow_tables, filling, image_folders, tfds_data
from kipcore.io import npz
from kipcore.types import DatasetError

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_NAMES = ("label_names", "class_names")
_TEST_FRACTION = 0.2


class Dataset(NamedTuple):
  """Three disjoint splits, in stored pixel units.

  Attributes:
    x_train, x_validation, x_test: `(n, height, width, channels)`, or `(n, features)` for
      tabular data. uint8 and floats are unchanged; other integers and bool become
      float32 (float64 if they exceed 2^24). Not scaled: digits are float32 in 0..16.
    y_train, y_validation, y_test: `(n,)` int32 in 0..c-1; each class occurs in y_train.
    num_classes, class_names: c, and c names or None.
    pixel_max: the value of white: 255 for uint8, 16 for digits; for floats 1,
      or the largest training value if it exceeds 1.
    hashes: sha256 in hex of "train", "validation" and "test", over dtype, shape and bytes.
    note: remarks on splits and conversions, or "".
    train_sources: `(n,)` the row of the training split that each row of x_train is or was made of, if
      `fill_classes` added rows; otherwise None.
  """

  name: str
  x_train: np.ndarray
  y_train: np.ndarray
  x_validation: np.ndarray
  y_validation: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  num_classes: int
  class_names: tuple[str, ...] | None
  pixel_max: float
  hashes: Mapping[str, str]
  note: str
  train_sources: np.ndarray | None = None


def load_dataset(
  name: str,
  data_dir: str | os.PathLike | None = None,
  validation_fraction: float = 0.1,
  seed: int = 0,
  train_rows: int = 0,
  test_fraction: float = _TEST_FRACTION,
) -> Dataset:
  """Loads a dataset, or a part of its training rows, and splits off a validation set.

  The validation split is stratified: round(fraction * n) rows over all classes, apportioned by
  largest remainder and drawn with NumPy's PCG64 bit stream (stable over versions); each class
  keeps at least one training row. The test split does not depend on the seed.

  Args:
    name: "digits": scikit-learn's 8 x 8 digits, without a file.
      A path that ends in `.npz`: x_train, x_test `(n, h, w, c)`, `(n, h, w)` (a channel is
      added) or `(n, d)`, y_train, y_test `(n,)` integers or strings, and optionally
      `class_names`. Nothing is unpickled; sizes are checked before memory is allocated.
      A folder of class folders of images of one size (rules: `kipcore.datasets.image_folders`): either the class folders themselves
      (in file name order), or train/ and test/ with class folders.
      A path that ends in `.parquet` or `.arrow`, or a folder of such files, as Hugging Face datasets writes them (rules:
      `kipcore.datasets.arrow_tables`); needs pyarrow.
      A TFDS image-classification name: prepared in data_dir, or downloaded by TFDS.
      Without a labeled test split, the validation split is used, or a part of each class (`test_fraction`); `note` records it.
    data_dir: the TFDS directory, which must exist; None for TFDS's default.
    validation_fraction: in [0, 1); 0 gives an empty validation split.
    seed: of the validation split and of `train_rows`, an integer >= 0.
    train_rows: number of training rows, validation included: a random part of each class in proportion, at least one row
      each; 0 for all. The other rows are never in memory.
    test_fraction: part of each class that is for testing if the dataset has no test split: evenly spaced rows, every fifth
      row for 0.2; between 0 and 1.

  Raises:
    DatasetError: if the data cannot be found, read or used.
    ValueError: for a fraction, seed or number of rows out of range.
  """
  if not 0 <= validation_fraction < 1:
    raise ValueError(
      f"validation_fraction: expected a number in [0, 1), got {validation_fraction!r}"
    )
  if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
    raise ValueError(f"seed: expected an integer >= 0 and below 2^63, got {seed!r}")
  if (
    isinstance(train_rows, bool) or not isinstance(train_rows, (int, np.integer)) or train_rows < 0
  ):
    raise ValueError(f"train_rows: expected an integer >= 0, got {train_rows!r}")
  test_fraction = checks.number("test_fraction", test_fraction, 1e-6, 1 - 1e-6)
  name = os.fspath(name)
  pick = _Pick(name, int(train_rows), int(seed), test_fraction)
  if name.lower().endswith(".npz"):
    raw = _read_npz(name, pick)
  elif name == "digits":
    raw = _read_digits(pick)
  elif arrow_tables.is_named(name):
    with _one_fault(f"{name}: expected readable Parquet or Arrow files"):
      raw = arrow_tables.read(os.path.expanduser(name), pick)
  elif image_folders.is_named(name):
    with _one_fault(f"{name}: expected a readable folder of images"):
      raw = image_folders.read(os.path.expanduser(name), pick)
  else:
    raw = _read_tfds(name, data_dir, pick)
  raw["note"] = "; ".join(filter(None, (pick.note(), raw.get("note", ""))))
  return _finish(name, validation_fraction, seed, **raw)


def fill_classes(data: Dataset, images_per_class: int, fill: str, seed: int = 0) -> Dataset:
  """Adds training rows to the classes that have fewer than `images_per_class`, up to this number.

  The added rows are training rows like the others, so small classes count more than before. A heuristic.

  Args:
    data: a dataset.
    images_per_class: the least number of training rows of a class, >= 1.
    fill: "repeat": copies of the rows of the class in turn; "augment": each copy shifted by up to 1/8 of its
      sides, scaled by up to 1.2 or rotated by up to 15 degrees (images only). What lies outside an image has the mean
      color of its border.
    seed: of the augmentation, an integer >= 0.

  Returns:
    The dataset with added rows at the end of x_train, their number in `note`, and `train_sources`; unchanged if no class
    is smaller.

  Raises:
    ValueError: for another `fill`, or "augment" for rows that are not images.
  """
  images_per_class = checks.positive_int("images_per_class", images_per_class)
  checks.one_of("fill", fill, filling.WAYS)
  sources = filling.missing_rows(data.y_train, data.num_classes, images_per_class)
  if not sources.size:
    return data
  x = data.x_train[sources]
  if fill == "augment":
    x = filling.augmented(seed, x)
  y = data.y_train[sources]
  x_train, y_train = np.concatenate([data.x_train, x]), np.concatenate([data.y_train, y])
  how = {"repeat": "copies", "augment": "shifted, scaled or rotated copies"}[fill]
  note = (
    f"{len(x)} {how} of training rows were added to {len(np.unique(y))} of {data.num_classes} classes, which had fewer "
    f"than {images_per_class}"
  )
  return data._replace(
    x_train=x_train,
    y_train=y_train,
    hashes={**data.hashes, "train": sha256_of(x_train, y_train)},
    note="; ".join(filter(None, (data.note, note))),
    train_sources=np.concatenate([np.arange(len(data.x_train)), sources]),
  )


def _finish(
  name,
  fraction,
  seed,
  *,
  x_train,
  y_train,
  x_test,
  y_test,
  class_names=None,
  pixel_max=None,
  note="",
):
  """The checked `Dataset` from the arrays of a reader."""
  if x_train.dtype.kind in "biu" and x_train.dtype != np.uint8:
    note = "; ".join(filter(None, (note, f"{x_train.dtype} pixels were converted to floats")))
  note = "; ".join(filter(None, (note, _layout_note(x_train.shape))))
  x_train, x_test = _pixels(f"{name}: x_train", x_train), _pixels(f"{name}: x_test", x_test)
  if x_train.shape[1:] != x_test.shape[1:] or (x_train.dtype == np.uint8) != (
    x_test.dtype == np.uint8
  ):
    raise DatasetError(
      f"{name}: expected x_train and x_test with rows of one shape, both uint8 or neither; got "
      f"{x_train.shape} {x_train.dtype} and {x_test.shape} {x_test.dtype}"
    )
  x_train, x_test = (
    x.astype(np.result_type(x_train, x_test), copy=False) for x in (x_train, x_test)
  )
  for key, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
    if y.shape not in ((len(x),), (len(x), 1)):
      raise DatasetError(
        f"{name}: expected y_{key} with one label for each of {len(x)} rows, got shape {y.shape}"
      )
  y_train, y_test, num_classes, class_names = _labels(
    name, y_train.ravel(), y_test.ravel(), class_names
  )
  if num_classes < 2:
    raise DatasetError(f"{name}: expected y_train of at least 2 classes, got {y_train[0]} alone")
  pixel_max = 255.0 if x_train.dtype == np.uint8 else pixel_max or max(float(x_train.max()), 1.0)
  held = _stratified(y_train, fraction, seed)
  arrays = (x_train[~held], y_train[~held], x_train[held], y_train[held], x_test, y_test)
  hashes = {
    key: sha256_of(*arrays[2 * i : 2 * i + 2])
    for i, key in enumerate(("train", "validation", "test"))
  }
  return Dataset(name, *arrays, num_classes, class_names, pixel_max, hashes, note)


def _layout_note(shape: tuple[int, ...]) -> str:
  """A note if images look like channels first: axis 1 has 1, 3 or 4 entries, the last more."""
  if len(shape) != 4 or shape[1] not in (1, 3, 4) or shape[3] <= 4:
    return ""
  return (
    f"x_train has shape {shape} and was read as {shape[1]} x {shape[2]} pixels with {shape[3]} channels; "
    "if it is channels first (NCHW), transpose it to (n, h, w, c): x.transpose(0, 2, 3, 1)"
  )


def sha256_of(*arrays) -> str:
  """Hash in hex of arrays, over dtype, shape and bytes; the same on every machine."""
  digest = hashlib.sha256()
  for array in arrays:
    array = np.ascontiguousarray(
      array, array.dtype.newbyteorder("<")
    )  # the same hash on every machine
    digest.update(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _pixels(what, x) -> np.ndarray:
  """Rows as `(n, h, w, c)` or `(n, d)`, in a native dtype, finite."""
  if x.ndim not in (2, 3, 4) or 0 in x.shape:
    raise DatasetError(
      f"{what}: expected a non-empty (n, h, w, c), (n, h, w) or (n, d), got shape {x.shape}"
    )
  if x.dtype.kind not in "biuf":
    raise DatasetError(f"{what}: expected uint8 or floating pixels, got {x.dtype}")
  if x.dtype.kind == "f":
    x = x.astype(np.dtype(f"f{min(x.itemsize, 8)}"), copy=False)
    bad = ~np.isfinite(x)
    if bad.any():
      first = tuple(int(i) for i in np.unravel_index(bad.argmax(), x.shape))
      raise DatasetError(
        f"{what}: expected finite pixels, got {int(bad.sum())} NaN or infinite, the first at index {first}"
      )
  elif x.dtype != np.uint8:
    exact = x.itemsize <= 2 or max(abs(int(x.min())), abs(int(x.max()))) <= 2**24
    x = x.astype(np.float32 if exact else np.float64)
  return x[..., None] if x.ndim == 3 else x


def _labels(name, train, test, class_names):
  """`(y_train, y_test, num_classes, class_names)`, labels as int32 in 0..c-1, all of which occur in training."""
  if {train.dtype.kind, test.dtype.kind} <= set("SU"):
    train, test = (
      np.char.decode(y, "utf-8", "replace") if y.dtype.kind == "S" else y for y in (train, test)
    )
    names, y_train = np.unique(train, return_inverse=True)
    unseen = np.setdiff1d(test, names)
    if unseen.size:
      raise DatasetError(
        f"{name}: expected y_test labels that occur in y_train, got {unseen.size} others, "
        f"the first {str(unseen[0])!r}"
      )
    y_test = np.searchsorted(names, test)
    return y_train.astype(np.int32), y_test.astype(np.int32), len(names), tuple(names.tolist())
  y_train, y_test = (
    _integers(f"{name}: {key}", y) for key, y in (("y_train", train), ("y_test", test))
  )
  num_classes = int(y_train.max()) + 1
  if num_classes > len(y_train) or (np.bincount(y_train, minlength=num_classes) == 0).any():
    seen = np.unique(y_train)
    absent = int(np.flatnonzero(seen != np.arange(len(seen)))[0])
    raise DatasetError(
      f"{name}: expected y_train to hold every class of 0..{num_classes - 1}, got {len(seen)} classes "
      f"from {seen[0]} to {seen[-1]}, without {absent}"
    )
  if y_test.max() >= num_classes:
    raise DatasetError(
      f"{name}: expected y_test in 0..{num_classes - 1}, the classes of y_train, got {y_test.max()}"
    )
  return (
    y_train,
    y_test,
    num_classes,
    class_names if len(class_names or ()) == num_classes else None,
  )


def _integers(what, y) -> np.ndarray:
  if y.dtype.kind not in "biuf":
    raise DatasetError(
      f"{what}: expected integer labels (or strings in both splits), got {y.dtype}"
    )
  if y.dtype.kind == "f":
    with np.errstate(over="ignore"):
      y = y.astype(np.float64)  # 2^31 is beyond float16
  whole = np.floor(y) == y if y.dtype.kind == "f" else True  # False at NaN
  bad = ~(whole & (y >= 0) & (y < 2**31 - 1))
  if bad.any():
    first = int(bad.argmax())
    raise DatasetError(
      f"{what}: expected integers 0..c-1, got {int(bad.sum())} other values, the first {y[first]} "
      f"at index {first}"
    )
  return y.astype(np.int32)


def _stratified(labels, fraction, seed) -> np.ndarray:
  """Boolean mask `(n,)` of the rows to hold out; every class keeps at least one."""
  counts = np.bincount(labels)
  share = fraction * counts
  take = np.floor(share).astype(np.int64)
  extra = round(fraction * len(labels)) - take.sum()
  take[np.argsort(take - share, kind="stable")[:extra]] += 1
  take = np.minimum(take, counts - 1)
  order = np.lexsort((np.random.PCG64(seed).random_raw(len(labels)), labels))
  held = np.zeros(len(labels), bool)
  held[order] = _rank_in_class(labels[order]) < take[labels[order]]
  return held


class _Pick:
  """Rows of a training split to read for training and for testing; the `pick` of readers.

  Args:
    name: of the dataset, for messages.
    count: number of training rows; 0 for all.
    seed: of the training rows.
    test_fraction: part of each class that is for testing, if there is no test split.
  """

  def __init__(self, name: str, count: int, seed: int, test_fraction: float):
    self._name, self._count, self._seed = name, count, seed
    # Exact, so that rounding does not move a row from one split to the other.
    self._fraction = fractions.Fraction(repr(test_fraction)).limit_denominator(10**6)
    self._cut = False

  def __call__(self, labels, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ascending rows for training and for testing.

    With `cut` a fraction f of each class is for testing: its rows r = 0, 1, ... with floor((r + 1) f) > floor(r f),
    never the first. About `count` of the others, in proportion to the classes, are for training.
    """
    self._cut = cut
    _, classes = np.unique(labels, return_inverse=True)
    test = np.zeros(len(labels), bool)
    if cut:
      rank, (above, below) = _rank_in_class(classes), self._fraction.as_integer_ratio()
      test = (rank + 1) * above // below > rank * above // below
      if not test.any():
        most = int(np.bincount(classes).max(initial=0))
        raise DatasetError(
          f"{self._name}: expected a test split, or a class with at least {-(-below // above)} rows, of which "
          f"test_fraction={float(self._fraction):g} is for testing; got {most} at most"
        )
    train = np.flatnonzero(~test)
    if 0 < self._count < len(train):
      share = 1 - self._count / len(train)
      train = train[~_stratified(classes[train], share, [self._seed, 1])]
    return train, np.flatnonzero(test)

  def note(self) -> str:
    """How the test rows were chosen, or that the fraction has no effect."""
    default = fractions.Fraction(repr(_TEST_FRACTION))
    if not self._cut:
      if self._fraction == default:
        return ""
      return (
        f"the dataset has a test split, so test_fraction={float(self._fraction):g} has no effect"
      )
    if self._fraction == default:
      return "no test split: test is every fifth row of each class"
    return (
      f"no test split: test is {100 * float(self._fraction):g} % of each class, evenly spaced rows"
    )


def _rank_in_class(labels) -> np.ndarray:
  """The number of earlier rows with the same label."""
  counts, rank = np.bincount(labels), np.empty(len(labels), np.int64)
  rank[np.argsort(labels, kind="stable")] = np.arange(len(labels)) - np.repeat(
    np.cumsum(counts) - counts, counts
  )
  return rank


def _read_digits(pick) -> dict:
  from sklearn.datasets import load_digits

  x, y = load_digits(return_X_y=True)
  x = x.reshape(-1, 8, 8, 1).astype(np.float32)
  train, test = pick(y, cut=True)
  return {
    "x_train": x[train],
    "y_train": y[train],
    "x_test": x[test],
    "y_test": y[test],
    "pixel_max": 16.0,
    "class_names": tuple("0123456789"),
    "note": "pixels are 0..16",
  }


@contextlib.contextmanager
def _one_fault(what):
  """Converts any exception to a one-line `DatasetError`."""
  try:
    yield
  except DatasetError:
    raise
  except Exception as error:
    raise DatasetError(f"{what}, got {type(error).__name__}: {checks.one_line(error)}") from error


def _read_npz(name, pick) -> dict:
  path = os.path.expanduser(name)
  try:
    missing = [key for key in _ARRAYS if key not in (found := npz.names_in(path))]
    if missing:
      raise DatasetError(
        f"{name}: expected the arrays {', '.join(_ARRAYS)}; {', '.join(missing)} missing, "
        f"found {checks.one_line(', '.join(sorted(found)[:20])) or 'nothing'}"
      )
    raw = npz.read_npz(path, (*_ARRAYS[1:], *_NAMES))
    rows, _ = pick(labels := raw["y_train"].ravel(), cut=False)
    if len(rows) < len(labels):
      raw |= {"x_train": npz.read_rows(path, "x_train", rows), "y_train": labels[rows]}
    else:
      raw |= npz.read_npz(path, ("x_train",))
  except npz.NpzError as error:
    raise DatasetError(str(error)) from error
  for names in [raw.pop(key) for key in _NAMES if key in raw]:
    if names.ndim == 1 and names.dtype.kind == "U":
      raw["class_names"] = tuple(names.tolist())  # type: ignore[assignment]
  return raw


def _read_tfds(name, data_dir, pick) -> dict:
  if data_dir is not None and not os.path.isdir(data_dir):
    raise DatasetError(
      f"{name}: expected data_dir to be an existing directory, got {os.fspath(data_dir)!r}"
    )
  where = f"in {os.fspath(data_dir)}" if data_dir else "in TFDS's default directory"
  with _one_fault(f"{name}: expected a dataset that TFDS can load {where}"):
    return tfds_data.read(name, data_dir, pick)
