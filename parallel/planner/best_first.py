"""The search for the fastest layouts: exhaustive over `plan_space`, with bounds that leave out what
cannot win. Pure; no torch.

Degrees are taken in the order of a lower bound of their time (`plan_bounds`). What is left is
placed on the groups of the cluster in every order, its layers are divided exactly
(`plan_partition`), and what fits is predicted by the cost model itself.
"""

from __future__ import annotations

import gc
import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.terms import Prediction
from motet.parallel.cost.topology import StageGroups
from motet.parallel.layout.layout import RECOMPUTE, Layout
from motet.parallel.planner.bounds import WorkBound, work_bound
from motet.parallel.planner.dense_first import dense_first
from motet.parallel.planner.frontier import DIVED, Frontier, OpenDegrees, SearchNode
from motet.parallel.planner.linear import Lines, skeleton
from motet.parallel.planner.pipelines import PipelineSearch
from motet.parallel.planner.placement import placement, places_of, renumbered, trimmed
from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout, kind_of
from motet.parallel.planner.space import (
    GroupAssignment,
    InnerDegrees,
    ScheduleChoice,
    divisors,
    inner_degrees,
    schedule_choices,
    splits,
)

ONE = ScheduleChoice("1f1b", 1)
DIVES, LOOKS = 24, 20
"""Of so many sets of degrees what looks best is tried before all is looked at, one for each of so
many looks: to know early what the rest must beat.
"""


def plan(question: PlanQuestion) -> PlanAnswer:
    """Return the fastest layouts that fit, one of each kind.

    First the first choice is proven: nothing in the space is faster. Then what else is ranked is
    searched, as far as `Limits` go.

    Raises:
        ClusterError: the devices have no rate for the data type.
    """
    from motet.parallel.planner import replicas as plan_replicas
    from motet.parallel.planner import zero as plan_flat

    search = Search(question)
    with _no_collection():
        if "deepspeed" in question.engines and question.allows(engine="deepspeed"):
            plan_flat.search(search)
        if "native" in question.engines and question.allows(engine="native"):
            for search.proving in (True, False):
                search.pipelines()
                plan_replicas.search(search)
    return search.answer


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python not look for cycles meanwhile: a search remembers much and makes none, and looking
    takes a sixth of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


SAMPLES, SAMPLED, FULL = 2, 32, 8
"""Where the rest is not tried, so many sets of machines and micro-batches of the same degrees are,
and so many of all; one that leaves fewer assignments of stages than the last number counts in
proportion.
"""


