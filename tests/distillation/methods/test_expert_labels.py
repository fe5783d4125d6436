"""Labels and losses of experts against the network applied directly, and the choice of the epoch."""

import numpy as np
import pytest
from helpers import image_problem

import kipcore
from kipcore.distillation.methods import experts

C = 3


@pytest.fixture(scope="module")
def trained():
  support, x, y = image_problem(np.float32, n=240)
  module = kipcore.network(kipcore.fc(1), 16, C)
  trajectory = kipcore.train_expert(0, module, x, y, 6, learning_rate=0.3, batch_size=32)
  return module, trajectory, support, x, y


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_labels_and_losses_are_those_of_the_network(trained, temperature):
  module, trajectory, support, x, y = trained
  _, variables = experts.flat_parameters(module, x)
  logits = np.asarray(module.apply(variables(trajectory[3]), x), np.float64)
  p = np.exp(logits / temperature)
  p /= p.sum(1, keepdims=True)
  labels = kipcore.expert_labels(module, trajectory[3], x, temperature)
  np.testing.assert_allclose(labels, p - 1 / C, atol=1e-6)
  np.testing.assert_allclose(kipcore.label_distribution(labels), p, atol=1e-6)
  if temperature == 1.0:
    losses = -np.log(p[np.arange(len(x)), y.argmax(1)])
    np.testing.assert_allclose(
      kipcore.expert_losses(module, trajectory[3], x, y), losses, rtol=1e-4, atol=1e-6
    )


def test_the_chosen_epoch_has_the_best_students(trained):
  module, trajectory, _, x, y = trained
  rows, _ = x[:30], y[:30]
  found = kipcore.choose_expert(
    0, module, trajectory, rows, x[120:], y[120:], num_steps=60, width=16
  )
  assert set(found.accuracies) == {1, 2, 4, 6}
  assert found.accuracies[found.epoch] == max(found.accuracies.values())
  # Labels of an untrained network teach less than those of the chosen one.
  untrained = kipcore.choose_expert(
    0, module, trajectory, rows, x[120:], y[120:], epochs=[0], num_steps=60, width=16
  )
  assert untrained.accuracies[0] < found.accuracies[found.epoch]


def test_invalid_arguments_are_named(trained):
  module, trajectory, _, x, y = trained
  with pytest.raises(ValueError, match="parameters: expected shape"):
    kipcore.expert_labels(module, trajectory[0][:-1], x)
  with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
    kipcore.expert_labels(module, trajectory[0], x, 0.0)
  with pytest.raises(TypeError, match="x: expected a floating dtype"):
    kipcore.expert_labels(module, trajectory[0], np.ones((2, *x.shape[1:]), np.uint8))
  with pytest.raises(ValueError, match=r"epochs: expected a value in \[0, 6\]"):
    kipcore.choose_expert(0, module, trajectory, x, x, y, epochs=[7])
