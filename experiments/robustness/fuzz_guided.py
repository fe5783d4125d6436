"""Coverage-guided fuzzing of the file readers with atheris.

`PYTHONPATH=. python -m experiments.robustness.fuzz_guided --seconds=300`

Atheris must be installed in addition to the dependencies of kipcore. Each input is passed to one
reader as a complete file, or with valid checksums as the members of an archive or the metadata of
an artifact. Writes counts to experiments/results/fuzz.json under coverage_guided.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
import zipfile

_SEED_MEMBERS = b"\xff\xfemember\xfd"  # separates the members of an archive
_EVERY = 2000  # inputs between reports


def _archive(path, names, parts) -> None:
  with zipfile.ZipFile(path, "w") as out:
    for name, part in zip(names, parts):
      out.writestr(name, part)


def seeds(folder: pathlib.Path) -> list[bytes]:
  """Valid inputs for `attempts`: a byte that selects the attempt, then its content."""
  from experiments.robustness import fuzz_targets, malformed
  from kipcore.io import npz

  fuzz_targets.targets(folder)
  metadata = json.dumps(npz.load_checked(folder / "good.npz", "kipcore-distilled", 1)[1]).encode()
  good, out = malformed.dataset_arrays(), []
  with zipfile.ZipFile(folder / "good.npz") as archive:
    artifact = [archive.read(name) for name in archive.namelist()]
  with zipfile.ZipFile(folder / "data.npz") as archive:
    dataset = [archive.read(name) for name in archive.namelist()]
  sets = malformed.published_sets()
  whole = {
    0: (folder / "good.npz").read_bytes(),
    1: malformed.npz_bytes(good),
    2: malformed.flax_bytes(sets["checkpoint_7"]),
    3: malformed.torch_bytes(),
    4: malformed.torch_layout(),
    5: _SEED_MEMBERS.join(artifact),
    6: _SEED_MEMBERS.join(dataset),
    7: metadata,
    8: (folder / "good.npy").read_bytes(),
    9: (folder / "good.json").read_bytes(),
    10: malformed.npz_bytes(sets["best.npz"]),
  }
  for number, content in whole.items():
    out.append(bytes([number]) + content)
  return out


def attempts(folder: pathlib.Path) -> list:
  """List of `(name, content -> None, documented errors)`, indexed by the first byte of an input."""
  from experiments.robustness import fuzz_targets, malformed
  from kipcore import datasets
  from kipcore.io import artifact, npz, published, torch_files, trajectories

  arrays, about = npz.load_checked(folder / "good.npz", artifact.FORMAT, artifact.FORMAT_VERSION)
  del about["checksums"]
  work = folder / "work"
  work.mkdir()
  with zipfile.ZipFile(folder / "good.npz") as archive:
    names = archive.namelist()

  def file(name, read):
    def attempt(content):
      (work / name).write_bytes(content)
      read(work / name)

    return attempt

  def members(name, inside, read):
    def attempt(content):
      _archive(work / name, inside, content.split(_SEED_MEMBERS))
      read(work / name)

    return attempt

  def metadata(content):
    try:
      text = json.loads(content)
    except (ValueError, RecursionError) as error:
      raise artifact.ArtifactError("expected JSON, got other text, which tests nothing") from error
    text = text if isinstance(text, dict) else {"x": text}
    npz.save_checked(work / "m.npz", arrays, artifact.FORMAT, artifact.FORMAT_VERSION, text)
    fuzz_targets.check_artifact(work / "m.npz")

  def pair(which):
    def attempt(content):
      for suffix in ("npy", "json"):
        (work / f"t.{suffix}").write_bytes(
          content if suffix == which else (folder / f"good.{suffix}").read_bytes()
        )
      fuzz_targets.finite("trajectories", trajectories.load_trajectories(work / "t.npy").array)

    return attempt

  dataset = [f"{name}.npy" for name in malformed.dataset_arrays()]
  of_artifact, of_dataset, of_set = (
    artifact.ArtifactError,
    datasets.DatasetError,
    published.PublishedError,
  )
  return [
    ("artifact", file("a.npz", fuzz_targets.check_artifact), of_artifact),
    ("dataset", file("d.npz", fuzz_targets.check_dataset), of_dataset),
    ("flax_set", file("checkpoint_7", fuzz_targets.check_published), of_set),
    ("torch_file", file("a.pt", torch_files.read_torch_file), ValueError),
    (
      "torch_layout",
      lambda content: file("b.pt", torch_files.read_torch_file)(malformed.torch_bytes(content)),
      ValueError,
    ),
    ("artifact_members", members("b.npz", names, fuzz_targets.check_artifact), of_artifact),
    ("dataset_members", members("e.npz", dataset, fuzz_targets.check_dataset), of_dataset),
    ("artifact_metadata", metadata, of_artifact),
    ("trajectories", pair("npy"), trajectories.TrajectoriesError),
    ("trajectories_metadata", pair("json"), trajectories.TrajectoriesError),
    ("npz_set", file("best.npz", fuzz_targets.check_published), of_set),
  ]


def main() -> None:
  """Fuzzes for the given number of seconds and writes the counts."""
  # Not the flags of the other programs, which import kipcore before atheris can instrument it.
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=300.0, help="for how long")
  parser.add_argument(
    "--output", type=pathlib.Path, default="experiments/results/fuzz.json", help="result file"
  )
  arguments = parser.parse_args()
  if importlib.util.find_spec("atheris") is None:
    parser.exit(2, "expected atheris to be installed, got none; pip install atheris\n")
  seconds, output = arguments.seconds, arguments.output
  import atheris

  readers = ["kipcore", "zipfile", "numpy.lib", "numpy.lib._format_impl", "pickletools"]
  with atheris.instrument_imports(include=readers, enable_loader_override=False):
    from kipcore.io import artifact, npz, published, publishers, torch_files, trajectories  # noqa: F401, imported to be instrumented
  from experiments.robustness import fuzz, fuzz_targets
  from kipcore.cli.folder import run_folder

  folder = pathlib.Path(tempfile.mkdtemp(prefix="guided"))
  corpus = folder / "corpus"
  corpus.mkdir()
  for i, seed in enumerate(seeds(folder)):
    (corpus / f"seed{i}").write_bytes(seed)
  tried, started = attempts(folder), time.perf_counter()
  counts = {name: {"examples": 0, "read": 0, "refused": 0, "defects": {}} for name, _, _ in tried}
  done = 0

  def report():
    total = {
      key: sum(each[key] for each in counts.values()) for key in ("examples", "read", "refused")
    }
    total["defects"] = sum(len(each["defects"]) for each in counts.values())
    content = (
      json.loads(output.read_text())
      if output.exists()
      else {"environment": run_folder.environment()}
    )
    run_folder.write_json(
      output,
      {
        **content,
        "coverage_guided": {
          "engine": f"atheris, {seconds:g} s",
          "environment": run_folder.environment(),
          "total": total,
          "targets": counts,
        },
      },
    )

  def one(data):
    nonlocal done
    if not data:
      return
    name, attempt, errors = tried[data[0] % len(tried)]
    target = fuzz_targets.Target(None, lambda _, content: attempt(content), (errors,))
    mine = counts[name]
    mine["examples"] += 1
    try:
      mine[fuzz.outcome(target, data[1:])] += 1
    except Exception as error:  # any exception is a finding
      text = f"{type(error).__name__}: {error}"[:300].replace(str(folder), "")
      if text not in mine["defects"]:
        mine["defects"][text] = repr(data[1:])[:2000]
        print("DEFECT", name, text, flush=True)
    done += 1
    if done % _EVERY == 0:
      print(f"{done} inputs in {time.perf_counter() - started:.0f} s", flush=True)
    if time.perf_counter() - started > seconds:  # libFuzzer would exit silently
      report()
      print(
        json.dumps(
          {
            name: {key: each[key] for key in ("examples", "read", "refused")}
            for name, each in counts.items()
          }
        ),
        flush=True,
      )
      shutil.rmtree(folder)
      os._exit(0)

  atheris.Setup(
    [
      sys.argv[0],
      str(corpus),
      "-max_len=20000",
      "-timeout=0",
      "-rss_limit_mb=0",
      "-print_final_stats=0",
    ],
    one,
  )
  atheris.Fuzz()


if __name__ == "__main__":
  main()
