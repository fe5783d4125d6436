"""Speed of the distillation loop: `python -m experiments.benchmarks.distillation --data_dir=DIR`.

KIP with the NTK of FC1 on the 60,000 rows of MNIST. Each job runs in a separate process and writes
to experiments/results/benchmark_distillation.json:

  throughput    target evaluations per second, compared with the published KIP recipe (kernel of
                neural-tangents, class-balanced batches drawn on the host, Adam), in float32 and in
                float64 (as published)
  shares        breakdown of a step: draw, gather, kernel block, solve, scores, and the rest
  growth        time per step against support, batch and rows

Times exclude compilation. OpenBLAS threads sleep between calls in both implementations
(`flags.launch`). About five minutes on two idle cores.
"""

import time

import numpy as np
import optax

from experiments.benchmarks import harness
from experiments.benchmarks.harness import mnist, peak_gb, timed
from kipcore.cli import flags as common

harness.define_flags("distillation")

_RIDGE = 1e-6


def starting_rows(labels, per_class: int) -> np.ndarray:
  """The first rows of each class."""
  return np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)])


def seconds_a_step(
  x, y, support, sampler, batch_size: int, steps: int, learn_labels: bool = False
) -> tuple[float, float]:
  """Seconds per step of `distill`, including the host, and compilation seconds."""
  import kipcore
  from kipcore.distillation.methods import kip

  method = kip.kip(kipcore.ntk_fn(kipcore.fc(1)), kip.KIPOptions(_RIDGE, learn_labels=learn_labels))
  distiller = kipcore.Distiller(method, sampler, optax.adam(0.04), batch_size)
  result = kipcore.distill(0, distiller, support, x, y, steps, log_steps=[steps // 2])
  return (result.history[-1]["seconds"] - result.history[1]["seconds"]) / (
    steps - steps // 2
  ), result.compile_seconds


def published_seconds_a_step(x, y, labels, support, batch_size: int, steps: int) -> float:
  """Seconds per step of the published recipe: class-balanced host batches, compiled update."""
  import jax
  import jax.numpy as jnp
  import optax

  import kipcore
  from kipcore.kernels import stax

  kernel_fn = stax.from_stax(stax.to_stax(kipcore.fc(1))[2])
  optimizer = optax.adam(0.04)
  flat = support.x.reshape(support.x.shape[0], -1)

  def loss_fn(params, x_target, y_target):
    k_ss, k_ts = kernel_fn(params, None), kernel_fn(x_target, params)
    ridge = _RIDGE * jnp.trace(k_ss) / k_ss.shape[0]
    alpha = jax.scipy.linalg.solve(
      k_ss + ridge * jnp.eye(k_ss.shape[0], dtype=k_ss.dtype), support.y, assume_a="pos"
    )
    return 0.5 * jnp.mean((k_ts @ alpha - y_target) ** 2)

  @jax.jit
  def update(params, state, x_target, y_target):
    gradient = jax.grad(loss_fn)(params, x_target, y_target)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state

  rng = np.random.default_rng(0)
  rows = [np.flatnonzero(labels == c) for c in range(10)]
  params, state = flat, optimizer.init(flat)

  def step(params, state):
    batch = np.concatenate([rng.choice(r, batch_size // 10, replace=False) for r in rows])
    return update(params, state, x[batch], y[batch])

  params, state = jax.block_until_ready(step(params, state))
  started = time.perf_counter()
  for _ in range(steps):
    params, state = step(params, state)
  jax.block_until_ready(params)
  return (time.perf_counter() - started) / steps


def throughput(data_dir) -> dict:
  """Compares the published recipe and kipcore at the published batch and three support sizes."""
  import jax
  import jax.numpy as jnp

  import kipcore

  x, y, labels, _, _ = mnist(data_dir)
  x, y, batch, rows = np.asarray(x), np.asarray(y), 5000, []
  for dtype in ("float32", "float64"):
    jax.config.update("jax_enable_x64", dtype == "float64")
    xd, yd = x.astype(dtype), y.astype(dtype)
    for per_class in (1, 10, 50):
      start = starting_rows(labels, per_class)
      support = kipcore.Support(jnp.asarray(xd[start]), jnp.asarray(yd[start]))
      runs = {
        "published": lambda s=support: (published_seconds_a_step(xd, yd, labels, s, batch, 30),),
        **{
          name: lambda s=support, name=name: seconds_a_step(
            xd, yd, s, kipcore.sampler(name), batch, 60
          )
          for name in ("class_balanced", "cross_entropy")
        },
      }
      # Alternate three times, so that changes of the machine affect all runs.
      seconds = [{name: run()[0] for name, run in runs.items()} for _ in range(3)]
      median = {name: float(np.median([s[name] for s in seconds])) for name in runs}
      rows.append(
        {
          "dtype": dtype,
          "support": len(start),
          "batch": batch,
          **{f"{name}_targets_per_second": batch / s for name, s in median.items()},
          **{
            f"{name}_ratio": median["published"] / s
            for name, s in median.items()
            if name != "published"
          },
          "seconds_a_step": {name: [s[name] for s in seconds] for name in runs},
        }
      )
      print(rows[-1], flush=True)
  # Speed as used: the published recipe in its published precision, kipcore with its default sampler
  # in float32.
  double = {
    row["support"]: row["published_targets_per_second"] for row in rows if row["dtype"] == "float64"
  }
  as_used = {
    row["support"]: row["cross_entropy_targets_per_second"] / double[row["support"]]
    for row in rows
    if row["dtype"] == "float32"
  }
  print(as_used, flush=True)
  return {
    "default_over_published": as_used,
    "recipe": "KIP notebook: FC1 NTK by neural-tangents, class-balanced host batches, Adam 0.04, "
    "images learned",
    "rows": rows,
    "peak_gb": peak_gb(),
  }


def _looped(fn, carry) -> float:
  """Seconds per call of `carry = fn(i, carry)` in a compiled loop: median of five 0.25 s loops."""
  import jax

  run = jax.jit(lambda carry, times: jax.lax.fori_loop(0, times, fn, carry))
  timed(lambda: run(carry, 2))
  times = max(2, int(0.25 * 10 / timed(lambda: run(carry, 10))[0]))
  return float(np.median([timed(lambda: run(carry, times))[0] for _ in range(5)]) / times)


def shares(data_dir) -> dict:
  """Times the parts of a step separately in compiled loops; the rest is the remaining step time."""
  import jax
  import jax.numpy as jnp

  import kipcore
  from kipcore.distillation.method import LossInfo
  from kipcore.distillation.methods import kip

  x, y, labels, _, _ = mnist(data_dir)
  targets = jax.tree.map(
    lambda a: jnp.asarray(a[0]), kipcore.arrange_targets(x, y, 1, jax.random.key(0))
  )
  kernel_fn, rows = kipcore.ntk_fn(kipcore.fc(1)), []
  method = kip.kip(kernel_fn, kip.KIPOptions(_RIDGE, learn_labels=True))
  for per_class, batch in ((1, 1000), (10, 1000), (10, 2000), (50, 2000)):
    start = starting_rows(labels, per_class)
    support = kipcore.Support(x[start], y[start])
    for name in ("uniform", "cross_entropy"):
      sampler = kipcore.sampler(name)
      distiller = kipcore.Distiller(method, sampler, optax.adam(0.01), batch)
      state = kipcore.distill_init(0, distiller, support, targets.class_counts, x.shape[0])
      advance = lambda i, s, d=distiller: kipcore.distill_step(jax.random.key(0), d, s, targets)[0]
      # Run some steps first, so that the scores are realistic.
      state = jax.block_until_ready(jax.jit(lambda s: jax.lax.fori_loop(0, 60, advance, s))(state))
      params = state.params
      draw = lambda i, s=state.sampler, b=batch: sampler.draw(
        jax.random.fold_in(jax.random.key(1), i), s, b
      )
      indices, weights = draw(0)
      picked, picked_y = targets.x[indices], targets.y[indices]
      k_ss, k_ts = kernel_fn(params["x"], None), kernel_fn(picked, params["x"])

      def of_kernels(support_x, i):
        both = kernel_fn(support_x, None), kernel_fn(picked, support_x)
        return sum(jnp.sum(jnp.sin(k + i)) for k in both)

      def of_solve(kernels):
        fit = kipcore.krr_fit(kernels[0], params["y"], kipcore.relative_ridge(kernels[0], _RIDGE))
        return kipcore.krr_loss(fit, kernels[1], picked_y, weights).loss

      tiny = lambda a, g: a - 1e-9 * g
      parts = {
        "draw": _looped(lambda i, c: c + draw(i)[0], jnp.zeros_like(indices)),
        "gather": _looped(lambda i, c: targets.x[(indices + i) % x.shape[0]], picked),
        "kernel": _looped(
          lambda i, c: tiny(c, jax.grad(of_kernels)(c, i.astype(c.dtype))), params["x"]
        ),
        "solve": _looped(lambda i, c: jax.tree.map(tiny, c, jax.grad(of_solve)(c)), (k_ss, k_ts)),
      }
      if name != "uniform":
        info = LossInfo(
          jnp.zeros(batch),
          kipcore.krr_predict(
            kipcore.krr_fit(k_ss, params["y"], kipcore.relative_ridge(k_ss, _RIDGE)), k_ts
          ),
          jnp.zeros(()),
          jnp.int32(0),
        )
        parts["scores"] = _looped(
          lambda i, s: sampler.update(s, (indices + i) % x.shape[0], picked_y, info), state.sampler
        )
      step = _looped(advance, state)
      rows.append(
        {
          "support": len(start),
          "batch": batch,
          "sampler": name,
          "step_ms": 1e3 * step,
          "ms": {
            part: 1e3 * s for part, s in {**parts, "rest": step - sum(parts.values())}.items()
          },
          "share": {
            part: s / step for part, s in {**parts, "rest": step - sum(parts.values())}.items()
          },
        }
      )
      print(rows[-1], flush=True)
  return {"n": x.shape[0], "rows": rows}


def growth(data_dir) -> dict:
  """Milliseconds per step as one size varies from support 100, batch 2,000, 60,000 rows."""
  import jax.numpy as jnp

  import kipcore

  x, y, labels, _, _ = mnist(data_dir)
  x, y, rows = np.asarray(x), np.asarray(y), []
  base = dict(per_class=10, batch=2000, copies=1.0)
  for name, values in (
    ("per_class", (1, 5, 10, 20, 50)),
    ("batch", (250, 500, 1000, 2000, 4000, 8000)),
    ("copies", (0.25, 0.5, 1, 2, 4)),
  ):
    for value in values:
      size = {**base, name: value}
      n = int(size["copies"] * len(x))
      take = np.arange(n) % len(x)
      start = starting_rows(labels, size["per_class"])
      support = kipcore.Support(jnp.asarray(x[start]), jnp.asarray(y[start]))
      times = {
        sampler: 1e3
        * seconds_a_step(
          x[take], y[take], support, kipcore.sampler(sampler), size["batch"], 40, True
        )[0]
        for sampler in ("uniform", "cross_entropy")
      }
      rows.append(
        {
          "support": len(start),
          "batch": size["batch"],
          "n": n,
          **{f"{k}_ms": v for k, v in times.items()},
        }
      )
      print(rows[-1], flush=True)
  return {"rows": rows, "peak_gb": peak_gb()}


JOBS = {job.__name__: job for job in (throughput, shares, growth)}

if __name__ == "__main__":
  common.launch(lambda: harness.run(JOBS))
