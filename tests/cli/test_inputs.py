"""Robustness: invalid data, malicious files and full disks at each entry point; some fuzzing."""

import io
import json
import os
import struct
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kipcore
from experiments.robustness import fuzz, fuzz_targets, malformed
from kipcore.cli import flags, report
from kipcore.cli.config import CompareConfig, DistillConfig, EvaluateConfig
from kipcore.cli.errors import UsageError
from kipcore.cli.folder import run_folder
from kipcore.cli.runs import comparison, evaluation, pipeline
from kipcore.datasets import DatasetError, load_dataset
from kipcore.io import npz, trajectories

RNG = np.random.default_rng(0)
LABELS = np.arange(12) % 3
X = (RNG.normal(size=(12, 2, 2, 1)) + LABELS[:, None, None, None]).astype(np.float32)
Y = np.asarray(kipcore.one_hot_centered(LABELS, 3))
SUPPORT = kipcore.Support(jnp.asarray(X[:3]), jnp.asarray(Y[:3]))
KERNEL = kipcore.rbf_fn(2.0)


def at(array, index, value):
  out = array.copy()
  out[index] = value
  return out


# Rows and labels, and the message for them; None if they are valid.
CASES = {
  "clean": (X, Y, None),
  "label noise": (X, Y[RNG.permutation(12)], None),
  "constant images": (np.ones_like(X), Y, None),
  "duplicate rows": (np.repeat(X[:3], 4, axis=0), np.repeat(Y[:3], 4, axis=0), None),
  "NaN": (
    at(X, (5, 1, 0, 0), np.nan),
    Y,
    r"expected finite values, got 1 NaN or infinite, the first at index \(5, 1, 0, 0\)",
  ),
  "infinity": (at(X, (5, 1, 0, 0), -np.inf), Y, "expected finite values, got 1"),
  "NaN in labels": (
    X,
    at(Y, (2, 1), np.nan),
    r"y[a-z_]*: expected finite values, got 1 NaN or infinite, the first at index \(2, 1\)",
  ),
  "uint16": (
    X.astype(np.uint16),
    Y,
    "x[a-z_]*: expected a floating dtype, got uint16; convert it first",
  ),
  "objects": (X.astype(object), Y, "x[a-z_]*: expected a floating dtype, got object"),
  "complex": (X.astype(np.complex64), Y, "x[a-z_]*: expected a floating dtype, got complex64"),
  "strings as labels": (X, np.array(list("abc"))[LABELS], "y[a-z_]*: expected"),
  "class numbers": (X, LABELS, r"y[a-z_]*: expected .* got (shape \(12,\)|\(12,\)|int64)"),
  "integer labels": (
    X,
    np.eye(3, dtype=int)[LABELS],
    "y[a-z_]*: expected a floating dtype, got int64",
  ),
  "a list": (X.tolist(), Y, "expected an array, got a list|x[a-z_]*: expected shape"),
  "fewer rows": (X[:10], Y, "same number of rows|to match"),
  "empty": (X[:0], Y[:0], "expected at (least|most)"),
}


def sensitivities(x, y):
  scores = kipcore.approximate_krr_sensitivities(0, KERNEL, x, y, 1.0, 4)
  return scores.scores, scores.total


def distilled(x, y):
  method = kipcore.kip(KERNEL, kipcore.KIPOptions(1e-2))
  distiller = kipcore.Distiller(method, kipcore.sampler("uniform"), optax.adam(1e-2), 6)
  return kipcore.distill(0, distiller, SUPPORT, x, y, 2).support


