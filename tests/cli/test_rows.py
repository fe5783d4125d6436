"""`kipcore-select --input=FILE`: rows of .npy, .npz, Parquet and CSV files."""

import json

import numpy as np
import pytest

import kipcore
from kipcore.cli.config import RowsConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.folder import reporting
from kipcore.cli.runs import rows as runs
from kipcore.datasets import row_files

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.csv")
pytest.importorskip("pyarrow.parquet")

RNG = np.random.default_rng(0)
N, M = 60, 12
X = RNG.normal(size=(N, 3)) * [1.0, 10.0, 100.0] + 5
PRICE = (X @ [1.0, 0.1, 0.01] + RNG.normal(size=N)).round(3)
KIND = np.array(["a", "b", "c"])[RNG.integers(0, 3, N)]
COUNT = RNG.integers(0, 3, N)
COLUMNS = {"p": X[:, 0], "q": X[:, 1], "r": X[:, 2], "price": PRICE, "kind": KIND, "count": COUNT}


def table(path, **changed):
  """Writes a table of the columns; a changed column of value None is left out."""
  columns = {name: column for name, column in {**COLUMNS, **changed}.items() if column is not None}
  content = pa.table(columns)
  if path.suffix == ".csv":
    pa.csv.write_csv(content, path)
  else:
    pa.parquet.write_table(content, path, row_group_size=25)
  return str(path)


def expected(y, strategy="uniform", weights=None, **kwargs):
  """The rows and weights of `select` on standardized columns, in the order of the file."""
  mass = np.ones(N) if weights is None else weights
  mean = np.average(X, axis=0, weights=mass)
  std = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=mass))
  x = ((X - mean) / std).astype("f4")
  weights = None if weights is None else weights.astype("f8")
  chosen = kipcore.select(0, x, y, strategy=strategy, weights=weights, **kwargs)
  order = np.argsort(chosen.indices)
  return np.asarray(chosen.indices)[order], np.asarray(chosen.weights)[order]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  for module in (runs, row_files):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 25)


