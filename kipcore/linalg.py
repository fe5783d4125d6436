"""Dense symmetric solves that report a status, and products at an explicit precision.

Matrix products request the highest precision, because the default is bfloat16 on TPU and TF32 on
recent GPUs. Factorizations run in the widest float that JAX's 64-bit switch allows: float64 if it
is on, otherwise the dtype of the input.
"""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from kipcore.types import Array, Status

HIGHEST = jax.lax.Precision.HIGHEST


@contextlib.contextmanager
def permissive_promotion():
  """A context for libraries that mix dtypes and ranks, which the caller may have disallowed."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def matmul(a: Array, b: Array) -> Array:
  """`a @ b` at the highest precision."""
  return jnp.matmul(a, b, precision=HIGHEST)


def squared_distances(x1: Array, x2: Array | None = None) -> Array:
  """Squared Euclidean distances between rows, accurate for rows far from the origin.

      ||a - b||^2 = ||a'||^2 + ||b'||^2 - 2 <a', b'>,   a' = a - s,  b' = b - s

  with s the mean of `x2`. The error is a few eps times ||a'||^2 + ||b'||^2; distances below that
  bound, those of equal rows included, are exactly 0. Row i depends on no other row of `x1`.
  Derivatives are those of the exact formula.

  Args:
    x1: `(n1, ...)` floating rows, flattened.
    x2: `(n2, ...)` rows, or None for `x1` itself; then the diagonal is exactly 0.

  Returns:
    `(n1, n2)`, all entries >= 0.
  """
  x1 = x1.reshape(x1.shape[0], -1)
  same, x2 = x2 is None, x1 if x2 is None else x2.reshape(x2.shape[0], -1)
  shift = jax.lax.stop_gradient(jnp.mean(x2, axis=0, keepdims=True))
  x1, x2 = x1 - shift, x2 - shift
  norms = jnp.sum(x1 * x1, axis=1)[:, None] + jnp.sum(x2 * x2, axis=1)[None, :]
  raw = norms - 2.0 * matmul(x1, x2.T)
  rounding = jnp.finfo(raw.dtype).eps * (4.0 + 0.25 * x1.shape[1] ** 0.5)
  zero = raw <= rounding * norms
  if same:
    zero |= jnp.eye(x1.shape[0], dtype=bool)
  # The value is clipped, the derivative is not: it is exact at equal rows, to second order.
  return raw + jax.lax.stop_gradient(jnp.where(zero, 0.0, raw) - raw)


# Exponent bits and mantissa bits that factors of products are rounded to.
PRECISIONS = {"float32": None, "tensorfloat32": (8, 10), "bfloat16": (8, 7)}


def rounded(a: Array, precision: str) -> Array:
  """float32 values rounded to a narrower type, stored as float32; other dtypes are unchanged."""
  bits = PRECISIONS[precision]
  return a if bits is None or a.dtype != jnp.float32 else jax.lax.reduce_precision(a, *bits)


def product(a: Array, b: Array, precision: str) -> Array:
  """`a @ b.T` of factors already `rounded` to that precision, summed in the dtype of the inputs."""
  narrow = a.dtype == jnp.float32
  if narrow and precision == "bfloat16":
    return jnp.matmul(
      a.astype(jnp.bfloat16), b.T.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
  how = jax.lax.Precision.HIGH if narrow and precision == "tensorfloat32" else HIGHEST
  return jnp.matmul(a, b.T, precision=how)


def at_least_float32(x: Array) -> Array:
  """Half precision (float16, bfloat16) as float32; other floating arrays are unchanged."""
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def widest_dtype(dtype) -> jnp.dtype:
  """float64 if the 64-bit switch is on, else `dtype`, but at least float32."""
  wide = jnp.dtype(jax.dtypes.canonicalize_dtype(jnp.float64))
  return wide if wide.itemsize > jnp.dtype(dtype).itemsize else jnp.dtype(dtype)


class Factor(NamedTuple):
  """Cholesky factor of a symmetric positive-definite matrix.

  Attributes:
    lower: `(m, m)` lower triangle L with L L^T = K + ridge.
    status: int32 scalar, `Status`.
  """

  lower: Array
  status: Array


def add_ridge(k: Array, ridge) -> Array:
  """K + diag(ridge); `ridge` is absolute, a scalar or one value per point `(m,)`."""
  m = k.shape[0]
  ridge = jnp.broadcast_to(jnp.asarray(ridge).astype(k.dtype), (m,))
  return k + jnp.diag(ridge)


def factor(k: Array, ridge=0.0) -> Factor:
  """Cholesky factor of K + diag(ridge), symmetrized, in the widest float available.

  Args:
    k: `(m, m)` symmetric positive semi-definite.
    ridge: absolute, scalar or `(m,)`.

  Returns:
    `Factor`; if the matrix is not finite or not positive definite, its entries are NaN and its
    status is NOT_FINITE or NOT_POSITIVE_DEFINITE.
  """
  k = k.astype(widest_dtype(k.dtype))
  k = add_ridge(0.5 * (k + k.T), ridge)
  lower = jnp.linalg.cholesky(k, symmetrize_input=False)
  failed = jnp.where(jnp.isfinite(k).all(), Status.NOT_POSITIVE_DEFINITE, Status.NOT_FINITE)
  status = jnp.where(jnp.isfinite(lower).all(), Status.OK, failed).astype(jnp.int32)
  return Factor(lower, status)


def rounding_ridge(k: Array) -> Array:
  """10 m eps tr(K) / m: a ridge at the level of rounding, with which a semi-definite K has a factor."""
  return 10.0 * k.shape[0] * float(jnp.finfo(widest_dtype(k.dtype)).eps) * jnp.mean(jnp.diagonal(k))


def factor_semidefinite(k: Array) -> tuple[Factor, Array]:
  """The factor of K plus a ridge, and the ridge: the first of `rounding_ridge` times 1, 30, 900, 27,000
  with which the factorization succeeds.

  Kernels of deep or convolutional networks have larger rounding errors than a matrix product. The
  search has no reverse-mode derivative.
  """
  unit = rounding_ridge(k).astype(widest_dtype(k.dtype))

  def more(state):
    return factor(k, 30 * state[1]), 30 * state[1]

  return jax.lax.while_loop(
    lambda s: (s[0].status == Status.NOT_POSITIVE_DEFINITE) & (s[1] < 20_000 * unit),
    more,
    (factor(k, unit), unit),
  )


def whiten(f: Factor, b: Array) -> Array:
  """L^{-1} b."""
  return solve_triangular(f.lower, b.astype(f.lower.dtype), lower=True)


def unwhiten(f: Factor, b: Array) -> Array:
  """L^{-T} b."""
  return solve_triangular(f.lower, b.astype(f.lower.dtype), lower=True, trans="T")


def solve(f: Factor, b: Array) -> Array:
  """(L L^T)^{-1} b, in the dtype of the factor."""
  return unwhiten(f, whiten(f, b))


def inverse_diagonal(f: Factor) -> Array:
  """The diagonal of (L L^T)^{-1}, `(m,)`, as column sums of squares of L^{-1}."""
  eye = jnp.eye(f.lower.shape[0], dtype=f.lower.dtype)
  return jnp.sum(whiten(f, eye) ** 2, axis=0)
