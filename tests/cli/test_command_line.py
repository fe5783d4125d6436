"""The command line: help, dry runs, progress, README files of runs, invalid input."""

import configparser
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
from binaries import run_binary
from helpers import slow_except

from kipcore.cli import evaluate, export
from kipcore.cli.config import (
  CheckpointConfig,
  CompareConfig,
  DataConfig,
  DistillConfig,
  EvaluateConfig,
  OutputConfig,
  ProcessConfig,
  RowsConfig,
  SelectConfig,
)
from kipcore.cli.cost import estimate, progress
from kipcore.cli.folder import outputs, readme, run_folder
from kipcore.cli.runs import dry_run, loading, pipeline

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = dict(steps=2, num_devices=1, target_batch_size=100, test_rows=100)
# Calls a console script several times in one process.
DRIVER = """
import contextlib, importlib, io, json, sys
module, _, name = sys.argv[1].partition(":")
call, done = getattr(importlib.import_module(module), name), []
for arguments in json.loads(sys.argv[2]):
  sys.argv = ["script", *arguments]
  out, errors, status = io.StringIO(), io.StringIO(), 0
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
    try:
      call()
    except SystemExit as end:
      status = end.code or 0
  done.append([status, out.getvalue(), errors.getvalue()])
print(json.dumps(done))
"""


def entry_points() -> dict[str, str]:
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  lines = parser["options.entry_points"]["console_scripts"].split("\n")
  return dict(tuple(part.strip() for part in line.split("=")) for line in lines if line)


