"""Run a function on several gloo ranks and collect what each returns."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import queue
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from motet.launcher.runs import extension_locks

TIMEOUT_S = 300
SILENT_S = (
    150  # no rank of a test computes so long, on however busy a machine: an extension compiles 40 s
)
LAST_WORDS_S = 10  # how long the other ranks may take to say what they waited for


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
    stacks: Path,
    out: Any,
) -> None:
    faulthandler.register(signal.SIGUSR1, file=stacks.open("w"))  # open as long as the rank lives
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
        joined = join("cpu", timeout_s=SILENT_S, layout=Layout(placement=placement))
        result = function(joined, *args)
        leave()
        out.put((joined.rank, "ok", result))
    except BaseException:
        out.put((rank, "failed", traceback.format_exc()))


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, placement: tuple[int, ...] = ()
) -> list[Any]:
    """Return function(world, *args) of every rank; the function must be importable, the results
    picklable. A failure tells what every other rank said, or where it stood.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.preloaded"])
    out = context.Queue()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, f"rank-{rank}") for rank in range(world)]
        ranks = [
            context.Process(
                target=_rank,
                args=(function, rank, world, port, placement, args, stacks[rank], out),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        results: dict[int, Any] = {}
        try:
            for _ in ranks:
                rank, state, value = _next(ranks, stacks, out)
                assert state == "ok", f"rank {rank}:\n{value}\n{_others(ranks, stacks, out)}"
                results[rank] = value
        finally:
            for process in ranks:
                process.join(timeout=5 if len(results) == world else 0)
                if process.is_alive():
                    extension_locks.drop(process.pid or 0)
                    process.kill()
    return [results[rank] for rank in range(world)]


def _next(ranks: list[Any], stacks: list[Path], out: Any) -> tuple[int, str, Any]:
    try:
        return out.get(timeout=TIMEOUT_S)  # type: ignore[no-any-return]
    except queue.Empty:
        raise AssertionError(
            f"no rank said anything for {TIMEOUT_S} s\n{_others(ranks, stacks, out)}"
        ) from None


def _others(ranks: list[Any], stacks: list[Path], out: Any) -> str:
    """Return where the ranks that still run stand, then what they say at last: of two that waited
    for each other, one report alone does not tell why.
    """
    for process, file in zip(ranks, stacks, strict=True):
        if process.is_alive() and file.exists():
            os.kill(process.pid, signal.SIGUSR1)
    told = []
    end = time.monotonic() + LAST_WORDS_S
    try:
        while True:
            rank, state, value = out.get(timeout=max(end - time.monotonic(), 0.1))
            told.append(f"rank {rank}, {state}:\n{value if state != 'ok' else ''}")
    except queue.Empty:
        pass
    stood = [
        f"rank {rank} stood at:\n{file.read_text()}"
        for rank, file in enumerate(stacks)
        if file.exists() and file.stat().st_size
    ]
    return "\n".join(stood + told)
