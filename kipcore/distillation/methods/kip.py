"""Kernel Inducing Points: learn the support so that its ridge regression predicts the targets."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kipcore import blocks, checks, krr
from kipcore.distillation.features import cross_entropy
from kipcore.distillation.method import Batch, LossInfo, Method, Params, value_equal
from kipcore.types import Array, KernelFn, Support


@dataclasses.dataclass(frozen=True)
class KIPOptions:
  """Choices of KIP.

  Attributes:
    relative_ridge: ridge as a fraction of tr(K_ss) / m.
    loss: "mse" (half mean squared error) or "cross_entropy" (of the predictions times a
      learned temperature: ridge regression of one-hot labels does not give logits).
    learn_labels: whether the labels of the support are learned too.
    initial_temperature: where the temperature starts.
    block_size: targets whose kernel is held at a time, computed again for the gradient: for large supports; None for all of
      them, once. Kernels of convolutional networks work in tiles of their own.
  """

  relative_ridge: float = 1e-6
  loss: str = "mse"
  learn_labels: bool = False
  initial_temperature: float = 10.0
  block_size: int | None = None


@value_equal
def kip(kernel_fn: KernelFn, options: KIPOptions = KIPOptions()) -> Method:
  """The KIP method over any kernel.

      P = K_ts (K_ss + ridge I)^{-1} y_s,   ridge = relative_ridge tr(K_ss) / m
      mse:            loss_t = 1/2 mean_c (P_tc - y_tc)^2
      cross_entropy:  loss_t = CE(softmax(temperature P_t), class of y_t)

  The gradient flows through K_ss (the trace in the ridge included) and K_ts into the
  support; targets are constants.

  Args:
    kernel_fn: kernel of the inputs.
    options: see `KIPOptions`.

  Returns:
    A `Method` that learns `x`, `y` and `log_temperature` (the last two if asked).

  Raises:
    ValueError: for a ridge or temperature <= 0, a block size < 1, or an unknown loss.

  Source: Nguyen, Chen, Lee 2021 (KIP), algorithm 1; temperature: Loo et al. 2022 (RFAD), section 3.

  Example:
    A support that has all targets predicts them, up to the ridge:

    >>> x, y = jnp.asarray([[0.0], [1.0], [3.0]]), kipcore.one_hot_centered(np.array([0, 1, 0]), 2)
    >>> method = kipcore.kip(kipcore.rbf_fn(1.0))
    >>> params = method.init_params(kipcore.Support(x, y))
    >>> loss, info = jax.jit(method.loss)(params, (), kipcore.Batch(x, y), jnp.ones(3), None)
    >>> round(float(loss), 6), float(info.accuracy)
    (0.0, 1.0)
  """
  checks.positive("relative_ridge", options.relative_ridge)
  checks.positive("initial_temperature", options.initial_temperature)
  checks.one_of("loss", options.loss, ("mse", "cross_entropy"))
  if options.block_size is not None:
    checks.positive_int("block_size", options.block_size)

  def init_params(support: Support) -> Params:
    log_temperature = jnp.asarray(math.log(options.initial_temperature), support.x.dtype)
    return {"x": support.x, "y": support.y, "log_temperature": log_temperature}

  def trainable(params: Params) -> dict[str, float]:
    del params
    return {
      "x": True,
      "y": options.learn_labels,
      "log_temperature": options.loss == "cross_entropy",
    }

  def loss(params: Params, aux, batch: Batch, weights: Array, key: Array):
    del aux, key
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

  return Method(
    "kip", init_params, lambda params, aux: Support(params["x"], params["y"]), trainable, loss
  )
