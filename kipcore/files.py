"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from typing import BinaryIO, Iterator


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
