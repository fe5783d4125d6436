"""Figures of a run, drawn with matplotlib: image grids in pixel space, curves and bars."""

import io

import numpy as np

from kipcore import checks
from kipcore.io import atomic

_MAX_COLUMNS = 10
_MAX_ROW_OF_CLASSES = 12
_MAX_CELLS = 120
# Of animations: columns, pixels of the larger side of an image, and the height of the caption.
_ANIMATION_COLUMNS, _ANIMATION_SIDE, _CAPTION_HEIGHT = 5, 80, 20


def save_image_grid(
  path,
  before,
  after,
  labels,
  pixel_range: tuple[float, float],
  class_names=None,
  titles=("start", "distilled"),
) -> None:
  """A PNG of the starting images next to the distilled ones: one row per class, up to 10 columns (titles tell if there are more).

  Args:
    path: PNG file name.
    before, after: `(m, h, w, 1 or 3)` in pixel space.
    labels: `(m,)` integer class of each image.
    pixel_range: (black, white); values outside are clipped in the picture only.
    class_names: names by class, or None for numbers.
    titles: of the two halves.

  Raises:
    ValueError: for arrays that are not images with 1 or 3 channels.
  """
  for name, x in (("before", before), ("after", after)):
    checks.rank(name, x, 4)
    if x.shape[-1] not in (1, 3):
      raise ValueError(f"{name}: expected 1 or 3 channels, got shape {x.shape}")
  labels = np.asarray(labels)
  classes = np.unique(labels)
  columns = min(_MAX_COLUMNS, max(np.sum(labels == c) for c in classes))
  if columns <= 2 and len(classes) > _MAX_ROW_OF_CLASSES:
    _grid_of_cells(path, before, after, labels, pixel_range, class_names, titles)
    return
  if columns <= 2:  # one or two images per class: a row of classes is easier to read than a column
    _grid_by_columns(
      path, before, after, labels, classes, columns, pixel_range, class_names, titles
    )
    return
  figure = _figure((2 * columns + 1.5) * 0.55, len(classes) * 0.54 + 0.5)
  panels = [_panel(x, labels, classes, columns, pixel_range) for x in (before, after)]
  if (most := max(np.sum(labels == c) for c in classes)) > columns:
    titles = [f"{title} ({columns} of {most} per class)" for title in titles]
  for axes, panel, title in zip(figure.subplots(1, 2), panels, titles):
    _show(axes, panel, title)
    height = panel.shape[0] / len(classes)
    axes.set_yticks(
      [(i + 0.5) * height for i in range(len(classes))], _names(classes, class_names), fontsize=7
    )
  _save(figure, path)


def _grid_by_columns(path, before, after, labels, classes, rows, pixel_range, class_names, titles):
  names = _names(classes, class_names)
  longest = max(map(len, names))
  slanted = longest > 11
  # Slanted names need room under both rows, or the upper title is cut off.
  figure = _figure(
    max(4.0, len(classes) * 0.75), 2 * rows * 0.75 + 1.1 + (0.08 * longest if slanted else 0.0)
  )
  for axes, x, title in zip(figure.subplots(2, 1), (before, after), titles):
    panel = _panel(x, labels, classes, rows, pixel_range, transpose=True)
    _show(axes, panel, title)
    width = panel.shape[1] / len(classes)
    axes.set_xticks(
      [(i + 0.5) * width for i in range(len(classes))],
      names,
      fontsize=7,
      rotation=45 if slanted else 0,
    )
  _save(figure, path)


