"""Closed-form NTK and NNGP of fully connected ReLU networks: one matrix product, then entrywise."""

import jax.numpy as jnp

from kipcore import linalg
from kipcore.architectures import Architecture, Dense, Relu
from kipcore.kernels import dual
from kipcore.types import Array


def dense_kernel(arch: Architecture, get: str, x1: Array, x2: Array | None = None) -> Array:
  """K(x1, x2), `(n1, n2)`; rows are flattened first. See `dense_tail` for the recursion."""
  x1 = x1.reshape(x1.shape[0], -1)
  v1 = _second_moment(x1)
  if x2 is None:
    nngp = linalg.matmul(x1, x1.T) / x1.shape[1]
    return with_exact_diagonal(dense_tail(arch.layers[1:], get, nngp, v1, v1), dense_diag(arch, get, x1))
  x2 = x2.reshape(x2.shape[0], -1)
  nngp = linalg.matmul(x1, x2.T) / x1.shape[1]
  return dense_tail(arch.layers[1:], get, nngp, v1, _second_moment(x2))


def dense_diag(arch: Architecture, get: str, x: Array) -> Array:
  """K(x_i, x_i), `(n,)`, exactly, without an arc cosine."""
  return dense_tail_diag(arch.layers[1:], get, _second_moment(x.reshape(x.shape[0], -1)))


def dense_tail(layers: tuple, get: str, nngp: Array, v1: Array, v2: Array, ntk: Array | None = None) -> Array:
  """The layers behind the inputs (or behind Flatten) applied to a covariance matrix.

      Dense: nngp <- w^2 nngp + b^2,  ntk <- nngp + w^2 ntk      (NTK parameterisation)
      ReLU:  (nngp, dot) <- relu_dual(nngp),  ntk <- dot ntk

  Args:
    layers: `Dense` and `Relu` records.
    get: "ntk" or "nngp".
    nngp: `(n1, n2)` covariance of the layer's inputs, per feature.
    v1, v2: `(n1,)` and `(n2,)` variances.
    ntk: `(n1, n2)` tangent kernel so far; None for zero.

  Returns:
    `(n1, n2)`.

  Source: Jacot, Gabriel, Hongler 2018, theorem 1; Lee et al. 2018.
  """
  ntk = jnp.zeros_like(nngp) if ntk is None else ntk
  for layer in layers:
    if isinstance(layer, Dense):
      nngp, v1, v2 = (layer.w_std**2 * a + layer.b_std**2 for a in (nngp, v1, v2))
      ntk = nngp + layer.w_std**2 * ntk
    elif isinstance(layer, Relu):
      nngp, dot = dual.relu_dual(nngp, v1[:, None], v2[None, :])
      ntk = dot * ntk
      v1, v2 = (dual.relu_dual_diag(v)[0] for v in (v1, v2))
  return ntk if get == "ntk" else nngp


def dense_tail_diag(layers: tuple, get: str, v: Array, ntk: Array | None = None) -> Array:
  """`dense_tail` for points with themselves, `(n,)`."""
  ntk = jnp.zeros_like(v) if ntk is None else ntk
  for layer in layers:
    if isinstance(layer, Dense):
      v = layer.w_std**2 * v + layer.b_std**2
      ntk = v + layer.w_std**2 * ntk
    elif isinstance(layer, Relu):
      v, dot = dual.relu_dual_diag(v)
      ntk = dot * ntk
  return ntk if get == "ntk" else v


def with_exact_diagonal(k: Array, diagonal: Array) -> Array:
  """`k` with its diagonal replaced: the arc cosine of a rounded 1 costs half of the digits."""
  i = jnp.arange(k.shape[0])
  return k.at[i, i].set(diagonal)


def _second_moment(x: Array) -> Array:
  return jnp.mean(x * x, axis=1)
