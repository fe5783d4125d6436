"""Rows for classes that are smaller than the number of images per class."""

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import augment, keys

WAYS = ("repeat", "augment")
_OPERATIONS = "crop_scale_rotate"  # none changes which digit or letter an image shows


def missing_rows(labels: np.ndarray, num_classes: int, per_class: int) -> np.ndarray:
  """Rows to add so that each class has `per_class`: those of the class in turn, grouped by class.

  Args:
    labels: `(n,)` integers in 0..num_classes-1, each of which occurs.
    num_classes: c.
    per_class: the least number of rows of a class.

  Returns:
    Integer rows in 0..n-1; none if no class is smaller.
  """
  added = [np.empty(0, np.int64)]
  for c in range(num_classes):
    rows = np.flatnonzero(labels == c)
    added.append(np.resize(rows, max(per_class - len(rows), 0)))
  return np.concatenate(added)


def augmented(seed: int, images: np.ndarray) -> np.ndarray:
  """Each image shifted, scaled or rotated at random; what lies outside has the mean color of its border.

  Args:
    seed: of the transforms.
    images: `(n, h, w, c)` pixels, uint8 or floating.

  Returns:
    Images of the same shape and dtype.

  Raises:
    ValueError: for rows that are not images.
  """
  if images.ndim != 4:
    raise ValueError(f"fill: expected images for augment, got rows of shape {images.shape[1:]}")
  x = images.astype(np.result_type(images, np.float32))
  inside = np.zeros(images.shape[1:3], bool)
  inside[1:-1, 1:-1] = True
  border = np.mean(x[:, ~inside], axis=1, keepdims=True)[:, :, None]
  draws = jax.random.split(keys.stream(seed, "fill"), len(x))
  draw = augment.random_augmentation(_OPERATIONS)
  moved = jax.jit(jax.vmap(lambda key, image: draw(key)(image[None])[0]))
  x = np.asarray(moved(draws, jnp.asarray(x - border))) + border
  if images.dtype == np.uint8:
    x = np.clip(np.rint(x), 0, 255)
  return x.astype(images.dtype)
