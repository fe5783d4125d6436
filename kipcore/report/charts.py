"""Curves and intervals as inline SVG, which an HTML page shows sharp at every width and in its own colors."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kipcore import checks
from kipcore.report.html import Html, element, joined

COLORS = (
  "#3b7dd8",
  "#e0801a",
  "#1f9e77",
  "#d6456f",
  "#8460c9",
  "#a3812f",
  "#5f9f2f",
  "#c160a0",
  "#868b92",
  "#17a2b8",
)
_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 36
_SCALES = {
  "linear": lambda v: v,
  "log": lambda v: math.log10(v),
  # Linear up to ten, where the early steps of a run are, then logarithmic.
  "symlog": lambda v: math.log1p(v / 10),
}


class _Axis(NamedTuple):
  """A scale, its ends, and where they lie in the drawing."""

  scale: str
  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    f = _SCALES[self.scale]
    span = f(self.high) - f(self.low)
    return self.start + (self.end - self.start) * ((f(value) - f(self.low)) / span if span else 0.5)

  def ticks(self, apart: float) -> list[float]:
    """Round values in the range, at least so far apart in the drawing; powers of ten come first on a logarithmic scale."""
    raw = (self.high - self.low) / max(abs(self.end - self.start) / apart, 1)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(self.low / step - 1e-9)
    even = [i * step for i in range(first, first + int((self.high - self.low) / step + 1e-9) + 2)]
    if self.scale == "linear":
      return self._apart(even, apart)
    positive = self.low if self.low > 0 else 1.0
    powers = range(
      math.floor(math.log10(positive)), math.ceil(math.log10(max(self.high, positive))) + 1
    )
    found = self._apart(
      [0.0] * (self.low <= 0) + [m * 10.0**k for m in (1, 2, 5, 3) for k in powers], apart
    )
    return found if len(found) > 2 else self._apart(even, apart)  # less than a power of ten

  def _apart(self, wanted: list[float], apart: float) -> list[float]:
    found = []
    for value in wanted:
      slack = 1e-9 * (self.high - self.low)
      if self.low - slack <= value <= self.high + slack and all(
        abs(self(value) - self(v)) >= apart * (1 - 1e-9) for v in found
      ):
        found.append(value)
    return sorted(found)


def line_chart(
  title: str,
  lines: Mapping[str, Sequence[tuple[float, float]]],
  x_label: str,
  *,
  x_scale: str = "linear",
  y_scale: str = "linear",
  references: Mapping[str, float] | None = None,
  marks: Mapping[str, Sequence[tuple[float, float]]] | None = None,
  unit: str = "",
) -> Html:
  """Lines through points, with a legend below.

  Args:
    title: above the chart.
    lines: points (x, y) of each line by name; on a logarithmic scale those that are not positive are left out.
    x_label: below the chart.
    x_scale, y_scale: "linear", "log", or "symlog": linear up to 10, then logarithmic.
    references: heights of dashed lines by name.
    marks: points without a line, by name.
    unit: of y, at every tick, such as "%".

  Returns:
    `Html`, a figure; empty where there is no point.

  Raises:
    ValueError: for an unknown scale.
  """
  for name, scale in (("x_scale", x_scale), ("y_scale", y_scale)):
    checks.one_of(name, scale, tuple(_SCALES))
  shown = {
    name: _drawable(points, x_scale, y_scale) for name, points in {**lines, **(marks or {})}.items()
  }
  shown = {name: points for name, points in shown.items() if points}
  if not shown:
    return Html()
  references = {
    name: v for name, v in (references or {}).items() if _drawable([(1, v)], x_scale, y_scale)
  }
  xs, ys = ([point[i] for points in shown.values() for point in points] for i in (0, 1))
  x = _Axis(x_scale, min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
  y = _Axis(
    y_scale,
    *_padded(min([*ys, *references.values()]), max([*ys, *references.values()]), y_scale),
    _HEIGHT - _BOTTOM,
    _TOP,
  )
  drawn, legend = [], []
  for value in y.ticks(30):
    drawn += [
      _line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), "grid"),
      _text(f"{_number(value)}{unit}", _LEFT - 5, y(value) + 4, "end"),
    ]
  drawn += [_line(_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, "axis")]
  for value in x.ticks(42):
    drawn += [
      _line(x(value), _HEIGHT - _BOTTOM, x(value), _HEIGHT - _BOTTOM + 4, "axis"),
      _text(_number(value), x(value), _HEIGHT - _BOTTOM + 16, "middle"),
    ]
  drawn.append(_text(x_label, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, "middle"))
  for i, (name, points) in enumerate(shown.items()):
    color = COLORS[i % len(COLORS)]
    places = [(x(a), y(b)) for a, b in points]
    if name in lines and len(places) > 1:
      drawn.append(
        element(
          "polyline",
          points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places),
          fill="none",
          stroke=color,
          stroke_width="2",
          stroke_linejoin="round",
        )
      )
    if name not in lines or len(places) <= 60:
      drawn += [
        element(
          "circle",
          element("title", f"{name}: {_number(p[1])}{unit} at {_number(p[0])}"),
          cx=f"{a:.1f}",
          cy=f"{b:.1f}",
          r="2.4",
          fill=color,
          fill_opacity=None if name in lines else ".7",
        )
        for (a, b), p in zip(places, points)
      ]
    legend.append((name, color, "solid" if name in lines else "dotted"))
  for i, (name, value) in enumerate(references.items(), len(shown)):
    color = COLORS[i % len(COLORS)]
    drawn.append(
      element(
        "line",
        x1=_LEFT,
        x2=_WIDTH - _RIGHT,
        y1=f"{y(value):.1f}",
        y2=f"{y(value):.1f}",
        stroke=color,
        stroke_width="1.5",
        stroke_dasharray="5 4",
      )
    )
    legend.append((f"{name}: {_number(value)}{unit and ' ' + unit}", color, "dashed"))
  return _figure(title, drawn, _HEIGHT, legend)


def interval_chart(
  title: str, groups: Mapping[str, Mapping[str, tuple[float, float]]], unit: str = ""
) -> Html:
  """Means with deviations: a block a group, a line a variant in it, the scale below.

  Args:
    title: above the chart.
    groups: group -> variant -> (mean, deviation).
    unit: of the scale.

  Returns:
    `Html`, a figure; empty where there is no value.
  """
  values = [(mean, spread) for variants in groups.values() for mean, spread in variants.values()]
  if not values:
    return Html()
  names = list(dict.fromkeys(name for variants in groups.values() for name in variants))
  left = min(max(7 * max(map(len, groups)) + 10, 40), 130)
  x = _Axis(
    "linear",
    *_padded(min(m - s for m, s in values), max(m + s for m, s in values), "linear"),
    left,
    _WIDTH - _RIGHT,
  )
  drawn, top = [], 8.0
  for group, variants in groups.items():
    height = 13.0 * len(variants)
    drawn.append(_text(group, left - 8, top + height / 2 + 4, "end"))
    for i, (name, (mean, spread)) in enumerate(variants.items()):
      color, at = COLORS[names.index(name) % len(COLORS)], f"{top + 13.0 * i + 6.5:.1f}"
      drawn += [
        element(
          "line",
          x1=f"{x(mean - spread):.1f}",
          x2=f"{x(mean + spread):.1f}",
          y1=at,
          y2=at,
          stroke=color,
          stroke_width="2.5",
          stroke_opacity=".45",
          stroke_linecap="round",
        ),
        element(
          "circle",
          element("title", f"{group}, {name}: {mean:.1f} ± {spread:.1f} {unit}"),
          cx=f"{x(mean):.1f}",
          cy=at,
          r="3.6",
          fill=color,
        ),
      ]
    top += height + 9
  bottom = top - 2
  grid = []
  for value in x.ticks(48):
    grid += [
      _line(x(value), 4, x(value), bottom, "grid"),
      _text(f"{_number(value)}{unit and ' ' + unit}", x(value), bottom + 15, "middle"),
    ]
  legend = [(name, COLORS[i % len(COLORS)], "solid") for i, name in enumerate(names)]
  return _figure(title, grid + drawn, bottom + 20, legend)


def _drawable(points, x_scale: str, y_scale: str) -> list:
  def good(value, scale):
    return math.isfinite(value) and (
      value > 0 if scale == "log" else value >= 0 if scale == "symlog" else True
    )

  return [(a, b) for a, b in points if good(a, x_scale) and good(b, y_scale)]


def _padded(low: float, high: float, scale: str) -> tuple[float, float]:
  """The range with a little room; a single value in the middle of some."""
  if scale == "log":
    room = (high / low) ** 0.05 if high > low else 2.0
    return low / room, high * room
  room = 0.05 * (high - low) if high > low else 0.1 * abs(high) or 1.0
  return (low if scale == "symlog" else low - room), high + room


def _number(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
  return element(
    "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind
  )


def _text(text: str, x: float, y: float, anchor: str) -> Html:
  return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _figure(
  title: str, drawn: list[Html], height: float, legend: list[tuple[str, str, str]]
) -> Html:
  entries = (
    element("li", element("i", style=f"border-top-color:{color};border-top-style:{style}"), name)
    for name, color, style in legend
  )
  svg = element(
    "svg", joined(drawn), viewBox=f"0 0 {_WIDTH} {height:.0f}", role="img", aria_label=title
  )
  return element("figure", element("h3", title), svg, element("ul", *entries, class_="legend"))
