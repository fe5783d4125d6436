"""Duals of activations against quadrature and neural-tangents, and the kernels built from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, assert_close, slow_except, standard_promotion
from kernel_reference import images, neural_tangents_kernel, value_and_gradient
from scipy import special

import kipcore
from kipcore.architectures import (
  ACTIVATIONS,
  Architecture,
  Dense,
  Flatten,
  Identity,
  LeakyRelu,
  Relu,
  architecture,
)
from kipcore.kernels import NetworkKernel, dual, finite

SMOOTH = {
  "erf": (special.erf, lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x)),
  "gelu": (
    lambda x: x * special.ndtr(x),
    lambda x: special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi),
  ),
  "identity": (lambda x: x, np.ones_like),
}


def gauss_hermite(fn, c, v1, v2, nodes=120):
  """E fn(u) fn(v) over the Gaussian of variances v1, v2 and correlation c, in float64 NumPy."""
  x, w = np.polynomial.hermite_e.hermegauss(nodes)
  u = np.sqrt(v1) * x[:, None]
  v = np.sqrt(v2) * (c * x[:, None] + np.sqrt(1 - c * c) * x[None])
  return np.sum(w[:, None] * w[None] * fn(u) * fn(v)) / (2 * np.pi)


def cases():
  return [
    (c, v1, v2)
    for c in (-0.95, -0.3, 0.0, 0.6, 0.99)
    for v1, v2 in ((1.3, 0.7), (0.05, 2.0), (3.0, 3.0))
  ]


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_equal_quadrature(name, x64):
  for c, v1, v2 in cases():
    ours = dual.activation(
      ACTIVATIONS[name], *(jnp.float64(a) for a in (c * np.sqrt(v1 * v2), v1, v2))
    )
    expected = [gauss_hermite(fn, c, v1, v2) for fn in SMOOTH[name]]
    np.testing.assert_allclose(np.array(ours, float), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("slope", [-1.0, -0.2, 0.0, 0.01, 0.3, 1.0, 1.5])
def test_leaky_relu_dual_equals_quadrature_over_the_angle(slope, x64):
  angle = np.linspace(0, 2 * np.pi, 200_001)[:-1]
  for c, v1, v2 in cases():
    u, v = np.cos(angle), c * np.cos(angle) + np.sqrt(1 - c * c) * np.sin(angle)
    value = (
      2 * np.sqrt(v1 * v2) * np.mean(np.where(u > 0, u, slope * u) * np.where(v > 0, v, slope * v))
    )
    derivative = np.mean(np.where(u > 0, 1, slope) * np.where(v > 0, 1, slope))
    ours = dual.activation(
      LeakyRelu(slope), *(jnp.float64(a) for a in (c * np.sqrt(v1 * v2), v1, v2))
    )
    np.testing.assert_allclose(ours, (value, derivative), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_duals_of_a_point_with_itself(name, x64):
  v = jnp.asarray([0.0, 1e-6, 0.3, 2.0, 50.0])
  np.testing.assert_allclose(
    *(
      np.broadcast_to(a[0], v.shape)
      for a in (
        dual.activation(ACTIVATIONS[name], v, v, v),
        dual.activation_diag(ACTIVATIONS[name], v),
      )
    ),
    rtol=1e-12,
  )
  positive = v[1:]
  np.testing.assert_allclose(
    *(
      np.broadcast_to(a[1], positive.shape)
      for a in (
        dual.activation(ACTIVATIONS[name], positive, positive, positive),
        dual.activation_diag(ACTIVATIONS[name], positive),
      )
    ),
    rtol=1e-12,
  )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_dual_is_the_derivative_of_the_first(name, x64):
  """Price's theorem: d E[phi phi] / dk = E[phi' phi'], by finite differences."""
  f = lambda k: dual.activation(ACTIVATIONS[name], *(jnp.float64(a) for a in (k, 1.3, 0.7)))
  for k in (-0.7, 0.1, 0.8):
    np.testing.assert_allclose((f(k + 1e-6)[0] - f(k - 1e-6)[0]) / 2e-6, f(k)[1], rtol=1e-7)


@pytest.mark.parametrize(
  "name",
  slow_except(
    ["fc2_leaky_relu", "fc2_erf", "fc2_gelu", "fc1_identity", "conv1_gelu", "conv1_vec_erf"],
    "fc2_gelu",
    "fc1_identity",
    "conv1_vec_erf",
  ),
)
@FLOAT64_IS_SLOW
def test_kernels_equal_neural_tangents(name, dtype):
  arch = architecture(name)
  x1, x2 = images(dtype)
  x1 = x1[[0, 3]]  # neural-tangents itself is imprecise at parallel rows
  for other in (None, x2):
    expected, expected_gradient = neural_tangents_kernel(arch, "ntk", x1, other)
    value, gradient = value_and_gradient(
      NetworkKernel(arch, "ntk"), jnp.asarray(x1), other if other is None else jnp.asarray(other)
    )
    assert_close(value, expected, rtol=RTOL[dtype.name])
    assert_close(gradient, expected_gradient, rtol=4 * RTOL[dtype.name])


