"""The last stage of a family that grows may be nested: who trains then, what it costs, and what is
refused.
"""

from __future__ import annotations

from typing import Any

import pytest

from motet.models.counts import training_flops_per_token
from motet.models.family.base import choices
from motet.models.family.costs import lineage_totals
from motet.models.family.nested import NestedFamily
from motet.models.family.stage_lengths import RunShape
from motet.models.member import name_of
from tests.models.test_progressive import LENGTH, SMALL, STEPS, WHOLE, family, told

NESTED = {"members": {"half": {"d_ffn": 0.5}, "thin": {"d_ffn": 0.25}}, "draws": 2}
LAST = {"operator": "stack", "nested": NESTED}


def test_the_last_stage_trains_who_a_nested_family_of_its_own_would_from_its_start() -> None:
    found, alone = family(SMALL, LAST), NestedFamily(WHOLE, NESTED, seed=3)
    assert found.problems(STEPS) == []
    members = {member.name: member for member in found.members()}
    assert list(members) == ["small", "thin", "half"]
    slices = {name: members[name] for name in ("thin", "half")}
    for step in range(100):
        assert not found.trains_slices(step)
        (first, _) = choices(found, members, step, 2) or ()
        assert [name_of(term.member) for term in first] == ["small"]
    drawn = set()
    for step in range(100, STEPS):
        assert found.trains_slices(step)
        chosen = choices(found, members, step, 2)
        assert chosen == choices(alone, slices, step - 100, 2)
        drawn |= {name_of(term.member) for choice in chosen or () for term in choice}
    assert drawn == {"thin", "half", None}


def test_the_engine_holds_slices_in_the_last_stage_alone() -> None:
    found = family(SMALL, LAST)
    small, *slices = found.members()
    assert list(found.slices(None)) == slices
    assert list(found.slices(small)) == []
    assert [facts.get("members") for facts in found.stage_facts()] == [None, ["thin", "half"]]


def test_channels_are_ordered_so_many_steps_into_the_stage_once_it_is_known_when_it_begins() -> (
    None
):
    ordered = {**LAST, "nested": {**NESTED, "order_at_step": 7}}
    assert family(SMALL, ordered).ordered_at() == 107
    assert family(SMALL, LAST).ordered_at() is None
    until = {"loss_fall": 0.1, "least_tokens": 20_000, "most_tokens": 40_000}
    found = family({"name": "small", "depth": 0.5, "until": until}, ordered)
    assert found.ordered_at() is None
    found.end_stage(50)
    assert found.ordered_at() == 57


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (
            [{**SMALL, "nested": NESTED}, LAST],
            "stages[0].nested: only the last stage trains slices",
        ),
        ([SMALL, {**LAST, "distill": {}}], "stages[1].nested: does not go with distill"),
        ([SMALL, {**LAST, "rewarm_steps": 5}], "stages[1].nested: does not go with rewarm_steps"),
        (
            [SMALL, {"operator": "stack", "nested": {**NESTED, "teacher": "ema"}}],
            "stages[1].nested.teacher: a stage of a family that grows keeps no second set",
        ),
        ([SMALL, {"operator": "stack", "nested": 4}], "stages[1].nested: 4 is not options"),
        (
            [SMALL, {"operator": "stack", "nested": {"members": {"small": {"d_ffn": 0.5}}}}],
            "stages[1].nested.members: 'small' is the name of a stage",
        ),
        (
            [SMALL, {"operator": "stack", "nested": {"members": {"half": {"d_fn": 0.5}}}}],
            "stages[1].nested.members.half.d_fn: is no setting",
        ),
        (
            [SMALL, {"operator": "stack", "nested": {**NESTED, "order_at_step": 300}}],
            "stages[1].nested.order_at_step=300: the run has 300 steps",
        ),
    ],
)
def test_what_does_not_go_together_is_one_error(stages: list[Any], why: str) -> None:
    assert why in told(*stages)


def test_slices_are_members_in_the_account_of_separate_runs() -> None:
    """By hand: a first stage of 100 for 10 tokens, then 20 tokens of which the model of 200 passes
    over half and its slice of 50 over the other.
    """
    rows: list[dict[str, Any]] = [
        {"flops_per_token": 100.0, "lineage_tokens": 10, "lineage_flops": 1000.0},
        {
            "flops_per_token": 200.0,
            "lineage_tokens": 30,
            "lineage_flops": 1000.0 + 10 * 200 + 10 * 50,
            "members": [
                {"flops_per_token": 200.0, "flops": 2000.0},
                {"flops_per_token": 50.0, "flops": 500.0},
            ],
        },
    ]
    found = lineage_totals(rows)
    assert found["flops"] == 3500
    assert found["at_equal_cost"] == 1000 + (1000 + 2000) + (1000 + 500)
    assert found["at_equal_tokens"] == 10 * 100 + 30 * 200 + 30 * 50


def test_a_stage_is_priced_by_the_passes_of_its_slices() -> None:
    from motet.launcher.planning.stage_costs import stage_passes

    joint = {**LAST, "nested": {**NESTED, "sampler": "joint"}}
    found = family(SMALL, joint, run=RunShape(STEPS, LENGTH, lambda n: 8 * n, lambda n: 1e-3, 10))
    assert stage_passes(found, 0, 0, 100) == {}
    passes = stage_passes(found, 1, 100, STEPS)
    assert passes == {"thin": 1.0, "half": 1.0, "whole": 1.0}
    each = [training_flops_per_token(one.config, LENGTH) for one in found.slices(None)]
    assert all(cost < training_flops_per_token(WHOLE, LENGTH) for cost in each)
