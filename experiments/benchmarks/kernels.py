"""Speed of kernels: `python -m experiments.benchmarks.kernels --data_dir=DIR`.

Both libraries compute the NTK of the same real images in one process, jitted, timed after
compilation. Each job runs in a separate process and writes to
experiments/results/benchmark_kernels.json:

  convolutional, dense  forward, and forward with the gradient with respect to the first rows (a
                        vector-Jacobian product): seconds and their ratio, compilation seconds,
                        scratch memory of the compiled program, largest difference of values and
                        gradients from float64, and the time of only the first matrix products
                        (floor)
  growth                milliseconds per pair against image side, channels and pairs; scratch memory
  precision             time and error of products in narrower types
  kip                   seconds of a KIP step with kernels of both libraries in the same loop (only
                        MNIST, because for 32 x 32 images the neural-tangents gradient in a loop
                        crashes XLA)

About 10 minutes on two idle cores, mostly for neural-tangents.
"""

import functools
import time

import numpy as np
import optax

from experiments.benchmarks import harness
from kipcore.cli import flags as common

harness.define_flags("kernels")

# (architecture, dataset, rows, other rows)
_CONVOLUTIONAL = (
  ("conv3", "cifar10", 10, 20),
  ("conv3", "mnist", 10, 20),
  ("conv3_vec", "cifar10", 20, 100),
  ("myrtle5", "cifar10", 4, 4),
  ("myrtle5", "mnist", 4, 4),
)
_DENSE = tuple(
  (f"fc{depth}", dataset, 500, 5000) for dataset in ("mnist", "cifar10") for depth in (1, 2, 3)
)
_CHECKED_ROWS = 4


def images(dataset: str, data_dir, rows: int, other_rows: int):
  """Standardized training rows `(rows, h, w, c)` and `other_rows` different ones, float32."""
  import jax.numpy as jnp

  from kipcore import datasets, preprocess

  raw = datasets.load_dataset(dataset, data_dir, validation_fraction=0.0)
  fitted = preprocess.fit_preprocess(raw.x_train, "standardize", raw.pixel_max)
  x = fitted.apply(raw.x_train[: rows + other_rows])
  return jnp.asarray(x[:rows]), jnp.asarray(x[rows:])


def theirs(arch):
  """The NTK of an architecture by neural-tangents."""
  from kipcore.kernels import stax

  return stax.from_stax(stax.to_stax(arch)[2], "ntk")


def with_gradient(kernel):
  """K(x1, x2), and the gradient of its product with fixed weights with respect to x1."""
  import jax
  import jax.numpy as jnp

  def fn(x1, x2):
    k, pull = jax.vjp(lambda x: kernel(x, x2), x1)
    weights = np.random.default_rng(0).normal(size=k.shape)
    return k, pull(jnp.asarray(weights, k.dtype))[0]

  return fn


