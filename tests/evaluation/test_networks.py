"""Evaluation by training networks against an explicit loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import image_problem, standard_promotion

import kipcore
from kipcore import keys

OPTIONS = dict(num_seeds=2, width=8, num_steps=12, learning_rate=0.05)


def test_equals_explicit_adam_with_cosine_schedule(x64):
  """Step i of n has 1/2 (1 + cos(pi i / n)) of the peak rate; initial outputs are subtracted."""
  support, x, y = image_problem(np.float64, n=300)
  arch, n = kipcore.fc(1), OPTIONS["num_steps"]
  scores = kipcore.evaluate_network(3, arch, support, x, y, **OPTIONS)
  module = kipcore.network(arch, OPTIONS["width"], 3)
  stream = keys.stream(3, "evaluate_network")
  expected = []
  for seed in range(2):
    start = params = module.init(keys.stream(keys.at_step(stream, seed), "init"), support.x[:1])
    f = lambda p, rows: module.apply(p, rows) - module.apply(start, rows)
    gradient = jax.jit(jax.grad(lambda p: jnp.mean((f(p, support.x) - support.y) ** 2)))
    adam = optax.scale_by_adam()
    state = adam.init(params)
    for i in range(n):
      rate = OPTIONS["learning_rate"] * 0.5 * (1 + np.cos(np.pi * i / n))
      with standard_promotion():
        direction, state = adam.update(gradient(params), state)
      params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    predictions = np.asarray(f(params, jnp.asarray(x)))
    expected.append(np.mean(predictions.argmax(1) == y.argmax(1)))
  assert len(set(expected)) == 2  # the seeds differ, so the comparison is not trivial
  np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_seeds_are_independent_of_their_number():
  support, x, y = image_problem()
  two = kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, **OPTIONS)
  one = kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, **{**OPTIONS, "num_seeds": 1})
  assert two.shape == (2,) and one[0] == two[0]


def test_diverged_training_is_an_error():
  support, x, y = image_problem()
  with pytest.raises(kipcore.NumericalError, match="training of a finite network"):
    kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, **{**OPTIONS, "learning_rate": 1e30})


@pytest.mark.parametrize(
  "change, message",
  [
    ({"num_steps": 0}, "num_steps"),
    ({"num_seeds": 0}, "num_seeds"),
    ({"batch_size": 0}, "batch_size"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"learning_rate": np.nan}, "learning_rate"),
    ({"norm": "layer"}, "norm: expected one of none, instance"),
  ],
)
def test_wrong_options_are_named(change, message):
  support, x, y = image_problem()
  with pytest.raises(ValueError, match=message):
    kipcore.evaluate_network(0, kipcore.fc(1), support, x, y, **{**OPTIONS, **change})
