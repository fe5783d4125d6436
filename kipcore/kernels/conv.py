"""Closed-form NTK and NNGP of convolutional networks, in tiles of image pairs.

The covariance of one pair of images is an (h, w, h', w') array: 10^6 numbers for 32x32 images. All
of it is needed up to the last pooling layer; between there and Flatten, its spatial diagonal (h, w)
is enough. Three things make it cheap:

* The first convolution is a product of patches: each pixel becomes a vector z with
  <z, z'> = w^2 <patch, patch'> / fan_in + b^2, and no 4-d array is shifted.
* Activation and pooling follow the product in slabs. With the pixels sorted by their position in
  the pooling window, a pooled covariance is a sum of contiguous slabs, each small enough for the
  cache, so the first covariance is never stored as a whole.
* Later layers are batched over a tile of pairs, and K(x, x) needs half of the pairs.

The gradient recomputes a tile instead of storing it, so memory depends on `tile_elements` and not
on the number of images. Activations need the variance of every pixel of both images; these come
from the pair of each image with itself, computed once per image.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kipcore import blocks, linalg
from kipcore.architectures import (
  REDUCERS,
  AvgPool,
  Conv,
  Flatten,
  GlobalSumPool,
  Residual,
  SumPool,
  image_size,
  nested,
)
from kipcore.kernels import covariance, dense
from kipcore.types import Array

# Numbers per tile: enough for a core's cache, or to fill an accelerator.
_CPU_TILE, _ACCELERATOR_TILE = 1 << 18, 1 << 25


class _Plan(NamedTuple):
  """The spatial layers: blocks on whole covariances, then blocks on their diagonals.

  Attributes:
    whole: blocks up to the last pooling; the convolution of the first becomes patches.
    diagonal: blocks after it.
    end: the layer after them, Flatten or a global pooling.
    with_ntk: whether to compute tangent kernels.
    precision: precision of products.
    tile_elements: numbers per tile.
    batched: whether a tile of first covariances is one batch of products. On CPU they are computed
      pair by pair, because XLA's batched products are ten times slower there.
  """

  whole: tuple
  diagonal: tuple
  end: object
  with_ntk: bool
  precision: str
  tile_elements: int
  batched: bool


class _Image(NamedTuple):
  """The data of each image that its pairs need (leading axis n).

  Attributes:
    x: `(n, h, w, channels)`.
    variances: a map `(n, h, w)` before each activation after the first block.
    nngp: variance after Flatten or the global pooling, `(n,)`.
    ntk: tangent kernel of the image with itself there, `(n,)`, or None.
  """

  x: Array
  variances: tuple
  nngp: Array
  ntk: Array | None


def conv_kernel(kernel, x1: Array, x2: Array | None = None) -> Array:
  """K(x1, x2), `(n1, n2)`, of a `NetworkKernel` for NHWC images of one size."""
  plan, tail = _plan(kernel)
  a = _self_pass(plan, x1)
  if x2 is None:
    b, (nngp, ntk) = a, _symmetric(plan, a)
  else:
    b = _self_pass(plan, x2)
    nngp, ntk = _rectangle(plan, a, b)
  k = dense.dense_tail(tail, kernel.get, nngp, a.nngp, b.nngp, ntk)
  return (
    dense.with_exact_diagonal(k, dense.dense_tail_diag(tail, kernel.get, a.nngp, a.ntk))
    if x2 is None
    else k
  )


def conv_diag(kernel, x: Array) -> Array:
  """K(x_i, x_i), `(n,)`."""
  plan, tail = _plan(kernel)
  a = _self_pass(plan, x)
  return dense.dense_tail_diag(tail, kernel.get, a.nngp, a.ntk)


def _plan(kernel) -> tuple[_Plan, tuple]:
  """The plan of the spatial layers, and the dense layers after them."""
  layers = kernel.arch.layers
  end = next(i for i, layer in enumerate(layers) if isinstance(layer, REDUCERS))
  average = not isinstance(layers[end], Flatten)
  pooled = end if average else max((i + 1 for i in range(end) if _pools(layers[i])), default=0)
  whole = _blocks(layers[:pooled])
  if (average or pooled) and not (whole and _computed_first(whole[0])):
    # The covariance of the pixels themselves comes from a block that does nothing.
    whole = (covariance.Block(), *whole)
  on_cpu = jax.default_backend() == "cpu"
  tile = kernel.tile_elements or (_CPU_TILE if on_cpu else _ACCELERATOR_TILE)
  plan = _Plan(
    whole,
    _blocks(layers[pooled:end]),
    layers[end],
    kernel.get == "ntk",
    kernel.precision,
    tile,
    not on_cpu,
  )
  return plan, layers[end + 1 :]


def _blocks(layers: tuple) -> tuple:
  """The layers in blocks of at most a convolution, an activation and a pooling, in this order."""
  found: list = []
  for layer in layers:
    last = found[-1] if found and isinstance(found[-1], covariance.Block) else None
    if isinstance(layer, Residual):
      found.append(covariance.Branches(_blocks(layer.branch), _blocks(layer.shortcut)))
    elif isinstance(layer, Conv):
      found.append(covariance.Block(conv=layer))
    elif isinstance(layer, (AvgPool, SumPool)):
      if last is None or last.pool or not layer.disjoint:
        found.append(covariance.Block())
      found[-1] = found[-1]._replace(pool=layer)
    else:
      if last is None or last.activation or last.pool:
        found.append(covariance.Block())
      found[-1] = found[-1]._replace(activation=layer)
  return tuple(found)


def _computed_first(block) -> bool:
  """Whether `covariance.first_block` can compute the block."""
  return isinstance(block, covariance.Block) and (block.pool is None or block.pool.disjoint)


def _pools(layer) -> bool:
  return any(isinstance(a, (AvgPool, SumPool)) for a in nested((layer,)))


def _pixels(plan: _Plan, x: Array) -> int:
  """Pixels after the first convolution, for which the covariance of a pair is whole."""
  layers = (plan.whole[0].conv,) if plan.whole and plan.whole[0].conv else ()
  return math.prod(image_size(layers, (x.shape[1], x.shape[2])))


def _tile(plan: _Plan, x: Array) -> int:
  """Pairs per tile of the later layers."""
  pixels = _pixels(plan, x)
  if not plan.whole:
    return max(1, plan.tile_elements // pixels)
  pool = plan.whole[0].pool
  return max(1, plan.tile_elements // (pixels // (pool.size if pool else 1) ** 2) ** 2)


def _self_pass(plan: _Plan, x: Array) -> _Image:
  nngp, ntk, variances = _map_tiles(lambda x: _pairs(plan, x, x, None, None), x, _tile(plan, x))
  return _Image(x, variances, nngp, ntk)


def _map_tiles(fn, images, tile: int):
  """`fn` on blocks of at most `tile` rows, recomputed in the gradient."""
  return blocks.map_row_blocks(
    jax.checkpoint(fn), images, _even(jax.tree.leaves(images)[0].shape[0], tile)
  )


def _even(n: int, most: int) -> int:
  """The block size of the fewest equal blocks of at most `most` rows that cover n rows."""
  return -(-n // -(-n // most))


def _rectangle(plan: _Plan, a: _Image, b: _Image):
  """Nngp and ntk of all pairs, two `(n1, n2)` arrays."""
  if a.x.shape[0] > b.x.shape[0]:  # tiles are blocks of the second images: the larger set
    return tuple(None if k is None else k.T for k in _rectangle(plan, b, a))
  tile = _tile(plan, a.x)

  def row(image):
    x, variances = image

    def with_row(other):
      mine = jax.tree.map(
        lambda k: jnp.broadcast_to(k[None], (other[0].shape[0], *k.shape)), (x, variances)
      )
      return _pairs(plan, mine[0], other[0], mine[1], other[1])[:2]

    return _map_tiles(with_row, (b.x, b.variances), tile)

  return jax.lax.map(row, (a.x, a.variances))


def _symmetric(plan: _Plan, a: _Image):
  """Nngp and ntk of images with one another, from the pairs (i, i + d mod n) for d <= n / 2 only."""
  n, tile = a.x.shape[0], _tile(plan, a.x)
  images = (a.x, a.variances)

  def band(d):
    others = jax.tree.map(lambda k: jnp.roll(k, -d, axis=0), images)
    return _map_tiles(
      lambda pair: _pairs(plan, pair[0][0], pair[1][0], pair[0][1], pair[1][1])[:2],
      (images, others),
      tile,
    )

  bands = jax.lax.map(band, jnp.arange(1, n // 2 + 1, dtype=jnp.int32))
  i, j = (k.astype(jnp.int32) for k in jnp.meshgrid(jnp.arange(n), jnp.arange(n), indexing="ij"))
  ahead = (j - i) % n
  # If j - i = n / 2 mod n, one entry of the last band serves both (i, j) and (j, i).
  near = (2 * ahead < n) | ((2 * ahead == n) & (i < j))

  def matrix(own, bands):
    bands = jnp.concatenate([own[None], bands])
    return bands[jnp.where(near, ahead, n - ahead), jnp.where(near, i, j)]

  return matrix(a.nngp, bands[0]), None if a.ntk is None else matrix(a.ntk, bands[1])


def _pairs(plan: _Plan, x1: Array, x2: Array, variances1, variances2):
  """Both kernels of t pairs after the spatial layers, and for images with themselves the variances.

  Args:
    plan: the layers.
    x1, x2: `(t, h, w, channels)`.
    variances1, variances2: maps before the activations after the first block; None for images
      with themselves.

  Returns:
    nngp `(t,)`, ntk `(t,)` or None, variances (tuple of maps).
  """
  own = variances1 is None
  between = None if own else zip(variances1, variances2, strict=True)
  found = []

  def through(layers, nngp, ntk):
    for block in layers:
      if isinstance(block, covariance.Branches):
        nngp, ntk = covariance.added(*(through(path, nngp, ntk) for path in block))
        continue
      v = next(between) if between and block.activation else None
      nngp, ntk, v = covariance.later_block(block, nngp, ntk, plan.with_ntk, v)
      found.extend([v] if own and block.activation else [])
    return nngp, ntk

  if plan.whole:
    first = lambda pair: _first(plan, pair[0], pair[1], own)
    if plan.batched:
      together = max(1, plan.tile_elements // _pixels(plan, x1) ** 2)
      nngp, ntk = blocks.map_row_blocks(jax.vmap(first), (x1, x2), _even(x1.shape[0], together))
    else:
      nngp, ntk = jax.lax.map(first, (x1, x2))
    nngp, ntk = through(plan.whole[1:], nngp, ntk)
    if isinstance(plan.end, Flatten):
      nngp, ntk = (None if k is None else covariance.spatial_diagonal(k) for k in (nngp, ntk))
  else:
    # Channels first: a sum over a short last axis is a scalar loop on CPU.
    x1, x2 = (jnp.moveaxis(linalg.rounded(x, plan.precision), -1, 1) for x in (x1, x2))
    nngp, ntk = jnp.sum(x1 * x2, axis=1) / x1.shape[1], None
  nngp, ntk = through(plan.diagonal, nngp, ntk)
  reduce = jnp.sum if isinstance(plan.end, GlobalSumPool) else jnp.mean
  nngp, ntk = (
    None if k is None else reduce(k.reshape(k.shape[0], -1), axis=1) for k in (nngp, ntk)
  )
  return nngp, ntk, tuple(found)


def _first(plan: _Plan, x1: Array, x2: Array, own: bool):
  block = plan.whole[0]
  z1, z2 = (
    linalg.rounded(covariance.pixel_vectors(block.conv, x), plan.precision) for x in (x1, x2)
  )
  v1, v2 = (jnp.sum(z * z, axis=-1) for z in (z1, z2))
  return covariance.first_block(
    block, plan.with_ntk, z1, z2, v1, v2, own, plan.tile_elements, plan.precision
  )
