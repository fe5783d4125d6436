"""Time and memory of a run: formulas, and the few measurements that they need.

Kernels of convolutional networks are counted in pairs of images, of which a few are timed; linear
algebra is counted in operations. Both are accurate within a factor of about two.
"""

import dataclasses
import math
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kipcore import linalg
from kipcore.distillation import loop
from kipcore.evaluation import protocols
from kipcore.evaluation.networks import network_of
from kipcore.selection import coreset

# Below these no estimate is printed.
WORTH_SECONDS, WORTH_BYTES = 30.0, 1e9
# Passes over the rows by Lloyd's algorithm: two initializations together, with their seeding.
_KMEANS_PASSES = 60
# Cost of a spectrum, in units of n^3 operations of a matrix product.
_SPECTRUM = 20
# Compilation of a network's training and scoring, in units of that of an optimizer step.
_PROGRAM = 4.0
# Seconds of an operation, and of a pair of images per feature (dense kernels), on a slow core.
_SLOW, _SLOW_PAIR = 1e-10, 5e-11


class Part(NamedTuple):
  """A part of a run, with its seconds or bytes."""

  name: str
  amount: float


class Work(NamedTuple):
  """Pairs of images whose kernel is evaluated, and other operations (a multiplication and an addition are two)."""

  pairs: float = 0.0
  operations: float = 0.0

  def __add__(self, other):
    return Work(self.pairs + other.pairs, self.operations + other.operations)

  def seconds(self, pair_seconds: float, operations_per_second: float) -> float:
    """Time of the work."""
    return self.pairs * pair_seconds + self.operations / operations_per_second


class Sizes(NamedTuple):
  """Numbers of rows of a distillation.

  Attributes:
    support: distilled images.
    batch: targets per step.
    solved: training rows from which the initial labels are solved.
    test: test rows.
    scores: how often all of them are scored.
    validation: validation rows, scored at each logged step.
    devices: number of devices that share the steps.
  """

  support: int
  batch: int
  solved: int
  test: int
  scores: int
  validation: int
  devices: int


def seconds_per_pair(kernel_fn, x, gradient: bool) -> tuple[float, int]:
  """Seconds per pair of images and bytes of scratch memory, from a small block of rows of `x`, after compilation."""
  rows, others = (4, 8) if kernel_fn.arch.convolutional else (256, 512)
  a, b = jnp.asarray(x[:rows]), jnp.asarray(x[-others:])
  value = lambda a: jnp.sum(kernel_fn(a, b))
  compiled = jax.jit(jax.value_and_grad(value) if gradient else value).lower(a).compile()
  memory_plan = compiled.memory_analysis()
  scratch = memory_plan.temp_size_in_bytes if memory_plan is not None else 0
  return _timed(lambda: compiled(a)) / pairs(a.shape[0], b.shape[0]), scratch


def operations_per_second(dtype) -> float:
  """Operations per second of a matrix product of a thousand rows."""
  a = jnp.ones((1024, 1024), dtype)
  product = (
    jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST)).lower(a).compile()
  )
  return 2 * 1024**3 / _timed(lambda: product(a))


def of_network(evaluator, support, test_rows: int) -> tuple[float, float]:
  """Seconds of a network, trained and scored, and of compilation, from a few optimizer steps on its batch.

  Args:
    evaluator: a `ranking.NetworkEvaluator`.
    support: what the network is trained on.
    test_rows: number of rows to score.

  Returns:
    Two numbers of seconds.
  """
  (m, *shape), classes = support.x.shape, support.y.shape[1]
  how = protocols.protocol(evaluator.protocol, shape[-1] if len(shape) == 3 else None)
  steps = evaluator.num_steps or how.num_steps(m)
  rows = min(how.batch_size, m)
  x, y = support.x[:rows], support.y[:rows]
  module = evaluator.network
  if not isinstance(module, nn.Module):
    norm = how.norm if evaluator.norm is None else evaluator.norm
    module = network_of(module, dataclasses.replace(how, norm=norm), evaluator.width, classes)
  # Values do not change the time, and drawing them would take longer to compile than a step.
  start = jax.tree.map(
    lambda a: jnp.full(a.shape, 0.01, a.dtype),
    jax.eval_shape(module.init, jax.random.key(0), x[:1]),
  )
  optimizer = how.transformation(steps)

  def step(variables, state):
    loss = lambda v: jnp.mean(jnp.square(module.apply(v, x) - y))
    return optimizer.update(jax.grad(loss)(variables), state, variables)

  with linalg.permissive_promotion():
    state, started = optimizer.init(start), time.perf_counter()
    compiled = jax.jit(step).lower(start, state).compile()
    compiling = _PROGRAM * (time.perf_counter() - started)
  one = min(_timed(lambda: compiled(start, state)) for _ in range(3))
  # Two forward passes per test row; a step has one forward and one backward pass.
  return steps * one + 2 * test_rows * one / (3 * rows), compiling


