"""Why a layout is not chosen, and what would make a model fit that fits nowhere. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from motet.parallel.catalogue import DEVICES
from motet.parallel.cluster import Cluster, device
from motet.parallel.layout import Layout
from motet.parallel.layout_rules import problems
from motet.parallel.plan_lines import skeleton
from motet.parallel.plan_space import Way, cores, divisors, splits
from motet.parallel.plan_terms import Choice, Question
from motet.parallel.planner import Search, plan

ONE = Way("1f1b", 1)
TELLING = 0.02
"""Phases that differ by less than this share of the best step are not named."""


@dataclass(frozen=True)
class Tight:
    """The layout that comes nearest to fitting."""

    layout: Layout
    device: str
    memory_gib: float
    capacity_gib: float
    parts: Mapping[str, float]

    @property
    def fill(self) -> float:
        """Share of the device's memory that it needs."""
        return self.memory_gib / self.capacity_gib

    def __str__(self) -> str:
        layout = self.layout
        degrees = ", ".join(
            f"{name} {getattr(layout, name)}"
            for name in ("tp", "pp", "cp", "ep", "dp_replicate", "dp_shard", "micro_sequences")
        )
        largest = sorted(self.parts.items(), key=lambda item: -item[1])[:3]
        shown = ", ".join(f"{name} {value:.1f}" for name, value in largest)
        return (
            f"{self.memory_gib:.1f} of {self.capacity_gib:.1f} GiB on a {self.device} with {degrees}, recompute {layout.recompute}: "
            f"{shown} GiB"
        )


def tightest(question: Question) -> Tight | None:
    """Return what needs least memory of its device among layouts inside one group; None where rules leave none.

    One sequence at a time, most recomputed and most divided: nothing that the question allows holds less on equal degrees.
    """
    search = Search(replace(question, fixed={**question.fixed}))
    recompute = search.recomputes()[-1]
    best: Tight | None = None
    for g, layout in _smallest(search, recompute):
        used = [0] * len(search.cluster.groups)
        used[g] = layout.world_size
        machines = search.machines(used)
        if machines is None:
            continue
        prediction = machines[1].predict(layout)
        fill = prediction.memory_gib / prediction.capacity_gib
        if best is None or fill < best.fill:
            kind = search.cluster.groups[g].device.kind
            best = Tight(
                layout,
                kind,
                prediction.memory_gib,
                prediction.capacity_gib,
                prediction.memory_parts,
            )
    return best


def _smallest(search: Search, recompute: str) -> Iterator[tuple[int, Layout]]:
    """Yield (group, layout) for the degrees of every group, as many devices as they can use."""
    q = search.question
    limits = replace(q.limits, micro_sequences=int(str(q.fixed.get("micro_sequences", 1))))
    length, sequences = q.training.sequence_length, q.training.sequences
    for g, group in enumerate(search.cluster.groups):
        for core in cores(
            q.model, length, sequences, group.devices, group.devices_per_node, limits
        ):
            if not q.allows(**core._asdict()):
                continue
            for readers in divisors(sequences // core.micro_sequences):
                ranks = readers * core.cp * core.tp
                if ranks > group.devices:
                    break
                most = min(search.most_stages(), group.devices // ranks, q.model.n_layers)
                for pp in {1, *divisors(group.devices // ranks, most), most}:
                    split = next(
                        (
                            one
                            for one in splits(q.model, core, readers)
                            if q.allows(dp_replicate=one[0], dp_shard=one[1])
                        ),
                        None,
                    )
                    number = sequences // (readers * core.micro_sequences)
                    way = next(iter(search.ways(pp, (number,))[-1:]), None)
                    if split and way and q.allows(pp=pp):
                        yield g, skeleton(core, split, pp, recompute, way)


def remedies(question: Question) -> list[str]:
    """Return changes that make a model fit that does not: each alone, the smallest of each kind."""
    found = []
    for name, word in (
        ("micro_sequences", "a smaller micro-batch"),
        ("recompute", "recomputation"),
    ):
        if name in question.fixed:
            fixed = {k: v for k, v in question.fixed.items() if k != name}
            if _fits(replace(question, fixed=fixed)):
                found.append(f"{word}: leave layout.{name} to the search")
    if "deepspeed" not in question.engines or question.fixed.get("offload") == "none":
        fixed = {k: v for k, v in question.fixed.items() if k not in ("engine", "offload")}
        if plan(replace(question, engines=("deepspeed",), fixed=fixed, top=1)).choices:
            found.append("offload: layout.engine=deepspeed layout.offload=optimizer")
    for factor in (2, 4, 8, 16, 32):
        if _fits(replace(question, cluster=larger(question.cluster, factor))):
            nodes = sum(group.nodes for group in question.cluster.groups)
            found.append(f"more devices: {factor} times as many nodes ({nodes * factor:,})")
            break
    for kind in sorted(DEVICES, key=lambda name: float(DEVICES[name]["memory_gib"])):
        memory = float(DEVICES[kind]["memory_gib"])
        if memory <= max(group.device.memory_gib for group in question.cluster.groups):
            continue
        groups = tuple(replace(g, device=device(kind)) for g in question.cluster.groups)
        if _fits(replace(question, cluster=replace(question.cluster, groups=groups))):
            found.append(f"bigger devices: as many {kind} ({memory:g} GiB)")
            break
    return found


def larger(cluster: Cluster, factor: int) -> Cluster:
    """Return a cluster with more nodes in every group."""
    groups = tuple(replace(group, nodes=group.nodes * factor) for group in cluster.groups)
    return replace(cluster, groups=groups)


def _fits(question: Question) -> bool:
    found = tightest(question)
    return found is not None and found.fill <= 1.0


def why(question: Question, best: Choice, fixed: Mapping[str, Any]) -> list[str]:
    """Return why layouts with some degrees are not the best: a rule, memory, or which phases take longer."""
    asked = replace(question, fixed={**question.fixed, **fixed}, top=1, worth=1.0)
    answer = plan(asked)
    tried = answer.counts["predicted"]
    if answer.choices:
        return _slower(answer.best, best, tried)
    degrees = {k: v for k, v in fixed.items() if k in Layout.__dataclass_fields__}
    sequences = [question.training.sequences]
    found = problems(
        Layout(**degrees), question.model, question.training.sequence_length, sequences, None
    )
    if found:
        return [f"{setting}: {message}" for setting, message in found]
    nearest = tightest(asked)
    if nearest is not None and nearest.fill > 1.0:
        return [f"does not fit; the least is {nearest}"]
    if nearest is not None:
        return [f"no schedule runs it with this batch on these machines ({dict(answer.counts)})"]
    return ["no number of devices of this cluster has these degrees, whole nodes counted"]


def _slower(one: Choice, best: Choice, tried: int) -> list[str]:
    here, there = one.prediction, best.prediction
    ratio = here.step_time_s / there.step_time_s - 1
    if ratio <= 1e-9:
        return ["this is the fastest"]
    lines = [
        f"fits, and takes {ratio:.1%} longer than the fastest ({here.step_time_s:.3g} s against {there.step_time_s:.3g} s; "
        f"{tried:,} layouts of these degrees were predicted)"
    ]
    names = dict.fromkeys((*here.parts, *there.parts))
    more = {name: here.parts.get(name, 0.0) - there.parts.get(name, 0.0) for name in names}
    for name, seconds in sorted(more.items(), key=lambda item: -abs(item[1])):
        if abs(seconds) > TELLING * there.step_time_s:
            word = "more" if seconds > 0 else "less"
            lines.append(f"  {abs(seconds):.3g} s {word} of {name.replace('_', ' ')}")
    return lines
