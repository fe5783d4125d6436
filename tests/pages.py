"""The documents, and the code in them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
GUIDES = ROOT / "experiments" / "docs" / "guides"
THEORY = ROOT / "experiments" / "docs" / "theory"


def python_blocks(text: str) -> list[str]:
  """The Python code blocks of a Markdown text."""
  return re.findall(r"```python\n(.*?)```", text, flags=re.S)
