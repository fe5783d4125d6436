"""Test accuracy of kernel ridge regression on a support."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from kipcore import checks, krr, pytrees
from kipcore.kernels.gram import gram_matvec
from kipcore.types import Array, ArrayLike, IntLike, KernelFn, RealLike, Support


class KRREvaluation(NamedTuple):
  """`accuracy` in [0, 1], `loss` (half mean squared error), `status`; all scalars."""

  accuracy: Float[Array, ""]
  loss: Float[Array, ""]
  status: Int[Array, ""]


def evaluate_krr(
  kernel_fn: KernelFn,
  support: Support,
  x: Shaped[ArrayLike, "n ..."],
  y: Float[ArrayLike, "n c"],
  ridge: RealLike | None = None,
  relative_ridge: RealLike | None = None,
  block_size: IntLike | None = 2000,
) -> KRREvaluation:
  """Fit ridge regression on the support and score it on held-out rows.

  Args:
    kernel_fn: the kernel.
    support: inputs `(m, ...)` and labels `(m, c)`.
    x: `(n, ...)` test rows.
    y: `(n, c)` test labels; the largest entry of a row is its class.
    ridge: absolute, > 0, scalar or `(m,)`; or else
    relative_ridge: fraction of tr(K_ss) / m. Exactly one of the two.
    block_size: test rows at a time; None for all.

  Returns:
    `KRREvaluation`.

  Raises:
    ValueError, TypeError: for shapes that do not match, empty or integer arrays, test rows that
      are not finite, or unless exactly one kind of ridge is given.
  """
  if (ridge is None) == (relative_ridge is None):
    raise ValueError(f"expected one of ridge and relative_ridge, got {ridge} and {relative_ridge}")
  check_support(support, x, y)
  if block_size is not None:
    block_size = checks.positive_int("block_size", block_size)
  relative = ridge is None
  if relative_ridge is not None:
    checks.positive("relative_ridge", relative_ridge)
    ridge = checks.scalar("relative_ridge", relative_ridge)
  ridge = krr.checked_ridge("ridge", ridge, support.x.shape[0])
  kernel_fn = pytrees.argument(kernel_fn)
  return _evaluate_krr(
    kernel_fn, relative, block_size, support, jnp.asarray(x), jnp.asarray(y), ridge
  )


def check_support(support: Support, x, y) -> None:
  """Check that support and test rows match, and that test rows are finite."""
  for name, array in (("support.x", support.x), ("support.y", support.y), ("x", x), ("y", y)):
    checks.floating(name, array)
  checks.same_rows("support.x", support.x, "support.y", support.y)
  checks.same_rows("x", x, "y", y)
  checks.rank("support.y", support.y, 2)
  checks.shape("x", x, (None, *support.x.shape[1:]))
  checks.shape("y", y, (None, support.y.shape[1]))
  for name, array in (("support.x", support.x), ("x", x)):
    if not array.shape[0]:
      raise ValueError(f"{name}: expected at least one row, got none")
  checks.finite("x", x)
  checks.finite("y", y)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _evaluate_krr(kernel_fn, relative, block_size, support, x, y, ridge):
  k_ss = kernel_fn(support.x, None)
  fit = krr.krr_fit(k_ss, support.y, krr.relative_ridge(k_ss, ridge) if relative else ridge)
  predictions = gram_matvec(kernel_fn, x, support.x, fit.dual.astype(x.dtype), block_size)
  loss = 0.5 * jnp.mean((predictions - y) ** 2)
  return KRREvaluation(krr.accuracy(predictions, y), loss, krr.status_with(fit.status, loss))
