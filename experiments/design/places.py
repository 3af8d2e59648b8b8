"""Places of random keys in their order, for many rows of keys at once.

Shapes: D rows (draws), N keys a row, B blocks.
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

from motet.experiments.stream.random import U64

I64 = npt.NDArray[np.int64]
I8 = npt.NDArray[np.int8]

FEWEST_SPARE_BITS = 3
HIGH_HALF = 1 if sys.byteorder == "little" else 0


def counted_places(keys: U64) -> I8:
    """Place of every key in the stable order along axis 1, by comparing each with each.

    keys: uint64 [D, N, B], N at most 127; the places are int8 of the same shape.
    """
    place = np.zeros(keys.shape, dtype=np.int8)
    for one in range(keys.shape[1]):
        for other in range(one):
            before = keys[:, other] <= keys[:, one]
            place[:, one] += before
            place[:, other] += ~before
    return place


def sorted_places(keys_DN: U64, fixed_bits: int | None = None) -> I64:
    """`np.argsort(keys_DN, axis=1, kind="stable")`, several times faster for random keys.

    The place replaces the lowest bits of its key, so that sorting values (which numpy does with the
    processor's vector instructions) sorts places. Where two keys agree in all other bits, whole
    keys decide.

    Args:
        keys_DN: uint64 [D, N].
        fixed_bits: how many of the highest bits are not random, the others being; None where
            nothing is known of them. With enough random bits among the highest 32, half of the key
            is sorted in half of the time.
    """
    n = keys_DN.shape[1]
    bits = max(n - 1, 0).bit_length()
    if fixed_bits is not None and 32 - fixed_bits - bits >= bits + FEWEST_SPARE_BITS:
        return _sorted_by_half(keys_DN, np.uint32((1 << bits) - 1))
    below = np.uint64((1 << bits) - 1)
    packed = keys_DN & ~below
    packed |= np.arange(n, dtype=np.uint64)
    packed.sort(axis=1)
    tied = ((packed[:, 1:] ^ packed[:, :-1]) <= below).any(axis=1)
    packed &= below
    places = packed.view(np.int64)
    if tied.any():
        places[tied] = np.argsort(keys_DN[tied], axis=1, kind="stable")
    return places


def _sorted_by_half(keys_DN: U64, below: np.uint32) -> I64:
    """Places in the order of keys; the few neighbours whose highest bits agree are put right by
    exchanges, even and odd places in turn.
    """
    n = keys_DN.shape[1]
    packed = keys_DN.view(np.uint32)[:, HIGH_HALF::2] & ~below
    packed |= np.arange(n, dtype=np.uint32)
    packed.sort(axis=1)
    # The last of a row and the first of the next are no neighbours.
    row, place = divmod(np.flatnonzero((packed[:, 1:] ^ packed[:, :-1]) <= below), n - 1)
    packed &= below
    places = packed.astype(np.int64)
    start = row * n
    _exchange(places.reshape(-1), keys_DN.reshape(-1), start + place, start)
    return places


def _exchange(places: I64, keys: U64, at: I64, start: I64) -> None:
    """Put neighbours right whose whole keys are in the wrong order, in place.

    places: of rows end to end. at: ascending, the first of every two neighbours that only whole
    keys can order. start: int64 like at, where the row starts.
    """
    moved = True
    while moved and len(at):
        moved = False
        for odd in (0, 1):
            turn = at % 2 == odd
            one, first = at[turn], start[turn]
            left, right = places[one], places[one + 1]
            wrong = keys[first + left] > keys[first + right]
            places[one[wrong]], places[one[wrong] + 1] = right[wrong], left[wrong]
            moved |= bool(wrong.any())
        # Two that agree with no third are in order now.
        near = np.diff(at, prepend=-2, append=len(places) + 2) == 1
        kept = near[1:] | near[:-1]
        at, start = at[kept], start[kept]
