"""What convolution, activation and pooling do to the covariance of pairs of images.

A covariance is `(t, h, w, h', w')` for t pairs of images, or its spatial diagonal `(t, h, w)`. `ntk` is the tangent
kernel so far, of the same shape; None stands for zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import linalg
from kipcore.architectures import Conv
from kipcore.kernels import dual
from kipcore.types import Array


class Block(NamedTuple):
  """Convolution, activation and pooling, done in one go; None or 1 where one is missing."""

  conv: Conv | None
  activation: object | None
  pool: int


def pixel_vectors(conv: Conv | None, x: Array) -> Array:
  """z, `(..., h, w, features)`, with <z, z'> the covariance behind a first convolution (or of the pixels themselves).

  Args:
    conv: a convolution on the images, or None.
    x: `(..., h, w, channels)`.
  """
  if conv is None:
    return x * x.shape[-1] ** -0.5
  r, (h, w, channels) = conv.size // 2, x.shape[-3:]
  padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(r, r), (r, r), (0, 0)])
  patches = [
    padded[..., i : i + h, j : j + w, :] for i in range(conv.size) for j in range(conv.size)
  ]
  bias = jnp.full((*x.shape[:-1], 1), conv.b_std, x.dtype)
  scale = conv.w_std * (conv.size**2 * channels) ** -0.5
  return jnp.concatenate([scale * patch for patch in patches] + [bias], axis=-1)


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
  """A block behind the products of pixel vectors of one pair, slab by slab.

  Image 1 is cut into runs of rows of pooling windows and, within them, by the place of a pixel in its window: a
  slab is the covariance of those pixels with all pixels of image 2, a matrix product of at most
  some `tile_elements` numbers. It is recomputed in a gradient.

  Args:
    block: its convolution is in the pixel vectors already.
    with_ntk: whether the tangent kernel is wanted.
    z1, z2: `(h, w, features)`.
    v1, v2: `(h, w)`, their squared norms.
    own: whether the two images are one; then equal pixels are exactly that.
    tile_elements: numbers in a slab.
    precision: of the products.

  Returns:
    nngp, ntk: `(h / pool, w / pool, h / pool, w / pool)`.
  """
  p, (h, w) = block.pool, z1.shape[:2]
  rows, cols = h // p, w // p
  windows = rows * cols
  run = _divisor(rows, tile_elements // (cols * p * p * windows))
  tangent = with_ntk and block.conv is not None

  def by_place(a):
    """`(rows, places, cols, ...)`."""
    a = a[: rows * p, : cols * p].reshape(rows, p, cols, p, *a.shape[2:])
    return jnp.moveaxis(a, 3, 2).reshape(rows, p * p, cols, *a.shape[4:])

  def slabs(a):
    """`(runs, places, run * cols, ...)`."""
    a = by_place(a)
    a = a.reshape(rows // run, run, *a.shape[1:])
    return jnp.moveaxis(a, 2, 1).reshape(rows // run, p * p, run * cols, *a.shape[4:])

  def flat(a):
    """`(places * windows, ...)`."""
    a = by_place(a)
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
  shape = (rows, cols, rows, cols)
  return nngp.reshape(shape) * p**-4, None if ntk is None else ntk.reshape(shape) * p**-4


def later_block(
  block: Block, nngp: Array, ntk: Array | None, with_ntk: bool, variances: tuple | None
) -> tuple[Array, Array | None, Array | None]:
  """A block on covariances.

  Args:
    block: see `Block`.
    nngp, ntk: `(t, h, w, h', w')` or `(t, h, w)`.
    with_ntk: whether the tangent kernel is wanted.
    variances: a pair of `(t, h, w)`, in front of the activation; None for images with themselves.

  Returns:
    nngp, ntk, and what `variances` were for images with themselves (None without an activation).
  """
  if block.conv is not None:
    w2, b2 = block.conv.w_std**2, block.conv.b_std**2
    nngp = w2 * box(nngp, block.conv.size) + b2
    if with_ntk:
      ntk = nngp if ntk is None else nngp + w2 * box(ntk, block.conv.size)
  maps = None
  if block.activation is not None:
    v1, v2 = variances or (spatial_diagonal(nngp),) * 2
    maps = v1
    if nngp.ndim == 5:
      v1, v2 = v1[:, :, :, None, None], v2[:, None, None]
    nngp, ntk = _activated(block.activation, nngp, ntk, v1, v2)
  if block.pool > 1:
    nngp, ntk = pool(nngp, block.pool), None if ntk is None else pool(ntk, block.pool)
  return nngp, ntk, maps


@functools.partial(jax.checkpoint, static_argnums=0)
def _activated(
  activation, nngp: Array, ntk: Array | None, v1: Array, v2: Array
) -> tuple[Array, Array | None]:
  """Recomputed in a gradient: to compute a dual again is cheaper than to keep what its derivative needs."""
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
  """Mean of k[h + d, w + e, h' + d, w' + e] over |d|, |e| <= size // 2, zero outside; the same for a diagonal."""
  r, (h, w) = size // 2, k.shape[1:3]
  padded = jnp.pad(k, [(0, 0)] + [(r, r)] * (k.ndim - 1))
  total = 0.0
  for d in range(size):
    for e in range(size):
      total = total + padded[(slice(None),) + (slice(d, d + h), slice(e, e + w)) * (k.ndim // 2)]
  return total / size**2


@box.defjvp
def _box_jvp(size, primals, tangents):
  # A box is its own adjoint. Written as the adjoint of the code above, the tangent is a sum of shifted pads, which JAX
  # transposes into that code; left alone it would transpose into the pads, which are scalar loops on CPU.
  (k,), (dk,) = primals, tangents
  r, (h, w), zero = size // 2, k.shape[1:3], jnp.zeros((), k.dtype)
  total = 0.0
  for d in range(size):
    for e in range(size):
      total = total + jax.lax.pad(
        dk, zero, [(0, 0, 0)] + [(d, 2 * r - d, 0), (e, 2 * r - e, 0)] * (k.ndim // 2)
      )
  tangent = total[(slice(None),) + (slice(r, r + h), slice(r, r + w)) * (k.ndim // 2)] / size**2
  return box(k, size), _settled(tangent)


def _settled(k: Array) -> Array:
  """`k`, written to memory: else XLA on CPU fuses what makes it with what reads it, and computes it anew for each shift of a box.

  A loop of two rounds, because it looks through an `optimization_barrier`.
  """
  halves = jnp.pad(k.reshape(-1), (0, k.size % 2)).reshape(2, -1)
  return (
    jax.lax.map(lambda half: half * jnp.ones((), k.dtype), halves)
    .reshape(-1)[: k.size]
    .reshape(k.shape)
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def pool(k: Array, size: int) -> Array:
  """Mean over size x size windows in both images; left-over rows and columns are dropped."""
  # A sum of strided slices, because XLA's own reduction of these axes is a scalar loop on CPU.
  windows, places = _windows(k, size), range(size)
  return (
    sum(
      windows[:, :, a, :, b, :, c, :, d]
      for a in places
      for b in places
      for c in places
      for d in places
    )
    * size**-4
  )


@pool.defjvp
def _pool_jvp(size, primals, tangents):
  # The reduction, on the other hand, has a fast adjoint.
  return pool(primals[0], size), jnp.sum(_windows(tangents[0], size), axis=(2, 4, 6, 8)) * size**-4


def _windows(k: Array, size: int) -> Array:
  h, w = k.shape[1] // size, k.shape[2] // size
  return k[:, : h * size, : w * size, : h * size, : w * size].reshape(
    -1, h, size, w, size, h, size, w, size
  )


def _divisor(n: int, most: int) -> int:
  """The largest _divisor of n that is at most `most` (at least 1)."""
  return next(d for d in range(min(n, max(most, 1)), 0, -1) if n % d == 0)
