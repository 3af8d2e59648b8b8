"""POA's list of sub-networks: small ones stand in it more often, and a walk over it repeats none
before every entry had its turn.

Source: POA (ECCV 2024, arXiv:2408.01031), section 3.3 and its code, `create_dynamic_networks` and
`get_network_id`. There the list is shuffled by Python's generator and the place in it is not saved;
here the entry at a place is a function of seed and place. No torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from motet.models.keyed import key_of, order

SELECT_SCALE = 3.0
"""How much more often the smallest value of an axis is chosen than the largest
(`net_select_scale`)."""


def poa_weights(sizes: Sequence[int]) -> list[float]:
    """Return the weight of each value of an axis: evenly spaced from 3, the smallest, to 1, the
    largest.

    Args:
        sizes: values of the axis (widths or depths), rising. One value has the weight 1.

    Raises:
        ValueError: no value, or values that do not rise.
    """
    if not sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes={list(sizes)} must be one or more rising values")
    if len(sizes) == 1:
        return [1.0]
    return [float(weight) for weight in np.linspace(SELECT_SCALE, 1.0, len(sizes))]


def poa_repetitions(widths: Sequence[int], depths: Sequence[int]) -> list[int]:
    """Return how often each (width, depth) stands in the list, width by width.

    The last entry is the intact network, which trains in every step anyway: it is left out, so the
    last number is 0.
    """
    counts = [round(w * d) for w in poa_weights(widths) for d in poa_weights(depths)]
    return [*counts[:-1], counts[-1] - 1]


def draw(weights: Sequence[int], seed: int, position: int) -> int:
    """Return the index of `weights` at a position of an endless walk over a shuffled list.

    The list holds index i `weights[i]` times and is shuffled anew for each cycle, so that
    sum(weights) positions in a row, from a multiple of it, hold each entry exactly once.

    Args:
        weights: repetitions, whole numbers, at least one above 0.
        seed: of the walk; walks of other seeds are independent.
        position: from 0; as step, or step x micro-batches + micro-batch.

    Raises:
        ValueError: a weight or the position is below 0, or no weight is above 0.
    """
    ends = list(accumulate(weights))
    if position < 0 or min(weights, default=-1) < 0 or ends[-1] < 1:
        raise ValueError(
            f"draw needs weights of 0 or more, one above 0, and a position of 0 or more; got "
            f"{list(weights)} at {position}"
        )
    cycle, place = divmod(position, ends[-1])
    return bisect_right(ends, int(_shuffled(ends[-1], seed, cycle)[place]))


@lru_cache(maxsize=16)
def _shuffled(total: int, seed: int, cycle: int) -> npt.NDArray[np.int64]:
    """Return the list's places in the order of a cycle; kept, as most draws follow one another."""
    return order(total, key_of("poa list", seed), cycle)
