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
from collections.abc import Iterator
from typing import Any, NamedTuple

from kipcore import checks, pytrees
from kipcore.types import IntLike, Number, RealLike

SQRT2 = math.sqrt(2.0)
_MAX_LAYERS = 1000  # in a file
_MAX_SCALE = 1e6
PADDINGS = ("SAME", "VALID", "CIRCULAR")
_NOT_GAUSSIAN, _OUTER, _INNER = range(3)  # see `_check_sequence`


class Window(NamedTuple):
  """The square windows of a convolution or pooling: those of neural-tangents, with equal sides.

  Attributes:
    size: pixels along each side.
    stride: pixels between neighboring windows.
    padding: "SAME" (with zeros) or "CIRCULAR" (with the opposite side of the image): one window for every
      `stride` pixels, with the odd pixel of padding after the image; "VALID": windows within the image only.
  """

  size: int
  stride: int
  padding: str

  def count(self, n: int) -> int:
    """The number of windows along n pixels, 0 if none fits."""
    if self.padding == "VALID":
      return max(0, (n - self.size) // self.stride + 1)
    return -(-n // self.stride)

  def pads(self, n: int) -> tuple[int, int]:
    """Pixels of padding before and after n pixels."""
    if self.padding == "VALID":
      return 0, 0
    total = max(0, (self.count(n) - 1) * self.stride + self.size - n)
    return total // 2, total - total // 2


class _Layer:
  """Converts the numbers of a layer record to Python numbers, so that it is hashable and JSON."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name = f"{field.name} of {type(self).__name__}"
      value = getattr(self, field.name)
      if field.name == "padding":
        checks.one_of(name, value, PADDINGS)
      else:
        convert = checks.integer if field.name in ("size", "stride") else checks.scalar
        object.__setattr__(self, field.name, convert(name, value))


class _Windows(_Layer):
  """A layer on the windows of an image."""

  size: int
  stride: Any
  padding: str

  @property
  def window(self) -> Window:
    return Window(self.size, self.stride, self.padding)


class _Pool(_Windows):
  """A pooling layer: windows are disjoint if no stride is given."""

  def __post_init__(self):
    if self.stride is None:
      object.__setattr__(self, "stride", self.size)
    super().__post_init__()

  @property
  def disjoint(self) -> bool:
    """Whether the windows are a partition of the image, up to remaining rows and columns."""
    return self.stride == self.size and self.padding == "VALID"


@pytrees.record("w_std", "b_std")
@dataclasses.dataclass(frozen=True)
class Dense(_Layer):
  """Fully connected layer; the last one of an architecture is the readout."""

  w_std: Number = SQRT2
  b_std: Number = 0.1


@pytrees.record("w_std", "b_std")
@dataclasses.dataclass(frozen=True)
class Conv(_Windows):
  """Square convolution; by default of stride 1 with zero padding that keeps the image size.

  The fan-in is size^2 * channels at every pixel, those at the border included. Paddings are those of
  neural-tangents: "SAME", "VALID" or "CIRCULAR", see `Window`.
  """

  size: int = 3
  w_std: Number = SQRT2
  b_std: Number = 0.1
  stride: int = 1
  padding: str = "SAME"


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
class AvgPool(_Pool):
  """Mean over size x size windows; by default disjoint ones, and remaining rows and columns are dropped.

  With padding "SAME" the zeros count as pixels, as in neural-tangents (`normalize_edges=False`).
  """

  size: int = 2
  stride: int | None = None
  padding: str = "VALID"


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class SumPool(_Pool):
  """Sum over size x size windows; see `AvgPool`."""

  size: int = 2
  stride: int | None = None
  padding: str = "VALID"


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class GlobalAvgPool:
  """Mean over all pixels."""


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class GlobalSumPool:
  """Sum over all pixels."""


@pytrees.record()
@dataclasses.dataclass(frozen=True)
class Flatten:
  """Reshape pixels and channels to one vector."""


@pytrees.record("branch", "shortcut")
@dataclasses.dataclass(frozen=True)
class Residual:
  """branch(x) + shortcut(x), a residual block.

  At infinite width, the outputs of the two are independent Gaussians, whose covariances and tangent kernels
  add up. Therefore the last activation of the branch must be followed by a `Dense` or `Conv` in it, and so
  must that of the shortcut, or, for the identity, that in front of the block: the activations of a block
  come before its convolutions. A finite network needs equally many channels in both.

  Attributes:
    branch: layers, which may include residual blocks.
    shortcut: the layers of a projection, such as `(Conv(1, stride=2),)`; empty for the identity.

  Example:
    >>> from kipcore.architectures import Architecture, Conv, Dense, GlobalAvgPool, Relu, Residual
    >>> def block(stride, *shortcut):
    ...   return Residual((Relu(), Conv(3, stride=stride), Relu(), Conv(3)), shortcut)
    >>> layers = (Conv(3), block(1), block(2, Conv(1, stride=2)), Relu(), GlobalAvgPool(), Dense())
    >>> kipcore.ntk_fn(Architecture("residual", layers)).diag(jnp.ones((2, 6, 6, 3))).shape
    (2,)

  References:
    He et al. (ECCV 2016), Identity mappings in deep residual networks.
  """

  branch: tuple
  shortcut: tuple = ()

  def __post_init__(self):
    for name in ("branch", "shortcut"):
      layers = getattr(self, name)
      if not isinstance(layers, (tuple, list)):
        raise TypeError(
          f"{name} of Residual: expected a tuple of layers, got a {type(layers).__name__}"
        )
      object.__setattr__(self, name, tuple(layers))


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
  for layer in (
    Dense,
    Conv,
    *map(type, ACTIVATIONS.values()),
    AvgPool,
    SumPool,
    GlobalAvgPool,
    GlobalSumPool,
    Flatten,
    Residual,
  )
}
REDUCERS = (Flatten, GlobalAvgPool, GlobalSumPool)  # from pixels to one vector


def nested(layers: tuple) -> Iterator:
  """All layers, those inside residual blocks included."""
  for layer in layers:
    yield layer
    if isinstance(layer, Residual):
      yield from nested(layer.branch + layer.shortcut)


def image_size(layers: tuple, size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns after the layers, of images with these; 0 if they are too small.

  Raises:
    ValueError: for a residual block whose branch and shortcut give images of different sizes.
  """
  for layer in layers:
    if isinstance(layer, Residual):
      branch, shortcut = (image_size(path, size) for path in (layer.branch, layer.shortcut))
      if branch != shortcut:
        raise ValueError(
          f"layers: expected a branch and a shortcut with equal image sizes, got {branch} and {shortcut} "
          f"for {layer!r}"
        )
      size = branch
    elif isinstance(layer, _Windows):
      size = layer.window.count(size[0]), layer.window.count(size[1])
  return size


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

    def change(layer):
      if isinstance(layer, Residual):
        return Residual(tuple(map(change, layer.branch)), tuple(map(change, layer.shortcut)))
      if isinstance(layer, Dense | Conv):
        return dataclasses.replace(layer, w_std=w_std, b_std=b_std)
      return layer

    return Architecture(self.name, tuple(map(change, self.layers)))

  def check_images(self, name: str, x) -> None:
    """Raise ValueError unless `x` is NHWC images, and large enough for the layers."""
    if x.ndim != 4:
      raise ValueError(f"{name}: expected NHWC images for {self.name}, got shape {x.shape}")
    if min(image_size(self.layers, x.shape[1:3])) < 1:
      raise ValueError(
        f"{name}: expected larger images, got shape {x.shape[1:]}, too small for the pooling and "
        f"convolutions of {self.name}"
      )

  def to_json(self) -> str:
    """The description as JSON text, for artifacts; `Architecture.from_json` inverts it."""
    return json.dumps({"name": self.name, "layers": _to_objects(self.layers)})

  @classmethod
  def from_json(cls, text: str) -> "Architecture":
    """The architecture that `to_json` wrote; ValueError for anything else."""
    try:
      raw = json.loads(text)
      return cls(str(raw["name"]), _from_objects(raw["layers"]))
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
      raise ValueError(
        f"expected the JSON of an architecture, got {text[:80]!r} ({error!r})"
      ) from error


def _to_objects(layers: tuple) -> list[dict]:
  """Layers as JSON objects; strides and paddings are left out at their defaults."""
  objects = []
  for layer in layers:
    found: dict = {"layer": type(layer).__name__}
    for field in dataclasses.fields(layer):
      value = getattr(layer, field.name)
      if isinstance(layer, Residual):
        found[field.name] = _to_objects(value)
      elif field.name not in ("stride", "padding"):
        found[field.name] = value if isinstance(value, int) else float(value)
      elif value != getattr(type(layer)(layer.size), field.name):
        found[field.name] = value
    objects.append(found)
  return objects


def _from_objects(objects: list) -> tuple:
  """The inverse of `_to_objects`."""
  layers: list = []
  if len(objects) > _MAX_LAYERS:
    raise ValueError(f"expected at most {_MAX_LAYERS} layers, got {len(objects)}")
  for record in objects:
    if not isinstance(record, dict):
      raise TypeError(f"expected layers that are objects, got a {type(record).__name__}")
    record = dict(record)
    layer = LAYERS[record.pop("layer")]
    if layer is Residual:
      record = {name: _from_objects(value) for name, value in record.items()}
    layers.append(layer(**record))
  return tuple(layers)


def _check_layers(layers: tuple) -> None:
  unknown = [layer for layer in nested(layers) if type(layer) not in LAYERS.values()]
  if unknown:
    raise ValueError(f"layers: expected records among {', '.join(LAYERS)}; got {unknown[0]!r}")
  if not layers or not isinstance(layers[-1], Dense):
    raise ValueError("layers: expected a Dense readout as the last layer")
  reducers = [i for i, layer in enumerate(layers) if isinstance(layer, REDUCERS)]
  if len(reducers) != 1:
    raise ValueError(
      f"layers: expected exactly one Flatten, GlobalAvgPool or GlobalSumPool, got {len(reducers)}"
    )
  (end,) = reducers
  gaussian = _check_sequence(layers[:end], 0, layers[end], True, _NOT_GAUSSIAN)
  _check_sequence(layers[end + 1 :], end + 1, layers[end], False, gaussian)


def _check_sequence(layers: tuple, start: int, reducer, spatial: bool, gaussian: int) -> int:
  """Check layers that follow one another on one side of the reducer.

  Args:
    layers: the layers; those of a branch or shortcut are a sequence of their own.
    start: position of the first one, for messages.
    reducer: Flatten or a global pooling.
    spatial: whether the layers are in front of it.
    gaussian: whether the inputs are Gaussian: `_NOT_GAUSSIAN`, `_OUTER` by weights in front of the innermost
      branch that contains the layers, `_INNER` by weights in it.

  Returns:
    Whether the outputs are.
  """
  for i, layer in enumerate(layers, start):
    place = f"{layer!r} at position {i}"
    if type(layer) in map(type, ACTIVATIONS.values()):
      if not gaussian:
        raise ValueError(
          f"layers: expected a Dense or Conv in front of {place}, whose inputs are not Gaussian"
        )
      gaussian = gaussian if isinstance(layer, Identity) else _NOT_GAUSSIAN
    elif isinstance(layer, (Dense, Conv)):
      gaussian = _INNER
    elif isinstance(layer, Residual):
      branch = _check_sequence(layer.branch, 0, reducer, spatial, min(gaussian, _OUTER))
      if branch != _INNER:
        raise ValueError(
          f"layers: expected a branch whose last activation is followed by a Dense or Conv in it, got {place}"
        )
      gaussian = _check_sequence(layer.shortcut, 0, reducer, spatial, gaussian)
      if not gaussian:
        raise ValueError(
          f"layers: expected a shortcut with Gaussian outputs, those of a Dense or Conv, got {place}"
        )
    elif isinstance(layer, REDUCERS):
      raise ValueError(f"layers: expected {place} outside of residual blocks")
    if isinstance(layer, _Windows) and not spatial or isinstance(layer, Dense) and spatial:
      raise ValueError(f"layers: {place} is on the wrong side of {reducer!r}")
    if isinstance(layer, _Windows) and (layer.size < 1 or layer.stride < 1):
      raise ValueError(f"layers: expected a size and a stride >= 1, got {layer!r}")
    if isinstance(layer, LeakyRelu) and not _within(layer.slope, -_MAX_SCALE):
      raise ValueError(f"layers: expected |slope| below {_MAX_SCALE:g}, got {layer!r}")
    if isinstance(layer, (Dense, Conv)) and not (
      _within(layer.w_std, 0.0) and (_within(layer.b_std, 0.0) or layer.b_std == 0)
    ):
      raise ValueError(
        f"layers: expected w_std > 0 and b_std >= 0, both below {_MAX_SCALE:g}, got {layer!r}"
      )
  return gaussian


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
