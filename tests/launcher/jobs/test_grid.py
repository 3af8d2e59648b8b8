"""Every combination of values of `--grid`, named so that a person and a folder can tell them
apart.
"""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.launcher.jobs.grid import MOST_RUNS, points

NAME = re.compile(r"[A-Za-z0-9._-]+")


def test_a_grid_is_the_product_of_its_axes() -> None:
    found = points(["training.optimizer.lr=1e-3,3e-3", "training.steps=100,200"])
    assert [point.suffix for point in found] == [
        "lr1e-3-steps100",
        "lr1e-3-steps200",
        "lr3e-3-steps100",
        "lr3e-3-steps200",
    ]
    assert found[1].words == ("training.optimizer.lr=1e-3", "training.steps=200")


def test_commas_in_brackets_and_quotes_part_no_values() -> None:
    found = points(["training.optimizer.betas=[0.9,0.95],[0.8,0.9]", "metrics.tags=['a,b'],[]"])
    assert [point.words[0] for point in found[::2]] == [
        "training.optimizer.betas=[0.9,0.95]",
        "training.optimizer.betas=[0.8,0.9]",
    ]
    assert found[0].words[1] == "metrics.tags=['a,b']"
    assert all(NAME.fullmatch(point.suffix) for point in found)


def test_axes_that_end_alike_are_named_by_what_tells_them_apart() -> None:
    (found,) = points(["data.seed=1", "experiments.seed=2"])
    assert found.suffix == "data.seed1-experiments.seed2"
    (found,) = points(["seed=1", "data.seed=2"])
    assert found.suffix == "seed1-data.seed2"


@pytest.mark.parametrize(
    ("grids", "given_too", "said"),
    [
        (["lr"], [], "is no setting with values"),
        (["=1,2"], [], "is no setting with values"),
        (["a b=1"], [], "is no setting with values"),
        (["seed=1,,2"], [], "a value is empty"),
        (["seed=1,1"], [], "1 comes twice"),
        (["seed=[1,2"], [], "] is missing"),
        (["seed=1", "seed=2"], [], "has values already"),
        (["seed=1,2"], ["seed=3"], "given beside the grid"),
        (["name=a,b"], [], "a name of its own"),
        ([f"seed={','.join(map(str, range(MOST_RUNS + 1)))}"], [], "at most 256"),
    ],
)
def test_what_is_no_grid_is_refused(grids: list[str], given_too: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        points(grids, given_too)


VALUES = st.lists(
    st.text("ab/ :_+-.1", min_size=1, max_size=4).map(str.strip).filter(bool),
    min_size=1,
    max_size=4,
    unique=True,
)


@given(VALUES, VALUES)
def test_no_two_runs_share_a_name_and_all_names_can_be_folders(
    one: list[str], two: list[str]
) -> None:
    found = points([f"a.b={','.join(one)}", f"a.c={','.join(two)}"])
    assert len(found) == len(one) * len(two)
    names = [point.suffix for point in found]
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) for name in names)
    words = [point.words for point in found]
    assert words == [(f"a.b={x}", f"a.c={y}") for x, y in itertools.product(one, two)]
