"""Writes the README's tables from the result files: `python -m experiments.tables`."""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]


def conformance_table(results: dict) -> str:
  """Markdown of `conformance.json`: a row a job."""
  lines = ["| run | test accuracy, % | seeds | seconds | reference |", "| --- | --- | --- | --- | --- |"]
  for name, job in results["jobs"].items():
    scores = f"{job['mean_percent']:.2f}" + (f" ± {job['std_percent']:.2f}" if job["std_percent"] is not None else "")
    seconds = sum(run["wall_seconds"] for run in job["runs"]) / len(job["runs"])
    lines.append(f"| `{name}` | {scores} | {len(job['runs'])} | {seconds:.0f} | {job['reference_percent']} |")
  hardware = results["environment"]["hardware"]
  lines += ["", f"Mean and deviation over seeds, {hardware['cpu_cores']} CPU cores, JAX "
            f"{results['environment']['versions']['jax']}, from `experiments/results/conformance.json` "
            "(`python -m experiments.conformance`). The CIFAR-10 used here was decoded from JPEG files of quality 75, "
            "so its figures are not strictly comparable with published ones."]
  return "\n".join(lines)


TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}


def starting_points_table(results: dict) -> str:
  """Markdown of `starting_points.json`: a row a dataset, network and size; one-hot / solved labels by strategy."""
  first = next(iter(results["cells"].values()))
  strategies = list(first["summary"])
  lines = ["| points | " + " | ".join(f"`{name}`" for name in strategies) + " |",
           "| --- |" + " --- |" * len(strategies)]
  for name, cell in results["cells"].items():
    dataset, network, points = name.rsplit("-", 2)
    row = []
    for strategy in strategies:
      numbers = (cell["summary"][strategy][kind] for kind in ("one_hot", "solved"))
      row.append(" / ".join(f"{number['mean']:.1f} ± {number['std']:.1f}" for number in numbers))
    lines.append(f"| {TITLES.get(dataset, dataset)} {network}, {points} | " + " | ".join(row) + " |")
  seeds = {len(cell["runs"]) for cell in results["cells"].values()}
  lines += ["", "Test accuracy of ridge regression on the points alone, %, with one-hot labels / with labels solved on all "
            f"training rows; mean and deviation over {'/'.join(map(str, sorted(seeds)))} seeds, from "
            "`experiments/results/starting_points.json` (`python -m experiments.starting_points`). `kmeans` has no "
            "deviation at one image a class: the mean of a class is no draw."]
  return "\n".join(lines)


def rendered(readme: str) -> str:
  """The README with its tables made anew, each between two comments that name its result file."""
  for name, table in (("conformance", conformance_table), ("starting_points", starting_points_table)):
    text = table(json.loads((ROOT / f"experiments/results/{name}.json").read_text()))
    readme = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme,
                    flags=re.S)
  return readme


def main() -> None:
  """Rewrites README.md."""
  path = ROOT / "README.md"
  path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
  main()
