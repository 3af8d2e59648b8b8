"""Is an answer from a shared run the answer? `python bench/validity.py [--json] [--plot FILE]
[--seeds 3] [--studies 1000]`.

(a) 1,000 studies without any effect, through the real assignment and analysis (`validity_null.py`):
the A/A control's p-values must be uniform, and the false-positive rate of the whole pipeline at its
nominal level. (b) Real trainings: for every seed one run that holds all four experiments, and four
that hold one each; nothing else differs. The
effect from the shared run must agree with the effect from the run that the experiment had for
itself: their difference lies within its 95 % interval, the two half-widths in quadrature as for
independent estimates. The runs share units, data and initial weights, so that interval is generous;
the share of effects alone that lie inside the shared run's own interval is given as well. At least
9 of 10 pairs must agree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import validity_null

EXPERIMENTS = {
    "canaries": {
        "use": "memorization",
        "doses": [0, 8, 32],
        "generate": {"count": 45},
        "options": {"n_references": 31},
    },
    "questions": {"use": "contamination", "doses": [0, 8, 32], "generate": {"count": 60}},
    "facts": {
        "use": "knowledge",
        "generate": {"count": 40},
        "placement": "anywhere",
        "schedule": {"kind": "uniform", "window": [0.0, 0.95]},
    },
    "one_look": {"use": "forgetting", "generate": {"count": 16}},
}
RUN = {
    "model": {
        "preset": "1m",
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "d_ffn": 192,
    },
    "data": {"sequence_length": 512},
    "batch": {"sequences": 12},
    "training": {
        "precision": "fp32",
        "optimizer": {"lr": 4e-3},
        "schedule": {"warmup_steps": 20},
        "bad_steps": {"spike_sigma": 0.0},
    },
    "checkpoint": {"every_steps": 0},
    "probes": {"every": 0.5},
    "layout": {"processes": 1, "device": "cpu", "micro_sequences": 12},
}


def motet(*arguments: str) -> str:
    """Run a command on one core and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "motet.launcher.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def effects(folder: Path, corpus: Path, seed: int, names: list[str], steps: int) -> dict[str, Any]:
    """Train one run with some of the experiments and return the primary outcome of each."""
    name = f"seed{seed}-{'all' if len(names) > 1 else names[0]}"
    settings = json.loads(json.dumps(RUN)) | {"name": name, "seed": seed}
    settings["data"]["corpora"] = [{"path": str(corpus)}]
    settings["training"]["steps"] = steps
    entries = [{"name": key, **EXPERIMENTS[key]} for key in names]
    settings["experiments"] = {"controls": False, "list": entries}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    motet("train", str(path))
    report = json.loads(motet("report", str(folder / "runs" / name), "--json"))
    return {entry["name"]: entry["primary"] for entry in report["answers"]["experiments"]}


def compare(joint: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Compare one effect of the shared run with the same effect alone."""
    half = [(one["high"] - one["low"]) / 2 for one in (joint, alone)]
    difference = joint["effect"] - alone["effect"]
    return {
        "outcome": joint["name"],
        "unit": joint["unit"],
        "joint": [joint["effect"], joint["low"], joint["high"]],
        "alone": [alone["effect"], alone["low"], alone["high"]],
        "difference": difference,
        "half_width": math.hypot(*half),
        "agrees": abs(difference) <= math.hypot(*half),
        "alone_inside_joint_interval": joint["low"] <= alone["effect"] <= joint["high"],
    }


def trainings(seeds: int, steps: int, workers: int) -> list[dict[str, Any]]:
    """Train all runs and return one comparison per (seed, experiment)."""
    names = list(EXPERIMENTS)
    jobs = [
        (seed, chosen) for seed in range(seeds) for chosen in [names, *([name] for name in names)]
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = folder / "stdlib"
        motet("data", "prepare", "stdlib:", "--output", str(corpus), "--vocabulary-size", "2048")
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda job: effects(folder, corpus, *job, steps), jobs))
    pairs = []
    for seed in range(seeds):
        joint = found[seed * 5]
        for number, name in enumerate(names):
            alone = found[seed * 5 + 1 + number]
            pairs.append({"seed": seed, "experiment": name, **compare(joint[name], alone[name])})
    return pairs


def plot(pairs: list[dict[str, Any]], path: str) -> None:
    """Draw each effect alone and in the shared run, one panel per experiment (units differ)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(EXPERIMENTS), figsize=(12, 3.2))
    for axis, name in zip(axes, EXPERIMENTS, strict=True):
        mine = [pair for pair in pairs if pair["experiment"] == name]
        for row, pair in enumerate(mine):
            for shift, key, color in ((-0.12, "joint", "#0b6e6e"), (0.12, "alone", "#b35c00")):
                effect, low, high = pair[key]
                label = {"joint": "shared run", "alone": "alone"}[key] if row == 0 else None
                axis.plot([low, high], [row + shift] * 2, color=color, label=label)
                axis.plot(effect, row + shift, "o", color=color, markersize=4)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set(title=name, xlabel=mine[0]["unit"], yticks=range(len(mine)))
        axis.set_yticklabels([f"seed {pair['seed']}" for pair in mine])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncol=2, loc="upper right")
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    if arguments.studies:
        result["null"] = validity_null.summarize(
            validity_null.run(arguments.studies, arguments.workers)
        )
    if arguments.seeds:
        pairs = trainings(arguments.seeds, arguments.steps, arguments.workers)
        result["pairs"] = pairs
        result["agreement"] = sum(pair["agrees"] for pair in pairs) / len(pairs)
        result["alone_inside_joint_interval"] = sum(
            pair["alone_inside_joint_interval"] for pair in pairs
        ) / len(pairs)
        if arguments.plot:
            plot(pairs, arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    if "null" in result:
        null = result["null"]
        print(
            f"no effect: A/A KS p {null['aa_ks_p']:.3f}, family-wise rate "
            f"{null['family_wise_rate']['rate']:.3f}"
        )
    for pair in result.get("pairs", []):
        joint, alone = pair["joint"], pair["alone"]
        print(
            f"seed {pair['seed']} {pair['experiment']:10} shared {joint[0]:+.3f} [{joint[1]:+.3f}, "
            f"{joint[2]:+.3f}]  "
            f"alone {alone[0]:+.3f} [{alone[1]:+.3f}, {alone[2]:+.3f}] {pair['unit']}  "
            f"{'agrees' if pair['agrees'] else 'DIFFERS'}"
        )
    if "pairs" in result:
        print(
            f"agreement {result['agreement']:.2f}; alone inside the shared run's interval "
            f"{result['alone_inside_joint_interval']:.2f}"
        )


if __name__ == "__main__":
    main()
