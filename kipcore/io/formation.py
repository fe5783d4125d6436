"""Several training images in one stored image, as in IDC, DREAM, NCFM and CIM (multi-formation)."""

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks

DECODINGS = ("single", "multi", "bound")
_PADDING = 0.5


def decode(
  images: np.ndarray, classes: np.ndarray, factor: int, decoding: str = "single", bound: int = 128
) -> tuple[np.ndarray, np.ndarray]:
  """The images that networks are trained on, by class.

  An image is cut into factor x factor parts, row by row, which are enlarged to its size by bilinear interpolation. If
  its side is not a multiple of the factor, it is first padded with 0.5 at the right and at the bottom.

  Args:
    images: `(m, side, side, channels)` pixels in [0, 1].
    classes: `(m,)` integers.
    factor: parts per side.
    decoding: "single": these parts; "multi": the parts for each factor from 1 to `factor`; "bound": the parts of as many
      images of a class as fit into `bound` images, with decreasing factors, and the other images unchanged.
    bound: largest number of decoded images of a class for "bound".

  Returns:
    Decoded images, and for each the index of the image that it was cut from.

  Raises:
    ValueError: for a factor that is not a positive integer or larger than the side, another decoding, or images that are
      not square if the factor exceeds 1.
  """
  factor = checks.positive_int("factor", factor)
  checks.one_of("decoding", decoding, DECODINGS)
  side = images.shape[1]
  if factor > 1 and (images.shape[2] != side or factor > side):
    raise ValueError(
      f"factor: expected 1 for images of {side} x {images.shape[2]} pixels, got {factor}; larger factors need square images "
      "with as many pixels per side"
    )
  found: list[tuple[np.ndarray, np.ndarray]] = []
  for c in np.unique(classes):
    rows = np.flatnonzero(classes == c)
    if decoding == "single":
      found.append(_parts(images, rows, factor))
    elif decoding == "multi":
      found += [_parts(images, rows, k) for k in range(1, factor + 1)]
    else:
      found += _bounded(images, rows, factor, bound)
  return np.concatenate([x for x, _ in found]), np.concatenate([rows for _, rows in found])


def _bounded(images, rows, factor: int, bound: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """The parts of "bound" for one class."""
  found, made = [], 0
  for k in range(factor, 0, -1):
    # Every image that is left takes at least one place.
    count = min(max(bound - made - len(rows), 0) // k**2, len(rows)) if k > 1 else len(rows)
    if count:
      found.append(_parts(images, rows[:count], k))
    made, rows = made + count * k**2, rows[count:]
    if not len(rows):
      break
  return found


def _parts(images, rows, factor: int) -> tuple[np.ndarray, np.ndarray]:
  """The enlarged parts of some images, part by part, and the image that each is from."""
  x, side = images[rows], images.shape[1]
  if factor == 1:
    return x, rows
  length = -(-side // factor)
  missing = -side % factor
  if missing:
    # As in the published code, which pads by `missing` on both sides and cuts parts of the rounded-up length.
    x = np.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)), constant_values=_PADDING)
  cut = np.concatenate(
    [
      x[:, i * length : (i + 1) * length, j * length : (j + 1) * length]
      for i in range(factor)
      for j in range(factor)
    ]
  )
  enlarged = jax.image.resize(
    jnp.asarray(cut, jnp.float32),
    (len(cut), side, side, images.shape[3]),
    "bilinear",
    precision=jax.lax.Precision.HIGHEST,
  )
  return np.asarray(enlarged), np.tile(rows, factor**2)
