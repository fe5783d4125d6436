"""Progress of long runs: in a terminal a bar with the remaining time, otherwise plain lines."""

import contextlib
import sys
import threading
import time

from tqdm import tqdm

from kipcore.cli.cost import estimate, planner

# Seconds of steps before an estimate is printed: compilation and short calls still dominate.
_SURE_SECONDS = 10.0


class Steps:
  """The progress bar of a loop, and a line with the expected time of a long one.

  The remaining time counts steps and the work at logged steps separately: early steps are logged
  often, and the first log compiles.

  Args:
    total: number of steps.
    name: text before the bar.
    log_steps: steps after which `logged` is called.
    write: prints a line; None for a silent loop.
    kernel: whether the steps use kernel matrices, not networks.
    clock: returns seconds.
  """

  def __init__(
    self,
    total: int,
    name: str,
    log_steps=(),
    write=None,
    kernel: bool = True,
    clock=time.perf_counter,
  ):
    self._total, self._log_steps, self._write, self._kernel, self._clock = (
      total,
      tuple(log_steps),
      write,
      kernel,
      clock,
    )
    self._done, self._seconds, self._logs, self._log_seconds, self._last = 0, 0.0, 0, 0.0, clock()
    self._marks = [(0, 0.0)]
    self._bar = tqdm(
      total=total,
      desc=name,
      unit="step",
      disable=None if write and total else True,
      leave=False,
      bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )
    self._part = planner.part(
      f"the steps of {name}",
      "reduce --target_batch_size, --images_per_class, --train_rows or --width",
    )
    self._bar.set_postfix_str(
      "preparing"
    )  # a method may train experts first; then its step is compiled

  def __enter__(self):
    self._part.__enter__()
    return self

  def __exit__(self, *error):
    self._bar.close()
    return self._part.__exit__(*error)

  def compiled(self, executable) -> None:
    """Called when the steps are compiled: prints a large need of memory; OutOfMemory if it does not fit."""
    if self._write and (warning := memory_line(estimate.memory_of_steps(executable, self._kernel))):
      self._write(warning)
    planner.check_steps(executable, self._kernel)

  def advance(self, done: int) -> None:
    """Called when `done` steps are done."""
    now = self._clock()
    self._seconds += now - self._last
    self._last, self._done = now, done
    self._marks.append((done, self._seconds))
    left = self.seconds_left()
    self._bar.set_postfix_str(f"{estimate.duration(left)} left", refresh=False)
    self._bar.update(done - self._bar.n)
    if self._write and self._seconds > _SURE_SECONDS:
      if left > estimate.WORTH_SECONDS:
        self._write(
          f"estimate: {self._step_seconds():.3g} s per step, {estimate.duration(left)} for the remaining {self._total - done:,} steps"
        )
      self._write = None

  def logged(self, step: int) -> None:
    """Called when the work of a logged step is done; that of step 0 is not counted."""
    now = self._clock()
    if step > 0:
      self._logs, self._log_seconds = self._logs + 1, self._log_seconds + now - self._last
    self._last = now

  def seconds_left(self) -> float:
    """Remaining seconds, from the second half of the steps done and the mean time of a log."""
    steps = self._step_seconds() * (self._total - self._done)
    logs = (
      self._log_seconds / max(self._logs, 1) * sum(step > self._done for step in self._log_steps)
    )
    return steps + logs

  def _step_seconds(self) -> float:
    """Seconds per step; the first calls to the devices have few steps and are slower."""
    done, seconds = max(mark for mark in self._marks if mark[0] <= self._done // 2)
    return (self._seconds - seconds) / max(self._done - done, 1)


def memory_line(parts: list[estimate.Part]) -> str | None:
  """The memory that a device needs, if it is large or more than there is; else None."""
  total, available = sum(part.amount for part in parts), estimate.available_bytes()
  if total < estimate.WORTH_BYTES and total < (available or total + 1):
    return None
  there = (
    ""
    if not available
    else f" of {estimate.memory(available)}" + ("; it may not fit" if total > available else "")
  )
  return f"memory: {estimate.memory(total)} per device{there}: " + ", ".join(
    f"{part.name} {estimate.memory(part.amount)}" for part in parts
  )


@contextlib.contextmanager
def working(text: str, expected: float | None = None, shown: bool = True, remedy: str = ""):
  """Shows the elapsed seconds of the block in a terminal; names it if memory runs out.

  Args:
    text: what is being done.
    expected: seconds that it should take, if known.
    shown: whether to show a line.
    remedy: flags that reduce the memory of the block.
  """
  with (
    planner.part(
      f"the part {text!r}",
      f"reduce {remedy}" if remedy else "--dry_run shows what each part needs",
    ),
    _ticking(text, expected, shown),
  ):
    yield


@contextlib.contextmanager
def _ticking(text: str, expected: float | None, shown: bool):
  if not (shown and sys.stderr.isatty()):
    yield
    return
  done = threading.Event()

  def tick():
    if done.wait(1.0):
      return
    of = f" of about {estimate.duration(expected)}" if expected else ""
    with tqdm(total=0, desc=text, leave=False, bar_format="{desc}: {elapsed}" + of) as bar:
      bar.start_t -= 1.0
      while not done.wait(0.5):
        bar.refresh()

  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
