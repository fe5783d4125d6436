"""The report of a run: one complete, escaped file for all screens; hardest images; event files."""

import dataclasses
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import markupsafe
import numpy as np
import optax
import pytest
from helpers import assert_close

import kipcore
from kipcore.cli import report as report_command
from kipcore.cli.config import CompareConfig, DistillConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.folder import event_log, outputs, reporting, run_folder
from kipcore.cli.runs import comparison, dry_run, pipeline
from kipcore.distillation import importance, loop, samplers, targets
from kipcore.distillation.methods import kip
from kipcore.report import html as html_report
from kipcore.report import pictures

CONFIG = DistillConfig(
  steps=30, num_devices=1
)  # as in test_pipeline.py, so that its compilations are reused
HOSTILE = "<script>alert(1)</script>" + "&\"'" + 60 * "m"
SECTIONS = [
  "Accuracy",
  "Learning curve",
  "Images",
  "Target sampling",
  "Cost",
  "Use it elsewhere",
  "Configuration",
  "Environment",
]
CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def count_charts(page) -> int:
  """The number of inlined SVG charts of a page."""
  return sum(
    name == "src" and value.startswith("data:image/svg+xml") for name, value in page.attributes
  )


class Page(html.parser.HTMLParser):
  """The elements of a page; raises if they are not nested correctly."""

  def __init__(self, text: str):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    self.close()
    if self.open:
      raise ValueError(f"left open: {self.open}")

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if self.open.pop() != tag:
      raise ValueError(f"closed before its time: {tag}")

  def handle_data(self, data):
    self.text.append(data)

  @property
  def sections(self):
    return [self.text[i] for i in range(len(self.text)) if self.text[i] in SECTIONS][
      : len(self.navigation)
    ]

  @property
  def navigation(self):
    return [value for name, value in self.attributes if name == "href"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return pipeline.run_distill(CONFIG, str(tmp_path_factory.mktemp("run") / "run"), verbose=False)


@pytest.fixture
def copied(run, tmp_path):
  return shutil.copytree(run[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def hostile(run, tmp_path_factory):
  """The report of the run with other class names and another dataset path."""
  folder = shutil.copytree(run[0], tmp_path_factory.mktemp("hostile") / "run")
  stored = kipcore.load_artifact(folder / "distilled.npz")
  about = {**stored.metadata["dataset"], "class_names": [f"{i}{HOSTILE}" for i in range(10)]}
  kipcore.save_artifact(
    folder / "distilled.npz",
    dataclasses.replace(stored, metadata={**stored.metadata, "dataset": about}),
  )
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(
    json.dumps({**config, "dataset": "no<b>path.npz", "note": HOSTILE})
  )
  reporting.write_report(folder)
  return folder


def report(folder) -> str:
  return (folder / "report.html").read_text()


def test_report_is_one_file_without_external_resources_and_scripts(run):
  text = report(run[0])
  page = Page(text)
  assert not re.search(
    r"https?:|//[a-z]|url\(|@import|javascript:", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
  )
  assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
  assert all(
    value.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,"))
    for name, value in page.attributes
    if name == "src"
  )
  assert not any(name.startswith("on") for name, _ in page.attributes)
  policy = (
    dict(page.attributes)["http-equiv"],
    next(v for k, v in page.attributes if k == "content" and "src" in v),
  )
  assert policy == (
    "Content-Security-Policy",
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
  )


def test_the_report_has_every_section_and_the_figures_of_the_run(run):
  folder, result = run
  page = Page(report(folder))
  assert page.sections == SECTIONS and page.tags.count("details") == 2
  text = " ".join(page.text)
  for name in ("test_accuracy", "init_test_accuracy", "random_baseline_test_accuracy"):
    assert f"{100 * result[name]:.2f} %" in page.text
  for figure in (
    f"{result['importance_gain']:.1f}",
    f"{result['target_evaluations']:,}",
    f"{result['wall_seconds']:.1f} s",
    f"{result['compile_seconds']:.1f} s",
    f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB",
    "cross_entropy",
    jax.__version__,
  ):
    assert figure in text, figure
  assert count_charts(page) == 2 + 3, "panels of the learning curve and of sampling"
  assert page.tags.count("img") == 2 + 3 + 2 * 10 + outputs.HARDEST


def test_missing_parts_of_a_run_are_omitted(copied):
  stored = kipcore.load_artifact(copied / "distilled.npz")
  flat = dataclasses.replace(
    stored,
    images=stored.images.reshape(10, 64),
    support=stored.support.reshape(10, 64),
    preprocess=kipcore.fit_preprocess(stored.images.reshape(10, 64), "none"),
  )
  kipcore.save_artifact(copied / "distilled.npz", flat)
  with np.load(copied / "importance.npz") as file:
    arrays = {name: file[name] for name in file if name != "metadata"}
  outputs.save_arrays(
    copied / "importance.npz", **{**arrays, "images": arrays["images"].reshape(-1, 64)}
  )
  reporting.write_report(copied)
  page = Page(report(copied))
  assert page.sections == [s for s in SECTIONS if s != "Images"] and (
    page.tags.count("img") == count_charts(page)
  ), "rows that are no images"
  (copied / "importance.npz").unlink()
  (copied / "metrics.jsonl").unlink()
  reporting.write_report(copied)
  assert Page(report(copied)).sections == ["Accuracy", *SECTIONS[-4:]]
  for scores in (None, np.full(3, np.nan)):
    outputs.write_importance(copied, CONFIG, None, None, scores)
  assert not (copied / "importance.npz").exists(), "a sampler without scores, or no row seen"


def test_text_from_data_is_escaped(hostile):
  text = report(hostile)
  page = Page(text)
  assert "<script" not in text and "<b>path" not in text
  assert str(markupsafe.escape(HOSTILE)) in text
  assert f"3{HOSTILE}" in page.text, "as text it is what it was"
  assert html_report.heading("<i>&") == "<h3>&lt;i&gt;&amp;</h3>"
  assert 'alt="&#34;&gt;&lt;i&gt;"' in html_report.image(np.zeros((2, 2, 1)), (0, 1), '"><i>')
  assert "<i>" not in html_report.page("<i>", [html_report.Section("<i>", ["<i>"])], "<i>", "<i>")
  figure = pictures.sampling_curves({"<i>": {"<i>": [(0, 1), (1, 2)]}}, {"<i>": ("<i>", 1.5)})
  assert b"<i>" not in pictures.svg(figure) and "<i>" not in html_report.chart(figure, "<i>")
  assert b"<i>" not in pictures.svg(pictures.bars({"<i>": {"<i>": {"<i>": (1.0, 0.1)}}}, "<i>"))
  assert "<i>" not in html_report.properties({"<i>": {"<i>": ["<i>"]}}) + html_report.code(
    "<i>"
  ) + html_report.cards([("<i>",) * 3])


@pytest.mark.usefixtures("without_pictures")
def test_a_run_on_vectors_speaks_of_points(tmp_path, capsys):
  """A dataset of vectors has neither images nor pixels, in the terminal and in every text of the folder."""
  rng = np.random.default_rng(0)
  labels = np.arange(90) % 3
  x = (rng.normal(size=(90, 128)) + 3 * np.eye(3, 128)[labels]).astype(np.float32)
  np.savez(tmp_path / "v.npz", x_train=x, y_train=labels, x_test=x[:30] + 0.1, y_test=labels[:30])
  config = DistillConfig(dataset=str(tmp_path / "v.npz"), steps=3, num_devices=1)
  dry_run.of_distillation(config)
  folder, _ = pipeline.run_distill(config, str(tmp_path / "run"))
  printed = capsys.readouterr().out
  text = " ".join(Page(re.sub("(?s)(<style>).*(</style>)", r"\1\2", report(folder))).text)
  assert printed.count("test points of 128 features, 3 classes") == 2
  assert "3 distilled points of v" in text and "features, (3, 3)" in text
  # Names of settings, files and arrays are not words about the data.
  names = r"images_per_class|images\.png|\.images|\[\W*images\W*\]"
  for words in (printed, text, (folder / "README.txt").read_text()):
    assert not re.search(r"(?i)\b(image|pixel)s?\b", re.sub(names, "", words))


def test_the_code_of_the_report_runs(run, monkeypatch):
  folder, result = run
  monkeypatch.chdir(folder)
  raw = kipcore.datasets.load_dataset("digits")
  scope = {"x": raw.x_test, "y": raw.y_test}
  snippets = [
    html.unescape(code)
    for code in re.findall(r"<pre><code>(.*?)</code></pre>", report(folder), flags=re.S)
  ]
  assert len(snippets) == 2
  for snippet in snippets:
    exec(compile(snippet, "report.html", "exec"), scope)
  assert (
    float(scope["accuracy"]) == result["test_accuracy"]
    and scope["inputs"].shape == raw.x_test.shape
  )
  assert_close(scope["one_hot"], kipcore.load_artifact("distilled.npz").labels + 0.1, 1e-6)
  assert (scope["classes"] == np.arange(10)).all()


def test_importance_is_recorded_over_time_and_its_hardest_rows_are_kept(run):
  folder, result = run
  lines = run_folder.read_metrics(folder)
  assert (
    lines[0]["importance_gain"] == 1
    and lines[-1]["importance_gain"] == result["importance_gain"] > 1
  )
  for line in lines:
    assert (
      len(line["class_shares"]) == 10
      and abs(sum(line["class_shares"]) - 1) < 1e-5
      and 0 < line["effective_share"] <= 1 + 1e-6
    )
  data = pipeline.load(CONFIG)
  with np.load(folder / "importance.npz", allow_pickle=False) as file:
    scores, labels, hardest, images, predicted = (
      file[name] for name in ("scores", "labels", "hardest", "images", "predicted")
    )
  np.testing.assert_array_equal(labels, data.raw.y_train)
  np.testing.assert_array_equal(images, data.raw.x_train[hardest])
  known = np.isfinite(scores)
  assert (
    1000 < known.sum() <= len(scores) == len(data.raw.y_train)
    and len(set(hardest)) == outputs.HARDEST
  )
  assert (np.diff(scores[hardest]) <= 0).all() and scores[hardest[-1]] >= np.sort(scores[known])[
    -outputs.HARDEST
  ]
  stored = kipcore.load_artifact(folder / "distilled.npz")
  assert float(stored.evaluate(images, predicted).accuracy) == 1, (
    "what the distilled set takes them for"
  )
  wrong = predicted != labels[hardest]
  assert (
    report(folder).count("<small>predicted ") - report(folder).count("<small>predicted correctly")
    == wrong.sum()
    > 0
    and report(folder).count("<small>predicted correctly") == (~wrong).sum()
  )
  with np.load(folder / "start.npz", allow_pickle=False) as file:
    start = pipeline.start(CONFIG, data).support
    assert_close(data.preprocess.apply(file["images"]), start.x, 1e-5)
    assert file["classes"].tolist() == list(range(10)), "whatever solved labels say"


def problem(n=203):
  """Unordered rows of unbalanced classes, and a support."""
  rng = np.random.default_rng(0)
  labels = rng.choice(3, n, p=[0.2, 0.3, 0.5])
  x = (1.5 * np.eye(3, 6)[labels] + 0.5 * rng.normal(size=(n, 6))).astype(np.float32)
  y = (np.eye(3)[labels] - 1 / 3).astype(np.float32)
  rows = np.concatenate([np.flatnonzero(labels == k)[:2] for k in range(3)])
  return kipcore.Support(jnp.asarray(x[rows]), jnp.asarray(y[rows])), x, y


def test_scores_are_returned_in_row_order():
  """After one step on all rows, scores are the squared errors of the start on any device."""
  support, x, y = problem()
  method = kip.kip(kipcore.linear_fn(), kip.KIPOptions(1e-2))
  distiller = loop.Distiller(
    method, importance.importance("squared_error"), optax.sgd(0.1), len(x) + 1
  )
  result = loop.distill(0, distiller, support, x, y, 1, devices=jax.devices()[:3])
  k = np.asarray(support.x, np.float64) @ np.asarray(support.x, np.float64).T / 6
  dual = np.linalg.solve(k + 1e-2 * np.trace(k) / 6 * np.eye(6), np.asarray(support.y, np.float64))
  assert_close(
    result.scores, np.sum((x @ np.asarray(support.x).T / 6 @ dual - y) ** 2, axis=1), 1e-4
  )
  assert_close(result.history[-1]["class_shares"], np.bincount(y.argmax(1)) / len(x), 1e-2)


def test_assigned_rows_and_unknown_scores():
  _, x, y = problem()
  key = jax.random.key(3)
  for num_devices in (1, 3):
    shards = targets.deal_rows(y.argmax(1), num_devices, key)
    dealt = targets.arrange_targets(x, y, num_devices, key)
    assert sorted(np.concatenate(shards)) == list(range(len(x)))
    np.testing.assert_array_equal(targets.gather_rows(shards, dealt.x[..., 0]), x[:, 0])
  sampler = importance.importance("squared_error")
  state = sampler.init(jnp.asarray([2, 1], jnp.int32), 4)
  state = state._replace(scores=state.scores.at[1].set(7), known=state.known.at[1].set(True))
  np.testing.assert_array_equal(sampler.scores(state), [np.nan, 7, np.nan, np.nan])
  assert samplers.uniform().scores(0) is None and samplers.class_balanced().metrics(0) == {}


@pytest.mark.parametrize("balanced", [False, True])
def test_logged_sampler_metrics_describe_its_distribution(balanced):
  """Class and effective shares against NumPy, for an active, missing and useless distribution."""
  counts, capacity, mix = np.array([30, 50, 20]), 104, 0.25
  sampler = importance.importance("squared_error", mix, least_gain=1.5, balanced=balanced)
  state = sampler.init(jnp.asarray(counts, jnp.int32), capacity)
  labels = np.repeat(np.arange(3), counts)
  base = (100 / (3 * counts))[labels] if balanced else np.ones(100)
  metrics, with_law = (
    jax.jit(sampler.metrics),
    jax.jit(lambda state: importance.with_distribution(state, mix, 5)),
  )
  plain = metrics(state)
  expected = np.bincount(labels, base) / base.sum()
  assert_close(plain["class_shares"], expected, 1e-5)
  assert_close(plain["effective_share"], 1 / (100 * np.sum((base / base.sum()) ** 2)), 1e-5)
  scores = np.random.default_rng(0).exponential(size=100) ** 2 * (1 + labels)
  filled = state._replace(
    scores=jnp.asarray(np.pad(scores, (0, 4)), jnp.float32), known=jnp.arange(capacity) < 100
  )
  found = metrics(with_law(filled))
  p = (1 - mix) * scores * base / np.sum(scores * base) + mix * base / base.sum()
  assert_close(found["class_shares"], np.bincount(labels, p), 1e-4)
  assert_close(found["effective_share"], 1 / (100 * np.sum(p * p)), 1e-4)
  assert found["importance_gain"] > 1.5
  mild = np.pad(1.0 + labels, (0, 4)).astype(np.float32)
  mild = metrics(with_law(filled._replace(scores=jnp.asarray(mild))))
  assert 1.02 < mild["importance_gain"] < 1.5
  assert_close(mild["class_shares"], expected, 1e-5)


def write_comparison(folder):
  """A grid of two methods, one cell of which failed."""
  folder.mkdir()
  cells = [
    dataclasses.asdict(
      DistillConfig(dataset="mnist", method=method, init=init, seed=seed, steps=steps)
    )
    for method, steps in (("kip", 7), ("dm", 9))
    for init in ("uniform", "kmeans")
    for seed in range(2)
  ]
  row = dict.fromkeys(comparison.FIELDS, "")
  rows = [
    {
      **row,
      **{name: cell[name] for name in ("dataset", "method", "init", "sampler", "seed")},
      "target_evaluations": "80",
      "test_accuracy": str(0.5 + 0.01 * i),
    }
    for i, cell in enumerate(cells)
  ]
  rows[-1].update(error=HOSTILE, test_accuracy="")
  config = {
    "grid": dataclasses.asdict(CompareConfig(methods=("kip", "dm"), num_seeds=2)),
    "cells": cells,
    "environment": run_folder.environment(),
  }
  (folder / "config.json").write_text(json.dumps(config))
  images = np.random.default_rng(0).integers(0, 256, (2, 10, 8, 8, 3), np.uint8)
  for cell, of_cell in zip(rows[0::4], images):
    comparison._add_images(
      folder, comparison.cell_of(cell), of_cell, [HOSTILE, *map(str, range(1, 10))]
    )
  comparison._write(folder, rows)
  return folder


def test_a_comparison_is_a_table_with_intervals_and_settings(tmp_path):
  folder = write_comparison(tmp_path / "grid")
  text = report(folder)
  page = Page(text)
  assert (
    page.text.count("50.0 and 51.0") == 1
    and "+2.0 and +2.0" in page.text
    and any("a and b: the values of two seeds" in part for part in page.text)
    and not any("±" in part for part in page.text)
    and "dm, kmeans, cross_entropy, 1" in page.text
  )
  # The first seed of each method, initialization and sampler keeps its images.
  assert text.count("data:image/png") == 20 and "kip: uniform / cross_entropy" in page.text
  assert "dm: uniform / cross_entropy" in page.text and any("seed 0." in t for t in page.text)
  kept = (folder / "images.npz").read_bytes()
  again = comparison.Cell("kip", "uniform", "cross_entropy", 1)
  comparison._add_images(folder, again, np.zeros((10, 8, 8, 3), np.uint8), list("0123456789"))
  assert (folder / "images.npz").read_bytes() == kept
  assert count_charts(page) == 1 and HOSTILE in page.text and "<script" not in text
  assert "Failed cells" in page.text and "8 runs" in " ".join(page.text)
  differing = text[text.index("<details") :]
  assert (
    re.search(r"<td>steps</td><td[^>]*>7</td><td[^>]*>9</td>", differing)
    and "<th>relative_ridge</th><td>1e-06</td>" in differing
  )
  report_command.write(folder, tmp_path / "again.html")
  assert (tmp_path / "again.html").read_text() == text


def test_report_is_regenerated_from_its_folder(run, tmp_path):
  report_command.write(run[0], tmp_path / "again.html")
  assert (tmp_path / "again.html").read_text() == report(run[0])
  with pytest.raises(UsageError, match="--run: expected the folder of a finished run, got"):
    report_command.write(tmp_path, tmp_path / "none.html")
  assert not (tmp_path / "none.html").exists()
  with pytest.raises(UsageError, match="--output: expected a file in an existing folder, got"):
    report_command.write(run[0], tmp_path / "none" / "none.html")


def test_charts_show_the_data_and_are_byte_reproducible():
  history = [{"step": s, "loss": 1 / s, "accuracy": 0.1 * s} for s in (1, 2, 5)]
  draw = lambda: pictures.learning_curve(history, {"baseline": 0.3})
  loss, accuracy = draw().axes
  np.testing.assert_allclose(loss.lines[0].get_xydata(), [(1, 1), (2, 0.5), (5, 0.2)])
  np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [(1, 10), (2, 20), (5, 50)])
  np.testing.assert_allclose(accuracy.lines[1].get_ydata(), 30)
  assert pictures.svg(draw()) == pictures.svg(draw())
  panels = pictures.panels(draw())
  assert panels == pictures.panels(draw()) and len(panels) == 2
  sizes = [re.search(rb'<svg [^>]*?width="([\d.]+)pt"', panel)[1] for panel in panels]
  assert sizes[0] == sizes[1] and 250 < float(sizes[0]) < 350
  assert all(panel.count(b'id="axes_') == 1 for panel in panels)
  markup = html_report.chart(draw(), "a chart")
  assert 'alt="a chart, 1 of 2"' in markup and 'alt="a chart, 2 of 2"' in markup
  assert "scroll" not in markup
  groups = {"dm": {"a": (50.0, 1.0), "b": (60.0, 2.0)}}
  (axes,) = pictures.bars({"score": groups}, "accuracy").axes
  assert len(pictures.panels(pictures.bars({"a": groups, "b": groups}, "accuracy"))) == 1
  assert [bar.get_height() for bar in axes.patches] == [50.0, 60.0]


def test_images_are_inlined_unchanged():
  import base64
  import io

  from PIL import Image

  x = np.random.default_rng(0).uniform(-1, 2, (5, 7, 3))
  for pixels in (x, x[..., :1]):
    content = base64.b64decode(
      re.search(r'base64,([^"]+)"', html_report.image(pixels, (0.0, 1.0), "an image"))[1]
    )
    shown = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(shown.reshape(pixels.shape), np.rint(255 * np.clip(pixels, 0, 1)))
  assert (
    len(html_report.image(np.random.default_rng(0).uniform(size=(600, 300, 3)), (0, 1))) < 2e5
  ), "large images are made smaller"
  with pytest.raises(ValueError, match="1 or 3 channels"):
    html_report.image(np.zeros((2, 2, 4)), (0, 1))


def test_image_rows_are_wrapped_and_captioned(tmp_path):
  from matplotlib.image import imread

  low, wrapped, longer = (tmp_path / f"{i}.png" for i in range(3))
  x = np.random.default_rng(0).uniform(size=(4, 6, 6, 1))
  save = lambda path, number, captions: pictures.save_image_rows(
    path, [("a row", x[:number], captions)], (0, 1), columns=2
  )
  save(low, 2, ["a", "b"])
  save(wrapped, 4, list("abcd"))
  save(longer, 2, ["a\nb", "b"])
  heights = [imread(path).shape[0] for path in (low, wrapped, longer)]
  assert heights[0] < heights[2] < heights[1]
  with pytest.raises(ValueError, match="one caption per image, got shape"):
    save(low, 2, ["a"])


def browse(folder, *arguments):
  flags = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--user-data-dir={folder}/profile",
  ]
  done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium, which is absent")
def test_browser_renders_the_page_at_phone_and_desktop_width(hostile, tmp_path):
  """With names of 90 letters and wide tables, no page is blank or wider than its window."""
  from matplotlib.image import imread

  pages = [report(hostile), report(write_comparison(tmp_path / "grid"))]
  # An expanded copy without the policy that forbids the measuring script.
  opened = [
    re.sub(r"<meta http-equiv[^>]*>", "", page).replace("<details", "<details open")
    for page in pages
  ]
  frames = [(width, page) for width in (390, 1100) for page in opened]
  body = "".join(
    f'<iframe width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>'
    for width, page in frames
  )
  measure = (
    "onload = () => { document.title = "
    "JSON.stringify([...document.querySelectorAll('iframe')].map(f => { const d = "
    "f.contentDocument; "
    "return [d.documentElement.clientWidth, d.documentElement.scrollWidth, "
    "Math.max(...[...d.querySelectorAll('.scroll')].map("
    "e => e.scrollWidth - e.clientWidth))] })) }"
  )
  (tmp_path / "host.html").write_text(
    f"<!DOCTYPE html><title></title><script>{measure}</script>{body}"
  )
  shown = browse(tmp_path, "--dump-dom", f"file://{tmp_path}/host.html")
  measured = json.loads(re.search(r"<title>(.*?)</title>", shown)[1])
  assert len(measured) == 4
  for (width, _), (window, wide, _) in zip(frames, measured):
    assert width - 30 < window <= width and wide <= window, measured
  assert measured[1][2] > 0, "the table of the comparison scrolls in its own box on a phone"
  picture = tmp_path / "page.png"
  browse(
    tmp_path, f"--screenshot={picture}", "--window-size=1100,1600", f"file://{hostile}/report.html"
  )
  pixels = imread(picture)[..., :3]
  assert (
    pixels.shape[1] == 1100
    and pixels.std() > 0.05
    and len(np.unique(np.rint(255 * pixels).reshape(-1, 3), axis=0)) > 30
  )
  assert (np.abs(pixels[600:] - pixels[-1, 0]).max(axis=(1, 2)) > 0.1).mean() > 0.5, (
    "something on most lines"
  )


def test_a_run_logs_to_a_writer(tmp_path, monkeypatch):
  """Works with any writer of that interface, with or without tensorboardX."""
  written = []

  class SummaryWriter:
    def __init__(self, folder, flush_secs):
      written.append(("open", os.path.relpath(folder, tmp_path)))

    def add_scalar(self, name, value, step):
      written.append((name, float(value), step))

    def add_image(self, name, image, step, dataformats):
      written.append((name, image.shape[2], step, dataformats))

    def close(self):
      written.append("close")

  monkeypatch.setitem(
    sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter)
  )
  log = event_log.EventLog(tmp_path)
  log.scalars({"step": 3, "loss": 0.5, "class_shares": [0.25, 0.75]})
  from matplotlib.image import imsave

  imsave(tmp_path / "images.png", np.zeros((4, 4, 3)))
  log.close(6, [tmp_path / "images.png", tmp_path / "absent.png"])
  assert written == [
    ("open", "tensorboard"),
    ("loss", 0.5, 3),
    ("class_shares/0", 0.25, 3),
    ("class_shares/1", 0.75, 3),
    ("images", 3, 6, "HWC"),
    "close",
  ]
  (tmp_path / event_log.FOLDER).mkdir()
  (tmp_path / event_log.FOLDER / "events.out.tfevents.1").write_bytes(b"")
  run_folder.clear(tmp_path)
  assert not (tmp_path / event_log.FOLDER).exists(), "--overwrite"
  event_log.EventLog(None).scalars({"step": 0, "loss": 1.0})
  event_log.EventLog(None).close(0, [])


