"""Nested families: which slices there are, who is drawn, and what a mistake in the options says."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding
from motet.models.family.base import choices, member_problems
from motet.models.family.costs import choice_flops, term_flops
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
from motet.models.member import Exit, TeacherUpdate, Term

WHOLE = ModelConfig(64, 256, 8, 8, 4, 1024, head_dim=32)
MIXED = replace(WHOLE, n_experts=8, d_expert=256, n_dense_layers=2)
THREE = {"small": {"d_ffn": 0.25, "n_layers": 2}, "half": {"d_ffn": 0.5, "n_layers": 4}}


EXITS = {
    "loss": "layerskip",
    "depth": "first",
    "members": {"two": {"n_layers": 2}, "five": {"n_layers": 5}},
}


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


def test_a_frozen_teacher_is_followed_by_all_once_it_is_there() -> None:
    phases = [{"until_step": 10, "smallest": "whole"}, {"smallest": "small"}]
    made = family(sampler="shrinking", phases=phases, loss="distill", teacher="frozen")
    assert (made.distill_from_step, made.needs()) == (10, ("teacher",))
    assert made.teacher_update(9) is None
    assert made.teacher_update(10) == made.teacher_update(40) == TeacherUpdate(10, 0.0)
    assert drawn(made, 9, 1) == [(Term(None),)]
    (term,) = drawn(made, 10, 1)[0]
    assert (term.labels, term.distill, term.kept) == (0.5, 0.0, 0.5)
    # A member costs its own pass, and the teacher a third of the whole model's.
    cost = choice_flops((term,), WHOLE, 64)
    assert cost == term_flops(term, WHOLE, 64) + term_flops(Term(None), WHOLE, 64) / 3


def test_an_averaged_teacher_joins_the_two_branches_of_poa() -> None:
    options = {"sampler": "poa", "teacher": "ema", "ema_steps": 100, "distill_from_step": 5}
    made = family(**options, distill_weight=1.0)
    before, after = drawn(made, 4, 1)[0], drawn(made, 5, 1)[0]
    assert [term.kept for term in before] == [0.0, 0.0]
    assert [x for t in after for x in (t.labels, t.distill, t.kept)] == pytest.approx(
        [0.8, 0.0, 0.8, 0.2, 0.2, 0.2]
    )
    keeps = [made.teacher_update(step).keep for step in (0, 50, 100, 900)]
    assert keeps == pytest.approx([0.992, (0.992 + 0.9999) / 2, 0.9999, 0.9999])


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


def test_two_models_train_jointly_and_then_in_turn() -> None:
    options = {"loss": "tsjt", "tsjt": {"joint_until_step": 5, "low_weight": 0.4}}
    made = family(**options, members={"low": {"n_layers": 4}}, depth="first")
    (low,) = made.members()
    assert low.layers == (0, 1, 2, 3)
    assert drawn(made, 4) == [(Term(None, 0.6), Term(low, 0.4))] * 4
    assert drawn(made, 5) == [(Term(None),), (Term(low),)] * 2
    one_share = [names(drawn(made, step, 1)[0]) for step in (5, 6, 7)]
    assert one_share == [("low",), (None,), ("low",)]
    assert "joint_until_step=5: the run has 5 steps" in made.problems(5)[0]
    assert made.problems(6) == []


def test_exits_take_turns_and_deeper_blocks_are_dropped_more_often() -> None:
    made = family(**EXITS, seed=3)
    two, five = made.members()
    # e(l) of blocks 1 and 4 at scale .2 is .2 x 1 and .2 x 10; the last block's 7 + .2 x 21.
    for step, member, weight in ((0, two, 0.2), (1, five, 2.0), (2, two, 0.2)):
        (term,) = drawn(made, step, 1)[0]
        assert [out.member for out in term.exits] == [member]
        assert term.exits[0].labels == pytest.approx(weight / (weight + 11.2))
        assert term.labels == pytest.approx(11.2 / (weight + 11.2))
        assert (term.members, term.member) == ((None, member), None)
    skipped = Counter(
        layer for step in range(2000) for (term,) in drawn(made, step) for layer in term.skips
    )
    for layer in range(8):
        chance = 0.1 * (2 ** (layer / 7) - 1)
        assert skipped[layer] == pytest.approx(8000 * chance, abs=4 * (8000 * chance) ** 0.5)
    assert drawn(made, 11) == drawn(family(**EXITS, seed=3), 11)
    gradual = {"curriculum": "gradual", "curriculum_steps": 100, "dropout_steps": 100}
    slow = family(**EXITS, layerskip=gradual)
    exits = [len(drawn(slow, step, 1)[0][0].exits) for step in (0, 49, 50)]
    assert exits == [1, 1, 2]
    assert all(not term.skips for (term,) in drawn(slow, 0, 64))
    assert "first loss at step 50, but the run has 50" in slow.problems(50)[0]


def test_a_pass_costs_the_blocks_and_heads_that_it_runs() -> None:
    two = family(**EXITS).members()[0]
    full = term_flops(Term(None), WHOLE, 128)
    alone = term_flops(Term(two), WHOLE, 128)
    head = 6 * WHOLE.vocabulary_size * WHOLE.d_model
    without = term_flops(Term(None, skips=tuple(range(2, 8))), WHOLE, 128)
    assert without == alone
    assert term_flops(Term(None, 0.8, exits=(Exit(two, 0.2),)), WHOLE, 128) == full + head
    assert term_flops(Term(None, 0.0), WHOLE, 128) == full / 3


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
        ({"loss": "tsjt"}, "tsjt.joint_until_step: must say at which step the two go apart"),
        (
            {"loss": "tsjt", "tsjt": {"joint_until_step": 5}},
            "members: are 2; tsjt trains one member beside the whole model",
        ),
        ({"loss": "layerskip"}, "'half' is no early exit: it must have the first layers"),
        ({"tsjt": {"joint_until_step": 5}}, "tsjt: belongs to loss tsjt, not to labels"),
        ({**EXITS, "sampler": "joint"}, "leave it out: loss layerskip says who trains on what"),
        ({**EXITS, "layerskip": {"every": 3}}, "3 is more than the 2 exits"),
        ({**EXITS, "layerskip": {"curriculum": "gradual"}}, "over how many steps exits are"),
        ({**EXITS, "layerskip": {"dropout": 1}}, "dropout: 1 is not a number from 0 to 0.99"),
        (
            {**EXITS, "members": {"a": {"n_layers": 1}}},
            "'a' has one layer, whose loss has the weight 0 by the rule",
        ),
        ({"teacher": "frozen"}, "is followed by nobody with loss labels; use distill or poa"),
        ({"teacher": "frozen", "loss": "distill"}, "after which step the whole model is frozen"),
        (
            {
                "teacher": "frozen",
                "loss": "distill",
                "teacher_step": 9,
                "distill_from_step": 8,
            },
            "8 is before the teacher is frozen, after step 9",
        ),
        ({"teacher": "ema", "sampler": "poa"}, "ema_steps: must say over how many steps"),
        ({"teacher": "ema", "sampler": "poa", "ema_steps": 9}, "when distillation begins"),
        ({"deploy": "ema"}, "belongs to teacher ema, not to largest"),
        ({"normalize": "user"}, "did you mean 'users'?"),
        ({"mask_update": 1}, "mask_update: 1 is not true or false"),
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


def test_every_fault_of_others_that_the_page_names_has_the_test_that_it_names() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "models.md").read_text()
    named = re.findall(r"^\| .* \| `(tests/\S+)::(\w+)` \|$", page, re.MULTILINE)
    assert len(named) > 25
    for file, test in named:
        assert f"def {test}(" in (root / file).read_text(), (file, test)
