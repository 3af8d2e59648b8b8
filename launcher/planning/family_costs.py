"""What a family costs in a planned layout, by who its sampler draws, beside runs of each member
alone. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from motet.core import format
from motet.core.errors import UserError
from motet.launcher.config.sections import RunSettings
from motet.launcher.output import terminal
from motet.launcher.planning import stage_costs, stage_proposals
from motet.launcher.planning.family_facts import sampled_steps
from motet.launcher.runs.families import (
    draws_of,
    growing_refusals,
    made_members,
    new_family,
    sound_members,
)
from motet.models.config import ModelConfig
from motet.models.family.base import WHOLE, Family, Member
from motet.models.family.costs import mean_passes
from motet.models.family.nested import NestedFamily
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.samplers import SAMPLERS
from motet.parallel.cost.family import StepCost, StepPrices
from motet.parallel.engines.refusals import refusals
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.question import PlanAnswer, PlanQuestion, RankedLayout


class PlannedFamily:
    """The family of a run.yaml, as `motet plan` asks about it.

    Raises:
        UserError: the family cannot be.
    """

    def __init__(self, settings: RunSettings, whole: ModelConfig) -> None:
        self.settings, self.whole = settings, whole
        self._own: tuple[RankedLayout, list[RankedLayout]] | None = None
        self.family = new_family(settings, whole)
        self.members: list[Member] = list(made_members(self.family))
        if isinstance(self.family, ProgressiveFamily):
            sound_members(self.family, settings)

    def refusal(self, layout: Layout) -> str:
        """Say why a layout cannot train the family; "" where it can."""
        if isinstance(self.family, ProgressiveFamily):
            refused = self._growing([layout] * len(self.family.stages))
        else:
            refused = refusals(layout, self.whole, self.members, self.family.needs())
        if refused:
            return refused[0]
        try:
            draws_of(self.family, self.settings, layout)
        except UserError as error:
            return str(error).removeprefix("family.kind: ")
        return ""

    def _growing(self, layouts: Sequence[Layout]) -> list[str]:
        """Say why layouts of the stages cannot train a family that grows."""
        assert isinstance(self.family, ProgressiveFamily)
        length = self.settings.data.sequence_length
        facts, needs = self.family.stage_facts(), self.family.needs()
        return growing_refusals(layouts, self.whole, self.members, facts, length, needs)

    def _of_stages(
        self, family: ProgressiveFamily, question: PlanQuestion, choice: RankedLayout
    ) -> list[RankedLayout]:
        """Return the layout of every stage, where the run's is `choice`: a search for each stage,
        made once for a layout that is both told and written.
        """
        if self._own is None or self._own[0] is not choice:
            own = stage_proposals.proposed(family, question, choice, self._growing)
            self._own = choice, own
        return self._own[1]

    def note(self, question: PlanQuestion, choice: RankedLayout) -> str:
        """Return what is written below the run's layout of those of its stages."""
        if not isinstance(self.family, ProgressiveFamily):
            return ""
        own = self._of_stages(self.family, question, choice)
        return stage_proposals.text(self.family, own, choice)

    def trainable(self, answer: PlanAnswer) -> tuple[list[RankedLayout], list[str]]:
        """Return the ranked layouts that can train the family, and why others cannot."""
        told = [(choice, self.refusal(choice.layout)) for choice in answer.choices]
        return [c for c, why in told if not why], [why for _, why in told if why]

    def prices(self, question: PlanQuestion, choice: RankedLayout) -> dict[str, Any]:
        """Return what every sampler, or stage, costs in a layout, and what runs of each member
        alone do.
        """
        if isinstance(self.family, ProgressiveFamily):
            own = self._of_stages(self.family, question, choice)
            return stage_costs.stage_prices(self.family, self.settings, question, choice, own)
        models = {member.name: member.config for member in self.members} | {WHOLE: self.whole}
        asked = (choice.cluster, choice.layout, question.training, question.traits)
        found = StepPrices(self.whole, models, *asked, question.constants)
        alone = {name: once.step_time_s for name, (once, _) in found.alone.items()}
        flops = {name: found.of({name: 1.0}).flops for name in models}
        draws = draws_of(self.family, self.settings, choice.layout)
        return {
            "layout": 1,
            "members_alone": [
                {"member": name, "step_time_s": alone[name], "flops_per_step": flops[name]}
                for name in sorted(models, key=flops.__getitem__)
            ],
            "all_alone": {
                "step_time_s": sum(alone.values()),
                "flops_per_step": sum(flops.values()),
            },
            "samplers": [self._row(name, family, draws, found) for name, family in self._kinds()],
        }

    def _kinds(self) -> list[tuple[str, Family | str]]:
        """Return the run's own family first, then one for every other sampler, or why not."""
        if not isinstance(self.family, NestedFamily):
            return [(self.settings.family.kind, self.family)]
        found: list[tuple[str, Family | str]] = [(self.family.sampler, self.family)]
        for name in SAMPLERS:
            if name == self.family.sampler:
                continue
            options = {**self.settings.family.options, "sampler": name}
            if name != "shrinking":
                options.pop("phases", None)
            try:
                found.append((name, NestedFamily(self.whole, options, self.settings.seed)))
            except UserError as error:
                found.append((name, str(error).splitlines()[-1].strip("- ")))
        return found

    def _row(
        self, name: str, family: Family | str, draws: int, prices: StepPrices
    ) -> dict[str, Any]:
        chosen = family is self.family
        if isinstance(family, str):
            return {"sampler": name, "chosen": False, "refused": family}
        by_name = {member.name: member for member in self.members}
        drawn = mean_passes(family, by_name, sampled_steps(self.settings), draws)
        if strange := sorted(drawn.passes.keys() - prices.alone.keys()):
            why = f"trains {', '.join(strange)}, which its members() does not list"
            return {"sampler": name, "chosen": chosen, "refused": why}
        cost = prices.of(drawn.passes, drawn.taught)
        return {
            "sampler": name,
            "chosen": chosen,
            "refused": None,
            "passes": dict(drawn.passes),
            **_plain(cost),
        }


