"""What a layout would do on a cluster: time of a step, memory, why, and how far to trust it.

Pure; no torch.

`predict` answers once. A search asks a `Predictor` many times: it remembers what layouts share
(`rank.RankCosts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import add, is_not
from typing import NamedTuple

from motet.models.config import ModelConfig
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost import memory
from motet.parallel.cost.block import PHASES
from motet.parallel.cost.pipeline import Chain, chain, chain_s, exposed, probe_s, step_s
from motet.parallel.cost.rank import CostKey, RankKey, RankTimes
from motet.parallel.cost.rank_memory import RankMemoryCosts
from motet.parallel.cost.shapes import StageShape
from motet.parallel.cost.terms import NATIVE, Prediction, Training, Traits
from motet.parallel.cost.topology import ReplicaKind, Topology
from motet.parallel.cost.trust import Trust
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.rules import step_unit

__all__ = ["Predictor", "predict"]


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
        model, layout: sound, by `models.config.problems` and `rules.problems`.
        cluster: its devices take the layout's processes in order.
        constants: by kind of device; None: what ships (`constants.DEFAULTS`).

    Raises:
        ClusterError: fewer devices than ranks, or no rate for the data type.
    """
    return Predictor(model, cluster, training, traits, constants).predict(layout)


MemoryRow = tuple[int, int, float, float, float]
"""Pipeline ranks from and to before, GiB however many micro-batches there are, GiB per micro-batch,
GiB of the device. A plain tuple: a search keeps many, and Python's garbage collector passes over
plain tuples of numbers.
"""


class PipelineTimes(NamedTuple):
    """A pipeline for one micro-batch: seconds, of the slowest rank where nothing else is said."""

    chain: Chain
    busy: tuple[float, ...]  # of every rank
    phases: tuple[float, ...]  # forward and backward, in the order of `PHASES`
    send_s: float
    waits_s: float  # for weights and gradients, in every micro-batch
    sync_s: float  # once a step, the longest of all ranks
    update_s: float


class RanksAlike(NamedTuple):
    """Neighbouring pipeline ranks, from `start` to before `stop`, that are alike."""

    start: int
    stop: int
    rank_keys: list[RankKey]  # one for each of the cluster's groups that their devices belong to


class Filled(NamedTuple):
    """Memory of a pipeline."""

    share: float  # of its memory that the fullest device needs
    gib: float  # that it holds
    rank_key: RankKey  # where it is
    ranks_gib: tuple[float, ...]  # of every pipeline rank's fullest device


