"""Kernel Inducing Points: learn the support so that its ridge regression predicts the targets."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kipcore import blocks, checks, krr, pytrees
from kipcore.distillation import options as option_checks
from kipcore.distillation.features import cross_entropy
from kipcore.distillation.method import Batch, Method, Params
from kipcore.types import Array, Flag, Integer, KernelFn, LossInfo, Real, Support


@dataclasses.dataclass(frozen=True)
class KIPOptions:
  """Options of KIP.

  Attributes:
    relative_ridge: ridge as a fraction of tr(K_ss) / m.
    loss: "mse" (half mean squared error) or "cross_entropy" (of the predictions times a learned
      temperature, since ridge regression of one-hot labels does not return logits).
    learn_labels: whether the labels of the support are learned.
    initial_temperature: first value of the temperature.
    block_size: targets whose kernel rows are in memory at a time, recomputed for the gradient; None for all
      targets at once. Kernels of convolutional networks work in tiles of their own.
  """

  relative_ridge: Real = 1e-6
  loss: str = "mse"
  learn_labels: Flag = False
  initial_temperature: Real = 10.0
  block_size: Integer | None = None

  def __post_init__(self):
    option_checks.validate(
      self,
      positive=("relative_ridge", "initial_temperature"),
      counts={"block_size": 1},
      choices={"loss": ("mse", "cross_entropy")},
      flags=("learn_labels",),
    )


@dataclasses.dataclass(frozen=True)
class KIP(Method):
  """The method of `kip`."""

  kernel_fn: KernelFn
  options: KIPOptions

  name = "kip"

  def init_params(self, support: Support) -> Params:
    log_temperature = jnp.asarray(math.log(self.options.initial_temperature), support.x.dtype)
    return {"x": support.x, "y": support.y, "log_temperature": log_temperature}

  def trainable(self, params: Params) -> dict[str, float]:
    return {
      "x": 1.0,
      "y": float(self.options.learn_labels),
      "log_temperature": float(self.options.loss == "cross_entropy"),
    }

  def loss(
    self, params: Params, aux: Any, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    return _loss(pytrees.argument(self.kernel_fn), self.options, params, batch, weights)


# The kernel is not static, so that its numbers may be traced.
@functools.partial(jax.jit, static_argnums=1)
def _loss(kernel_fn, options: KIPOptions, params, batch, weights):
  k_ss = kernel_fn(params["x"], None)
  fit = krr.krr_fit(k_ss, params["y"], krr.relative_ridge(k_ss, options.relative_ridge))
  predict = lambda rows: krr.krr_predict(fit, kernel_fn(rows, params["x"]))
  if options.block_size is not None:
    predict = jax.checkpoint(predict)
  predictions = blocks.map_row_blocks(predict, batch.x, options.block_size)
  if options.loss == "mse":
    per_example = 0.5 * jnp.mean((predictions - batch.y) ** 2, axis=1)
  else:
    per_example = cross_entropy(jnp.exp(params["log_temperature"]) * predictions, batch.y)
  value = jnp.mean(weights.astype(per_example.dtype) * per_example)
  info = LossInfo(per_example, predictions, krr.accuracy(predictions, batch.y), fit.status)
  return value, jax.lax.stop_gradient(info)


def kip(kernel_fn: KernelFn, options: KIPOptions = KIPOptions()) -> Method:
  """Kernel Inducing Points over any kernel.

      P = K_ts (K_ss + ridge I)^{-1} y_s,   ridge = relative_ridge tr(K_ss) / m
      mse:            loss_t = 1/2 mean_c (P_tc - y_tc)^2
      cross_entropy:  loss_t = CE(softmax(temperature P_t), class of y_t)

  The gradient flows through K_ss (including the trace in the ridge) and K_ts into the support; targets are constant.

  Args:
    kernel_fn: kernel of the inputs. Methods are equal if their kernels and options are.
    options: see `KIPOptions`.

  Returns:
    A `Method` that learns `x`, and `y` and `log_temperature` if requested.

  References:
    Nguyen, Chen, Lee (2021), KIP, algorithm 1. Temperature: Loo et al. (2022), RFAD, section 3.

  Example:
    A support that contains all targets predicts them, up to the ridge:

    >>> x, y = jnp.asarray([[0.0], [1.0], [3.0]]), kipcore.one_hot_centered(np.array([0, 1, 0]), 2)
    >>> method = kipcore.kip(kipcore.rbf_fn(1.0))
    >>> params = method.init_params(kipcore.Support(x, y))
    >>> loss, info = jax.jit(method.loss)(params, (), kipcore.Batch(x, y), jnp.ones(3), None)
    >>> round(float(loss), 6), float(info.accuracy)
    (0.0, 1.0)
  """
  # A pytree may have traced numbers: then the method is not hashable, but its loss is differentiable by them.
  is_pytree = pytrees.argument(kernel_fn) is kernel_fn
  return KIP(kernel_fn if is_pytree else checks.hashable(kernel_fn), options)
