"""The planner's search: what it offers can run, where stages stand, why others are out."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from motet.models.config import ModelConfig, preset
from motet.parallel.cluster.description import Cluster, Group, Link, device, homogeneous
from motet.parallel.cost.predictor import predict
from motet.parallel.cost.terms import Prediction, Training
from motet.parallel.cost.topology import topology_of
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.rules import problems
from motet.parallel.planner.best_first import PipelinesSearch, plan
from motet.parallel.planner.context import Context
from motet.parallel.planner.open_degrees import SearchNode
from motet.parallel.planner.placement import placement, places_of
from motet.parallel.planner.question import PlanQuestion, RankedLayout
from motet.parallel.planner.reasons import best_with, remedies, tightest
from motet.parallel.planner.reasons import slower as slower_than
from motet.parallel.planner.space import GroupAssignment, Limits, ScheduleChoice
from motet.parallel.planner.which_probe import probes

MODEL = preset("1b", 32_768)
MIXTURE = ModelConfig(
    1024, 256, 6, 4, 4, 512, n_experts=8, d_expert=256, n_dense_layers=1, n_shared_experts=1
)


def halls(nodes: int = 2, slow_gb_s: float = 5.0) -> Cluster:
    inside, outside = Link(300.0, 3.0, "nvlink"), Link(25.0, 5.0, "infiniband")
    fast = Group("fast", device("h100"), nodes, 4, inside, outside)
    slow = Group("slow", device("a100-40"), nodes, 4, inside, Link(12.0, 7.0, "roce"))
    return Cluster((fast, slow), {("fast", "slow"): Link(slow_gb_s, 50.0, "ethernet")})


def why(question: PlanQuestion, best: RankedLayout, fixed: dict[str, int]) -> list[str]:
    """Why layouts with some degrees are not the best."""
    found = best_with(question, fixed)
    return found if isinstance(found, list) else slower_than(found, best)


def test_every_layout_that_is_offered_obeys_the_rules_and_takes_what_was_predicted() -> None:
    for model, cluster in ((MODEL, halls()), (MIXTURE, halls(1)), (MODEL, homogeneous("h100", 1))):
        question = PlanQuestion(model, cluster, Training(16, 2048), ("native", "deepspeed"))
        answer = plan(question)
        assert answer.choices
        for choice in answer.choices:
            layout = choice.layout
            assert problems(layout, model, 2048, [16], choice.cluster.devices) == []
            training = replace(
                question.training, zero_stage=choice.zero_stage, offload=choice.offload != "none"
            )
            again = predict(model, choice.cluster, layout, training)
            assert again.step_time_s == pytest.approx(choice.prediction.step_time_s, rel=1e-9)
            assert again.fits
        times = [choice.prediction.step_time_s for choice in answer.choices]
        assert times == sorted(times)


@pytest.mark.parametrize("across", ["pipeline", "replicas"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_places_found_from_the_shape_are_those_found_device_by_device(
    across: str, order: tuple[int, int]
) -> None:
    cluster = halls()
    for tp, shard, cp in ((1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2), (4, 2, 1)):
        inside = tp * shard * cp
        if across == "pipeline":
            layout = Layout(dp_shard=shard, tp=tp, cp=cp, pp=16 // inside)
            spread = GroupAssignment(across, tuple((g, 8 // inside) for g in order))
        else:
            layout = Layout(dp_replicate=16 // inside, dp_shard=shard, tp=tp, cp=cp)
            if inside == 4:
                layout = replace(layout, dp_replicate=2, pp=2, shares=(3, 1))
            spread = GroupAssignment(across, tuple((g, layout.dp_replicate // 2) for g in order))
        whole = replace(layout, placement=placement(cluster, layout, spread))
        found, expected = places_of(cluster, layout, spread), topology_of(cluster, whole)
        for mine, other in zip(found.stages, expected.stages, strict=True):
            for one in fields(mine):
                here, there = getattr(mine, one.name), getattr(other, one.name)
                # The links of a single rank carry nothing.
                assert here == there or here.ranks == there.ranks == 1, one.name
        assert set(found.columns) == set(expected.columns)


def test_a_group_behind_a_slow_link_is_left_out_and_behind_a_fast_one_is_used() -> None:
    training = Training(64, 2048)
    far = plan(PlanQuestion(MODEL, halls(1, slow_gb_s=0.001), training, top=1)).best
    near = plan(PlanQuestion(MODEL, halls(1, slow_gb_s=50.0), training, top=1)).best
    assert [group.name for group in far.cluster.groups] == ["fast"]
    assert [group.name for group in near.cluster.groups] == ["fast", "slow"]
    assert near.prediction.step_time_s < far.prediction.step_time_s


def test_what_is_fixed_stays_fixed() -> None:
    fixed = {"tp": 2, "recompute": "full", "micro_sequences": 2}
    answer = plan(PlanQuestion(MODEL, homogeneous("h100", 1), Training(16, 2048), fixed=fixed))
    assert answer.choices
    for choice in answer.choices:
        assert {name: getattr(choice.layout, name) for name in fixed} == fixed


def test_compiled_blocks_get_no_schedule_that_takes_the_backward_pass_apart() -> None:
    question = PlanQuestion(
        MODEL, homogeneous("h100", 1), Training(16, 2048), compiled=True, fixed={"pp": 4}
    )
    assert plan(question).choices
    assert all("zero" not in choice.layout.schedule for choice in plan(question).choices)


def test_the_first_choice_is_proven_also_where_the_rest_of_the_table_is_not() -> None:
    limits = Limits(nodes=1_000_000, looked=1_000_000, replica_shapes=1_000)
    question = PlanQuestion(MODEL, halls(1), Training(16, 2048), top=8, worth=3.0, limits=limits)
    whole = plan(question)
    short = plan(replace(question, limits=replace(limits, nodes=0)))
    assert (whole.bound_s, whole.gap, whole.ranked_all) == (0.0, 0.0, True)
    assert (short.bound_s, short.gap, short.ranked_all) == (0.0, 0.0, False)
    assert short.best.prediction.step_time_s == whole.best.prediction.step_time_s
    assert len(whole.choices) == 8
    for row in short.choices:
        same = [one for one in whole.choices if one.kind == row.kind]
        assert not same or same[0].prediction.step_time_s <= row.prediction.step_time_s


def test_a_search_that_leaves_replicas_out_says_how_much_faster_they_may_be() -> None:
    question = PlanQuestion(MODEL, halls(1, 50.0), Training(16, 2048), top=1)
    whole = plan(replace(question, limits=Limits(replica_shapes=1_000)))
    short = plan(replace(question, limits=Limits(replica_shapes=0)))
    assert (whole.bound_s, whole.gap) == (0.0, 0.0)
    least_s = (1 - short.gap) * short.best.prediction.step_time_s
    assert 0.0 < short.gap < 1.0
    assert least_s == pytest.approx(short.bound_s)
    assert short.bound_s <= whole.best.prediction.step_time_s


def test_a_search_that_time_ends_has_a_layout_and_a_gap_that_holds() -> None:
    mixed = replace(MIXTURE, n_dense_layers=0, moe_every=2)
    for model in (MODEL, mixed):
        question = PlanQuestion(model, halls(1, 50.0), Training(16, 2048), top=1)
        whole = plan(question)
        short = plan(replace(question, limits=Limits(seconds=1e-6)))
        assert (whole.late, whole.gap) == (False, 0.0)
        assert short.late
        assert short.counts["predicted"] < whole.counts["predicted"]
        assert short.best.prediction.fits
        # What is best is nowhere below the bound that the short search tells.
        assert 0.0 < short.bound_s <= whole.best.prediction.step_time_s
        assert 0.0 <= short.gap < 1.0


@pytest.mark.parametrize("model", [MODEL, MIXTURE])
def test_no_layout_takes_less_than_the_bound_of_its_degrees_and_machines(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    margins: list[float] = []
    nodes: list[SearchNode] = []
    expand, judge = PipelinesSearch._expand, Context.judge

    def expanded(search: PipelinesSearch, node: SearchNode) -> None:
        nodes.append(node)
        expand(search, node)

    def judged(context: Context, layout: Layout, spread: GroupAssignment) -> Prediction:
        found = judge(context, layout, spread)
        if found.fits:
            way = ScheduleChoice(layout.schedule, layout.virtual_stages)
            bound_s = nodes[-1].bounds_s[layout.recompute][way]
            margins.append(found.step_time_s / bound_s)
        return found

    monkeypatch.setattr(PipelinesSearch, "_expand", expanded)
    monkeypatch.setattr(Context, "judge", judged)
    for slow_gb_s in (1.0, 50.0):
        question = PlanQuestion(model, halls(1, slow_gb_s), Training(16, 2048), worth=3.0)
        PipelinesSearch(Context(question)).search()
    assert len(margins) > 20
    assert min(margins) >= 1.0 - 1e-9


def test_reasons_name_a_rule_or_memory_or_the_phases_that_take_longer() -> None:
    question = PlanQuestion(MODEL, homogeneous("h100", 1), Training(16, 2048))
    best = plan(question).best
    assert any("does not divide model.n_heads" in one for one in why(question, best, {"tp": 3}))
    slower = why(question, best, {"tp": 8})
    assert "longer than the fastest" in slower[0]
    assert any("more of tensor" in line for line in slower[1:])
    large = PlanQuestion(preset("7b", 32_768), homogeneous("a10", 1), Training(8, 2048))
    assert "does not fit" in why(large, best, {"tp": 1, "pp": 1, "cp": 1, "dp_shard": 1})[0]


def test_a_model_that_fits_nowhere_hears_what_would_make_it_fit() -> None:
    question = PlanQuestion(
        preset("7b", 32_768), homogeneous("a10", 1, 2), Training(8, 2048), ("native", "deepspeed")
    )
    assert plan(question).choices == []
    nearest = tightest(question)
    assert nearest is not None
    assert nearest.fill > 1.0
    found = " ".join(remedies(question))
    assert "more devices" in found
    assert "bigger devices" in found


def test_the_run_that_tells_most_leaves_less_doubt_than_there_was() -> None:
    answer = plan(PlanQuestion(MODEL, halls(), Training(64, 2048)))
    found = probes(answer.choices)
    assert len(found) == len(answer.choices)
    assert found[0].after < found[0].before
    assert [probe.after for probe in found] == sorted(probe.after for probe in found)
