"""The sum of the losses of several methods on one set: for example, a set for a kernel and for networks."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from kipcore import keys
from kipcore.distillation.method import Batch, Method, Params
from kipcore.types import Array, Integer, LossInfo, Support


@dataclasses.dataclass(frozen=True)
class Combined(Method):
  """The method of `combined`; its auxiliary state is a tuple of those of its methods."""

  methods: tuple[Method, ...]
  weights: tuple[float, ...]

  @property
  def name(self) -> str:  # type: ignore[override]
    return "+".join(method.name for method in self.methods)

  def init_params(self, support: Support) -> Params:
    params: Params = {}
    for method in self.methods:
      params.update(method.init_params(support))
    return params

  def support(self, params: Params, aux: Any) -> Support:
    return self.methods[0].support(params, aux[0])

  def trainable(self, params: Params) -> dict[str, float]:
    rates: dict[str, float] = {}
    for method in self.methods:
      for name, rate in method.trainable(params).items():
        rates[name] = max(rates.get(name, 0.0), float(rate))
    return rates

  def loss(
    self, params: Params, aux: Any, batch: Batch, weights: Float[Array, " t"], key: Any
  ) -> tuple[Float[Array, ""], LossInfo]:
    total: Any = 0.0
    infos = []
    for i, (method, own, weight) in enumerate(zip(self.methods, aux, self.weights)):
      value, info = method.loss(params, own, batch, weights, keys.stream(key, f"method {i}"))
      total = total + weight * value
      infos.append(info)
    status = jnp.max(jnp.stack([info.status for info in infos]))
    return total, infos[0]._replace(status=status)

  def init_aux(self, key: Array, params: Params) -> Any:
    return tuple(
      method.init_aux(keys.stream(key, f"method {i}"), params)
      for i, method in enumerate(self.methods)
    )

  def update_aux(self, key: Array, params: Params, aux: Any, step: Integer) -> Any:
    return tuple(
      method.update_aux(keys.stream(key, f"method {i}"), params, own, step)
      for i, (method, own) in enumerate(zip(self.methods, aux))
    )


def combined(*methods: Method, weights: tuple[float, ...] | None = None) -> Method:
  """Learns one set by the sum of the losses of several methods.

      loss = sum_k weight_k loss_k

  The methods share the parameters `x` and `y`, so their labels must have the same convention: `kip` and `frepo`
  have centered labels, and so has `rat_bptt` with the squared error. The set, and the predictions that samplers score, are
  those of the first method.

  Args:
    *methods: at least one.
    weights: of the losses; None for ones.

  Returns:
    A `Method`.

  Raises:
    ValueError: for no method, or another number of weights.

  Example:
    >>> method = kipcore.combined(
    ...   kipcore.rat_bptt(
    ...     kipcore.network(kipcore.fc(1), 8, 2), kipcore.RaTBPTTOptions(loss="squared_error")
    ...   ),
    ...   kipcore.kip(kipcore.ntk_fn(kipcore.fc(1))),
    ... )
    >>> method.name
    'ratbptt+kip'
  """
  weights = (1.0,) * len(methods) if weights is None else tuple(map(float, weights))
  if not methods or len(weights) != len(methods):
    raise ValueError(
      f"methods: expected at least one and a weight for each, got {len(methods)} and {len(weights)} weights"
    )
  return Combined(tuple(methods), weights)
