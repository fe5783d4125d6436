"""The device axis: which devices share the work, and the one place that maps it over them."""

from typing import NamedTuple

import jax
import numpy as np

AXIS = "devices"


class Axis(NamedTuple):
  """The device axis: its size, how many devices of it are of this process, from which on, and what `pmap` is told."""

  size: int
  local: int
  first: int
  devices: tuple | None

  @property
  def own(self) -> slice:
    """The devices of this process."""
    return slice(self.first, self.first + self.local)

  def every(self, count: int) -> np.ndarray:
    """The same number for each local device."""
    return np.full((self.local,), count, np.int32)


def device_axis(devices) -> Axis:
  """The axis over a list of devices, over the first one for None, or over all of several processes."""
  if jax.process_count() == 1:
    devices = (jax.local_devices()[0],) if devices is None else tuple(devices)
    return Axis(len(devices), len(devices), 0, devices)
  if devices is not None:
    raise ValueError(
      "devices: expected None where several processes run, all of whose devices take part; got a list"
    )
  local = jax.local_device_count()
  first = jax.devices().index(jax.local_devices()[0])
  return Axis(jax.device_count(), local, first, None)


def pmap(fn, axis: Axis, **options):
  """The only place where work is mapped over devices."""
  return jax.pmap(fn, axis_name=AXIS, devices=axis.devices and list(axis.devices), **options)
