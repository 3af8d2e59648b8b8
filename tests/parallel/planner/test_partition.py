"""Layers per pipeline rank against all partitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from motet.parallel.planner.partition import Counts, alike, least_s, stage_layers
from motet.parallel.planner.ranges import unlike
from motet.parallel.planner.steps import Load


def all_partitions(layers: int, least: list[int]) -> Iterator[Counts]:
    if len(least) == 1:
        if layers >= least[0]:
            yield (layers,)
        return
    for first in range(least[0], layers + 1):
        for rest in all_partitions(layers - first, least[1:]):
            yield (first, *rest)


@st.composite
def loads(draw: st.DrawFn) -> list[Load]:
    out = []
    for _ in range(draw(st.integers(2, 4))):
        fixed, each = draw(st.floats(0.0, 3.0)), draw(st.sampled_from((1.0, 1.5, 4.0)))
        out.append(Load(fixed, (each, 2 * each), fixed, (each, 2 * each), draw(st.integers(0, 1))))
    return out


def seconds(ranks: list[Load], layers: list[tuple[int, int]], n: int) -> float:
    busy = [
        r.fixed + r.each[0] * d + r.each[1] * e for r, (d, e) in zip(ranks, layers, strict=True)
    ]
    return n * max(busy) + sum(busy) - max(busy)


@settings(max_examples=200, deadline=None)
@given(loads(), st.integers(4, 9), st.integers(2, 20), st.data())
def test_no_partition_of_equal_layers_is_faster(
    ranks: list[Load], layers: int, n: int, data: st.DataObject
) -> None:
    most = [data.draw(st.integers(1, layers)) for _ in ranks]

    def score(counts: Counts) -> float:
        return seconds(ranks, [(k, 0) for k in counts], n)

    sound = [
        counts
        for counts in all_partitions(layers, [r.least for r in ranks])
        if all(k <= top for k, top in zip(counts, most, strict=True))
    ]
    found = alike(ranks, layers, most, n, score)
    if not sound:
        assert found is None
        return
    assert found is not None
    assert found[1] in sound
    best = min(map(score, sound))
    assert abs(found[0] - best) < 1e-9 * best
    assert least_s(ranks, layers, n) <= best * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(loads(), st.lists(st.integers(0, 1), min_size=4, max_size=8))
def test_unlike_layers_on_equally_fast_ranks_get_the_shortest_slowest_rank(
    ranks: list[Load], kinds: list[int]
) -> None:
    ranks = [replace(rank, each=(1.0, 2.0), least=0) for rank in ranks]
    sums = [0, *accumulate(kinds)]

    def slowest(counts: Counts) -> float:
        ends = list(accumulate(counts))
        routed = [sums[end] - sums[end - k] for end, k in zip(ends, counts, strict=True)]
        layers = [(k - e, e) for k, e in zip(counts, routed, strict=True)]
        return seconds(ranks, layers, 1_000_000)

    found = unlike(ranks, kinds, lambda r, dense, experts: True, slowest)
    assert found is not None
    best = min(map(slowest, all_partitions(len(kinds), [r.least for r in ranks])))
    assert abs(found[0] - best) < 1e-4 * best


def test_stages_share_the_layers_of_their_rank() -> None:
    assert stage_layers((4, 5), [[0, 2], [1, 3]], 4) == (2, 3, 2, 2)
    assert stage_layers((0, 3, 1), [[0], [1], [2]], 3) == (0, 3, 1)
    assert stage_layers((0, 0, 4), [[0], [1], [2]], 3) is None
