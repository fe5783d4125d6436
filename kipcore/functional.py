"""Networks of `flax.linen`, of `flax.nnx` and of plain functions as pure functions of their variables.

Variables are a dict of collections: "params", which is trained, and any others, which the network changes
itself in training, such as the running statistics of batch norm.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from kipcore import checks, linalg
from kipcore.types import Array, ArrayLike

# Arguments of calls and their values in training; the negated values otherwise.
_TRAINING = {
  "train": True,
  "training": True,
  "deterministic": False,
  "use_running_average": False,
}


class FunctionalNetwork:
  """A network as pure functions of its variables, made by `as_network`.

  Networks made from equal objects are equal, and share compilations.
  """

  features_of: str | Callable | None

  def init(self, key: Array, x: Float[ArrayLike, "n ..."]) -> dict[str, Any]:
    """The variables of a random network for rows like `x`."""
    with linalg.permissive_promotion():
      variables = self._init(key, x)
    leaves = jax.tree.leaves(variables["params"])
    if not leaves or not all(
      jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves
    ):
      raise ValueError(
        "network: expected parameters of floating dtypes, got "
        + (", ".join(sorted({str(jnp.result_type(leaf)) for leaf in leaves})) or "none")
      )
    return variables

  def apply(self, variables: Any, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n c"]:
    """The outputs, without dropout and with running statistics."""
    return self._evaluated("outputs", None, variables, x)

  def features(self, variables: Any, x: Float[ArrayLike, "n ..."]) -> Float[Array, "n p"]:
    """The inputs of the last linear layer, without dropout and with running statistics."""
    self.check_features()
    return self._evaluated("features", self.features_of, variables, x)

  def train(
    self, variables: Any, x: Float[ArrayLike, "n ..."], key: Array
  ) -> tuple[Float[Array, "n c"], dict[str, Any]]:
    """The outputs in training, and the collections other than "params" afterwards.

    Args:
      variables: of `init`.
      x: `(n, ...)` rows; batch norm uses their statistics.
      key: random key of dropout.

    Returns:
      `(n, c)` outputs, and the other collections in their dtypes.
    """
    with linalg.permissive_promotion():
      out, state = self._run(None, variables, x, key)
    old = {name: variables[name] for name in state}
    return _matrix("outputs", out, x), jax.tree.map(
      lambda new, a: jnp.asarray(new, a.dtype), state, old
    )

  def check_features(self) -> None:
    """Raise ValueError if nothing says what the features are."""
    if self.features_of is None:
      raise ValueError(
        "network: expected features, the inputs of the last linear layer, which this method uses; give the module a "
        "method `features(x)`, or pass kipcore.as_network(network, features=...) with the name of a method or a function"
      )

  def parameters_only(self, x: Float[ArrayLike, "n ..."]) -> Any:
    """The shapes of the parameters for rows like `x`.

    Raises:
      ValueError: for a network with other variables, such as those of batch norm.
    """
    row = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    shapes = jax.eval_shape(self.init, jax.random.key(0), row)
    if set(shapes) != {"params"}:
      raise ValueError(
        "module: expected a network without other variables than parameters (such as those of batch norm), "
        f"got {', '.join(sorted(set(shapes) - {'params'}))}"
      )
    return shapes["params"]

  def check_outputs(
    self, x: Float[ArrayLike, "n ..."], name: str, y: Float[ArrayLike, "n c"]
  ) -> None:
    """Raise ValueError unless the labels `y`, an argument of that name, have as many columns as rows like `x` have outputs."""
    row = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    out = jax.eval_shape(lambda row: self.apply(self.init(jax.random.key(0), row), row), row)
    checks.shape(name, y, (None, out.shape[1]))

  def _evaluated(self, what: str, function, variables: Any, x) -> Array:
    with linalg.permissive_promotion():
      return _matrix(what, self._run(function, variables, x, None)[0], x)

  def _init(self, key: Array, x) -> dict[str, Any]:
    raise NotImplementedError

  def _run(self, function, variables: Any, x, key: Array | None) -> tuple[Any, dict[str, Any]]:
    """The value of a function of the network, by default its call, and the new state; with a key in training."""
    raise NotImplementedError


# What `as_network` accepts. `Callable` includes classes of nnx modules.
NetworkLike: TypeAlias = FunctionalNetwork | nn.Module | tuple[Callable, Callable] | Callable


def as_network(network: NetworkLike, features: str | Callable | None = None) -> FunctionalNetwork:
  """A network of any library, for the methods through networks and for `evaluate_network`.

  These call it themselves; call it to say what the features are, or to choose variables by hand.

      linen:  a module with `__call__(x) -> (n, c)`
      nnx:    a class or function `(*, rngs) -> module` with such a call; it draws a new network at each call
      pair:   `init(key, x) -> params` and `apply(params, x) -> (n, c)`

  The call of a module may have an argument `train` or `training`, or `deterministic` or `use_running_average`, with
  the value for training or evaluation; nnx modules are also set by `train()` and `eval()`. In training, dropout gets a key and
  batch norm uses the batch; in evaluation, dropout is off and batch norm uses its running statistics. Pairs have no mode.

  Args:
    network: one of these, hashable. The same object compiles once.
    features: the inputs of the last linear layer, `(n, p)`: the name of a method `(x)` of the module, or a function
      `(module, x)`, for pairs `(params, x)`. None for the method `features` if the module has it.

  Returns:
    A `FunctionalNetwork`; `network` itself if it is one.

  Raises:
    TypeError, ValueError: for anything else, such as an nnx module that is already drawn, or a name that is no method.

  Example:
    >>> def init(key, x):
    ...   return jax.random.normal(key, (x[0].size, 2))
    >>> net = kipcore.as_network((init, lambda w, x: x @ w), features=lambda w, x: x)
    >>> net.apply(net.init(jax.random.key(0), jnp.ones((1, 3))), jnp.ones((5, 3))).shape
    (5, 2)
  """
  if isinstance(network, FunctionalNetwork):
    if features is not None:
      raise TypeError("features: expected None for a network that as_network made")
    return network
  if features is not None and not isinstance(features, str):
    if not callable(features):
      raise TypeError(f"features: expected a name or a function, got {features!r}")
    features = checks.hashable(features)
  if isinstance(network, nn.Module):
    return _Linen(_hashable(network), _named(type(network), features))
  if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
    if isinstance(features, str):
      raise TypeError(f"features: expected a function (params, x) for a pair, got {features!r}")
    init, apply = map(checks.hashable, network)
    return _Pair(init, apply, features)
  from flax import nnx  # slow to import

  if callable(network) and not isinstance(network, nnx.Module):
    build = checks.hashable(network)
    return _NNX(build, _named(type(_abstract(build)), features))
  got = checks.one_line(network, 60) if isinstance(network, tuple) else type(network).__name__
  raise TypeError(
    "network: expected a flax.linen module, a class or function (*, rngs) -> flax.nnx module that draws a new network, "
    f"or a pair (init, apply), got {got}"
  )


def applied(network: Any, variables: Any = None) -> tuple[Callable[[Any, Array], Array], Any]:
  """A function `(variables, x) -> (n, c)`, whose derivatives are those by parameters, and its variables.

  Args:
    network: a linen module, a pair or a `FunctionalNetwork` with its variables (for pairs, parameters); an nnx module
      without them. Any other function is returned as it is.
    variables: of the network.

  Returns:
    The function, hashable if the network is, and the variables.
  """
  if isinstance(network, (FunctionalNetwork, nn.Module)) and variables is not None:
    return _Applied(as_network(network)), variables
  if isinstance(network, tuple) and variables is not None:
    pair: Any = as_network(network)
    return pair.apply_fn, variables
  if variables is not None:
    return network, variables
  from flax import nnx

  if not isinstance(network, nnx.Module):
    raise TypeError(
      f"params: expected parameters, got None, for a function or network of type {type(network).__name__}"
    )
  definition, state = nnx.split(network)
  leaves, structure = jax.tree.flatten(state)
  shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(a), a.dtype) for a in leaves)
  return _Applied(_NNX(_Copy(definition, structure, shapes), None)), _collections(_split(network))


@dataclasses.dataclass(frozen=True)
class _Linen(FunctionalNetwork):
  module: nn.Module
  features_of: str | Callable | None

  def _init(self, key, x):
    found = self.module.init(key, x, **_mode(self.module.__call__, False))
    return {"params": {}, **found}

  def _run(self, function, variables, x, key):
    called = self.module.__call__ if function is None else function
    mode = _mode(
      getattr(self.module, called) if isinstance(called, str) else called, key is not None
    )
    if key is not None:
      state = [name for name in variables if name != "params"]
      out, new = self.module.apply(variables, x, rngs=key, mutable=state, **mode)
      return out, dict(new)
    try:
      return self.module.apply(variables, x, method=function, **mode), {}
    except (flax.errors.InvalidRngError, flax.errors.ModifyScopeVariableError) as error:
      raise _not_pure("needs random numbers or changes variables") from error


@dataclasses.dataclass(frozen=True)
class _NNX(FunctionalNetwork):
  """Variables are the leaves of the module's states, in tuples."""

  build: Callable
  features_of: str | Callable | None

  def _init(self, key, x):
    return _collections(_split(_drawn(self.build, key)))

  def _run(self, function, variables, x, key):
    from flax import nnx

    definition, *states = _split(_abstract(self.build))
    structures = [jax.tree.structure(state) for state in states]
    given = (
      variables["params"],
      variables.get("state", ()),
      _fresh(jax.random.key(0) if key is None else key, jax.tree.leaves(states[2])),
      jax.tree.leaves(states[3]),
    )
    module = nnx.merge(definition, *map(jax.tree.unflatten, structures, given))
    module.eval() if key is None else module.train()
    if isinstance(function, str) or function is None:
      call = module.__call__ if function is None else getattr(module, function)
      out = call(x, **_mode(call, key is not None))
    else:
      out = function(module, x, **_mode(function, key is not None))
    found = [jax.tree.leaves(state) for state in _split(module)[1:]]
    kept = [len(a) == len(b) and all(p is q for p, q in zip(a, b)) for a, b in zip(given, found)]
    if not kept[0]:
      raise _not_pure("changes its parameters")
    if key is None and not all(kept[:3]):
      raise _not_pure("uses random numbers or changes variables")
    return out, {"state": tuple(found[1])} if "state" in variables else {}


