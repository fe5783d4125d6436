"""Checks accept what they document and name what they reject."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kipcore import checks
from kipcore.types import NumericalError, Status

NUMBERS = [2, 2.0, np.int64(2), np.float32(2), np.array(2.0), jnp.asarray(2.0), jnp.asarray(2)]
NOT_NUMBERS = [True, np.bool_(True), np.array(True), jnp.asarray(True), "2", None, 2j, np.array(2j)]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: f"{type(v).__name__}")
def test_scalar_accepts_every_form_of_a_number(value):
  result = checks.scalar("a", value)
  assert type(result) is float and result == 2.0
  checks.positive("a", value)
  checks.non_negative("a", value)
  checks.in_range("a", value, 1, 3)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda v: f"{type(v).__name__}-{v!r}")
@pytest.mark.parametrize(
  "check",
  [
    checks.scalar,
    checks.positive,
    checks.non_negative,
    lambda name, v: checks.in_range(name, v, 0, 3),
  ],
)
def test_numeric_checks_reject_other_types(check, value):
  with pytest.raises(TypeError, match="a: expected a real number, got"):
    check("a", value)


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), jnp.asarray(3)])
def test_integers_become_python_ints(value):
  for check in (checks.integer, checks.positive_int):
    result = check("n", value)
    assert type(result) is int and result == 3


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 3.0, np.float32(3), np.ones(1, int), jnp.ones(())])
def test_integers_reject_other_types(value):
  with pytest.raises(TypeError, match="n: expected an integer, got"):
    checks.integer("n", value)
  with pytest.raises(TypeError, match="n: expected a positive integer, got"):
    checks.positive_int("n", value)


@pytest.mark.parametrize("value", [0, -1, np.int64(0)])
def test_positive_integers_are_positive(value):
  with pytest.raises(ValueError, match="n: expected a positive integer, got"):
    checks.positive_int("n", value)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, [1.0, 0.0], [1.0, np.nan]])
def test_positive_rejects_values_that_are_not(value):
  with pytest.raises(ValueError, match="a: expected (finite )?values > 0, got"):
    checks.positive("a", np.asarray(value))


def test_scalar_rejects_arrays_and_passes_tracers():
  with pytest.raises(ValueError, match=r"a: expected a scalar, got shape \(1,\)"):
    checks.scalar("a", np.ones(1))
  np.testing.assert_allclose(jax.jit(lambda a: checks.scalar("a", a) + 1.0)(2.0), 3.0)
  jax.jit(lambda a: checks.positive("a", a))(-1.0)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 3), (4,)])
def test_weights_have_one_shape(shape):
  with pytest.raises(ValueError, match=r"w: expected shape \(3,\)"):
    checks.weights("w", np.ones(shape), 3, np.float32)
  with pytest.raises(ValueError, match=r"w: expected shape \(3,\)"):
    jax.jit(lambda w: checks.weights("w", w, 3, np.float32))(np.ones(shape, np.float32))


def test_weights_are_finite_non_negative_numbers():
  weights = checks.weights("w", np.array([0, 1, 2]), 3, np.float32)
  assert weights.dtype == jnp.float32 and weights.tolist() == [0, 1, 2]
  for value, message in [
    ([1.0, -1.0, 1.0], "w: expected values >= 0, got -1"),
    ([1.0, np.nan, 1.0], "w: expected finite values"),
    ([1.0, np.inf, 1.0], "w: expected finite values"),
  ]:
    with pytest.raises(ValueError, match=message):
      checks.weights("w", np.array(value), 3, np.float32)
  for value in ([1.0, 1.0, 1.0], np.ones(3, bool)):
    with pytest.raises(TypeError, match="w: expected"):
      checks.weights("w", value, 3, np.float32)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.complex64])
def test_floating_rejects_other_dtypes(dtype):
  with pytest.raises(TypeError, match="x: expected a floating dtype, got"):
    checks.floating("x", np.ones(2, dtype))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_floating_accepts_every_precision(dtype):
  checks.floating("x", np.ones(2, dtype))


def test_finite_counts_and_locates():
  x = np.ones((2, 3))
  x[1, 0], x[1, 2] = np.nan, np.inf
  with pytest.raises(ValueError, match=r"x: .* got 2 NaN or infinite, the first at index \(1, 0\)"):
    checks.finite("x", x)


def test_status_becomes_an_error_with_advice():
  checks.raise_for_status("the fit", jnp.zeros(3, jnp.int32))
  with pytest.raises(NumericalError, match=r"the fit failed \(NOT_FINITE\): it contains NaN"):
    checks.raise_for_status("the fit", jnp.asarray([0, int(Status.NOT_FINITE)]))


def test_hashable_wraps_only_what_is_not():
  class Unhashable:
    __hash__ = None
    diag = "an attribute"

    def __call__(self, x):
      return x + 1

  one, other, function = Unhashable(), Unhashable(), lambda x: x
  assert checks.hashable(function) is function
  wrapped = checks.hashable(one)
  assert wrapped == checks.hashable(one) and hash(wrapped) == hash(checks.hashable(one))
  assert wrapped != checks.hashable(other)
  assert wrapped(1) == 2 and wrapped.diag == "an attribute"


def test_one_of_suggests_the_nearest_choice():
  with pytest.raises(ValueError, match=r"got 'rkh' \(did you mean rkhs\?\)"):
    checks.one_of("penalty", "rkh", ("rkhs", "coefficients"))


def test_one_line_removes_control_characters():
  assert checks.one_line("a\n b\x1b[31m\tc") == "a b?[31m c"
  assert checks.one_line("x" * 400) == "x" * 300 + "..."
