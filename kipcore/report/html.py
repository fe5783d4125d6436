"""A report as one HTML file that needs nothing else: no network, no scripts, readable on a phone, in light and dark.

What comes from data (names of classes, paths, flags) enters through `element`, which escapes all text that is not `Html`.
The page also forbids itself to load or run anything (its content security policy).
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kipcore import checks
from kipcore.io import atomic

_VOID = ("img", "meta", "br")
_LARGEST_SIDE = 128  # of an inlined image, in pixels
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --text: #1c1e21; --soft: #63676e; --line: #dfdfda;
  --accent: #2468c9; --shade: #0002; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1d2024; --text: #e4e5e7; --soft: #9aa0a8;
  --line: #34383e; --accent: #6fa8f5; --shade: #000a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.1rem 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
a { color: var(--accent); }
.soft, figcaption, th, .legend { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0 1.2rem; font-size: .9rem; }
section, details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 0 0 1rem; }
section > :last-child, details > :last-child { margin-bottom: 0; }
summary { font-size: 1.15rem; font-weight: 600; cursor: pointer; }
details[open] summary { margin-bottom: .6rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 0 0 1rem; }
.cards div { border-left: 3px solid var(--line); padding: 0 0 0 .7rem; min-width: 0; }
.cards .first { border-color: var(--accent); }
.cards b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.cards .first b { color: var(--accent); }
.cards span { display: block; font-size: .85rem; color: var(--soft); line-height: 1.35; }
.scroll { overflow-x: auto; margin: 0 0 .8rem; background: linear-gradient(to right, var(--card) 40%, transparent) left / 2rem 100%,
  linear-gradient(to left, var(--card) 40%, transparent) right / 2rem 100%, linear-gradient(to right, var(--shade), transparent) left / .6rem 100%,
  linear-gradient(to left, var(--shade), transparent) right / .6rem 100%; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: .9rem; min-width: 50%; overflow-wrap: normal; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; vertical-align: bottom; }
.properties { table-layout: fixed; width: 100%; overflow-wrap: anywhere; }
.properties th { vertical-align: top; width: 15rem; }
@media (max-width: 40rem) { .properties th { width: 38%; } }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
tr > :last-child { padding-right: .2rem; }
td .soft { display: block; font-size: .85em; line-height: 1.3; }
.bar { display: block; height: .55rem; border-radius: .2rem; background: var(--accent); margin-top: .45rem; min-width: 1px; }
.track { display: block; width: clamp(3.2rem, 14vw, 8rem); }
pre { overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; margin: 0 0 .8rem;
  font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: normal; }
figure { margin: 0; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem; margin: 0 0 1rem; }
.charts h3 { margin-top: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .3rem 0 0; padding: 0; list-style: none; font-size: .8rem; }
.legend i { display: inline-block; width: .9rem; height: 0; border-top: 3px solid; margin-right: .35rem; vertical-align: middle; }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(5.3rem, 22%), 1fr)); gap: .7rem .5rem; margin: 0 0 1rem; }
.cells.pairs { grid-template-columns: repeat(auto-fill, minmax(min(9.6rem, 46%), 1fr)); }
.cells .images { display: flex; gap: 3px; }
.cells img { flex: 1; min-width: 0; width: 100%; }
.cells figcaption { font-size: .75rem; line-height: 1.3; margin-top: .2rem; }
.cells b { color: var(--text); font-weight: 600; }
.cells small { display: block; font-size: inherit; }
.rows { display: grid; gap: 2px; align-items: center; margin: 0 0 .5rem; font-size: .75rem; max-width: 32rem; }
.rows span { color: var(--soft); padding-right: .3rem; text-align: right; max-width: 6rem; line-height: 1.2; }
img { display: block; max-width: 100%; background: #fff; }
img.pixels { width: 100%; image-rendering: pixelated; }
footer { color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) { svg text { font-size: 14px; } th, td { padding-right: .55rem; } .cells figcaption { font-size: .7rem; } }
@media print { section, details { break-inside: avoid; } }
"""


class Html(str):
  """Markup that stands as it is; any other text is escaped where it enters an `element`."""


class Section(NamedTuple):
  """A part of the page: `title`, its `content` (text is a paragraph), and whether it is closed until clicked."""

  title: str
  content: Sequence[str]
  collapsed: bool = False


