from __future__ import annotations

from dataclasses import replace

import pytest

from motet.models.config import preset
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cost.family import GrowthStage, MemberShare, nested_cost, progressive_cost
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
