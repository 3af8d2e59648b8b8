"""Two experiments with the same units: the four cells, the interaction, and its rate of error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.two_by_two import Crossed, Interaction, interaction, joined
from motet.launcher.report.page import render
from motet.launcher.report.terminal import shared_parts
from tests.experiments.analysis.test_shared_units import carried_out


def dealt(generator: np.random.Generator, blocks: np.ndarray, draws: int) -> np.ndarray:
    """Half of every block treated, bool [D, U]."""
    out = np.zeros((draws, len(blocks)), dtype=bool)
    for row in out:
        for block in np.unique(blocks):
            members = generator.permutation(np.flatnonzero(blocks == block))
            row[members[: len(members) // 2]] = True
    return out


def study(
    seed: int,
    effects: tuple[float, float, float],
    n: int = 24,
    n_blocks: int = 2,
    draws: int = 199,
    spread: float = 0.0,
) -> tuple[np.ndarray, Crossed]:
    """Outcomes with two effects and an interaction, and both designs repeated."""
    generator = np.random.default_rng(seed)
    blocks, one_block = np.arange(n) * n_blocks // n, np.zeros(n, dtype=np.int64)
    first, second = dealt(generator, blocks, draws + 1), dealt(generator, one_block, draws + 1)
    a, b = first[0].astype(float), second[0].astype(float)
    own = [effect + spread * generator.normal(size=n) for effect in effects]
    values = generator.normal(size=n) + blocks + own[0] * a + own[1] * b + own[2] * a * b
    units = np.arange(n)
    return values, Crossed(
        units, units, (a, b), (first[1:], second[1:]), (blocks, one_block), units
    )


def by_hand(values: np.ndarray, crossed: Crossed) -> float:
    """The coefficient of the product by least squares."""
    a, b = crossed.treated
    blocks = np.eye(int(crossed.blocks[0].max()) + 1)[crossed.blocks[0]]
    columns = np.column_stack([blocks, a, b, a * b])
    return float(np.linalg.lstsq(columns, values, rcond=None)[0][-1])


def test_the_estimate_is_the_difference_of_differences() -> None:
    values, crossed = study(3, (1.0, 0.5, 2.0))
    found = interaction(values, crossed, 0.05)
    assert found.effect == pytest.approx(by_hand(values, crossed))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.effect < found.high
    values, crossed = study(3, (1.0, 0.5, 2.0), n_blocks=1)
    cell = [values[crossed.cell == number].mean() for number in range(4)]
    assert interaction(values, crossed, 0.05).effect == pytest.approx(
        cell[3] - cell[1] - cell[2] + cell[0]
    )


def test_the_test_does_not_depend_on_the_two_effects() -> None:
    values, crossed = study(5, (0.0, 0.0, 0.3))
    a, b = crossed.treated
    base = interaction(values, crossed, 0.05)
    moved = interaction(values + 7 * a - 3 * b, crossed, 0.05)
    assert moved.p == base.p
    assert moved.effect == pytest.approx(base.effect)
    assert (moved.low, moved.high) == pytest.approx((base.low, base.high))


def test_the_interval_holds_what_the_test_does_not_reject() -> None:
    values, crossed = study(8, (1.0, 1.0, 1.0))
    found = interaction(values, crossed, 0.05)
    product = crossed.treated[0] * crossed.treated[1]
    assert found.low is not None
    assert found.high is not None
    width = found.high - found.low
    for end, inward in ((found.low, 1), (found.high, -1)):
        inside = interaction(values - (end + 0.01 * width * inward) * product, crossed, 0.05)
        outside = interaction(values - (end - 0.01 * width * inward) * product, crossed, 0.05)
        assert inside.p > 0.05 >= outside.p


@pytest.mark.parametrize("offset", [0.0, 0.7, -100.0])
def test_an_interaction_that_is_0_but_for_rounding_has_p_1(offset: float) -> None:
    n = 16
    a, b = np.tile([0.0, 0, 1, 1], n // 4), np.tile([0.0, 1, 0, 1], n // 4)
    blocks, units = np.arange(n) // 8, np.arange(n)
    for seed in range(12):
        generator = np.random.default_rng(seed)
        draws = dealt(generator, blocks, 199), dealt(generator, blocks, 199)
        crossed = Crossed(units, units, (a, b), draws, (blocks, blocks), units)
        # The same answers in all four cells of a quadruple: nothing is left to interact.
        values = offset + 0.1 * np.repeat(generator.integers(0, 2, n // 4), 4)
        found = interaction(values, crossed, 0.05)
        assert (found.effect, found.p) == (0.0, 1.0), seed


def test_it_errs_about_as_often_as_it_says() -> None:
    """Of 300 studies in which two effects of one standard deviation add up; 5 % is 15."""
    p = [interaction(*study(seed, (1.0, 1.0, 0.0), draws=99), 0.05).p for seed in range(300)]
    assert 4 <= sum(value <= 0.05 for value in p) <= 30  # binomial: .999 within


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "n_blocks", "spread"), [(16, 1, 0.0), (24, 4, 0.0), (40, 1, 0.0), (40, 1, 1.0)]
)
def test_error_and_coverage_over_designs(n: int, n_blocks: int, spread: float) -> None:
    wrong, held, count = 0, 0, 1000
    for seed in range(count):
        still = interaction(*study(seed, (1.0, 0.5, 0.0), n, n_blocks, 199, spread), 0.05)
        wrong += still.p <= 0.05
        moved = interaction(*study(seed + count, (1.0, 0.5, 0.7), n, n_blocks, 199, spread), 0.05)
        low = -np.inf if moved.low is None else moved.low
        high = np.inf if moved.high is None else moved.high
        held += low <= 0.7 <= high
    assert wrong / count <= 0.075
    assert held / count >= 0.925


def test_units_of_either_clustering_stay_together() -> None:
    one, other = np.array([0, 0, 1, 2, 3]), np.array([9, 8, 8, 7, 6])
    together = joined(one, other)
    assert together[0] == together[1] == together[2]
    assert len({*together.tolist()}) == 3


def test_too_few_units_in_a_cell_give_no_estimate() -> None:
    values, crossed = study(1, (0, 0, 0), n=8, n_blocks=1)
    values[np.flatnonzero(crossed.cell == 3)] = np.nan
    found = interaction(values, crossed, 0.05)
    assert (found.effect, found.p) == (None, 1.0)
    assert "a cell has fewer than 2" in found.note
    flat = interaction(np.ones(8), crossed, 0.05)
    assert isinstance(flat, Interaction)
    assert flat.p == 1.0


def test_a_declared_share_has_its_table_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    first, second = carried_out(tmp_path, declared=True)
    answers = analyze([first, second], seed=0, draws=199)
    for entry, m, other in zip(
        answers["experiments"], (first, second), (second, first), strict=True
    ):
        (outcome,) = [o for o in entry["secondary"] if o.get("cells")]
        assert outcome["cells"]["with"] == other.name
        for row in outcome["cells"]["rows"]:
            here = (m.arms > 0) == row["shown"]
            here &= (other.arms > 0) == row["shown_by_other"]
            assert row["n"] == int(here.sum())
            assert row["mean"] == (1.0 if row["shown"] or row["shown_by_other"] else 0.0)
        # Known from either, it cannot be learned again: the second adds nothing to the first.
        assert outcome["effect"] == pytest.approx(-1.0)
        assert outcome["p_corrected"] >= outcome["p"]
    page = render({"answers": answers})
    assert "shown by second" in page
    assert "Interaction" in page
    title, table = shared_parts(answers["experiments"])
    assert "share" in str(title)
    assert table.row_count == 2
