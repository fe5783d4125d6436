"""Time and memory of the kernel evaluations of a run, measured on a few rows before it starts."""

import time

import jax
import jax.numpy as jnp

from kipcore.distill import loop

_ROWS, _OTHER_ROWS = 4, 8


def seconds_a_pair(kernel_fn, x, gradient: bool) -> tuple[float, int]:
  """Seconds of one pair of images, and bytes of scratch memory, from a small block of rows of `x`, after compilation."""
  a, b = jnp.asarray(x[:_ROWS]), jnp.asarray(x[-_OTHER_ROWS:])
  value = lambda a: jnp.sum(kernel_fn(a, b))
  compiled = jax.jit(jax.value_and_grad(value) if gradient else value).lower(a).compile()
  jax.block_until_ready(compiled(a))
  started = time.perf_counter()
  jax.block_until_ready(compiled(a))
  seconds = (time.perf_counter() - started) / pairs(a.shape[0], b.shape[0])
  return seconds, compiled.memory_analysis().temp_size_in_bytes


def pairs(rows: int, other_rows: int, symmetric: bool = False) -> int:
  """Pairs in K(rows, other rows), each image with itself, and in K(rows, rows) if wanted."""
  return rows * other_rows + rows + other_rows + symmetric * (rows * (rows + 1) // 2)


def of_distillation(config, data, support_size: int, batch_size: int, solved_rows: int, validation_rows: int, scores: int,
                    num_devices: int) -> str | None:
  """What a run of `run_distill` will take; None for kernels that take next to nothing.

  Args:
    config: of the run.
    data: its data.
    support_size, batch_size: images, and targets of a step.
    solved_rows: rows that the labels of the start are solved from.
    validation_rows: rows scored at each logged step.
    scores: scores of all test rows.
    num_devices: that share the steps.
  """
  if config.method != "kip":
    if not data.score_kernel.arch.convolutional:
      return None
    return _of_scores(config, data, support_size, solved_rows, validation_rows, scores)
  if not data.kernel_fn.arch.convolutional:
    return None
  shared = 1 if jax.default_backend() == "cpu" else num_devices  # simulated devices share the cores
  forward, _ = seconds_a_pair(data.kernel_fn, data.x_train, gradient=False)
  backward, scratch = seconds_a_pair(data.kernel_fn, data.x_train, gradient=True)
  step_pairs = pairs(support_size, batch_size, symmetric=True)
  step = step_pairs * backward / shared
  other = forward * support_size * _scored_rows(config, data, solved_rows, validation_rows, scores)
  return (f"estimate: {step_pairs:,} pairs of images a step, {1e3 * backward:.3g} ms each: {step:.3g} s a step, {duration(config.steps * step)} "
          f"for {config.steps} steps, and {duration(other)} for labels and scores ({1e3 * forward:.3g} ms a pair; --test_rows for less); "
          f"{scratch / 1e6:,.0f} MB of scratch memory, {4e-6 * step_pairs:,.1f} MB of kernel matrices")


def _scored_rows(config, data, solved_rows: int, validation_rows: int, scores: int) -> int:
  return scores * data.x_test.shape[0] + solved_rows + len(loop.default_log_steps(config.steps)) * validation_rows


def _of_scores(config, data, support_size, solved_rows, validation_rows, scores) -> str:
  """For methods whose steps are no kernel: the scores by ridge regression are."""
  forward, _ = seconds_a_pair(data.score_kernel, data.x_train, gradient=False)
  rows = _scored_rows(config, data, solved_rows, validation_rows, scores)
  return (f"estimate: {duration(forward * support_size * rows)} for scores by kernel ridge regression ({1e3 * forward:.3g} ms a pair of "
          f"images; --test_rows for less); the steps are the method's own")


def of_selection(data, rows: int, columns: int) -> str | None:
  """What the kernel matrix of all rows with as many columns will take; None for kernels that take next to nothing."""
  if not data.kernel_fn.arch.convolutional:
    return None
  forward, scratch = seconds_a_pair(data.kernel_fn, data.x_train, gradient=False)
  return (f"estimate: {rows:,} x {columns:,} pairs of images, {1e3 * forward:.3g} ms each: {duration(rows * columns * forward)}, "
          f"{scratch / 1e6:,.0f} MB of scratch memory")


def duration(seconds: float) -> str:
  """Seconds for people."""
  for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
    if seconds >= 2 * size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.1f} s"
