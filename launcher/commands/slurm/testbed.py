"""`motet slurm testbed ...`: a private Slurm of four nodes on this machine."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from motet.launcher.commands import options
from motet.launcher.output import terminal
from motet.slurm.errors import SlurmError
from motet.slurm.testbed import needs, shape
from motet.slurm.testbed.bed import Testbed

Verb = Callable[[argparse.Namespace], int]
Option = Callable[[argparse.ArgumentParser], None]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is to be done with it."""
    parser.description = None
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=options.Parser)

    def add(
        function: Verb, help_text: str, option: Option | None = options.dry_run
    ) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        verb: argparse.ArgumentParser = verbs.add_parser(
            name, help=help_text, description=help_text
        )
        verb.set_defaults(verb=function)
        if option is not None:
            option(verb)
        folder = shape.DEFAULT_FOLDER
        verb.add_argument("--folder", default=folder, metavar="F", help=f"default: {folder}")
        return verb

    begin = add(start, "start it and wait until every node is idle")
    link = "of the link (default 1000)"
    begin.add_argument("--rate", type=float, default=1000.0, metavar="MBIT", help=link)
    add(stop, "end and remove all of it, also after a crash")
    add(status, "its nodes, daemons and link", options.as_json)
    add(env, "shell lines that let sbatch and motet use it: eval them", None)
    speed = add(rate, "shape the link between its two clusters")
    speed.add_argument("mbit", type=float, metavar="MBIT", help="Mbit/s in each direction")
    pulled = add(cut, "pull a node's network cable")
    killed = add(crash, "kill a host, as if its power failed")
    killed.add_argument("host", metavar="HOST", help="n1 to n4, or ctl for the controller")
    mended = add(mend, "put the cable back and start slurmd anew")
    for parser_of_node in (pulled, mended):
        parser_of_node.add_argument("node", metavar="NODE", help="n1 to n4")
    add(restart_controller, "start slurmctld anew from its saved state")


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    verb: Verb = arguments.verb
    return verb(arguments)


def start(arguments: argparse.Namespace) -> int:
    """Start it; one that runs is left as it is."""
    bed = _bed(arguments)
    if arguments.dry_run:
        print(bed.plan(arguments.rate))
        return 0
    bed.start(arguments.rate)
    print(f"{len(bed.nodes)} nodes are idle; in a shell, sbatch and motet submit use them after")
    print(f'  eval "$(motet slurm testbed env{_folder_option(arguments)})"')
    return 0


def stop(arguments: argparse.Namespace) -> int:
    """End its processes and remove its network, also after a crash."""
    bed = _bed(arguments)
    if arguments.dry_run:
        print("\n".join(f"# ends or removes {thing}" for thing in bed.leftovers()) or "# nothing")
        return 0
    bed.stop()
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Nodes with their states, daemons, link. 1 when not all daemons run."""
    bed = _bed(arguments)
    needs.require()
    pids = bed.pids()
    states = bed.node_states() if shape.CONTROLLER in pids else {}
    nodes = [
        {
            "node": node,
            "cluster": feature,
            "address": bed.address(node) if pids else "",
            "state": states.get(node, "unknown"),
            "slurmd": pids.get(node),
            "processes": sum(who.host == node for who in bed.inhabitants()),
        }
        for node, feature in shape.NODES.items()
    ]
    facts: dict[str, Any] = {
        "folder": str(bed.folder),
        "running": bed.running,
        "slurmctld": pids.get(shape.CONTROLLER),
        "munged": pids.get("munged"),
        "link_mbit_per_s": bed.rate_mbit if pids else None,
    }
    if arguments.json:
        terminal.print_json({**facts, "nodes": nodes})
    else:
        facts["running"] = terminal.cell(bed.running)
        terminal.print_facts([(name, "–" if v is None else str(v)) for name, v in facts.items()])
        terminal.print_table([{**row, "slurmd": str(row["slurmd"] or "")} for row in nodes])
    return 0 if bed.running else 1


def env(arguments: argparse.Namespace) -> int:
    """Shell lines that let Slurm's commands, and motet, use it."""
    bed = _bed(arguments)
    needs.require()
    if not bed.pids():
        raise SlurmError(
            f"no testbed runs in {bed.folder}; first: motet slurm testbed start"
            f"{_folder_option(arguments)}"
        )
    for name, value in bed.environment().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def rate(arguments: argparse.Namespace) -> int:
    """Shape the link between the clusters."""
    bed = _bed(arguments)
    shape.check_rate(arguments.mbit)
    if arguments.dry_run:
        return _print_commands(shape.rate_commands(bed.names, arguments.mbit))
    needs.require()
    bed.set_rate(arguments.mbit)
    return 0


def cut(arguments: argparse.Namespace) -> int:
    """Pull a node's network cable."""
    bed = _bed(arguments)
    shape.check_node(arguments.node)
    if arguments.dry_run:
        return _print_commands([shape.cut_command(bed.names, arguments.node, up=False)])
    needs.require()
    bed.cut(arguments.node)
    return 0


def crash(arguments: argparse.Namespace) -> int:
    """Kill a node, or the controller, as if its power failed."""
    bed = _bed(arguments)
    if arguments.host != shape.CONTROLLER:
        shape.check_node(arguments.host)
    if arguments.dry_run:
        print(f"# SIGKILL to every process of {arguments.host}")
        return 0
    needs.require()
    bed.crash(arguments.host)
    return 0


def mend(arguments: argparse.Namespace) -> int:
    """Put a node's cable back and start its slurmd anew."""
    bed = _bed(arguments)
    shape.check_node(arguments.node)
    if arguments.dry_run:
        _print_commands([shape.cut_command(bed.names, arguments.node, up=True)])
        print(f"# start slurmd of {arguments.node} anew")
        return 0
    needs.require()
    bed.mend(arguments.node)
    return 0


def restart_controller(arguments: argparse.Namespace) -> int:
    """Start slurmctld anew from its saved state."""
    bed = _bed(arguments)
    if arguments.dry_run:
        print("# end slurmctld when it runs, and start it from its saved state")
        return 0
    needs.require()
    bed.restart_controller()
    return 0


def _bed(arguments: argparse.Namespace) -> Testbed:
    return Testbed(Path(arguments.folder))


def _folder_option(arguments: argparse.Namespace) -> str:
    default = arguments.folder == shape.DEFAULT_FOLDER
    return "" if default else f" --folder {shlex.quote(arguments.folder)}"


def _print_commands(commands: list[list[str]]) -> int:
    print("\n".join(shlex.join(command) for command in commands))
    return 0
