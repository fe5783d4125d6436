"""A report as one self-contained HTML file: no network, no scripts, readable on a phone, light and dark.

The page is a Jinja2 template with automatic escaping; text from data (class names, paths, flags) is always
escaped. Its content security policy forbids loading and running anything.
"""

import base64
import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from kipcore import checks
from kipcore.io import atomic
from kipcore.report import pictures

_LARGEST_SIDE = 128  # of an inlined image, in pixels


class Section(NamedTuple):
  """A part of the page.

  Attributes:
    title: heading, and entry of the navigation.
    content: text (a paragraph each) or markup.
    collapsed: whether it is closed until clicked.
  """

  title: str
  content: Sequence[str]
  collapsed: bool = False


@functools.cache
def _environment():
  import jinja2

  return jinja2.Environment(
    loader=jinja2.PackageLoader("kipcore.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )


def _part(name: str, *arguments) -> Markup:
  """The markup of a macro of `parts.html.j2`."""
  return getattr(_environment().get_template("parts.html.j2").module, name)(*arguments)


def write_html(
  path, title: str, sections: Sequence[Section], lead: str = "", footer: str = ""
) -> None:
  """Writes the page atomically.

  Args:
    path: file name.
    title: heading, and title of the window.
    sections: in order; sections without content are left out.
    lead: a line below the heading.
    footer: a line at the end.

  Raises:
    OSError: if the file cannot be written.
  """
  atomic.write_atomically(path, page(title, sections, lead, footer).encode())


def page(title: str, sections: Sequence[Section], lead: str = "", footer: str = "") -> str:
  """The document that `write_html` writes.

  Args:
    title, sections, lead, footer: see `write_html`.

  Returns:
    HTML text.
  """
  sections = [section for section in sections if section.content]
  return (
    _environment()
    .get_template("report.html.j2")
    .render(title=title, sections=sections, lead=lead, footer=footer)
  )


def cards(entries: Sequence[tuple[str, str, str]]) -> Markup:
  """Headline figures: (figure, name, note or "") each; the first one is emphasized."""
  return _part("cards", entries)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> Markup:
  """A table that scrolls horizontally if needed.

  Args:
    header: name of each column.
    rows: text or markup, one entry per column.
    text_columns: number of left-aligned columns; the others contain numbers and are right-aligned.

  Returns:
    Markup.
  """
  return _part("table", header, list(rows), text_columns)


def properties(values: Mapping[str, Any]) -> Markup:
  """A table of names and values; nested names are joined with dots, values other than text are JSON."""
  return _part(
    "properties",
    [
      (name, value if isinstance(value, str) else json.dumps(value))
      for name, value in _flat(values)
    ],
  )


def _flat(values: Mapping[str, Any], prefix: str = ""):
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def noted(name: str, note: str) -> Markup:
  """A name for a table cell, with a note below it."""
  return _part("noted", name, note)


def bar(share: float) -> Markup:
  """A bar for a table cell, `share` in [0, 1] of its full length."""
  return _part("bar", f"{100 * min(max(share, 0.0), 1.0):.1f}")


def code(text: str) -> Markup:
  """Lines of a program."""
  return _part("code", text)


def heading(text: str) -> Markup:
  """A heading within a section."""
  return _part("heading", text)


def image(x, pixel_range: tuple[float, float], alt: str = "") -> Markup:
  """An array as an inlined PNG.

  Args:
    x: `(h, w, 1 or 3)` in pixel space; large images are scaled down.
    pixel_range: (black, white); values outside are clipped in the picture only.
    alt: description for screen readers.

  Returns:
    Markup.

  Raises:
    ValueError: if the array is not an image with 1 or 3 channels.
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
  return _part("image", _data_uri("image/png", buffer.getvalue()), alt)


def animation(content: bytes, alt: str) -> Markup:
  """A GIF, inlined."""
  return _part("figure_image", _data_uri("image/gif", content), alt)


def image_cells(cells: Sequence[tuple[Sequence[Markup], str, Sequence[str]]]) -> Markup:
  """Images with captions in as many columns as fit: (its images, a name, lines of notes) each."""
  pairs = max((len(images) for images, _, _ in cells), default=0) > 1
  return _part("image_cells", cells, pairs)


def image_rows(title: str, rows: Sequence[tuple[str, Sequence[Markup]]]) -> Markup:
  """A grid of images with a title and named rows."""
  columns = max((len(images) for _, images in rows), default=0)
  padded = [(name, images, columns - len(images)) for name, images in rows]
  return _part("image_rows", title, padded, columns)


def chart(figure, alt: str) -> Markup:
  """A matplotlib figure as inlined SVG: panels next to each other, or below each other on narrow screens."""
  panels = pictures.panels(figure)
  parts = [f", {i + 1} of {len(panels)}" if len(panels) > 1 else "" for i in range(len(panels))]
  return _part(
    "chart",
    [(_data_uri("image/svg+xml", panel), alt + part) for panel, part in zip(panels, parts)],
  )


def side_by_side(*figures: Markup) -> Markup:
  """Figures next to each other, or below each other on narrow screens."""
  return _part("side_by_side", figures)


def _data_uri(kind: str, content: bytes) -> str:
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"
