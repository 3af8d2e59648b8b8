"""One attempt of a run on one rank: what the loop drives, and what its hooks read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from motet.core.files import again_with_room
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.ledger import LedgerWriter, Record, Segment
from motet.launcher.config.sections import RunSettings
from motet.launcher.rank.checkpoint import Checkpoints
from motet.launcher.rank.choices import DrawCheck
from motet.launcher.rank.evaluating import MemberEvaluation
from motet.launcher.rank.feed import Feed, Share
from motet.launcher.rank.hooks import HookContext, Hooks
from motet.launcher.rank.probe_budget import ProbeBudget
from motet.launcher.rank.probing import ProbeSet
from motet.launcher.rank.progress import TrainingProgress
from motet.launcher.rank.stop import SpikeGuard, StopRequest
from motet.launcher.rank.validating import Validation
from motet.launcher.runs.blame import Heartbeat
from motet.launcher.runs.metrics import MetricsWriter, Tracker
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.stage_layouts import RunLayouts
from motet.launcher.runs.starting import Starting
from motet.models.counts import training_flops_per_token
from motet.models.family.base import Choice, Family, Member
from motet.models.family.costs import choice_flops
from motet.models.family.loss_trend import LossTrend
from motet.models.family.progressive import ProgressiveFamily
from motet.parallel.engines.protocol import Engine, StepResult
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World, agree_any

ORDER = "order"
"""The fact of a checkpoint: at which step channels of its model were put in order, and in which."""


@dataclass(frozen=True)
class StepDone:
    """The step that was trained last: what it consumed, gave and took.

    Attributes:
        draw: hash of who trained on what, the same on all ranks; "" where there is no family.
    """

    share: Share
    result: StepResult
    lr: float
    draw: str = ""


@dataclass
class TrainingJob:
    """One attempt of a run, on one rank: everything that the loop drives."""

    settings: RunSettings
    run: RunDir
    world: World
    layouts: RunLayouts
    layout: Layout
    engine: Engine
    steps: Steps
    feed: Feed
    probes: ProbeSet
    checkpoints: Checkpoints
    metrics: MetricsWriter
    mirror: Tracker | None
    progress: TrainingProgress
    stop: StopRequest
    heartbeat: Heartbeat
    starting: Starting
    guard: SpikeGuard
    segment: Segment
    ledger: LedgerWriter
    facts: dict[str, Any]
    peak_lr: float
    flops_per_token: float
    peak_flops: float | None
    memory_mib: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=dict)
    family: Family | None = None
    members: dict[str, Member] = field(default_factory=dict)
    draw_check: DrawCheck | None = None
    evaluation: MemberEvaluation | None = None
    validation: Validation | None = None
    engines: Callable[[Member | None, Layout], Engine] | None = None
    """Makes the engine of a member's own model under a layout, where a family grows."""
    held: Member | None = None
    """Whose model the engine has, where a family grows; None is the whole one."""
    trend: tuple[int, LossTrend] | None = None
    """Number and losses of the stage that trains, where its loss may end it."""
    measured: list[dict[str, Any]] = field(default_factory=list)
    """Step, segment and SHA-256 of each probe file that the weights were measured by (rank 0)."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """The segments of the ledger that lead to the one that trains, itself last (rank 0)."""
    budget: ProbeBudget | None = None
    """What probes may cost; None where they may cost whatever they do."""
    reached: int = 0
    """Updates that are done."""
    told_skipped: str = ""
    """What was said of the newest checkpoint that was skipped."""
    last: StepDone | None = None
    hooks: Hooks = field(init=False)

    def __post_init__(self) -> None:
        self.hooks = Hooks(self.world)
        self.metrics.make_room = self.checkpoints.gives_room

    @property
    def growing(self) -> ProgressiveFamily | None:
        """The family, where its members are models of their own that train one after the other."""
        return self.family if isinstance(self.family, ProgressiveFamily) else None

    def stage_at(self, step: int) -> int:
        """Return the number of the stage of a step; 0 where nothing grows."""
        return 0 if self.growing is None else self.growing.number_at(step)

    def lie(self, layout: Layout) -> None:
        """Go on under another layout of the same ranks: what is read is the same, and who reads
        which of it another.
        """
        if layout != self.layout:
            self.layout, self.feed = layout, self.feed.under(layout, self.world.rank)

    @property
    def scored(self) -> tuple[Member | None, ...]:
        """Whom the engine can score now: its model, and the slices of it that are members."""
        return (self.held, *self.slices)

    @property
    def slices(self) -> tuple[Member, ...]:
        """The members that are slices of the model that the engine has."""
        if self.growing is None:
            return tuple(self.members.values())
        return tuple(self.growing.slices(self.held))

    def inside(self, member: Member | None) -> Member | None:
        """Return a member as the engine knows it: one that grew is the engine's whole model."""
        return member if member in self.slices else None

    @property
    def done(self) -> StepDone:
        """The step that was trained last."""
        assert self.last is not None
        return self.last

    def flops_of(self, draws: Sequence[Choice] | None) -> float:
        """Return the floating-point operations per token of a step: of who trained on it."""
        if draws is None:
            return self.flops_per_token + self._teacher_flops()
        assert self.family is not None
        whole, length = self.family.whole, self.settings.data.sequence_length
        own = sum(choice_flops(choice, whole, length) for choice in draws) / len(draws)
        return own + self._teacher_flops()

    def _teacher_flops(self) -> float:
        """Return those of the frozen model that the one at hand follows."""
        growing = self.growing
        if growing is None or (teacher := growing.taught_by(self.held)) is None:
            return 0.0
        return training_flops_per_token(teacher, self.settings.data.sequence_length) / 3

    def at(self, moment: str, step: int, **facts: Any) -> None:
        """Call the hooks of a moment; `step` updates are done.

        Raises:
            UserError: on every rank, when a user's hook failed on one.
        """

        def log(numbers: Mapping[str, Any]) -> None:
            self.metrics.log("hook", step, **{self.hooks.current: dict(numbers)})

        context = HookContext(
            step=step,
            settings=self.settings,
            rank=self.world.rank,
            world_size=self.world.size,
            facts=facts,
            _log=log,
            _weights=self.engine.full_model,
            _stop=self.stop.ask,
        )
        self.hooks.call(moment, context)

    def asked_to_stop(self) -> bool:
        """Return whether a user's hook asked for a stop (a collective where there are any)."""
        return bool(self.hooks.users) and agree_any(self.stop.requested(), self.world)

    def note(self, records: Sequence[Record], applied: bool) -> None:
        """Write what a data-parallel rank consumed to the ledger, once."""
        if self.layout.is_dp_leader(self.world.rank):
            for record in records:
                mine = replace(record, applied=applied)
                again_with_room(partial(self.ledger.append, mine), self.checkpoints.gives_room)
