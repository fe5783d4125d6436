"""File formats of the publishers of distilled sets, and conventions that the files do not record.

One function per publisher maps the content of a file to `Stored`. It raises ValueError if the
content does not have the publisher's format.
"""

import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kipcore import checks, preprocess
from kipcore.io import formation, image_sets, torch_files

# The file forms of each publisher.
FORMS = {
  "kip": (".npz",),
  "rfad": (".npz",),
  "frepo": (".npz", "Flax"),
  "rcig": ("Flax",),
  "dc": ("torch",),
  "mtt": ("torch",),
  "datm": ("torch",),
  "idc": ("torch",),
  "dream": ("torch",),
  "ncfm": ("torch",),
  "cim": ("torch",),
  "rded": ("folder",),
  "sre2l": ("folder",),
}
KINDS = tuple(FORMS)
# File names of sets that are pairs of images and labels, as the code of each publisher writes them.
_PAIR_FILES = {"idc": r"data", "dream": r"data\d+", "ncfm": r"data_(\d+|init)"}
# Names of the images and the labels in dictionaries.
_IMAGE_NAMES = ("data", "images", "image", "image_syn", "x")
_LABEL_NAMES = ("label", "labels", "targets", "label_syn", "y")
# RCIG distilled its larger sets (from 1,000 images of 64 x 64 pixels) without mirror images.
_MOST_MIRRORED_PIXELS = 2**21


class Stored(NamedTuple):
  """A set as stored in the file, but with labels in the convention of kipcore.

  `layout` is "NHWC" or "NCHW"; the other fields are those of `PublishedSet`.
  """

  images: Any
  layout: str
  labels: np.ndarray
  labels_note: str
  preprocess: str | None
  preprocess_note: str
  mirrored: bool = False
  relative_ridge: float | None = None
  log_temperature: float | None = None
  source: dict[str, Any] = {}
  pixels: bool = False


class Options(NamedTuple):
  """What the caller says about a file; the arguments of `load_published`."""

  experiment: int = 0
  factor: int | None = None
  decoding: str | None = None
  labels: Any = None


def guess(form, content, path) -> str:
  """Infers the kind of a file; ValueError if it is ambiguous."""
  names = set(content) if isinstance(content, dict) else set()
  if form == "torch":
    if isinstance(content, dict) and isinstance(content.get("data"), (list, tuple)):
      return "dc"
    if {"dataset", "data", "label"} <= names:
      return "cim"
    if isinstance(content, np.ndarray) and content.ndim == 4:
      return "datm" if _has_soft_labels(path) else "mtt"
    if isinstance(content, (list, tuple)) and len(content) == 2:
      for kind, pattern in _PAIR_FILES.items():
        if re.fullmatch(pattern, path.stem):
          return kind
  elif form == "folder":
    if content.kind:
      return content.kind
  elif form == "Flax":
    params = content.get("params")
    if isinstance(params, dict) and {"x_proto", "y_proto"} <= set(params):
      return "rcig" if "log_temp" in params else "frepo"
  elif {"image", "label"} <= names:
    return "frepo"
  elif {"images", "labels", "metadata"} <= names:
    raise ValueError(
      "expected a set of other authors, got an artifact of kipcore; use load_artifact"
    )
  elif {"images", "labels"} <= names:
    if "k" in names or "jit" in names:
      return "rfad"
    shape = content["images"].shape
    if len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3):
      return "kip"
  raise ValueError(
    f"expected a set of recognizable kind, got a {form}{' file' * (form != 'folder')} {describe(content)}; pass kind, one "
    f"of {', '.join(kind for kind in KINDS if form in FORMS[kind])}"
  )


def describe(content) -> str:
  """A description of the content for error messages."""
  if isinstance(content, dict):
    return f"with {', '.join(str(name)[:20] for name in list(content)[:8]) or 'nothing'}"
  if isinstance(content, image_sets.Folder):
    return f"with {len(content.images)} images of {content.classes[-1] + 1} classes"
  return (
    f"with an array of shape {content.shape}"
    if isinstance(content, np.ndarray)
    else f"with a {type(content).__name__}"
  )


