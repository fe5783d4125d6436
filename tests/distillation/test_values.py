"""Configurations compare by value and compile once; records under `jit` contain only arrays."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import slow_except

import kipcore
from kipcore.distillation import loop
from kipcore.distillation.optimizers import NamedOptimizer

KERNEL = kipcore.ntk_fn(kipcore.fc(1))
WALKS = np.zeros((1, 30, 5), np.float32)


def network(norm="none"):
  return kipcore.network(kipcore.conv_net(1), 4, 3, norm=norm)


CONFIGURATIONS = {
  "kip": lambda: kipcore.kip(kipcore.ntk_fn(kipcore.fc(1)), kipcore.KIPOptions(1e-3)),
  "rfad": lambda: kipcore.rfad(network(), kipcore.RFADOptions(num_networks=2)),
  "frepo": lambda: kipcore.frepo(network("batch")),
  "rcig": lambda: kipcore.rcig(network()),
  "dm": lambda: kipcore.dm(network("instance")),
  "dc": lambda: kipcore.dc(network("instance")),
  "dsa": lambda: kipcore.dsa(network("instance")),
  "mtt": lambda: kipcore.mtt(network("instance"), WALKS),
  "ncfm": lambda: kipcore.ncfm(network("instance"), WALKS),
  **{
    f"sampler {name}": lambda name=name: kipcore.sampler(name, refresh_every=3)
    for name in ("uniform", "class_balanced", "cross_entropy", "squared_error", "margin")
  },
  "optimizer": lambda: NamedOptimizer("adam", 0.1, 10, "cosine"),
  "distiller": lambda: kipcore.Distiller(
    kipcore.kip(KERNEL), kipcore.sampler("margin"), NamedOptimizer("sgd", 0.1, 10), 8
  ),
}


def test_equal_settings_are_equal_and_others_are_not():
  made = {name: make() for name, make in CONFIGURATIONS.items()}
  for name, make in CONFIGURATIONS.items():
    again = make()
    assert made[name] == again and hash(made[name]) == hash(again) and made[name] is not again
    assert sum(again == other for other in made.values()) == 1


def some_changes(value):
  """Copies of a frozen dataclass of numbers, flags and names, each with one field changed."""
  for field in dataclasses.fields(value):
    old = getattr(value, field.name)
    if isinstance(old, bool):
      yield dataclasses.replace(value, **{field.name: not old})
    elif isinstance(old, (int, float)):
      yield dataclasses.replace(value, **{field.name: type(old)(old + 1) if old >= 1 else old / 2})


@pytest.mark.parametrize(
  "method, options",
  [
    (lambda o: kipcore.kip(KERNEL, o), kipcore.KIPOptions()),
    (lambda o: kipcore.rfad(network(), o), kipcore.RFADOptions()),
    (lambda o: kipcore.frepo(network("batch"), o), kipcore.FRePoOptions()),
    (lambda o: kipcore.rcig(network(), o), kipcore.RCIGOptions()),
    (lambda o: kipcore.dc(network(), o), kipcore.GradientMatchingOptions(3, 2)),
    (
      lambda o: kipcore.mtt(network(), WALKS[:, :29], o),
      kipcore.TrajectoryMatchingOptions(3, 1, 9),
    ),
    (lambda o: kipcore.ncfm(network(), None, o), kipcore.NCFMOptions()),
  ],
)
def test_every_option_is_part_of_the_value(method, options):
  changed = list(some_changes(options))
  assert changed and len({method(options), *map(method, changed)}) == 1 + len(changed)


def test_numpy_scalars_make_equal_options_and_booleans_are_not_numbers():
  plain = kipcore.RCIGOptions(pool_size=3, inner_rate=0.25, clip=True)
  numpy = kipcore.RCIGOptions(
    pool_size=np.int64(3), inner_rate=np.float32(0.25), clip=np.bool_(True)
  )
  arrays = kipcore.RCIGOptions(pool_size=jnp.asarray(3), inner_rate=np.asarray(0.25))
  assert plain == numpy == arrays and hash(plain) == hash(numpy) == hash(arrays)
  assert kipcore.sampler("margin", refresh_every=np.int64(2)) == kipcore.sampler(
    "margin", refresh_every=2
  )
  for wrong in (
    lambda: kipcore.RCIGOptions(pool_size=True),
    lambda: kipcore.RCIGOptions(inner_rate=True),
    lambda: kipcore.RCIGOptions(clip=1),
    lambda: kipcore.KIPOptions(block_size=2.0),
    lambda: kipcore.sampler("margin", refresh_every=True),
    lambda: kipcore.importance("margin", uniform_mix=True),
    lambda: kipcore.importance("margin", power=np.ones(2)),
    lambda: kipcore.Distiller(
      kipcore.kip(KERNEL), kipcore.sampler("uniform"), optax.sgd(1.0), True
    ),
  ):
    with pytest.raises((TypeError, ValueError), match="expected"):
      wrong()


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_rates_and_ridges_must_be_finite_and_positive(value):
  for make in (
    lambda: kipcore.KIPOptions(relative_ridge=value),
    lambda: kipcore.FRePoOptions(network_rate=value),
    lambda: kipcore.RCIGOptions(l2=value),
    lambda: kipcore.TrajectoryMatchingOptions(initial_rate=value),
    lambda: NamedOptimizer("adam", value, 3),
  ):
    with pytest.raises(ValueError, match="expected a finite number > 0, got"):
      make()


def test_methods_and_samplers_of_functions_are_equal_if_their_functions_are():
  loss, draw = (lambda *_: None), (lambda *_: None)
  functions = [lambda s: {"x": s.x}, lambda p, a: None, lambda p: {"x": 1}]
  make = lambda: kipcore.Method("own", *functions, loss)
  assert make() == make() and hash(make()) == hash(make())
  assert make() != kipcore.Method("own", *functions, lambda *_: None)
  assert isinstance(make(), kipcore.Method) and make().init_aux(jax.random.key(0), {}) == ()
  sampler = lambda: kipcore.Sampler("own", lambda counts, capacity: 0, draw, refresh_every=4)
  assert isinstance(sampler(), kipcore.Sampler) and sampler().refresh_every == 4
  assert sampler().metrics(0) == {} and sampler().scores(0) is None
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().name = "other"


def problem():
  rng = np.random.default_rng(0)
  labels = np.arange(40) % 2
  x = (rng.normal(size=(40, 3)) + labels[:, None]).astype(np.float32)
  y = np.asarray(kipcore.one_hot_centered(labels, 2))
  return kipcore.Support(jnp.asarray(x[:4]), jnp.asarray(y[:4])), x, y


def test_equal_distillers_compile_once():
  traced = []

  @dataclasses.dataclass(frozen=True)
  class Nearest(kipcore.Method):
    scale: float

    def loss(self, params, aux, batch, weights, key):
      traced.append(self.scale)
      per_example = self.scale * jnp.sum((batch.x - params["x"][:1]) ** 2, axis=1)
      info = kipcore.LossInfo(per_example, batch.y, jnp.mean(per_example), jnp.int32(0))
      return jnp.mean(weights * per_example), info

  def run(scale, rate, seed):
    distiller = kipcore.Distiller(
      Nearest(scale), kipcore.sampler("uniform"), NamedOptimizer("sgd", rate, 0), 10
    )
    return kipcore.distill(seed, distiller, *problem(), 3)

  run(1.0, 0.1, 0)
  first = len(traced)
  run(1.0, 0.1, 1)
  assert first and len(traced) == first
  run(1.0, 0.2, 0)
  run(2.0, 0.1, 0)
  assert len(traced) > first and traced[-1] == 2.0


def test_records_pass_through_jit_as_arguments_and_results():
  support, x, y = problem()
  distiller = kipcore.Distiller(
    kipcore.kip(KERNEL), kipcore.sampler("cross_entropy"), optax.adam(0.1), 10
  )
  targets = jax.tree.map(lambda a: jnp.asarray(a[0]), kipcore.arrange_targets(x, y))
  state = kipcore.distill_init(0, distiller, support, targets.class_counts, len(x))
  params = distiller.method.init_params(support)
  for axis_name in (None, "devices"):
    batch = kipcore.Batch(targets.x, targets.y, axis_name)
    out = jax.jit(lambda b: b)(batch)
    assert out.axis_name == axis_name and np.array_equal(out.x, batch.x)
  batch = kipcore.Batch(targets.x, targets.y)
  _, info = jax.jit(distiller.method.loss)(params, (), batch, jnp.ones(len(x)), None)
  after, step_info = jax.jit(lambda s, t: kipcore.distill_step(0, distiller, s, t))(state, targets)
  for data in (support, targets, batch, info, state, after, step_info):
    out = jax.jit(lambda tree: tree)(data)
    assert type(out) is type(data)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(out))
    for got, given in zip(jax.tree.leaves(out), jax.tree.leaves(data), strict=True):
      np.testing.assert_array_equal(got, given)


def test_the_networks_of_a_pool_are_updated_in_place():
  """The compiled loop does not copy the pool of 23 networks inside its body."""
  arch = kipcore.fc(1)
  method = kipcore.frepo(kipcore.network(arch, 8, 2), kipcore.FRePoOptions(pool_size=23))
  distiller = kipcore.Distiller(method, kipcore.sampler("uniform"), optax.adam(0.1), 10)
  programs = []
  kipcore.distill(
    0, distiller, *problem(), 0, compiled=lambda program: programs.append(program.as_text())
  )
  computations = re.split(r"\n(?=\S)", programs[0])
  bodies = [c for c in computations if "f32[23," in c and not c.startswith("ENTRY")]
  assert any("dynamic-update-slice" in c and "f32[23,3,8]" in c for c in bodies)
  copies = [
    line.strip()
    for body in bodies
    for line in body.splitlines()
    if re.search(r"= f32\[23,\d+(,\d+)?\]\S* (copy|select)\(", line)
  ]
  assert not copies, copies


@pytest.mark.parametrize("rate", slow_except([1e38, np.inf, -np.inf, np.nan], 1e38, np.nan))
@pytest.mark.parametrize("checkpointed", [False, True])
def test_extreme_rates_name_the_step_and_keep_the_state_before_it(rate, checkpointed):
  support, x, y = problem()
  snapshots = []
  policy = kipcore.CheckpointPolicy(snapshots.append, 1e9) if checkpointed else None
  distiller = kipcore.Distiller(
    kipcore.kip(KERNEL, kipcore.KIPOptions(1e-3)), kipcore.sampler("uniform"), optax.sgd(rate), 20
  )
  with pytest.raises(kipcore.NumericalError, match=r"distillation at step \d+ failed \(NOT_FINITE"):
    loop.distill(0, distiller, support, x, y, 10, checkpoint_policy=policy)
  assert all(np.isfinite(leaf).all() for s in snapshots for leaf in s.arrays[:3])
  assert len(snapshots) == checkpointed
