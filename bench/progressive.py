"""Families and operators of growth against training from scratch, on real text.

    python bench/progressive.py --text speeches.jsonl --json   train what is missing, then the table
    python bench/progressive.py --summary --json               what is kept; train nothing
    bench/gpu_family.sh                                        --scale gpu, on one GPU

Bytes of speeches, every tenth held out; one process. A model of 8 layers and width 64 on one
thread, fp32, or of 16 layers and width 896 on one GPU, bf16 (progressive_scales.py). All arms of a seed read the same sequences in the same order, and none twice.

    operators    a base trains 300 steps, grows, and trains 400 more (ARMS in progressive_arms.py
                 has the exceptions). The learning rate is warmed up and stays. `flops_speedup`:
                 FLOPs at which training from scratch has the arm's last loss, over the arm's own,
                 base included. Both losses are read off lines through neighbouring measurements.
    family       preset yano2025 over 1, 2, 4 and 8 layers against each alone with as many FLOPs as
                 its lineage had. `flops_share`: of the family, over the sum of all alone.

The learning rate is that of the lowest loss from scratch, of `GRID`, on a seed that no arm has;
growth has the same, so that what it saves is not a rate. Means over seeds, with 95 % intervals by
Student's t. An arm that ends is a row of `--results`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import progressive_arms as arms
import torch
from progressive_scales import SCALES, Scale
from scipy import stats

from motet.core.files import write_json
from motet.parallel.runtime.mesh import join, leave

SHARED = Path(os.environ.get("MOTET_SHARED", "../shared"))
RESULTS = Path(__file__).parent / "results"
KEPT = {"cores": "progressive.json", "gpu": "progressive_gpu.json", "tiny": "progressive_tiny.json"}
TUNING_SEED = 100
NEIGHBOURS = 5
NOT_OPERATORS = ("scratch", "family", "family-alone")
Row = Mapping[str, Any]


def fingerprint(scale: Scale, arm: str, lr: float) -> str:
    """Return what a kept row must have been made with to count."""
    told: list[Any] = [arm, lr, repr(scale.whole), scale.sequences, scale.length, scale.held_out]
    told += [scale.held_out_often, scale.every, scale.warmup, scale.rewarm, scale.fall]
    lengths: dict[str, list[Any]] = {
        "scratch": [scale.scratch],
        "tuning": [scale.tuning],
        "vcycle": [scale.cycle],
        "incremental": [scale.increment],
        "family": [scale.family, scale.depths],
        "family-alone": [scale.family, scale.depths],
        "ligo": [scale.learn],
        "mango": [scale.learn],
    }
    told += lengths.get(arm, [scale.base, scale.grown])
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def kept_rows(results: Path, scale: Scale) -> list[dict[str, Any]]:
    """Return the rows that were made as arms are made now."""
    rows = json.loads(results.read_text()) if results.exists() else []
    return [row for row in rows if row["settings"] == fingerprint(scale, row["arm"], row["lr"])]


def tuned(rows: Sequence[Row], grid: Sequence[float]) -> float | None:
    """Return the learning rate of the lowest loss, or the only one; None before all of the grid has
    trained.
    """
    if len(grid) == 1:
        return grid[0]
    found = {row["lr"]: row["loss"] for row in rows if row["arm"] == "tuning"}
    return min(found, key=lambda lr: found[lr]) if found.keys() >= set(grid) else None


def train_missing(
    results: Path,
    text: Path,
    seeds: int,
    asked: Sequence[str],
    scale: Scale,
    device: str = "cpu",
    budget_s: float = math.inf,
) -> None:
    """Train what the results file lacks: all seeds of the questions in turn.

    Args:
        budget_s: no arm begins after it.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    world, rows, began = join(device), kept_rows(results, scale), time.monotonic()

    def keep(arm: str, seed: int, lr: float, made: Row) -> None:
        settings = fingerprint(scale, arm, lr)
        told = {"settings": settings, "arm": arm, "seed": seed, "lr": lr, **made}
        rows.append(told)
        write_json(results, rows)
        short = {key: value for key, value in told.items() if key != "curve"}
        print(json.dumps(short), file=sys.stderr, flush=True)

    for lr in scale.grid if len(scale.grid) > 1 else ():
        if not any((row["arm"], row["lr"]) == ("tuning", lr) for row in rows):
            keep(
                "tuning",
                TUNING_SEED,
                lr,
                arms.tuning(arms.Text(text, TUNING_SEED, scale), world, lr),
            )
    chosen = tuned(rows, scale.grid)
    assert chosen is not None
    parts = (asked[: list(asked).index("incremental")] if "incremental" in asked else asked, asked)
    for part in parts:
        for seed in range(seeds):
            data = arms.Text(text, seed, scale)
            there = {row["arm"] for row in rows if (row["seed"], row["lr"]) == (seed, chosen)}
            for arm in part:
                if arm not in there and time.monotonic() < began + budget_s:
                    keep(arm, seed, chosen, arms.ARMS[arm](data, world, chosen))
    leave()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds with its 95 % interval (Student's t; None for one seed)."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "interval": None}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def last_loss(row: Row) -> float:
    """Return the loss at the end of a curve: of a line through its last measurements, which differ
    by chance.
    """
    curve = np.array(row["curve"])[-NEIGHBOURS:]
    _slope, level = np.polyfit(curve[:, 0] - curve[-1, 0], curve[:, 2], 1)
    return float(level)


def speedup(row: Row, scratch: Row) -> tuple[float, bool]:
    """Return the FLOPs from scratch over an arm's, at the arm's last loss; and whether that loss is
    below all that were reached from scratch, so that the number is too low.
    """
    flops, _, loss = np.array(scratch["curve"]).T
    half = NEIGHBOURS // 2
    at = range(half, len(flops) - half)
    smooth = [_line_at(flops, loss, n, half, flops[n]) for n in at]
    smooth.append(_line_at(flops, loss, len(flops) - 1 - half, half, flops[-1]))
    places = [*(flops[n] for n in at), flops[-1]]
    wanted = last_loss(row)
    falling = np.minimum.accumulate(smooth)
    needed = float(np.interp(-wanted, -falling, np.log(places)))
    return float(np.exp(needed)) / row["flops"], bool(wanted < falling[-1])


def _line_at(x: Any, y: Any, centre: int, half: int, where: float) -> float:
    near = slice(centre - half, centre + half + 1)
    _slope, level = np.polyfit(x[near] - where, y[near], 1)
    return float(level)


def operator_lines(by: Mapping[tuple[str, int], Row], seeds: int) -> Iterator[dict[str, Any]]:
    """Yield one line for each operator, over the seeds that it and scratch have."""
    for arm in arms.ARMS:
        mine = [s for s in range(seeds) if (arm, s) in by and ("scratch", s) in by]
        if arm in NOT_OPERATORS or not mine:
            continue
        found = [speedup(by[arm, seed], by["scratch", seed]) for seed in mine]
        told = spread([value for value, _ in found])
        yield {
            "operator": arm,
            "seeds": mine,
            "flops_speedup": told["mean"],
            "interval": told["interval"],
            "each": [round(value, 4) for value, _ in found],
            "at_least": any(below for _, below in found),
            "loss": float(np.mean([last_loss(by[arm, seed]) for seed in mine])),
            "loss_scratch_end": float(np.mean([last_loss(by["scratch", s]) for s in mine])),
        }


def family_line(by: Mapping[tuple[str, int], Row], seeds: int) -> dict[str, Any] | None:
    """Return the family against its members alone; None before a seed has both."""
    mine = [s for s in range(seeds) if ("family", s) in by and ("family-alone", s) in by]
    if not mine:
        return None
    pairs = [(by["family", seed], by["family-alone", seed]) for seed in mine]
    members = []
    for name in pairs[0][0]["members"]:
        losses, without = ([pair[which]["members"][name] for pair in pairs] for which in (0, 1))
        gap = spread([a - b for a, b in zip(losses, without, strict=True)])
        flops = [pair["member_flops"][name] for pair in pairs[0]]
        members.append(
            {
                "member": name,
                "loss": float(np.mean(losses)),
                "loss_alone": float(np.mean(without)),
                "gap": gap["mean"],
                "interval": gap["interval"],
                "flops_over_alone": flops[0] / flops[1],
            }
        )
    kl, kl_alone = ([float(np.mean(pair[which]["kl"])) for pair in pairs] for which in (0, 1))
    return {
        "seeds": mine,
        "flops_share": float(np.mean([one["flops"] / other["flops"] for one, other in pairs])),
        "members": members,
        "kl": float(np.mean(kl)),
        "kl_alone": float(np.mean(kl_alone)),
        "kl_change": spread([a - b for a, b in zip(kl, kl_alone, strict=True)]),
        "kl_pairs": np.mean([pair[0]["kl"] for pair in pairs], axis=0).tolist(),
        "kl_pairs_alone": np.mean([pair[1]["kl"] for pair in pairs], axis=0).tolist(),
    }


def summary(rows: Sequence[Row], seeds: int, grid: Sequence[float]) -> dict[str, Any]:
    """Return the table of what is kept, and what is lacking."""
    lr = tuned(rows, grid)
    by = {(row["arm"], row["seed"]): row for row in rows if row["lr"] == lr}
    lacking = [f"{arm}, seed {s}" for s in range(seeds) for arm in arms.ARMS if (arm, s) not in by]
    return {
        "lr": lr,
        "operators": list(operator_lines(by, seeds)),
        "family": family_line(by, seeds),
        "cpu_s": round(sum(row["cpu_s"] for row in rows)),
        "lacking": lacking,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=SHARED / "data" / "speeches.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="default: of the scale, in bench/results")
    parser.add_argument("--scale", choices=list(SCALES), default="cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="begin no arm after it")
    parser.add_argument("--arms", nargs="+", choices=list(arms.ARMS), default=list(arms.ARMS))
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {**one, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    scale, results = SCALES[asked.scale], asked.results or RESULTS / KEPT[asked.scale]
    if not asked.summary:
        limits = (asked.device, asked.budget_s)
        train_missing(results, asked.text, asked.seeds, asked.arms, scale, *limits)
    found = summary(kept_rows(results, scale), asked.seeds, scale.grid)
    if found["lacking"]:
        print(f"not trained yet: {'; '.join(found['lacking'])}", file=sys.stderr)
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    for line in found["operators"]:
        low, high = line["interval"] or (float("nan"),) * 2
        more = " or more" if line["at_least"] else ""
        print(f"{line['operator']:20} {line['flops_speedup']:.2f}x ({low:.2f} to {high:.2f}){more}")
    if found["family"]:
        print(json.dumps(found["family"], indent=1))


if __name__ == "__main__":
    main()
