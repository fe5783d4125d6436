"""An evaluation: a saved artifact next to its baselines, with its own preprocessing, on its test split."""

import dataclasses
import re
import sys
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kipcore import augment, checks, datasets, kernels, keys
from kipcore.architectures import architecture
from kipcore.cli import recipes
from kipcore.cli.config import DistillConfig, EvaluateConfig, validate
from kipcore.cli.cost import estimate, progress
from kipcore.cli.errors import UsageError, usage
from kipcore.cli.runs import pipeline
from kipcore.evaluation import networks, protocols, ranking
from kipcore.io import artifact
from kipcore.networks import ResNet
from kipcore.selection import coreset, sampling
from kipcore.types import Support

ALL_EVALUATORS = (
  "krr",
  "krr:fc1:nngp",
  "krr:fc3",
  "krr:conv3_vec",
  "network",
  "network:mlp",
  "network:convnet",
  "network:convnet:dsa",
  "network:resnet",
)
BASELINES = ("uniform", "kmeans", "herding", "k_center", "leverage", "full")
_RANDOM, _SOLVED = "uniform", "uniform_solved"
# Architecture and normalization of the short names; convnet is that of DC, DM and MTT.
_NETWORKS = {"mlp": ("fc3", "none"), "convnet": ("conv3", "instance")}


class Plan(NamedTuple):
  """What an evaluation scores: data and sets, evaluators by name, and pairs of the names of a set and an evaluator."""

  evaluation: "Evaluation"
  evaluators: dict
  todo: list


class Evaluation(NamedTuple):
  """Config and data of an artifact, and the sets by name, the distilled one first."""

  config: DistillConfig
  data: pipeline.Data
  sets: dict


def run_evaluate(stored: artifact.Artifact, config: EvaluateConfig, write=None) -> dict:
  """Scores an artifact and its baselines on the test split of its dataset.

  Args:
    stored: the artifact; JAX's 64-bit switch must suit its dtype.
    config: evaluators, baselines, seeds.
    write: prints a line of progress; None for none.

  Returns:
    Results for JSON: `test_accuracy` reproduces the recorded one exactly, `table` and `scores` are those of
    `ranking.evaluation_table` and `ranking.ranking_scores`, `markdown` is the table as text.

  Raises:
    UsageError: for an invalid evaluator or baseline, or a dataset that is not the recorded one.
  """
  write = write or (lambda text: None)
  evaluation, how, todo = plan(stored, config, write)
  data = evaluation.data
  with usage():
    if config.tune:
      how = _tuned(evaluation, how, config, write)
    table = _table(evaluation, how, todo, config, write)
  result = {
    "dataset": stored.metadata["dataset"]["name"],
    "support_size": len(stored.images),
    "recorded_test_accuracy": stored.metadata["result"]["test_accuracy"],
  }
  own = {entry.evaluator: entry for entry in table if entry.set == "distilled"}
  if "krr" in own:
    result["test_accuracy"] = own["krr"].mean
  if "network" in own:
    result["network_test_accuracy"] = list(own["network"].accuracies)
    result["network_test_accuracy_mean"] = own["network"].mean
    result["network_test_accuracy_half_width"] = own["network"].half_width
  return {
    **result,
    "num_seeds": config.num_seeds,
    "test_rows": data.x_test.shape[0],
    "table": [entry._asdict() for entry in table],
    "scores": scores_of(table),
    "markdown": ranking.markdown(table),
  }


def plan(
  stored: artifact.Artifact, config: EvaluateConfig, write=None, stand_ins: bool = False
) -> Plan:
  """Loads the data, makes the baselines and checks all settings.

  Args:
    stored: the artifact.
    config: evaluators, baselines, seeds.
    write: prints a line of progress; None for none.
    stand_ins: whether random rows stand for all baselines, to estimate the time of scores without making them.

  Returns:
    `Plan`.

  Raises:
    UsageError: as `run_evaluate`.
  """
  validate(config)
  with usage():
    for name in config.evaluators:
      checks.one_of("--evaluators", re.split("[:@]", name)[0], ("krr", "network"))
    for name in config.protocol:
      checks.one_of("--protocol", name, tuple(protocols.PROTOCOLS))
    for name in config.baselines:
      checks.one_of("--baselines", name, (*BASELINES, _SOLVED))
    if not config.evaluators:
      raise UsageError("--evaluators: expected at least one, got none")
    evaluation = prepare(stored, config, write, stand_ins)
    names = with_protocols(config)
    how = {name: evaluator_of(name, stored, evaluation.config, config) for name in names}
  todo = [
    (name, key)
    for name in evaluation.sets
    for key, each in how.items()
    if name != "full" or not _too_costly(each)
  ]
  return Plan(evaluation, how, todo)


