"""The device axis: which devices share the work, and the only function that maps work over them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from kipcore import checks

AXIS = "devices"
MAPPINGS = ("pmap", "shard_map")


class Axis(NamedTuple):
  """The device axis.

  Attributes:
    size: number of devices on it.
    local: how many of them belong to this process.
    first: position of the first local device.
    devices: the devices for `jax.pmap`, or None for its default.
    mapping: one of `MAPPINGS`.
  """

  size: int
  local: int
  first: int
  devices: tuple | None
  mapping: str = "pmap"

  @property
  def own(self) -> slice:
    """The positions of the devices of this process."""
    return slice(self.first, self.first + self.local)

  def every(self, count: int) -> Int[np.ndarray, " local"]:
    """The same number for each local device."""
    return np.full((self.local,), count, np.int32)


def device_axis(devices: Sequence | None, mapping: str = "pmap") -> Axis:
  """The axis over `devices`; None stands for the first device, or all devices of all processes."""
  checks.one_of("mapping", mapping, MAPPINGS)
  if jax.process_count() == 1:
    devices = (jax.local_devices()[0],) if devices is None else tuple(devices)
    return Axis(len(devices), len(devices), 0, devices, mapping)
  if devices is not None:
    raise ValueError(
      "devices: expected None with several processes, which use all of their devices; got a list"
    )
  if mapping != "pmap":
    raise ValueError(f"mapping: expected pmap with several processes, got {mapping}")
  local = jax.local_device_count()
  first = jax.devices().index(jax.local_devices()[0])
  return Axis(jax.device_count(), local, first, None)


def over_devices(fn: Callable, axis: Axis, **options) -> Callable:
  """`fn` mapped over the device axis, with the options of `jax.pmap`.

  JAX reuses a compilation for the same `fn` (the same object) and equal static arguments, so `fn`
  should be a function of a module, not a closure.
  """
  if axis.mapping == "shard_map":
    return _ShardMapped(fn, axis, **options)
  return jax.pmap(fn, axis_name=AXIS, devices=axis.devices and list(axis.devices), **options)


def first(tree: Any) -> Any:
  """The copies on the first local device, without the device axis.

  Indexing instead would move data between devices, because the result of an index into a sharded array is on all of them.
  The copy remains valid when the array is donated.
  """
  return jax.tree.map(lambda a: jnp.copy(a.addressable_shards[0].data).reshape(a.shape[1:]), tree)


class _ShardMapped:
  """What `jax.pmap` returns, by `jax.shard_map`: the same arguments, results and placement."""

  def __init__(self, fn, axis, in_axes=0, static_broadcasted_argnums=(), donate_argnums=()):
    static = np.atleast_1d(np.asarray(static_broadcasted_argnums, int))
    self._static, self._in_axes = tuple(static.tolist()), in_axes
    self._mesh = jax.sharding.Mesh(np.asarray(axis.devices), (AXIS,))
    self._program = _program(fn, self._mesh, self._in_axes, self._static, tuple(donate_argnums))

  def __call__(self, *arguments):
    return self._program(*self._placed(arguments))

  def lower(self, *arguments):
    """As that of a jitted function."""
    return self._program.lower(*self._placed(arguments))

  def _placed(self, arguments):
    specs = _specs(self._in_axes, self._static, len(arguments))
    return [
      a if spec is None else jax.device_put(a, NamedSharding(self._mesh, spec))
      for a, spec in zip(arguments, specs)
    ]


def _specs(in_axes, static, count: int) -> list[PartitionSpec | None]:
  """The partition of each argument; None for static ones."""
  axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * count
  return [
    None if i in static else PartitionSpec(*([] if axis is None else [AXIS]))
    for i, axis in enumerate(axes)
  ]


@functools.lru_cache
def _program(fn, mesh, in_axes, static, donate):
  """The jitted program; the same object for equal arguments, so that JAX reuses its compilations.

  A block of an array keeps the device axis, of size 1, which `fn` does not see.
  """

  def whole(*arguments):
    specs = _specs(in_axes, static, len(arguments))
    moving = [i for i, spec in enumerate(specs) if spec is not None]

    def on_device(*parts):
      given = list(arguments)
      for i, part in zip(moving, parts):
        given[i] = jax.tree.map(lambda a: a[0], part) if specs[i] else part
      return jax.tree.map(lambda a: a[None], fn(*given))

    mapped = jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=tuple(specs[i] for i in moving),
      out_specs=PartitionSpec(AXIS),
      check_vma=False,  # as for pmap: which values are equal on all devices is not tracked
    )
    return mapped(*(arguments[i] for i in moving))

  return jax.jit(whole, static_argnums=static, donate_argnums=donate)
