"""Builds the API reference and the theory page: `python -m experiments.docs.reference --output_dir=site`.

Static HTML by pdoc (`pip install -e '.[docs]'`): one page per module of kipcore except the command line, a front
page that lists the public names, and one page from the Markdown files in `theory/`.
"""

import argparse
import inspect
import pathlib
import pkgutil
import types
import warnings

import kipcore

THEORY = pathlib.Path(__file__).parent / "theory"


def theory() -> str:
  """The theory page: `README.md`, then the other files in alphabetical order."""
  files = sorted(THEORY.glob("*.md"), key=lambda path: (path.name != "README.md", path.name))
  text = "\n\n".join(path.read_text() for path in files)
  return text.replace(
    "\\\\", "\\\\\\\\"
  )  # Markdown halves the two backslashes that end a row in LaTeX


def front() -> str:
  """The public names by the module that defines them, with their first lines; pdoc links full names in backticks."""
  lines = [inspect.getdoc(kipcore), ""]
  things = [getattr(kipcore, name) for name in kipcore.__all__ if name != "__version__"]
  for module in sorted({thing.__module__ for thing in things}):
    lines += ["", f"**`{module}`**", ""]
    for thing in (thing for thing in things if thing.__module__ == module):
      lines.append(f"- `{module}.{thing.__qualname__}`: {inspect.getdoc(thing).splitlines()[0]}")
  return "\n".join(lines)


def build(folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes the pages.

  Args:
    folder: created if needed; files of the same names are replaced.

  Returns:
    The paths of the files; `index.html` comes first.
  """
  try:
    import pdoc
    import pdoc.render
  except ImportError as error:
    raise SystemExit("pdoc is not installed: run pip install -e '.[docs]'") from error

  names = [module.name for module in pkgutil.walk_packages(kipcore.__path__, "kipcore.")]
  names = [name for name in names if not name.startswith("kipcore.cli")]
  modules = {name: pdoc.doc.Module.from_name(name) for name in ["kipcore", *names]}
  modules["kipcore"].docstring = front()
  modules["kipcore"].members.clear()  # they are on the pages of their modules
  modules["theory"] = pdoc.doc.Module(types.ModuleType("theory", theory()))
  # `optax.OptState` refers to a name by a string that pdoc looks up in the module that uses it.
  warnings.filterwarnings("ignore", ".*Import of ArrayTree failed")
  footer = f"kipcore {kipcore.__version__}"
  pdoc.render.configure(docformat="google", math=True, show_source=False, footer_text=footer)
  pages = {"index.html": pdoc.render.html_index(modules)}
  for name, module in modules.items():
    pages[name.replace(".", "/") + ".html"] = pdoc.render.html_module(module, modules)
  pages["search.js"] = pdoc.render.search_index(modules)
  for name, text in pages.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  return [folder / name for name in pages]


def main() -> None:
  """Builds the pages and prints where they start."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output_dir", default="site", help="folder of the pages")
  written = build(pathlib.Path(parser.parse_args().output_dir))
  print(f"{len(written)} files; open {written[0]}")


if __name__ == "__main__":
  main()
