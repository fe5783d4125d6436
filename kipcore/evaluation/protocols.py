"""Protocols: how a network is trained on a set before it is scored.

The accuracy of a set depends on the protocol as much as on the set, so results name it. `PROTOCOLS` holds those under
which published figures were measured; a `Protocol` of one's own is as good.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from kipcore import augment, checks
from kipcore.networks import NORMS
from kipcore.types import Array, ArrayLike, Flag, Integer, Real

LOSSES = ("squared_error", "cross_entropy", "soft_cross_entropy")
SCHEDULES = ("constant", "cosine", "step")
OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class Protocol:
  """The training of a network on a support.

  Attributes:
    name: named in results.
    loss: "squared_error" to the labels as they are; "cross_entropy" with the class of a label, its largest entry;
      "soft_cross_entropy" with the distribution `label_distribution` of a label.
    optimizer: "adam", "adamw" or "sgd" (with momentum).
    learning_rate: peak rate.
    schedule: "constant"; "cosine" decay to `final_fraction` of the rate; "step", a tenth of it from halfway on.
    warmup_steps: of a linear warm-up from 0, at most half of all steps.
    final_fraction: of the rate, at the end of "cosine".
    steps: pairs (size, steps): the steps for supports of at most that size; the last pair also for larger ones.
    epochs: passes over the support instead of `steps`; 0 for `steps`.
    batch_size: rows per step; all rows if there are fewer.
    momentum: of "sgd".
    weight_decay: of "sgd" (added to the gradient) and "adamw" (decoupled).
    augmentation: names of `augment.random_augmentation` joined with "_"; one random transform per step. "" for none.
    cutmix: whether a rectangle of each image comes from another row, and its label in proportion.
    temperature: the outputs are divided by it in "soft_cross_entropy".
    ema: decay per step of the moving average of the parameters, which is scored; 0 for the last parameters.
    norm: "none", "instance" or "batch", after each convolution.
    width_growth: factor of the width at each pooling.
    w_std: standard deviation of initial weights, times 1/sqrt(fan_in), in every layer, with biases that start at 0; None
      for the standard deviations of the architecture.
    subtract_initial: whether predictions are outputs minus those at initialization.
  """

  name: str
  loss: str = "squared_error"
  optimizer: str = "adam"
  learning_rate: Real = 1e-3
  schedule: str = "cosine"
  warmup_steps: Integer = 0
  final_fraction: Real = 0.0
  steps: tuple[tuple[int, int], ...] = ((1, 1000),)
  epochs: Integer = 0
  batch_size: Integer = 256
  momentum: Real = 0.9
  weight_decay: Real = 0.0
  augmentation: str = ""
  cutmix: Flag = False
  temperature: Real = 1.0
  ema: Real = 0.0
  norm: str = "none"
  width_growth: Integer = 1
  w_std: Real | None = None
  subtract_initial: Flag = False

  def __post_init__(self):
    assign = lambda name, value: object.__setattr__(self, name, value)
    checks.one_of("loss", self.loss, LOSSES)
    checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
    checks.one_of("schedule", self.schedule, SCHEDULES)
    checks.one_of("norm", self.norm, NORMS)
    augment.random_augmentation(self.augmentation)
    for name in ("learning_rate", "temperature", "w_std"):
      if name != "w_std" or self.w_std is not None:
        assign(name, checks.number(name, getattr(self, name), 0, above=True))
    for name, high in (("final_fraction", 1), ("momentum", 1), ("ema", 1), ("weight_decay", 1e3)):
      assign(name, checks.number(name, getattr(self, name), 0, high))
    for name in ("batch_size", "width_growth"):
      assign(name, checks.positive_int(name, getattr(self, name)))
    for name in ("epochs", "warmup_steps"):
      assign(name, checks.integer(name, getattr(self, name), 0))
    assign("steps", tuple(tuple(checks.positive_ints(size=m, steps=n)) for m, n in self.steps))
    if not self.steps:
      raise ValueError("steps: expected at least one pair (size, steps), got none")
    for name in ("cutmix", "subtract_initial"):
      assign(name, checks.flag(name, getattr(self, name)))

  def num_steps(self, size: int) -> int:
    """The optimizer steps for a support of that many rows."""
    if self.epochs:
      return self.epochs * -(-size // self.batch_size)
    return next((steps for limit, steps in self.steps if size <= limit), self.steps[-1][1])

  def transformation(self, num_steps: int, learning_rate=None) -> optax.GradientTransformation:
    """The optimizer with its schedule for that many steps; `learning_rate` replaces the peak rate, and may be traced."""
    peak = self.learning_rate if learning_rate is None else learning_rate
    warmup = min(self.warmup_steps, num_steps // 2)
    length = max(num_steps - warmup, 1)
    if self.schedule == "cosine":
      rate = optax.cosine_decay_schedule(peak, length, self.final_fraction)
    elif self.schedule == "step":
      rate = optax.piecewise_constant_schedule(peak, {length // 2: 0.1})
    else:
      rate = optax.constant_schedule(peak)
    if warmup:
      rate = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rate], [warmup])
    if self.optimizer == "adam":
      return optax.adam(rate)
    if self.optimizer == "adamw":
      return optax.adamw(rate, weight_decay=self.weight_decay)
    decay = [optax.add_decayed_weights(self.weight_decay)] if self.weight_decay else []
    return optax.chain(*decay, optax.sgd(rate, momentum=self.momentum or None))

  def row_losses(self, outputs: Float[Array, "n c"], y: Float[Array, "n c"]) -> Float[Array, " n"]:
    """The loss of each row."""
    if self.loss == "squared_error":
      return jnp.mean((outputs - y) ** 2, axis=1)
    if self.loss == "cross_entropy":
      return optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.argmax(y, axis=1))
    return optax.softmax_cross_entropy(outputs / self.temperature, label_distribution(y))


def label_distribution(y: Float[ArrayLike, "n c"]) -> Float[Array, "n c"]:
  """Labels as distributions over classes: max(y + 1/c, 0), normalized; exact for centered distributions p - 1/c.

  Args:
    y: `(n, c)` labels.

  Returns:
    `(n, c)`, each row sums to 1. Rows without a positive entry become uniform.
  """
  return _label_distribution(jnp.asarray(y))


@jax.jit
def _label_distribution(y):
  positive = jnp.maximum(y + 1 / y.shape[1], 0)
  total = jnp.sum(positive, axis=1, keepdims=True)
  return jnp.where(total > 0, positive / jnp.where(total > 0, total, 1), 1 / y.shape[1])


def cutmix(
  key: Array, x: Float[Array, "n h w c"], y: Float[Array, "n q"]
) -> tuple[Float[Array, "n h w c"], Float[Array, "n q"]]:
  """Images with a rectangle of another row each, and labels mixed by area.

  The area fraction of the rectangle is uniform on [0, 1] before it is cut off at the border, and the rectangle is the
  same for all rows.

  Args:
    key: random key.
    x: images.
    y: labels.

  Returns:
    Mixed images and labels.

  References:
    Yun et al. (ICCV 2019), CutMix, algorithm 1 with alpha = 1.
  """
  checks.rank("x", x, 4)
  key_order, key_area, key_center = jax.random.split(key, 3)
  order = jax.random.permutation(key_order, x.shape[0])
  side = jnp.sqrt(jax.random.uniform(key_area, (), x.dtype))
  center = jax.random.uniform(key_center, (2,), x.dtype)
  inside = []
  for i, length in enumerate(x.shape[1:3]):
    position = (jnp.arange(length, dtype=x.dtype) + 0.5) / length
    inside.append(jnp.abs(position - center[i]) < side / 2)
  hole = inside[0][:, None] & inside[1][None, :]
  share = jnp.mean(hole.astype(y.dtype))
  mixed = jnp.where(hole[None, :, :, None], x[order], x)
  return mixed, (1 - share) * y + share * y[order]


_FREPO_STEPS = (
  (10, 1000),
  (100, 2000),
  (200, 20_000),
  (500, 5000),
  (1000, 10_000),
  (5000, 40_000),
)
# DC, DM, MTT: cross-entropy on classes, instance norm.
# The weights of PyTorch's layers are uniform with variance 1 / (3 fan_in).
_DC = Protocol(
  "dc",
  w_std=3**-0.5,
  loss="cross_entropy",
  optimizer="sgd",
  learning_rate=0.01,
  schedule="step",
  epochs=300,
  weight_decay=5e-4,
  norm="instance",
)
# The same with differentiable siamese augmentation, as DSA, DM and MTT report.
_DSA = dataclasses.replace(_DC, name="dsa", epochs=1000, augmentation=augment.DSA)
PROTOCOLS = {
  protocol.name: protocol
  for protocol in (
    # Squared error on the labels, no augmentation.
    Protocol("default", subtract_initial=True),
    # KIP papers: squared error on learned labels without augmentation; rate and length are to be tuned (`tune`).
    Protocol("kip", steps=((1, 5000),), learning_rate=4e-4, subtract_initial=True),
    # FRePo (eval.py): squared error on learned labels, one random transform per step, moving average.
    Protocol(
      "frepo",
      learning_rate=3e-4,
      warmup_steps=500,
      final_fraction=0.01,
      steps=_FREPO_STEPS,
      batch_size=500,
      augmentation="color_crop_cutout_flip_rotate",
      ema=0.995,
      width_growth=2,
      w_std=1.0,
    ),
    # RCIG (eval.py): squared error on learned labels.
    Protocol(
      "rcig",
      learning_rate=1e-4,
      warmup_steps=500,
      final_fraction=0.01,
      steps=((10, 1000), (5000, 2000)),
      batch_size=500,
      augmentation="flip",
      width_growth=2,
      w_std=1.0,
    ),
    _DC,
    _DSA,
    # Expert labels (Qin et al. 2024): cross-entropy to distributions.
    dataclasses.replace(_DSA, name="soft", loss="soft_cross_entropy", epochs=3000),
  )
}


def protocol(name_or_protocol: str | Protocol, image_channels: int | None = None) -> Protocol:
  """A protocol by name, or itself; for images of one channel, which are usually characters, without mirror images.

  Args:
    name_or_protocol: a name of `PROTOCOLS`, or a `Protocol`, which is returned unchanged.
    image_channels: channels of the images; None for other rows, which are not augmented.

  Returns:
    A `Protocol`.

  Raises:
    ValueError: for an unknown name.
  """
  if isinstance(name_or_protocol, Protocol):
    return name_or_protocol
  checks.one_of("protocol", name_or_protocol, tuple(PROTOCOLS))
  found = PROTOCOLS[name_or_protocol]
  names = found.augmentation.split("_") if image_channels else []
  if image_channels == 1:
    names = [name for name in names if name != "flip"]
  return dataclasses.replace(found, augmentation="_".join(names))
