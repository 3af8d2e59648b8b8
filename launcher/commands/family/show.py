"""`motet family show`: the members of a run.yaml's family, what each costs and shares."""

from __future__ import annotations

import argparse

from motet.core.errors import Problem, raise_problems
from motet.launcher.commands import common, options
from motet.launcher.config import run_yaml
from motet.launcher.output import terminal
from motet.launcher.runs.described_model import model_of


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml."""
    options.as_json(parser)
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw the members of a run.yaml's family, or tell them as JSON."""
    settings = run_yaml.load(common.run_yaml(arguments), arguments.settings)
    from motet.launcher.planning import stage_costs
    from motet.launcher.planning.family_facts import draw, family_facts
    from motet.launcher.runs.families import (
        draws_of,
        new_family,
        new_members,
        sound_members,
    )
    from motet.launcher.runs.stage_layouts import checked_layouts, family_of
    from motet.models.family.base import WHOLE
    from motet.models.family.progressive import ProgressiveFamily

    model, known = model_of(settings)
    if settings.family.kind == WHOLE:
        problem = Problem(
            "family.kind", "is whole: this run trains one model; set nested or progressive"
        )
        raise_problems([problem])
    family = new_family(settings, model)
    members = list(sound_members(family, settings))
    layout = settings.layout_for(settings.layout.processes)
    checked_layouts(
        settings,
        new_members(settings, model),
        model,
        settings.layout.processes,
        family=family_of(settings, model, None, {}),
    )
    draws = draws_of(family, settings, layout)
    if isinstance(family, ProgressiveFamily):
        facts = {"kind": settings.family.kind, **stage_costs.stage_facts(family, settings)}
        shown = stage_costs.draw
    else:
        facts, shown = family_facts(family, members, settings, draws), draw
    if arguments.json:
        terminal.print_json(facts)
        return 0
    shown(facts, known)
    return 0
