"""The suite checks annotations: a wrong one fails a test, and errors for invalid input come first."""

import importlib
import sys

import jax
import jax.numpy as jnp
import pytest
import typechecks
from jaxtyping import TypeCheckError

import kipcore

PLANTED = """
import dataclasses
import jax
from jaxtyping import Array, Float

def right(x: Float[Array, "n d"]) -> Float[Array, " n"]:
  return x.sum(1)

def wrong_result(x: Float[Array, "n d"]) -> Float[Array, " n"]:
  return x.sum(0)

def wrong_argument(x: Float[Array, " n"]) -> Float[Array, ""]:
  return x.sum()

def validated(x: Float[Array, " n"]) -> Float[Array, " n"]:
  if x.ndim != 1:
    raise ValueError("x: expected one axis")
  return x

@jax.jit
def wrong_when_traced(x: Float[Array, "n d"]) -> Float[Array, "d n"]:
  return x

@dataclasses.dataclass(frozen=True)
class Options:
  steps: int
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
  """The module above, imported under the hook."""
  folder = tmp_path_factory.mktemp("planted")
  (folder / "planted_annotations.py").write_text(PLANTED)
  sys.path.insert(0, str(folder))
  try:
    with typechecks.install("planted_annotations"):
      yield importlib.import_module("planted_annotations")
  finally:
    sys.path.remove(str(folder))


@pytest.mark.parametrize("name", ["wrong_result", "wrong_argument", "wrong_when_traced"])
def test_wrong_annotations_are_found(planted, name):
  with pytest.raises(TypeCheckError, match=name):
    getattr(planted, name)(jnp.ones((2, 3)))


def test_wrong_fields_are_found(planted):
  with pytest.raises(TypeCheckError, match="Options"):
    planted.Options("many")


def test_right_annotations_pass(planted):
  assert planted.right(jnp.ones((2, 3))).shape == (2,)
  assert jax.jit(planted.right)(jnp.ones((2, 3))).shape == (2,)
  assert planted.Options(3).steps == 3


def test_invalid_input_meets_the_error_of_the_library(planted):
  with pytest.raises(ValueError, match="expected one axis"):
    planted.validated(jnp.ones((2, 3)))
  with pytest.raises((TypeError, ValueError), match="expected"):
    kipcore.one_hot_centered(jnp.ones((2, 3)), 3)


def test_kipcore_is_checked():
  assert sys.modules["kipcore.krr"].__loader__.__class__.__name__ == "_JaxtypingLoader"
  assert kipcore.krr_fit.__wrapped__.__module__ == "kipcore.krr"
