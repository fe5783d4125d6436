"""`report.html` of a run folder: settings, results, cost and usage in one file."""

import datetime
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from kipcore.cli.folder import outputs, run_folder
from kipcore.io import artifact, export
from kipcore.report import html, pictures
from kipcore.report.html import Section
from kipcore.selection import rows_certificate

_MAX_CELLS = 120  # images with a caption each
_MAX_IMAGES = 200  # in a grid of rows
_MAX_COLUMNS = 10
_MAX_CLASSES = 30  # in the table of classes
_MAX_LINES = 8  # of classes in a chart, where there are more than ten


def write_report(folder: pathlib.Path, path: pathlib.Path | None = None) -> None:
  """Writes the report of a distillation or a selection from the files of its folder.

  Args:
    folder: contains config.json, result.json and, except for selected rows of a file, distilled.npz; sections
      whose files are missing are omitted.
    path: the file; None for report.html in the folder.
  """
  config, result = (
    json.loads((folder / name).read_text()) for name in ("config.json", "result.json")
  )
  if "input" in config:
    title, lead, sections = _selected_rows(folder, config, result)
  else:
    title, lead, sections = _distilled_or_selected(folder, config, result)
  settings = {key: value for key, value in config.items() if key != "environment"}
  sections += [
    Section("Configuration", [html.properties(settings)], True),
    Section("Environment", [html.properties(config["environment"])], True),
  ]
  html.write_html(path or folder / "report.html", title, sections, lead, _footer(folder, config))


def _distilled_or_selected(folder, config: dict, result: dict) -> tuple[str, str, list[Section]]:
  """Title, summary and sections of a run with an artifact."""
  stored = artifact.load_artifact(folder / "distilled.npz")
  name, m = pathlib.Path(config["dataset"]).stem, result["support_size"]
  kernel = f"the {config['kernel'].upper()} of {config['architecture']}"
  if (folder / "certificate.json").exists():
    title, lead = (
      f"{m} selected {_kind(stored)} of {name}",
      f"Selected by {result['chosen_strategy']} with {kernel}, seed {config['seed']}.",
    )
    sections = _selection(folder, config, result, stored)
  else:
    title, targets = (
      f"{m} distilled {_kind(stored)} of {name}",
      f", targets by {result['sampler']}" if result["steps"] else "",
    )
    lead = (
      f"Learned by {result['method']} with {_learned_with(config)}; initialization {result['init']}{targets}, "
      f"seed {config['seed']}."
    )
    sections = _distillation(folder, config, result, stored)
  return title, lead, [*sections, Section("Use it elsewhere", _use(stored))]


def _selected_rows(folder, config: dict, result: dict) -> tuple[str, str, list[Section]]:
  """Title, summary and sections of selected rows of a file."""
  certified: dict = {}
  number = lambda value: f"{value:.4g}"
  if (folder / "certificate.json").exists():
    certified = json.loads((folder / "certificate.json").read_text())
  proof: list[str] = []
  if certified:
    compared = {"MMD to all rows": (certified["mmd"], 0.0, certified["random_mmd"])}
    for model in rows_certificate.MODELS:
      if certified[f"{model}_error"] is not None:
        compared[f"{model} regression, {certified['error']}"] = tuple(
          certified[f"{model}_error{of}"] for of in ("", "_all", "_random")
        )
    cards = [
      (number(own), name, f"random rows: {number(random)}")
      for name, (own, _, random) in compared.items()
    ]
    rows = [[name, *map(number, values)] for name, values in compared.items()]
    proof = [
      html.cards(cards),
      html.table(["", "selected rows", "all rows", "as many random rows"], rows),
      _about_rows(certified),
    ]
  labels = f"{len(result['class_names'])} classes" if result["class_names"] else result["labels"]
  facts = {
    "rows": f"{result['rows']:,}, of weight {number(result['total_weight'])}",
    "selected": f"{result['support_size']:,}, of weight {number(result['selected_weight'])}",
    "labels": labels,
    "errors by which auto chose": json.dumps(result["objectives"]) if result["objectives"] else "",
    "effective dimension": number(result["d_eff"]) if "d_eff" in result else "",
    "total sensitivity": number(result["total_sensitivity"]) if "d_eff" in result else "",
  }
  return (
    f"{result['support_size']:,} selected rows of {pathlib.Path(config['input']).name}",
    f"Selected by {result['chosen_strategy']} from {result['rows']:,} rows, seed {config['seed']}.",
    [
      Section("Certificate", proof),
      Section("Rows", [html.properties({name: text for name, text in facts.items() if text})]),
      Section("Cost", [html.properties(_cost(result))]),
    ],
  )


