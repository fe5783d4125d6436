"""The device axis: which devices share the work, and the only function that maps work over them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

AXIS = "devices"


class Axis(NamedTuple):
  """The device axis.

  Attributes:
    size: number of devices on it.
    local: how many of them belong to this process.
    first: position of the first local device.
    devices: the devices for `jax.pmap`, or None for its default.
  """

  size: int
  local: int
  first: int
  devices: tuple | None

  @property
  def own(self) -> slice:
    """The positions of the devices of this process."""
    return slice(self.first, self.first + self.local)

  def every(self, count: int) -> Int[np.ndarray, " local"]:
    """The same number for each local device."""
    return np.full((self.local,), count, np.int32)


def device_axis(devices: Sequence | None) -> Axis:
  """The axis over `devices`; None stands for the first device, or all devices of all processes."""
  if jax.process_count() == 1:
    devices = (jax.local_devices()[0],) if devices is None else tuple(devices)
    return Axis(len(devices), len(devices), 0, devices)
  if devices is not None:
    raise ValueError(
      "devices: expected None with several processes, which use all of their devices; got a list"
    )
  local = jax.local_device_count()
  first = jax.devices().index(jax.local_devices()[0])
  return Axis(jax.device_count(), local, first, None)


def pmap(fn: Callable, axis: Axis, **options) -> Callable:
  """`jax.pmap` of `fn` over the device axis.

  JAX reuses a compilation for the same `fn` (the same object) and equal static arguments, so `fn`
  should be a function of a module, not a closure.
  """
  return jax.pmap(fn, axis_name=AXIS, devices=axis.devices and list(axis.devices), **options)
