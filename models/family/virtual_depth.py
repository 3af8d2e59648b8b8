"""Layers that run several times: the virtual depth of Apollo's small models (arXiv:2401.09192).

A model of N layers runs as one of d layers, N <= d <= L: virtual layer i is layer floor(i N / d),
as when the model has grown by interpolation. How deep is drawn anew every step by
low-value-prioritized sampling (the public code's `ApolloGPT2Trainer`): small depths, which cost
little, are drawn most often. Torch-free, and no state.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from motet.models.keyed import key_of, uniforms

LEAST = 1e-6
"""Of the uniform draw; the curve is steepest there."""
OVER, END = 0.4, 0.6
"""The curve begins at L / N + OVER and ends at END; it is clipped to 1 to L / N, so that both ends
have some probability.
"""


def lvps_depth(x: float, layers: int, deepest: int) -> int:
    """Return the virtual depth of a draw.

    Args:
        x: uniform from `LEAST` to 1; the smaller, the deeper.
        layers: N, that the model has.
        deepest: L, that the last model has.
    """
    ratio = deepest / layers
    begin = ratio + OVER
    shift = (begin * LEAST - END) / (END - begin)
    share = END * (shift + 1) / (x + shift)
    return int(min(max(share, 1.0), ratio) * layers)


def virtual_depth(seed: int, step: int, layers: int, deepest: int) -> int:
    """Return the virtual depth of a step, the same on all ranks and in every attempt."""
    return _drawn(key_of("lvps", seed), step, layers, deepest)


@lru_cache(maxsize=16)
def virtual_depths(
    seed: int, start: int, stop: int, layers: int, deepest: int
) -> npt.NDArray[np.int64]:
    """Return the virtual depths of steps, int64 [stop - start]: each is a draw of its own, and
    plans ask for those of a whole stage once for every layout.
    """
    key = key_of("lvps", seed)
    return np.array([_drawn(key, step, layers, deepest) for step in range(start, stop)])


def _drawn(key: int, step: int, layers: int, deepest: int) -> int:
    drawn = float(uniforms(key, step, 1)[0])
    return lvps_depth(LEAST + (1 - LEAST) * drawn, layers, deepest)


@lru_cache(maxsize=4096)
def times(layers: int, depth: int) -> tuple[int, ...]:
    """Return how often each layer runs, one after the other: virtual layer i is floor(i N / d)."""
    counted = [0] * layers
    for at in range(depth):
        counted[at * layers // depth] += 1
    return tuple(counted)
