"""The texts of exposures: token sequences end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """Token sequences end to end: text i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: npt.NDArray[np.unsignedinteger]
    offsets: I64
    masked: npt.NDArray[np.int32] | None = None
    """Of each text, how many tokens after its first carry no loss; None: of none."""

    @classmethod
    def of(
        cls,
        texts: list[npt.NDArray[np.integer]],
        dtype: npt.DTypeLike,
        masked: Sequence[int] = (),
    ) -> Texts:
        """Pack a list of token arrays; `masked` may say what carries no loss."""
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        tokens = np.concatenate(texts) if texts else np.empty(0)
        marks = np.array(masked, dtype=np.int32) if any(masked) else None
        return cls(tokens.astype(dtype), offsets, marks)

    def lengths(self) -> I64:
        """Return tokens per text, int64 [texts]."""
        return np.diff(self.offsets)

    def all_masked(self) -> npt.NDArray[np.int32]:
        """Return `masked` with zeros for None, int32 [texts]."""
        count = len(self.offsets) - 1
        return np.zeros(count, dtype=np.int32) if self.masked is None else self.masked


def join_texts(tables: list[Texts]) -> Texts:
    """Return one text table; text numbers of table k follow those of table k - 1."""
    if len(tables) == 1:
        return tables[0]
    offsets, base = [np.zeros(1, dtype=np.int64)], 0
    for table in tables:
        offsets.append(table.offsets[1:] + base)
        base += int(table.offsets[-1])
    dtype = np.result_type(*[table.tokens.dtype for table in tables]) if tables else np.uint16
    tokens = np.concatenate([table.tokens for table in tables]) if tables else np.empty(0)
    masked = None
    if any(table.masked is not None for table in tables):
        masked = np.concatenate(
            [
                np.zeros(len(t.offsets) - 1, np.int32) if t.masked is None else t.masked
                for t in tables
            ]
        )
    return Texts(tokens.astype(dtype), np.concatenate(offsets), masked)