def _table(evaluation: Evaluation, how: dict, todo: list, config: EvaluateConfig, write) -> list:
  """All entries of the evaluation table, each reported with the expected time of the others."""
  data, table = evaluation.data, []
  work = lambda name, key: (  # networks, or regressions
    config.num_seeds
    if isinstance(how[key], ranking.NetworkEvaluator)
    else len(evaluation.sets[name])
  )
  if (expected := expected_seconds(evaluation, how, todo, config)) > estimate.WORTH_SECONDS:
    write(f"estimate: about {estimate.duration(expected)} for {len(todo)} scores")
  seconds = {}  # of a unit of work, by evaluator
  for i, (name, key) in enumerate(todo):
    started = time.perf_counter()
    with progress.working(f"scoring {name} with {key}"):
      (entry,) = ranking.evaluation_table(
        config.seed,
        {name: evaluation.sets[name]},
        {key: how[key]},
        data.x_test,
        data.y_test,
        config.num_seeds,
        {name: coreset.OBJECTIVE_RIDGE} if name == "full" else None,
      )
    table.append(entry)
    seconds[key] = (time.perf_counter() - started) / work(name, key)
    left = [seconds[k] * work(n, k) for n, k in todo[i + 1 :] if k in seconds]
    known = len(left) == len(todo) - i - 1
    accuracy = ranking.shown(entry.mean, entry.half_width, entry.accuracies)
    text = f", {'about' if known else 'more than'} {estimate.duration(sum(left))} left"
    write(f"{i + 1} of {len(todo)}  {name}, {key}: {accuracy} %" + (text if left else ""))
  return table


def expected_seconds(
  evaluation: Evaluation, how: dict, todo: list, config: EvaluateConfig
) -> float:
  """Seconds of all scores, from a few optimizer steps of each network and a few pairs of each kernel.

  Args:
    evaluation: data and sets.
    how: evaluators by name.
    todo: pairs of a set and an evaluator, by name.
    config: settings of the evaluation.

  Returns:
    A number of seconds.
  """
  data, total = evaluation.data, 0.0
  for key, each in how.items():
    sets = [evaluation.sets[name] for name, other in todo if other == key]
    if isinstance(each, ranking.NetworkEvaluator):
      # Sets of one size share a compilation, and take the same time.
      by_size = {len(supports[0].x): supports[0] for supports in sets}
      found = {
        size: estimate.of_network(each, support, len(data.x_test))
        for size, support in by_size.items()
      }
      total += sum(compiled for _, compiled in found.values())
      total += sum(config.num_seeds * found[len(supports[0].x)][0] for supports in sets)
    else:
      rows = [len(support.x) for supports in sets for support in supports]
      work = estimate.Work(
        sum(estimate.pairs(size, len(data.x_test), symmetric=True) for size in rows),
        sum(float(size) ** 3 for size in rows),
      )
      (part,) = estimate.seconds_of({key: work}, each.kernel_fn, data.x_train)
      total += part.amount
  return total