class Search:
    """One search; `answer` grows while it runs."""

    def __init__(self, question: PlanQuestion) -> None:
        self.question, self.answer = question, PlanAnswer()
        self.cluster, self.model = question.cluster, question.model
        self.predictor = self.predictor_of(self.cluster)
        self.lines = Lines(self.predictor)
        self.routed = [int(self.model.has_experts(i)) for i in range(self.model.n_layers)]
        self.dense_first = dense_first(self.routed)
        self._trimmed: dict[tuple[int, ...], tuple[Cluster, Predictor] | None] = {}
        self._works: dict[tuple[InnerDegrees, str], WorkBound] = {}
        self._best: dict[tuple[object, ...], RankedLayout] = {}
        self._stages: dict[StageGroups, int] = {}
        self._limit_s = math.inf
        self._fastest_s = math.inf
        self._seen: list[
            tuple[float, InnerDegrees, int]
        ] = []  # bounds while the first choice was proven
        self.proving = False
        self.nodes = Frontier(self)

    # --- what is shared

    def predictor_of(self, cluster: Cluster) -> Predictor:
        """Return a predictor of the question's model on some machines."""
        q = self.question
        return Predictor(q.model, cluster, q.training, q.traits, q.constants)

    def machines(self, used: Sequence[int]) -> tuple[Cluster, Predictor] | None:
        """Return the nodes that hold this many devices of every group, and their predictor."""
        key = tuple(used)
        if key not in self._trimmed:
            cluster = trimmed(self.cluster, key)
            self._trimmed[key] = None if cluster is None else (cluster, self.predictor_of(cluster))
        return self._trimmed[key]

    def work_of(self, core: InnerDegrees, recompute: str) -> WorkBound:
        """Return the work of a core."""
        key = core, recompute
        if key not in self._works:
            self._works[key] = work_bound(self.lines, core, recompute)
        return self._works[key]

    def number_of(self, stage: StageGroups) -> int:
        """Return a number that stands for a stage: cheaper to compare than its links."""
        return self._stages.setdefault(stage, len(self._stages))

    @property
    def limit_s(self) -> float:
        """What takes longer is of no use: while the first choice is being proven, what does not
        beat it; then, what is not ranked.
        """
        return self._fastest_s if self.proving else self._limit_s

    def limit_of(self, kind: tuple[object, ...]) -> float:
        """Return the seconds that a layout of a kind must stay below to be of use."""
        return self._fastest_s if self.proving else self._ranked_below(kind)

    def _ranked_below(self, kind: tuple[object, ...]) -> float:
        known = self._best.get(kind)
        return self._limit_s if known is None else min(self._limit_s, known.prediction.step_time_s)

    def record(self, choice: RankedLayout) -> None:
        """Keep a layout that fits, if it is among the best."""
        if choice.prediction.step_time_s >= self._ranked_below(choice.kind):
            return
        self._best[choice.kind] = choice
        ranked = sorted(self._best.values(), key=_order)[: self.question.top]
        self._fastest_s = ranked[0].prediction.step_time_s
        self._limit_s = self._fastest_s * self.question.worth
        if len(ranked) == self.question.top:
            self._limit_s = min(self._limit_s, ranked[-1].prediction.step_time_s)
        ranked = [one for one in ranked if one.prediction.step_time_s <= self._limit_s]
        self.answer.choices, self._best = ranked, {one.kind: one for one in ranked}

    def cores(self) -> Iterator[InnerDegrees]:
        """Yield the cores that the question allows."""
        q = self.question
        largest = max(group.devices for group in self.cluster.groups)
        node = max(group.devices_per_node for group in self.cluster.groups)
        found = inner_degrees(
            self.model, q.training.sequence_length, q.training.sequences, largest, node, q.limits
        )
        for core in found:
            if q.allows(**core._asdict()):
                yield core

    # --- stages cross between groups

    def pipelines(self) -> None:
        """Search layouts whose stages stand inside one group each."""
        sizes = [group.devices for group in self.cluster.groups]
        sequences, most = self.question.training.sequences, self.most_stages()
        rooms_of: dict[int, np.ndarray] = {}
        pairs: list[OpenDegrees] = []
        for core in self.cores():
            done = self.work_of(core, self.recomputes()[0])
            rates = 1 / done.whole
            for readers in divisors(sequences // core.micro_sequences):
                ranks = readers * core.cp * core.tp
                if ranks not in rooms_of:
                    rooms_of[ranks] = np.array([min(size // ranks, most) for size in sizes])
                rate = float(rooms_of[ranks] @ rates)
                if rate:
                    n = sequences // (readers * core.micro_sequences)
                    pairs.append(OpenDegrees(self.nodes, core, readers, n * done.share / rate))
        self._take(pairs)
        if self.proving:
            self._seen = [(one.known_s, one.core, one.readers) for one in pairs if one.sharpness]

    def _take(self, pairs: Sequence[OpenDegrees]) -> None:
        """Expand the nodes of pairs, lowest bound first; a bound is made sharper when its turn
        comes.
        """
        counts, tried = self.answer.counts, 0
        looked: list[OpenDegrees] = []
        dived: set[tuple[int, ...]] = set()
        looks = 0
        heap = [(pair.bound_s, number) for number, pair in enumerate(pairs)]
        heapq.heapify(heap)
        while heap:
            bound_s, number = heapq.heappop(heap)
            pair = pairs[number]
            if bound_s >= self.limit_s:
                counts["slower"] += 1 + len(heap)
                return
            if not self.proving and self.spent(tried):
                counts["not tried"] += 1 + len(heap)
                self.left_from(bound_s)
                self._sample()
                return
            if pair.following:
                tried += 1
                counts["tried"] += 1
                self._expand(pair.following[0])
            pair.sharpen()
            if pair.sharpness == 2 and len(pair.found) > DIVED:
                looked.append(pair)
                looks += 1
                if looks % LOOKS == 0 and looks <= DIVES * LOOKS:
                    self._dive(looked, dived)
            if pair.bound_s < self.limit_s:
                heapq.heappush(heap, (pair.bound_s, number))

    def _dive(self, looked: list[OpenDegrees], dived: set[tuple[int, ...]]) -> None:
        """Expand what looks best of all that was looked at, once of each pair and of every set of
        degrees before any again.
        """
        best = min(looked, key=lambda pair: (_degrees_of(pair.core) in dived, pair.bound_s))
        looked.remove(best)
        dived.add(_degrees_of(best.core))
        for node in best.promising():
            self._expand(node)

    def _sample(self) -> None:
        """Expand what looked best of degrees that are not ranked yet, the most promising first."""
        tries: dict[tuple[int, ...], float] = {_degrees(kind): SAMPLES for kind in self._best}
        spent = 0.0
        for bound_s, core, readers in sorted(self._seen):
            degrees = _degrees_of(core)
            if spent >= SAMPLED or bound_s >= self.limit_s:
                return
            if tries.get(degrees, 0.0) >= SAMPLES:
                continue
            pair = OpenDegrees(self.nodes, core, readers, bound_s)
            pair.sharpen()
            pair.sharpen()
            work_bound = min(1.0, len(pair.found) / FULL)
            tries[degrees] = tries.get(degrees, 0.0) + work_bound
            spent += work_bound
            for node in pair.promising() if len(pair.found) else ():
                self._expand(node)

    def bound_s(self, done: WorkBound, pp: np.ndarray, n: float, slowest: np.ndarray) -> np.ndarray:
        """Return lower bounds of a step under any schedule, from what the slowest rank needs at
        least.
        """
        virtual = self.question.limits.virtual_stages
        return done.any_way_s(pp, n, slowest, self.model.n_layers, virtual)

    def left_from(self, bound_s: float) -> None:
        """Tell that something is left out that takes at least as long as this."""
        if self.proving:
            self.answer.bound_s = min(self.answer.bound_s or bound_s, bound_s)
        else:
            self.answer.ranked_all = False

    def spent(self, tried: int) -> bool:
        """Return whether enough was done to rank what comes after the first choice."""
        limits = self.question.limits
        return tried >= limits.nodes or self.nodes.looked >= limits.looked

    def most_stages(self) -> int:
        """Return the most pipeline ranks that a model can have."""
        if self.model.tied_embeddings:
            return 1
        return self.model.n_layers + 2

    def kind_of(self, core: InnerDegrees, stages: tuple[int, ...]) -> tuple[object, ...]:
        """Return the kind of layouts whose stages stand in groups."""
        blocks = tuple((g, count) for g, count in enumerate(stages) if count)
        names = tuple(self.cluster.groups[g].name for g, _ in blocks)
        layout = skeleton(core, (1, 1), sum(stages), "none", ONE)
        return (*kind_of(layout, GroupAssignment("pipeline", blocks), names), None, "none")

    def splits_of(self, core: InnerDegrees, readers: int) -> list[tuple[int, int]]:
        """Return (dp_replicate, dp_shard) that the question allows, most sharding first."""
        return [
            split
            for split in splits(self.model, core, readers)
            if self.question.allows(dp_replicate=split[0], dp_shard=split[1])
        ]

    def _expand(self, node: SearchNode) -> None:
        """Try every placement, schedule, recomputation and sharding of some degrees and machines."""
        core, pp = node.core, sum(node.stages)
        ranks = node.readers * core.cp * core.tp
        machines = self.machines([count * ranks for count in node.stages])
        found = self.splits_of(core, node.readers)
        if machines is None or not found:
            self.answer.counts["uneven"] += 1
            return
        n = self.question.training.sequences // (node.readers * core.micro_sequences)
        spread = GroupAssignment("pipeline", tuple((g, node.stages[g]) for g in node.order))
        if pp == 1:
            self._single(node, found, spread)
            return
        PipelineSearch(self, node, spread, n).search(found, node.bounds_s)

    def ways(self, pp: int, micro_batches: Sequence[int]) -> list[ScheduleChoice]:
        """Return the schedules that the question allows."""
        q = self.question
        return [
            way
            for way in schedule_choices(pp, self.model.n_layers, micro_batches, q.limits)
            if q.allows(**way._asdict()) and not (q.compiled and "zero_bubble" in way.schedule)
        ]

    def recomputes(self) -> list[str]:
        """Return what may be recomputed, least time first."""
        return [name for name in RECOMPUTE if self.question.allows(recompute=name)]

    def _single(
        self, node: SearchNode, found: list[tuple[int, int]], spread: GroupAssignment
    ) -> None:
        """One stage: nothing to divide."""
        fits = False
        for split in found:
            for recompute in node.bounds_s:
                layout = skeleton(node.core, split, 1, recompute, ONE)
                if self.judge(layout, spread).fits:
                    fits = True
                    break
        self.answer.counts["memory"] += int(not fits)

    def judge(
        self, layout: Layout, spread: GroupAssignment, used: Sequence[int] | None = None
    ) -> Prediction:
        """Predict a layout, and keep it if it fits and is good."""
        if used is None:
            used = [0] * len(self.cluster.groups)
            for g, count in spread.blocks:
                used[g] = count * layout.stage_ranks
        machines = self.machines(used)
        assert machines is not None, "checked before"
        cluster, predictor = machines
        spread = renumbered(spread)
        where = places_of(cluster, layout, spread)
        self.answer.counts["predicted"] += 1
        prediction = predictor.predict(layout, where)
        choice = RankedLayout(layout, cluster, spread, prediction)
        if prediction.fits and prediction.step_time_s < self._ranked_below(choice.kind):
            placed = replace(layout, placement=placement(cluster, layout, spread))
            self.record(replace(choice, layout=placed))
        return prediction


def _degrees_of(core: InnerDegrees) -> tuple[int, ...]:
    return core.tp, core.cp, core.ep, core.etp


def _degrees(kind: tuple[object, ...]) -> tuple[int, ...]:
    """Return (tp, cp, ep, etp) of a kind of layouts (`plan_terms.kind_of`)."""
    _, tp, _, cp, ep, etp, *_ = kind
    return tuple(one for one in (tp, cp, ep, etp) if isinstance(one, int))


def _order(choice: RankedLayout) -> tuple[float, int]:
    return choice.prediction.step_time_s, choice.layout.world_size
