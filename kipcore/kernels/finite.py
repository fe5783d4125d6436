"""Empirical kernels of finite networks, which converge to the closed forms as the width grows."""

import jax
import jax.numpy as jnp

from kipcore import linalg
from kipcore.types import Array, ArrayLike


def empirical_ntk(apply_fn, variables, x1: ArrayLike, x2: ArrayLike | None = None) -> Array:
  """<df(x1)/dtheta, df(x2)/dtheta> / c, summed over the c outputs: `(n1, n2)`.

  Args:
    apply_fn: `apply_fn(variables, x) -> (n, c)`.
    variables: parameters theta, any pytree.
    x1: `(n1, ...)` inputs.
    x2: `(n2, ...)` inputs, or None for `x1` itself.

  Returns:
    `(n1, n2)`; with unit-normal parameters its expectation converges to `ntk_fn`.
  """

  def jacobian(x):
    jac = jax.jacobian(apply_fn)(variables, x)
    leaves = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jac)]
    return jnp.concatenate(leaves, axis=-1)

  j1 = jacobian(x1)
  j2 = j1 if x2 is None else jacobian(x2)
  return jnp.einsum("icp,jcp->ij", j1, j2, precision=linalg.HIGHEST) / j1.shape[1]


def empirical_nngp(apply_fn, variables, x1: ArrayLike, x2: ArrayLike | None = None) -> Array:
  """Mean over outputs of f(x1) f(x2): `(n1, n2)`, whose expectation converges to `nngp_fn`.

  Args:
    apply_fn: `apply_fn(variables, x) -> (n, c)`.
    variables: parameters, any pytree.
    x1: `(n1, ...)` inputs.
    x2: `(n2, ...)` inputs, or None for `x1` itself.

  Returns:
    `(n1, n2)`.
  """
  f1 = apply_fn(variables, x1)
  f2 = f1 if x2 is None else apply_fn(variables, x2)
  return linalg.matmul(f1, f2.T) / f1.shape[1]
