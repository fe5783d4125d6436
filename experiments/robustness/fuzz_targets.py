"""Targets of `fuzz`: readers of files and settings, and writers of files on a full disk."""

import contextlib
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

SETTINGS_SECONDS = 20.0  # enough to trace the kernel of a network of 99 layers


class Defect(Exception):
  """Invalid behavior of an example."""


class Target(NamedTuple):
  """A fuzzing target.

  Attributes:
    payloads: hypothesis strategy.
    attempt: `(folder, payload) -> None` in a temporary folder; raises `Defect` for an invalid
      result.
    errors: the documented error types.
    seconds: time limit of an example.
    most: maximum examples per round, for targets that run complete commands.
  """

  payloads: Any
  attempt: Callable[[pathlib.Path, Any], None]
  errors: tuple
  seconds: float = 2.0
  most: int = 2**31


def finite(what: str, *arrays) -> None:
  """Raises `Defect` for NaN or infinity in a result."""
  for array in arrays:
    if not np.isfinite(np.asarray(array, np.float64)).all():
      raise Defect(f"silent NaN or infinity in {what}")


def check_artifact(path: pathlib.Path) -> None:
  from kipcore.io import artifact

  stored = artifact.load_artifact(path)
  finite("an artifact", stored.images, stored.labels, stored.support, stored.relative_ridge)
  m = len(stored.images)
  pixels = stored.preprocess.invert(np.zeros_like(stored.support[:1]), np.float64)
  if not (
    m == len(stored.labels) == len(stored.support) and pixels.shape[1:] == stored.images.shape[1:]
  ):
    raise Defect("parts of an artifact are inconsistent")
  stored.kernel_fn()


def good_artifact():
  import kipcore

  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 3, 3, 1)).astype(np.float32)
  prepared, labels = (
    kipcore.fit_preprocess(x, "zca"),
    np.asarray(kipcore.one_hot_centered(np.arange(3), 3)),
  )
  return kipcore.Artifact(
    x[:3],
    labels,
    prepared.apply(x[:3]),
    prepared,
    kipcore.fc(1),
    "ntk",
    1e-6,
    {"dataset": {"name": "digits"}},
  )


def _artifact_targets(folder: pathlib.Path, malformed) -> dict[str, Target]:
  from hypothesis import strategies as st

  from kipcore.io import artifact, npz

  path = folder / "good.npz"
  artifact.save_artifact(path, good_artifact())
  arrays, metadata = npz.load_checked(path, artifact.FORMAT, artifact.FORMAT_VERSION)

  def altered(folder, payload):
    # Valid checksums, so that the code after the checksum test is reached.
    changed, about = payload
    if not isinstance(about, dict):
      about = {"not": about}
    kept = {name: array for name, array in changed.items() if array.dtype.kind in "biufSU"}
    npz.save_checked(folder / "a.npz", kept, artifact.FORMAT, artifact.FORMAT_VERSION, about)
    check_artifact(folder / "a.npz")

  contents = st.one_of(
    st.tuples(malformed.changed_arrays(arrays), st.just(metadata)),
    st.tuples(st.just(arrays), malformed.changed(metadata)),
  )
  return {
    "artifact_bytes": _file(
      "a.npz", malformed.spoiled_archive(path.read_bytes()), check_artifact, artifact.ArtifactError
    ),
    "artifact_content": Target(contents, altered, (artifact.ArtifactError,)),
  }


def _file(name: str, contents, read: Callable, *errors) -> Target:
  """The target that writes a file with this name and reads it."""

  def attempt(folder, content):
    (folder / name).write_bytes(content)
    read(folder / name)

  return Target(contents, attempt, errors)


def check_dataset(path) -> None:
  from kipcore import datasets

  data = datasets.load_dataset(str(path), validation_fraction=0.2)
  for x, y in (
    (data.x_train, data.y_train),
    (data.x_validation, data.y_validation),
    (data.x_test, data.y_test),
  ):
    finite("a dataset", x, data.pixel_max)
    if (
      len(x) != len(y)
      or y.size
      and not 0 <= y.min() <= y.max() < data.num_classes
      or y.dtype != np.int32
    ):
      raise Defect("labels that are not classes")
  if len(np.unique(data.y_train)) != data.num_classes or len(set(data.hashes.values())) < 2:
    raise Defect("a class without a training row")


