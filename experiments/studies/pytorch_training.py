"""Reads an exported set in plain PyTorch without kipcore, trains networks on it and scores them.

All information about the set comes from the exported file, which contains tensors and their
conventions as JSON. The networks are the ConvNet of DC, DM and MTT, at a width suitable for a CPU.
"""

import json
import math

import numpy as np


def load(path) -> tuple[dict, dict]:
  """The arrays of an export in format torch, as NumPy arrays, and its conventions."""
  import torch

  stored = torch.load(path, weights_only=True)
  conventions = json.loads(stored.pop("conventions"))
  return {name: tensor.numpy() for name, tensor in stored.items()}, conventions


def inputs_of(pixels, conventions: dict, arrays: dict) -> np.ndarray:
  """Applies the preprocessing in the conventions of the set to rows in pixel units.

  Args:
    pixels: `(n, *row_shape)`, channels last.
    conventions: conventions of the export.
    arrays: arrays of the export, including preprocessing arrays too large for the conventions.

  Returns:
    float32 of the same shape.

  Raises:
    ValueError: for an unknown step.
  """
  x = np.asarray(pixels, np.float64)
  for step in conventions["preprocess"]["steps"]:
    known = {
      name: arrays[value["stored_as"]] if isinstance(value, dict) else np.asarray(value)
      for name, value in step["arrays"].items()
    }
    rows = x.reshape(len(x), -1)
    if step["name"] == "scale":
      x = x / known["divisor"]
    elif step["name"] == "standardize":
      x = (x - known["mean"]) / known["divisor"]
    elif step["name"] == "center":
      x = x - known["mean"]
    elif step["name"] == "unit_norm":
      rows = rows - rows.mean(axis=1, keepdims=True)
      norms = np.linalg.norm(rows, axis=1, keepdims=True)
      x = (rows / np.where(norms > 0, norms, 1.0)).reshape(x.shape)
    elif step["name"] == "zca":
      x = (rows @ known["whitening"]).reshape(x.shape)
    else:
      raise ValueError(
        "preprocess: expected a step of scale, standardize, center, unit_norm, zca; got "
        f"{step['name']!r}"
      )
  return x.astype(np.float32)


def conv_net(
  channels: int, image_size: tuple[int, int], num_classes: int, width: int, depth: int = 3
):
  """ConvNet of `depth` blocks and a linear layer.

  A block is a 3x3 convolution, instance norm, ReLU and 2x2 average pool. Initial weights are
  N(0, 2 / fan-in) and biases N(0, 0.1^2), including the last layer; norms start as the identity.

  Args:
    channels, image_size, num_classes: shape of the data.
    width: channels of every convolution.
    depth: number of convolutions.

  Returns:
    `torch.nn.Sequential` for NCHW images.
  """
  from torch import nn

  layers, last = [], channels
  for _ in range(depth):
    layers += [
      nn.Conv2d(last, width, 3, padding=1),
      nn.InstanceNorm2d(width, eps=1e-5, affine=True),
      nn.ReLU(),
      nn.AvgPool2d(2),
    ]
    last = width
  features = width * math.prod(side // 2**depth for side in image_size)
  network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_classes))
  for layer in network:
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
      nn.init.normal_(layer.weight, std=math.sqrt(2.0 / layer.weight[0].numel()))
      nn.init.normal_(layer.bias, std=0.1)
  return network


def train(network, images, labels, num_steps: int, learning_rate: float):
  """Trains with Adam and a cosine schedule on all images at each step.

  The loss is the mean squared error of the outputs minus the outputs at initialization.

  Args:
    network: modified in place.
    images: `(m, channels, height, width)`, preprocessed.
    labels: `(m, c)`, centered.
    num_steps: number of Adam steps.
    learning_rate: initial learning rate; the schedule ends at 0.
  """
  import torch

  with torch.no_grad():
    targets = labels + network(images)
  optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
  schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
  for _ in range(num_steps):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(network(images), targets).backward()
    optimizer.step()
    schedule.step()


def accuracies(
  path, x_test, y_test, num_seeds: int, width: int, num_steps: int, learning_rate: float
) -> list[float]:
  """Test accuracies of ConvNets trained on an exported set, one per seed.

  Args:
    path: an export in format torch with images in pixel space.
    x_test: `(n, height, width, channels)` in pixel units.
    y_test: `(n,)` classes.
    num_seeds: number of networks.
    width: channels of the networks.
    num_steps, learning_rate: see `train`.

  Returns:
    Accuracies in [0, 1].
  """
  import copy

  import torch

  arrays, conventions = load(path)
  tensor = lambda pixels: (
    torch.from_numpy(inputs_of(pixels, conventions, arrays)).permute(0, 3, 1, 2).contiguous()
  )
  images, labels = (
    tensor(arrays["images"].transpose(0, 2, 3, 1)),
    torch.from_numpy(arrays["labels"]),
  )
  test, classes = tensor(x_test).split(100), torch.from_numpy(np.asarray(y_test, np.int64))
  found = []
  for seed in range(num_seeds):
    torch.manual_seed(seed)
    network = conv_net(images.shape[1], images.shape[2:], labels.shape[1], width)
    start = copy.deepcopy(network)
    train(network, images, labels, num_steps, learning_rate)
    with torch.no_grad():
      predicted = torch.cat([(network(block) - start(block)).argmax(1) for block in test])
    found.append(float((predicted == classes).double().mean()))
  return found