def _about_rows(certified: dict) -> str:
  """How the certificate of selected rows was measured."""
  texts = []
  if certified["num_test_rows"]:
    texts.append(
      f"Errors are measured on {certified['num_test_rows']:,} rows that were not selected and are in no training set."
    )
  if not certified["exact"]:
    texts.append(
      f"The MMD and logistic regression on all rows use {certified['measured_rows']:,} draws of rows, whose noise makes the MMD too large."
    )
  return " ".join([*texts, "All of this is measured; nothing is guaranteed."])


def write_comparison(
  folder: pathlib.Path,
  table: str,
  panels: dict,
  errors: dict[str, str],
  images: dict,
  path: pathlib.Path | None = None,
) -> None:
  """Writes the report of a comparison.

  Args:
    folder: contains config.json.
    table: `comparison.md`.
    panels: score -> method -> initialization and targets -> (mean, deviation), in percent.
    errors: error messages by cell.
    images: (method, initialization, targets) -> (seed, images `(k, h, w, c)` in uint8, their classes).
    path: the file; None for report.html in the folder.
  """
  config = json.loads((folder / "config.json").read_text())
  cells, grid = config["cells"], config["grid"]
  datasets = ", ".join(dict.fromkeys(pathlib.Path(cell["dataset"]).stem for cell in cells))
  header, _, *rows = (
    [cell.strip() for cell in line.strip("| ").split(" | ")] for line in _padded_table(table)
  )
  panels = {name: groups for name, groups in panels.items() if groups}
  sections = [
    Section(
      "Accuracy",
      [
        "Mean over seeds, by initialization / targets. Error bars: one standard deviation; of two seeds, both values.",
        html.chart(pictures.bars(panels, "test accuracy, %"), "Test accuracy of each method"),
      ]
      if panels
      else [],
    ),
    Section(
      "Table",
      [
        *(line for line in table.splitlines() if line and not line.startswith("|")),
        html.table(header, rows, text_columns=3),
      ],
    ),
    Section("Images", _images_of_cells(images)),
    Section("Failed cells", [html.properties(errors)] if errors else []),
    Section("Settings", [html.properties(grid), *_settings_by_method(cells)], True),
    Section("Environment", [html.properties(config["environment"])], True),
  ]
  lead = (
    f"{len(dict.fromkeys(cell['method'] for cell in cells))} methods, {len(cells)} runs: initializations {', '.join(grid['inits'])}; "
    f"targets {', '.join(grid['samplers'])}; {grid['num_seeds']} seeds."
  )
  html.write_html(
    path or folder / "report.html",
    f"Comparison on {datasets}",
    sections,
    lead,
    _footer(folder, config),
  )


def _images_of_cells(images: dict) -> list:
  """A row of images for each method, initialization and targets."""
  if not images:
    return []
  figures = []
  for (method, init, sampler), (_, pixels, classes) in images.items():
    title = f"{method}: {init} / {sampler}"
    drawn = [html.image(x, (0, 255), f"{title}, class {name}") for x, name in zip(pixels, classes)]
    figures.append(html.image_rows(title, [("", drawn)]))
  seeds = {seed for seed, _, _ in images.values()}
  classes = next(iter(images.values()))[2]
  text = f"The first distilled image of each class: {', '.join(classes)}; seed {', '.join(map(str, sorted(seeds)))}."
  return [text, html.side_by_side(*figures)]


def _padded_table(text: str) -> list[str]:
  """The lines of a Markdown table, with empty last cells kept."""
  return [line.replace("||", "|  |") for line in text.splitlines() if line.startswith("|")]


