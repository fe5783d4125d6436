"""Where to start: a strategy by name gives the first support."""

import jax
import jax.numpy as jnp
import numpy as np

from kipcore import checks, keys


def class_balanced_indices(key, labels, per_class: int, num_classes: int) -> np.ndarray:
  """`per_class` distinct rows of each class, drawn uniformly, grouped by class.

  Args:
    key: random key (or int seed).
    labels: `(n,)` integers in [0, num_classes).
    per_class: rows a class, >= 1.
    num_classes: c.

  Returns:
    `(c * per_class,)` int indices.

  Raises:
    ValueError: where a class has fewer rows than `per_class`; it names the class.
  """
  checks.positive_int("per_class", per_class)
  labels = np.asarray(labels)
  checks.rank("labels", labels, 1)
  counts = np.bincount(labels, minlength=num_classes)
  short = np.flatnonzero(counts < per_class)
  if short.size:
    raise ValueError(f"images_per_class: expected at most the {counts[short].min()} rows of the smallest class, "
                     f"got {per_class} ({short.size} of {num_classes} classes are smaller, the first is {short[0]})")
  order = np.asarray(jax.random.permutation(keys.canonical_key(key), labels.shape[0]))
  return np.concatenate([order[labels[order] == c][:per_class] for c in range(num_classes)])


def noise_like(key, x, num_rows: int) -> jax.Array:
  """Standard normal rows of the shape of `x`: noise in the standardised space.

  Args:
    key: random key (or int seed).
    x: `(n, ...)`; only its row shape and dtype count.
    num_rows: m.

  Returns:
    `(m, ...)`.
  """
  return jax.random.normal(keys.canonical_key(key), (num_rows, *x.shape[1:]), jnp.dtype(x.dtype))
