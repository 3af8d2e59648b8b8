"""How the loss gradient with respect to input embeddings agrees with each unit's noise.

I items, B rows, T tokens, D channels. Torch-free: the gradient is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from motet.experiments.scoring.probes import (
    EncodedItems,
    SumOverRanks,
    padded_batch,
    probe_batches,
)
from motet.experiments.types import F64, I64

Gradient = Callable[[I64, I64], npt.NDArray[np.float32]]
"""(tokens [B, T], labels [B, T]) -> gradient of the summed loss with respect to the input
embeddings, [B, T, D].
"""
NoiseOf = Callable[[int, int, int], npt.NDArray[np.float32]]
"""(unit, tokens, channels) -> its noise, [tokens, channels]."""


def align_items(
    items: EncodedItems,
    units: Sequence[int],
    gradient: Gradient,
    noise_of: NoiseOf,
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: SumOverRanks = lambda values: values,
    before_batch: Callable[[], None] = lambda: None,
) -> F64:
    """Return the cosine of each item's noise with minus its gradient, float64 [I]: above 0 where
    the loss falls along the noise. Arguments as those of `score_items`.

    Args:
        units: the number of each item's unit, [I].
    """
    lengths = np.array([len(ids) for ids in items.tokens], dtype=np.int64)
    batches = probe_batches(lengths, batch_tokens)
    found = np.zeros(len(items), dtype=np.float64)
    for turn in range(0, len(batches), world_size):
        before_batch()
        mine = turn + rank
        members = batches[mine] if mine < len(batches) else np.empty(0, dtype=np.int64)
        gradient_BTD = gradient(*padded_batch(items, members))
        for row, item in enumerate(members.tolist()):
            # Token 0 is the end of document before the text, which carries no noise.
            own = gradient_BTD[row, 1 : lengths[item]].astype(np.float64)
            noise = noise_of(units[item], *own.shape).astype(np.float64)
            size = np.linalg.norm(own) * np.linalg.norm(noise)
            found[item] = -float((own * noise).sum()) / size if size > 0 else 0.0
    return sum_over_ranks(found)