def _dataset_targets(malformed) -> dict[str, Target]:
  from kipcore import datasets
  from kipcore.io import npz

  good = malformed.dataset_arrays()
  whole = malformed.npz_bytes(good)

  def images(folder, payload):
    from PIL import Image

    for label in range(2):
      (folder / f"class{label}").mkdir()
      for i in range(5):
        Image.fromarray(good["x_train"][i, ..., 0]).save(folder / f"class{label}" / f"{i}.png")
    spoil = folder / "class0" / "2.png"
    spoil.write_bytes(payload)
    check_dataset(f"{folder}/")

  from PIL import Image

  png = io.BytesIO()
  Image.fromarray(good["x_train"][2, ..., 0]).save(png, "PNG")
  return {
    "npz_by_hand": _file("a.npz", malformed.odd_archive(), npz.read_npz, npz.NpzError),
    "dataset_bytes": _file(
      "a.npz", malformed.spoiled_archive(whole), check_dataset, datasets.DatasetError
    ),
    "dataset_content": _file(
      "a.npz",
      malformed.changed_arrays(good).map(malformed.npz_bytes),
      check_dataset,
      datasets.DatasetError,
    ),
    "image_folder": Target(malformed.spoiled(png.getvalue()), images, (datasets.DatasetError,)),
  }


def check_published(path) -> None:
  from kipcore.io import published

  found = published.load_published(path)
  finite(
    "a published set", found.images, found.labels, found.relative_ridge or 0, found.temperature or 0
  )
  if not len(found.images) == len(found.labels) == len(found.classes):
    raise Defect("rows of a published set are inconsistent")


def _published_targets(malformed) -> dict[str, Target]:
  from hypothesis import strategies as st

  from kipcore.io import published, torch_files

  files, contents = [], []
  for name, good in malformed.published_sets().items():
    form, spoil = (
      (malformed.npz_bytes, malformed.spoiled_archive)
      if name.endswith(".npz")
      else (malformed.flax_bytes, malformed.spoiled)
    )
    files.append(st.tuples(st.just(name), spoil(form(good))))
    if name.endswith(".npz"):
      contents.append(
        st.tuples(st.just(name), malformed.changed_arrays(good).map(malformed.npz_bytes))
      )
    else:
      parts = malformed.changed_arrays(good["ema_average"]).map(
        lambda part, good=good: {**good, "params": part, "ema_average": part}
      )
      flax = lambda tree: malformed.flax_bytes(
        {**tree, "params": _plain(tree["params"]), "ema_average": _plain(tree["ema_average"])}
      )
      contents.append(st.tuples(st.just(name), parts.map(flax)))

  def attempt(folder, payload):
    name, content = payload
    (folder / name).write_bytes(content)
    check_published(folder / name)

  def torch(folder, content):
    (folder / "a.pt").write_bytes(content)
    with contextlib.suppress(published.PublishedError):
      check_published(folder / "a.pt")
    torch_files.read_torch_file(folder / "a.pt")

  layouts = st.one_of(
    malformed.spoiled(malformed.torch_layout()),
    st.binary(max_size=40).map(lambda b: b"\x80\x02" + b + b"."),
  )
  pt = st.one_of(
    malformed.spoiled_archive(malformed.torch_bytes()), layouts.map(malformed.torch_bytes)
  )
  return {
    "published_bytes": Target(st.one_of(files), attempt, (published.PublishedError,)),
    "published_content": Target(st.one_of(contents), attempt, (published.PublishedError,)),
    "torch": Target(pt, torch, (ValueError,)),
  }


def _plain(part: dict) -> dict:
  """The entries that Flax can write."""
  arrays = {name: np.asarray(value) for name, value in part.items()}
  return {
    name: array
    for name, array in arrays.items()
    if array.dtype.kind in "biuf" and array.itemsize <= 8
  }


def _trajectory_targets(folder: pathlib.Path, malformed) -> dict[str, Target]:
  from hypothesis import strategies as st

  from kipcore.io import trajectories

  trajectories.save_trajectories(folder / "good.npy", np.ones((2, 3, 4), np.float32), {"seed": 0})
  array, about = (folder / "good.npy").read_bytes(), (folder / "good.json").read_bytes()

  def attempt(folder, payload):
    (folder / "a.npy").write_bytes(payload[0])
    (folder / "a.json").write_bytes(payload[1])
    finite("trajectories", trajectories.load_trajectories(folder / "a.npy").array)

  payloads = st.one_of(
    st.tuples(malformed.spoiled(array), st.just(about)),
    st.tuples(st.just(array), malformed.spoiled(about)),
    st.tuples(st.just(array), malformed.changed(json.loads(about)).map(malformed.json_bytes)),
  )
  return {"trajectories": Target(payloads, attempt, (trajectories.TrajectoriesError,))}


class _FullDisk:
  """A file on a disk with space for `room` bytes."""

  def __init__(self, file, room: int):
    self._file, self._room = file, room

  def write(self, data):
    """Writes data; OSError if there is not enough space."""
    if self._file.tell() + len(memoryview(data).cast("B")) > self._room:
      raise OSError(28, "No space left on device")
    return self._file.write(data)

  def __getattr__(self, name):
    return getattr(self._file, name)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._file.close()


