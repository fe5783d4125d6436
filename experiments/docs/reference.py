"""Builds the API reference from the docstrings: `python -m experiments.docs.reference --output_dir=site`.

Static HTML that needs no network, made with pdoc (`pip install -e '.[docs]'`): a page a room of kipcore that
has public names, and a front page that lists them. Each name is shown once, in the room that defines it.
"""

import enum
import importlib
import inspect
import pathlib
import re
import textwrap
import typing
from types import ModuleType

from absl import flags

from kipcore.cli import flags as common
from kipcore.cli.errors import UsageError

FLAGS = flags.FLAGS

flags.DEFINE_string("output_dir", "site", "Folder of the pages; the first one is index.html.")

# Not at the top level of kipcore, and yet for users.
MORE = {
  "architectures": (
    "Dense",
    "Conv",
    "Relu",
    "LeakyRelu",
    "Erf",
    "Gelu",
    "Identity",
    "AvgPool",
    "GlobalAvgPool",
    "Flatten",
  ),
  "kernels.stax": ("import_neural_tangents", "to_stax"),
  "preprocess": ("uncenter", "class_labels"),
  "sensitivity": ("Guarantee",),
  "distill.importance": ("ImportanceState",),
  "datasets": ("load_dataset", "Dataset", "DatasetError"),
  "npz": ("read_npz", "names_in", "save_checked", "load_checked", "NpzError"),
  "export": ("DistilledSet", "as_numpy", "as_torch", "as_tfds", "check", "write"),
  "html_report": (
    "Html",
    "Section",
    "write_html",
    "page",
    "element",
    "joined",
    "cards",
    "table",
    "properties",
    "noted",
    "bar",
    "code",
    "image",
    "image_cells",
    "image_rows",
    "side_by_side",
  ),
  "charts": ("line_chart", "interval_chart"),
  "report": (
    "save_image_grid",
    "save_image_rows",
    "save_learning_curve",
    "save_scores",
    "save_comparison",
    "save_bars",
  ),
}
# Rooms in the order of the front page; what is not named here comes last.
TOPICS = {
  "Networks and kernels": ("architectures", "kernels", "gram", "networks", "resnet"),
  "Data": ("datasets", "preprocess"),
  "Kernel ridge regression": ("krr", "absorb", "evaluate", "ranking"),
  "Which points matter": (
    "coreset",
    "leverage",
    "score_ridge",
    "sensitivity",
    "streaming",
    "clustering",
    "representatives",
    "cholesky",
    "pursuit",
  ),
  "Draws and guarantees": ("draws", "sampling", "guarantees", "certificate"),
  "Distillation": ("distill",),
  "Files and pictures": (
    "artifact",
    "checkpoint",
    "npz",
    "export",
    "published",
    "torch_files",
    "trajectories",
    "report",
    "html_report",
    "charts",
  ),
  "Types": ("types",),
}
FRONT = """
The public names of kipcore {version}, by the room that defines them. The README has a quickstart.

Sizes in shapes: n rows, m support rows, t targets, c classes, d features. `ridge` is absolute, as in K + ridge I.
Examples take these imports for granted, and a test runs them:

```python
import jax
import jax.numpy as jnp
import numpy as np
import kipcore
```
"""
LIST_SECTIONS = ("Args", "Attributes", "Formats", "Raises", "Strategies")
STYLE = """
@media (min-width: 770px) { main, header { width: calc(64rem + var(--sidebar-width)); } }
.pdoc .docstring h6 { margin: 1rem 0 .3rem; font-weight: 600; }
.pdoc .docstring pre { font-size: .8rem; white-space: pre-wrap; border: 0; border-left: 3px solid var(--accent2); }
.pdoc .inherited { display: none; }
.pdoc .docstring ul { margin-bottom: .6rem; }
.pdoc .docstring li p { margin-bottom: .3rem; }
.pdoc .module-info .docstring li { margin: .15rem 0; }
.pdoc .module-info .docstring h3 { margin: 1rem 0 .2rem; font-size: 1rem; font-weight: 400; }
"""
# The sidebar: rooms by their full names on the front page, names without constructors on the others.
TEMPLATE = """{% extends "default/module.html.jinja2" %}
{% block title %}{{ module.modulename }}{% endblock %}
{% block module_list_link %}
  {% if module.modulename != "kipcore" %}
    {% set up = "../" * module.modulename.count(".") %}
    <a class="pdoc-button module-list-button" href="{{ up }}kipcore.html">All names</a>
  {% endif %}
{% endblock %}
{% block nav_index %}{% endblock %}
{% block nav_submodules %}
  {% if module.submodules %}
    <h2>Rooms</h2>
    <ul>{% for m in module.submodules %}<li>{{ m.taken_from | link(text=m.modulename[8:]) }}</li>{% endfor %}</ul>
  {% endif %}
{% endblock %}
{% block nav_members %}
  {% if module.members %}
    <h2>{{ module.modulename[8:] }}</h2>
    <ul class="memberlist">{% for m in module.members.values() %}
      <li><a class="{{ m.kind }}" href="#{{ m.qualname }}">{{ m.name }}</a></li>
    {% endfor %}</ul>
  {% endif %}
{% endblock %}
"""
# Public things that signatures call by their private modules, with the tags of highlighting between.
_DOT = r'(?:</span><span class=\\?"o\\?">)?\.(?:</span><span class=\\?"n\\?">)?'
PRIVATE = {
  rf"(?:jax{_DOT})?jaxlib{_DOT}_jax{_DOT}(Array|Device)": r"jax.\1",
  rf"optax{_DOT}_src{_DOT}base{_DOT}": "optax.",
  r"<p>@public</p>": "",
  r"&lt;class &#(?:x27|39);([\w.]+)&#(?:x27|39);&gt;": r"\1",
}


