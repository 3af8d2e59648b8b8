"""How long a job will take and what its fullest rank holds, by the cost model, before it is
submitted. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from motet.core.errors import UserError
from motet.core.jobs import NodeGroup
from motet.launcher.config.sections import RunSettings
from motet.launcher.planning.prediction import cluster_for, expected_training
from motet.models.config import ModelConfig
from motet.parallel.cluster.description import Cluster, homogeneous
from motet.parallel.cluster.probe.result import device_kind
from motet.parallel.cost.stages import predict
from motet.parallel.cost.terms import Prediction

ASSUMED_GBIT_S = 200.0
"""A GPU's share of the network where only the kind of GPU is known."""
HOUR_S = 3600.0


def machines(
    settings: RunSettings, groups: Sequence[NodeGroup], section: str
) -> tuple[Cluster, str]:
    """Return the machines that a job will get, and what was assumed of them.

    Raises:
        UserError: nothing tells what they are; the message says what would.
    """
    if settings.layout.cluster:
        return cluster_for(settings, 1), f"machines of {settings.layout.cluster}"
    kinds = {device_kind(group.gpu_type) if group.gpu_type else None for group in groups}
    kind = kinds.pop()
    if kinds or kind is None:
        raise UserError(
            "nothing says what these nodes are; set layout.cluster to a file that `motet cluster "
            "probe` or `--from-slurm` wrote, "
            f"or {section}.gpu_type to a kind that `motet cluster show --catalogue` lists"
        )
    nodes, each = sum(group.nodes for group in groups), groups[0].processes
    said = f"{kind} by its data sheet, {ASSUMED_GBIT_S:g} Gbit/s of network for each"
    return homogeneous(kind, nodes, each, nic_gbit_s=ASSUMED_GBIT_S), said


def forecast(
    settings: RunSettings,
    model: ModelConfig,
    world: int,
    groups: Sequence[NodeGroup],
    limit_s: int | None,
    section: str,
) -> list[tuple[str, str]]:
    """Return lines (name, value) on the time of the run, against its time limit, and on memory.

    Args:
        world: processes of all groups.
        limit_s: of one job; None where the partition decides.
        section: of run.yaml that asks for the job.
    """
    try:
        cluster, said = machines(settings, groups, section)
        training, traits = expected_training(settings, cluster)
        found = predict(model, cluster, settings.layout_for(world), training, traits)
    except UserError as error:
        return [("time", f"not known: {error}")]
    lines = [
        ("time", f"{_time(settings, found, limit_s, section)} ({said})"),
        ("memory", _memory(found)),
    ]
    return lines + [("doubt", reason) for reason in found.trust]


def _time(settings: RunSettings, found: Prediction, limit_s: int | None, section: str) -> str:
    """The time of the whole run with its interval, and how many jobs of this length that is."""
    low, high = (settings.steps * bound / HOUR_S for bound in found.interval_s)
    hours = settings.steps * found.step_time_s / HOUR_S
    text = (
        f"about {hours:.3g} h ({low:.3g} to {high:.3g}): {settings.steps:,} steps of "
        f"{found.step_time_s:.3g} s, "
        f"{found.tokens_per_s:,.0f} tokens/s, without probes and checkpoints"
    )
    if limit_s is not None and hours * HOUR_S > limit_s:
        jobs = -(-hours * HOUR_S // limit_s)
        text += f"; over {section}.time: it takes about {jobs:,.0f} jobs, by requeue or "
        text += f"{section}.chain"
    return text


def _memory(found: Prediction) -> str:
    verdict = "" if found.fits else ": it will not fit"
    return f"{found.memory_gib:.3g} of {found.capacity_gib:.3g} GiB on the fullest device{verdict}"