def _write_targets() -> dict[str, Target]:
  """Atomic writers on a full disk: the old file must stay unchanged, with no other files left."""
  from hypothesis import strategies as st

  from kipcore.cli.folder import run_folder
  from kipcore.io import artifact, atomic, npz, trajectories

  good = good_artifact()
  writers = {
    "a.npz": lambda path: artifact.save_artifact(path, good),
    "b.npz": lambda path: npz.save_checked(path, {"x": np.arange(500.0)}, "test", 1),
    "a.json": lambda path: run_folder.write_json(path, {"list": list(range(200))}),
    "a.txt": lambda path: atomic.write_atomically(path, bytes(1000)),
    "a.npy": lambda path: trajectories.save_trajectories(path, np.ones((3, 5, 7), np.float32), {}),
  }

  def attempt(folder, payload):
    name, room = payload
    writers[name](folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = atomic.os.fdopen
    try:
      with mock.patch.object(atomic.os, "fdopen", lambda *args: _FullDisk(real(*args), room)):
        writers[name](folder / name)
    except OSError:
      after = {path.name: path.read_bytes() for path in folder.iterdir()}
      # Saving trajectories first removes the old metadata, so the old trajectories do not load.
      if after != before and not (name == "a.npy" and set(after) == {"a.npy"}):
        raise Defect(f"a failed write of {name} left {sorted(after)}") from None
      raise

  return {
    "full_disk": Target(
      st.tuples(st.sampled_from(sorted(writers)), st.integers(0, 3000)), attempt, (OSError,)
    )
  }


def _settings_targets(folder: pathlib.Path, malformed) -> dict[str, Target]:
  from hypothesis import strategies as st

  from kipcore.cli import config, recipes
  from kipcore.cli.errors import UsageError
  from kipcore.cli.runs import comparison, pipeline, selection

  path = folder / "data.npz"
  path.write_bytes(malformed.npz_bytes(malformed.dataset_arrays()))
  # Its images are too small for the convolutions of the default method.
  known = dict(dataset=str(path), architecture="fc1", target_batch_size=0, num_devices=0)
  resolved = lambda given: recipes.resolve(**{**known, **given, "x64": False})
  pipeline.plan(resolved({}))  # imports and compiles once
  return {
    "settings_distill": Target(
      malformed.settings_of(config.DistillConfig),
      lambda _, given: pipeline.plan(resolved(given)),
      (UsageError,),
      SETTINGS_SECONDS,
    ),
    "settings_select": Target(
      malformed.settings_of(config.SelectConfig),
      lambda _, given: selection.plan(
        config.SelectConfig(**{"dataset": str(path), **given, "x64": False})
      ),
      (UsageError,),
      SETTINGS_SECONDS,
    ),
    "settings_compare": Target(
      st.tuples(
        malformed.settings_of(config.CompareConfig), malformed.settings_of(config.DistillConfig)
      ),
      lambda _, given: comparison.plan(
        config.CompareConfig(**given[0]), {**given[1], "dataset": str(path)}
      ),
      (UsageError,),
      SETTINGS_SECONDS,
    ),
  }


def _run_targets(folder: pathlib.Path, malformed) -> dict[str, Target]:
  """Runs at extreme values; after a failure, the corrected command must work in the folder."""
  from kipcore.cli import config, recipes
  from kipcore.cli.errors import UsageError
  from kipcore.cli.runs import pipeline, selection
  from kipcore.types import NumericalError

  path = folder / "runs.npz"
  path.write_bytes(malformed.npz_bytes(malformed.dataset_arrays()))

  def distill(given, where):
    quick = dict(dataset=str(path), method="kip", steps=2, num_devices=1, validation_fraction=0.0)
    return pipeline.run_distill(recipes.resolve(**{**quick, **given}), where, verbose=False)

  def select(given, where):
    settings = config.SelectConfig(**{"dataset": str(path), **given})
    return selection.run_select(settings, where, verbose=False)

  def sequence(run):
    def attempt(where, given):
      try:
        finite("a result", run(given, str(where / "run"))[1]["test_accuracy"])
      except (UsageError, NumericalError) as error:
        try:
          finite("a result", run({}, str(where / "run"))[1]["test_accuracy"])
        except Exception as second:
          raise Defect(f"the corrected command fails after {error}: {second}") from second
        if isinstance(error, UsageError):
          raise

    return attempt

  return {
    name: Target(malformed.extreme_settings(kind), sequence(run), (UsageError,), 120.0, 30)
    for name, kind, run in (
      ("runs_distill", config.DistillConfig, distill),
      ("runs_select", config.SelectConfig, select),
    )
  }


def targets(folder: pathlib.Path) -> dict[str, Target]:
  """All targets by name.

  Valid files to corrupt are created in the folder. Raises UsageError without hypothesis.
  """
  from kipcore.cli.errors import UsageError

  try:
    from experiments.robustness import malformed
  except ImportError as error:
    raise UsageError(
      f"expected hypothesis to be installed, got {error}; pip install -e '.[test]'"
    ) from error
  return {
    **_artifact_targets(folder, malformed),
    **_dataset_targets(malformed),
    **_published_targets(malformed),
    **_trajectory_targets(folder, malformed),
    **_write_targets(),
    **_settings_targets(folder, malformed),
    **_run_targets(folder, malformed),
  }
