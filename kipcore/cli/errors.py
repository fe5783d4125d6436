"""Errors that end a command with one line and an exit status instead of a traceback."""

import contextlib

from kipcore.types import KipcoreError


class UsageError(KipcoreError, ValueError):
  """An invalid flag, file or value (exit status 2)."""


class OutOfMemory(KipcoreError):
  """Memory ran out, or would; the message names the part and what helps (exit status 3)."""


class Stopped(KipcoreError):
  """A run was asked to stop and did so at a checkpoint.

  Attributes:
    status: exit status: 130 after Ctrl-C, 143 after SIGTERM.
  """

  def __init__(self, message: str, status: int = 143):
    super().__init__(message)
    self.status = status


@contextlib.contextmanager
def usage():
  """Converts ValueError and TypeError of the library's eager checks to `UsageError`, and names of settings to flags."""
  try:
    yield
  except UsageError:
    raise
  except (ValueError, TypeError) as error:
    from kipcore.cli import config

    text = str(error)
    named = text.partition(":")[0] in config.names()
    raise UsageError(f"--{text}" if named else text) from error