def test_event_files_without_their_writer_are_named_before_any_work(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(
    UsageError, match="--tensorboard: expected tensorboardX to be installed, got .*; pip install"
  ) as error:
    pipeline.run_distill(CONFIG, str(tmp_path / "run"), tensorboard=True)
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("per_class", [1, 3, 10, 12])
def test_titles_of_image_grids_are_not_cut_off(tmp_path, per_class):
  from matplotlib.image import imread

  labels = np.repeat(np.arange(10), per_class)
  x = np.zeros((len(labels), 28, 28, 1))  # black, so that white borders and titles are distinct
  pictures.save_image_grid(tmp_path / "a.png", x, x, labels, (0.0, 1.0))
  ink = imread(tmp_path / "a.png")[..., :3].min(axis=-1) < 0.9
  assert not ink[:3].any() and not ink[-3:].any() and not ink[:, :3].any() and not ink[:, -3:].any()
  assert ink.any(axis=1).argmax() < 0.1 * len(ink)


def test_a_result_below_its_references_is_reported(copied):
  path = copied / "result.json"
  result = json.loads(path.read_text())
  for start, random, expected in (
    (0.5, 0.4, ()),
    (0.9, 0.4, ("its initialization",)),
    (0.9, 0.8, ("its initialization", "random real data of the same size")),
  ):
    path.write_text(
      json.dumps(
        result
        | {
          "test_accuracy": 0.6,
          "init_test_accuracy": start,
          "random_baseline_test_accuracy": random,
        }
      )
    )
    reporting.write_report(copied)
    text = (copied / "report.html").read_text()
    assert text.count("Warning: the result is") == len(expected)
    for name in expected:
      assert f"points below {name}." in text


def test_an_animation_has_a_frame_for_each_step(tmp_path):
  from PIL import Image

  rng = np.random.default_rng(0)
  for channels in (1, 3):
    frames = [rng.integers(0, 256, (7, 8, 6, channels), np.uint8) // 128 * 255 for _ in range(3)]
    path = tmp_path / f"{channels}.gif"
    pictures.save_animation(path, frames, ["step 0", "step 1", "step 10"])
    with Image.open(path) as movie:
      assert (movie.format, movie.n_frames, movie.info["loop"]) == ("GIF", 3, 0)
      assert movie.size == (5 * 62, 2 * 82 + 20)  # with a white border
      for i, frame in enumerate(frames):
        movie.seek(i)
        shown = np.asarray(movie.convert("RGB"))
        # The second image of the second row is the seventh; blocks of 10 x 10 pixels.
        block = shown[83:163:10, 63:123:10]
        np.testing.assert_array_equal(block, np.broadcast_to(frame[6], block.shape))
        assert (shown[164:] != 255).any() and movie.info["duration"] == (2400 if i == 2 else 300)
