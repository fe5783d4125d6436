"""`animation.gif` of a run: its images at the logged steps (`--animation`)."""

import contextlib
import pathlib

import numpy as np

from kipcore.cli.folder import outputs
from kipcore.io import npz
from kipcore.report import pictures

FILE, _FRAMES = "animation.gif", "frames.npz"
_MOST_IMAGES = 10


class Animation:
  """The first image of each of the first classes at the logged steps, kept in a file until the run has finished.

  A run that is resumed continues with the frames of that file; a step that is repeated replaces its frame.

  Args:
    folder: the run folder; None for no animation.
    data: data of the run; without images with 1 or 3 channels there is no animation.
    labels: `(m, c)` initial labels.
  """

  def __init__(self, folder: pathlib.Path | None, data, labels):
    images = data.x_train.ndim == 4 and data.x_train.shape[-1] in (1, 3)
    self._folder, self._data = folder if images else None, data
    _, rows = np.unique(np.argmax(np.asarray(labels), axis=1), return_index=True)
    self._rows = rows[:_MOST_IMAGES]
    self._frames: dict[int, np.ndarray] = {}
    if self._folder is not None:
      with contextlib.suppress(npz.NpzError, OSError):
        steps, frames = outputs.load_arrays(self._folder / _FRAMES, "steps", "frames")
        self._frames = {int(step): frame for step, frame in zip(steps, frames)}

  def add(self, step: int, x) -> None:
    """Adds the images `(m, ...)` of a step, preprocessed."""
    if self._folder is None:
      return
    pixels = np.asarray(self._data.preprocess.invert(np.asarray(x[self._rows])), np.float64)
    black, white = outputs.pixel_range(self._data)
    levels = np.rint(255 * np.clip((pixels - black) / (white - black), 0, 1)).astype(np.uint8)
    self._frames[step] = levels
    steps = sorted(self._frames)
    outputs.save_arrays(
      self._folder / _FRAMES,
      steps=np.array(steps),
      frames=np.stack([self._frames[step] for step in steps]),
    )

  def finish(self) -> None:
    """Writes the animation and removes the frames."""
    if self._folder is None or not self._frames:
      return
    steps = sorted(self._frames)
    pictures.save_animation(
      self._folder / FILE,
      [self._frames[step] for step in steps],
      [f"step {step:,}" for step in steps],
    )
    (self._folder / _FRAMES).unlink(missing_ok=True)
