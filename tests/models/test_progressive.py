"""Families that grow: which model trains in which step, for how long, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.models.config import ModelConfig
from motet.models.counts import parameters_non_embedding, training_flops_per_token
from motet.models.family.base import Term, choices
from motet.models.family.costs import lineage_totals
from motet.models.family.growth_presets import gstack_tokens
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.stage_lengths import RunShape
from motet.models.growth.registry import stated_jump
from tests.models.families import tiny

WHOLE = replace(tiny(), n_layers=4, n_heads=4, n_kv_heads=2)
STEPS, SEQUENCES, LENGTH = 400, 8, 64
SMALL = {"name": "small", "depth": 0.5, "steps": 100}
STACK = {"operator": "stack"}


def shape(steps: int = STEPS, warmup_steps: int = 10) -> RunShape:
    return RunShape(steps, LENGTH, lambda step: step * SEQUENCES, lambda n: 1e-3, warmup_steps)


def family(
    *stages: Any, whole: ModelConfig = WHOLE, run: RunShape | None = None, **options: Any
) -> ProgressiveFamily:
    asked = {**({"stages": list(stages)} if stages else {}), **options}
    found = ProgressiveFamily(whole, asked, seed=3)
    found.fit(run or shape())
    return found


def told(*stages: Any, whole: ModelConfig = WHOLE, **options: Any) -> str:
    """What is said of stages that cannot be."""
    try:
        return "\n".join(family(*stages, whole=whole, **options).problems(STEPS))
    except UserError as error:
        return str(error)


def test_each_step_trains_the_model_of_its_stage_alone() -> None:
    middle = {"name": "middle", "width": 0.5, "steps": 50, "operator": "stack"}
    found = family({**SMALL, "width": 0.5}, middle, {"operator": "hypercloning"})
    assert found.problems(STEPS) == []
    assert found.starts == (0, 100, 150)
    members = {member.name: member for member in found.members()}
    assert list(members) == ["small", "middle"]

    def who(step: int) -> str | None:
        chosen = choices(found, members, step, 1)
        if chosen is None:
            return None
        ((term,),) = chosen
        assert term.member is not None
        assert term.member == found.member_at(step)
        return term.member.name

    assert [who(step) for step in (0, 99, 100, 149)] == ["small", "small", "middle", "middle"]
    assert who(150) is who(399) is None  # the whole model alone, as in any run
    small, whole = members["small"].config, found.whole
    assert (small.n_layers, small.d_model, small.n_heads, small.n_kv_heads) == (2, 16, 2, 1)
    assert small.head_width == whole.head_width


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"steps": 120}, 120),
        ({"tokens": 120 * SEQUENCES * LENGTH}, 120),
        ({"tokens": "60k"}, 118),
        ({"flops": 1e9}, None),
    ],
)
def test_a_stage_ends_with_the_first_whole_step_that_holds_its_length(
    length: dict[str, Any], steps: int | None
) -> None:
    found = family({"name": "small", "depth": 0.5, **length}, STACK)
    each = training_flops_per_token(found.stages[0].config, LENGTH) * SEQUENCES * LENGTH
    assert found.starts[1] == (steps or -(-1e9 // each))


def test_a_run_that_has_begun_keeps_its_stages_when_it_becomes_longer() -> None:
    sizes: list[dict[str, Any]] = [{"name": "small", "depth": 0.5}, {}]
    found = family(*sizes, preset="yano2025")
    longer = ProgressiveFamily(WHOLE, {"stages": sizes, "preset": "yano2025"}, 3)
    longer.fit(shape(2 * STEPS), found.stage_facts())
    assert longer.starts == found.starts
    anew = family(*sizes, preset="yano2025", run=shape(2 * STEPS))
    assert anew.starts != found.starts
    stage = longer.stage(2 * STEPS - 1)
    assert stage is not None
    assert stage.start_step + stage.steps == 2 * STEPS


def test_every_stage_has_a_learning_rate_and_a_warm_up_of_its_own() -> None:
    found = family({**SMALL, "lr": 4e-3}, {**STACK, "warmup_steps": 3})
    first, second = found.stage(99), found.stage(100)
    assert first is not None
    assert second is not None
    assert (first.start_step, first.steps, first.lr_scale, first.warmup_steps) == (0, 100, 4, None)
    assert (second.start_step, second.steps) == (100, 300)
    assert (second.lr_scale, second.warmup_steps) == (1, 3)


def test_yano2025_lets_each_member_cost_what_it_would_alone() -> None:
    """Doubling sizes cost 64 of 1 + 4 + 16 + 64, with attention and head as they are counted."""
    whole = replace(WHOLE, n_layers=8)
    depths = [{"name": f"d{n}", "depth": n / 8} for n in (1, 2, 4)]
    found = family(*depths, {}, whole=whole, preset="yano2025", run=shape(20_000, 1))
    configs = [stage.config for stage in found.stages]
    assert [config.n_layers for config in configs] == [1, 2, 4, 8]
    assert [stage.operator for stage in found.stages] == ["", *["interpolate"] * 3]
    rows, tokens, flops = [], 0, 0.0
    for number, (config, start) in enumerate(zip(configs, found.starts, strict=True)):
        read = (found.stop_of(number) - start) * SEQUENCES * LENGTH
        each = training_flops_per_token(config, LENGTH)
        tokens, flops = tokens + read, flops + read * each
        rows.append({"flops_per_token": each, "lineage_tokens": tokens, "lineage_flops": flops})
    # Alone: as many tokens for each parameter.
    alone = [
        parameters_non_embedding(config) * training_flops_per_token(config, LENGTH)
        for config in configs
    ]
    for row, cost in zip(rows, alone, strict=True):
        assert row["lineage_flops"] / rows[-1]["lineage_flops"] == pytest.approx(
            cost / alone[-1], rel=0.01
        )
    saved = lineage_totals(rows)["saved_at_equal_cost"]
    assert saved == pytest.approx(1 - alone[-1] / sum(alone), abs=1e-3)
    peaks = [found.peak_lr(number) for number in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] == 1e-3


def test_doubling_sizes_save_what_the_arithmetic_says() -> None:
    """Where FLOPs are 6 N a token: 1 - 64 / 85."""
    rows, tokens, flops = [], 0.0, 0.0
    for n, alone, before in ((1, 1, 0), (2, 4, 1), (4, 16, 4), (8, 64, 16)):
        read = (alone - before) / (6 * n)
        tokens, flops = tokens + read, flops + 6 * n * read
        rows.append({"flops_per_token": 6 * n, "lineage_tokens": tokens, "lineage_flops": flops})
    assert lineage_totals(rows)["saved_at_equal_cost"] == pytest.approx(1 - 64 / 85)


@pytest.mark.parametrize(
    ("parameters", "tokens", "published"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.1e9), (13e9, 2e12, 15.8e9), (70e9, 2e12, 42.5e9)],
)
def test_the_guideline_of_gstack_gives_the_published_table(
    parameters: float, tokens: float, published: float
) -> None:
    assert gstack_tokens(parameters, 6 * parameters * tokens) == pytest.approx(published, rel=3e-3)


def test_gstack_stacks_a_base_of_a_quarter_of_the_layers() -> None:
    found = family(preset="gstack", tokens="50k")
    assert [stage.config.n_layers for stage in found.stages] == [1, 4]
    assert found.stages[1].operator == "stack"
    assert found.starts[1] == -(-50_000 // (SEQUENCES * LENGTH))
    assert "fitted to runs of billions" in told(preset="gstack")


def test_upcycle_begins_with_the_dense_model_whose_copies_are_the_experts() -> None:
    whole = replace(WHOLE, n_experts=4, experts_per_token=2, d_expert=24)
    found = family(whole=whole, preset="upcycle", tokens="50k")
    assert found.problems(STEPS) == []
    assert (found.stages[0].config.n_experts, found.stages[0].config.d_ffn) == (0, 24)
    assert found.growth(1).exact


def test_a_size_in_parameters_is_one_that_the_operator_can_grow() -> None:
    half = parameters_non_embedding(replace(WHOLE, n_layers=2))
    found = family({"name": "small", "parameters": half, "steps": 9}, STACK, run=shape(20, 1))
    assert found.stages[0].config == replace(found.stages[0].config, n_layers=2, d_model=32)
    assert found.problems(20) == []
    asked = {"name": "small", "parameters": "2", "steps": 9}
    assert f"there are {parameters_non_embedding(replace(WHOLE, n_layers=1)):,}" in told(
        asked, STACK
    )


def test_what_an_operator_freezes_trains_again_after_so_many_steps() -> None:
    found = family(SMALL, {"operator": "incremental", "frozen_steps": 20})
    assert found.frozen(99) == frozenset()
    assert "embedding.weight" in found.frozen(100)
    assert found.frozen(119) == found.frozen(100)
    assert found.frozen(120) == frozenset()


def test_a_pair_of_operators_may_raise_the_loss_by_the_sum_of_both() -> None:
    assert stated_jump("bert2bert-aki+stack") == stated_jump("bert2bert-aki") + stated_jump("stack")
    found = family(SMALL, {**STACK, "loss_jump_nats": 0.3})
    assert found.loss_jump_nats(1) == 0.3


def test_a_v_cycle_has_the_published_shares_and_blends_with_its_first_model() -> None:
    """5,000 steps of 100,000 of the large model, 50,000 of the small one (arXiv:2404.07999)."""
    found = family(preset="vcycle", alpha=0.5, run=shape(400, 10))
    assert found.problems(400) == []
    assert found.starts == (0, 20, 220)
    first, small, whole = found.stages
    assert first.config == whole.config == WHOLE
    assert (small.config.n_layers, small.config.d_model) == (2, WHOLE.d_model // 2)
    assert [found.blended_with(number) for number in range(3)] == [None, None, 0]
    assert found.stage_facts()[2]["operator"] == "decoalesce (0.5, the rest first)"
    assert found.loss_jump_nats(2) == found.loss_jump_nats(1) == 8.0


def test_maps_that_are_learned_are_paid_for() -> None:
    ligo = {"name": "ligo", "steps": 20, "sequences": 3}
    found = family(SMALL, {"operator": ligo})
    assert found.problems(STEPS) == []
    assert [found.learning_sequences(number) for number in range(2)] == [0, 60]
    assert found.stage_facts()[1]["learning_tokens"] == 60 * LENGTH
    assert "learning_tokens" not in found.stage_facts()[0]


WIDE = {"name": "small", "width": 0.5, "steps": 100}
SPARKLING = {"operator": "sparkling", "warmup_steps": 0}


def test_the_rate_of_new_values_alone_rises_above_that_of_the_rest() -> None:
    found = family(WIDE, {**SPARKLING, "rewarm_steps": 4})
    assert found.problems(STEPS) == []
    shares = [found.rewarm_share(step) for step in (99, 100, 101, 102, 103, 104)]
    assert shares == pytest.approx([1, 0.325, 0.65, 0.975, 1.3, 1])
    new = found.new_elements(100, "blocks.0.feed_forward.down_proj.weight")
    assert new is not None
    old_rows, old_columns = WHOLE.d_model // 2, WHOLE.d_ffn // 2
    assert not new[:old_rows, :old_columns].any()
    assert new[old_rows:].all()
    assert new[:, old_columns:].all()


def test_minitron_prunes_and_follows_what_it_pruned() -> None:
    found = family(preset="minitron", larger={"d_ffn": 2 * WHOLE.d_ffn})
    assert found.problems(STEPS) == []
    assert found.starts == (0, 389)  # 400 / 1.03, rounded up
    (large,) = found.members()
    assert (large.config.d_ffn, found.told(1)) == (2 * WHOLE.d_ffn, "prune, then taught by large")
    assert (found.term(388), found.taught_by(large)) == (None, None)
    assert found.term(389) == Term(None, 0.0, kept=1.0)
    assert found.taught_by(None) == large.config
    first, last = found.stage_facts()
    assert "teacher_flops_per_token" not in first
    forward = training_flops_per_token(large.config, LENGTH) / 3
    assert last["teacher_flops_per_token"] == pytest.approx(forward)
    longer = family(preset="minitron", larger={"d_ffn": 2 * WHOLE.d_ffn}, tokens=100 * LENGTH)
    assert longer.starts == (0, 13)


def test_a_stage_may_follow_any_model_before_it() -> None:
    middle = {"name": "middle", "width": 0.5, "steps": 50, "operator": "stack"}
    last = {"operator": "hypercloning", "distill": {"of": "small", "labels": 0.5}}
    found = family({**SMALL, "width": 0.5}, middle, last)
    assert found.problems(STEPS) == []
    assert found.taught_by(None) == found.stages[0].config
    assert found.term(399) == Term(None, 0.5, kept=1.0)


def test_rates_and_logits_follow_the_width_from_the_first_stage_on() -> None:
    deep = {"name": "deep", "width": 0.5, "steps": 50, "operator": "stack"}
    stages = ({**SMALL, "width": 0.5}, deep, {"operator": "hypercloning", "lr": 5e-4})
    run = replace(shape(), peak_lr=lambda size: 1 / size)
    found, plain = (family(*stages, run=run, **o) for o in ({"width_multipliers": "mup"}, {}))
    assert found.problems(STEPS) == plain.problems(STEPS) == []
    assert [one.config.output_multiplier for one in found.stages] == [1, 1, 0.5]
    assert [member.config.output_multiplier for member in found.members()] == [1, 1]
    assert found.whole.output_multiplier == 0.5
    # One rate for all, the base's by its size; a stage's own is taken as it is.
    base = parameters_non_embedding(found.stages[0].config)
    assert [found.peak_lr(number) for number in range(3)] == [1 / base, 1 / base, 5e-4]
    assert plain.peak_lr(1) < plain.peak_lr(0)
    facts = [entry["width_multipliers"] for entry in found.stage_facts()]
    assert [entry["output"] for entry in facts] == [1, 1, 0.5]
    assert facts[0]["learning_rate"] == facts[1]["learning_rate"] == {}
    assert set(map(tuple, facts[2]["learning_rate"].values())) == {(0.5,)}
    assert "width_multipliers" not in plain.stage_facts()[0]
    # Made again of its own frozen model it is the same.
    again = ProgressiveFamily(found.whole, found.options, found.seed)
    assert [one.config for one in again.stages] == [one.config for one in found.stages]


def test_the_multiplied_model_grows_by_its_operator_and_exactly() -> None:
    """Also back to smaller ones, and beside one that was there before."""
    found = family({**WIDE}, {"operator": "hypercloning"}, width_multipliers="mup")
    growth = found.growth(1)
    assert growth.exact
    assert growth.source.output_multiplier == 1.0
    assert growth.target == found.whole
    cycle = family(preset="vcycle", width_multipliers="mup")
    assert [one.config.output_multiplier for one in cycle.stages] == [1, 2, 1]
    assert cycle.problems(STEPS) == []
    assert cycle.blended_with(2) == 0
    sizes = ({"name": "small", "width": 0.5}, {"operator": "hypercloning"})
    yano = family(*sizes, preset="yano2025", width_multipliers="mup")
    assert [stage.lr for stage in yano.stages] == [None, None]


CUT = {"name": "cut", "operator": "prune", "steps": 100}
MUP = {"width_multipliers": "mup"}
HALF = {"members": {"half": {"d_ffn": 0.5}}}
REFUSED = [
    ([], {}, "stages: is not set"),
    ([SMALL], {}, "a model that grows has 2 or more"),
    ([SMALL, {}], {}, "operator: is not set; write one such as stack"),
    ([SMALL, {"operator": "stak"}], {}, "did you mean 'stack'"),
    ([SMALL, {"operator": {"name": "stack", "noise": 1}}], {}, "has no option 'noise'"),
    ([SMALL, {"operator": "hypercloning"}], {}, "this operator changes"),
    ([SMALL, {"operator": "bert2bert-aki+ligo"}], {}, "goes with no other operator"),
    ([SMALL, {"operator": {"name": "ligo", "steps": 0}}], {}, "0 is not a whole number >= 1"),
    ([SMALL, {"operator": {"name": "mango", "lr": -1}}], {}, "-1 is not a number above 0"),
    ([SMALL, {**STACK, "blend": 0.5}], {}, "no stage before whole has a model of its sizes"),
    ([{**SMALL, "blend": 0.5}, STACK], {}, "nothing comes before the first stage"),
    ([SMALL, {**STACK, "blend": 2}], {}, "2 is not a number from 0 to 1"),
    ([SMALL, {"operator": "prune"}], {}, "is more than the 2 there are; prune takes less"),
    ([SMALL, {"operator": "prune+stack"}], {}, "write prune alone"),
    (
        [{**SMALL, "depth": 1}, {**CUT, "depth": 0.5}, {"operator": "stack"}],
        {},
        "layers has 0 scores",
    ),
    ([{**SMALL, "operator": "stack"}, STACK], {}, "nothing comes before the first stage"),
    ([{**SMALL, "tokens": 5}, STACK], {}, "steps says how long the stage is already"),
    ([{**SMALL, "steps": "soon"}, STACK], {}, "'soon' is not a whole number of steps"),
    ([{**SMALL, "steps": True}, STACK], {}, "True is not a whole number of steps"),
    ([{**SMALL, "steps": 1.5}, STACK], {}, "1.5 is not a whole number of steps"),
    ([{**SMALL, "steps": 400}, STACK], {}, "nothing is left for the last stage"),
    ([{**SMALL, "steps": 5}, STACK], {}, "no more than its warm-up of 10"),
    ([SMALL, {**STACK, "warmup_steps": 300}], {}, "no more than its warm-up of 300"),
    ([{"name": "small", "depth": 0.5}, STACK], {}, "stage small has no length"),
    ([{"name": "small", "steps": 5}, STACK], {}, "has no size; give one of"),
    ([{**SMALL, "depth": 0.3}, STACK], {}, "shares that fit: 1/2, 1/4, 3/4"),
    ([{**SMALL, "depth": 2}, STACK], {}, "2 is not a share"),
    ([{**SMALL, "depth": "1/0"}, STACK], {}, "'1/0' is not a share"),
    ([{**SMALL, "parameters": "5k"}, STACK], {}, "parameters says the size already"),
    ([{**SMALL, "model": {"d_modle": 3}}, STACK], {}, "did you mean 'd_model'"),
    ([{**SMALL, "model": {"n_heads": 3}}, STACK], {}, "stages[0].model.n_"),
    ([{**SMALL, "name": "whole"}, STACK], {}, "'whole' is not a name"),
    ([{**SMALL, "name": None}, STACK], {}, "None is not a name"),
    ([SMALL, {**STACK, "name": "large"}], {}, "the last stage is the run's model"),
    ([SMALL, {**STACK, "steps": 5}], {}, "the last stage takes the rest of the run"),
    ([SMALL, {**STACK, "depth": 1}], {}, "the last stage has the sizes of the run's model"),
    ([SMALL, {**SMALL, **STACK}, STACK], {}, "'small' is the name of two"),
    ([SMALL, {**STACK, "frozen_steps": 3}], {}, "stack freezes nothing"),
    ([SMALL, {**STACK, "rewarm_steps": 3}], {}, "stack makes no new values"),
    ([WIDE, {**SPARKLING, "rewarm_steps": 301}], {}, "301 are more than the 300 of the stage"),
    ([WIDE, {**SPARKLING, "rewarm_steps": 0}], {}, "0 is not a whole number >= 1"),
    ([SMALL, STACK], MUP, "all stages are as wide as the first"),
    ([SMALL, STACK], {"width_multipliers": "sp"}, "'sp' is not mup, or left out"),
    ([WIDE, {**SPARKLING, "nested": HALF}], MUP, "slices of a nested stage share weights"),
    ([{**SMALL, "lr": 0}, STACK], {}, "0 is not a number above 0"),
    ([SMALL, {**STACK, "lr": 0}], {}, "0 is not a number above 0"),
    ([SMALL, {**STACK, "lrr": 0.1}], {}, "stages[1].lrr"),
    (["small", STACK], {}, "stages[0]: 'small' is not a mapping"),
    ([SMALL, STACK], {"preset": "yano"}, "did you mean 'yano2025'"),
    ([SMALL, STACK], {"preset": "vcycle"}, "preset vcycle makes them itself"),
    ([], {"preset": "vcycle", "alpha": -1}, "-1 is not a number from 0 to 1"),
    ([], {"preset": "vcycle", "factor": 3}, "1/3 of 4 is no whole number"),
    ([SMALL, STACK], {"preset": "minitron"}, "preset minitron makes them itself"),
    ([], {"preset": "minitron"}, "larger: is not set"),
    ([SMALL, STACK], {"larger": {"d_ffn": 64}}, "belongs to preset minitron"),
    ([{**SMALL, "distill": {}}, STACK], {}, "nothing comes before the first stage"),
    ([SMALL, {**STACK, "distill": True}], {}, "distill: True"),
    ([SMALL, {**STACK, "distill": {"label": 1}}], {}, "did you mean 'labels'"),
    ([SMALL, {**STACK, "distill": {"divergence": 0}}], {}, "0 is not a number above 0"),
    ([SMALL, {**STACK, "distill": {"labels": -1}}], {}, "-1 is not a number of at least 0"),
    ([SMALL, {**STACK, "distill": {"of": "large"}}], {}, "'large' is no stage before it"),
    ([SMALL, {**STACK, "distill": {"of": 3}}], {}, "3 is not the name of a stage"),
    ([SMALL, STACK], {"preset": "gstack"}, "preset gstack makes them itself"),
    ([SMALL, STACK], {"preset": "yano2025"}, "yano2025 says how long each stage is"),
    ([SMALL, STACK], {"factor": 2}, "belongs to preset gstack or vcycle"),
    ([SMALL, STACK], {"preset": ["gstack"]}, "is not one of"),
    ([], {"preset": "gstack", "factor": 3}, "3 does not divide 4 layers; there are 2, 4"),
    ([], {"preset": "gstack", "tokens": "many"}, "'many' is not a number"),
    ([], {"preset": "upcycle"}, "set model.n_experts"),
    ([{"name": "same", "depth": 1}, {}], {"preset": "yano2025"}, "operator: is not set"),
]


@pytest.mark.parametrize(("stages", "options", "why"), REFUSED)
def test_a_schedule_that_cannot_be_is_refused_with_what_would_work(
    stages: list[Any], options: dict[str, Any], why: str
) -> None:
    assert why in told(*stages, **options)
