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
# Imports that another requirement installs, and requirements that another one imports without declaring them.
INSTALLED_BY = {"tensorflow": "neural-tangents"}
IMPORTED_BY = {"importlib_resources": "tensorflow-datasets"}


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


def test_every_import_is_declared():
  parser = configuration()
  extras = {name: distributions(text) for name, text in parser["options.extras_require"].items()}
  core = distributions(parser["options"]["install_requires"])
  optional = extras["torch"] | extras["tensorboard"] | extras["arrow"]
  declared = {import_name(name) for name in core | optional}
  assert imports() - declared == set(INSTALLED_BY)
  assert set(INSTALLED_BY.values()) <= core


def test_every_declared_requirement_is_imported():
  core = distributions(configuration()["options"]["install_requires"])
  used = imports()
  unused = {name for name in core if import_name(name) not in used}
  assert unused == set(IMPORTED_BY) and set(IMPORTED_BY.values()) <= core


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
