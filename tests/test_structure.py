"""The house itself: layers, documented public names, what an import costs."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import kipcore

PACKAGE = pathlib.Path(kipcore.__file__).parent
# A room may import rooms of its own layer that stand before it, and of lower layers.
LAYERS = [
    ["version", "types", "checks", "keys", "linalg", "architectures", "devices", "gram", "kernels.dual", "kernels.dense",
     "kernels.covariance", "kernels.conv", "kernels.finite", "kernels.stax", "kernels", "networks", "resnet"],
    ["krr", "scoring", "leverage", "score_ridge", "sensitivity_cores", "sensitivity", "streaming", "draws", "clustering",
     "representatives", "cholesky", "pursuit", "sampling", "guarantees", "certificate", "preprocess"],
    ["distill.augment", "evaluate", "ranking", "coreset", "absorb", "distill.targets", "distill.method", "distill.samplers",
     "distill.importance", "distill.optimizers", "distill.features", "distill.kip", "distill.rfad", "distill.frepo", "distill.distribution_matching",
     "distill.gradient_matching", "distill.experts", "distill.trajectory_matching", "distill.rcig", "distill.closed_form", "distill.snapshot", "distill.loop", "distill"],
    ["files", "npz", "image_folders", "tfds_data", "datasets", "torch_files", "publishers", "published", "export", "artifact", "checkpoint", "trajectories", "report", "html_report", "charts"],
]
ORDER = [room for layer in LAYERS for room in layer]
FILES_AND_CLOCKS = {"files", "npz", "image_folders", "tfds_data", "datasets", "torch_files", "publishers", "published", "export", "artifact", "checkpoint", "trajectories", "report", "html_report"}


def rooms():
  for path in sorted(PACKAGE.rglob("*.py")):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if name != "__init__":
      yield name, path


def imports(path):
  """Names of modules that a file imports, relative to the package where they belong to it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full.removeprefix("kipcore.") in ORDER else node.module


@pytest.mark.parametrize("name, path", list(rooms()))
def test_rooms_import_downwards_only(name, path):
  assert name in ORDER, f"{name} has no place in the layers: add it to tests/test_structure.py and WORKSPACE.md"
  for module in imports(path):
    if module.startswith("kipcore."):
      room = module.removeprefix("kipcore.")
      assert room in ORDER, f"{name} imports {module}"
      assert ORDER.index(room) < ORDER.index(name), f"{name} imports {room}, which stands above it"
    assert module != "kipcore", f"{name} imports the whole package"
    owner = {"neural_tangents": "kernels.stax", "tensorflow_datasets": "tfds_data", "tensorflow": "tfds_data",
             "torch": "export", "safetensors": "export", "PIL": "export html_report image_folders"}
    assert name in owner.get(module.split(".")[0], name).split(), f"{name} imports {module}, which {owner} owns"


@pytest.mark.parametrize("name, path", list(rooms()))
def test_pure_rooms_have_no_side_effects(name, path):
  text = path.read_text()
  assert "assert " not in re.sub(r'""".*?"""', "", text, flags=re.S), "library code raises typed errors"
  if name in FILES_AND_CLOCKS:
    return
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      assert called not in ("print", "open", "input"), f"{name} calls {called}"
      assert called != "jax.config.update", f"{name} changes the global configuration"


@pytest.mark.parametrize("path", [p for _, p in rooms()], ids=lambda p: p.name)
def test_files_can_be_read_in_one_sitting(path):
  assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", [n for n in kipcore.__all__ if n != "__version__"])
def test_public_names_are_documented(name):
  thing = getattr(kipcore, name)
  doc = inspect.getdoc(thing)
  assert doc and len(doc.splitlines()[0]) <= 120 and doc.splitlines()[0].rstrip().endswith((".", ":", "`."))
  if inspect.isfunction(thing):
    parameters = [p for p in inspect.signature(thing).parameters]
    if parameters:
      assert "Args:" in doc, f"{name} documents no arguments"
      for parameter in parameters:
        assert re.search(rf"\b{parameter}\b", doc), f"{name} does not document {parameter}"
    assert "Returns:" in doc or "-> None" in str(inspect.signature(thing)), f"{name} documents no result"


def test_public_names_are_complete():
  assert sorted(kipcore.__all__) == sorted(set(kipcore.__all__))
  for name in kipcore.__all__:
    assert hasattr(kipcore, name)


def test_import_is_light():
  code = ("import sys, time; start = time.perf_counter(); import kipcore; seconds = time.perf_counter() - start; "
          "heavy = {'tensorflow', 'tensorflow_datasets', 'neural_tangents', 'sklearn', 'matplotlib', 'torch'} & set(sys.modules); "
          "print(heavy or 'light')")
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  assert out.strip() == "light"


def test_experiments_stay_thin():
  for path in (PACKAGE.parent / "experiments").glob("run_*.py"):
    if path.name != "run_folder.py":
      assert len(path.read_text().splitlines()) <= 70, f"{path.name} is longer than one screen"


def test_every_room_imports_on_its_own():
  for name, _ in rooms():
    importlib.import_module(f"kipcore.{name}")


def test_the_list_of_slow_tests_names_tests():
  folder = pathlib.Path(__file__).parent
  for line in (folder / "slow.txt").read_text().splitlines():
    if not line.startswith("#"):
      file, name = line.split("::")
      assert re.search(rf"^def {name.partition('[')[0]}\(", (folder / file).read_text(), flags=re.M), line
