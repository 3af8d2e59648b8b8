"""Every layout against one process, through `motet train`: `python bench/layouts.py [--json]
[--only TEXT] [--pairs]`.

Each row is a run of its own: 20 steps, four experiments, probes, checkpoints and a ledger, on text
of the Python standard library.
Compared with the run of one process: losses and gradient norms of all steps (largest relative
difference), final weights (largest absolute difference), the slots and exposures of every step as
the ledger has them, probe scores, and `motet experiments audit`. With `--pairs` a run is trained
under one layout, and resumed from its checkpoint at step 10 under another.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MOTET = [sys.executable, "-m", "motet.launcher.cli"]
STEPS = 20
RUN_YAML = """
name: one
seed: 3
model: {{preset: 1m, d_model: 64, n_layers: 4, n_heads: 4, n_kv_heads: 2, d_ffn: 128, head_dim: 16}}
data: {{sequence_length: 256, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 16}}
training: {{steps: 20, precision: fp32, optimizer: {{lr: 1.0e-3}}, schedule: {{kind: constant, warmup_steps: 4}}}}
checkpoint: {{every_steps: 10}}
layout: {{device: cpu, micro_sequences: 4}}
experiments:
  draws: 200
  list:
    - {{name: canaries, use: memorization, doses: [0, 2], generate: {{count: 12}}, options: {{n_references: 7}}}}
    - {{name: facts, use: knowledge, generate: {{count: 10}}, placement: anywhere, schedule: {{every: 2, start: 1}}}}
