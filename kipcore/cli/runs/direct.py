"""Methods without a loop: optimal labels of real images, and distillation in closed form."""

import dataclasses
import time
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kipcore import checks, krr
from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig
from kipcore.cli.errors import usage
from kipcore.distillation.methods import closed_form as in_closed_form
from kipcore.evaluation import krr as krr_evaluation
from kipcore.types import Support


class Outcome(NamedTuple):
  """The result of a method, and its cost.

  Attributes:
    support: the distilled set.
    history: a dict per logged step.
    target_evaluations: targets whose predictions were computed.
    compile_seconds: time of compilation.
    seconds: time of the steps.
    importance_gain: last value of a sampler by loss; None for other samplers.
    own: further results of the method, for the result file.
    scores: `(n,)` latest score of each training row, NaN if it was never drawn; None without scores.
  """

  support: Support
  history: list
  target_evaluations: int
  compile_seconds: float
  seconds: float
  importance_gain: float | None = None
  own: dict = {}
  scores: np.ndarray | None = None


def solve_labels(config: DistillConfig, data, support: Support) -> Outcome:
  """The optimal labels of the initial images, over all training rows."""
  started = time.perf_counter()
  ridge = krr.relative_ridge(data.kernel_fn.diag(support.x), config.relative_ridge)
  solution = krr.label_solve_rows(
    data.kernel_fn, support.x, jnp.asarray(data.x_train), jnp.asarray(data.y_train), float(ridge)
  )
  checks.raise_for_status("label solve", solution.status)
  return Outcome(
    Support(support.x, solution.labels),
    [],
    data.x_train.shape[0],
    0.0,
    time.perf_counter() - started,
  )


def closed_form(config: DistillConfig, data, support: Support) -> Outcome:
  """The set whose ridge regression, in the features of an invertible map, equals that of all training rows."""
  started = time.perf_counter()
  with usage():
    options = dataclasses.replace(recipes.options_of(config), relative_ridge=config.relative_ridge)
    found = in_closed_form.krr_closed_form(
      config.seed, data.x_train, data.y_train, support, options
    )
  checks.raise_for_status("closed form", found.status)
  seconds = time.perf_counter() - started
  scored = krr_evaluation.evaluate_krr(
    in_closed_form.feature_kernel(found.feature_map),
    found.support,
    data.x_test,
    data.y_test,
    ridge=found.support_ridge,
  )
  own = {
    "feature_map_test_accuracy": float(scored.accuracy),
    "full_model_error": found.error,
    "full_model_ridge": found.ridge,
  }
  return Outcome(found.support, [], data.x_train.shape[0], 0.0, seconds, own=own)


METHODS = {"label_solve": solve_labels, "krr_closed_form": closed_form}
