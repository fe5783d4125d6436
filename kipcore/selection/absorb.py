"""Conversion of a weighted coreset to an equivalent unweighted one."""

import jax.numpy as jnp
import numpy as np

from kipcore import checks, krr, linalg
from kipcore.selection.coreset import Coreset
from kipcore.types import KernelFn, Support


def absorb_weights(kernel_fn: KernelFn, coreset: Coreset, ridge, used_ridge, how: str = "labels"):
  """Converts the weighted ridge regression of a coreset to an equivalent unweighted one.

  The weighted fit solves (K_SS + ridge diag(1/w)) a = y. Three methods give exactly the same
  predictor from an unweighted problem:
    labels: y' = (K_SS + used_ridge I)(K_SS + ridge diag(1/w))^{-1} y, for any kernel.
    ridge: y is unchanged, and the ridge is the vector ridge / w.
    scale: x' = sqrt(w) x and y' = sqrt(w) y, with the ridge `ridge`. This needs a kernel with
      k(a x, b z) = a b k(x, z), such as bias-free ReLU networks and the linear kernel.
  The fourth method, "drop", ignores the weights and keeps x, y and `used_ridge`. It is a heuristic
  without a guarantee.

  Args:
    kernel_fn: the kernel.
    coreset: from `select_coreset`, or from `select` with `(n, c)` labels; its weights are positive.
    ridge: absolute ridge of the weighted problem, e.g. `coreset.ridge`.
    used_ridge: absolute ridge that will be used with the result; for "labels" and "drop" only.
    how: "labels", "ridge", "scale" or "drop".

  Returns:
    `(support, ridge)`: `Support` and the absolute ridge (scalar or `(m,)`) to use with it.

  Raises:
    ValueError: for an unknown `how`, weights that are not positive, or "scale" with a kernel
      that is not homogeneous.
    NumericalError: if the factorization fails.
  """
  checks.one_of("how", how, ("labels", "ridge", "scale", "drop"))
  checks.rank("coreset.y (one-hot or real labels)", coreset.y, 2)
  checks.floating("coreset.y (one-hot or real labels)", coreset.y)
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
        "how='scale': expected a kernel with k(a x, b z) = a b k(x, z), such as that of a bias-free "
        "ReLU network; this kernel is not homogeneous, use how='labels'"
      )
    root = jnp.sqrt(w)
    return Support(x * root.reshape(-1, *(1,) * (x.ndim - 1)), y * root[:, None]), ridge
  k = kernel_fn(x, None)
  fit = krr.krr_fit(k, y, ridge / w)
  checks.raise_for_status("the weighted fit", fit.status)
  return Support(x, linalg.matmul(linalg.add_ridge(k, used_ridge), fit.dual)), used_ridge
