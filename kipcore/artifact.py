"""The distilled set as one self-describing file: `distilled.npz`, readable with NumPy alone.

It carries all that is needed to use the images elsewhere and to get the recorded
accuracy here: pixels, labels and their convention, the preprocessing with its
inverse, the ridge rule, the architecture, seeds, dataset hashes and checksums.
Nothing in it is ever unpickled.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np

from kipcore import checks, evaluate, files, kernels
from kipcore.architectures import Architecture
from kipcore.preprocess import Preprocess, one_hot_centred
from kipcore.types import Support

FORMAT = "kipcore-distilled"
FORMAT_VERSION = 1
_PREPROCESS = "preprocess/"
_REQUIRED = ("images", "labels", "support", "metadata")


class ArtifactError(ValueError):
  """A file that is not a whole, unaltered artefact; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A distilled set with its papers.

  Attributes:
    images: `(m, ...)` float, in the pixel units of the dataset (values may leave its
      range: they were optimised).
    labels: `(m, c)`: one-hot minus 1/c where they were not learned; add
      `metadata["label_convention"]["offset"]` for one-hot labels.
    support: `(m, ...)` the same inputs behind the preprocessing, exactly as trained.
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

  def evaluate(self, x, labels) -> evaluate.KRREvaluation:
    """Ridge regression on the set, scored on raw pixels `(n, ...)` with integer labels `(n,)`."""
    dtype = self.support.dtype
    targets = one_hot_centred(np.asarray(labels), self.labels.shape[1], dtype)
    support = Support(_device_array(self.support), _device_array(self.labels))
    return evaluate.evaluate_krr(self.kernel_fn(), support, self.preprocess.apply(x, dtype), targets,
                                 relative_ridge=self.relative_ridge)


def _device_array(x: np.ndarray):
  """A device array of the same dtype; ValueError where the 64-bit switch would narrow it silently."""
  array = jnp.asarray(x)
  if array.dtype != x.dtype:
    raise ValueError(f"expected JAX's 64-bit mode for an artefact in {x.dtype}; turn it on (--x64)")
  return array


def save_artifact(path, artifact: Artifact) -> None:
  """Writes the artefact atomically: the file is there whole, or not at all.

  Args:
    path: file name; by convention it ends in `.npz`.
    artifact: what to write.

  Raises:
    ValueError: for arrays that disagree in rows or hold NaN or infinity.
    OSError: where the file cannot be written.
  """
  checks.same_rows("images", artifact.images, "labels", artifact.labels)
  checks.same_rows("images", artifact.images, "support", artifact.support)
  spec, fitted = artifact.preprocess.to_arrays()
  arrays = {"images": artifact.images, "labels": artifact.labels, "support": artifact.support}
  for name, array in arrays.items():
    checks.finite(name, array)
  arrays |= {_PREPROCESS + name: np.asarray(array) for name, array in fitted.items()}
  metadata = {
      **artifact.metadata,
      "format": FORMAT,
      "format_version": FORMAT_VERSION,
      "label_convention": {
          "kind": "one-hot minus offset, possibly learned since",
          "offset": 1.0 / artifact.labels.shape[1],
      },
      "preprocess": spec,
      "architecture": json.loads(artifact.arch.to_json()),
      "kernel": artifact.kernel,
      "ridge": {"kind": "fraction of tr(K_ss) / m", "value": artifact.relative_ridge},
      "checksums": {name: _checksum(array) for name, array in arrays.items()},
  }
  buffer = io.BytesIO()
  np.savez_compressed(buffer, metadata=np.array(json.dumps(metadata)), **arrays)
  files.write_atomically(path, buffer.getvalue())


def load_artifact(path) -> Artifact:
  """Reads what `save_artifact` wrote, and checks every array against its checksum.

  Args:
    path: file name.

  Returns:
    `Artifact`.

  Raises:
    ArtifactError: for a file that is missing, truncated, altered, or of another kind or
      a newer format.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ArtifactError(f"{path}: expected an artefact, found no such file")
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, zlib.error) as error:
    raise ArtifactError(f"{path}: expected a whole .npz file, got one that does not read ({error})") from error
  except AttributeError as error:  # np.load of a bare .npy gives an array
    raise ArtifactError(f"{path}: expected an .npz file, got a single array") from error
  missing = [name for name in _REQUIRED if name not in arrays]
  if missing:
    raise ArtifactError(f"{path}: expected arrays {', '.join(_REQUIRED)}; missing {', '.join(missing)}")
  try:
    metadata = json.loads(str(arrays.pop("metadata")[()]))
    if metadata["format"] != FORMAT or metadata["format_version"] > FORMAT_VERSION:
      raise ArtifactError(f"{path}: expected format {FORMAT} up to version {FORMAT_VERSION}, got "
                          f"{metadata['format']!r} version {metadata['format_version']}")
    for name, expected in metadata["checksums"].items():
      if name not in arrays or _checksum(arrays[name]) != expected:
        raise ArtifactError(f"{path}: array {name!r} does not have its recorded checksum; the file was altered")
    if set(arrays) != set(metadata["checksums"]):
      raise ArtifactError(f"{path}: expected the arrays {sorted(metadata['checksums'])}, got {sorted(arrays)}")
    fitted = {name[len(_PREPROCESS):]: array for name, array in arrays.items() if name.startswith(_PREPROCESS)}
    return Artifact(
        arrays["images"], arrays["labels"], arrays["support"], Preprocess.from_arrays(metadata["preprocess"], fitted),
        Architecture.from_json(json.dumps(metadata["architecture"])), str(metadata["kernel"]),
        float(metadata["ridge"]["value"]), metadata)
  except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
    raise ArtifactError(f"{path}: expected the metadata of an artefact, got something else ({error!r})") from error
  except ArtifactError:
    raise
  except ValueError as error:
    raise ArtifactError(f"{path}: {error}") from error


def _checksum(array: np.ndarray) -> str:
  """sha256 of dtype, shape and C-order content."""
  array = np.ascontiguousarray(array)
  digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
  digest.update(array.data)
  return digest.hexdigest()
