"""`motet layout show`: the rank grid, the stages and the pipeline's timeline of a run.yaml."""

from __future__ import annotations

import argparse

from motet.core.errors import UserError, raise_problems
from motet.launcher.commands import common, options
from motet.launcher.config import run_yaml
from motet.launcher.output import terminal
from motet.launcher.runs.described_model import model_of


def arguments(parser: argparse.ArgumentParser) -> None:
    """A run.yaml, and on how many machines."""
    options.as_json(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    options.run_yaml(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw the layout of a run.yaml, or tell it as JSON."""
    if arguments.nodes < 1:
        raise UserError(f"--nodes: {arguments.nodes} is not at least 1")
    settings = run_yaml.load(common.run_yaml(arguments), arguments.settings, nodes=arguments.nodes)
    from motet.launcher.config.checks import layout_problems
    from motet.launcher.planning.layout_drawing import draw
    from motet.launcher.planning.layout_facts import layout_facts

    model, known = model_of(settings)
    world_size = settings.layout.processes * arguments.nodes
    raise_problems(layout_problems(settings, world_size, model))
    facts = layout_facts(settings, model, arguments.nodes)
    if arguments.json:
        terminal.print_json(facts)
        return 0
    draw(settings, model, facts, known)
    return 0
