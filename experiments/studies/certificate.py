"""Error of sampled rows against their number, and coverage of the guarantees: `python -m experiments.studies.certificate`.

Real targets under kernel ridge regression with one output. Rows are drawn with replacement by their
exact sensitivities, or uniformly. For each number of draws and seed:

- exact: sup_W |F_S(W) / F(W) - 1|, the largest absolute eigenvalue of M^(-1/2) (M_S - M) M^(-1/2), where
  M = sum_i v_i v_i^T + ridge diag(I, 0) for v_i = (phi_i, -y_i), and M_S has weighted rows (float64);
- queries: the largest error on the test queries of `kipcore.selection.certificate`;
- optimum: |F_S / F - 1| at the minimizer of F, a query that does not depend on the draw;
- excess: F(W_S) / F* - 1 for the minimizer W_S of F_S (float64; drawn by sensitivity alone).

Each is compared with `kipcore.guarantee_at` for failure probability `DELTA`. The lower bound on F* of
`kipcore.measure_coreset` is compared with F* for as many choices of landmarks. Writes
experiments/results/certificate.json.
"""

import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from absl import flags

import kipcore
from experiments.studies import selection_data
from kipcore.cli import flags as common
from kipcore.selection import certificate as library

FLAGS = flags.FLAGS

DATASETS = ("friedman", "heavy_tailed")
SAMPLERS = ("krr_sensitivity", "uniform")
SIZES = (100, 400, 1600, 6400, 25_600)
EFFECTIVE_DIMENSION = 10.0
DELTA = 0.1
NUM_LANDMARKS = 128


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_integer("num_seeds", 100, "Draws for each number of rows.", lower_bound=2)
  flags.DEFINE_integer("num_rows", 400, "Rows of each dataset.", lower_bound=20)
  flags.DEFINE_string("output", "experiments/results/certificate.json", "Result file.")


class Problem(NamedTuple):
  """Kernel ridge regression on n rows, in float64 unless stated.

  Attributes:
    x, y, kernel_fn, ridge: as for `kipcore.measure_coreset`, in float32.
    scores: `(n,)` float32 exact sensitivities.
    bank: the test queries.
    features: `(n, n)` phi, with K = phi phi^T.
    targets: `(n,)`.
    whitened: `(n, n + 1)` rows M^(-1/2) v_i.
    optimum: F*.
  """

  x: jnp.ndarray
  y: jnp.ndarray
  kernel_fn: kipcore.KernelFn
  ridge: float
  scores: jnp.ndarray
  bank: library.QueryBank
  features: np.ndarray
  targets: np.ndarray
  whitened: np.ndarray
  optimum: float


def problem_of(name: str, n: int) -> Problem:
  """The first rows of a dataset under the default kernel of `kipcore.select`."""
  data = selection_data.load(name, train_rows=n)
  x, y = jnp.asarray(data.x), jnp.asarray(data.y[:, None])
  kernel_fn = kipcore.rbf_fn(float(np.sqrt(data.x.var(axis=0).sum())))
  k = kernel_fn(x, None)
  ridge = float(kipcore.score_ridge_for_dimension(k, EFFECTIVE_DIMENSION).ridge)
  bank = library.query_bank(0, kernel_fn, x, y, ridge, num_landmarks=n)
  k64, y64 = np.asarray(k, np.float64), np.asarray(y[:, 0], np.float64)
  values, vectors = np.linalg.eigh(k64)
  features = vectors * np.sqrt(np.maximum(values, 0))
  extended = np.column_stack([features, -y64])
  moments = extended.T @ extended + ridge * np.diag(np.append(np.ones(n), 0.0))
  whitened = scipy.linalg.solve_triangular(np.linalg.cholesky(moments), extended.T, lower=True).T
  optimum = ridge * float(y64 @ np.linalg.solve(k64 + ridge * np.eye(n), y64))
  scores = kipcore.krr_sensitivities(k, y, ridge)
  return Problem(x, y, kernel_fn, ridge, scores, bank, features, y64, whitened, optimum)


def exact_epsilon(problem: Problem, multiplicities: np.ndarray) -> float:
  """sup_W |F_S(W) / F(W) - 1| for rows with weights `(n,)`."""
  change, whitened = multiplicities - 1, problem.whitened
  product = lambda v: whitened.T @ (change * (whitened @ v).ravel())
  size = whitened.shape[1]
  operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
  start = np.random.default_rng(0).normal(size=size)
  (value,) = scipy.sparse.linalg.eigsh(
    operator, 1, which="LM", tol=1e-6, v0=start, return_eigenvectors=False
  )
  return float(abs(value))


