"""POA's list is walked without replacement, from any place, with the published chances."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from motet.models.family.poa_list import draw, poa_repetitions, poa_weights

WIDTHS, DEPTHS = range(384, 1025, 64), range(12, 25)
"""The space of the paper: ViT-S, -B and -L are in it."""


def test_the_list_of_the_paper_has_573_entries_with_its_chances_and_means() -> None:
    repetitions = poa_repetitions(WIDTHS, DEPTHS)
    assert len(repetitions) == 143
    assert sum(repetitions) == 573 - 1  # the intact network is the last, and is not drawn
    listed = [*repetitions[:-1], repetitions[-1] + 1]
    sizes = list(product(WIDTHS, DEPTHS))

    def mean(values: list[float]) -> float:
        return sum(n * value for n, value in zip(listed, values, strict=True)) / sum(listed)

    assert round(100 * listed[0] / sum(listed), 2) == 1.57
    assert round(100 * listed[-2] / sum(listed), 2) == 0.17
    assert round(mean([w for w, _ in sizes])) == 640
    assert round(mean([d for _, d in sizes]), 1) == 16.8
    assert round(mean([(w / 1024) ** 2 * d / 24 for w, d in sizes]), 3) == 0.298


def test_weights_fall_evenly_from_3_to_1() -> None:
    assert poa_weights([16, 32, 48, 64, 96]) == [3.0, 2.5, 2.0, 1.5, 1.0]
    assert poa_weights([16]) == [1.0]
    assert poa_repetitions([8, 16], [1, 2]) == [9, 3, 3, 0]
    assert poa_repetitions([8], [2]) == [0]


def test_every_entry_comes_once_before_any_comes_again() -> None:
    weights = [3, 0, 1, 2]
    for seed, cycle in product(range(5), range(6)):
        drawn = Counter(draw(weights, seed, cycle * 6 + at) for at in range(6))
        assert drawn == {0: 3, 2: 1, 3: 2}


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    weights = [3, 2, 1]
    forwards = [draw(weights, 7, at) for at in range(60)]
    assert [draw(weights, 7, at) for at in reversed(range(60))] == forwards[::-1]
    assert forwards != [draw(weights, 8, at) for at in range(60)]
    cycles = {tuple(forwards[at : at + 6]) for at in range(0, 60, 6)}
    assert len(cycles) > 1  # each cycle has an order of its own


def test_draws_stay_the_same_for_ever() -> None:
    assert [draw([3, 2, 1], 0, at) for at in range(12)] == GOLDEN


GOLDEN = [1, 0, 1, 2, 0, 0, 1, 1, 2, 0, 0, 0]


def test_orders_of_neighbouring_seeds_and_cycles_are_independent() -> None:
    """Which entry comes first is uniform over seeds, and over cycles of one seed."""
    for places in ([(seed, 0) for seed in range(600)], [(1, 6 * cycle) for cycle in range(600)]):
        first = Counter(draw([1] * 6, *place) for place in places)
        assert sum((n - 100) ** 2 / 100 for n in first.values()) < 20.5  # chi2(5), p = .001


@pytest.mark.parametrize("sizes", [[], [64, 32], [32, 32]])
def test_sizes_that_do_not_rise_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="rising"):
        poa_weights(sizes)


@pytest.mark.parametrize(("weights", "position"), [([], 0), ([0, 0], 0), ([1, -1], 0), ([1], -1)])
def test_a_walk_over_nothing_is_refused(weights: list[int], position: int) -> None:
    with pytest.raises(ValueError, match="one above 0"):
        draw(weights, 0, position)
