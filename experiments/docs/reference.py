"""Builds the documentation site: `python -m experiments.docs.reference --output_dir=site`.

Static HTML by pdoc (`pip install -e '.[docs]'`): pages from Markdown files (index, guides, theory, results), a page for
each topic of the API that lists its public names, and a page for each module of kipcore except the command line.
"""

import argparse
import inspect
import pathlib
import pkgutil
import re
import types
import warnings

import kipcore

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
THEORY = FOLDER / "theory"
GUIDES = FOLDER / "guides"
# Markdown pages by group of the menu: page -> files.
PAGES = {
  "Documentation": {"index": [GUIDES / "README.md"], "overview": [ROOT / "README.md"]},
  "Guides": {
    f"guides.{name}": [GUIDES / f"{name}.md"]
    for name in (
      "distill",
      "select_rows",
      "kernels",
      "neural_tangents",
      "add_a_method",
      "devices",
    )
  },
  "Background": {
    "theory": [THEORY / "README.md", THEORY / "kernels.md", THEORY / "selection.md"],
    "results": [ROOT / "experiments" / "results" / "README.md"],
    "guarantees": [ROOT / "tests" / "README.md"],
    "architecture": [ROOT / "WORKSPACE.md"],
  },
}
MARKDOWN = {page: files for group in PAGES.values() for page, files in group.items()}
# API topics: page -> title, and the modules whose public names it lists, with all modules inside them.
TOPICS = {
  "api.kernels": ("Kernels", ("kernels", "architectures")),
  "api.regression": (
    "Ridge regression, predictions and preprocessing",
    ("krr", "predictions", "preprocess"),
  ),
  "api.selection": ("Subset selection", ("selection", "sklearn")),
  "api.distillation": ("Distillation and samplers", ("distillation",)),
  "api.methods": ("Distillation methods", ("distillation.methods",)),
  "api.networks": (
    "Networks and evaluation",
    ("networks", "functional", "augment", "evaluation"),
  ),
  "api.files": ("Datasets, files and reports", ("io", "datasets", "report")),
  "api.types": ("Types and errors", ("types",)),
}
# Titles of pages whose first heading says something else.
TITLES = {"index": "Index", "overview": "Overview"}
# Code, or a link or picture that is not an address.
_CODE_OR_LINK = re.compile(
  r"`(?P<code>[^`]+)`|(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!\w+:)(?P<file>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
)


def url(page: str, target: str) -> str:
  """The relative address of a page (with dots for folders) or file from a page."""
  return "../" * page.count(".") + target


def address(page: str) -> str:
  """The path of a page in the site."""
  return page.replace(".", "/") + ".html"


def markdown(page: str, pictures: set[pathlib.Path]) -> str:
  """The text of a Markdown page, with links that are valid in the site.

  Args:
    page: a key of `MARKDOWN`.
    pictures: files that pages show; those of this page are added.

  Returns:
    Markdown. Links to files that are not in the site become text, and public names of kipcore become links.
  """
  pages = {file.resolve(): name for name, files in MARKDOWN.items() for file in files}
  names = public_names()

  def convert(match: re.Match, file: pathlib.Path) -> str:
    text, name, anchor = match["text"], match["file"], match["anchor"] or ""
    if code := match["code"]:
      module, qualified = names.get(code.removeprefix("kipcore."), ("", ""))
      linked = code.startswith("kipcore.") and module
      return f"[{match[0]}]({url(page, address(module))}#{qualified})" if linked else match[0]
    target = (file.parent / name).resolve() if name else file
    path = target.relative_to(ROOT).as_posix()
    if match["picture"]:
      pictures.add(target)
      return f"![{text}]({url(page, f'files/{path}')})"
    if target not in pages:
      return f"{text} (`{path}`)"
    there = "" if pages[target] == page and anchor else url(page, address(pages[target]))
    return f"[{text}]({there}{anchor})"

  texts = []
  for file in MARKDOWN[page]:
    text = re.sub(r"<!--.*?-->\n?", "\n", file.read_text(), flags=re.S)
    parts = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)  # code blocks stay as they are
    for i in range(0, len(parts), 2):
      parts[i] = _CODE_OR_LINK.sub(lambda match, file=file: convert(match, file), parts[i])
    texts.append("".join(parts))
  # Markdown halves the two backslashes that end a row in LaTeX.
  return "\n\n".join(texts).replace("\\\\", "\\\\\\\\")


