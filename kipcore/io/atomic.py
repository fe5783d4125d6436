"""Atomic writes of files and folders."""

import contextlib
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path) -> Iterator[BinaryIO]:
  """A temporary binary file; at the end of the block it is flushed to disk and renamed to `path`.

  If the block raises, an existing file of that name is unchanged and the temporary file is deleted.
  Permissions follow the umask of the process.

  Args:
    path: file name in an existing folder.

  Raises:
    OSError: if it cannot be written.
  """
  path = pathlib.Path(path)
  aside = path.parent / f".{path.name}.{secrets.token_hex(8)}"
  # tempfile would always create files with mode 0600.
  handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
  try:
    with os.fdopen(handle, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(aside, path)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


def write_atomically(path, content: bytes) -> None:
  """Writes a file atomically; see `replacing`."""
  with replacing(path) as file:
    file.write(content)


@contextlib.contextmanager
def replacing_folder(path) -> Iterator[pathlib.Path]:
  """A temporary folder; at the end of the block it is renamed to `path`, replacing a folder of that name.

  If the block raises, an existing folder is unchanged and the temporary one is deleted. No portable call exchanges
  two folders: a process that is killed between the two renames leaves both in a hidden folder next to `path`.

  Args:
    path: folder name in an existing folder.

  Raises:
    OSError: if it cannot be written.
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