def _settings_by_method(cells: list[dict]) -> Sequence[str]:
  """A table of the settings that differ between methods, and the shared settings."""
  first = {cell["method"]: cell for cell in reversed(cells)}
  first = dict(reversed(first.items()))
  names = [name for name in cells[0] if name not in ("method", "init", "sampler", "seed")]
  text = lambda value: value if isinstance(value, str) else json.dumps(value)
  values = {name: [text(cell.get(name)) for cell in first.values()] for name in names}
  differ = [name for name in names if len(set(values[name])) > 1]
  tables = [html.properties({name: values[name][0] for name in names if name not in differ})]
  return (
    [html.table(["", *first], [[name, *values[name]] for name in differ]), *tables]
    if differ
    else tables
  )


def _distillation(folder, config: dict, result: dict, stored: artifact.Artifact) -> list[Section]:
  history = run_folder.read_metrics(folder)
  return [
    Section("Accuracy", _accuracies(config, result, stored)),
    Section("Learning curve", _curves(history, result)),
    Section("Images", _before_and_after(folder, stored)),
    Section("Target sampling", _importance(folder, config, result, stored, history)),
    Section("Cost", [html.properties(_cost(result))]),
  ]


def _percent(share: float, digits: int = 2) -> str:
  return f"{100 * share:.{digits}f} %"


def _accuracies(config: dict, result: dict, stored: artifact.Artifact) -> Sequence[str]:
  random, spread = (
    result["random_baseline_test_accuracy"],
    result["random_baseline_test_accuracy_std"],
  )
  rows = [
    (f"distilled {_kind(stored)}", result["test_accuracy"], ""),
    ("initialization", result["init_test_accuracy"], result["init"]),
    (
      "random real data",
      random,
      f"same size; standard deviation {100 * spread:.2f} points over draws",
    ),
  ]
  if "uniform_targets_test_accuracy" in result:
    rows.insert(
      1,
      (
        "distilled with uniform targets",
        result["uniform_targets_test_accuracy"],
        "equal target evaluations",
      ),
    )
  if "feature_map_test_accuracy" in result:
    rows.insert(
      1,
      (
        f"distilled {_kind(stored)}, in the features of the map",
        result["feature_map_test_accuracy"],
        "",
      ),
    )
  if networks := result.get("network_test_accuracy"):
    note = (
      f"{len(networks)} networks, {_percent(min(networks), 1)} to {_percent(max(networks), 1)}"
      if len(networks) > 1
      else "one network"
    )
    rows.append(
      (
        "networks trained on the distilled set",
        result["network_test_accuracy_mean"],
        note,
      )
    )
    rows += [
      (f"networks trained on {name}", value, result["init"] if "initial" in name else "same size")
      for name, value in outputs.compared_networks(result).items()
    ]
  if leads := result.get("teach", "kernel") != "kernel" and bool(networks):
    rows = [row for row in rows if "networks" in row[0]] + [
      (f"ridge regression, {name}", value, note)
      for name, value, note in rows
      if "networks" not in name
    ]
  gained = 100 * (result["test_accuracy"] - random)
  entries = [
    (
      _percent(result["test_accuracy"]),
      "distilled",
      _difference(gained, "random real data"),
    ),
    (
      _percent(random),
      "random real data",
      f"standard deviation {100 * spread:.2f} points",
    ),
    (_percent(result["init_test_accuracy"]), "initialization", result["init"]),
  ]
  if leads:
    entries = _network_entries(result)
  warnings = [
    f"Warning: the result is {_difference(100 * (result['test_accuracy'] - reference), name)}."
    for reference, name in (
      (result["init_test_accuracy"], "its initialization"),
      (random, "random real data of the same size"),
    )
    if result["test_accuracy"] < reference and not leads
  ]
  return [
    html.cards(entries),
    *warnings,
    html.table(
      ["", "test accuracy", ""],
      [[html.noted(name, note), _percent(value), html.bar(value)] for name, value, note in rows],
    ),
    *([f"Networks: {result['network_scored_by']}."] if networks else []),
    f"Kernel ridge regression on {result['support_size']} {_kind(stored)}, with the {config['kernel'].upper()} of "
    f"{config['score_architecture'] or config['architecture']}, scored on {result['test_rows']:,} test rows.",
  ]


