"""Imports TensorFlow and TensorFlow Datasets silently and without taking accelerator memory."""

import contextlib
import os
import sys


@contextlib.contextmanager
def quiet_tensorflow():
  """Yields (tensorflow, tensorflow_datasets) without accelerators; output, including that of C++ code, is discarded."""
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
        import tensorflow as tf
        import tensorflow_datasets as tfds

        for device in ("GPU", "TPU"):
          with contextlib.suppress(
            RuntimeError, ValueError
          ):  # TensorFlow is already initialized by the caller.
            tf.config.set_visible_devices([], device)
        tfds.disable_progress_bar()
        yield tf, tfds
    finally:
      for fd, copy in saved.items():
        os.dup2(copy, fd)
        os.close(copy)
