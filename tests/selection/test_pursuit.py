"""Randomly pivoted Cholesky has the law of its simple form; the pursuit's objective is the true one and falls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT64_IS_SLOW, RTOL, assert_close, slow_except
from scipy import stats
from sklearn.datasets import load_digits

from kipcore import linalg
from kipcore.selection import cholesky, pursuit
from kipcore.selection.cholesky import rpcholesky
from kipcore.selection.pursuit import krr_pursuit
from kipcore.types import Status


def linear(a, b=None):
  return jnp.matmul(a, (a if b is None else b).T, precision="highest")


def rbf(a, b=None):
  b = a if b is None else b
  squares = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)[None]
  return jnp.exp(-0.1 * jnp.maximum(squares - 2 * linear(a, b), 0))


def reference_rbf(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.exp(-0.1 * ((a[:, None] - b[None]) ** 2).sum(2))


def schur_diagonal(k, pivots):
  """diag(K - K_nS K_SS^{-1} K_Sn) in float64."""
  s = list(pivots)
  return (
    np.diag(k) - np.einsum("ij,ji->i", k[:, s], np.linalg.solve(k[np.ix_(s, s)], k[s]))
    if s
    else np.diag(k)
  )


def rows(n=200, d=4, seed=0):
  return np.random.default_rng(seed).normal(size=(n, d))


class TestRPCholesky:
  @pytest.mark.parametrize("block_size", [1, 12])
  @FLOAT64_IS_SLOW
  def test_factor_is_the_projection_onto_the_pivots(self, dtype, block_size):
    x = jnp.asarray(rows(), dtype)
    result = rpcholesky(jax.random.key(0), rbf, x, 40, block_size=block_size, row_block_size=64)
    rtol = 100 * RTOL[dtype.name]
    k = reference_rbf(x, x)
    pivots = np.asarray(result.pivots)
    factor = np.asarray(result.factor, np.float64)
    assert (
      int(result.status) == Status.OK
      and int(result.count) == 40
      and len(set(pivots.tolist())) == 40
    )
    nystrom = k[:, pivots] @ np.linalg.solve(k[np.ix_(pivots, pivots)], k[pivots])
    assert_close(factor @ factor.T, nystrom, rtol)
    assert_close(result.residual_diagonal, np.diag(k - nystrom), 0, atol=rtol)
    assert_close(result.residual_trace, np.trace(k) - (factor**2).sum(), rtol)
    # Lower triangular at the pivots: the first r columns are the factor of rank r.
    assert_close(np.triu(factor[pivots], 1), np.zeros((40, 40)), 0, atol=rtol)
    path = np.trace(k) - np.cumsum((factor**2).sum(0))
    assert (np.diff(path) <= 0).all()
    for r in (1, 7, 25):
      assert path[r - 1] == pytest.approx(schur_diagonal(k, pivots[:r]).sum(), rel=rtol)

  @pytest.mark.parametrize("block_size", slow_except([1, 3], 3))
  def test_distribution_of_pivots(self, x64, block_size):
    """Frequencies of ordered pivots against the enumerated sequential law; blocks and weights included."""
    x = rows(5, 2)
    weights = np.array([1.0, 2.0, 0.5, 1.0, 0.0])
    k = reference_rbf(x, x)
    expected = {}
    for s in itertools.permutations(range(4), 3):
      p = 1.0
      for step in range(3):
        law = weights * schur_diagonal(k, s[:step])
        p *= law[s[step]] / law.sum()
      expected[s] = p
    run = jax.jit(
      jax.vmap(
        lambda key: (
          rpcholesky(
            key, rbf, jnp.asarray(x), 3, jnp.asarray(weights), block_size=block_size
          ).pivots
        )
      )
    )
    drawn = np.asarray(run(jax.random.split(jax.random.key(0), 20_000)))
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    counts = {tuple(map(int, s)): int(c) for s, c in zip(found, counts)}
    assert set(counts) <= set(expected)
    frequencies = np.array([expected[s] * 20_000 for s in expected])
    assert sum(expected.values()) == pytest.approx(1) and frequencies.min() > 5
    assert stats.chisquare([counts.get(s, 0) for s in expected], frequencies).pvalue > 1e-3

  def test_blocks_match_the_residual_of_single_pivots(self, x64):
    """Past the first block and factor chunk, on digits: mean residual trace within 4 standard errors."""
    x = jnp.asarray(load_digits().data[:500] / 16)
    run = lambda block: np.array(
      [
        float(rpcholesky(jax.random.key(s), rbf, x, 150, block_size=block).residual_trace)
        for s in range(20)
      ]
    )
    simple, block = run(1), run(32)
    assert abs(simple.mean() - block.mean()) < 4 * np.sqrt((simple.var() + block.var()) / 20)

  @pytest.mark.parametrize("block_size", [1, 8])
  def test_low_rank_stops_early(self, dtype, block_size):
    x = jnp.asarray(np.repeat(rows(6, 5), 5, axis=0), dtype)
    result = rpcholesky(jax.random.key(0), linear, x, 12, block_size=block_size)
    assert int(result.count) == 5 and int(result.status) == Status.OK
    assert (np.asarray(result.pivots[5:]) == -1).all() and (
      np.asarray(result.factor[:, 5:]) == 0
    ).all()
    assert_close(
      linear(result.factor),
      np.asarray(x, np.float64) @ np.asarray(x, np.float64).T,
      30 * RTOL[dtype.name],
    )

  @FLOAT64_IS_SLOW
  def test_duplicates_are_not_both_selected(self, dtype):
    x = jnp.asarray(np.repeat(rows(20, 4), 4, axis=0), dtype)
    for seed in range(5):
      pivots = np.asarray(rpcholesky(jax.random.key(seed), rbf, x, 20, block_size=8).pivots)
      assert len(set((pivots[pivots >= 0] // 4).tolist())) == (pivots >= 0).sum() >= 19

  def test_vmap_over_padded_classes(self, x64):
    x = jnp.asarray(rows(90).reshape(2, 45, 4))
    weights = (jnp.arange(45)[None] < jnp.array([45, 30])[:, None]).astype(jnp.float64)
    split = jax.random.split(jax.random.key(0), 2)
    run = lambda key, x, w: rpcholesky(key, rbf, x, 20, w, block_size=8)
    together = jax.vmap(run)(split, x, weights)
    for c in range(2):
      alone = run(split[c], x[c], weights[c])
      np.testing.assert_array_equal(together.pivots[c], alone.pivots)
      assert_close(together.factor[c], alone.factor, 1e-9)
    assert int(together.pivots[1].max()) < 30

  def test_same_key_same_result_and_no_recompilation(self):
    x = jnp.asarray(rows(), jnp.float32)
    first = rpcholesky(0, rbf, x, 10)
    before = cholesky._rpcholesky._cache_size()
    np.testing.assert_array_equal(first.pivots, rpcholesky(jax.random.key(0), rbf, x, 10).pivots)
    assert not np.array_equal(first.pivots, rpcholesky(jax.random.key(1), rbf, x, 10).pivots)
    assert cholesky._rpcholesky._cache_size() == before

  def test_invalid_input_raises(self):
    x = jnp.asarray(rows(10), jnp.float32)
    broken = lambda a, b=None: rbf(a, b) * jnp.nan
    assert int(rpcholesky(0, broken, x, 3).status) == Status.NOT_FINITE
    with pytest.raises(ValueError, match="at most the number of rows, 10"):
      rpcholesky(0, rbf, x, 11)
    with pytest.raises(ValueError, match="expected finite"):
      rpcholesky(0, rbf, x.at[0, 0].set(jnp.inf), 3)
    with pytest.raises(ValueError, match="block_size: expected a positive integer"):
      rpcholesky(0, rbf, x, 3, block_size=0)
    with pytest.raises(TypeError, match="floating"):
      rpcholesky(0, rbf, jnp.ones((4, 2), jnp.int32), 2)


def problem(dtype, n=150, classes=3):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, classes, n)
  x = rng.normal(size=(n, 4)) + 1.5 * np.eye(4)[labels % 4]
  return jnp.asarray(x, dtype), jnp.asarray(np.eye(classes)[labels] - 1 / classes, dtype), labels


def objective(x, y, points, coefficients, ridge):
  """||K_nS c - Y||^2 + ridge <c, K_SS c>."""
  y, c = np.asarray(y, np.float64), np.asarray(coefficients, np.float64)
  return ((reference_rbf(x, points) @ c - y) ** 2).sum() + ridge * np.sum(
    c * (reference_rbf(points, points) @ c)
  )


def best_objective(x, y, points, ridge, jitter=0.0):
  k, y = reference_rbf(x, points), np.asarray(y, np.float64)
  penalty = ridge * (reference_rbf(points, points) + jitter * np.eye(len(points)))
  c = np.linalg.solve(k.T @ k + penalty, k.T @ y)
  return ((k @ c - y) ** 2).sum() + np.sum(c * (penalty @ c))


class TestKRRPursuit:
  ridge = 0.3

  @FLOAT64_IS_SLOW
  def test_objectives_match_direct_evaluation(self, dtype):
    x, y, _ = problem(dtype)
    result = krr_pursuit(0, rbf, x, y, jnp.arange(60), 15, self.ridge, block_size=40)
    rtol = 50 * RTOL[dtype.name]
    assert int(result.status) == Status.OK and result.coefficients.dtype == dtype
    points = x[result.indices]
    assert len(set(np.asarray(result.indices).tolist())) == 15 and int(result.indices.max()) < 60
    assert_close(
      result.objectives[-1], objective(x, y, points, result.coefficients, self.ridge), rtol
    )
    assert_close(result.objectives[0], (np.asarray(y, np.float64) ** 2).sum(), rtol)
    for m in (1, 4, 15):
      assert_close(result.objectives[m], best_objective(x, y, points[:m], self.ridge), rtol)
    assert (np.diff(np.asarray(result.objectives)) < 0).all()
    jitter = float(linalg.rounding_ridge(rbf(x[:60], None)))
    assert_close(result.pool_objective, best_objective(x, y, x[:60], self.ridge, jitter), rtol)
    assert float(result.pool_objective) < float(result.objectives[-1])

  def test_float32_is_accurate_for_a_large_squared_condition_number(self):
    # Nearby rows: M has a condition far beyond float32, in which no Cholesky factor of it exists.
    rng = np.random.default_rng(0)
    x = jnp.asarray(0.5 * rng.normal(size=(400, 8)), jnp.float32)
    y = jnp.asarray(np.eye(3)[rng.integers(0, 3, 400)] - 1 / 3, jnp.float32)
    k = np.asarray(rbf(x[:60], None), np.float64)
    cross = np.asarray(rbf(x, x[:60]), np.float64)
    assert np.linalg.cond(cross.T @ cross + 1e-2 * k) > 1e7
    result = krr_pursuit(0, rbf, x, y, jnp.arange(60), 30, 1e-2)
    assert int(result.status) == Status.OK
    assert_close(result.objectives[-1], best_objective(x, y, x[result.indices], 1e-2), 1e-4)

  def test_each_step_is_the_best_single_addition(self, x64):
    x, y, _ = problem(jnp.float64, n=60)
    result = krr_pursuit(0, rbf, x, y, jnp.arange(20, 50), 6, self.ridge)
    chosen = []
    for index in result.indices.tolist():
      left = [j for j in range(20, 50) if j not in chosen]
      values = {j: best_objective(x, y, x[jnp.array([*chosen, j])], self.ridge) for j in left}
      assert index == min(values, key=values.get)
      chosen.append(index)

  def test_better_than_random(self, x64):
    x, y, _ = problem(jnp.float64)
    ours = float(krr_pursuit(0, rbf, x, y, 150, 12, self.ridge).objectives[-1])
    rng = np.random.default_rng(0)
    random = [
      best_objective(x, y, x[rng.choice(150, 12, replace=False)], self.ridge) for _ in range(100)
    ]
    assert ours < min(random)

  @FLOAT64_IS_SLOW
  def test_quota(self, dtype):
    x, y, labels = problem(dtype)
    result = krr_pursuit(jax.random.key(1), rbf, x, y, 45, 12, self.ridge, quota=4)
    assert np.bincount(labels[np.asarray(result.indices)]).tolist() == [4, 4, 4]
    # The pool itself is drawn class by class in turn, each row once.
    pool = np.asarray(result.candidates)
    assert len(set(pool.tolist())) == 45 and np.bincount(labels[pool]).tolist() == [15, 15, 15]
    given = krr_pursuit(
      0, rbf, x, y, jnp.arange(40), 4, self.ridge, quota=2, classes=np.arange(40) % 2
    )
    assert np.bincount(np.asarray(given.indices) % 2).tolist() == [2, 2]
    short = krr_pursuit(
      0, rbf, x, y, jnp.arange(40), 4, self.ridge, quota=1, classes=np.arange(40) % 2
    )
    assert (
      short.indices.tolist()[2:] == [-1, -1] and int(short.status) == Status.NOT_POSITIVE_DEFINITE
    )
    assert (np.asarray(short.coefficients[2:]) == 0).all()
    assert_close(short.objectives[2:], np.full(3, float(short.objectives[2])), 0)

  @FLOAT64_IS_SLOW
  def test_duplicates_are_skipped(self, dtype):
    x, y, _ = problem(dtype)
    pool = jnp.repeat(jnp.arange(6), 3)
    result = krr_pursuit(0, rbf, x, y, pool, 8, self.ridge)
    indices = np.asarray(result.indices)
    assert sorted(indices[:6].tolist()) == [0, 1, 2, 3, 4, 5] and indices[6:].tolist() == [-1, -1]
    assert int(result.status) == Status.NOT_POSITIVE_DEFINITE
    assert_close(
      result.objectives[-1], best_objective(x, y, x[:6], self.ridge), 100 * RTOL[dtype.name]
    )

  @FLOAT64_IS_SLOW
  def test_pool_of_separate_rows(self, dtype):
    x, y, _ = problem(dtype)
    means = jnp.stack([x[i::8].mean(0) for i in range(8)])
    result = krr_pursuit(0, rbf, x, y, means, 5, self.ridge)
    assert_close(
      result.objectives[-1],
      objective(x, y, means[result.indices], result.coefficients, self.ridge),
      50 * RTOL[dtype.name],
    )
    with pytest.raises(ValueError, match="classes: expected one class per candidate"):
      krr_pursuit(0, rbf, x, y, means, 5, self.ridge, quota=2)

  def test_jit_determinism_and_no_recompilation(self, x64):
    x, y, _ = problem(jnp.float64)
    first = krr_pursuit(0, rbf, x, y, 50, 5, 0.1)
    before = pursuit._krr_pursuit._cache_size()
    again = krr_pursuit(jax.random.key(0), rbf, x, y, 50, 5, 0.1)
    np.testing.assert_array_equal(first.indices, again.indices)
    other = krr_pursuit(1, rbf, x, y, 50, 5, 10.0)
    assert not np.array_equal(first.candidates, other.candidates)
    assert pursuit._krr_pursuit._cache_size() == before
    outer = jax.jit(lambda x, ridge: krr_pursuit(0, rbf, x, y, 50, 5, ridge))(x, 0.1)
    np.testing.assert_array_equal(first.indices, outer.indices)
    assert_close(outer.objectives, first.objectives, 1e-12)

  @FLOAT64_IS_SLOW
  def test_edge_cases(self, dtype):
    """Constant labels, as many points as candidates, and one row."""
    x, y, _ = problem(dtype, n=12)
    constant = krr_pursuit(0, rbf, x, jnp.zeros_like(y), 12, 3, self.ridge)
    assert (np.asarray(constant.objectives) == 0).all() and (
      np.asarray(constant.coefficients) == 0
    ).all()
    whole = krr_pursuit(0, rbf, x, y, 12, 12, self.ridge)
    assert sorted(whole.indices.tolist()) == list(range(12))
    one = krr_pursuit(0, rbf, x[:1], y[:1], 1, 1, self.ridge)
    assert_close(one.coefficients, np.asarray(y[:1]) / (1 + self.ridge), 10 * RTOL[dtype.name])

  def test_invalid_input_raises(self):
    x, y, _ = problem(jnp.float32)
    broken = lambda a, b=None: rbf(a, b) * jnp.nan
    assert int(krr_pursuit(0, broken, x, y, 10, 3, 0.1).status) == Status.NOT_FINITE
    with pytest.raises(ValueError, match="at most the number of candidates, 10"):
      krr_pursuit(0, rbf, x, y, 10, 11, 0.1)
    with pytest.raises(ValueError, match="ridge: expected values > 0"):
      krr_pursuit(0, rbf, x, y, 10, 3, 0.0)
    with pytest.raises(ValueError, match="same number of rows"):
      krr_pursuit(0, rbf, x, y[:-1], 10, 3, 0.1)
    with pytest.raises(ValueError, match=r"candidates: expected a value in \[0, 149\]"):
      krr_pursuit(0, rbf, x, y, jnp.array([0, 150]), 1, 0.1)
    with pytest.raises(ValueError, match="expected finite"):
      krr_pursuit(0, rbf, x, y.at[0, 0].set(jnp.nan), 10, 3, 0.1)
