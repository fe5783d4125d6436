"""Differentiable random image transforms that are the same for targets and support (DSA).

`random_augmentation("flip_crop")(key)` is a function of a batch of images; equal keys give equal
transforms.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kipcore import keys, linalg
from kipcore.types import Array

DSA = "color_crop_cutout_flip_scale_rotate"

_BRIGHTNESS, _SATURATION, _CONTRAST = 1.0, 2.0, 0.5
_CROP_PAD, _CUTOUT, _FLIP, _SCALE, _DEGREES = 0.125, 0.5, 0.5, 1.2, 15.0


def random_augmentation(names: str):
  """Differentiable augmentation: one random operation with the same parameters for every image.

      color    x + (u1 - 1/2), then 2 u2 (x - g) + g with the channel mean g of each pixel,
               then (u3 + 1/2) (x - a) + a with the mean a of the image
      crop     shift by an integer number of pixels, up to 1/8 of each side, filled with zeros
      cutout   set a rectangle with half of each side to zero; it may lie partly outside the image
      flip     horizontally, with probability 1/2
      scale    divide each side by its own factor in [1/1.2, 1.2] about the center, bilinear,
               zeros outside
      rotate   by an angle in [-15, 15] degrees about the center, bilinear, zeros outside

  u are uniform on [0, 1]. A key determines one operation (mode "S" of the published code) and its
  parameters, independently of the number and dtype of the images, so equal keys transform targets
  and support equally. The brightness is in pixel units and assumes standardized pixels. The second
  color step is the identity for one channel. Unlike the published code, this function rotates
  non-square images without shear, and its draws are reproducible.

  Args:
    names: operations of `DSA`, joined with "_", each equally likely; "" for no augmentation.

  Returns:
    `key -> (images -> images)` for images `(n, height, width, channels)` of any size and floating
    dtype. The transform raises ValueError for rows that are not images, except that "" returns any
    rows unchanged.

  Raises:
    ValueError: for an unknown name.

  References:
    Zhao and Bilen (2021), DSA. The ranges are those of the published code.
  """
  operations = []
  for name in names.split("_") if names else []:
    if name not in _OPERATIONS:
      raise ValueError(
        f"augmentation: expected names of {', '.join(_OPERATIONS)} joined with '_', or ''; got "
        f"{names!r}"
      )
    operations.append(_OPERATIONS[name])

  def draw(key: Array):
    if not operations:
      return lambda images: images
    # Drawn outside the transform, which is called for the targets and again for the support.
    choice = jax.random.randint(keys.stream(key, "operation"), (), 0, len(operations), jnp.int32)
    u = jax.random.uniform(keys.stream(key, "parameters"), (3,), jnp.float32)

    def transform(images: Array) -> Array:
      if images.ndim != 4:
        raise ValueError(
          f"augmentation: expected images (n, height, width, channels), got shape {images.shape}"
        )
      return _switched(tuple(operations), choice, u, images)

    return transform

  return draw


@functools.partial(jax.jit, static_argnums=0)
def _switched(operations: tuple, choice: Array, u: Array, images: Array) -> Array:
  return jax.lax.switch(choice, operations, u.astype(images.dtype), images)


def _color(u: Array, images: Array) -> Array:
  images = images + _BRIGHTNESS * (u[0] - 0.5)
  gray = jnp.mean(images, axis=3, keepdims=True)
  images = _SATURATION * u[1] * (images - gray) + gray
  mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
  return (u[2] + _CONTRAST) * (images - mean) + mean


def _integer(u: Array, count: int) -> Array:
  """Uniform on 0, ..., count - 1; the product may round up to `count`."""
  return jnp.minimum((u * count).astype(jnp.int32), count - 1)


def _crop(u: Array, images: Array) -> Array:
  pads = [int(side * _CROP_PAD + 0.5) for side in images.shape[1:3]]
  padded = jnp.pad(images, [(0, 0), *((p, p) for p in pads), (0, 0)])
  start = [_integer(u[i], 2 * p + 1) for i, p in enumerate(pads)]
  zero = jnp.zeros((), jnp.int32)
  return jax.lax.dynamic_slice(padded, (zero, *start, zero), images.shape)


def _cutout(u: Array, images: Array) -> Array:
  inside = []
  for i, side in enumerate(images.shape[1:3]):
    size = int(side * _CUTOUT + 0.5)
    first = _integer(u[i], side + 1 - size % 2) - size // 2
    position = jnp.arange(side, dtype=jnp.int32)
    inside.append((position >= first) & (position < first + size))
  hole = inside[0][:, None] & inside[1][None, :]
  return jnp.where(hole[None, :, :, None], jnp.zeros((), images.dtype), images)


def _flip(u: Array, images: Array) -> Array:
  return jnp.where(u[0] < _FLIP, images[:, :, ::-1], images)


def _scale(u: Array, images: Array) -> Array:
  factor = u[:2] * (_SCALE - 1 / _SCALE) + 1 / _SCALE
  return _resample(images, ((factor[0], 0), (0, factor[1])))


def _rotate(u: Array, images: Array) -> Array:
  angle = (2 * u[0] - 1) * math.radians(_DEGREES)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _resample(images, ((cos, -sin), (sin, cos)))


def _resample(images: Array, matrix) -> Array:
  """Resamples to pixels p <- center + matrix (p - center), bilinear, zero outside."""
  _, height, width, _ = images.shape
  middle = (height - 1) / 2, (width - 1) / 2
  rows = (jnp.arange(height).astype(images.dtype) - middle[0])[:, None]
  columns = (jnp.arange(width).astype(images.dtype) - middle[1])[None, :]
  with linalg.permissive_promotion():
    where = [a * rows + b * columns + m for (a, b), m in zip(matrix, middle)]
    plane = lambda image: jax.scipy.ndimage.map_coordinates(image, where, order=1)
    return jax.vmap(jax.vmap(plane, -1, -1))(images)


_OPERATIONS = {
  "color": _color,
  "crop": _crop,
  "cutout": _cutout,
  "flip": _flip,
  "scale": _scale,
  "rotate": _rotate,
}
