"""Merging of equal rows into one row with the sum of their weights.

Equal rows are found by a random linear hash of their bits, and then compared.
"""

from typing import NamedTuple

import numpy as np

from kipcore import blocks

_BLOCK_WORDS = 2**22


class Merged(NamedTuple):
  """Distinct rows.

  Attributes:
    rows: `(k,)` int, the first of each set of equal rows, ascending.
    place: `(n,)` int in 0..k-1, the entry of `rows` that each row is equal to; -1 for weight 0.
    weights: `(k,)` float64, sums of the weights of equal rows, > 0.
  """

  rows: np.ndarray
  place: np.ndarray
  weights: np.ndarray


def merge_rows(arrays, weights: np.ndarray) -> Merged:
  """Merges rows that are equal in every array; 0.0 and -0.0 are equal.

  Args:
    arrays: NumPy arrays of numbers `(n, ...)` with the same number of rows, without NaN.
    weights: `(n,)` float64, >= 0; rows of weight 0 are left out.

  Returns:
    `Merged`.
  """
  live = np.flatnonzero(weights > 0)
  hashes = np.sum([row_hashes(array, seed)[live, 0] for seed, array in enumerate(arrays)], axis=0)
  _, first, place = np.unique(hashes, return_index=True, return_inverse=True)
  leader = first[place]  # of equal hashes, as positions in `live`
  for array in arrays:
    others = np.flatnonzero(leader != np.arange(live.size))
    for part in blocks.row_slices(others.size, max(1, _BLOCK_WORDS // max(1, array[:1].size))):
      here = others[part]
      same = array[live[here]] == array[live[leader[here]]]
      same = same.reshape(here.size, -1).all(axis=1)
      leader[here[~same]] = here[~same]  # equal hashes of different rows
  kept, place = np.unique(leader, return_inverse=True)
  full = np.full(len(weights), -1, np.int64)
  full[live] = place
  return Merged(live[kept], full, np.bincount(place, weights=weights[live], minlength=kept.size))


def row_hashes(array: np.ndarray, seed: int) -> np.ndarray:
  """Two 64-bit hashes of the bits of each row, `(n, 2)` uint64, computed in blocks.

  The hash is linear with random odd multipliers: different rows have equal pairs of hashes with a
  probability of at most 2^-66.
  """
  array = array.reshape(array.shape[0], -1)
  wide = np.float64 if array.dtype.kind == "f" else np.int64
  words = 2 * array.shape[1]
  multipliers = np.random.default_rng(seed).integers(0, 2**63, (words, 2), np.uint64) * 2 + 1
  out = np.empty((array.shape[0], 2), np.uint64)
  for part in blocks.row_slices(array.shape[0], max(1, _BLOCK_WORDS // words)):
    block = np.ascontiguousarray(array[part], wide) + wide(0)  # -0.0 becomes 0.0
    out[part] = block.view(np.uint32).astype(np.uint64) @ multipliers
  return out


def merge_hashes(hashes: np.ndarray, weights: np.ndarray) -> Merged:
  """`merge_rows` from pairs of hashes `(n, 2)` alone: rows with equal pairs count as equal."""
  live = np.flatnonzero(weights > 0)
  pairs = np.ascontiguousarray(hashes[live]).view([("a", np.uint64), ("b", np.uint64)]).reshape(-1)
  _, first, place = np.unique(pairs, return_index=True, return_inverse=True)
  kept, place = np.unique(first[place], return_inverse=True)
  full = np.full(len(weights), -1, np.int64)
  full[live] = place
  return Merged(live[kept], full, np.bincount(place, weights=weights[live], minlength=kept.size))
