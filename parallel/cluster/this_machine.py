"""What this machine is, without loading torch: its GPUs as the driver lists them, its cores and
memory, as a cluster of one node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from motet.core.errors import UserError
from motet.parallel.cluster.description import (
    Cluster,
    ClusterError,
    Device,
    Group,
    Link,
    builtin_link,
    device,
)
from motet.parallel.cluster.devices import DEFAULT_LINKS, NETWORK_LATENCY_US
from motet.parallel.cluster.file import BOUNDS, PEAK_TFLOPS, read
from motet.parallel.cluster.probe.result import device_kind

DRIVER_TIMEOUT_S = 20.0
CATALOGUE_CORES = 16
"""Cores that the catalogue's "cpu" stands for."""


def gpus(environment: Mapping[str, str] | None = None) -> list[tuple[str, float]]:
    """Return (name, memory in GiB) of the GPUs that NVIDIA's driver lists and CUDA_VISIBLE_DEVICES
    leaves; [] without a driver.
    """
    inherited = os.environ if environment is None else environment
    found = shutil.which("nvidia-smi", path=inherited.get("PATH", os.defpath))
    if found is None:
        return []
    query = ["--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [found, *query], capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        visible(done.stdout, inherited.get("CUDA_VISIBLE_DEVICES")) if not done.returncode else []
    )


def visible(listing: str, chosen: str | None) -> list[tuple[str, float]]:
    """Return the GPUs of nvidia-smi's lines "index, uuid, name, MiB" that CUDA_VISIBLE_DEVICES
    (None: unset) leaves.
    """
    rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines()]
    known = {}
    for row in (row for row in rows if len(row) == 4 and row[3].isdecimal()):
        known[row[0]] = known[row[1]] = (row[2], int(row[3]) / 1024)
    if chosen is None:
        return [known[row[0]] for row in rows if row[0] in known]
    out = []
    for name in filter(None, (part.strip() for part in chosen.split(","))):
        full = [k for k in known if k == name or (name.startswith("GPU-") and k.startswith(name))]
        if not full:  # CUDA stops at the first that there is not
            break
        out.append(known[full[0]])
    return out


def read_cluster(path: str) -> Cluster:
    """Return the machines that `layout.cluster` names.

    Raises:
        UserError: they cannot be read.
    """
    try:
        return read(Path(path))
    except ClusterError as error:
        raise UserError(f"layout.cluster: {error}") from None


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this machine's cores multiply bf16 in hardware: where they do, a run's
    precision `auto` is bf16.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    return bool({"amx_tile", "avx512_bf16"} & set(text.split()))


def memory_gib() -> float:
    """Return the memory of this machine, or what its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit) / 2**30) if limit.isdecimal() else total


def this_machine(processes: int | None = None, use: str = "auto") -> Cluster:
    """Return this machine as a cluster, by data sheets and by the number of its cores.

    Args:
        processes: that share its cores where there is no GPU; None: one per core. With GPUs each
            process has one.
        use: "auto", "cuda" or "cpu".

    Raises:
        ClusterError: GPUs that the catalogue does not have.
    """
    found = gpus() if use != "cpu" else []
    if found:
        return node_of(sum(one == found[0] for one in found), found[0])
    return node_of(processes or cores())


def node_of(processes: int, gpu: tuple[str, float] | None = None) -> Cluster:
    """Return one node with as many devices as processes: GPUs of a name and a memory in GiB, or
    shares of this machine's cores.
    """
    if gpu is not None:
        return _one_node(_gpu(*gpu), processes)
    return _one_node(cpu(cores() / processes, memory_gib() / processes), processes)


def _one_node(kind: Device, number: int) -> Cluster:
    intra = builtin_link(DEFAULT_LINKS.get(kind.kind, "pcie4"))
    alone = Link(1.0, NETWORK_LATENCY_US["ethernet"], "ethernet")
    return Cluster((Group("here", kind, 1, number, intra, alone),))


def _gpu(name: str, size_gib: float) -> Device:
    """Return the catalogue's device with the memory that this one has.

    Raises:
        ClusterError: the catalogue does not have it.
    """
    kind = device_kind(name, size_gib)
    if kind is None:
        raise ClusterError(
            f"{name} with {size_gib:.0f} GiB is not in the catalogue; measure it: motet cluster "
            "probe"
        )
    return device(kind, memory_gib=round(size_gib, 1))


def cpu(own_cores: float, own_memory_gib: float) -> Device:
    """Return the catalogue's "cpu", scaled to a process with so many cores and so much memory."""
    whole = device("cpu")
    share = own_cores / CATALOGUE_CORES
    return replace(
        whole,
        memory_gib=max(BOUNDS["memory_gib"][0], round(own_memory_gib, 2)),
        peak_tflops={n: max(PEAK_TFLOPS[0], rate * share) for n, rate in whole.peak_tflops.items()},
        memory_gb_s=max(BOUNDS["memory_gb_s"][0], whole.memory_gb_s * share),
        price_per_hour=whole.price_per_hour * share,
        power_w=whole.power_w * share,
    )
