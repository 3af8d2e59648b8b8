"""What the parts of a search share: how layouts are costed, and what was found. Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.predictor import Predictor
from motet.parallel.cost.terms import Prediction
from motet.parallel.cost.topology import StageGroups
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.bounds import WorkBound, work_bound
from motet.parallel.planner.linear import Lines, skeleton
from motet.parallel.planner.partition import dense_first
from motet.parallel.planner.placement import placement, places_of, renumbered, trimmed
from motet.parallel.planner.question import PlanQuestion, RankedLayout, kind_of
from motet.parallel.planner.record import SearchRecord
from motet.parallel.planner.space import GroupAssignment, InnerDegrees, ScheduleChoice

ONE = ScheduleChoice("1f1b", 1)


class Context:
    """One search's question, predictors and record.

    Attributes:
        predictor, lines: of all machines.
        kinds: of every layer, 0 dense or 1 with experts.
        dense_first: dense layers, where all come first and they are few; else 0.
    """

    def __init__(self, question: PlanQuestion) -> None:
        self.question, self.record = question, SearchRecord(question)
        self.predictor = self._predictor_of(question.cluster)
        self.lines = Lines(self.predictor)
        model = question.model
        self.kinds = [int(model.has_experts(layer)) for layer in range(model.n_layers)]
        self.dense_first = dense_first(self.kinds)
        self._trimmed: dict[tuple[int, ...], tuple[Cluster, Predictor] | None] = {}
        self._works: dict[tuple[InnerDegrees, str], WorkBound] = {}
        self._stages: dict[StageGroups, int] = {}

    def _predictor_of(self, cluster: Cluster) -> Predictor:
        q = self.question
        return Predictor(q.model, cluster, q.training, q.traits, q.constants)

    def machines(self, used: Sequence[int]) -> tuple[Cluster, Predictor] | None:
        """Return the nodes that hold this many devices of every group, and their predictor; None
        where nodes would be used unevenly.
        """
        key = tuple(used)
        if key not in self._trimmed:
            cluster = trimmed(self.question.cluster, key)
            self._trimmed[key] = None if cluster is None else (cluster, self._predictor_of(cluster))
        return self._trimmed[key]

    def work_bound(self, core: InnerDegrees, recompute: str) -> WorkBound:
        """Return what bounds a step from the work alone."""
        key = core, recompute
        if key not in self._works:
            self._works[key] = work_bound(self.lines, core, recompute)
        return self._works[key]

    def number_of(self, stage: StageGroups) -> int:
        """Return a number that stands for a stage: cheaper to compare than its links."""
        return self._stages.setdefault(stage, len(self._stages))

    def kind_of(self, core: InnerDegrees, stages: tuple[int, ...]) -> tuple[object, ...]:
        """Return the kind of layouts whose stages stand in groups."""
        blocks = tuple((g, count) for g, count in enumerate(stages) if count)
        names = tuple(self.question.cluster.groups[g].name for g, _ in blocks)
        layout = skeleton(core, (1, 1), sum(stages), "none", ONE)
        return (*kind_of(layout, GroupAssignment("pipeline", blocks), names), None, "none")

    def judge(
        self, layout: Layout, spread: GroupAssignment, used: Sequence[int] | None = None
    ) -> Prediction:
        """Predict a layout, and keep it if it fits and is good; `used`: devices of every group."""
        if used is None:
            used = [0] * len(self.question.cluster.groups)
            for g, count in spread.blocks:
                used[g] = count * layout.stage_ranks
        machines = self.machines(used)
        assert machines is not None, "checked before"
        # A layout is predicted on the nodes that it uses: what stands idle is not paid for, and
        # links are those of its groups.
        cluster, predictor = machines
        spread = renumbered(spread)
        self.record.counts["predicted"] += 1
        prediction = predictor.predict(layout, places_of(cluster, layout, spread))
        choice = RankedLayout(layout, cluster, spread, prediction)
        if prediction.fits and prediction.step_time_s < self.record.ranked_below(choice.kind):
            # Only what is kept gets its list of devices, which is long on thousands of them.
            placed = replace(layout, placement=placement(cluster, layout, spread))
            self.record.add(replace(choice, layout=placed))
        return prediction
