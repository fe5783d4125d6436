"""Test errors of three models trained on weighted rows: ridge and logistic regression, a network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kipcore
from experiments.studies.selection_data import Rows
from kipcore.selection import rows_certificate

# Penalty of ridge and logistic regression per unit of weight, for standardized columns.
PENALTY = 1e-3
# Two hidden layers of 64 units, AdamW, a cosine schedule, batches drawn in proportion to the weights.
NETWORK = {"depth": 2, "width": 64, "steps": 1000, "batch": 64, "rate": 3e-3, "decay": 1e-4}
MODELS = ("ridge", "logistic", "network")


def errors(seed: int, x, y, weights, data: Rows) -> dict[str, float]:
  """Test errors of models trained on weighted rows, by model.

  For classes the error rate, averaged over the classes; for targets the squared error divided by the
  variance of the test targets. `seed` starts the network.
  """
  weights = np.asarray(weights, np.float64)
  codes, targets = coded(y, data)
  coefficients, intercept = rows_certificate.ridge_solution(
    rows_certificate.ridge_sums(x, targets, weights), PENALTY
  )
  outputs = {
    "ridge": data.x_test @ coefficients + intercept,
    "network": network_outputs(seed, x, targets, weights, data),
  }
  found = {name: error_of(values, data) for name, values in outputs.items()}
  if data.has_classes:
    predict = rows_certificate.logistic_regression(x, codes, weights, PENALTY)
    found["logistic"] = _balanced(predict(data.x_test), data)
  return found


def coded(y, data: Rows) -> tuple[np.ndarray, np.ndarray]:
  """Class codes `(m,)` and one-hot labels `(m, c)`; for targets zeros and the targets `(m, 1)`."""
  if not data.has_classes:
    return np.zeros(len(y), np.int64), np.asarray(y, np.float64)[:, None]
  classes = np.unique(data.y)
  codes = np.searchsorted(classes, y)
  return codes, np.eye(classes.size)[codes]


def error_of(outputs: np.ndarray, data: Rows) -> float:
  """The error of outputs `(t, c)` on the test rows."""
  if data.has_classes:
    return _balanced(outputs.argmax(axis=1), data)
  return float(np.mean((outputs[:, 0] - data.y_test) ** 2) / np.var(data.y_test))


def _balanced(codes: np.ndarray, data: Rows) -> float:
  """The error rate of class codes, averaged over the classes."""
  from sklearn.metrics import balanced_accuracy_score

  return 1 - float(balanced_accuracy_score(data.y_test, np.unique(data.y)[codes]))


def network_outputs(seed: int, x, targets, weights, data: Rows) -> np.ndarray:
  """Outputs `(t, c)` of a trained network.

  It is compiled once for each dataset: rows of weight 0 are appended up to the number of training rows,
  and no batch contains them.
  """
  n = len(data.y)
  fill = lambda a: np.concatenate([a, np.zeros((n - len(a), *a.shape[1:]), a.dtype)])
  cumulative = np.cumsum(fill(weights / weights.sum()))
  arguments = fill(x), fill(targets.astype(np.float32)), cumulative.astype(np.float32)
  outputs = _train(data.has_classes, len(weights), jax.random.key(seed), *arguments, data.x_test)
  return np.asarray(outputs, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _train(classes: bool, num_rows, key, x, targets, cumulative, x_test):
  """Outputs on test rows after NETWORK's steps on the first `num_rows` rows."""
  module = kipcore.network(
    kipcore.fc(NETWORK["depth"]), width=NETWORK["width"], num_outputs=targets.shape[1]
  )
  first, draws = jax.random.split(key)
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(NETWORK["rate"], NETWORK["steps"]), weight_decay=NETWORK["decay"]
  )

  def loss(params, rows):
    outputs = module.apply(params, x[rows])
    if classes:
      return jnp.mean(optax.softmax_cross_entropy(outputs, targets[rows]))
    return jnp.mean(jnp.sum((outputs - targets[rows]) ** 2, axis=1))

  def step(state, key):
    params, memory = state
    uniform = jax.random.uniform(key, (NETWORK["batch"],))
    rows = jnp.minimum(jnp.searchsorted(cumulative, uniform, side="right"), num_rows - 1)
    updates, memory = optimizer.update(jax.grad(loss)(params, rows), memory, params)
    return (optax.apply_updates(params, updates), memory), None

  params = module.init(first, x[:1])
  state = params, optimizer.init(params)
  (params, _), _ = jax.lax.scan(step, state, jax.random.split(draws, NETWORK["steps"]))
  return module.apply(params, x_test)
