"""Files, and folders of them, that are there whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
  """A binary file to write to, aside; at the end of the block it is flushed to disk and renamed over `path`.

  Whatever is raised in the block leaves an older file of that name as it was, and nothing aside.

  Args:
    path: file name; its folder exists.

  Raises:
    OSError: where it cannot be written.
  """
  path = pathlib.Path(path)
  handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.chmod(aside, 0o644)
    os.replace(aside, path)
  except BaseException:
    pathlib.Path(aside).unlink(missing_ok=True)
    raise


def write_atomically(path, content: bytes) -> None:
  """Writes a whole file or none; see `replacing`."""
  with replacing(path) as file:
    file.write(content)


@contextlib.contextmanager
def replacing_folder(path) -> Iterator[pathlib.Path]:
  """A folder to fill, aside; at the end of the block it takes the name `path`, and a folder of that name is deleted.

  Whatever is raised in the block leaves an older folder as it was, and nothing aside. No portable call exchanges
  two folders: a process that is killed between the two renames leaves both in a hidden folder beside `path`.

  Args:
    path: folder name; the folder that it is in exists.

  Raises:
    OSError: where it cannot be written.
  """
  path = pathlib.Path(path)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
    new, old = pathlib.Path(aside, "new"), pathlib.Path(aside, "old")
    new.mkdir()
    yield new
    if path.exists():
      path.rename(old)
    try:
      new.rename(path)
    except BaseException:
      if old.exists():
        old.rename(path)
      raise
