"""The distilled set as one self-describing file: `distilled.npz`, readable with NumPy alone.

It contains everything needed to use the images elsewhere and to reproduce the recorded accuracy:
pixels, labels and their convention, the preprocessing with its inverse, the ridge rule, the
architecture, seeds, dataset hashes and checksums. Nothing is unpickled.
"""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from kipcore import checks, kernels
from kipcore.architectures import Architecture
from kipcore.evaluation import krr as krr_evaluation
from kipcore.io import export, npz
from kipcore.preprocess import Preprocess, one_hot_centered
from kipcore.types import KipcoreError, Support

FORMAT = "kipcore-distilled"
FORMAT_VERSION = 1
_PREPROCESS = "preprocess/"
_REQUIRED = ("images", "labels", "support")


class ArtifactError(KipcoreError, ValueError):
  """A file is not a complete, unaltered artifact."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A distilled set with its metadata.

  Attributes:
    images: `(m, ...)` float, in the pixel units of the dataset (optimized values may lie outside its
      range).
    labels: `(m, c)`: one-hot minus 1/c unless they were learned; add
      `metadata["label_convention"]["offset"]` for one-hot labels.
    support: `(m, ...)` the same inputs after preprocessing, exactly as trained.
    preprocess: fitted on the training rows; `images = preprocess.invert(support)`.
    arch: the architecture.
    kernel: "ntk" or "nngp".
    relative_ridge: ridge as a fraction of tr(K_ss) / m.
    metadata: JSON-able dict: dataset and its hashes, method, seed, versions, results.
  """

  images: np.ndarray
  labels: np.ndarray
  support: np.ndarray
  preprocess: Preprocess
  arch: Architecture
  kernel: str
  relative_ridge: float
  metadata: dict

  def kernel_fn(self):
    """The kernel that the set was made with."""
    return kernels.NetworkKernel(self.arch, self.kernel)

  def evaluate(self, x, labels) -> krr_evaluation.KRREvaluation:
    """Ridge regression on the set, scored on raw pixels `(n, ...)` with integer labels `(n,)`."""
    dtype = self.support.dtype
    targets = one_hot_centered(np.asarray(labels), self.labels.shape[1], dtype)
    support = Support(_device_array(self.support), _device_array(self.labels))
    return krr_evaluation.evaluate_krr(
      self.kernel_fn(),
      support,
      self.preprocess.apply(x, dtype),
      targets,
      relative_ridge=self.relative_ridge,
    )

  def as_numpy(self, space: str = "pixels") -> dict[str, np.ndarray]:
    """`images` (NHWC), `labels` (centered, as stored), `one_hot` (labels + offset), `classes` (argmax); see `export.as_numpy`.

    Args:
      space: "pixels", or "inputs" for the preprocessed images.
    """
    return export.as_numpy(self._images(space), self.labels)

  def as_torch(self, space: str = "pixels") -> dict:
    """The same as PyTorch tensors, float32 and int64, images NCHW; ImportError without PyTorch. See `export.as_torch`."""
    return export.as_torch(self._images(space), self.labels)

  def as_tfds(self, space: str = "pixels"):
    """The same as a `tf.data.Dataset` of dicts, one element per image; see `export.as_tfds`."""
    return export.as_tfds(self._images(space), self.labels)

  def distilled_set(
    self, space: str = "pixels", pixel_max: float | None = None
  ) -> export.DistilledSet:
    """The arrays that `export` writes, with their conventions; the same arguments."""
    dataset, result = (self.metadata.get(name) or {} for name in ("dataset", "result"))
    accuracy = {
      name: result[name]
      for name in ("test_accuracy", "network_test_accuracy_mean")
      if name in result
    }
    if accuracy:
      accuracy |= {
        "of": f"test_accuracy: kernel ridge regression with the {self.kernel} of {self.arch.name} on the inputs and "
        f"labels of this set; network_test_accuracy_mean: finite networks trained on them",
        "test_rows": dataset.get("test_rows"),
        "test_sha256": (dataset.get("hashes") or {}).get("test"),
      }
    about = {
      "dataset": {name: dataset[name] for name in ("name", "hashes", "note") if name in dataset}
      or None,
      "kernel": {"kind": self.kernel, "architecture": json.loads(self.arch.to_json())},
      "ridge": {"kind": "fraction of tr(K_ss) / m", "value": self.relative_ridge},
      "accuracy": accuracy or None,
    }
    names = dataset.get("class_names")
    return export.DistilledSet(
      self._images(space),
      self.labels,
      space,
      self.preprocess,
      dataset.get("pixel_max") if pixel_max is None else pixel_max,
      tuple(names) if names else None,
      about,
    )

  def export(
    self,
    path,
    format: str,
    space: str = "pixels",
    overwrite: bool = False,
    pixel_max: float | None = None,
  ) -> None:
    """Writes the set for other programs atomically, with a JSON file that documents its conventions.

    Args:
      path: a file ("numpy", "safetensors", "torch") or folder ("png", "tfds").
      format: one of `export.FORMATS`, described at `export.write`.
      space: "pixels", or "inputs" for the preprocessed images.
      overwrite: replace an earlier export.
      pixel_max: stored value of full white, for sets whose metadata lacks it.

    Raises:
      ValueError, TypeError: for an unknown format or space, or a set that PNG cannot hold.
      ImportError: for "torch" and "tfds" if a package they need is not installed.
      OSError: if it cannot be written, or the path is taken.
    """
    export.write(path, format, self.distilled_set(space, pixel_max), overwrite)

  def _images(self, space: str) -> np.ndarray:
    checks.one_of("space", space, export.SPACES)
    return self.images if space == "pixels" else self.support


