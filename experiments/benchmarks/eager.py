"""Time of public functions called directly against the same calls under `jax.jit`: `python -m experiments.benchmarks.eager`.

Every public function of arrays that can be traced, at a size at which it takes tens of milliseconds, so
that neither validation nor dispatch dominates. After a first run of both, which compiles, the calls alternate, and the
smallest times are compared. Writes experiments/results/benchmark_eager.json:

  functions   seconds of each, elapsed and of the processor, their ratios, and the number of repetitions

About five minutes on one core. `--cases=NAME,...` measures some functions again.
"""

import json
import pathlib
import time

import numpy as np
from absl import flags

from experiments.benchmarks import harness
from kipcore.cli import flags as common

harness.define_flags("eager")
flags.DEFINE_list("cases", [], "Measure these functions; the others stay in the file.")

_REPEATS, _SECONDS = 5, 0.5


def cases() -> dict:
  """Functions of arrays by name, with all of their arrays as arguments: constants would be folded by XLA."""
  import jax
  import jax.numpy as jnp

  import kipcore
  from kipcore.kernels.stax import to_stax

  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  fc, rbf = kipcore.ntk_fn(kipcore.fc(2)), kipcore.rbf_fn(8.0)
  x, many, wide = normal(2000, 64), normal(10_000, 64), normal(100_000, 64)
  labels = np.arange(2000) % 10
  y = kipcore.one_hot_centered(labels, 10)
  k = jax.jit(fc)(x)
  fit = kipcore.krr_fit(k, y, 10.0)
  tall = normal(20_000, 2000)
  support = kipcore.Support(x[:500], y[:500])
  scores = jnp.asarray(rng.uniform(0.5, 1.5, 1_000_000), jnp.float32)
  images = normal(2000, 28, 28, 1)
  network = kipcore.network(kipcore.fc(1), 512, 10)
  networks = jax.jit(jax.vmap(lambda key: network.init(key, x[:1])))(
    jax.random.split(jax.random.key(0), 4)
  )
  prepared = kipcore.fit_preprocess(np.asarray(wide[:10_000]), "zca")
  sampler = kipcore.importance("cross_entropy")
  state = jax.jit(lambda: sampler.init(jnp.full((10,), 100_000, jnp.int32), 1_000_000))()
  rows = jnp.arange(500_000, dtype=jnp.int32)
  row_labels = kipcore.one_hot_centered(rows % 10, 10)
  info = kipcore.LossInfo(scores[:500_000], normal(500_000, 10), jnp.float32(0), jnp.int32(0))
  key, landmarks = jax.random.key(0), jnp.arange(300)
  return {
    "ntk_fn": (lambda x: kipcore.ntk_fn(kipcore.fc(3))(x), normal(3000, 64)),
    "nngp_fn": (lambda x: kipcore.nngp_fn(kipcore.fc(3))(x), normal(3000, 64)),
    "ntk_fn, convolutional": (kipcore.ntk_fn(kipcore.conv_net(2)), images[:6], images[:3]),
    "rbf_fn": (rbf, normal(3000, 64)),
    "linear_fn": (kipcore.linear_fn(), normal(3000, 64)),
    "sum of kernels": (fc + 2.0 * rbf, x),
    "from_stax": (kipcore.from_stax(to_stax(kipcore.fc(2))[2]), x[:1000]),
    "gram": (lambda x: kipcore.gram(fc, x), many),
    "gram, blocks": (lambda x: kipcore.gram(fc, x, None, 1000), normal(5000, 64)),
    "gram_diag": (lambda x: kipcore.gram_diag(fc, x), normal(1_000_000, 64)),
    "gram_matvec": (lambda x: kipcore.gram_matvec(fc, x, x, x), normal(4000, 64)),
    "krr_fit": (lambda k, y: kipcore.krr_fit(k, y, 10.0), k, y),
    "krr_predict": (kipcore.krr_predict, fit, tall),
    "krr_loss": (kipcore.krr_loss, fit, tall, row_labels[:20_000]),
    "gp_posterior": (lambda k, y: kipcore.gp_posterior(k, k, k, y, 10.0), k, y),
    "gp_log_likelihood": (lambda k, y: kipcore.gp_log_likelihood(k, y, 10.0), k, y),
    "gradient_flow": (lambda k, y: kipcore.gradient_flow(k, k, y, 100.0), k[:500, :500], y[:500]),
    "label_solve": (
      lambda k, t, y: kipcore.label_solve(k, t, y, 10.0),
      k[:500, :500],
      k[:, :500],
      y,
    ),
    "label_solve_rows": (
      lambda s, x, y: kipcore.label_solve_rows(fc, s, x, y, 10.0),
      x[:300],
      many,
      row_labels[:10_000],
    ),
    "evaluate_krr": (
      lambda s, x, y: kipcore.evaluate_krr(fc, s, x, y, 10.0),
      support,
      many,
      row_labels[:10_000],
    ),
    "ridge_leverage_scores": (lambda k: kipcore.ridge_leverage_scores(k, 10.0), k),
    "effective_dimension": (lambda k: kipcore.effective_dimension(k, 10.0), k),
    "feature_leverage_scores": (lambda z: kipcore.feature_leverage_scores(z, 10.0), wide),
    "landmark_leverage_scores": (
      lambda x, i: kipcore.landmark_leverage_scores(fc, x, i, 10.0),
      many,
      landmarks,
    ),
    "score_ridge_for_dimension": (
      lambda k: kipcore.score_ridge_for_dimension(k, 50.0),
      k[:600, :600],
    ),
    "landmark_score_ridge": (lambda x: kipcore.landmark_score_ridge(0, fc, x, 50.0, 300), many),
    "effective_dimension_bounds": (
      lambda x: kipcore.effective_dimension_bounds(0, fc, x, 10.0, 300),
      many,
    ),
    "krr_sensitivities": (lambda k, y: kipcore.krr_sensitivities(k, y, 10.0), k, y),
    "krr_sensitivity_scores": (lambda k, y: kipcore.krr_sensitivity_scores(k, y, 10.0), k, y),
    "feature_krr_sensitivities": (
      lambda z, y: kipcore.feature_krr_sensitivities(z, y, 10.0),
      wide,
      row_labels[:100_000],
    ),
    "blocked_krr_sensitivities": (
      lambda x, y: kipcore.blocked_krr_sensitivities(fc, x, y, 10.0, np.arange(len(x)) % 10),
      many,
      row_labels[:10_000],
    ),
    "approximate_krr_sensitivities": (
      lambda x, y: kipcore.approximate_krr_sensitivities(0, fc, x, y, 10.0, 300),
      x,
      y,
    ),
    "kmeans_sensitivities": (kipcore.kmeans_sensitivities, wide, wide[:100]),
    "lightweight_sensitivities": (kipcore.lightweight_sensitivities, normal(1_000_000, 64)),
    "kmeans": (lambda x: kipcore.kmeans(0, x, 20, max_iterations=10), wide),
    "kmeans_plusplus": (lambda x: kipcore.kmeans_plusplus(0, x, 50), wide),
    "kernel_kmeans_plusplus": (lambda x: kipcore.kernel_kmeans_plusplus(0, fc, x, 50), wide),
    "nearest_rows": (kipcore.nearest_rows, wide, wide[:50]),
    "herding": (lambda x: kipcore.herding(x, 10), wide),
    "k_center": (lambda x: kipcore.k_center(x, 10), wide),
    "rpcholesky": (lambda x: kipcore.rpcholesky(0, fc, x, 100), many),
    "krr_pursuit": (lambda x, y: kipcore.krr_pursuit(0, fc, x, y, 1000, 100, 10.0), x, y),
    "sensitivity_sample": (lambda s: kipcore.sensitivity_sample(0, s, 1_000_000), scores),
    "systematic_sample": (lambda s: kipcore.systematic_sample(0, s, 50_000), scores),
    "gumbel_sample": (lambda s: kipcore.gumbel_sample(0, s, 50_000), scores),
    "importance_sample": (lambda s: kipcore.importance_sample(0, s, 50_000), scores),
    "stratified_sample": (
      lambda s: kipcore.stratified_sample(0, s, np.arange(s.size) % 10, 1_000_000),
      scores,
    ),
    "merge_duplicates": (kipcore.merge_duplicates, rows % 1000, scores[:500_000]),
    "scaled_to_rows": (kipcore.scaled_to_rows, normal(300_000, 64), wide),
    "random_features": (lambda v, x: kipcore.random_features(network, v, x), networks, many),
    "random_feature_kernel": (
      lambda a, b: kipcore.random_feature_kernel(network, a, b),
      normal(3000, 2048),
      normal(3000, 2048),
    ),
    "random_augmentation": (
      lambda key, x: kipcore.random_augmentation("color")(key)(x),
      key,
      images,
    ),
    "random_crops": (kipcore.random_crops, key, images),
    "label_distribution": (kipcore.label_distribution, row_labels),
    "one_hot_centered": (lambda i: kipcore.one_hot_centered(i, 1000), rows[:100_000] % 1000),
    "Preprocess.apply": (prepared.apply, wide),
    "Preprocess.invert": (prepared.invert, wide),
    "Sampler.update": (sampler.update, state, rows, row_labels, info),
    "Sampler.draw": (lambda key, s: sampler.draw(key, s, 50_000), key, state),
  }


