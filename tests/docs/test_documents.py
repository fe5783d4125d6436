"""README, guides, WORKSPACE and notebooks are correct: their code runs and their commands exist."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from binaries import run_binary
from helpers import slow_except, standard_promotion
from pages import GUIDES, ROOT, THEORY, python_blocks, without_code

import kipcore
from kipcore import datasets

README = (ROOT / "README.md").read_text()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = [
  *ROOT.glob("*.md"),
  ROOT / "experiments" / "results" / "README.md",
  ROOT / "tests" / "README.md",
  *sorted(GUIDES.glob("*.md")),
  *sorted(THEORY.glob("*.md")),
]

# Names of the code blocks of each document, in order. `test_neural_tangents` executes the page without names.
BLOCKS = {
  ROOT / "README.md": ("quickstart",),
  GUIDES / "distill.md": ("own",),
  GUIDES / "select_rows.md": ("rows", "pipeline", "selection"),
  GUIDES / "kernels.md": ("fitting", "layers"),
  GUIDES / "add_a_method.md": ("method", "sampler"),
  GUIDES / "devices.md": ("devices",),
}
PYTHON = {
  name: code
  for path, names in BLOCKS.items()
  for name, code in zip(names, python_blocks(path.read_text()), strict=True)
}


def test_every_code_block_is_executed():
  executed = {*BLOCKS, GUIDES / "neural_tangents.md"}
  assert {path for path in DOCUMENTS if python_blocks(path.read_text())} == executed


def check_python(name, out):
  """What the code block with a name prints."""
  numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", out)]
  if name == "selection":
    total, streamed, dimension = numbers
    assert dimension < total < 4 * dimension and abs(streamed - total) < 0.2 * total
  elif name == "rows":
    assert int(re.search(r"(\d+) % of the variance", out)[1]) > 75
  elif name == "pipeline":
    assert int(re.search(r"(\d+) % accuracy", out)[1]) > 85
  elif name == "sampler":
    accuracy, gain = numbers
    assert accuracy > 85 and gain > 1.5
  elif name == "fitting":
    bandwidth, noise = numbers
    assert 0.7 < bandwidth < 1.5 and 0.05 < noise < 0.15  # 0.1 in the data
  elif name == "own":
    assert int(re.search(r"(\d+) % with a network", out)[1]) > 50
  elif name == "method":
    initial, distilled = numbers
    assert distilled > initial + 10
  elif name == "devices":
    count, difference = re.search(r"(\d+) devices: the images differ by (\S+) of", out).groups()
    assert int(count) > 1 and float(difference) < 1e-5
  elif name == "quickstart":
    real, distilled = (float(p) for p in re.findall(r"images: ([\d.]+) %", out))
    assert distilled > real + 10


@pytest.mark.parametrize("name", slow_except(PYTHON, "rows", "sampler", "fitting", "layers"))
def test_python_in_documents_runs(name, capsys):
  standard = name in ("fitting", "own", "method", "devices")
  with standard_promotion() if standard else contextlib.nullcontext():  # the default of JAX
    exec(compile(PYTHON[name], name, "exec"), {})
  check_python(name, capsys.readouterr().out)


@pytest.mark.parametrize("marker", ["distill", "test"])
def test_each_command_is_one_line(marker):
  (block,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, flags=re.S)
  assert "\n" not in block and block.startswith("python3 -m venv")


def launched(text):
  """The text with installed commands as the launchers of a clone, which take the same flags."""
  return re.sub(
    r"\bkipcore-(distill|select|evaluate|compare|export|report)\b",
    r"python -m experiments.run_\1",
    text,
  )


TEXT = launched("".join(path.read_text() for path in DOCUMENTS))
MODULES = sorted(set(re.findall(r"-m (experiments(?:\.\w+)+)", TEXT)))


@pytest.mark.parametrize(
  "module", slow_except(MODULES, *(name for name in MODULES if ".run_" in name))
)
def test_commands_name_flags_that_exist(module):
  done = run_binary(module, "--helpfull")
  shown = done.stdout + done.stderr
  for line in re.findall(rf"-m {re.escape(module)}([^`\n&]*)", TEXT):
    for flag in re.findall(r"--(\w+)", line):
      assert re.search(rf"--(\[no\])?{flag}\b", shown), f"{module} has no flag --{flag}"


def test_workspace_names_every_module():
  text = (ROOT / "WORKSPACE.md").read_text()
  for path in (ROOT / "kipcore").rglob("*.py"):
    if path.stem not in ("__init__", "version"):
      assert f"`{path.stem}`" in text, f"WORKSPACE.md does not name {path.stem}"


@pytest.mark.parametrize(
  "path",
  slow_except(
    NOTEBOOKS, *(path for path in NOTEBOOKS if path.stem in ("quickstart", "select_rows"))
  ),
  ids=lambda p: p.name,
)
def test_notebooks_run_and_stored_outputs_are_printed_text(path):
  """Of stored outputs, which only some notebooks have, the words are compared, and not the numbers."""
  notebook = json.loads(path.read_text())
  assert any(cell.get("outputs") for cell in notebook["cells"]) == (path.stem == "select_rows")
  scope = {}
  for cell in notebook["cells"]:
    if cell["cell_type"] != "code":
      continue
    assert cell["execution_count"] is None
    source = "".join(cell["source"])
    code = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
    printed = io.StringIO()
    with standard_promotion(), contextlib.redirect_stdout(printed):  # the default of JAX
      exec(compile(code, path.name, "exec"), scope)
    words = lambda text: re.sub(r"[\d.]+", "#", text)
    for output in cell["outputs"]:
      assert output["output_type"] == "stream"
      assert words("".join(output["text"])) == words(printed.getvalue())
  assert path.stat().st_size < 40_000


def install_cells() -> set[str]:
  return {
    "".join(cell["source"])
    for path in NOTEBOOKS
    for cell in json.loads(path.read_text())["cells"]
    if "KIPCORE_SOURCE" in "".join(cell["source"])
  }


def test_notebooks_have_the_same_install_cell():
  assert len(install_cells()) == 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  """A clone of kipcore, the address of its repository, and its wheel."""
  folder = tmp_path_factory.mktemp("sources")
  clone = folder / "clone" / "kipcore"
  (clone / "notebooks").mkdir(parents=True)
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy2(ROOT / name, clone)
  shutil.copytree(ROOT / "kipcore", clone / "kipcore", ignore=shutil.ignore_patterns("__pycache__"))
  user = ("-c", "user.name=test", "-c", "user.email=test@localhost")
  for command in (("init", "-q"), ("add", "."), (*user, "commit", "-q", "-m", "clone")):
    subprocess.run(["git", *command], cwd=clone, check=True, capture_output=True)
  build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
  subprocess.run([*build, "-w", folder, clone], check=True, capture_output=True)
  (wheel,) = folder.glob("*.whl")
  return {"clone": str(clone), "repository": f"git+file://{clone}", "wheel": str(wheel)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clone", "repository", "wheel", "clone next to it", "absent"])
def test_the_install_cell_installs_or_raises_an_error(kind, sources, tmp_path):
  """In an environment that has the requirements of kipcore, but not kipcore itself."""
  (cell,) = install_cells()
  subprocess.run(
    [sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment"], check=True
  )
  python = tmp_path / "environment" / "bin" / "python"
  (there,) = (tmp_path / "environment").glob("lib/python*/site-packages")
  (there / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
  source = {"clone next to it": "", "absent": str(tmp_path / "absent.whl")}.get(
    kind, sources.get(kind)
  )
  done = subprocess.run(
    [python, "-c", cell + "\nimport kipcore; print(kipcore.__file__)"],
    # The cell looks in this folder and above it if the source is empty.
    cwd=pathlib.Path(sources["clone"], "notebooks"),
    env={
      **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
      "KIPCORE_SOURCE": source,
      "PIP_NO_DEPS": "1",
      "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of --no-build-isolation
    },
    capture_output=True,
    text=True,
    check=False,
  )
  if kind == "absent":
    assert done.returncode and "RuntimeError: kipcore could not be installed from" in done.stderr
  else:
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip()).is_relative_to(there)


def test_links_resolve():
  """The files and headings that documents link to exist."""
  for path in DOCUMENTS:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", without_code(path.read_text())):
      name, _, heading = target.partition("#")
      there = path.parent / name if name else path
      assert there.exists(), f"{path.name}: {target}"
      if heading:
        slugs = {
          re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
          for line in there.read_text().splitlines()
          if line.startswith("#")
        }
        assert heading in slugs, f"{path.name}: {target}"


def test_documents_only_describe_the_software():
  for path in [*DOCUMENTS, *(ROOT / "notebooks").glob("*.ipynb")]:
    assert not re.search(r"(^|[^A-Za-z])/(work|root|tmp)/", path.read_text()), path.name


def test_results_record_their_origin():
  for path in (ROOT / "experiments" / "results").rglob("*.json"):
    origin = json.loads(path.read_text())["environment"]
    assert origin["commit"] and origin["hardware"]["backend"] and origin["versions"]["jax"], (
      path.name
    )


def test_guarantees_name_tests_that_exist():
  text = (ROOT / "tests" / "README.md").read_text()
  for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.M), (
      f"{file} has no {name}"
    )
  for name in re.findall(r"`(\w+\.json)`", text):
    assert (ROOT / "experiments" / "results" / name).exists(), name
  rows = [
    line
    for line in text.splitlines()
    if line.startswith("|") and not line.startswith(("| guarantee", "| ---"))
  ]
  assert len(rows) > 20 and all("`" in row.split("|")[2] for row in rows)


def test_version_is_the_installed_one():
  assert re.fullmatch(r"\d+\.\d+\.\d+", kipcore.__version__)


def test_tables_come_from_the_result_files():
  from experiments.docs import tables

  for name in tables.DOCUMENTS:
    text = (ROOT / name).read_text()
    assert tables.rendered(text) == text, "run python -m experiments.docs.tables"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with the inputs of the commands: a run, an .npz file, a folder of images, a table and embeddings."""
  from PIL import Image

  path = tmp_path_factory.mktemp("readme")
  data = datasets.load_dataset("digits")
  arrays = {name: getattr(data, name)[:300] for name in ("x_train", "y_train", "x_test", "y_test")}
  np.savez(path / "data.npz", **arrays)
  rows = data.x_train.reshape(len(data.x_train), -1).astype(np.float32)
  np.save(path / "embeddings.npy", rows)
  np.save(path / "labels.npy", data.y_train)
  table = [f"{row[20]},{row[21]},a,b,{row[22]}" for row in rows]
  (path / "table.csv").write_text("\n".join(["first,second,name,city,price", *table]))
  for name, images, labels in (
    ("train", data.x_train, data.y_train),
    ("test", data.x_test, data.y_test),
  ):
    for i in range(100):
      folder = path / "folder" / name / str(labels[i])
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray((15 * images[i, ..., 0]).astype(np.uint8)).save(folder / f"{i}.png")
  assert (
    run_binary(
      "experiments.run_distill", f"--output_dir={path}/RUN", "--teach=kernel", "--steps=2"
    ).returncode
    == 0
  )
  return path