def _plain(cost: StepCost) -> dict[str, Any]:
    return {
        "step_time_s": cost.step_time_s,
        "flops_per_step": cost.flops,
        "memory_gib": cost.memory_gib,
        "fits": cost.fits,
        "same_passes_alone_s": cost.alone_s,
    }


def tell(facts: Mapping[str, Any]) -> None:
    """Print what the samplers, or the stages, cost."""
    if "stages" in facts:
        stage_costs.tell(facts)
        return
    whole = facts["members_alone"][-1]
    all_alone = facts["all_alone"]
    rows = [_shown(row, whole, all_alone) for row in facts["samplers"] if not row["refused"]]
    print("\nThe family in layout 1, by sampler (* is this run's):")
    terminal.print_table(rows)
    members = ", ".join(
        f"{row['member']} {row['step_time_s']:.3g} s" for row in facts["members_alone"]
    )
    print(
        f"Alone, a step of each takes {members}: {all_alone['step_time_s']:.3g} s and "
        f"{format.power_of_ten(all_alone['flops_per_step'])} FLOPs for all of them, on as many "
        "tokens each."
    )
    for row in facts["samplers"]:
        if row["refused"]:
            print(f"{row['sampler']}: {row['refused']}")


def _shown(
    row: Mapping[str, Any], whole: Mapping[str, Any], all_alone: Mapping[str, Any]
) -> dict[str, Any]:
    passes = ", ".join(f"{name} {number:.2f}" for name, number in row["passes"].items())
    return {
        "sampler": f"{row['sampler']}{' *' if row['chosen'] else ''}",
        "step (s)": row["step_time_s"],
        "FLOPs/step": format.power_of_ten(row["flops_per_step"]),
        "of the whole model's step": f"{row['step_time_s'] / whole['step_time_s']:.2f}",
        "of separate runs": f"{row['step_time_s'] / all_alone['step_time_s']:.2f}",
        "memory (GiB)": f"{row['memory_gib']:.1f}{'' if row['fits'] else ' (does not fit)'}",
        "passes per token": passes,
    }
