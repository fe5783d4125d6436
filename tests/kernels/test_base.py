"""Kernel objects: pytrees of their hyperparameters, equal by value; sums, products and multiples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, enable_x64, slow_except

import kipcore
from kipcore.architectures import Architecture, Conv, Dense, Flatten, LeakyRelu

RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(6, 4)), RNG.normal(size=(4, 4))
Y = RNG.normal(size=(6, 2))
IMAGES = RNG.normal(size=(3, 4, 4, 1))


def leaky(w_std, b_std, slope):
  layers = (Flatten(), Dense(w_std, b_std), LeakyRelu(slope), Dense(w_std, b_std))
  return Architecture("leaky", layers)


def convolutional(w_std, b_std, slope):
  """Two blocks after the first, whose activations are recomputed in the gradient."""
  block = (Conv(3, w_std, b_std), LeakyRelu(slope))
  return Architecture("conv", (*block, *block, Flatten(), Dense(w_std, b_std)))


def user_kernel(x1, x2=None):
  """The quadratic kernel, without a method `diag`."""
  return (x1 @ (x1 if x2 is None else x2).T) ** 2


# name -> (kernel of its hyperparameters, hyperparameters, rows)
FAMILIES = {
  "rbf": (lambda p: kipcore.rbf_fn(p[0]), [1.3], X),
  "ntk": (lambda p: kipcore.ntk_fn(kipcore.fc(2, p[0], p[1])), [1.2, 0.3], X),
  "nngp": (lambda p: kipcore.nngp_fn(leaky(*p)), [1.2, 0.3, 0.2], X),
  "convolutional": (lambda p: kipcore.ntk_fn(convolutional(*p)), [1.2, 0.3, 0.2], IMAGES),
  "combination": (
    lambda p: (
      p[0] * kipcore.rbf_fn(p[1]) * kipcore.linear_fn() + kipcore.ntk_fn(kipcore.fc(1, p[2]))
    ),
    [0.7, 1.5, 1.2],
    X,
  ),
}


def total(name, p):
  """A weighted sum of the entries, of the kernel of rows with themselves and of its diagonal."""
  kernel, x = FAMILIES[name][0](p), jnp.asarray(FAMILIES[name][2])
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), len(x))))
  return (
    jnp.sum(weights[:, :2] * kernel(x, x[:2]))
    + jnp.sum(weights * kernel(x))
    + jnp.sum(kernel.diag(x) ** 2)
  )


@pytest.mark.parametrize("name", slow_except(FAMILIES, "nngp", "combination", "rbf"))
def test_gradients_by_hyperparameters_are_finite_differences(name, x64):
  p, f = jnp.asarray(FAMILIES[name][1]), jax.jit(lambda p: total(name, p))
  gradient, h = jax.jit(jax.grad(f))(p), 1e-5
  slopes = [(f(p + h * e) - f(p - h * e)) / (2 * h) for e in jnp.eye(len(p))]
  np.testing.assert_allclose(gradient, slopes, rtol=1e-7)
  assert np.abs(gradient).min() > 1e-3


def test_hyperparameters_are_mapped_and_differentiated_eagerly(x64):
  x, bandwidths = jnp.asarray(X), jnp.asarray([0.5, 1.0, 2.0])
  value = lambda b: jnp.sum(kipcore.gram(kipcore.rbf_fn(b), x, None, 4))
  expected = [float(jnp.sum(kipcore.rbf_fn(float(b))(x))) for b in bandwidths]
  np.testing.assert_allclose(jax.vmap(value)(bandwidths), expected, rtol=1e-12)
  kernels = jax.tree.map(
    lambda *b: jnp.stack([jnp.asarray(v) for v in b]), *map(kipcore.rbf_fn, (0.5, 1.0, 2.0))
  )
  np.testing.assert_allclose(jax.vmap(lambda k: jnp.sum(k(x)))(kernels), expected, rtol=1e-12)
  slope = (value(1.0 + 1e-5) - value(1.0 - 1e-5)) / 2e-5
  np.testing.assert_allclose(jax.grad(value)(1.0), slope, rtol=1e-8)


# Functions of kernels that are compiled: the gradient by the kernel is a kernel.
USES = {
  "gram_matvec": lambda k, x, y: kipcore.gram_matvec(k, x, x, y, 4),
  "gram_diag": lambda k, x, y: kipcore.gram_diag(k, x, 4),
  "label_solve_rows": lambda k, x, y: (
    kipcore.label_solve_rows(k, x[:3], x, y, 0.5, block_size=4).labels
  ),
  "evaluate_krr": lambda k, x, y: (
    kipcore.evaluate_krr(k, kipcore.Support(x[:3], y[:3]), x, y, 0.5).loss
  ),
  "landmark_leverage_scores": lambda k, x, y: kipcore.landmark_leverage_scores(
    k, x, np.arange(3), 0.5
  ),
  **{
    f"blocked_krr_sensitivities.{part}": lambda k, x, y, part=part: getattr(
      kipcore.blocked_krr_sensitivities(k, x, y, 0.5, np.asarray([0, 1, 1, 0, 2, 1])), part
    )
    for part in ("scores", "leverage", "objective")
  },
  **{
    f"approximate_krr_sensitivities.{part}": lambda k, x, y, part=part: getattr(
      kipcore.approximate_krr_sensitivities(0, k, x, y, 0.5, 3, landmarks=np.arange(3)), part
    )
    for part in ("scores", "leverage")
  },
  "kip": lambda k, x, y: kipcore.kip(k, kipcore.KIPOptions(0.1)).loss(
    kipcore.kip(k).init_params(kipcore.Support(x[:3], y[:3])),
    (),
    kipcore.Batch(x, y),
    jnp.ones(6),
    None,
  )[0],
}


@pytest.mark.parametrize("name", USES)
def test_functions_of_kernels_are_differentiable_by_hyperparameters(name, x64):
  x, y = jnp.asarray(X), jnp.asarray(Y)
  kernel = 0.5 * kipcore.rbf_fn(1.3) + kipcore.linear_fn()
  f = lambda k: jnp.sum(jnp.sin(USES[name](k, x, y)))
  gradient = jax.grad(f)(kernel)
  assert type(gradient) is type(kernel)
  for i, slope in enumerate(jax.tree.leaves(gradient)):
    leaves, structure = jax.tree.flatten(kernel)
    values = [
      f(jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + h, *leaves[i + 1 :]]))
      for h in (1e-5, -1e-5)
    ]
    np.testing.assert_allclose(slope, (values[0] - values[1]) / 2e-5, rtol=1e-6)


def test_kernels_are_pytrees_of_their_numbers():
  kernel = kipcore.ntk_fn(kipcore.fc(1, 1.5, 0.25))
  assert jax.tree.leaves(kernel) == [1.5, 0.25, 1.5, 0.25]
  assert jax.tree.map(lambda v: v, kernel) == kernel
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(kernel)]
  assert paths[0] == ".arch.layers[1].w_std"
  # Transformations put anything at the leaves.
  assert jax.tree.map(lambda v: None, kipcore.rbf_fn(1.0)).bandwidth is None
  assert jax.eval_shape(lambda: kipcore.rbf_fn(1.0)).bandwidth.shape == ()


def test_kernels_are_equal_and_hashed_by_value():
  make = lambda b: 2.0 * kipcore.rbf_fn(b) + kipcore.ntk_fn(kipcore.fc(1, b, 0.25))
  kernels = [make(1.5), make(np.float32(1.5)), jax.tree.map(jnp.asarray, make(1.5))]
  assert len(set(kernels)) == 1 and kernels[0] == kernels[1] == kernels[2]
  assert make(1.5) != make(1.25) and make(1.5) != kipcore.rbf_fn(1.5)
  assert kipcore.ntk_fn(kipcore.fc(1)) != kipcore.ntk_fn(kipcore.fc(2))
  several = [
    jax.tree.map(lambda v: jnp.stack([v, v + i]), jax.tree.map(jnp.asarray, make(1.5)))
    for i in (1, 1, 2)
  ]
  assert several[0] == several[1] != several[2] and hash(several[0]) == hash(several[1])

  def traced(b):
    kernel = kipcore.rbf_fn(b)
    assert kernel == kernel and kernel != kipcore.rbf_fn(1.0)
    with pytest.raises(
      TypeError, match="RBFKernel: expected concrete numbers in order to hash it, got traced"
    ):
      hash(kernel)
    return b

  jax.jit(traced)(1.0)


def test_an_architecture_with_arrays_as_numbers_is_stored():
  arch = kipcore.fc(1, 1.5, 0.25)
  assert Architecture.from_json(jax.tree.map(jnp.asarray, arch).to_json()) == arch


def test_hyperparameters_take_the_dtype_of_the_rows(x64):
  rows = jnp.asarray(X, jnp.float32)
  for kernel in (
    kipcore.rbf_fn(1.5),
    2.0 * kipcore.ntk_fn(kipcore.fc(1)),
    kipcore.linear_fn() * kipcore.rbf_fn(2.0),
  ):
    kernel64 = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), kernel)
    for result in (kernel64(rows), kernel64.diag(rows), kernel64(rows, rows[:2])):
      assert result.dtype == jnp.float32
    np.testing.assert_array_equal(kernel64(rows), kernel(rows))
    assert kernel(jnp.asarray(X)).dtype == jnp.float64


SUMS = {
  "sum": (lambda a, b: a + b, np.add),
  "product": (lambda a, b: a * b, np.multiply),
  "multiple": (lambda a, b: 2.5 * (a * np.float64(2.0)), lambda a, b: 5 * a),
  "all": (lambda a, b: 0.5 * a * b + b * 3.0 + a, lambda a, b: 0.5 * a * b + 3 * b + a),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize(
  "other", [kipcore.nngp_fn(kipcore.fc(1)), user_kernel], ids=["nngp", "function"]
)
def test_sums_and_products_are_those_of_the_entries(name, other, x64):
  combine, expected = SUMS[name]
  first, x, z = kipcore.rbf_fn(1.5), jnp.asarray(X), jnp.asarray(Z)
  kernel = (
    combine(first, other)
    if name != "all" or other is not user_kernel
    else combine(kipcore.rbf_fn(1.5), first)
  )
  second = other if name != "all" or other is not user_kernel else first
  assert_close(kernel(x, z), expected(first(x, z), second(x, z)), 1e-14)
  k = kernel(x)
  assert_close(k, expected(first(x), second(x, None)), 1e-14)
  assert_close(kernel.diag(x), np.diag(k), 1e-13)
  assert_close(kipcore.gram(kernel, x, None, 4), k, 1e-14)
  assert_close(kipcore.gram_matvec(kernel, x, z, jnp.asarray(Z)), kernel(x, z) @ Z, 1e-13)
  assert np.linalg.eigvalsh(k).min() > -1e-12


def test_functions_of_users_are_on_either_side(x64):
  x, rbf = jnp.asarray(X), kipcore.rbf_fn(1.5)
  expected = rbf(x) + user_kernel(x)
  for kernel in (rbf + user_kernel, user_kernel + rbf):
    assert_close(kernel(x), expected, 1e-14)
  assert_close((user_kernel * rbf)(x), rbf(x) * user_kernel(x), 1e-14)
  assert rbf + user_kernel == kipcore.rbf_fn(1.5) + user_kernel
  assert (rbf + rbf) + user_kernel == rbf + (rbf + user_kernel)


def test_sums_work_in_scores_and_distillation():
  kernel, x, y = (
    0.5 * kipcore.rbf_fn(1.3) + kipcore.linear_fn(),
    *(jnp.asarray(a, jnp.float32) for a in (X, Y)),
  )
  exact = kipcore.krr_sensitivities(kernel(x), y, 0.5)
  upper = kipcore.approximate_krr_sensitivities(0, kernel, x, y, 0.5, 3).scores
  assert (upper >= exact - 1e-5).all()
  assert kipcore.kip(kernel) == kipcore.kip(0.5 * kipcore.rbf_fn(1.3) + kipcore.linear_fn())
  assert hash(kipcore.kip(kernel)) == hash(
    kipcore.kip(0.5 * kipcore.rbf_fn(1.3) + kipcore.linear_fn())
  )


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf, True, "2", None])
def test_factors_are_numbers_that_are_not_negative(scale):
  for multiply in (lambda k: scale * k, lambda k: k * scale):
    with pytest.raises((TypeError, ValueError), match="scale: expected"):
      multiply(kipcore.rbf_fn(1.0))
  with pytest.raises(TypeError):
    kipcore.rbf_fn(1.0) + 1.0


SMOOTH = {
  "rbf": (lambda p: kipcore.rbf_fn(p), X),
  "ntk": (lambda p: kipcore.ntk_fn(kipcore.fc(1, p)), X),
  "convolutional": (lambda p: kipcore.ntk_fn(kipcore.conv_net(1, p)), IMAGES[:, :2, :2]),
  "combination": (
    lambda p: p * kipcore.rbf_fn(p) * kipcore.linear_fn() + kipcore.nngp_fn(kipcore.fc(1, p)),
    X,
  ),
}


@pytest.mark.parametrize("name", slow_except(SMOOTH, "ntk", "combination", "rbf"))
def test_second_derivatives_at_identical_rows_are_finite(name, x64):
  """By the position of one of two equal rows and by a hyperparameter."""
  make, rows = SMOOTH[name]
  x = jnp.asarray(rows)[:1]
  v = jnp.asarray(np.random.default_rng(3).normal(size=x.shape))

  def f(p):
    pair = jnp.concatenate([x + p[0] * v, x])  # equal at p = (0, b)
    return jnp.sum(make(p[1])(pair)) + jnp.sum(make(p[1])(pair, x))

  second = jax.jit(jax.hessian(f))(jnp.asarray([0.0, 1.5]))
  assert np.isfinite(second).all() and second[0, 0] != 0
  if (
    name == "rbf"
  ):  # the entries (0, 1) and (1, 0) of the first matrix and (0, 0) of the second move
    np.testing.assert_allclose(second[0, 0], -3 * jnp.sum(v**2) / 1.5**2, rtol=1e-10)


def test_one_program_serves_all_values():
  with enable_x64(False):
    x = jnp.asarray(X, jnp.float32)
    made = lambda b: kipcore.gram(
      b * kipcore.rbf_fn(b) + kipcore.ntk_fn(kipcore.fc(1, b)), x, None, 4
    )
    made(1.0)
    size = _cache_size()
    for b in (1.5, np.float64(2.0), jnp.asarray(2.5)):
      made(b)
    assert _cache_size() == size


BUDGETED = {
  "rbf": kipcore.rbf_fn(2.0),
  "combination": kipcore.rbf_fn(2.0) * kipcore.linear_fn() + kipcore.ntk_fn(kipcore.fc(2)),
  # Sorts 64 numbers for each entry.
  "function": lambda x1, x2=None: jnp.mean(
    jnp.sort(jnp.abs(x1[:, None] - (x1 if x2 is None else x2)[None]), axis=-1)[..., :8], axis=-1
  ),
}
# At least, in budgets, without one; XLA of JAX 0.7 computes the first in place.
SCRATCH = {"rbf": 0.0, "combination": 2.0, "function": 500.0}


@pytest.mark.parametrize("name", BUDGETED)
def test_a_memory_budget_bounds_the_scratch_memory(name):
  kernel, n, d, budget = BUDGETED[name], 1500, 64, 1_000_000
  shape = jax.ShapeDtypeStruct((n, d), jnp.float32)

  def scratch(**options):
    fn = lambda x, z: kipcore.gram(kernel, x, z, **options)
    return jax.jit(fn).lower(shape, shape).compile().memory_analysis().temp_size_in_bytes

  copies = 2 * 4 * n * d  # rows, padded and divided into blocks
  assert scratch(memory_budget=budget) <= budget + copies
  assert scratch() > SCRATCH[name] * budget


def test_a_memory_budget_changes_no_values():
  x = jnp.asarray(np.random.default_rng(2).normal(size=(100, 4)), jnp.float32)
  kernel = kipcore.rbf_fn(2.0)
  assert_close(kipcore.gram(kernel, x, memory_budget=5000), kernel(x), 1e-6)
  assert_close(kipcore.gram(kernel, x, x[:7], memory_budget=10**9), kernel(x, x[:7]), 1e-6)
  with pytest.raises(
    ValueError,
    match="memory_budget: expected at least the .* bytes of one row of the kernel, got 10",
  ):
    kipcore.gram(kernel, x, memory_budget=10)
  with pytest.raises(
    ValueError, match="expected one of block_size and memory_budget, got 3 and 100"
  ):
    kipcore.gram(kernel, x, None, 3, memory_budget=100)


def _cache_size():
  from kipcore.kernels import gram

  return gram._gram._cache_size()