def calls(script: str, commands: list[list[str]], cwd) -> list[tuple[int, str, str]]:
  """(exit status, output, errors) of each."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", DRIVER, entry_points()[script], json.dumps(commands)],
    cwd=cwd,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize(
  "argument, status", slow_except([("--help", 0), ("--dataset=nosuch.npz", 2)], ("--help", 0))
)
def test_forked_commands_behave_like_those_of_users(argument, status):
  """Output, errors and status of a forked process equal those of `python -m`, in success and failure."""
  forked = run_binary("experiments.run_distill", argument)
  done = subprocess.run(
    [sys.executable, "-m", "experiments.run_distill", argument],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert forked.returncode == done.returncode == status
  assert (forked.stdout, forked.stderr) == (done.stdout, done.stderr)
  assert bool(done.stdout) != bool(done.stderr)


def names(*kinds) -> set[str]:
  return {field.name for kind in kinds for field in dataclasses.fields(kind)}


# Flags of each command, and those that help shows first.
FLAGS = {
  "distill": (
    names(DistillConfig, OutputConfig, ProcessConfig, CheckpointConfig) - {"shared"},
    ("dataset", "data_dir", "images_per_class", "teach", "minutes", "method"),
  ),
  "select": (
    names(SelectConfig, RowsConfig, OutputConfig),
    ("dataset", "data_dir", "images_per_class", "strategy"),
  ),
  "compare": (
    names(DataConfig, CompareConfig, OutputConfig) | {"set"},
    ("dataset", "data_dir", "images_per_class", "methods"),
  ),
  "evaluate": (names(EvaluateConfig) | {"artifact", "output", "dry_run"}, ("artifact",)),
  "export": (
    {"artifact", "format", "space", "pixel_max", "output_dir", "overwrite", "dry_run"},
    ("artifact", "format"),
  ),
  "report": ({"run", "output"}, ("run",)),
}


def test_each_launcher_has_its_console_script():
  modules = {path.stem.removeprefix("run_") for path in (ROOT / "experiments").glob("run_*.py")}
  assert entry_points() == {
    f"kipcore-{name}": f"kipcore.cli.{name}:run" for name in modules
  } and modules == set(FLAGS)


@pytest.mark.parametrize("name", slow_except(FLAGS, "distill", "select"))
def test_help_lists_every_flag(name, tmp_path):
  (status, text, errors), (_, full, _), (_, version, _) = calls(
    f"kipcore-{name}", [["--help"], ["--no_such", "--helpfull"], ["--version"]], tmp_path
  )
  assert status == 0 and not errors and version.startswith("kipcore ")
  lines = text.splitlines()
  assert max(map(len, lines)) <= 100 and all(line == line.rstrip() for line in lines)
  assert f"Usage: kipcore-{name}, then" in text and "experiments" not in text
  shown = re.findall(r"^  --(?:\[no\])?(\w+)", text, flags=re.M)
  expected, main = FLAGS[name]
  assert (
    expected <= set(shown) and len(shown) == len(set(shown)) and tuple(shown[: len(main)]) == main
  )
  assert full == text and set(shown) == expected


WRONG = [
  (["--stepz=3"], "Did you mean: steps?"),
  (["--steps=-1"], "--steps: expected an integer from 0 to 2,147,483,647, got -1"),
  (["--steps=many"], "--steps: expected an integer from 0 to 2,147,483,647, got 'many'"),
  (["--uniform_mix=half"], "--uniform_mix: expected a number from 0 to 1, got 'half'"),
  (["--learning_rate=-1"], "--learning_rate: expected a number from 1e-30 to 1e+30, got -1.0"),
  (["--loss=hinge"], "--loss: expected one of mse, cross_entropy, got 'hinge'"),
  (["--teach=bot"], "--teach: expected one of network, kernel, both, got 'bot'"),
  (["--x64=perhaps"], "--x64: expected true or false, got 'perhaps'"),
  (["stray"], "expected flags only, as --name=value, got 'stray'"),
  (["--method=frep"], "did you mean frepo?"),
  (["--init=kmean"], "did you mean kmeans?"),
  (["--sampler=crossentropy"], "did you mean cross_entropy?"),
  (["--architecture=fc"], "architecture: expected fc1"),
  (["--method=kip", "--options=a=b"], "--options: expected none for --method=kip"),
  (["--method=dm", "--options=augment=flip"], "--options: expected names among"),
  (["--dataset=absent.npz"], "no such file"),
  (["--dataset=./absent"], "no such folder"),
  (["--dataset=empty/"], "got no folder"),
  (["--output_dir=taken"], "--output_dir: cannot write to taken"),
  (["--output_dir=taken/below"], "--output_dir: cannot write to taken/below"),
  (["--output_dir=before"], "already contains a run (result.json)"),
]


@pytest.fixture(scope="module")
def distilling(tmp_path_factory):
  """Results of a dry run and of invalid commands, and the folder in which they ran."""
  folder = tmp_path_factory.mktemp("calls")
  (folder / "empty").mkdir()
  (folder / "before").mkdir()
  (folder / "before" / "result.json").write_text("{}")
  (folder / "taken").write_text("")
  commands = [
    ["--dry_run", "--method=label_solve", "--init=uniform", "--num_devices=1"],
    *(arguments for arguments, _ in WRONG),
  ]
  return folder, calls("kipcore-distill", commands, folder)


@pytest.mark.parametrize("i", range(len(WRONG)), ids=lambda i: " ".join(WRONG[i][0]))
def test_invalid_input_ends_with_status_2_and_one_line(distilling, i):
  status, out, errors = distilling[1][i + 1]
  assert (
    status == 2
    and not out
    and errors.startswith("error: ")
    and errors.count("\n") == 1
    and WRONG[i][1] in errors
  ), errors


def parts_of(out) -> tuple[list[str], list[str]]:
  """Names of the parts of time and memory in a dry run, after a check of their amounts."""
  seconds, memory = (
    text.splitlines()
    for text in re.search(
      r"estimated time\n(.*?)\n\nestimated memory per device\n(.*?)\n\n", out, flags=re.S
    ).groups()
  )
  assert all(re.search(r"  [\d.]+ (s|min)$", line) for line in seconds), seconds
  assert (
    all(re.search(r"  [\d.,]+ (kB|MB|GB)$", line) for line in memory[:-1])
    and "available" in memory[-1]
  ), memory
  return [line.strip().split("  ")[0] for line in seconds], [
    line.strip().split("  ")[0] for line in memory[:-1]
  ]


def test_a_dry_run_describes_the_run_and_writes_nothing(distilling):
  folder, ((status, out, errors), *_) = distilling
  assert status == 0 and not errors
  assert (
    "1,298 training" in out
    and "10 images (1 per class), 0 steps" in out
    and "settings other than kip's defaults: num_devices=1, init=uniform" in out
  )
  time, memory = parts_of(out)
  assert "label_solve" in time and time[-1] == memory[-1] == "total"
  assert "Nothing was written. Without --dry_run, results go to runs/" in out
  assert (
    out.strip().splitlines()[-1].strip()
    == "kipcore-distill --method=label_solve --num_devices=1 --init=uniform"
  )
  assert {path.name for path in folder.rglob("*")} == {"empty", "before", "result.json", "taken"}


def test_dry_runs_of_steps_a_selection_and_a_grid(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  dry_run.of_distillation(
    DistillConfig(
      **QUICK, init="uniform", sampler="uniform", solve_labels=False, validation_fraction=0.0
    )
  )
  time, memory = parts_of(capsys.readouterr().out)
  assert any(part.startswith("2 steps of 0.") for part in time) and "compiling" in time
  assert (
    "working memory of a step: kernel matrices" in memory
    and "images, labels and their optimizer" in memory
  )
  dry_run.of_selection(SelectConfig(strategy="uniform"))
  out = capsys.readouterr().out
  time, _ = parts_of(out)
  assert "10 points (1 per class) by uniform" in out and {
    "scores of all rows",
    "certificate",
  } <= set(time)
  dry_run.of_comparison(
    CompareConfig(("label_solve",), ("uniform", "noise"), num_seeds=2),
    {**QUICK, "network_seeds": 0},
  )
  out = capsys.readouterr().out
  assert "4 cells, 0 of them finished" in out and "label_solve: 4 cells of" in out
  assert not list(tmp_path.iterdir())


def test_dry_runs_of_an_evaluation_and_an_export_write_nothing(tmp_path, monkeypatch, capsys):
  config = DistillConfig(init="uniform", num_devices=1)
  data = loading.load(config)
  outputs.write_artifact(
    tmp_path, config, data, pipeline.random_support(0, data, 1), {"test_accuracy": 0.5}
  )
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

  def printed(module, *arguments):
    monkeypatch.setattr(
      sys, "argv", ["kipcore", f"--artifact={tmp_path}/distilled.npz", *arguments, "--dry_run"]
    )
    module.run()
    return capsys.readouterr().out

  out = printed(evaluate, "--baselines=uniform,kmeans,full", "--num_seeds=3")
  assert "4 scores of distilled, uniform, kmeans, full by krr; 3 networks or draws" in out
  assert "krr: 4 sets" in out and "Nothing was written. Without --dry_run, the result is" in out
  assert out.splitlines()[-1].strip() == (
    f"kipcore-evaluate --artifact={tmp_path}/distilled.npz --baselines=uniform,kmeans,full --num_seeds=3"
  )
  out = printed(export, "--format=numpy,ddranking", f"--output_dir={tmp_path}/out")
  assert "10 rows of shape (8, 8, 1), 10 classes, pixels" in out
  assert f"ddranking: {tmp_path}/out/distilled_pixels_ddranking" in out
  assert out.endswith("Nothing was written.\n")
  for module, arguments, message in (
    (evaluate, ["--baselines=best"], "--baselines: expected one of"),
    (export, ["--format=png", "--space=inputs"], "format png: expected space pixels"),
  ):
    monkeypatch.setattr(
      sys, "argv", ["kipcore", f"--artifact={tmp_path}/distilled.npz", *arguments, "--dry_run"]
    )
    with pytest.raises(SystemExit) as ended:
      module.run()
    assert ended.value.code == 2 and message in capsys.readouterr().err
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_shows_the_remaining_time_in_a_terminal_only(monkeypatch):
  now, lines = [0.0], []
  monkeypatch.setattr(sys, "stderr", Terminal())
  with progress.Steps(100, "kip", (1, 50, 100), lines.append, clock=lambda: now[0]) as bar:
    bar.logged(0)
    for done, seconds in ((1, 1.0), (50, 50.0)):
      now[0] = seconds
      time.sleep(0.11)  # the bar is drawn ten times a second at most
      bar.advance(done)
    assert bar.seconds_left() == pytest.approx(50.0)
    now[0] += 3.0
    bar.logged(50)
    assert bar.seconds_left() == pytest.approx(50.0 + 3.0), (
      "one log is left, and the logs so far took 3 s each"
    )
    shown = sys.stderr.getvalue()
  assert re.search(r"kip:  50%\|.*\| 50/100 \[\d\d:\d\d, 50\.0 s left\]", shown), shown
  assert lines == ["estimate: 1 s per step, 50.0 s for the remaining 50 steps"]
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  with (
    progress.Steps(100, "kip", (), lines.append) as bar,
    progress.working("waiting", expected=3.0),
  ):
    bar.advance(50)
  assert sys.stderr.getvalue() == ""


def test_the_readme_of_a_run_folder_lists_each_file(tmp_path):
  """See test_pipeline.py for real runs."""
  folder = tmp_path / "my run"
  folder.mkdir()
  for name in (*run_folder.RUN_FILES, "mine.npy"):
    np.savez(folder / name, images=np.ones(3)) if name.endswith(".npz") else (
      folder / name
    ).write_text("")
  config = DistillConfig(steps=2, learn_labels=False, dataset="a b.npz")
  readme.of_distillation(
    folder,
    config,
    dict(
      method="kip",
      steps=2,
      dataset="a b.npz",
      support_size=10,
      test_accuracy=0.5,
      random_baseline_test_accuracy=0.25,
    ),
  )
  text = (folder / "README.txt").read_text()
  assert text.startswith(
    "10 distilled examples of a b.npz (kip, 2 steps): 50.00 % test accuracy, 25.00 %"
  )
  for path in folder.iterdir():
    assert re.search(
      rf"^  {re.escape(path.name)} +{re.escape(run_folder.RUN_FILES.get(path.name, 'a NumPy array'))}$",
      text,
      flags=re.M,
    )
  line = next(line for line in text.splitlines() if "kipcore-distill" in line)
  assert shlex.split(line)[1:] == [
    "--method=kip",
    "--dataset=a b.npz",
    "--steps=2",
    "--nolearn_labels",
    f"--output_dir={folder}-again",
  ]
  scope = {}
  exec("import numpy\n" + re.search(r"examples = numpy.load\(.*", text)[0], scope)
  assert scope["examples"].shape == (3,)


def test_commands_of_a_grid_keep_lists_and_settings():
  text = readme.comparison_command(
    CompareConfig(("dm",), num_seeds=1), {"dataset": "a b.npz", "steps": 5, "width": 16}
  )
  assert shlex.split(text)[1:] == [
    "--methods=dm",
    "--num_seeds=1",
    "--dataset=a b.npz",
    "--set=steps=5,width=16",
  ]


def test_amounts_as_text():
  assert [estimate.memory(count) for count in (2e3, 3.2e6, 1.5e9)] == ["2.0 kB", "3.2 MB", "1.5 GB"]
  parts = [estimate.Part("a", 1.0), estimate.Part("longer", float("nan"))]
  assert estimate.listed(parts, estimate.duration).splitlines()[1:] == [
    "  longer    unknown",
    "  total   more than 1.0 s",
  ]