@dataclasses.dataclass(frozen=True)
class _Pair(FunctionalNetwork):
  init_fn: Callable
  apply_fn: Callable
  features_of: Any

  def _init(self, key, x):
    params = self.init_fn(key, x)
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
      raise ValueError(
        f"network: expected parameters from init, got collections {', '.join(sorted(params))}; pass the linen "
        "module itself, which has variables other than parameters"
      )
    return {"params": params}

  def _run(self, function, variables, x, key):
    return (function or self.apply_fn)(variables["params"], x), {}


@dataclasses.dataclass(frozen=True)
class _Applied:
  """The outputs as a function of variables that is constant in those other than parameters."""

  network: FunctionalNetwork

  def __call__(self, variables, x):
    constant = jax.lax.stop_gradient(variables)
    return self.network.apply({**constant, "params": variables["params"]}, x)


@dataclasses.dataclass(frozen=True)
class _Copy:
  """A constructor of modules that differ from a given one only in their values."""

  definition: Any
  structure: Any
  shapes: tuple

  def __call__(self, rngs):
    from flax import nnx

    values = _fresh(jax.random.key(0), self.shapes)
    return nnx.merge(self.definition, jax.tree.unflatten(self.structure, values))


def _drawn(build: Callable, key: Any) -> Any:
  """The nnx module of a constructor."""
  from flax import nnx

  module = build(rngs=nnx.Rngs(key))
  if not isinstance(module, nnx.Module):
    raise TypeError(f"it returns a {type(module).__name__}")
  return module


