"""Writes a saved artifact for other programs.

For example `python -m experiments.run_export --artifact=RUN/distilled.npz --format=png,torch`.
"""

import pathlib

from absl import flags

from kipcore.cli import errors
from kipcore.cli import flags as common

FLAGS = flags.FLAGS

flags.DEFINE_string(
  "artifact", None, "The distilled.npz of a run; without it, the newest under runs/."
)
flags.DEFINE_list(
  "format", ["safetensors", "png"], "numpy, png, safetensors, torch, tfds: one or several."
)
flags.DEFINE_string(
  "space", "pixels", "pixels, or inputs: behind the preprocessing, as a network sees them."
)
flags.DEFINE_float(
  "pixel_max",
  None,
  "Stored value of full white, for artifacts that do not record it: 255 for uint8 images.",
)
flags.DEFINE_string(
  "output_dir", None, "Folder for the exports; by default `export` beside the artifact."
)
flags.DEFINE_bool("overwrite", False, "Replace earlier exports of the same names.")


def main() -> None:
  """Loads, checks every format, then writes each."""
  from kipcore.cli.folder import run_folder
  from kipcore.io import artifact, export

  with errors.usage():
    if not FLAGS.format:
      raise errors.UsageError(
        f"--format: expected one or several of {', '.join(export.FORMATS)}; got none"
      )
    path = pathlib.Path(FLAGS.artifact or run_folder.newest("distilled.npz"))
    stored = artifact.load_artifact(path)
    content = stored.distilled_set(FLAGS.space, FLAGS.pixel_max)
  folder = pathlib.Path(FLAGS.output_dir or path.parent / "export")
  name = f"{path.stem}_{FLAGS.space}"
  targets = {
    kind: folder / f"{name}{export.SUFFIXES.get(kind, '_' + kind)}" for kind in FLAGS.format
  }
  if "tfds" in targets:
    targets["tfds"] /= "1.0.0"  # as `tfds.load` looks for it
  try:
    with errors.usage():
      for kind, target in targets.items():
        export.check(target, kind, content, FLAGS.overwrite)
    for kind, target in targets.items():
      export.write(target, kind, content, FLAGS.overwrite)
      print(f"{kind}: {target}")
  except ImportError as error:
    raise errors.UsageError(str(error)) from error
  print("what the numbers mean: NAME.json beside a file, conventions.json in a folder")


def run() -> None:
  """The console script."""
  common.launch(main)


if __name__ == "__main__":
  run()
