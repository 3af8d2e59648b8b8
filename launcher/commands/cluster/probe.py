"""`motet cluster probe`: measure machines and their links, and write them down."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.format import bandwidth, latency
from motet.core.marks import rich_console
from motet.launcher.commands import options
from motet.launcher.commands.cluster import told
from motet.launcher.output import terminal
from motet.parallel.cluster.description import Cluster

RESIDUAL_WORTH_TELLING = 0.15


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, on which machines, and where it is written."""
    options.dry_run(parser)
    options.as_json(parser)
    parser.add_argument("--output", default="cluster.yaml", metavar="FILE", help="cluster.yaml")
    parser.add_argument("--force", action="store_true", help="replace the file when it exists")
    parser.add_argument("--processes", type=int, metavar="N", help="here (default: one per GPU)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--groups", nargs="+", metavar="NAME:HOSTS", help="such as ib:n[1-2] (default: measured)"
    )
    parser.add_argument("--nnodes", type=int, metavar="N", help="machines, when not under srun")
    parser.add_argument("--node-rank", type=int, metavar="R", help="of this one, from 0")
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="of the first machine")
    meet = "folder that all machines see, where they meet (default ~/.cache/motet/meetings)"
    parser.add_argument("--meet", type=Path, metavar="FOLDER", help=meet)
    seconds = "of one series of transfers (default 1.5)"
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help=seconds)
    wait = "seconds to wait for other machines (default 300)"
    parser.add_argument("--wait", type=float, default=300.0, metavar="S", help=wait)
    told.slurm_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print what was found, and write cluster.yaml."""
    output = Path(arguments.output)
    if not arguments.dry_run and output.exists() and not arguments.force:
        raise UserError(f"{output} exists; --force replaces it, --output names another file")
    if arguments.from_slurm:
        cluster, notes = told.from_slurm(arguments)
        return _write(arguments, cluster, notes, {})
    return _measure(arguments, output)


def _measure(arguments: argparse.Namespace, output: Path) -> int:
    from motet.launcher.measure import cluster_launch
    from motet.parallel.cluster import this_machine

    asked, nodes = _asked(arguments), _nodes(arguments)
    if arguments.dry_run:
        words = cluster_launch.command(asked, nodes, "ASKED.json", "RESULT.json")
        print(shlex.join(words))
        print(f"# ranks read this from ASKED.json: {asked.plain()}")
        print(f"# the first node writes {output}")
        return 0
    with _telling(quiet=nodes.rank > 0) as tell:
        result = cluster_launch.run(asked, nodes, tell, this_machine.cores(), arguments.meet)
    if nodes.rank:
        return 0  # all nodes have the same result; the first tells it
    from motet.parallel.cluster.probe.result import cluster_of

    cluster, notes = cluster_of(result)
    return _write(arguments, cluster, [*_findings(result), *notes], result)


def _asked(arguments: argparse.Namespace) -> Any:
    """What is to be measured, checked."""
    from motet.launcher.measure.cluster_launch import Asked, read_groups
    from motet.parallel.cluster import this_machine

    for name, least in (("processes", 1), ("seconds", 0.1), ("wait", 1.0)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name}: {value} is not at least {least}")
    gpus = this_machine.gpus() if arguments.device != "cpu" else []
    processes = arguments.processes or max(1, len(gpus))
    if gpus and processes > len(gpus):
        raise UserError(
            f"--processes: {processes}, but there are {len(gpus)} GPUs here, one for each process; "
            "leave it out, or give --device cpu"
        )
    groups = read_groups(arguments.groups or ())
    return Asked(processes, arguments.device, groups, arguments.seconds, arguments.wait)


def _nodes(arguments: argparse.Namespace) -> Any:
    """Who this machine is: by options, by the variables of its job, or the only one."""
    import os

    from motet.launcher.launch.command import ONE_NODE, NodePlace
    from motet.launcher.measure.cluster_launch import in_job

    given = arguments.nnodes is not None
    if not given:
        if arguments.node_rank is not None or arguments.endpoint:
            raise UserError("--nnodes is missing; it goes with --node-rank and --endpoint")
        return in_job(os.environ) or ONE_NODE
    count, rank, endpoint = arguments.nnodes, arguments.node_rank or 0, arguments.endpoint or ""
    host, colon, port = endpoint.rpartition(":")
    if count == 1:
        return ONE_NODE
    if count < 1 or not 0 <= rank < count or (arguments.node_rank is None):
        raise UserError(f"--nnodes {count} needs --node-rank from 0 to {max(0, count - 1)}")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65_536):
        raise UserError(
            f"--endpoint: {endpoint!r} is not HOST:PORT of the first machine, such as n1:29500"
        )
    return NodePlace(count, rank, endpoint)


@contextlib.contextmanager
def _telling(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is measured now: a moving line at a terminal, lines on standard error otherwise;
    `quiet`: another node tells it.
    """
    if quiet:
        yield lambda text: None
        return
    from rich.markup import escape

    console = rich_console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with console.status("waiting for all ranks") as status:
        yield lambda text: status.update(escape(text))


def _findings(result: dict[str, Any]) -> list[str]:
    """What the probe found, in sentences."""
    words = {
        "given": "groups as given",
        "one host": "one host",
        "measured": "groups found by measuring every pair of hosts",
    }
    groups = [f"{name} = {', '.join(hosts)}" for name, hosts in result["groups"].items()]
    out = [f"{words[result['groups_by']]}: {'; '.join(groups)}"]
    for link in result["links"]:
        names = " to ".join(link["groups"])
        many = f"{link['flows']} at once" if link["flows"] > 1 else "one pair"
        said = f"{link['scope'].replace('_', ' ')}: {names}, {many}: {bandwidth(link['gb_s'])}"
        noisy = link["residual"] > RESIDUAL_WORTH_TELLING
        doubt = f"; times differ from the fit by {link['residual']:.0%}" if noisy else ""
        out.append(f"{said}, {latency(link['latency_us'])}{doubt}")
    for one in result["collectives"]:
        kind = one["kind"].replace("_", "-")
        bus, start = bandwidth(one["bus_gb_s"]), latency(one["start_us"])
        out.append(f"{kind} over {one['ranks']} ranks ({one['where']}): {bus} per rank, {start}")
    return out


def _write(
    arguments: argparse.Namespace, cluster: Cluster, notes: Sequence[str], result: dict[str, Any]
) -> int:
    """Write the file, or print it in a dry run."""
    from motet.core.files import atomic_write
    from motet.parallel.cluster.file import from_mapping

    from_mapping(cluster.to_mapping())  # what is written can be read
    source = "Slurm's list of nodes" if arguments.from_slurm else "measurements"
    head = "".join(f"# {note}\n" for note in (f"By motet cluster probe, from {source}.", *notes))
    text = f"{head}{cluster.to_yaml()}"
    if arguments.dry_run:
        print(text, end="")
        return 0
    atomic_write(Path(arguments.output), text)
    if arguments.json:
        terminal.print_json(
            {"output": arguments.output, "cluster": cluster.to_mapping(), "notes": notes, **result}
        )
        return 0
    told.show(cluster, notes)
    print(f"wrote {arguments.output}")
    return 0
