"""What a search is asked and what it answers. Pure; no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from motet.models.config import ModelConfig
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import Cluster
from motet.parallel.cost.terms import NATIVE, Prediction, Training, Traits
from motet.parallel.layout.layout import RECOMPUTE, Layout
from motet.parallel.planner.space import (
    GroupAssignment,
    InnerDegrees,
    Limits,
    ScheduleChoice,
    inner_degrees,
    schedule_choices,
    splits,
)

FIXABLE = (
    "tp",
    "pp",
    "cp",
    "ep",
    "etp",
    "dp_replicate",
    "dp_shard",
    "micro_sequences",
    "virtual_stages",
    "schedule",
    "recompute",
    "sequence_parallel",
    "engine",
    "zero_stage",
    "offload",
)
"""What a question may fix."""


@dataclass(frozen=True)
class PlanQuestion:
    """What a search answers.

    Attributes:
        training: its `zero_stage` and `offload` are replaced by what an engine does.
        engines: "native", "deepspeed".
        fixed: degrees and switches that a layout must have, by names of `FIXABLE`.
        compiled: zero-bubble schedules, which take the backward pass apart, are out.
        top: how many kinds of layouts are ranked.
        worth: layouts that take longer than this many times the fastest are not.
        constants: by kind of device; None: what ships.
        units: the sequences that the micro-batches of all data-parallel ranks together divide, and
            those that a micro-batch divides: of a ramp's smaller steps, and of equal shares of a
            step that may not be cut (`runs.families.units_of`); None: a step's.
    """

    model: ModelConfig
    cluster: Cluster
    training: Training
    engines: tuple[str, ...] = ("native",)
    fixed: Mapping[str, object] = field(default_factory=dict)
    compiled: bool = False
    top: int = 8
    worth: float = 1.25
    limits: Limits = field(default_factory=Limits)
    traits: Traits = NATIVE
    constants: Mapping[str, Constants] | None = None
    units: tuple[int, int] | None = None

    def allows(self, **values: object) -> bool:
        """Return whether values contradict none that are fixed."""
        return all(self.fixed.get(name, value) == value for name, value in values.items())

    # --- what may be searched

    @property
    def most_stages(self) -> int:
        """The most pipeline ranks that the model can have."""
        if self.model.tied_embeddings:
            return 1
        return self.model.n_layers + 2  # the first and the last may hold no layer

    def inner_degrees(self) -> Iterator[InnerDegrees]:
        """Yield the divisions of a block that may be searched."""
        largest = max(group.devices for group in self.cluster.groups)
        node = max(group.devices_per_node for group in self.cluster.groups)
        length, sequences = self.training.sequence_length, self.micro_unit
        for core in inner_degrees(self.model, length, sequences, largest, node, self.limits):
            if self.allows(**core._asdict()):
                yield core

    @property
    def micro_unit(self) -> int:
        """The sequences that micro-batches divide."""
        return self.training.sequences if self.units is None else self.units[1]

    @property
    def rank_unit(self) -> int:
        """The sequences that the micro-batches of all data-parallel ranks divide."""
        return self.training.sequences if self.units is None else self.units[0]

    def micro_batches(self, core: InnerDegrees, dp_ranks: int) -> int:
        """Return the micro-batches of a step."""
        return self.training.sequences // (dp_ranks * core.micro_sequences)

    def splits(self, core: InnerDegrees, dp_ranks: int) -> list[tuple[int, int]]:
        """Return (dp_replicate, dp_shard) that may be searched, most sharding first."""
        return [
            split
            for split in splits(self.model, core, dp_ranks)
            if self.allows(dp_replicate=split[0], dp_shard=split[1])
        ]

    def schedules(self, pp: int, micro_batches: Sequence[int]) -> list[ScheduleChoice]:
        """Return the schedules that may be searched."""
        return [
            way
            for way in schedule_choices(pp, self.model.n_layers, micro_batches, self.limits)
            if self.allows(**way._asdict())
            and not (self.compiled and "zero_bubble" in way.schedule)
        ]

    def recomputes(self) -> list[str]:
        """Return what may be recomputed, least time first."""
        return [name for name in RECOMPUTE if self.allows(recompute=name)]


@dataclass(frozen=True)
class RankedLayout:
    """A layout that fits.

    Attributes:
        cluster: the nodes that it uses; processes are numbered along its groups.
        offload: "none" or "optimizer"; `zero_stage` and it are settings of DeepSpeed.
    """

    layout: Layout
    cluster: Cluster
    spread: GroupAssignment
    prediction: Prediction
    zero_stage: int | None = None
    offload: str = "none"

    @property
    def kind(self) -> tuple[object, ...]:
        """What makes it another row of the table."""
        names = tuple(group.name for group in self.cluster.groups)
        return (*kind_of(self.layout, self.spread, names), self.zero_stage, self.offload)


def kind_of(layout: Layout, spread: GroupAssignment, groups: tuple[str, ...]) -> tuple[object, ...]:
    """Return engine, degrees and machines: no schedule, no size of a micro-batch, and no number of
    stages where they differ by group.
    """
    # On several groups the number of stages follows from the machines that are used: rows that
    # differ in it alone would crowd the table.
    pp = layout.pp if len(groups) == 1 else min(layout.pp, 2)
    degrees = layout.tp, pp, layout.cp, layout.ep, layout.etp
    return (layout.engine, *degrees, spread.across, groups)


@dataclass
class PlanAnswer:
    """What a search found.

    Attributes:
        choices: the fastest layout of each kind that fits, fastest first.
        counts: candidates by what became of them: "predicted", "slower" (a lower bound of their
            time is above what is ranked), "memory" (a bound of their memory is above the devices'),
            "micro-batches" (the batch gives the schedules too few).
        bound_s: 0 where the first choice is proven: nothing in the space is faster; else nothing
            that was not tried takes less than this.
        ranked_all: whether that holds for every other row, too: it is the fastest of its kind, and
            no row is missing. Else these are the fastest of their kinds that were found.
        late: `Limits.seconds` were over before the first choice was proven.
    """

    choices: list[RankedLayout] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    bound_s: float = 0.0
    ranked_all: bool = True
    late: bool = False

    @property
    def best(self) -> RankedLayout:
        """The fastest."""
        return self.choices[0]

    @property
    def gap(self) -> float:
        """The share of its time by which something that was not tried may be faster than the first
        choice; 0: it is proven.
        """
        if not self.choices or not self.bound_s:
            return 0.0
        return max(0.0, 1.0 - self.bound_s / self.best.prediction.step_time_s)
