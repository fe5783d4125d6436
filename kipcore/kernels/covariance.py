"""The action of convolution, activation and pooling on the covariances of pairs of images.

A covariance is `(t, h, w, h', w')` for t pairs of images, or its spatial diagonal `(t, h, w)`. `ntk`
is the tangent kernel so far, of the same shape; None stands for zero.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import linalg
from kipcore.architectures import AvgPool, Conv, SumPool, Window
from kipcore.kernels import dual
from kipcore.types import Array

_MODES = {"SAME": "constant", "VALID": "constant", "CIRCULAR": "wrap"}  # of `jnp.pad`


class Block(NamedTuple):
  """Convolution, activation and pooling, computed together; None for a missing part."""

  conv: Conv | None = None
  activation: object | None = None
  pool: AvgPool | SumPool | None = None


class Branches(NamedTuple):
  """The blocks of a residual block."""

  branch: tuple
  shortcut: tuple


def patches(x: Array, window: Window) -> list[Array]:
  """The pixels at each position in the windows of `(..., h, w, channels)`: size^2 arrays, row by row."""
  h, w = x.shape[-3:-1]
  pads = [(0, 0)] * (x.ndim - 3) + [window.pads(h), window.pads(w), (0, 0)]
  padded = jnp.pad(x, pads, _MODES[window.padding])
  return [
    padded[..., _shifted(window, h, i), _shifted(window, w, j), :]
    for i in range(window.size)
    for j in range(window.size)
  ]


def _shifted(window: Window, n: int, i: int) -> slice:
  """Position i of each window along n pixels, after padding."""
  return slice(i, i + (window.count(n) - 1) * window.stride + 1, window.stride)


def pixel_vectors(conv: Conv | None, x: Array) -> Array:
  """z, `(..., h, w, features)`, with <z, z'> the covariance after a first convolution.

  Args:
    conv: a convolution on the images, or None for the covariance of the pixels themselves.
    x: `(..., h, w, channels)`.
  """
  if conv is None:
    return x * x.shape[-1] ** -0.5
  pixels = patches(x, conv.window)
  bias = jnp.full((*pixels[0].shape[:-1], 1), conv.b_std, x.dtype)
  scale = conv.w_std * (conv.size**2 * x.shape[-1]) ** -0.5
  return jnp.concatenate([scale * patch for patch in pixels] + [bias], axis=-1)


def first_block(
  block: Block,
  with_ntk: bool,
  z1: Array,
  z2: Array,
  v1: Array,
  v2: Array,
  own: bool,
  tile_elements: int,
  precision: str,
) -> tuple[Array, Array | None]:
  """A block after the products of pixel vectors of one pair, in slabs.

  Image 1 is divided into runs of rows of pooling windows and, within them, by the position of a
  pixel in its window. A slab is the covariance of those pixels with all pixels of image 2: a matrix
  product of about `tile_elements` numbers at most. The gradient recomputes it.

  Args:
    block: its convolution is already in the pixel vectors, and the windows of its pooling are disjoint.
    with_ntk: whether to compute the tangent kernel.
    z1, z2: `(h, w, features)`.
    v1, v2: `(h, w)`, their squared norms.
    own: whether the two images are the same; equal pixels then get their exact variance.
    tile_elements: numbers per slab.
    precision: precision of the products.

  Returns:
    nngp, ntk: `(h / pool, w / pool, h / pool, w / pool)`.
  """
  p, (h, w) = 1 if block.pool is None else block.pool.size, z1.shape[:2]
  rows, cols = h // p, w // p
  windows = rows * cols
  run = _divisor(rows, tile_elements // (cols * p * p * windows))
  tangent = with_ntk and block.conv is not None

  def by_position(a):
    """`(rows, positions, cols, ...)`."""
    a = a[: rows * p, : cols * p].reshape(rows, p, cols, p, *a.shape[2:])
    return jnp.moveaxis(a, 3, 2).reshape(rows, p * p, cols, *a.shape[4:])

  def slabs(a):
    """`(runs, positions, run * cols, ...)`."""
    a = by_position(a)
    a = a.reshape(rows // run, run, *a.shape[1:])
    return jnp.moveaxis(a, 2, 1).reshape(rows // run, p * p, run * cols, *a.shape[4:])

  def flat(a):
    """`(positions * windows, ...)`."""
    a = by_position(a)
    return jnp.moveaxis(a, 1, 0).reshape(p * p * windows, *a.shape[3:])

  pixels = jnp.arange(h * w, dtype=jnp.int32).reshape(h, w)
  z2, v2, pixels2 = flat(z2), flat(v2).reshape(p * p, windows), flat(pixels)

  @jax.checkpoint
  def slab(z, v, pixels1):
    k = linalg.product(z, z2, precision)
    if own:
      k = jnp.where(pixels1[:, None] == pixels2[None], v[:, None], k)
    k = k.reshape(run * cols, p * p, windows)
    value, derivative = dual.activation(block.activation, k, v[:, None, None], v2[None])
    # The tangent kernel of a first convolution is its covariance.
    return jnp.sum(value, axis=1), jnp.sum(derivative * k, axis=1) if tangent else None

  def run_of_rows(images):
    zeros = jnp.zeros((run * cols, windows), z1.dtype)
    add = lambda total, image: (jax.tree.map(jnp.add, total, slab(*image)), None)
    return jax.lax.scan(add, (zeros, zeros if tangent else None), images)[0]

  nngp, ntk = jax.lax.map(run_of_rows, (slabs(z1), slabs(v1), slabs(pixels)))
  shape, scale = (rows, cols, rows, cols), 1 if isinstance(block.pool, SumPool) else p**-4
  return nngp.reshape(shape) * scale, None if ntk is None else ntk.reshape(shape) * scale


def later_block(
  block: Block, nngp: Array, ntk: Array | None, with_ntk: bool, variances: tuple | None
) -> tuple[Array, Array | None, Array | None]:
  """A block on covariances.

  Args:
    block: see `Block`.
    nngp, ntk: `(t, h, w, h', w')` or `(t, h, w)`.
    with_ntk: whether to compute the tangent kernel.
    variances: a pair of `(t, h, w)`, before the activation; None for images with themselves.

  Returns:
    nngp, ntk, and the variances before the activation (None without one).
  """
  if block.conv is not None:
    w2, b2 = block.conv.w_std**2, block.conv.b_std**2
    nngp = w2 * _convolved(nngp, block.conv.window) + b2
    if with_ntk:
      ntk = nngp if ntk is None else nngp + w2 * _convolved(ntk, block.conv.window)
  maps = None
  if block.activation is not None:
    v1, v2 = variances or (spatial_diagonal(nngp),) * 2
    maps = v1
    if nngp.ndim == 5:
      v1, v2 = v1[:, :, :, None, None], v2[:, None, None]
    nngp, ntk = _activated(block.activation, nngp, ntk, v1, v2)
  if block.pool is not None:
    nngp, ntk = _pooled(nngp, block.pool), None if ntk is None else _pooled(ntk, block.pool)
  return nngp, ntk, maps


def added(branch: tuple, shortcut: tuple) -> tuple[Array, Array | None]:
  """Nngp and ntk of the sum of independent Gaussians with weights of their own."""
  (nngp1, ntk1), (nngp2, ntk2) = branch, shortcut
  if ntk1 is None or ntk2 is None:
    return nngp1 + nngp2, ntk2 if ntk1 is None else ntk1
  return nngp1 + nngp2, ntk1 + ntk2


def _convolved(k: Array, window: Window) -> Array:
  """The mean over the windows, at equal positions in both images."""
  if window.stride == 1 and window.padding == "SAME" and window.size % 2:
    return box(k, window.size)
  for axis in (1, 2):
    k = _window_sums(k, window, (axis,) if k.ndim == 3 else (axis, axis + 2))
  return k / window.size**2


def _pooled(k: Array, layer: AvgPool | SumPool) -> Array:
  """The mean or sum over the windows of both images."""
  sums = isinstance(layer, SumPool)
  if layer.disjoint:
    return pool(k, layer.size) * layer.size**4 if sums else pool(k, layer.size)
  for axis in range(1, 5):
    k = _window_sums(k, layer.window, (axis,))
  return k if sums else k * layer.size**-4


def _window_sums(k: Array, window: Window, axes: tuple[int, ...]) -> Array:
  """Sums over windows that are shifted along all `axes` at once; the axes are equally long."""
  n = k.shape[axes[0]]
  pads = [window.pads(n) if axis in axes else (0, 0) for axis in range(k.ndim)]
  padded = jnp.pad(k, pads, _MODES[window.padding])
  at = lambda i: tuple(
    _shifted(window, n, i) if axis in axes else slice(None) for axis in range(k.ndim)
  )
  return functools.reduce(jnp.add, [padded[at(i)] for i in range(window.size)])


@jax.checkpoint
def _activated(
  activation, nngp: Array, ntk: Array | None, v1: Array, v2: Array
) -> tuple[Array, Array | None]:
  """Recomputed in the gradient, which is cheaper than storing the intermediate values."""
  nngp, derivative = dual.activation(activation, nngp, v1, v2)
  return nngp, None if ntk is None else derivative * ntk


def spatial_diagonal(k: Array) -> Array:
  """`(t, h, w)` of `(t, h, w, h, w)`; a diagonal is returned as it is."""
  if k.ndim == 3:
    return k
  t, h, w = k.shape[:3]
  return jnp.diagonal(k.reshape(t, h * w, h * w), axis1=1, axis2=2).reshape(t, h, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def box(k: Array, size: int) -> Array:
  """Mean of k[h + d, w + e, h' + d, w' + e] over |d|, |e| <= size // 2, with zero padding."""
  r, (h, w) = size // 2, k.shape[1:3]
  padded = jnp.pad(k, [(0, 0)] + [(r, r)] * (k.ndim - 1))
  total = jnp.zeros_like(k)
  for d in range(size):
    for e in range(size):
      total = total + padded[(slice(None),) + (slice(d, d + h), slice(e, e + w)) * (k.ndim // 2)]
  return total / size**2


@box.defjvp
def _box_jvp(size, primals, tangents):
  # A box is self-adjoint. The tangent is written as the adjoint of the code above, a sum of shifted
  # pads, so that its transpose is that code. The transpose of the code above would be a sum of pads,
  # which are scalar loops on CPU.
  (k,), (dk,) = primals, tangents
  r, (h, w), zero = size // 2, k.shape[1:3], jnp.zeros((), k.dtype)
  total = 0.0
  for d in range(size):
    for e in range(size):
      total = total + jax.lax.pad(
        dk, zero, [(0, 0, 0)] + [(d, 2 * r - d, 0), (e, 2 * r - e, 0)] * (k.ndim // 2)
      )
  tangent = total[(slice(None),) + (slice(r, r + h), slice(r, r + w)) * (k.ndim // 2)] / size**2
  return box(k, size), _materialized(tangent)


def _materialized(k: Array) -> Array:
  """`k`, written to memory. Otherwise XLA on CPU recomputes it for each shift of a box.

  A loop of two iterations, because XLA fuses through an `optimization_barrier`.
  """
  halves = jnp.pad(k.reshape(-1), (0, k.size % 2)).reshape(2, -1)
  return (
    jax.lax.map(lambda half: half * jnp.ones((), k.dtype), halves)
    .reshape(-1)[: k.size]
    .reshape(k.shape)
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def pool(k: Array, size: int) -> Array:
  """Mean over size x size windows in both images; remaining rows and columns are dropped."""
  # A sum of strided slices: XLA's reduction over these axes is a scalar loop on CPU.
  windows = _windows(k, size)
  total = jnp.zeros_like(windows[:, :, 0, :, 0, :, 0, :, 0])
  for a, b, c, d in itertools.product(range(size), repeat=4):
    total = total + windows[:, :, a, :, b, :, c, :, d]
  return total * size**-4


@pool.defjvp
def _pool_jvp(size, primals, tangents):
  # The adjoint of the reduction is fast.
  return pool(primals[0], size), jnp.sum(_windows(tangents[0], size), axis=(2, 4, 6, 8)) * size**-4


def _windows(k: Array, size: int) -> Array:
  h, w = k.shape[1] // size, k.shape[2] // size
  return k[:, : h * size, : w * size, : h * size, : w * size].reshape(
    -1, h, size, w, size, h, size, w, size
  )


def _divisor(n: int, most: int) -> int:
  """The largest divisor of n that is at most `most` (at least 1)."""
  return next(d for d in range(min(n, max(most, 1)), 0, -1) if n % d == 0)