def select(tmp_path, **settings):
  config = RowsConfig(**{"certificate": False, **settings})
  folder, result = runs.run_rows(config, str(tmp_path / "run"), verbose=False)
  assert result == json.loads((folder / "result.json").read_text())
  found = np.load(folder / "selection.npz")
  return folder, result, found["indices"], found["weights"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_rows_of_a_table_are_written_with_weights_and_row_numbers(tmp_path, suffix):
  path = table(tmp_path / f"table{suffix}")
  folder, result, indices, weights = select(
    tmp_path,
    input=path,
    target="price",
    input_weights="count",
    ignore=("kind",),
    size=M,
    strategy="lightweight",
  )
  rows, mass = expected(PRICE, "lightweight", COUNT, size=M)
  np.testing.assert_array_equal(indices, rows)
  np.testing.assert_allclose(weights, mass, rtol=1e-4)
  reader = pa.csv.read_csv if suffix == ".csv" else pa.parquet.read_table
  written = reader(folder / f"selected{suffix}").to_pydict()
  assert written[row_files.ROW] == indices.tolist()
  np.testing.assert_allclose(written[row_files.WEIGHT], weights)
  for name, column in COLUMNS.items():  # unchanged, also the column that is ignored
    assert written[name] == column[indices].tolist(), name
  assert result["columns"] == ["p", "q", "r"] and result["labels"] == "real"
  assert result["read_in_blocks"] and "lightweight" in (folder / "README.txt").read_text()
  assert "mmd" not in result and not (folder / "certificate.json").exists()
  assert "Certificate" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("strategy", ["lightweight", "herding"])
def test_the_certificate_is_that_of_the_standardized_rows(tmp_path, strategy, capsys):
  """Of rows that are read in blocks, and of rows in memory; in certificate.json, the result and the report."""
  config = RowsConfig(
    input=table(tmp_path / "table.csv", kind=None),
    target="price",
    input_weights="count",
    size=M,
    strategy=strategy,
  )
  folder, result = runs.run_rows(config, str(tmp_path / "run"))
  stored = np.load(folder / "selection.npz")
  std = np.sqrt(np.cov(X.T, aweights=COUNT, ddof=0).diagonal())
  x = ((X - np.average(X, axis=0, weights=COUNT)) / std).astype("f4")
  weights = COUNT.astype("f8")
  measured = kipcore.measure_rows(
    0, x, PRICE, stored["indices"], stored["weights"], input_weights=weights
  )
  certified = json.loads((folder / "certificate.json").read_text())
  assert certified.keys() == measured.as_dict().keys() and certified["num_test_rows"] > 0
  for name in ("mmd", "random_mmd", "ridge_error", "ridge_error_all", "ridge_error_random"):
    assert certified[name] == pytest.approx(getattr(measured, name), rel=1e-3), name
    assert result[name] == certified[name]
  assert f"MMD to all rows {result['mmd']:.3g}" in capsys.readouterr().out
  page = (folder / "report.html").read_text()
  assert f"{result['ridge_error']:.4g}" in page and "squared error" in page
  reporting.write_report(folder, tmp_path / "again.html")
  assert (tmp_path / "again.html").read_text() == page


def test_arrays_are_selected_like_tables(tmp_path):
  classes = np.searchsorted(["a", "b", "c"], KIND)
  rows, mass = expected(classes, size_per_class=3)
  np.save(tmp_path / "x.npy", X)
  np.save(tmp_path / "y.npy", KIND)
  np.savez_compressed(tmp_path / "both.npz", x=X, y=classes)
  settings = dict(size_per_class=3, strategy="uniform")
  arrays = dict(input=str(tmp_path / "x.npy"), input_labels=str(tmp_path / "y.npy"), **settings)
  archive = dict(input=str(tmp_path / "both.npz"), **settings)
  text = dict(input=table(tmp_path / "t.csv", price=None, count=None), target="kind", **settings)
  for i, config in enumerate((arrays, archive, text)):
    (tmp_path / str(i)).mkdir()
    folder, result, indices, weights = select(tmp_path / str(i), **config)
    np.testing.assert_array_equal(indices, rows)
    np.testing.assert_allclose(weights, mass, rtol=1e-5)
    assert result["class_names"] == (["0", "1", "2"] if i == 1 else ["a", "b", "c"])
    if i < 2:
      written = np.load(folder / "selected.npz")
      np.testing.assert_array_equal(written["x"], X[rows])
      np.testing.assert_array_equal(written["rows"], rows)
      assert written["y"].tolist() == (KIND, classes)[i][rows].tolist()


def test_large_files_are_read_in_blocks_and_small_ones_by_auto_in_memory(tmp_path, monkeypatch):
  np.save(tmp_path / "x.npy", X)
  config = RowsConfig(input=str(tmp_path / "x.npy"), size=M)
  assert not runs.plan(config).streamed
  monkeypatch.setattr(runs, "AUTO_BYTES", 100)
  planned = runs.plan(config)
  assert (
    planned.streamed and planned.strategy == "lightweight" and isinstance(planned.file.x, np.memmap)
  )
  monkeypatch.setattr(runs.estimate, "available_bytes", lambda: 1000)
  with pytest.raises(UsageError, match="--strategy: expected one that reads rows in blocks"):
    runs.plan(RowsConfig(input=str(tmp_path / "x.npy"), size=M, strategy="herding"))


def test_sequential_rows_index_like_an_array():
  reads = []

  def read():
    reads.append(1)
    yield from np.array_split(X, [1, 20, 50])

  rows = row_files.SequentialRows(X.shape, read)
  for part in (slice(0, 25), slice(25, 50), slice(50, 60)):
    np.testing.assert_array_equal(rows[part], X[part])
  assert len(reads) == 1  # consecutive slices are one pass
  for part in (slice(30, 31), slice(None), np.array([0, 19, 20, 59]), np.array([3])):
    np.testing.assert_array_equal(rows[part], X[part])


GOOD = dict(target="price", ignore=("kind",), size=M, strategy="uniform")


@pytest.mark.parametrize(
  "changed, settings, message",
  [
    (
      dict(price=np.where(COUNT > 1, np.nan, PRICE)),
      {},
      "column 'price': expected a value in every row",
    ),
    (
      dict(kind=None),
      dict(ignore=(), target="p", strategy="auto", size=99),
      "--size: expected at most",
    ),
    ({}, dict(ignore=()), "expected numeric columns, got string in kind"),
    (
      dict(p=None, q=None, r=None, count=None),
      {},
      "expected at least one numeric column besides price, kind",
    ),
    (
      dict(q=np.where(COUNT > 1, np.nan, X[:, 1])),
      {},
      "column 'q': expected finite numbers, got NaN",
    ),
    (dict(count=-1 * COUNT), dict(input_weights="count"), "weights: expected values >= 0"),
    (
      dict(count=0 * COUNT),
      dict(input_weights="count"),
      "weights: expected at least one value > 0",
    ),
    (
      dict(kind=np.full(N, "a")),
      dict(target="kind", ignore=()),
      "labels: expected at least 2 classes",
    ),
    (dict(price=np.full(N, 3.5)), {}, "labels: expected targets that differ, got the constant 3.5"),
    ({}, dict(target="", strategy="krr_sensitivity"), "labels: expected labels for strategy"),
    ({}, dict(target="prize"), r"expected a column 'prize', got .* \(did you mean price\?\)"),
    ({}, dict(size_per_class=2), "expected either size or size_per_class"),
    ({}, dict(size=0), "expected either size or size_per_class"),
    (
      {},
      dict(target="kind", ignore=(), task="regression"),
      "expected numbers for regression, got text",
    ),
    ({}, dict(input_labels="y.npy"), "expected no labels for this type of file"),
    ({}, dict(strategy="best"), "--strategy: expected one of"),
    (dict(coreset_row=COUNT), {}, "expected no column 'coreset_row'"),
  ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_invalid_tables_are_refused_with_one_line(tmp_path, suffix, changed, settings, message):
  path = table(tmp_path / f"table{suffix}", **changed)
  with pytest.raises(UsageError, match=message) as error:
    runs.run_rows(
      RowsConfig(**{"input": path, **GOOD, **settings}), str(tmp_path / "run"), verbose=False
    )
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "name", ["no.npy", "no.parquet", "bad.npy", "bad.npz", "bad.parquet", "x.txt", "."]
)
def test_damaged_and_missing_files_are_refused(tmp_path, name):
  if name.startswith("bad"):
    (tmp_path / name).write_bytes(b"not an array")
  with pytest.raises(UsageError, match="--input: .*expected") as error:
    runs.plan(RowsConfig(input=str(tmp_path / name), size=M))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_text_labels_of_many_batches_are_those_of_the_column(tmp_path, monkeypatch, suffix):
  """Also if batches have different values, and where Parquet stores codes."""
  monkeypatch.setattr(row_files, "_CSV_BYTES", 600)
  kind = np.array([f"k{i // 20}" for i in range(N)])
  for column in (kind, pa.array(kind).dictionary_encode()):
    path = table(tmp_path / f"table{suffix}", kind=column)
    file = row_files.open_rows(path, "kind", task="auto")
    assert file.class_names == ("k0", "k1", "k2")
    np.testing.assert_array_equal(file.y, np.arange(N) // 20)


def test_truncated_and_text_arrays_are_refused(tmp_path):
  np.save(tmp_path / "x.npy", X)
  content = (tmp_path / "x.npy").read_bytes()
  (tmp_path / "short.npy").write_bytes(content[:-8])
  np.save(tmp_path / "text.npy", KIND)
  np.savez(tmp_path / "other.npz", rows=X)
  for name, message in (
    ("short.npy", "expected 1440 bytes"),
    ("text.npy", "expected numbers"),
    ("other.npz", "expected an array x of rows, found rows"),
  ):
    with pytest.raises(UsageError, match=message):
      runs.plan(RowsConfig(input=str(tmp_path / name), size=M))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_memory_of_a_pass_over_a_table_does_not_grow_with_the_rows(tmp_path, monkeypatch, suffix):
  content = pa.table({f"c{i}": RNG.normal(size=40_000) for i in range(8)})  # 2.4 MiB, 6 MiB of text
  path = tmp_path / f"t{suffix}"
  if suffix == ".csv":
    monkeypatch.setattr(row_files, "_CSV_BYTES", 2**14)
    pa.csv.write_csv(content, path)
  else:
    pa.parquet.write_table(content, path, row_group_size=2000)
  del content
  file = row_files.open_rows(path)
  before, most = pa.total_allocated_bytes(), 0
  for first in range(0, 40_000, 1000):
    assert len(file.x[first : first + 1000]) == 1000
    most = max(most, pa.total_allocated_bytes() - before)
  assert 0 < most < 1e6
  assert pa.total_allocated_bytes() == before  # the file is closed after the last row
