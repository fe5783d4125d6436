"""The package: declared dependencies equal the imports, and only `kipcore` is installed."""

import ast
import configparser
import pathlib
import re
import sys

import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Distributions whose import name differs.
IMPORT_NAMES = {
  "absl-py": "absl",
  "orbax-checkpoint": "orbax",
  "pillow": "PIL",
  "scikit-learn": "sklearn",
  "jinja2": "jinja2",
}
# Requirements that another one imports without declaring them.
IMPORTED_BY = {"importlib_resources": "tensorflow-datasets"}
# Extras that kipcore imports; the others are tools.
OPTIONAL = ("neural-tangents", "tfds", "torch", "tensorboard", "arrow")
# What requires TensorFlow, which Colab does not have on TPUs, and TensorFlow Datasets.
TENSORFLOW = {"tensorflow", "tensorflow-datasets", "neural-tangents"}


def configuration() -> configparser.ConfigParser:
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return parser


def distributions(text: str) -> set[str]:
  """Names in a list of requirements, without versions and comments."""
  lines = (line.strip() for line in text.splitlines())
  return {re.split(r"[<>=!~\[; ]", line)[0] for line in lines if line and not line.startswith("#")}


def imports() -> set[str]:
  """Top-level names that `kipcore` imports, other than itself and the standard library."""
  found = set()
  for path in (ROOT / "kipcore").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module:
        found.add(node.module.split(".")[0])
      elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        found |= {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
  return found - set(sys.stdlib_module_names) - {"kipcore"}


def import_name(distribution: str) -> str:
  return IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))


def requirements() -> tuple[set[str], dict[str, set[str]]]:
  """Names of the packages that are always installed, and of those that each extra adds."""
  parser = configuration()
  extras = {name: distributions(text) for name, text in parser["options.extras_require"].items()}
  return distributions(parser["options"]["install_requires"]), extras


def test_imports_equal_the_declared_requirements():
  core, extras = requirements()
  declared = core.union(*(extras[name] for name in OPTIONAL))
  used = imports()
  assert used <= {import_name(name) for name in declared}
  assert {name for name in declared if import_name(name) not in used} == set(IMPORTED_BY)
  assert all({name, user} <= extras["tfds"] for name, user in IMPORTED_BY.items())


def test_tensorflow_is_optional_and_the_tests_install_it():
  core, extras = requirements()
  assert not core & TENSORFLOW
  assert extras["neural-tangents"] | extras["tfds"] >= TENSORFLOW
  (own,) = re.findall(r"^kipcore\[(.*)\]$", configuration()["options.extras_require"]["test"], re.M)
  assert set(own.split(",")) == {"neural-tangents", "tfds"}


def test_only_kipcore_is_installed():
  parser = configuration()
  patterns = parser["options.packages.find"]["include"].split()
  packages = setuptools.find_packages(str(ROOT), include=patterns)
  assert packages and {name.split(".")[0] for name in packages} == {"kipcore"}
  folders = {path.parent for path in (ROOT / "kipcore").rglob("*.py")}
  assert {ROOT / name.replace(".", "/") for name in packages} == folders, "each has an __init__.py"


def test_package_data_are_declared():
  patterns = configuration()["options.package_data"]["kipcore"].split()
  declared = {path for pattern in patterns for path in (ROOT / "kipcore").glob(pattern)}
  other = {path for path in (ROOT / "kipcore").rglob("*") if path.is_file()}
  other -= {path for path in other if path.suffix in (".py", ".pyc")}
  assert declared == other and ROOT / "kipcore" / "py.typed" in declared


def test_the_license_is_the_one_declared():
  text = (ROOT / "LICENSE").read_text()
  assert configuration()["metadata"]["license"] == "Apache-2.0"
  assert "Apache License" in text and "Version 2.0, January 2004" in text
