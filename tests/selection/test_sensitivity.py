"""Sensitivities against independent suprema, their certificates, and the k-means bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import FLOAT64_IS_SLOW, RTOL, SHARED_DATA, assert_close, needs, read_idx
from sklearn.cluster import KMeans

from kipcore import kernels
from kipcore.architectures import fc
from kipcore.selection import leverage, score_ridge, sensitivity, sensitivity_cores
from kipcore.selection.sensitivity import Guarantee
from kipcore.types import Status


def problem(n=60, d=5, classes=3, seed=0):
  """Rows of unequal length, labels one-hot - 1/c, class sizes unequal, weights."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) * np.exp(0.7 * rng.normal(size=(n, 1)))
  label = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
  return x, np.eye(classes)[label] - 1 / classes, label, rng.uniform(0.2, 3.0, n)


def rbf(x1, x2=None):
  x2 = x1 if x2 is None else x2
  return jnp.exp(-0.5 * jnp.sum((x1[:, None, :] - x2[None, :, :]) ** 2, axis=-1) / 4.0)


def rbf_matrix(x):
  return np.exp(-0.5 * ((x[:, None] - x[None]) ** 2).sum(-1) / 4.0)


def exact(k, y, ridge, u=None):
  """Tau + ||r||^2 / F* in float64, by explicit inverse."""
  root = np.sqrt(np.ones(len(k)) if u is None else u)
  k, y = (
    root[:, None] * np.asarray(k, np.float64) * root[None],
    root[:, None] * np.asarray(y, np.float64),
  )
  inverse = np.linalg.inv(k + ridge * np.eye(len(k)))
  residual = ridge * inverse @ y
  return 1 - ridge * np.diag(inverse) + (residual**2).sum(1) / (residual * y).sum()


def approximate(key, x, y, ridge, num_landmarks=12, weights=None, **options):
  """`approximate_krr_sensitivities` at sizes that most tests share, so that it compiles once."""
  y = jnp.asarray(y)
  weights = jnp.ones(len(x), y.dtype) if weights is None else jnp.asarray(weights, y.dtype)
  return sensitivity.approximate_krr_sensitivities(
    key, rbf, jnp.asarray(x, y.dtype), y, ridge, num_landmarks, weights, block_size=16, **options
  )


def objective(x, y, w, ridge):
  return ((x @ w - y) ** 2).sum() + ridge * (w**2).sum()


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 100.0])
def test_scores_equal_the_supremum(x64, classes, ridge):
  # F and f_i are quadratic forms of (vec W, 1), so sup f_i / F is a generalized eigenvalue.
  n, p = 25, 6
  rng = np.random.default_rng(0)
  x, u = rng.normal(size=(n, p)), rng.uniform(0.2, 3.0, n)
  y = rng.normal(size=(n, classes))
  xw, yw = np.sqrt(u)[:, None] * x, np.sqrt(u)[:, None] * y

  def form(rows, labels, reg):
    top = np.kron(np.eye(classes), rows.T @ rows + reg * np.eye(p))
    side = -(rows.T @ labels).T.reshape(-1, 1)
    return np.block([[top, side], [side.T, np.array([[(labels**2).sum()]])]])

  whole = form(xw, yw, ridge)
  supremum = [
    scipy.linalg.eigh(form(xw[i : i + 1], yw[i : i + 1], 0.0), whole, eigvals_only=True)[-1]
    for i in range(n)
  ]
  scores = sensitivity.krr_sensitivities(
    jnp.asarray(x @ x.T), jnp.asarray(y), ridge, jnp.asarray(u)
  )
  assert_close(scores, supremum, 1e-10)
  features = sensitivity.feature_krr_sensitivities(
    jnp.asarray(x), jnp.asarray(y), ridge, jnp.asarray(u), block_size=7
  )
  assert_close(features.scores, supremum, 1e-10)
  assert features.guarantee == Guarantee.EXACT