def compare(fn, args) -> dict:
  """The smallest times of alternating direct and jitted calls: elapsed, and of the processor.

  The processor time is that of this process only, so other work on the machine hardly changes its ratio.
  """
  import jax

  jitted = jax.jit(fn)
  calls = {"eager": lambda: fn(*args), "jitted": lambda: jitted(*args)}
  seconds: dict[str, list] = {name: [] for name in calls}
  for call in calls.values():
    harness.timed(call)
  started = time.perf_counter()
  while len(seconds["jitted"]) < _REPEATS or time.perf_counter() - started < _SECONDS:
    for name, call in calls.items():
      before = time.process_time()
      elapsed = harness.timed(call)[0]
      seconds[name].append((elapsed, time.process_time() - before))
  best = {name: np.min(each, axis=0).tolist() for name, each in seconds.items()}
  return {
    "eager_seconds": best["eager"][0],
    "jitted_seconds": best["jitted"][0],
    "ratio": best["eager"][0] / best["jitted"][0],
    "eager_processor_seconds": best["eager"][1],
    "jitted_processor_seconds": best["jitted"][1],
    "processor_ratio": best["eager"][1] / best["jitted"][1],
    "repeats": len(seconds["jitted"]),
  }


def functions(data_dir) -> dict:
  """One entry per function, with the commit that was measured."""
  from kipcore.cli.folder import run_folder

  wanted, path = flags.FLAGS.cases, pathlib.Path(flags.FLAGS.output)
  rows, commit = {}, run_folder.environment()["commit"]
  if wanted:
    job = json.loads(path.read_text())["jobs"]["functions"]
    rows = {name: {"commit": job["commit"], **row} for name, row in job["rows"].items()}
  for name, (fn, *args) in cases().items():
    if wanted and name not in wanted:
      continue
    rows[name] = {**compare(fn, args), "commit": commit}
    print(name, rows[name], flush=True)
  worst = max(rows, key=lambda name: rows[name]["processor_ratio"])
  return {"rows": rows, "worst": worst, "worst_processor_ratio": rows[worst]["processor_ratio"]}


JOBS = {"functions": functions}

if __name__ == "__main__":
  common.launch(lambda: harness.run(JOBS))
