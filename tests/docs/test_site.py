"""The documentation site: it builds without warnings, and its links and anchors exist."""

import html
import posixpath
import re
import sys
import warnings

import pytest
from pages import GUIDES, THEORY

from experiments.docs import reference


def test_every_public_name_belongs_to_one_topic():
  lists = {page: reference.topic(page) for page in reference.TOPICS}
  for name, (module, qualified) in reference.public_names().items():
    pages = [page for page, text in lists.items() if f"- `{module}.{qualified}`: " in text]
    assert pages == [reference.topic_of(module)], name


def test_every_guide_and_theory_file_has_a_page():
  files = [file for files in reference.MARKDOWN.values() for file in files]
  assert {*GUIDES.glob("*.md"), *THEORY.glob("*.md")} <= {*files} and len({*files}) == len(files)


def test_links_of_markdown_pages_lead_to_pages_of_the_site():
  text = reference.markdown("guides.select_rows", set())
  assert "(../theory.html#proved-or-heuristic)" in text  # a file of a page
  assert "[`kipcore.select`](../kipcore/selection/rows.html#select)" in text  # a public name
  pictures = set()
  text = reference.markdown("overview", pictures)
  assert "LICENSE (`LICENSE`)" in text  # a file that is not in the site
  assert [path.name for path in pictures] == ["mnist_1.png"]
  assert "](files/experiments/results/networks/mnist_1.png)" in text


def test_missing_pdoc_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pdoc", None)
  with pytest.raises(SystemExit, match="pip install"):
    reference.build(tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The files of the site by name, built without warnings."""
  pytest.importorskip("pdoc", reason="needs pdoc: pip install -e '.[docs]'")
  folder = tmp_path_factory.mktemp("site")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    written = reference.build(folder)
  assert written[0].name == "index.html"
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in written}


@pytest.fixture(scope="module")
def pages(site):
  """The HTML of the pages by name, without scripts."""
  return {
    name: re.sub(r"<script.*?</script>", "", content.decode(), flags=re.S)
    for name, content in site.items()
    if name.endswith(".html")
  }


def test_links_and_anchors_exist(site, pages):
  anchors = {name: {*re.findall(r' (?:id|name)="([^"]+)"', text)} for name, text in pages.items()}
  for name, text in pages.items():
    for link in re.findall(r'<(?:a|img)\b[^>]*? (?:href|src)="([^"]+)"', text):
      if re.match(r"\w+:", link):
        continue
      path, _, anchor = html.unescape(link).partition("#")
      there = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
      assert there in site, f"{name}: {link}"
      if not anchor.startswith("_"):  # pdoc links private base classes, which it does not document
        assert not anchor or anchor in anchors[there], f"{name}: {link}"


@pytest.mark.slow
def test_every_page_links_the_index_guides_theory_and_topics(pages):
  for name, text in pages.items():
    root = "../" * name.count("/")
    for page in (*reference.MARKDOWN, *reference.TOPICS):
      assert f'href="{root}{reference.address(page)}"' in text, f"{name} does not link {page}"


@pytest.mark.slow
def test_topics_link_the_documentation_of_each_public_name(pages):
  for name, (module, qualified) in reference.public_names().items():
    text = pages[reference.address(reference.topic_of(module))]
    link = rf'href="\.\./kipcore/[\w/]+\.html#{qualified}">{module}\.{qualified}<'
    assert re.search(link, text), f"{name} is not linked"
    page = reference.address(module)
    assert f'id="{qualified}"' in pages[page], f"{page} does not document {name}"


@pytest.mark.slow
def test_markdown_is_rendered_completely(pages):
  """Headings, tables, code and formulas of the files are on their pages."""
  for page, files in reference.MARKDOWN.items():
    text = pages[reference.address(page)]
    for file in files:
      source = file.read_text()
      code = re.findall(r"^```\w*$.*?^```$", source, flags=re.S | re.M)
      prose = re.sub(r"^```\w*$.*?^```$", "", source, flags=re.S | re.M)
      tables = re.findall(r"^\|[ |-]+\|$", prose, flags=re.M)
      assert text.count("<table>") >= len(tables), f"{file.name}: tables"
      assert text.count("<pre>") >= len(code), f"{file.name}: code"
      for formula in re.findall(r"\$\$(.+?)\$\$", prose, flags=re.S):
        assert formula.strip() in html.unescape(text), f"{file.name}: {formula}"
      for heading in re.findall(r"^#+ ([\w ,-]+)$", prose, flags=re.M):
        assert re.search(rf"<h\d[^>]*>{re.escape(heading)}</h\d>", text), f"{file.name}: {heading}"