def test_no_random_query_exceeds_the_scores(x64):
  x, y, _, _ = problem(n=40)
  ridge, rng = 0.7, np.random.default_rng(1)
  scores = np.asarray(sensitivity.krr_sensitivities(jnp.asarray(x @ x.T), jnp.asarray(y), ridge))
  best = np.linalg.solve(x.T @ x + ridge * np.eye(5), x.T @ y)
  largest = np.zeros(40)
  for _ in range(10_000):
    w = 10 ** rng.uniform(-3, 3) * rng.normal(size=(5, 3)) + rng.integers(2) * best
    largest = np.maximum(largest, ((x @ w - y) ** 2).sum(1) / objective(x, y, w, ridge))
  assert (largest <= scores + 1e-12).all()
  assert (largest / scores).max() > 0.5


def test_sum_objective_and_diagnostics(x64):
  x, y, _, u = problem()
  k = rbf_matrix(x)
  for ridge in (1e-3, 0.3, 20.0):
    for weights in (None, u):
      w = np.ones(60) if weights is None else weights
      got = sensitivity.krr_sensitivity_scores(
        jnp.asarray(k), jnp.asarray(y), ridge, None if weights is None else jnp.asarray(w)
      )
      root = np.sqrt(w)
      kw, yw = root[:, None] * k * root, root[:, None] * y
      dual = np.linalg.solve(kw + ridge * np.eye(60), yw)
      residual = yw - kw @ dual
      optimum = (residual**2).sum() + ridge * np.sum(dual * (kw @ dual))
      assert abs(got.objective / optimum - 1) < 1e-9
      assert abs(got.total - got.effective_dimension - (residual**2).sum() / optimum) < 1e-9
      assert 0 <= got.label_mass <= 1 and got.effective_dimension_lower == got.effective_dimension
      s, tau = np.asarray(got.scores), np.asarray(got.leverage)
      assert (0 <= tau).all() and (tau <= s).all() and (s <= 1).all()
      assert_close(got.label_scores, s - tau, 1e-12, 1e-15)
      assert_close(got.max_over_mean, s.max() / s.mean(), 1e-12)
      assert_close(got.second_moment, 60 * ((s / s.sum()) ** 2).sum(), 1e-12)
      assert int(got.status) == Status.OK and got.guarantee == Guarantee.EXACT


def test_invariances(x64):
  x, y, _, u = problem()
  k, ridge, rng = rbf_matrix(x), 0.3, np.random.default_rng(2)
  call = lambda k, y, ridge, u: np.asarray(
    sensitivity.krr_sensitivities(jnp.asarray(k), jnp.asarray(y), ridge, jnp.asarray(u))
  )
  s = call(k, y, ridge, u)
  assert_close(call(5 * k, y, 5 * ridge, u), s, 1e-11)
  assert_close(call(k, 9 * y, ridge, u), s, 1e-11)
  rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  assert_close(call(k, y @ rotation, ridge, u), s, 1e-11)
  order = rng.permutation(60)
  assert_close(call(k[order][:, order], y[order], ridge, u[order]), s[order], 1e-11)
  # A duplicate halves the score; an integer weight is that many copies.
  twice, half = np.append(np.arange(60), 7), np.append(u, u[7] / 2)
  half[7] /= 2
  copies = call(k[twice][:, twice], y[twice], ridge, half)
  assert_close(copies[[7, 60]], [s[7] / 2] * 2, 1e-11)
  assert_close(np.delete(copies, [7, 60]), np.delete(s, 7), 1e-11)
  counts = rng.integers(1, 4, 60)
  repeated = np.repeat(np.arange(60), counts)
  by_copies = exact(k[repeated][:, repeated], y[repeated], ridge)
  assert_close(call(k, y, ridge, counts.astype(float)), np.bincount(repeated, by_copies), 1e-10)
  assert np.abs(call(k, y + 1 / 3, ridge, u) - s).max() > 1e-3  # centring the labels matters


