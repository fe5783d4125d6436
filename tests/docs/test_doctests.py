"""The examples in docstrings run and say what happens; the reference has every public name, once."""

import doctest
import html
import importlib
import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import standard_promotion

import kipcore
from experiments.docs import reference
from kipcore.cli.errors import UsageError

PACKAGE = pathlib.Path(kipcore.__file__).parent
# What every example may use without importing it, as the front page of the reference says.
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
  with standard_promotion():  # as a user's JAX has it
    for test in EXAMPLES[module]:
      runner.run(test, out=report.append)
  assert runner.tries and not runner.failures, "".join(report)


# What people call first.
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


def test_each_public_name_has_one_place_in_the_reference():
  rooms = reference.public_names()
  listed = [room for topic in reference.topics(rooms).values() for room in topic]
  assert sorted(listed) == sorted(rooms)
  for room, names in rooms.items():
    assert names == sorted(set(names), key=names.index)
    assert all(
      getattr(importlib.import_module(f"kipcore.{room}"), name).__module__ == f"kipcore.{room}"
      for name in names
    )
  shown = [name for names in rooms.values() for name in names]
  for name in kipcore.__all__:
    assert name == "__version__" or shown.count(name) == 1, name


def test_docstrings_become_markdown():
  def documented():
    """Solves for `krr_fit` where 0 <= a * b < |c*|, with *the same* [ridge].

        a_i = b*_i <y, z>

    - one: goes
      on.

    Args:
      x, y: `(n,)`, a:b.
      z: none.

    Example:
      >>> print("<")
      <
    """

  text = reference.to_markdown(inspect.getdoc(documented), lambda code: f"<{code}>")
  assert html.unescape(text) == (
    "Solves for <krr_fit> where 0 <= a * b < |c*|, with *the same* [ridge].\n\n```text\na_i = b*_i <y, z>\n```\n\n"
    "- one: goes on.\n\n###### Args\n\n- **x, y**: <(n,)>, a:b.\n- **z**: none.\n\n"
    '###### Example\n\n```pycon\n>>> print("<")\n<\n```'
  )
  assert text.count("*") == 2 + 8 + 1 and "|" not in text and "[" not in text


def test_the_reference_is_built_or_says_what_is_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pdoc", None)
  with pytest.raises(UsageError, match="pip install"):
    reference.build(tmp_path)
  assert not list(tmp_path.iterdir())
  monkeypatch.undo()
  pytest.importorskip("pdoc")
  written = {
    path.relative_to(tmp_path).as_posix(): path.read_text() for path in reference.build(tmp_path)
  }
  assert (
    "kipcore/krr.html#krr_fit" in written["kipcore.html"]
    and 'id="krr_fit"' in written["kipcore/krr.html"]
  )
  for name, text in written.items():
    assert not re.search(r'(?:src|rel="stylesheet" href)="?https?:', text), (
      f"{name} needs a network"
    )
    for target in re.findall(r'href="([^":#]+\.html)', text):
      assert (tmp_path / name).parent.joinpath(target).resolve().exists(), f"{name}: {target}"
