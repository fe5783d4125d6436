"""The migration guide: each pair of calls gives equal values, and every name of neural-tangents is on the page."""

import re

import pytest
from helpers import assert_close, slow_except, standard_promotion
from pages import GUIDES, python_blocks

from kipcore import architectures
from kipcore.kernels.stax import import_neural_tangents

PAGE = (GUIDES / "neural_tangents.md").read_text()
BLOCKS = python_blocks(PAGE)
# table -> the blocks of code that its rows continue, and the calls that cells are put in
TABLES = {
  "layers": (BLOCKS[:1], ("theirs({})", "ours({})")),
  "kernels": (BLOCKS[1:2], ("{}", "{}")),
  "finite": (BLOCKS[1:3], ("{}", "{}")),
  "predictions": (BLOCKS[1:], ("{}", "{}")),
}


def rows(table):
  """The expressions of the two columns."""
  (text,) = re.findall(rf"<!-- {table} -->\n(.*?)<!-- /{table} -->", PAGE, flags=re.S)
  found = [re.fullmatch(r"\| `([^`]+)` \| `([^`]+)` \|", line) for line in text.splitlines()[2:]]
  assert found and all(found), f"expected rows of two expressions in the table {table}"
  return [match.groups() for match in found]


@pytest.mark.parametrize("table", slow_except(TABLES, "kernels", "predictions"))
def test_both_columns_have_equal_values(table, x64):
  blocks, (theirs, ours) = TABLES[table]
  scope = {}
  with standard_promotion():  # the default of JAX
    exec(compile("\n".join(blocks), "neural_tangents.md", "exec"), scope)
    for left, right in rows(table):
      expected = eval(theirs.format(left), scope)
      found = eval(ours.format(right), scope)
      assert str(expected.dtype) == "float64", left
      try:
        assert_close(found, expected, 1e-9)
      except AssertionError as error:
        raise AssertionError(f"{left} and {right}: {error}") from error


def test_every_name_of_neural_tangents_is_on_the_page():
  nt = import_neural_tangents()
  for module in (nt, nt.stax, nt.predict):
    for name in (name for name in dir(module) if not name.startswith("_")):
      assert re.search(rf"\b{name}\b", PAGE), f"the page does not say what replaces {name}"


def test_every_layer_of_kipcore_has_a_row():
  cells = "".join(right for _, right in rows("layers"))
  for name in architectures.LAYERS:
    assert f"{name}(" in cells, name
