"""Networks that are trained on the result of a run, to score it.

Training a few may take as long as all steps, so their accuracies are kept in the folder of a run until it has finished.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np

from kipcore import datasets
from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig
from kipcore.cli.cost import estimate
from kipcore.cli.errors import Stopped
from kipcore.cli.folder import run_folder
from kipcore.cli.folder.resume import StopSignals
from kipcore.cli.runs.loading import Data
from kipcore.evaluation import networks, ranking
from kipcore.types import Support

# Networks trained on each set that a result is compared with.
_COMPARED = 2
# Accuracies of networks that take longer are printed one by one.
_SILENT_SECONDS = 20.0
_NAME = "network_scores.json"


def evaluator(config: DistillConfig, data: Data) -> ranking.NetworkEvaluator:
  """How the networks of a run are trained."""
  return ranking.NetworkEvaluator(
    data.kernel_fn.arch,
    config.network_width or config.width,
    recipes.RECIPES[config.method].norm if config.protocol == "default" else None,
    num_steps=config.network_steps or None,
    protocol=config.protocol,
  )


class KeptScores:
  """Accuracies of the networks of one run, in a file that `done` deletes."""

  def __init__(
    self, folder: pathlib.Path, stop: StopSignals, write: Callable[[str], None] = lambda text: None
  ):
    """Reads the file, if the run was interrupted while networks were trained.

    Args:
      folder: folder of the run.
      stop: signals that stop the run after the next network.
      write: prints a line.
    """
    self._path, self._stop, self.write = folder / _NAME, stop, write
    self._found: dict[str, dict] = {}
    with contextlib.suppress(OSError, ValueError):  # none, or a file that was cut
      self._found = json.loads(self._path.read_text(encoding="utf-8"))

  def of(self, config: DistillConfig, support: Support, name: str) -> dict[int, float]:
    """The accuracies of the networks that were trained on a set, by number; the `known` of `evaluate_network`."""
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
    digest = datasets.sha256_of(support.x, support.y, np.frombuffer(settings, np.uint8))
    before = {int(number): accuracy for number, accuracy in self._found.get(digest, {}).items()}
    self._found[digest] = _Known(self, before, name, config.network_seeds)
    return self._found[digest]

  def added(self) -> None:
    """Writes the file; raises `Stopped` after a signal."""
    run_folder.write_json(self._path, self._found)
    if self._stop():
      raise Stopped(
        "stopped while networks were trained on the result; --resume continues with the next one",
        self._stop.status,
      )

  def done(self) -> None:
    """Deletes the file of a run that has finished."""
    self._path.unlink(missing_ok=True)


class _Known(dict[int, float]):
  """Accuracies of the networks of one set, which are written as they are added."""

  def __init__(self, kept: KeptScores, before: dict[int, float], name: str, count: int):
    super().__init__(before)
    self._kept, self._name, self._count = kept, name, count
    self._started = time.perf_counter()

  def __setitem__(self, number: int, accuracy: float) -> None:
    super().__setitem__(number, accuracy)
    seconds = time.perf_counter() - self._started
    if seconds > _SILENT_SECONDS:
      self._kept.write(
        f"network {number + 1} of {self._count} trained on the {self._name}: {100 * accuracy:.1f} % test accuracy "
        f"({estimate.duration(seconds)})"
      )
    self._kept.added()
    self._started = time.perf_counter()


def scores(
  config: DistillConfig,
  data: Data,
  support: Support,
  others: dict[str, Support] | None = None,
  kept: KeptScores | None = None,
) -> dict:
  """Test accuracy of finite networks trained on a support, for `result.json`; {} without seeds.

  Args:
    config: settings of the run.
    data: its data.
    support: the result.
    others: sets to compare with under the same protocol, by the first part of their key.
    kept: keeps the accuracies of networks for a resumed run; None to keep none.

  Returns:
    Accuracies of the networks, their mean and standard deviation, and the means of the other sets.

  Raises:
    Stopped: after a signal that `kept` knows.
  """
  if not config.network_seeds:
    return {}
  accuracies = _accuracies(config, data, support, kept, "result")
  fewer = dataclasses.replace(config, network_seeds=min(config.network_seeds, _COMPARED))
  found = {
    "network_test_accuracy": accuracies,
    "network_test_accuracy_mean": float(np.mean(accuracies)),
    "network_protocol": config.protocol,
  }
  if len(accuracies) > 1:
    found["network_test_accuracy_std"] = float(np.std(accuracies, ddof=1))
  for name, other in (others or {}).items():
    mean = float(np.mean(_accuracies(fewer, data, other, kept, f"set '{name}'")))
    found[f"{name}_network_test_accuracy_mean"] = mean
  return found


def _accuracies(
  config: DistillConfig, data: Data, support: Support, kept: KeptScores | None, name: str
) -> list[float]:
  how = evaluator(config, data)
  accuracies = networks.evaluate_network(
    config.seed,
    how.network,
    support,
    data.x_test,
    data.y_test,
    config.network_seeds,
    how.width,
    how.num_steps,
    norm=how.norm,
    protocol=how.protocol,
    known=None if kept is None else kept.of(config, support, name),
  )
  return [float(accuracy) for accuracy in accuracies]
