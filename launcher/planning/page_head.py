"""What a page of a plan says first: of which model and machines it is, in which currency, and the
command that takes the layout. No torch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from motet.core import format
from motet.launcher.planning import table as plan_table
from motet.models import counts
from motet.parallel.cluster.description import Cluster
from motet.parallel.planner.question import PlanQuestion, RankedLayout

CLUSTER = "cluster.yaml"


def facts(question: PlanQuestion, choice: RankedLayout, tokens: float) -> dict[str, str]:
    """Return the lines of the head by their names."""
    model, training, cluster = question.model, question.training, question.cluster
    shown = {
        "Model": f"{format.big(counts.parameters(model))} parameters: {model.n_layers} layers, "
        f"width {model.d_model:,}, vocabulary {model.vocabulary_size:,}",
        "Training": f"{tokens:.3g} tokens, {training.sequences:,} sequences of "
        f"{training.sequence_length:,} tokens a step, {training.dtype}",
        "Cluster": "; ".join(machines(cluster)),
    }
    if cluster.price_per_hour:
        shown["Prices"] = currency(cluster)
    return shown


def machines(cluster: Cluster) -> list[str]:
    """Return each group of nodes in words."""
    return [
        f"{group.name}: {group.nodes:,} {'node' if group.nodes == 1 else 'nodes'} of "
        f"{group.devices_per_node} {group.device.kind}, {group.inter_node.kind} between them"
        if group.nodes > 1
        else f"{group.name}: 1 node of {group.devices_per_node} {group.device.kind}"
        for group in cluster.groups
    ]


def currency(cluster: Cluster) -> str:
    """Return what the prices are in, and what a device costs."""
    each = ", ".join(
        f"{group.device.price_per_hour:g} for one hour of one {group.device.kind}"
        for group in cluster.groups
        if group.device.price_per_hour
    )
    if cluster.currency:
        return f"in {cluster.currency}; {each}"
    return f"in the currency of price_per_hour ({CLUSTER} does not name it); {each}"


def command(choice: RankedLayout, run_yaml: str, cluster: str | None) -> str:
    """Return the line for a shell that trains with a layout: here where it takes one node, else as
    a batch job.

    Args:
        choice: the layout.
        run_yaml: as it was given.
        cluster: the cluster file as it was given; None where this machine was planned for.
    """
    groups = plan_table.job_groups(choice)
    alone = len(groups) == 1 and groups[0]["nodes"] == 1
    values: dict[str, Any] = {
        f"layout.{name}": value for name, value in plan_table.section(choice).items()
    }
    if cluster is not None:
        values["layout.cluster"] = cluster
    if not alone and len(groups) > 1:
        values["slurm.groups"] = groups
    elif not alone:
        values |= {f"slurm.{name}": groups[0][name] for name in ("nodes", "gpus_per_node")}
    words = [f"{name}={_word(value)}" for name, value in values.items()]
    return shlex.join(["motet", "train" if alone else "submit", run_yaml, *words])


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def html(shown: Mapping[str, str], taken: str) -> str:
    """Return the head."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in shown.items()
    )
    line = f"<div><dt>Take layout 1</dt><dd><code>{escape(taken)}</code></dd></div>"
    return f'<dl class="facts">{rows}{line}</dl>'
