"""Is an answer from a shared run the answer? `python bench/validity.py [--seeds 8] [--results FILE]
[--json] [--plot FILE] [--studies 1000]`.

(a) 1,000 studies without any effect, through the real assignment and analysis (`validity_null.py`):
the A/A control's p-values must be uniform, and the false-positive rate of the whole pipeline at its
nominal level.

(b) Real trainings: for every seed one run that holds all four experiments, and four that hold one
each; nothing else differs. Per experiment the difference of the two effects, shared minus alone, is
taken seed by seed, and its mean over seeds is tested for equivalence: two one-sided t-tests at 5 %
each, which is a 90 % interval that lies within the margin (Schuirmann, "A comparison of the two
one-sided tests procedure and the power approach", J. Pharmacokinetics and Biopharmaceutics 15,
1987). An experiment is then

    equivalent   the 90 % interval of the mean difference lies within the margin
    different    it does not, and the 95 % interval excludes 0
    not shown    neither: more seeds are needed, and the line says how many

The margins are declared in `MARGINS`. Seeds whose verdict differs between
shared and alone, and those whose interval holds 0 in one of the two only, are counted as flips.

Every training that ends is a line of `bench/results/validity.jsonl` (or `--results FILE`), and is
not done again: those of the published table are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import validity_null

from motet.experiments.library import generate

MARGINS = {"canaries": 0.3, "questions": 0.10, "facts": 0.1, "one_look": 0.005}
"""How far the mean effect may move, in the outcome's unit (bits, accuracy, nats/token, nats/token).

