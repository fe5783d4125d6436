"""Malformed files and settings for `fuzz`: small valid ones and strategies that corrupt them."""

import copy
import io
import json
import pickle
import warnings
import zipfile

import numpy as np
from hypothesis import strategies as st

# Numbers that often break length fields, shapes and counts.
_NASTY = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


# --- bytes ---


@st.composite
def spoiled(draw, content: bytes) -> bytes:
  """Content with bytes flipped, removed, repeated or inserted, or a field set to a bad number."""
  out = bytearray(content)
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, max(len(out) - 1, 0)))
    kind = draw(st.sampled_from(("flip", "set", "field", "cut", "insert", "repeat", "end")))
    if kind == "flip" and out:
      out[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "set" and out:
      out[at] = draw(st.integers(0, 255))
    elif kind == "field":
      size = draw(st.sampled_from((2, 4, 8)))
      out[at : at + size] = (draw(st.sampled_from(_NASTY)) % 2 ** (8 * size)).to_bytes(
        size, "little"
      )
    elif kind == "cut":
      del out[at : at + draw(st.integers(1, 40))]
    elif kind == "insert":
      out[at:at] = draw(st.binary(min_size=1, max_size=12))
    elif kind == "repeat":
      out[at:at] = out[at : at + draw(st.integers(1, 200))]
    elif draw(st.booleans()):
      del out[at:]
  return bytes(out)


@st.composite
def spoiled_archive(draw, content: bytes) -> bytes:
  """A corrupt zip archive, or one with valid checksums but corrupt, renamed or missing members."""
  if draw(st.integers(0, 3)) == 0:
    return draw(spoiled(content))
  out = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(content)) as old,
    zipfile.ZipFile(out, "w", draw(st.sampled_from((0, 0, 8, 12)))) as new,
  ):
    chosen = draw(st.sets(st.sampled_from(old.namelist()), min_size=1, max_size=2))
    for name in old.namelist():
      data = old.read(name)
      kind = (
        draw(st.sampled_from(("spoil", "spoil", "spoil", "rename", "drop")))
        if name in chosen
        else ""
      )
      if kind != "drop":
        _add(
          new,
          name if kind != "rename" else draw(_names),
          draw(spoiled(data)) if kind == "spoil" else data,
        )
  return out.getvalue()


def _add(archive, name, content) -> None:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about a duplicate name
    archive.writestr(name, content)


_names = st.one_of(
  st.sampled_from(
    (
      "../x.npy",
      "/x.npy",
      "x_train",
      "images.npy",
      "a\\..\\b.npy",
      "metadata.npy",
      ".npy",
      "data.pkl",
    )
  ),
  st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
)
_headers = st.builds(
  "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}".format,
  st.sampled_from(
    (
      "'<f4'",
      "'|u1'",
      "'|O'",
      "'|S0'",
      "'<U1000000000'",
      "'<c8'",
      "[('a', '|O')]",
      "'<f16'",
      "'>i8'",
      "'<M8[s]'",
      "'|V8'",
      "3",
      "'x'",
      "{}",
      "()",
    )
  ),
  st.sampled_from(("False", "True", "0", "None")),
  st.one_of(
    st.lists(st.sampled_from((*_NASTY, -1, 3)), max_size=4).map(lambda shape: str(tuple(shape))),
    st.sampled_from(
      (
        "3",
        "(3.0,)",
        "(True,)",
        "((3,),)",
        "(3L,)",
        "-" * 3000 + "1",
        "(" * 150 + ")" * 150,
        "(3,) * 9",
      )
    ),
  ),
)