def public_names() -> dict[str, list[str]]:
  """The public names by the room that defines them: `kipcore.__all__`, the classes in their signatures, and `MORE`."""
  import kipcore

  rooms = {}

  def add(thing):
    room, name = thing.__module__.removeprefix("kipcore."), thing.__name__
    if thing.__module__.startswith("kipcore.") and name not in rooms.setdefault(room, []):
      rooms[room].append(name)
      for hint in _parts(typing.get_type_hints(thing).values()):
        if inspect.isclass(hint) and not hint.__name__.startswith("_"):
          add(hint)

  for name in kipcore.__all__:
    if name != "__version__":
      add(inspect.unwrap(getattr(kipcore, name)))
  for room, names in MORE.items():
    for name in names:
      add(getattr(importlib.import_module(f"kipcore.{room}"), name))
  for room, names in rooms.items():
    source = inspect.getsource(importlib.import_module(f"kipcore.{room}"))
    places = {
      name: re.search(rf"^(def {name}\(|class {name}\b|{name} =)", source, flags=re.M).start()
      for name in names
    }
    names.sort(key=places.get)
  return rooms


def _parts(hints):
  """The hints and all that is inside them."""
  for hint in hints:
    yield hint
    yield from _parts(part for part in typing.get_args(hint) if part is not ...)


def topics(rooms) -> dict[str, list[str]]:
  """The rooms by topic, each once."""
  left, found = list(rooms), {}
  for topic, prefixes in TOPICS.items():
    found[topic] = [
      room for prefix in prefixes for room in sorted(left) if f"{room}.".startswith(f"{prefix}.")
    ]
  named = {room for listed in found.values() for room in listed}
  return {**found, "More": sorted(set(left) - named)}


