"""Writes the tables of README and experiments/results/README.md from the result files: `python -m experiments.docs.tables`."""

import argparse
import csv
import itertools
import json
import pathlib
import re
import statistics

ROOT = pathlib.Path(__file__).resolve().parents[2]


def conformance_table(results: dict) -> str:
  """Markdown of `conformance.json`: one row per job."""
  lines = [
    "| run | test accuracy, % | seeds | seconds | reference |",
    "| --- | --- | --- | --- | --- |",
  ]
  for name, job in results["jobs"].items():
    scores = f"{job['mean_percent']:.2f}" + (
      f" ± {job['std_percent']:.2f}" if job["std_percent"] is not None else ""
    )
    seconds = statistics.median(run["wall_seconds"] for run in job["runs"])
    lines.append(
      f"| `{name}` | {scores} | {len(job['runs'])} | {seconds:.0f} | {job['reference_percent']} |"
    )
  hardware = results["environment"]["hardware"]
  lines += [
    "",
    f"Mean and deviation over seeds, median seconds, {hardware['cpu_cores']} CPU cores, JAX "
    f"{results['environment']['versions']['jax']}, from `experiments/results/conformance.json` "
    "(`python -m experiments.studies.conformance`). The CIFAR-10 used here was decoded from JPEG files of quality 75, "
    "so its figures are not strictly comparable with published ones.",
  ]
  return "\n".join(lines)


# Arms of the ablation that are compared: the plain run, and the recipe that `run_distill` uses by default.
REFERENCE, DEFAULT = "uniform/uniform", "kmeans solved/cross_entropy"
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}


def starting_points_table(results: dict) -> str:
  """Markdown of `starting_points.json`: one row per dataset, network and size."""
  first = next(iter(results["cells"].values()))
  strategies = list(first["summary"])
  lines = [
    "| points | " + " | ".join(f"`{name}`" for name in strategies) + " |",
    "| --- |" + " --- |" * len(strategies),
  ]
  for name, cell in results["cells"].items():
    dataset, network, points = name.rsplit("-", 2)
    row = []
    for strategy in strategies:
      numbers = (cell["summary"][strategy][kind] for kind in ("one_hot", "solved"))
      row.append(" / ".join(f"{number['mean']:.1f} ± {number['std']:.1f}" for number in numbers))
    lines.append(
      f"| {TITLES.get(dataset, dataset)} {network}, {points} | " + " | ".join(row) + " |"
    )
  seeds = {len(cell["runs"]) for cell in results["cells"].values()}
  lines += [
    "",
    "Test accuracy (%) of ridge regression on the selected points before any step, with one-hot labels / with labels solved on all "
    f"training rows; mean and deviation over {'/'.join(map(str, sorted(seeds)))} seeds, from "
    "`experiments/results/starting_points.json` (`python -m experiments.studies.starting_points`). `kmeans` has no "
    "deviation at one image per class: the mean of a class is deterministic."
    + "".join(
      f" {network} chooses from {rows:,} training rows and is tested on {tested:,}."
      for network, rows, tested in dict.fromkeys(
        (name.rsplit("-", 2)[1], cell["training_rows"], cell["test_rows"])
        for name, cell in results["cells"].items()
        if cell["config"]["test_rows"]
      )
    ),
  ]
  return "\n".join(lines)


def _setting_title(name: str) -> str:
  dataset, images_per_class = name.rsplit("-", 1)
  return f"{TITLES.get(dataset, dataset)}, {images_per_class}"


