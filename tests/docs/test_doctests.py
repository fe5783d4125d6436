"""Examples in docstrings run."""

import doctest
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import standard_promotion

import kipcore

PACKAGE = pathlib.Path(kipcore.__file__).parent
# Names that examples may use without importing them, as documented on the front page.
NAMES = {"jax": jax, "jnp": jnp, "np": np, "kipcore": kipcore}


def examples() -> dict[str, list[doctest.DocTest]]:
  """The examples of each module that has some."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    if ">>> " not in path.read_text():
      continue
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
      ".__init__"
    )
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=NAMES)
    if tests := [test for test in tests if test.examples]:
      found[name] = tests
  return found


EXAMPLES = examples()


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_run(module):
  report = []
  runner = doctest.DocTestRunner(verbose=False)
  with standard_promotion():  # the default of JAX
    for test in EXAMPLES[module]:
      runner.run(test, out=report.append)
  assert runner.tries and not runner.failures, "".join(report)


# The main functions.
MAIN = (
  "approximate_krr_sensitivities",
  "architecture",
  "conv_net",
  "effective_dimension",
  "fc",
  "fit_preprocess",
  "gram",
  "guarantee_at",
  "importance_sample",
  "kip",
  "kmeans",
  "kmeans_plusplus",
  "krr_fit",
  "krr_loss",
  "krr_predict",
  "krr_sensitivities",
  "label_solve",
  "measure_coreset",
  "nngp_fn",
  "ntk_fn",
  "one_hot_centered",
  "rbf_fn",
  "relative_ridge",
  "ridge_leverage_scores",
  "sample_size",
  "sensitivity_sample",
)


@pytest.mark.parametrize("name", MAIN)
def test_main_functions_have_an_example(name):
  assert "Example:\n" in inspect.getdoc(getattr(kipcore, name)) and ">>> " in inspect.getdoc(
    getattr(kipcore, name)
  )