def to_markdown(docstring: str, link=lambda code: f"`{code}`") -> str:
  """A docstring of ours as Markdown: sections, formulas (all that is indented) as they stand, and escaped prose.

  Args:
    docstring: Google style.
    link: from a piece of code in backticks to Markdown.

  Returns:
    Markdown.
  """
  lines, out = inspect.cleandoc(docstring).split("\n"), []
  while lines:
    if not lines[0].strip():
      lines.pop(0)
    elif (
      (match := re.fullmatch(r"([A-Z][a-z]+):", lines[0]))
      and len(lines) > 1
      and lines[1].startswith(" ")
    ):
      lines.pop(0)
      body = textwrap.dedent("\n".join(_take(lines, lambda line: not line or line.startswith(" "))))
      convert = _items if match[1] in LIST_SECTIONS else to_markdown
      out.append(f"###### {match[1]}\n\n{convert(body, link)}")
    elif lines[0].startswith(">>>"):
      out.append("```pycon\n" + "\n".join(_take(lines, bool)) + "\n```")
    elif lines[0].startswith(" "):
      block = textwrap.dedent(
        "\n".join(_take(lines, lambda line: not line or line.startswith(" ")))
      ).strip("\n")
      out.append(f"```text\n{block}\n```")
    elif match := re.match(r"(\d+\.|-) ", lines[0]):
      first = lines.pop(0)
      item = [first[len(match[0]) :], *_take(lines, lambda line: line.startswith(" "))]
      out.append(f"{match[0]}{_prose(item, link)}")
    else:
      paragraph = [
        lines.pop(0),
        *_take(lines, lambda line: line and not line.startswith((" ", ">>>"))),
      ]
      out.append(_prose(paragraph, link))
  return "\n\n".join(out)


def _take(lines: list[str], wanted) -> list[str]:
  """Moves the leading lines that are wanted out of `lines`; no empty ones at the end."""
  end = next((i for i, line in enumerate(lines) if not wanted(line)), len(lines))
  taken, lines[:] = lines[:end], lines[end:]
  while taken and not taken[-1]:
    taken.pop()
  return taken


def _items(body: str, link) -> str:
  """The entries of a list section, `name: text`, as a list."""
  items = []
  for line in body.split("\n"):
    items.append([line]) if not line.startswith(" ") else items[-1].append(line)
  return "\n".join(
    "- " + re.sub(r"^([^:`]+):", r"**\1**:", _prose(item, link)) for item in items if item[0]
  )


