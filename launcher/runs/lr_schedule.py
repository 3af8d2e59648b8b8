"""Learning rate of every step: pure functions."""

from __future__ import annotations

import math

from motet.launcher.config.sections import ScheduleSettings
from motet.models.family.base import TrainingStage


def learning_rate(
    schedule: ScheduleSettings,
    step: int,
    steps: int,
    peak: float,
    stage: TrainingStage | None = None,
) -> float:
    """Return the learning rate of the update that makes model `step + 1`.

    A linear rise over `warmup_steps` (the first update already learns), then: constant; linear or
    cosine (Loshchilov and Hutter, arXiv:1608.03983) down to `final_lr_fraction` of the peak at the
    last update; or wsd, constant and then linear down over the last `decay_fraction` of the run (Hu
    et al., MiniCPM, arXiv:2404.06395).

    Args:
        step: the update's number, from 0.
        steps: updates of the whole run.
        peak: the highest learning rate.
        stage: the stage of a family's run that the step belongs to: the schedule runs over it. One
            whose end is not known has no decay: a schedule over its greatest length would end
            somewhere on its way down.
    """
    warmup = schedule.warmup_steps
    if stage is not None:
        step, steps, peak = step - stage.start_step, stage.steps, peak * stage.lr_scale
        warmup = warmup if stage.warmup_steps is None else stage.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if stage is not None and stage.held:
        return peak
    first, last = warmup, max(steps - 1, warmup + 1)
    if schedule.kind == "wsd":
        first = last - max(1, round(schedule.decay_fraction * steps))
    done = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    shape = {"constant": 1.0, "linear": 1.0 - done, "wsd": 1.0 - done}
    shape["cosine"] = 0.5 * (1.0 + math.cos(math.pi * done))
    floor = 0.0 if schedule.kind == "constant" else schedule.final_lr_fraction
    return peak * (floor + (1.0 - floor) * shape[schedule.kind])
