"""Closed-form distillation for ridge regression in invertible features, without training steps."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from kipcore import blocks, checks, keys, linalg, pytrees
from kipcore.distillation import options as option_checks
from kipcore.preprocess import class_labels
from kipcore.selection.coreset import class_balanced_indices
from kipcore.types import Array, Integer, Real, Status, Support

FEATURE_MAPS = ("linear", "fcnn", "rff")
RIDGES = tuple(10.0 ** (half / 2) for half in range(-12, 12))
_SLOPE = 0.1  # of the leaky ReLU


@dataclasses.dataclass(frozen=True)
class ClosedFormOptions:
  """Options of `krr_closed_form`.

  Attributes:
    feature_map, depth, num_features, bandwidth: "linear", "fcnn" or "rff", and its settings; see
      `draw_map`.
    labels: "start" for the labels of the start, or "predicted" for the predictions of the full
      model on the start (published).
    ridges: candidate absolute ridges of the full model.
    criterion: "accuracy" or "loss" on held-out rows, which selects the ridge.
    held_out: fraction of the rows that are held out for this selection.
    relative_ridge: ridge with which the distilled set will be used, as a fraction of tr(K_ss) / m.
    block_size: rows per block.
  """

  feature_map: str = "linear"
  depth: Integer = 1
  num_features: Integer | None = None
  bandwidth: Real = 1000.0**0.5
  labels: str = "start"
  ridges: tuple[float, ...] = RIDGES
  criterion: str = "accuracy"
  held_out: Real = 0.05
  relative_ridge: Real = 1e-6
  block_size: Integer = 2048

  def __post_init__(self):
    option_checks.validate(
      self,
      positive=("bandwidth", "relative_ridge", "held_out"),
      counts={"depth": 1, "num_features": 1, "block_size": 1},
      choices={
        "feature_map": FEATURE_MAPS,
        "labels": ("start", "predicted"),
        "criterion": ("accuracy", "loss"),
      },
    )
    ridges = tuple(checks.number("ridges", ridge, 0, above=True) for ridge in self.ridges)
    if not ridges:
      raise ValueError("ridges: expected at least one candidate, got none")
    object.__setattr__(self, "ridges", ridges)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["weights", "shift"], meta_fields=["name"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMap:
  """An invertible feature map from `draw_map`.

  Attributes:
    name: "linear", "fcnn" or "rff".
    weights: matrices `(inputs, outputs)`.
    shift: `(p,)` for rff, else None.
  """

  name: str
  weights: tuple[Array, ...] = ()
  shift: Array | None = None


@pytrees.record("feature_map")
@dataclasses.dataclass(frozen=True)
class FeatureKernel:
  """<phi(x), phi(x')>; see `feature_kernel`."""

  feature_map: FeatureMap

  def __call__(self, x1: Array, x2: Array | None = None) -> Array:
    phi = map_features(self.feature_map, x1)
    return linalg.matmul(phi, (phi if x2 is None else map_features(self.feature_map, x2)).T)

  def diag(self, x: Array) -> Array:
    """||phi(x_i)||^2, `(n,)`."""
    return jnp.sum(map_features(self.feature_map, x) ** 2, axis=1)


class Validation(NamedTuple):
  """Held-out scores: `ridges`, `accuracy` and `loss` (half mean squared error), each `(r,)`."""

  ridges: np.ndarray
  accuracy: np.ndarray
  loss: np.ndarray


class ClosedForm(NamedTuple):
  """A distilled set and the model that it reproduces.

  Attributes:
    support: `(m, ...)` inputs with the shape and dtype of the given rows, `(m, c)` labels.
    feature_map: phi.
    weights: W `(p, c)` of the full model f(x) = phi(x) W.
    ridge: absolute ridge of the full model.
    support_ridge: absolute ridge with which the set reproduces W: relative_ridge * tr(K_ss) / m, or
      the largest feasible ridge if that is smaller.
    scale: factor of features and labels that keeps them in the range of the map; 1 except for rff.
    error: ||W_S - W|| / ||W||, with W_S from ridge regression on the returned inputs.
    validation: the scores that selected `ridge`.
    held_out: indices of the held-out rows, int32.
    status: int32, `types.Status`.
  """

  support: Support
  feature_map: FeatureMap
  weights: Array
  ridge: float
  support_ridge: float
  scale: float
  error: float
  validation: Validation
  held_out: np.ndarray
  status: Array


def draw_map(
  key,
  name: str,
  num_inputs: int,
  depth: int = 1,
  num_features: int | None = None,
  bandwidth: float = 1000.0**0.5,
  dtype=jnp.float32,
) -> FeatureMap:
  """Draws an invertible feature map R^d -> R^p of flattened rows.

      linear:  phi(x) = x
      fcnn:    `depth` times x <- LeakyReLU_0.1(x A), A (d, d) with entries N(0, 1/d); a bijection
      rff:     phi(x) = sqrt(2/p) cos(x A + b), A (d, p) with entries N(0, 1/bandwidth^2),
               b uniform on [0, 2 pi); onto the cube |phi_j| <= sqrt(2/p) if p <= d

  The expected kernel of rff is exp(-||x - x'||^2 / (2 bandwidth^2)). The published b is uniform on
  [0, pi), which only changes signs.

  Args:
    key: random key (or int seed).
    name: "linear", "fcnn" or "rff".
    num_inputs: d.
    depth: number of fcnn layers.
    num_features: p of rff; None for d, as published. Inputs stay closer to real rows if p is well
      below d.
    bandwidth: length scale of rff, in units of the inputs.
    dtype: dtype of the parameters.

  Returns:
    `FeatureMap`.

  Raises:
    ValueError: for an unknown name, or more features than inputs (the map is then not onto).
  """
  checks.one_of("feature_map", name, FEATURE_MAPS)
  depth = checks.positive_int("depth", depth)
  checks.positive("bandwidth", bandwidth)
  d, p = num_inputs, num_inputs if num_features is None else num_features
  checks.positive_int("num_features", p)
  if p > d or (p != d and name != "rff"):
    raise ValueError(
      f"num_features: expected {'at most ' if name == 'rff' else ''}{d}, the size of a row, got {p}"
    )
  draw = keys.stream(key, "weights")
  if name == "fcnn":
    return FeatureMap(
      name,
      tuple(
        jax.random.normal(keys.at_step(draw, i), (d, d), dtype) * d**-0.5 for i in range(depth)
      ),
    )
  if name == "rff":
    shift = jax.random.uniform(keys.stream(key, "shift"), (p,), dtype, 0.0, 2 * math.pi)
    return FeatureMap(name, (jax.random.normal(draw, (d, p), dtype) / bandwidth,), shift)
  return FeatureMap(name)


def map_features(feature_map: FeatureMap, x: Array) -> Array:
  """phi(x), `(n, p)`, of rows `(n, ...)`, in the dtype of the rows."""
  x = x.reshape(x.shape[0], -1)
  for w in feature_map.weights:
    x = linalg.matmul(x, w.astype(x.dtype))
    if feature_map.name == "fcnn":
      x = jnp.where(x > 0, x, _SLOPE * x)
  if feature_map.shift is not None:
    x = (2 / x.shape[1]) ** 0.5 * jnp.cos(x + feature_map.shift.astype(x.dtype)[None, :])
  return x


def invert_map(feature_map: FeatureMap, phi, near) -> np.ndarray:
  """Rows `(m, ...)` with the features `phi` `(m, p)`, in float64 on the host.

  Many rows have the same Fourier features. For each feature, the function selects the branch of the
  arc cosine closest to that of `near` `(m, ...)`; then it selects the row closest to `near`.
  Features outside [-sqrt(2/p), sqrt(2/p)] are clipped.
  """
  phi, near = np.asarray(phi, np.float64), np.asarray(near, np.float64)
  weights = [np.asarray(w, np.float64) for w in feature_map.weights]
  if feature_map.name == "rff":
    angle = near.reshape(len(near), -1) @ weights[0] + np.asarray(feature_map.shift, np.float64)
    arc = np.arccos(np.clip(phi * (phi.shape[1] / 2) ** 0.5, -1.0, 1.0))
    turns = np.stack([arc - angle, -arc - angle])
    turns -= 2 * np.pi * np.round(turns / (2 * np.pi))
    step = np.where(np.abs(turns[0]) <= np.abs(turns[1]), *turns)
    q, r = scipy.linalg.qr(weights[0], mode="economic")
    return near + (q @ scipy.linalg.solve_triangular(r, step.T, trans="T")).T.reshape(near.shape)
  for w in weights[::-1]:
    phi = scipy.linalg.solve(w.T, np.where(phi > 0, phi, phi / _SLOPE).T).T
  return phi.reshape(near.shape)


def feature_kernel(feature_map: FeatureMap) -> FeatureKernel:
  """The kernel <phi(x), phi(x')> of a feature map.

  Args:
    feature_map: from `draw_map` or a `ClosedForm`.

  Returns:
    A hashable `kernel_fn(x1, x2=None) -> (n1, n2)` with a method `diag`, and a pytree whose leaves are
    the matrices of the map.
  """
  return FeatureKernel(feature_map)


def krr_closed_form(
  key, x, y, start: Support | int, options: ClosedFormOptions = ClosedFormOptions()
) -> ClosedForm:
  """Computes m points whose ridge regression equals that of all rows, using only linear algebra.

      W = (Phi^T Phi + ridge I)^{-1} Phi^T y                             the full model, (p, c)
      E = W Y^+ = U diag(s) V^T                                          (p, m), of rank r
      Phi_S = V diag(sigma) U^T + (I - Y Y^+) Phi_0 (I - U U^T)          (m, p)
      sigma_i = (1 + sqrt(1 - 4 lambda s_i^2)) / (2 s_i),  so that  sigma_i / (sigma_i^2 + lambda) = s_i

  with Y the `(m, c)` labels of the set, Phi_0 the features of the start and lambda the ridge of the
  set. The two parts of Phi_S have orthogonal rows and columns, and the second is orthogonal to Y,
  so Phi_S^T (Phi_S Phi_S^T + lambda I)^{-1} Y = U diag(s) V^T Y = W Y^+ Y = W. The inputs are
  phi^{-1}(Phi_S). If features exceed the range of rff, features and labels are multiplied by
  `scale` and lambda by scale^2, which does not change W.

  Proved: W is reproduced exactly for every lambda <= 1 / (4 s_1^2) if the rows of y lie in the row
    space of Y. This
  holds if each class has a point; for centered labels, which have rank c - 1, points of c - 1
  classes suffice. At lambda = 0, Phi_S is the matrix closest to Phi_0 among those whose dual
  coefficients lie in the range of Y.
  Heuristic: that the inputs resemble the start. Square Gaussian matrices (fcnn, rff with p = d)
    have
  condition numbers of order d. The inputs then look like noise, and rounding them to float32
  increases `error`.

  Published version: p = d, depth 1, W from 95 % of the rows, free part (I - Y^+ Y) pinv(Phi_0) of
    the
  inverse, predicted labels, principal arc cosine, and rff features divided by their largest entry
  but unscaled labels (which scales predictions). This implementation differs in the free part (no
  ill-conditioned pseudo-inverse), W (fitted on all rows after the ridge is selected), the labels
  (scaled with the features), the branch of the arc cosine, and the ridge of the set (never 0).

  Ties in accuracy are broken by the smaller loss. Ridges below the rounding error of Phi^T Phi
  (`linalg.rounding_ridge`) are skipped; in float32 these may be most of them. Loops over row blocks
  with memory for a few p x p matrices and one block, so it cannot be traced.

  Args:
    key: random key (or int seed).
    x: `(n, ...)` training rows, NumPy or JAX.
    y: `(n, c)` labels or any outputs.
    start: initial points, real rows or noise; or the number of rows to draw at random per class.
    options: see `ClosedFormOptions`.

  Returns:
    `ClosedForm`; score it with
    `evaluate_krr(feature_kernel(r.feature_map), r.support, x, y, ridge=r.support_ridge)`.

  Raises:
    ValueError, TypeError: for inconsistent shapes, unknown names, labels of the start that do not
      span those of y, only ridges below the rounding error, or values that are not finite floats.

  References:
    Chen, Huang and Weng (2024), theorems for linear and surjective feature maps.
  """
  checks.same_rows("x", x, "y", y)
  checks.rank("y", y, 2)
  for name, array in {"x": x, "y": y}.items():
    checks.floating(name, array)
  if y.shape[1] == 1 and options.criterion == "accuracy":
    raise ValueError(
      "criterion: expected 'loss' for a single output, which has no classes, got 'accuracy'"
    )
  if not isinstance(start, Support):
    rows = class_balanced_indices(keys.stream(key, "start"), class_labels(y), start, y.shape[1])
    start = Support(jnp.asarray(x[rows]), jnp.asarray(y[rows]))
  checks.shape("start.x", start.x, (None, *x.shape[1:]))
  checks.shape("start.y", start.y, (start.x.shape[0], y.shape[1]))
  # Rows of centered float32 labels sum to zero only up to float32 rounding.
  y64, span = (
    np.asarray(y, np.float64),
    _row_space(np.asarray(start.y, np.float64), float(jnp.finfo(start.y.dtype).eps)),
  )
  if not np.sum((y64 - y64 @ span @ span.T) ** 2) <= 1e-6 * np.sum(y64**2):
    raise ValueError(
      f"start: expected labels that span those of y (for example, a point of each of {y.shape[1]} "
      "classes), "
      f"got {start.y.shape[0]} points whose labels have rank {span.shape[1]}"
    )
  feature_map = draw_map(
    keys.stream(key, "map"),
    options.feature_map,
    math.prod(x.shape[1:]),
    options.depth,
    options.num_features,
    options.bandwidth,
    jax.dtypes.canonicalize_dtype(x.dtype),
  )
  w, ridge, table, held_out, status = _full_model(
    keys.stream(key, "held_out"), x, y, feature_map, options
  )
  w64 = np.asarray(w, np.float64) @ span @ span.T
  phi_start = np.asarray(map_features(feature_map, jnp.asarray(start.x)), np.float64)
  y_s = (
    np.asarray(start.y, np.float64) @ span @ span.T
    if options.labels == "start"
    else phi_start @ w64
  )
  phi, support_ridge = _support_features(w64, y_s, phi_start, options.relative_ridge)
  bound = (2 / phi.shape[1]) ** 0.5 if feature_map.name == "rff" else math.inf
  scale = min(1.0, bound / float(np.abs(phi).max()))
  y_s, support_ridge = scale * y_s, scale**2 * support_ridge
  support = Support(
    jnp.asarray(invert_map(feature_map, scale * phi, start.x), x.dtype), jnp.asarray(y_s, y.dtype)
  )
  status = jnp.where(
    jnp.isfinite(support.x).all(), status, jnp.maximum(status, Status.NOT_FINITE)
  ).astype(jnp.int32)
  found = np.asarray(
    map_features(feature_map, support.x.astype(linalg.widest_dtype(x.dtype))), np.float64
  )
  w_found = found.T @ np.linalg.solve(found @ found.T + support_ridge * np.eye(len(found)), y_s)
  error = float(np.linalg.norm(w_found - w64) / np.linalg.norm(w64))
  return ClosedForm(
    support,
    feature_map,
    jnp.asarray(w64, y.dtype),
    ridge,
    support_ridge,
    scale,
    error,
    table,
    held_out,
    status,
  )


def _full_model(key, x, y, feature_map, options):
  """`(w, ridge, table, held-out rows, status)` of ridge regression on all rows."""
  n, dtype = x.shape[0], linalg.widest_dtype(x.dtype)
  v = max(1, round(options.held_out * n))
  if v >= n:
    raise ValueError(
      f"held_out: expected a fraction that leaves rows to fit, got {options.held_out} of {n} rows"
    )
  order = np.asarray(jax.random.permutation(key, n))
  held_out, fit = np.sort(order[:v]), np.sort(order[v:])
  row_blocks = functools.partial(_row_blocks, x, y, min(options.block_size, n), dtype)
  p = map_features(feature_map, jnp.asarray(x[:1])).shape[1]
  sums = (jnp.zeros((p, p), dtype), jnp.zeros((p, y.shape[1]), dtype))
  for block in row_blocks(fit):
    sums = _add(feature_map, sums, block)
  checks.finite("moments of the features (x may contain NaN or values that are too large)", sums[0])
  floor = float(linalg.rounding_ridge(sums[0]))
  ridges = np.array([r for r in options.ridges if r >= floor])
  if not ridges.size:
    raise ValueError(
      f"ridges: expected one of at least {floor:.2g}, the rounding error of Phi^T Phi in {dtype}, "
      f"got at most {max(options.ridges)}; standardize x, or enable 64-bit floats in JAX"
    )
  values, vectors = jnp.linalg.eigh(sums[0])
  values, rotated = jnp.maximum(values, 0), linalg.matmul(vectors.T, sums[1])
  models = jnp.stack(
    [linalg.matmul(vectors, rotated / (values + float(ridge))[:, None]) for ridge in ridges]
  )
  hits, squares = np.zeros(len(ridges)), np.zeros(len(ridges))
  for block in row_blocks(held_out):
    sums = _add(feature_map, sums, block)
    right, wrong = _score(feature_map, models, block)
    hits, squares = hits + np.asarray(right), squares + np.asarray(wrong, np.float64)
  best = np.lexsort((squares, -hits))[0] if options.criterion == "accuracy" else np.argmin(squares)
  factor = linalg.factor(sums[0], float(ridges[best]))
  table = Validation(ridges, hits / v, squares / (2 * v * y.shape[1]))
  return (
    linalg.solve(factor, sums[1]),
    float(ridges[best]),
    table,
    held_out.astype(np.int32),
    factor.status,
  )


def _row_blocks(x, y, size, dtype, rows):
  """Yields blocks `(x, y, keep)` of the given rows; `keep` is False for padding rows."""
  for part in blocks.row_slices(len(rows), size):
    take = blocks.pad_rows(rows[part], size)
    keep = np.arange(size) < part.stop - part.start
    yield (
      jnp.asarray(x[take]).astype(dtype),
      jnp.asarray(y[take]).astype(dtype),
      jnp.asarray(keep),
    )


@jax.jit
def _add(feature_map, sums, block):
  x, y, keep = block
  phi = jnp.where(keep[:, None], map_features(feature_map, x), 0)
  return sums[0] + linalg.matmul(phi.T, phi), sums[1] + linalg.matmul(phi.T, y)


@jax.jit
def _score(feature_map, models, block):
  """Counts of hits and sums of squared errors, `(r,)` each, of models `(r, p, c)` on a block."""
  x, y, keep = block
  found = jnp.einsum("np,rpc->rnc", map_features(feature_map, x), models, precision=linalg.HIGHEST)
  right = keep[None] & (jnp.argmax(found, axis=2) == jnp.argmax(y, axis=1)[None])
  return jnp.sum(right, axis=1), jnp.sum(
    jnp.where(keep[None, :, None], (found - y[None]) ** 2, 0), axis=(1, 2)
  )


def _row_space(a, eps=np.finfo(np.float64).eps) -> np.ndarray:
  """Orthonormal basis `(columns, rank)` of the row space of `a`, known to relative `eps`."""
  _, s, vt = np.linalg.svd(a, full_matrices=False)
  return vt[s > 100 * eps * s[0]].T


def _support_features(w, y_s, phi_start, relative_ridge):
  """Phi_S and the absolute ridge of the formula in `krr_closed_form`, in float64."""
  range_y = _row_space(y_s.T)
  q, r = np.linalg.qr(w)
  # Y^+ = (Q^T Y)^+ Q^T with a basis Q of the range of Y, so that its rank is determined only once.
  u, s, vt = np.linalg.svd(r @ np.linalg.pinv(range_y.T @ y_s), full_matrices=False)
  kept = s > 1e-13 * s[0]
  u, s, v = q @ u[:, kept], s[kept], range_y @ vt[kept].T
  rest = phi_start - range_y @ (range_y.T @ phi_start)
  rest -= (rest @ u) @ u.T
  sigma = lambda ridge: (1 + np.sqrt(np.maximum(1 - 4 * ridge * s**2, 0))) / (2 * s)
  excess = lambda ridge: (
    relative_ridge * (np.sum(sigma(ridge) ** 2) + np.sum(rest**2)) / len(y_s) - ridge
  )
  low, high = 0.0, 0.25 / s[0] ** 2
  # The excess decreases in the ridge. Find its zero, or the largest feasible ridge if smaller.
  for _ in range(100):
    middle = 0.5 * (low + high)
    low, high = (middle, high) if excess(middle) > 0 else (low, middle)
  return (v * sigma(high)) @ u.T + rest, high