def test_labels_as_an_extra_feature_give_lower_scores(x64):
  x, y, _, _ = problem()
  k, y, ridge = rbf_matrix(x), y[:, :1], 2.0
  joint = np.diag(np.linalg.solve(k + y @ y.T + ridge * np.eye(60), k + y @ y.T))
  got = sensitivity.krr_sensitivity_scores(jnp.asarray(k), jnp.asarray(y), ridge)
  residual2 = np.asarray(got.label_scores * got.objective)
  assert_close(joint, np.asarray(got.leverage) + residual2 / (float(got.objective) + ridge), 1e-10)
  assert (joint < np.asarray(got.scores)).all()


@pytest.mark.parametrize("ridge", [0.05, 1.0, 50.0])
@FLOAT64_IS_SLOW
def test_class_blocks_are_upper_bounds(dtype, ridge):
  x, y, label, u = problem()
  truth = exact(rbf_matrix(x), y, ridge, u)
  args = jnp.asarray(x, dtype), jnp.asarray(y, dtype), ridge
  got = sensitivity.blocked_krr_sensitivities(rbf, *args, label, jnp.asarray(u, dtype))
  assert (np.asarray(got.scores) >= truth - RTOL[dtype.name]).all()
  assert got.guarantee == Guarantee.OVER_ESTIMATE and got.scores.dtype == dtype
  # Never above the exact scores within the class, and equal to them in the largest.
  bests = []
  for c in range(3):
    rows = np.where(label == c)[0]
    within = exact(rbf_matrix(x[rows]), y[rows], ridge, u[rows])
    bests.append(np.abs(np.asarray(got.scores)[rows] - within).max())
    assert (np.asarray(got.scores)[rows] <= within + 10 * RTOL[dtype.name]).all()
  assert min(bests) < 20 * RTOL[dtype.name]
  one = sensitivity.blocked_krr_sensitivities(rbf, *args, np.zeros(60, int), jnp.asarray(u, dtype))
  assert_close(one.scores, truth, 20 * RTOL[dtype.name])
  # Knowing F* tightens the label term and stays an over-estimate.
  full = sensitivity.krr_sensitivity_scores(
    jnp.asarray(rbf_matrix(x), dtype), args[1], ridge, jnp.asarray(u, dtype)
  )
  known = sensitivity.blocked_krr_sensitivities(
    rbf, *args, label, jnp.asarray(u, dtype), full.objective
  )
  assert (np.asarray(known.scores) >= truth - RTOL[dtype.name]).all()
  assert known.total <= got.total * (1 + 1e-5)


@pytest.mark.parametrize("refine", [False, True])
def test_landmark_scores_are_upper_bounds_for_every_draw(x64, refine):
  x, y, _, u = problem()
  k, weights = rbf_matrix(x), jnp.asarray(u)
  call = lambda seed, ridge, s: approximate(jax.random.key(seed), x, y, ridge, s, u, refine=refine)
  for ridge in (0.05, 1.0, 30.0):
    truth = sensitivity.krr_sensitivity_scores(jnp.asarray(k), jnp.asarray(y), ridge, weights)
    assert_close(truth.scores, exact(k, y, ridge, u), 1e-10)
    for seed in range(100):
      got = call(seed, ridge, 12)
      assert (np.asarray(got.scores) >= np.asarray(truth.scores) - 1e-12).all()
      assert got.effective_dimension_lower <= truth.effective_dimension <= got.effective_dimension
      assert got.objective <= truth.objective * (1 + 1e-12)
      assert got.guarantee == Guarantee.OVER_ESTIMATE and int(got.status) == Status.OK
    # More landmarks than rows: all of them, and the exact scores.
    assert_close(call(0, ridge, 100).scores, truth.scores, 1e-6)
  assert (call(1, 30.0, 12).scores == call(1, 30.0, 12).scores).all()
  assert (call(1, 30.0, 12).scores != call(2, 30.0, 12).scores).any()