def default_gain_table(results: dict) -> str:
  """Markdown of the default recipe in `ablation.json`: one row per dataset and images per class."""
  lines = [
    "| dataset (images per class) | uniform start and targets | default recipe | gain | gain in area under the curve | "
    "share of evaluations needed to match uniform's final accuracy |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for name, setting in results["settings"].items():
    plain, ours = (setting["arms"][arm] for arm in (REFERENCE, DEFAULT))
    gains = {
      key: [b[key] - a[key] for a, b in zip(plain, ours, strict=True)] for key in ("final", "area")
    }
    gain, area = (
      f"{statistics.mean(g):+.2f} ± {statistics.stdev(g) / len(g) ** 0.5:.2f}"
      for g in gains.values()
    )
    final = [
      f"{row['mean']:.2f} ± {row['std']:.2f}"
      for row in (setting["summary"][arm]["final"] for arm in (REFERENCE, DEFAULT))
    ]
    reached = setting["summary"][DEFAULT]["reaches"]
    share = "not reached" if reached is None else f"{reached / setting['evaluations']:.2f}"
    lines.append(
      f"| {_setting_title(name)} | {final[0]} | {final[1]} | {gain} | {area} | {share} |"
    )
  seeds = {len(arm) for setting in results["settings"].values() for arm in setting["arms"].values()}
  evaluations = {setting["evaluations"] for setting in results["settings"].values()}
  lines += [
    "",
    f"KIP with the NTK of FC1 and learned labels, {'/'.join(f'{e:,}' for e in sorted(evaluations))} target evaluations in "
    f"batches of 1,000; test accuracy (%), mean and standard deviation over {'/'.join(map(str, sorted(seeds)))} seeds, gains with "
    "standard errors (paired seeds), from `experiments/results/ablation.json` (`python -m experiments.studies.ablation`). "
    "CIFAR-10 was decoded from JPEG files of quality 75.",
  ]
  return "\n".join(lines)


def ablation_table(results: dict) -> str:
  """Markdown of `ablation.json`: final test accuracy, one row per arm and one column per setting."""
  settings = results["settings"]
  arms = list(dict.fromkeys(arm for setting in settings.values() for arm in setting["arms"]))
  lines = [
    "| start/targets | " + " | ".join(map(_setting_title, settings)) + " |",
    "| --- |" + " --- |" * len(settings),
  ]
  for arm in arms:
    cells = [
      f"{row['final']['mean']:.2f} ± {row['final']['std']:.2f}"
      if (row := setting["summary"].get(arm))
      else ""
      for setting in settings.values()
    ]
    lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
  lines += [
    "",
    "*solved*: starts from solved labels; e: weight exponent (default 0.25); g: uniform share (0.5); b: batch size (1,000); "
    "*always*: never falls back to uniform sampling; *refreshed*: scores all rows every 500 steps. Passes over all rows count as "
    "evaluations. The default was chosen by validation accuracy (in the file) on MNIST and CIFAR-10.",
  ]
  return "\n".join(lines)


def kernels_table(results: dict) -> str:
  """Markdown of `benchmark_kernels.json`: one row per network and image size, compared with neural-tangents."""
  lines = [
    "| network | images | pairs | forward, ms | speedup (in a loop) | with gradient, ms | speedup | ratio to the first product | "
    "scratch memory, MB | error |",
    "| --- |" + " --- |" * 9,
  ]
  for row in (row for job in ("convolutional", "dense") for row in results["jobs"][job]["rows"]):
    times = []
    for part in ("forward", "gradient"):
      ours, theirs = (1e3 * row[part][side]["seconds"] for side in ("ours", "neural_tangents"))
      ratio = f"**{theirs / ours:.{1 if theirs < 10 * ours else 0}f}**"
      times += [
        f"{ours:,.0f} / {theirs:,.0f}",
        f"{ratio} ({row[part]['ratio_in_loop']:.1f})" if part == "forward" else ratio,
      ]
    memory = " / ".join(
      f"{row['gradient'][side]['scratch_bytes'] / 1e6:,.0f}" for side in ("ours", "neural_tangents")
    )
    lines.append(
      f"| {row['architecture']} | {'x'.join(map(str, row['shape']))} | {row['rows']} x {row['other_rows']} | "
      + " | ".join(times)
      + f" | {row['forward_over_floor']:.1f} | {memory} | {row['difference']['ours']['value']:.0e} / "
      f"{row['difference']['neural_tangents']['value']:.0e} |"
    )
  hardware = results["environment"]["hardware"]
  return "\n".join(
    [
      *lines,
      "",
      f"NTK in float32, kipcore / neural-tangents in one run after compilation, {hardware['cpu_cores']} CPU cores, real images; the gradient "
      "is with respect to the first rows, values included. *In a loop*: neural-tangents inside `jax.lax.map`, where XLA runs its pooled kernels several "
      "times faster. *Ratio to the first product*: forward time over that of the first matrix product. *Error*: largest difference "
      "from float64, relative to the largest value. From `experiments/results/benchmark_kernels.json` "
      "(`python -m experiments.benchmarks.kernels`), which also contains scaling, reduced precision and a step of KIP.",
    ]
  )


def cost_table(results: dict) -> str:
  """Markdown of `benchmark_methods.json`: one row per method, time and memory of a step."""
  lines = [
    "| method | targets per step | step, ms | compilation, s | scratch memory, MB | state, MB | scratch memory at published settings, MB |",
    "| --- |" + " --- |" * 6,
  ]
  for method, job in results["jobs"].items():
    small, published = job["cpu"], job["published"]
    lines.append(
      f"| `{method}` | {small['targets']:,} | {1e3 * small['step_seconds']:.0f} | {small['compile_seconds']:.1f} | {small['scratch_bytes'] / 1e6:,.0f} | "
      f"{small['state_bytes'] / 1e6:,.1f} | {published['scratch_bytes'] / 1e6:,.0f} |"
    )
  return "\n".join(
    [
      *lines,
      "",
      f"MNIST, one image per class, `--preset=cpu`, {results['environment']['hardware']['cpu_cores']} CPU cores; the last column is the plan of XLA on CPU "
      "for a step at the published settings, which was not run. From `experiments/results/benchmark_methods.json` "
      "(`python -m experiments.benchmarks.methods`).",
    ]
  )


def cross_architecture_table(results: dict) -> str:
  """Markdown of `cross_architecture.json`: one row per dataset and set, one column per evaluator."""
  from kipcore.evaluation import ranking

  evaluators = list(
    dict.fromkeys(
      entry["evaluator"] for dataset in results["datasets"].values() for entry in dataset["table"]
    )
  )
  lines = [
    "| dataset | set | " + " | ".join(f"`{name}`" for name in evaluators) + " |",
    "| --- | --- |" + " --- |" * len(evaluators),
  ]
  for dataset, content in results["datasets"].items():
    cells = {
      (entry["set"], entry["evaluator"]): ranking.shown(
        entry["mean"], entry["half_width"], entry["accuracies"]
      )
      for entry in content["table"]
    }
    for name in dict.fromkeys(entry["set"] for entry in content["table"]):
      lines.append(
        f"| {TITLES[dataset]} | {name} | "
        + " | ".join(cells.get((name, how), "") for how in evaluators)
        + " |"
      )
  scores = [
    f"{TITLES[dataset]} {content['scores']['krr']['label_robust']:.3f} (`krr`), "
    f"{content['scores']['network:convnet']['label_robust']:.3f} (`network:convnet`)"
    for dataset, content in results["datasets"].items()
  ]
  dependence = [
    f"{TITLES[dataset]} {100 * content['scores']['network:convnet:dsa']['augmentation_dependence']:+.1f}"
    for dataset, content in results["datasets"].items()
  ]
  parts = results["parts"].values()
  return "\n".join(
    [
      *lines,
      "",
      "Test accuracy (%) with half of the 95 % interval of the mean over "
      f"{next(iter(parts))['num_seeds']} seeds (networks, and draws of random "
      f"sets), on the first {next(iter(parts))['test_rows']:,} test rows. *distilled*: the result of `run_distill --dataset=...`, ten images with learned labels for the "
      "NTK of FC1 (`krr`); baselines are real images (k-means: centers) of the same number with class labels, *uniform_solved* with the best labels under `krr`; *full*: 5,000 rows "
      "under kernels and `network:mlp`, all for `network:convnet`. Networks: MLP of three layers (width 512, 1,000 steps), ConvNet-3 with instance norm (32, 500; dsa: "
      "with augmentation), a residual network (16, 300). DD-Ranking's label-robust score, 0.27 for a set with neither gain nor loss: "
      + "; ".join(scores)
      + ". Part of the "
      "gain over random images due to augmentation, points: "
      + "; ".join(dependence)
      + ". From `experiments/results/cross_architecture.json` "
      "(`python -m experiments.studies.cross_architecture`).",
    ]
  )


def published_table(results: dict) -> str:
  """Markdown of `published_sets.json`: one row per published set and evaluator."""
  lines = [
    "| set and evaluator | accuracy, % | reference, % | test rows | training rows |",
    "| --- |" + " --- |" * 4,
  ]
  for name, part in results["parts"].items():
    deviation = "" if part.get("std_percent") is None else f" ± {part['std_percent']:.1f}"
    lossy = " †" * ("images" in part)
    lines.append(
      f"| `{name}` | {part['accuracy_percent']:.1f}{deviation} | {part['reference_percent']} | "
      f"{part['test_rows']:,}{lossy} | {part['training_rows']:,} |"
    )
  return "\n".join(
    [
      *lines,
      "",
      "CIFAR-10, the first test rows with their original pixels (†: all rows, decoded from JPEG files of quality 75), whitening fitted on the training rows; deviation over "
      "networks. From `experiments/results/published_sets.json` (`python -m experiments.studies.published_sets`), which contains the recipe of each row.",
    ]
  )


def pytorch_table(results: dict) -> str:
  """Markdown of `pytorch_check.json`: one row per set, our networks and those of PyTorch."""
  from kipcore.evaluation import ranking

  lines = ["| set | kipcore, % | PyTorch, % | difference, points |", "| --- | --- | --- | --- |"]
  for name, found in results["sets"].items():
    ours, theirs = (
      ranking.shown(found[half]["mean"], found[half]["half_width"], found[half]["accuracies"])
      for half in ("kipcore", "pytorch")
    )
    lines.append(
      f"| `{name}` | {ours} | {theirs} | {ranking.shown(found['difference'], found['difference_half_width'])} |"
    )
  recipe, networks = (
    results["recipe"],
    len(next(iter(results["sets"].values()))["kipcore"]["accuracies"]),
  )
  return "\n".join(
    [
      *lines,
      "",
      f"MNIST, ten images per class, test accuracy of ConvNet-3 with {recipe['width']} channels with instance norm, {recipe['num_steps']} steps of all images; means of "
      f"{networks} networks with half of their 95 % intervals. PyTorch used only the exported file. From `experiments/results/pytorch_check.json` "
      "(`python -m experiments.studies.pytorch_check`).",
    ]
  )


_DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}


