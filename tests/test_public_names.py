"""The public names are complete, and the order of their imports does not matter."""

import ast
import inspect
import pathlib
import subprocess
import sys
import typing

import numpy as np
import optax
import pytest
from helpers import image_problem

import kipcore


def kipcore_types() -> dict[type, str]:
  """Every class of kipcore that a public signature, method or field mentions, and where."""
  found: dict[type, str] = {}

  def visit(annotation, where):
    if isinstance(annotation, (list, tuple)):
      for part in annotation:
        visit(part, where)
      return
    for part in typing.get_args(annotation):
      visit(part, where)
    if hasattr(annotation, "array_type"):  # of jaxtyping
      visit(annotation.array_type, where)
    if inspect.isclass(annotation) and annotation.__module__.partition(".")[0] == "kipcore":
      if annotation not in found:
        found[annotation] = where
        members(annotation)

  def hints(thing, where):
    for name, annotation in typing.get_type_hints(thing).items():
      if not name.startswith("_"):
        visit(annotation, f"{where}.{name}")

  def members(cls):
    if not issubclass(cls, Exception):
      hints(cls, cls.__name__)
    for name, member in vars(cls).items():
      member = member.fget if isinstance(member, property) else member
      if inspect.isfunction(member) and (not name.startswith("_") or name == "__call__"):
        hints(inspect.unwrap(member), f"{cls.__name__}.{name}")

  for name in kipcore.__all__:
    thing = getattr(kipcore, name)
    if inspect.isclass(thing):
      visit(thing, name)
    elif callable(thing):
      hints(inspect.unwrap(thing), name)
  return found


def test_every_type_of_a_public_signature_is_public():
  found = kipcore_types()
  assert kipcore.Support in found and kipcore.KMeansResult in found and len(found) > 50
  public = {id(getattr(kipcore, name)) for name in kipcore.__all__}
  hidden = {cls.__qualname__: where for cls, where in found.items() if id(cls) not in public}
  assert not {name: where for name, where in hidden.items() if not name.startswith("_")}


def test_every_exception_is_a_kipcore_error_and_keeps_its_built_in_base():
  errors = [
    getattr(kipcore, name)
    for name in kipcore.__all__
    if inspect.isclass(getattr(kipcore, name)) and issubclass(getattr(kipcore, name), Exception)
  ]
  assert len(errors) >= 7
  for error in errors:
    assert issubclass(error, kipcore.KipcoreError)
    assert error is kipcore.KipcoreError or issubclass(error, (ValueError, ArithmeticError))


def test_public_names_exist_once_and_none_is_a_module():
  assert len(set(kipcore.__all__)) == len(kipcore.__all__)
  assert not [name for name in kipcore.__all__ if inspect.ismodule(getattr(kipcore, name))]


@pytest.mark.parametrize("name", sorted({*kipcore._DEPRECATED, *kipcore._OPTIMIZERS}))
def test_deprecated_names_warn_and_work(name):
  with pytest.warns(DeprecationWarning, match=f"kipcore.{name} is"):
    assert callable(getattr(kipcore, name))
  assert name not in kipcore.__all__


def test_reversing_the_imports_changes_nothing():
  """The package, imported with its import statements in reverse order, has the same public names and kernels."""
  path = pathlib.Path(kipcore.__file__)
  tree = ast.parse(path.read_text())
  imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
  others = [node for node in tree.body if not isinstance(node, ast.ImportFrom)]
  tree.body = [*imports[::-1], *others]
  program = (
    "import sys, types\n"
    f"package = types.ModuleType('kipcore'); package.__path__ = [{str(path.parent)!r}]\n"
    f"package.__file__ = {str(path)!r}; sys.modules['kipcore'] = package\n"
    f"exec(compile({ast.unparse(tree)!r}, 'reversed', 'exec'), package.__dict__)\n"
    "import jax.numpy as jnp\n"
    "kernel = package.ntk_fn(package.conv_net(1))\n"
    "assert kernel(jnp.ones((2, 4, 4, 1))).shape == (2, 2)\n"
    "assert not [n for n in package.__all__ if type(getattr(package, n)) is types.ModuleType]\n"
    "print(len(package.__all__))"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.stdout.strip() == str(len(kipcore.__all__)), done.stderr


def test_the_old_name_of_the_checkpoint_policy_warns_and_works():
  support, x, y = image_problem(np.float32, n=20)
  distiller = kipcore.Distiller(
    kipcore.kip(kipcore.linear_fn(), kipcore.KIPOptions(relative_ridge=1e-2)),
    kipcore.sampler("uniform"),
    optax.sgd(0.1),
    10,
  )
  stop = kipcore.CheckpointPolicy(save=lambda snapshot: None, stop=lambda: True)
  with pytest.warns(DeprecationWarning, match="keeping is deprecated: use checkpoint_policy"):
    old = kipcore.distill(0, distiller, support, x, y, 50, keeping=stop)
  new = kipcore.distill(0, distiller, support, x, y, 50, checkpoint_policy=stop)
  assert int(old.state.step) == int(new.state.step) < 50
