"""The cache of fitted whitenings: equal bits, and files that are damaged, foreign, or cannot be written."""

import os

import numpy as np
import pytest

from kipcore import preprocess
from kipcore.cli.runs import preprocess_cache

X = np.random.default_rng(0).integers(0, 256, (30, 14, 13, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv("KIPCORE_CACHE_DIR", str(tmp_path / "cache"))
  return tmp_path / "cache"


def fit(x=X, kind="zca", pixel_max=255.0, digest="a"):
  return preprocess_cache.fit(x, kind, pixel_max, digest)


def arrays(fitted):
  return [array for step in fitted.steps for array in step.arrays.values()]


def same(a, b):
  return all(np.array_equal(p, q) for p, q in zip(arrays(a), arrays(b), strict=True))


def refuse(*args, **kwargs):
  raise AssertionError("fitted again")


def test_a_second_fit_reads_equal_bits(folder, monkeypatch):
  fresh = preprocess.fit_preprocess(X, "zca", 255.0)
  assert same(fit(), fresh)
  monkeypatch.setattr(preprocess, "fit_preprocess", refuse)
  again = fit()
  assert same(again, fresh) and (again.kind, again.row_shape) == (fresh.kind, fresh.row_shape)
  assert np.array_equal(again.apply(X), fresh.apply(X))
  for other in (dict(digest="b"), dict(kind="zca_kip"), dict(pixel_max=1.0)):
    with pytest.raises(AssertionError, match="fitted again"):
      fit(**other)


def test_damaged_and_foreign_files_are_replaced(folder, monkeypatch):
  fresh = fit()
  (file,) = folder.iterdir()
  content = file.read_bytes()
  fit(digest="b")
  (other,) = set(folder.iterdir()) - {file}
  for wrong in (b"", content[:-99], other.read_bytes(), os.urandom(500)):
    file.write_bytes(wrong)
    assert same(fit(), fresh)
    assert file.read_bytes() == content


def test_folders_that_cannot_be_written_are_ignored(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("KIPCORE_CACHE_DIR", str(tmp_path / "file" / "cache"))
  assert same(fit(), preprocess.fit_preprocess(X, "zca", 255.0))


def test_small_rows_and_other_kinds_are_not_stored(folder):
  fit(X[:, :5])
  fit(kind="standardize")
  assert not folder.exists()


def test_the_oldest_files_are_deleted(folder, monkeypatch):
  monkeypatch.setattr(preprocess_cache, "_MOST_FILES", 2)
  for i, digest in enumerate("abc"):
    before = set(folder.iterdir()) if folder.exists() else set()
    fit(digest=digest)
    (new,) = set(folder.iterdir()) - before
    os.utime(new, (i, i))
  assert len(set(folder.iterdir())) == 2
  monkeypatch.setattr(preprocess, "fit_preprocess", refuse)
  fit(digest="c")
  with pytest.raises(AssertionError):
    fit(digest="a")


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.delenv("KIPCORE_CACHE_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert preprocess_cache.folder() == tmp_path / "kipcore"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert preprocess_cache.folder() == tmp_path / ".cache" / "kipcore"