def methods_table(folders: dict) -> str:
  """Markdown of the `compare_*` folders: one row per dataset and method: the gain from initialization, target sampling, and both."""
  from kipcore.cli import recipes
  from kipcore.cli.runs import comparison

  lines = [
    "| dataset | method | scored by | uniform | k-means start | importance sampling | both | steps | target evaluations |",
    "| --- |" + " --- |" * 8,
  ]
  for dataset, (config, rows) in folders.items():
    cells = {comparison.cell_of(cell): cell for cell in config["cells"]}
    (plain_start, start), (plain_targets, targets) = (
      config["grid"][name] for name in ("inits", "samplers")
    )
    arms = list(itertools.product((plain_targets, targets), (plain_start, start)))
    for method in dict.fromkeys(row["method"] for row in rows):
      networks = method not in recipes.FOR_KERNELS
      found = comparison.arms(rows, "network_test_accuracy" if networks else "test_accuracy")
      names = [(method, first, second) for second, first in arms]
      if not all(name in found for name in names):
        continue
      own = next(row for row in rows if row["method"] == method)
      protocol = cells[comparison.cell_of(own)].get("protocol")
      model = f"networks, `{protocol or 'default'}`" if networks else "ridge regression"
      gains = [comparison.differences(found[name], found[names[0]]) for name in names[1:]]
      shown = [comparison.shown(found[names[0]].values())]
      shown += [comparison.shown(gain, "+", True) for gain in gains]
      earlier = "" if protocol or method == "kip" else " †"
      lines.append(
        f"| {_DATASETS[dataset]} | `{method}`{earlier} | {model} | {' | '.join(shown)} | "
        f"{int(own['steps']):,} | {int(own['target_evaluations']):,} |"
      )
  return "\n".join(
    [
      *lines,
      "",
      "One image per class, settings at CPU size (`--preset=cpu`), 3 seeds, equal target evaluations: test accuracy (%), mean and standard deviation, then the gain "
      "with the standard error of the differences (paired seeds). Networks: two per set and seed, of the method's architecture and width, under the protocol of its "
      "paper, on the first 2,000 test rows; ridge regression: with the NTK of FC1 (KIP: all test rows). *uniform*: random images as start and uniform targets; "
      f"*importance sampling*: targets by `{targets}`. †: measured with networks of the default protocol and centers that were not scaled. From "
      "`experiments/results/compare_*` (`python -m experiments.run_compare --methods=METHOD --set=steps=STEPS`).",
    ]
  )


