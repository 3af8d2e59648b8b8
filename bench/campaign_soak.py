"""A random fault every half a minute, for a long time: `bench/campaign.py --soak MINUTES`."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from campaign_world import Trained, World, numbers_of, unlike

from motet.core.processes import children

EVERY_S, LOOK_S = 30.0, 2.0
START_S = 15.0
"""How long a start is thought to take: steps are paced so that all of them last for MINUTES."""
STEP_S = 0.25
GROWTH, MORE_FILES = 1.05, 8
"""A process may grow by so much, and have so many more descriptors, in the second half."""
RESULTS = Path(__file__).parent / "results" / "campaign_soak.json"


class Watch(threading.Thread):
    """Looks at memory and descriptors of every process of the run, by its role and age."""

    def __init__(self, one: Trained) -> None:
        super().__init__(daemon=True)
        self.one, self.over, self.began = one, threading.Event(), time.monotonic()
        self.seen: list[dict[str, Any]] = []

    def run(self) -> None:
        """Look every two seconds."""
        while not self.over.wait(LOOK_S):
            now = time.monotonic() - self.began
            for role, pid in self.roles():
                if found := usage(pid):
                    self.seen.append({"at_s": round(now, 1), "role": role, "pid": pid, **found})

    def roles(self) -> Iterator[tuple[str, int]]:
        """(role, process) of all that train now."""
        process = self.one.process
        if process is None or process.poll() is not None:
            return
        yield "motet", process.pid
        for agent in children(process.pid)[:1]:
            yield "torchrun", agent
        for number, pid in enumerate(self.one.ranks()):
            yield f"rank {number}", pid


def usage(pid: int) -> dict[str, float]:
    """Memory of a process in MiB (resident, anonymous), its descriptors and threads."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in status.splitlines())
    if "VmRSS" not in found:
        return {}
    mib = {
        name: round(int(found[key].split()[0]) / 1024, 1)
        for name, key in (("rss_mib", "VmRSS"), ("anon_mib", "RssAnon"))
    }
    return {**mib, "files": files, "threads": int(found["Threads"])}


def fault(one: Trained, world: World) -> str:
    """One random fault; the launch is begun anew where it ended."""
    kind = world.rng.choice(
        [
            "rank 0",
            "rank 1",
            "rank 0",
            "rank 1",
            "both ranks",
            "SIGSTOP",
            "SIGTERM",
            "torchrun",
            "everything",
        ]
    )
    ranks = one.ranks()
    if len(ranks) < 2:
        return "nobody"
    if kind == "SIGSTOP":
        pid = world.rng.choice(ranks)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(pid, signal.SIGCONT)
    elif kind in ("SIGTERM", "everything"):
        one.kill_all() if kind == "everything" else os.kill(one.pid, signal.SIGTERM)
        one.ends(0, -9)
        if not one.run.done.exists():
            one.start(STEP_S)
    elif kind == "torchrun":
        os.kill(one.torchrun(), signal.SIGKILL)
        one.ends(0, 1)
        if not one.run.done.exists():
            one.start(STEP_S)
    else:
        for pid in ranks if kind == "both ranks" else [ranks[kind == "rank 1"]]:
            os.kill(pid, signal.SIGKILL)
    return kind


def settings_of(steps: int, seed: int = 3) -> list[str]:
    """Of a run so long."""
    more = ["training.max_restarts=100000", "checkpoint.every_steps=10", "probes.every=0.1"]
    return [f"training.steps={steps}", f"seed={seed}", *more]


def soak(
    one: Trained, world: World, minutes: float
) -> tuple[list[str], list[dict[str, Any]], float]:
    """Let faults happen until the run has ended; (faults, what was seen, seconds)."""
    faults, watch, began = [], Watch(one), time.monotonic()
    one.start(STEP_S)
    watch.start()
    try:
        due = time.monotonic() + world.rng.expovariate(1.0 / EVERY_S)
        while not one.run.done.exists():
            over = time.monotonic() - began > 60.0 * minutes
            if over:
                one.pace(0.0)
            if (
                one.process is not None
                and one.process.poll() is not None
                and not one.run.done.exists()
            ):
                raise AssertionError(f"it ended: {one.said()[-1500:]}")
            if not over and time.monotonic() > due and len(one.ranks()) == 2 and progressed(one):
                faults.append(fault(one, world))
                print(
                    f"# {time.monotonic() - began:.0f} s, step {newest(one)}: {faults[-1]}",
                    file=sys.stderr,
                    flush=True,
                )
                due = time.monotonic() + world.rng.expovariate(1.0 / EVERY_S)
            time.sleep(0.1)
        one.ends(0)
    finally:
        watch.over.set()
        watch.join()
        one.close()
    return faults, watch.seen, time.monotonic() - began


def newest(one: Trained) -> int:
    """The newest step, by the run's record."""
    return max(numbers_of(one.run), default=0)


def progressed(one: Trained) -> bool:
    """Whether there is a checkpoint since the newest attempt began: deaths without one between
    them are a crash loop, which ends a run.
    """
    facts = one.attempts()
    return bool(facts) and (one.run.checkpoint_steps() or [0])[-1] > int(
        facts[-1]["start_step"] or 0
    )


def growth(seen: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """By role, the most of the first half of a soak and of the second.

    What lives for the whole soak is compared with itself; ranks with those that took their place.
    """
    out = {}
    end = max((row["at_s"] for row in seen), default=0.0)
    for role in sorted({row["role"] for row in seen}):
        mine = [row for row in seen if row["role"] == role]
        halves = [[r[key] for r in mine if (r["at_s"] > end / 2) is late] for late in (False, True)]
        if all(halves):
            out[role] = {"first": max(halves[0]), "second": max(halves[1])}
    return out


def main(world: World, minutes: float, seed: int) -> int:
    """Soak, compare, print."""
    steps = 10 * math.ceil(60.0 * minutes * 0.55 / STEP_S / 10)
    settings = settings_of(steps)
    print(f"# {steps} steps, seed {seed}", file=sys.stderr, flush=True)
    twin = world.twin(*settings, key="soak", wait_s=120.0 + 120.0 * minutes)
    one = world.new(*settings)
    faults, seen, seconds = soak(one, world, minutes)
    different = unlike(one.run, twin)
    mine, theirs = numbers_of(one.run), numbers_of(twin)
    ends = [
        statistics.fmean(loss for step, (loss, _) in found.items() if step > steps - 50)
        for found in (mine, theirs)
    ]
    memory, files = growth(seen, "anon_mib"), growth(seen, "files")
    flat = all(one["second"] <= one["first"] * GROWTH for one in memory.values())
    closed = all(one["second"] <= one["first"] + MORE_FILES for one in files.values())
    found = {
        "minutes": round(seconds / 60, 1), "steps": steps, "seed": seed, "faults": {k: faults.count(k) for k in sorted(set(faults))},
        "attempts": len(one.attempts()), "differs_in": different, "loss_of_last_50": ends,
        "memory_mib": memory, "descriptors": files, "memory_flat": flat, "descriptors_flat": closed,
        "looks": len(seen),
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    RESULTS.write_text(text + "\n")
    print(text)
    return 0 if not different and flat and closed else 1