"""
MOE = [
    "model.n_experts=4",
    "model.experts_per_token=2",
    "model.d_expert=32",
    "model.n_shared_experts=1",
    "model.balance_loss=0.01",
    "model.router_z_loss=0.001",
    "model.n_dense_layers=1",
]
DENSE_ROWS = {
    "FSDP 2": "dp_shard=2",
    "FSDP 4": "dp_shard=4",
    "FSDP 8": "dp_shard=8 micro_sequences=2",
    "replicas 2": "dp_replicate=2",
    "HSDP 2x2": "dp_replicate=2 dp_shard=2",
    "uneven replicas 3:1": "dp_replicate=2 shares=[3,1]",
    "uneven HSDP 3:1 x2": "dp_replicate=2 dp_shard=2 shares=[3,1] micro_sequences=2",
    "TP 2": "tp=2",
    "TP 2, no sequence parallel": "tp=2 sequence_parallel=false",
    "TP 2, whole logits": "tp=2 vocabulary_parallel=false",
    "CP 2": "cp=2",
    "CP 4": "cp=4",
    "PP 2, 1F1B": "pp=2",
    "PP 2, GPipe": "pp=2 schedule=gpipe",
    "PP 2, uneven stages 1+3": "pp=2 stage_layers=[1,3]",
    "PP 4, 1F1B": "pp=4",
    "PP 2, interleaved": "pp=2 virtual_stages=2 schedule=interleaved_1f1b",
    "PP 2, zero bubble": "pp=2 virtual_stages=2 schedule=interleaved_zero_bubble",
    "PP 2, ZBV": "pp=2 virtual_stages=2 schedule=zbv_zero_bubble",
    "FSDP 2 x TP 2": "dp_shard=2 tp=2",
    "FSDP 2 x CP 2": "dp_shard=2 cp=2",
    "FSDP 2 x PP 2, interleaved": "dp_shard=2 pp=2 virtual_stages=2 schedule=interleaved_1f1b",
    "TP 2 x PP 2": "tp=2 pp=2",
    "TP 2 x CP 2": "tp=2 cp=2",
    "CP 2 x PP 2": "cp=2 pp=2",
    "HSDP 2x2 x TP 2": "dp_replicate=2 dp_shard=2 tp=2",
    "FSDP 2 x TP 2 x PP 2": "dp_shard=2 tp=2 pp=2",
    "CP 2 x TP 2 x PP 2, ZBV": "cp=2 tp=2 pp=2 virtual_stages=2 schedule=zbv_zero_bubble",
    "FSDP 2 x TP 2, placed 3,1,0,2": "dp_shard=2 tp=2 placement=[3,1,0,2]",
    "ZeRO 1": "engine=deepspeed zero_stage=1 dp_shard=2",
    "ZeRO 2": "engine=deepspeed zero_stage=2 dp_shard=2",
    "ZeRO 3": "engine=deepspeed zero_stage=3 dp_shard=2",
    "Accelerate FSDP2": "engine=accelerate dp_shard=2",
}
EXPERT_ROWS = {
    "MoE, FSDP 2": "dp_shard=2",
    "MoE, EP 2": "dp_shard=2 ep=2",
    "MoE, EP 4": "dp_shard=4 ep=4",
    "MoE, ETP 2": "dp_shard=2 etp=2",
    "MoE, EP 2 x EDP 2": "dp_shard=4 ep=2",
    "MoE, folded: TP 2 x FSDP 2, EP 4": "dp_shard=2 tp=2 ep=4",
    "MoE, folded: TP 2 x FSDP 2, EP 2 x ETP 2": "dp_shard=2 tp=2 ep=2 etp=2",
    "MoE, folded: PP 2 x TP 2 x FSDP 2, EP 4": "dp_shard=2 tp=2 pp=2 ep=4",
}
PAIRS = [
    ("one", "FSDP 2 x TP 2"),
    ("FSDP 2", "TP 2"),
    ("FSDP 8", "PP 2, interleaved"),
    ("replicas 2", "CP 2"),
    ("HSDP 2x2", "TP 2 x PP 2"),
    ("TP 2", "uneven replicas 3:1"),
    ("CP 2", "PP 2, uneven stages 1+3"),
    ("PP 2, ZBV", "HSDP 2x2 x TP 2"),
    ("FSDP 2 x TP 2 x PP 2", "one"),
    ("FSDP 2", "ZeRO 2"),
    ("ZeRO 1", "FSDP 2"),
    ("ZeRO 3", "TP 2"),
    ("ZeRO 2", "ZeRO 3"),
    ("Accelerate FSDP2", "PP 2, 1F1B"),
    ("TP 2", "Accelerate FSDP2"),
    ("MoE, folded: TP 2 x FSDP 2, EP 4", "MoE, ETP 2"),
]
ROWS = {"one": "", **DENSE_ROWS, **EXPERT_ROWS}


def settings(row: str) -> list[str]:
    """Return the settings of a row, as `motet train` takes them."""
    words = ROWS[row].split()
    degrees = {"dp_replicate": 1, "dp_shard": 1, "tp": 1, "cp": 1, "pp": 1}
    degrees |= {k: int(v) for k, v in (word.split("=") for word in words) if k in degrees}
    processes = int(np.prod(list(degrees.values())))
    # Degrees that a row leaves out are said too: a resumed run keeps those of the row before.
    everything = {
        "engine": "native", "ep": 1, "etp": 1, "stage_layers": "[]", "virtual_stages": 1, "schedule": "1f1b",
        "micro_sequences": 4, "shares": "[]", "placement": "[]", "sequence_parallel": "true", "vocabulary_parallel": "true",
        **degrees, "processes": processes, **dict(word.split("=") for word in words),
    }  # fmt: skip
    experts = MOE if row.startswith("MoE") else []
    return [*(f"layout.{key}={value}" for key, value in everything.items()), *experts]


def motet(*arguments: str) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run(
        [*MOTET, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(
            f"motet {' '.join(arguments)}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
        )
    return done.stdout


def evidence(run: Path) -> dict[str, Any]:
    """Return what a finished run shows: numbers of every step, weights, consumed slots and
    exposures, probe scores.
    """
    from motet.experiments.stream.ledger import read_records
    from motet.launcher.commands.export import read_model
    from motet.launcher.runs.rundir import RunDir

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if row.get("kind") == "step"}
    consumed: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
    for segment in sorted((run / "ledger").glob("segment-*")):
        parts: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
        for path in segment.glob("rank-*.bin"):
            for record in read_records(path):
                part = (record.first_slot, record.count, tuple(record.exposure_ids.tolist()))
                parts.setdefault(record.step, []).append(part)
        consumed |= parts  # a resumed run reads some steps again
    motet("experiments", "audit", str(run))  # fails when an exposure was not consumed exactly once
    return {
        "loss": [steps[step]["loss"] for step in range(1, STEPS + 1)],
        "grad_norm": [steps[step]["grad_norm"] for step in range(1, STEPS + 1)],
        "weights": read_model(RunDir(run), STEPS)[1],
        "slots": {step: _cover(parts) for step, parts in consumed.items()},
        "exposures": {
            s: sorted(e for part in parts for e in part[2]) for s, parts in consumed.items()
        },
        "probes": {row["step"]: row["experiments"] for row in rows if row.get("kind") == "probe"},
    }


def _cover(parts: list[tuple[int, int, tuple[int, ...]]]) -> list[int]:
    """Return every slot of a step, in order, as often as it was consumed."""
    return sorted(slot for first, count, _ in parts for slot in range(first, first + count))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return the differences between two runs."""

    def relative(key: str) -> float:
        return float(np.abs(np.array(found[key]) / np.array(expected[key]) - 1).max())

    weights = max(
        float((found["weights"][name] - value).abs().max())
        for name, value in expected["weights"].items()
    )
    return {
        "loss_relative": relative("loss"),
        "grad_norm_relative": relative("grad_norm"),
        "weights_absolute": weights,
        "probes_absolute": _furthest(found["probes"], expected["probes"]),
        "slots_identical": found["slots"] == expected["slots"],
        "exposures_identical": found["exposures"] == expected["exposures"],
    }


