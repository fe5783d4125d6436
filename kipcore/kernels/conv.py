"""Closed-form NTK and NNGP of convolutional ReLU networks, in tiles of image pairs.

The covariance of one pair of images is a (h, w, h', w') array: 10^6 numbers at 32x32.
It is needed whole only up to the last pooling layer; in front of Flatten, with no
pooling in between, its spatial diagonal (h, w) is enough. A tile of pairs is held at
a time, and the gradient recomputes a tile rather than store it. So the memory is set
by `tile_elements` and not by the number of images.

ReLU needs the variance of every pixel of both images. These come from the pair of
each image with itself, computed once an image.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import linalg
from kipcore.architectures import Architecture, AvgPool, Conv, Flatten, GlobalAvgPool, Relu
from kipcore.kernels import dense, dual
from kipcore.types import Array


class _Image(NamedTuple):
  """What a pair needs to know of each image (leading axis n outside the loops).

  Attributes:
    x: `(h, w, channels)` pixels.
    variances: a map `(h, w)` in front of each ReLU.
    nngp: variance behind Flatten or GlobalAvgPool, scalar.
    ntk: tangent kernel of the image with itself there, scalar.
  """

  x: Array
  variances: tuple
  nngp: Array
  ntk: Array


def conv_kernel(arch: Architecture, get: str, tile_elements: int, x1: Array, x2: Array | None = None) -> Array:
  """K(x1, x2), `(n1, n2)`, for NHWC images of one size."""
  a = _self_pass(arch, tile_elements, x1)
  b = a if x2 is None else _self_pass(arch, tile_elements, x2)
  nngp, ntk = _pairs(_spatial_layers(arch), get, tile_elements, a, b)
  k = dense.dense_tail(_dense_layers(arch), get, nngp, a.nngp, b.nngp, ntk)
  return dense.with_exact_diagonal(k, _diagonal(arch, get, a)) if x2 is None else k


def conv_diag(arch: Architecture, get: str, tile_elements: int, x: Array) -> Array:
  """K(x_i, x_i), `(n,)`."""
  return _diagonal(arch, get, _self_pass(arch, tile_elements, x))


def _diagonal(arch: Architecture, get: str, a: _Image) -> Array:
  return dense.dense_tail_diag(_dense_layers(arch), get, a.nngp, a.ntk)


def _reducer(arch: Architecture) -> int:
  return next(i for i, layer in enumerate(arch.layers) if isinstance(layer, (Flatten, GlobalAvgPool)))


def _spatial_layers(arch: Architecture) -> tuple:
  return arch.layers[:_reducer(arch) + 1]


def _dense_layers(arch: Architecture) -> tuple:
  return arch.layers[_reducer(arch) + 1:]


def _last_pool(layers: tuple) -> int:
  """Index of the last layer that needs the whole covariance, -1 for none."""
  return max((i for i, layer in enumerate(layers) if isinstance(layer, (AvgPool, GlobalAvgPool))), default=-1)


def _tile(layers: tuple, x: Array, tile_elements: int) -> int:
  pixels = x.shape[-3] * x.shape[-2]
  return max(1, tile_elements // (pixels if _last_pool(layers) < 0 else pixels**2))


def _self_pass(arch: Architecture, tile_elements: int, x: Array) -> _Image:
  layers = _spatial_layers(arch)

  @jax.checkpoint
  def one(image):
    return _recursion(layers, image, image, None, None, True)

  nngp, ntk, variances = jax.lax.map(one, x, batch_size=min(x.shape[0], _tile(layers, x, tile_elements)))
  return _Image(x, variances, nngp, ntk)


def _pairs(layers: tuple, get: str, tile_elements: int, a: _Image, b: _Image):
  """The covariances (and tangent kernels) behind the spatial layers, two `(n1, n2)` arrays."""
  tile = _tile(layers, a.x, tile_elements)
  inner = min(tile, b.x.shape[0])
  outer = min(max(1, tile // inner), a.x.shape[0])

  @jax.checkpoint
  def one(image1, image2):
    nngp, ntk, _ = _recursion(layers, image1.x, image2.x, image1.variances, image2.variances, get == "ntk")
    return nngp, ntk

  def row(image1):
    return jax.lax.map(functools.partial(one, image1), b, batch_size=inner)

  return jax.lax.map(row, a, batch_size=outer)


def _recursion(layers: tuple, x1: Array, x2: Array, v1, v2, with_ntk: bool):
  """Both kernels of one pair, and the variances met on the way if the pair is an image with itself.

  Args:
    layers: up to and with the Flatten or GlobalAvgPool.
    x1, x2: `(h, w, channels)`.
    v1, v2: variance maps in front of each ReLU; None for an image with itself.
    with_ntk: whether the tangent kernel is wanted (None is returned if not).

  Returns:
    nngp (scalar), ntk (scalar or None), variances (tuple of maps).
  """
  whole = _last_pool(layers) >= 0
  if isinstance(layers[0], Conv):
    # The first covariance is a product of patches: no shifts of a 4-d array.
    nngp = _affine(layers[0], _input_covariance(_patches(x1, layers[0].size), _patches(x2, layers[0].size), whole))
    start = 1
  else:
    nngp = _input_covariance(x1, x2, whole)
    start = 0
  ntk = (nngp if start else jnp.zeros_like(nngp)) if with_ntk else None
  variances = []
  for i, layer in enumerate(layers[start:], start):
    if isinstance(layer, Conv):
      nngp = _affine(layer, _box(nngp, layer.size))
      ntk = nngp + layer.w_std**2 * _box(ntk, layer.size) if with_ntk else None
    elif isinstance(layer, Relu):
      own = _spatial_diagonal(nngp) if v1 is None else None
      m1, m2 = (own, own) if v1 is None else (v1[len(variances)], v2[len(variances)])
      variances.append(m1)
      if nngp.ndim == 4:
        m1, m2 = m1[:, :, None, None], m2[None, None]
      nngp, dot = dual.relu_dual(nngp, m1, m2)
      ntk = dot * ntk if with_ntk else None
    elif isinstance(layer, AvgPool):
      nngp, ntk = _pool(nngp, layer.size), _pool(ntk, layer.size) if with_ntk else None
    else:
      reduce = _spatial_diagonal if isinstance(layer, Flatten) else lambda k: k
      nngp, ntk = jnp.mean(reduce(nngp)), jnp.mean(reduce(ntk)) if with_ntk else None
    if i == _last_pool(layers) and isinstance(layer, AvgPool):
      nngp, ntk = _spatial_diagonal(nngp), _spatial_diagonal(ntk) if with_ntk else None
  return nngp, ntk, tuple(variances)


def _affine(layer, k: Array) -> Array:
  return layer.w_std**2 * k + layer.b_std**2


def _patches(x: Array, size: int) -> Array:
  """`(h, w, size^2 channels)`: the zero-padded neighbourhood of each pixel."""
  r = size // 2
  h, w, _ = x.shape
  padded = jnp.pad(x, ((r, r), (r, r), (0, 0)))
  return jnp.concatenate([padded[i:i + h, j:j + w] for i in range(size) for j in range(size)], axis=-1)


def _input_covariance(p1: Array, p2: Array, whole: bool) -> Array:
  if whole:
    return jnp.einsum("hwc,ijc->hwij", p1, p2, precision=linalg.HIGHEST) / p1.shape[-1]
  # Not the mean of a product: XLA of JAX 0.10 returns wrong numbers for it on CPU, once mapped over some 40 x 40 pairs.
  return jnp.einsum("hwc,hwc->hw", p1, p2, precision=linalg.HIGHEST) / p1.shape[-1]


def _spatial_diagonal(k: Array) -> Array:
  """`(h, w)` of a whole covariance; a diagonal one is returned as it is."""
  if k.ndim == 2:
    return k
  h, w = k.shape[:2]
  pixels = k.reshape(h * w, h * w)
  return jnp.diagonal(pixels).reshape(h, w)


def _box(k: Array, size: int) -> Array:
  """Mean of k[h + d, w + e, h' + d, w' + e] over offsets |d|, |e| <= size // 2, zero outside.

  Separable: first along the rows of both images, then along the columns.
  """
  for axis in (0, 1):
    k = _box_axis(k, size, (axis, axis + 2) if k.ndim == 4 else (axis,))
  return k / size**2


def _box_axis(k: Array, size: int, axes: tuple) -> Array:
  r, n = size // 2, k.shape[axes[0]]
  padded = jnp.pad(k, [(r, r) if axis in axes else (0, 0) for axis in range(k.ndim)])
  total = 0.0
  for d in range(size):
    shifted = padded
    for axis in axes:
      shifted = jax.lax.slice_in_dim(shifted, d, d + n, axis=axis)
    total = total + shifted
  return total


def _pool(k: Array, size: int) -> Array:
  """Mean over size x size windows in both images; left-over rows and columns are dropped."""
  h, w = k.shape[0] // size, k.shape[1] // size
  k = k[:h * size, :w * size, :h * size, :w * size]
  return k.reshape(h, size, w, size, h, size, w, size).mean(axis=(1, 3, 5, 7))