def _abstract(build: Callable) -> Any:
  """The nnx module of a constructor, without values."""
  from flax import nnx

  try:
    return nnx.eval_shape(lambda: _drawn(build, 0))
  except TypeError as error:
    raise TypeError(
      "network: expected a class or function (*, rngs) -> flax.nnx module, got one whose call fails: "
      + checks.one_line(error)
    ) from error


def _split(module: Any) -> tuple:
  """The definition of an nnx module, its parameters, other variables, random streams, and recorded values."""
  from flax import nnx

  definition, *states = nnx.split(module, nnx.Param, nnx.RngState, nnx.Intermediate, ...)
  params, streams, sown, state = states
  return definition, params, state, streams, sown


def _collections(split: tuple) -> dict[str, Any]:
  params, state = (tuple(jax.tree.leaves(part)) for part in (split[1], split[2]))
  return {"params": params, "state": state} if state else {"params": params}


def _fresh(key: Array, leaves: Sequence) -> list[Array]:
  """Different keys for leaves that are keys, zeros for others, such as the counts of random streams."""
  return [
    jax.random.split(jax.random.fold_in(key, i), a.shape)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    else jnp.zeros(a.shape, a.dtype)
    for i, a in enumerate(leaves)
  ]


def _mode(function: Callable, training: bool) -> dict[str, bool]:
  """The arguments by which a function is told whether it is in training."""
  names = inspect.signature(function).parameters
  return {name: value == training for name, value in _TRAINING.items() if name in names}


def _named(cls: type, features: Any) -> Any:
  """The features, by default the method of that name."""
  own = inspect.isfunction(getattr(cls, "features", None))
  if isinstance(features, str) and not callable(getattr(cls, features, None)):
    raise ValueError(f"features: expected the name of a method of {cls.__name__}, got {features!r}")
  return "features" if features is None and own else features


def _hashable(module: nn.Module) -> nn.Module:
  try:
    hash(module)
  except TypeError as error:
    raise TypeError(
      "network: expected a module with hashable fields, such as tuples in place of arrays, got a "
      f"{type(module).__name__}: {checks.one_line(error)}"
    ) from error
  return module


def _matrix(what: str, found: Any, x) -> Any:
  shape = getattr(found, "shape", None)
  if shape is None or len(shape) != 2 or shape[0] != x.shape[0]:
    got = type(found).__name__ if shape is None else f"shape {shape}"
    raise ValueError(f"network: expected {what} of shape ({x.shape[0]}, any), got {got}")
  return found


def _not_pure(what: str) -> ValueError:
  return ValueError(
    f"network: expected a pure function of parameters and rows, got one that {what}, outside training or in a way that "
    "is not supported; dropout and batch norm need an argument `train` of the call (or train() and eval() of nnx)"
  )
