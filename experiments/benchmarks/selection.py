"""Speed and memory of selection: `python -m experiments.benchmarks.selection --data_dir=DIR`.

Each job runs in a separate process, to measure its peak memory, and writes to
experiments/results/benchmark_selection.json:

  scores        certified sensitivities of all 60,000 rows of MNIST
  stream        the same for up to a million rows of shifted, noisy MNIST in a memory-mapped file
  kmeans        k-means++ compared with scikit-learn and with only the distance products
  cholesky      randomly pivoted Cholesky compared with coreax (skipped if not installed)

Times are those of the second call unless noted; the first call also compiles.
About 40 minutes on two idle cores.
"""

import pathlib
import tempfile
import time

import numpy as np
from absl import flags

from experiments.benchmarks import harness
from experiments.benchmarks.harness import mnist, peak_gb, private_peak, timed
from kipcore.cli import flags as common

FLAGS = flags.FLAGS
_REFERENCE_LANDMARKS = 8000

harness.define_flags("selection")
flags.DEFINE_integer(
  "stream_rows", 1_000_000, "Rows of the largest file in the job stream.", lower_bound=1000
)


def scores(data_dir) -> dict:
  """Certified scores of 60,000 rows at several ridges, and bounds on d_eff from more landmarks."""
  import jax

  from kipcore import kernels
  from kipcore.architectures import fc
  from kipcore.selection import score_ridge, sensitivity

  x, y, labels, _, _ = mnist(data_dir)
  kernel_fn = kernels.NetworkKernel(fc(1), "ntk")
  num_landmarks, ridges = 2000, []
  for target in (10, 30, 100, 300):
    ridges.append(
      float(score_ridge.landmark_score_ridge(0, kernel_fn, x, target, num_landmarks).ridge)
    )
  rows = []
  for ridge in ridges:
    run = lambda ridge=ridge: sensitivity.approximate_krr_sensitivities(
      0, kernel_fn, x, y, ridge, num_landmarks
    )
    first, _ = timed(run)
    seconds, out = timed(run)
    rows.append(
      {
        "method": "landmarks",
        "num_landmarks": num_landmarks,
        "ridge": ridge,
        "total": float(out.total),
        "max_over_mean": float(out.max_over_mean),
        "seconds": seconds,
        "compile_seconds": max(first - seconds, 0.0),
        "peak_gb": peak_gb(),
      }
    )
    print(rows[-1], flush=True)
  bound = float(out.objective)
  jax.clear_caches()
  seconds, out = timed(
    lambda: sensitivity.blocked_krr_sensitivities(
      kernel_fn, x, y, ridges[-1], labels, objective_bound=bound
    )
  )
  rows.append(
    {
      "method": "class blocks with the landmarks' bound on F*",
      "ridge": ridges[-1],
      "total": float(out.total),
      "max_over_mean": float(out.max_over_mean),
      "seconds_with_compilation": seconds,
      "peak_gb": peak_gb(),
    }
  )
  print(rows[-1], flush=True)
  # A near-exact reference, whose cost and memory are not those of the scores.
  reference = score_ridge.effective_dimension_bounds(
    1, kernel_fn, x, np.array(ridges), _REFERENCE_LANDMARKS
  )
  jax.clear_caches()
  estimates, errors, steps = estimated_dimensions(
    kernel_fn, x, np.array(ridges, np.float32), num_landmarks
  )
  for row in rows:
    i = ridges.index(row["ridge"])
    row["d_eff_at_least"], row["d_eff_at_most"] = (
      float(reference.lower[i]),
      float(reference.upper[i]),
    )
    row["d_eff_estimate"], row["d_eff_standard_error"] = float(estimates[i]), float(errors[i])
    row["total_over_d_eff"] = row["total"] / row["d_eff_estimate"]
    print(
      {
        key: row[key]
        for key in (
          "method",
          "total",
          "d_eff_at_least",
          "d_eff_at_most",
          "d_eff_estimate",
          "d_eff_standard_error",
          "total_over_d_eff",
        )
      },
      flush=True,
    )
  return {
    "n": x.shape[0],
    "kernel": "fc1 ntk",
    "reference_landmarks": _REFERENCE_LANDMARKS,
    "estimate_steps": steps,
    "rows": rows,
  }


