"""What a growth needs beside the state of the model before: maps that are learned, scores of its
channels, and an earlier model to blend with.

All are functions of the run alone, so that a growth that is made again is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from motet.core.errors import UserError
from motet.launcher.rank.job import TrainingJob
from motet.models.family.progressive import ProgressiveFamily
from motet.models.growth.growth import Growth
from motet.models.growth.learned import LearnedGrowth, LearnedOperator, learn
from motet.models.growth.multilevel import blended, digests
from motet.models.growth.multiplied import Multiplied
from motet.models.growth.prune import Prune
from motet.models.growth.state import WeightState, states_of
from motet.parallel.engines.protocol import Engine
from motet.parallel.runtime.mesh import first_complaint


def is_exact(family: ProgressiveFamily, number: int) -> bool:
    """Return whether the model of a stage computes what the one before does."""
    return family.stages[number].blend is None and family.growth(number).exact


def growth_of(job: TrainingJob, number: int) -> Growth:
    """Return how the model of a stage is made, its maps learned where it has any (a collective).

    Rank 0 learns, and tells the others. The maps read sequences that lie behind the run's last one:
    what the run trains on is neither read before its turn nor twice, and no exposure is among them.

    Raises:
        UserError: on every rank: learning met a loss that is no number.
    """
    assert job.growing is not None
    operator = job.growing.operator(number)
    if isinstance(operator, Prune) and "scores" not in job.growing.stages[number].options:
        return _pruned(job, number, operator)
    growth = job.growing.growth(number)
    learns = growth.inner if isinstance(growth, Multiplied) else growth
    if not isinstance(learns, LearnedGrowth):
        return growth
    weights: dict[str, Tensor] = {}
    for name, state in job.engine.export_state():  # a collective, to its end
        if job.world.rank == 0 and "weight" in state:
            weights[name] = state["weight"].to(job.world.device)
    losses: list[float] = []
    complaint = None
    if job.world.rank == 0:
        try:
            losses = _learn(job, number, learns, weights)
        except UserError as error:
            complaint = str(error)
    if told := first_complaint(complaint, job.world):
        raise UserError(f"family.options.stages[{number}].operator: {told}")
    if job.world.size > 1:
        for parameter in learns.maps.parameters():
            dist.broadcast(parameter.data, src=0, group=job.world.control)
    if losses:
        _tell(job, number, losses)
    return growth


def _pruned(job: TrainingJob, number: int, operator: Prune) -> Growth:
    """Return what is left of a model by the size of its activations on the sequences that come
    next, which are not trained on before their turn.
    """
    assert job.growing is not None
    step, batches, sequences = job.growing.starts[number], [], 0
    while sequences < operator.sequences and step < job.settings.steps:
        batches += job.feed.read(step).batches
        sequences, step = sequences + job.steps.sequences(step), step + 1
    measured = replace(operator, scores=job.engine.channel_scores(batches))
    return job.growing.growth(number, measured)


def _learn(
    job: TrainingJob, number: int, growth: LearnedGrowth, weights: Mapping[str, Tensor]
) -> list[float]:
    assert job.growing is not None
    operator: Any = job.growing.operator(number)
    assert isinstance(operator, LearnedOperator)
    device = job.world.device
    growth.maps.to(device)
    losses = learn(growth, weights, _batches(job, operator), operator.lr)
    growth.maps.to("cpu")
    return losses


def _batches(job: TrainingJob, operator: LearnedOperator) -> Iterator[tuple[Tensor, Tensor]]:
    first = job.steps.slots_before(job.settings.steps)
    for step in range(operator.steps):
        at = first + step * operator.sequences
        batch = job.feed.stream.batch(at, operator.sequences)
        tokens_BT = torch.from_numpy(batch.tokens_BT.astype(np.int64))
        labels_BT = torch.from_numpy(batch.labels_BT)
        yield tokens_BT.to(job.world.device), labels_BT.to(job.world.device)


def _tell(job: TrainingJob, number: int, losses: list[float]) -> None:
    assert job.growing is not None
    step = job.growing.starts[number]
    job.metrics.log(
        "event",
        step,
        event="learned_growth",
        operator=job.growing.stages[number].operator,
        steps=len(losses),
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def read_teacher(job: TrainingJob) -> None:
    """Read the frozen model that the one at hand follows, of the checkpoint at the end of its
    stage, which stays for good and whose checksums are verified (a collective where there is one).

    Raises:
        UserError: on every rank: that checkpoint is missing or damaged.
    """
    growing = job.growing
    if growing is None or growing.taught_by(job.held) is None:
        return
    teacher = growing.teacher_of(growing.number_of(job.held))
    assert teacher is not None
    job.checkpoints.load(growing.stop_of(teacher), job.engine.teacher_source())


def blended_states(
    job: TrainingJob, number: int, engine: Engine, states: Iterable[tuple[str, WeightState]]
) -> Iterable[tuple[str, WeightState]]:
    """Return the states of a new model, blended with an earlier one of the same sizes where its
    stage says so (a collective).

    The earlier one is read from the checkpoint at the end of its stage, whose checksums were
    verified, through the new model's engine. Each rank holds its weights, fp32 on the CPU.
    """
    assert job.growing is not None
    other, share = job.growing.blended_with(number), job.growing.stages[number].blend
    if other is None or share is None:
        return states
    tensors = engine.tensors()
    job.checkpoints.load(job.growing.stop_of(other), tensors)
    engine.restore(tensors)
    weights = {name: state["weight"] for name, state in engine.export_state() if "weight" in state}
    earlier = dict(states_of(weights))
    return blended(earlier.__getitem__, digests(earlier.items()), states, share)
