"""The transition of a run that grows: the model of one stage becomes that of the next.

What stands before is a checkpoint, and so is what comes out of it, under the same step: no token is
read between them. A rank that dies anywhere in it finds the one or the other. An operator draws
from its seed and the names of weights, so a growth that is made again is the same.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from motet.core.errors import UserError
from motet.experiments.stream.stream import IGNORED_LABEL, Batch
from motet.launcher.rank.growth_inputs import (
    blended_states,
    growth_of,
    is_exact,
    read_teacher,
)
from motet.launcher.rank.job import ORDER, TrainingJob
from motet.launcher.rank.probing import sum_over_ranks
from motet.launcher.rank.stage_ends import stage_state
from motet.models.family.base import WHOLE, Member
from motet.models.family.nested_stages import Carried
from motet.models.growth.growth import grow as grown_states
from motet.models.member import name_of
from motet.parallel.engines.protocol import Engine
from motet.parallel.layout.layout import Layout

EXACT_TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
"""Most that a log-probability may change by when an operator is exact, nats, by precision; more
where it is larger than 1, in proportion."""


class Change(NamedTuple):
    """What a growth changed, on the sequences that come next.

    Attributes:
        loss_before, loss_after: mean cross-entropy of both models, nats.
        largest: largest change of a log-probability over max(1, its size).
    """

    loss_before: float
    loss_after: float
    largest: float


def growth_due(job: TrainingJob, step: int) -> bool:
    """Return whether the model must grow before `step` trains."""
    return job.growing is not None and job.growing.member_at(step) != job.held


def has_grown(job: TrainingJob, step: int) -> bool:
    """Return whether the model that was trained up to `step` has grown already: it was measured
    before, and what it became has not trained yet.
    """
    growing = job.growing
    return growing is not None and step in growing.ends() and growing.member_at(step) == job.held


def grow(job: TrainingJob, step: int) -> None:
    """Let the model of the stage that begins at `step` take the place of the one before (a
    collective).

    Raises:
        UserError: on every rank: the new model is not what the operator states.
    """
    assert job.growing is not None
    assert job.engines is not None
    job.checkpoints.wait()  # the model before is on disk
    started, number = time.perf_counter(), job.growing.number_at(step)
    growth, layout = growth_of(job, number), job.layouts.of(number)
    batch = _compared(job, step, layout)
    with job.progress.phase("growing"):
        before, earlier = _scores(job.engine, batch), _earlier(job, number, batch)
        engine = job.engines(job.growing.member_at(step), layout)
        grown = grown_states(growth, job.engine.export_state())
        engine.import_state(blended_states(job, number, engine, grown))
        change = _change(job, batch, before, _scores(engine, batch))
        refuse_change(job, number, change)
        slices = [
            (one, _change(job, batch, old, _scores(engine, batch, one.member)))
            for one, old in earlier
        ]
        refuse_slices(job, number, slices)
        from_name = name_of(job.held) or WHOLE
        job.engine, job.held = engine, job.growing.member_at(step)
        job.lie(layout)
        job.facts.pop(ORDER, None)  # of the channels of the model before
        read_teacher(job)
        gc.collect()  # the old engine holds as much as half of the new one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        job.checkpoints.save(step, engine.tensors(), facts_of(job), job.ledger.sync, grown=True)
        job.checkpoints.wait()
    _tell(job, step, from_name, change, slices, time.perf_counter() - started)


def _earlier(
    job: TrainingJob, number: int, batch: Batch
) -> list[tuple[Carried, npt.NDArray[np.float64]]]:
    """Return how the models score that join the space of a stage as slices, before they do."""
    assert job.growing is not None
    carried = job.growing.carried.get(number, [])
    return [(one, _scores(job.engine, batch, one.source)) for one in carried]


def _compared(job: TrainingJob, step: int, layout: Layout) -> Batch:
    """Return the sequences that both models are scored on, of those that come next: each rank's
    own, or, where the new model lies otherwise, and other ranks must read alike, the same on all.
    """
    if layout == job.layout:
        return job.feed.read(step).batches[0]
    first, rows = job.steps.slots_before(step), (job.layout, layout)
    return job.feed.stream.batch(first, min(one.micro_sequences for one in rows))


def _tell(
    job: TrainingJob,
    step: int,
    from_name: str,
    change: Change,
    slices: Sequence[tuple[Carried, Change]],
    seconds: float,
) -> None:
    """Log a growth, and show it."""
    assert job.growing is not None
    number = job.growing.number_at(step)
    joined = {
        one.member.name: {"source": one.source_name, "exact": one.exact, **own._asdict()}
        for one, own in slices
    }
    job.metrics.log(
        "event",
        step,
        event="grown",
        source=from_name,
        member=name_of(job.held) or WHOLE,
        operator=job.growing.told(number),
        exact=is_exact(job.growing, number),
        **change._asdict(),
        **({"slices": joined} if joined else {}),
        seconds=seconds,
    )
    job.progress.print(
        f"step {step:,}: {from_name} grew into {name_of(job.held) or WHOLE} "
        f"(loss {change.loss_before:.3f}, then {change.loss_after:.3f})"
    )


def facts_of(job: TrainingJob) -> dict[str, Any]:
    """Return what the manifest of a checkpoint says beside its files: where members grow, whose
    model it has.
    """
    held = {}
    if job.growing is not None:
        config = job.growing.whole if job.held is None else job.held.config
        named = {"name": name_of(job.held) or WHOLE, "model": vars(config)}
        held = {"stage": named | stage_state(job)}
    return {
        **job.facts,
        **held,
        "segment": job.segment.segment,
        "lineage": list(job.lineage),
        "judge": job.guard.state(),
        "probes": list(job.measured),
        "metrics": job.metrics.mark(),
    }


def refuse_change(job: TrainingJob, number: int, change: Change) -> None:
    """Raise `UserError` where a growth changed the model more than its operator states."""
    assert job.growing is not None
    stage, told = job.growing.stages[number], ""
    tolerance = EXACT_TOLERANCE[job.facts["precision"]]
    rise, most = change.loss_after - change.loss_before, job.growing.loss_jump_nats(number)
    asked = "set loss_jump_nats of the stage if that is what you want"
    if is_exact(job.growing, number) and stage.loss_jump_nats is None:
        if not change.largest <= tolerance:
            told = (
                "keeps what the model computes, and a log-probability changed by "
                f"{change.largest:.2g}; {tolerance:g} is what {job.facts['precision']} explains; "
                f"{asked}"
            )
    elif not rise <= most:
        told = (
            f"raises the loss by at most {most:g} nats, and it rose by {rise:.3g}, from "
            f"{change.loss_before:.4g} to {change.loss_after:.4g}; {asked}"
        )
    if told:
        where = f"family.options.stages[{number}].operator={stage.operator}"
        raise UserError(f"{where}: {told}. The model before it is kept")


def refuse_slices(job: TrainingJob, number: int, slices: Sequence[tuple[Carried, Change]]) -> None:
    """Raise `UserError` where a slice that is to be a model of the stage before is not."""
    assert job.growing is not None
    tolerance, stage = EXACT_TOLERANCE[job.facts["precision"]], job.growing.stages[number]
    for one, change in slices:
        if one.exact and not change.largest <= tolerance:
            where = f"family.options.stages[{number}].nested.before"
            raise UserError(
                f"{where}: {one.member.name} computes what {one.source_name} does, by "
                f"{stage.operator}, and a log-probability changed by {change.largest:.2g}; "
                f"{tolerance:g} is what {job.facts['precision']} explains. The model before it is "
                "kept"
            )


def _scores(engine: Engine, batch: Batch, member: Member | None = None) -> npt.NDArray[np.float64]:
    """Return the log-probability of every label of the sequences that come next; nothing is trained
    on them before their turn.
    """
    tokens, labels = batch.tokens_BT.astype(np.int64), batch.labels_BT.astype(np.int64)
    logprob_BT, _ = engine.score(tokens, labels, member)
    engine.finish_scoring()
    return logprob_BT


def _change(
    job: TrainingJob,
    batch: Batch,
    before_BT: npt.NDArray[np.float64],
    after_BT: npt.NDArray[np.float64],
) -> Change:
    """Return what changed, over all ranks (a collective)."""
    counted = batch.labels_BT != IGNORED_LABEL
    sums = [float(x[counted].sum()) for x in (before_BT, after_BT)]
    total = sum_over_ranks(np.array([*sums, float(counted.sum())]), job.layout, job.world)
    relative = np.abs(after_BT - before_BT) / np.maximum(1.0, np.abs(before_BT))
    # What is no number is the largest change of all.
    mine = float(np.nan_to_num(relative[counted], nan=math.inf).max(initial=0.0))
    largest = torch.tensor([mine], dtype=torch.float64)
    if job.world.size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=job.world.control)
    labels = max(1.0, float(total[2]))
    return Change(-float(total[0]) / labels, -float(total[1]) / labels, float(largest))