def estimated_dimensions(
  kernel_fn, x, ridges, num_landmarks: int, num_probes: int = 12, tolerance: float = 2e-3
):
  """Estimates d_eff = tr K (K + ridge I)^{-1}, with standard errors `(r,)` and solver steps.

  Useful if bounds are wide. With the Nystrom approximation N <= K, random signs estimate only the
  small trace of K (K + ridge)^{-1} - N (N + ridge)^{-1}; the trace of the second term is known. The
  solves are conjugate gradients on the full kernel, preconditioned by N + ridge. Each step computes
  n^2 kernel entries for all ridges.
  """
  import jax
  import jax.numpy as jnp

  from kipcore import linalg
  from kipcore.blocks import map_row_blocks
  from kipcore.kernels.gram import gram_matvec
  from kipcore.selection import scoring

  n = x.shape[0]
  landmarks = jax.random.permutation(jax.random.key(2), n)[:num_landmarks]
  xs, ones = x[landmarks], jnp.ones((num_landmarks,), x.dtype)
  factor = scoring.nystrom_factor(kernel_fn, xs, ones)
  v = map_row_blocks(lambda rows: linalg.whiten(factor, kernel_fn(rows, xs).T).T, x, 2048)
  values, basis = np.linalg.eigh(np.asarray(linalg.matmul(v.T, v), np.float64))
  u = linalg.matmul(
    v, jnp.asarray(basis / np.sqrt(np.maximum(values, 1e-12 * values[-1])), x.dtype)
  )
  values = np.maximum(values, 0)
  signs = jax.random.rademacher(jax.random.key(3), (n, num_probes), x.dtype)
  b = jnp.tile(signs, (1, len(ridges)))
  ridge = jnp.asarray(np.repeat(ridges, num_probes))
  shrink = jnp.asarray(values, x.dtype)[:, None]
  # (N + ridge)^{-1} b = (b - U diag(values / (values + ridge)) U^T b) / ridge
  precondition = jax.jit(
    lambda r: (r - linalg.matmul(u, shrink / (shrink + ridge) * linalg.matmul(u.T, r))) / ridge
  )
  apply = jax.jit(lambda p: gram_matvec(kernel_fn, x, x, p, 512) + ridge * p)
  inner = lambda a, c: jnp.sum(a * c, axis=0)
  z, r = jnp.zeros_like(b), b
  h = precondition(r)
  p, rho, steps = h, inner(r, h), 0
  while (
    float(jnp.max(jnp.linalg.norm(r, axis=0) / jnp.linalg.norm(b, axis=0))) > tolerance
    and steps < 20
  ):
    q = apply(p)
    rate = rho / inner(p, q)
    z, r = z + rate * p, r - rate * q
    h = precondition(r)
    rho, old = inner(r, h), rho
    p, steps = h + rho / old * p, steps + 1
  # g^T (M - M_N) g = ridge g^T ((N + ridge)^{-1} - (K + ridge)^{-1}) g
  differences = np.asarray(ridge * inner(b, precondition(b) - z)).reshape(len(ridges), num_probes)
  known = np.sum(values / (values + np.asarray(ridges)[:, None]), axis=1)
  return (
    known + differences.mean(axis=1),
    differences.std(axis=1, ddof=1) / np.sqrt(num_probes),
    steps,
  )