def _device_array(x: np.ndarray):
  """A device array of the same dtype; ValueError if JAX's 64-bit mode is off and would narrow it silently."""
  array = jnp.asarray(x)
  if array.dtype != x.dtype:
    raise ValueError(f"expected JAX's 64-bit mode for an artifact in {x.dtype}; turn it on (--x64)")
  return array


def save_artifact(path, artifact: Artifact) -> None:
  """Writes the artifact atomically.

  Args:
    path: file name; by convention it ends in `.npz`.
    artifact: what to write.

  Raises:
    ValueError: if shapes disagree, dtypes are not float32 or float64, values are NaN or infinite, or the kernel is unknown.
    OSError: if the file cannot be written.
  """
  _check(artifact)
  spec, fitted = artifact.preprocess.to_arrays()
  arrays = {"images": artifact.images, "labels": artifact.labels, "support": artifact.support}
  arrays |= {_PREPROCESS + name: array for name, array in fitted.items()}
  npz.save_checked(
    path,
    arrays,
    FORMAT,
    FORMAT_VERSION,
    {
      **artifact.metadata,
      "label_convention": {
        "kind": export.label_kind(artifact.labels),
        "offset": 1.0 / artifact.labels.shape[1],
      },
      "preprocess": spec,
      "architecture": json.loads(artifact.arch.to_json()),
      "kernel": artifact.kernel,
      "ridge": {"kind": "fraction of tr(K_ss) / m", "value": float(artifact.relative_ridge)},
    },
  )


def load_artifact(path) -> Artifact:
  """Reads what `save_artifact` wrote, and checks every array against its checksum.

  Args:
    path: file name.

  Returns:
    `Artifact`.

  Raises:
    ArtifactError: if the file is missing, truncated, altered, of another kind or a newer format, claims
      sizes that it does not have (see `npz.read_npz`), or has arrays of the wrong shape or dtype, or
      NaN or infinity.
  """
  path = pathlib.Path(path)
  try:
    arrays, metadata = npz.load_checked(path, FORMAT, FORMAT_VERSION, _REQUIRED)
  except npz.NpzError as error:
    raise ArtifactError(str(error)) from error
  try:
    fitted = {
      name[len(_PREPROCESS) :]: array
      for name, array in arrays.items()
      if name.startswith(_PREPROCESS)
    }
    stored = Artifact(
      arrays["images"],
      arrays["labels"],
      arrays["support"],
      Preprocess.from_arrays(metadata["preprocess"], fitted),
      Architecture.from_json(json.dumps(metadata["architecture"])),
      metadata["kernel"],
      metadata["ridge"]["value"],
      metadata,
    )
    _check(stored)
  except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
    text = (
      str(error)
      if type(error) is ValueError
      else f"expected the metadata of an artifact, got something else ({error!r})"
    )
    raise ArtifactError(f"{path}: {' '.join(text.split())[:400]}") from error
  return stored


def _check(artifact: Artifact) -> None:
  """Raises ValueError or TypeError for arrays and numbers that are inconsistent or not finite."""
  arrays = {"images": artifact.images, "labels": artifact.labels, "support": artifact.support}
  for name, array in arrays.items():
    if array.dtype not in (np.float32, np.float64) or not array.size:
      raise ValueError(
        f"{name}: expected float32 or float64 numbers, got {array.dtype} of shape {array.shape}"
      )
    checks.same_rows("images", artifact.images, name, array)
    checks.finite(name, array)
  checks.shape("support", artifact.support, (None, *artifact.preprocess.row_shape))
  checks.shape("images", artifact.images, artifact.support.shape)
  checks.rank("labels", artifact.labels, 2)
  checks.one_of("kernel", artifact.kernel, ("ntk", "nngp"))
  ridge = artifact.relative_ridge
  if isinstance(ridge, (bool, str)) or not 0 < ridge < np.inf:
    raise ValueError(f"relative_ridge: expected a positive finite number, got {ridge!r}")
