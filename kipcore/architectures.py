"""The description of a network, from which kernel, stax and Flax versions are made.

A description is a tuple of layer records: hashable, comparable and printable, and a pytree whose leaves
are the numbers w_std, b_std and slope. It has no widths, because a kernel is the limit of infinite width; a finite network chooses one (`networks`).

Every weight is drawn from N(0, w_std^2 / fan_in) and every bias from N(0, b_std^2). The "ntk"
parameterization draws unit normals and multiplies them by these scales, which changes the NTK but
not the function at initialization. Published KIP uses w_std = sqrt(2) and b_std = 0.1 in every
layer, the readout included.
"""

import dataclasses
import json
import math
import re

from kipcore import checks, pytrees
from kipcore.types import IntLike, Number, RealLike

SQRT2 = math.sqrt(2.0)
_MAX_LAYERS = 1000  # in a file
_MAX_SCALE = 1e6


class _Layer:
  """Converts the numbers of a layer record to Python numbers, so that it is hashable and JSON."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      convert = checks.integer if field.name == "size" else checks.scalar
      name = f"{field.name} of {type(self).__name__}"
      object.__setattr__(self, field.name, convert(name, getattr(self, field.name)))


@pytrees.record("w_std", "b_std")
@dataclasses.dataclass(frozen=True)
class Dense(_Layer):
  """Fully connected layer; the last one of an architecture is the readout."""

  w_std: Number = SQRT2
  b_std: Number = 0.1


@pytrees.record("w_std", "b_std")
@dataclasses.dataclass(frozen=True)
class Conv(_Layer):
  """Square convolution, stride 1, zero padding that keeps the image size (SAME).

  The fan-in is size^2 * channels at every pixel, those at the border included.
  """

  size: int = 3
  w_std: Number = SQRT2
  b_std: Number = 0.1


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class Relu:
  """max(x, 0)."""


@pytrees.record("slope")
@dataclasses.dataclass(frozen=True)
class LeakyRelu(_Layer):
  """max(x, 0) + slope min(x, 0), for any finite slope; slope -1 is |x|."""

  slope: Number = 0.01


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class Erf:
  """The error function of x."""


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class Gelu:
  """x Phi(x), with Phi the normal distribution function; exact, not the tanh approximation."""


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class Identity:
  """x: a deep linear network."""


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class AvgPool(_Layer):
  """Mean over disjoint size x size windows; remaining rows and columns are dropped (VALID)."""

  size: int = 2


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class GlobalAvgPool:
  """Mean over all pixels."""


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class Flatten:
  """Reshape pixels and channels to one vector."""


# Activations by name.
ACTIVATIONS = {
  "relu": Relu(),
  "leaky_relu": LeakyRelu(),
  "erf": Erf(),
  "gelu": Gelu(),
  "identity": Identity(),
}
LAYERS = {
  layer.__name__: layer
  for layer in (Dense, Conv, *map(type, ACTIVATIONS.values()), AvgPool, GlobalAvgPool, Flatten)
}


@pytrees.record("layers")
@dataclasses.dataclass(frozen=True)
class Architecture:
  """A named sequence of layers that ends in a `Dense` readout.

  Attributes:
    name: used in messages and files; two architectures are equal if name and layers are.
    layers: tuple of layer records.

  Raises:
    ValueError: for layers that do not compose: see the messages of `_check_layers`.
  """

  name: str
  layers: tuple

  def __post_init__(self):
    object.__setattr__(self, "layers", tuple(self.layers))
    _check_layers(self.layers)

  @property
  def convolutional(self) -> bool:
    """True if inputs are NHWC images; otherwise rows are flattened first."""
    return not isinstance(self.layers[0], Flatten)

  def with_stds(self, w_std: RealLike, b_std: RealLike = 0.0) -> "Architecture":
    """The same layers with these standard deviations of weights (times 1/sqrt(fan_in)) and biases.

    Example:
      >>> kipcore.fc(1).with_stds(1.0) == kipcore.fc(1, w_std=1.0, b_std=0.0)
      True
    """
    w_std, b_std = _stds(w_std, b_std)
    change = lambda layer: (
      dataclasses.replace(layer, w_std=w_std, b_std=b_std)
      if isinstance(layer, Dense | Conv)
      else layer
    )
    return Architecture(self.name, tuple(map(change, self.layers)))

  def to_json(self) -> str:
    """The description as JSON text, for artifacts; `Architecture.from_json` inverts it."""
    number = lambda value: value if isinstance(value, int) else float(value)
    layers = [
      {
        "layer": type(layer).__name__,
        **{name: number(value) for name, value in dataclasses.asdict(layer).items()},
      }
      for layer in self.layers
    ]
    return json.dumps({"name": self.name, "layers": layers})

  @classmethod
  def from_json(cls, text: str) -> "Architecture":
    """The architecture that `to_json` wrote; ValueError for anything else."""
    try:
      raw = json.loads(text)
      layers = []
      if len(raw["layers"]) > _MAX_LAYERS:
        raise ValueError(f"expected at most {_MAX_LAYERS} layers, got {len(raw['layers'])}")
      for record in raw["layers"]:
        if not isinstance(record, dict):
          raise TypeError(f"expected layers that are objects, got a {type(record).__name__}")
        record = dict(record)
        layers.append(LAYERS[record.pop("layer")](**record))
      return cls(str(raw["name"]), tuple(layers))
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
      raise ValueError(
        f"expected the JSON of an architecture, got {text[:80]!r} ({error!r})"
      ) from error


def _check_layers(layers: tuple) -> None:
  unknown = [layer for layer in layers if type(layer) not in LAYERS.values()]
  if unknown:
    raise ValueError(f"layers: expected records among {', '.join(LAYERS)}; got {unknown[0]!r}")
  if not layers or not isinstance(layers[-1], Dense):
    raise ValueError("layers: expected a Dense readout as the last layer")
  reducers = [i for i, layer in enumerate(layers) if isinstance(layer, (Flatten, GlobalAvgPool))]
  if len(reducers) != 1:
    raise ValueError(f"layers: expected exactly one Flatten or GlobalAvgPool, got {len(reducers)}")
  gaussian = False
  for i, layer in enumerate(layers):
    if type(layer) in map(type, ACTIVATIONS.values()) and not gaussian:
      raise ValueError(
        f"layers: expected a Dense or Conv in front of {layer!r} at position {i}, whose inputs are not Gaussian"
      )
    gaussian = (
      isinstance(layer, (Dense, Conv))
      or gaussian
      and isinstance(layer, (AvgPool, GlobalAvgPool, Flatten))
    )
    spatial = isinstance(layer, (Conv, AvgPool))
    if spatial and i > reducers[0] or isinstance(layer, Dense) and i < reducers[0]:
      raise ValueError(
        f"layers: {layer!r} at position {i} is on the wrong side of {layers[reducers[0]]!r}"
      )
    if spatial and (layer.size < 1 or isinstance(layer, Conv) and layer.size % 2 == 0):
      raise ValueError(
        f"layers: expected an odd Conv size and a positive AvgPool size, got {layer!r}"
      )
    if isinstance(layer, LeakyRelu) and not _within(layer.slope, -_MAX_SCALE):
      raise ValueError(f"layers: expected |slope| below {_MAX_SCALE:g}, got {layer!r}")
    if isinstance(layer, (Dense, Conv)) and not (
      _within(layer.w_std, 0.0) and (_within(layer.b_std, 0.0) or layer.b_std == 0)
    ):
      raise ValueError(
        f"layers: expected w_std > 0 and b_std >= 0, both below {_MAX_SCALE:g}, got {layer!r}"
      )


def _within(value: Number, above: float) -> bool:
  """Whether above < value < _MAX_SCALE; a traced number passes."""
  return checks.is_traced(value) or bool(above < value < _MAX_SCALE)


def fc(
  depth: IntLike, w_std: RealLike = SQRT2, b_std: RealLike = 0.1, activation: str = "relu"
) -> Architecture:
  """Flatten, then `depth` x (Dense, activation), then the Dense readout: the FC networks of KIP.

  Args:
    depth: number of hidden layers, >= 1.
    w_std, b_std: standard deviations of weights (times 1/sqrt(fan_in)) and biases.
    activation: "relu", "leaky_relu" (slope 0.01), "erf", "gelu" or "identity".

  Returns:
    The architecture `fc{depth}`, with the suffix `_{activation}` if that is not ReLU.

  Example:
    >>> kipcore.fc(1, w_std=1.0, b_std=0.0).layers
    (Flatten(), Dense(w_std=1.0, b_std=0.0), Relu(), Dense(w_std=1.0, b_std=0.0))
    >>> kipcore.fc(2, activation="erf").name
    'fc2_erf'
  """
  depth, stds = checks.positive_int("depth", depth), _stds(w_std, b_std)
  hidden = (Dense(*stds), _activation(activation)) * depth
  return _named(f"fc{depth}", activation, (Flatten(), *hidden, Dense(*stds)))


def _stds(w_std: RealLike, b_std: RealLike) -> tuple[Number, Number]:
  return checks.scalar("w_std", w_std), checks.scalar("b_std", b_std)


def _activation(name: str):
  checks.one_of("activation", name, ACTIVATIONS)
  return ACTIVATIONS[name]


def _named(name: str, activation: str, layers: tuple) -> Architecture:
  return Architecture(name if activation == "relu" else f"{name}_{activation}", layers)


def conv_net(
  depth: IntLike,
  w_std: RealLike = SQRT2,
  b_std: RealLike = 0.1,
  pooling: bool = True,
  global_pooling: bool = False,
  activation: str = "relu",
) -> Architecture:
  """`depth` x (Conv 3x3, activation[, 2x2 average pool]), then Flatten or global pooling, then Dense.

  `conv_net(3)` is the "ConvNet3" of KIP and, with a norm layer, the ConvNet of most distillation
  papers; `pooling=False` is "ConvVec".

  Args:
    depth: number of blocks, >= 1.
    w_std, b_std: standard deviations of weights (times 1/sqrt(fan_in)) and biases.
    pooling: a 2x2 average pool after each activation; the image side must be >= 2^depth.
    global_pooling: end with a global average pool instead of flattening.
    activation: as for `fc`.

  Returns:
    The architecture `conv{depth}`, with suffix `_vec` without pooling, `_gap` with
    global pooling, and `_{activation}` if that is not ReLU.

  Example:
    >>> kipcore.conv_net(3, pooling=False) == kipcore.architecture("conv3_vec")
    True
    >>> kipcore.conv_net(2, global_pooling=True).layers[-2:]
    (GlobalAvgPool(), Dense(w_std=1.4142135623730951, b_std=0.1))
  """
  depth, stds = checks.positive_int("depth", depth), _stds(w_std, b_std)
  block = (Conv(3, *stds), _activation(activation)) + ((AvgPool(2),) if pooling else ())
  name = f"conv{depth}" + ("" if pooling else "_vec") + ("_gap" if global_pooling else "")
  end = GlobalAvgPool() if global_pooling else Flatten()
  return _named(name, activation, block * depth + (end, Dense(*stds)))


_MYRTLE_REPEATS = {5: (1, 1, 1), 7: (1, 2, 2), 10: (2, 3, 3)}


def myrtle(
  depth: IntLike, w_std: RealLike = SQRT2, b_std: RealLike = 0.1, activation: str = "relu"
) -> Architecture:
  """The Myrtle networks of KIP: a stem, three blocks of convolutions, global average pooling.

  The stem is one (Conv 3x3, activation). The three blocks repeat it [1, 1, 1], [1, 2, 2] or
  [2, 3, 3] times for depth 5, 7 or 10; a 2x2 average pool follows the first and the second block.

  Args:
    depth: 5, 7 or 10.
    w_std, b_std: standard deviations of weights (times 1/sqrt(fan_in)) and biases.
    activation: as for `fc`.

  Returns:
    The architecture `myrtle{depth}`, with the suffix `_{activation}` if that is not ReLU.
  """
  depth, stds = checks.integer("depth", depth), _stds(w_std, b_std)
  checks.one_of("depth", depth, _MYRTLE_REPEATS)
  unit = (Conv(3, *stds), _activation(activation))
  first, second, third = (unit * r for r in _MYRTLE_REPEATS[depth])
  layers = unit + first + (AvgPool(2),) + second + (AvgPool(2),) + third
  return _named(f"myrtle{depth}", activation, (*layers, GlobalAvgPool(), Dense(*stds)))


def architecture(name: str) -> Architecture:
  """The architecture with a given name: `fcN`, `convN`, `convN_vec`, `convN_gap`, `convN_vec_gap`, `myrtle5|7|10`.

  Args:
    name: e.g. "fc1", "conv3" (3 x conv 3x3, ReLU, 2x2 average pool; flatten; dense); with the suffix
      `_leaky_relu` (slope 0.01), `_erf`, `_gelu` or `_identity` for another activation.

  Returns:
    The architecture with w_std = sqrt(2) and b_std = 0.1.

  Raises:
    ValueError: for a name of another form.

  Example:
    >>> arch = kipcore.architecture("fc3_gelu")
    >>> arch == kipcore.fc(3, activation="gelu")
    True
    >>> kipcore.Architecture.from_json(arch.to_json()) == arch
    True
  """
  match = re.fullmatch(
    rf"(fc|conv|myrtle)([1-9]\d?)(_vec)?(_gap)?(?:_({'|'.join(ACTIVATIONS)}))?", name
  )
  if match:
    kind, depth, vec, gap, activation = (
      match[1],
      int(match[2]),
      match[3],
      match[4],
      match[5] or "relu",
    )
    if kind == "conv":
      return conv_net(depth, pooling=not vec, global_pooling=bool(gap), activation=activation)
    if kind == "fc" and not vec and not gap:
      return fc(depth, activation=activation)
    if kind == "myrtle" and depth in _MYRTLE_REPEATS and not vec and not gap:
      return myrtle(depth, activation=activation)
  raise ValueError(
    f"architecture: expected fc1, fc2, ..., conv1, conv2, ... (with _vec: no pooling, _gap: global average "
    f"pooling at the end), myrtle5, myrtle7 or myrtle10, all with an activation at the end if not ReLU "
    f"(_leaky_relu, _erf, _gelu, _identity); got {name!r}"
  )
