"""Why a layout is not chosen, and what would make a model fit that fits nowhere. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from motet.parallel.cluster.description import Cluster, device
from motet.parallel.cluster.devices import DEVICES
from motet.parallel.layout.layout import RECOMPUTE, Layout
from motet.parallel.layout.rules import problems
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.context import Context
from motet.parallel.planner.linear import skeleton
from motet.parallel.planner.question import PlanQuestion, RankedLayout
from motet.parallel.planner.space import ScheduleChoice, divisors, inner_degrees

ONE = ScheduleChoice("1f1b", 1)
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
            f"{self.memory_gib:.1f} of {self.capacity_gib:.1f} GiB on one {self.device} with "
            f"{degrees}, recompute {layout.recompute}: "
            f"{shown} GiB"
        )


def tightest(question: PlanQuestion) -> Tight | None:
    """Return what needs least memory of its device among layouts inside one group; None where rules
    leave none.

    One sequence at a time, most recomputed and most divided: nothing that the question allows holds
    less on equal degrees.
    """
    context = Context(question)
    # What holds least decides whether anything can fit.
    recompute = question.recomputes()[-1]
    best: Tight | None = None
    for g, layout in _smallest(question, recompute):
        used = [0] * len(question.cluster.groups)
        used[g] = layout.world_size
        machines = context.machines(used)
        if machines is None:
            continue
        prediction = machines[1].predict(layout)
        fill = prediction.memory_gib / prediction.capacity_gib
        if best is None or fill < best.fill:
            kind = question.cluster.groups[g].device.kind
            best = Tight(
                layout,
                kind,
                prediction.memory_gib,
                prediction.capacity_gib,
                prediction.memory_parts,
            )
    return best


def _smallest(q: PlanQuestion, recompute: str) -> Iterator[tuple[int, Layout]]:
    """Yield (group, layout) for the degrees of every group, as many devices as they can use."""
    limits = replace(q.limits, micro_sequences=int(str(q.fixed.get("micro_sequences", 1))))
    length, sequences = q.training.sequence_length, q.training.sequences
    unit = q.micro_unit
    for g, group in enumerate(q.cluster.groups):
        for core in inner_degrees(
            q.model, length, unit, group.devices, group.devices_per_node, limits
        ):
            if not q.allows(**core._asdict()):
                continue
            for dp_ranks in divisors(q.rank_unit // core.micro_sequences):
                ranks = dp_ranks * core.cp * core.tp
                if ranks > group.devices:
                    break
                found = q.splits(core, dp_ranks)
                if not found:
                    continue
                number = sequences // (dp_ranks * core.micro_sequences)
                most = min(q.most_stages, group.devices // ranks, q.model.n_layers)
                for pp in {1, *divisors(group.devices // ranks, most), most}:
                    ways = q.schedules(pp, (number,))
                    if ways and q.allows(pp=pp):
                        yield g, skeleton(core, found[0], pp, recompute, ways[-1])


def remedies(question: PlanQuestion) -> list[str]:
    """Return changes that make a model fit that does not: each alone, the smallest of each kind."""
    ways = []
    for name, word in (
        ("micro_sequences", "a smaller micro-batch"),
        ("recompute", "recomputation"),
    ):
        if name in question.fixed:
            fixed = {k: v for k, v in question.fixed.items() if k != name}
            if _fits(replace(question, fixed=fixed)):
                ways.append(f"{word}: leave layout.{name} to the search")
    if "deepspeed" not in question.engines or question.fixed.get("offload") == "none":
        fixed = {k: v for k, v in question.fixed.items() if k not in ("engine", "offload")}
        if plan(replace(question, engines=("deepspeed",), fixed=fixed, top=1)).choices:
            ways.append("offload: layout.engine=deepspeed layout.offload=optimizer")
    for factor in (2, 4, 8, 16, 32):
        if _fits(replace(question, cluster=larger(question.cluster, factor))):
            nodes = sum(group.nodes for group in question.cluster.groups)
            ways.append(f"more devices: {factor} times as many nodes ({nodes * factor:,})")
            break
    for kind in sorted(DEVICES, key=lambda name: float(DEVICES[name]["memory_gib"])):
        memory = float(DEVICES[kind]["memory_gib"])
        if memory <= max(group.device.memory_gib for group in question.cluster.groups):
            continue
        groups = tuple(replace(g, device=device(kind)) for g in question.cluster.groups)
        if _fits(replace(question, cluster=replace(question.cluster, groups=groups))):
            ways.append(f"bigger devices: as many {kind} ({memory:g} GiB)")
            break
    return ways


def larger(cluster: Cluster, factor: int) -> Cluster:
    """Return a cluster with more nodes in every group."""
    groups = tuple(replace(group, nodes=group.nodes * factor) for group in cluster.groups)
    return replace(cluster, groups=groups)


def _fits(question: PlanQuestion) -> bool:
    found = tightest(question)
    return found is not None and found.fill <= 1.0


def best_with(question: PlanQuestion, fixed: Mapping[str, Any]) -> RankedLayout | list[str]:
    """Return the fastest layout with some degrees, or why there is none: a rule, memory, or the
    machines.
    """
    found = _contradiction(question, fixed)
    if found:
        return [found]
    asked = _asking(question, fixed)
    answer = plan(asked)
    if answer.choices:
        return answer.best
    broken = _broken(question, fixed)
    if broken:
        return broken
    nearest = tightest(asked)
    if nearest is not None and nearest.fill > 1.0:
        return [f"does not fit; the least is {nearest}"]
    return [_unplaced(asked, answer.counts)]


def _asking(question: PlanQuestion, fixed: Mapping[str, Any]) -> PlanQuestion:
    """Return the question with some degrees fixed, to the engine that knows them."""
    every = {**question.fixed, **fixed}
    asked = replace(question, fixed=every, top=1, worth=1.0)
    if "zero_stage" in every or every.get("offload", "none") != "none":
        return replace(asked, engines=("deepspeed",))
    return asked


def _contradiction(question: PlanQuestion, fixed: Mapping[str, Any]) -> str:
    """Return why no layout can have these settings together, whatever the machines; "" where some
    may.
    """
    for name, value in fixed.items():
        other = question.fixed.get(name, value)
        if other != value:
            return f"layout.{name}={other} is fixed on the command line as well: nothing has both"
    every = {**question.fixed, **fixed}
    named = [name for name in ("zero_stage", "offload") if every.get(name, "none") != "none"]
    if named and every.get("engine", "deepspeed") != "deepspeed":
        return f"{' and '.join(named)}: of DeepSpeed only, and engine={every['engine']}"
    if every.get("schedule") == "gpipe":
        return (
            "gpipe takes as long as 1f1b and holds more; it is looked at only where 1f1b cannot run"
        )
    if question.compiled and "zero_bubble" in str(every.get("schedule", "")):
        return (
            "zero-bubble schedules take the backward pass apart, which training.compile=true "
            "forbids"
        )
    if every.get("schedule", "1f1b") != "1f1b" and every.get("pp") == 1:
        return f"schedule={every['schedule']} is for pipelines, and pp=1"
    return ""


def _broken(question: PlanQuestion, fixed: Mapping[str, Any]) -> list[str]:
    """Return the rules that these degrees break by themselves; other settings stay as they are most
    easily kept.
    """
    names = Layout.__dataclass_fields__
    every = {k: v for k, v in {**question.fixed, **fixed}.items() if k in names}
    if "zero_stage" in fixed or fixed.get("offload", "none") != "none":
        every["engine"] = "deepspeed"
    plain = replace(Layout(micro_sequences=1), **every)
    if "dp_shard" not in every:  # as much as experts need to be divided among its ranks
        experts = plain.ep * plain.etp
        plain = replace(plain, dp_shard=experts // math.gcd(experts, plain.cp * plain.tp))
    ranks = plain.world_size
    devices = question.cluster.devices
    if ranks > devices:
        return [f"needs at least {ranks:,} devices, and there are {devices:,}"]
    if plain.virtual_stages > 1 and "schedule" not in every:
        plain = replace(plain, schedule="interleaved_1f1b")
    if plain.schedule == "zbv_zero_bubble":
        plain = replace(plain, virtual_stages=2)
    sequences = [question.training.sequences]
    length = question.training.sequence_length
    found = problems(plain, question.model, length, sequences, None)
    asked = {f"layout.{name}" for name in every}
    told = [f"{setting}: {message}" for setting, message in found if setting in asked]
    return told or _cut(question, plain)


def _cut(question: PlanQuestion, layout: Layout) -> list[str]:
    """Return that micro-batches cut what no micro-batch may: a share of a step of a family, or a
    smaller step of a ramp.
    """
    together = layout.dp_size * layout.micro_sequences
    whole = question.rank_unit % together or question.micro_unit % layout.micro_sequences
    if not whole or question.units is None:
        return []
    return [
        f"dp x micro_sequences = {together:,} sequences do not divide {question.rank_unit:,}: so "
        f"many has each share of a step of the family, or the greatest part that all steps of the "
        f"ramp have in common; micro_sequences must divide {question.micro_unit:,}"
    ]


def _unplaced(asked: PlanQuestion, counts: Mapping[str, int]) -> str:
    """Return why layouts with these degrees stand nowhere, though they would fit."""
    cluster, fixed = asked.cluster, asked.fixed
    node = max(group.devices_per_node for group in cluster.groups)
    tp = int(str(fixed.get("tp", 1)))
    if tp > node:
        return f"tensor parallelism stays on a node, and a node has {node} devices"
    for name, most in (
        ("micro_sequences", asked.limits.micro_sequences),
        ("cp", asked.limits.cp),
        ("virtual_stages", asked.limits.virtual_stages),
    ):
        if int(str(fixed.get(name, 1))) > most:
            return f"{name} is searched up to {most}; `motet layout show` draws larger ones"
    inside = math.prod(int(str(fixed.get(name, 1))) for name in ("tp", "cp", "dp_shard"))
    largest = max(group.devices for group in cluster.groups)
    if inside > largest:
        return (
            f"tp x cp x dp_shard = {inside:,} ranks stay inside one group of the cluster, and the "
            f"largest has {largest:,} devices"
        )
    if counts.get("uneven"):
        return (
            "it would use nodes unevenly: its stages and replicas fill neither whole nodes of "
            f"{node} devices nor a part of one"
        )
    if counts.get("micro-batches"):
        return (
            f"a batch of {asked.training.sequences:,} sequences gives a pipeline of these degrees "
            "fewer than "
            f"{asked.limits.micro_batches} micro-batches, or not a number that its schedule takes"
        )
    return (
        f"no number of the {cluster.devices:,} devices has these degrees: replicas divide "
        "batch.sequences="
        f"{asked.training.sequences:,}, and whole nodes, or a part of one, are used"
    )


def every_degree(
    question: PlanQuestion, best: RankedLayout, tell: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Return a row for every value of every setting: the best layout that has it, how much longer
    it takes, and why.

    Keys: setting, value, time_s, longer (a share of the fastest, as text), why. A value that the
    fastest has says so.
    """
    rows = []
    for name, values in _values(question, best).items():
        for value in values:
            tell(f"searching layouts with {name}={value}")
            rows.append({"setting": name, "value": str(value), **_row(question, best, name, value)})
    return rows


