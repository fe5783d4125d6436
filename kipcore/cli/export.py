"""Writes a saved set in formats of other programs.

Examples:
  kipcore-export
      the newest run under runs/, as safetensors and PNG files
  kipcore-export --artifact=RUN/distilled.npz --format=png,torch
      another run, as PNG files and for PyTorch
"""

import pathlib

from kipcore.cli import errors, flags
from kipcore.cli.config import ExportConfig


def main(values) -> None:
  """Loads, checks every format, then writes each."""
  from kipcore.cli.folder import run_folder
  from kipcore.io import artifact, export

  with errors.usage():
    if not values.format:
      raise errors.UsageError(
        f"--format: expected one or more of {', '.join(export.FORMATS)}; got none"
      )
    path = pathlib.Path(values.artifact or run_folder.newest("distilled.npz"))
    stored = artifact.load_artifact(path)
    content = stored.distilled_set(values.space, values.pixel_max)
  folder = pathlib.Path(values.output_dir or path.parent / "export")
  name = f"{path.stem}_{values.space}"
  targets = {
    kind: folder / f"{name}{export.SUFFIXES.get(kind, '_' + kind)}" for kind in values.format
  }
  if "tfds" in targets:
    targets["tfds"] /= "1.0.0"  # where `tfds.load` looks for it
  try:
    with errors.usage():
      for kind, target in targets.items():
        export.check(target, kind, content, values.overwrite)
    if values.dry_run:
      print(
        f"{path}: {len(content.images)} rows of shape {content.images.shape[1:]}, {content.labels.shape[1]} classes, "
        f"{content.space}"
      )
      for kind, target in targets.items():
        print(f"{kind}: {target}{' (replaced)' * target.exists()}")
      print("Nothing was written.")
      return
    for kind, target in targets.items():
      export.write(target, kind, content, values.overwrite)
      print(f"{kind}: {target}")
      if kind == "png" and export.learned(content.labels):
        print(f"png: {export.folder_note(content)}")
  except ImportError as error:
    raise errors.UsageError(str(error)) from error
  print("conventions of the values: NAME.json next to a file, conventions.json in a folder")


run = flags.binary(main, ExportConfig, main_flags=("artifact", "format", "dry_run"))

if __name__ == "__main__":
  run()