@st.composite
def odd_archive(draw) -> bytes:
  """An `.npz` file with unusual headers, names, compressions and declared sizes."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", draw(st.sampled_from((0, 8, 8, 12, 14)))) as archive:
    for name in draw(
      st.lists(
        st.one_of(st.sampled_from(("x_train.npy", "images.npy")), _names), max_size=3, unique=True
      )
    ):
      text = draw(_headers).encode() + b"\n"
      version = draw(st.sampled_from((1, 1, 1, 2, 3, 0)))
      length = draw(st.sampled_from((len(text), len(text), len(text), *_NASTY))) % 2 ** (
        16 if version < 2 else 32
      )
      body = bytes(draw(st.sampled_from((0, 1, 12, 12, 1000, 2**20))))
      _add(
        archive,
        name,
        b"\x93NUMPY"
        + bytes((version, 0))
        + length.to_bytes(2 if version < 2 else 4, "little")
        + text
        + body,
      )
  return draw(spoiled(out.getvalue())) if draw(st.booleans()) else out.getvalue()


# --- values ---

values = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from((0, -1, 10**400, "ntk", "nan", [], {}, float("nan"), float("inf"))),
  ),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
  ),
  max_leaves=6,
)


@st.composite
def changed(draw, good):
  """A JSON value in which one or two parts are replaced or missing."""
  out = copy.deepcopy(good)
  for _ in range(draw(st.integers(1, 2))):
    parent, key, here = None, None, out
    while isinstance(here, (dict, list)) and here and (parent is None or draw(st.integers(0, 3))):
      parent, key = (
        here,
        draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here)))),
      )
      here = here[key]
    if parent is None:
      return draw(values)
    if draw(st.integers(0, 4)) == 0:
      del parent[key]
    else:
      parent[key] = draw(values)
  return out


@st.composite
def arrays(draw, like: np.ndarray | None = None) -> np.ndarray:
  """An array that shares some of shape, dtype and content with `like`, or any array."""
  near = like is not None and draw(st.integers(0, 3)) > 0
  shape = draw(st.lists(st.sampled_from((0, 1, 2, 3, 4, 12)), max_size=4).map(tuple))
  if near:
    others = (like.shape[1:], (*like.shape, 1), (0, *like.shape[1:]), like.shape[::-1])
    shape = like.shape if draw(st.booleans()) else draw(st.sampled_from(others))
  dtype = np.dtype(
    draw(
      st.sampled_from(
        (
          "f4",
          "f8",
          "f2",
          "f16",
          "u1",
          "u2",
          "i4",
          "i8",
          "u8",
          "?",
          "U3",
          "S3",
          "O",
          "c8",
          "M8[s]",
          "V3",
          ">f4",
          ">i2",
        )
      )
    )
  )
  if near and draw(st.booleans()):
    dtype = like.dtype
  if near and shape == like.shape and dtype == like.dtype:
    out = like.copy()
  else:
    out = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    out = (
      np.zeros(shape, dtype)
      if dtype.kind in "MV"
      else np.asarray(out % draw(st.sampled_from((1, 2, 3, 200)))).astype(dtype)
    )
  if out.size and dtype.kind in "fiu" and draw(st.booleans()):
    odd = [-1, 0, 7, 2**31 - 1, 10**6] + (
      [np.nan, np.inf, -np.inf, 1e300, 1e-300, 0.5] if dtype.kind == "f" else []
    )
    with np.errstate(all="ignore"):
      out.flat[draw(st.integers(0, out.size - 1))] = np.array(draw(st.sampled_from(odd))).astype(
        dtype
      )
  return out


@st.composite
def changed_arrays(draw, good: dict) -> dict:
  """Arrays by name, some of them replaced, missing or renamed."""
  out = dict(good)
  for name in draw(st.sets(st.sampled_from(sorted(good)), min_size=1, max_size=2)):
    kind = draw(st.sampled_from(("other", "other", "other", "drop", "rename")))
    old = out.pop(name)
    if kind == "other":
      out[name] = draw(arrays(np.asarray(old)))
    elif kind == "rename":
      out[draw(st.sampled_from(("label", "image", "k", "jit", "extra")))] = old
  return out


# --- small valid files ---


def npz_bytes(content: dict) -> bytes:
  """The bytes of `np.savez`."""
  out = io.BytesIO()
  np.savez(out, **content)
  return out.getvalue()


def dataset_arrays() -> dict:
  """A dataset of 12 training and 6 test images in three classes."""
  rng = np.random.default_rng(0)
  return {
    "x_train": rng.integers(0, 256, (12, 4, 4, 1)).astype(np.uint8),
    "y_train": np.arange(12) % 3,
    "x_test": rng.integers(0, 256, (6, 4, 4, 1)).astype(np.uint8),
    "y_test": np.arange(6) % 3,
  }


def published_sets() -> dict:
  """Valid published sets: file name -> dict for `.npz` or Flax."""
  rng = np.random.default_rng(0)
  images, labels = (
    rng.normal(size=(4, 4, 4, 3)).astype(np.float32),
    (np.eye(4) - 0.25).astype(np.float32),
  )
  params = {"x_proto": images, "y_proto": labels, "log_temp": np.float32(0.5)}
  return {
    "zca_4.npz": {"images": images, "labels": labels},
    "frepo.npz": {"image": images, "label": labels},
    "best.npz": {
      "images": images.transpose(0, 3, 1, 2),
      "labels": labels,
      "k": np.float64(2.0),
      "jit": np.float64(5e-3),
    },
    "checkpoint_7": {"step": 7, "params": params, "ema_average": params},
  }


def flax_bytes(content) -> bytes:
  """The bytes of a Flax checkpoint."""
  from flax import serialization

  return serialization.msgpack_serialize(content)


def torch_bytes(layout: bytes | None = None) -> bytes:
  """A `torch.save` file with the given pickle, by default a "dc" set of two images."""

  def name(module, what):
    return f"c{module}\n{what}\n".encode()

  def const(value):
    return pickle.dumps(value, 2)[2:-1]

  def tensor(key, kind, count, size, stride):
    storage = (
      b"("
      + const("storage")
      + name("torch", kind)
      + const(key)
      + const("cpu")
      + const(count)
      + b"tQ"
    )
    args = (
      b"("
      + storage
      + const(0)
      + const(size)
      + const(stride)
      + const(False)
      + name("collections", "OrderedDict")
      + b")Rt"
    )
    return name("torch._utils", "_rebuild_tensor_v2") + args + b"R"

  pair = (
    b"]("
    + tensor("0", "FloatStorage", 24, (2, 3, 2, 2), (12, 4, 2, 1))
    + tensor("1", "LongStorage", 2, (2,), (1,))
    + b"e"
  )
  layout = b"\x80\x02}" + const("data") + b"](" + pair + b"es." if layout is None else layout
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    numbers = {
      "data/0": np.arange(24, dtype="<f4").tobytes(),
      "data/1": np.arange(2, dtype="<i8").tobytes(),
    }
    for member, data in {"data.pkl": layout, **numbers}.items():
      archive.writestr(f"archive/{member}", data)
  return out.getvalue()


def torch_layout() -> bytes:
  """The pickle in `torch_bytes`."""
  with zipfile.ZipFile(io.BytesIO(torch_bytes())) as archive:
    return archive.read("archive/data.pkl")


def json_bytes(value) -> bytes:
  """JSON text as Python writes it, including NaN and Infinity."""
  return json.dumps(value).encode()


# --- settings ---

_WORDS = st.one_of(
  st.sampled_from(
    (
      "",
      "fc1",
      "fc0",
      "fc99",
      "conv3",
      "conv9",
      "conv3_vec_gelu",
      "myrtle5",
      "uniform",
      "kmeans",
      "auto",
      "cross_entropy",
      "margin",
      "adam",
      "sgd",
      "lamb",
      "mse",
      "cosine",
      "constant",
      "kip",
      "dm",
      "frepo",
      "rcig",
      "rfad",
      "mtt",
      "label_solve",
      "krr_closed_form",
      "zca",
      "none",
      "pool_size=3",
      "augmentation=mixup",
      "num_networks=nan",
      "a=b=c",
      "=,=",
      "bfloat16",
      "cpu",
      "published",
      "../..",
      "\n",
      "nngp",
    )
  ),
  st.text(max_size=6),
)
_NUMBERS = st.one_of(
  st.integers(-3, 3), st.sampled_from((10**3, 2**31, 2**63, 2**70, -(2**70))), st.integers()
)
# Values at and just beyond the limits of float32 and float64: 0, denormals, the largest numbers,
# infinity and NaN.
_EXTREMES = (
  0.0,
  -0.0,
  -1.0,
  5e-324,
  1e-300,
  1e-46,
  1e-45,
  1e-38,
  1.0,
  1e9,
  1e38,
  3.4e38,
  1e39,
  1e300,
  1.7e308,
)
_EXTREMES += (float("inf"), float("-inf"), float("nan"))


@st.composite
def extreme_settings(draw, kind: type) -> dict:
  """One or two real-valued fields of a config at extreme values; not the time that a run must take."""
  import dataclasses

  real = (field.name for field in dataclasses.fields(kind) if isinstance(field.default, float))
  names = sorted(name for name in real if name != "minutes")
  chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
  return {name: draw(st.sampled_from(_EXTREMES)) for name in chosen}


@st.composite
def settings_of(draw, kind: type) -> dict:
  """Some fields of a config, each with the type of its default."""
  import dataclasses

  fields = {
    field.name: field.default
    for field in dataclasses.fields(kind)
    if field.name not in ("dataset", "data_dir", "experts")
  }
  out = {}
  for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4, unique=True)):
    default = fields[name]
    if isinstance(default, bool):
      out[name] = draw(st.booleans())
    elif isinstance(default, int):
      out[name] = draw(_NUMBERS)
    elif isinstance(default, float):
      out[name] = draw(st.one_of(st.floats(), st.sampled_from(_EXTREMES)))
    elif isinstance(default, tuple):
      out[name] = tuple(draw(st.lists(_WORDS, max_size=3)))
    else:
      out[name] = draw(_WORDS)
  return out
