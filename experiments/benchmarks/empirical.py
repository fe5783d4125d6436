"""Empirical tangent kernels against neural-tangents: `python -m experiments.benchmarks.empirical`.

Kernels of one Flax module on the same random images, each implementation in a process of its own, and the memory that a network of the
size of ResNet-18 needs, as XLA plans it. Writes experiments/results/benchmark_empirical.json, one job per implementation:

  seconds            the kernel matrix after compilation
  compile_seconds    the first call minus that
  peak_gb            peak private memory of the process
  entries            the first entries of the matrix, which must agree

About three minutes on two idle cores; the vector products of neural-tangents take 16 GB.
"""

import functools

from experiments.benchmarks import harness
from kipcore.cli import flags as common

harness.define_flags("empirical")

_IMAGES, _SHAPE, _WIDTH, _CLASSES = 48, (32, 32, 3), 64, 10
_BUDGET = 2**30  # bytes


def convnet():
  """ConvNet-3 of Flax layers."""
  from flax import linen as nn

  class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
      for _ in range(3):
        x = nn.avg_pool(nn.relu(nn.Conv(_WIDTH, (3, 3))(x)), (2, 2), (2, 2))
      return nn.Dense(_CLASSES)(x.reshape(x.shape[0], -1))

  return ConvNet()


def resnet18():
  """ResNet-18 for 32 x 32 images, with group norm, which treats rows independently."""
  from flax import linen as nn

  class Block(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
      conv = functools.partial(nn.Conv, self.width, use_bias=False)
      norm = functools.partial(nn.GroupNorm, num_groups=32)
      y = nn.relu(norm()(conv((3, 3), self.stride)(x)))
      y = norm()(conv((3, 3))(y))
      if x.shape != y.shape:
        x = norm()(conv((1, 1), self.stride)(x))
      return nn.relu(x + y)

  class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.GroupNorm(32)(nn.Conv(64, (3, 3), use_bias=False)(x)))
      for stage in range(4):
        for block in range(2):
          x = Block(64 * 2**stage, 2 if stage and not block else 1)(x)
      return nn.Dense(_CLASSES)(x.mean(axis=(1, 2)))

  return ResNet()


def problem(module, n: int):
  """Images and parameters."""
  import jax

  x = jax.random.normal(jax.random.key(0), (n, *_SHAPE))
  return x, module.init(jax.random.key(1), x[:1])


def measured(kernel) -> dict:
  """Times, memory and the first entries of a kernel matrix, `kernel()`."""
  import numpy as np

  with harness.private_peak() as peak:
    first, k = harness.timed(kernel)
    seconds, _ = harness.timed(kernel)
  result = {"seconds": seconds, "compile_seconds": first - seconds, "peak_gb": peak[0]}
  print(result, flush=True)
  return {**result, "entries": np.asarray(k[:3, :3], np.float64).tolist()}


def planned(data_dir, n: int) -> dict:
  """The memory plan of XLA for the kernel of a network of the size of ResNet-18, which is not computed."""
  import jax

  import kipcore

  module = resnet18()
  x, params = problem(module, n)
  kernel_fn = kipcore.empirical_ntk_fn(module.apply, params, memory_budget=_BUDGET)
  plan = jax.jit(lambda k, x: k(x)).lower(kernel_fn, x).compile().memory_analysis()
  result = {
    "scratch_gb": plan.temp_size_in_bytes / 1e9,
    "arguments_gb": plan.argument_size_in_bytes / 1e9,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "images": n,
  }
  print(result, flush=True)
  return result


def ours(data_dir, n: int) -> dict:
  """`kipcore.empirical_ntk_fn`."""
  import jax

  import kipcore

  module = convnet()
  x, params = problem(module, n)
  kernel_fn = kipcore.empirical_ntk_fn(module.apply, params, memory_budget=_BUDGET)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
  found = measured(lambda: kernel_fn(x))
  return {**found, "parameters": parameters, "images": n}


def theirs(data_dir, implementation: str, n: int) -> dict:
  """`neural_tangents.empirical_ntk_fn`."""
  import jax

  from kipcore.kernels.stax import import_neural_tangents

  nt = import_neural_tangents()
  module = convnet()
  x, params = problem(module, n)
  kernel_fn = nt.empirical_ntk_fn(
    module.apply, vmap_axes=0, implementation=nt.NtkImplementation[implementation]
  )
  jitted = jax.jit(lambda x: kernel_fn(x, None, params))
  return {**measured(lambda: jitted(x)), "images": n}


JOBS = {
  "resnet18, kipcore, plan": functools.partial(planned, n=64),
  "convnet, kipcore": functools.partial(ours, n=_IMAGES),
  **{
    f"convnet, neural-tangents, {name.lower()}": functools.partial(
      theirs, implementation=name, n=_IMAGES
    )
    # Its structured derivatives fail on current JAX.
    for name in ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS")
  },
}

if __name__ == "__main__":
  common.launch(lambda: harness.run(JOBS))
