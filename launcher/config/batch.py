"""The section `slurm` of a run.yaml: what a batch job of the run asks for. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from motet.core.errors import Problem
from motet.launcher.config.field import setting
from motet.launcher.config.layout import LayoutSettings
from motet.slurm.config import (
    MAIL_TYPES,
    SIGNAL_EARLY_S,
    VARIABLES,
    JobComponent,
    fault,
    seconds,
)

MOST_SEED_IN_ARRAY = 4_000_000
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_OWN_VARIABLES = ("MOTET_", *VARIABLES, "BASH_")
_LOADER = "LD_"


@dataclass(frozen=True)
class GroupSettings:
    """Nodes of one kind. What is null is taken from `slurm` itself."""

    nodes: int = setting(1, "nodes of this kind", unit="nodes", least=1, most=10_000)
    processes: int | None = setting(
        None,
        "processes per node; null = layout.processes",
        unit="processes",
        least=1,
        most=64,
    )
    partition: str | None = setting(None, "partition, or several with commas between them")
    gpus_per_node: int | None = setting(None, "GPUs per node", unit="GPUs", least=0, most=64)
    gpu_type: str | None = setting(None, "kind of GPU, as the site names it")
    cpus_per_node: int | None = setting(None, "CPUs per node", unit="CPUs", least=1, most=4096)
    memory: str | None = setting(None, "host memory per node, such as 64G")
    constraint: str | None = setting(None, "features that nodes must have")
    reservation: str | None = setting(None, "reservation")


@dataclass(frozen=True)
class SlurmSettings:
    """What `motet submit` asks of Slurm.

    Texts are handed on as they are written, once they match an allow-pattern.
    """

    partition: str = setting(
        "", "partition, or several with commas between them; empty = the site's default"
    )
    account: str = setting("", "account that is charged")
    qos: str = setting("", "quality of service")
    nodes: int = setting(1, "nodes, where there are no groups", unit="nodes", least=1, most=10_000)
    gpus_per_node: int = setting(0, "GPUs per node; 0 = none", unit="GPUs", least=0, most=64)
    gpu_type: str = setting("", "kind of GPU, as the site names it")
    cpus_per_node: int | None = setting(
        None, "CPUs per node; null = one per process", unit="CPUs", least=1, most=4096
    )
    memory: str = setting("", "host memory per node, such as 64G; empty = the partition's default")
    time: str = setting(
        "",
        "time limit as Slurm writes it: MINUTES, MM:SS, HH:MM:SS, D-HH:MM; empty = the partition's",
    )
    constraint: str = setting("", "features that nodes must have, such as ib&a100")
    reservation: str = setting("", "reservation")
    exclusive: bool = setting(False, "no other job on the nodes")
    groups: tuple[GroupSettings, ...] = setting(
        (), "nodes of different kinds; two or more make one heterogeneous job, ranks in this order"
    )
    array: tuple[int, ...] = setting(
        (),
        "seeds: one run NAME-seedN for each, all of them one job array; the task's id is the seed",
        least=0,
        most=MOST_SEED_IN_ARRAY,
    )
    array_limit: int = setting(
        0, "runs of the array that train at once; 0 = all", unit="runs", least=0
    )
    dependency: tuple[str, ...] = setting(
        (), "jobs to wait for, such as afterok:123; all of them must come true"
    )
    chain: int = setting(
        1, "jobs that are submitted at once, each going on from the one before", least=1, most=100
    )
    requeue: str = setting(
        "self",
        "after a preemption or time limit: the job asks to be requeued, waits until the site does "
        "so, or ends",
        choices=("self", "site", "never"),
    )
    max_requeues: int = setting(
        20, "the job ends after this many requeues", unit="requeues", least=0
    )
    signal_s: int = setting(
        180,
        "how long before the time limit the run is told to save and stop; Slurm may be up to 60 s "
        "early",
        unit="seconds",
        least=30,
        most=65_535,
    )
    mail_user: str = setting("", "whom Slurm writes mail to")
    mail_type: tuple[str, ...] = setting(
        (), "of what Slurm writes mail, such as [END, FAIL]", choices=MAIL_TYPES
    )
    modules: tuple[str, ...] = setting((), "modules that the job loads, such as cuda/12.4")
    container: tuple[str, ...] = setting(
        (), "words before python in the job, such as [apptainer, exec, --nv, /images/motet.sif]"
    )
    srun: tuple[str, ...] = setting(
        (), "further arguments of srun, such as --container-image=/images/motet.sqsh"
    )
    python: str = setting("", "python of the job; empty = the one that submits")
    environment: tuple[str, ...] = setting(
        (),
        "NAME: a variable of your shell that the job gets; NAME=value: set in the script, for "
        "what is no secret",
    )
    loader_variables: bool = setting(
        False,
        "slurm.environment may name variables of the dynamic loader: LD_LIBRARY_PATH, LD_PRELOAD, "
        "all that begin with LD_; they decide which code every program of the job loads",
        omit_default=True,
    )
    secrets: tuple[str, ...] = setting(
        (),
        "NAME=/file: read on every node when the job starts; the file must be yours alone (mode "
        "0600)",
    )
    port: int = setting(
        29_600,
        "first of 1,000 ports, of which the job's id chooses one; nodes meet there only in runs "
        "that an older version froze",
        least=1024,
        most=64_000,
    )


def groups_of(slurm: SlurmSettings, layout: LayoutSettings) -> tuple[JobComponent, ...]:
    """Return the nodes that a run asks for, by kind; one group where the run names none."""
    return tuple(_group(slurm, layout, group) for group in slurm.groups or (_whole(slurm),))


def _whole(slurm: SlurmSettings) -> GroupSettings:
    return GroupSettings(nodes=slurm.nodes)


def _group(slurm: SlurmSettings, layout: LayoutSettings, group: GroupSettings) -> JobComponent:

    def chosen(name: str) -> Any:
        own = getattr(group, name)
        return getattr(slurm, name) if own is None else own

    processes = group.processes or layout.processes
    return JobComponent(
        nodes=group.nodes,
        processes=processes,
        cpus=chosen("cpus_per_node") or processes,
        gpus=chosen("gpus_per_node"),
        exclusive=slurm.exclusive,
        **{n: chosen(n) for n in ("partition", "gpu_type", "memory", "constraint", "reservation")},
    )


def size_of(slurm: SlurmSettings, layout: LayoutSettings) -> tuple[int, int]:
    """Return the number of nodes of all groups, and of their processes."""
    groups = slurm.groups or (_whole(slurm),)
    each = [(group.nodes, group.processes or layout.processes) for group in groups]
    return sum(nodes for nodes, _ in each), sum(nodes * number for nodes, number in each)


def slurm_problems(slurm: SlurmSettings, layout: LayoutSettings) -> list[Problem]:
    """Texts match their patterns, and no two settings contradict each other."""
    out = [
        Problem(path, why)
        for path, kind, value in _texts(slurm)
        if value
        if (why := fault(kind, value))
    ]
    if out:
        return out
    return [*_contradictions(slurm), *_device_problems(slurm, layout), *_variable_problems(slurm)]


def _texts(slurm: SlurmSettings) -> Iterator[tuple[str, str, str]]:
    """Every text with its setting and the name of its pattern."""
    kinds = {"python": "path"}
    single = ("partition", "account", "qos", "gpu_type", "memory", "time", "constraint")
    for name in (*single, "reservation", "mail_user", "python"):
        yield f"slurm.{name}", kinds.get(name, name), getattr(slurm, name)
    for name in ("dependency", "modules", "container", "srun"):
        for i, word in enumerate(getattr(slurm, name)):
            yield f"slurm.{name}.{i}", name, word or " "
    for i, entry in enumerate(slurm.environment):
        name, _, value = entry.partition("=")
        yield f"slurm.environment.{i}", "variable", name or " "
        yield f"slurm.environment.{i}", "value", value
    for i, entry in enumerate(slurm.secrets):
        name, _, path = entry.partition("=")
        yield f"slurm.secrets.{i}", "variable", name or " "
        yield f"slurm.secrets.{i}", "path", path or " "
    for i, group in enumerate(slurm.groups):
        for field in fields(group):
            value = getattr(group, field.name)
            if isinstance(value, str):
                yield f"slurm.groups.{i}.{field.name}", field.name, value


def _contradictions(slurm: SlurmSettings) -> list[Problem]:
    out = []
    several = len(slurm.groups) > 1
    if slurm.groups and slurm.nodes != SlurmSettings().nodes:
        why = (
            f"{slurm.nodes}, but slurm.groups says how many nodes there are of each kind; leave it "
            "out"
        )
        out.append(Problem("slurm.nodes", why))
    if slurm.array and several:
        why = (
            "Slurm has no arrays of heterogeneous jobs; submit each seed by itself, or leave "
            "slurm.groups at one kind"
        )
        out.append(Problem("slurm.array", why))
    if slurm.array and slurm.chain > 1:
        why = (
            f"{slurm.chain} with slurm.array: an array has no chain; slurm.requeue=self takes the "
            "runs past their time limit"
        )
        out.append(Problem("slurm.chain", why))
    if len(set(slurm.array)) != len(slurm.array):
        out.append(Problem("slurm.array", f"{list(slurm.array)} names a seed twice"))
    if slurm.array_limit and not slurm.array:
        out.append(Problem("slurm.array_limit", "is for slurm.array, which is empty; leave it out"))
    limit_s = seconds(slurm.time)
    if limit_s is not None and limit_s <= slurm.signal_s + SIGNAL_EARLY_S:
        why = (
            f"{slurm.time} is {limit_s:,} s, but the run is told to stop {slurm.signal_s} s before "
            "its end, or up to "
            f"{SIGNAL_EARLY_S} s earlier; raise it, or lower slurm.signal_s"
        )
        out.append(Problem("slurm.time", why))
    if slurm.mail_type and not slurm.mail_user:
        out.append(Problem("slurm.mail_user", "is missing; slurm.mail_type needs it"))
    return out


def _device_problems(slurm: SlurmSettings, layout: LayoutSettings) -> list[Problem]:
    """Processes on GPUs get one each."""
    out = []
    for i, group in enumerate(groups_of(slurm, layout)):
        place = f"slurm.groups.{i}" if slurm.groups else "slurm"
        if layout.device == "cpu" and group.gpus:
            why = f"{group.gpus}, but layout.device=cpu uses none; leave it out"
            out.append(Problem(f"{place}.gpus_per_node", why))
        elif 0 < group.gpus < group.processes:
            why = f"{group.gpus} for {group.processes} processes per node, which need one each"
            out.append(Problem(f"{place}.gpus_per_node", why))
        if group.gpu_type and not group.gpus:
            why = f"{group.gpu_type} is asked for, but no GPU; set gpus_per_node"
            out.append(Problem(f"{place}.gpu_type", why))
    return out


def _variable_problems(slurm: SlurmSettings) -> list[Problem]:
    """Secrets go by name, and no variable of Slurm's or of Motet's is set, of the loader's
    only where that was asked for."""
    out = []
    named: dict[str, str] = {}
    entries = [(f"slurm.environment.{i}", entry) for i, entry in enumerate(slurm.environment)]
    entries += [(f"slurm.secrets.{i}", entry) for i, entry in enumerate(slurm.secrets)]
    for path, entry in entries:
        name, equals, _ = entry.partition("=")
        if name in named:
            out.append(Problem(path, f"{name} is given twice; {named[name]} has it as well"))
        named[name] = path
        if name.startswith(_OWN_VARIABLES):
            why = f"{name} is not yours to give: Slurm, bash or Motet sets it"
            out.append(Problem(path, why))
        if name.startswith(_LOADER) and not ("environment" in path and slurm.loader_variables):
            why = (
                f"{name} decides which code every program of the job loads; slurm.environment may "
                "name it with slurm.loader_variables=true"
            )
            out.append(Problem(path, why))
        if equals and "environment" in path and _SECRET.search(name):
            why = (
                f"{name} sounds like a secret, and values here are stored; give the name alone, or "
                f"slurm.secrets: [{name}=/file]"
            )
            out.append(Problem(path, why))
    return out