def test_refinement_tightens_the_label_term(x64):
  x, y, _, _ = problem(n=200)
  k = jnp.asarray(rbf_matrix(x))
  ridge = score_ridge.score_ridge_for_dimension(k, 4.0).ridge
  truth = sensitivity.krr_sensitivity_scores(k, jnp.asarray(y), ridge)
  totals = [
    sensitivity.approximate_krr_sensitivities(
      jax.random.key(0),
      rbf,
      jnp.asarray(x),
      jnp.asarray(y),
      ridge,
      40,
      block_size=100,
      refine=refine,
    ).total
    for refine in (False, True)
  ]
  assert truth.total <= totals[1] <= 1.6 * truth.total
  assert totals[1] < 0.8 * totals[0]


def test_parts_of_the_nystrom_bound(x64):
  x, y, _, u = problem()
  k, root, s = rbf_matrix(x), np.sqrt(u), np.arange(12) * 5
  kw, yw = root[:, None] * k * root, root[:, None] * y
  for ridge in (0.05, 1.0, 30.0):
    truth = sensitivity.krr_sensitivity_scores(
      jnp.asarray(k), jnp.asarray(y), ridge, jnp.asarray(u)
    )
    # Restricted to the span of the landmarks, W = sum_s c_s phi_s.
    c = np.linalg.solve(kw[:, s].T @ kw[:, s] + ridge * kw[s][:, s], kw[:, s].T @ yw)
    r = yw - kw[:, s] @ c
    reached = (r**2).sum() + ridge * np.sum(c * (kw[s][:, s] @ c))
    start = sensitivity_cores.nystrom_start(rbf, jnp.asarray(x[s]), jnp.asarray(root[s]))
    blocks = [tuple(jnp.asarray(a[b : b + 16]) for a in (x, root, yw)) for b in range(0, 60, 16)]
    totals = sensitivity_cores.nystrom_totals(start, yw.shape[1])
    for block in blocks:
      totals = sensitivity_cores.nystrom_gather(rbf, start, totals, *block)
    fit = sensitivity_cores.nystrom_fit(start, totals, jnp.asarray(ridge))
    rows = [
      sensitivity_cores.nystrom_rows(rbf, start, fit, jnp.asarray(ridge), *block)
      for block in blocks
    ]
    tau, residual2 = (jnp.concatenate(a) for a in list(zip(*rows))[:2])
    nothing = jnp.ones(60), jnp.zeros(60), jnp.zeros(60)
    bound = sensitivity_cores.two_pass_scores(
      nothing, fit, tau, residual2, sum(row[2] for row in rows), jnp.asarray(ridge), jnp.int32(0)
    )[2]
    assert_close(residual2, (r**2).sum(1), 1e-8)
    assert (np.asarray(tau) >= np.asarray(truth.leverage) - 1e-12).all()
    assert bound <= truth.objective
    # Written out block by block.
    e = kw - kw[:, s] @ np.linalg.solve(kw[s][:, s], kw[s])
    unseen = [
      np.sqrt(np.diag(r[b : b + 16].T @ e[b : b + 16, b : b + 16] @ r[b : b + 16]))
      for b in range(0, 60, 16)
    ]
    assert_close(bound, max(reached - (sum(unseen) ** 2).sum() / ridge, 0), 1e-7, 1e-7)
  assert bound > 0.5 * truth.objective


def test_spectral_norm_bound(dtype):
  rng = np.random.default_rng(0)
  for scale in (1e-6, 1.0, 1e6):
    for rank in (1, 3, 40):
      f = rng.normal(size=(40, rank))
      e = scale * f @ f.T
      norm = np.linalg.norm(e, 2)
      bound = float(sensitivity_cores.norm_bound(jnp.asarray(e, dtype)))
      assert norm * (1 - 1e-5) <= bound <= rank ** (1 / 16) * norm * (1 + 1e-5)
  assert sensitivity_cores.norm_bound(jnp.zeros((4, 4), dtype)) == 0


