"""Images of TensorFlow Datasets, read silently and only as many as requested.

Prepared files in a format with random access (array_record) are read without TensorFlow. TFDS needs it for other formats, and to
prepare a dataset, because it encodes images by TensorFlow.
"""

import contextlib
import difflib
import functools
import importlib.util
import os
import pathlib
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable

import numpy as np

from kipcore import checks
from kipcore.io.quiet_tensorflow import import_tensorflow, quiet_tfds
from kipcore.types import DatasetError

_BATCH = 256  # images decoded at a time


def read(name: str, data_dir, pick: Callable) -> dict:
  """The splits of a TFDS dataset of images with class labels.

  Args:
    name: of the dataset.
    data_dir: where the dataset is, or will be stored; None for TFDS's default.
    pick: `(labels, cut) -> rows for training, rows for testing`, the latter if it must `cut` them from the former.

  Returns:
    x_train uint8 `(n, h, w, c)`, y_train `(n,)`, x_test, y_test, `class_names`, `note`.

  Raises:
    DatasetError: for an unknown name, other features, packages that are not installed, or data that are missing and cannot be
      downloaded; and for exceptions of TFDS.
  """
  _require_known(name, data_dir)
  try:
    with quiet_tfds() as tfds:
      return _read(tfds, name, data_dir, pick)
  except ImportError as error:
    raise DatasetError(f"{name}: {checks.one_line(error)}") from error


def _require_known(name: str, data_dir) -> None:
  """Rejects a misspelled name quickly, without importing TensorFlow."""
  own = re.split(r"[/:]", name)[0]
  folders = (data_dir, os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets")
  prepared = (pathlib.Path(folder).expanduser() / own for folder in folders if folder)
  # Names with a namespace, and builders registered by the caller, are handled by TFDS.
  if ":" in name.partition("/")[0] or "tensorflow_datasets" in sys.modules:
    return
  if not pathlib.Path(name).exists() and not any(path.exists() for path in prepared):
    names = builder_names()
    if names and own not in names:
      raise _unknown(name, names)


@functools.cache
def builder_names() -> frozenset[str]:
  """Names of the datasets in the installed TFDS package (and of other classes), from its files, without importing it."""
  spec = importlib.util.find_spec("tensorflow_datasets")
  names = set()
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    for path in pathlib.Path(folder).rglob("*.py"):
      if {"core", "testing", "scripts"} & set(path.relative_to(folder).parts[:1]):
        continue
      text = path.read_text(encoding="utf-8", errors="ignore")
      for found in re.findall(r"^class (\w+)\(", text, flags=re.M):
        spaced = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", found)
        names.add(re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", spaced).lower())
    names |= {path.name for path in pathlib.Path(folder, "datasets").glob("*") if path.is_dir()}
  return frozenset(names)


def _unknown(name: str, names) -> DatasetError:
  close = difflib.get_close_matches(name, ["digits", *sorted(names)], n=3)
  return DatasetError(
    f"unknown dataset {name!r}: expected digits, a folder of images, a path ending in .npz, .parquet or .arrow, or a TFDS name"
    + (f"; did you mean {' or '.join(close)}?" if close else "")
  )


def _read(tfds, name, data_dir, pick) -> dict:
  try:
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
  except tfds.core.DatasetNotFoundError as error:
    raise _unknown(name, tfds.list_builders()) from error
  features = builder.info.features
  x_key, y_key = builder.info.supervised_keys or ("image", "label")
  if not (
    x_key in features
    and isinstance(features[x_key], tfds.features.Image)
    and y_key in features
    and isinstance(features[y_key], tfds.features.ClassLabel)
  ):
    raise DatasetError(
      f"{name}: expected a TFDS dataset of images with class labels, got features {checks.one_line(features)}"
    )
  if None in features[x_key].shape:
    raise DatasetError(
      f"{name}: expected images of one size, got image shape {features[x_key].shape}"
    )
  if not builder.is_prepared():
    import_tensorflow()  # otherwise, TFDS fails after the download
    _require_host(name, builder)
    builder.download_and_prepare()
  batches = _batches(tfds, builder)

  def labels(split):
    return np.concatenate([y for y in batches(split, y_key, skip=x_key)])

  def images(split, wanted):
    out = np.empty((wanted.sum(), *features[x_key].shape), features[x_key].np_dtype)
    first, done = 0, 0
    for batch in batches(split, x_key):
      here = batch[wanted[first : first + len(batch)]]
      out[done : done + len(here)] = here
      first, done = first + len(batch), done + len(here)
    return out

  splits = builder.info.splits
  main = "train" if len(splits) != 1 else next(iter(splits))
  if main not in splits:
    raise DatasetError(f"{name}: expected a split called train, got {', '.join(splits)}")
  raw = {"note": "" if main == "train" else f"the only split is called {main}"}
  for split in ("test", "validation"):
    if split in splits and split != main:
      y = labels(split)
      if (y >= 0).all():  # Some test splits come without labels, as -1.
        raw |= {
          "x_test": images(split, np.ones(len(y), bool)),
          "y_test": y,
          "note": "" if split == "test" else "the TFDS validation split is the test split",
        }
        break
  y = labels(main)
  train, test = pick(y, cut="x_test" not in raw)
  wanted = np.zeros(len(y), bool)
  wanted[train] = wanted[test] = True
  # The position of each requested row among the requested ones.
  x, place = images(main, wanted), np.cumsum(wanted) - 1
  if len(test):
    raw |= {"x_test": x[place[test]], "y_test": y[test]}
    x = x[place[train]]
  return {
    **raw,
    "x_train": x,
    "y_train": y[train],
    "class_names": tuple(features[y_key].names or ()) or None,
  }


def _batches(tfds, builder) -> Callable:
  """`(split, key, skip=None) -> iterator` over batches of the feature `key`, in an order that is always the same; `skip` is not decoded."""

  def by_tensorflow(split, key, skip=None):
    del skip
    rows = builder.as_dataset(
      split=split,
      batch_size=_BATCH,
      shuffle_files=False,
      decoders=tfds.decode.PartialDecoding({key: True}),
    )
    return (batch[key] for batch in tfds.as_numpy(rows))

  def by_position(split, key, skip=None):
    decoders = {skip: tfds.decode.SkipDecoding()} if skip else None
    rows = builder.as_data_source(split=split, decoders=decoders)
    for first in range(0, len(rows), _BATCH):
      batch = rows.__getitems__(range(first, min(first + _BATCH, len(rows))))
      yield np.stack([row[key] for row in batch])

  formats = builder.info.available_file_formats()
  return by_position if formats & tfds.core.FileFormat.with_random_access() else by_tensorflow


def _require_host(name, builder):
  """Fails immediately if no download host can be resolved; TFDS itself retries for minutes."""
  hosts = sorted(
    {urllib.parse.urlsplit(url).hostname or "" for url in getattr(builder, "url_infos", None) or ()}
  )
  for host in hosts:
    with contextlib.suppress(OSError):
      socket.getaddrinfo(host, None)
      return
  if hosts and not urllib.request.getproxies():
    raise DatasetError(
      f"{name}: expected it prepared in {builder.data_dir}, or a network to download it; "
      f"got neither (no address for {', '.join(hosts)})"
    )
