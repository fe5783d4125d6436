"""Named random streams: one root key, one stream a purpose, the step number folded in.

A draw depends on (root key, stream name, step) alone. So a resumed run needs no
stored key, and a new consumer of randomness does not shift the draws of the others.
"""

import zlib

import jax

from kipcore.types import Array


def canonical_key(key_or_seed) -> Array:
  """A typed key from an int seed, a raw `uint32` key or a typed key; ValueError for a seed beyond 64 bits."""
  if isinstance(key_or_seed, int):
    if not -(2**63) <= key_or_seed < 2**63:
      raise ValueError(f"seed: expected an integer of 64 bits, got {key_or_seed}")
    return jax.random.key(key_or_seed)
  if jax.numpy.issubdtype(key_or_seed.dtype, jax.dtypes.prng_key):
    return key_or_seed
  return jax.random.wrap_key_data(key_or_seed)


def stream(key, name: str) -> Array:
  """The stream called `name` under `key`."""
  return jax.random.fold_in(canonical_key(key), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def at_step(stream_key: Array, step) -> Array:
  """The key of a stream at a step (int or traced int)."""
  return jax.random.fold_in(stream_key, step)
