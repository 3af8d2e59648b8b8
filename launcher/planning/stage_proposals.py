"""The layouts that stages of a progressive family would have on the machines of a planned layout,
where another than the run's is worth it. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from motet.launcher.planning.table import FULLEST, section
from motet.launcher.runs.stage_layouts import OF_THE_RUN
from motet.models.family.growing_stages import GrowingStage
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.staged import WHERE
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.family import GrowthStage, progressive_cost
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.question import FIXABLE, PlanQuestion, RankedLayout

GAIN = 0.05
"""A stage is proposed a layout of its own where that is predicted to take so much less time: less
than this is within what predictions miss.
"""


def proposed(
    family: ProgressiveFamily,
    question: PlanQuestion,
    choice: RankedLayout,
    refused: Callable[[Sequence[Layout]], Sequence[str]],
) -> list[RankedLayout]:
    """Return the layout of every stage: the fastest one on as many ranks in the same places, or
    `choice`, the run's, where nothing is faster by `GAIN`. The last stage has the run's.

    Args:
        refused: says why layouts of all stages cannot train the family.
    """
    found = [choice] * len(family.stages)
    for number, stage in enumerate(family.stages[:-1]):
        now = _cost(family, number, choice, question)
        for other in _others(stage, question, choice):
            taken = [*found[:number], other, *found[number + 1 :]]
            if refused([one.layout for one in taken]):
                continue
            seconds = _cost(family, number, other, question)
            if seconds is not None and (now is None or seconds < (1 - GAIN) * now):
                found[number] = other
                break
    return found


def _others(
    stage: GrowingStage, question: PlanQuestion, choice: RankedLayout
) -> list[RankedLayout]:
    """Return layouts of a stage's model on the ranks of the run's that leave room in memory,
    fastest first.
    """
    asked = {name: value for name, value in (stage.layout or {}).items() if name in FIXABLE}
    own = replace(
        question,
        model=stage.config,
        cluster=_with_memory(choice.cluster, FULLEST),
        engines=(choice.layout.engine,),
        fixed={**question.fixed, **asked},
    )
    ranks = choice.layout.world_size, choice.layout.placement
    return [
        replace(other, cluster=choice.cluster)
        for other in plan(own).choices
        if (other.layout.world_size, other.layout.placement) == ranks
    ]


def _with_memory(cluster: Cluster, share: float) -> Cluster:
    """Return machines whose devices have a share of their memory."""
    groups = [
        replace(group, device=replace(group.device, memory_gib=share * group.device.memory_gib))
        for group in cluster.groups
    ]
    return replace(cluster, groups=tuple(groups))


def _cost(
    family: ProgressiveFamily, number: int, choice: RankedLayout, question: PlanQuestion
) -> float | None:
    """Return the seconds of a step of a stage in a layout; None where it does not fit."""
    stage, teacher = family.stages[number], family.teacher_of(number)
    taught_by = None if teacher is None else family.stages[teacher].config
    one = GrowthStage(stage.label, stage.config, choice.layout, question.training, 1.0, taught_by)
    cost = progressive_cost([one], choice.cluster, question.traits, question.constants)
    return cost.step_time_s[stage.label] if cost.fits else None


def differences(own: RankedLayout, run: RankedLayout) -> dict[str, Any]:
    """Return what a stage's section `layout` says otherwise than the run's; {} where nothing."""
    plain = {name: _written(value) for name, value in vars(Layout()).items()}
    before, after = section(run), section(own)
    return {
        name: after.get(name, plain.get(name))
        for name in (*after, *(before.keys() - after.keys()))
        if name not in OF_THE_RUN
        and after.get(name, plain.get(name)) != before.get(name, plain.get(name))
    }


def _written(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def text(family: ProgressiveFamily, own: Sequence[RankedLayout], run: RankedLayout) -> str:
    """Return what layout.yaml says of stages that have layouts of their own: a note, as entries of
    a list cannot be put in by themselves.
    """
    lines = [
        f"# {WHERE}.stages[{number}], {stage.label}: layout: {flow(differences(one, run))}\n"
        for number, (stage, one) in enumerate(zip(family.stages, own, strict=True))
        if one is not run
    ]
    head = "# Stages of the family that are predicted to be faster otherwise; in the run.yaml:\n"
    return head + "".join(lines) if lines else ""


def flow(layout: Mapping[str, Any]) -> str:
    """Return settings on one line of YAML."""
    return "{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in layout.items()) + "}"
