"""Cost of a step of every method: `python -m experiments.benchmarks.methods --data_dir=DIR`.

MNIST, one image per class. Each method runs in a separate process with the settings of
`--preset=cpu` ("cpu"). One step with its published settings is compiled but not run, to determine
its memory ("published"). Writes experiments/results/benchmark_methods.json:

  step_seconds       mean over 20 steps after compilation, including the host
  compile_seconds    compilation of the mapped step
  scratch_bytes      temporary memory of one compiled step, as planned by XLA for this backend
  state_bytes        state of the step: images, optimizer, networks, sampler
  peak_gb            peak memory of the process, including the dataset and compilation
"""

import functools

from experiments.benchmarks import harness
from kipcore.cli import flags as common

harness.define_flags("methods")

METHODS = ("kip", "rfad", "frepo", "rcig", "dm", "dc", "dsa", "mtt", "ncfm")
_STEPS = 20


def job(method: str, data_dir) -> dict:
  """One method: measured at CPU settings, compiled at published settings."""
  import os
  import tempfile

  import jax
  import numpy as np

  from kipcore.cli import recipes
  from kipcore.cli.runs import pipeline
  from kipcore.distillation.methods import experts
  from kipcore.io import trajectories

  config = recipes.resolve(method=method, dataset="mnist", data_dir=data_dir, init="uniform")
  data = pipeline.load(config)
  support = pipeline.start(config, data).support
  row = {}
  with tempfile.TemporaryDirectory() as folder:
    for preset in ("cpu", "published"):
      config = recipes.resolve(
        method=method, preset=preset, dataset="mnist", data_dir=data_dir, init="uniform"
      )
      problem = recipes.Problem(data.kernel_fn, 10)
      if recipes.RECIPES[method].experts:
        # Random experts on disk, because their values affect neither time nor memory.
        path = os.path.join(folder, f"{preset}.npy")
        size, _ = experts.flat_parameters(recipes.module_of(config, problem), support.x)
        shape, rng = (config.expert_epochs + 1, size), np.random.default_rng(0)
        made = (0.05 * rng.normal(size=shape).astype(np.float32) for _ in range(2))
        trajectories.save_trajectories(path, made, {})
        problem = problem._replace(experts=trajectories.load_trajectories(path).array)
      batch = pipeline.batch_size_of(config, data)
      distiller = recipes.distiller_of(config, problem, pipeline.sampler_of(config), batch)
      row[preset] = {
        "width": config.width,
        "targets": batch,
        **step_memory(distiller, support, data),
      }
      if preset == "cpu":
        from kipcore.distillation import loop

        result = loop.distill(
          0,
          distiller,
          support,
          data.x_train,
          data.y_train,
          _STEPS,
          log_steps=[2],
          devices=[jax.devices()[0]],
        )
        seconds = (result.history[-1]["seconds"] - result.history[1]["seconds"]) / (_STEPS - 2)
        row[preset].update(
          step_seconds=seconds, compile_seconds=result.compile_seconds, peak_gb=harness.peak_gb()
        )
  return row


def step_memory(distiller, support, data) -> dict:
  """Temporary and state memory of one step in bytes, without running it."""
  import jax
  import numpy as np

  from kipcore import keys
  from kipcore.distillation import loop
  from kipcore.distillation.targets import Targets

  counts = np.bincount(np.argmax(data.y_train, axis=1), minlength=10).astype(np.int32)
  key = keys.canonical_key(0)
  shape = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype))
  targets = shape(Targets(data.x_train, data.y_train, counts, np.float32(1)))
  state = jax.eval_shape(
    lambda: loop.distill_init(key, distiller, support, counts, len(data.x_train))
  )
  step = jax.jit(lambda state, targets: loop.distill_step(key, distiller, state, targets))
  compiled = step.lower(state, targets).compile()
  kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
  return {"scratch_bytes": compiled.memory_analysis().temp_size_in_bytes, "state_bytes": int(kept)}


def main() -> None:
  """Runs the jobs selected by --only."""
  harness.run({method: functools.partial(job, method) for method in METHODS})


if __name__ == "__main__":
  common.launch(main)
