"""One run at a time in a folder: the lock, and a folder that a failed run leaves free."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from kipcore.cli.errors import UsageError
from kipcore.cli.folder import run_folder


@contextlib.contextmanager
def new_folder(output_dir: str | None, name: str, overwrite: bool) -> Iterator[pathlib.Path]:
  """A locked folder for a new run, cleared of an earlier one; a run that fails leaves it free.

  Args:
    output_dir: folder, or None for a new one under runs/.
    name: name of the run, for a new folder.
    overwrite: whether an earlier run may be replaced.

  Raises:
    UsageError: if it is occupied, locked or not writable.
  """
  folder = run_folder.reserve(output_dir, name, overwrite)
  with lock_folder(folder, created=not output_dir):
    run_folder.planned(str(folder), name, overwrite)  # it may have changed before it was locked
    run_folder.clear(folder)
    with run_folder.releasing(folder):
      yield folder


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path, created: bool = False) -> Iterator[None]:
  """Holds the lock of a run folder; the system releases it if the process dies.

  The lock file is deleted at the end. A process that opened the deleted file before would lock
  something that no other process sees, so the file is compared with the one at its path, and
  opened again if they differ.

  Args:
    folder: created if it does not exist.
    created: whether the caller created it; a created folder is removed if it ends up empty.

  Raises:
    UsageError: if another process holds the lock, or the folder is not writable.
  """
  path = folder / ".lock"
  created = created or not folder.exists()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
  except BlockingIOError as error:
    raise UsageError(
      f"--output_dir: another run is writing to {folder}; choose another folder, or wait until it "
      "ends"
    ) from error
  except OSError as error:
    raise run_folder.not_writable(folder, error) from error
  with file:
    try:
      yield
    finally:
      path.unlink(missing_ok=True)
      if created:
        with contextlib.suppress(OSError):
          folder.rmdir()


def _locked(path: pathlib.Path):
  """The lock file, open and locked; BlockingIOError if another process holds the lock."""
  try:
    import fcntl
  except ImportError:  # Windows
    return open(path, "a+b")
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        return file
    except FileNotFoundError:  # deleted by the process that held the lock
      pass
    except BaseException:
      file.close()
      raise
    file.close()