def excess(problem: Problem, multiplicities: np.ndarray) -> float:
  """F(W_S) / F* - 1 for the minimizer W_S of F_S."""
  phi, y, ridge = problem.features, problem.targets, problem.ridge
  weighted = multiplicities[:, None] * phi
  moments = weighted.T @ phi + ridge * np.eye(phi.shape[1])
  w = scipy.linalg.solve(moments, weighted.T @ y, assume_a="pos")
  return float(np.sum((phi @ w - y) ** 2) + ridge * w @ w) / problem.optimum - 1


def measure(problem: Problem, sampler: str, m: int, num_seeds: int) -> dict[str, list[float]]:
  """The errors of `num_seeds` draws of m rows, by kind."""
  scores = problem.scores if sampler == "krr_sensitivity" else jnp.ones_like(problem.scores)
  found: dict[str, list[float]] = {"exact": [], "queries": [], "optimum": [], "excess": []}
  for seed in range(num_seeds):
    sample = kipcore.sensitivity_sample(seed, scores, m)
    errors = np.asarray(library.query_errors(problem.bank, sample.indices, sample.weights))
    found["queries"].append(float(errors.max()))
    found["optimum"].append(float(errors[1]))
    multiplicities = np.bincount(
      sample.indices, weights=np.asarray(sample.weights, np.float64), minlength=scores.size
    )
    found["exact"].append(exact_epsilon(problem, multiplicities))
    if sampler == "krr_sensitivity":
      found["excess"].append(excess(problem, multiplicities))
  return {kind: errors for kind, errors in found.items() if errors}


def promises(total: float, dimension: float, m: int) -> dict[str, float | None]:
  """What the theorems guarantee with probability 1 - DELTA, by kind of error; None for no bound."""
  theorems = {"exact": "krr", "optimum": "single_query", "excess": "krr_optimum"}
  found = {
    kind: kipcore.guarantee_at(m, total, dimension, DELTA, theorem)
    for kind, theorem in theorems.items()
  }
  return {kind: value if np.isfinite(value) else None for kind, value in found.items()}


def slope(sizes, errors) -> float:
  """The exponent a of errors proportional to m^a, by least squares on the medians' logarithms."""
  medians = [np.log(np.median(part)) for part in errors]
  return float(np.polyfit(np.log(sizes), medians, 1)[0])


def lower_bounds(problem: Problem, num_seeds: int) -> list[float]:
  """`objective_lower` / F* for `num_seeds` choices of NUM_LANDMARKS landmarks."""
  n = problem.targets.size
  rows, ones = jnp.arange(n), jnp.ones(n)
  return [
    kipcore.measure_coreset(
      seed,
      problem.kernel_fn,
      problem.x,
      problem.y,
      problem.ridge,
      rows,
      ones,
      num_landmarks=min(NUM_LANDMARKS, n // 2),
    ).objective_lower
    / problem.optimum
    for seed in range(num_seeds)
  ]


def main() -> None:
  """Measures all datasets and writes the result file."""
  from kipcore.cli.folder import run_folder

  environment = run_folder.environment()
  settings = {"num_rows": FLAGS.num_rows, "num_seeds": FLAGS.num_seeds, "delta": DELTA}
  results = {}
  for name in DATASETS:
    problem = problem_of(name, FLAGS.num_rows)
    # Scores of uniform draws are at least the sensitivities if all are the largest one.
    totals = {
      "krr_sensitivity": float(jnp.sum(problem.scores)),
      "uniform": FLAGS.num_rows * float(jnp.max(problem.scores)),
    }
    dimension = float(problem.bank.dimension_upper)
    entry = {"total_sensitivity": totals, "effective_dimension": dimension, "samplers": {}}
    for sampler in SAMPLERS:
      cells = {m: measure(problem, sampler, m, FLAGS.num_seeds) for m in SIZES}
      entry["samplers"][sampler] = {
        "sizes": {
          str(m): {"errors": errors, "promised": promises(totals[sampler], dimension, m)}
          for m, errors in cells.items()
        },
        "slopes": {
          kind: slope(SIZES, [errors[kind] for errors in cells.values()])
          for kind in cells[SIZES[0]]
        },
      }
      print(name, sampler, entry["samplers"][sampler]["slopes"], flush=True)
    entry["lower_bounds"] = lower_bounds(problem, FLAGS.num_seeds)
    results[name] = entry
  content = {"environment": environment, "settings": settings, "datasets": results}
  run_folder.write_json(pathlib.Path(FLAGS.output), content)


if __name__ == "__main__":
  define_flags()
  common.launch(main)
