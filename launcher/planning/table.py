"""A planned layout for people and for files: a row of the table, its networks, its section of a
run.yaml. No torch.
"""

from __future__ import annotations

from typing import Any

from motet.core.yaml_text import dump
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.budget import bill
from motet.parallel.planner.question import RankedLayout

COLUMNS = {
    "number": "#",
    "layout": "layout",
    "on": "on",
    "time": "step (s)",
    "tokens_per_s": "tokens/s",
    "mfu_percent": "MFU %",
    "memory": "memory (GiB)",
    "bubble_percent": "bubble %",
    "exposed_percent": "exposed %",
    "days": "days",
    "device_hours": "device-hours",
    "price": "price",
    "energy_kwh": "kWh",
}
TRANSFERS = ("tensor", "context", "experts", "pipeline_send", "data_parallel")

FULLEST = 0.9
"""The share of a device's memory that a layout which is written may fill by prediction: memory is
predicted to some percent, and fragments, other processes and longer steps come on top."""


def row(number: int, choice: RankedLayout, tokens: float) -> dict[str, Any]:
    prediction, cost = choice.prediction, bill(choice, tokens)
    low, high = prediction.interval_s
    exposed = sum(prediction.parts.get(name, 0.0) for name in TRANSFERS)
    free = prediction.capacity_gib - prediction.memory_gib
    return {
        "number": number,
        "layout": words(choice),
        "on": machines(choice),
        "time": f"{prediction.step_time_s:.3g} ({low:.3g}–{high:.3g})",
        "tokens_per_s": round(prediction.tokens_per_s),
        "mfu_percent": round(100 * prediction.mfu, 1),
        "memory": f"{prediction.memory_gib:.1f} ({free:.1f} free)",
        "bubble_percent": round(
            100 * prediction.parts.get("bubble", 0.0) / prediction.step_time_s, 1
        ),
        "exposed_percent": round(100 * exposed / prediction.step_time_s, 1),
        "days": cost.days,
        "device_hours": round(cost.device_hours, 1),
        "price": None if cost.price is None else round(cost.price, 2),
        "energy_kwh": None if cost.energy_kwh is None else round(cost.energy_kwh, 1),
    }


def words(choice: RankedLayout) -> str:
    layout = choice.layout
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
    parts = [f"{name} {getattr(layout, name)}" for name in names if getattr(layout, name) > 1]
    parts.append(f"micro {layout.micro_sequences}")
    if layout.pp > 1:
        virtual = f" x{layout.virtual_stages}" if layout.virtual_stages > 1 else ""
        parts.append(layout.schedule + virtual)
    if layout.recompute != "none":
        parts.append(f"recompute {layout.recompute}")
    if layout.tp > 1 and not layout.sequence_parallel:
        parts.append("no sequence parallel")
    if layout.engine == "deepspeed":
        offload = "" if choice.offload == "none" else ", offload"
        parts.insert(0, f"ZeRO-{choice.zero_stage}{offload}")
    return ", ".join(parts)


def machines(choice: RankedLayout) -> str:
    groups = choice.cluster.groups
    word = "replica" if choice.spread.across == "replicas" else "stage"
    counts = {g: f"{n} {word}{'s' if n > 1 else ''}" for g, n in choice.spread.blocks}
    order = [g for g, _ in choice.spread.blocks] if len(groups) > 1 else [0]
    return " > ".join(
        f"{groups[g].devices:,} {groups[g].name}" + (f" ({counts[g]})" if len(groups) > 1 else "")
        for g in order
    )


def transports(choice: RankedLayout) -> dict[str, str]:
    """Return which network each kind of group of ranks uses: its kind picks the communicator's
    transport.
    """
    layout, groups = choice.layout, choice.cluster.groups
    inside = layout.tp * layout.cp * layout.dp_shard

    def within(ranks: int) -> str:
        kinds = {
            (g.intra_node if ranks <= g.devices_per_node else g.inter_node).kind for g in groups
        }
        return " and ".join(sorted(kinds))

    links = sorted({link.kind for link in choice.cluster.links.values()})
    between = " and ".join(links)
    out = {"tp": within(layout.tp), "dp_shard": within(inside)}
    crosses = choice.spread.across if len(groups) > 1 else ""
    out["dp_replicate"] = between if crosses == "replicas" else within(layout.stage_ranks)
    out["pp"] = between if crosses == "pipeline" else within(layout.world_size)
    used = {"tp": layout.tp, "dp_shard": layout.dp_shard, "dp_replicate": layout.dp_replicate}
    used["pp"] = layout.pp
    return {name: word for name, word in out.items() if used[name] > 1}


def section(choice: RankedLayout) -> dict[str, Any]:
    """Return the `layout:` section of a run.yaml that makes a layout."""
    layout, plain = choice.layout, Layout()
    always = (
        "engine",
        "dp_replicate",
        "dp_shard",
        "tp",
        "pp",
        "cp",
        "micro_sequences",
        "recompute",
    )
    values: dict[str, Any] = {"processes": choice.cluster.groups[0].devices_per_node}
    for name in Layout.__dataclass_fields__:
        value = getattr(layout, name)
        if name in always or value != getattr(plain, name):
            values[name] = list(value) if isinstance(value, tuple) else value
    if layout.engine == "deepspeed":
        values |= {"zero_stage": choice.zero_stage, "offload": choice.offload}
    return values


def job_groups(choice: RankedLayout) -> list[dict[str, int]]:
    """Return `slurm.groups` for a layout: the nodes of every group in order, their processes and
    GPUs.
    """
    return [
        {
            "nodes": group.nodes,
            "processes": group.devices_per_node,
            "gpus_per_node": 0 if group.device.kind == "cpu" else group.devices_per_node,
        }
        for group in choice.cluster.groups
    ]


def layout_text(choice: RankedLayout) -> str:
    """Return layout.yaml: the section `layout:`, and with several groups of nodes `slurm:`, which
    says the processes of each.
    """
    groups = choice.cluster.groups
    nodes = ", ".join(
        f"{g.nodes} of {g.name} with {g.devices_per_node} "
        f"process{'es' if g.devices_per_node > 1 else ''} each"
        for g in groups
    )
    found = choice.prediction
    head = (
        f"# Nodes, in this order: {nodes}.\n"
        f"# Predicted: {found.step_time_s:.4g} s per step, {found.memory_gib:.1f} of "
        f"{found.capacity_gib:.1f} GiB.\n"
    )
    text = head + dump({"layout": section(choice)})
    if len(groups) == 1:
        return text
    note = (
        "# `motet submit` asks for these nodes; give each its partition. By hand, `motet train "
        "--nnodes` on each machine in this order,\n"
        "# with layout.processes=N where it differs from the first.\n"
    )
    return text + note + dump({"slurm": {"groups": job_groups(choice)}})
