"""Weights that survive: a weighted coreset as an unweighted one, for whatever comes after."""

import jax.numpy as jnp
import numpy as np

from kipcore import checks, krr, linalg
from kipcore.selection.coreset import Coreset
from kipcore.types import KernelFn, Support


def absorb_weights(kernel_fn: KernelFn, coreset: Coreset, ridge, used_ridge, how: str = "labels"):
  """The weighted ridge regression of a coreset as an unweighted one, exactly.

  The weighted fit solves (K_SS + ridge diag(1/w)) a = y. The three cures give the same
  predictor from an ordinary solve:
    labels: y' = (K_SS + used_ridge I)(K_SS + ridge diag(1/w))^{-1} y, for any kernel.
    ridge: the vector ridge / w, with y as it is.
    scale: x' = sqrt(w) x and y' = sqrt(w) y, with the ridge `ridge`; only for kernels with
      k(a x, b z) = a b k(x, z): bias-free ReLU networks and the linear kernel.
  "drop" keeps x, y and `used_ridge` and forgets the weights: heuristic, no theorem holds.

  Args:
    kernel_fn: the kernel.
    coreset: from `select_coreset`.
    ridge: absolute ridge of the weighted problem, e.g. `coreset.ridge`.
    used_ridge: absolute ridge with which the result will be used (labels, drop).
    how: "labels", "ridge", "scale" or "drop".

  Returns:
    `(support, ridge)`: `Support` and the absolute ridge (scalar or `(m,)`) to use with it.

  Raises:
    ValueError: for another `how`, weights that are not positive, or "scale" with a kernel
      that is not homogeneous.
    NumericalError: where the factorization failed.
  """
  checks.one_of("how", how, ("labels", "ridge", "scale", "drop"))
  checks.positive("weights", coreset.weights)
  x, y, w = coreset.x, coreset.y, coreset.weights
  if how == "drop":
    return Support(x, y), used_ridge
  if how == "ridge":
    return Support(x, y), ridge / w
  if how == "scale":
    probe = jnp.asarray(np.random.default_rng(0).normal(size=(2, *x.shape[1:])), x.dtype)
    k, scaled = kernel_fn(probe[:1], probe[1:]), kernel_fn(2.0 * probe[:1], 3.0 * probe[1:])
    if not np.allclose(scaled, 6.0 * k, rtol=1e-3):
      raise ValueError(
        "how='scale': expected a kernel with k(a x, b z) = a b k(x, z), such as a bias-free ReLU "
        "network's; this one is not homogeneous, use how='labels'"
      )
    root = jnp.sqrt(w)
    return Support(x * root.reshape(-1, *(1,) * (x.ndim - 1)), y * root[:, None]), ridge
  k = kernel_fn(x, None)
  fit = krr.krr_fit(k, y, ridge / w)
  checks.raise_for_status("the weighted fit", fit.status)
  return Support(x, linalg.matmul(linalg.add_ridge(k, used_ridge), fit.dual)), used_ridge
