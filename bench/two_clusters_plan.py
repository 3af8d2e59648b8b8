"""What `bench/two_clusters.py` trains: layouts that people would write, and those that the planner
chooses. No process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from motet.models.config import ModelConfig
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.stages import predict
from motet.parallel.cost.terms import Training, Traits
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.placement import trimmed
from motet.parallel.planner.question import PlanQuestion, RankedLayout
from motet.parallel.planner.space import Limits

HOSTS = {"a": ("n1", "n2"), "b": ("n3", "n4")}
"""Groups of the cluster: the nodes on either side of the slow link."""
CALIBRATED = (2, 8)
"""Micro-batches of the runs that calibrate, smallest and largest; the planner is asked for none
that are larger.
"""
NAIVE = "dp 4 over all"
ACROSS = (0, 2, 1, 3)
"""A placement that puts neighbours of the grid on both sides of the link."""
WRITTEN = {
    NAIVE: Layout(dp_replicate=4, micro_sequences=6),
    "dp 4, shares 2:2:1:1": Layout(dp_replicate=4, shares=(2, 2, 1, 1), micro_sequences=4),
    "hsdp 2x2, shards inside": Layout(dp_replicate=2, dp_shard=2, micro_sequences=6),
    "pp 2 across, dp 2 inside, layers 2+2": Layout(
        pp=2, dp_replicate=2, stage_layers=(2, 2), micro_sequences=3
    ),
    "pp 2 across, dp 2 inside, layers 3+1": Layout(
        pp=2, dp_replicate=2, stage_layers=(3, 1), micro_sequences=3
    ),
    "pp 2 inside, dp 2 across": Layout(
        pp=2, dp_replicate=2, stage_layers=(2, 2), micro_sequences=3, placement=ACROSS
    ),
    "pp 4, a layer each": Layout(pp=4, stage_layers=(1, 1, 1, 1), micro_sequences=3),
    "pp 2 across, tp 2 inside, layers 3+1": Layout(
        pp=2, tp=2, stage_layers=(3, 1), micro_sequences=6
    ),
    "cluster a alone, dp 2": Layout(dp_replicate=2, micro_sequences=6),
}


@dataclass(frozen=True)
class Asked:
    """What is trained, as the planner and the cost model know it."""

    model: ModelConfig
    training: Training
    traits: Traits


@dataclass(frozen=True)
class Row:
    """A layout on some nodes, in the order of processes.

    Attributes:
        used: devices of every group, as the cluster has them.
    """

    name: str
    layout: Layout
    used: tuple[int, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes in the order of processes."""
        groups = zip(HOSTS.values(), self.used, strict=True)
        return tuple(node for hosts, number in groups for node in hosts[:number])

    def key(self) -> tuple[object, ...]:
        """What makes two rows the same run."""
        plain = self.layout.placement == tuple(range(self.layout.world_size))
        return (replace(self.layout, placement=()) if plain else self.layout), self.used


def written() -> list[Row]:
    """Return the layouts that people would write."""
    return [
        Row(name, layout, (2, 2) if layout.world_size == 4 else (2, 0))
        for name, layout in WRITTEN.items()
    ]


def chosen(
    asked: Asked, cluster: Cluster, constants: Mapping[str, Constants] | None, top: int
) -> list[Row]:
    """Return the planner's first choices on a cluster, best first."""
    question = PlanQuestion(
        asked.model,
        cluster,
        asked.training,
        traits=asked.traits,
        constants=constants,
        top=top,
        worth=10.0,
        limits=Limits(micro_sequences=CALIBRATED[1]),
    )
    return [_row(choice) for choice in plan(question).choices]


def _row(choice: RankedLayout) -> Row:
    used = {group.name: group.devices for group in choice.cluster.groups}
    return Row(described(choice.layout), choice.layout, tuple(used.get(name, 0) for name in HOSTS))


def described(layout: Layout) -> str:
    """A layout in a few words."""
    degrees = [f"{n} {getattr(layout, n)}" for n in ("pp", "tp", "cp") if getattr(layout, n) > 1]
    if layout.dp_replicate > 1:
        degrees.append(f"dp {layout.dp_replicate}")
    if layout.dp_shard > 1:
        degrees.append(f"fsdp {layout.dp_shard}")
    found = ", ".join(degrees) or "one rank"
    if layout.pp > 1:
        found += f", layers {'+'.join(map(str, layout.stage_layers))}"
        found += f", {layout.schedule.replace('_', ' ')}"
    if len(set(layout.shares)) > 1:
        found += f", shares {':'.join(map(str, layout.shares))}"
    if layout.placement:
        found += f", placed {','.join(map(str, layout.placement))}"
    return f"{found}, micro {layout.micro_sequences}"


def predicted_s(
    row: Row, asked: Asked, cluster: Cluster, constants: Mapping[str, Constants] | None
) -> float:
    """Return the predicted seconds of a step."""
    machines = trimmed(cluster, row.used)
    assert machines is not None, "whole nodes of one process each"
    found = predict(asked.model, machines, row.layout, asked.training, asked.traits, constants)
    return found.step_time_s


def merged(rows: Sequence[Row], more: Sequence[Row]) -> list[Row]:
    """Return the rows, and those of `more` that are none of them."""
    out = list(rows)
    for row in more:
        if row.key() not in {one.key() for one in out}:
            out.append(row)
    return out
