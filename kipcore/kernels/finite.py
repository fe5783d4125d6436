"""Empirical kernels of finite networks, which converge to the closed forms as the width grows.

`empirical_ntk_fn` is the kernel of any function of parameters and inputs, in blocks within a memory
budget. Per pair of rows and output it costs

    Jacobian contraction:  2 P operations, and the Jacobian rows (c P numbers per row) once or several times
    Jacobian products:     about 3 F operations, for a forward-mode derivative, and one row of the Jacobian at a time

with P parameters and F operations of the function per row. F is at least 2 P if each parameter is used at
every row, but less for embeddings. The cheaper of the two that the budget allows is chosen.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kipcore import blocks, checks, functional, linalg, pytrees
from kipcore.kernels.base import Kernel
from kipcore.types import Array, ArrayLike, IntLike

IMPLEMENTATIONS = ("auto", "contraction", "products")
_DERIVATIVE = 3.0  # operations of a derivative per operation of the function


def empirical_ntk(apply_fn, variables, x1: ArrayLike, x2: ArrayLike | None = None) -> Array:
  """<df(x1)/dtheta, df(x2)/dtheta> / c, summed over the c outputs: `(n1, n2)`.

  Args:
    apply_fn: `apply_fn(variables, x) -> (n, c)`.
    variables: parameters theta, any pytree.
    x1: `(n1, ...)` inputs.
    x2: `(n2, ...)` inputs, or None for `x1` itself.

  Returns:
    `(n1, n2)`; with unit-normal parameters its expectation converges to `ntk_fn`.
  """

  def jacobian(x):
    jac = jax.jacobian(apply_fn)(variables, x)
    leaves = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jac)]
    return jnp.concatenate(leaves, axis=-1)

  j1 = jacobian(x1)
  j2 = j1 if x2 is None else jacobian(x2)
  return jnp.einsum("icp,jcp->ij", j1, j2, precision=linalg.HIGHEST) / j1.shape[1]


def empirical_nngp(apply_fn, variables, x1: ArrayLike, x2: ArrayLike | None = None) -> Array:
  """Mean over outputs of f(x1) f(x2): `(n1, n2)`, whose expectation converges to `nngp_fn`.

  Args:
    apply_fn: `apply_fn(variables, x) -> (n, c)`.
    variables: parameters, any pytree.
    x1: `(n1, ...)` inputs.
    x2: `(n2, ...)` inputs, or None for `x1` itself.

  Returns:
    `(n1, n2)`.
  """
  f1 = apply_fn(variables, x1)
  f2 = f1 if x2 is None else apply_fn(variables, x2)
  return linalg.matmul(f1, f2.T) / f1.shape[1]


@pytrees.record("params")
@dataclasses.dataclass(frozen=True)
class EmpiricalNTK(Kernel):
  """The empirical tangent kernel of a function; see `empirical_ntk_fn`."""

  apply_fn: Callable
  params: Any
  memory_budget: int = 2**30
  implementation: str = "auto"

  def __post_init__(self):
    if not callable(self.apply_fn):
      raise TypeError(f"apply_fn: expected a function, got a {type(self.apply_fn).__name__}")
    checks.one_of("implementation", self.implementation, IMPLEMENTATIONS)
    budget = checks.positive_int("memory_budget", self.memory_budget)
    object.__setattr__(self, "memory_budget", budget)
    object.__setattr__(self, "apply_fn", checks.hashable(self.apply_fn))

  def _rows(self, name: str, x: ArrayLike) -> Array:
    """Rows of any dtype, such as tokens: the function knows what they mean."""
    checks.array(name, x)
    if x.ndim < 1:
      raise ValueError(f"{name}: expected rows (n, ...), got shape {x.shape}")
    return jnp.asarray(x)

  def _in_dtype(self, dtype) -> "EmpiricalNTK":
    return self

  def _matrix(self, x1: Array, x2: Array | None) -> Array:
    same, x2 = x2 is None, x1 if x2 is None else x2
    f, params, num_outputs, dtype = self._checked(x1)
    used = _row_bytes(f, params, x1)
    rows = self._contracted_rows(f, params, used, x1, x2, same)
    num_rows = x1.shape[0] + (0 if same else x2.shape[0])
    if rows is not None and num_outputs * num_rows * used <= self.memory_budget:
      # Without a loop over outputs, in which XLA on CPU is slow at convolutions.
      first = _all_jacobians(f, params, num_outputs, x1)
      second = first if same else _all_jacobians(f, params, num_outputs, x2)
      return _inner(first, second).astype(dtype) / num_outputs

    def add(total, o):
      if rows is None:
        # As many rows at a time as rows of the Jacobian fit: an upper bound on their scratch memory.
        part = _products(f, params, o, x1, x2, max(1, self.memory_budget // used))
      else:
        part = _contraction(f, params, o, x1, x2, same, rows)
      return total + part.astype(dtype), None

    total = jnp.zeros((x1.shape[0], x2.shape[0]), dtype)
    return jax.lax.scan(add, total, jnp.arange(num_outputs, dtype=jnp.int32))[0] / num_outputs

  def _diagonal(self, x: Array) -> Array:
    f, params, num_outputs, dtype = self._checked(x)

    def block(x):
      def add(total, o):
        jacobian = _jacobian(f, params, o, x)
        squares = [jnp.sum(j.reshape(j.shape[0], -1) ** 2, axis=1) for j in jacobian]
        return functools.reduce(jnp.add, [total, *(s.astype(dtype) for s in squares)]), None

      outputs = jnp.arange(num_outputs, dtype=jnp.int32)
      return jax.lax.scan(add, jnp.zeros(x.shape[0], dtype), outputs)[0] / num_outputs

    rows = max(1, self.memory_budget // _row_bytes(f, params, x))
    return blocks.map_row_blocks(block, x, rows)

  def _checked(self, x: Array) -> tuple[Callable, tuple, int, Any]:
    """`f(trained, constant, row, output)`, its first two arguments, the number of outputs, and their dtype."""
    leaves, structure = jax.tree.flatten(self.params)
    floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    if not any(floating):
      raise TypeError("params: expected at least one array of a floating dtype, got none")
    apply_fn = self.apply_fn

    def outputs(trained, constant, row):
      parts = iter(trained), iter(constant)
      whole = [next(parts[0] if is_trained else parts[1]) for is_trained in floating]
      return apply_fn(jax.tree.unflatten(structure, whole), row[None])

    params = tuple(
      [leaf for leaf, is_trained in zip(leaves, floating, strict=True) if is_trained is wanted]
      for wanted in (True, False)
    )
    found = jax.eval_shape(outputs, *params, x[0])
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 1:
      got = type(found).__name__ if shape is None else f"shape {shape}"
      raise ValueError(f"apply_fn: expected outputs of shape (1, c) for one row, got {got}")
    dtype = _at_least_float32(found.dtype)
    f = lambda trained, constant, row, o: outputs(trained, constant, row)[0, o].astype(dtype)
    return f, params, shape[1], dtype

  def _contracted_rows(self, f, params, used, x1, x2, same) -> tuple[int, int] | None:
    """Rows of x1 and x2 whose Jacobians, of `used` bytes a row, are contracted at a time, or None for Jacobian products."""
    n1, n2 = x1.shape[0], x2.shape[0]
    together = self.memory_budget // used
    least = 1 if n1 == 1 and same else 2
    if self.implementation == "products" or (self.implementation == "auto" and together < least):
      return None
    if together < least:
      raise ValueError(
        f"memory_budget: expected at least {least * used} bytes, for {least} rows of the Jacobian, "
        f"got {self.memory_budget}"
      )
    # All rows of the smaller set at once, if possible, so that no Jacobian is computed twice.
    whole = same and n1 <= together
    rows = (n1, n1) if whole else (min(n1, max(1, together // 2, together - n2)), 0)
    rows = rows if whole else (rows[0], min(n2, together - rows[0]))
    if self.implementation == "contraction":
      return rows
    size = sum(math.prod(leaf.shape) for leaf in params[0])
    derivative = _DERIVATIVE * _operations(f, params, x1)
    passes = n1 if whole else n1 + n2 * -(-n1 // rows[0])
    contraction = passes * derivative + 2.0 * n1 * n2 * size
    return rows if contraction <= (n2 + n1 * n2) * derivative else None


def _at_least_float32(dtype):
  return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def _jacobian(f, params, o, x: Array) -> list:
  """The derivatives of output o at each row by the parameters, leaves `(b, ...)`."""
  return jax.vmap(jax.grad(f), in_axes=(None, None, 0, None))(*params, x, o)


def _all_jacobians(f, params, num_outputs: int, x: Array) -> list:
  """The derivatives of all outputs at each row, leaves `(b, c, ...)`."""
  outputs = jnp.arange(num_outputs, dtype=jnp.int32)
  return jax.vmap(lambda o: _jacobian(f, params, o, x), out_axes=1)(outputs)


def _contraction(f, params, o, x1: Array, x2: Array, same: bool, rows: tuple[int, int]) -> Array:
  """The kernel of output o, by contraction of blocks of Jacobians."""
  if same and rows[0] == x1.shape[0]:
    jacobian = _jacobian(f, params, o, x1)
    return _inner(jacobian, jacobian)

  def row_block(x1):
    first = _jacobian(f, params, o, x1)
    inner = lambda x2: _inner(_jacobian(f, params, o, x2), first)
    return blocks.map_row_blocks(inner, x2, rows[1]).T

  return blocks.map_row_blocks(row_block, x1, rows[0])


def _inner(j1, j2) -> Array:
  """Inner products of rows of two Jacobians, `(b1, b2)`."""
  flat = lambda j: linalg.at_least_float32(j.reshape(j.shape[0], -1))
  parts = [linalg.matmul(flat(a), flat(b).T) for a, b in zip(j1, j2, strict=True)]
  return functools.reduce(jnp.add, parts)


def _products(f, params, o, x1: Array, x2: Array, rows: int) -> Array:
  """The kernel of output o, by forward-mode derivatives along each row of the Jacobian."""
  trained, constant = params

  def column(row):
    direction = jax.grad(f)(trained, constant, row, o)
    along = lambda row: jax.jvp(lambda p: f(p, constant, row, o), (trained,), (direction,))[1]
    return blocks.map_row_blocks(jax.vmap(along), x1, rows)

  return jax.lax.map(column, x2).T


def _compiled(fn, params, x: Array):
  """`fn(params, rows)` compiled for the shapes of one row, also while it is being traced."""
  spec = lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a))
  row = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
  return jax.jit(fn).lower(jax.tree.map(spec, params), row).compile()


def _row_bytes(f, params, x: Array) -> int:
  """Bytes of a row of the Jacobian, and of the scratch memory that computes it."""
  memory = _compiled(lambda p, x: _jacobian(f, p, 0, x), params, x).memory_analysis()
  return memory.output_size_in_bytes + memory.temp_size_in_bytes


def _operations(f, params, x: Array) -> float:
  """Operations of the function for one row."""
  analysis = _compiled(lambda p, x: f(*p, x[0], 0), params, x).cost_analysis()
  return float((analysis or {}).get("flops", 0.0))


def empirical_ntk_fn(
  apply_fn: Callable[[Any, Array], Array] | functional.NetworkLike,
  params: Any = None,
  memory_budget: IntLike = 2**30,
  implementation: str = "auto",
) -> EmpiricalNTK:
  """The empirical tangent kernel of a network, or of any function of parameters and inputs.

      Theta(x, x') = 1/c sum_o <df_o(x)/dtheta, df_o(x')/dtheta>

  Rows are differentiated one by one, so the function must treat them independently: batch norm must
  use its running statistics, and dropout must be off.

  Args:
    apply_fn: `apply_fn(params, x) -> (n, c)` for rows `(n, ...)` of any dtype. Kernels are equal, and share a
      compilation, if their functions are equal. Or a network: a `flax.linen` module or a result of `as_network` with its
      variables, a pair `(init, apply)` with its parameters, or a `flax.nnx` module without `params`; then derivatives are
      taken by parameters, dropout is off and batch norm uses its running statistics.
    params: any pytree. Derivatives are taken by its floating leaves; the others are constants.
    memory_budget: bytes for rows of Jacobians and for the scratch memory of their computation; the result and
      a copy of it are not counted.
    implementation: "contraction" of Jacobians, "products" of Jacobians with vectors (less memory), or
      "auto" for the one with fewer operations within the budget.

  Returns:
    `kernel_fn(x1, x2=None) -> (n1, n2)` with `diag`, compiled once per shape for all values of the
    parameters, which are leaves of the kernel.

  Raises:
    ValueError, TypeError: for an unknown implementation or a budget that is not a positive integer; at the call, for
      outputs of another rank, parameters without a floating leaf, rows of different shapes, or a budget that is too small for
      "contraction".

  References:
    Novak, Sohl-Dickstein and Schoenholz (2022), Fast finite width neural tangent kernel.

  Example:
    >>> kernel_fn = kipcore.empirical_ntk_fn(lambda w, x: jnp.tanh(x @ w), jnp.zeros((2, 3)))
    >>> print(kernel_fn(jnp.asarray([[1.0, 0.0], [1.0, 2.0]])))  # tanh'(0) = 1: <x, x'>
    [[1. 1.]
     [1. 5.]]
  """
  budget = checks.positive_int("memory_budget", memory_budget)
  return EmpiricalNTK(*functional.applied(apply_fn, params), budget, implementation)
