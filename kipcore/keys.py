"""Named random streams: one root key, one stream per purpose, with the step number folded in.

A draw depends only on (root key, stream name, step). A resumed run therefore needs no stored key,
and a new consumer of randomness does not change the draws of others.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks
from kipcore.types import Array


def canonical_key(key_or_seed) -> Array:
  """A typed key from an integer seed, raw `uint32` key data or a typed key.

  Args:
    key_or_seed: a 64-bit seed (int, NumPy integer or 0-d integer array), `uint32` key data
      such as `jax.random.PRNGKey` returns, or a typed key, which is returned as is.

  Returns:
    A typed key.

  Raises:
    TypeError: for anything else, including booleans.
    ValueError: for a seed that does not fit into 64 bits.
  """
  is_array = isinstance(key_or_seed, (jax.Array, np.ndarray))
  if is_array and jnp.issubdtype(key_or_seed.dtype, jax.dtypes.prng_key):
    return key_or_seed
  if is_array and key_or_seed.ndim and key_or_seed.dtype == jnp.uint32:
    return jax.random.wrap_key_data(key_or_seed)
  if checks.is_traced(key_or_seed):
    if key_or_seed.ndim == 0 and jnp.issubdtype(key_or_seed.dtype, jnp.integer):
      return jax.random.key(key_or_seed)
    raise TypeError(f"key: expected a random key or an integer seed, got {key_or_seed!r}")
  try:
    seed = checks.integer("seed", key_or_seed)
  except TypeError:
    got = f"an array of dtype {key_or_seed.dtype}" if is_array else repr(key_or_seed)
    raise TypeError(f"key: expected a random key or an integer seed, got {got}") from None
  if not -(2**63) <= seed < 2**63:
    raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
  return jax.random.key(seed)


def stream(key, name: str) -> Array:
  """The stream `name` of `key` (a key or an integer seed)."""
  return jax.random.fold_in(canonical_key(key), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def at_step(stream_key: Array, step) -> Array:
  """The key of a stream at a step (an int or a traced int)."""
  return jax.random.fold_in(stream_key, step)