def _compared() -> dict:
  """{dataset: (config, lines)} of the `compare_*` result folders."""
  folders = {}
  for dataset in _DATASETS:
    folder = ROOT / f"experiments/results/compare_{dataset}"
    if folder.exists():
      folders[dataset] = (
        json.loads((folder / "config.json").read_text()),
        list(csv.DictReader((folder / "cells.csv").open())),
      )
  return folders


def networks_table(results: dict) -> str:
  """Sets that teach networks, next to other sets under the same protocol."""
  lines = [
    "| dataset (images per class) | method | distilled | random real images | initial images | networks | goal (published) | minutes | steps |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for name, job in results["jobs"].items():
    dataset, size = re.fullmatch(r"(.*?)_(\d+)(?:_.*)?", name).groups()
    (run,) = job["runs"][:1]
    own = f"{100 * run['network_test_accuracy_mean']:.1f} ± {100 * run['network_test_accuracy_std']:.1f}"
    others = [
      f"{100 * run[name]:.1f}" if name in run else "not scored"
      for name in (f"{key}_network_test_accuracy_mean" for key in ("random_baseline", "init"))
    ]
    others[1] += f" (`{run['init']}`)"
    minutes = f"{run['wall_seconds'] / 60:.0f}"
    title = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}[dataset]
    scored_by = run["network_scored_by"].replace("networks of ", "").replace("protocol ", "")
    mark = " (`--minutes=5`)" if "minutes" in job["settings"] else ""
    mark += " †" * bool(job.get("note"))
    cells = [f"{title}, {size}{mark}", f"`{run['method']}`", own, *others, scored_by]
    cells += [job["goal"], minutes, f"{run['steps']:,}"]
    lines.append(f"| {' | '.join(cells)} |")
  notes = [job["note"] for job in results["jobs"].values() if job.get("note")]
  short = any("minutes" in job["settings"] for job in results["jobs"].values())
  return "\n".join(
    [
      *lines,
      "",
      "Test accuracy (%) of five networks trained on the set (two on random images and on the initial ones), mean and standard deviation, one distillation seed, all test rows; "
      "*networks*: architecture, width (before the first pooling, for `frepo`) and protocol; minutes of the whole run, scores included, on two CPU cores with other work. "
      "From `experiments/results/networks.json` (`python -m experiments.studies.networks`), with all settings."
      + " Rows with `--minutes=5`: two networks and the first 2,000 test rows, as that flag has by default."
      * short
      + "".join(f" †: {note}." for note in dict.fromkeys(notes)),
    ]
  )