def stream(data_dir) -> dict:
  """Time and private memory of streamed scores as the file grows."""
  from kipcore import kernels
  from kipcore.architectures import fc
  from kipcore.selection import score_ridge, streaming

  _, y, _, raw, fitted = mnist(data_dir)
  kernel_fn = kernels.NetworkKernel(fc(1), "ntk")
  n = FLAGS.stream_rows
  y = np.asarray(y)
  with tempfile.TemporaryDirectory() as folder:
    pixels, targets = _write_distorted(pathlib.Path(folder), raw.x_train, y, n)
    transform = lambda block: np.asarray(fitted.apply(block.reshape(-1, 28, 28, 1))).reshape(
      len(block), -1
    )
    landmarks, few = 1000, min(n, 20_000)
    # A ridge proportional to n keeps the effective dimension constant as rows are added.
    found = score_ridge.landmark_score_ridge(0, kernel_fn, transform(pixels[:few]), 50, landmarks)
    ridge = n / few * float(found.ridge)
    run = lambda rows: streaming.stream_krr_sensitivities(
      0, kernel_fn, pixels[:rows], targets[:rows], ridge * rows / n, landmarks, transform
    )
    compile_seconds, _ = timed(lambda: run(8192).scores)
    rows = []
    for size in (n // 8, n // 4, n // 2, n):
      with private_peak() as peak:
        seconds, out = timed(lambda size=size: run(size))
      rows.append(
        {
          "n": size,
          "seconds": seconds,
          "private_peak_gb": peak[0],
          "total": float(out.total),
          "max_over_mean": float(out.max_over_mean),
        }
      )
      print(rows[-1], flush=True)
  return {
    "kernel": "fc1 ntk",
    "num_landmarks": landmarks,
    "first_call_seconds": compile_seconds,
    "file_gb": pixels.nbytes / 1e9,
    "rows": rows,
  }


def _write_distorted(folder, images, labels, n):
  """Memory-mapped files of n byte images (shifted, noisy MNIST) and of their labels."""
  rng = np.random.default_rng(0)
  images = images.reshape(-1, 28, 28)
  for start in range(0, n, 10_000):
    rows = rng.integers(0, len(images), min(10_000, n - start))
    shift = rng.integers(-2, 3, size=(rows.size, 2))
    moved = np.stack([np.roll(images[r], s, (0, 1)) for r, s in zip(rows, shift)]).astype(np.int16)
    noisy = np.clip(moved + rng.integers(-20, 21, size=moved.shape), 0, 255).astype(np.uint8)
    for name, content in (("x", noisy), ("y", labels[rows].astype(np.float32))):
      with open(folder / name, "ab") as file:
        content.tofile(file)
  return (
    np.memmap(folder / "x", np.uint8, "r", shape=(n, 784)),
    np.memmap(folder / "y", np.float32, "r", shape=(n, labels.shape[1])),
  )


def kmeans(data_dir) -> dict:
  """k-means++ seeds, k = 500, with 1 and 8 trials, and scikit-learn in the same process."""
  import jax
  from sklearn.cluster import kmeans_plusplus as peer

  from kipcore import linalg
  from kipcore.selection import clustering

  x, _, _, _, _ = mnist(data_dir)
  host, k, rows = np.asarray(x), 500, []
  # scikit-learn converts float32 rows to float64 at every seed, so it is faster on float64 rows.
  wide = host.astype(np.float64)

  def cost(centers):
    return float(np.mean(_nearest_squares(host, np.asarray(centers))))

  for trials in (1, 8):
    ours = lambda seed, trials=trials: clustering.kmeans_plusplus(seed, x, k, num_trials=trials)
    first, _ = timed(lambda: ours(0))
    # Alternate three times, so that changes of the machine affect both.
    mine, theirs, costs, peer_costs = [], [], [], []
    for seed in range(1, 4):
      seconds, seeds = timed(lambda: ours(seed))
      mine.append(seconds)
      costs.append(cost(seeds.centers))
      started = time.perf_counter()
      centers, _ = peer(wide, k, n_local_trials=trials, random_state=seed)
      theirs.append(time.perf_counter() - started)
      peer_costs.append(cost(centers))
    # The products of all rows with the candidates, in blocks of 256 columns, which no exact method
    # can omit without pruning.
    product = jax.jit(lambda a, b: linalg.matmul(a, b.T))
    timed(lambda: product(x, x[:256]))
    floor = np.mean([timed(lambda: product(x, x[:256]))[0] for _ in range(5)]) * k * trials / 256
    rows.append(
      {
        "trials": trials,
        "seconds": mine,
        "peer_seconds": theirs,
        "ratio": float(np.mean(theirs) / np.mean(mine)),
        "compile_seconds": first - float(np.mean(mine)),
        "floor_seconds": float(floor),
        "over_floor": float(np.mean(mine) / floor),
        "cost": costs,
        "peer_cost": peer_costs,
      }
    )
    print(rows[-1], flush=True)
  return {
    "n": host.shape[0],
    "d": host.shape[1],
    "k": k,
    "peer": "scikit-learn kmeans_plusplus on float64 rows, on which it is faster than on float32",
    "rows": rows,
    "peak_gb": peak_gb(),
  }


def _nearest_squares(x, centers):
  squares = (centers**2).sum(1)
  return np.concatenate(
    [
      np.maximum((b**2).sum(1) + (squares - 2 * b @ centers.T).min(1), 0)
      for b in np.array_split(x, 20)
    ]
  )


def cholesky(data_dir) -> dict:
  """Pivoted Cholesky of a Gaussian kernel, 1,000 pivots of 60,000 rows, and its residuals."""
  try:
    import coreax
    from coreax.kernels import SquaredExponentialKernel
    from coreax.solvers import RPCholesky
  except ImportError as error:
    return {"left_out": f"coreax is not installed ({error})"}
  import jax
  import jax.numpy as jnp

  from kipcore import kernels, linalg
  from kipcore.selection import cholesky as ours_room

  x, _, _, _, _ = mnist(data_dir)
  scale, rank, rows = float(np.sqrt(x.shape[1])), 1000, []
  kernel_fn = kernels.rbf_fn(scale)

  @jax.jit
  def residual(indices):
    s = x[indices]
    f = linalg.factor(kernel_fn(s, None), 1e-5)
    v = linalg.whiten(f, kernel_fn(s, x))
    return 1 - jnp.mean(jnp.sum(v * v, axis=0))

  ours = lambda seed: ours_room.rpcholesky(seed, kernel_fn, x, rank)
  theirs = lambda seed: (
    RPCholesky(
      coreset_size=rank,
      random_key=jax.random.key(seed),
      kernel=SquaredExponentialKernel(length_scale=scale),
    )
    .reduce(coreax.Data(x))[0]
    .unweighted_indices
  )
  first, _ = timed(lambda: ours(0))
  peer_first, _ = timed(lambda: theirs(0))
  for seed in (1, 2, 3):
    seconds, mine = timed(lambda: ours(seed))
    peer_seconds, indices = timed(lambda: theirs(seed))
    rows.append(
      {
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "ratio": peer_seconds / seconds,
        "relative_residual": float(residual(mine.pivots)),
        "peer_relative_residual": float(residual(indices)),
      }
    )
    print(rows[-1], flush=True)

  def products():
    # Lower bound on the cost of the factor: every column once, and n k^2 / 2 multiply-adds.
    f = jnp.zeros((rank // 2, x.shape[0]), x.dtype)
    return kernel_fn(x, x[:rank]), linalg.matmul(jnp.zeros((rank, rank // 2), x.dtype), f)

  products = jax.jit(products)
  timed(products)
  floor = float(np.mean([timed(products)[0] for _ in range(3)]))
  return {
    "n": x.shape[0],
    "rank": rank,
    "peer": f"coreax {coreax.__version__} RPCholesky",
    "rows": rows,
    "first_call_seconds": first,
    "peer_first_call_seconds": peer_first,
    "floor_seconds": floor,
    "over_floor": float(np.mean([r["seconds"] for r in rows]) / floor),
    "peak_gb": peak_gb(),
  }


JOBS = {job.__name__: job for job in (scores, stream, kmeans, cholesky)}

if __name__ == "__main__":
  common.launch(lambda: harness.run(JOBS))
