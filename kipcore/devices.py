"""The device axis: which devices share the work, and the only place where work is mapped over them."""

from typing import NamedTuple

import jax
import numpy as np

AXIS = "devices"


class Axis(NamedTuple):
  """The device axis.

  Attributes:
    size: number of devices, over all processes.
    local: number of devices of this process.
    first: position of the first device of this process.
    devices: what `pmap` maps over; None for all devices of all processes.
  """

  size: int
  local: int
  first: int
  devices: tuple | None

  @property
  def own(self) -> slice:
    """The positions of the devices of this process."""
    return slice(self.first, self.first + self.local)

  def every(self, count: int) -> np.ndarray:
    """The same number for each local device."""
    return np.full((self.local,), count, np.int32)


def device_axis(devices) -> Axis:
  """The axis over a list of devices, over the first local one for None, or over all of several processes.

  Raises:
    ValueError: for a list of devices with several processes.
  """
  if jax.process_count() == 1:
    devices = (jax.local_devices()[0],) if devices is None else tuple(devices)
    return Axis(len(devices), len(devices), 0, devices)
  if devices is not None:
    raise ValueError(
      "devices: expected None with several processes, where all devices take part; got a list"
    )
  local = jax.local_device_count()
  first = jax.devices().index(jax.local_devices()[0])
  return Axis(jax.device_count(), local, first, None)


def pmap(fn, axis: Axis, **options):
  """`jax.pmap` over the axis: the only place where work is mapped over devices.

  JAX reuses a compilation for the same `fn` (the same object) and equal static arguments, so `fn`
  should be a function of a module, not a closure.
  """
  return jax.pmap(fn, axis_name=AXIS, devices=axis.devices and list(axis.devices), **options)
