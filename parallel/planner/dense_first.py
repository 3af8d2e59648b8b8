"""Layers of a mixture whose dense layers come first (as those of DeepSeek-V3, arXiv:2412.19437):
exactly divided. Pure; no torch.

The dense layers lie on the first stages, in few ways: each is tried. What is left are layers that
are all alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from motet.parallel.planner.linear import MemoryLines
from motet.parallel.planner.partition import Counts, Load

MOST_DENSE = 6
"""More dense layers are divided like any that differ (`plan_partition.unlike`): there are 2 to the
power of their number of ways.
"""

DenseFirst = tuple[int, ...]
"""Dense layers of the first stages; of these only the first may have none, and only the last may
have others.
"""


class Rest(NamedTuple):
    """What is left to divide when the dense layers have their places."""

    dense: Counts  # of every rank
    loads: list[Load]  # what ranks add, their dense layers included, by layers with experts
    most: list[int]  # layers with experts that fit into the memory of every rank


def dense_first(kinds: Sequence[int]) -> int:
    """Return how many dense layers there are if all come first and they are few, else 0; `kinds`: 1
    for layers with experts.
    """
    dense = len(kinds) - sum(kinds)
    return dense if dense <= MOST_DENSE and dense < len(kinds) and not any(kinds[:dense]) else 0


def dense_places(dense: int, stages: int) -> Iterator[DenseFirst]:
    """Yield every way to put some dense layers on the first of some stages."""

    def parts(left: int, room: int) -> Iterator[DenseFirst]:
        if not left:
            yield ()
        elif room:
            for here in range(left, 0, -1):
                for rest in parts(left - here, room - 1):
                    yield (here, *rest)

    for first in range(dense, -1, -1):
        for rest in parts(dense - first, stages - 1):
            yield (first, *rest)


def rest(
    front: DenseFirst,
    loads: Sequence[Load],
    kept: Sequence[MemoryLines],
    held: Sequence[float],
    stages_of: Sequence[Sequence[int]],
    stages: int,
    layers: int,
) -> Rest:
    """Return what is left to divide.

    Args:
        held: micro-batches whose activations every rank keeps.
        stages_of: stages of every rank.
        layers: with experts.
    """
    dense, known = [], {}
    out, most = [], []
    for rank, (load, own, count) in enumerate(zip(loads, kept, held, strict=True)):
        mine = stages_of[rank]
        here = sum(front[stage] for stage in mine if stage < len(front))
        full = all(stage < len(front) - 1 for stage in mine)
        least = sum(0 < stage < stages - 1 and stage >= len(front) for stage in mine)
        dense.append(here)
        key = id(load), here, least
        if key not in known:
            known[key] = replace(
                load,
                fixed=load.fixed + here * load.each[0],
                each=(load.each[1], load.each[1]),
                wait_fixed=load.wait_fixed + here * load.wait_each[0],
                wait_each=(load.wait_each[1], load.wait_each[1]),
                least=least,
                once=(_after(load.once[0], here), _after(load.once[1], here)),
            )
        out.append(known[key])
        left = own.capacity - own.bytes(here, 0, count)
        each = own.fixed[2] + count * own.saved[2]
        most.append(0 if full else min(layers, int(left / each)) if left >= 0 else -1)
    return Rest(tuple(dense), out, most)


def _after(line: tuple[float, float, float], dense: int) -> tuple[float, float, float]:
    """Return a line by layers with experts, where some dense layers are there."""
    return line[0] + dense * line[1], line[2], line[2]


def stages_with(
    front: DenseFirst, counts: Counts, stages_of: Sequence[Sequence[int]], stages: int
) -> tuple[int, ...]:
    """Return layers of every stage, dense ones included; `counts`: layers with experts of every
    rank.
    """
    out = [*front, *[0] * (stages - len(front))]
    for count, mine in zip(counts, stages_of, strict=True):
        open_ = [stage for stage in mine if stage >= len(front) - 1]
        empty = [stage for stage in open_ if 0 < stage < stages - 1 and not out[stage]]
        for stage in empty:
            out[stage] = 1
        for _ in range(count - len(empty)):
            stage = min(open_, key=lambda s: (out[s], s in (0, stages - 1)))
            out[stage] += 1
    return tuple(out)
