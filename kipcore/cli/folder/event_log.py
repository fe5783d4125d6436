"""TensorBoard event files of a run (`--tensorboard`), written by tensorboardX, an optional dependency."""

import pathlib

from kipcore.cli.errors import UsageError

FOLDER = "tensorboard"


def require(wanted: bool) -> None:
  """Raises UsageError if the writer is requested but not installed."""
  if not wanted:
    return
  try:
    import tensorboardX  # noqa: F401
  except ImportError as error:
    raise UsageError(
      f"--tensorboard: expected tensorboardX to be installed, got {error}; pip install tensorboardX"
    ) from error


class EventLog:
  """Scalars of each logged step, and pictures at the end, in `tensorboard/` of a run folder.

  Args:
    folder: the run folder; None to write nothing.
  """

  def __init__(self, folder: pathlib.Path | None):
    self._writer = None
    if folder is not None:
      import tensorboardX

      self._writer = tensorboardX.SummaryWriter(str(folder / FOLDER), flush_secs=5)

  def scalars(self, record: dict) -> None:
    """Writes the numbers of a logged step, lists with one entry per index; flushed within seconds."""
    if self._writer is None:
      return
    for name, value in record.items():
      several = enumerate(value) if isinstance(value, list) else ((None, value),)
      for i, each in several:
        if name != "step":
          self._writer.add_scalar(name if i is None else f"{name}/{i}", each, record["step"])

  def close(self, step: int, pictures: list[pathlib.Path]) -> None:
    """Writes the existing pictures and closes the log."""
    if self._writer is None:
      return
    from matplotlib.image import imread

    for path in pictures:
      if path.exists():
        self._writer.add_image(path.stem, imread(path)[..., :3], step, dataformats="HWC")
    self._writer.close()
