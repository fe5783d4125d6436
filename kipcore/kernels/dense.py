"""Closed-form NTK and NNGP of fully connected networks: one matrix product, then entrywise maps."""

import jax.numpy as jnp

from kipcore import linalg
from kipcore.architectures import Dense, Residual
from kipcore.kernels import dual
from kipcore.types import Array


def dense_kernel(kernel, x1: Array, x2: Array | None = None) -> Array:
  """K(x1, x2), `(n1, n2)`, of a `NetworkKernel` on flattened rows; see `dense_tail`."""
  layers = kernel.arch.layers[1:]
  rows1, v1 = _rows(kernel, x1)
  rows2, v2 = (rows1, v1) if x2 is None else _rows(kernel, x2)
  nngp = linalg.product(rows1, rows2, kernel.precision) / rows1.shape[1]
  k = dense_tail(layers, kernel.get, nngp, v1, v2)
  return with_exact_diagonal(k, dense_tail_diag(layers, kernel.get, v1)) if x2 is None else k


def dense_diag(kernel, x: Array) -> Array:
  """K(x_i, x_i), `(n,)`, exactly, without an arc cosine."""
  return dense_tail_diag(kernel.arch.layers[1:], kernel.get, _rows(kernel, x)[1])


def _rows(kernel, x: Array) -> tuple[Array, Array]:
  """Flattened rows, rounded to the precision of the kernel, and their mean squares."""
  x = linalg.rounded(x.reshape(x.shape[0], -1), kernel.precision)
  return x, jnp.mean(x * x, axis=1)


def dense_tail(
  layers: tuple, get: str, nngp: Array, v1: Array, v2: Array, ntk: Array | None = None
) -> Array:
  """Apply the layers after Flatten (or a global average) to a covariance matrix.

      Dense: nngp <- w^2 nngp + b^2,  ntk <- nngp + w^2 ntk      (NTK parameterization)
      activation: (nngp, derivative) <- dual.activation(nngp),  ntk <- derivative ntk
      Residual: the sums of the two, of the branch and of the shortcut

  Args:
    layers: `Dense`, activation and `Residual` records.
    get: "ntk" or "nngp".
    nngp: `(n1, n2)` covariance of the inputs of the first layer, per feature.
    v1, v2: `(n1,)` and `(n2,)` variances.
    ntk: `(n1, n2)` tangent kernel so far; None for zero.

  Returns:
    `(n1, n2)`.

  References:
    Jacot, Gabriel and Hongler (2018), theorem 1; Lee et al. (2018).
  """
  ntk = jnp.zeros_like(nngp) if ntk is None else ntk
  nngp, v1, v2, ntk = _tail(layers, nngp, v1, v2, ntk)
  return ntk if get == "ntk" else nngp


def _tail(layers: tuple, nngp: Array, v1: Array, v2: Array, ntk: Array) -> tuple[Array, ...]:
  for layer in layers:
    if isinstance(layer, Dense):
      nngp, v1, v2 = (layer.w_std**2 * a + layer.b_std**2 for a in (nngp, v1, v2))
      ntk = nngp + layer.w_std**2 * ntk
    elif isinstance(layer, Residual):
      paths = (_tail(path, nngp, v1, v2, ntk) for path in (layer.branch, layer.shortcut))
      nngp, v1, v2, ntk = map(jnp.add, *paths)
    else:
      nngp, derivative = dual.activation(layer, nngp, v1[:, None], v2[None, :])
      ntk = derivative * ntk
      v1, v2 = (dual.activation_diag(layer, v)[0] for v in (v1, v2))
  return nngp, v1, v2, ntk


def dense_tail_diag(layers: tuple, get: str, v: Array, ntk: Array | None = None) -> Array:
  """`dense_tail` of points with themselves, `(n,)`."""
  v, ntk = _tail_diag(layers, v, jnp.zeros_like(v) if ntk is None else ntk)
  return ntk if get == "ntk" else v


def _tail_diag(layers: tuple, v: Array, ntk: Array) -> tuple[Array, ...]:
  for layer in layers:
    if isinstance(layer, Dense):
      v = layer.w_std**2 * v + layer.b_std**2
      ntk = v + layer.w_std**2 * ntk
    elif isinstance(layer, Residual):
      paths = (_tail_diag(path, v, ntk) for path in (layer.branch, layer.shortcut))
      v, ntk = map(jnp.add, *paths)
    else:
      v, derivative = dual.activation_diag(layer, v)
      ntk = derivative * ntk
  return v, ntk


def with_exact_diagonal(k: Array, diagonal: Array) -> Array:
  """`k` with another diagonal: the arc cosine of a rounded 1 loses half of the digits."""
  i = jnp.arange(k.shape[0])
  return k.at[i, i].set(diagonal)
