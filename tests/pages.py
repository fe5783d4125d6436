"""The documents, and the code in them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
GUIDES = ROOT / "experiments" / "docs" / "guides"
THEORY = ROOT / "experiments" / "docs" / "theory"


def python_blocks(text: str) -> list[str]:
  """The Python code blocks of a Markdown text."""
  return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def without_code(text: str) -> str:
  """A Markdown text without the contents of code blocks and of code in lines."""
  return re.sub(r"`[^`]+`", "``", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
