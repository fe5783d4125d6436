"""Random architectures of all layers, and the errors of their kernels against neural-tangents.

`python tests/random_architectures.py 200` prints the largest relative errors of 200 architectures, in float64.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from kernel_reference import neural_tangents_kernel, value_and_gradient

from kipcore.architectures import (
  PADDINGS,
  REDUCERS,
  Architecture,
  AvgPool,
  Conv,
  Dense,
  Erf,
  Gelu,
  LeakyRelu,
  Relu,
  Residual,
  SumPool,
  image_size,
)
from kipcore.kernels import NetworkKernel

ACTIVATIONS = (Relu, LeakyRelu, Erf, Gelu)


def architecture(rng: np.random.Generator) -> tuple[Architecture, tuple[int, int]]:
  """An architecture with at least one residual block, and the size of images for it."""
  size = tuple(int(n) for n in rng.integers(5, 9, 2))
  # A residual block on the images themselves has a projection as shortcut.
  layers = [] if rng.random() < 0.2 else [fitting(rng, conv, (), size)]
  nesting = int(rng.integers(1, 3))
  for kind in rng.permutation(["residual", *rng.choice(["conv", "pool", "residual"], 1)]):
    extend(rng, kind, layers, size, nesting)
  layers.append(REDUCERS[rng.integers(3)]())
  if rng.random() < 0.3:
    block = Residual((activation(rng), Dense(*stds(rng))), (Dense(*stds(rng)),) * rng.integers(2))
    layers += [Dense(*stds(rng)), block, activation(rng)]
  return Architecture("random", (*layers, Dense(*stds(rng)))), size


def extend(rng, kind: str, layers: list, size: tuple, nesting: int) -> None:
  """Append a residual block, a pooling, or a convolution after an activation, to layers on images of a size."""
  gaussian = any(isinstance(layer, (Conv, Residual)) for layer in layers)
  if kind == "residual":
    layers.append(residual(rng, image_size(tuple(layers), size), gaussian, nesting - 1))
  elif kind == "pool":
    layers.append(fitting(rng, pool, layers, size))
  else:
    layers += [activation(rng)] * gaussian + [fitting(rng, conv, layers, size)]


def residual(rng, size: tuple, gaussian: bool, nesting: int) -> Residual:
  """A block; its shortcut is the identity if the size and the inputs allow it, or a projection."""
  branch: list = [activation(rng)] * gaussian + [fitting(rng, conv, (), size)]
  if rng.random() < 0.5:
    extend(rng, "residual" if nesting else rng.choice(["conv", "pool"]), branch, size, nesting)
  after = image_size(tuple(branch), size)
  if after == size and gaussian and rng.random() < 0.7:
    return Residual(tuple(branch))
  for _ in range(100):
    shortcut = (activation(rng),) * (gaussian and rng.integers(2)) + (conv(rng),)
    if image_size(shortcut, size) == after:
      return Residual(tuple(branch), shortcut)
  return residual(rng, size, gaussian, nesting)


def fitting(rng, make, layers, size: tuple):
  """A layer that leaves at least 2 x 2 pixels."""
  while True:
    layer = make(rng)
    if min(image_size((*layers, layer), size)) >= 2:
      return layer


def conv(rng) -> Conv:
  stride = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
  return Conv(int(rng.integers(1, 6)), *stds(rng), stride, str(rng.choice(PADDINGS)))


def pool(rng) -> AvgPool | SumPool:
  layer = (AvgPool, SumPool)[rng.integers(2)]
  if rng.random() < 0.5:
    return layer(int(rng.integers(1, 4)))
  return layer(int(rng.integers(1, 4)), int(rng.integers(1, 4)), str(rng.choice(PADDINGS)))


def activation(rng):
  kind = ACTIVATIONS[rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])]
  return kind(float(rng.uniform(-1, 1))) if kind is LeakyRelu else kind()


def stds(rng) -> tuple[float, float]:
  return float(rng.uniform(0.7, 1.6)), float(rng.choice([0.0, 0.1, 0.5]))


def errors(seed: int) -> tuple[float, float]:
  """Relative errors of value and gradient of one kernel; the seed chooses NTK or NNGP, and one or two sets."""
  rng = np.random.default_rng(seed)
  arch, size = architecture(rng)
  x1, x2 = rng.normal(size=(2, *size, 2)), rng.normal(size=(1, *size, 2))
  get, other = ("ntk", "ntk", "nngp")[seed % 3], (x2, None)[seed % 2]
  x1 = x1 if other is None else x1[:1]
  expected = neural_tangents_kernel(arch, get, x1, other)
  other = None if other is None else jnp.asarray(other)
  found = value_and_gradient(NetworkKernel(arch, get), jnp.asarray(x1), other)
  value, gradient = (
    float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
    for a, b in zip(found, expected, strict=True)
  )
  return value, gradient


def main(count: int) -> None:
  jax.config.update("jax_enable_x64", True)
  worst = np.zeros(2)
  for seed in range(count):
    error = errors(seed)
    worst = np.maximum(worst, error)
    print(f"{seed}: value {error[0]:.1e}, gradient {error[1]:.1e}", flush=True)
    if seed % 20 == 19:
      jax.clear_caches()
  print(f"largest of {count}: value {worst[0]:.1e}, gradient {worst[1]:.1e}")


if __name__ == "__main__":
  main(int(sys.argv[1]))
