"""`kernel_thinning`: the algorithms of the papers in NumPy, and its MMD next to that of random rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, slow_except

import kipcore
from kipcore.selection import thinning

RNG = np.random.default_rng(0)
KERNEL = kipcore.rbf_fn(1.0)


def gram(x, targets=None):
  k = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 2)
  return k if targets is None else k * (1 + targets @ targets.T)


def mmd2(k, rows, weights):
  v = np.bincount(rows, minlength=len(k)) / len(rows) - weights / np.sum(weights)
  return v @ k @ v


def split(k, sequence, rounds, uniforms, delta=0.5):
  """KT-SPLIT, one part and pair after the other."""
  parts = [list(sequence)]
  for i in range(rounds):
    halves, size = [], len(parts[0])
    factor = 2 * np.log(2 * size * rounds / delta)
    for j, part in enumerate(parts):
      first, second, variance = [], [], 0.0
      for q in range(size // 2):
        a, b = part[2 * q : 2 * q + 2]
        norm = k[a, a] + k[b, b] - 2 * k[a, b]
        bound = max(np.sqrt(variance * norm * factor), norm)
        growth = 0.0 if bound == 0 else 0.5 + (norm / (2 * bound) - 1) * variance / bound
        variance = norm if variance == 0 else variance + 2 * norm * max(growth, 0)
        balance = sum(k[r, a] - k[r, b] for r in first) - sum(k[r, a] - k[r, b] for r in second)
        chance = 0.5 * (1 - balance / (bound or 1))
        if not uniforms[i][j * size // 2 + q] < chance:
          a, b = b, a
        first.append(a)
        second.append(b)
      halves += [first, second]
    parts = halves
  return parts


def swap(k, rows, weights):
  rows = list(rows)
  for i in range(len(rows)):
    others = rows[:i] + rows[i + 1 :]
    free = [a for a in range(len(k)) if a not in others]
    rows[i] = min(free, key=lambda a: mmd2(k, others + [a], weights))
  return rows


@pytest.mark.parametrize("m, rounds, with_targets", [(5, 3, False), (150, 2, True)])
def test_the_steps_are_those_of_the_papers(m, rounds, with_targets, x64):
  """With parts that are smaller and larger than blocks of the implementation, and repeated rows."""
  p, length = 300, m << rounds
  x, weights = RNG.normal(size=(p, 2)), RNG.uniform(0, 2, p)
  targets = RNG.normal(size=(p, 1)) if with_targets else None
  k = gram(x, targets)
  sequence = RNG.choice(p, length, p=weights / weights.sum())
  padded = np.resize(sequence, -(-(length + m) // thinning._BLOCK) * thinning._BLOCK)
  key = jax.random.key(3)
  uniforms = [
    np.asarray(jax.random.uniform(jax.random.fold_in(key, i), (padded.size // 2,)))
    for i in range(rounds)
  ]
  parts = split(k, sequence, rounds, uniforms)
  candidates = [*parts, sequence[:: 2**rounds]]
  best = min(candidates, key=lambda rows: mmd2(k, np.array(rows), weights))
  mean = k @ weights / weights.sum()
  found = thinning._thin(
    key,
    KERNEL,
    m + 2,
    jnp.asarray(x),
    None if targets is None else jnp.asarray(targets),
    jnp.ones(p, bool),
    jnp.asarray(mean),
    jnp.asarray(padded, jnp.int32),
    jnp.int32(m),
    jnp.int32(rounds),
  )
  assert np.asarray(found)[:m].tolist() == swap(k, best, weights)


def test_resampled_rows_follow_the_weights():
  weights, random = RNG.uniform(0, 3, 50), RNG.uniform(size=51)
  for length in (20, 50, 200):
    counts = np.bincount(thinning._resample(weights, length, random), minlength=50)
    assert np.abs(counts - length * weights / weights.sum()).max() < 1 + 1e-9
  assert sorted(thinning._resample(np.ones(50), 50, random)) == list(range(50))


@pytest.mark.parametrize("m, weighted", slow_except([(7, False), (100, True)], (100, True)))
def test_the_mmd_is_far_below_that_of_random_rows(m, weighted):
  n = 600
  x = RNG.normal(size=(n, 2)).astype("f4")
  weights = RNG.integers(0, 3, n).astype("f4") if weighted else np.ones(n, "f4")
  k, live = gram(x.astype("f8")), np.flatnonzero(weights)
  p = weights[live].astype("f8") / weights.sum()
  random = [mmd2(k, RNG.choice(live, m, p=p), weights) for _ in range(20)]
  for seed in range(2):
    rows = np.asarray(kipcore.kernel_thinning(seed, KERNEL, x, m, weights=weights))
    assert len(set(rows.tolist())) == m and (weights[rows] > 0).all()
    assert np.sqrt(mmd2(k, rows, weights)) < 0.3 * np.sqrt(np.mean(random))


def test_rows_beyond_the_pool_are_represented_by_a_sample(monkeypatch):
  """Rows of a pool may be selected; the MMD that they minimize is that to all rows."""
  x, weights = RNG.normal(size=(1000, 2)).astype("f4"), RNG.integers(1, 4, 1000).astype("f4")
  monkeypatch.setattr(thinning, "POOL_ROWS", 200)
  k, u = gram(x.astype("f8")), weights.astype("f8") / weights.sum()
  every = np.arange(1000)
  pool = thinning._pool(
    jax.random.key(0), KERNEL, jnp.asarray(x), None, every, every, jnp.asarray(weights), 20
  )
  assert len(set(pool.rows.tolist())) == 200 and pool.present.all() and pool.rounds == 3
  assert_close(pool.mean, k[pool.rows] @ u, 1e-5)
  rows = np.asarray(kipcore.kernel_thinning(0, KERNEL, x, 20, weights=weights))
  random = np.mean([mmd2(k, RNG.choice(1000, 20, p=u), weights) for _ in range(20)])
  assert np.sqrt(mmd2(k, rows, weights)) < 0.4 * np.sqrt(random)


def test_all_rows_can_be_thinned_to_all_rows():
  x = RNG.normal(size=(9, 2)).astype("f4")
  assert sorted(kipcore.kernel_thinning(0, KERNEL, x, 9).tolist()) == list(range(9))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(num_rows=0), "num_rows: expected a positive integer, got 0"),
    (
      dict(num_rows=9),
      "num_rows: expected at most the number of rows of positive weight, 8, got 9",
    ),
    (dict(weights=np.zeros(8, "f4")), "positive weight, 0, got 3"),
    (dict(weights=-np.ones(8, "f4")), "weights: expected values >= 0"),
    (dict(x=np.full((8, 2), np.nan, "f4")), "x: expected finite values"),
    (dict(x=np.ones((8, 2), int)), "x: expected a floating dtype"),
    (dict(targets=np.ones((7, 1), "f4")), "targets: expected shape"),
  ],
)
def test_invalid_input(change, message):
  with pytest.raises((ValueError, TypeError), match=message):
    kipcore.kernel_thinning(0, KERNEL, **{"x": np.eye(8, 2, dtype="f4"), "num_rows": 3, **change})