def _network_entries(result: dict) -> list[tuple[str, str, str]]:
  """The cards of a set for networks: its accuracy and those of other sets under the same protocol."""
  own = result["network_test_accuracy_mean"]
  others = outputs.compared_networks(result)
  differences = [_difference(100 * (own - value), name) for name, value in others.items()]
  return [
    (_percent(own), "networks trained on the distilled set", ", ".join(differences)),
    *((_percent(value), f"networks trained on {name}", "") for name, value in others.items()),
  ]


def _curves(history: list[dict], result: dict) -> Sequence[str]:
  if len([r for r in history if "loss" in r]) < 2:
    return []
  figure = pictures.learning_curve(
    history,
    outputs.reference_lines(result),
  )
  parts: list[str] = [html.chart(figure, "Loss and accuracy against the step")]
  if any("importance_gain" in r for r in history):
    parts.append(
      "Targets drawn by score are harder than the average row, so their loss does not measure progress. The accuracy is the importance-weighted "
      "estimate for all training rows."
    )
  return parts


def _series(history: list[dict], key: str, name: str = "", factor: float = 1.0) -> dict:
  return {name or key: [(r["step"], factor * r[key]) for r in history if key in r]}


def _names(stored: artifact.Artifact) -> Sequence[str]:
  about = stored.metadata["dataset"]
  return [str(name) for name in about.get("class_names") or range(about["num_classes"])]


def _pixel_range(stored: artifact.Artifact) -> tuple[float, float]:
  """(black, white) of the dataset, or of the images if the artifact does not record it."""
  return stored.metadata["dataset"].get("pixel_range") or (
    float(stored.images.min()),
    float(stored.images.max()),
  )


def _are_images(x) -> bool:
  return x.ndim == 4 and x.shape[-1] in (1, 3)


def _kind(stored: artifact.Artifact) -> str:
  return "images" if _are_images(stored.images) else "points"


