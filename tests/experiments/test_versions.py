"""Versions of Python and JAX: what an installation changed, and the recorded result for Colab."""

import json
import pathlib

from experiments.robustness import versions

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_changes_of_an_installation():
  before, after = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "2.1", "d": "4", "kipcore": "1"}
  assert versions.changes(before, after) == {
    "added": ["d"],
    "replaced": {"b": ["2", "2.1"], "c": ["3", None]},
  }


def test_installation_changes_nothing_on_colab():
  results = json.loads((ROOT / "experiments" / "results" / "versions.json").read_text())
  row = results["sets"]["Colab TPU"]
  assert row["replaced"] == {} and not [name for name in row["added"] if "tensor" in name]
  assert row["versions"]["jax"] == "0.7.2" and row["versions"]["absl-py"] == "1.4.0"
