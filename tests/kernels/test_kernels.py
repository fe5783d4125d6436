"""Kernels against neural-tangents, Monte Carlo networks, and identities."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, assert_close, enable_x64, slow_except, standard_promotion
from kernel_reference import combination, images, neural_tangents_kernel, value_and_gradient

import kipcore
from kipcore.architectures import architecture
from kipcore.kernels import NetworkKernel, dual, finite
from kipcore.kernels.stax import import_neural_tangents, to_stax

NAMES = ["fc1", "fc3", "conv2", "conv2_vec", "conv1_vec_gap", "conv2_gap", "myrtle5"]


# float64 of pooled networks: see also `test_conv.py`.
@pytest.mark.parametrize(
  "name, get, dtype",
  slow_except(
    [(name, "ntk", "float32") for name in NAMES]
    + [(name, "ntk", "float64") for name in ("fc1", "fc3", "conv2", "conv2_vec")]
    + [
      ("fc3", "nngp", "float32"),
      ("conv2_vec", "nngp", "float64"),
      ("conv2_gap", "nngp", "float32"),
    ],
    ("conv1_vec_gap", "ntk", "float32"),
    ("fc3", "ntk", "float64"),
    ("fc3", "nngp", "float32"),
  ),
)
def test_equals_neural_tangents(name, get, dtype):
  arch, dtype = architecture(name), np.dtype(dtype)
  x1, x2 = images(dtype)
  kernel = NetworkKernel(arch, get)
  for other in (None, x2):
    expected, expected_gradient = neural_tangents_kernel(arch, get, x1, other)
    with enable_x64(dtype == np.float64):
      value, gradient = value_and_gradient(
        kernel, jnp.asarray(x1), other if other is None else jnp.asarray(other)
      )
    rtol, coincident = RTOL[dtype.name], RTOL[dtype.name]
    distinct = np.ones(value.shape, bool)
    if other is None:
      # At parallel rows neural-tangents takes sqrt(v1 v2 - k^2) of rounding noise: half of the
      # digits of its NTK are lost, in float64 too. `test_diagonal_is_exact` checks kipcore there.
      distinct[:3, :3], coincident = False, {"float32": 2e-4, "float64": 1e-6}[dtype.name]
      distinct[3, 3] = False
    np.testing.assert_allclose(np.asarray(value)[distinct], expected[distinct], rtol=rtol)
    np.testing.assert_allclose(np.asarray(value), expected, rtol=coincident)
    assert_close(gradient, expected_gradient, rtol=coincident)


@pytest.mark.parametrize("depth", [1, 3])
def test_diagonal_is_exact(depth, dtype):
  """Against the recursion at angle 0 in float64 NumPy; also equal and rescaled rows."""
  x, _ = images(dtype)
  q = np.mean(x.astype(np.float64).reshape(4, -1) ** 2, axis=1)
  q = 2 * q + 0.01
  theta = q
  for _ in range(depth):
    q = 2 * (q / 2) + 0.01
    theta = q + 2 * theta / 2
  k = np.asarray(kipcore.ntk_fn(kipcore.fc(depth))(jnp.asarray(x)))
  np.testing.assert_allclose(np.diag(k), theta, rtol=RTOL[dtype.name] / 10)
  np.testing.assert_allclose(k[0, 1], theta[0], rtol=2 * depth * np.sqrt(np.finfo(dtype).eps))


@pytest.mark.parametrize(
  "dtype, name",
  slow_except(
    [
      (dtype, name)
      for name in ("fc2", "conv2", "conv2_vec", "myrtle5")
      for dtype in ("float32", "float64")
    ],
    ("float32", "fc2"),
    ("float64", "fc2"),
    ("float32", "conv2"),
    ("float64", "conv2_vec"),
  ),
  indirect=["dtype"],
)
def test_diagonal_and_symmetry(name, dtype):
  kernel = kipcore.ntk_fn(architecture(name))
  x, _ = images(dtype)
  k = np.asarray(kernel(jnp.asarray(x)))
  np.testing.assert_allclose(
    np.diag(k), np.asarray(kernel.diag(jnp.asarray(x))), rtol=RTOL[dtype.name]
  )
  np.testing.assert_allclose(k, k.T, rtol=RTOL[dtype.name])
  assert np.linalg.eigvalsh(k.astype(np.float64)).min() > -1e-5 * np.trace(k)


@pytest.mark.parametrize("name", slow_except(["fc2", "conv2", "conv2_vec_gap"], "fc2"))
def test_tiles_and_blocks_do_not_change_values(name, x64):
  arch = architecture(name)
  x1, x2 = (jnp.asarray(x) for x in images(np.float64, 5, 7))
  kernel, tiled = NetworkKernel(arch, "ntk"), NetworkKernel(arch, "ntk", tile_elements=300)
  two, one = jax.jit(kernel)(x1, x2), jax.jit(kernel)(x1)
  assert_close(jax.jit(tiled)(x1, x2), two, rtol=1e-13)
  gram = jax.jit(kipcore.gram, static_argnums=(0, 3))
  for block_size in (2, 5):
    assert_close(gram(kernel, x1, x2, block_size), two, rtol=1e-13)
    assert_close(gram(kernel, x1, None, block_size), one, rtol=1e-7)
    assert_close(kipcore.gram_diag(kernel, x1, block_size), jnp.diagonal(one), rtol=1e-13)


@pytest.mark.parametrize("name", slow_except(["fc2", "conv2", "conv2_vec"], "fc2", "conv2_vec"))
def test_gradient_equals_finite_differences(name, x64):
  kernel = kipcore.ntk_fn(architecture(name))
  rng = np.random.default_rng(2)
  x, v = jnp.asarray(rng.normal(size=(3, 6, 6, 2))), jnp.asarray(rng.normal(size=(3, 6, 6, 2)))
  w = jnp.asarray(combination((3, 3)))
  f = lambda x: jnp.sum(w * kernel(x))
  f = jax.jit(f)
  slope = jnp.vdot(jax.jit(jax.grad(f))(x), v)
  h = 1e-5
  np.testing.assert_allclose(slope, (f(x + h * v) - f(x - h * v)) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("b_std", slow_except([0.0, 0.1], 0.0))
@pytest.mark.parametrize("make, depth", [(kipcore.fc, 2), (kipcore.conv_net, 1)])
@FLOAT64_IS_SLOW
def test_gradients_stay_finite_at_degenerate_rows(make, depth, b_std, dtype):
  kernel = kipcore.ntk_fn(make(depth, b_std=b_std))
  x, _ = images(dtype, 7)
  x[3], x[4], x[5] = 0.0, -x[0], 1.0
  for other in (None, jnp.asarray(x)):
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(kernel(x, other) ** 2)))(
      jnp.asarray(x)
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_gradient_is_finite_where_that_of_arccos_is_nan(x64):
  naive = lambda k, v: (jnp.pi - jnp.arccos(k / v)) / (2 * jnp.pi)
  assert np.isnan(jax.grad(lambda v: naive(v, v))(jnp.float64(2.0)))
  assert jax.grad(lambda v: dual.relu_dual(v, v, v)[1])(jnp.float64(2.0)) == 0.0


def test_relu_dual_equals_quadrature(x64):
  """Quadrature of E relu(u) relu(v) and of its step derivative over the polar angle."""
  v1, v2 = 1.3, 0.7
  for c in (-0.99, -0.3, 0.0, 0.6, 0.999):
    angle = np.linspace(0, 2 * np.pi, 200_001)[:-1]
    u, v = np.cos(angle), c * np.cos(angle) + np.sqrt(1 - c * c) * np.sin(angle)
    radial = 2.0  # E r^2 of a 2-d standard normal
    first = np.sqrt(v1 * v2) * radial * np.mean(np.maximum(u, 0) * np.maximum(v, 0))
    second = np.mean((u > 0) & (v > 0))
    ours = dual.relu_dual(jnp.float64(c * np.sqrt(v1 * v2)), jnp.float64(v1), jnp.float64(v2))
    np.testing.assert_allclose(ours, (first, second), rtol=2e-5, atol=1e-5)


def test_bias_free_kernel_is_homogeneous(x64):
  kernel = kipcore.ntk_fn(kipcore.fc(2, b_std=0.0))
  x1, x2 = (jnp.asarray(x) for x in images(np.float64))
  assert_close(kernel(3.0 * x1, 0.5 * x2), 1.5 * kernel(x1, x2), rtol=1e-12)


@pytest.mark.parametrize("name", slow_except(["fc2", "conv2", "conv1_vec_gap"], "conv1_vec_gap"))
def test_monte_carlo_of_flax_networks_matches_the_kernel(name):
  """The mean over random networks is within 5 standard errors (and 3 % for the finite width)."""
  arch = architecture(name)
  x = np.random.default_rng(3).normal(size=(3, 4, 4, 2)).astype(np.float32)
  one, many = (
    kipcore.network(arch, width=256, num_outputs=c, parameterization="ntk") for c in (1, 64)
  )

  @jax.jit
  def draw(key):
    ntk = finite.empirical_ntk(one.apply, one.init(key, x), x)
    return ntk, finite.empirical_nngp(many.apply, many.init(key, x), x)

  with standard_promotion():
    ntks, nngps = zip(*(draw(key) for key in jax.random.split(jax.random.key(0), 100)))
  for draws, exact in ((ntks, kipcore.ntk_fn(arch)), (nngps, kipcore.nngp_fn(arch))):
    draws, exact = np.asarray(draws, np.float64), np.asarray(exact(jnp.asarray(x)), np.float64)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - exact) < 5 * error + 0.03 * np.abs(exact)).all()
    assert np.abs(draws.mean(0) - exact).max() < 0.1 * np.abs(exact).max()


def test_parameterizations_draw_the_same_distribution_of_functions():
  arch = kipcore.conv_net(1)
  x = np.random.default_rng(4).normal(size=(2, 4, 4, 2)).astype(np.float32)
  moments = []
  for parameterization in ("ntk", "standard"):
    module = kipcore.network(arch, 64, 256, parameterization)
    f = [
      np.asarray(module.apply(module.init(key, x), x))
      for key in jax.random.split(jax.random.key(1), 20)
    ]
    moments.append(np.mean(np.square(f), axis=(0, 2)))
  np.testing.assert_allclose(*moments, rtol=0.25)


def test_importing_neural_tangents_leaves_jax_unchanged():
  """The moved names exist only during its import; TensorFlow is not imported."""
  code = (
    "import sys, jax, jax.core\nbefore = set(dir(jax.core)) | set(dir(jax.interpreters.ad))\n"
    "from kipcore.kernels.stax import import_neural_tangents\n"
    "assert 'neural_tangents' not in sys.modules\nnt = import_neural_tangents()\n"
    "assert (set(dir(jax.core)) | set(dir(jax.interpreters.ad))) == before\n"
    "assert nt.stax.Dense and nt is import_neural_tangents() and 'tensorflow' not in sys.modules\n"
    "assert 'neural_tangents.experimental' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_neural_tangents_is_reported_in_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "neural_tangents", None)
  command = r"pip install 'kipcore\[neural-tangents\]'"
  with pytest.raises(
    ImportError, match=f"^expected neural-tangents to be installed, got .*; {command}$"
  ):
    to_stax(kipcore.fc(1))


@FLOAT64_IS_SLOW
@pytest.mark.slow
def test_neural_tangents_empirical_kernel_runs(dtype):
  nt = import_neural_tangents()
  arch = kipcore.fc(1)
  init, apply, _ = to_stax(arch, width=16)
  x = images(dtype)[0].reshape(4, -1)
  with standard_promotion():
    _, params = init(jax.random.PRNGKey(0), x.shape)
    theirs = nt.empirical_ntk_fn(apply, implementation=nt.NtkImplementation.JACOBIAN_CONTRACTION)(
      x, None, params
    )
  assert_close(finite.empirical_ntk(apply, params, jnp.asarray(x)), theirs, rtol=RTOL[dtype.name])


def test_simple_kernels_equal_scikit_learn(dtype):
  from sklearn.metrics import pairwise

  x1, x2 = (x.reshape(len(x), -1) for x in images(dtype))
  assert_close(
    kipcore.linear_fn()(jnp.asarray(x1), jnp.asarray(x2)), x1 @ x2.T, rtol=RTOL[dtype.name]
  )
  expected = pairwise.rbf_kernel(x1.astype(np.float64), x2, gamma=0.5 / 20.0**2)
  assert_close(
    kipcore.rbf_fn(20.0)(jnp.asarray(x1), jnp.asarray(x2)), expected, rtol=RTOL[dtype.name]
  )


@pytest.mark.parametrize("mean, features, bandwidth", [(128, 3072, 55.0), (1000, 8, 1.0)])
def test_rbf_kernel_does_not_depend_on_the_mean(mean, features, bandwidth):
  """float32 rows far from the origin, against their differences in float64."""
  x = (mean + np.random.default_rng(0).normal(size=(100, features))).astype(np.float32)
  squared = np.stack([((row - x.astype(np.float64)) ** 2).sum(-1) for row in x.astype(np.float64)])
  expected = np.exp(-0.5 * squared / bandwidth**2)
  kernel = kipcore.rbf_fn(bandwidth)
  k = np.asarray(kernel(jnp.asarray(x)))
  np.testing.assert_array_equal(np.diag(k), 1)
  np.testing.assert_array_equal(kernel.diag(jnp.asarray(x)), 1)
  assert_close(k, expected, rtol=1e-5)
  assert_close(kernel(jnp.asarray(x[:7]), jnp.asarray(x)), expected[:7], rtol=1e-5)
  assert_close(kipcore.gram(kernel, x, None, 30), expected, rtol=1e-5)
  assert np.linalg.eigvalsh(k.astype(np.float64)).min() > -1e-5


def test_rbf_kernel_has_exact_second_derivatives_at_equal_rows(x64):
  """d^2 k / dx dx' = I / bandwidth^2 at x = x'."""
  kernel, x = kipcore.rbf_fn(2.0), jnp.asarray([[1.0, -3.0]])
  mixed = jax.jacfwd(jax.jacrev(lambda a, b: kernel(a, b)[0, 0]), argnums=1)(x, x)
  np.testing.assert_allclose(mixed.reshape(2, 2), np.eye(2) / 4, rtol=1e-12, atol=1e-12)


def test_zero_rows_give_an_empty_matrix():
  x, _ = images(np.float32)
  for name in ("fc1", "conv1"):
    kernel = kipcore.ntk_fn(architecture(name))
    assert kernel(jnp.asarray(x[:0]), jnp.asarray(x)).shape == (0, 4)
    assert kernel.diag(jnp.asarray(x[:0])).shape == (0,)
    assert kernel(jnp.asarray(x[:1])).shape == (1, 1)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda x: kipcore.ntk_fn(kipcore.conv_net(1))(x.reshape(4, -1)), "expected NHWC images"),
    (lambda x: kipcore.ntk_fn(kipcore.conv_net(4))(x), "too small for the pooling"),
    (lambda x: kipcore.ntk_fn(kipcore.fc(1))(x, x[:, :2]), "expected rows of one shape"),
    (lambda x: kipcore.gram(kipcore.linear_fn(), x, x, 0), "positive integer"),
    (lambda x: kipcore.rbf_fn(0.0), "bandwidth"),
    (lambda x: kipcore.from_stax(None, "both"), "get: expected one of ntk, nngp"),
    (lambda x: architecture("vgg16"), "got 'vgg16'"),
    (lambda x: kipcore.fc(0), "depth"),
    (lambda x: kipcore.myrtle(6), "expected one of 5, 7, 10"),
    (lambda x: kipcore.Architecture("a", (kipcore.architectures.Relu(),)), "Dense readout"),
    (lambda x: kipcore.Architecture.from_json("{}"), "expected the JSON of an architecture"),
  ],
)
def test_wrong_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.asarray(images(np.float32)[0]))


def test_integers_are_rejected():
  with pytest.raises(TypeError, match="floating"):
    kipcore.ntk_fn(kipcore.fc(1))(jnp.ones((2, 3), jnp.int32))


@pytest.mark.parametrize("name", NAMES + ["myrtle7", "myrtle10", "conv3"])
def test_descriptions_round_trip_through_json_and_hashing(name):
  arch = architecture(name)
  assert arch.name == name
  copy = kipcore.Architecture.from_json(arch.to_json())
  assert copy == arch and hash(copy) == hash(arch)


@pytest.mark.slow
def test_many_pairs_without_pooling_equal_few():
  """A mean of products over patches, mapped over 60 x 60 pairs, was miscompiled on CPU."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(60, 28, 28, 1)), jnp.float32)
  kernel = kipcore.ntk_fn(kipcore.architecture("conv1_vec"))
  many = kernel(x, None)
  few = jnp.concatenate([kernel(x[i : i + 10], x) for i in range(0, 60, 10)])
  assert_close(many, few, 1e-5)
  assert_close(many, many.T, 1e-6)
  for i in (0, 41):
    assert_close(many[i, 40:50], kernel(x[i : i + 1], x[40:50])[0], 1e-5)
