"""Selection of crops of images by the loss of a trained network (RDED)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kipcore import checks, keys
from kipcore.selection.coreset import Coreset, class_balanced_indices
from kipcore.types import Array, ArrayLike, Integer

# Smallest share of the image that a crop covers.
_LEAST_AREA = 0.08


def rded(
  key,
  x: Float[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  images_per_class: Integer,
  losses: Callable[[Array, Array], ArrayLike],
  num_candidates: Integer = 300,
  num_crops: Integer = 5,
) -> Coreset:
  """The crops of each class with the smallest loss of a trained network, at most one crop of an image.

  Of `num_candidates` random images of each class, `num_crops` random crops are made, square, with uniform areas from 8 % to
  100 % of the image, and enlarged to its size (bilinear). Of each image the crop with the smallest loss is kept, of each
  class the images with the smallest losses. Rows that are not images are not cropped. For images of at least 64 pixels
  the published method joins four crops of half the size; this function does not.

  Args:
    key: random key (or int seed).
    x: `(n, ...)` floating rows, such as pixels.
    y: `(n, c)` labels; the index of the largest entry of a row is its class.
    images_per_class: number of points per class, >= 1.
    losses: maps rows like `x` with their labels to one loss each, such as `expert_losses` of preprocessed rows.
    num_candidates: random rows of each class; at least `images_per_class`, and all of the class if there are fewer.
    num_crops: crops of each, >= 1.

  Returns:
    `Coreset` of the crops, grouped by class, with equal shares of the class as weights. The indices of crops are -1.

  Raises:
    ValueError, TypeError: for shapes that disagree, integer rows, numbers out of range, a class with fewer rows than
      `images_per_class`, or another number of losses.

  References:
    Sun et al. (CVPR 2024), RDED, section 4.
  """
  checks.same_rows("x", x, "y", y)
  checks.rank("y", y, 2)
  checks.floating("x", x)
  images_per_class, num_candidates, num_crops = checks.positive_ints(
    images_per_class=images_per_class, num_candidates=num_candidates, num_crops=num_crops
  )
  x, y = np.asarray(x), np.asarray(y)
  labels, num_classes = np.argmax(y, axis=1), y.shape[1]
  stream = keys.stream(key, "rded")
  class_balanced_indices(stream, labels, images_per_class, num_classes)  # checks the sizes
  order = np.asarray(jax.random.permutation(stream, labels.size))
  points, indices, weights = [], [], []
  for c in range(num_classes):
    rows = order[labels[order] == c]
    share = rows.size / images_per_class
    rows = rows[: max(num_candidates, images_per_class)]
    best, best_losses = jnp.asarray(x[rows]), np.full(rows.size, np.inf)
    targets = jnp.asarray(y[rows])
    for i in range(num_crops if x.ndim == 4 else 1):
      crop_key = keys.at_step(keys.at_step(keys.stream(stream, "crop"), c), i)
      crops = random_crops(crop_key, x[rows]) if x.ndim == 4 else best
      found = np.asarray(losses(crops, targets))
      checks.shape("losses", found, (rows.size,))
      better = found < best_losses
      best = jnp.where(better.reshape(-1, *(1,) * (x.ndim - 1)), crops, best)
      best_losses = np.where(better, found, best_losses)
    chosen = np.argsort(best_losses, kind="stable")[:images_per_class]
    points.append(best[chosen])
    indices.append(np.full(images_per_class, -1) if x.ndim == 4 else rows[chosen])
    weights.append(np.full(images_per_class, share))
  classes = np.asarray([np.flatnonzero(labels == c)[0] for c in range(num_classes)])
  return Coreset(
    jnp.concatenate(points),
    jnp.asarray(y[np.repeat(classes, images_per_class)]),
    np.concatenate(indices).astype(np.int32),
    jnp.asarray(np.concatenate(weights), x.dtype),
    "rded",
  )


def random_crops(key, images: Float[ArrayLike, "n h w c"]) -> Float[Array, "n h w c"]:
  """A random square crop of each image, enlarged to the size of the image, bilinear.

      side = round(sqrt(u h w)), at most min(h, w), u uniform from 0.08 to 1; uniform position

  Args:
    key: random key (or int seed).
    images: `(n, h, w, c)`, floating.

  Returns:
    `(n, h, w, c)`.

  Raises:
    ValueError, TypeError: for another rank or integers.
  """
  checks.rank("images", images, 4)
  checks.floating("images", images)
  images = jnp.asarray(images)
  return _crops(jax.random.uniform(keys.canonical_key(key), (len(images), 3)), images)


@jax.jit
def _crops(u, images):
  _, height, width, _ = images.shape
  u = u.astype(images.dtype)
  area = _LEAST_AREA + (1 - _LEAST_AREA) * u[:, 0]
  side = jnp.clip(jnp.round(jnp.sqrt(area * height * width)), 1, min(height, width))

  def sampled(image, side, start):
    def places(size, u):
      first = jnp.floor(u * (size - side + 1))
      where = first + (jnp.arange(size, dtype=image.dtype) + 0.5) * side / size - 0.5
      return jnp.clip(where, first, first + side - 1)

    where = jnp.meshgrid(places(height, start[0]), places(width, start[1]), indexing="ij")
    plane = lambda channel: jax.scipy.ndimage.map_coordinates(channel, where, 1, mode="nearest")
    return jax.vmap(plane, -1, -1)(image)

  return jax.vmap(sampled)(images, side, u[:, 1:])
