"""Structure of the code: dependencies between packages, public names, side effects of imports."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import kipcore

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kipcore"

# A unit (a module or package of `kipcore`) may import itself, units on earlier lines, and units to
# its left on the same line. `__init__` is the public list; nothing below it may import it.
LAYERS = [
  ["version", "types", "checks", "pytrees", "keys", "linalg", "devices", "blocks", "convolution"],
  ["architectures", "augment", "preprocess", "krr", "predictions", "functional"],
  ["kernels", "networks"],
  ["evaluation"],
  ["selection"],
  ["distillation"],
  ["io"],
  ["datasets", "report", "sklearn"],
  ["__init__"],
  ["cli"],
  ["experiments"],
]
RANK = {unit: i for i, unit in enumerate(unit for layer in LAYERS for unit in layer)}

# Units that may read and write files, print, and use the clock.
SIDE_EFFECTS = {"io", "datasets", "report", "cli", "experiments"}

# Libraries that only some modules may import: they are slow to import or optional.
OWNERS = {
  "neural_tangents": {"kernels.stax"},
  "tensorflow": {"io.quiet_tensorflow"},
  "tensorflow_datasets": {"io.quiet_tensorflow"},
  "torch": {"io.export"},
  "safetensors": {"io.export"},
  "PIL": {"report.pictures", "io.export", "report.html", "datasets.decoding", "io.image_sets"},
  "pyarrow": {"datasets.arrow_tables", "datasets.row_files"},
}


def unit_of(name: str) -> str:
  """The unit of a module given by its full dotted name."""
  parts = name.split(".")
  if parts[0] == "experiments":
    return "experiments"
  return parts[1] if len(parts) > 1 else "__init__"


def modules(*folders: str) -> list[tuple[str, pathlib.Path]]:
  """Full dotted names and paths of all modules under the folders."""
  found = []
  for folder in folders:
    for path in sorted((ROOT / folder).rglob("*.py")):
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
      found.append((name, path))
  return found


def imported_modules(source: str) -> list[str]:
  """Full names that a module imports: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      found += [f"{node.module}.{alias.name}" for alias in node.names]
  return found


def upward_imports(name: str, source: str) -> list[str]:
  """The imports of a module that break the table of layers."""
  wrong = []
  for target in imported_modules(source):
    root = target.split(".")[0]
    if root not in ("kipcore", "experiments"):
      continue
    unit = unit_of(target)
    if unit not in RANK:  # `from kipcore import ntk_fn`: the public list
      unit = "__init__"
    if RANK[unit] > RANK[unit_of(name)]:
      wrong.append(target)
  return wrong


@pytest.mark.parametrize("name, path", modules("kipcore", "experiments"), ids=lambda v: str(v)[:60])
def test_imports_follow_the_layers(name, path):
  assert unit_of(name) in RANK, f"{name} has no layer: add it to LAYERS and to WORKSPACE.md"
  assert not upward_imports(name, path.read_text())


@pytest.mark.parametrize(
  "name, source",
  [
    ("kipcore.krr", "from kipcore.kernels import ntk_fn"),
    ("kipcore.kernels.dense", "def f():\n  from kipcore.io import npz"),
    ("kipcore.selection.coreset", "import kipcore.distillation.loop"),
    ("kipcore.io.npz", "from kipcore import ntk_fn"),
    ("kipcore.report.html", "import kipcore"),
    ("kipcore.cli.distill", "from experiments.docs import tables"),
  ],
)
def test_a_planted_upward_import_is_found(name, source):
  assert upward_imports(name, source)


@pytest.mark.parametrize("name, path", modules("kipcore"), ids=lambda v: str(v)[:60])
def test_library_modules_have_no_side_effects(name, path):
  source = path.read_text()
  tree = ast.parse(source)
  assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "raise a typed error"
  for target in imported_modules(source):
    owners = OWNERS.get(target.split(".")[0])
    assert owners is None or name.removeprefix("kipcore.") in owners, f"{name} imports {target}"
  if unit_of(name) in SIDE_EFFECTS:
    return
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      assert called not in ("print", "open", "input"), f"{name} calls {called}"
      assert called != "jax.config.update", f"{name} changes the global configuration"


@pytest.mark.parametrize("name", [n for n in kipcore.__all__ if n != "__version__"])
def test_public_names_are_documented(name):
  thing = getattr(kipcore, name)
  doc = inspect.getdoc(thing)
  assert doc and len(doc.splitlines()[0]) <= 120
  assert doc.splitlines()[0].rstrip().endswith((".", ":", "`."))
  if inspect.isfunction(thing):
    parameters = list(inspect.signature(thing).parameters)
    if parameters:
      assert "Args:" in doc, f"{name} documents no arguments"
      for parameter in parameters:
        assert re.search(rf"\b{parameter}\b", doc), f"{name} does not document {parameter}"
    assert "Returns:" in doc or "-> None" in str(inspect.signature(thing)), name