def _kip(path, content, _):
  words = path.stem.split("_")
  whitened = {"zca": True, "nozca": False}.get(
    next((word for word in words if word in ("zca", "nozca")), None)
  )
  recipe = {True: "zca_kip", False: "standardize", None: None}[whitened]
  note = (
    f"the file name {path.name} is that of a KIP set {'with' if whitened else 'without'} ZCA"
    if recipe
    else "KIP's files do not record it: zca_kip for file names with zca, standardize for nozca"
  )
  labels, labels_note = _centered(_get(content, "labels"))
  return Stored(_get(content, "images"), "NHWC", labels, labels_note, recipe, note)


def _rfad(path, content, _):
  images, k, jit = _get(content, "images"), content.get("k"), content.get("jit")
  shape = getattr(images, "shape", ())
  whitened = len(shape) == 4 and shape[1] == 3 and shape[2] <= 32
  note = (
    "RFAD whitens CIFAR, the dataset of its published sets; SVHN images are first normalized to "
    "mean 0 and norm 1"
    if whitened
    else "RFAD only standardizes gray images and faces"
  )
  labels, labels_note = _centered(_get(content, "labels"))
  extra = {
    name: _number(name, content[name]) for name in ("valid_loss", "best_iter") if name in content
  }
  return Stored(
    images,
    "NCHW",
    labels,
    labels_note,
    "zca_rfad" if whitened else "standardize",
    note,
    relative_ridge=None if jit is None else _number("jit", jit),
    log_temperature=None if k is None else _number("k", k),
    source=extra,
  )


def _channels_last(images) -> int:
  """Number of channels of NHWC images; 0 for other arrays, which `load_published` rejects later."""
  return images.shape[3] if getattr(images, "ndim", 0) == 4 else 0


def _proto_recipe(images):
  """The preprocessing of FRePo and RCIG, which share its code, and a note."""
  if _channels_last(images) == 1:
    return "standardize", "gray images are only standardized"
  if _channels_last(images) and images.shape[1] > 64:
    return (
      None,
      "images of 128 pixels were whitened in interleaved blocks of 64, which kipcore "
      "does not support",
    )
  return "zca", "RGB images of up to 64 pixels are standardized, centered and whitened"


def _frepo(path, content, _):
  if "image" in content or "label" in content:
    params, extra = {"x_proto": content.get("image"), "y_proto": content.get("label")}, {}
  else:
    params, extra = _get(content, "params"), {"step": int(_number("step", content.get("step", 0)))}
  images, labels = _get(params, "x_proto", "image"), _soft_labels(_get(params, "y_proto", "label"))
  scale = math.sqrt(labels.shape[1] / 10)
  if _is_one_hot(scale * labels, centered=True):
    labels, labels_note = (
      scale * labels,
      f"stored as (one-hot minus 1/c) / sqrt(c / 10), not learned: multiplied by {scale:g}",
    )
  else:
    labels, labels_note = _centered(labels)
    labels_note += (
      "; they were initialized divided by sqrt(c / 10), but learned against undivided targets"
    )
  recipe, note = _proto_recipe(images)
  # FRePo evaluates all its RGB sets with mirror images, even the largest, distilled without them.
  return Stored(
    images,
    "NHWC",
    labels,
    labels_note,
    recipe,
    note,
    mirrored=_channels_last(images) == 3,
    source=extra,
  )


def _rcig(path, content, _):
  result = _get(content, "ema_average")
  images, labels = _get(result, "x_proto"), _get(result, "y_proto")
  labels, labels_note = _centered(labels)
  recipe, note = _proto_recipe(images)
  mirrored = _channels_last(images) == 3 and images[..., 0].size <= _MOST_MIRRORED_PIXELS
  step = int(_number("step", content.get("step", 0)))
  return Stored(
    images,
    "NHWC",
    labels,
    labels_note,
    recipe,
    note,
    mirrored,
    log_temperature=_number("log_temp", _get(result, "log_temp")),
    source={"step": step, "part": "ema_average, the result; params is the last iterate"},
  )


