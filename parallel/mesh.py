"""From a launch to process groups: who this process is, and how all of them agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """This process among all of the run's.

    Attributes:
        rank, size: its number, and how many there are.
        local_rank: its number on this node.
        device: where it computes.
        mesh: one dimension, "dp", over all ranks.
        control: a gloo group for small agreements, used by the main thread only.
        saving: a gloo group for checkpoints, used by whichever thread saves: collectives of two threads in one group would meet in
            different orders on different ranks.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup
    saving: dist.ProcessGroup


def choose_device(setting: str, local_rank: int) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if setting == "cuda" and not available:
        raise ValueError("layout.device=cuda, but torch sees no CUDA device here; use auto or cpu")
    if setting == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def join(device_setting: str, timeout_s: float = 600.0) -> World:
    """Join the process group that torchrun announced in the environment.

    Args:
        device_setting: "auto", "cpu" or "cuda".
        timeout_s: how long a collective waits for a silent rank before it fails.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    device = choose_device(device_setting, local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    control = dist.new_group(backend="gloo", timeout=timeout)
    saving = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, mesh, control, saving)


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
    """Return one message that names every rank with a complaint, or None when no rank has one (a collective)."""
    boxes: list[str | None] = [None] * world.size
    dist.all_gather_object(boxes, complaint, group=world.control)
    told = [f"rank {rank}: {text}" for rank, text in enumerate(boxes) if text]
    return "\n".join(told) or None
