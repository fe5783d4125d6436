"""Classes of arguments over all functions of kernels, ridge regression, networks and evaluation.

Optional arrays of a wrong shape, integer and half-precision arrays, NumPy scalars and booleans.
"""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers import assert_close, slow_except

import kipcore
from kipcore.architectures import AvgPool, Conv, Dense, LeakyRelu
from kipcore.kernels import LinearKernel, NetworkKernel, RBFKernel, StaxKernel
from kipcore.preprocess import class_labels

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 3)).astype("f4"), RNG.normal(size=(6, 2)).astype("f4")
K = np.exp(-0.5 * ((X[:, None] - X[None]) ** 2).sum(-1))
IMAGES = RNG.normal(size=(6, 4, 4, 1)).astype("f4")
KERNEL = kipcore.rbf_fn(1.0)
SUPPORT = kipcore.Support(jnp.asarray(X[:4]), jnp.asarray(Y[:4]))
FIT = kipcore.krr_fit(K, Y, 0.1)


def linear_kernel_of_stax(x1, x2, get):
  return x1 @ (x1 if x2 is None else x2).T


KERNELS = {
  "dense": (NetworkKernel(kipcore.fc(1), "ntk"), X),
  "convolutional": (NetworkKernel(kipcore.conv_net(1), "nngp"), IMAGES),
  "rbf": (RBFKernel(1.0), X),
  "linear": (LinearKernel(), X),
  "stax": (StaxKernel(linear_kernel_of_stax), X),
  "combination": (2.0 * RBFKernel(1.0) * LinearKernel() + NetworkKernel(kipcore.fc(1), "nngp"), X),
}

# name of the argument, its size, and the call; each is per row, in the shape (n,).
PER_ROW = {
  "krr_loss weights": ("weights", 6, lambda w: kipcore.krr_loss(FIT, K, Y, w)),
  "krr_fit ridge": ("ridge", 6, lambda r: kipcore.krr_fit(K, Y, r)),
  "label_solve ridge": ("ridge", 6, lambda r: kipcore.label_solve(K, K, Y, r, 0.1)),
  "label_solve_rows ridge": (
    "ridge",
    4,
    lambda r: kipcore.label_solve_rows(KERNEL, X[:4], X, Y, r, 0.1),
  ),
  "evaluate_krr ridge": ("ridge", 4, lambda r: kipcore.evaluate_krr(KERNEL, SUPPORT, X, Y, r)),
}


@pytest.mark.parametrize("name", PER_ROW)
def test_optional_arrays_do_not_broadcast(name):
  argument, n, call = PER_ROW[name]
  assert np.isfinite(call(np.full(n, 0.5, "f4"))[0]).all()
  for shape in [(n, 1), (1,), (1, n), (n + 1,), ()]:
    if shape == () and argument == "ridge":
      continue  # a scalar ridge is documented
    with pytest.raises(ValueError, match=rf"{argument}: expected shape \({n},\)"):
      call(np.full(shape, 0.5, "f4"))


@pytest.mark.parametrize("name", PER_ROW)
def test_optional_arrays_contain_valid_numbers(name):
  argument, n, call = PER_ROW[name]
  for value in (np.nan, -1.0, np.inf):
    bad = np.full(n, 0.5, "f4")
    bad[1] = value
    with pytest.raises(ValueError, match=f"{argument}: expected"):
      call(bad)
  with pytest.raises(TypeError, match=f"{argument}: expected a real number"):
    call(np.ones(n, bool))


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (2, 3, 1)])
def test_second_rows_have_the_shape_of_the_first(shape):
  other = np.ones(shape, "f4")
  for call in (
    lambda: KERNEL(X, other),
    lambda: kipcore.gram(KERNEL, X, other),
    lambda: kipcore.gram(KERNEL, X, other, 2),
    lambda: kipcore.gram_matvec(KERNEL, X, other, Y),
  ):
    with pytest.raises(ValueError, match="expected rows"):
      call()


@pytest.mark.parametrize("shape", [(6,), (5, 2), (1, 2), (), (6, 2, 1)])
def test_vectors_of_products_have_the_rows_of_the_kernel(shape):
  with pytest.raises(ValueError, match=r"v: expected shape \(6, 'any'\)"):
    kipcore.gram_matvec(KERNEL, X, X, np.ones(shape, "f4"))


