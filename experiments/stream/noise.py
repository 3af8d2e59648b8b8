"""Gaussian noise on the input embeddings of some exposures: a pure function of names, never stored.

The plan keeps a seed, a standard deviation per experiment and one bit per exposure. Every number
is drawn from a counter keyed by (seed, experiment), at (unit, token of the text, channel), so
ranks, layouts and restarts make the same noise, and a unit that is never shown has its own as well.

L tokens of a text, D channels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.random import name_key, philox

F32 = npt.NDArray[np.float32]


def noise(seed: int, experiment: str, unit: int, length: int, width: int, deviation: float) -> F32:
    """Return independent N(0, deviation^2), float32 [length, width].

    Token l of channel d is the same whatever length and width are.
    """
    from scipy.special import ndtri

    key = name_key(seed, "embedding noise", experiment)
    tokens = np.arange(length, dtype=np.uint64)[:, None]
    pairs = np.arange((width + 1) // 2, dtype=np.uint64)[None, :]
    place = np.broadcast_to(tokens << np.uint64(32) | pairs, (length, pairs.shape[1]))
    unit_keys = np.full(place.size, unit, dtype=np.uint64)
    words = philox(key, unit_keys, np.ascontiguousarray(place).ravel())
    bits = np.stack(words, axis=-1).reshape(length, -1)[:, :width]
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(ndtri(uniform) * deviation, dtype=np.float32)


@dataclass(frozen=True)
class EmbeddingNoise:
    """The noise of one exposure in a batch: row and offset of its text's first token, its length in
    tokens (without the end-of-document tokens around it), and what it is drawn from.
    """

    row: int
    offset: int
    length: int
    seed: int
    experiment: str
    unit: int
    deviation: float

    def values(self, width: int) -> F32:
        """Return the noise, float32 [length, width]."""
        names = self.seed, self.experiment, self.unit
        return noise(*names, self.length, width, self.deviation)

    def mark(self) -> bytes:
        """Return what the ledger's digest of its slot holds of it."""
        key = name_key(self.seed, "embedding noise", self.experiment)
        return struct.pack("<iiQqd", self.offset, self.length, key, self.unit, self.deviation)
