"""Preprocessing as a list of fitted steps with an exact inverse, and label centering.

"ZCA" names five different recipes in published distillation code, and images made with one are
useless with another. So a `Preprocess` records every step, its order, its settings and its fitted
arrays, and is stored with the distilled set. Pixels are taken in the units in which they are stored
and are never rescaled silently.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float, Int, Integer, Shaped

from kipcore import blocks, checks, linalg
from kipcore.types import Array, ArrayLike, IntLike, RealLike

_FORMAT = 1
_BLOCK_NUMBERS = 2**23  # per row block: 64 MiB in float64
_MAX_ZCA_FEATURES = 2**14  # a d x d float64 matrix of 2 GiB

_DEFAULTS: dict[str, dict[str, Any]] = {
  "scale": {"divisor": 255.0},
  "standardize": {},
  "unit_norm": {},
  "center": {},
  "zca": {"regularization": "trace_relative", "value": 0.1, "ddof": 0, "rank_control": False},
}
_CHOICES = {
  "regularization": ("trace_relative", "absolute"),
  "ddof": (0, 1),
  "rank_control": (True, False),
}
# The fitted arrays of a step and their shapes, from the shape of a row.
_ARRAYS = {
  "scale": lambda row: {"divisor": ()},
  "standardize": lambda row: {"mean": row[-1:], "divisor": row[-1:]},
  "unit_norm": lambda row: {"mean": (), "divisor": ()},
  "center": lambda row: {"mean": row},
  "zca": lambda row: {"whitening": 2 * (math.prod(row),)},
}
_RANKED_ZCA = ("zca", {"rank_control": True})
_RECIPES = {
  "none": (),
  "standardize": ("standardize",),
  "zca": ("standardize", "center", _RANKED_ZCA),
  "zca_kip": ("standardize", "unit_norm", _RANKED_ZCA),
  "zca_rfad": ("standardize", "zca"),
  "zca_dcbench": ("scale", "unit_norm", _RANKED_ZCA),
  "zca_absolute": ("scale", "center", ("zca", {"regularization": "absolute", "ddof": 1})),
}
KINDS = tuple(_RECIPES)


def recipe(kind: str) -> dict[str, Any]:
  """The steps of a kind with all of their settings, and the version of their format, as JSON values."""
  named = [(entry, {}) if isinstance(entry, str) else entry for entry in _RECIPES[kind]]
  return {"format": _FORMAT, "steps": [[name, {**_DEFAULTS[name], **own}] for name, own in named]}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One fitted step: its name, its settings (JSON values) and its float64 arrays (read-only)."""

  name: str
  settings: Mapping[str, Any]
  arrays: Mapping[str, np.ndarray]

  @functools.cached_property
  def unwhitening(self) -> np.ndarray:
    """The inverse of the whitening matrix of a zca step, `(d, d)`, symmetric; computed once, in float64."""
    inverse = np.linalg.inv(self.arrays["whitening"])
    return 0.5 * (inverse + inverse.T)

  def operands(self, inverse: bool) -> dict[str, np.ndarray]:
    """The arrays with which the step, or its inverse, transforms rows."""
    if self.name == "zca":
      return {"matrix": self.unwhitening if inverse else self.arrays["whitening"]}
    return dict(self.arrays)

  @functools.cached_property
  def _on_device(self) -> dict[tuple, dict[str, jax.Array]]:
    return {}

  def operands_on_device(self, inverse: bool, dtype) -> dict[str, jax.Array]:
    """`operands` in `dtype`, placed once."""
    if (key := (inverse, np.dtype(dtype))) not in self._on_device:
      with jax.ensure_compile_time_eval():  # no tracers, which would outlive their trace
        self._on_device[key] = {k: jnp.asarray(a, dtype) for k, a in self.operands(inverse).items()}
    return self._on_device[key]


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocess:
  """Fitted steps in the order in which `apply` runs them; made by `fit_preprocess`.

  `apply` and `invert` take `(n, *row_shape)`. For NumPy arrays they return NumPy arrays and work in
  row blocks of about 64 MiB: entrywise steps in float64, the whitening product in `dtype`. For a
  `jax.Array` they return a `jax.Array`, computed on all rows at once in `dtype`, compiled once per
  shape; it may be traced, and the `(d, d)` whitening matrix is then a constant of the compiled function.

  Attributes:
    kind: name of the recipe, or "custom".
    row_shape: shape of a row.
    steps: the fitted steps.
  """

  kind: str
  row_shape: tuple[int, ...]
  steps: tuple[Step, ...]

  def apply(self, x: Shaped[ArrayLike, "n ..."], dtype: Any = np.float32) -> ArrayLike:
    """The preprocessed rows in `dtype`, from rows in stored pixel units.

    Raises:
      ValueError: for another row shape.
    """
    return self._run(x, dtype, self.steps)

  def invert(self, x: Shaped[ArrayLike, "n ..."], dtype: Any = np.float32) -> ArrayLike:
    """The rows in stored pixel units in `dtype`, not clipped.

    Every step except `unit_norm` is a bijection, which `invert` undoes up to rounding. `unit_norm`
    discards the mean and the norm of an image, and `invert` inserts their training averages. So
    apply(invert(z)) = z for z in the range of `apply`, and invert(apply(x)) is x up to the
    brightness and contrast of each image. For other z, as distilled images may be,
    apply(invert(z)) is z centered and rescaled.

    Raises:
      ValueError: for another row shape.
    """
    return self._run(x, dtype, self.steps[::-1], inverse=True)

  def _run(self, x, dtype, steps, inverse=False):
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    checks.shape("x", x, (None, *self.row_shape))
    if isinstance(x, jax.Array):
      dtype = jax.dtypes.canonicalize_dtype(dtype)
      operands = [step.operands_on_device(inverse, dtype) for step in steps]
      return _run_compiled(tuple(step.name for step in steps), dtype, inverse, x, operands)
    out = np.empty(x.shape, dtype)
    for rows, block in _processed_blocks(x, steps, out.dtype, inverse):
      out[rows] = block
    return out

  def to_arrays(self) -> tuple[dict, dict[str, np.ndarray]]:
    """`(spec, arrays)` for `from_arrays`: JSON values and float64 arrays.

    A whitening matrix is stored as its upper triangle.
    """
    steps = [{"name": step.name, "settings": dict(step.settings)} for step in self.steps]
    arrays = {
      f"{i}_{step.name}_{name}": value[np.triu_indices(len(value))]
      if name == "whitening"
      else value.copy()
      for i, step in enumerate(self.steps)
      for name, value in step.arrays.items()
    }
    return {
      "format": _FORMAT,
      "kind": self.kind,
      "row_shape": list(self.row_shape),
      "steps": steps,
    }, arrays

  @classmethod
  def from_arrays(cls, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "Preprocess":
    """The object whose `to_arrays` returned `spec` and `arrays`, exactly; other arrays are ignored.

    Raises:
      ValueError: for another format, an unknown step or setting, or an array that is missing or of
        the wrong dtype, shape or range.
    """
    try:
      version, kind, row_shape = (
        spec["format"],
        str(spec["kind"]),
        tuple(int(size) for size in spec["row_shape"]),
      )
      listed = [(str(step["name"]), step["settings"]) for step in spec["steps"]]
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"preprocess spec: expected format, kind, row_shape and steps, got {error!r}"
      ) from error
    if version != _FORMAT:
      raise ValueError(f"preprocess spec: expected format {_FORMAT}, got {version!r}")
    steps = []
    for i, (name, settings) in enumerate(listed):
      settings, loaded = _settings(name, settings, complete=True), {}
      for array, shape in _ARRAYS[name](row_shape).items():
        key = f"{i}_{name}_{array}"
        if key not in arrays:
          raise ValueError(f"preprocess arrays: expected {key!r}, got {sorted(arrays)}")
        value = np.asarray(arrays[key])
        if value.dtype != np.float64:
          raise ValueError(f"{key}: expected float64, got {value.dtype}")
        checks.shape(
          key, value, (shape[0] * (shape[0] + 1) // 2,) if array == "whitening" else shape
        )
        checks.finite(key, value)
        if array == "divisor":
          checks.positive(key, value)
        loaded[array] = _symmetric(value, shape[0]) if array == "whitening" else value
      steps.append(_step(name, settings, loaded))
    return cls(kind, row_shape, tuple(steps))


def fit_preprocess(
  x_train: Shaped[ArrayLike, "n ..."],
  kind: str | Sequence = "zca",
  pixel_max: RealLike = 255.0,
) -> Preprocess:
  """Fit a preprocessing recipe to training rows, in float64 and in row blocks.

  Steps (X: the n training rows after the previous steps, with d numbers per row):
    scale        x / divisor.
    standardize  (x - mean) / std of each channel over rows and pixels (tabular data: of each
                 feature over rows); the std of a constant channel is 1.
    unit_norm    subtract the mean of each row, then divide by its L2 norm (constant rows become 0);
                 two numbers per row are lost, see `Preprocess.invert`.
    center       subtract the mean training row.
    zca          x W with W = (S + r I)^(-1/2) symmetric and S = X^T X / (n - ddof), not centered:
                 precede it by `center` for a covariance. regularization "trace_relative":
                 r = value * tr(S) / d; "absolute": r = value. rank_control: if n < d, directions in
                 which X is zero (by numerical rank) keep gain 1 instead of r^(-1/2); published code
                 keeps all but the n leading eigenvectors, which is arbitrary among equal eigenvalues.
  Kinds, all but the last for pixels of any scale:
    none, standardize   no step; the step of that name.
    zca           standardize, center, zca 0.1 tr/d with rank control (Zhou et al. 2022, FRePo).
    zca_kip       standardize, unit_norm, zca 0.1 tr/d with rank control (Nguyen et al. 2021).
    zca_rfad      standardize, zca 0.1 tr/d (Loo et al. 2022, RFAD, its CIFAR recipe).
    zca_dcbench   scale, unit_norm, zca 0.1 tr/d with rank control (Cui et al. 2022, for KIP's sets).
    zca_absolute  scale to [0, 1], center, zca 0.1 absolute, ddof 1 (Cazenavette et al. 2022, MTT);
                  needs `pixel_max`.

  Args:
    x_train: `(n, ...)` training rows only, integers or floats; channels (or features) last.
    kind: one of the kinds, or a sequence of steps, each a name or a pair (name, settings).
    pixel_max: divisor of a `scale` step without one: the stored value of white (255, 16 for
      scikit-learn's digits, or 1).

  Returns:
    `Preprocess`. Extra memory: about 5 d^2 numbers for a zca step, plus row blocks.

  Raises:
    ValueError, TypeError: if x_train is empty, not numeric, not finite, or has over 16384 numbers
      per row with a zca step; for unknown kinds, steps or settings; on overflow.

  Example:
    >>> prepared = kipcore.fit_preprocess(x := np.arange(12.0).reshape(3, 2, 2, 1) ** 2, "zca")
    >>> np.allclose(prepared.invert(prepared.apply(x)), x, atol=1e-3)
    True
  """
  x = np.asarray(x_train)
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(
      f"x_train: expected (n, ...) with at least one row and one feature, got shape {x.shape}"
    )
  if x.dtype.kind not in "uif":
    raise TypeError(f"x_train: expected integers or floats, got {x.dtype}")
  checks.finite("x_train", x)
  checks.positive("pixel_max", pixel_max)
  pixel_max = checks.scalar("pixel_max", pixel_max)
  if isinstance(kind, str):
    checks.one_of("kind", kind, KINDS)
  steps: list[Step] = []
  for entry in _RECIPES[kind] if isinstance(kind, str) else kind:
    name, settings = (entry, {}) if isinstance(entry, str) else entry
    settings = _settings(name, {"divisor": pixel_max, **settings} if name == "scale" else settings)
    with np.errstate(over="ignore", invalid="ignore"):
      arrays = _fit(
        name, settings, lambda: (b for _, b in _processed_blocks(x, steps, np.float64)), x.shape
      )
    for array, value in arrays.items():
      checks.finite(f"{array} of step {name} (the pixels may be too large)", value)
    steps.append(_step(name, settings, arrays))
  return Preprocess(kind if isinstance(kind, str) else "custom", x.shape[1:], tuple(steps))


def _fit(name, settings, read, shape) -> dict[str, Any]:
  """The arrays of one step, from passes over the blocks of rows that `read()` yields."""
  n, d = shape[0], math.prod(shape[1:])
  if name == "standardize":
    axes, count = tuple(range(len(shape) - 1)), n * d // shape[-1]
    mean = sum(b.sum(axes) for b in read()) / count
    std = np.sqrt(sum(((b - mean) ** 2).sum(axes) for b in read()) / count)
    # The computed mean of equal numbers has a rounding error, so their computed std is not exactly 0.
    return {
      "mean": mean,
      "divisor": np.where(std > 64 * np.finfo(std.dtype).eps * np.abs(mean), std, 1.0),
    }
  if name == "center":
    return {"mean": sum(b.sum(0) for b in read()) / n}
  if name == "unit_norm":
    parts = zip(*(_mean_and_norm(b, np)[1:] for b in read()))
    means, norms, varies = (np.concatenate(part) for part in parts)
    return {"mean": means.mean(), "divisor": norms[varies].mean() if varies.any() else 1.0}
  if name == "zca":
    if d > _MAX_ZCA_FEATURES:
      raise ValueError(
        f"zca: expected at most {_MAX_ZCA_FEATURES} numbers per row (it needs a d x d matrix), got {d}"
      )
    moment = np.zeros((d, d))
    for b in read():
      flat = b.reshape(len(b), d)
      moment += flat.T @ flat
    moment /= max(n - settings["ddof"], 1)
    checks.finite("second moments of the rows (the pixels may be too large)", moment)
    return {"whitening": _whitening(moment, n, settings)}
  return {"divisor": settings["divisor"]}


def _whitening(moment, n, settings) -> np.ndarray:
  ridge = settings["value"] * (
    moment.trace() / len(moment) if settings["regularization"] == "trace_relative" else 1.0
  )
  values, vectors = scipy.linalg.eigh(moment, overwrite_a=True, check_finite=False)
  values = np.maximum(values, 0.0)
  zero = values.size * np.finfo(np.float64).eps * values[-1]
  whitened = values + ridge > zero
  if settings["rank_control"] and n < values.size:
    whitened &= values > zero
  vectors *= np.where(whitened, values + ridge, 1.0) ** -0.25
  whitening = vectors @ vectors.T
  return 0.5 * (whitening + whitening.T)


def _mean_and_norm(x, xp):
  """Centered rows, their means, their norms (1 for constant rows), and which rows vary."""
  over = {"axis": tuple(range(1, x.ndim)), "keepdims": True}
  mean = x.mean(**over)
  x = x - mean
  squares = (x * x).sum(**over)
  # A smaller norm is rounding error of the mean; dividing by it would amplify noise.
  noise = 64 * float(np.finfo(x.dtype).eps) * xp.abs(mean)
  varies = squares > math.prod(x.shape[1:]) * noise * noise
  return x, mean, xp.sqrt(xp.where(varies, squares, 1.0)), varies


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_compiled(names, dtype, inverse, x, operands):
  x = x.astype(dtype)
  for name, arrays in zip(names, operands):
    x = _transform(name, arrays, x, jnp, dtype, inverse)
  return x


def _transform(name: str, operands: Mapping, x, xp, dtype, inverse):
  """Apply or invert one step on a block of rows."""
  if name == "zca":
    matrix = xp.asarray(operands["matrix"], dtype)
    flat = x.reshape(x.shape[0], matrix.shape[0]).astype(dtype)
    return (np.matmul if xp is np else linalg.matmul)(flat, matrix).reshape(x.shape)
  if name == "unit_norm" and not inverse:
    x, _, norm, _ = _mean_and_norm(x, xp)
    return x / norm
  mean, divisor = operands.get("mean", np.zeros(())), operands.get("divisor", np.ones(()))
  mean, divisor = (
    xp.asarray(a.reshape((1,) * (x.ndim - a.ndim) + a.shape), x.dtype) for a in (mean, divisor)
  )
  return x * divisor + mean if inverse else (x - mean) / divisor


def _processed_blocks(x, steps, dtype, inverse=False):
  """Yield (slice of rows, those rows after `steps`), about `_BLOCK_NUMBERS` numbers at a time."""
  size = max(1, _BLOCK_NUMBERS // max(1, math.prod(x.shape[1:])))
  for rows in blocks.row_slices(x.shape[0], size):
    block = x[rows].astype(np.float64)
    for step in steps:
      block = _transform(step.name, step.operands(inverse), block, np, dtype, inverse)
    yield rows, block


def _settings(name, given, complete=False) -> dict:
  """The checked settings of a step; missing ones get defaults unless they must be `complete`."""
  checks.one_of("preprocess step", name, _DEFAULTS)
  expected, what = _DEFAULTS[name], f"settings of step {name}"
  if (
    not isinstance(given, Mapping)
    or not set(given) <= set(expected)
    or (complete and set(given) != set(expected))
  ):
    raise ValueError(f"{what}: expected {sorted(expected)}, got {given!r}")
  settings = {**expected, **given}
  for key, value in settings.items():
    if key in _CHOICES:
      checks.one_of(f"{what}: {key}", value, _CHOICES[key])
      if isinstance(value, (bool, np.bool_)) != isinstance(_CHOICES[key][0], bool):
        raise ValueError(f"{what}: {key}: expected one of {_CHOICES[key]}, got {value!r}")
      settings[key] = next(choice for choice in _CHOICES[key] if choice == value)
    else:
      try:
        settings[key] = checks.scalar(key, value)
      except (TypeError, ValueError):
        settings[key] = np.nan
      if not np.finfo(float).tiny <= settings[key] < np.inf:
        raise ValueError(f"{what}: expected a positive finite {key}, got {value!r}")
  return settings


def _step(name, settings, arrays) -> Step:
  arrays = {key: np.array(value, np.float64) for key, value in arrays.items()}
  for value in arrays.values():
    value.setflags(write=False)
  return Step(name, MappingProxyType(settings), MappingProxyType(arrays))


def _symmetric(triangle, d) -> np.ndarray:
  matrix = np.zeros((d, d))
  matrix[np.triu_indices(d)] = triangle
  return matrix + np.triu(matrix, 1).T


def one_hot_centered(
  labels: Integer[ArrayLike, " n"], num_classes: IntLike, dtype: Any = jnp.float32
) -> Float[Array, "n c"]:
  """One-hot labels minus 1/c, the targets of KIP, RFAD and FRePo; `uncenter` inverts it.

  Args:
    labels: `(n,)` integers in [0, c); checked unless traced.
    num_classes: c.
    dtype: floating dtype of the result.

  Returns:
    `(n, c)`: 1 - 1/c at the class, -1/c elsewhere.

  Raises:
    ValueError, TypeError: for another rank, a label outside [0, c), or labels that are not integers.

  References:
    Nguyen et al. (2021).

  Example:
    >>> kipcore.one_hot_centered(np.array([1]), 4).tolist()
    [[-0.25, 0.75, -0.25, -0.25]]
  """
  num_classes = checks.positive_int("num_classes", num_classes)
  labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
  checks.rank("labels", labels, 1)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f"labels: expected integers, got {labels.dtype}")
  if (
    not checks.is_traced(labels)
    and labels.size
    and not 0 <= labels.min() <= labels.max() < num_classes
  ):
    raise ValueError(
      f"labels: expected integers in [0, {num_classes}), got {labels.min()} to {labels.max()}"
    )
  return _one_hot_centered(num_classes, jnp.dtype(dtype), labels.astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_hot_centered(num_classes: int, dtype, labels):
  return jax.nn.one_hot(labels, num_classes, dtype=dtype) - 1.0 / num_classes


def uncenter(y: Float[ArrayLike, "n c"]) -> Float[ArrayLike, "n c"]:
  """Add 1/c to centered labels `(n, c)`, the inverse of `one_hot_centered`."""
  return y + 1.0 / y.shape[1]


def class_labels(y: Shaped[ArrayLike, "n c"]) -> Int[Array, " n"]:
  """The class of each row of `(n, c)` labels, centered or not; the first of equal maxima."""
  checks.rank("y", y, 2)
  return jnp.argmax(jnp.asarray(y), axis=1).astype(jnp.int32)
