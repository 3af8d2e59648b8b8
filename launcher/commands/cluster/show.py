"""`motet cluster show`: draw a description of machines, or list the known devices."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from motet.launcher.commands import common, options
from motet.launcher.commands.cluster import told
from motet.launcher.output import terminal
from motet.launcher.planning import cluster_view
from motet.parallel.cluster.description import Cluster
from motet.parallel.cluster.file import read


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which machines, and where the picture goes."""
    options.as_json(parser)
    parser.add_argument(
        "what", metavar="FILE|RUN", nargs="?", help="cluster.yaml, or a run (default: this machine)"
    )
    parser.add_argument("--catalogue", action="store_true", help="known devices, with sources")
    parser.add_argument("--svg", metavar="FILE", help="also as a picture")
    parser.add_argument("--html", metavar="FILE", help="also as a page")
    told.slurm_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw a cluster, or list the catalogue."""
    if arguments.catalogue:
        return _show_catalogue(arguments)
    notes: Sequence[str] = ()
    if arguments.from_slurm:
        cluster, notes = told.from_slurm(arguments)
        title = "Cluster by Slurm's list of nodes"
    else:
        cluster, title = _named(arguments.what)
    from motet.core.files import atomic_write

    if arguments.svg:
        atomic_write(Path(arguments.svg), cluster_view.svg(cluster))
    if arguments.html:
        atomic_write(Path(arguments.html), cluster_view.page(cluster, title, notes))
    if arguments.json:
        terminal.print_json({**cluster.to_mapping(), **told.totals(cluster), "notes": notes})
        return 0
    told.show(cluster, notes)
    return 0


def _named(what: str | None) -> tuple[Cluster, str]:
    """The cluster of a file, of a run, or this machine."""
    path = Path(what or ".")
    if what is None:
        from motet.parallel.cluster.this_machine import this_machine

        return this_machine(), "This machine, by data sheets"
    if path.is_dir():
        from motet.launcher.planning.prediction import cluster_of_run

        return cluster_of_run(common.open_run(what)), f"Cluster of {path.name}"
    return read(path), path.name


def _show_catalogue(arguments: argparse.Namespace) -> int:
    from motet.parallel.cluster.devices import DEFAULT_LINKS, DEVICES, LINKS

    if arguments.json:
        terminal.print_json({"devices": DEVICES, "links": LINKS, "default_links": DEFAULT_LINKS})
        return 0
    rows = [
        {
            "device": kind,
            "GiB": entry["memory_gib"],
            "peak TFLOPS": ", ".join(f"{n} {v:g}" for n, v in entry["peak_tflops"].items()),
            "reached": f"{entry['matmul_efficiency']:.0%}",
            "memory GB/s": entry["memory_gb_s"],
            "in a node": DEFAULT_LINKS[kind],
            "price/h": entry["price_per_hour"],
            "W": entry["power_w"],
            "source": entry["source"],
        }
        for kind, entry in DEVICES.items()
    ]
    terminal.print_table(rows)
    print()
    terminal.print_table([{"link": name, **entry} for name, entry in LINKS.items()])
    return 0