def _timed(call) -> float:
  jax.block_until_ready(call())
  started = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - started


def pairs(rows: int, other_rows: int, symmetric: bool = False) -> int:
  """Pairs in K(rows, other rows), each image with itself, and in K(rows, rows) if wanted."""
  return rows * other_rows + rows + other_rows + symmetric * (rows * (rows + 1) // 2)


def logged_rows(config, sizes: Sizes) -> int:
  """Number of scored rows: test rows, and validation rows during the run."""
  return sizes.scores * sizes.test + len(loop.default_log_steps(config.steps)) * sizes.validation


def of_initialization(strategy: str, rows: int, support: int, features: int, classes: int) -> Work:
  """Work of selecting `support` points among the rows."""
  per_class = max(support // classes, 1)
  if strategy in ("krr_sensitivity", "leverage"):
    return of_scores(rows, support)
  if strategy == "krr_pursuit":
    pool = min(rows, max(2000, support))
    return Work(rows * pool, 2.0 * rows * pool**2 + 2.0 * support * pool**2)
  one_pass = 2.0 * rows * per_class * features
  passes = {
    "kmeans": _KMEANS_PASSES,
    "kmedoids": _KMEANS_PASSES,
    "kmeans_plusplus": 2 + np.log(per_class),
    "herding": 1,
    "k_center": 1,
  }
  if strategy == "auto":
    tried = sum(
      (
        of_initialization(name, rows, support, features, classes)
        for name in ("kmeans", "kmeans_plusplus", "krr_pursuit")
      ),
      Work(),
    )
    return tried + Work(len(coreset.AUTO_CANDIDATES) * min(rows, 10_000) * support)
  return Work(0.0, passes.get(strategy, 0) * one_pass)


def of_scores(rows: int, support: int) -> Work:
  """Work of the sensitivities of all rows: exact for few, else two passes over landmarks (ridge, scores)."""
  columns = coreset.num_score_columns(rows, support)
  if columns == rows:
    return Work(rows**2, float(_SPECTRUM) * rows**3)
  return Work(2 * rows * columns, 8.0 * rows * columns**2 + 2.0 * _SPECTRUM * columns**3)


def of_selection(
  strategy: str, rows: int, support: int, features: int, classes: int, test: int, dual_rows: int
) -> dict[str, Work]:
  """Work of the parts of a selection: points, scores, labels, certificate, and test accuracies."""
  landmarks = min(1000, rows)
  scored = (
    {}
    if strategy in ("krr_sensitivity", "leverage")
    else {"scores of all rows": of_scores(rows, support)}
  )
  certificate = Work(4 * rows * landmarks, 6.0 * rows * landmarks**2)
  if landmarks < rows <= dual_rows:
    certificate += Work(rows**2)
  return {
    f"points ({strategy})": of_initialization(strategy, rows, support, features, classes),
    **scored,
    "solved labels": Work(rows * support, 2.0 * rows * support**2),
    **({} if strategy in ("kmeans", "noise", "rded") else {"certificate": certificate}),
    "scores of the test rows": Work(5 * test * support),
  }


def memory_of_selection(data, support: int, dtype) -> list[Part]:
  """The largest arrays of a selection."""
  rows, size = data.x_train.shape[0], np.dtype(dtype).itemsize
  columns, block = coreset.num_score_columns(rows, support), min(rows, 1024)
  kernel = 4 * size * rows**2 if columns == rows else size * (4 * columns**2 + 2 * block * columns)
  return [Part("training and test rows", rows_bytes(data)), Part("kernel matrices", kernel)]


def seconds_of(work: dict[str, Work], kernel_fn, x, measure: bool = False) -> list[Part]:
  """Seconds of the parts on this machine; little work is estimated for a slow core instead, unless `measure`."""
  total = sum(work.values(), Work())
  if (
    not measure
    and not kernel_fn.arch.convolutional
    and total.seconds(_SLOW_PAIR * x[0].size, 1 / _SLOW) < WORTH_SECONDS
  ):
    rates = _SLOW_PAIR * x[0].size, 1 / _SLOW
  else:
    rates = seconds_per_pair(kernel_fn, x, gradient=False)[0], operations_per_second(x.dtype)
  return [Part(name, each.seconds(*rates)) for name, each in work.items()]


def worth_reporting(seconds: list[Part], memory_parts: list[Part]) -> str | None:
  """A line about time and memory, or None if both are small."""
  time_total, memory_total = (
    sum(part.amount for part in parts) for parts in (seconds, memory_parts)
  )
  if time_total < WORTH_SECONDS and memory_total < WORTH_BYTES:
    return None
  parts = ", ".join(
    f"{part.name} {duration(part.amount)}" for part in seconds if part.amount > 0.05 * time_total
  )
  return f"estimate: about {duration(time_total)} ({parts}) and {memory(memory_total)} of memory"


def dataset_bytes(data) -> int:
  """The dataset as read and as preprocessed, in main memory."""
  return sum(a.nbytes for a in (*data, *data.raw) if isinstance(a, np.ndarray))


def rows_bytes(data) -> int:
  """Training and test rows with their labels, as a device holds them."""
  return sum(a.nbytes for a in (data.x_train, data.y_train, data.x_test, data.y_test))


def memory_of_steps(compiled, kernel: bool) -> list[Part]:
  """Memory of the steps of the loop on each device, by part.

  Args:
    compiled: the compiled steps (`compiled` of `loop.distill`).
    kernel: whether they use kernel matrices, not networks.
  """
  _, state, targets, *_ = compiled.args_info[0]
  devices = jax.tree.leaves(targets)[0].shape[0]
  size = lambda tree: (
    sum(np.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree)) / devices
  )
  planned = compiled.memory_analysis()
  scratch = planned.temp_size_in_bytes if planned is not None else 0
  # A row of images has rank 3, with a device axis and one of rows before it.
  rows = "images" if len(targets.x.shape) == 5 else "points"
  parts = [
    Part("training rows", size(targets)),
    Part(f"{rows}, labels and their optimizer", size((state.params, state.opt_state))),
    Part("networks", size(state.aux)),
    Part("scores of rows", size(state.sampler)),
    Part(
      "working memory of a step: " + ("kernel matrices" if kernel else "activations and gradients"),
      scratch,
    ),
  ]
  return [part for part in parts if part.amount]


def available_bytes() -> int | None:
  """Memory of a device in bytes: total of an accelerator, free main memory of a CPU; None if unknown."""
  statistics = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in statistics:
    return statistics["bytes_limit"]
  try:
    known = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(known["MemAvailable"].split()[0])
  except (OSError, KeyError, ValueError):
    return None


def of_distillation(config, data, sizes: Sizes) -> str | None:
  """A line about the time and memory of a distillation; None for cheap kernels and short runs.

  Args:
    config: settings of the run.
    data: its data.
    sizes: its numbers of rows.
  """
  kernel_fn = data.kernel_fn if config.method == "kip" else data.score_kernel
  if not kernel_fn.arch.convolutional:
    return None
  forward, _ = seconds_per_pair(kernel_fn, data.x_train, gradient=False)
  chosen = of_initialization(
    config.init, data.x_train.shape[0], sizes.support, data.x_train[0].size, data.y_train.shape[1]
  ).pairs
  solved = data.x_train.shape[0] if config.method == "label_solve" else sizes.solved
  other = forward * (sizes.support * (logged_rows(config, sizes) + solved) + chosen)
  if config.method != "kip":
    return (
      (
        f"estimate: {duration(other)} for initialization and scores by kernel ridge regression ({1e3 * forward:.3g} ms per pair of "
        "images; --test_rows reduces it), without the steps"
      )
      if other > WORTH_SECONDS
      else None
    )
  backward, scratch = seconds_per_pair(data.kernel_fn, data.x_train, gradient=True)
  step, step_pairs = step_of_pairs(sizes, backward)
  if config.steps * step + other < WORTH_SECONDS and scratch + 4 * step_pairs < WORTH_BYTES:
    return None
  return (
    f"estimate: {step_pairs:,} pairs of images per step, {1e3 * backward:.3g} ms each: {step:.3g} s per step, {duration(config.steps * step)} "
    f"for {config.steps} steps, and {duration(other)} for initialization and scores ({1e3 * forward:.3g} ms per pair; --test_rows "
    f"reduces it); {memory(scratch)} of scratch memory, {memory(4 * step_pairs)} of kernel matrices"
  )


def step_of_pairs(sizes: Sizes, pair_seconds: float) -> tuple[float, int]:
  """Seconds and pairs of a step of KIP."""
  shared = (
    1 if jax.default_backend() == "cpu" else sizes.devices
  )  # simulated devices share the cores
  count = pairs(sizes.support, sizes.batch, symmetric=True)
  return count * pair_seconds / shared, count


def duration(seconds: float) -> str:
  """Seconds as text."""
  for length, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
    if seconds >= 2 * length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.1f} s"


def memory(count: float) -> str:
  """Bytes as text."""
  for length, unit in ((1e9, "GB"), (1e6, "MB")):
    if count >= 0.95 * length:
      return f"{count / length:,.1f} {unit}"
  return f"{count / 1e3:,.1f} kB"


def listed(parts: list[Part], shown, total: str | None = "total") -> str:
  """A line per part, and their sum under the name `total`; NaN for an unknown amount."""
  known = [part for part in parts if not math.isnan(part.amount)]
  texts = {part.name: shown(part.amount) if part in known else "unknown" for part in parts}
  if total and len(parts) > 1:
    texts[total] = ("more than " if len(known) < len(parts) else "") + shown(
      sum(part.amount for part in known)
    )
  width = max(map(len, texts))
  return "\n".join(f"  {name:<{width}}  {text:>9}" for name, text in texts.items())
