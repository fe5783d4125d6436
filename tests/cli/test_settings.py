"""Settings: flags, help and validation from config fields; numeric flags at extreme values."""

import dataclasses
import math
import sys

import numpy as np
import pytest
from absl import flags as absl_flags

from kipcore.cli import config as configs
from kipcore.cli import flags, help_text, recipes
from kipcore.cli.errors import UsageError
from kipcore.cli.runs import selection

KINDS = [
  kind
  for kind in vars(configs).values()
  if dataclasses.is_dataclass(kind) and kind.__module__ == configs.__name__
]
NUMBERS = [
  (kind, name)
  for kind in KINDS
  for name, field in configs.settings(kind).items()
  if configs.type_of(field) in (int, float)
]
SINGLE, DOUBLE = np.finfo(np.float32), np.finfo(np.float64)
EXTREMES = [
  0.0,
  -0.0,
  -1.0,
  5e-324,
  1e-300,
  1e-46,
  float(SINGLE.smallest_subnormal),
  float(SINGLE.tiny),
  float(SINGLE.max),
  1e39,
  1e300,
  float(DOUBLE.max),
  math.inf,
  -math.inf,
  math.nan,
]
INTEGERS = [0, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**40]


@pytest.mark.parametrize("kind, name", NUMBERS, ids=lambda v: getattr(v, "__name__", v))
def test_extreme_numbers_are_in_range_or_refused_with_the_flag(kind, name):
  field = configs.settings(kind)[name]
  low, high = configs.bounds(field)
  values = INTEGERS if configs.type_of(field) is int else EXTREMES
  accepted = []
  for value in values:
    config = dataclasses.replace(kind(), **{name: value})
    text = f"--{name}={value}"
    parser = absl_flags.FlagValues()
    flags.define(parser, kind)
    try:
      configs.validate(config)
      parser(["command", text])
      accepted.append(value)
      assert parser[name].value == value
    except UsageError as error:
      message = f"--{name}: {configs.expectation_error(field, value)}"
      assert str(error) == message and "\n" not in message
      with pytest.raises(absl_flags.Error) as caught:
        parser(["command", text])
      assert flags.flag_error(caught.value) == message
  assert accepted == [value for value in values if low <= value <= high]
  assert all(math.isfinite(value) for value in accepted)
  if configs.type_of(field) is float and low > 0:
    products = [np.float32(value) * np.float32(value) ** 0.25 for value in (low, min(high, 1e30))]
    assert all(np.isfinite(products)) and all(product > 0 for product in products), (
      "a bound leaves room for products in float32"
    )


@pytest.mark.parametrize("text", ["0", "-1", "1e-46", "1e39", "inf", "nan", "many", ""])
def test_the_ridge_of_scores_is_a_number_in_range_or_auto(text):
  with pytest.raises(UsageError, match="^--score_ridge: expected 'auto' or a number"):
    selection.plan(configs.SelectConfig(score_ridge=text))


def test_values_of_another_type_are_refused():
  for wrong in (
    dict(steps=1.5),
    dict(steps=True),
    dict(steps="3"),
    dict(learning_rate="fast"),
    dict(x64=1),
    dict(loss="hinge"),
    dict(dataset=3),
  ):
    ((name, value),) = wrong.items()
    config = configs.DistillConfig()
    object.__setattr__(config, name, value)  # as a JSON file could contain it
    with pytest.raises(UsageError, match=f"^--{name}: expected"):
      configs.validate(config)


def test_a_setting_is_defined_once():
  """A field with `setting` is a flag with its default, is in the help, and reaches the config."""

  @dataclasses.dataclass(frozen=True)
  class Config:
    rate: float = configs.setting(0.5, "A new rate.", configs.DATA, 0.0, 1.0)
    names: tuple[str, ...] = configs.setting(("a", "b"), "New names.", configs.DATA)
    path: str | None = configs.setting(None, "A new path.", configs.OUTPUT)
    own: int = 3

  values = absl_flags.FlagValues()
  flags.define(values, Config)
  values(["command", "--rate=0.25", "--names=c"])
  assert configs.from_flags(Config, values) == Config(0.25, ("c",), None)
  assert configs.given_flags(Config, values) == {"rate": 0.25, "names": ["c"]}
  groups = help_text.groups(configs.settings(Config))
  assert groups == [(configs.DATA, ["rate", "names"]), (configs.OUTPUT, ["path"])]
  text = help_text.of(sys.modules[__name__], values, groups)
  assert "--rate=X" in text and "A new rate. Default: 0.5." in text and "--own" not in text


def test_every_setting_has_a_valid_default_and_a_sentence_of_help():
  for kind in KINDS:
    configs.validate(kind())
    for name, field in configs.settings(kind).items():
      text = field.metadata["help"]
      assert field.metadata["group"] in configs.GROUPS, name
      assert text and not text[:1].isspace() and text.endswith((".", "all")), name


def test_methods_have_valid_settings():
  for method in recipes.METHODS:
    for preset in recipes.PRESETS:
      configs.validate(recipes.resolve(method=method, preset=preset))


@pytest.mark.parametrize(
  "given, lines",
  [
    (
      dict(method="krr_closed_form", steps=3, learning_rate=0.1),
      ["note: --steps, --learning_rate have no effect with --method=krr_closed_form"],
    ),
    (
      dict(sampler="uniform", uniform_mix=0.1),
      ["note: --uniform_mix has no effect with --sampler=uniform"],
    ),
    (dict(experts="a.npy"), ["note: --experts has no effect with --method=kip"]),
    (
      dict(method="dm", learn_labels=True),
      ["note: --learn_labels has no effect with --method=dm, whose labels are the classes"],
    ),
    (dict(width=3), ["note: --width has no effect with --method=kip and --network_seeds=0"]),
    (dict(width=3, network_seeds=1, network_steps=5, steps=3, loss="mse"), []),
  ],
)
def test_flags_without_effect_are_reported(given, lines):
  assert recipes.unused(recipes.resolve(**{"method": "kip", **given}), given) == lines


def test_options_must_be_finite():
  with pytest.raises(UsageError, match="--options: expected relative_ridge to be a finite number"):
    recipes.options_of(recipes.resolve(method="frepo", options="relative_ridge=nan"))
