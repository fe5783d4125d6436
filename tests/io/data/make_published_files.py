"""Writes `published/` with the code of the projects themselves: `python make_published_files.py SOURCES FOLDER`.

SOURCES contains a clone of each project under the name of its repository. The `torch.save` statements, the functions that
save images, and the functions that decode several images from one are taken from the clones and run on small tensors;
`decoded.npz` contains what the projects train networks on. Written with torch 2.13.0 and torchvision 0.28.0 on a CPU.
"""

import ast
import functools
import math
import os
import pathlib
import random
import sys
import types

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import functional as t_F

sources, folder = map(pathlib.Path, sys.argv[1:])
torch.Tensor.cuda = lambda self, *_, **__: self
torch.load = functools.partial(torch.load, weights_only=False)  # as when the projects were written
decoded = {}


def tree(path):
  """The syntax tree of a source file."""
  return ast.parse((sources / path).read_text())


def defined(path, *names):
  """Functions and classes of a source file, with the libraries that they use."""
  space = dict(np=np, torch=torch, nn=nn, F=functional, os=os, random=random, math=math)
  space |= dict(ceil=math.ceil, Image=Image, torchvision=torchvision, transforms=transforms)
  space |= dict(t_F=t_F)
  nodes = [n for n in tree(path).body if getattr(n, "name", None) in names]
  exec(compile(ast.Module(nodes, []), path, "exec"), space)
  return types.SimpleNamespace(**{name: space[name] for name in names})


def run_saves(path, containing, **space):
  """Runs the torch.save statements of a source file that contain a text."""
  found = [
    node
    for node in ast.walk(tree(path))
    if isinstance(node, ast.Expr)
    and ast.unparse(node).startswith("torch.save(")
    and containing in ast.unparse(node)
  ]
  assert found, (path, containing)
  for node in found:
    exec(compile(ast.Module([node], []), path, "exec"), dict(torch=torch, os=os, **space))


def place(name):
  """A new folder of a project."""
  path = folder / name
  path.mkdir(parents=True, exist_ok=True)
  return path


def args(**values):
  return types.SimpleNamespace(**values)


torch.manual_seed(0)
# IDC and DREAM, whose Synthesizer is that of IDC: 2 classes, 2 images per class of 5 x 5 pixels with 4 parts each.
for name, file, tag in (
  ("Efficient-Dataset-Condensation", "idc", "conv3in_cut_niter2_factor2_lr0.005_ipc2"),
  ("DREAM", "dream", "conv3in_cut_niter2_factor2_lr0.005_ipc2"),
):
  settings = args(ipc=2, factor=2, decode_type="single", save_dir=str(place(f"{file}/{tag}")))
  synset = defined(f"{name}/condense.py", "Synthesizer").Synthesizer(settings, 2, 3, 5, 5, "cpu")
  run_saves(f"{name}/condense.py", "data", synset=synset, args=settings, it=1199)
  for kind in ("single", "multi", "bound"):
    synset.decode_type = kind
    # A bound of 6 leaves room for one decoded image per class.
    parts = [
      synset.decode(synset.data[2 * c : 2 * c + 2], synset.targets[2 * c : 2 * c + 2], 6)
      for c in (0, 1)
    ]
    decoded[f"{file}_{kind}"] = torch.cat([images for images, _ in parts]).detach().numpy()
    decoded[f"{file}_{kind}_labels"] = torch.cat([labels for _, labels in parts]).numpy()
