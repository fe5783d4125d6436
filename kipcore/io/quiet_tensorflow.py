"""Imports TensorFlow Datasets, and TensorFlow, silently and without taking accelerator memory."""

import contextlib
import os
import sys

_HINT = "pip install 'kipcore[tfds]'"


@contextlib.contextmanager
def quiet_tfds():
  """Yields tensorflow_datasets; output, including that of C++ code, is discarded.

  TensorFlow, which TFDS uses for many purposes, gets no accelerators if it is installed.

  Raises:
    ImportError: if tensorflow-datasets is not installed, or if TensorFlow is used and not installed.
  """
  for setting in ("TF_CPP_MIN_LOG_LEVEL=3", "GRPC_VERBOSITY=ERROR", "NO_GCE_CHECK=true"):
    os.environ.setdefault(*setting.split("="))
  sys.stdout.flush()
  sys.stderr.flush()
  saved = {fd: os.dup(fd) for fd in (1, 2)}
  with open(os.devnull, "w") as nowhere:
    try:
      for fd in saved:
        os.dup2(nowhere.fileno(), fd)
      with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        with _required():
          import tensorflow_datasets as tfds

          with contextlib.suppress(ModuleNotFoundError):
            import_tensorflow()
          tfds.disable_progress_bar()
          yield tfds
    finally:
      for fd, copy in saved.items():
        os.dup2(copy, fd)
        os.close(copy)


@contextlib.contextmanager
def quiet_tensorflow():
  """Yields (tensorflow, tensorflow_datasets) as `quiet_tfds` does.

  Raises:
    ImportError: if one of them is not installed.
  """
  with quiet_tfds() as tfds:
    yield import_tensorflow(), tfds


def import_tensorflow():
  """TensorFlow without accelerators; ModuleNotFoundError if it is not installed."""
  import tensorflow as tf

  for device in ("GPU", "TPU"):
    # TensorFlow may be initialized by the caller already.
    with contextlib.suppress(RuntimeError, ValueError):
      tf.config.set_visible_devices([], device)
  return tf


@contextlib.contextmanager
def _required():
  """Names the package and the command that installs it."""
  packages = {"tensorflow": "TensorFlow", "tensorflow_datasets": "tensorflow-datasets"}
  try:
    yield
  except ImportError as error:
    if error.name not in packages:
      raise
    raise ImportError(
      f"expected {packages[error.name]} to be installed, got {error}; {_HINT}", name=error.name
    ) from error
