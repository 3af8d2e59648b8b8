"""Where groups of ranks stand, and which of them share the link between two halls."""

from __future__ import annotations

from dataclasses import replace

from motet.models.config import preset
from motet.parallel.cluster.description import Cluster, Group, Link, device
from motet.parallel.cost.predictor import predict
from motet.parallel.cost.terms import Training
from motet.parallel.cost.topology import topology_of
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.placement import places_of
from motet.parallel.planner.space import GroupAssignment

SLOW = Link(0.00625, 100.0, "ethernet")  # 50 Mbit/s
NEAR = Link(1.0, 50.0, "ethernet")
HALLS = Cluster(
    tuple(Group(name, device("cpu"), 2, 1, NEAR, NEAR) for name in ("a", "b")), {("a", "b"): SLOW}
)
ACROSS = (0, 2, 1, 3)
"""Neighbours of the grid on both sides of the link."""


def test_gradients_of_all_pipeline_stages_share_the_link_between_halls() -> None:
    inside = Layout(pp=2, dp_replicate=2, micro_sequences=2, placement=ACROSS)
    assert [stage.replicate.sharers for stage in topology_of(HALLS, inside).stages] == [2, 2]
    alone = Layout(dp_replicate=2, micro_sequences=2, placement=(0, 2))
    assert topology_of(HALLS, alone).stages[0].replicate.sharers == 1


def test_groups_that_stay_inside_a_hall_share_nothing() -> None:
    across = Layout(pp=2, dp_replicate=2, micro_sequences=2)
    assert all(stage.replicate.between is None for stage in topology_of(HALLS, across).stages)


def test_half_of_the_weights_on_each_of_two_stages_take_as_long_to_cross_as_all_of_them_at_once() -> (
    None
):
    training = Training(24, 128, "fp32")
    model = replace(preset("1m", 1024), vocabulary_size=16)
    parts = [
        predict(model, HALLS, layout, training).parts["data_parallel"]
        for layout in (
            Layout(pp=2, dp_replicate=2, micro_sequences=3, placement=ACROSS),
            Layout(dp_replicate=2, micro_sequences=3, placement=(0, 2)),
        )
    ]
    assert 0.8 < parts[0] / parts[1] < 1.25  # what hides behind the last backward pass differs


def test_the_search_places_them_as_the_cost_model_does() -> None:
    layout = Layout(pp=2, dp_replicate=2, micro_sequences=2, placement=ACROSS)
    spread = GroupAssignment("replicas", ((0, 1), (1, 1)))
    assert places_of(HALLS, replace(layout, placement=()), spread).stages == (
        topology_of(HALLS, layout).stages
    )