# Each with one array as its argument, in a dtype that is not floating.
FLOATING = {
  **{f"{name} x1": lambda x, k=k, a=a: k(x(a)) for name, (k, a) in KERNELS.items()},
  **{f"{name} x2": lambda x, k=k, a=a: k(a, x(a)) for name, (k, a) in KERNELS.items()},
  **{f"{name} diag": lambda x, k=k, a=a: k.diag(x(a)) for name, (k, a) in KERNELS.items()},
  "gram x1": lambda x: kipcore.gram(KERNEL, x(X), X),
  "gram x2": lambda x: kipcore.gram(KERNEL, X, x(X), 4),
  "gram_diag": lambda x: kipcore.gram_diag(KERNEL, x(X)),
  "gram_matvec x1": lambda x: kipcore.gram_matvec(KERNEL, x(X), X, Y),
  "gram_matvec x2": lambda x: kipcore.gram_matvec(KERNEL, X, x(X), Y),
  "gram_matvec v": lambda x: kipcore.gram_matvec(KERNEL, X, X, x(Y)),
  "krr_fit k_ss": lambda x: kipcore.krr_fit(x(K), Y, 0.1),
  "krr_fit y": lambda x: kipcore.krr_fit(K, x(Y), 0.1),
  "krr_predict": lambda x: kipcore.krr_predict(FIT, x(K)),
  "krr_loss k_ts": lambda x: kipcore.krr_loss(FIT, x(K), Y),
  "krr_loss y": lambda x: kipcore.krr_loss(FIT, K, x(Y)),
  "relative_ridge": lambda x: kipcore.relative_ridge(x(K), 0.1),
  "label_solve k_ss": lambda x: kipcore.label_solve(x(K), K, Y, 0.1),
  "label_solve k_ts": lambda x: kipcore.label_solve(K, x(K), Y, 0.1),
  "label_solve y": lambda x: kipcore.label_solve(K, K, x(Y), 0.1),
  "label_solve_rows x_support": lambda x: kipcore.label_solve_rows(KERNEL, x(X), X, Y, 0.1),
  "label_solve_rows x": lambda x: kipcore.label_solve_rows(KERNEL, X, x(X), Y, 0.1),
  "label_solve_rows y": lambda x: kipcore.label_solve_rows(KERNEL, X, X, x(Y), 0.1),
  "evaluate_krr support.x": lambda x: kipcore.evaluate_krr(
    KERNEL, kipcore.Support(x(X), Y), X, Y, 0.1
  ),
  "evaluate_krr support.y": lambda x: kipcore.evaluate_krr(
    KERNEL, kipcore.Support(X, x(Y)), X, Y, 0.1
  ),
  "evaluate_krr x": lambda x: kipcore.evaluate_krr(KERNEL, SUPPORT, x(X), Y, 0.1),
  "evaluate_krr y": lambda x: kipcore.evaluate_krr(KERNEL, SUPPORT, X, x(Y), 0.1),
  "gp_posterior k_ss": lambda x: kipcore.gp_posterior(x(K), K, K, Y, 0.1),
  "gp_posterior k_ts": lambda x: kipcore.gp_posterior(K, x(K), K, Y, 0.1),
  "gp_posterior k_tt": lambda x: kipcore.gp_posterior(K, K, x(K), Y, 0.1),
  "gp_posterior y": lambda x: kipcore.gp_posterior(K, K, K, x(Y), 0.1),
  "gp_log_likelihood k": lambda x: kipcore.gp_log_likelihood(x(K), Y, 0.1),
  "gp_log_likelihood y": lambda x: kipcore.gp_log_likelihood(K, x(Y), 0.1),
  "gradient_flow k_ss": lambda x: kipcore.gradient_flow(x(K), K, Y, 0.1),
  "gradient_flow k_ts": lambda x: kipcore.gradient_flow(K, x(K), Y, 0.1),
  "gradient_flow y": lambda x: kipcore.gradient_flow(K, K, x(Y), 0.1),
  "evaluate_network x": lambda x: kipcore.evaluate_network(0, kipcore.fc(1), SUPPORT, x(X), Y),
  "evaluate_network y": lambda x: kipcore.evaluate_network(0, kipcore.fc(1), SUPPORT, X, x(Y)),
}


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool, np.complex64])
def test_integers_booleans_and_complex_numbers_are_rejected(name, dtype):
  with pytest.raises(TypeError, match=f"expected a floating dtype, got {np.dtype(dtype).name}"):
    FLOATING[name](lambda array: (100 * np.abs(array)).astype(dtype))


