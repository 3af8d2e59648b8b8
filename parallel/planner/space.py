"""Every layout that the planner considers: degrees, micro-batches, schedules, and how many stages
or replicas each group gets. Pure.

The space is exhaustive inside `Limits`. Two rules of placement bound it. Tensor parallelism stays
on a node. And (Holmes, arXiv:2312.03549, section 3) what tensor, context, expert and sharded data
parallelism joins stays inside one group of the cluster; pipeline stages may cross between groups,
or else whole replicas may, with shares of the step that follow their speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from motet.models.config import ModelConfig
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.model_rules import beyond_ring
from motet.parallel.layout.rules import schedule_takes


@dataclass(frozen=True)
class Limits:
    """Where the search ends; none of these is a rule of the runtime.

    Attributes:
        micro_sequences, cp, virtual_stages: largest values tried.
        micro_batches: fewest of a step in a pipeline: with one, stages only wait for each other.
        assignments: most ways to give stages to groups for one size of stage; where there are more,
            a group is used whole or not at all.
        nodes: sets of degrees and machines that are tried in full at most, after the first choice
            is proven, for what is ranked behind it.
        looked: assignments of stages to groups that are looked at, the proof of the first choice
            included, before the rest ends.
        seconds: after which a search ends with the best that it knows, and says by how much
            something better may be faster; None: when the first choice is proven. It goes on until
            it knows a layout that fits.
        replica_shapes: degrees and machines of replicas in different groups that are tried at most;
            the answer says what is left.
    """

    micro_sequences: int = 16
    cp: int = 16
    virtual_stages: int = 8
    micro_batches: int = 2
    assignments: int = 20_000
    nodes: int = 200
    looked: int = 20_000
    replica_shapes: int = 60
    seconds: float | None = None


class InnerDegrees(NamedTuple):
    """What decides the time of one block for one micro-batch."""

    tp: int
    cp: int
    ep: int
    etp: int
    micro_sequences: int
    sequence_parallel: bool


class ScheduleChoice(NamedTuple):
    """A schedule with its stages per rank."""

    schedule: str
    virtual_stages: int


@dataclass(frozen=True)
class GroupAssignment:
    """Which groups of the cluster hold what.

    Attributes:
        across: "pipeline" or "replicas": what crosses between groups.
        blocks: (group, stages) in order of the pipeline, or (group, replicas).
    """

    across: str
    blocks: tuple[tuple[int, int], ...]


def divisors(number: int, most: int | None = None) -> list[int]:
    """Return the divisors of a number in ascending order, those above `most` left out."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    found = small + [number // n for n in reversed(small) if n * n != number]
    return found if most is None else [n for n in found if n <= most]


def inner_degrees(
    model: ModelConfig,
    sequence_length: int,
    sequences: int,
    devices: int,
    node: int,
    limits: Limits,
) -> Iterator[InnerDegrees]:
    """Yield every way to divide one block among at most `devices` devices, its channels among those
    of one node.
    """
    most_cp = 1 if beyond_ring(model, sequence_length) else limits.cp
    for tp in tensor_degrees(model, node):
        for cp in divisors(sequence_length, min(most_cp, devices // tp)):
            switches = [True, False] if tp > 1 and model.n_experts == 0 else [True]
            for parallel in switches:
                # Context ranks take two parts of the sequence each, one from either end, so that
                # causal attention is even; sequence parallelism divides it once more.
                unit = (2 * cp if cp > 1 else 1) * (tp if tp > 1 and parallel else 1)
                if sequence_length % unit:
                    continue
                for ep, etp in expert_degrees(model, tp, devices):
                    for micro in divisors(sequences, limits.micro_sequences):
                        yield InnerDegrees(tp, cp, ep, etp, micro, parallel)


def tensor_degrees(model: ModelConfig, devices: int) -> list[int]:
    """Return the degrees of tensor parallelism that divide what it divides."""
    common = math.gcd(model.n_heads, model.n_kv_heads)
    if any(not model.has_experts(layer) for layer in range(model.n_layers)):
        common = math.gcd(common, model.d_ffn)
    return divisors(common, devices)


def expert_degrees(model: ModelConfig, tp: int, devices: int) -> list[tuple[int, int]]:
    """Return (ep, etp); an expert's own channels are divided as far as a block's, or not at all."""
    if model.n_experts == 0:
        return [(1, 1)]
    return [
        (ep, etp)
        for etp in sorted({1, tp})
        for ep in divisors(model.n_experts, devices // etp)
        if model.expert_width % etp == 0
    ]


def splits(model: ModelConfig, core: InnerDegrees, dp_ranks: int) -> list[tuple[int, int]]:
    """Return (dp_replicate, dp_shard) for a number of data-parallel ranks, most sharding first: it
    needs least memory.
    """
    found = []
    for replicate in divisors(dp_ranks):
        inside = dp_ranks // replicate * core.cp * core.tp
        experts = core.ep * core.etp
        # Experts are divided along the model's width where data parallelism divides them: it must
        # divide evenly.
        if model.n_experts and (inside % experts or model.d_model % (inside // experts)):
            continue
        found.append((replicate, dp_ranks // replicate))
    return found


def schedule_choices(
    pp: int, n_layers: int, micro_batches: Sequence[int], limits: Limits
) -> list[ScheduleChoice]:
    """Return the schedules that a pipeline can run with these numbers of micro-batches (one for
    each kind of replica).

    GPipe is only there where 1F1B cannot run: it takes as long and holds more.
    """
    if pp == 1:
        return [ScheduleChoice("1f1b", 1)]
    if min(micro_batches) < limits.micro_batches or pp > n_layers + 2:
        return []
    found = every_schedule(min(limits.virtual_stages, (n_layers + 2) // pp))[:-1]
    # 1F1B holds less than GPipe in the same time: GPipe is left for numbers of micro-batches that
    # 1F1B does not take.
    taken = [way for way in found if _takes(way, pp, micro_batches)]
    return taken if ScheduleChoice("1f1b", 1) in taken else [*taken, ScheduleChoice("gpipe", 1)]


def every_schedule(most: int) -> list[ScheduleChoice]:
    """Return all schedules with at most this many stages per rank."""
    found = [ScheduleChoice("interleaved_1f1b", v) for v in range(2, most + 1)]
    found += [ScheduleChoice("interleaved_zero_bubble", v) for v in range(2, most + 1)]
    found += [ScheduleChoice("zbv_zero_bubble", 2)] if most >= 2 else []
    return [*found, ScheduleChoice("1f1b", 1), ScheduleChoice("gpipe", 1)]


def _takes(way: ScheduleChoice, pp: int, micro_batches: Sequence[int]) -> bool:
    layout = Layout(pp=pp, schedule=way.schedule, virtual_stages=way.virtual_stages)
    return all(schedule_takes(layout, number) for number in micro_batches)


def assignments(sizes: Sequence[int], stage: int, most: int, limits: Limits) -> np.ndarray:
    """Return how many stages of `stage` devices each group may take: any number that it has room
    for, `most` together.

    Args:
        sizes: devices of the groups.

    Returns:
        [assignment, group].
    """
    rooms = [min(size // stage, most) for size in sizes]
    choices = [np.arange(room + 1) for room in rooms]
    # Too many ways to look at each: groups whole or not at all, which the plan says.
    if math.prod(room + 1 for room in rooms) > limits.assignments:
        choices = [np.unique([0, room]) for room in rooms]
    found = np.stack(np.meshgrid(*choices, indexing="ij"), axis=-1).reshape(-1, len(sizes))
    total = found.sum(axis=1)
    return found[(total > 0) & (total <= most)]
