"""Fitted whitening on disk: fitting a 3,072 x 3,072 whitening matrix takes half a minute, and every run on the same rows needs it."""

import contextlib
import hashlib
import json
import os
import pathlib

import numpy as np

from kipcore import preprocess
from kipcore.io import npz

_FORMAT, _VERSION = "kipcore-preprocess", 1
# Fitting for fewer numbers per row is as fast as reading.
_LEAST_FEATURES = 512
# Files that are kept, the newest ones; 38 MB each for 32 x 32 color images.
_MOST_FILES = 8


def folder() -> pathlib.Path:
  """`$KIPCORE_CACHE_DIR`, or `kipcore` in `$XDG_CACHE_HOME` or `~/.cache`."""
  if named := os.environ.get("KIPCORE_CACHE_DIR"):
    return pathlib.Path(named)
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "kipcore"


def fit(x_train: np.ndarray, kind: str, pixel_max: float, digest: str) -> preprocess.Preprocess:
  """`fit_preprocess(x_train, kind, pixel_max)`, read from the cache if it is there.

  A whitening is stored exactly, with checksums, so that both give equal bits. Files that cannot be read or written are
  ignored.

  Args:
    x_train: `(n, ...)` training rows.
    kind: one of `preprocess.KINDS`.
    pixel_max: stored value of white.
    digest: hash of the training rows.

  Returns:
    The fitted preprocessing.
  """
  if not kind.startswith("zca") or x_train[0].size < _LEAST_FEATURES:
    return preprocess.fit_preprocess(x_train, kind, pixel_max)
  about = {"kind": kind, "pixel_max": float(pixel_max), "rows": digest, **preprocess.recipe(kind)}
  name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
  path = folder() / f"{kind}-{name}.npz"
  with contextlib.suppress(OSError, ValueError):
    arrays, metadata = npz.load_checked(path, _FORMAT, _VERSION)
    if metadata.get("about") == about:
      found = preprocess.Preprocess.from_arrays(metadata["preprocess"], arrays)
      os.utime(path)
      return found
  fitted = preprocess.fit_preprocess(x_train, kind, pixel_max)
  spec, arrays = fitted.to_arrays()
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    npz.save_checked(path, arrays, _FORMAT, _VERSION, {"about": about, "preprocess": spec})
    _prune(path.parent)
  return fitted


def _prune(found: pathlib.Path) -> None:
  """Deletes all but the newest files of this cache."""
  files = sorted(found.glob("zca*-*.npz"), key=lambda file: file.stat().st_mtime)
  for file in files[:-_MOST_FILES]:
    file.unlink(missing_ok=True)
