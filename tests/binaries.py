"""The binaries as users start them, without waiting for their imports each time.

One process imports the libraries, and forks itself for each command; what is run, and what comes
back, is that of `python -m`. JAX starts its threads with the first computation, so before that a
process may fork.
"""

import atexit
import functools
import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_binary(*arguments) -> subprocess.CompletedProcess:
  """Exit status, output and errors of `python -m` with the arguments in the repository folder."""
  process = _forking()
  with tempfile.TemporaryDirectory() as folder:
    paths = [os.path.join(folder, name) for name in ("out", "errors")]
    process.stdin.write(json.dumps([list(map(str, arguments)), paths]) + "\n")
    process.stdin.flush()
    status = int(process.stdout.readline())
    return subprocess.CompletedProcess(
      arguments, status, *(pathlib.Path(path).read_text() for path in paths)
    )


def free_port() -> int:
  """A TCP port on loopback that no process listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@functools.cache
def _forking() -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, __file__],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  atexit.register(process.kill)
  return process


def _run(arguments, paths) -> None:
  """In the forked process: never returns."""
  for number, path in zip((1, 2), paths):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  sys.argv = arguments
  status = 0
  try:
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
  except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(bool(end.code))
  except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
  # Only libraries: each command imports the modules of this repository itself, as a new process
  # would.
  import flax.linen  # noqa: F401

  sys.path[0] = str(ROOT)
  for line in sys.stdin:
    process = os.fork()
    if not process:
      _run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
  _serve()