def element(tag: str, *content: str, **attributes) -> Html:
  """An HTML or SVG element: `<tag attributes>content</tag>`.

  Args:
    tag: its name.
    content: `Html` stands as it is; other text is escaped.
    attributes: `class_` is class, other underscores are hyphens; None leaves one out. Values are escaped.

  Returns:
    `Html`.
  """
  given = "".join(
    f' {name.strip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for name, value in attributes.items()
    if value is not None
  )
  return Html(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{joined(content)}</{tag}>")


def joined(parts: Iterable[str]) -> Html:
  """Parts one after another; those that are no `Html` are escaped."""
  return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


def write_html(
  path, title: str, sections: Sequence[Section], lead: str = "", footer: str = ""
) -> None:
  """Writes the page, whole or not at all.

  Args:
    path: file name.
    title: heading, and title of the window.
    sections: in order; those without content are left out.
    lead: a line below the heading.
    footer: a line at the end.

  Raises:
    OSError: where the file cannot be written.
  """
  atomic.write_atomically(path, page(title, sections, lead, footer).encode())


def page(title: str, sections: Sequence[Section], lead: str = "", footer: str = "") -> Html:
  """The text of `write_html`'s file.

  Args:
    title, sections, lead, footer: of `write_html`.

  Returns:
    `Html`, a document.
  """
  sections = [section for section in sections if section.content]
  head = element(
    "head",
    element("meta", charset="utf-8"),
    element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("title", title),
    element("style", Html(_STYLE)),
  )
  links = [element("a", section.title, href=f"#part-{i}") for i, section in enumerate(sections)]
  parts = [_section(section, f"part-{i}") for i, section in enumerate(sections)]
  body = element(
    "body",
    element(
      "main",
      element("h1", title),
      element("p", lead, class_="soft") if lead else Html(),
      element("nav", *links),
      *parts,
      element("footer", footer),
    ),
  )
  return Html("<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n")


def _section(section: Section, name: str) -> Html:
  content = [part if isinstance(part, Html) else element("p", part) for part in section.content]
  if section.collapsed:
    return element("details", element("summary", section.title), *content, id=name)
  return element("section", element("h2", section.title), *content, id=name)


def cards(entries: Sequence[tuple[str, str, str]]) -> Html:
  """Figures that come first: (figure, what it is, a note or "") each; the first one stands out."""
  return element(
    "div",
    *(
      element(
        "div",
        element("b", figure),
        element("span", name),
        element("span", note) if note else Html(),
        class_=None if i else "first",
      )
      for i, (figure, name, note) in enumerate(entries)
    ),
    class_="cards",
  )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> Html:
  """A table that scrolls in its own box.

  Args:
    header: name of each column.
    rows: of text or `Html`, as many as the header.
    text_columns: so many columns stand to the left, the others, of numbers, to the right.

  Returns:
    `Html`.
  """
  kind = lambda i: "number" if i >= text_columns else None
  head = element("tr", *(element("th", name, class_=kind(i)) for i, name in enumerate(header)))
  body = (
    element("tr", *(element("td", cell, class_=kind(i)) for i, cell in enumerate(row)))
    for row in rows
  )
  return element(
    "div", element("table", element("thead", head), element("tbody", *body)), class_="scroll"
  )


def properties(values: Mapping[str, Any]) -> Html:
  """A table of names and values; what is nested gets a name with dots, a value that is no text is shown as JSON."""
  rows = (
    element(
      "tr",
      element("th", name),
      element("td", value if isinstance(value, str) else json.dumps(value)),
    )
    for name, value in _flat(values)
  )
  return element(
    "div", element("table", element("tbody", *rows), class_="properties"), class_="scroll"
  )


def _flat(values: Mapping[str, Any], prefix: str = ""):
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def noted(name: str, note: str) -> Html:
  """A name for a cell of a table, with a note below it."""
  return joined([name, element("span", note, class_="soft")] if note else [name])


def bar(share: float) -> Html:
  """A bar for a cell of a table, `share` in [0, 1] of its full length."""
  return element(
    "span",
    element("span", class_="bar", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"),
    class_="track",
  )


def code(text: str) -> Html:
  """Lines of a program."""
  return element("pre", element("code", text))


def image(x, pixel_range: tuple[float, float], alt: str = "") -> Html:
  """An array as an inlined PNG.

  Args:
    x: `(h, w, 1 or 3)` in pixel space; large ones are made smaller.
    pixel_range: (black, white); values outside are clipped for the picture only.
    alt: what is read out.

  Returns:
    `Html`.

  Raises:
    ValueError: for an array that is no image with 1 or 3 channels.
  """
  from PIL import Image

  checks.rank("x", x, 3)
  if x.shape[-1] not in (1, 3):
    raise ValueError(f"x: expected 1 or 3 channels, got shape {x.shape}")
  low, high = pixel_range
  levels = np.rint(255 * np.clip((np.asarray(x, np.float64) - low) / (high - low), 0, 1)).astype(
    np.uint8
  )
  picture = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
  picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
  buffer = io.BytesIO()
  picture.save(buffer, "png", optimize=True)
  return element(
    "img",
    src="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
    alt=alt,
    class_="pixels",
  )


def image_cells(cells: Sequence[tuple[Sequence[Html], str, str]]) -> Html:
  """Images with captions, as many side by side as there is room for: (its images, a name, a note or "") each."""
  pairs = max((len(images) for images, _, _ in cells), default=0) > 1
  return element(
    "div",
    *(
      element(
        "figure",
        element("div", *images, class_="images"),
        element("figcaption", element("b", name), element("small", note) if note else ""),
      )
      for images, name, note in cells
    ),
    class_="cells pairs" if pairs else "cells",
  )


def image_rows(title: str, rows: Sequence[tuple[str, Sequence[Html]]]) -> Html:
  """A grid of images under a title, a named row each."""
  across = max((len(images) for _, images in rows), default=0)
  cells = [
    cell
    for name, images in rows
    for cell in (element("span", name), *images, *[element("i")] * (across - len(images)))
  ]
  return element(
    "figure",
    element("h3", title),
    element(
      "div",
      *cells,
      class_="rows",
      style=f"grid-template-columns: auto repeat({across}, minmax(0, 1fr))",
    ),
  )


def side_by_side(*figures: Html) -> Html:
  """Figures beside one another, or below where the screen is narrow."""
  return element("div", *figures, class_="charts")
