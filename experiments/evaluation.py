"""A saved artefact scored again, behind its own preprocessing, on the test split of its dataset."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kipcore import artifact, checks, datasets, evaluate
from kipcore.architectures import architecture
from kipcore.types import Support
from experiments import pipeline
from experiments.config import DistillConfig
from experiments.errors import UsageError, usage


def run_evaluate(stored: artifact.Artifact, data_dir: str | None, evaluators: list[str], num_seeds: int, seed: int,
                 dataset: str | None = None) -> dict:
  """Scores an artefact on the test split of its dataset.

  Args:
    stored: the artefact; JAX's 64-bit switch must suit its dtype.
    data_dir: where TFDS keeps prepared datasets.
    evaluators: among "krr" and "network".
    num_seeds: networks to train.
    seed: root of their random streams.
    dataset: another name or path for the dataset; its content must have the recorded hash.

  Returns:
    JSON-able results; `test_accuracy` is to the last digit what was recorded.

  Raises:
    UsageError: for a wrong evaluator, or a dataset that is not the recorded one.
  """
  with usage():
    for name in evaluators:
      checks.one_of("evaluators", name, ("krr", "network"))
    about, recorded = stored.metadata["dataset"], stored.metadata["config"]
    config = DistillConfig(**{f.name: recorded[f.name] for f in dataclasses.fields(DistillConfig) if f.name in recorded})
    raw = datasets.load_dataset(dataset or about["name"], data_dir or config.data_dir, about["validation_fraction"],
                                config.seed)
    if raw.hashes["test"] != about["hashes"]["test"]:
      raise UsageError(f"the test split of {dataset or about['name']} is not the one that the artefact was scored on: "
                       f"expected sha256 {about['hashes']['test'][:12]}..., got {raw.hashes['test'][:12]}...")
    data = pipeline.prepare(config, raw, stored.preprocess, stored.kernel_fn())._replace(score_kernel=stored.kernel_fn())
  support = Support(jnp.asarray(stored.support), jnp.asarray(stored.labels))
  result = {"dataset": about["name"], "support_size": len(stored.images),
            "recorded_test_accuracy": stored.metadata["result"]["test_accuracy"]}
  if "krr" in evaluators:
    result["test_accuracy"] = pipeline.score(config, data, support)
  if "network" in evaluators:
    arch = architecture(config.architecture) if config.score_architecture else stored.arch
    scores = evaluate.evaluate_network(seed, arch, support, data.x_test, data.y_test, num_seeds)
    result["network_test_accuracy"] = [float(s) for s in scores]
    result["network_test_accuracy_mean"] = float(np.mean(scores))
    result["network_test_accuracy_std"] = float(np.std(scores, ddof=1)) if num_seeds > 1 else 0.0
  return result