def measure(fn, *args, seconds: float = 2.0) -> dict:
  """Compilation time, run times and scratch memory.

  Runs at least three times, and more often if the time allows; only once if that takes `seconds`.
  """
  import jax

  started = time.perf_counter()
  compiled = jax.jit(fn).lower(*args).compile()
  compile_seconds = time.perf_counter() - started
  runs = [harness.timed(lambda: compiled(*args))[0]]
  if runs[0] < seconds:
    runs = [
      harness.timed(lambda: compiled(*args))[0]
      for _ in range(max(3, min(50, int(seconds / runs[0]))))
    ]
  return {
    "seconds": min(runs),
    "median_seconds": float(np.median(runs)),
    "runs": len(runs),
    "compile_seconds": compile_seconds,
    "scratch_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


def differences(arch, x1, x2) -> dict:
  """Relative errors of float32 values and gradients of both libraries.

  The reference is kipcore in float64, because neural-tangents in float64 crashes XLA on CPU for
  images of this size; a test checks that they agree to ten digits. Errors are largest differences
  divided by the largest magnitude.
  """
  import jax

  sides = {"ours": kernel_of(arch), "neural_tangents": theirs(arch)}
  found = {
    side: [np.asarray(a, np.float64) for a in jax.jit(with_gradient(kernel))(x1, x2)]
    for side, kernel in sides.items()
  }
  with harness.x64():
    exact = [
      np.asarray(a)
      for a in jax.jit(with_gradient(kernel_of(arch)))(x1.astype("float64"), x2.astype("float64"))
    ]
  return {
    side: {
      name: float(np.abs(a - b).max() / np.abs(b).max())
      for name, a, b in zip(("value", "gradient"), pair, exact)
    }
    for side, pair in found.items()
  }


def kernel_of(arch, precision: str = "float32"):
  """The NTK of kipcore."""
  import kipcore

  return kipcore.ntk_fn(arch, precision)


def compare(case, data_dir) -> dict:
  """One row of the table: both libraries, forward and with the gradient."""
  import jax

  from kipcore import architectures

  name, dataset, rows, other_rows = case
  arch = architectures.architecture(name)
  x1, x2 = images(dataset, data_dir, rows, other_rows)
  row = {
    "architecture": name,
    "shape": list(x1.shape[1:]),
    "rows": rows,
    "other_rows": other_rows,
    "floor_seconds": measure(floor(arch), x1, x2)["seconds"],
  }
  for part, wrap in (("forward", lambda kernel: kernel), ("gradient", with_gradient)):
    ours, other = (measure(wrap(kernel), x1, x2) for kernel in (kernel_of(arch), theirs(arch)))
    row[part] = {
      "ours": ours,
      "neural_tangents": other,
      "ratio": other["seconds"] / ours["seconds"],
    }
  # neural-tangents is several times faster inside an XLA loop, which is how it would run in
  # `distill`.
  in_loop = measure(lambda x1, x2: jax.lax.map(lambda x: theirs(arch)(x, x2), x1[None]), x1, x2)
  row["forward"].update(
    neural_tangents_in_loop=in_loop,
    ratio_in_loop=in_loop["seconds"] / row["forward"]["ours"]["seconds"],
  )
  row["forward_over_floor"] = row["forward"]["ours"]["seconds"] / row["floor_seconds"]
  few = _CHECKED_ROWS if arch.convolutional else 100
  row["difference"] = differences(arch, x1[:few], x2[:few])
  print(
    f"{name} {x1.shape[1:]} {rows} x {other_rows}: forward {row['forward']['ratio']:.2f} x "
    f"({row['forward']['ratio_in_loop']:.2f} x), gradient "
    f"{row['gradient']['ratio']:.2f} x, {row['forward_over_floor']:.2f} x the floor, "
    f"{row['difference']}",
    flush=True,
  )
  return row


def floor(arch):
  """Only the first matrix products: of the rows, or of all pairs of patches."""
  import jax
  import jax.numpy as jnp

  from kipcore import linalg
  from kipcore.kernels import covariance

  def dense(x1, x2):
    return linalg.matmul(x1.reshape(x1.shape[0], -1), x2.reshape(x2.shape[0], -1).T)

  def patches(x1, x2):
    z1, z2 = (covariance.pixel_vectors(arch.layers[0], x) for x in (x1, x2))
    z1, z2 = (z.reshape(z.shape[0], -1, z.shape[-1]) for z in (z1, z2))
    return jax.lax.map(lambda a: jax.lax.map(lambda b: linalg.matmul(a, b.T)[:1, :1], z2), z1)

  def diagonals(x1, x2):
    return jax.lax.map(lambda a: jnp.sum(a[None] * x2, axis=-1), x1)

  if not arch.convolutional:
    return dense
  return diagonals if "_vec" in arch.name else patches


def growth(data_dir) -> dict:
  """Milliseconds per pair, forward and with the gradient, as one quantity grows."""
  import jax.numpy as jnp

  from kipcore import architectures

  kernel = kernel_of(architectures.architecture("conv3"))
  rows = []
  sweeps = {
    "side": [(side, 3, 4, 4) for side in (8, 16, 32, 64)],
    "channels": [(32, c, 4, 4) for c in (1, 3, 16, 64)],
    "pairs": [(16, 3, 10, n) for n in (10, 50, 250, 1000)],
  }
  for quantity, cases in sweeps.items():
    for side, channels, n1, n2 in cases:
      rng = np.random.default_rng(0)
      x1, x2 = (
        jnp.asarray(rng.normal(size=(n, side, side, channels)), jnp.float32) for n in (n1, n2)
      )
      parts = {
        part: measure(fn, x1, x2)
        for part, fn in (("forward", kernel), ("gradient", with_gradient(kernel)))
      }
      rows.append(
        {
          "grows": quantity,
          "side": side,
          "channels": channels,
          "pairs": n1 * n2,
          **{
            part: {
              "milliseconds_a_pair": 1e3 * m["seconds"] / (n1 * n2),
              "scratch_bytes": m["scratch_bytes"],
            }
            for part, m in parts.items()
          },
        }
      )
      print(rows[-1], flush=True)
  return {"architecture": "conv3", "rows": rows}


def precision(data_dir) -> dict:
  """Time and relative error against float64 of products in narrower types, on real images."""
  import jax

  from kipcore import architectures, linalg

  rows = []
  for name, dataset, n1, n2 in (("fc1", "cifar10", 500, 5000), ("conv3", "cifar10", 8, 8)):
    arch = architectures.architecture(name)
    x1, x2 = images(dataset, data_dir, n1, n2)
    with harness.x64():
      exact = np.asarray(jax.jit(kernel_of(arch))(x1.astype("float64"), x2.astype("float64")))
    for kind in linalg.PRECISIONS:
      kernel = kernel_of(arch, kind)
      error = np.abs(np.asarray(jax.jit(kernel)(x1, x2)) - exact) / np.abs(exact).max()
      rows.append(
        {
          "architecture": name,
          "precision": kind,
          "seconds": measure(kernel, x1, x2)["seconds"],
          "largest_error": float(error.max()),
          "mean_error": float(error.mean()),
        }
      )
      print(rows[-1], flush=True)
  return {"rows": rows}


def kip(data_dir, batch_size: int = 20) -> dict:
  """Seconds per KIP step on 10 images with the conv3 kernels of both libraries in the same loop."""
  import jax.numpy as jnp

  import kipcore
  from kipcore import architectures
  from kipcore.distillation import samplers
  from kipcore.distillation.methods import kip as kip_method

  arch = architectures.architecture("conv3")
  result = {"support": 10, "batch": batch_size}
  for dataset in ("mnist", "cifar10"):
    x, others = images(dataset, data_dir, 10, 500)
    y = jnp.eye(10, dtype=x.dtype) - 0.1
    y_others = y[jnp.arange(500) % 10]
    for side, kernel, steps in (("ours", kernel_of(arch), 6), ("neural_tangents", theirs(arch), 3)):
      if side == "neural_tangents" and dataset == "cifar10":  # neural-tangents crashes XLA there
        continue
      distiller = kipcore.Distiller(
        kip_method.kip(kernel, kip_method.KIPOptions(1e-6)),
        samplers.uniform(),
        optax.adam(0.01),
        batch_size,
      )
      run = kipcore.distill(
        0, distiller, kipcore.Support(x, y), others, y_others, steps, log_steps=list(range(steps))
      )
      seconds = np.diff([record["seconds"] for record in run.history if record["step"] > 0])
      result[f"{dataset}_{side}"] = {
        "seconds_a_step": float(np.min(seconds)),
        "compile_seconds": run.compile_seconds,
        "peak_gb": harness.peak_gb(),
      }
      print(dataset, side, result[f"{dataset}_{side}"], flush=True)
  result["mnist_ratio"] = (
    result["mnist_neural_tangents"]["seconds_a_step"] / result["mnist_ours"]["seconds_a_step"]
  )
  return result


def _table(cases, data_dir) -> dict:
  return {"rows": [compare(case, data_dir) for case in cases]}


JOBS = {
  "convolutional": functools.partial(_table, _CONVOLUTIONAL),
  "dense": functools.partial(_table, _DENSE),
  "growth": growth,
  "precision": precision,
  "kip": kip,
}

if __name__ == "__main__":
  common.launch(lambda: harness.run(JOBS))