def prepare(
  stored: artifact.Artifact, config: EvaluateConfig, write=None, stand_ins: bool = False
) -> Evaluation:
  """Loads the data of an artifact and makes its baselines.

  Args:
    stored: the artifact.
    config: baselines and seeds.
    write: prints a line of progress; None for none.
    stand_ins: whether random rows stand for all baselines but "full".

  Returns:
    `Evaluation`.

  Raises:
    UsageError: for a dataset that is not the recorded one, or an artifact without metadata of a run.
  """
  write = write or (lambda text: None)
  try:
    about, recorded, _ = (stored.metadata[part] for part in ("dataset", "config", "result"))
    name, fraction, hashed = (
      config.dataset or about["name"],
      about["validation_fraction"],
      str(about["hashes"]["test"]),
    )
    distilled = DistillConfig(
      **{f.name: recorded[f.name] for f in dataclasses.fields(DistillConfig) if f.name in recorded}
    )
    distilled = dataclasses.replace(distilled, test_rows=config.test_rows or distilled.test_rows)
    write(f"loading {name}")
    raw = datasets.load_dataset(
      name,
      config.data_dir or distilled.data_dir,
      fraction,
      distilled.seed,
      distilled.train_rows,
      distilled.test_fraction,
    )
    if distilled.fill:
      raw = datasets.fill_classes(raw, distilled.images_per_class, distilled.fill, distilled.seed)
  except (KeyError, TypeError, AttributeError) as error:
    raise UsageError(
      "--artifact: expected the artifact of a run, with dataset, config and result in its metadata; got "
      f"one without ({checks.one_line(error)})"
    ) from error
  if raw.hashes["test"] != hashed:
    raise UsageError(
      f"--dataset: the test split of {name} differs from the one that the artifact was scored on: "
      f"expected sha256 {hashed[:12]}..., got {raw.hashes['test'][:12]}..."
    )
  data = pipeline.prepare(distilled, raw, stored.preprocess, stored.kernel_fn())._replace(
    score_kernel=stored.kernel_fn()
  )
  sets = {"distilled": [Support(jnp.asarray(stored.support), jnp.asarray(stored.labels))]}
  for name in config.baselines:
    started = time.perf_counter()
    with progress.working(f"baseline {name}"):
      drawn = name in (_RANDOM, _SOLVED, "leverage")
      made = name if not stand_ins or name == "full" else _RANDOM
      found = baseline(made, distilled, data, config)
      sets[name] = found[:1] if made != name and not drawn else found
    if not stand_ins:
      write(f"baseline {name}: {estimate.duration(time.perf_counter() - started)}")
  return Evaluation(distilled, data, sets)