def _grid_of_cells(path, before, after, labels, pixel_range, class_names, titles):
  """Many classes with one or two images: at most 120 labeled cells in class order, wrapped."""
  order = np.argsort(labels, kind="stable")[:_MAX_CELLS]
  across = _MAX_ROW_OF_CLASSES
  place = np.arange(order.size)
  down = -(-order.size // across)
  figure = _figure(across * 0.75, 2 * down * 0.75 + 0.8)
  for axes, x, title in zip(figure.subplots(2, 1), (before, after), titles):
    # Lines of the wrapped grid take the place of classes.
    panel = _panel(np.asarray(x)[order], place // across, np.arange(down), across, pixel_range)
    _show(axes, panel, title)
    h, w = panel.shape[0] / down, panel.shape[1] / across
    for i, c in enumerate(labels[order]):
      axes.text(
        i % across * w + 0.06 * w,
        i // across * h + 0.06 * h,
        _names([c], class_names)[0],
        fontsize=5,
        va="top",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
      )
  _save(figure, path)


def _panel(x, labels, classes, per_class, pixel_range, transpose=False) -> np.ndarray:
  """One large image with a thin border around each cell; missing cells are white."""
  low, high = pixel_range
  x = np.clip((np.asarray(x, np.float64) - low) / (high - low), 0.0, 1.0)
  h, w = x.shape[1] + 2, x.shape[2] + 2
  lines = len(classes)
  panel = np.ones((per_class * h, lines * w, 3) if transpose else (lines * h, per_class * w, 3))
  for line, c in enumerate(classes):
    for place, image in enumerate(x[labels == c][:per_class]):
      row, column = (place, line) if transpose else (line, place)
      panel[row * h + 1 : (row + 1) * h - 1, column * w + 1 : (column + 1) * w - 1] = image
  return panel


def save_image_rows(
  path, panels, pixel_range: tuple[float, float], columns: int = _MAX_COLUMNS
) -> None:
  """A PNG of titled rows of images, each with a caption below it; long rows are wrapped.

  Args:
    path: PNG file name.
    panels: (title, images `(m, h, w, 1 or 3)` in pixel space, m captions) each; "": no title.
    pixel_range: (black, white); values outside are clipped in the picture only.
    columns: images per row.

  Raises:
    ValueError: for arrays that are not images with 1 or 3 channels, or a different number of captions.
  """
  lines = []
  for title, x, captions in panels:
    checks.rank(title or "images", x, 4)
    if x.shape[-1] not in (1, 3) or len(captions) != x.shape[0]:
      raise ValueError(
        f"{title or 'images'}: expected 1 or 3 channels and one caption per image, got shape {x.shape} and {len(captions)} captions"
      )
    lines += [
      (title if i == 0 else "", x[i : i + columns], captions[i : i + columns])
      for i in range(0, x.shape[0], columns)
    ]
  heights = [
    0.74 + 0.14 * max(c.count("\n") + 1 for c in captions) + (0.26 if title else 0.0)
    for title, _, captions in lines
  ]
  figure, low, high = _figure(0.78 * columns, sum(heights)), *pixel_range
  for part, (title, x, captions) in zip(
    np.atleast_1d(figure.subfigures(len(lines), 1, height_ratios=heights)), lines
  ):
    if title:
      part.suptitle(title, fontsize=9)
    for axes, image, caption in zip(
      part.subplots(1, columns, squeeze=False)[0],
      [*x, *[None] * columns],
      [*captions, *[""] * columns],
    ):
      if image is None:
        axes.axis("off")
        continue
      shown = np.clip((np.asarray(image, np.float64) - low) / (high - low), 0.0, 1.0)
      _show(axes, np.broadcast_to(shown, (*shown.shape[:2], 3)), "")
      axes.set_xlabel(caption, fontsize=6.5, labelpad=2, linespacing=1.1)
  _save(figure, path)


def save_learning_curve(path, history: list[dict], lines: dict[str, float] | None = None) -> None:
  """Writes `learning_curve` as PNG.

  Args:
    path: PNG file name.
    history, lines: see `learning_curve`.
  """
  _save(learning_curve(history, lines), path)


def learning_curve(history: list[dict], lines: dict[str, float] | None = None):
  """Loss (left) and accuracies (right) against the step, on a scale that shows early steps.

  Args:
    history: one dictionary per logged step, with `step`, `loss` and any keys that end in `accuracy`.
    lines: horizontal reference lines by name, such as the random baseline.

  Returns:
    A matplotlib figure.
  """
  figure = _figure(9.0, 3.4)
  left, right = figure.subplots(1, 2)
  steps = [r["step"] for r in history if "loss" in r]
  left.plot(steps, [r["loss"] for r in history if "loss" in r], color="tab:blue")
  left.set_yscale("log")
  left.set_ylabel("loss on the target batch")
  names = sorted({name for r in history for name in r if name.endswith("accuracy")})
  for name in names:
    points = [(r["step"], 100 * r[name]) for r in history if name in r]
    label = (
      "target batch" if name == "accuracy" else name.removesuffix("_accuracy").replace("_", " ")
    )
    right.plot(*zip(*points), label=label, alpha=0.5 if name == "accuracy" else 1.0)
  for i, (name, value) in enumerate((lines or {}).items()):
    right.axhline(
      100 * value, linestyle="--", color=f"C{len(names) + i}", label=f"{name}: {100 * value:.1f} %"
    )
  right.set_ylabel("accuracy, %")
  right.legend(fontsize=8)
  for axes in (left, right):
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
  return figure


def sampling_curves(panels: dict[str, dict], references: dict[str, tuple[str, float]]):
  """Lines against the step, one panel per quantity.

  Args:
    panels: panel title -> line name -> list of (step, value).
    references: panel title -> (name, height) of a horizontal line.

  Returns:
    A matplotlib figure.
  """
  figure = _figure(4.5 * len(panels), 3.4)
  for axes, (title, lines) in zip(
    figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
  ):
    for name, points in lines.items():
      axes.plot(*zip(*points), label=name)
    if title in references:
      name, height = references[title]
      axes.axhline(height, linestyle="--", color="gray", label=name)
    axes.set_title(title, fontsize=10)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(lines) > 1 or title in references:
      axes.legend(fontsize=7, ncols=2 if len(lines) > 5 else 1)
  return figure


def save_scores(path, scores, indices, certificate: dict) -> None:
  """Writes `selection_scores` as PNG.

  Args:
    path: PNG file name.
    scores, indices, certificate: see `selection_scores`.
  """
  _save(selection_scores(scores, indices, certificate), path)


def selection_scores(scores, indices, certificate: dict):
  """Sorted scores with the selected rows marked (left), and the measured errors in the certificate (right).

  Args:
    scores: `(n,)` sensitivities.
    indices: `(m,)` selected rows, -1 for synthetic points.
    certificate: content of `certificate.json`.

  Returns:
    A matplotlib figure.
  """
  figure = _figure(9.0, 3.4)
  left, right = figure.subplots(1, 2)
  scores, chosen = np.asarray(scores, np.float64), np.asarray(indices)
  order = np.argsort(-scores)
  place = np.empty_like(order)
  place[order] = np.arange(order.size)
  left.plot(
    np.arange(1, order.size + 1), scores[order] / scores.mean(), color="tab:blue", label="all rows"
  )
  rows = chosen[chosen >= 0]
  if rows.size:
    left.plot(
      place[rows] + 1, scores[rows] / scores.mean(), "o", ms=4, color="tab:red", label="selected"
    )
  left.axhline(1.0, color="gray", linestyle="--", label="uniform")
  left.set_xscale("log")
  left.set_xlabel("rank of the row")
  left.set_ylabel("sensitivity / mean")
  left.legend(fontsize=8)
  shown = {
    "epsilon, worst query": "measured_epsilon",
    "epsilon, mean": "mean_epsilon",
    "epsilon at the optimum": "epsilon_at_optimum",
    "epsilon guaranteed": "promised_epsilon",
    "F / F* - 1 (at most)": "objective_ratio",
  }
  bars = {name: certificate[key] for name, key in shown.items() if certificate.get(key) is not None}
  if "F / F* - 1 (at most)" in bars:
    bars["F / F* - 1 (at most)"] -= 1
  if bars:
    right.barh(list(bars)[::-1], list(bars.values())[::-1], color="tab:blue")
    for i, value in enumerate(list(bars.values())[::-1]):
      right.text(value, i, f" {value:.3g}", va="center", fontsize=8)
    right.margins(x=0.2)
    right.set_title("relative error of the weighted subset", fontsize=9)
  else:
    right.text(0.5, 0.5, "synthetic points: no certificate", ha="center", va="center", fontsize=9)
    right.axis("off")
  return figure


def save_animation(path, frames: list, captions: list[str], seconds: float = 0.3) -> None:
  """Writes a GIF that repeats: images in up to five columns, with a caption below them.

  Args:
    path: file name.
    frames: `(k, h, w, 1 or 3)` images in uint8 of each frame, at least one.
    captions: text of each frame.
    seconds: time of a frame; the last one is shown eight times as long.
  """
  from PIL import Image, ImageDraw

  k, height, width, channels = frames[0].shape
  columns, scale = min(k, _ANIMATION_COLUMNS), max(1, round(_ANIMATION_SIDE / max(height, width)))
  rows = -(-k // columns)
  drawn = []
  for frame, caption in zip(frames, captions):
    tiles = np.full(
      (rows * columns, scale * height + 2, scale * width + 2, channels), 255, np.uint8
    )
    tiles[:k, 1:-1, 1:-1] = np.repeat(np.repeat(frame, scale, axis=1), scale, axis=2)
    grid = tiles.reshape(rows, columns, *tiles.shape[1:]).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * tiles.shape[1], columns * tiles.shape[2], channels)
    page = np.full((len(grid) + _CAPTION_HEIGHT, *grid.shape[1:]), 255, np.uint8)
    page[: len(grid)] = grid
    image = Image.fromarray(page[..., 0] if channels == 1 else page)
    ImageDraw.Draw(image).text((4, len(grid) + 4), caption, fill=0 if channels == 1 else (0, 0, 0))
    drawn.append(image if channels == 1 else image.quantize(256))
  buffer = io.BytesIO()
  pause = round(1000 * seconds)
  durations = [pause] * (len(drawn) - 1) + [8 * pause]
  drawn[0].save(
    buffer, "GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0, optimize=True
  )
  atomic.write_atomically(path, buffer.getvalue())


def save_comparison(path, panels: dict, x_label: str, y_label: str, log_x: bool = False) -> None:
  """A PNG of lines with error bars: one panel per setting, one line per competitor, one legend.

  Args:
    path: PNG file name.
    panels: panel title -> line name -> list of (x, mean, deviation).
    x_label, y_label: of every panel.
    log_x: whether x is on a logarithmic scale, with ticks at its values.
  """
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  figure = _figure(4.2 * columns + 1.6, 3.3 * rows)
  grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
  names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
  for axes, (title, lines) in zip(grid, panels.items()):
    for name, points in lines.items():
      x, mean, deviation = np.array(sorted(points), float).T
      # Shifted slightly, so that error bars do not hide each other.
      shift = 0.06 * (names.index(name) / max(len(names) - 1, 1) - 0.5)
      style = (
        {"color": "black", "lw": 2.2, "zorder": 5}
        if name == "auto"
        else {"color": f"C{names.index(name)}"}
      )
      axes.errorbar(
        x * 10**shift if log_x else x,
        mean,
        deviation,
        label=name,
        marker="o",
        ms=3.5,
        capsize=2,
        **style,
      )
    if log_x:
      axes.set_xscale("log")
      ticks = sorted({point[0] for line in lines.values() for point in line})
      axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
      axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
  for axes in grid[len(panels) :]:
    axes.axis("off")
  figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
  _save(figure, path)


def save_bars(path, panels: dict, y_label: str) -> None:
  """Writes `bars` as PNG.

  Args:
    path: PNG file name.
    panels, y_label: see `bars`.
  """
  _save(bars(panels, y_label), path)


def bars(panels: dict, y_label: str):
  """Groups of bars with error bars: one panel per score, one group per method, one bar per variant.

  Args:
    panels: `{title: {group: {variant: (mean, deviation)}}}`.
    y_label: of all panels.

  Returns:
    A matplotlib figure.
  """
  figure = _figure(6.5, 3.0 * max(len(panels), 1))  # narrow enough for a phone
  for i, (title, groups) in enumerate(panels.items()):
    axes = figure.add_subplot(len(panels), 1, i + 1)
    variants = list(dict.fromkeys(v for group in groups.values() for v in group))
    width = 0.8 / max(len(variants), 1)
    for j, variant in enumerate(variants):
      places = [
        k + (j - 0.5 * (len(variants) - 1)) * width
        for k, group in enumerate(groups.values())
        if variant in group
      ]
      means, deviations = zip(*(group[variant] for group in groups.values() if variant in group))
      axes.bar(
        places, means, 0.9 * width, yerr=deviations, capsize=2, label=variant if i == 0 else None
      )
    axes.set_xticks(range(len(groups)), list(groups), rotation=30 if len(groups) > 5 else 0)
    axes.set_title(title)
    axes.set_ylabel(y_label)
  figure.legend(fontsize=9, ncols=2, loc="outside upper center")
  return figure


def svg(figure, box=None) -> bytes:
  """A figure, or the part of it in a box in inches, as SVG; equal figures give equal bytes."""
  import matplotlib

  buffer = io.BytesIO()
  with matplotlib.rc_context({"svg.hashsalt": "kipcore"}):
    figure.savefig(buffer, format="svg", bbox_inches=box, metadata={"Date": None})
  return buffer.getvalue()


def panels(figure) -> list[bytes]:
  """The panels of a figure as SVG of equal size; the figure as a whole if they share a legend.

  Args:
    figure: a matplotlib figure, whose layout is fixed by this.

  Returns:
    One document per panel.
  """
  from matplotlib.transforms import Bbox

  if figure.legends or len(figure.axes) == 1:
    return [svg(figure)]
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  boxes = [
    axes.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()) for axes in figure.axes
  ]
  width, height = (max(getattr(box, side) for box in boxes) + 0.1 for side in ("width", "height"))
  found = []
  for shown, box in zip(figure.axes, boxes):
    for axes in figure.axes:
      axes.set_visible(axes is shown)
    x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    found.append(svg(figure, Bbox.from_bounds(x - width / 2, y - height / 2, width, height)))
  for axes in figure.axes:
    axes.set_visible(True)
  return found


def _names(classes, class_names):
  return [str(class_names[c]) if class_names else str(c) for c in classes]


def _show(axes, panel, title):
  height, width = panel.shape[:2]
  axes.imshow(panel, extent=(0, width, height, 0), interpolation="nearest")
  axes.set_title(title, fontsize=9)
  axes.tick_params(length=0)
  axes.set_xticks([])
  axes.set_yticks([])
  for spine in axes.spines.values():
    spine.set_visible(False)


def _figure(width: float, height: float):
  # The object-oriented interface: no global state, no display needed.
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path) -> None:
  buffer = io.BytesIO()
  # The tight box contains all titles and tick labels, also those that do not fit into the figure.
  figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", pad_inches=0.05)
  atomic.write_atomically(path, buffer.getvalue())