def expert_labels_table(results: dict) -> str:
  """Markdown of `expert_labels.json`: one row per dataset and size, one column per selection, with both kinds of labels."""
  accuracies: dict = {}
  for name, cell in results["cells"].items():
    dataset, size, selection, _ = name.split("-")
    for labels, accuracy in cell["test_accuracy"].items():
      runs = accuracies.setdefault((dataset, size), {}).setdefault((selection, labels), [])
      runs.append(100 * accuracy)
  selections = list(dict.fromkeys(name.split("-")[2] for name in results["cells"]))
  shown = lambda runs: (
    f"{statistics.mean(runs):.1f} ± {statistics.stdev(runs):.1f}"
    if len(runs) > 1
    else f"{runs[0]:.1f}"
  )
  lines = [
    "| images per class | epoch | " + " | ".join(f"`{name}`" for name in selections) + " |",
    "| --- |" + " --- |" * (len(selections) + 1),
  ]
  for (dataset, size), found in accuracies.items():
    chosen = results["epochs"][f"{dataset}-{size}"]
    cells = [f"{TITLES[dataset]}, {size}", f"{chosen['epoch']} of {chosen['epochs']}"]
    for name in selections:
      kinds = [found[name, labels] for labels in ("class", "expert") if (name, labels) in found]
      cells.append(" / ".join(map(shown, kinds)))
    lines.append("| " + " | ".join(cells) + " |")
  seeds = {len(runs) for found in accuracies.values() for runs in found.values()}
  config = results["config"]
  return "\n".join(
    [
      *lines,
      "",
      "Test accuracy (%) of ConvNet-3 networks trained on the selected images with class labels (one seed) / with the labels of an expert, mean and standard deviation over "
      f"{max(seeds)} seeds of network and selection; width {config['width']}, protocol `{config['protocol']}`; the epoch of the expert was chosen "
      "on validation rows for random images. From `experiments/results/expert_labels.json` (`python -m experiments.studies.expert_labels`).",
    ]
  )


def teach_table(results: dict) -> str:
  """Markdown of `teach.json`: one row per dataset and goal, scored by ridge regression and by networks."""
  lines = [
    "| dataset | set for | method | ridge regression | networks | steps | target evaluations | minutes |",
    "| --- |" + " --- |" * 7,
  ]
  for name, run in results["runs"].items():
    dataset, goal = name.split("-")
    networks = [100 * accuracy for accuracy in run["network_test_accuracy"]]
    cells = [TITLES[dataset], goal, f"`{run['method']}`", f"{100 * run['test_accuracy']:.1f}"]
    by = run["network_scored_by"].split()[0]
    cells.append(f"{statistics.mean(networks):.1f} ± {statistics.stdev(networks):.1f} ({by})")
    cells += [f"{run['steps']:,}", f"{run['target_evaluations']:,}"]
    lines.append("| " + " | ".join([*cells, f"{run['wall_seconds'] / 60:.0f}"]) + " |")
  return "\n".join(
    [
      *lines,
      "",
      "One image per class, the settings of `--teach` for a few CPU cores, one distillation seed, the first 2,000 test rows. Test accuracy (%) of ridge regression with the NTK of FC1, and of two "
      "networks of width 32 and the named architecture under the protocol `frepo`; minutes on one busy core. From `experiments/results/teach.json` "
      "(`python -m experiments.studies.teach`).",
    ]
  )