def _dc(path, content, options):
  experiment = options.experiment
  data = _get(content, "data")
  if not isinstance(data, (list, tuple)) or not all(
    isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in data
  ):
    raise ValueError(
      "data: expected a list with one pair of images and labels per experiment, got something else"
    )
  if (
    isinstance(experiment, bool)
    or not isinstance(experiment, int)
    or not 0 <= experiment < len(data)
  ):
    raise ValueError(f"experiment: expected an integer in 0..{len(data) - 1}, got {experiment!r}")
  images, labels = data[experiment]
  accuracies = content.get("accs_all_exps")
  if isinstance(accuracies, dict):
    accuracies = {
      str(name): [
        float(a) for a in values if isinstance(a, (int, float, np.floating)) and math.isfinite(a)
      ]
      for name, values in accuracies.items()
      if isinstance(values, list)
    }
  note = (
    "DC, DSA and DM standardize each channel with fixed constants, which fit_preprocess uses; for "
    "CIFAR their deviation is 0.8 times that of the pixels"
  )
  source = {
    "experiment": experiment,
    "experiments": len(data),
    "accuracies_of_all_experiments": accuracies,
  }
  return Stored(images, "NCHW", *_hard_labels(labels), "standardize", note, source=source)


def _mtt(path, content, _):
  stored, beside = _mtt_images("MTT", path, content), _beside(path, "labels")
  if not beside.is_file():
    raise ValueError(f"expected its labels in {beside.name} in the same folder, found no such file")
  labels, note = _hard_labels(torch_files.read_torch_file(beside))
  return stored._replace(labels=labels, labels_note=note, source={"labels_file": beside.name})


def _mtt_images(publisher: str, path, content) -> Stored:
  """The images of MTT or DATM, without labels."""
  if not isinstance(content, np.ndarray) or content.ndim != 4:
    raise ValueError(
      f"expected images (m, channels, height, width), got a torch file {describe(content)}"
    )
  if not path.name.startswith("images_") or path.name.startswith("images_zca_"):
    raise ValueError(
      "expected a file images_NAME.pt with labels_NAME.pt in the same folder (images_zca_NAME.pt "
      f"contains pixels, not network inputs), got {path.name}"
    )
  whitened = any(path.parent.glob("images_zca_*.pt"))
  note = (
    "images_zca_*.pt in the same folder is written only by runs with ZCA"
    if whitened
    else f"{publisher}'s files do not record it: zca_absolute for runs with --zca (CIFAR), else standardize"
  )
  recipe = "zca_absolute" if whitened else None
  return Stored(content, "NCHW", np.empty((0, 0)), "", recipe, note)


def _beside(path, what: str):
  """The file of MTT or DATM with the labels (or "lr": the learning rate) of an images file."""
  return path.with_name(f"{what}_" + path.name.removeprefix("images_"))


def _has_soft_labels(path) -> bool:
  """Whether the labels beside an images file are a matrix, as those of DATM."""
  beside = _beside(path, "labels")
  if not path.name.startswith("images_") or not beside.is_file():
    return False
  return getattr(torch_files.read_torch_file(beside), "ndim", 1) == 2


def _datm(path, content, _):
  beside, rate = _beside(path, "labels"), _beside(path, "lr")
  labels = torch_files.read_torch_file(beside) if beside.is_file() else None
  if getattr(labels, "ndim", 0) != 2:
    raise ValueError(
      f"expected real-valued labels (m, c) in {beside.name} in the same folder, got "
      + ("no such file" if labels is None else describe(labels))
    )
  stored = _mtt_images("DATM", path, content)
  source: dict[str, Any] = {"labels_file": beside.name}
  if rate.is_file():
    source["learning_rate"] = _number("lr", torch_files.read_torch_file(rate))
  note = (
    "stored as logits, which DATM passes through a softmax: converted to probabilities minus 1/c"
  )
  return stored._replace(labels=_probabilities(labels), labels_note=note, source=source)


