"""From a launch and a layout to process groups: who this process is, and how all of them agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from motet.parallel.layout.layout import Layout, LayoutError

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """This process among all of the run's.

    Attributes:
        rank, size: its number, and how many there are.
        local_rank: its number on this node.
        device: where it computes.
        timeout_s: how long a collective waits for a silent rank before it fails.
        control: a gloo group for small agreements, used by the main thread only.
        saving: a gloo group for checkpoints, used by whichever thread saves: collectives of two
            threads in one group would meet in different orders on different ranks.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout_s: float
    control: dist.ProcessGroup
    saving: dist.ProcessGroup


def choose_device(setting: str, local_rank: int) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        LayoutError: "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if setting == "cuda" and not available:
        raise LayoutError("layout.device=cuda, but torch sees no CUDA device here; use auto or cpu")
    if setting == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def join(device_setting: str, timeout_s: float = 600.0, layout: Layout | None = None) -> World:
    """Join the process group that torchrun announced in the environment.

    Args:
        device_setting: "auto", "cpu" or "cuda".
        timeout_s: how long a collective waits for a silent rank before it fails.
        layout: gives this process its rank (`Layout.rank_of_process`); None: that of the
            environment.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    device = choose_device(device_setting, local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if layout is not None:
        os.environ["RANK"] = str(layout.rank_of_process(int(os.environ["RANK"])))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout, **_file_store(timeout))
    control = dist.new_group(backend="gloo", timeout=timeout)
    world = World(
        dist.get_rank(),
        dist.get_world_size(),
        local_rank,
        device,
        timeout_s,
        control,
        dist.new_group(backend="gloo", timeout=timeout),
    )
    _same_devices(world)
    return world


def _file_store(timeout: timedelta) -> dict[str, Any]:
    """Return the store that ranks were given by whoever started them: a file that begins with
    $MOTET_STORE, of its own for each restart (torchrun counts those of several machines differently
    on each; there $MOTET_ROUND does). Otherwise the environment's address serves.
    """
    path = os.environ.get("MOTET_STORE")
    if not path:
        return {}
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start = os.environ.get("MOTET_ROUND") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.FileStore(f"{path}-{start}", size)
    store.set_timeout(timeout)
    return {"store": store, "rank": rank, "world_size": size}


def _same_devices(world: World) -> None:
    """Refuse ranks on different kinds of device: they would wait for each other in different
    backends.
    """
    kinds: list[str] = [""] * world.size
    dist.all_gather_object(kinds, world.device.type, group=world.control)
    if len(set(kinds)) > 1:
        found = ", ".join(
            f"{kind} on {_ranks([r for r, k in enumerate(kinds) if k == kind])}"
            for kind in sorted(set(kinds))
        )
        raise LayoutError(
            f"layout.device={world.device.type} here, but the ranks of one run must all use one "
            "kind of device; "
            f"found {found}: set layout.device=cpu, or leave out the machines without a GPU"
        )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"


@dataclass(frozen=True)
class Meshes:
    """The process groups of a layout.

    Attributes:
        dense: dimensions "pp", "dp_replicate", "fsdp" (data shards and context ranks together) and
            "tp".
        experts: dimensions "pp", "dp_replicate", "edp", "ep" and "etp" over the same ranks; None
            for a dense model.
        context: ranks that hold parts of the same sequences; None when cp = 1.
    """

    dense: DeviceMesh
    experts: DeviceMesh | None
    context: dist.ProcessGroup | None

    def data(self) -> DeviceMesh:
        """Return the ranks that share dense weights: sharded, and replicated where there are
        replicas.
        """
        return _replicated(self.dense, "fsdp")

    def expert_data(self) -> DeviceMesh:
        """Return the ranks that share the same experts' weights."""
        assert self.experts is not None
        return _replicated(self.experts, "edp")


def _replicated(mesh: DeviceMesh, name: str) -> DeviceMesh:
    return mesh["dp_replicate", name] if mesh["dp_replicate"].size() > 1 else mesh[name]


def build_meshes(layout: Layout, world: World, experts: bool) -> Meshes:
    """Make the process groups of a layout (a collective)."""
    grid = torch.arange(layout.world_size, dtype=torch.int)
    head = (layout.pp, layout.dp_replicate)
    dense = DeviceMesh(
        world.device.type,
        grid.view(*head, layout.fsdp, layout.tp),
        mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"),
    )
    other = None
    if experts:
        other = DeviceMesh(
            world.device.type,
            grid.view(*head, layout.edp, layout.ep, layout.etp),
            mesh_dim_names=("pp", "dp_replicate", "edp", "ep", "etp"),
        )
    context = None
    if layout.cp > 1:
        rows = grid.view(-1, layout.cp, layout.tp).transpose(1, 2).reshape(-1, layout.cp)
        context, _ = dist.new_subgroups_by_enumeration(
            rows.tolist(), timeout=timedelta(seconds=world.timeout_s)
        )
    for mesh in filter(None, (dense, other)):
        for group in mesh.get_all_groups():
            # A mesh makes its groups with torch's own timeout, half an hour, and has no public way
            # to say another.
            _set_pg_timeout(timedelta(seconds=world.timeout_s), group)
    return Meshes(dense, other, context)


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def agree_any(mine: bool, world: World) -> bool:
    """Return whether the answer is yes on any rank (a collective: every rank calls it)."""
    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=world.control)
    return bool(flag.item())


def tell_all(value: _T, world: World) -> _T:
    """Return rank 0's JSON-like value on every rank (a collective)."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.control)
    return box[0]


def first_complaint(complaint: str | None, world: World) -> str | None:
    """Return one message that names every rank with a complaint, or None when no rank has one (a
    collective).
    """
    boxes: list[str | None] = [None] * world.size
    dist.all_gather_object(boxes, complaint, group=world.control)
    told = [f"rank {rank}: {text}" for rank, text in enumerate(boxes) if text]
    return "\n".join(told) or None