def exact_kernels_table(results: dict) -> str:
  """Markdown of `exact_kernels.json`: one row per job and seed, one column per phase."""
  phases = ("start", "warm", "solve", "steps", "solve_again")
  lines = [
    "| dataset (images per class) | initial images | cheap method | labels solved | exact steps | labels solved again | networks | minutes | kernel pairs |",
    "| --- |" + " --- |" * 8,
  ]
  for name, job in results["jobs"].items():
    dataset, size, _ = re.fullmatch(r"(.*)_(\d+)_seed(\d+)", name).groups()
    found = job["phases"]
    cells = [f"{100 * found[phase]['accuracy']:.1f}" if phase in found else "" for phase in phases]
    cells[1] += f" (`{job['settings']['warm']['method']}`)" if cells[1] else ""
    networks = found.get("networks")
    cells.append(f"{100 * statistics.mean(networks['accuracies']):.1f}" if networks else "")
    done = [found[phase] for phase in phases if phase in found]
    cells.append(f"{sum(phase['seconds'] for phase in done) / 60:.0f}")
    cells.append(f"{sum(phase['kernel_pairs'] for phase in done):,}")
    lines.append(f"| {TITLES[dataset]}, {size} | {' | '.join(cells)} |")
  job = next(iter(results["jobs"].values()))
  return "\n".join(
    [
      *lines,
      "",
      f"Test accuracy (%) of ridge regression under the exact {job['settings']['steps']['kernel'].upper()} of ConvNet-3 after each phase, on the first {job['test_rows']:,} test rows; "
      "*networks*: mean of networks trained on the final images under the protocol of the cheap method; minutes without scores, on one CPU core; kernel pairs: entries of exact "
      "kernel matrices between images and targets. From `experiments/results/exact_kernels.json` (`python -m experiments.studies.exact_kernels`).",
    ]
  )


# Strategy of the study of selected rows that is trained on all rows, so it is not among the compared.
ALL_ROWS = "sklearn_nystroem"


def _selection_errors(results: dict) -> dict:
  """Errors of all seeds by (dataset, fraction, model) and strategy."""
  found: dict = {}
  for name, cell in results["cells"].items():
    if not cell or name.endswith("/all"):
      continue
    dataset, strategy, fraction = name.split("/")
    for model in ("ridge", "logistic", "network"):
      if model in cell["runs"][0]:
        runs = [run[model] for run in cell["runs"]]
        found.setdefault((dataset, fraction, model), {})[strategy] = runs
  return found


def _difference(one: list, other: list) -> tuple[float, float]:
  """The difference of two means, and its standard error."""
  variance = lambda runs: statistics.variance(runs) / len(runs) if len(runs) > 1 else 0.0
  return statistics.mean(one) - statistics.mean(other), (variance(one) + variance(other)) ** 0.5


def selection_table(results: dict) -> str:
  """Markdown of `selection.json`: one row per dataset, model and number of rows; random, "auto" and the best."""
  errors = _selection_errors(results)
  lines = [
    "| dataset, rows | model | all rows | `uniform` | `auto` | best other strategy of kipcore | best other package | `sklearn_nystroem` † |",
    "| --- |" + " --- |" * 7,
  ]

  def shown(runs, name: str = "") -> str:
    if not runs:
      return ""
    error = _difference(runs, [0.0])[1]
    return f"{statistics.mean(runs):.3f} ± {error:.3f}" + (f" (`{name}`)" if name else "")

  for (dataset, fraction, model), found in errors.items():
    complete = results["cells"][f"{dataset}/all"]
    size = next(
      cell["size"]
      for name, cell in results["cells"].items()
      if cell and name.startswith(f"{dataset}/") and name.endswith(f"/{fraction}")
    )
    row = [f"{dataset}, {size:,} of {complete['size']:,}", model]
    row.append(f"{statistics.mean(run[model] for run in complete['runs']):.3f}")
    row += [shown(found.get(name)) for name in ("uniform", "auto")]
    external = lambda name: name.startswith(("coreax", "goodpoints", "sklearn"))
    for packages in (False, True):
      names = [
        name
        for name in found
        if name not in ("uniform", "auto", ALL_ROWS) and external(name) == packages
      ]
      best = min(names, key=lambda name: statistics.mean(found[name]), default="")
      row.append(shown(found.get(best), best))
    row.append(shown(found.get(ALL_ROWS)))
    lines.append("| " + " | ".join(row) + " |")
  settings = results["settings"]
  rows = (
    f"at most {settings['train_rows']:,} rows of each dataset"
    if settings["train_rows"]
    else "all rows"
  )
  lines += [
    "",
    "Test error of models trained on the weighted rows: error rate, the mean over classes, or squared error divided by the variance; mean and standard error over "
    f"{settings['num_seeds']} seeds of selection and network, {rows}. The best of several strategies is chosen on the test error, which favors it. †: ridge regression on as many "
    "Nystroem features, trained on all rows and labels. From `experiments/results/selection.json` (`python -m experiments.studies.selection`), which contains all strategies and the seconds.",
  ]
  return "\n".join(lines)