# NCFM: gray images.
images, labels = torch.rand(4, 1, 6, 6), torch.tensor([0, 0, 1, 1])
run_saves(
  "NCFM/utils/ddp.py",
  "all_data",
  all_data=images,
  all_targets=labels,
  data_save_path=str(place("ncfm") / "data_20000.pt"),
)
decode = vars(defined("NCFM/condenser/decode.py", "decode_zoom"))["decode_zoom"]
parts = [decode((6, 6), images[labels == c], labels[labels == c], 2) for c in (0, 1)]
decoded["ncfm_single"] = torch.cat([images for images, _ in parts]).numpy()
decoded["ncfm_single_labels"] = torch.cat([labels for _, labels in parts]).numpy()
# CIM: networks see a whole image or one of its parts.
images = torch.rand(4, 3, 4, 4)
run_saves(
  "CIM/condense/condense.py",
  "label",
  args=args(dataset="cifar10", save_dir=str(place("cim"))),
  imgs=images,
  targets=labels,
)
cim = defined("CIM/data/utils/transforms.py", "decode_zoom", "decode_fn")
decoded["cim_multi"], decoded["cim_multi_labels"] = (
  x.numpy() for x in cim.decode_fn(images, labels, 2)
)
# DATM: labels are logits.
with torch.no_grad():
  save_dir = place("datm")
  (save_dir / "Normal").mkdir(exist_ok=True)
  run_saves(
    "DATM/distill/DATM.py",
    "_best.pt",
    image_save=torch.randn(4, 3, 4, 4).requires_grad_(True),
    label_syn=(4 * torch.randn(4, 2)).requires_grad_(True),
    syn_lr=torch.tensor(0.01).requires_grad_(True),
    save_dir=str(save_dir),
    it=5,
  )
# RDED: JPEG files in a folder per class.
rded = defined("RDED/synthesize/main.py", "save_images")
for c in range(2):
  rded.save_images(args(syn_data_path=str(place("rded"))), torch.rand(2, 3, 8, 8), c)
# SRe2L: JPEG files, and the logits of a teacher for crops of them, mixed by CutMix.
recover = defined("SRe2L/SRe2L/recover/data_synthesis.py", "save_images")
for i in range(3):
  settings = args(syn_data_path=str(place("sre2l")))
  recover.save_images(settings, torch.rand(2, 3, 16, 16), torch.tensor([0, 1]), i)
fkd = "SRe2L/SRe2L/relabel/utils_fkd.py"
names = [n.name for n in tree(fkd).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
fkd = defined(fkd, *names)
labels_path = str(place("sre2l_labels")) + "/"
transform = fkd.ComposeWithCoords(
  transforms=[
    fkd.RandomResizedCropWithCoords(size=16, scale=(0.08, 1)),
    fkd.RandomHorizontalFlipWithRes(),
    transforms.ToTensor(),
  ]
)
data = fkd.ImageFolder_FKD_MIX(
  fkd_path=labels_path, mode="fkd_save", root=str(folder / "sre2l"), transform=transform
)
generator = torch.Generator()
generator.manual_seed(42)
loader = torch.utils.data.DataLoader(
  data, batch_size=4, sampler=torch.utils.data.RandomSampler(data, generator=generator)
)
save = defined("SRe2L/SRe2L/relabel/generate_soft_label.py", "save").save
save.__globals__["mix_aug"] = fkd.mix_aug
settings = args(mode="fkd_save", mix_type="cutmix", cutmix=1.0, mixup=0.8, use_fp16=True)
np.random.seed(0)  # noqa: NPY002 (the generator that the projects use)
teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)).requires_grad_(False)
save(loader, teacher, str(place("sre2l_labels/epoch_0")), settings)
# What train_FKD.py trains on.
settings.mode = data.mode = "fkd_load"
generator.manual_seed(42)
order = list(torch.utils.data.RandomSampler(data, generator=generator))
data.img2batch_idx_list, data.epoch = [{order[0]: 0, order[4]: 1}], 0
views, logits = [], []
for batch in (order[:4], order[4:]):
  index, share, box, label = data.load_batch_config(batch[0])
  images = torch.stack([data[i][0] for i in batch])
  views.append(fkd.mix_aug(images, settings, index, share, box)[0])
  logits.append(label.float())
decoded["sre2l_views"], decoded["sre2l_logits"] = (
  torch.cat(views).numpy(),
  torch.cat(logits).numpy(),
)
np.savez_compressed(folder / "decoded.npz", **decoded)