def _pair(content) -> tuple[Any, Any]:
  """Images and labels of a pair, or of a dictionary with one of the known names for each."""
  if isinstance(content, (list, tuple)) and len(content) == 2:
    return content[0], content[1]
  if isinstance(content, dict):
    images = [name for name in _IMAGE_NAMES if isinstance(content.get(name), np.ndarray)]
    labels = [name for name in _LABEL_NAMES if isinstance(content.get(name), np.ndarray)]
    if len(images) == len(labels) == 1:
      return content[images[0]], content[labels[0]]
  raise ValueError(
    "expected a pair of images and labels, or a dictionary with one of "
    f"{', '.join(_IMAGE_NAMES)} and one of {', '.join(_LABEL_NAMES)}; got a torch file {describe(content)}"
  )


_CONSTANTS_NOTE = (
  "pixels in [0, 1] (IDC and DREAM do not clip them), which are standardized with fixed constants when networks are "
  "trained; fit_preprocess uses these"
)


def _formed(default_factor: int | None, default_decoding: str, note: str = ""):
  """The reader of sets with several training images in one stored image."""

  def read(path, content, options):
    images, labels = _pair(content)
    labels, labels_note = _hard_labels(labels)
    if getattr(images, "ndim", 0) != 4:
      raise ValueError(f"expected images (m, channels, side, side), got {describe(images)}")
    checks.same_rows("images", images, "labels", labels)
    factor, decoding = options.factor, options.decoding
    tag = re.search(r"_factor(\d+)(?:_(multi|bound))?(?=_|$)", path.parent.name)
    if factor is None and tag:
      factor, decoding = int(tag[1]), decoding or tag[2]
    factor = default_factor if factor is None else factor
    if factor is None:
      raise ValueError(
        "factor: expected the number of training images per side of a stored image, which the file does not record: 2, or "
        "3 for ImageNet, or 1 for sets without several images in one (IDC-I)"
      )
    decoding = decoding or default_decoding
    images = np.asarray(floats("images", images)).transpose(0, 2, 3, 1)
    decoded, rows = formation.decode(images, np.argmax(labels, axis=1), factor, decoding)
    source = {
      "layout": "NCHW",
      "factor": factor,
      "decoding": decoding,
      "stored_images": len(images),
    }
    if isinstance(content, dict) and isinstance(content.get("dataset"), str):
      source["dataset"] = content["dataset"]
    return Stored(
      decoded,
      "NHWC",
      labels[rows],
      labels_note + note,
      "standardize",
      _CONSTANTS_NOTE,
      source=source,
      pixels=True,
    )

  return read


def _folder(kind: str):
  """The reader of a folder of images."""

  def read(path, content, options):
    images, layout = content.images.astype(np.float32) / np.float32(255), "NHWC"
    labels, labels_note = _hard_labels(content.classes)
    labels_note = "the folders of the classes, in their order: converted to one-hot minus 1/c"
    source = {"stored_images": len(images)}
    if options.labels is not None:
      if kind != "sre2l":
        raise ValueError("labels: expected None for RDED, which does not store labels")
      views = image_sets.labeled_views(content.images, options.labels)
      if views.logits.shape[1] != labels.shape[1]:
        raise ValueError(
          f"labels: expected {labels.shape[1]} classes, as folders, got {views.logits.shape[1]}"
        )
      images, labels = views.images, _probabilities(views.logits)
      labels_note = (
        "outputs of a teacher for the mixed crops of the first epoch: converted to probabilities minus 1/c; SRe2L matches "
        "them at temperature 20"
      )
      source["labels"] = "epoch_0"
    elif options.factor is not None:
      factor, decoding = options.factor, options.decoding or "single"
      images, rows = formation.decode(images, content.classes, factor, decoding)
      labels, source = labels[rows], {**source, "factor": factor, "decoding": decoding}
    if options.labels is None:
      labels_note += "; the publisher trains on the outputs of a teacher for crops of the images"
    note = "pixels, which are standardized with the constants of ImageNet (SRe2L: of CIFAR for 32 pixels)"
    return Stored(
      images, layout, labels, labels_note, "standardize", note, source=source, pixels=True
    )

  return read


