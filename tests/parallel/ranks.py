"""Run a function on several gloo ranks and collect what each returns."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 180


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    function: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    placement: tuple[int, ...],
    args: tuple,
    out: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    from motet.parallel.layout.layout import Layout
    from motet.parallel.runtime.mesh import join, leave

    torch.set_num_threads(1)
    try:
        joined = join("cpu", timeout_s=60, layout=Layout(placement=placement))
        result = function(joined, *args)
        leave()
        out.put((joined.rank, "ok", result))
    except BaseException:
        out.put((rank, "failed", traceback.format_exc()))


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, placement: tuple[int, ...] = ()
) -> list[Any]:
    """Return function(world, *args) of every rank; the function must be importable, the results
    picklable.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.preloaded"])
    out = context.Queue()
    port = free_port()
    ranks = [
        context.Process(
            target=_rank, args=(function, rank, world, port, placement, args, out), daemon=True
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in ranks:
            rank, state, value = out.get(timeout=TIMEOUT_S)
            assert state == "ok", f"rank {rank}:\n{value}"
            results[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]