def _furthest(found: Any, expected: Any) -> float:
    """Return the largest difference between two nested dictionaries of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), (found.keys(), expected.keys())
        return max((_furthest(found[key], expected[key]) for key in expected), default=0.0)
    return abs(float(found) - float(expected))


def verdict(row: dict[str, Any]) -> bool:
    """Return whether a row holds what the project promises."""
    return (
        row["loss_relative"] <= 1e-5
        and row["grad_norm_relative"] <= 1e-5
        and row["weights_absolute"] <= 1e-4
        and row["probes_absolute"] <= 1e-3
        and row["slots_identical"]
        and row["exposures_identical"]
    )


def train(folder: Path, row: str, name: str) -> Path:
    """Train a row from step 0."""
    motet("train", str(folder / "run.yaml"), f"name={name}", *settings(row))
    return folder / "runs" / name


def resumed(folder: Path, first: str, second: str, name: str) -> Path:
    """Train a row, throw away what came after the middle, and go on from there as another row."""
    run = train(folder, first, name)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "DONE").unlink()
    layout = [word for word in settings(second) if word.startswith("layout.")]
    motet("resume", str(run), *layout)
    return run


def measure(folder: Path, name: str, make: Any, expected: dict[str, Any] | None) -> dict[str, Any]:
    """Make a run and compare it; a row that fails to run says so and the table goes on."""
    started = time.perf_counter()
    try:
        found = evidence(make())
    except RuntimeError as error:
        return {"row": name, "ok": False, "error": str(error)[-2000:]}
    row: dict[str, Any] = {"row": name, "seconds": round(time.perf_counter() - started, 1)}
    if expected is None:
        return {**row, "evidence": found}
    row |= compare(found, expected)
    return {**row, "ok": verdict(row)}


def table(folder: Path, only: str, pairs: bool, say: Any) -> list[dict[str, Any]]:
    """Return the rows of the table, dense and expert rows each against one process."""
    rows = []
    for experts in (False, True):
        reference_row = "one"
        names = [r for r in (EXPERT_ROWS if experts else DENSE_ROWS) if only.lower() in r.lower()]
        chosen = [
            p
            for p in PAIRS
            if p[1].startswith("MoE") == experts and only.lower() in " ".join(p).lower()
        ]
        if not (chosen if pairs else names):
            continue
        kind = "experts" if experts else "dense"
        ROWS["MoE one"] = ""
        reference_row = "MoE one" if experts else "one"
        if pairs:
            base = measure(
                folder,
                kind,
                lambda r=reference_row, k=kind: resumed(folder, r, r, f"reference-{k}"),
                None,
            )
        else:
            base = measure(
                folder,
                kind,
                lambda r=reference_row, k=kind: train(folder, r, f"reference-{k}"),
                None,
            )
        if "evidence" not in base:
            raise SystemExit(base["error"])
        for number, item in enumerate(chosen if pairs else names):
            name = f"{kind}-{number}"
            if pairs:
                shown = " -> ".join(item)
                row = measure(
                    folder, shown, lambda i=item, n=name: resumed(folder, *i, n), base["evidence"]
                )
            else:
                row = measure(
                    folder, item, lambda i=item, n=name: train(folder, i, n), base["evidence"]
                )
            rows.append(row)
            say(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--pairs", action="store_true", help="resume under another layout")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "corpus"
        source = Path(sysconfig.get_path("stdlib"))
        if not corpus.exists():
            inputs = [str(source / name) for name in ("email", "json", "asyncio", "unittest")]
            motet("data", "prepare", *inputs, "--output", str(corpus), "--vocabulary-size", "1024")
        (folder / "run.yaml").write_text(RUN_YAML.format(corpus=corpus))
        rows = table(folder, options.only, options.pairs, lambda row: options.json or show(row))
    if options.json:
        print(json.dumps(rows))
    return 0 if all(row["ok"] for row in rows) else 1


def show(row: dict[str, Any]) -> None:
    """Print one row of the table."""
    if "error" in row:
        print(f"| {row['row']} | failed: {row['error'].strip().splitlines()[-1]} |", flush=True)
        return
    same = "identical" if row["slots_identical"] and row["exposures_identical"] else "DIFFERENT"
    print(
        f"| {row['row']} | {row['loss_relative']:.1e} | {row['grad_norm_relative']:.1e} | "
        f"{row['weights_absolute']:.1e} | "
        f"{row['probes_absolute']:.1e} | "
        f"{same} | {'yes' if row['ok'] else 'NO'} | {row['seconds']:.0f} s |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
