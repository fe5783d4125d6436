"""The one exception that means "the user can mend this"; binaries turn it into one line and status 2."""

import contextlib


class UsageError(ValueError):
  """A wrong flag, file or value."""


class Stopped(Exception):
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
