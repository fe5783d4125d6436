"""Finite networks against the same networks of Flax layers: `python -m experiments.benchmarks.networks`.

ConvNet-3 (convolution, ReLU, average pool) of `kipcore.network` and of `flax.linen.Conv` and `avg_pool`, on random images. Each is timed
inside a compiled loop, as in training. Writes experiments/results/benchmark_networks.json, one job per size of images:

  forward_seconds    one forward pass of 256 images, and that of the Flax layers (`flax_forward_seconds`)
  step_seconds       one step of gradient descent on them (`flax_step_seconds`)
  compile_seconds    compilation of both loops of `kipcore.network` (`flax_compile_seconds`)

About five minutes on two idle cores.
"""

import functools

from experiments.benchmarks import harness
from kipcore.cli import flags as common

harness.define_flags("networks")

_IMAGES, _REPEATS = 256, 4


def flax_network(width: int):
  """ConvNet-3 of Flax layers, without a norm."""
  from flax import linen as nn

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
      for _ in range(3):
        x = nn.avg_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
      return nn.Dense(10)(x.reshape(x.shape[0], -1))

  return Plain()


def seconds_of(module, x) -> tuple[float, float, float]:
  """Seconds of a forward pass and of a training step, and of compiling both."""
  import jax
  import jax.numpy as jnp

  variables = module.init(jax.random.key(0), x[:1])

  def forward(_, x):
    return x + 1e-9 * jnp.mean(module.apply(variables, x))  # so that no pass is left out

  def step(_, parameters):
    gradient = jax.grad(lambda p: jnp.mean(module.apply(p, x) ** 2))(parameters)
    return jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradient)

  times, compiling = [], 0.0
  for body, start in ((forward, x), (step, variables)):
    loop = jax.jit(lambda start, body=body: jax.lax.fori_loop(0, _REPEATS, body, start))
    first, _ = harness.timed(lambda: loop(start))
    again = min(harness.timed(lambda: loop(start))[0] for _ in range(3))
    times.append(again / _REPEATS)
    compiling += first - again
  return times[0], times[1], compiling


def job(data_dir, shape: tuple[int, int, int], width: int) -> dict:
  """Both networks for images of a shape."""
  import jax

  from kipcore import conv_net, network

  x = jax.random.normal(jax.random.key(0), (_IMAGES, *shape))
  forward, step, compiling = seconds_of(network(conv_net(3), width), x)
  flax_forward, flax_step, flax_compiling = seconds_of(flax_network(width), x)
  result = {
    "forward_seconds": forward,
    "flax_forward_seconds": flax_forward,
    "step_seconds": step,
    "flax_step_seconds": flax_step,
    "compile_seconds": compiling,
    "flax_compile_seconds": flax_compiling,
  }
  print({name: round(value, 4) for name, value in result.items()}, flush=True)
  return result


JOBS = {
  f"{h}x{w}x{c}, width 32": functools.partial(job, shape=(h, w, c), width=32)
  for h, w, c in ((28, 28, 1), (32, 32, 3))
}

if __name__ == "__main__":
  common.launch(lambda: harness.run(JOBS))