@pytest.mark.parametrize("dtype", slow_except([jnp.float16, jnp.bfloat16], jnp.bfloat16))
@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_rows_are_computed_in_float32(name, dtype):
  kernel, x = KERNELS[name]
  half = jnp.asarray(x, dtype)
  single = half.astype(jnp.float32)
  for result, expected in (
    (kernel(half), kernel(single)),
    (kernel(half, half[:2]), kernel(single, single[:2])),
    (kernel.diag(half), kernel.diag(single)),
    (kipcore.gram(kernel, half, None, 4), kipcore.gram(kernel, single, None, 4)),
  ):
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_ridge_regression_is_computed_in_float32(dtype):
  k, y = jnp.asarray(K, dtype), jnp.asarray(Y, dtype)
  k32, y32 = k.astype(jnp.float32), y.astype(jnp.float32)
  fit, fit32 = kipcore.krr_fit(k, y, 0.5), kipcore.krr_fit(k32, y32, 0.5)
  assert fit.status == 0 and fit.dual.dtype == jnp.float32
  assert_close(fit.dual, fit32.dual, 1e-6)
  assert_close(kipcore.krr_predict(fit, k), kipcore.krr_predict(fit32, k32), 1e-6)
  assert_close(kipcore.krr_loss(fit, k, y).loss, kipcore.krr_loss(fit32, k32, y32).loss, 1e-5)
  posterior, posterior32 = (kipcore.gp_posterior(a, a, a, b, 0.5) for a, b in ((k, y), (k32, y32)))
  assert posterior.mean.dtype == posterior.covariance.dtype == jnp.float32
  assert_close(posterior.covariance, posterior32.covariance, 1e-5)
  flow, flow32 = (kipcore.gradient_flow(a, a, b, 2.0).predictions for a, b in ((k, y), (k32, y32)))
  assert flow.dtype == jnp.float32
  assert_close(flow, flow32, 1e-5)
  likelihood = kipcore.gp_log_likelihood(k, y, 0.5)
  assert likelihood.dtype == jnp.float32
  assert_close(likelihood, kipcore.gp_log_likelihood(k32, y32, 0.5), 1e-5)
  solved = kipcore.label_solve(k, k, y, 0.5)
  assert solved.dtype == jnp.float32
  assert_close(solved, kipcore.label_solve(k32, k32, y32, 0.5), 1e-5)


# A real argument of value 0.5, and a value that depends on it.
REALS = {
  "bandwidth": lambda v: kipcore.rbf_fn(v)(X),
  "krr_fit ridge": lambda v: kipcore.krr_fit(K, Y, v).dual,
  "scale": lambda v: kipcore.relative_ridge(K, v),
  "scale of a kernel": lambda v: (v * kipcore.rbf_fn(1.0))(X),
  "noise": lambda v: kipcore.gp_log_likelihood(K, Y, v),
  "label_solve ridge": lambda v: kipcore.label_solve(K, K, Y, v),
  "label_solve fit_ridge": lambda v: kipcore.label_solve(K, K, Y, 0.1, v),
  "label_solve_rows ridge": lambda v: kipcore.label_solve_rows(KERNEL, X, X, Y, v).labels,
  "evaluate_krr ridge": lambda v: kipcore.evaluate_krr(KERNEL, SUPPORT, X, Y, v).loss,
  "evaluate_krr relative_ridge": lambda v: (
    kipcore.evaluate_krr(KERNEL, SUPPORT, X, Y, relative_ridge=v).loss
  ),
  "learning_rate": lambda v: kipcore.evaluate_network(
    0, kipcore.fc(1), SUPPORT, X, Y, 1, 4, 2, learning_rate=v
  ),
  "pixel_max": lambda v: kipcore.fit_preprocess(X, ["scale"], v).apply(X),
  "divisor": lambda v: kipcore.fit_preprocess(X, [("scale", {"divisor": v})]).apply(X),
  "accuracy": lambda v: np.array(kipcore.ranking_scores(v, 0.25, 0.75)),
  "w_std": lambda v: Dense(w_std=v).w_std,
  "b_std": lambda v: Conv(3, b_std=v).b_std,
  "slope": lambda v: LeakyRelu(v).slope,
  "fc": lambda v: kipcore.ntk_fn(kipcore.fc(1, b_std=v))(X),
  "softplus": lambda v: kipcore.network(kipcore.fc(1), softplus=v).softplus,
}
# An integer argument of value 3.
INTEGERS = {
  "gram block_size": lambda v: kipcore.gram(KERNEL, X, None, v),
  "gram_diag block_size": lambda v: kipcore.gram_diag(KERNEL, X, v),
  "gram_matvec block_size": lambda v: kipcore.gram_matvec(KERNEL, X, X, Y, v),
  "label_solve_rows block_size": lambda v: (
    kipcore.label_solve_rows(KERNEL, X, X, Y, 0.1, block_size=v).labels
  ),
  "evaluate_krr block_size": lambda v: (
    kipcore.evaluate_krr(KERNEL, SUPPORT, X, Y, 0.1, block_size=v).loss
  ),
  "tile_elements": lambda v: NetworkKernel(kipcore.fc(1), "ntk", v).tile_elements,
  "fc depth": lambda v: kipcore.ntk_fn(kipcore.fc(v))(X),
  "conv depth": lambda v: len(kipcore.conv_net(v).layers),
  "size of Conv": lambda v: Conv(v).size,
  "size of AvgPool": lambda v: AvgPool(v).size,
  "stride of Conv": lambda v: Conv(stride=v).stride,
  "stride of AvgPool": lambda v: AvgPool(2, v).stride,
  "width": lambda v: kipcore.network(kipcore.fc(1), v).width,
  "num_outputs": lambda v: kipcore.network(kipcore.fc(1), 4, v).num_outputs,
  "width_growth": lambda v: kipcore.network(kipcore.fc(1), width_growth=v).width_growth,
  "num_classes": lambda v: kipcore.one_hot_centered(np.array([0, 1]), v),
  "num_seeds": lambda v: kipcore.evaluate_network(0, kipcore.fc(1), SUPPORT, X, Y, v, 4, 1),
  "evaluate_network width": lambda v: kipcore.evaluate_network(
    0, kipcore.fc(1), SUPPORT, X, Y, 1, v, 1
  ),
  "num_steps": lambda v: kipcore.evaluate_network(0, kipcore.fc(1), SUPPORT, X, Y, 1, 4, v),
  "batch_size": lambda v: kipcore.evaluate_network(
    0, kipcore.fc(1), SUPPORT, X, Y, 1, 4, 1, batch_size=v
  ),
  "key": lambda v: kipcore.evaluate_network(v, kipcore.fc(1), SUPPORT, X, Y, 1, 4, 1),
}


