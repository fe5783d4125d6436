"""Memory: block sizes, runs that are refused before they start, and messages if memory runs out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, slow_except

import kipcore
from kipcore import kernels
from kipcore.cli.config import DataConfig, DistillConfig
from kipcore.cli.cost import planner, progress
from kipcore.cli.errors import OutOfMemory, UsageError
from kipcore.cli.runs import loading, pipeline
from kipcore.datasets import load_dataset
from kipcore.io import npz

pytestmark = pytest.mark.usefixtures("module_without_pictures")


@pytest.mark.parametrize(
  "depth, m, t", slow_except([(1, 500, 1000), (5, 100, 2000)], (1, 500, 1000))
)
def test_the_plan_covers_the_memory_analysis_of_xla(depth, m, t):
  """Scratch memory of a step: at most that of a block as planned, plus that of the support."""
  method = kipcore.kip(
    kernels.NetworkKernel(kipcore.fc(depth), "ntk"), kipcore.KIPOptions(learn_labels=True)
  )
  x, y = jax.ShapeDtypeStruct((m, 784), jnp.float32), jax.ShapeDtypeStruct((m, 10), jnp.float32)

  def scratch(t):
    batch = kipcore.Batch(
      jax.ShapeDtypeStruct((t, 784), jnp.float32), jax.ShapeDtypeStruct((t, 10), jnp.float32)
    )
    params = {"x": x, "y": y, "log_temperature": jax.ShapeDtypeStruct((), jnp.float32)}
    step = jax.jit(
      jax.grad(
        lambda params, batch: method.loss(params, (), batch, jnp.ones(batch.x.shape[0]), None)[0]
      )
    )
    return step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

  assert 0 < scratch(t) - scratch(8) < planner._ARRAYS_PER_BLOCK * m * t * 4


@FLOAT64_IS_SLOW
def test_blocks_do_not_change_the_loss(dtype):
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(size=(6, 5)), dtype), jnp.asarray(rng.normal(size=(6, 2)), dtype)
  batch = kipcore.Batch(
    jnp.asarray(rng.normal(size=(21, 5)), dtype), jnp.asarray(rng.normal(size=(21, 2)), dtype)
  )
  kernel_fn, found = kernels.NetworkKernel(kipcore.fc(2), "ntk"), []
  for block in (None, 4, 21, 100):
    method = kipcore.kip(kernel_fn, kipcore.KIPOptions(1e-3, learn_labels=True, block_size=block))
    params = method.init_params(kipcore.Support(x, y))
    found.append(
      jax.value_and_grad(lambda p: method.loss(p, (), batch, jnp.ones(21, dtype), None)[0])(params)
    )
  for other in found[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e3 * jnp.finfo(dtype).eps, atol=1e3 * jnp.finfo(dtype).eps
      ),
      found[0],
      other,
    )
  with pytest.raises(ValueError, match="block_size: expected a positive integer, got 0"):
    kipcore.kip(kernel_fn, kipcore.KIPOptions(block_size=0))


def test_block_rows(monkeypatch):
  assert planner.block_rows(1000, 10, 4) == 0 and planner.free_bytes() > 1e8
  for free in (0.0, 1e6):  # the result must not depend on this
    monkeypatch.setattr(planner, "free_bytes", lambda free=free: free)
    assert planner.block_rows(1000, 10, 4) == 0
  monkeypatch.setattr(planner, "BLOCK_BYTES", 0.25e6)
  assert planner.block_rows(1000, 10, 4) == 128, "0.25 MB over 40 arrays of 40 bytes per row: 156"
  assert planner.block_rows(156, 10, 4) == 0
  monkeypatch.setattr(planner, "BLOCK_BYTES", 1.0)
  assert planner.block_rows(1000, 10, 4) == 8


@pytest.mark.slow
def test_a_large_problem_is_computed_in_blocks_that_are_recorded(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(planner, "block_rows", lambda rows, *_: 64 if rows > 64 else 0)
  config = DistillConfig(steps=3, target_batch_size=200, num_devices=1, test_rows=100)
  folder, _ = pipeline.run_distill(config, str(tmp_path / "blocks"))
  assert "3 steps of 200 targets on 1 cpu device(s), 64 at a time" in capsys.readouterr().out
  monkeypatch.undo()
  whole, _ = pipeline.run_distill(config, str(tmp_path / "whole"), verbose=False)
  assert (
    '"target_block_size": 64' in (folder / "config.json").read_text()
    and '"target_block_size": 0' in (whole / "config.json").read_text()
  )
  found = [kipcore.load_artifact(each / "distilled.npz").support for each in (folder, whole)]
  np.testing.assert_allclose(*found, atol=1e-4)


def test_rows_that_do_not_fit_are_refused_with_a_number_that_fits(monkeypatch):
  monkeypatch.setattr(planner, "free_bytes", lambda: 4e5)
  with pytest.raises(
    UsageError,
    match=r"fit into 400.0 kB of free memory, got 920.1 kB: 1,442 training and 355 test rows .*--train_rows=348 ",
  ):
    loading.load(DataConfig())
  assert len(loading.load(DataConfig(train_rows=348)).x_train) == 313
  monkeypatch.setattr(planner, "free_bytes", lambda: 1e5)
  with pytest.raises(UsageError, match="--train_rows and --test_rows use a subset"):
    loading.load(DataConfig())
  assert len(loading.load(DataConfig(train_rows=100, test_rows=50)).x_test) == 50


def test_steps_that_do_not_fit_are_refused_before_the_first(tmp_path, monkeypatch):
  monkeypatch.setattr(planner, "free_bytes", lambda: 3e6)
  monkeypatch.setattr(planner, "block_rows", lambda *_: 0)
  with pytest.raises(
    OutOfMemory,
    match=r"a step needs [\d.]+ MB of working memory, and 3.0 MB are free \(training rows .*; reduce --target_block_size",
  ):
    pipeline.run_distill(
      DistillConfig(steps=3, images_per_class=40, num_devices=1), str(tmp_path / "a"), verbose=False
    )
  assert not (tmp_path / "a" / "result.json").exists()


@pytest.mark.parametrize(
  "error",
  [
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore"),
  ],
)
def test_out_of_memory_names_the_part_and_a_remedy(error):
  with pytest.raises(
    OutOfMemory,
    match="out of memory in the part 'scoring' .*(5 bytes|MemoryError).*; reduce --test_rows",
  ) as caught:
    with progress.working("scoring", shown=False, remedy="--test_rows"):
      raise error
  assert "\n" not in str(caught.value)
  with pytest.raises(OutOfMemory, match="the steps of kip .*--target_batch_size"):
    with progress.Steps(3, "kip"):
      raise error
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    with planner.part("it"):
      raise jax.errors.JaxRuntimeError("INTERNAL: something else")


# --- subsets of the training rows ---


def arrays(rng, n=60):
  return dict(
    x_train=rng.integers(0, 256, (n, 3, 3, 1)).astype(np.uint8),
    y_train=np.repeat([0, 1, 2], [n // 2, n // 3, n // 6]),
    x_test=rng.integers(0, 256, (6, 3, 3, 1)).astype(np.uint8),
    y_test=np.array([0, 1, 2, 0, 1, 2]),
  )


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_subset_read_from_an_npz_equals_that_of_all_rows(tmp_path, monkeypatch, write):
  given = arrays(np.random.default_rng(0))
  write(tmp_path / "a.npz", **given)
  monkeypatch.setattr(npz, "_BLOCK_BYTES", 70)  # seven rows
  found = load_dataset(str(tmp_path / "a.npz"), validation_fraction=0, train_rows=18)
  np.testing.assert_array_equal(np.bincount(found.y_train), [9, 6, 3])
  where = [
    int(np.flatnonzero((given["x_train"] == row).all((1, 2, 3)))[0]) for row in found.x_train
  ]
  assert where == sorted(where) and np.array_equal(given["y_train"][where], found.y_train)
  assert np.array_equal(found.x_test, given["x_test"])
  again, other = (
    load_dataset(str(tmp_path / "a.npz"), train_rows=18, seed=seed, validation_fraction=0).hashes
    for seed in (0, 1)
  )
  assert (
    again == found.hashes and other["train"] != again["train"] and other["test"] == again["test"]
  )
  all_rows = load_dataset(str(tmp_path / "a.npz"), train_rows=10**9)
  assert all_rows.hashes == load_dataset(str(tmp_path / "a.npz")).hashes


def test_rare_classes_keep_a_row_and_validation_is_cut_from_the_subset():
  data = load_dataset("digits", train_rows=100, validation_fraction=0.2)
  assert len(data.x_train) + len(data.x_validation) == 100 and len(data.x_validation) == 20
  assert len(load_dataset("digits", train_rows=3, validation_fraction=0).x_train) == 10
  for wrong in (-1, 1.5, True):
    with pytest.raises(ValueError, match="train_rows: expected an integer >= 0"):
      load_dataset("digits", train_rows=wrong)


def test_only_the_subset_is_in_memory(tmp_path, monkeypatch):
  """With more training rows than the reader expects to fit into memory."""
  np.savez_compressed(tmp_path / "a.npz", **arrays(np.random.default_rng(0), 6000))
  monkeypatch.setattr(npz, "_memory", lambda: 50_000)
  with pytest.raises(
    kipcore.datasets.DatasetError, match="expected arrays that fit into the 50000 bytes"
  ):
    load_dataset(str(tmp_path / "a.npz"))
  assert (
    len(load_dataset(str(tmp_path / "a.npz"), train_rows=100, validation_fraction=0).x_train) == 100
  )


@pytest.mark.parametrize(
  "spoil, message",
  [
    (dict(x_train=np.zeros((3, 2, 2, 1), np.uint8)), "expected an array in C order of"),
    (dict(x_train=np.asfortranarray(np.zeros((60, 3, 3, 2), np.uint8))), "in Fortran order"),
    (dict(x_train=np.zeros((), np.uint8)), "expected an array in C order of"),
    (dict(y_train=np.zeros(60, np.int32), y_test=np.zeros(6, np.int32)), "at least 2 classes"),
  ],
)
def test_invalid_files_are_refused(tmp_path, spoil, message):
  np.savez(tmp_path / "a.npz", **{**arrays(np.random.default_rng(0)), **spoil})
  with pytest.raises(kipcore.datasets.DatasetError, match=message):
    load_dataset(str(tmp_path / "a.npz"), train_rows=30)


def test_a_damaged_row_outside_the_subset_is_found(tmp_path):
  np.savez(tmp_path / "a.npz", **arrays(np.random.default_rng(0), 6000))
  content = bytearray((tmp_path / "a.npz").read_bytes())
  content[2000] ^= 1
  (tmp_path / "a.npz").write_bytes(content)
  with pytest.raises(kipcore.datasets.DatasetError, match="CRC"):
    load_dataset(str(tmp_path / "a.npz"), train_rows=30)


def test_a_run_on_a_subset_is_evaluated_on_it(tmp_path):
  folder, result = pipeline.run_distill(
    DistillConfig(train_rows=200, steps=3, num_devices=1), str(tmp_path / "a"), verbose=False
  )
  stored = kipcore.load_artifact(folder / "distilled.npz")
  assert stored.metadata["config"]["train_rows"] == 200
  from kipcore.cli.config import EvaluateConfig
  from kipcore.cli.runs import evaluation

  prepared = evaluation.prepare(stored, EvaluateConfig(baselines=("uniform",), num_seeds=2))
  assert len(prepared.data.x_train) == 180