READERS = {
  "kip": _kip,
  "rfad": _rfad,
  "frepo": _frepo,
  "rcig": _rcig,
  "dc": _dc,
  "mtt": _mtt,
  "datm": _datm,
  "idc": _formed(None, "single"),
  "dream": _formed(None, "single"),
  "ncfm": _formed(2, "single"),
  # CIM trains on a whole image or on one of its parts, drawn for each batch.
  "cim": _formed(
    2, "multi", "; CIM trains on the outputs of a teacher, which the file does not contain"
  ),
  "rded": _folder("rded"),
  "sre2l": _folder("sre2l"),
}


def _get(content, name, stored_as=None):
  if not isinstance(content, dict) or content.get(name) is None:
    raise ValueError(f"expected a file with {stored_as or name}, got one {describe(content)}")
  return content[name]


def floats(what, x) -> np.ndarray:
  """Converts any floating-point array to finite float32."""
  if not isinstance(x, np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"{what}: expected floats, got {getattr(x, 'dtype', type(x).__name__)}")
  with np.errstate(over="ignore"):
    x = x.astype(np.float32)
  checks.finite(what, x)
  return x


def _number(what, x) -> float:
  number = np.asarray(x) if isinstance(x, (int, float, np.number, np.ndarray)) else np.empty(0)
  if number.size != 1 or number.dtype.kind not in "iuf" or not np.isfinite(number).all():
    raise ValueError(f"{what}: expected a finite number, got {x!r:.100}")
  return float(number.reshape(()))


def _soft_labels(labels) -> np.ndarray:
  labels = floats("labels", labels)
  if labels.ndim != 2 or len(labels) == 0 or labels.shape[1] < 2:
    raise ValueError(f"labels: expected shape (m, c) with at least 2 classes, got {labels.shape}")
  return labels


def _probabilities(logits) -> np.ndarray:
  """Softmax of logits, minus 1/c, in float32."""
  logits = _soft_labels(logits).astype(np.float64)
  powers = np.exp(logits - logits.max(axis=1, keepdims=True))
  share = powers / powers.sum(axis=1, keepdims=True)
  return (share - 1 / logits.shape[1]).astype(np.float32)


def _is_one_hot(labels, centered: bool) -> bool:
  hot = np.full(labels.shape, -centered / labels.shape[1])
  hot[np.arange(len(hot)), np.argmax(labels, axis=1)] += 1
  return np.allclose(labels, hot, rtol=0, atol=1e-5)


def _centered(labels):
  """`(labels, note)`: one-hot minus 1/c or learned against such targets, and the conversion."""
  labels = _soft_labels(labels)
  if _is_one_hot(labels, centered=False):
    return labels - np.float32(1 / labels.shape[1]), "stored as one-hot: 1/c was subtracted"
  if _is_one_hot(labels, centered=True):
    return labels, "stored as one-hot minus 1/c: unchanged"
  return labels, "learned against targets one-hot minus 1/c: unchanged"


def _hard_labels(labels):
  """`(labels, note)`: one-hot minus 1/c of class indices, and the conversion."""
  if (
    not isinstance(labels, np.ndarray)
    or labels.ndim != 1
    or labels.dtype.kind not in "iu"
    or not labels.size
  ):
    raise ValueError(
      f"labels: expected class indices (m,), got {getattr(labels, 'dtype', '')} {describe(labels)}"
    )
  classes = np.unique(labels)
  if not np.array_equal(classes, np.arange(len(classes))) or len(classes) < 2:
    raise ValueError(
      f"labels: expected images of every class 0..c-1, got the classes {classes[:20].tolist()}"
    )
  return np.asarray(
    preprocess.one_hot_centered(labels, len(classes))
  ), "stored as class indices: converted to one-hot minus 1/c"