def test_public_names_are_unique_and_exist():
  assert len(kipcore.__all__) == len(set(kipcore.__all__))
  for name in kipcore.__all__:
    assert hasattr(kipcore, name), name


def test_no_public_name_hides_a_module():
  """After `import kipcore`, each attribute with the name of a submodule is that submodule."""
  for info in pkgutil.walk_packages(kipcore.__path__, "kipcore."):
    parent, _, last = info.name.rpartition(".")
    importlib.import_module(info.name) if ".cli" not in info.name else None
    if parent in sys.modules and hasattr(sys.modules[parent], last):
      assert inspect.ismodule(getattr(sys.modules[parent], last)), f"{info.name} is hidden"


IMPORT_ALONE = """
import importlib, json, os, sys
# Importing any module of kipcore imports the package first, with the modules that its __init__ needs.
import kipcore
names = [name for name in json.loads(sys.argv[1]) if name not in sys.modules]
assert len(names) > 50 and "kipcore.cli.distill" in names
failed = {}
for name in names:
  read, write = os.pipe()
  process = os.fork()
  if not process:
    try:
      importlib.import_module(name)
    except BaseException as error:
      os.write(write, repr(error).encode())
    os._exit(0)
  os.close(write)
  with os.fdopen(read) as pipe:
    message = pipe.read()
  if os.waitpid(process, 0)[1] or message:
    failed[name] = message
print(json.dumps(failed))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess:
  """A new Python in the root of the repository."""
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True
  )


def test_each_module_imports_alone():
  """In a process that has imported the package and no other module of kipcore or experiments."""
  names = [name for name, _ in modules("kipcore", "experiments")]
  assert json.loads(run_python("-c", IMPORT_ALONE, json.dumps(names)).stdout) == {}


@pytest.mark.slow
def test_order_of_imports_in_init_is_free(tmp_path):
  """With the imports of `kipcore/__init__.py` reversed, all public names are the same objects."""
  source = (PACKAGE / "__init__.py").read_text()
  tree = ast.parse(source)
  imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
  places = iter(reversed(imports))
  tree.body = [next(places) if node in imports else node for node in tree.body]
  reversed_source = ast.unparse(tree)
  code = """
import sys, types
spec = __import__("importlib.util").util.find_spec("kipcore")
kipcore = types.ModuleType("kipcore")
kipcore.__path__, kipcore.__spec__, kipcore.__file__ = spec.submodule_search_locations, spec, spec.origin
sys.modules["kipcore"] = kipcore
if len(sys.argv) > 1:
  exec(compile(open(sys.argv[1]).read(), spec.origin, "exec"), kipcore.__dict__)
else:
  spec.loader.exec_module(kipcore)
for name in kipcore.__all__:
  thing = getattr(kipcore, name)
  print(name, getattr(thing, "__module__", ""), getattr(thing, "__qualname__", type(thing).__name__))
kernel = kipcore.ntk_fn(kipcore.conv_net(1))
import numpy as np
print(kernel(np.ones((2, 4, 4, 1), np.float32)).shape)
"""
  path = tmp_path / "init.py"
  path.write_text(reversed_source)
  assert run_python("-c", code, str(path)).stdout == run_python("-c", code).stdout


def test_import_takes_less_than_half_the_time_of_the_dependencies():
  """A ratio of times in one process, independent of the machine; bytecode is precompiled."""
  run_python("-c", "import kipcore")
  lines = run_python("-X", "importtime", "-c", "import kipcore").stderr.splitlines()
  times = [re.match(r"import time:\s*(\d+) \|\s*\d+ \|\s*([\w.]+)$", line) for line in lines]
  own = sum(int(t[1]) for t in times if t and t[2].split(".")[0] == "kipcore")
  total = sum(int(t[1]) for t in times if t)
  assert 0 < own < 0.5 * (total - own), (own, total)


def test_import_is_light():
  code = (
    "import sys; import kipcore; "
    "print({'tensorflow', 'tensorflow_datasets', 'neural_tangents', 'sklearn', 'matplotlib', "
    "'torch'} & set(sys.modules) or 'light')"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  assert out.strip() == "light"


def test_launchers_only_launch():
  launchers = sorted((ROOT / "experiments").glob("*.py"))
  assert {path.stem for path in launchers} == {"__init__"} | {
    f"run_{name}" for name in ("distill", "select", "evaluate", "compare", "export", "report")
  }
  for path in launchers:
    assert len(path.read_text().splitlines()) <= 10, path.name