Fixed from the standard errors of one pilot run (0.38, 0.147, 0.13, 0.006) before further seeds were
trained: at most 0.85 of them, and less than a third of what such a run finds in 4 of 5 cases. An
effect that moved by 0.85 standard errors would still be covered by the printed 95 % interval in
86 % of runs.
"""
KEPT = Path(__file__).parent / "results" / "validity.jsonl"
POWER = 0.8
MOST_SEEDS = 1000
EXPERIMENTS = {
    "canaries": {
        "use": "memorization",
        "doses": [0, 8, 32],
        "generate": {"count": 45},
        "options": {"n_references": 15},
    },
    "questions": {"use": "contamination", "doses": [0, 8, 32], "generate": {"count": 60}},
    "facts": {
        "use": "knowledge",
        "generate": {"count": 40},
        "placement": "anywhere",
        "schedule": {"kind": "uniform", "window": [0.0, 0.95]},
    },
    "one_look": {"use": "forgetting"},
}
LOOKS, LOOK_CHARACTERS = 20, 110
"""Documents that are seen once: so short that all of them fit into the one step."""
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
    "batch": {"sequences": 6},
    "training": {
        "precision": "fp32",
        "optimizer": {"lr": 4e-3},
        "schedule": {"warmup_steps": 20},
        "bad_steps": {"spike_sigma": 0.0},
    },
    "checkpoint": {"every_steps": 0},
    "probes": {"every": 0.5},
    "layout": {"processes": 1, "device": "cpu", "micro_sequences": 6},
}


def motet(*arguments: str) -> str:
    """Run a command on one core and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "motet.launcher.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def settings_hash(steps: int) -> str:
    """What a kept training must have been made with to count."""
    text = json.dumps([EXPERIMENTS, LOOKS, RUN, steps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train(folder: Path, corpus: Path, seed: int, names: list[str], steps: int) -> dict[str, Any]:
    """Train one run with some of the experiments; the primary outcome and verdict of each."""
    name = f"seed{seed}-{arm_of(names)}"
    settings = json.loads(json.dumps(RUN)) | {"name": name, "seed": seed}
    settings["data"]["corpora"] = [{"path": str(corpus)}]
    settings["training"]["steps"] = steps
    entries = [{"name": key, **EXPERIMENTS[key]} for key in names]
    for entry in entries:
        if entry["name"] == "one_look":
            entry["items"] = str(short_documents(folder))
    settings["experiments"] = {"controls": False, "list": entries}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    motet("train", str(path))
    report = json.loads(motet("report", str(folder / "runs" / name), "--json"))
    kept = ("name", "unit", "effect", "low", "high", "p")
    return {
        entry["name"]: {key: entry["primary"][key] for key in kept}
        | {"verdict": entry["verdict"]["kind"]}
        for entry in report["answers"]["experiments"]
    }


def short_documents(folder: Path) -> Path:
    """The beginnings of invented documents, as items."""
    path = folder / "documents.jsonl"
    rows = generate.documents(("validity",), LOOKS, 1)
    texts = [row.texts[0][:LOOK_CHARACTERS].rsplit(" ", 1)[0] for row in rows]
    lines = [json.dumps({"id": f"document-{n}", "text": text}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arm_of(names: list[str]) -> str:
    return "all" if len(names) > 1 else names[0]


def trainings(seeds: int, steps: int, workers: int, results: Path | None) -> dict[Any, Any]:
    """All runs, {(seed, arm): answers}: those that the results file holds are read from it."""
    arms = [list(EXPERIMENTS), *([name] for name in EXPERIMENTS)]
    made_with, done, lock = settings_hash(steps), {}, threading.Lock()
    if results and results.exists():
        for row in map(json.loads, results.read_text().splitlines()):
            if row["settings"] == made_with:
                done[row["seed"], row["arm"]] = row["answers"]
    jobs = [(seed, names) for seed in range(seeds) for names in arms]
    missing = [job for job in jobs if (job[0], arm_of(job[1])) not in done]
    began = time.monotonic()

    def one(job: tuple[int, list[str]]) -> None:
        seed, names = job
        answers = train(folder, corpus, seed, names, steps)
        with lock:
            done[seed, arm_of(names)] = answers
            row = {"settings": made_with, "seed": seed, "arm": arm_of(names), "answers": answers}
            if results:
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            ended = len(missing) - sum((s, arm_of(n)) not in done for s, n in missing)
            spent = time.monotonic() - began
            print(f"{ended} of {len(missing)} trainings, {spent:.0f} s", file=sys.stderr)

    if missing:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            corpus = folder / "stdlib"
            words = ("--output", str(corpus), "--vocabulary-size", "2048")
            motet("data", "prepare", "stdlib:", *words)
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(one, missing))
    return {(seed, arm_of(names)): done[seed, arm_of(names)] for seed, names in jobs}


def pairs_of(found: dict[Any, Any], seeds: int) -> list[dict[str, Any]]:
    """One row per seed and experiment: shared, alone, difference, and what flipped."""
    pairs = []
    for seed in range(seeds):
        for name in EXPERIMENTS:
            shared, alone = found[seed, "all"][name], found[seed, name][name]
            holds_0 = [one["low"] <= 0 <= one["high"] for one in (shared, alone)]
            pairs.append(
                {
                    "seed": seed,
                    "experiment": name,
                    "outcome": shared["name"],
                    "unit": shared["unit"],
                    "shared": [shared["effect"], shared["low"], shared["high"]],
                    "alone": [alone["effect"], alone["low"], alone["high"]],
                    "difference": shared["effect"] - alone["effect"],
                    "verdicts": [shared["verdict"], alone["verdict"]],
                    "verdict_flips": shared["verdict"] != alone["verdict"],
                    "interval_flips": holds_0[0] != holds_0[1],
                    "alone_inside": shared["low"] <= alone["effect"] <= shared["high"],
                }
            )
    return pairs


def equivalence(differences: list[float], margin: float) -> dict[str, Any]:
    """Two one-sided t-tests of paired differences against +- margin.

    Returns the mean, its 90 % and 95 % interval, sd, p of the test and the verdict.
    """
    from statsmodels.stats.weightstats import DescrStatsW

    data = DescrStatsW(np.array(differences))
    low, high = data.tconfint_mean(0.10)
    wide = data.tconfint_mean(0.05)
    sd = float(np.std(differences, ddof=1))
    inside = -margin < low and high < margin
    verdict = "equivalent" if inside else "different" if wide[0] > 0 or wide[1] < 0 else "not shown"
    return {
        "pairs": len(differences),
        "margin": margin,
        "mean": float(data.mean),
        "low": float(low),
        "high": float(high),
        "wide": [float(end) for end in wide],
        "sd": sd,
        "p": float(data.ttost_mean(-margin, margin)[0]),
        "verdict": verdict,
    }


def pairs_needed(sd: float, room: float) -> int | None:
    """Pairs with which 4 of 5 such tests succeed when `room` is left to the nearer margin.

    The larger of two one-sided t-tests' demands at half the remaining error each (Chow, Shao, Wang,
    "Sample Size Calculations in Clinical Research", section 3.1, with t in place of normal
    quantiles). None: no room, or more than 1,000.
    """
    from scipy.stats import t

    if room <= 0:
        return None
    pairs = np.arange(2, MOST_SEEDS)
    spare = room * np.sqrt(pairs) / sd - t.ppf(0.95, pairs - 1)
    enough = pairs[2 * t.cdf(spare, pairs - 1) - 1 >= POWER]
    return int(enough[0]) if len(enough) else None


def judged(pairs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The equivalence test of every experiment, with its flips."""
    found = {}
    for name, margin in MARGINS.items():
        mine = [pair for pair in pairs if pair["experiment"] == name]
        test = equivalence([pair["difference"] for pair in mine], margin)
        found[name] = test | {
            "pairs_needed": pairs_needed(test["sd"], margin),
            "pairs_needed_at_this_mean": pairs_needed(test["sd"], margin - abs(test["mean"])),
            "unit": mine[0]["unit"],
            "verdict_flips": sum(pair["verdict_flips"] for pair in mine),
            "interval_flips": sum(pair["interval_flips"] for pair in mine),
            "alone_inside": sum(pair["alone_inside"] for pair in mine),
        }
    return found


def plot(pairs: list[dict[str, Any]], found: dict[str, Any], path: str) -> None:
    """Draw the difference of each seed, their mean with its 90 % interval, and the margin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(EXPERIMENTS), figsize=(12, 3.2), sharey=True)
    for axis, (name, test) in zip(axes, found.items(), strict=True):
        mine = [pair for pair in pairs if pair["experiment"] == name]
        axis.axvspan(-test["margin"], test["margin"], color="#0b6e6e", alpha=0.12, lw=0)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.plot([pair["difference"] for pair in mine], [p["seed"] for p in mine], "o", ms=4)
        axis.plot([test["low"], test["high"]], [-1.5, -1.5], color="#b35c00", linewidth=2)
        axis.plot(test["mean"], -1.5, "D", color="#b35c00", markersize=5)
        axis.set(title=f"{name}: {test['verdict']}", xlabel=f"shared - alone, {test['unit']}")
        axis.locator_params(axis="x", nbins=4)
    axes[0].set(ylabel="seed (below: mean, 90 %)", yticks=sorted({p["seed"] for p in pairs}))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def show(pairs: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """Print every pair, every test, and what flipped."""
    for pair in pairs:
        shared, alone = pair["shared"], pair["alone"]
        flips = [word for word in ("verdict", "interval") if pair[f"{word}_flips"]]
        print(
            f"seed {pair['seed']:2} {pair['experiment']:10} shared {shared[0]:+.3f} "
            f"[{shared[1]:+.3f}, {shared[2]:+.3f}]  alone {alone[0]:+.3f} [{alone[1]:+.3f}, "
            f"{alone[2]:+.3f}] {pair['unit']}  {', '.join(flips) and 'flips: ' + ', '.join(flips)}"
        )
    for name, test in found.items():
        needed = "more than can be run" if test["pairs_needed"] is None else test["pairs_needed"]
        print(
            f"{name:10} {test['mean']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}] "
            f"{test['unit']}, margin {test['margin']:g}, sd {test['sd']:.4f} over {test['pairs']} "
            f"seeds (a test with power {POWER:.0%} needs {needed} when there is no difference): "
            f"{test['verdict'].upper()}; verdict flips {test['verdict_flips']}, interval flips "
            f"{test['interval_flips']}, alone inside the shared interval {test['alone_inside']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", default="")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--results", type=Path, default=KEPT, help="keep ended trainings here, and go on from it"
    )
    arguments = parser.parse_args()
    if arguments.seeds == 1:
        parser.error("--seeds is 1; a mean difference needs at least 2 (0 leaves part b out)")
    result: dict[str, Any] = {}
    if arguments.studies:
        result["null"] = validity_null.summarize(
            validity_null.run(arguments.studies, arguments.workers)["default"]
        )
    if arguments.seeds:
        done = trainings(arguments.seeds, arguments.steps, arguments.workers, arguments.results)
        result["pairs"] = pairs_of(done, arguments.seeds)
        result["equivalence"] = judged(result["pairs"])
        if arguments.plot:
            plot(result["pairs"], result["equivalence"], arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    if "null" in result:
        null = result["null"]
        rate = null["family_wise_rate"]["rate"]
        print(f"no effect: A/A KS p {null['aa_ks_p']:.3f}, family-wise rate {rate:.3f}")
    if "pairs" in result:
        show(result["pairs"], result["equivalence"])


if __name__ == "__main__":
    main()
