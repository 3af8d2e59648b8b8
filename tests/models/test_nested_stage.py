"""Stages of a family that grows may be nested: who trains then, what of a space joins the next one,
what it costs, and what is refused.
"""

from __future__ import annotations

from typing import Any

import pytest

from motet.models.counts import parameters_non_embedding, training_flops_per_token
from motet.models.family.base import choices
from motet.models.family.costs import choice_flops, lineage_totals
from motet.models.family.nested import NestedFamily
from motet.models.family.stage_lengths import RunShape
from motet.models.member import name_of
from tests.models.test_progressive import LENGTH, SMALL, STEPS, WHOLE, family, told

NESTED = {"members": {"half": {"d_ffn": 0.5}, "thin": {"d_ffn": 0.25}}, "draws": 2}
LAST = {"operator": "stack", "nested": NESTED}
FIRST: dict[str, Any] = {**SMALL, "nested": {"members": {"part": {"d_ffn": 0.5}}, "draws": 2}}


def joins(before: Any, operator: str = "stack", **nested: Any) -> dict[str, Any]:
    return {"operator": operator, "nested": {"before": before, "draws": 2, **nested}}


def test_the_last_stage_trains_who_a_nested_family_of_its_own_would_from_its_start() -> None:
    found, alone = family(SMALL, LAST), NestedFamily(WHOLE, NESTED, seed=3)
    assert found.problems(STEPS) == []
    members = {member.name: member for member in found.members()}
    assert list(members) == ["small", "thin", "half"]
    slices = {name: members[name] for name in ("thin", "half")}
    for step in range(100):
        assert not found.trains_slices(step)
        (first, _) = choices(found, members, step, 2) or [(), ()]
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


def test_a_stage_before_the_last_trains_slices_of_its_own_model_by_its_name() -> None:
    distilled = {"sampler": "sandwich", "loss": "distill", "distill_from_step": 5}
    first = {**FIRST, "nested": {**FIRST["nested"], **distilled}}
    middle = {
        "name": "middle",
        "model": {"d_ffn": 96},
        "steps": 50,
        "operator": "hypercloning+stack",
    }
    found = family(first, middle, PRUNE)
    assert found.problems(STEPS) == []
    small, middle, part = found.members()
    assert (small.name, middle.name, part.name) == ("small", "middle", "part")
    members = {member.name: member for member in found.members()}
    assert list(found.slices(small)) == [part]
    assert list(found.slices(middle)) == list(found.slices(None)) == []
    assert found.model_at(0) == small.config
    alone = NestedFamily(small.config, first["nested"], seed=3)
    for step in (0, 7, 99):
        chosen = choices(found, members, step, 2)
        assert chosen is not None
        # To its engine the model of the stage is the whole one.
        assert found.engine_choices(step, chosen) == choices(alone, {"part": part}, step, 2)
        for choice in chosen:
            assert [name_of(term.member) for term in choice] == ["small", "part"]
            assert choice[1].teacher == (small if step >= 5 else None)
        assert step_flops(chosen) == 2 * sum(
            training_flops_per_token(one.config, LENGTH) for one in (small, part)
        )
    assert found.engine_choices(100, choices(found, members, 100, 2) or []) is None
    assert [facts.get("members") for facts in found.stage_facts()] == [["part"], None, None]


PRUNE = {"operator": "prune", "distill": {}}


def step_flops(chosen: Any) -> float:
    return sum(choice_flops(choice, WHOLE, LENGTH) for choice in chosen)


