"""The engines of a run whose model grows, and how the model of a checkpoint lies on these ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from motet.launcher.runs.stage_layouts import RunLayouts
from motet.models.config import ModelConfig
from motet.models.family.base import Member
from motet.models.family.progressive import ProgressiveFamily
from motet.parallel.engines.protocol import Engine, EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World


class OtherRanks(Exception):
    """The model of this step is trained on by ranks of another number, or in other places."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def layout_at(
    layouts: RunLayouts, growing: ProgressiveFamily | None, step: int, held: Member | None
) -> Layout:
    """Return how the model of a checkpoint lies: as in the stage of `step`, or, where it is to grow
    first, so that it can.

    Raises:
        OtherRanks: these ranks do not train that stage.
    """
    if growing is None:
        return layouts.of(0)
    number = growing.number_at(step)
    if not layouts.runs_here(number):
        raise OtherRanks(step)
    if growing.member_at(step) == held:
        return layouts.of(number)
    return layouts.holding(number - 1, number)


@dataclass
class StageEngines:
    """Makes the engine of the model that trains: the whole one, or a member that is a model of its
    own; the one that was made last is kept until another is asked for.

    Attributes:
        taught_by: the sizes of the frozen model that one of them follows; None: of none.
        update_rule: what slices of a model ask of its updates, where a family grows
            (`Family.update_rule`).
    """

    whole: ModelConfig
    options: EngineOptions
    world: World
    taught_by: Callable[[Member | None], ModelConfig | None] = lambda member: None
    update_rule: Callable[[Member | None], tuple[bool, bool]] | None = None
    made: tuple[Member | None, Layout, Engine] | None = None

    def of(self, member: Member | None, layout: Layout) -> Engine:
        """Return the engine of a model."""
        if self.made is None or self.made[:2] != (member, layout):
            self.made = None  # its memory is needed
            self.made = (member, layout, self.another(member, layout))
        return self.made[2]

    def another(self, member: Member | None, layout: Layout) -> Engine:
        """Make an engine beside the one that there is."""
        self.made = None
        config = self.whole if member is None else member.config
        options = replace(self.options, taught_by=self.taught_by(member))
        if self.update_rule is not None:
            mask_update, by_users = self.update_rule(member)
            options = replace(options, mask_update=mask_update, by_users=by_users)
        return build_engine(config, options, layout, self.world)
