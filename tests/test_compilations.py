"""Public functions compile once per shape: a call with equal kernels and new data is cached."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import slow_except, standard_promotion

import kipcore
from kipcore.kernels import StaxKernel, finite
from kipcore.kernels.stax import to_stax

COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
  """A list that gets one entry per program compiled within the context."""
  found = []

  def listen(event, duration, **_):
    if event == COMPILATION:
      found.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def rows(seed, n=12, shape=(5,)):
  return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def images(seed, n=6):
  return jnp.asarray(rows(seed, n, (8, 8, 1)))


def problem(seed):
  """Support, rows and labels, as JAX arrays."""
  x, y = jnp.asarray(rows(seed)), jnp.asarray(rows(seed + 1, shape=(3,)))
  return kipcore.Support(x[:4], y[:4]), x, y


class Unhashable:
  """A kernel of a user that compares by value but cannot be hashed."""

  __hash__ = None

  def __init__(self):
    self.fn = kipcore.rbf_fn(1.0)

  def __eq__(self, other):
    return isinstance(other, Unhashable)

  def __call__(self, x1, x2=None):
    return self.fn(x1, x2)


UNHASHABLE, USER_KERNEL = Unhashable(), lambda x1, x2=None: kipcore.rbf_fn(2.0)(x1, x2)
STAX = to_stax(kipcore.fc(1))[2]
MODULE = kipcore.network(kipcore.fc(1), 8, 3)
VARIABLES = MODULE.init(jax.random.key(0), np.zeros((1, 5), np.float32))
KERNELS = {
  "ntk": lambda: kipcore.ntk_fn(kipcore.fc(2)),
  "rbf": lambda: kipcore.rbf_fn(1.0),
  "stax": lambda: kipcore.from_stax(STAX),
  "function": lambda: USER_KERNEL,
  "unhashable": lambda: UNHASHABLE,
}


def calls_of(kernel):
  """Calls of every function that takes a kernel, each with a new kernel and the data of a seed."""
  return {
    "call": lambda seed: kernel()(jnp.asarray(rows(seed)), jnp.asarray(rows(seed, 3))),
    "call with itself": lambda seed: kernel()(jnp.asarray(rows(seed))),
    "diag": lambda seed: kernel().diag(jnp.asarray(rows(seed))),
    "gram": lambda seed: kipcore.gram(kernel(), rows(seed), rows(seed, 3)),
    "gram with itself, blocks": lambda seed: kipcore.gram(kernel(), rows(seed), None, 5),
    "gram on devices": lambda seed: kipcore.gram(
      kernel(), rows(seed), rows(seed, 3), None, jax.devices()[:2]
    ),
    "gram_diag": lambda seed: kipcore.gram_diag(kernel(), rows(seed)),
    "gram_diag, blocks": lambda seed: kipcore.gram_diag(kernel(), rows(seed), 5),
    "gram_matvec": lambda seed: kipcore.gram_matvec(kernel(), rows(seed), rows(1, 3), rows(2, 3)),
    "gram_matvec, blocks": lambda seed: kipcore.gram_matvec(
      kernel(), rows(seed), rows(1, 3), rows(2, 3), 5
    ),
    "label_solve_rows": lambda seed: kipcore.label_solve_rows(
      kernel(), problem(seed)[0].x, *problem(seed)[1:], 0.1 + seed, block_size=5
    ),
    "evaluate_krr": lambda seed: kipcore.evaluate_krr(
      kernel(), *problem(seed), relative_ridge=0.1 + seed, block_size=5
    ),
    "evaluate_krr, absolute": lambda seed: kipcore.evaluate_krr(
      kernel(), *problem(seed), ridge=0.1 + seed
    ),
  }


def kernel_cases():
  for name, kernel in KERNELS.items():
    for call in calls_of(kernel):
      if name in ("function", "unhashable") and call.startswith(("call", "diag")):
        continue  # a user function runs unjitted
      further = name in ("stax", "unhashable") and call != "gram"
      marks = pytest.mark.slow if further else ()
      yield pytest.param(name, call, id=f"{name}-{call}", marks=marks)


OTHERS = {
  "methods": lambda seed: method_calls(seed),
  "convolutional kernel": lambda seed: kipcore.ntk_fn(kipcore.conv_net(2))(
    images(seed), images(seed)[:3]
  ),
  "convolutional diag": lambda seed: kipcore.ntk_fn(kipcore.conv_net(2)).diag(images(seed)),
  "empirical_ntk, whole": lambda seed: finite.empirical_ntk(
    MODULE.apply, MODULE.init(jax.random.key(0), rows(0)), jnp.asarray(rows(seed))
  ),
  "apply a preprocess": lambda seed: PREPROCESS.apply(jnp.asarray(rows(seed))),
  "invert a preprocess": lambda seed: PREPROCESS.invert(jnp.asarray(rows(seed))),
}
PREPROCESS = kipcore.fit_preprocess(rows(0), "zca")


def gram(seed):
  return kipcore.rbf_fn(1.0)(jnp.asarray(rows(seed)))


def fit(seed):
  return kipcore.krr_fit(gram(seed), jnp.asarray(rows(seed)), 0.5)


# --- Every public function, called twice with equal shapes and other values ---

RIDGE = 0.5
LABELS = np.arange(12) % 3
ROWS_KERNEL = kipcore.rbf_fn(1.5)
ONE_HOT = jnp.asarray(np.eye(3, dtype=np.float32)[LABELS] - 1 / 3)


def x_of(seed):
  return jnp.asarray(rows(seed)) + ONE_HOT @ jnp.ones((3, 5)) * 0


def scores_of(seed):
  return jnp.asarray(np.abs(rows(seed)).sum(axis=1))


def coreset_of(seed):
  return kipcore.Coreset(
    x_of(seed)[:4], ONE_HOT[:4], np.arange(4, dtype=np.int32), jnp.full((4,), 3.0 + seed), "uniform"
  )


def parameters_of(seed):
  """The flat parameters of `MODULE`."""
  variables = MODULE.init(jax.random.key(seed), x_of(0))
  return jax.flatten_util.ravel_pytree(variables["params"])[0]


def sampler_calls(seed):
  """`init`, `draw` and `update` of samplers, each made anew."""
  counts, out = jnp.asarray([4, 4, 4], jnp.int32), []
  for name in ("uniform", "class_balanced", "cross_entropy"):
    sampler = kipcore.sampler(name)
    state = sampler.init(counts, 12)
    indices, weights = sampler.draw(jax.random.key(seed), state, 4)
    info = kipcore.LossInfo(weights, ONE_HOT[:4] + 0.1 * seed, jnp.float32(0), jnp.int32(0))
    state = sampler.update(state, indices, ONE_HOT[:4], info)
    out += [weights, state, sampler.metrics(state), sampler.scores(state)]
  return [leaf for leaf in jax.tree.leaves(out)]


@functools.cache
def distiller():
  """One object, because optax optimizers are equal only to themselves."""
  return kipcore.Distiller(
    kipcore.kip(ROWS_KERNEL, kipcore.KIPOptions(relative_ridge=1e-2)),
    kipcore.sampler("uniform"),
    optax.sgd(0.1),
    4,
  )


class UserLinen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x)


class UserNNX(nnx.Module):
  def __init__(self, *, rngs):
    self.readout = nnx.Linear(5, 3, rngs=rngs)

  def features(self, x):
    return x

  def __call__(self, x):
    return self.readout(x)


def user_init(key, x):
  return jax.random.normal(key, (5, 3))


def user_apply(w, x):
  return x @ w


def user_features(network, x):
  return x


def method_calls(seed):
  """The functions of a method with blocks and of some with networks, each made anew."""
  batch, out = kipcore.Batch(x_of(seed), ONE_HOT), []
  for method in (
    kipcore.kip(kipcore.rbf_fn(1.0 + seed), kipcore.KIPOptions(block_size=5)),
    kipcore.dm(MODULE, kipcore.DMOptions(augmentation="")),
    kipcore.dm(UserNNX, kipcore.DMOptions(augmentation="")),
    kipcore.dm(kipcore.as_network(UserLinen(), user_features), kipcore.DMOptions(augmentation="")),
    kipcore.dm(
      kipcore.as_network((user_init, user_apply), user_features), kipcore.DMOptions(augmentation="")
    ),
  ):
    params = method.init_params(kipcore.Support(x_of(seed)[:3], ONE_HOT[:3]))
    aux = method.init_aux(jax.random.key(seed), params)
    aux = method.update_aux(jax.random.key(seed), params, aux, jnp.int32(seed))
    out.append(method.loss(params, aux, batch, jnp.ones(12), jax.random.key(seed)))
  return out


def targets_of(seed):
  return jax.tree.map(lambda a: jnp.asarray(a[0]), kipcore.arrange_targets(x_of(seed), ONE_HOT))


def state_of(seed):
  targets = targets_of(seed)
  support = kipcore.Support(x_of(seed)[:3], ONE_HOT[:3])
  return kipcore.distill_init(seed, distiller(), support, targets.class_counts, 12)


def map_of(seed):
  return kipcore.draw_map(seed, "fcnn", 5)


PUBLIC = {
  "absorb_weights": lambda seed: kipcore.absorb_weights(
    ROWS_KERNEL, coreset_of(seed), RIDGE + seed, RIDGE
  ),
  "absorb_weights, scale": lambda seed: kipcore.absorb_weights(
    kipcore.linear_fn(), coreset_of(seed), RIDGE + seed, RIDGE, "scale"
  ),
  "approximate_krr_sensitivities": lambda seed: kipcore.approximate_krr_sensitivities(
    seed, ROWS_KERNEL, x_of(seed), ONE_HOT, RIDGE + seed, 4, block_size=5
  ),
  "arrange_targets": lambda seed: kipcore.arrange_targets(rows(seed), np.asarray(ONE_HOT)),
  "as_network": lambda seed: kipcore.evaluate_network(
    seed, kipcore.as_network(UserNNX), *problem(seed), 1, num_steps=2
  ),
  "auto_candidates": lambda seed: list(
    kipcore.auto_candidates(seed, x_of(seed), ONE_HOT, 2, ROWS_KERNEL, 8)
  ),
  "blocked_krr_sensitivities": lambda seed: kipcore.blocked_krr_sensitivities(
    ROWS_KERNEL, x_of(seed), ONE_HOT, RIDGE + seed, LABELS
  ),
  "choose_expert": lambda seed: (
    kipcore.choose_expert(
      seed,
      MODULE,
      jnp.stack([parameters_of(seed), parameters_of(1)]),
      x_of(seed)[:3],
      x_of(seed),
      ONE_HOT,
      width=4,
      num_steps=1,
    ).accuracies
  ),
  "class_balanced_indices": lambda seed: kipcore.class_balanced_indices(seed, LABELS, 2, 3),
  "distill": lambda seed: (
    kipcore.distill(seed, distiller(), problem(seed)[0], *problem(seed)[1:], 1).support
  ),
  "distill_init": lambda seed: jax.tree.leaves(state_of(seed).params),
  "distill_step": lambda seed: (
    kipcore.distill_step(seed, distiller(), state_of(seed), targets_of(seed))[0].params
  ),
  "draw_map": lambda seed: map_of(seed).weights,
  "feature_kernel": lambda seed: kipcore.feature_kernel(map_of(seed))(x_of(seed)),
  "effective_dimension": lambda seed: kipcore.effective_dimension(gram(seed), RIDGE + seed),
  "effective_dimension_bounds": lambda seed: kipcore.effective_dimension_bounds(
    seed, ROWS_KERNEL, x_of(seed), RIDGE + seed, 4
  ),
  "empirical_ntk_fn": lambda seed: kipcore.empirical_ntk_fn(
    MODULE.apply, jax.tree.map(lambda leaf: (1.0 + seed) * leaf, VARIABLES)
  )(x_of(seed)),
  "evaluate_krr": lambda seed: kipcore.evaluate_krr(ROWS_KERNEL, *problem(seed), ridge=0.1 + seed),
  "evaluate_network": lambda seed: kipcore.evaluate_network(
    seed, kipcore.fc(1), *problem(seed), num_seeds=1, width=8, num_steps=2, learning_rate=0.1 + seed
  ),
  "evaluation_table": lambda seed: [
    entry.mean
    for entry in kipcore.evaluation_table(
      seed,
      {"set": [problem(seed)[0]]},
      {"krr": kipcore.KernelEvaluator(ROWS_KERNEL, 0.1)},
      *problem(seed)[1:],
      1,
    )
  ],
  "expert_labels": lambda seed: kipcore.expert_labels(
    MODULE, parameters_of(seed), x_of(seed), 1.0 + seed
  ),
  "expert_losses": lambda seed: kipcore.expert_losses(
    MODULE, parameters_of(seed), x_of(seed), ONE_HOT
  ),
  "feature_krr_sensitivities": lambda seed: kipcore.feature_krr_sensitivities(
    x_of(seed), ONE_HOT, RIDGE + seed
  ),
  "feature_leverage_scores": lambda seed: kipcore.feature_leverage_scores(x_of(seed), RIDGE + seed),
  "fit_preprocess": lambda seed: kipcore.fit_preprocess(rows(seed), "zca").apply(rows(seed)),
  "gp_log_likelihood": lambda seed: kipcore.gp_log_likelihood(gram(seed), ONE_HOT, 0.1 + seed),
  "gp_posterior": lambda seed: kipcore.gp_posterior(
    gram(seed), gram(1), gram(2), ONE_HOT, 0.1 + seed
  ),
  "gradient_flow": lambda seed: kipcore.gradient_flow(gram(seed), gram(1), ONE_HOT, 0.1 + seed)[0],
  "gram": lambda seed: kipcore.gram(ROWS_KERNEL, rows(seed), rows(1, 3), 5),
  "gram_diag": lambda seed: kipcore.gram_diag(USER_KERNEL, rows(seed), 5),
  "gram_matvec": lambda seed: kipcore.gram_matvec(ROWS_KERNEL, rows(seed), rows(1, 3), rows(2, 3)),
  "guarantee_at": lambda seed: kipcore.guarantee_at(100 + seed, 3.0, 2.0),
  "gumbel_sample": lambda seed: kipcore.gumbel_sample(seed, scores_of(seed), 4),
  "herding": lambda seed: kipcore.herding(x_of(seed), 4),
  "importance_sample": lambda seed: kipcore.importance_sample(seed, scores_of(seed), 4),
  "k_center": lambda seed: kipcore.k_center(x_of(seed), 4),
  "kernel_herding": lambda seed: kipcore.kernel_herding(ROWS_KERNEL, x_of(seed), 4),
  "kernel_kmeans_plusplus": lambda seed: kipcore.kernel_kmeans_plusplus(
    seed, ROWS_KERNEL, x_of(seed), 3
  ),
  "kernel_thinning": lambda seed: kipcore.kernel_thinning(seed, ROWS_KERNEL, x_of(seed), 3),
  "kmeans": lambda seed: kipcore.kmeans(seed, x_of(seed), 3),
  "kmeans_plusplus": lambda seed: kipcore.kmeans_plusplus(seed, x_of(seed), 3),
  "kmeans_sensitivities": lambda seed: kipcore.kmeans_sensitivities(
    x_of(seed), x_of(seed)[:3], alpha=1.0 + seed
  ),
  "krr_closed_form": lambda seed: kipcore.krr_closed_form(seed, rows(seed), ONE_HOT, 1).support,
  "krr_fit": lambda seed: kipcore.krr_fit(gram(seed), jnp.asarray(rows(seed)), 0.1 + seed),
  "krr_loss": lambda seed: kipcore.krr_loss(fit(seed), gram(seed), rows(seed), np.ones(12, "f4")),
  "krr_predict": lambda seed: kipcore.krr_predict(fit(seed), gram(seed)),
  "krr_pursuit": lambda seed: kipcore.krr_pursuit(
    seed, ROWS_KERNEL, x_of(seed), ONE_HOT, 6, 3, RIDGE + seed, quota=1
  ),
  "krr_sensitivities": lambda seed: kipcore.krr_sensitivities(gram(seed), ONE_HOT, RIDGE + seed),
  "krr_sensitivity_scores": lambda seed: kipcore.krr_sensitivity_scores(
    gram(seed), ONE_HOT, RIDGE + seed, scores_of(seed)
  ),
  "label_distribution": lambda seed: kipcore.label_distribution(ONE_HOT),
  "label_solve": lambda seed: kipcore.label_solve(gram(seed), gram(seed), rows(seed), 0.1 + seed),
  "label_solve_rows": lambda seed: kipcore.label_solve_rows(
    ROWS_KERNEL, x_of(seed)[:4], x_of(seed), ONE_HOT, 0.1 + seed, block_size=5
  ),
  "landmark_leverage_scores": lambda seed: kipcore.landmark_leverage_scores(
    ROWS_KERNEL, x_of(seed), np.arange(4) + seed, RIDGE + seed
  ),
  "landmark_score_ridge": lambda seed: kipcore.landmark_score_ridge(
    seed, ROWS_KERNEL, x_of(seed), 3.0 + 0.1 * seed, 4
  ),
  "lightweight_sensitivities": lambda seed: kipcore.lightweight_sensitivities(x_of(seed)),
  "measure_coreset": lambda seed: (
    kipcore.measure_coreset(
      seed,
      ROWS_KERNEL,
      x_of(seed),
      ONE_HOT,
      RIDGE + seed,
      np.arange(4),
      scores_of(seed)[:4],
      num_landmarks=6,
      num_queries=3,
    ).measured_epsilon
  ),
  "measure_rows": lambda seed: (
    kipcore.measure_rows(
      seed, rows(seed), None, np.arange(4), scores_of(seed)[:4], kernel_fn=ROWS_KERNEL
    ).mmd
  ),
  "measured_objective": lambda seed: kipcore.measured_objective(
    ROWS_KERNEL, coreset_of(seed), x_of(seed), ONE_HOT
  ),
  "merge_duplicates": lambda seed: kipcore.merge_duplicates(
    np.arange(4) % (seed + 2), rows(seed, 4)[:, 0]
  ),
  "nearest_rows": lambda seed: kipcore.nearest_rows(x_of(seed), x_of(seed)[:3]),
  "network": lambda seed: kipcore.network(kipcore.fc(1), 8).init(jax.random.key(seed), rows(seed)),
  "one_hot_centered": lambda seed: kipcore.one_hot_centered(np.arange(5) % (seed + 1), 7),
  "random_augmentation": lambda seed: kipcore.random_augmentation(
    "color_crop_cutout_flip_scale_rotate"
  )(jax.random.key(seed))(images(seed)),
  "random_crops": lambda seed: kipcore.random_crops(seed, images(seed)),
  "random_features": lambda seed: kipcore.random_features(
    MODULE, drawn_networks(jax.random.split(jax.random.key(seed), 2)), x_of(seed)
  ),
  "random_feature_kernel": lambda seed: kipcore.random_feature_kernel(
    MODULE, jnp.asarray(rows(seed)), jnp.asarray(rows(1))
  ),
  "ranking_scores": lambda seed: list(kipcore.ranking_scores(0.5, 0.25, 0.75)),
  "rded": lambda seed: (
    kipcore.rded(seed, rows(seed), np.asarray(ONE_HOT), 1, lambda x, y: jnp.sum(x, axis=1), 3, 1).x
  ),
  "rded, images": lambda seed: (
    kipcore.rded(
      seed, images(seed, 12), np.asarray(ONE_HOT), 1, lambda x, y: jnp.sum(x, axis=(1, 2, 3)), 3, 1
    ).x
  ),
  "relative_ridge": lambda seed: kipcore.relative_ridge(gram(seed), 0.1 + seed),
  "ridge_leverage_scores": lambda seed: kipcore.ridge_leverage_scores(gram(seed), RIDGE + seed),
  "rpcholesky": lambda seed: kipcore.rpcholesky(seed, ROWS_KERNEL, x_of(seed), 4, block_size=2),
  "sample_size": lambda seed: kipcore.sample_size(3.0, 2.0, 0.5, 0.1),
  "sampler": sampler_calls,
  "scaled_to_rows": lambda seed: kipcore.scaled_to_rows(x_of(seed)[:3], x_of(seed)),
  "score_ridge_for_dimension": lambda seed: kipcore.score_ridge_for_dimension(
    gram(seed), 3.0 + 0.1 * seed
  ),
  **{
    f"select_coreset, {strategy}": lambda seed, strategy=strategy: (
      kipcore.select_coreset(
        seed, x_of(seed), ONE_HOT, 2, strategy, ROWS_KERNEL, num_candidates=8
      ).x
    )
    for strategy in kipcore.selection.coreset.STRATEGIES
  },
  **{
    f"select, {strategy}": lambda seed, strategy=strategy: (
      kipcore.select(seed, x_of(seed), ONE_HOT, 6, None, strategy, ROWS_KERNEL).x
    )
    for strategy in ("auto", "leverage", "kernel_herding", "kernel_thinning")
  },
  "stream_select": lambda seed: kipcore.stream_select(seed, x_of(seed), ONE_HOT, 6, block_size=8).x,
  "sensitivity_sample": lambda seed: kipcore.sensitivity_sample(seed, scores_of(seed), 4),
  "sensitivity_sample, distinct": lambda seed: kipcore.sensitivity_sample(
    seed, scores_of(seed), 4, replace=False
  ),
  "stratified_sample": lambda seed: kipcore.stratified_sample(seed, scores_of(seed), LABELS, 6),
  "stream_krr_sensitivities": lambda seed: kipcore.stream_krr_sensitivities(
    seed, ROWS_KERNEL, rows(seed), np.asarray(ONE_HOT), RIDGE + seed, 4, block_size=5
  ),
  "systematic_sample": lambda seed: kipcore.systematic_sample(seed, scores_of(seed), 4),
  "train_expert": lambda seed: kipcore.train_expert(
    seed, MODULE, rows(seed), np.asarray(ONE_HOT), 1, 0.1, 4
  ),
  "tune": lambda seed: (
    kipcore.tune(
      seed,
      kipcore.fc(1),
      *problem(seed),
      learning_rates=(0.1,),
      num_steps=(1,),
      num_seeds=1,
      width=4,
    ).accuracies
  ),
}


@jax.jit
def drawn_networks(keys):
  return jax.vmap(lambda key: MODULE.init(key, jnp.zeros((1, 5))))(keys)


EXEMPT = {
  **dict.fromkeys(
    "architecture combined conv_net dc dm dsa fc frepo from_stax importance kip linear_fn mtt myrtle ncfm nngp_fn ntk_fn "
    "protocol rat_bptt rbf_fn rcig rfad".split(),
    "makes a configuration",
  ),
  **dict.fromkeys(
    "load_artifact load_expert_state load_published load_trajectories read_torch_file save_artifact "
    "save_expert_state save_trajectories".split(),
    "reads or writes a file",
  ),
  "scale_learning_rate": "changes a number of a snapshot on the host",
}


def check(call):
  with standard_promotion():
    with compilations() as first:
      jax.block_until_ready(call(0))
    with compilations() as second:
      jax.block_until_ready(call(1))
  assert not second, f"the second call compiled {len(second)} programs (the first: {len(first)})"


@pytest.mark.parametrize("name, call", list(kernel_cases()))
def test_functions_of_kernels_compile_once(name, call):
  check(calls_of(KERNELS[name])[call])


@pytest.mark.parametrize(
  "name",
  slow_except(
    OTHERS, *(name for name in OTHERS if name not in ("methods", "empirical_ntk, whole"))
  ),
)
def test_other_functions_compile_once(name):
  check(OTHERS[name])


@pytest.mark.parametrize(
  "name", slow_except(PUBLIC, *(name for name in PUBLIC if name != "auto_candidates"))
)
@pytest.mark.filterwarnings("ignore:scores are nearly equal", "ignore:images_per_class")
def test_public_functions_compile_once(name):
  check(PUBLIC[name])


def test_functions_of_methods_are_compiled():
  """Those of KIP call a jitted function, because its kernel may be traced; those of sums call others."""
  classes = {
    cls.__name__: cls for cls in kipcore.Method.__subclasses__() if ".methods." in cls.__module__
  }
  assert {"FRePo", "RCIG", "NCFM"} < set(classes)
  for name, cls in classes.items():
    for function in {"loss", "init_aux", "update_aux"} & set(vars(cls)):
      assert hasattr(vars(cls)[function], "lower") or name in ("KIP", "Combined"), (
        f"{name}.{function}"
      )


def test_every_public_function_is_called_or_exempt():
  functions = {
    name
    for name in kipcore.__all__
    if callable(getattr(kipcore, name)) and not inspect.isclass(getattr(kipcore, name))
  }
  called = {name.partition(",")[0] for name in PUBLIC}
  assert functions == called | set(EXEMPT)
  assert not called & set(EXEMPT)


def test_a_new_shape_and_a_new_kernel_are_counted():
  """The counter works, so the tests above can fail; another value of a number is not a new kernel."""
  counts = []
  for kernel, n in (
    (kipcore.rbf_fn(7.0) * kipcore.linear_fn(), 12),
    (kipcore.rbf_fn(7.0) + kipcore.linear_fn(), 12),
    (kipcore.rbf_fn(8.0) + kipcore.linear_fn(), 12),
    (kipcore.rbf_fn(8.0) + kipcore.linear_fn(), 13),
  ):
    x = jnp.asarray(rows(0, n))
    with compilations() as found:
      kernel(x)
    counts.append(len(found))
  assert counts[0] and counts[1] and not counts[2] and counts[3]


def test_kernels_compare_by_value():
  for name, kernel in KERNELS.items():
    if name not in ("function", "unhashable"):
      assert kernel() == kernel() and hash(kernel()) == hash(kernel()), name
  assert kipcore.rbf_fn(1.0) != kipcore.rbf_fn(2.0)
  assert kipcore.ntk_fn(kipcore.fc(1)) != kipcore.nngp_fn(kipcore.fc(1))
  assert StaxKernel(STAX) != StaxKernel(to_stax(kipcore.fc(1))[2])


def test_gram_matvec_does_not_store_the_matrix():
  """The scratch memory of the default block size is that of a block, forward and backward."""
  n = 8192

  def scratch(fn):
    x, v = jax.ShapeDtypeStruct((n, 4), jnp.float32), jax.ShapeDtypeStruct((n, 2), jnp.float32)
    return jax.jit(fn).lower(x, v).compile().memory_analysis().temp_size_in_bytes

  kernel = kipcore.rbf_fn(1.0)
  product = lambda x, v: kipcore.gram_matvec(kernel, x, x, v)
  assert scratch(product) < n * n * 4 / 2
  assert scratch(jax.grad(lambda x, v: jnp.sum(product(x, v)))) < 2 * n * n * 4


def test_kernels_that_close_over_traced_values_are_differentiable(x64):
  """The derivative by the bandwidth of a user's kernel, outside and inside jit and vmap."""
  x = jnp.asarray(rows(0), jnp.float64)

  def total(bandwidth):
    kernel = lambda x1, x2=None: jnp.exp(
      -jnp.sum((x1[:, None] - (x1 if x2 is None else x2)[None]) ** 2, axis=-1) / bandwidth
    )
    product = kipcore.gram_matvec(kernel, x, x, x, 5)
    return jnp.sum(kipcore.gram(kernel, x, None, 5) ** 2) + jnp.sum(product * x)

  slope = (total(3.0 + 1e-5) - total(3.0 - 1e-5)) / 2e-5
  for gradient in (jax.grad(total), jax.jit(jax.grad(total))):
    np.testing.assert_allclose(gradient(3.0), slope, rtol=1e-7)
  np.testing.assert_allclose(jax.vmap(jax.grad(total))(jnp.array([3.0]))[0], slope, rtol=1e-7)


def test_kernels_map_over_devices():
  """A kernel and `gram` give equal results inside and outside pmap."""
  kernel, x = kipcore.ntk_fn(kipcore.fc(1)), jnp.asarray(rows(0, 8)).reshape(2, 4, 5)
  mapped = jax.pmap(lambda a: kernel(a, x[0]) + kipcore.gram(kernel, a, x[0], 3))(x)
  expected = jnp.stack([2 * kernel(a, x[0]) for a in x])
  np.testing.assert_allclose(mapped, expected, rtol=1e-5)
