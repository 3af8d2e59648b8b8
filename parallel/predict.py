"""What a layout would do on a cluster: time of a step, memory, why, and how far to trust it. Pure; no torch.

`predict` answers once. A search asks a `Predictor` many times: it remembers what layouts share (`cost_rank.RankCosts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from motet.models.config import ModelConfig
from motet.parallel import cost_memory as memory
from motet.parallel.calibration import BEYOND_SPREAD, FITTED_SPREAD, SPREAD
from motet.parallel.cluster import Cluster
from motet.parallel.cost_block import PHASES
from motet.parallel.cost_parts import Held, Kept, Rank, exposed
from motet.parallel.cost_pipeline import Chain, chain, chain_s
from motet.parallel.cost_places import Column, Places
from motet.parallel.cost_rank import GIB, RankCosts
from motet.parallel.cost_terms import NATIVE, Constants, Prediction, Training, Traits
from motet.parallel.layout import Layout
from motet.parallel.layout_rules import step_unit

__all__ = ["Kept", "Predictor", "Rank", "predict"]

TIGHT = 0.93
"""Above this share of its memory, whether a layout fits is uncertain."""
_STEP_PHASES = (*PHASES, "pipeline_send", "bubble", "data_parallel", "optimizer", "probes", "data")
_SPREADS = tuple(SPREAD[name] for name in _STEP_PHASES)


def predict(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    training: Training,
    traits: Traits = NATIVE,
    constants: Mapping[str, Constants] | None = None,
) -> Prediction:
    """Return what a layout would do.

    Args:
        model, layout: sound, by `models.config.problems` and `layout_rules.problems`.
        cluster: its devices take the layout's processes in order.
        constants: by kind of device; None: what ships (`calibration.DEFAULTS`).

    Raises:
        ClusterError: fewer devices than ranks, or no rate for the data type.
    """
    return Predictor(model, cluster, training, traits, constants).predict(layout)


class Line(NamedTuple):
    """A pipeline for one micro-batch: seconds, of the slowest rank where nothing else is said."""

    where: Places
    chain: Chain
    busy: tuple[float, ...]  # of every rank
    phases: tuple[float, ...]  # forward and backward, in the order of `PHASES`
    send_s: float
    waits_s: float  # for weights and gradients, in every micro-batch
    sync_s: float  # once a step, the longest of all ranks
    update_s: float


class Predictor(RankCosts):
    """Predicts many layouts of one model, cluster and training."""

    def __init__(
        self,
        model: ModelConfig,
        cluster: Cluster,
        training: Training,
        traits: Traits = NATIVE,
        constants: Mapping[str, Constants] | None = None,
    ) -> None:
        super().__init__(model, cluster, training, traits, constants)
        self._lines: dict[tuple[object, ...], Line] = {}
        self._holders: dict[tuple[object, ...], tuple[Places, list[list[Held]]]] = {}
        self._counts: dict[tuple[object, ...], list[float]] = {}

    # --- a step

    def micro_batches(self, layout: Layout) -> float:
        """Return the micro-batches of a step on an average replica."""
        return (
            self.training.sequences
            / (step_unit(layout) * layout.dp_replicate)
            * (sum(layout.shares) if layout.shares else layout.dp_replicate)
        )

    def predict(self, layout: Layout, where: Places | None = None) -> Prediction:
        """Return what a layout would do; see `predict`. `where` spares the search for its groups where they are known."""
        where, kept = where or self.places(layout), self.kept(layout)
        number = self.micro_batches(layout)
        found = [self._column(layout, where, kept, column, number) for column in where.columns]
        time_s, parts, busy = found[0] if len(found) == 1 else max(found, key=lambda one: one[0])
        shares, totals, holders = self._memory(layout, where, kept, number)
        fill = max(shares)
        fullest = shares.index(fill)
        holder = holders[fullest]
        memory_parts = {name: value / GIB for name, value in holder.parts.items()}
        memory_parts["activations"] = (totals[fullest] - holder.fixed) / GIB
        used = self._used(where, layout)
        peak = price = 0.0
        for group, devices in used.items():
            peak += devices * self.peaks[group]
            price += devices * self.cluster.groups[group].device.price_per_hour
        tokens_per_s = self.tokens / time_s
        return Prediction(
            time_s,
            self._interval(parts, time_s, used),
            totals[fullest] / GIB,
            holder.capacity / GIB,
            fill <= 1.0,
            parts,
            memory_parts,
            tuple(busy),
            tuple([total / GIB for total in totals]),
            tokens_per_s,
            tokens_per_s * self.flops / peak,
            price / 3600 / tokens_per_s * 1e9,
            self._trust(layout, parts, time_s, fill, used),
        )

    def _used(self, where: Places, layout: Layout) -> dict[int, float]:
        """Return how many devices of each of the cluster's groups a layout uses."""
        if len(self.cluster.groups) == 1:
            return {0: layout.world_size}
        if layout.world_size == self.cluster.devices:
            return {i: group.devices for i, group in enumerate(self.cluster.groups)}
        found: dict[int, float] = {}
        for device in layout.placement or range(layout.world_size):
            group = self.cluster.spot(device)[0]
            found[group] = found.get(group, 0) + 1
        return found

    def _line(self, layout: Layout, where: Places, kept: tuple[Kept, ...], column: Column) -> Line:
        """Return the pipeline of replicas that stand alike: what does not depend on the schedule and the number of micro-batches."""
        key = (
            id(where),  # kept alive by the line; equal `kept` are one object
            id(kept),
            id(column),
            layout.micro_sequences,
            layout.recompute,
            layout.sequence_parallel,
            layout.vocabulary_parallel,
            layout.virtual_stages,
        )
        found = self._lines.get(key)
        if found is None:
            ranks = self._ranks_of(layout, where, kept, column)
            found = self._lines[key] = self._lined(ranks, where)
        return found

    def _ranks_of(
        self, layout: Layout, where: Places, kept: tuple[Kept, ...], column: Column
    ) -> list[Rank]:
        """Return every pipeline rank on the slowest of its devices."""
        ranks: list[Rank] = []
        before: tuple[object, ...] = ()
        for stage, own, groups in zip(where.stages, kept, column.groups, strict=True):
            if (id(stage), id(own), groups) != before:
                before = (id(stage), id(own), groups)
                rank = self.rank(layout, stage, own, groups[0])
                for group in groups[1:]:
                    rank = max(rank, self.rank(layout, stage, own, group), key=_rank_s)
            ranks.append(rank)
        return ranks

    def _lined(self, ranks: list[Rank], where: Places) -> Line:
        forward = [rank.ahead_s for rank in ranks]
        backward = [rank.behind_s for rank in ranks]
        busy = [f + b for f, b in zip(forward, backward, strict=True)]
        slowest = ranks[busy.index(max(busy))]
        # Reductions hide behind the last backward pass, gathers behind the first forward pass.
        window = slowest.backward_s + slowest.forward_s
        overlap = self.traits.data_overlap
        return Line(
            where,
            chain(forward, backward, [rank.weight_s for rank in ranks]),
            tuple(busy),
            tuple([a + b for a, b in zip(slowest.forward, slowest.backward, strict=True)]),
            slowest.send_s,
            max(0.0, max(busy) - window - slowest.send_s),
            max(exposed(rank.sync_s, window, overlap) for rank in ranks),
            max(rank.optimizer_s for rank in ranks),
        )

    def _column(
        self,
        layout: Layout,
        where: Places,
        kept: tuple[Kept, ...],
        column: Column,
        number: float,
    ) -> tuple[float, dict[str, float], list[float]]:
        """Return (seconds of a step, by phase, busy seconds of pipeline ranks) of replicas that stand alike."""
        number *= column.share
        line = self._line(layout, where, kept, column)
        pipe_s = chain_s(layout, number, line.chain)
        training = self.training
        probe_s = pipe_s * training.probe_tokens / (3.0 * self.tokens)
        parts = dict(zip(PHASES, [number * each for each in line.phases], strict=True))
        parts["pipeline_send"] = number * line.send_s
        parts["bubble"] = pipe_s - number * line.chain.slowest_s
        parts["data_parallel"] = number * line.waits_s + line.sync_s
        parts["optimizer"] = line.update_s
        parts["probes"] = probe_s
        parts["data"] = training.data_s
        time_s = pipe_s + line.sync_s + line.update_s + probe_s + training.data_s
        return time_s, parts, [number * each for each in line.busy]

    # --- memory

    def fill(self, layout: Layout) -> float:
        """Return the share of its memory that the fullest device needs."""
        found = self._memory(
            layout, self.places(layout), self.kept(layout), self.micro_batches(layout)
        )
        return max(found[0])

    def _memory(
        self, layout: Layout, where: Places, kept: tuple[Kept, ...], number: float
    ) -> tuple[list[float], list[float], list[Held]]:
        """Return (share of memory, bytes, what they are) of the fullest device of every pipeline rank."""
        shares: list[float] = []
        totals: list[float] = []
        holders: list[Held] = []
        found = self._holds_of(layout, where, kept, number > 1 or layout.pp > 1)
        for each, held in zip(found, self._held_counts(layout, math.ceil(number)), strict=True):
            one = each[0]
            total = one.fixed + one.once + one.per_micro_batch * held
            for other in each[1:]:
                more = other.fixed + other.once + other.per_micro_batch * held
                if more / other.capacity > total / one.capacity:
                    one, total = other, more
            shares.append(total / one.capacity)
            totals.append(total)
            holders.append(one)
        return shares, totals, holders

    def _holds_of(
        self, layout: Layout, where: Places, kept: tuple[Kept, ...], several: bool
    ) -> list[list[Held]]:
        """Return what devices of every cluster group hold, for every pipeline rank."""
        key = (
            id(where),
            id(kept),
            layout.micro_sequences,
            layout.recompute,
            layout.sequence_parallel,
            layout.vocabulary_parallel,
            several,
        )
        found = self._holders.get(key)
        if found is None:
            ranks: list[list[Held]] = []
            before: tuple[int, ...] = ()
            for stage, own in zip(where.stages, kept, strict=True):
                if (id(stage), id(own)) != before:
                    before = id(stage), id(own)
                    each = [self.held(layout, stage, own, several, g) for g in stage.groups]
                ranks.append(each)
            found = self._holders[key] = where, ranks
        return found[1]

    def _held_counts(self, layout: Layout, micro_batches: int) -> list[float]:
        """Return for how many micro-batches every pipeline rank keeps activations."""
        key = (layout.schedule, layout.pp, layout.virtual_stages, micro_batches)
        found = self._counts.get(key)
        if found is None:
            found = self._counts[key] = [
                memory.micro_batches_held(layout, rank, micro_batches) for rank in range(layout.pp)
            ]
        return found

    def forget_memory(self) -> None:
        """Forget bytes, after constants that only they depend on have changed."""
        super().forget_memory()
        self._holders.clear()

    # --- how far to trust it

    def _interval(
        self, parts: Mapping[str, float], time_s: float, used: Mapping[int, float]
    ) -> tuple[float, float]:
        """Phases err independently of each other; 1.64 standard deviations on both sides."""
        factor = 1.0
        if all(self.known[group] for group in used):
            factor = FITTED_SPREAD * (1.0 + BEYOND_SPREAD * self._beyond(used))
        variance = 0.0
        for share, value in zip(_SPREADS, parts.values(), strict=True):
            variance += (share * value) ** 2
        spread = math.exp(1.64 * (factor * math.sqrt(variance) / time_s + 0.02))
        return time_s / spread, time_s * spread

    def _beyond(self, used: Mapping[int, float]) -> float:
        """Return by how many doublings a layout has more devices than the runs that its constants were found on."""
        most = min([self.constants[group].most_devices for group in used])
        devices = sum(used.values())
        return math.log2(devices / most) if 0 < most < devices else 0.0

    def _trust(
        self,
        layout: Layout,
        parts: Mapping[str, float],
        time_s: float,
        fill: float,
        used: Mapping[int, float],
    ) -> tuple[str, ...]:
        found = []
        for group in used:
            if not self.known[group]:
                kind = self.cluster.groups[group].device.kind
                found.append(f"no run on {kind} calibrates its constants; data sheets stand in")
        if self._beyond(used):
            most = min(self.constants[group].most_devices for group in used)
            found.append(f"the constants come from runs on at most {most:,} devices")
        if TIGHT < fill < 2.0 - TIGHT:
            found.append(f"memory is {fill:.0%} of what the device has: it may or may not fit")
        network = parts["data_parallel"] + parts["pipeline_send"] + parts["experts"]
        if network > 0.2 * time_s and layout.world_size > 8:
            found.append(
                f"{network / time_s:.0%} of the step waits for transfers, which depend on the network's load; probe it"
            )
        if len(used) > 1:
            found.append("devices differ: the times of their links were not measured together")
        if self.training.dtype == "fp8":
            found.append("fp8: how much of a block runs in 8 bits differs between backends")
        return tuple(found)


def _rank_s(rank: Rank) -> float:
    return rank.ahead_s + rank.behind_s
