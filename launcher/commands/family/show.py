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
    from motet.launcher.planning.family_facts import draw, family_facts
    from motet.launcher.runs.families import draws_of, made_members, new_family
    from motet.models.family.base import WHOLE, member_problems
    from motet.parallel.engines.refusals import refusals

    model, known = model_of(settings)
    if settings.family.kind == WHOLE:
        problem = Problem("family.kind", "is whole: this run trains one model; set kind: nested")
        raise_problems([problem])
    family = new_family(settings, model)
    members = list(made_members(family))
    problems = member_problems(model, members) or family.problems(settings.steps)
    raise_problems([Problem("family.kind", why) for why in problems])
    layout = settings.layout_for(settings.layout.processes)
    refused = refusals(layout, model, members, family.needs())
    raise_problems([Problem("family.kind", why) for why in refused])
    facts = family_facts(family, members, settings, draws_of(family, settings, layout))
    if arguments.json:
        terminal.print_json(facts)
        return 0
    draw(facts, known)
    return 0
