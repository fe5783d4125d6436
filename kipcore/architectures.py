"""One description of a network, which the kernel, stax and Flax rooms each realise.

A description is a tuple of layer records: hashable, comparable, printable. Widths
are not part of it, because a kernel is the limit of infinite width; a finite
realisation chooses one (`networks.py`).

Every weight is drawn as N(0, w_std^2 / fan_in) and every bias as N(0, b_std^2) (the
"NTK" parameterisation keeps unit normals and multiplies, which changes the NTK and
not the function at initialisation). Published KIP uses w_std = sqrt(2), b_std = 0.1
in every layer, the readout included.
"""

import dataclasses
import json
import math
import re

from kipcore import checks

SQRT2 = math.sqrt(2.0)


@dataclasses.dataclass(frozen=True)
class Dense:
  """Fully connected layer; the last one of an architecture is the readout."""

  w_std: float = SQRT2
  b_std: float = 0.1


@dataclasses.dataclass(frozen=True)
class Conv:
  """Square convolution, stride 1, zero padding that keeps the image size (SAME).

  The fan-in is size^2 * channels at every pixel, those at the border included.
  """

  size: int = 3
  w_std: float = SQRT2
  b_std: float = 0.1


@dataclasses.dataclass(frozen=True)
class Relu:
  """max(x, 0)."""


@dataclasses.dataclass(frozen=True)
class AvgPool:
  """Mean over disjoint size x size windows; rows and columns left over are dropped (VALID)."""

  size: int = 2


@dataclasses.dataclass(frozen=True)
class GlobalAvgPool:
  """Mean over all pixels."""


@dataclasses.dataclass(frozen=True)
class Flatten:
  """Pixels and channels into one vector."""


LAYERS = {layer.__name__: layer for layer in (Dense, Conv, Relu, AvgPool, GlobalAvgPool, Flatten)}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A named sequence of layers that ends in a `Dense` readout.

  Attributes:
    name: for people and files; two architectures are equal if name and layers are.
    layers: tuple of layer records.

  Raises:
    ValueError: for layers that do not compose (see `_check_layers`).
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

  def to_json(self) -> str:
    """The description as JSON text, for artefacts; `Architecture.from_json` inverts it."""
    layers = [{"layer": type(layer).__name__, **dataclasses.asdict(layer)} for layer in self.layers]
    return json.dumps({"name": self.name, "layers": layers})

  @classmethod
  def from_json(cls, text: str) -> "Architecture":
    """The architecture that `to_json` wrote; ValueError for anything else."""
    try:
      raw = json.loads(text)
      layers = []
      for record in raw["layers"]:
        record = dict(record)
        layers.append(LAYERS[record.pop("layer")](**record))
      return cls(str(raw["name"]), tuple(layers))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
      raise ValueError(f"expected the JSON of an architecture, got {text[:80]!r} ({error!r})") from error


def _check_layers(layers: tuple) -> None:
  unknown = [layer for layer in layers if type(layer) not in LAYERS.values()]
  if unknown:
    raise ValueError(f"layers: expected records among {', '.join(LAYERS)}; got {unknown[0]!r}")
  if not layers or not isinstance(layers[-1], Dense):
    raise ValueError("layers: expected a Dense readout as the last layer")
  reducers = [i for i, layer in enumerate(layers) if isinstance(layer, (Flatten, GlobalAvgPool))]
  if len(reducers) != 1:
    raise ValueError(f"layers: expected exactly one Flatten or GlobalAvgPool, got {len(reducers)}")
  for i, layer in enumerate(layers):
    spatial = isinstance(layer, (Conv, AvgPool))
    if spatial and i > reducers[0] or isinstance(layer, Dense) and i < reducers[0]:
      raise ValueError(f"layers: {layer!r} at position {i} is on the wrong side of {layers[reducers[0]]!r}")
    if isinstance(layer, (Conv, AvgPool)) and layer.size < 1 or isinstance(layer, Conv) and layer.size % 2 == 0:
      raise ValueError(f"layers: expected an odd Conv size and a positive AvgPool size, got {layer!r}")
    if isinstance(layer, (Dense, Conv)) and not (layer.w_std > 0 and layer.b_std >= 0):
      raise ValueError(f"layers: expected w_std > 0 and b_std >= 0, got {layer!r}")


