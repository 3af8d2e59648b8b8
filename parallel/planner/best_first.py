"""The search for the fastest layouts: exhaustive over `space`, with bounds that leave out what
cannot win. Pure; no torch.

Degrees are taken in the order of a lower bound of their time (`bounds`). What is left is placed on
the groups of the cluster in every order, its layers are divided exactly (`partition`), and what
fits is predicted by the cost model itself. docs/planner_internals.md tells why the first row is
proven.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from motet.parallel.planner import replicas, zero
from motet.parallel.planner.context import ONE, Context
from motet.parallel.planner.frontier import Frontier
from motet.parallel.planner.linear import skeleton
from motet.parallel.planner.open_degrees import DIVED, OpenDegrees, SearchNode
from motet.parallel.planner.pipelines import PipelineSearch
from motet.parallel.planner.question import PlanAnswer, PlanQuestion
from motet.parallel.planner.space import GroupAssignment, InnerDegrees, divisors

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
    context = Context(question)
    with _no_collection():
        if "deepspeed" in question.engines and question.allows(engine="deepspeed"):
            zero.search(context)
        if "native" in question.engines and question.allows(engine="native"):
            pipelines = PipelinesSearch(context)
            for context.record.proving in (True, False):
                pipelines.search()
                replicas.search(context)
    return context.record.answer


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


class PipelinesSearch:
    """Searches layouts whose stages stand inside one group each."""

    def __init__(self, context: Context) -> None:
        self.context, self.record = context, context.record
        self.frontier = Frontier(context)
        self._seen: list[tuple[float, InnerDegrees, int]] = []  # bounds from the proof

    def search(self) -> None:
        """Search all degrees, once for the proof and once for the rest of the table."""
        pairs = self._open_degrees()
        self._take(pairs)
        # Kept for the rest of the table: degrees whose bounds were looked at are those that came
        # near.
        if self.record.proving:
            self._seen = [(one.known_s, one.core, one.dp_ranks) for one in pairs if one.sharpness]

    def _open_degrees(self) -> list[OpenDegrees]:
        """Return degrees of a stage with the coarsest of bounds, which asks for no assignment."""
        question = self.context.question
        sizes = [group.devices for group in question.cluster.groups]
        least = question.recomputes()[0]
        rooms_of: dict[int, np.ndarray] = {}
        pairs: list[OpenDegrees] = []
        for core in question.inner_degrees():
            done = self.context.work_bound(core, least)
            rates = 1 / done.whole
            for dp_ranks in divisors(question.rank_unit // core.micro_sequences):
                ranks = dp_ranks * core.cp * core.tp
                if ranks not in rooms_of:
                    rooms = [min(size // ranks, question.most_stages) for size in sizes]
                    rooms_of[ranks] = np.array(rooms)
                # n micro-batches through all ranks that could be used at once: no assignment of
                # stages has more, so none is faster.
                rate = float(rooms_of[ranks] @ rates)
                if rate:
                    bound_s = question.micro_batches(core, dp_ranks) * done.share / rate
                    pairs.append(OpenDegrees(self.frontier, core, dp_ranks, bound_s))
        return pairs

    def _take(self, pairs: Sequence[OpenDegrees]) -> None:
        """Expand the nodes of pairs, lowest bound first; a bound is made sharper when its turn
        comes.
        """
        record, counts, tried = self.record, self.record.counts, 0
        looked: list[OpenDegrees] = []
        dived: set[tuple[int, ...]] = set()
        looks = 0
        heap = [(pair.bound_s, number) for number, pair in enumerate(pairs)]
        heapq.heapify(heap)
        while heap:
            bound_s, number = heapq.heappop(heap)
            pair = pairs[number]
            if bound_s >= record.limit_s:
                # The heap's least bound is above what is known: so are all others.
                counts["slower"] += 1 + len(heap)
                return
            if record.late() if record.proving else record.enough(tried):
                counts["not tried"] += 1 + len(heap)
                record.left_from(bound_s)
                if not record.late():
                    self._sample()
                return
            # A node is expanded when its own bound is the least of all that is open: had it been
            # expanded earlier, a better layout might have closed it.
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
            if pair.bound_s < record.limit_s:
                heapq.heappush(heap, (pair.bound_s, number))

    def _dive(self, looked: list[OpenDegrees], dived: set[tuple[int, ...]]) -> None:
        """Expand what looks best of all that was looked at, once of each pair and of every set of
        degrees before any again.
        """
        # Unlike degrees teach more than the neighbours of what was just tried.
        best = min(looked, key=lambda pair: (_degrees_of(pair.core) in dived, pair.bound_s))
        looked.remove(best)
        dived.add(_degrees_of(best.core))
        for node in best.promising():
            self._expand(node)

    def _sample(self) -> None:
        """Expand what looked best of degrees that are not ranked yet, the most promising first."""
        tries: dict[tuple[int, ...], float] = {_degrees(kind): SAMPLES for kind in self.record.best}
        spent = 0.0
        for bound_s, core, dp_ranks in sorted(self._seen):
            degrees = _degrees_of(core)
            if spent >= SAMPLED or bound_s >= self.record.limit_s or self.record.late():
                return
            if tries.get(degrees, 0.0) >= SAMPLES:
                continue
            # Anew, as the proof's limit was lower: what it closed may be worth a row of the table.
            pair = OpenDegrees(self.frontier, core, dp_ranks, bound_s)
            pair.sharpen()
            pair.sharpen()
            effort = min(1.0, len(pair.found) / FULL)
            tries[degrees] = tries.get(degrees, 0.0) + effort
            spent += effort
            for node in pair.promising() if len(pair.found) else ():
                self._expand(node)

    def _expand(self, node: SearchNode) -> None:
        """Try every schedule, recomputation and sharding of some degrees on their machines."""
        core, pp, question = node.core, sum(node.stages), self.context.question
        ranks = node.dp_ranks * core.cp * core.tp
        machines = self.context.machines([count * ranks for count in node.stages])
        open_ = question.splits(core, node.dp_ranks)
        if machines is None or not open_:
            self.record.counts["uneven"] += 1
            return
        spread = GroupAssignment("pipeline", tuple((g, node.stages[g]) for g in node.order))
        if pp == 1:
            self._single(node, open_, spread)
            return
        n = question.micro_batches(core, node.dp_ranks)
        PipelineSearch(self.context, node, spread, n).search(open_)

    def _single(
        self, node: SearchNode, open_: list[tuple[int, int]], spread: GroupAssignment
    ) -> None:
        """One stage: nothing to divide."""
        fits = False
        for split in open_:
            for recompute in node.bounds_s:
                layout = skeleton(node.core, split, 1, recompute, ONE)
                if self.context.judge(layout, spread).fits:
                    fits = True
                    break  # more recomputation takes longer
        self.record.counts["memory"] += int(not fits)


def _degrees_of(core: InnerDegrees) -> tuple[int, ...]:
    return core.tp, core.cp, core.ep, core.etp


def _degrees(kind: tuple[object, ...]) -> tuple[int, ...]:
    """Return (tp, cp, ep, etp) of a kind of layouts (`question.kind_of`)."""
    _, tp, _, cp, ep, etp, *_ = kind
    return tuple(degree for degree in (tp, cp, ep, etp) if isinstance(degree, int))