def _values(question: PlanQuestion, best: RankedLayout) -> dict[str, list[Any]]:
    """Return the values that are worth a look: powers of two as far as rules and devices go, and
    every choice of the switches.
    """
    model = question.model
    devices = question.cluster.devices
    node = max(group.devices_per_node for group in question.cluster.groups)
    twos, most = [2**i for i in range(15)], question.limits.micro_sequences
    values_of: dict[str, list[Any]] = {
        "tp": [n for n in twos if n <= node],
        "pp": [n for n in twos if n <= min(devices, model.n_layers + 2)],
        "cp": [n for n in twos if n <= min(devices, question.limits.cp)],
        "micro_sequences": [n for n in twos if n <= most and question.micro_unit % n == 0],
        "recompute": list(RECOMPUTE),
    }
    if model.n_experts:
        values_of["ep"] = [n for n in twos if n <= min(devices, model.n_experts)]
    if len(question.engines) > 1:
        values_of["engine"] = list(question.engines)
    for name, values in values_of.items():
        own = getattr(best.layout, name)
        if own not in values:
            values.append(own)
            values.sort()
    return {name: values for name, values in values_of.items() if name not in question.fixed}


def _row(question: PlanQuestion, best: RankedLayout, name: str, value: Any) -> dict[str, Any]:
    if getattr(best.layout, name) == value:
        return {"time_s": best.prediction.step_time_s, "longer": None, "why": "the first has it"}
    found = best_with(question, {name: value})
    if isinstance(found, list):
        return {"time_s": None, "longer": None, "why": found[0]}
    time_s = found.prediction.step_time_s
    reasons = [line.strip() for line in slower(found, best)[1:]]
    longer = f"{time_s / best.prediction.step_time_s - 1:.1%}"
    return {"time_s": time_s, "longer": longer, "why": "; ".join(reasons[:2])}


def slower(one: RankedLayout, best: RankedLayout) -> list[str]:
    """Return by how much a layout takes longer than the best, and in which phases."""
    here, there = one.prediction, best.prediction
    ratio = here.step_time_s / there.step_time_s - 1
    if ratio <= 1e-9:
        return ["this is the fastest" if one.kind == best.kind else "takes as long as the fastest"]
    lines = [
        f"fits, and takes {ratio:.1%} longer than the fastest ({here.step_time_s:.3g} s against "
        f"{there.step_time_s:.3g} s)"
    ]
    names = dict.fromkeys((*here.parts, *there.parts))
    more = {name: here.parts.get(name, 0.0) - there.parts.get(name, 0.0) for name in names}
    for name, seconds in sorted(more.items(), key=lambda item: -abs(item[1])):
        if abs(seconds) > TELLING * there.step_time_s:
            word = "more" if seconds > 0 else "less"
            lines.append(f"  {abs(seconds):.3g} s {word} of {name.replace('_', ' ')}")
    return lines