def baseline(
  name: str, distilled: DistillConfig, data: pipeline.Data, config: EvaluateConfig
) -> list[Support]:
  """A baseline of the size of the distilled set, from the artifact's preprocessed training rows.

  Args:
    name: of the baseline.
    distilled: config of the artifact.
    data: its data.
    config: settings of the evaluation.

  Returns:
    One support per seed if it is drawn at random, else one.
  """
  if name == "full":
    stride = -(-data.x_train.shape[0] // config.full_rows) if config.full_rows else 1
    return [Support(jnp.asarray(data.x_train[::stride]), jnp.asarray(data.y_train[::stride]))]
  seeds = range(config.seed, config.seed + config.num_seeds)
  if name == "leverage":  # scored once, drawn from once per seed
    m = distilled.images_per_class * data.raw.num_classes
    _, scores = coreset.score_rows(
      keys.stream(config.seed, "leverage"),
      jnp.asarray(data.x_train),
      jnp.asarray(data.y_train),
      m,
      data.kernel_fn,
    )
    rows = [
      np.asarray(
        sampling.stratified_sample(
          keys.stream(seed, "leverage"),
          scores.leverage,
          data.raw.y_train,
          m,
          uniform_mix=0.1,
          replace=False,
        ).indices
      )
      for seed in seeds
    ]
    return [
      Support(jnp.asarray(data.x_train[each]), jnp.asarray(data.y_train[each])) for each in rows
    ]
  if name in (_RANDOM, _SOLVED):
    supports = [
      pipeline.random_support(keys.stream(seed, "evaluation"), data, distilled.images_per_class)
      for seed in seeds
    ]
    if name == _SOLVED:
      supports = [
        pipeline.with_solved_labels(distilled, data, each, data.x_train, data.y_train)
        for each in supports
      ]
    return supports
  chosen = coreset.select_coreset(
    config.seed, data.x_train, data.y_train, distilled.images_per_class, name
  )
  return [Support(chosen.x, chosen.y)]


def with_protocols(config: EvaluateConfig) -> list[str]:
  """The names of the evaluators, with each protocol for networks without one."""
  names = []
  for name in config.evaluators:
    plain = not name.startswith("network") or "@" in name or not config.protocol
    names += [name] if plain else [f"{name}@{protocol}" for protocol in config.protocol]
  return names


def _tuned(evaluation: Evaluation, how: dict, config: EvaluateConfig, write) -> dict:
  """The evaluators, each network with the rate and length that are best on the validation rows."""
  data, support = evaluation.data, evaluation.sets["distilled"][0]
  if not data.x_validation.shape[0]:
    raise UsageError(
      "--tune: expected an artifact whose run held rows out (--validation_fraction), got none"
    )
  tuned = {}
  for name, each in how.items():
    if isinstance(each, ranking.NetworkEvaluator):
      base = protocols.protocol(each.protocol, support.x.shape[3] if support.x.ndim == 4 else None)
      base = dataclasses.replace(base, norm=base.norm if each.norm is None else each.norm)
      steps = each.num_steps or base.num_steps(support.x.shape[0])
      rates = [base.learning_rate * factor for factor in (0.3, 1.0, 3.0)]
      with progress.working(f"tuning {name}"):
        found = networks.tune(
          config.seed,
          each.network,
          support,
          data.x_validation,
          data.y_validation,
          base,
          rates,
          (max(steps // 3, 1), steps),
          width=each.width,
        )
      rate, steps = found.protocol.learning_rate, found.protocol.num_steps(1)
      write(f"{name}: learning rate {rate:.3g}, {steps:,} steps, chosen on validation rows")
      each = each._replace(protocol=found.protocol, num_steps=None, norm=None)
    tuned[name] = each
  return tuned


def evaluator_of(
  name: str, stored: artifact.Artifact, distilled: DistillConfig, config: EvaluateConfig
):
  """The evaluator of a name: krr[:ARCHITECTURE[:ntk|nngp]] or network[:ARCHITECTURE|mlp|convnet|resnet[:dsa]][@PROTOCOL].

  Args:
    name: of the evaluator.
    stored: the artifact.
    distilled: config of the artifact.
    config: settings of the evaluation.

  Returns:
    An evaluator.

  Raises:
    ValueError: for another name.
  """
  kind, *rest = name.partition("@")[0].split(":")
  protocol = name.partition("@")[2] or "default"
  what, option = (*rest, "", "")[:2]
  if len(rest) > 2:
    raise ValueError(f"--evaluators: expected at most two colons, got {name!r}")
  if kind == "krr":
    checks.one_of(f"--evaluators={name}: kernel", option or "ntk", ("ntk", "nngp"))
    kernel = (
      kernels.NetworkKernel(_architecture(name, what), option or "ntk")
      if what
      else stored.kernel_fn()
    )
    return ranking.KernelEvaluator(kernel, stored.relative_ridge)
  checks.one_of(f"--evaluators={name}: protocol", protocol, tuple(protocols.PROTOCOLS))
  if option not in ("", "dsa"):
    raise ValueError(
      f"--evaluators={name}: expected nothing or dsa after the second colon, got {option!r}"
    )
  own = architecture(distilled.architecture) if distilled.score_architecture else stored.arch
  norm = recipes.RECIPES[distilled.method].norm
  network: Any
  if what == "resnet":
    network = ResNet(config.width, stored.labels.shape[1])
  elif what in _NETWORKS:
    network, norm = architecture(_NETWORKS[what][0]), _NETWORKS[what][1]
  else:
    network = _architecture(name, what, (*_NETWORKS, "resnet")) if what else own
  return ranking.NetworkEvaluator(
    network,
    config.width,
    norm if protocol == "default" else None,
    augment.DSA if option else None,
    config.network_steps or None,
    protocol=protocol,
  )


def _architecture(name: str, what: str, others: tuple = ()):
  """The architecture in the name of an evaluator."""
  try:
    return architecture(what)
  except ValueError as error:
    names = "".join(f"{other}, " for other in others)
    raise ValueError(f"--evaluators={name}: expected {names}or an architecture; {error}") from None


def _too_costly(evaluator) -> bool:
  """Whether an evaluator needs a convolutional kernel, which takes hours on thousands of rows."""
  kernel_fn = getattr(evaluator, "kernel_fn", None)
  return isinstance(kernel_fn, kernels.NetworkKernel) and kernel_fn.arch.convolutional


def scores_of(table) -> dict:
  """`ranking.RankingScores` of the distilled set by evaluator, if random rows and all data were scored by it.

  With `network:NAME` and `network:NAME:dsa` also how much of the gain over random rows is due to augmentation.
  """
  means = {(entry.set, entry.evaluator): entry.mean for entry in table}
  evaluators = list(dict.fromkeys(entry.evaluator for entry in table))
  scores = {}
  for how in evaluators:
    names = [(name, how) for name in ("distilled", _RANDOM, "full")]
    if all(name in means for name in names):
      scores[how] = ranking.ranking_scores(*(means[name] for name in names))._asdict()
  gains = {
    how: means["distilled", how] - means[_RANDOM, how]
    for how in evaluators
    if (_RANDOM, how) in means
  }
  for how in gains:
    if how.endswith(":dsa") and how.removesuffix(":dsa") in gains:
      scores.setdefault(how, {})["augmentation_dependence"] = (
        gains[how] - gains[how.removesuffix(":dsa")]
      )
  return scores


def print_progress(text: str) -> None:
  """Prints a line of progress to the error stream; standard output is for the result."""
  print(text, file=sys.stderr, flush=True)
