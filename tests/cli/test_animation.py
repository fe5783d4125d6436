"""`--animation`: the frames of a run, also of one that is resumed."""

import numpy as np
from PIL import Image

from kipcore.cli.config import DistillConfig
from kipcore.cli.folder import animation, outputs
from kipcore.cli.runs import loading


def test_frames_survive_an_interruption_and_repeated_steps_replace_theirs(tmp_path):
  data = loading.load(DistillConfig(num_devices=1))
  # Two images of each of ten classes; the first ones are shown.
  rows = np.concatenate([np.flatnonzero(data.raw.y_train == c)[:2] for c in range(10)])
  x, labels = data.x_train[rows], data.y_train[rows]
  movie = animation.Animation(tmp_path, data, labels)
  for step in (0, 1, 5):
    movie.add(step, x[::-1] if step == 5 else x)
  resumed = animation.Animation(tmp_path, data, labels)
  for step in (5, 10):
    resumed.add(step, x)
  steps, frames = outputs.load_arrays(tmp_path / "frames.npz", "steps", "frames")
  expected = np.rint(data.raw.x_train[rows[::2]] * 255 / 16)
  assert steps.tolist() == [0, 1, 5, 10] and frames.dtype == np.uint8
  assert np.array_equal(frames, np.broadcast_to(expected, frames.shape))
  resumed.finish()
  assert [path.name for path in tmp_path.iterdir()] == ["animation.gif"]
  with Image.open(tmp_path / "animation.gif") as gif:
    assert gif.format == "GIF" and gif.size[0] == 5 * 82


def test_nothing_is_kept_without_the_flag_or_images(tmp_path):
  data = loading.load(DistillConfig(num_devices=1))
  x, labels = data.x_train[:10], data.y_train[:10]
  flat = data._replace(x_train=data.x_train.reshape(len(data.x_train), -1))
  for folder, each in ((None, data), (tmp_path, flat)):
    movie = animation.Animation(folder, each, labels)
    movie.add(0, x)
    movie.finish()
  assert not list(tmp_path.iterdir())