@pytest.mark.parametrize(
    ("operator", "layers", "exact"),
    [("stack", (0, 1), True), ("interpolate", (0, 2), True), ("identity", None, True)],
)
def test_the_space_of_a_stage_joins_that_of_the_next_where_its_layers_stand(
    operator: str, layers: tuple[int, ...] | None, exact: bool
) -> None:
    found = family(FIRST, joins("all", operator, members={"half": {"d_ffn": 0.5}}, monotone=False))
    assert found.problems(STEPS) == []
    slices = {one.name: one for one in found.slices(None)}
    assert set(slices) == {"part.whole", "small.whole", "half"}
    assert [one.exact for one in found.carried[1]] == [exact, exact]
    small, part = found.members()[0], found.slices(found.members()[0])[0]
    for was, now in ((small, slices["small.whole"]), (part, slices["part.whole"])):
        assert layers is None or now.layers == layers
        assert parameters_non_embedding(now.config) == parameters_non_embedding(was.config)
    facts = found.stage_facts()[1]
    assert facts["carried"] == {"part.whole": "part", "small.whole": "small"}
    # What joins alone is a space as well: the new model is its largest.
    alone = family(FIRST, joins(["part"], operator))
    assert [one.name for one in alone.slices(None)] == ["part.whole"]


def test_what_grows_in_width_says_whether_a_slice_is_what_it_was() -> None:
    first = {"name": "small", "width": 0.5, "steps": 100, "nested": FIRST["nested"]}
    for operator, exact in (("hypercloning", False), ("prefix", True)):
        found = family(first, joins("all", operator))
        assert found.problems(STEPS) == []
        assert {one.exact for one in found.carried[1]} == {exact}
        assert [one.layers for one in found.slices(None)] == [(0, 1, 2, 3)] * 2


def test_channels_are_ordered_so_many_steps_into_the_stage_once_it_is_known_when_it_begins() -> (
    None
):
    ordered = {**LAST, "nested": {**NESTED, "order_at_step": 7}}
    first = {**SMALL, "nested": {**NESTED, "members": {"part": {"d_ffn": 0.5}}}}
    first["nested"] |= {"order_at_step": 3, "order_sequences": 16}
    found = family(first, ordered)
    assert (found.ordering(0), found.ordering(100)) == ((3, 16), (107, 1024))
    assert family(SMALL, ordered).ordering(0) is None
    assert family(SMALL, LAST).ordering(100) is None
    until = {"loss_fall": 0.1, "least_tokens": 20_000, "most_tokens": 40_000}
    found = family({"name": "small", "depth": 0.5, "until": until}, ordered)
    found.end_stage(50)
    assert found.ordering(50) == (57, 1024)


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (
            [{**SMALL, "nested": NESTED}, LAST],
            "stages[1].nested.members: 'thin' is the name of a slice of stage small; take another",
        ),
        (
            [{**FIRST, "nested": {**FIRST["nested"], "draws": 4}}, LAST],
            "stages[1].nested.draws: is 2, and of stage small it is 4: who reads which share",
        ),
        (
            [{"name": "small", "depth": 0.5, "until": {}, "nested": NESTED}, {"operator": "stack"}],
            "stages[0].nested: does not go with until",
        ),
        (
            [{**SMALL, "virtual_depth": "lvps", "nested": NESTED}, {"operator": "interpolate"}],
            "stages[0].nested: does not go with virtual_depth",
        ),
        ([{**SMALL, "nested": {"before": "all"}}, LAST], "stages[0].nested.before: nothing comes"),
        ([FIRST, joins(["hafl"])], "'hafl' is neither the model of the stage before nor a slice"),
        ([FIRST, joins(7)], "stages[1].nested.before: 7 is not all, or a list of part, small"),
        ([FIRST, joins([])], "stages[1].nested.before: is empty; leave it out"),
        (
            [FIRST, joins("all", groups=2)],
            "nested.before: part of stage small lies in 1 groups, and this stage has 2; set",
        ),
        (
            [FIRST, joins("all", order_at_step=3)],
            "nested.before: order_at_step puts other channels first than those of the stage before",
        ),
        (
            [{**FIRST, "depth": 1, "model": {"d_ffn": 96}}, joins("all", "prune")],
            "nested.before: prune leaves the model of stage small in no part of what it makes; name",
        ),
        (
            [FIRST, joins("all", by_replica=True)],
            "stages[1].nested.by_replica: is True, and of stage small it is False",
        ),
        (
            [SMALL, joins("all", by_replica=True)],
            "stages[1].nested.by_replica: member 'small.whole' leaves out layers",
        ),
        ([FIRST, joins("all", "stock")], "stages[1].operator: operator 'stock' is not one of"),
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
