"""Runs DD-Ranking 0.2.0 on the sets and rows of a folder; imports no kipcore.

dd_ranking_scores.py writes the folder and calls `run` in an interpreter with PyTorch and ddranking. The package
loads only some datasets, so its loader is replaced by the rows of the folder; everything else is its own code.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib

import numpy as np


def rows_of(folder: pathlib.Path, split: str):
  """A PyTorch dataset of the rows of a split, with integers as labels."""
  import torch

  images = torch.from_numpy(np.load(folder / f"{split}_images.npy"))
  labels = np.load(folder / f"{split}_labels.npy").tolist()

  class Rows(torch.utils.data.Dataset):
    targets = labels

    def __len__(self):
      return len(labels)

    def __getitem__(self, index):
      return images[index], labels[index]

  return Rows()


def train_on_all(train, test, settings: dict, name: str, classes: int) -> float:
  """Trains a network on all rows by DD-Ranking's code, saves it as the teacher, and returns its test accuracy in percent."""
  import torch
  from ddranking import utils

  model = utils.build_model(
    settings["model_name"], classes, tuple(settings["im_size"]), device="cpu"
  )
  optimizer = utils.get_optimizer("sgd", model, 0.01)
  loader = torch.utils.data.DataLoader(train, settings["real_batch_size"], shuffle=True)
  for epoch in range(settings["full_epochs"]):
    utils.train_one_epoch(
      epoch, model, loader, torch.nn.CrossEntropyLoss(), optimizer, device="cpu"
    )
  folder = pathlib.Path(settings["teacher_dir"], name, settings["model_name"])
  folder.mkdir(parents=True)
  torch.save(model.state_dict(), folder / "ckpt_best.pt")
  return utils.validate(
    model, torch.utils.data.DataLoader(test, settings["real_batch_size"]), device="cpu"
  )


def scores(folder: pathlib.Path) -> dict:
  """The scores of all sets."""
  import torch
  from ddranking import Config
  from ddranking.metrics import hard_label, soft_label

  settings = json.loads((folder / "settings.json").read_text())
  train, test = rows_of(folder, "train"), rows_of(folder, "test")
  classes, side = max(train.targets) + 1, tuple(settings["im_size"])
  same = {c: c for c in range(classes)}
  # Its code for CIFAR-10 takes tensors; that for other datasets takes folders.
  name = settings["dataset"] = "CIFAR10"
  for module in (hard_label, soft_label):
    module.get_dataset = lambda *_, **__: (
      (3, side, None, None, classes, train, test, test, same, same)
    )
    # 0.2.0 records hard-label scores twice and fails when it writes columns of two lengths.
    module.save_results = lambda *_: None
  # 0.2.0 forgets the map of classes in this call.
  draw = soft_label.get_random_data_tensors
  soft_label.get_random_data_tensors = lambda *given: draw(*given[:4], same, *given[4:])
  full = train_on_all(train, test, settings, name, classes)
  for module in (hard_label, soft_label):
    module.REAL_DATA_ACC_CACHE[f"{name}-{settings['model_name']}"] = full
  settings["eval_full_data"] = False
  found = {"full_accuracy_percent": full, "hard": {}}
  if settings["soft"]:
    found["soft"] = {}
  for each in settings["sets"]:
    images, hard, soft = (
      torch.from_numpy(np.load(folder / each / f"{part}.npy"))
      for part in ("images", "hard_labels", "soft_labels")
    )
    scorer = hard_label.LabelRobustScoreHard(Config(settings))
    found["hard"][each] = scorer.compute_metrics(images, hard_labels=hard)
    if settings["soft"]:
      scorer = soft_label.LabelRobustScoreSoft(Config(settings))
      scorer.teacher_model = scorer.teacher_models[0]  # 0.2.0 reads this name without setting it
      found["soft"][each] = scorer.compute_metrics(images, soft_labels=soft)
  versions = {package: importlib.metadata.version(package) for package in ("torch", "numpy")}
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    versions["ddranking"] = importlib.metadata.version("ddranking")
  return {**found, "versions": versions}


def run(path: str) -> None:
  """Scores the sets of a folder and writes `result.json` there."""
  folder = pathlib.Path(path)
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    found = scores(folder)
  clean = lambda value: (
    {k: clean(v) for k, v in value.items()}
    if isinstance(value, dict)
    else float(value)
    if isinstance(value, (np.floating, np.integer))
    else value
  )
  (folder / "result.json").write_text(json.dumps(clean(found)))
