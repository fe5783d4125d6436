"""Selections of other packages, for comparison with `kipcore.select`.

coreax and goodpoints select rows of equal weight from vectors without labels. They are called as
`kipcore.select` treats its own strategies: within each class, with the same numbers of rows, and for
real targets on columns that include the target; the kernel is Gaussian with the same bandwidth.
MiniBatchKMeans of scikit-learn gives new points: the centers of all rows, weighted by the sizes of
their clusters, with the most frequent class or the mean target of their cluster as label. Nystroem of
scikit-learn selects no training rows: ridge regression on features from as many landmarks is trained
on all rows and labels.
"""

import importlib.util
import warnings
from collections.abc import Callable

import numpy as np

from experiments.studies import selection_models
from experiments.studies.selection_data import Rows
from kipcore.selection import draws

NYSTROEM = "sklearn_nystroem"
KMEANS = "sklearn_minibatch_kmeans"
# goodpoints thins a random pool of at most this many rows, whose kernel matrix it holds.
_POOL = 4096


def _coreax_herding(seed: int, points: np.ndarray, size: int) -> np.ndarray:
  from coreax.kernels import SquaredExponentialKernel
  from coreax.solvers import KernelHerding

  return _coreax(KernelHerding(size, SquaredExponentialKernel(1.0), block_size=1000), points)


def _coreax_rpcholesky(seed: int, points: np.ndarray, size: int) -> np.ndarray:
  import jax
  from coreax.kernels import SquaredExponentialKernel
  from coreax.solvers import RPCholesky

  return _coreax(RPCholesky(size, jax.random.key(seed), SquaredExponentialKernel(1.0)), points)


def _coreax(solver, points: np.ndarray) -> np.ndarray:
  import coreax
  import jax.numpy as jnp

  found, _ = solver.reduce(coreax.Data(jnp.asarray(points)))
  return np.asarray(found.unweighted_indices)


def _goodpoints_thinning(seed: int, points: np.ndarray, size: int) -> np.ndarray:
  """Halves a random pool of size * 2^h rows h times."""
  from goodpoints import kt

  halvings = max(0, int(np.log2(min(len(points), max(_POOL, size)) / size)))
  pool = np.random.default_rng(seed).permutation(len(points))[: size * 2**halvings]
  if not halvings:
    return pool
  squares = np.sum(points[pool].astype(np.float64) ** 2, axis=1)
  products = points[pool].astype(np.float64) @ points[pool].T
  kernel = np.exp(-np.maximum(squares[:, None] + squares - 2 * products, 0) / 2)
  return pool[kt.thin_K(kernel, kernel, halvings, seed=seed, unique=True)]


# name -> package, and the rows `(size,)` that it selects from points at a seed
SELECTIONS: dict[str, tuple[str, Callable]] = {
  "coreax_herding": ("coreax", _coreax_herding),
  "coreax_rpcholesky": ("coreax", _coreax_rpcholesky),
  "goodpoints_thinning": ("goodpoints", _goodpoints_thinning),
}
NAMES = (*SELECTIONS, KMEANS, NYSTROEM)
DETERMINISTIC = ("coreax_herding",)


def missing(name: str) -> str | None:
  """The package that a selection needs, if it is not installed."""
  package = SELECTIONS[name][0] if name in SELECTIONS else "sklearn"
  return None if importlib.util.find_spec(package) else package


def select(
  name: str, seed: int, data: Rows, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows `(size, d)`, labels and weights that another package selects."""
  if name == KMEANS:
    return _centers(seed, data, size)
  points = data.x / np.sqrt(data.x.var(axis=0).sum())
  groups = np.zeros(len(points), np.int64)
  if data.has_classes:
    groups = np.unique(data.y, return_inverse=True)[1]
  else:
    points = np.column_stack([points, (data.y - data.y.mean()) / data.y.std()])
  counts = np.bincount(groups)
  quotas = draws.class_quotas(np.arange(counts.size), counts, counts, size, False)
  rows, weights = [], []
  for group, quota in enumerate(quotas):
    members = np.flatnonzero(groups == group)
    rows.append(members[SELECTIONS[name][1](seed, points[members], int(quota))])
    weights.append(np.full(quota, members.size / quota))
  chosen = np.concatenate(rows)
  return data.x[chosen], data.y[chosen], np.concatenate(weights)


def _centers(seed: int, data: Rows, size: int):
  """Centers of MiniBatchKMeans with labels and weights; empty clusters are left out."""
  from sklearn.cluster import MiniBatchKMeans

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fewer distinct rows than clusters
    model = MiniBatchKMeans(size, random_state=seed, n_init=1).fit(data.x)
  place = model.predict(data.x)
  _, targets = selection_models.coded(data.y, data)
  sums = np.zeros((size, targets.shape[1]))
  np.add.at(sums, place, targets)
  mass = np.bincount(place, minlength=size)
  live = mass > 0
  if data.has_classes:
    labels = np.unique(data.y)[sums[live].argmax(axis=1)]
  else:
    labels = (sums[live, 0] / mass[live]).astype(data.y.dtype)
  return model.cluster_centers_[live], labels, mass[live].astype(np.float64)


def nystroem_error(seed: int, data: Rows, size: int) -> float:
  """The error of ridge regression on Nystroem features of `size` uniform landmarks, from all rows."""
  from sklearn.kernel_approximation import Nystroem
  from sklearn.linear_model import Ridge

  gamma = 0.5 / float(data.x.var(axis=0).sum())
  features = Nystroem(gamma=gamma, n_components=size, random_state=seed)
  phi = features.fit_transform(data.x)
  _, targets = selection_models.coded(data.y, data)
  # Features have norms of at most 1 in all, and columns of the other models 1 each.
  penalty = selection_models.PENALTY / data.x.shape[1]
  model = Ridge(alpha=penalty * len(phi)).fit(phi, targets)
  outputs = model.predict(features.transform(data.x_test))
  return selection_models.error_of(np.asarray(outputs).reshape(len(data.y_test), -1), data)
