"""Atomic writing of files and folders."""

import os

import numpy as np
import pytest

from kipcore.io import atomic, npz


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request):
  before = os.umask(request.param)
  yield request.param
  os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_follow_the_umask(tmp_path, umask):
  atomic.write_atomically(tmp_path / "file", b"text")
  npz.save_checked(tmp_path / "arrays.npz", {"x": np.zeros(2)}, "kipcore-test", 1)
  with atomic.replacing_folder(tmp_path / "folder") as folder:
    (folder / "inner").write_text("")
  mode = lambda *names: tmp_path.joinpath(*names).stat().st_mode & 0o777
  assert mode("file") == mode("arrays.npz") == mode("folder", "inner") == 0o666 & ~umask
  assert mode("folder") == 0o777 & ~umask


def test_a_failed_write_changes_nothing(tmp_path):
  atomic.write_atomically(tmp_path / "file", b"old")
  with pytest.raises(KeyError), atomic.replacing(tmp_path / "file") as file:
    file.write(b"new")
    raise KeyError
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
  assert (tmp_path / "file").read_bytes() == b"old"
