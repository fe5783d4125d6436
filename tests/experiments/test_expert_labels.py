"""The study of expert labels on a few digits: it continues where it stopped, and its table has a row per size."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.docs import tables
from experiments.studies import expert_labels


@pytest.fixture
def study(tmp_path, monkeypatch):
  """The study on a small problem, as a function of `--only`; returns the content of its file."""
  monkeypatch.setattr(expert_labels, "DATASETS", {"digits": "standardize"})
  monkeypatch.setattr(expert_labels, "SELECTIONS", ("kmeans", "rded"))
  monkeypatch.setattr(tables, "TITLES", {"digits": "digits"})
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["study"])
  output = tmp_path / "result.json"

  def run(*only, width=2):
    settings = dict(
      experts_dir=str(tmp_path), output=str(output), train_rows=300, test_rows=50, steps=3
    )
    with flagsaver.flagsaver(**settings, num_seeds=2, only=only, width=width, expert_epochs=1):
      expert_labels.main()
    return json.loads(output.read_text())

  return run


@pytest.mark.slow
def test_cells_are_added_and_never_repeated(study, capsys):
  first = study("digits-1-kmeans")
  assert list(first["cells"]) == ["digits-1-kmeans-0", "digits-1-kmeans-1"]
  second = study("digits-1")
  assert list(second["cells"]) == [*first["cells"], "digits-1-rded-0", "digits-1-rded-1"]
  assert all(second["cells"][name] == cell for name, cell in first["cells"].items())
  assert second["epochs"] == first["epochs"] and second["epochs"]["digits-1"]["epoch"] == 1
  assert {"commit", "hardware", "versions"} <= set(second["environment"])
  capsys.readouterr()
  study("digits-1")
  assert capsys.readouterr().out == ""
  row = tables.expert_labels_table(second).splitlines()[2]
  assert row.startswith("| digits, 1 | 1 of 1 | ") and row.count(" / ") == 2 and row.count("±") == 2
  with pytest.raises(ValueError, match="output: expected a file with the settings"):
    study("digits-1", width=3)
