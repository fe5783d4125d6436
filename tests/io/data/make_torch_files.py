"""Writes the .pt files of this folder with torch (2.13.0): `python make_torch_files.py FOLDER`."""

import pathlib
import sys

import numpy as np
import torch

folder = pathlib.Path(sys.argv[1])
images = torch.arange(4 * 3 * 4 * 4, dtype=torch.float32).reshape(4, 3, 4, 4) / 8
labels = torch.tensor([0, 0, 1, 1])
# In the formats of DC, DSA and DM, and of MTT.
torch.save(
  {
    "data": [[images.clone(), labels.clone()], [-images, labels.clone()]],
    "accs_all_exps": {"ConvNet": [np.float64(0.25), np.float64(0.5)]},
  },
  folder / "torch_dc.pt",
)
torch.save((images - 20).clone().requires_grad_(True).detach().cpu(), folder / "images_best.pt")
torch.save(labels, folder / "labels_best.pt")
whole = torch.arange(24, dtype=torch.float64).reshape(4, 6)
torch.save(
  {
    "transposed": whole.t(),
    "strided": whole[1::2, ::3],
    "whole": whole,
    "bfloat16": torch.tensor([1.5, -2.0, 3e38], dtype=torch.bfloat16),
    "half": torch.tensor([0.5], dtype=torch.float16),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(7, dtype=torch.int32),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "state": torch.nn.Linear(2, 1, bias=False).state_dict().__class__([("w", torch.zeros(1))]),
    "array": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "nested": (1, [2.5, "three", None]),
    "size": whole.shape,
  },
  folder / "torch_layouts.pt",
)
