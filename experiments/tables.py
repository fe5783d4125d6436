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


def rendered(readme: str) -> str:
  """The README with its results section made anew."""
  table = conformance_table(json.loads((ROOT / "experiments/results/conformance.json").read_text()))
  return re.sub(r"(<!-- results -->\n).*?(<!-- /results -->)", lambda m: f"{m[1]}{table}\n{m[2]}", readme, flags=re.S)


def main() -> None:
  """Rewrites README.md."""
  path = ROOT / "README.md"
  path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
  main()
