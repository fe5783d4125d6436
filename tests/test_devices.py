"""Mapping over 8 simulated devices: `shard_map` and `pmap` give equal bits, donation, memory, copies of the first device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import image_problem

import kipcore
from kipcore import devices

KERNEL = kipcore.ntk_fn(kipcore.fc(1))
NETWORK = kipcore.network(kipcore.conv_net(1), 4, 3, norm="instance")
METHODS = {
  "kip": kipcore.kip(KERNEL, kipcore.KIPOptions(relative_ridge=1e-3, learn_labels=True)),
  "dm": kipcore.dm(NETWORK),
}


@functools.cache
def run(name, mapping, resume=None):
  """A run whose sampler has state on each device, with its snapshots and the compiled steps."""
  snapshots, programs = [], []
  support, x, y = image_problem(n=43)
  distiller = kipcore.Distiller(
    METHODS[name], kipcore.sampler("cross_entropy"), optax.adam(0.05), 16
  )
  result = kipcore.distill(
    0,
    distiller,
    support,
    x,
    y,
    4,
    devices=jax.devices(),
    log_steps=(1, 2),
    mapping=mapping,
    compiled=programs.append,
    checkpoint_policy=kipcore.CheckpointPolicy(snapshots.append, seconds=0.0),
    resume=resume and run(name, resume)[1][1],
  )
  return result, snapshots, programs[0]


def assert_equal_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", METHODS)
def test_shard_map_and_pmap_give_equal_bits(name):
  assert len(jax.devices()) == 8
  (a, saved_a, _), (b, saved_b, _) = (run(name, mapping) for mapping in devices.MAPPINGS)
  assert_equal_bits((a.support, a.state, a.scores), (b.support, b.state, b.scores))
  assert [s.arrays[0].shape for s in saved_a] == [s.arrays[0].shape for s in saved_b]
  for one, other in zip(saved_a, saved_b):
    assert_equal_bits(one.arrays, other.arrays)
  timeless = lambda history: [{**line, "seconds": 0} for line in history]
  assert timeless(a.history) == timeless(b.history)


@pytest.mark.parametrize("mapping", devices.MAPPINGS)
def test_a_snapshot_of_one_mapping_resumes_under_the_other(mapping):
  (other,) = set(devices.MAPPINGS) - {mapping}
  whole, resumed = run("kip", mapping)[0], run("kip", mapping, other)[0]
  assert_equal_bits((whole.support, whole.state), (resumed.support, resumed.state))


@pytest.mark.parametrize("mapping", devices.MAPPINGS)
def test_the_state_is_updated_in_place(mapping):
  """The steps reuse all memory of the state, and `shard_map` needs no more scratch memory than `pmap`."""
  result, _, program = run("kip", mapping)
  memory = program.memory_analysis()
  state = sum(leaf.nbytes for leaf in jax.tree.leaves(result.state))
  assert memory.alias_size_in_bytes >= state
  reference = run("kip", "pmap")[2].memory_analysis()
  assert memory.temp_size_in_bytes <= reference.temp_size_in_bytes
  assert memory.argument_size_in_bytes == reference.argument_size_in_bytes


def _add_position(a, b):
  position = jax.lax.axis_index(devices.AXIS).astype(b.dtype)
  return a + jax.lax.psum(b, devices.AXIS) * position


@pytest.mark.parametrize("mapping", devices.MAPPINGS)
def test_collectives_and_copies_of_the_first_device_that_survive_donation(mapping):
  axis = devices.device_axis(jax.devices()[4:], mapping)
  mapped = devices.over_devices(_add_position, axis, in_axes=(0, None), donate_argnums=(0,))
  once = mapped(jnp.arange(8.0).reshape(4, 2), np.float32(2.0))
  first = devices.first(once)
  twice = mapped(once, np.float32(2.0))
  assert once.is_deleted() and first.devices() == {jax.devices()[4]}
  np.testing.assert_array_equal(first, [0.0, 1.0])
  np.testing.assert_array_equal(twice, np.arange(8.0).reshape(4, 2) + 16 * np.arange(4.0)[:, None])


def test_gram_gives_equal_bits_and_compiles_once():
  x = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
  for block_size in (None, 1):
    a, b = (
      kipcore.gram(KERNEL, x, x[:3], block_size, jax.devices(), mapping=mapping)
      for mapping in devices.MAPPINGS
    )
    np.testing.assert_array_equal(a, b)
  before = devices._program.cache_info().misses
  kipcore.gram(KERNEL, x, x[:3], 1, jax.devices(), mapping="shard_map")
  assert devices._program.cache_info().misses == before


def test_unknown_mappings_and_several_processes_are_rejected(monkeypatch):
  x = np.ones((2, 3), np.float32)
  message = "mapping: expected one of pmap, shard_map; got 'vmap'"
  with pytest.raises(ValueError, match=message):
    kipcore.gram(KERNEL, x, devices=jax.devices(), mapping="vmap")
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  message = "mapping: expected pmap with several processes, got shard_map"
  with pytest.raises(ValueError, match=message):
    devices.device_axis(None, "shard_map")