class Predictor(RankMemoryCosts):
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
        self._lines: dict[tuple[object, ...], PipelineTimes] = {}
        self._holders: dict[tuple[object, ...], tuple[MemoryRow, ...]] = {}
        self._runs: dict[tuple[int, ...], tuple[tuple[object, ...], list[RanksAlike]]] = {}
        self._rank_keys_in: dict[tuple[int, int], list[RankKey]] = {}
        self.trust = Trust(cluster, training, self.constants, self.known)
        self.prices = [group.device.price_per_hour for group in cluster.groups]
        self._counts: dict[tuple[object, ...], list[float]] = {}

    # --- a step

    def micro_batches(self, layout: Layout) -> float:
        """Return the micro-batches of a step on an average replica."""
        return (
            self.training.sequences
            / (step_unit(layout) * layout.dp_replicate)
            * (sum(layout.shares) if layout.shares else layout.dp_replicate)
        )

    def predict(self, layout: Layout, where: Topology | None = None) -> Prediction:
        """Return what a layout would do; see `predict`.

        `where` spares the search for its groups where they are known.
        """
        where, shapes = where or self.topology(layout), self.shapes(layout)
        number = self.micro_batches(layout)
        cost_key = self.cost_key(layout, number > 1)
        found = [
            self._column(layout, cost_key, where, shapes, column, number)
            for column in where.columns
        ]
        # Replicas wait for each other at the end of a step: the slowest kind is the step.
        time_s, parts, busy = found[0] if len(found) == 1 else max(found, key=lambda one: one[0])
        filled = self._memory(layout, cost_key, where, shapes, number)
        holder = self.held_at(layout, cost_key, filled.rank_key)
        # Activations are told apart last, as only the fullest device's are shown.
        activations = filled.gib - holder.fixed_gib
        used = self._used(where, layout)
        peak = price = 0.0
        for group, devices in used.items():
            peak += devices * self.peaks[group]
            price += devices * self.prices[group]
        tokens_per_s = self.tokens / time_s
        beyond = self.trust.beyond(used)
        return Prediction(
            time_s,
            self.trust.interval(parts, time_s, used, beyond),
            filled.gib,
            holder.capacity_gib,
            filled.share <= 1.0,
            parts,
            {**holder.state, **holder.rest, "activations": activations},
            busy,
            filled.ranks_gib,
            tokens_per_s,
            tokens_per_s * self.flops / peak,
            price / 3600 / tokens_per_s * 1e9,
            self.trust.doubts(layout, parts, time_s, filled.share, used, beyond),
        )

    def _used(self, where: Topology, layout: Layout) -> dict[int, float]:
        """Return how many devices of each of the cluster's groups a layout uses."""
        # The usual cases without a loop over devices, which are thousands.
        if len(self.cluster.groups) == 1:
            return {0: layout.world_size}
        if layout.world_size == self.cluster.devices:
            return {i: group.devices for i, group in enumerate(self.cluster.groups)}
        found: dict[int, float] = {}
        for device in layout.placement or range(layout.world_size):
            group = self.cluster.spot(device)[0]
            found[group] = found.get(group, 0) + 1
        return found

    def _line(
        self,
        layout: Layout,
        cost_key: CostKey,
        where: Topology,
        shapes: tuple[StageShape, ...],
        column: ReplicaKind,
    ) -> PipelineTimes:
        """Return the pipeline of replicas that stand alike: what does not depend on the schedule
        and the number of micro-batches.
        """
        key = (
            id(where),  # kept alive by `_runs`; equal `shapes` are one object
            id(shapes),
            id(column),
            cost_key.blocks,
            layout.virtual_stages,
        )
        found = self._lines.get(key)
        if found is None:
            runs = self._runs_of(where, shapes, column)
            found = self._lines[key] = self._lined(layout, cost_key, runs)
        return found

    def _runs_of(
        self, where: Topology, shapes: tuple[StageShape, ...], column: ReplicaKind | None
    ) -> list[RanksAlike]:
        """Return pipeline ranks that are alike together: those of one column, or with the devices
        of all of them.
        """
        key = (id(where), id(shapes), id(column))
        known = self._runs.get(key)
        if known is not None:
            return known[1]
        groups = [stage.groups for stage in where.stages] if column is None else column.groups
        bounds: list[int] = []
        rows = list(zip(where.stages, shapes, groups, strict=True))
        for at, row in enumerate(rows):
            # By identity: equal shapes and stages are one object, and comparing their fields would
            # cost more than the rest of a prediction.
            if not at or row[2] != groups[at - 1] or any(map(is_not, row[:2], rows[at - 1][:2])):
                bounds.append(at)
        found = [
            RanksAlike(
                start, stop, [self.rank_key(*rows[start][:2], group) for group in groups[start]]
            )
            for start, stop in pairwise([*bounds, len(rows)])
        ]
        self._runs[key] = (where, shapes, column), found  # kept alive for their ids
        return found

    def _lined(
        self, layout: Layout, cost_key: CostKey, runs: Sequence[RanksAlike]
    ) -> PipelineTimes:
        """Return the pipeline with every rank on the slowest of its devices."""
        alike: list[tuple[int, float, float, float]] = []
        busy: tuple[float, ...] = ()
        slowest, slowest_s, update_s = None, -1.0, 0.0
        syncs: list[float] = []
        for run in runs:
            rank = self.rank_at(layout, cost_key, run.rank_keys[0])
            for rank_key in run.rank_keys[1:]:
                # A stage over several kinds of devices is as fast as its slowest.
                rank = max(rank, self.rank_at(layout, cost_key, rank_key), key=_rank_s)
            count, rank_s = run.stop - run.start, rank.ahead_s + rank.behind_s
            alike.append((count, rank.ahead_s, rank.behind_s, rank.weight_s))
            busy += (rank_s,) * count
            # Each rank's transfer is hidden behind the slowest rank's passes, and the longest
            # counts.
            syncs.append(rank.sync_s)
            update_s = max(update_s, rank.optimizer_s)
            if rank_s > slowest_s:
                slowest, slowest_s = rank, rank_s
        assert slowest is not None
        # Reductions hide behind the last backward pass, gathers behind the first forward pass:
        # behind what hides no others already.
        window = slowest.backward_s + slowest.forward_s
        waits_s = max(0.0, slowest_s - window - slowest.send_s)
        free_s = max(0.0, window - (sum(slowest.gather_s) - waits_s))
        overlap = self.traits.data_overlap
        return PipelineTimes(
            chain(alike),
            busy,
            tuple(map(add, slowest.forward, slowest.backward)),
            slowest.send_s,
            waits_s,
            max([exposed(sync_s, free_s, overlap) for sync_s in syncs]),
            update_s,
        )

    def _column(
        self,
        layout: Layout,
        cost_key: CostKey,
        where: Topology,
        shapes: tuple[StageShape, ...],
        column: ReplicaKind,
        number: float,
    ) -> tuple[float, dict[str, float], tuple[float, ...]]:
        """Return (seconds of a step, by phase, busy seconds of pipeline ranks) of replicas that
        stand alike.
        """
        number *= column.share
        line = self._line(layout, cost_key, where, shapes, column)
        pipe_s = chain_s(layout, number, line.chain)
        training = self.training
        parts = dict(zip(PHASES, [number * each for each in line.phases], strict=True))
        parts["pipeline_send"] = number * line.send_s
        # What the slowest rank is not busy for: waiting for others to fill and drain, whatever the
        # schedule.
        parts["bubble"] = pipe_s - number * line.chain.slowest_s
        parts["data_parallel"] = number * line.waits_s + line.sync_s
        parts["optimizer"] = line.update_s
        parts["probes"] = probe_s(pipe_s, training)
        parts["data"] = training.data_s
        time_s = step_s(pipe_s, line.sync_s, line.update_s, training)
        return time_s, parts, tuple([number * each for each in line.busy])

    # --- memory

    def fill(self, layout: Layout) -> float:
        """Return the share of its memory that the fullest device needs."""
        number = self.micro_batches(layout)
        cost_key = self.cost_key(layout, number > 1)
        return self._memory(
            layout, cost_key, self.topology(layout), self.shapes(layout), number
        ).share

    def _memory(
        self,
        layout: Layout,
        cost_key: CostKey,
        where: Topology,
        shapes: tuple[StageShape, ...],
        number: float,
    ) -> Filled:
        """Return what the fullest device of every pipeline rank holds."""
        # Ranks near the start keep more micro-batches, those at the end have the logits: the
        # fullest is found, not known.
        counts = self._held_counts(layout, math.ceil(number))
        totals: list[float] = []
        most: list[float] = []  # shares of the ranks of `totals`, as of the fullest of those alike
        best, fullest, gib = -1.0, 0, 0.0
        # Where stages stand on several kinds of devices, each kind has a row: the fullest counts by
        # share, not by bytes.
        for i, row in enumerate(self._holds_of(layout, cost_key, where, shapes)):
            start, stop, fixed, more, capacity = row
            mine = [fixed + more * count for count in counts[start:stop]]
            top = max(mine)
            share = top / capacity
            if start == len(totals):
                totals += mine
                most.append(share)
            elif share > most[-1]:  # another kind of device of the same ranks
                totals[start:], most[-1] = mine, share
            if share > best:
                best, fullest, gib = share, i, top
        return Filled(best, gib, self._rank_keys_of(where, shapes)[fullest], tuple(totals))

    def _rank_keys_of(self, where: Topology, shapes: tuple[StageShape, ...]) -> list[RankKey]:
        """Return where the rows of `_holds_of` come from."""
        key = (id(where), id(shapes))
        found = self._rank_keys_in.get(key)
        if found is None:
            runs = self._runs_of(where, shapes, None)
            found = self._rank_keys_in[key] = [
                rank_key for run in runs for rank_key in run.rank_keys
            ]
        return found

    def _holds_of(
        self, layout: Layout, cost_key: CostKey, where: Topology, shapes: tuple[StageShape, ...]
    ) -> tuple[MemoryRow, ...]:
        """Return what devices of every cluster group hold, for pipeline ranks that are alike."""
        key = (id(where), id(shapes), cost_key.blocks, cost_key.several)
        found = self._holders.get(key)
        if found is None:
            rows: list[MemoryRow] = []
            for run in self._runs_of(where, shapes, None):
                for rank_key in run.rank_keys:
                    one = self.held_at(layout, cost_key, rank_key)
                    fixed_gib = one.fixed_gib + one.once_gib
                    per, capacity = one.per_micro_batch_gib, one.capacity_gib
                    rows.append((run.start, run.stop, fixed_gib, per, capacity))
            found = self._holders[key] = tuple(rows)
        return found

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


def _rank_s(rank: RankTimes) -> float:
    return rank.ahead_s + rank.behind_s
