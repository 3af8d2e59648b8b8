"""How good predictions are on runs they were not fitted to: `python bench/planner.py [--json]
[--peers]`.

`--rows FILE.csv --fit FILE.csv` does the same for files of your own with the columns of
`../shared/data/layouts/`: constants are fitted to the rows of --fit (without it: those that ship),
and every model and set of --rows is scored. `--where`, `--fit-where` COLUMN=VALUE,... take a part
of the rows, by columns of the file (several values: A|B). `--speed` measures one prediction.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner_fit import alike, answers, by_group, calibrate
from planner_peers import ESTIMATORS, missing, peer_answers
from planner_read import read
from planner_rows import Observation

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "layouts"
CLAIMS: list[tuple[str, str, str, str]] = [
    # what, file, rows to fit, rows to check
    ("13B-8k from 13B-2k", "llama13b_a100.csv", "seq_len=2048", "seq_len=8192"),
    ("256 GPUs from 64", "vtrain_gpt_a100.csv", "set=multi,gpus=64", "set=multi,gpus=256"),
    ("Mixtral", "moe_mixtral_h100.csv", "gpus=128", ""),
    ("MPT", "llm_foundry_mpt.csv", "precision=bf16|amp_bf16", ""),
    ("torchtitan", "torchtitan_benchmarks.csv", "precision=bf16", ""),
    ("Korthikanti", "korthikanti_table5.csv", "none", ""),
    ("AMP on T4", "amp_gpt2_t4.csv", "micro_batch=1|4|16", "micro_batch=2|8|32"),
    ("one node", "vtrain_gpt_a100.csv", "set=single,layers=12|24", "set=single,layers=16|20"),
]
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2)]
SCHEDULES += [("interleaved_1f1b", 4), ("zbv_zero_bubble", 2)]
COLUMNS = ("n", "mape", "spearman", "regret_mfu_points", "first_choice_fits", "oom_accuracy")
COLUMNS += ("false_fit_rate", "peak_memory_mape", "mfu_error_points", "interval_coverage")


def report(
    path: Path, rows: Sequence[Observation], fitted: Sequence[Observation], peers: bool
) -> dict[str, Any]:
    """Return scores of Motet by group, of peers if asked, and what was fitted."""
    constants, told = calibrate(alike(fitted, rows))
    found: dict[str, Any] = {
        "constants": told,
        "groups": by_group(rows, answers(rows, constants), path.name),
    }
    if peers:
        names = [n for n in ESTIMATORS if n != "llm-analysis" or missing() is None]
        found["peers"] = {
            name: by_group(rows, peer_answers(name, fitted, rows), path.name) for name in names
        }
    return found


def show(title: str, found: dict[str, Any]) -> None:
    """Print scores as a table."""
    print(f"\n{title}")
    for line in found["constants"] or ["constants as they ship"]:
        print(f"  {line}")
    tables = {"motet": found["groups"], **found.get("peers", {})}
    for who, groups in tables.items():
        for name, scored in groups.items():
            shown = [f"{c}={_text(scored.get(c))}" for c in COLUMNS if scored.get(c) is not None]
            print(f"  {who:22} {name}: {' '.join(shown)}")


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def speed() -> dict[str, float]:
    """Return microseconds of process time of one prediction among many layouts, and of a first
    one.
    """
    from motet.models.config import preset
    from motet.parallel.cluster.description import homogeneous
    from motet.parallel.cost.stages import Predictor, Training
    from motet.parallel.layout.layout import Layout

    model, cluster = preset("7b", 128_256), homogeneous("h100", 32, nic_gbit_s=400.0)
    layouts = [
        Layout(
            dp_replicate=rep, dp_shard=256 // (tp * pp * cp * rep), tp=tp, pp=pp, cp=cp, micro_sequences=micro,
            recompute=recompute, sequence_parallel=sp, schedule=schedule, virtual_stages=virtual,
        )
        for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8, 16) for cp in (1, 2, 4) for rep in (1, 2, 4, 8)
        for micro in (1, 2, 4, 8, 16) for recompute in ("none", "selective", "full") for sp in (False, True)
        for schedule, virtual in SCHEDULES
        if tp * pp * cp * rep <= 256 and (pp > 1 or schedule == "1f1b")
    ]  # fmt: skip
    gc.collect()
    gc.freeze()  # what else this process has imported is no part of a prediction
    began = time.process_time()
    predictor = Predictor(model, cluster, Training(2048, 8192))
    for layout in layouts:
        predictor.predict(layout)
    spent = time.process_time() - began
    return {"layouts": len(layouts), "microseconds_per_layout": 1e6 * spent / len(layouts)}


def main() -> None:
    """Run the claims, or the rows that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, help="CSV file of runs to predict")
    parser.add_argument("--fit", type=Path, help="CSV file of runs to fit constants to")
    parser.add_argument("--where", default="", help="COLUMN=VALUE,... of --rows")
    parser.add_argument("--fit-where", default="", help="COLUMN=VALUE,... of --fit")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers", action="store_true", help="score other estimators as well")
    parser.add_argument("--speed", action="store_true", help="time of one prediction, no rows")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    if given.speed:
        found["speed"] = speed()
        print(json.dumps(found["speed"]) if given.json else found["speed"])
        return
    if given.rows:
        fitted = read(given.fit, given.fit_where) if given.fit else []
        found[given.rows.name] = report(
            given.rows, read(given.rows, given.where), fitted, given.peers
        )
    else:
        if not DATA.is_dir():
            raise SystemExit(
                f"bench/planner.py: no measured runs in {DATA}; name a file with --rows"
            )
        for title, file, fit_where, where in CLAIMS:
            path = DATA / file
            fitted = [] if fit_where == "none" else read(path, fit_where)
            found[title] = report(path, read(path, where), fitted, given.peers)
    if given.json:
        groups = {name: scored for one in found.values() for name, scored in one["groups"].items()}
        json.dump({"groups": groups, "details": found}, sys.stdout, indent=1)
        print()
        return
    for title, one in found.items():
        show(title, one)


if __name__ == "__main__":
    main()