# Records convert such numbers to Python numbers, as their fields are annotated.
RECORDS = {
  *("w_std", "b_std", "slope", "tile_elements"),
  *("size of Conv", "size of AvgPool", "stride of Conv", "stride of AvgPool"),
}


@pytest.fixture
def record_annotations(name):
  """Disables the annotation checks while a record is created from a number of another type."""
  jaxtyping.config.update("jaxtyping_disable", name in RECORDS)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("record_annotations")
@pytest.mark.parametrize("name", REALS)
def test_real_scalars_of_every_type_are_one_number(name):
  expected = np.asarray(REALS[name](0.5))
  for make in (np.float32, np.float64, np.array, jnp.asarray):
    np.testing.assert_array_equal(np.asarray(REALS[name](make(0.5))), expected)


@pytest.mark.usefixtures("record_annotations")
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_every_type_are_one_number(name):
  expected = np.asarray(INTEGERS[name](3))
  for make in (np.int64, np.int32, np.uint8, np.array, jnp.asarray):
    np.testing.assert_array_equal(np.asarray(INTEGERS[name](make(3))), expected)


@pytest.mark.parametrize("name", [*REALS, *INTEGERS])
@pytest.mark.parametrize("value", [True, np.bool_(True), jnp.asarray(True), "3", 3j])
def test_booleans_and_text_are_not_numbers(name, value):
  with pytest.raises((TypeError, ValueError), match="expected"):
    {**REALS, **INTEGERS}[name](value)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [3.0, np.float32(3)])
def test_integers_are_not_floats(name, value):
  with pytest.raises(TypeError, match="expected a.* integer"):
    INTEGERS[name](value)


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_reals_are_finite(name, value):
  """Layer records are checked by the architecture that they become part of."""
  if name in ("w_std", "b_std", "slope"):
    layer = {"w_std": Dense(w_std=value), "b_std": Dense(b_std=value), "slope": LeakyRelu(value)}
    with pytest.raises(ValueError, match="expected"):
      kipcore.Architecture("a", (kipcore.architectures.Flatten(), Dense(), layer[name], Dense()))
    return
  with pytest.raises(ValueError, match="expected"):
    REALS[name](value)


def test_class_labels_take_numpy_and_jax():
  for y in (Y, jnp.asarray(Y)):
    np.testing.assert_array_equal(class_labels(y), Y.argmax(1))