def title(page: str) -> str:
  """The title in the menu: of a topic, or the first heading of a Markdown page."""
  if page in TOPICS:
    return TOPICS[page][0]
  if page in TITLES:
    return TITLES[page]
  return MARKDOWN[page][0].read_text().lstrip().splitlines()[0].lstrip("# ")


def public_names() -> dict[str, tuple[str, str]]:
  """Public name -> module that defines it, and its name there."""
  things = {name: getattr(kipcore, name) for name in kipcore.__all__ if name != "__version__"}
  return {name: (thing.__module__, thing.__qualname__) for name, thing in things.items()}


def topic_of(module: str) -> str:
  """The topic with the longest prefix of the name of a module."""
  prefixes = {
    f"kipcore.{prefix}": topic for topic, (_, modules) in TOPICS.items() for prefix in modules
  }
  fitting = [prefix for prefix in prefixes if f"{module}.".startswith(f"{prefix}.")]
  if not fitting:
    raise ValueError(f"TOPICS: expected a topic for {module}, got none")
  return prefixes[max(fitting, key=len)]


def topic(page: str) -> str:
  """The Markdown of a topic: its public names by module, with their first lines; pdoc links full names in backticks."""
  lines = [f"# {title(page)}", ""]
  by_module: dict[str, list] = {}
  for name, (module, qualified) in sorted(public_names().items()):
    if topic_of(module) == page:
      first = inspect.getdoc(getattr(kipcore, name)).splitlines()[0]
      by_module.setdefault(module, []).append(f"- `{module}.{qualified}`: {first}")
  for module in sorted(by_module):
    lines += ["", f"**`{module}`**", "", *by_module[module]]
  others = [f"`kipcore.{name}`" for name in TOPICS[page][1]]
  return "\n".join([*lines, "", f"All modules: {', '.join(others)}."])


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

  pictures: set[pathlib.Path] = set()
  texts = {page: markdown(page, pictures) for page in MARKDOWN} | {
    page: topic(page) for page in TOPICS
  }
  topics = "\n".join(f"- [{title(page)}]({address(page)})" for page in TOPICS)
  texts["index"] += f"\n## API reference\n\n{topics}\n"
  modules = {page: pdoc.doc.Module(types.ModuleType(page, text)) for page, text in texts.items()}
  names = [module.name for module in pkgutil.walk_packages(kipcore.__path__, "kipcore.")]
  names = [name for name in names if not name.startswith("kipcore.cli")]
  modules |= {name: pdoc.doc.Module.from_name(name) for name in ["kipcore", *names]}
  modules["kipcore"].docstring = f"{inspect.getdoc(kipcore)}\n\n{topics}"
  modules["kipcore"].members.clear()  # they are on the pages of their modules

  # `optax.OptState` refers to a name by a string that pdoc looks up in the module that uses it.
  warnings.filterwarnings("ignore", ".*Import of ArrayTree failed")
  pdoc.render.configure(
    docformat="google",
    math=True,
    show_source=False,
    footer_text=f"kipcore {kipcore.__version__}",
    template_directory=FOLDER / "templates",
  )
  menu = {heading: list(group) for heading, group in PAGES.items()} | {"API": list(TOPICS)}
  titles = {page: title(page) for page in texts}
  pdoc.render.env.globals.update(menu=menu, titles=titles)
  files = {
    address(name): pdoc.render.html_module(module, modules).encode()
    for name, module in modules.items()
  }
  files["search.js"] = pdoc.render.search_index(modules).encode()
  files |= {f"files/{path.relative_to(ROOT).as_posix()}": path.read_bytes() for path in pictures}
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  return [folder / name for name in files]


def main() -> None:
  """Builds the pages and prints where they start."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output_dir", default="site", help="folder of the pages")
  written = build(pathlib.Path(parser.parse_args().output_dir))
  print(f"{len(written)} files; open {written[0]}")


if __name__ == "__main__":
  main()