def _prose(lines: list[str], link) -> str:
  """One line of text, in which only code in backticks has a meaning to Markdown."""
  parts = " ".join(line.strip() for line in lines).split("`")
  return "".join(link(part) if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
  text = re.sub(r"[&<>*\[\]|~\\#]", lambda m: f"&#{ord(m[0])};", text)
  star = "&#42;"  # emphasis is words between two stars, not a product or F*
  return re.sub(rf"(?<![^\s(]){star}([a-z][a-z ]*){star}(?![^\s).,;:])", r"*\1*", text)


def build(folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes the pages.

  Args:
    folder: is made where it is absent; files of the same names are replaced.

  Returns:
    What was written.

  Raises:
    UsageError: where pdoc is not installed.
  """
  try:
    import pdoc
    import pdoc.render
  except ImportError as error:
    raise UsageError(
      "the reference is built with pdoc, which is not installed: pip install -e '.[docs]'"
    ) from error
  import jinja2

  import kipcore
  from kipcore.io import atomic

  rooms = public_names()
  homes = {name: room for room, names in rooms.items() for name in names}
  pages = {"kipcore": pdoc.doc.Module(_only(kipcore, []))}
  for listed in topics(rooms).values():
    for room in listed:
      pages[f"kipcore.{room}"] = pdoc.doc.Module(
        _only(importlib.import_module(f"kipcore.{room}"), rooms[room])
      )
  for name, page in pages.items():
    _document(
      page, lambda code, own, name=name: _linked(code, own, name.removeprefix("kipcore."), homes)
    )
  pages["kipcore"].docstring = _front(rooms, kipcore)
  pages["kipcore"].submodules = list(pages.values())[1:]
  pdoc.render.configure(
    docformat="markdown", show_source=False, footer_text=f"kipcore {kipcore.__version__}"
  )
  pdoc.render.env.loader = jinja2.ChoiceLoader(
    [
      jinja2.DictLoader({"module.html.jinja2": TEMPLATE, "custom.css": STYLE}),
      pdoc.render.env.loader,
    ]
  )
  texts = {
    f"{name.replace('.', '/')}.html": pdoc.render.html_module(page, pages)
    for name, page in pages.items()
  }
  texts |= {
    "index.html": pdoc.render.html_index(pages),
    "search.js": pdoc.render.search_index(pages),
  }
  for name, text in texts.items():
    for private, public in PRIVATE.items():
      text = re.sub(private, public, text)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    atomic.write_atomically(folder / name, text.encode())
  return [folder / name for name in texts]


def _only(module: ModuleType, names: list[str]) -> ModuleType:
  """The module as pdoc is to see it: with these names alone."""
  shown = ModuleType(module.__name__, module.__doc__)
  shown.__dict__.update({**module.__dict__, "__all__": names})
  return shown


def _document(doc, link) -> None:
  """Turns the docstrings of a page and its members into Markdown; fields are in the docstring of their class."""
  own = {doc.name, *getattr(doc, "members", ())}
  if doc.kind == "function":
    own |= set(doc.signature.parameters)
  doc.docstring = to_markdown(
    doc.docstring, lambda code: link(code, own if doc.kind != "module" else ())
  )
  for member in getattr(doc, "members", {}).values():
    if member.name == "__init__":
      member.docstring = (
        "@private" if getattr(doc.obj, "_is_protocol", False) else ""
      )  # the signature alone
    elif member.name == "__call__":
      member.docstring = "@public"
    elif isinstance(doc.obj, enum.EnumType):
      member.docstring = (
        "" if isinstance(getattr(member, "default_value", None), doc.obj) else "@private"
      )
    elif member.kind == "variable" and (
      not member.docstring or member.docstring.startswith("Alias for field")
    ):
      member.docstring = "@private"
    else:
      _document(member, link)


def _linked(code: str, own, here: str, homes: dict) -> str:
  """Code in backticks, linked where it is a public `name` not in `own`, or `room.name`; with arguments or not."""
  room, dot, name = code.partition("(")[0].rpartition(".")
  home = homes.get(name)
  # `loop.distill` and `distill.loop.distill` are one.
  if home is None or (not dot and name in own) or (dot and not f".{home}".endswith(f".{room}")):
    return f"`{code}`"
  up = "../" * here.count(".") + ("" if here == "kipcore" else "./")
  return f"[`{code}`]({up}{home.replace('.', '/')}.html#{name})"


def _front(rooms: dict, kipcore: ModuleType) -> str:
  """The Markdown of the front page."""
  lines = [FRONT.format(version=kipcore.__version__)]
  for topic, listed in topics(rooms).items():
    lines += [f"## {topic}\n"] if listed else []
    for room in listed:
      module, path = (
        importlib.import_module(f"kipcore.{room}"),
        f"kipcore/{room.replace('.', '/')}.html",
      )
      lines += [f"### [`{room}`]({path}) {_first_line(module)}\n"]
      lines += [
        f"- [`{name}`]({path}#{name}): {_first_line(getattr(module, name))}" for name in rooms[room]
      ] + [""]
  return "\n".join(lines)


def _first_line(thing) -> str:
  return _prose([(inspect.getdoc(thing) or "").split("\n")[0]], lambda code: f"`{code}`")


def main() -> None:
  """Builds the pages and says where they are."""
  try:
    written = build(pathlib.Path(FLAGS.output_dir))
  except OSError as error:
    raise UsageError(
      f"--output_dir: cannot write to {FLAGS.output_dir} ({error.strerror or error})"
    ) from error
  print(f"{len(written)} files; start at {pathlib.Path(FLAGS.output_dir) / 'index.html'}")


if __name__ == "__main__":
  common.launch(main)
