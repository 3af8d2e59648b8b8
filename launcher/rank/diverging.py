"""How far the model of a stage lies from the one before it, measured as the stage ends.

As `motet family divergence` does it afterwards, of the same sequences and by the same function:
rank 0 holds both models whole, and the others wait.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from motet.core.errors import UserError
from motet.experiments.stream.held_out import HeldOutSequences
from motet.launcher.rank.job import TrainingJob
from motet.launcher.rank.stored_weights import stored_weights
from motet.launcher.runs.kept_models import sequences_read
from motet.launcher.runs.manifest import open_stream
from motet.launcher.runs.seals import read_manifest
from motet.launcher.runs.verify import EXPORTED_FROM, refuse_damage
from motet.models.counts import parameters_non_embedding as size_of
from motet.models.decoder import Decoder
from motet.models.family.base import WHOLE
from motet.models.member import name_of
from motet.parallel.runtime.mesh import tell_all


def divergence_due(job: TrainingJob, step: int) -> bool:
    """Return whether neighbours are to be measured after `step` updates: a stage ends, there are
    some, and the family asks for it.
    """
    growing = job.growing
    if growing is None or growing.divergence is None:
        return False
    if growing.number_at(step - 1) == 0 and not job.slices:
        return False
    return step in (*growing.ends(), job.settings.steps)


def measure(job: TrainingJob, step: int) -> None:
    """Measure the model that ends its stage against the one before, its slices by size, and those
    that joined from the stage before against what they were (a collective). What cannot be measured
    is told, and training goes on.
    """
    weights = job.engine.full_model()  # a collective; of rank 0 alone
    facts: dict[str, Any] = {}
    if job.world.rank == 0:
        try:
            facts = _measured(job, step, weights)
        except (UserError, torch.OutOfMemoryError) as error:
            why = f"the divergence of neighbours at step {step:,} was not measured: {error}"
            job.metrics.log("event", step, event="unmeasured", why=why)
            print(f"motet: {why}; training goes on", file=sys.stderr)
    tell_all(None, job.world)
    if facts:
        job.metrics.log("event", step, event="divergence", **facts)


def _measured(job: TrainingJob, step: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    from motet.launcher.rank.neighbours import MeasuredModel, pair_rows  # brings scipy

    growing = job.growing
    assert growing is not None
    assert growing.divergence is not None
    number = growing.number_at(step - 1)
    end = growing.starts[number]
    mine = growing.stages[number].config
    before = growing.stages[max(0, number - 1)].config

    def decoder_of(at: int) -> Decoder:
        config, state = mine, weights
        if at == end:
            refuse_damage(job.run, EXPORTED_FROM, at)
            config, state = before, stored_weights(job.run.checkpoint(at), before, "model")
        decoder = Decoder(config)
        decoder.load_state_dict(state, assign=True)
        return decoder

    own = MeasuredModel(name_of(job.held) or WHOLE, step, size_of(mine), None)
    slices = [MeasuredModel(one.name, step, size_of(one.config), one) for one in job.slices]
    chains = [[*slices, own]]
    if number:
        earlier = MeasuredModel(growing.stages[number - 1].label, end, size_of(before), None)
        chains.insert(0, [earlier, own])
    for one in growing.carried.get(number, ()):
        config = before if one.source is None else one.source.config
        was = MeasuredModel(one.source_name, end, size_of(config), one.source)
        now = MeasuredModel(one.member.name, step, size_of(one.member.config), one.member)
        chains.append([was, now])
    slots = sequences_read(job.settings, read_manifest(job.run).get("stages") or ())
    text = HeldOutSequences(open_stream(job.settings), growing.divergence, slots)
    device = job.world.device
    rows = [row for chain in chains for row in pair_rows(chain, decoder_of, text, device)]
    return {"unseen": text.unseen, "pairs": rows}
