"""Nested families: which slices there are, who is drawn, and what a mistake in the options says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding
from motet.models.family.base import choices, member_problems
from motet.models.family.nested import NestedFamily
from motet.models.family.samplers import SAMPLERS, DrawKey
from motet.models.family.space import (
    SliceError,
    depth_layers,
    layer_order,
    member_of,
    members_by_size,
    size_of,
    unnested,
)
from motet.models.member import Term

WHOLE = ModelConfig(64, 256, 8, 8, 4, 1024, head_dim=32)
MIXED = replace(WHOLE, n_experts=8, d_expert=256, n_dense_layers=2)
THREE = {"small": {"d_ffn": 0.25, "n_layers": 2}, "half": {"d_ffn": 0.5, "n_layers": 4}}


def family(seed: int = 0, **options: Any) -> NestedFamily:
    return NestedFamily(WHOLE, {"members": THREE, **options}, seed)


def drawn(made: NestedFamily, step: int, draws: int = 4) -> list[tuple[Term, ...]]:
    named = {member.name: member for member in made.members()}
    found = choices(made, named, step, draws)
    return found or [(Term(None),)] * draws


def names(choice: tuple[Term, ...]) -> tuple[str | None, ...]:
    return tuple(term.member.name if term.member else None for term in choice)


@given(st.integers(1, 60))
def test_layers_of_a_smaller_depth_are_among_those_of_a_larger_one(n_layers: int) -> None:
    assert sorted(layer_order(n_layers)) == list(range(n_layers))
    for depth in range(1, n_layers):
        assert set(depth_layers(n_layers, depth)) < set(depth_layers(n_layers, depth + 1))
    if n_layers > 1:
        assert depth_layers(n_layers, 2) == (0, n_layers - 1)


@given(st.integers(1, 8), st.integers(1, 6))
def test_groups_of_layers_keep_equally_many_and_a_smaller_depth_lies_in_a_larger_one(
    groups: int, size: int
) -> None:
    n_layers, held = groups * size, set[int]()
    for depth in range(groups, n_layers + 1, groups):
        layers = depth_layers(n_layers, depth, groups)
        assert held < set(layers)
        assert set(Counter(layer // size for layer in layers).values()) == {depth // groups}
        held = set(layers)
    assert depth_layers(n_layers, n_layers, groups) == tuple(range(n_layers))


def test_members_keep_layers_of_every_group_or_say_which_depth_would() -> None:
    made = family(layer_groups=2)
    assert [member.layers for member in made.members()] == [(0, 7), (0, 2, 5, 7)]
    (small,) = NestedFamily(WHOLE, {"members": ["1m"], "layer_groups": 4}, 0).members()
    assert len(small.layers) % 4 == 0
    with pytest.raises(UserError, match="3 cannot be taken equally from layer_groups=2; use 2 or"):
        family(members={"odd": {"n_layers": 3}}, layer_groups=2)
    with pytest.raises(UserError, match="layer_groups: 3 does not divide 8 layers; 1 would"):
        family(layer_groups=3)


@given(
    st.lists(st.floats(0.08, 0.95), min_size=1, max_size=3, unique=True),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([WHOLE, MIXED]),
)
def test_members_by_size_are_near_and_lie_in_each_other(
    shares: list[float], groups: int, whole: ModelConfig
) -> None:
    most = parameters_non_embedding(whole)
    sizes = [f"{round(share * most / 1000)}k" for share in shares]
    assume(len(set(sizes)) == len(sizes))
    axes = ["d_ffn", "n_layers", "n_kv_heads", "d_model"]
    try:
        found = members_by_size(whole, sizes, axes, groups)
    except SliceError:  # inside a larger one little may be left
        assume(False)
    assert unnested(whole, found) == []
    assert member_problems(whole, found) == []
    for member in found:
        assert parameters_non_embedding(member.config) == pytest.approx(
            size_of(member.name), rel=0.1
        )


def test_a_size_that_no_slice_is_near_says_which_are() -> None:
    with pytest.raises(ValueError, match="9k: no slice of n_layers is near; the nearest have"):
        members_by_size(WHOLE, ["9k"], ["n_layers"])


def test_widths_may_differ_by_layer() -> None:
    member = member_of(WHOLE, "steps", {"n_layers": 3, "d_ffn": [128, 256, 0.5]})
    assert member.config.layer_ffn == (128, 256, 512)
    assert member_problems(WHOLE, [member]) == []


def test_a_smaller_member_that_is_no_part_of_a_larger_one_is_refused_unless_asked_for() -> None:
    members = {"flat": {"n_layers": 2, "d_ffn": 1024}, "thin": {"d_ffn": 512}}
    with pytest.raises(UserError, match="'flat' is smaller than 'thin', but no part of it: hidden"):
        NestedFamily(WHOLE, {"members": members}, 0)
    assert len(NestedFamily(WHOLE, {"members": members, "monotone": False}, 0).members()) == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_is_a_function_of_seed_step_and_share(sampler: str) -> None:
    places = [DrawKey(7, step, share, 4, 5) for step in range(20) for share in range(4)]
    first = [SAMPLERS[sampler](place) for place in places]
    assert first == [SAMPLERS[sampler](place) for place in reversed(places)][::-1]
    assert all(0 <= number < 5 for choice in first for number in choice)
    other = [SAMPLERS[sampler](place._replace(seed=8)) for place in places]
    assert (first == other) == (sampler == "joint")


def test_uniform_draws_are_uniform_and_independent_of_each_other() -> None:
    made = np.array(
        [SAMPLERS["uniform"](DrawKey(3, s, d, 2, 3))[0] for s in range(3000) for d in (0, 1)]
    ).reshape(-1, 2)
    pairs = Counter(map(tuple, made.tolist()))
    expected = 3000 / 9
    assert sum((pairs[a, b] - expected) ** 2 / expected for a in range(3) for b in range(3)) < 26.1


def test_a_sandwich_has_the_largest_the_smallest_and_one_between() -> None:
    made = [SAMPLERS["sandwich"](DrawKey(0, step, 0, 1, 5)) for step in range(400)]
    assert all(choice[0] == 4 and choice[-1] == 0 and len(choice) == 3 for choice in made)
    assert {choice[1] for choice in made} == {1, 2, 3}
    assert SAMPLERS["sandwich"](DrawKey(0, 0, 0, 1, 2)) == [1, 0]


def test_poa_draws_small_members_more_often_and_each_before_it_repeats() -> None:
    # Four members beside the whole: repetitions round(3 x linspace(3, 1)) = 9, 7, 5, 3.
    made = [SAMPLERS["poa"](DrawKey(1, step, 0, 1, 5)) for step in range(48)]
    assert all(choice[0] == 4 for choice in made)
    for cycle in (made[:24], made[24:]):
        assert Counter(choice[1] for choice in cycle) == {0: 9, 1: 7, 2: 5, 3: 3}


def test_balanced_draws_mirror_each_other() -> None:
    for step in range(50):
        pair = [SAMPLERS["balanced"](DrawKey(0, step, share, 4, 5))[0] for share in range(4)]
        assert pair[0] + pair[1] == pair[2] + pair[3] == 4


def test_phases_only_add_smaller_members() -> None:
    phases = [{"until_step": 10, "smallest": "whole"}, {"until_step": 20, "smallest": "half"}, {}]
    phases[2] = {"smallest": "small"}
    made = family(sampler="shrinking", phases=phases)
    seen = [
        {names(c)[0] for s in steps for c in drawn(made, s)}
        for steps in (range(10), range(10, 20), range(20, 60))
    ]
    assert seen == [{None}, {None, "half"}, {None, "half", "small"}]
    assert made.problems(30) == []
    assert "the last begins at step 20, but the run has 20 steps" in made.problems(20)[0]


def test_losses_are_what_the_rules_say() -> None:
    plain = drawn(family(sampler="sandwich"), 0)[0]
    assert [term.labels for term in plain] == pytest.approx([1 / 3] * 3)
    poa = drawn(family(sampler="poa"), 0)[0]
    assert [x for t in poa for x in (t.labels, t.distill)] == pytest.approx([0.8, 0.0, 0.2, 0.2])
    assert poa[1].teacher is None
    follow = family(sampler="sandwich", loss="distill", distill_from_step=5, distill_weight=0.6)
    assert all(term.distill == 0 for term in drawn(follow, 4)[0])
    first, *others = drawn(follow, 5)[0]
    assert (first.labels, first.distill) == (pytest.approx(1 / 3), 0)
    weights = [x for t in others for x in (t.labels, t.distill)]
    assert weights == pytest.approx([0.4 / 3, 0.6 / 3] * 2)


def test_a_teacher_that_was_not_drawn_runs_forward_alone() -> None:
    made = family(sampler="uniform", loss="distill", distill_from_step=0)
    for step in range(20):
        for choice in drawn(made, step):
            if names(choice) == (None,):
                assert choice == (Term(None),)
            else:
                teacher, student = choice
                assert (teacher.member, teacher.labels, teacher.distill) == (None, 0, 0)
                assert (student.labels, student.distill) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"members": {}}, "names no member; write name"),
        ({"members": [0.5]}, "0.5 is no size; write 125m"),
        ({"members": ["big"]}, "'big' is no size; write 125m"),
        ({"members": {"a": {"d_fn": 4}}}, "members.a.d_fn: is no setting (did you mean 'd_ffn'?)"),
        ({"members": {"a": {"d_ffn": 4096}}}, "4096 is not a number from 1 to the whole model's"),
        ({"members": {"a": {"d_ffn": 0.3}}}, "is 307.2 of 1024, no whole number"),
        ({"members": {"a": {"n_experts": 2}}}, "a.n_experts: is no axis of this model; it has"),
        ({"members": {"a": {"layers": [3, 1]}}}, "is not a rising list of layers from 0 to 7"),
        ({"members": {"a": {"n_layers": 8}}}, "member 'a' is the whole model; leave it out"),
        ({"members": {"a": {"d_ffn": [1, 2]}}}, "has 2 widths for 8 layers; give one for each"),
        ({"groups": 3}, "cannot be cut in 3 equal groups; groups="),
        ({"sampler": "sandwhich"}, "did you mean 'sandwich'?"),
        ({"sampler": "balanced", "draws": 3}, "3 is not even; sampler balanced draws in pairs"),
        ({"loss": "distill"}, "distill_from_step: must say when distillation begins"),
        ({"loss": "poa"}, "poa trains the largest on every share; sampler uniform does not"),
        ({"phases": [{"smallest": "half"}]}, "belong to sampler shrinking, not to uniform"),
        ({"sampler": "shrinking"}, "phases: do not cover the run"),
        (
            {"sampler": "shrinking", "phases": [{"smallest": "half"}, {"smallest": "small"}]},
            "phases: do not cover the run",
        ),
        (
            {
                "sampler": "shrinking",
                "phases": [{"until_step": 5, "smallest": "small"}, {"smallest": "half"}],
            },
            "take members away again",
        ),
        ({"members": {"a": {"d_ffn": 0.5}, "b": {"d_ffn": 512}}}, "'a' and 'b' are the same slice"),
        ({"axes": ["depth"], "members": ["1m"]}, "'depth' is no axis of this model"),
    ],
)
def test_a_mistake_says_which_option_and_what_would_work(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as raised:
        family(**options)
    assert said in str(raised.value)
    assert "family.options" in str(raised.value)
