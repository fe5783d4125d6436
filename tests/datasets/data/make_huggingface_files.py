"""Writes the files of this folder with Hugging Face datasets: `python make_huggingface_files.py FOLDER`."""

import pathlib
import sys

import datasets
import numpy as np
from PIL import Image

folder = pathlib.Path(sys.argv[1])
features = datasets.Features(
  {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
)


def rows(first: int, count: int) -> datasets.Dataset:
  """Uniform images of 5 x 4 pixels, image i with the color (i, 2 i, 3 i), of alternating classes."""
  images = [
    Image.fromarray(np.full((4, 5, 3), [i, 2 * i, 3 * i], np.uint8))
    for i in range(first, first + count)
  ]
  return datasets.Dataset.from_dict(
    {"image": images, "label": [i % 2 for i in range(count)]}, features=features
  )


train, test = rows(0, 6), rows(40, 4)
datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "saved")
train.to_parquet(folder / "train.parquet")
print("datasets", datasets.__version__)
