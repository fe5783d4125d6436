"""Examples in docstrings run, and the API reference is complete."""

import doctest
import html
import importlib
import inspect
import pathlib
import posixpath
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import standard_promotion

import kipcore
from experiments.docs import reference

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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The pages of the reference by name, built without warnings."""
  pytest.importorskip("pdoc")
  folder = tmp_path_factory.mktemp("site")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    written = reference.build(folder)
  return {path.relative_to(folder).as_posix(): path.read_text() for path in written}


def test_front_page_links_each_public_name(site):
  found = re.findall(r'href="([\w/]+\.html)#(\w+)">kipcore\.', site["kipcore.html"])
  assert {name for _, name in found} >= {
    getattr(getattr(kipcore, n), "__name__", n) for n in kipcore.__all__ if n != "__version__"
  }
  for page, name in found:
    assert f'id="{name}"' in site[page], f"{page} does not document {name}"


def test_reference_links_resolve(site):
  for name, text in site.items():
    for target in re.findall(r'href="([^":#]+\.html)', text):
      path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
      assert path in site, f"{name}: {target}"


def test_theory_page_contains_all_files_and_formulas(site):
  for path in reference.THEORY.glob("*.md"):
    text = path.read_text()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M):
      assert html.escape(heading, quote=False) in site["theory.html"], heading
    for formula in re.findall(r"\$\$(.+?)\$\$", text, flags=re.S):
      assert formula.strip() in html.unescape(site["theory.html"]), formula


def test_missing_pdoc_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pdoc", None)
  with pytest.raises(SystemExit, match="pip install"):
    reference.build(tmp_path)
  assert not list(tmp_path.iterdir())
