"""Crops against NumPy, and RDED: the crop of each image and the images of each class with the lowest loss."""

import jax
import numpy as np
import pytest

import kipcore
from kipcore.selection import crops

C = 3


def images(n=40, size=8):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, size, size, 2)).astype(np.float32)
  return x, np.eye(C, dtype=np.float32)[np.arange(n) % C] - 1 / C


def bilinear(image, top, left, side):
  """A crop resized to the size of the image with pixel centers aligned, as images are usually resized."""
  size, out = image.shape[0], np.empty_like(image)
  crop = image[top : top + side, left : left + side]
  for i in range(size):
    for j in range(size):
      a, b = (np.clip((k + 0.5) * side / size - 0.5, 0, side - 1) for k in (i, j))
      (r, c), (s, d) = (int(a), int(b)), (min(int(a) + 1, side - 1), min(int(b) + 1, side - 1))
      u, v = a - r, b - c
      rows = (1 - u) * crop[r] + u * crop[s]
      out[i, j] = (1 - v) * rows[c] + v * rows[d]
  return out


def test_crops_equal_numpy():
  x, _ = images(30)
  found = np.asarray(kipcore.random_crops(3, x))
  u = np.asarray(jax.random.uniform(jax.random.key(3), (30, 3)))
  sides = set()
  for image, crop, (area, top, left) in zip(x, found, u):
    side = int(np.clip(np.round(np.sqrt((0.08 + 0.92 * area) * 64)), 1, 8))
    first, second = (int(share * (8 - side + 1)) for share in (top, left))
    np.testing.assert_allclose(crop, bilinear(image, first, second, side), atol=1e-5)
    sides.add(side)
  assert len(sides) >= 4 and max(sides) >= 7


def test_the_crops_with_the_lowest_loss_are_selected():
  x, y = images(90)
  seen = []

  def losses(rows, targets):
    loss = np.asarray(rows)[:, 2:6, 2:6].sum((1, 2, 3))
    seen.append((np.asarray(rows), np.asarray(targets).argmax(1), loss))
    return loss

  found = kipcore.rded(0, x, y, 4, losses, num_candidates=20, num_crops=3)
  assert found.x.shape == (12, 8, 8, 2) and (found.indices == -1).all()
  assert np.asarray(found.y).argmax(1).tolist() == np.repeat(range(C), 4).tolist()
  np.testing.assert_allclose(found.weights, 90 / 12)
  assert len(seen) == C * 3 and all(len(rows) == 20 for rows, _, _ in seen)
  for c in range(C):
    own = [entry for entry in seen if entry[1][0] == c]
    assert len(own) == 3 and all((labels == c).all() for _, labels, _ in own)
    table = np.stack([loss for *_, loss in own])
    best = np.argsort(table.min(0))[:4]
    expected = [own[table[:, i].argmin()][0][i] for i in best]
    np.testing.assert_array_equal(found.x[4 * c : 4 * c + 4], expected)
  again = kipcore.rded(0, x, y, 4, losses, num_candidates=20, num_crops=3)
  np.testing.assert_array_equal(again.x, found.x)


def test_rows_that_are_not_images_are_selected_whole():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(60, 5)).astype(np.float32), images(60)[1]
  found = kipcore.rded(0, x, y, 2, lambda rows, _: np.asarray(rows)[:, 0], num_candidates=300)
  np.testing.assert_array_equal(found.x, x[found.indices])
  for c in range(C):
    own = np.flatnonzero(y.argmax(1) == c)
    assert set(found.indices[2 * c : 2 * c + 2]) == set(own[np.argsort(x[own, 0])[:2]])


def test_invalid_arguments_are_named():
  x, y = images()
  zeros = lambda rows, _: np.zeros(len(rows))
  for arguments, message in (
    ((0, x, y, 20, zeros), "images_per_class: expected at most the 13 rows"),
    ((0, x, y[:-1], 1, zeros), "same number of rows"),
    ((0, x, y, 1, zeros, 0), "num_candidates"),
    ((0, x, y, 1, lambda rows, _: np.zeros(2)), "losses: expected shape"),
  ):
    with pytest.raises(ValueError, match=message):
      kipcore.rded(*arguments)
  with pytest.raises(ValueError, match="images: expected"):
    crops.random_crops(0, x[0])
