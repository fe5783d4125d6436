"""What a run ends with that is no defect; binaries turn each into one line and a status (2 for what the user can mend)."""

import contextlib

from kipcore.types import KipcoreError


class UsageError(KipcoreError, ValueError):
  """A wrong flag, file or value."""


class OutOfMemory(KipcoreError):
  """Memory that ran out, or would; the message names the part and what helps. Binaries end with status 3."""


class Stopped(KipcoreError):
  """A run that was asked to stop, and did so at a checkpoint."""


@contextlib.contextmanager
def usage():
  """Turns the eager ValueError and TypeError of the library, met while setting up, into `UsageError`."""
  try:
    yield
  except UsageError:
    raise
  except (ValueError, TypeError) as error:
    raise UsageError(str(error)) from error