def versions_table(results: dict) -> str:
  """Markdown of `versions.json`: one row per set of versions."""
  packages = list(next(iter(results["sets"].values()))["versions"])
  lines = [
    "| versions | Python | "
    + " | ".join(packages)
    + " | replaced | added | MB before, after | tests passed | failed | command |",
    "| --- | --- |" + " --- |" * (len(packages) + 6),
  ]
  for name, row in results["sets"].items():
    replaced = ", ".join(f"{package} {old}" for package, (old, _) in row["replaced"].items())
    tests, status = row["tests"], row["command"]["status"]
    cells = [
      name,
      row["python"],
      *row["versions"].values(),
      replaced or "none",
      str(len(row["added"])),
      f"{row['megabytes'][0]:,}, {row['megabytes'][1]:,}",
      str(tests["passed"]),
      str(len(tests["failed"])),
      f"status {status}" if status else f"{100 * row['command']['test_accuracy']:.1f} %",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(
    [
      *lines,
      "",
      "Each row: a new virtual environment with these versions, and kipcore installed into it. *Replaced*: packages whose version this changed; *added*: "
      "number of packages that it added; MB: size of the environment; *tests*: of "
      + ", ".join(f"`{path}`" for path in results["tests"])
      + f", without neural-tangents; *command*: test accuracy of `{' '.join(results['command'])}`. *Colab TPU*: the versions of that runtime in August 2026. "
      "From `experiments/results/versions.json` (`python -m experiments.robustness.versions`), which also names the packages.",
    ]
  )


def selection_strategies_table(results: dict) -> str:
  """Markdown of `selection.json`: one row per strategy, compared with random rows over all datasets."""
  errors = _selection_errors(results)
  names = dict.fromkeys(name for found in errors.values() for name in found if name != "uniform")
  lines = [
    "| strategy | cells | error relative to `uniform` | better | worse | best | seconds |",
    "| --- |" + " --- |" * 6,
  ]
  for name in names:
    cells = [found for found in errors.values() if name in found and "uniform" in found]
    if not cells:
      continue
    apart = [_difference(found[name], found["uniform"]) for found in cells]
    ratios = [statistics.mean(found[name]) / statistics.mean(found["uniform"]) for found in cells]
    mean = lambda found, other: statistics.mean(found[other])
    compared = lambda found: [other for other in found if other != ALL_ROWS]
    best = sum(mean(found, name) <= min(mean(found, c) for c in compared(found)) for found in cells)
    seconds = [
      statistics.median(run["seconds"] for run in cell["runs"])
      for key, cell in results["cells"].items()
      if cell and key.split("/")[1] == name
    ]
    row = [
      f"`{name}`" + (" †" if name == ALL_ROWS else ""),
      str(len(cells)),
      f"{statistics.geometric_mean(ratios):.2f}",
      str(sum(difference < -error for difference, error in apart)),
      str(sum(difference > error for difference, error in apart)),
      "" if name == ALL_ROWS else str(best),
      f"{statistics.median(seconds):.2f}",
    ]
    lines.append("| " + " | ".join(row) + " |")
  auto = [found for found in errors.values() if {"auto", "uniform"} <= set(found)]
  matched = 0
  for found in auto:
    others = [name for name in found if name not in ("auto", ALL_ROWS)]
    difference, error = _difference(
      found["auto"], min((found[name] for name in others), key=statistics.mean)
    )
    matched += difference <= error
  lines += [
    "",
    "A cell is a dataset, number of rows and model. *Error relative to `uniform`*: geometric mean of the ratios; *better*, *worse*: cells that differ from `uniform` by more than "
    "the standard error of the difference; *best*: cells with the smallest mean error (`auto` ties with the strategy that it chose); seconds: median over datasets and sizes of "
    "the median over seeds, on one busy CPU core, most cells compiled with little optimization. Strategies with different cells are not comparable by their ratios. "
    f"`auto` is within one standard error of the best of all others, or better, in {matched} of {len(auto)} cells. †: trained on all rows, so it is not compared.",
  ]
  return "\n".join(lines)


def certificate_table(results: dict) -> str:
  """Markdown of `certificate.json`: one row per dataset, sampler and number of draws."""
  lines = [
    "| dataset, draws by | m | exact error | largest of the test queries | guaranteed | coverage | error at the optimum | guaranteed | coverage | excess of the minimizer | guaranteed | coverage |",
    "| --- |" + " --- |" * 11,
  ]
  number = lambda value: "" if value is None else f"{value:.2g}"
  slopes, bounds = [], []
  for dataset, entry in results["datasets"].items():
    for sampler, measured in entry["samplers"].items():
      for m, cell in measured["sizes"].items():
        row = [f"{dataset}, `{sampler}`", f"{int(m):,}"]
        for kind in ("exact", "optimum", "excess"):
          errors, promised = cell["errors"].get(kind), cell["promised"][kind]
          row.append(number(statistics.median(errors)) if errors else "")
          if kind == "exact":
            row.append(number(statistics.median(cell["errors"]["queries"])))
          row.append(number(promised) if errors else "")
          covered = errors and promised is not None
          row.append(
            f"{100 * sum(error <= promised for error in errors) / len(errors):.0f} %"
            if covered
            else ""
          )
        lines.append("| " + " | ".join(row) + " |")
      shown = ", ".join(f"{kind} {value:.2f}" for kind, value in measured["slopes"].items())
      slopes.append(f"{dataset}, `{sampler}`: {shown}")
    found = entry["lower_bounds"]
    valid = sum(ratio <= 1 + 1e-5 for ratio in found)
    bounds.append(
      f"{dataset}: {valid} of {len(found)} valid, median {statistics.median(found):.3f} F*"
    )
  settings = results["settings"]
  return "\n".join(
    [
      *lines,
      "",
      f"Kernel ridge regression of real targets, {settings['num_rows']} rows, effective dimension 10, draws with replacement; medians over {settings['num_seeds']} seeds. Guarantees hold with "
      f"probability {1 - settings['delta']:.0%} (blank: no bound at this size), and coverage is the share of seeds that satisfy them. For uniform draws the total sensitivity is n times the largest "
      "one. Exponents of m fitted to the medians (predicted: -0.5, and -1 for the excess): "
      f"{'; '.join(slopes)}. Lower bounds on F* from 128 landmarks: {'; '.join(bounds)}. From `experiments/results/certificate.json` (`python -m experiments.studies.certificate`).",
    ]
  )


# marker in the document -> result file, and the function that renders it
TABLES = {
  "selection": ("selection", selection_table),
  "selection_strategies": ("selection", selection_strategies_table),
  "certificate": ("certificate", certificate_table),
  "networks": ("networks", networks_table),
  "versions": ("versions", versions_table),
  "expert_labels": ("expert_labels", expert_labels_table),
  "teach": ("teach", teach_table),
  "exact_kernels": ("exact_kernels", exact_kernels_table),
  "conformance": ("conformance", conformance_table),
  "starting_points": ("starting_points", starting_points_table),
  "default_gain": ("ablation", default_gain_table),
  "ablation": ("ablation", ablation_table),
  "kernels": ("benchmark_kernels", kernels_table),
  "cost": ("benchmark_methods", cost_table),
  "cross_architecture": ("cross_architecture", cross_architecture_table),
  "published": ("published_sets", published_table),
  "pytorch": ("pytorch_check", pytorch_table),
}


DOCUMENTS = ("README.md", "experiments/results/README.md")


def rendered(document: str) -> str:
  """The document with its tables regenerated, each between two comments that name it."""
  for name in re.findall(r"<!-- /(\w+) -->", document):
    if name == "methods":
      text = methods_table(_compared())
    else:
      file, table = TABLES[name]
      text = table(json.loads((ROOT / f"experiments/results/{file}.json").read_text()))
    document = re.sub(
      rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
      lambda m, text=text: f"{m[1]}{text}\n{m[2]}",
      document,
      flags=re.S,
    )
  return document


def main() -> None:
  """Rewrites the documents."""
  argparse.ArgumentParser(description=__doc__).parse_args()
  for name in DOCUMENTS:
    path = ROOT / name
    path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
  main()
