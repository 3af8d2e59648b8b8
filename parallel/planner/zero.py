"""Layouts of engines that divide data and state only: DeepSpeed's ZeRO stages, with and without
offload. Pure; no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from motet.parallel.cost.predictor import Predictor
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.placement import trimmed
from motet.parallel.planner.question import RankedLayout
from motet.parallel.planner.space import GroupAssignment, divisors

if TYPE_CHECKING:
    from motet.parallel.planner.best_first import Search

ZERO_STAGES = (1, 2, 3)
OFFLOAD = ("none", "optimizer")


def search(search: Search) -> None:
    """Try every number of ranks of every group, ZeRO stage, offload, micro-batch and recomputation."""
    question = search.question
    if any(question.fixed.get(name, 1) != 1 for name in ("tp", "pp", "cp", "ep", "etp")):
        return
    for g, group in enumerate(search.cluster.groups):
        for ranks in divisors(question.training.sequences, group.devices):
            used = [ranks if other == g else 0 for other in range(len(search.cluster.groups))]
            cluster = trimmed(search.cluster, used)
            if cluster is None or not question.allows(dp_shard=ranks, dp_replicate=1):
                continue
            for zero_stage in ZERO_STAGES:
                for offload in OFFLOAD:
                    if question.allows(zero_stage=zero_stage, offload=offload):
                        training = replace(
                            question.training, zero_stage=zero_stage, offload=offload != "none"
                        )
                        predictor = Predictor(
                            search.model, cluster, training, question.traits, question.constants
                        )
                        _batches(search, predictor, ranks, (zero_stage, offload), g)


def _batches(
    search: Search, predictor: Predictor, ranks: int, zero: tuple[int, str], g: int
) -> None:
    question = search.question
    fits = False
    for micro in divisors(question.training.sequences // ranks, question.limits.micro_sequences):
        if not question.allows(micro_sequences=micro):
            continue
        for recompute in search.recomputes():
            layout = Layout(
                engine="deepspeed", dp_shard=ranks, micro_sequences=micro, recompute=recompute
            )
            search.answer.counts["predicted"] += 1
            prediction = predictor.predict(layout)
            if not prediction.fits:
                continue
            fits = True
            if prediction.step_time_s < search.limit_s:
                spread = GroupAssignment("pipeline", ((0, 1),))
                search.record(RankedLayout(layout, predictor.cluster, spread, prediction, *zero))
            break
    search.answer.counts["memory"] += int(not fits)
