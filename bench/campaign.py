"""Faults of every kind against real runs, each with what should happen and what did.

    python bench/campaign.py [--slurm] [--cases WORD ...] [--again] [--json] [--list]
    python bench/campaign.py --soak MINUTES

A case passes when what should happen did, by computation: "equal to its twin" means losses,
gradient norms, probe arrays and all tensors of the last checkpoint bit for bit as those of a run
that nothing happened to, `experiments audit --replay` and `verify` passing. Finished cases are kept
in bench/results/campaign.json, and not done again unless --again; every case draws from a seed of
its own, which is kept with it. --slurm also does those of a testbed (docs/testbed.md; needs root).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests of the same faults have the tools

import campaign_damage
import campaign_disks
import campaign_kills
import campaign_slurm
import campaign_soak
from campaign_world import Case, World, Wrong

from motet.core.files import atomic_write

RESULTS = Path(__file__).parent / "results" / "campaign.json"
LOCAL: Sequence[Case] = (*campaign_kills.CASES, *campaign_disks.CASES, *campaign_damage.CASES)
NOT_SHOWN = (
    "kills of NCCL ranks, of DeepSpeed's and Accelerate's CUDA paths (fused optimizers, pinned "
    "memory, NCCL's own timeouts): no GPU takes part here"
)


def seed_of(case: Case, seed: int) -> int:
    """The seed that a case draws from."""
    return zlib.crc32(f"{seed}/{case.name}".encode())


def anywhere(text: str, world: World) -> str:
    """The same words without the folders of this machine."""
    for folder in (world.folder, Path(__file__).parents[1]):
        text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    return text


def judged(case: Case, world: World, seed: int) -> dict[str, Any]:
    """Let a case happen; one row of the table."""
    began = time.monotonic()
    try:
        did, passed = case.act(world.seeded(seed)), True
    except Wrong as error:
        did, passed = str(error), False
    except Exception as error:  # a case that cannot be carried out has not passed
        traceback.print_exc()
        did, passed = f"{type(error).__name__}: {error}", False
    return {
        "case": case.name,
        "group": case.group,
        "perfect": case.perfect,
        "did": " ".join(anywhere(did, world).split()),
        "passed": passed,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
        "date": date.today().isoformat(),
    }


def kept() -> dict[str, dict[str, Any]]:
    """Rows of the cases that were done before, by name."""
    if not RESULTS.exists():
        return {}
    return {row["case"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}


def keep(rows: dict[str, dict[str, Any]]) -> None:
    """Write the rows down, in the order of the cases."""
    known = [case.name for case in (*LOCAL, *campaign_slurm.CASES)]
    ordered = sorted(rows.values(), key=lambda row: known.index(row["case"]))
    RESULTS.parent.mkdir(exist_ok=True)
    text = json.dumps(ordered, indent=1, ensure_ascii=False) + "\n"
    atomic_write(RESULTS, text, private=False)


def campaign(cases: Sequence[Case], folder: Path, seed: int, again: bool) -> list[dict[str, Any]]:
    """Do what is not done yet; the rows of these cases."""
    names = {case.name for case in (*LOCAL, *campaign_slurm.CASES)}
    done = {name: row for name, row in kept().items() if name in names}
    todo = [case for case in cases if again or not done.get(case.name, {}).get("passed")]
    world = World(folder, seed) if todo else None
    for number, case in enumerate(todo, start=1):
        assert world is not None
        row = judged(case, world, seed_of(case, seed))
        done = {name: one for name, one in kept().items() if name in names} | {case.name: row}
        keep(done)
        mark = "ok" if row["passed"] else "FAILED"
        print(
            f"# {number}/{len(todo)} {mark} {row['seconds']:.0f} s, seed {row['seed']}: "
            f"{case.name}: {row['did']}",
            file=sys.stderr,
            flush=True,
        )
        for leftover in folder.glob("case-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return [done[case.name] for case in cases if case.name in done]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| case | perfect is | it did | |", "|---|---|---|---|"]
    for row in rows:
        did = row["did"].replace("|", "/")[:200]
        lines.append(
            f"| {row['case']} | {row['perfect']} | {did} | {'yes' if row['passed'] else '**no**'} |"
        )
    passed, seconds = sum(row["passed"] for row in rows), sum(row["seconds"] for row in rows)
    load = os.getloadavg()[1]
    lines.append(f"\n{passed} of {len(rows)} as they should; {seconds / 60:.0f} minutes; load of the machine {load:.1f}. Not shown: {NOT_SHOWN}.")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Do the cases, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--slurm", action="store_true", help="also those of a testbed")
    parser.add_argument("--cases", nargs="+", default=[], help="those with one of these words")
    parser.add_argument("--again", action="store_true", help="also those that passed before")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    arguments = parser.parse_args()
    cases = [*LOCAL, *(campaign_slurm.CASES if arguments.slurm else ())]
    words = arguments.cases
    cases = [c for c in cases if not words or any(w in f"{c.name} {c.group}" for w in words)]
    if arguments.list:
        print("\n".join(f"{case.group}: {case.name}" for case in cases))
        return 0
    with tempfile.TemporaryDirectory(prefix="motet-campaign-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if arguments.soak:
            return campaign_soak.main(World(folder, arguments.seed), arguments.soak, arguments.seed)
        try:
            rows = campaign(cases, folder, arguments.seed, arguments.again)
        finally:
            campaign_slurm.stop()
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    return 0 if rows and all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