def _before_and_after(folder, stored: artifact.Artifact) -> Sequence[str]:
  if not _are_images(stored.images) or not (folder / "start.npz").exists():
    return []
  before, labels = outputs.load_arrays(folder / "start.npz", "images", "classes")
  names, pixels = _names(stored), _pixel_range(stored)
  draw = lambda x, what, c: html.image(x, pixels, f"{what}, class {names[c]}")
  order = np.argsort(labels, kind="stable")
  moving = folder / "animation.gif"
  movie = (
    [html.animation(moving.read_bytes(), "images of the first classes at the logged steps")]
    if moving.exists()
    else []
  )
  across = min(_MAX_COLUMNS, np.bincount(labels).max())
  if across <= 2:
    chosen = order[:_MAX_CELLS]
    text = f"Initialization (left) and distilled images (right){_cut(len(chosen), len(order))}."
    return [
      text,
      html.image_cells(
        [
          (
            (
              draw(before[i], "initialization", labels[i]),
              draw(stored.images[i], "distilled", labels[i]),
            ),
            names[labels[i]],
            [],
          )
          for i in chosen
        ]
      ),
      *movie,
    ]
  classes = np.unique(labels)[: max(_MAX_IMAGES // across, 1)]
  picked = {c: np.flatnonzero(labels == c)[:across] for c in classes}
  grids = [
    html.image_rows(
      title, [(names[c], [draw(x[i], title, c) for i in rows]) for c, rows in picked.items()]
    )
    for title, x in (("Initialization", before), ("Distilled", stored.images))
  ]
  cut = _cut(sum(map(len, picked.values())), len(order))
  return ([f"One row per class{cut}."] if cut else []) + [html.side_by_side(*grids), *movie]


def _cut(shown: int, total: int) -> str:
  return f"; the first {shown} of {total}" if shown < total else ""


def _shown(shown: int, total: int) -> str:
  return f"; {shown} of {total} are shown" if shown < total else ""


def _some_of_each_class(labels, most: int) -> np.ndarray:
  """Indices of at most `most` rows, grouped by class, with an equal number of each class as far as possible."""
  labels = np.asarray(labels)
  order = np.argsort(labels, kind="stable")
  first = np.searchsorted(labels[order], labels[order])
  position = np.arange(labels.size) - first
  chosen = np.argsort(position, kind="stable")[:most]
  return order[np.sort(chosen)]


def _difference(points: float, reference: str) -> str:
  """ "1.2 points above random real images", or below."""
  return f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} {reference}"


def _learned_with(config: dict) -> str:
  """The kernel, or the networks, that the method of a run learns with."""
  from kipcore.cli import recipes

  if recipes.RECIPES[config["method"]].kernel:
    return f"the {config['kernel'].upper()} of {config['architecture']}"
  return f"networks of {config['architecture']}, width {config['width']}"


def _importance(
  folder, config: dict, result: dict, stored: artifact.Artifact, history: list[dict]
) -> Sequence[str]:
  logged = [r for r in history if "importance_gain" in r]
  if not logged or not result["steps"] or not (folder / "importance.npz").exists():
    return []
  scores, labels, hardest, images, predicted = outputs.load_arrays(
    folder / "importance.npz", "scores", "labels", "hardest", "images", "predicted"
  )
  last, names = logged[-1], _names(stored)
  known = np.sort(scores[np.isfinite(scores)])[::-1]
  half = np.searchsorted(np.cumsum(known), known.sum() / 2) + 1 if known.sum() > 0 else known.size
  text = (
    f"Targets were drawn in proportion to their {config['sampler']} under the current distilled set, mixed with "
    f"{_percent(config['uniform_mix'], 0)} uniform draws. The importance gain is the factor by which sampling by score reduces the "
    f"second moment of a draw: 1 if all losses are equal. Below {config['least_gain']:g} draws are uniform"
    + (", as they were at the end." if last["importance_gain"] < config["least_gain"] else ".")
  )
  entries = [
    (f"{last['importance_gain']:.1f}", "importance gain at the end", ""),
    (
      _percent(last["effective_share"], 0),
      "effective share of rows at the end",
      "1 / (n sum p²) of the sampling distribution",
    ),
    (_percent(half / max(known.size, 1), 1), "of the rows have half of the total score", ""),
    (_percent(known.size / scores.size, 0), "of the rows were drawn at least once", ""),
  ]
  present = np.bincount(labels, minlength=len(names))
  ratio = np.asarray(last["class_shares"]) / np.maximum(present / labels.size, 1e-12)
  order = np.argsort(-ratio, kind="stable")
  lines = range(len(names)) if len(names) <= 10 else sorted(order[:_MAX_LINES])
  of_classes = {names[c]: [(r["step"], 100 * r["class_shares"][c]) for r in logged] for c in lines}
  known_rows = np.isfinite(scores)
  mean = lambda c: (
    f"{scores[known_rows & (labels == c)].mean():.3g}" if (known_rows & (labels == c)).any() else ""
  )
  rows = [
    [
      names[c],
      _percent(present[c] / labels.size, 1),
      _percent(last["class_shares"][c], 1),
      mean(c),
      html.bar(last["class_shares"][c] / max(last["class_shares"])),
    ]
    for c in order[:_MAX_CLASSES]
  ]
  gain_title, classes_title = (
    "importance gain",
    "share of draws by class, %"
    if len(names) <= 10
    else f"share of draws, %: the {_MAX_LINES} most drawn classes relative to size",
  )
  parts = [
    text,
    html.cards(entries),
    html.chart(
      pictures.sampling_curves(
        {
          gain_title: _series(logged, "importance_gain", "gain"),
          "effective share of the rows, %": _series(logged, "effective_share", "share", 100),
          classes_title: of_classes,
        },
        {gain_title: ("threshold for sampling by score", config["least_gain"])},
      ),
      "Importance gain, effective share of the rows, and share of each class against the step",
    ),
    html.heading(
      f"Classes at the end, by draws relative to their size{_cut(len(rows), len(names))}"
    ),
    html.table(["class", "share of rows", "share of draws", "mean score", ""], rows),
  ]
  if _are_images(images) and hardest.size:
    note = lambda i, k: [
      f"predicted {names[k]}" if k != labels[i] else "predicted correctly",
      f"score {scores[i]:.3g}",
      f"row {i}",
    ]
    cells = [
      (
        (html.image(x, _pixel_range(stored), f"class {names[labels[i]]}"),),
        names[labels[i]],
        note(i, k),
      )
      for i, x, k in zip(hardest, images, predicted)
    ]
    wrong = np.mean(predicted != labels[hardest])
    parts += [
      html.heading("The hardest training images"),
      "The rows with the highest latest score: class, predicted class "
      f"({_percent(wrong, 0)} are wrong), and row number in the training data. Wrong labels "
      "and unusual images are frequent here.",
      html.image_cells(cells),
    ]
  return parts


def _cost(result: dict) -> dict[str, str]:
  entries = {"total": f"{result['wall_seconds']:.1f} s"}
  if result.get("steps"):
    entries["compilation"] = f"{result['compile_seconds']:.1f} s"
  if "step_seconds" in result:
    entries[f"{result['steps']:,} steps" if result["steps"] else result["method"]] = (
      f"{result['step_seconds']:.1f} s"
    )
    entries["target evaluations"] = f"{result['target_evaluations']:,}"
  for key, name in (
    ("peak_memory_bytes", "peak memory of the process"),
    ("device_peak_memory_bytes", "peak memory of the device"),
  ):
    if result.get(key):
      entries[name] = f"{result[key] / 2**20:,.0f} MiB"
  return entries


def _use(stored: artifact.Artifact) -> Sequence[str]:
  low, high = _pixel_range(stored)
  metadata, offset = stored.metadata, stored.metadata["label_convention"]["offset"]
  shape, kind = ", ".join(map(str, stored.images.shape[1:])), _kind(stored)
  units = "pixels" if _are_images(stored.images) else "features"
  with_numpy = f"""import json
import numpy as np

with np.load("distilled.npz", allow_pickle=False) as file:
  {kind}, labels = file["images"], file["labels"]  # {stored.images.shape} {units}, {stored.labels.shape}
  about = json.loads(str(file["metadata"]))
classes = labels.argmax(axis=1)
one_hot = labels + about["label_convention"]["offset"]"""
  with_kipcore = f"""import kipcore

distilled = kipcore.load_artifact("distilled.npz")
inputs = distilled.preprocess.apply(x)  # x (n, {shape}): {units} as the dataset stores them
accuracy = distilled.evaluate(x, y).accuracy  # y (n,): integer classes"""
  steps, fitted = (
    ", then ".join(step["name"] for step in metadata["preprocess"]["steps"]),
    metadata["preprocess"]["kind"],
  )
  facts = {
    kind: f"{stored.images.shape} {stored.images.dtype}, {units[:-1]} values from {low:g} to {high:g}; learned values may lie outside",
    "labels": f"{stored.labels.shape}, {export.label_kind(stored.labels)}; the offset is 1/c = {offset:g}",
    "preprocessing": f"{fitted}{f': {steps}' if steps != fitted else ''}; fitted on training rows; its arrays are in the file",
    "ridge": f"{stored.relative_ridge:g} of tr(K_ss) / m",
    "kernel": f"{stored.kernel.upper()} of {stored.arch.name}",
  }
  return [
    "With NumPy alone:",
    html.code(with_numpy),
    "With kipcore, with the same preprocessing:",
    html.code(with_kipcore),
    html.properties(facts),
  ]


_CERTIFIED = (
  (
    "measured_epsilon",
    "epsilon, worst query",
    "largest |F_S / F - 1| over the queries: it can refute a guarantee, but not prove one",
  ),
  ("mean_epsilon", "epsilon, mean", "over the same queries"),
  (
    "epsilon_at_optimum",
    "epsilon at the optimum",
    "at the best model in the span of the landmarks",
  ),
  (
    "promised_epsilon",
    "guaranteed epsilon",
    "by the theorem, with the total sensitivity of the scores",
  ),
  (
    "objective_ratio",
    "F / F*, at most",
    "objective of the model trained on the points, divided by a certified lower bound",
  ),
  ("objective_subset", "F of the subset's model", "on all rows"),
  ("objective_reference", "F of the reference", "the smallest objective found"),
  ("objective_lower", "lower bound on F*", "certified, up to rounding"),
  ("num_queries", "queries", ""),
  ("num_landmarks", "landmarks", "rows that span the queries"),
)


def _selection(folder, config: dict, result: dict, stored: artifact.Artifact) -> list[Section]:
  certified = json.loads((folder / "certificate.json").read_text())
  random = result["random_baseline_test_accuracy"]
  entries = [
    (
      _percent(result["test_accuracy"]),
      # Runs of version 0.1 scored the weighted regression alone.
      "the points" if "weighted_test_accuracy" in result else "the weighted points",
      _difference(100 * (result["test_accuracy"] - random), "random real data"),
    ),
    (_percent(result["solved_labels_test_accuracy"]), "with labels solved on all rows", ""),
    (_percent(random), "random real data, same size", ""),
  ]
  if "weighted_test_accuracy" in result:
    weighted_random = _percent(result["random_baseline_weighted_test_accuracy"])
    entries.insert(
      1,
      (
        _percent(result["weighted_test_accuracy"]),
        "the points, weighted regression",
        f"random real data: {weighted_random}",
      ),
    )
  if "expert_epoch" in result:
    with_classes = _percent(result["class_labels_test_accuracy"])
    entries[0] = (entries[0][0], "the points with expert labels", entries[0][2])
    entries.append(
      (
        _percent(result["expert_random_baseline_test_accuracy"]),
        "random real data with expert labels",
        f"the points with class labels: {with_classes}",
      )
    )
  scored = {
    "effective dimension": f"{result['d_eff']:.1f}, at least {result['d_eff_lower']:.1f}",
    "total sensitivity": f"{result['total_sensitivity']:.1f}",
    "largest over mean score": f"{result['max_over_mean_score']:.2f}",
    "scores are": result["scores_are"],
    "ridge of the scores": f"{result['score_ridge']:.4g}",
  }
  value = lambda v: (
    f"{v:,}" if isinstance(v, int) else f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}"
  )
  proof: list[str] = [
    html.table(
      ["", "measured"],
      [
        [html.noted(name, note), value(certified[key])]
        for key, name, note in _CERTIFIED
        if certified.get(key) is not None
      ],
    )
  ]
  if "note" in certified:
    proof = [certified["note"][:1].upper() + certified["note"][1:] + "."]
  elif certified.get("promised_epsilon") is None:
    proof.append("The theorems give no guarantee for this few points; rely on the measured errors.")
  indices, weights, scores = outputs.load_arrays(
    folder / "selection.npz", "indices", "weights", "scores"
  )
  chart = html.chart(
    pictures.selection_scores(scores, indices, certified),
    "Sorted scores with the selected rows, and measured errors of the selection",
  )
  sections = [
    Section("Accuracy", [html.cards(entries)]),
    Section("Certificate", proof),
    Section("Scores", [chart, html.properties(scored)]),
  ]
  if _are_images(stored.images):
    names, labels = _names(stored), stored.labels.argmax(axis=1)
    order = _some_of_each_class(labels, _MAX_CELLS)
    cells = [
      (
        (html.image(stored.images[i], _pixel_range(stored), f"class {names[labels[i]]}"),),
        names[labels[i]],
        [f"weight {value(float(weights[i]))}"],
      )
      for i in order
    ]
    sections.append(
      Section(
        "Images",
        [f"Selected points, by class{_shown(len(order), len(labels))}.", html.image_cells(cells)],
      )
    )
  return [*sections, Section("Cost", [html.properties(_cost(result))])]


def _footer(folder, config: dict) -> str:
  version, commit = (
    config["environment"]["versions"].get("kipcore", ""),
    config["environment"].get("commit"),
  )
  written = datetime.datetime.fromtimestamp((folder / "config.json").stat().st_mtime).strftime(
    "%Y-%m-%d %H:%M"
  )
  return f"kipcore {version}{f', commit {commit[:12]}' if commit else ''}; started {written}."
