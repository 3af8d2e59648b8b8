"""Stages that the loss ends: all ranks decide alike, from losses that are the same on all.

What was decided stands in the checkpoint that the decision brings about, under `stage`, and so does
what the next decision will rest on: a run that goes on decides what it would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from motet.launcher.rank.job import TrainingJob
from motet.launcher.runs.families import refuse_other_multipliers
from motet.models.family.base import WHOLE
from motet.models.family.loss_trend import LossTrend, Slope
from motet.models.family.progressive import ProgressiveFamily
from motet.models.member import name_of
from motet.parallel.engines.protocol import StepResult


def watch(job: TrainingJob, step: int, result: StepResult) -> None:
    """Take the loss of the update that made model `step`; end its stage where the rule says so."""
    growing = job.growing
    if growing is None or not growing.is_open(step - 1):
        return
    number = growing.number_at(step - 1)
    if job.trend is None or job.trend[0] != number:
        job.trend = (number, growing.trend(number))
    assert growing.run is not None
    tokens = growing.run.tokens(growing.starts[number], step)
    trend = job.trend[1]
    full = trend.add(tokens, result.loss if result.applied else None)
    length = growing.stages[number].length
    assert length is not None
    assert length.until is not None
    slope = trend.slope() if full and tokens >= length.until.least_tokens else None
    if slope is not None and slope.below(length.until.loss_fall):
        _end(job, step, number, tokens, "loss", slope)
    elif step >= growing.stop_of(number):
        _end(job, step, number, tokens, "most_tokens", trend.slope())


def _end(
    job: TrainingJob, step: int, number: int, tokens: int, why: str, slope: Slope | None
) -> None:
    """End the stage, on all ranks: what was prepared for the next steps is of the old one."""
    growing = job.growing
    assert growing is not None
    growing.end_stage(step)
    job.trend = None
    job.feed.forget()
    if job.draw_check is not None:
        job.draw_check.forget()
    for end in growing.ends():
        job.checkpoints.keep_for_good(end)
        if end >= step:
            job.probes.also(end)
    stage = growing.stages[number]
    assert stage.length is not None
    assert stage.length.until is not None
    job.metrics.log(
        "event",
        step,
        event="stage_ended",
        member=name_of(growing.member_at(step - 1)),
        by=why,
        tokens=tokens,
        threshold=stage.length.until.loss_fall,
        **({} if slope is None else slope._asdict()),
    )
    fall = "" if slope is None else f"; its loss falls by {slope.fall:.3g} a ln(tokens)"
    job.progress.print(f"step {step:,}: stage {stage.label} ends by {why}{fall}")


def stage_state(job: TrainingJob) -> dict[str, Any]:
    """Return what a checkpoint says of its stage: the width multipliers of its model where it has
    some, and of stages whose ends are not known beforehand.
    """
    growing = job.growing
    if growing is None:
        return {}
    multipliers = growing.multipliers(name_of(job.held) or WHOLE)
    found = {} if multipliers is None else {"width_multipliers": multipliers}
    if not any(map(growing.loss_ends, range(len(growing.stages)))):
        return found
    trend = {} if job.trend is None else {"number": job.trend[0], **job.trend[1].state()}
    return {**found, "starts": list(growing.starts), "trend": trend}


def settle(growing: ProgressiveFamily, facts: Mapping[str, Any]) -> None:
    """Let a family know what a checkpoint says of where its stages began."""
    if starts := (facts.get("stage") or {}).get("starts"):
        growing.settle(starts)


def restore(job: TrainingJob, facts: Mapping[str, Any]) -> None:
    """Take over the losses of a checkpoint's stage.

    Raises:
        UserError: its model trained with other width multipliers than the family has.
    """
    if job.growing is not None and (stage := facts.get("stage")):
        refuse_other_multipliers(job.growing, stage, f"the checkpoint of {job.run.root}")
    kept = (facts.get("stage") or {}).get("trend")
    job.trend = (int(kept["number"]), LossTrend.restored(kept)) if kept else None