ENTRIES = {
  "select_coreset": lambda x, y: jax.tree.leaves(kipcore.select_coreset(0, x, y, 1, "uniform")),
  "evaluate_krr": lambda x, y: kipcore.evaluate_krr(KERNEL, SUPPORT, x, y, ridge=0.1)[:2],
  "evaluate_network": lambda x, y: kipcore.evaluate_network(
    0, kipcore.fc(1), SUPPORT, x, y, 1, 4, 2
  ),
  "distill": distilled,
  "sensitivities": sensitivities,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_dirty_rows_work_or_are_refused(entry):
  """If rows are accepted, the result is finite.

  Entry points that compile slowly have tests of valid rows elsewhere.
  """
  for name, (x, y, pattern) in CASES.items():
    if pattern is None and entry in ("evaluate_network", "distill"):
      continue
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # about nearly equal scores
      if pattern is None:
        assert all(np.isfinite(np.asarray(part)).all() for part in ENTRIES[entry](x, y)), name
        continue
      with pytest.raises((ValueError, TypeError), match=pattern) as caught:
        ENTRIES[entry](x, y)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300, name


def test_missing_classes_are_refused():
  for rows in (LABELS == 0, LABELS != 1, np.arange(12) == 0):
    with pytest.raises(
      ValueError, match="images_per_class: expected at most the 0 rows of the smallest class, got 1"
    ):
      kipcore.select_coreset(0, X[rows], Y[rows], 1, "kmeans")
  for labels, error in (
    ([0, 3], ValueError),
    ([-1, 0], ValueError),
    (["a", "b"], TypeError),
    ([0.0, 1.0], TypeError),
  ):
    with pytest.raises(error, match="labels: expected integers"):
      kipcore.one_hot_centered(np.array(labels), 3)


@pytest.mark.parametrize(
  "x, kind, pattern",
  [
    (X.astype(object), "zca", "expected integers or floats, got object"),
    (X[:0], "zca", "at least one row"),
    (at(X, 0, np.nan), "standardize", "expected finite values, got 4"),
    (X[0, 0, 0], "zca", "at least one row"),
    (X.astype(str), "zca", "expected integers or floats, got <U"),
    (1e200 * X.astype(float), "zca", "may be too large"),
    (X[:1], "zca", None),
    (np.ones_like(X), "zca_kip", None),
    (np.zeros((5, 2, 2, 4), np.uint16), "zca", None),
    (X[[0] * 9], "zca", None),
  ],
)
def test_preprocessing_is_finite_or_refused(x, kind, pattern):
  if pattern:
    with pytest.raises((ValueError, TypeError), match=pattern):
      kipcore.fit_preprocess(x, kind)
  else:
    fitted = kipcore.fit_preprocess(x, kind)
    assert (
      np.isfinite(fitted.apply(x)).all()
      and np.isfinite(fitted.invert(fitted.apply(x), np.float64)).all()
    )


def test_ridge_regression_never_returns_nan_silently():
  k = jnp.eye(3)
  assert kipcore.krr_fit(k, Y[:3], 1.0).status == kipcore.Status.OK
  for matrix, labels in (
    (k, at(Y[:3], (0, 0), np.nan)),
    (at(np.eye(3, dtype=np.float32), (1, 1), np.inf), Y[:3]),
  ):
    assert (
      kipcore.krr_fit(jnp.asarray(matrix), jnp.asarray(labels), 1.0).status
      == kipcore.Status.NOT_FINITE
    )
  for matrix, labels in (
    (jnp.zeros((0, 0)), Y[:0]),
    (jnp.eye(3, dtype=int), Y[:3]),
    (k, np.eye(3, dtype=int)),
    (k, LABELS[:3]),
  ):
    with pytest.raises((ValueError, TypeError), match="expected"):
      kipcore.krr_fit(matrix, labels, 1.0)
  huge = kipcore.evaluate_krr(kipcore.linear_fn(), SUPPORT, 1e25 * X, Y, ridge=1e-3)
  assert huge.status == kipcore.Status.NOT_FINITE, "an infinite loss is no result"
  with pytest.raises(kipcore.NumericalError, match="training of a finite network failed"):
    kipcore.evaluate_network(0, kipcore.fc(1), SUPPORT, X, Y, 1, 4, 9, learning_rate=1e30)


# --- datasets ---

PIXELS = RNG.integers(0, 256, (12, 3, 3, 1)).astype(np.uint8)
GOOD = {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS[:6], "y_test": LABELS[:6]}
both = lambda change: {name: change(GOOD[name]) for name in ("x_train", "x_test")}
labels = lambda change: {name: change(GOOD[name]) for name in ("y_train", "y_test")}
DATASETS = {
  "NaN": (
    both(lambda x: at(x.astype(np.float32), (1, 0, 0, 0), np.nan)),
    "x_train: expected finite pixels, got 1",
  ),
  "constant": (both(np.ones_like), lambda d: d.x_train.max() == 1),
  "four channels": (
    both(lambda x: np.repeat(x, 4, axis=3)),
    lambda d: d.x_train.shape == (12, 3, 3, 4),
  ),
  "uint16": (
    both(lambda x: 300 * x.astype(np.uint16)),
    lambda d: d.x_train.dtype == np.float32 and "converted" in d.note,
  ),
  "objects": (both(lambda x: x.astype(object)), "never unpickled"),
  "complex": (both(lambda x: x.astype(complex)), "got complex numbers .complex128."),
  "dates": (labels(lambda y: y.astype("M8[s]")), "plain numeric or string array"),
  "empty": (both(lambda x: x[:0]), "expected a non-empty"),
  "label noise": ({"y_train": LABELS[::-1]}, lambda d: d.num_classes == 3),
  "a single class": (labels(np.zeros_like), "at least 2 classes, got 0 alone"),
  "a single string": (labels(lambda y: np.full(y.shape, "cat")), "at least 2 classes"),
  "one example": ({name: array[:1] for name, array in GOOD.items()}, "at least 2 classes"),
  "duplicates": ({"x_train": PIXELS[[0] * 12]}, lambda d: len(d.x_train) == 12),
  "a class missing in training": (
    {"y_train": np.where(LABELS == 1, 2, LABELS)},
    "every class of 0..2, got 2 classes from 0 to 2, without 1",
  ),
  "a class missing in the test split": ({"y_test": np.zeros(6, int)}, lambda d: d.num_classes == 3),
  "strings": (
    labels(lambda y: np.array(list("abc"))[y]),
    lambda d: d.class_names == ("a", "b", "c"),
  ),
  "float16 labels": (
    labels(lambda y: y.astype(np.float16)),
    lambda d: np.array_equal(d.y_train, LABELS),
  ),
  "strings in one split": ({"y_test": np.array(list("abc"))[LABELS[:6]]}, "strings in both splits"),
  "negative": ({"y_train": at(LABELS, 4, -1)}, "the first -1 at index 4"),
  "a class of the test split alone": (
    {"y_test": at(LABELS[:6], 0, 7)},
    "expected y_test in 0..2, the classes of y_train, got 7",
  ),
  "rows": ({"y_train": LABELS[:-1]}, r"one label for each of 12 rows, got shape \(11,\)"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_dirty_datasets_work_or_end_a_command_with_status_2(name, tmp_path, capsys):
  changes, expected = DATASETS[name]
  path = str(tmp_path / "data.npz")
  np.savez(path, **{**GOOD, **changes})
  if callable(expected):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      data = load_dataset(path, validation_fraction=0)
    assert expected(data) and np.isfinite(data.x_train).all()
    return
  with pytest.raises(DatasetError, match=expected):
    load_dataset(path)
  with pytest.raises(SystemExit) as ended:
    flags._run(lambda: pipeline.plan(DistillConfig(dataset=path)))
  written = capsys.readouterr().err
  assert (
    ended.value.code == 2
    and written.startswith("error: ")
    and written.count("\n") == 1
    and path in written
  )


# --- hostile archives ---


def npy(text, body=b"", version=1, length=None):
  """A `.npy` file with the given text as header."""
  text = text.encode()
  length = len(text) if length is None else length
  return (
    b"\x93NUMPY"
    + bytes((version, 0))
    + struct.pack("<H" if version < 2 else "<I", length)
    + text
    + body
  )


def header(descr="'|u1'", shape="(9,)"):
  return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"


def archive(members, compression=zipfile.ZIP_DEFLATED):
  out = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as file:
    warnings.simplefilter("ignore")  # about a duplicate name
    for name, content in members:
      file.writestr(name, content)
  return out.getvalue()


def patched(content, local, central, value):
  """The archive with bytes of the local and central headers of its first member replaced."""
  out, start = bytearray(content), content.index(b"PK\x01\x02")
  for at_byte in (local, start + central):
    out[at_byte : at_byte + len(value)] = value
  return bytes(out)


NINE = npy(header(), bytes(9))
ONE = archive([("x.npy", NINE)])
BAD_ARCHIVES = {
  "a bomb": (archive([("x.npy", npy(header(shape=f"({2**28},)"), bytes(2**28)))]), "256 times the"),
  "a claim without bytes": (patched(ONE, 22, 24, struct.pack("<I", 2**31)), "256 times the"),
  "a small claim without bytes": (
    patched(ONE, 22, 24, struct.pack("<I", 2**20)),
    "a size that .* compressed bytes can hold",
  ),
  "overlapping members": (patched(ONE, 18, 20, struct.pack("<I", 2**20)), "fit into"),
  "a password": (patched(ONE, 6, 8, b"\x01"), "without a password"),
  "lzma": (archive([("x.npy", NINE)], zipfile.ZIP_LZMA), "compression type 14"),
  "bzip2": (archive([("x.npy", NINE)], zipfile.ZIP_BZIP2), "compression type 12"),
  "a path above": (
    archive([("x.npy", NINE), ("../y.npy", NINE)]),
    r"plain names of arrays, got '\.\./y\.npy'",
  ),
  "an absolute path": (archive([("/etc/y.npy", NINE)]), "plain names"),
  "a path of Windows": (archive([("..\\y.npy", NINE)]), "plain names"),
  "a name twice": (archive([("x.npy", NINE), ("x.npy", NINE)]), "every member once"),
  "a name over lines": (
    archive([("x\nerror\x1b[2J.npy", npy(header("'|O'")))]),
    r"x error\?\[2J: expected a plain",
  ),
  "strings of no size": (
    archive([("x.npy", npy(header("'|S0'", f"({10**12},)")))]),
    "plain numeric or string array, got dtype .S0",
  ),
  "objects": (archive([("x.npy", npy(header("'|O'"), bytes(72)))]), "never unpickled"),
  "records": (archive([("x.npy", npy(header("[('a', '|O')]"), bytes(72)))]), "never unpickled"),
  "a huge shape": (
    archive([("x.npy", npy(header(shape=f"({2**40}, 3)"), bytes(9)))]),
    f"expected {3 * 2**40} bytes",
  ),
  "a shape beyond 64 bits": (
    archive([("x.npy", npy(header(shape=f"(0, {2**70})")))]),
    "dimensions that are integers",
  ),
  "a boolean shape": (
    archive([("x.npy", npy(header(shape="(True,)"), bytes(1)))]),
    "dimensions that are integers",
  ),
  "many dimensions": (
    archive([("x.npy", npy(header(shape=str((1,) * 40)).ljust(200), bytes(1)))]),
    "at most 32 dimensions",
  ),
  "a long header": (archive([("x.npy", npy(header(), bytes(9), 2, 2**31 - 1))]), "readable .npz"),
  "nested parentheses": (
    archive([("x.npy", npy(header(shape="(" * 500 + ")" * 500)))]),
    "readable .npz",
  ),
  "a sum of signs": (archive([("x.npy", npy(header(shape="-" * 9000 + "1")))]), "readable .npz"),
  "version 3": (
    archive([("x.npy", npy(header(), bytes(9), 3))]),
    r"format 1.0 or 2.0, got \(3, 0\)",
  ),
  "no archive": (b"PK\x05\x06", "not a zip file"),
  "a pickle": (b"cos\nsystem\n(S'true'\ntR.", "not a zip file"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_hostile_archives_are_refused_before_memory_is_allocated(name, tmp_path):
  content, pattern = BAD_ARCHIVES[name]
  path = tmp_path / "a.npz"
  path.write_bytes(content)
  for read, error in ((npz.read_npz, npz.NpzError), (kipcore.load_artifact, kipcore.ArtifactError)):
    with pytest.raises(error, match=pattern) as caught:
      read(path)
    assert (
      "\n" not in str(caught.value)
      and str(caught.value).startswith(str(path))
      and len(str(caught.value)) < 800
    )
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz"]


def test_the_reader_reads_what_numpy_writes(tmp_path):
  content = {
    "f": np.arange(6.0).reshape(2, 3).T,
    "s": np.array("text"),
    "b": np.array([True]),
    "e": np.empty((0, 3), ">f4"),
    "w": np.array([b"ab"]),
  }
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / "a.npz", **content)
    for name, array in npz.read_npz(tmp_path / "a.npz").items():
      assert (
        array.dtype == content[name].dtype
        and array.shape == content[name].shape
        and np.array_equal(array, content[name])
      )
  assert npz.names_in(tmp_path / "a.npz") == list(content) and list(
    npz.read_npz(tmp_path / "a.npz", ("s", "absent"))
  ) == ["s"]
  (tmp_path / "b.npz").write_bytes(
    archive(
      [("x.npy", npy(header(), bytes(9), 2)), ("y.npy", npy(header(shape="(9L,)"), bytes(9)))]
    )
  )
  assert all(
    np.array_equal(array, np.zeros(9)) for array in npz.read_npz(tmp_path / "b.npz").values()
  )
  os.mkfifo(tmp_path / "pipe.npz")
  with pytest.raises(npz.NpzError, match="expected an .npz file, got no such file"):
    npz.read_npz(tmp_path / "pipe.npz")


def test_written_files_contain_format_version_and_checksums(tmp_path):
  path, content = tmp_path / "a.npz", {"x": np.arange(3.0), "file": np.zeros((), ">i4")}
  npz.save_checked(path, content, "kind", 2, {"note": "n"})
  arrays, metadata = npz.load_checked(path, "kind", 2, ("x",))
  assert (
    np.array_equal(arrays["x"], content["x"])
    and arrays["file"].shape == ()
    and metadata["note"] == "n"
    and metadata["format_version"] == 2
  )
  for arguments, pattern in (
    (("other", 2), "expected format other up to version 2, got 'kind' version 2"),
    (("kind", 1), "up to version 1"),
    (("kind", 2, ("y",)), "missing y"),
  ):
    with pytest.raises(npz.NpzError, match=pattern):
      npz.load_checked(path, *arguments)
  for bad in ({"x": np.array([None])}, {"metadata": np.zeros(1)}):
    with pytest.raises(ValueError, match="expected an array of"):
      npz.save_checked(path, bad, "kind", 1)
  stored = npz.read_npz(path)
  for changes, pattern in (
    ({"x": stored["x"] + 1}, "array 'x' to have its recorded checksum"),
    ({"y": np.zeros(1)}, "expected the arrays"),
    ({"metadata": np.array("[" * 20_000)}, "got something else .RecursionError"),
    ({"metadata": np.array(["{}"])}, "got something else"),
    ({"metadata": np.array("[]")}, "got something else"),
    (
      {"metadata": np.array('{"format": "kind", "format_version": true, "checksums": {}}')},
      "version True",
    ),
  ):
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as out:
      for name, array in {**stored, **changes}.items():
        with out.open(f"{name}.npy", "w") as member:
          np.lib.format.write_array(member, array)
    with pytest.raises(npz.NpzError, match=pattern):
      npz.load_checked(path, "kind", 2)


# --- artifacts and trajectories with correct checksums ---


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
  path = tmp_path_factory.mktemp("artifact") / "a.npz"
  kipcore.save_artifact(path, fuzz_targets.good_artifact())
  return npz.load_checked(path, "kipcore-distilled", 1)


def replaced(tree, names, value):
  """A copy of nested dicts and lists with one value replaced."""
  if not names:
    return value
  copy = tree.copy()
  copy[names[0]] = replaced(tree[names[0]], names[1:], value)
  return copy


@pytest.mark.parametrize(
  "names, value, pattern",
  [
    (("images",), np.full((3, 3, 3, 1), np.nan), "images: expected finite"),
    (("labels",), np.full((3, 3), np.inf), "labels: expected finite"),
    (
      ("images",),
      np.zeros((3, 3, 3, 1), int),
      "images: expected float32 or float64 numbers, got int64",
    ),
    (("labels",), np.zeros((2, 3)), "same number of rows"),
    (("labels",), np.zeros(3), "labels: expected an array with 2"),
    (("support",), np.zeros((3, 9)), "support: expected shape"),
    (("images",), np.zeros((3, 9)), "images: expected shape"),
    (("images",), np.zeros((0, 3, 3, 1)), "images: expected float32"),
    (("preprocess/2_zca_whitening",), np.zeros(3), "whitening: expected shape"),
    (("about", "ridge", "value"), float("nan"), "positive finite number, got nan"),
    (("about", "ridge", "value"), "1", "positive finite"),
    (("about", "ridge"), None, "metadata of an artifact"),
    (("about", "kernel"), "rbf", "kernel: expected one of ntk, nngp"),
    (("about", "kernel"), [], "kernel: expected one of"),
    (
      ("about", "architecture"),
      {"name": "a", "layers": [{"layer": "Flatten"}] * 1001},
      "at most 1000",
    ),
    (("about", "architecture", "layers", 1), "Dense", "JSON of an architecture"),
    (("about", "architecture", "layers"), None, "JSON of an architecture"),
    (("about", "architecture", "layers", 1, "w_std"), float("inf"), "w_std > 0"),
    (("about", "architecture", "layers", 1, "w_std"), "1", "architecture"),
    (("about", "preprocess", "row_shape"), [2**40, 2**40], "expected shape"),
    (("about", "preprocess", "steps"), 3, "preprocess spec"),
  ],
)
def test_inconsistent_artifacts_are_refused(names, value, pattern, artifact, tmp_path):
  arrays, about = artifact
  if names[0] == "about":
    about = replaced(about, names[1:], value)
  else:
    arrays = {**arrays, names[0]: value}
  npz.save_checked(tmp_path / "a.npz", arrays, "kipcore-distilled", 1, about)
  with pytest.raises(kipcore.ArtifactError, match=pattern) as caught:
    kipcore.load_artifact(tmp_path / "a.npz")
  assert "\n" not in str(caught.value)


def test_an_artifact_without_a_run_is_not_scored(artifact, tmp_path):
  for about in ({**artifact[1], "dataset": None}, {**artifact[1], "config": {}, "result": {}}):
    npz.save_checked(tmp_path / "a.npz", artifact[0], "kipcore-distilled", 1, about)
    with pytest.raises(UsageError, match="--artifact: expected the artifact of a run"):
      evaluation.run_evaluate(kipcore.load_artifact(tmp_path / "a.npz"), EvaluateConfig())


def test_altered_trajectories_are_detected(tmp_path):
  path = tmp_path / "experts.npy"
  trajectories.save_trajectories(path, np.ones((2, 3, 4), np.float32), {})
  whole, about = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
  path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
  with pytest.raises(
    trajectories.TrajectoriesError, match="expected expert 1 to have its recorded checksum"
  ):
    trajectories.load_trajectories(path)
  assert np.isnan(trajectories.load_trajectories(path, verify=False).array[1, 2, 3])
  for text in (
    "[" * 100_000,
    json.dumps({**about, "sha256": ["", ""]}),
    json.dumps({**about, "format_version": True}),
    json.dumps({**about, "sha256": 3}),
  ):
    path.with_suffix(".json").write_text(text)
    path.write_bytes(whole)
    with pytest.raises(trajectories.TrajectoriesError, match="expected"):
      trajectories.load_trajectories(path)


def test_reports_of_broken_runs_fail_with_one_line(tmp_path):
  for config in ("[]", "{}", "[" * 100_000, '{"dataset": 3}', "null", "\udcff"):
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    run_folder.write_json(tmp_path / "result.json", {"support_size": 1})
    with pytest.raises(UsageError, match="--run: expected the folder of a finished run"):
      report.write(tmp_path, tmp_path / "report.html")
  assert not (tmp_path / "report.html").exists()


def test_huge_grids_seeds_and_widths_are_refused(tmp_path):
  for grid in (
    dict(num_seeds=2**70),
    dict(num_seeds=2**31, samplers=()),
    dict(inits=()),
    dict(num_seeds=-1),
  ):
    with pytest.raises(
      UsageError, match="expected a grid of 1 to 10,000 cells|--num_seeds: expected an integer"
    ):
      comparison.plan(CompareConfig(**grid), {})
  for number in (-1, 10**9):
    with pytest.raises(
      UsageError, match="--num_devices: expected at most the .* local devices .0 for all., got"
    ):
      pipeline.plan(DistillConfig(num_devices=number))
  for call in (
    lambda: load_dataset("digits", seed=2**63),
    lambda: kipcore.select_coreset(2**64, X, Y, 1, "uniform"),
    lambda: kipcore.network(kipcore.fc(1), 2**40, 3),
  ):
    with pytest.raises(ValueError, match="(seed|width): expected"):
      call()


def test_invalid_escapes_in_a_pickle_cause_no_warning(tmp_path):
  (tmp_path / "a.pt").write_bytes(malformed.torch_bytes(b"\x80\x02S'\\('\n."))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert kipcore.read_torch_file(tmp_path / "a.pt") == "\\("


def test_a_step_of_a_checkpoint_must_be_a_number(tmp_path):
  good = malformed.published_sets()["checkpoint_7"]
  for step in ([1, [2, 3]], {}, "7", None, True, np.inf):
    (tmp_path / "checkpoint_7").write_bytes(malformed.flax_bytes({**good, "step": step}))
    with pytest.raises(kipcore.PublishedError, match="step: expected a finite number, got"):
      kipcore.load_published(tmp_path / "checkpoint_7")


# --- a part of the fuzzing ---


def test_malformed_examples_do_no_harm(tmp_path):
  found = {
    name: fuzz.attack(target._replace(seconds=20.0), 18)
    for name, target in fuzz_targets.targets(tmp_path).items()
    if not name.startswith("runs_")  # whole runs: `test_settings.py` and `test_folder.py`
  }
  assert not {name: each["defects"] for name, each in found.items() if each["defects"]}
  assert (
    sum(each["examples"] for each in found.values()) >= 230
    and min(each["refused"] for each in found.values()) >= 1
  )
  assert sum(each["read"] for each in found.values()) >= 10


def test_whole_runs_of_the_fuzzer_are_short(tmp_path, monkeypatch):
  """The method that compiles fastest, no validation, and never a time that the run must fill."""
  ran = []
  done = lambda config, *_, **__: ran.append(config) or (None, {"test_accuracy": 0.5})
  monkeypatch.setattr(pipeline, "run_distill", done)
  target = fuzz_targets.targets(tmp_path)["runs_distill"]
  assert fuzz.attack(target, 30) == {"examples": 30, "read": 30, "refused": 0, "defects": {}}
  assert {(config.method, config.minutes, config.steps) for config in ran} == {("kip", 0.0, 2)}
  assert [config.validation_fraction for config in ran].count(0.0) > 15


def test_the_fuzzer_finds_planted_bugs(tmp_path):
  def harm(folder, payload):
    if payload == 0:
      raise KeyError("crash")
    if payload == 1:
      fuzz_targets.finite("it", np.array([np.nan]))
    if payload == 2:
      raise ValueError("over\ntwo lines, expected one")
    if payload == 3:
      while True:
        pass
    raise ValueError("expected another number, got this")

  from hypothesis import strategies as st

  found = fuzz.attack(fuzz_targets.Target(st.integers(0, 4), harm, (ValueError,), 0.05), 25)
  assert found["refused"] and len(found["defects"]) == 4
  assert all(
    any(text in name for name in found["defects"])
    for text in ("KeyError", "silent NaN", "unclear message", "no result after")
  )