@FLOAT64_IS_SLOW
def test_given_landmarks_inside_jit(dtype):
  x, y, _, u = problem()
  call = lambda key, ridge: approximate(
    key, x, jnp.asarray(y, dtype), ridge, 12, jnp.asarray(u, dtype), landmarks=jnp.arange(12) * 5
  )
  eager = call(jax.random.key(0), 0.5)
  assert_close(jax.jit(call)(jax.random.key(0), 0.5).scores, eager.scores, 20 * RTOL[dtype.name])
  compiled = sensitivity_cores.landmark_scores._cache_size()
  call(jax.random.key(5), 0.9)
  call(jax.random.key(6), jnp.asarray(3.0, dtype))
  assert sensitivity_cores.landmark_scores._cache_size() == compiled
  truth = exact(rbf_matrix(x), y, 0.5, u)
  assert (np.asarray(eager.scores) >= truth - RTOL[dtype.name]).all()


@FLOAT64_IS_SLOW
def test_vmap_over_classes_matches_a_loop(dtype):
  x, y, _, _ = problem()
  k, y = (
    jnp.asarray(rbf_matrix(x).reshape(3, 20, 3, 20)[range(3), :, range(3)], dtype),
    jnp.asarray(y, dtype),
  )
  y = y.reshape(3, 20, 3)
  mapped = jax.vmap(sensitivity.krr_sensitivities, (0, 0, None))(k, y, 0.5)
  for c in range(3):
    assert_close(mapped[c], sensitivity.krr_sensitivities(k[c], y[c], 0.5), 20 * RTOL[dtype.name])
    assert_close(mapped[c], exact(k[c], y[c], 0.5), 20 * RTOL[dtype.name])


def test_float32_has_three_digits_for_large_ridges():
  x, y, _, _ = problem(n=150)
  k = rbf_matrix(x)
  for ridge in (1e-2, 1e-1, 1.0, 10.0):
    got = sensitivity.krr_sensitivities(
      jnp.asarray(k, jnp.float32), jnp.asarray(y, jnp.float32), ridge
    )
    assert np.abs(np.asarray(got) - exact(k, y, ridge)).max() < 1e-3
  with pytest.raises(ValueError, match="in float32"):
    sensitivity.approximate_krr_sensitivities(
      jax.random.key(0), rbf, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), 1e-5, 10
    )
  traced = jax.jit(sensitivity.krr_sensitivity_scores)(
    jnp.asarray(k, jnp.float32), jnp.asarray(y, jnp.float32), 1e-6
  )
  assert int(traced.status) == Status.NOT_POSITIVE_DEFINITE and np.isnan(traced.scores).all()


@pytest.mark.filterwarnings("ignore:scores are nearly equal")
@FLOAT64_IS_SLOW
def test_degenerate_data(dtype):
  x, y, _, _ = problem(n=30)
  k = jnp.asarray(rbf_matrix(x), dtype)
  tau = leverage.ridge_leverage_scores(k, 0.5)
  no_labels = sensitivity.krr_sensitivity_scores(k, jnp.zeros((30, 3), dtype), 0.5)
  assert (no_labels.scores == tau).all() and no_labels.label_mass == 0
  rows = np.repeat(problem()[0][:12], 5, axis=0)
  constant = jnp.ones((60, 3), dtype)
  for labels in (constant, 0 * constant):
    got = approximate(jax.random.key(0), rows, labels, 0.5)
    truth = sensitivity.krr_sensitivities(jnp.asarray(rbf_matrix(rows), dtype), labels, 0.5)
    assert (np.asarray(got.scores) >= np.asarray(truth) - RTOL[dtype.name]).all()
  one = sensitivity.krr_sensitivity_scores(k[:1, :1], jnp.ones((1, 1), dtype), 0.5)
  assert_close(one.scores, [1.0], 1e-6)


