"""Random keys: every form of a seed gives the same stream, and nothing else is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kipcore import keys


def data(key):
  return np.asarray(jax.random.key_data(key))


SEEDS = {
  "int": 7,
  "np.int64": np.int64(7),
  "np.int32": np.int32(7),
  "np.uint8": np.uint8(7),
  "0-d NumPy array": np.array(7),
  "0-d JAX array": jnp.asarray(7),
  "raw key": jax.random.PRNGKey(7),
  "raw key in NumPy": np.asarray(jax.random.PRNGKey(7)),
  "typed key": jax.random.key(7),
}


@pytest.mark.parametrize("name", SEEDS)
def test_all_forms_of_a_seed_are_one_key(name):
  key = keys.canonical_key(SEEDS[name])
  assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
  np.testing.assert_array_equal(data(key), data(jax.random.key(7)))
  np.testing.assert_array_equal(
    data(keys.stream(SEEDS[name], "a")), data(keys.stream(jax.random.key(7), "a"))
  )


def test_traced_seeds_and_keys():
  for seed in (jnp.int32(7), jax.random.PRNGKey(7), jax.random.key(7)):
    np.testing.assert_array_equal(data(jax.jit(keys.canonical_key)(seed)), data(jax.random.key(7)))


@pytest.mark.parametrize(
  "value", [True, False, np.bool_(True), jnp.asarray(True), 0.0, np.float32(1), "0", None, [0]]
)
def test_other_types_are_rejected(value):
  with pytest.raises(TypeError, match="key: expected a random key or an integer seed, got"):
    keys.canonical_key(value)
  if isinstance(value, jax.Array):
    with pytest.raises(TypeError, match="key: expected a random key or an integer seed, got"):
      jax.jit(keys.canonical_key)(value)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**30])
def test_seeds_beyond_64_bits_are_rejected(seed):
  with pytest.raises(ValueError, match="seed: expected a 64-bit integer"):
    keys.canonical_key(seed)


def test_streams_and_steps_are_distinct():
  found = {
    tuple(data(key).tolist())
    for name in ("a", "b")
    for stream in [keys.stream(0, name)]
    for key in (stream, keys.at_step(stream, 0), keys.at_step(stream, 1))
  }
  assert len(found) == 6
