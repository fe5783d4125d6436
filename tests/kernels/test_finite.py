"""The empirical kernel of any function against neural-tangents, for linen, nnx and plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import assert_close, enable_x64, slow_except, standard_promotion

import kipcore
from kipcore.kernels import finite
from kipcore.kernels.stax import import_neural_tangents

RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(6, 4)).astype("f4"), RNG.normal(size=(5, 4)).astype("f4")


class Linen(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(3)(linen.tanh(linen.Dense(7)(x)))


class Convolutional(linen.Module):
  @linen.compact
  def __call__(self, x):
    h = linen.relu(linen.Conv(5, (2, 2))(x.reshape(-1, 2, 2, 1)))
    return linen.Dense(3)(h.reshape(h.shape[0], -1))


def linen_case(module):
  return module.apply, module.init(jax.random.key(0), X)


def nnx_case():
  model = nnx.Sequential(
    nnx.Linear(4, 7, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(7, 3, rngs=nnx.Rngs(1))
  )
  definition, state = nnx.split(model)
  return lambda state, x: nnx.merge(definition, state)(x), state


def plain_case():
  """With an integer among the parameters, which is a constant."""
  params = {"w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), "power": jnp.int32(2)}
  return lambda p, x: jnp.sin(x @ p["w"]) ** p["power"], params


CASES = {
  "linen": lambda: linen_case(Linen()),
  "convolutional": lambda: linen_case(Convolutional()),
  "nnx": nnx_case,
  "plain": plain_case,
}


def dense_reference(apply_fn, params, x1, x2):
  """From whole Jacobians by the floating parameters."""
  leaves, structure = jax.tree.flatten(params)
  trained = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

  def outputs(values, x):
    whole = [values[trained.index(i)] if i in trained else leaf for i, leaf in enumerate(leaves)]
    return apply_fn(jax.tree.unflatten(structure, whole), x)

  def jacobian(x):
    parts = jax.jacobian(outputs)([leaves[i] for i in trained], x)
    return np.concatenate(
      [np.asarray(p, np.float64).reshape(*p.shape[:2], -1) for p in parts], axis=2
    )

  return np.einsum("icp,jcp->ij", jacobian(x1), jacobian(x2)) / 3


@pytest.mark.parametrize("name", slow_except(["linen", "nnx", "plain"], "nnx", "plain"))
def test_blocks_and_implementations_equal_whole_jacobians(name):
  apply_fn, params = CASES[name]()
  with standard_promotion():
    expected, own = (dense_reference(apply_fn, params, X, b) for b in (Z, X))
    row = finite.empirical_ntk_fn(apply_fn, params)
    f, split, *_ = row._checked(jnp.asarray(X))
    one = finite._row_bytes(f, split, jnp.asarray(X))
    kernel = kipcore.empirical_ntk_fn(apply_fn, params)
    assert_close(kernel(X), own, 1e-5)
    assert_close(kernel.diag(X), np.diag(own), 1e-5)
    for implementation, budget in (("contraction", 5 * one), ("products", 1)):
      kernel = kipcore.empirical_ntk_fn(apply_fn, params, budget, implementation)
      assert_close(kernel(X, Z), expected, 1e-5)


def test_neural_tangents_gives_the_same_kernel():
  nt = import_neural_tangents()
  apply_fn, params = CASES["convolutional"]()
  with standard_promotion():
    # Without `trace_axes`: all pairs of outputs, of which ours is the mean of the diagonal ones.
    theirs = nt.empirical_ntk_fn(
      apply_fn, trace_axes=(), implementation=nt.NtkImplementation.JACOBIAN_CONTRACTION
    )(X, Z, params)
    ours = kipcore.empirical_ntk_fn(apply_fn, params)(X, Z)
  assert_close(ours, np.trace(np.asarray(theirs), axis1=2, axis2=3) / 3, 1e-5)


def test_it_is_a_kernel_of_its_parameters(x64):
  """In sums, `gram`, ridge regression; traced, and differentiable by parameters and rows."""
  params = jnp.asarray(RNG.normal(size=(4, 3)))
  make = lambda p: kipcore.empirical_ntk_fn(apply_tanh, p)
  x, z = jnp.asarray(X, jnp.float64), jnp.asarray(Z, jnp.float64)
  total = lambda p: jnp.sum(kipcore.gram(make(p) + 0.5 * kipcore.linear_fn(), x, z, 2) ** 2)
  v, h = jnp.asarray(RNG.normal(size=params.shape)), 1e-5
  slope = (total(params + h * v) - total(params - h * v)) / (2 * h)
  np.testing.assert_allclose(jnp.vdot(jax.grad(total)(params), v), slope, rtol=1e-7)
  assert make(params) == make(params + 0) != make(params + 1)
  found = kipcore.evaluate_krr(
    make(params), kipcore.Support(x[:4], x[:4]), x, x, relative_ridge=1e-6
  )
  assert found.status == 0


def apply_tanh(p, x):
  return jnp.tanh(x @ p)


def test_tokens_are_rows_and_the_budget_selects_the_implementation(monkeypatch):
  """A row of an embedding uses few of the parameters: products need fewer operations."""
  table = jnp.asarray(RNG.normal(size=(2000, 3)), jnp.float32)
  kernel = kipcore.empirical_ntk_fn(apply_embedding, table)
  tokens = jnp.asarray([[1, 5], [5, 7], [0, 0]], jnp.int32)
  np.testing.assert_allclose(kernel(tokens), [[2, 1, 0], [1, 2, 0], [0, 0, 4]], rtol=1e-6)
  chosen = []
  for name in ("_all_jacobians", "_contraction", "_products"):
    original = getattr(finite, name)
    monkeypatch.setattr(
      finite,
      name,
      lambda *a, name=name, original=original, **k: chosen.append(name) or original(*a, **k),
    )
  x = jnp.asarray(X)
  dense = jnp.asarray(RNG.normal(size=(4, 64)), jnp.float32)
  for fn, params, rows, budget, expected in (
    (apply_embedding, table, tokens, 2**31, "_products"),
    (apply_tanh, dense, x, 2**31, "_all_jacobians"),
    (apply_tanh, dense, x, 100_000, "_contraction"),
    (apply_tanh, dense, x, 1500, "_products"),
  ):
    kipcore.empirical_ntk_fn(fn, params, budget)(rows)
    assert set(chosen) == {expected}
    chosen.clear()


def apply_embedding(p, x):
  return jnp.sum(p[x], axis=1)


@pytest.mark.parametrize("implementation", ["contraction", "products"])
def test_the_budget_bounds_the_scratch_memory(implementation):
  with enable_x64(False):
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 512), (512, 2))]
    x, budget = jax.ShapeDtypeStruct((48, 64), jnp.float32), 2_000_000

    def scratch(budget):
      fn = lambda p, x: kipcore.empirical_ntk_fn(apply_two_layers, p, budget, implementation)(x)
      return jax.jit(fn).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert scratch(budget) < 1.1 * budget
    if implementation == "contraction":
      assert scratch(2**30) > 3 * budget
      for larger in (8_000_000, 16_000_000, 32_000_000):  # one output at a time, and all
        assert scratch(larger) < 1.1 * larger


def apply_two_layers(p, x):
  return jnp.tanh(x @ p[0]) @ p[1]


INVALID = {
  "apply_fn: expected a function, got a int": lambda: kipcore.empirical_ntk_fn(3, X),
  "implementation: expected one of auto, contraction, products; got 'fast'": lambda: (
    kipcore.empirical_ntk_fn(apply_tanh, X, implementation="fast")
  ),
  "memory_budget: expected a positive integer, got 0": lambda: kipcore.empirical_ntk_fn(
    apply_tanh, X, 0
  ),
  r"apply_fn: expected outputs of shape \(1, c\) for one row, got shape \(1,\)": lambda: (
    kipcore.empirical_ntk_fn(lambda p, x: x @ p, jnp.ones(4))(X)
  ),
  "apply_fn: expected outputs .*, got tuple": lambda: kipcore.empirical_ntk_fn(
    lambda p, x: (x @ p, x), jnp.ones((4, 2))
  )(X),
  "params: expected at least one array of a floating dtype, got none": lambda: (
    kipcore.empirical_ntk_fn(lambda p, x: x, jnp.arange(3))(X)
  ),
  "memory_budget: expected at least .* bytes, for 2 rows of the Jacobian, got 10": lambda: (
    kipcore.empirical_ntk_fn(apply_tanh, jnp.ones((4, 2)), 10, "contraction")(X)
  ),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments_are_named(message):
  with pytest.raises((ValueError, TypeError), match=message):
    INVALID[message]()
