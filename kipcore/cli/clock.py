"""When a command was started, so that its time includes imports and loading."""

import os
import pathlib
import time

_process_start: float | None = None
_reported = False


def mark_process_start() -> None:
  """Makes the next `start` return the start of this process; called by commands alone."""
  global _process_start
  if _process_start is None:
    _process_start = time.perf_counter() - _age()


def start() -> float:
  """The value of `time.perf_counter` at the start of the command, or now outside of commands."""
  global _reported
  if _process_start is None or _reported:
    return time.perf_counter()
  _reported = True
  return _process_start


def _age() -> float:
  """Seconds since this process was started; 0 where the system does not report it."""
  try:
    ticks = pathlib.Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    uptime = float(pathlib.Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return max(uptime - int(ticks[19]) / os.sysconf("SC_CLK_TCK"), 0.0)
  except (OSError, ValueError, IndexError, AttributeError):
    return 0.0