def test_nearly_equal_scores_issue_a_warning(x64):
  k = jnp.asarray(rbf_matrix(problem()[0]))
  with pytest.warns(UserWarning, match="nearly equal"):
    sensitivity.krr_sensitivity_scores(k + 0.01 * jnp.eye(60), jnp.ones((60, 1)), 1e-6)


def test_invalid_input_raises():
  k, y, x = jnp.eye(4), jnp.ones((4, 1)), jnp.ones((4, 2))
  key = jax.random.key(0)
  for call, message in (
    (lambda: sensitivity.krr_sensitivities(k, y[:3], 1.0), "same number of rows"),
    (lambda: sensitivity.krr_sensitivities(k, y[:, 0], 1.0), "y: expected"),
    (lambda: sensitivity.krr_sensitivities(k.at[0, 1].set(jnp.nan), y, 1.0), "k: expected finite"),
    (lambda: sensitivity.krr_sensitivities(k, y.at[2].set(jnp.inf), 1.0), "y: expected finite"),
    (lambda: sensitivity.krr_sensitivities(k, y, -1.0), "ridge"),
    (lambda: sensitivity.approximate_krr_sensitivities(key, rbf, x, y, 1.0, 0), "num_landmarks"),
    (
      lambda: sensitivity.approximate_krr_sensitivities(key, rbf, x * jnp.nan, y, 1.0, 2),
      "x: expected finite",
    ),
    (lambda: sensitivity.blocked_krr_sensitivities(rbf, x, y, 1.0, np.zeros(3)), "groups"),
    (lambda: sensitivity.kmeans_sensitivities(x, jnp.ones((2, 3))), "centers"),
    (lambda: sensitivity.kmeans_sensitivities(x, x, alpha=0.5), "alpha"),
    (lambda: sensitivity.kmeans_sensitivities(x, x[:0]), "at least one row"),
    (lambda: sensitivity.lightweight_sensitivities(x, -jnp.ones(4)), "weights"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(TypeError, match="floating"):
    sensitivity.krr_sensitivities(k, jnp.ones((4, 1), jnp.int32), 1.0)
  with pytest.raises(TypeError, match="traced"):
    jax.jit(lambda g: sensitivity.blocked_krr_sensitivities(rbf, x, y, 1.0, g))(
      jnp.zeros(4, jnp.int32)
    )


def test_mnist_upper_bounds_are_tight():
  folder = needs(SHARED_DATA / "mnist")
  x = read_idx(folder / "train-images-idx3-ubyte.gz")[:600].reshape(600, -1) / np.float32(255)
  label = read_idx(folder / "train-labels-idx1-ubyte.gz")[:600].astype(np.int64)
  x = jnp.asarray((x - x.mean(0)) / x.std())
  y = jnp.asarray((np.eye(10)[label] - 0.1).astype(np.float32))
  kernel_fn = kernels.ntk_fn(fc(1))
  k = kernel_fn(x)
  for target in (10.0, 100.0):
    ridge = score_ridge.score_ridge_for_dimension(k, target).ridge
    truth = np.asarray(sensitivity.krr_sensitivities(k, y, ridge))
    landmarks = sensitivity.approximate_krr_sensitivities(
      jax.random.key(0), kernel_fn, x, y, ridge, 150, block_size=256
    )
    known = sensitivity.blocked_krr_sensitivities(
      kernel_fn, x, y, ridge, label, None, landmarks.objective
    )
    for got in (landmarks, known):
      assert (np.asarray(got.scores) >= truth - 1e-5).all()
      assert got.total <= 1.5 * truth.sum(), (target, got.total)


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_bound_holds_for_every_query(x64, weighted):
  n, k, rng = 45, 3, np.random.default_rng(0)
  x = rng.normal(size=(n, 2)) + 5 * rng.normal(size=(3, 2))[rng.integers(0, 3, n)]
  u = rng.uniform(0.2, 3.0, n) if weighted else np.ones(n)
  optimum = KMeans(k, n_init=100, random_state=0).fit(x, sample_weight=u).inertia_
  centers = x[rng.choice(n, k, replace=False)]
  cost = (u * ((x[:, None] - centers[None]) ** 2).sum(-1).min(1)).sum()
  alpha = cost / optimum
  assert alpha > 1
  bound = np.asarray(
    sensitivity.kmeans_sensitivities(
      jnp.asarray(x), jnp.asarray(centers), jnp.asarray(u) if weighted else None, alpha
    )
  )
  assert bound.sum() <= 6 * alpha + 4 * k + 1e-9
  largest = np.zeros(n)
  for _ in range(20_000):
    near = x[rng.choice(n, k, replace=False)]
    query = near + 10 ** rng.uniform(-2, 1) * rng.normal(size=(k, 2))
    losses = u * ((x[:, None] - query[None]) ** 2).sum(-1).min(1)
    largest = np.maximum(largest, losses / losses.sum())
  assert (largest <= bound).all()
  if weighted:
    return
  # The formula, written out, far from the origin in float32; a weight is a multiplicity.
  shifted = sensitivity.kmeans_sensitivities(
    jnp.asarray(x + 1e3, jnp.float32), jnp.asarray(centers + 1e3, jnp.float32), None, 2.0
  )
  d2 = ((x[:, None] - centers[None]) ** 2).sum(-1)
  own = d2.argmin(1)
  size, part = np.bincount(own), np.bincount(own, d2.min(1))
  assert_close(shifted, 4 * d2.min(1) / cost + 8 * (part / size)[own] / cost + 4 / size[own], 1e-3)
  counts = rng.integers(1, 4, n)
  copies = np.repeat(np.arange(n), counts)
  by_weight = sensitivity.kmeans_sensitivities(
    jnp.asarray(x), jnp.asarray(centers), jnp.asarray(counts, jnp.float64)
  )
  by_copies = sensitivity.kmeans_sensitivities(jnp.asarray(x[copies]), jnp.asarray(centers))
  assert_close(by_weight, np.bincount(copies, by_copies), 1e-11)


def test_kmeans_scores_of_equal_rows(dtype):
  scores = sensitivity.kmeans_sensitivities(jnp.ones((6, 2), dtype), jnp.ones((1, 2), dtype))
  assert_close(scores, np.full(6, 4 / 6), 1e-6)
  unused = jnp.asarray([[1.0, 1.0], [50.0, 50.0]], dtype)
  assert np.isfinite(sensitivity.kmeans_sensitivities(jnp.ones((6, 2), dtype), unused)).all()


def test_lightweight_probabilities(dtype):
  x, _, _, u = problem()
  call = lambda x, u=None: np.asarray(
    sensitivity.lightweight_sensitivities(
      jnp.asarray(x, dtype), None if u is None else jnp.asarray(u, dtype)
    ),
    np.float64,
  )
  rtol = 20 * RTOL[dtype.name]
  q = call(x)
  d2 = ((x - x.mean(0)) ** 2).sum(1)
  assert_close(q, 0.5 / 60 + 0.5 * d2 / d2.sum(), rtol)
  assert abs(q.sum() - 1) < rtol and (q >= 0.5 / 60 * (1 - rtol)).all()
  rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
  assert_close(call(3 * x @ rotation + 2.0), q, rtol)
  assert_close(call(x, u), call(x, 5 * u), rtol)
  counts = np.random.default_rng(1).integers(1, 4, 60)
  copies = np.repeat(np.arange(60), counts)
  assert_close(call(x, counts), np.bincount(copies, call(x[copies])), rtol)
  assert_close(call(np.ones((4, 2)), np.array([1.0, 2.0, 3.0, 4.0])), np.arange(1, 5) / 10, rtol)
