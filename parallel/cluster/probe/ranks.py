"""What the ranks of `motet cluster probe` run: matrix products, copies, transfers and collectives,
timed.

Every function here that takes a `Measurer` is a collective: all ranks call it with the same values,
and get the same numbers.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from motet.parallel.runtime.mesh import World

COMPUTE_S = 0.7
"""How long each data type's products, and copies, are timed."""
MOST_WIDTH, LEAST_PRODUCT_S, COPY_BYTES = 8192, 0.02, 128 << 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all")
Flow = tuple[int, int]  # from rank, to rank


@dataclass
class Measurer:
    """This rank among those that measure.

    Attributes:
        world: see `mesh.World`; transfers use its default group, agreements the gloo group
            `control`.
        tell: takes a line on what is measured now.
    """

    world: World
    tell: Callable[[str], None]

    def wait(self) -> None:
        """Finish the device's work, then wait for all ranks."""
        self.sync()
        dist.barrier(group=self.world.control)

    def sync(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def share(self, value: float) -> list[float]:
        """Return every rank's value, by rank."""
        mine = torch.tensor([value], dtype=torch.float64)
        out = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(out, mine, group=self.world.control)
        return [float(one) for one in out]


def facts(measurer: Measurer) -> list[dict[str, Any]]:
    """Return what every rank stands on, by rank: host, device, memory, kind of network card."""
    device = measurer.world.device
    own_facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "local_rank": measurer.world.local_rank,
    }
    own_facts["network"] = network_kind()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        own_facts |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
    else:
        own_facts |= {
            "device": "cpu",
            "memory_gib": _host_memory_gib(),
            "threads": torch.get_num_threads(),
        }
    out: list[Any] = [None] * measurer.world.size
    dist.all_gather_object(out, own_facts, group=measurer.world.control)
    return out


def network_kind(root: Path = Path("/sys/class/infiniband")) -> str:
    """Return "infiniband" or "roce" where the kernel has such a linked card, else "ethernet"."""
    layers = set()
    for port in root.glob("*/ports/*"):
        try:
            if "ACTIVE" in (port / "state").read_text():
                layers.add((port / "link_layer").read_text().strip())
        except OSError:
            continue
    if "InfiniBand" in layers:
        return "infiniband"
    return "roce" if "Ethernet" in layers else "ethernet"


def _host_memory_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) / 2**20
    return 0.0


# --- one device


def _rate(measurer: Measurer, work: Callable[[], object], least_s: float = COMPUTE_S) -> float:
    """Return the median of runs per second of some work over about `least_s`; all ranks work at the
    same time.
    """
    work()
    measurer.wait()
    taken_s: list[float] = []
    ends = time.perf_counter() + least_s
    while time.perf_counter() < ends or not taken_s:
        start = time.perf_counter()
        work()
        measurer.sync()
        taken_s.append(time.perf_counter() - start)
    return 1 / statistics.median(taken_s)


def matmul_tflops(measurer: Measurer, name: str) -> float:
    """Return 10^12 operations per second of large products, as this rank reaches while all others
    work; 0 where a rank cannot.
    """
    product = _product(measurer, DTYPES[name])
    if min(measurer.share(float(product is not None))) == 0:
        return 0.0
    assert product is not None
    width = len(product)
    factor = torch.ones_like(product)
    return _rate(measurer, lambda: torch.mm(factor, factor, out=product)) * 2 * width**3 / 1e12


def _product(measurer: Measurer, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a square matrix whose product takes about 20 ms or more, so that a slow device gets no
    large one; None without products.
    """
    width = 512
    while True:
        try:
            factor = torch.ones(width, width, dtype=dtype, device=measurer.world.device)
            product = torch.mm(factor, factor)  # also loads the library
            measurer.sync()
            start = time.perf_counter()
            torch.mm(factor, factor, out=product)
            measurer.sync()
        except RuntimeError:
            return None
        if time.perf_counter() - start > LEAST_PRODUCT_S or width >= MOST_WIDTH:
            return product
        width *= 2


def copy_gb_s(measurer: Measurer) -> float:
    """Return 10^9 bytes per second, read and written, of copies from memory to memory."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=measurer.world.device)
    target = torch.empty_like(source)
    return _rate(measurer, lambda: target.copy_(source)) * 2 * COPY_BYTES / 1e9


# --- between devices


class Transfers:
    """Buffers for flows from rank to rank."""

    def __init__(self, measurer: Measurer) -> None:
        self.measurer = measurer
        self.buffer = torch.zeros(0, dtype=torch.uint8, device=measurer.world.device)
        self.word = torch.zeros(4, dtype=torch.uint8, device=measurer.world.device)
        dist.all_reduce(
            torch.zeros(1, device=measurer.world.device)
        )  # NCCL connects all ranks at once

    def seconds(self, flows: Sequence[Flow], size: int) -> list[float]:
        """Return how long each flow took to send `size` bytes and have them acknowledged; all flows
        go at once.

        Both ends greet each other first, so that the clock does not start before the receiver is
        ready.
        """
        self.measurer.wait()
        rank, took_s = self.measurer.world.rank, 0.0
        for sender, receiver in flows:
            if rank in (sender, receiver):
                other = receiver if rank == sender else sender
                self._turn(rank == sender, other, self.word)
                start = time.perf_counter()
                self._turn(rank == sender, other, self._bytes(size))
                took_s = time.perf_counter() - start
        everyone = self.measurer.share(took_s)
        return [everyone[sender] for sender, _ in flows]

    def _bytes(self, size: int) -> torch.Tensor:
        if len(self.buffer) < size:
            self.buffer = torch.zeros(size, dtype=torch.uint8, device=self.measurer.world.device)
        return self.buffer[:size]

    def _turn(self, sending: bool, other: int, data: torch.Tensor) -> None:
        """Send bytes and wait for a word, or take bytes and send a word."""
        self._do(dist.isend if sending else dist.irecv, data, other)
        self._do(dist.irecv if sending else dist.isend, self.word, other)

    def _do(self, call: Callable[..., Any], data: torch.Tensor, other: int) -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(call, data, other)]):
            work.wait()
        self.measurer.sync()


def collective_seconds(
    measurer: Measurer, kind: str, group: Any, ranks: int, size: int
) -> list[float]:
    """Return the seconds of a collective of `size` bytes until the last rank has it; ranks outside
    of `group` wait.

    Args:
        group: None on ranks that are not in it.
        ranks: of the group.
    """
    measurer.wait()
    took_s = 0.0
    if group is not None:
        each = max(1, size // 4 // ranks)
        device = measurer.world.device
        whole = torch.zeros(each * ranks, device=device)
        other = torch.empty_like(whole)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # all are ready
        measurer.sync()
        start = time.perf_counter()
        if kind == "all_reduce":
            dist.all_reduce(whole, group=group)
        elif kind == "all_gather":
            dist.all_gather_into_tensor(other, whole[:each], group=group)
        else:
            dist.all_to_all_single(other, whole, group=group)
        measurer.sync()
        took_s = time.perf_counter() - start
    return [max(measurer.share(took_s))]


def bus_share(kind: str, ranks: int) -> float:
    """Return the bytes that each rank sends, over the bytes of the collective (ring algorithms)."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks
