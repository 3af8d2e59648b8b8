from __future__ import annotations

from dataclasses import replace

import pytest

from motet.models.config import preset
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cost.family import (
    GrowthStage,
    MemberShare,
    StepPrices,
    nested_cost,
    progressive_cost,
)
from motet.parallel.cost.stages import Training, predict
from motet.parallel.layout.layout import Layout

BIG = preset("7b", 32_000)
SMALL = replace(BIG, n_layers=16, d_ffn=7168)
CLUSTER = homogeneous("h100", 2, nic_gbit_s=400.0)
LAYOUT = Layout(dp_shard=16, recompute="full")
TRAINING = Training(128, 4096)


def test_a_nested_family_costs_between_its_members_and_holds_the_whole_model() -> None:
    members = [MemberShare("big", BIG, 0.5), MemberShare("small", SMALL, 0.5)]
    cost = nested_cost(BIG, members, CLUSTER, LAYOUT, TRAINING)
    whole = predict(BIG, CLUSTER, LAYOUT, TRAINING)
    assert cost.step_time_s["big"] == pytest.approx(whole.step_time_s)
    assert cost.step_time_s["small"] < 0.6 * cost.step_time_s["big"]
    # The update and the reduction are those of the whole model.
    assert cost.step_time_s["small"] > cost.predictions["small"].step_time_s
    assert cost.memory_gib == whole.memory_gib
    assert cost.time_s == pytest.approx(sum(cost.step_time_s.values()) / 2)


def test_shares_of_steps_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        nested_cost(BIG, [MemberShare("big", BIG, 0.9)], CLUSTER, LAYOUT, TRAINING)


def test_a_progressive_family_costs_its_stages_and_less_than_its_members_alone() -> None:
    stages = [
        GrowthStage("small", SMALL, LAYOUT, TRAINING, 1e9),
        GrowthStage("big", BIG, LAYOUT, TRAINING, 1e9),
    ]
    cost = progressive_cost(stages, CLUSTER)
    by_hand = sum(1e9 / predict(s.model, CLUSTER, LAYOUT, TRAINING).tokens_per_s for s in stages)
    assert cost.time_s == pytest.approx(by_hand)
    assert cost.alone_s > cost.time_s
    assert cost.memory_gib == cost.predictions["big"].memory_gib


def test_passes_of_one_step_cost_what_as_many_batches_do_and_one_update() -> None:
    models = {"big": BIG, "small": SMALL}
    prices = StepPrices(BIG, models, CLUSTER, LAYOUT, TRAINING)
    once = predict(BIG, CLUSTER, LAYOUT, TRAINING)
    twice = predict(BIG, CLUSTER, LAYOUT, replace(TRAINING, sequences=256))
    one, two = prices.of({"big": 1.0}), prices.of({"big": 2.0})
    assert one.step_time_s == pytest.approx(once.step_time_s)
    assert one.memory_gib == once.memory_gib
    # Twice the passes over the same tokens are the work of twice the sequences.
    assert two.step_time_s == pytest.approx(twice.step_time_s)
    assert two.memory_gib == twice.memory_gib
    assert two.flops == 2 * one.flops
    both = prices.of({"big": 1.0, "small": 1.0})
    assert one.step_time_s < both.step_time_s < two.step_time_s
    small = predict(SMALL, CLUSTER, LAYOUT, TRAINING)
    assert both.alone_s == pytest.approx(once.step_time_s + small.step_time_s)
    # A slice waits for the weights of whole blocks, and its update is everyone's.
    assert prices.pass_s("small") >= prices.of({"small": 1.0}).step_time_s - once.step_time_s
    assert prices.of({"small": 1.0}).step_time_s > small.step_time_s
    mean = prices.of({"big": 0.5, "small": 0.5})
    nested = nested_cost(
        BIG,
        [MemberShare("big", BIG, 0.5), MemberShare("small", SMALL, 0.5)],
        CLUSTER,
        LAYOUT,
        TRAINING,
    )
    assert mean.step_time_s == pytest.approx(nested.time_s, rel=0.02)


def test_what_a_teacher_hands_on_is_held_beside_the_largest() -> None:
    prices = StepPrices(BIG, {"big": BIG}, CLUSTER, LAYOUT, TRAINING)
    plain, taught = prices.of({"big": 1.5}), prices.of({"big": 1.5}, taught=True)
    states_gib = LAYOUT.micro_sequences * 4096 * BIG.d_model * 2 / (1 << 30)
    assert taught.memory_gib - plain.memory_gib == pytest.approx(states_gib)
    assert taught.step_time_s == plain.step_time_s