SMALL_NETWORKS = " --architecture=conv1 --width=4 --network_seeds=0 --test_rows=50"
SMALL = {
  # One device, as on the machines of users: eight simulated ones need a thread each for every collective.
  "run_distill": " --steps=2 --num_devices=1",
  "run_compare": " --num_devices=1 --num_seeds=1 --inits=uniform --samplers=uniform --evaluations=250 "
  "--network_seeds=0 --architecture=conv1 --set=width=4",
  "run_evaluate": " --baselines=uniform --num_seeds=2 --network_steps=2 --width=4 --test_rows=50",
}
SHELL = "".join(
  block
  for path in DOCUMENTS
  if path.parent in (ROOT, GUIDES)
  for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.S)
)
# `--distributed` needs several processes, which `tests/cli/test_processes.py` starts.
COMMANDS = [
  command
  for command in dict.fromkeys(re.findall(r"^python -m (.+)$", launched(SHELL), flags=re.M))
  if "--distributed" not in command
]


# Those that finish in seconds; whole runs, selections and grids are tested in `tests/cli`.
QUICK = ("--dry_run", "--protocol=", "--resume", "run_report", "run_export")


@pytest.mark.parametrize(
  "command",
  slow_except(COMMANDS, *(command for command in COMMANDS if any(q in command for q in QUICK))),
)
def test_commands_in_documents_run(place, command):
  """Runs each command with few steps and digits instead of named datasets; none needs a network."""
  module = command.split()[0].removeprefix("experiments.")
  command = re.sub(
    r"--dataset=(mnist|cifar10)|--data_dir=DIR|--minutes=\d+|--target_batch_size=\d+",
    "",
    command.replace("path/to", str(place)).replace("runs/", f"{place}/"),
  )
  if module in ("run_distill", "run_select", "run_export") and "--output_dir" not in command:
    command += f" --output_dir={place}/{len(list(place.iterdir()))}"
  networks = module == "run_distill" and "--teach=kernel" not in command
  small = SMALL.get(module, "") + SMALL_NETWORKS * networks
  if "--labels=expert" in command:
    small += " --width=4 --expert_epochs=1 --network_steps=1"
  done = run_binary(*(command + ("" if "--resume" in command else small)).split())
  finished = "--resume" in command and "already finished" in done.stderr
  assert done.returncode == 0 or finished, f"{command}\n{done.stdout}\n{done.stderr}"
