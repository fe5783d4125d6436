"""Baselines against their definitions, the table and its intervals, and equal runs and calls."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, image_problem
from scipy import stats

import kipcore
from kipcore import augment, keys
from kipcore.cli.config import DistillConfig, EvaluateConfig
from kipcore.cli.cost import estimate
from kipcore.cli.runs import evaluation, pipeline
from kipcore.evaluation import ranking
from kipcore.selection import representatives
from kipcore.types import Support

pytestmark = pytest.mark.usefixtures("module_without_pictures")


def rows(n=40, d=5, seed=0):
  return np.random.default_rng(seed).normal(size=(n, d))


def test_herding_is_greedy_for_the_mean(dtype):
  x = rows().astype(dtype)
  chosen = np.asarray(kipcore.herding(x, 8))
  x64, mean, expected = x.astype(np.float64), x.astype(np.float64).mean(0), []
  for k in range(1, 9):
    errors = [
      np.inf if i in expected else np.linalg.norm(mean - (x64[i] + x64[expected].sum(0)) / k)
      for i in range(len(x))
    ]
    expected.append(int(np.argmin(errors)))
  assert chosen.tolist() == expected


def test_k_center_is_farthest_first_and_within_twice_the_best(dtype):
  x = rows(14).astype(dtype)
  chosen = np.asarray(kipcore.k_center(x, 3))
  distances = np.linalg.norm(x[:, None].astype(np.float64) - x[None], axis=2)
  expected = [int(np.argmin(np.linalg.norm(x - x.mean(0), axis=1)))]
  while len(expected) < 3:
    expected.append(int(np.argmax(distances[:, expected].min(1))))
  assert chosen.tolist() == expected
  radius = lambda centers: distances[:, list(centers)].min(1).max()
  best = min(radius((i, j, k)) for i in range(14) for j in range(i) for k in range(j))
  assert best <= radius(expected) <= 2 * best


@pytest.mark.parametrize("choose", [representatives.herding, representatives.k_center])
def test_masked_rows_are_ignored(choose):
  x = rows(30).astype(np.float32)
  present = np.arange(30) % 3 != 0
  kept = np.flatnonzero(present)
  shifted = np.where(present[:, None], x, 50.0).astype(np.float32)
  assert (kept[np.asarray(choose(x[present], 6))] == np.asarray(choose(shifted, 6, present))).all()
  with pytest.raises(ValueError, match="num_rows: expected at most the number of rows, 20, got 21"):
    choose(x, 21, present)
  with pytest.raises(ValueError, match="finite"):
    choose(x * np.nan, 2)


def test_resnet_equals_its_definition():
  x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
  module = kipcore.ResNet(4, 3, (1, 1))
  variables = jax.jit(module.init)(keys.canonical_key(0), x)
  p = {
    name: {k: np.asarray(v, np.float64) for k, v in leaf.items()}
    for name, leaf in variables["params"].items()
  }

  def conv(name, x):
    kernel = p[name]["kernel"]
    size = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    return sum(
      padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
      for i in range(size)
      for j in range(size)
    )

  def norm(name, x):
    mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p[name]["scale"] + p[name]["bias"]

  relu = lambda x: np.maximum(x, 0)
  h = relu(norm("stem_norm", conv("stem", x.astype(np.float64))))
  for stage in range(2):
    if stage:
      h = h[:, :4, :6].reshape(2, 2, 2, 3, 2, 4).mean((2, 4))
    name = f"stage_{stage}_block_0"
    inner = relu(norm(f"{name}_norm_0", conv(f"{name}_0", h)))
    inner = norm(f"{name}_norm_1", conv(f"{name}_1", inner))
    h = relu(inner + (conv(f"{name}_shortcut", h) if stage else h))
  expected = h.mean((1, 2)) @ p["readout"]["kernel"] + p["readout"]["bias"]
  assert_close(jax.jit(module.apply)(variables, x), expected, 1e-4)


def test_scores_and_intervals():
  values = [0.5, 0.6, 0.55, 0.7]
  low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
  assert ranking.half_width(values) == pytest.approx((high - low) / 2)
  assert ranking.half_width([0.3]) is None
  scores = kipcore.ranking_scores(0.6, 0.4, 0.9)
  assert scores.gain_over_random == pytest.approx(0.2) and scores.gap_to_full == pytest.approx(0.3)
  assert scores.label_robust == pytest.approx((np.exp(-0.05) - np.exp(-1)) / (np.e - np.exp(-1)))
  assert kipcore.ranking_scores(1.0, 0.0, 0.0).label_robust == pytest.approx(1.0)
  assert kipcore.ranking_scores(0.0, 1.0, 1.0).label_robust == pytest.approx(0.0)
  with pytest.raises(ValueError, match=r"full: expected a number in \[0, 1\], got 90"):
    kipcore.ranking_scores(0.6, 0.4, 90)


def test_table_contains_the_evaluator_results():
  support, x, y = image_problem()
  sets = {"one": [support], "drawn": [Support(support.x * s, support.y) for s in (1.0, 0.5)]}
  kernel = kipcore.ntk_fn(kipcore.fc(1))
  network = kipcore.NetworkEvaluator(kipcore.fc(1), width=8, num_steps=3)
  seen = []
  table = kipcore.evaluation_table(
    0,
    sets,
    {"krr": kipcore.KernelEvaluator(kernel, 1e-3), "network": network},
    x,
    y,
    2,
    progress=seen.append,
  )
  assert seen == table and [(e.set, e.evaluator, len(e.accuracies)) for e in table] == [
    ("one", "krr", 1),
    ("one", "network", 2),
    ("drawn", "krr", 2),
    ("drawn", "network", 2),
  ]
  expected = [
    float(kipcore.evaluate_krr(kernel, s, x, y, relative_ridge=1e-3).accuracy)
    for s in sets["drawn"]
  ]
  assert (
    list(table[2].accuracies) == expected
    and table[2].mean == np.mean(expected)
    and table[0].half_width is None
  )
  text = ranking.markdown(table)
  assert (
    text.splitlines()[0] == "| set | `krr` | `network` |"
    and f"| {100 * table[0].mean:.1f} |" in text
    and " and ".join(f"{100 * value:.1f}" for value in expected) in text
  )
  with pytest.raises(ValueError, match="expected 1 or 3 supports of 'drawn', got 2"):
    kipcore.evaluation_table(0, sets, {"krr": kipcore.KernelEvaluator(kernel)}, x, y, 3)


def test_an_interval_needs_three_seeds_and_is_explained():
  entry = lambda name, *values: ranking.EvaluationEntry(
    "a set", name, values, float(np.mean(values)), ranking.half_width(values)
  )
  one, two, three = entry("one", 0.5), entry("two", 0.611, 0.687), entry("three", 0.5, 0.6, 0.7)
  assert ranking.shown(two.mean, two.half_width, two.accuracies) == "61.1 and 68.7"
  assert ranking.shown(three.mean, three.half_width, three.accuracies) == "60.0 ± 24.8"
  assert ranking.shown(one.mean, one.half_width, one.accuracies) == "50.0"
  interval = "a ± b: mean and half of its 95 % confidence interval"
  last = lambda *table: ranking.markdown(table).splitlines()[-1]
  assert last(three) == f"Accuracy, %; {interval}."
  assert last(two, three) == f"Accuracy, %; {interval}; a and b: the values of two seeds."
  assert last(one, two) == "Accuracy, %; a and b: the values of two seeds."
  assert last(one) == "| a set | 50.0 |"


def test_networks_train_with_augmentation_and_on_batches():
  support, x, y = image_problem()
  options = dict(num_seeds=1, width=8, num_steps=2)
  plain, augmented = (
    kipcore.evaluate_network(0, kipcore.conv_net(1), support, x, y, augmentation=a, **options)
    for a in ("", augment.DSA)
  )
  assert 0 <= plain[0] <= 1 and 0 <= augmented[0] <= 1
  # For equal rows, any batch is equivalent to all of them.
  doubled = Support(jnp.concatenate([support.x[:1]] * 4), jnp.concatenate([support.y[:1]] * 4))
  whole, part = (
    kipcore.evaluate_network(0, kipcore.fc(1), doubled, x, y, batch_size=size, **options)
    for size in (4, 2)
  )
  assert whole[0] == part[0]
  with pytest.raises(ValueError, match="augmentation"):
    kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, augmentation="mirror", **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  folder, _ = pipeline.run_distill(
    DistillConfig(method="label_solve", init="uniform", test_rows=60),
    tmp_path_factory.mktemp("run"),
    verbose=False,
  )
  return kipcore.load_artifact(folder / "distilled.npz")


def test_run_and_library_give_the_same_table(stored):
  config = EvaluateConfig(
    ("krr", "krr:fc1:nngp", "network:mlp"),
    ("uniform", "uniform_solved", "kmeans", "herding", "k_center", "leverage", "full"),
    num_seeds=2,
    width=8,
    network_steps=3,
    full_rows=100,
  )
  result = evaluation.run_evaluate(stored, config)
  json.dumps(result)
  assert result["test_accuracy"] == stored.metadata["result"]["test_accuracy"]
  means = {(e["set"], e["evaluator"]): e["mean"] for e in result["table"]}
  assert len(means) == 8 * 3
  with_labels = {"distilled", "uniform_solved"}
  prepared = evaluation.prepare(stored, config)
  for name, supports in prepared.sets.items():
    assert len(supports) == (2 if name in ("uniform", "uniform_solved", "leverage") else 1)
    for support in supports:
      if name != "full":
        classes = np.asarray(support.y).argmax(1)
        assert len(classes) == 10 and (name in with_labels or sorted(classes) == list(range(10)))
  own = kipcore.KernelEvaluator(stored.kernel_fn(), stored.relative_ridge)
  library = kipcore.evaluation_table(
    0,
    {"distilled": prepared.sets["distilled"], "k_center": prepared.sets["k_center"]},
    {"krr": own},
    prepared.data.x_test,
    prepared.data.y_test,
    2,
  )
  assert [e.mean for e in library] == [means["distilled", "krr"], means["k_center", "krr"]]
  scores = result["scores"]["krr"]
  assert scores["gain_over_random"] == means["distilled", "krr"] - means["uniform", "krr"]
  assert (
    means["uniform_solved", "krr"] > means["uniform", "krr"]
    and means["full", "krr"] > means["kmeans", "krr"]
  )


@pytest.mark.parametrize("seconds, printed", [(8.0, True), (2.0, False)])
def test_long_evaluations_are_announced_before_the_first_score(
  seconds, printed, stored, monkeypatch
):
  monkeypatch.setattr(estimate, "of_network", lambda *_: (seconds, 1.0))
  config = EvaluateConfig(("krr", "network:mlp"), ("kmeans",), 2, width=4, network_steps=2)
  lines = []
  evaluation.run_evaluate(stored, config, lines.append)
  first = next(i for i, line in enumerate(lines) if line.startswith("1 of 4"))
  expected = [line for line in lines if line.startswith("estimate")]
  assert (expected == ["estimate: about 33.0 s for 4 scores"]) == printed
  assert not expected or lines.index(expected[0]) < first


def test_evaluators_by_name(stored):
  config = EvaluateConfig(width=8, network_steps=3, num_seeds=1)
  named = lambda name: evaluation.evaluator_of(name, stored, DistillConfig(), config)
  assert (
    named("krr").kernel_fn == stored.kernel_fn() and named("krr:conv2:nngp").kernel_fn.get == "nngp"
  )
  assert named("network").network == stored.arch and isinstance(
    named("network:resnet").network, kipcore.ResNet
  )
  convnet = named("network:convnet:dsa")
  assert (
    convnet.norm == "instance"
    and convnet.augmentation == augment.DSA
    and convnet.network.name == "conv3"
  )
  for name, message in [
    ("krr:fc1:cntk", "ntk"),
    ("network:lenet", "lenet"),
    ("network:mlp:mixup", "dsa"),
    ("krr:fc1:ntk:x", "colons"),
  ]:
    with pytest.raises(ValueError, match=message):
      named(name)
  for changes, message in [
    ({"evaluators": ("svm",)}, "krr"),
    ({"baselines": ("best",)}, "herding"),
    ({"evaluators": ()}, "at least one"),
  ]:
    with pytest.raises(ValueError, match=message):
      evaluation.run_evaluate(stored, EvaluateConfig(**changes))