@pytest.mark.parametrize("slope", slow_except([-3.0, -1.0, -0.2], -0.2))
def test_negative_slopes_equal_neural_tangents(slope, x64):
  """Slope -1 is the absolute value; values and gradients of the kernel, NTK and NNGP."""
  layers = (Flatten(), Dense(), LeakyRelu(slope), Dense(), LeakyRelu(slope), Dense())
  arch = Architecture("leaky", layers)
  x1, x2 = images(np.float64)
  x1 = x1[[0, 3]]  # neural-tangents itself is imprecise at parallel rows
  for get in ("ntk", "nngp"):
    for other in (None, x2):
      expected = neural_tangents_kernel(arch, get, x1, other)
      kernel = NetworkKernel(arch, get)
      other = other if other is None else jnp.asarray(other)
      for ours, theirs in zip(value_and_gradient(kernel, jnp.asarray(x1), other), expected):
        assert_close(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("slope", [-2.0, -1.0, 0.5])
def test_leaky_relu_dual_equals_monte_carlo(slope, x64):
  """Within 5 standard errors of the mean over a million Gaussian pairs."""
  v1, v2, c = 1.3, 0.7, -0.4
  z = np.random.default_rng(0).normal(size=(2, 1_000_000))
  u, v = np.sqrt(v1) * z[0], np.sqrt(v2) * (c * z[0] + np.sqrt(1 - c * c) * z[1])
  phi, step = lambda a: np.where(a > 0, a, slope * a), lambda a: np.where(a > 0, 1, slope)
  ours = dual.activation(
    LeakyRelu(slope), *(jnp.float64(a) for a in (c * np.sqrt(v1 * v2), v1, v2))
  )
  for value, draws in zip(ours, (phi(u) * phi(v), step(u) * step(v))):
    assert abs(value - draws.mean()) < 5 * draws.std() / 1000


@pytest.mark.parametrize("slope", [-1.0, -0.3])
def test_flax_networks_have_negative_slopes(slope):
  """A network of one unit is the activation of an affine map; its NTK converges to the kernel."""
  arch = Architecture("one", (Flatten(), Dense(), LeakyRelu(slope), Dense(b_std=0.0)))
  module = kipcore.network(arch, width=1, num_outputs=1)
  x = jnp.linspace(-2, 2, 9)[:, None]
  variables = jax.tree.map(jnp.ones_like, module.init(jax.random.key(0), x))
  bias = {key: 0 * value for key, value in variables["params"].items() if key.startswith("bias")}
  out = module.apply({"params": {**variables["params"], **bias}}, x)
  np.testing.assert_allclose(out, np.where(x > 0, x, slope * x), atol=1e-6)
  wide = kipcore.network(arch, width=4096, num_outputs=1, parameterization="ntk")
  rows = jnp.asarray(np.random.default_rng(3).normal(size=(3, 5)), jnp.float32)
  draws = [
    finite.empirical_ntk(wide.apply, wide.init(jax.random.key(seed), rows), rows)
    for seed in range(8)
  ]
  assert_close(np.mean(draws, axis=0), kipcore.ntk_fn(arch)(rows), rtol=0.05)


def test_finite_networks_converge_to_the_gelu_kernel():
  """The mean over random Flax networks is within 5 standard errors, and 3 % for the finite width."""
  arch = architecture("fc2_gelu")
  x = np.random.default_rng(3).normal(size=(3, 4, 4, 2)).astype(np.float32)
  module = kipcore.network(arch, width=256, num_outputs=1, parameterization="ntk")

  @jax.jit
  def draw(key):
    return finite.empirical_ntk(module.apply, module.init(key, x), x)

  with standard_promotion():
    draws = np.asarray([draw(key) for key in jax.random.split(jax.random.key(0), 100)], np.float64)
  exact = np.asarray(kipcore.ntk_fn(arch)(jnp.asarray(x)), np.float64)
  error = draws.std(0, ddof=1) / np.sqrt(len(draws))
  assert (np.abs(draws.mean(0) - exact) < 5 * error + 0.03 * np.abs(exact)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_flax_networks_use_the_activation(name):
  """A network of one unit is the activation of an affine map."""
  arch = Architecture("one", (Flatten(), Dense(), ACTIVATIONS[name], Dense(b_std=0.0)))
  module = kipcore.network(arch, width=1, num_outputs=1)
  x = jnp.linspace(-2, 2, 9)[:, None]
  variables = jax.tree.map(jnp.ones_like, module.init(jax.random.key(0), x))
  bias = {key: 0 * value for key, value in variables["params"].items() if key.startswith("bias")}
  out = module.apply({"params": {**variables["params"], **bias}}, x)
  numpy = {
    "relu": lambda a: np.maximum(a, 0),
    "leaky_relu": lambda a: np.where(a > 0, a, 0.01 * a),
    **{key: fns[0] for key, fns in SMOOTH.items()},
  }
  np.testing.assert_allclose(out, numpy[name](np.asarray(x)), atol=1e-6)


def test_arccos_is_accurate(dtype):
  c = np.linspace(-1, 1, 100_001).astype(dtype)
  error = np.abs(
    np.asarray(dual._arccos(jnp.asarray(c)), np.float64) - np.arccos(c.astype(np.float64))
  ).max()
  assert error < (5e-7 if dtype == np.float32 else 1e-15)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: architecture("fc1_swish"), "_gelu, _identity"),
    (lambda: kipcore.fc(1, activation="swish"), "activation: expected one of relu"),
    (lambda: architecture("fc1_vec"), "expected fc1"),
    (lambda: architecture("myrtle6_erf"), "myrtle5"),
    (
      lambda: Architecture("a", (Flatten(), Dense(), LeakyRelu(float("inf")), Dense())),
      r"expected \|slope\| below 1e\+06",
    ),
    (lambda: Architecture("a", (Flatten(), Relu(), Dense())), "expected a Dense or Conv in front"),
    (lambda: Architecture("a", (Flatten(), Dense(), Relu(), Identity(), Dense())), "not Gaussian"),
  ],
)
def test_wrong_descriptions_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize("name", ["fc2_leaky_relu", "conv3_vec_gap_erf", "myrtle7_gelu"])
def test_names_round_trip_through_json(name):
  arch = architecture(name)
  assert arch.name == name and kipcore.Architecture.from_json(arch.to_json()) == arch
