"""Layouts of engines that divide data and state only: DeepSpeed's ZeRO stages, with and without
offload. Pure; no torch.
"""

from __future__ import annotations

import math
from dataclasses import replace

from motet.parallel.cost.predictor import Predictor
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.context import Context
from motet.parallel.planner.placement import trimmed
from motet.parallel.planner.question import RankedLayout
from motet.parallel.planner.space import GroupAssignment, divisors

ZERO_STAGES = (1, 2, 3)
OFFLOAD = ("none", "optimizer")


def search(context: Context) -> None:
    """Try ranks of every group, ZeRO stage, offload, micro-batch and recomputation."""
    question = context.question
    # These engines divide data and state only: fixed degrees of anything else leave them nothing.
    if any(question.fixed.get(name, 1) != 1 for name in ("tp", "pp", "cp", "ep", "etp")):
        return
    for g, group in enumerate(context.question.cluster.groups):
        for ranks in divisors(question.rank_unit, group.devices):
            used = [
                ranks if other == g else 0 for other in range(len(context.question.cluster.groups))
            ]
            cluster = trimmed(context.question.cluster, used)
            if cluster is None or not question.allows(dp_shard=ranks, dp_replicate=1):
                continue
            for zero_stage in ZERO_STAGES:
                for offload in OFFLOAD:
                    if question.allows(zero_stage=zero_stage, offload=offload):
                        training = replace(
                            question.training, zero_stage=zero_stage, offload=offload != "none"
                        )
                        predictor = Predictor(
                            question.model, cluster, training, question.traits, question.constants
                        )
                        _batches(context, predictor, ranks, (zero_stage, offload), g)


def _batches(
    context: Context, predictor: Predictor, ranks: int, zero: tuple[int, str], g: int
) -> None:
    question = context.question
    fits = False
    unit = math.gcd(question.rank_unit // ranks, question.micro_unit)
    for micro in divisors(unit, question.limits.micro_sequences):
        if not question.allows(micro_sequences=micro):
            continue
        for recompute in question.recomputes():
            layout = Layout(
                engine="deepspeed", dp_shard=ranks, micro_sequences=micro, recompute=recompute
            )
            context.record.counts["predicted"] += 1
            prediction = predictor.predict(layout)
            if not prediction.fits:
                continue
            fits = True
            if prediction.step_time_s < context.record.limit_s:
                spread = GroupAssignment("pipeline", ((0, 1),))
                context.record.add(
                    RankedLayout(layout, predictor.cluster, spread, prediction, *zero)
                )
            break
    context.record.counts["memory"] += int(not fits)