def fc(depth: int, w_std: float = SQRT2, b_std: float = 0.1) -> Architecture:
  """Flatten, then `depth` x (Dense, ReLU), then the Dense readout: the FC networks of KIP.

  Args:
    depth: number of hidden layers, >= 1.
    w_std, b_std: standard deviations of weights (times 1/sqrt(fan_in)) and biases.

  Returns:
    The architecture `fc{depth}`.
  """
  checks.positive_int("depth", depth)
  hidden = (Dense(w_std, b_std), Relu()) * depth
  return Architecture(f"fc{depth}", (Flatten(), *hidden, Dense(w_std, b_std)))


def conv_net(depth: int, w_std: float = SQRT2, b_std: float = 0.1, pooling: bool = True,
             global_pooling: bool = False) -> Architecture:
  """`depth` x (Conv 3x3, ReLU[, 2x2 average pool]), then Flatten or global pooling, then Dense.

  `conv_net(3)` is the "ConvNet3" of KIP and the ConvNet of most of the field (there
  with a norm layer); `pooling=False` is "ConvVec".

  Args:
    depth: number of blocks, >= 1.
    w_std, b_std: standard deviations of weights (times 1/sqrt(fan_in)) and biases.
    pooling: a 2x2 average pool after each ReLU; the image side must be >= 2^depth.
    global_pooling: end with a global average pool instead of flattening.

  Returns:
    The architecture `conv{depth}`, with suffix `_vec` without pooling and `_gap` with
    global pooling.
  """
  checks.positive_int("depth", depth)
  block = (Conv(3, w_std, b_std), Relu()) + ((AvgPool(2),) if pooling else ())
  name = f"conv{depth}" + ("" if pooling else "_vec") + ("_gap" if global_pooling else "")
  end = GlobalAvgPool() if global_pooling else Flatten()
  return Architecture(name, block * depth + (end, Dense(w_std, b_std)))


def myrtle(depth: int, w_std: float = SQRT2, b_std: float = 0.1) -> Architecture:
  """The Myrtle networks of KIP: a stem, three blocks of convolutions, global average pooling.

  Conv-ReLU is repeated [1, 1, 1], [1, 2, 2] or [2, 3, 3] times in the blocks of depth
  5, 7 or 10, after one stem Conv-ReLU; a 2x2 average pool follows blocks 1 and 2.

  Args:
    depth: 5, 7 or 10.
    w_std, b_std: standard deviations of weights (times 1/sqrt(fan_in)) and biases.

  Returns:
    The architecture `myrtle{depth}`.
  """
  repeats = {5: (1, 1, 1), 7: (1, 2, 2), 10: (2, 3, 3)}
  checks.one_of("depth", depth, repeats)
  unit = (Conv(3, w_std, b_std), Relu())
  first, second, third = (unit * r for r in repeats[depth])
  layers = unit + first + (AvgPool(2),) + second + (AvgPool(2),) + third
  return Architecture(f"myrtle{depth}", (*layers, GlobalAvgPool(), Dense(w_std, b_std)))


def architecture(name: str) -> Architecture:
  """The architecture of a name: `fcN`, `convN`, `convN_vec`, `convN_gap`, `convN_vec_gap`, `myrtle5|7|10`.

  Args:
    name: e.g. "fc1", "conv3" (3 x conv 3x3, ReLU, 2x2 average pool; flatten; dense).

  Returns:
    The architecture with w_std = sqrt(2) and b_std = 0.1.

  Raises:
    ValueError: for a name of another form.
  """
  if match := re.fullmatch(r"fc([1-9]\d?)", name):
    return fc(int(match[1]))
  if match := re.fullmatch(r"conv([1-9]\d?)(_vec)?(_gap)?", name):
    return conv_net(int(match[1]), pooling=not match[2], global_pooling=bool(match[3]))
  if match := re.fullmatch(r"myrtle(5|7|10)", name):
    return myrtle(int(match[1]))
  raise ValueError(
      f"architecture: expected fc1, fc2, ..., conv1, conv2, ... (with _vec: no pooling, _gap: global average "
      f"pooling at the end), myrtle5, myrtle7 or myrtle10; got {name!r}")
