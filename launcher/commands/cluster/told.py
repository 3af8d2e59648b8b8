"""What both commands of `motet cluster` ask and print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from motet.core.errors import UserError
from motet.launcher.output import terminal
from motet.launcher.planning import cluster_view
from motet.parallel.cluster.description import Cluster
from motet.parallel.cluster.devices import DEVICES


def slurm_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that take machines from Slurm's list."""
    parser.add_argument("--from-slurm", action="store_true", help="nodes that Slurm lists")
    only = "with --from-slurm: only its nodes"
    parser.add_argument("--partition", metavar="NAME", help=only)
    kind = "with --from-slurm: of GPUs that it gives no kind, such as h100"
    parser.add_argument("--gpu", metavar="KIND", help=kind)


def from_slurm(arguments: argparse.Namespace) -> tuple[Cluster, list[str]]:
    """The machines that Slurm lists, and what had to be guessed."""
    from motet.launcher.measure.slurm_cluster import cluster_from_slurm
    from motet.slurm.client import Client
    from motet.slurm.inventory import nodes

    if arguments.gpu is not None and arguments.gpu not in DEVICES:
        raise UserError(f"--gpu={arguments.gpu} is not in the catalogue ({', '.join(DEVICES)})")
    return cluster_from_slurm(nodes(Client(), arguments.partition), arguments.gpu)


def totals(cluster: Cluster) -> dict[str, float]:
    """Devices, their price per hour and their power in kW."""
    return {
        "devices": cluster.devices,
        "price_per_hour": cluster.price_per_hour,
        "power_kw": sum(g.devices * g.device.power_w for g in cluster.groups) / 1e3,
    }


def show(cluster: Cluster, notes: Sequence[str]) -> None:
    """Draw the groups and links of a cluster, and list them."""
    console = terminal.console()
    for line in cluster_view.lines(cluster):
        console.print(line, markup=False, soft_wrap=True)
    print()
    terminal.print_table(cluster_view.group_rows(cluster))
    if cluster.links:
        print()
        terminal.print_table(cluster_view.link_rows(cluster))
    whole = totals(cluster)
    unpriced = [g.name for g in cluster.groups if not g.device.price_per_hour]
    price = f"{whole['price_per_hour']:,.2f} per hour"
    price += f" (none known for {', '.join(unpriced)})" if unpriced else ""
    print(f"\n{cluster.devices:,} devices, {price}, {whole['power_kw']:,.2f} kW")
    for note in (*cluster_view.calibrations(cluster), *notes):
        print(f"  {note}")
