"""How far a long run is: a bar with the time left, in a terminal alone; elsewhere plain lines and nothing else."""

import contextlib
import sys
import threading
import time

from tqdm import tqdm

from kipcore.cli.cost import estimate, planner

# Before so many seconds of steps nothing is said: compilation and short calls still weigh.
_SURE_SECONDS = 10.0


class Steps:
  """The bar of a loop, and one line that says how long it will take, where that is long.

  The time left counts steps and the work at logged steps apart: early in a run much is logged, and what is compiled for the
  first log is no measure of anything.

  Args:
    total: steps of the loop.
    name: before the bar.
    log_steps: after which `logged` is called.
    say: prints a line; None for a silent loop.
    kernel: whether the steps work through kernel matrices, else through networks.
    clock: seconds.
  """

  def __init__(
    self,
    total: int,
    name: str,
    log_steps=(),
    say=None,
    kernel: bool = True,
    clock=time.perf_counter,
  ):
    self._total, self._log_steps, self._say, self._kernel, self._clock = (
      total,
      tuple(log_steps),
      say,
      kernel,
      clock,
    )
    self._done, self._seconds, self._logs, self._log_seconds, self._last = 0, 0.0, 0, 0.0, clock()
    self._marks = [(0, 0.0)]
    self._bar = tqdm(
      total=total,
      desc=name,
      unit="step",
      disable=None if say and total else True,
      leave=False,
      bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )
    self._part = planner.part(
      f"the steps of {name}",
      "less by --target_batch_size, --images_per_class, --train_rows or --width",
    )
    self._bar.set_postfix_str(
      "getting ready"
    )  # a method may train experts first; then its step is compiled

  def __enter__(self):
    self._part.__enter__()
    return self

  def __exit__(self, *error):
    self._bar.close()
    return self._part.__exit__(*error)

  def compiled(self, executable) -> None:
    """The steps are compiled: what they need is said, where that is much; OutOfMemory where it is not there."""
    if self._say and (warning := memory_line(estimate.memory_of_steps(executable, self._kernel))):
      self._say(warning)
    planner.check_steps(executable, self._kernel)

  def advance(self, done: int) -> None:
    """So many steps are done, as of now."""
    now = self._clock()
    self._seconds += now - self._last
    self._last, self._done = now, done
    self._marks.append((done, self._seconds))
    left = self.seconds_left()
    self._bar.set_postfix_str(f"{estimate.duration(left)} left", refresh=False)
    self._bar.update(done - self._bar.n)
    if self._say and self._seconds > _SURE_SECONDS:
      if left > estimate.WORTH_SECONDS:
        self._say(
          f"estimate: {self._a_step():.3g} s a step, {estimate.duration(left)} for the other {self._total - done:,} steps"
        )
      self._say = None

  def logged(self, step: int) -> None:
    """The work of a logged step is done, as of now; that of step 0 is counted nowhere."""
    now = self._clock()
    if step > 0:
      self._logs, self._log_seconds = self._logs + 1, self._log_seconds + now - self._last
    self._last = now

  def seconds_left(self) -> float:
    """From the latest half of the steps done, and the mean of what was logged."""
    steps = self._a_step() * (self._total - self._done)
    logs = (
      self._log_seconds / max(self._logs, 1) * sum(step > self._done for step in self._log_steps)
    )
    return steps + logs

  def _a_step(self) -> float:
    """Seconds of a step; the first calls to the devices are of few steps, and slower."""
    done, seconds = max(mark for mark in self._marks if mark[0] <= self._done // 2)
    return (self._seconds - seconds) / max(self._done - done, 1)


def memory_line(parts: list[estimate.Part]) -> str | None:
  """What a device needs, where that is much or more than there is; else None."""
  total, available = sum(part.amount for part in parts), estimate.available_bytes()
  if total < estimate.WORTH_BYTES and total < (available or total + 1):
    return None
  there = (
    ""
    if not available
    else f", of {estimate.memory(available)} that there are"
    + ("; it may not fit" if total > available else "")
  )
  return f"memory: {estimate.memory(total)} a device{there}: " + ", ".join(
    f"{part.name} {estimate.memory(part.amount)}" for part in parts
  )


@contextlib.contextmanager
def working(text: str, expected: float | None = None, shown: bool = True, remedy: str = ""):
  """In a terminal, after a second, a line with the seconds that the block has taken; `OutOfMemory` of that name, where memory runs out.

  Args:
    text: what is being done.
    expected: seconds that it should take, where known.
    shown: False for no line at all.
    remedy: flags that make the block need less memory.
  """
  with (
    planner.part(
      f"the part {text!r}", f"less by {remedy}" if remedy else "--dry_run says what each part takes"
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
