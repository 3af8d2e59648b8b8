"""Is p of the A/A control uniform where a model is really trained?

    python bench/placebo_trained.py [--seeds 12] [--further 9] [--results FILE] [--json]

Every seed is the example of `examples/trainer.py` as printed (transformers' Trainer, 120 steps),
with `seed` of its run.yaml and nothing else changed, but for `--further` A/A experiments beside the
control, whose texts are never shown either. Their assignments are drawn apart from each other, so
all p-values of all seeds are independent draws of one distribution, which must be uniform:
Kolmogorov-Smirnov p > .01, for the controls alone and for all. `validity_null.py` asks the same of
scores that are simulated; here scores come from a model that saw everything else in the run.
Trainings that ended are kept in `bench/results/placebo_trained.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from validity import motet
from validity_null import NOT_UNIFORM, uniformity

from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.analysis.answers import Answer
from motet.launcher.study.after_training import load_measured

EXAMPLES = Path(__file__).parents[1] / "examples"
KEPT = Path(__file__).parent / "results" / "placebo_trained.jsonl"
CONTROL = "aa-placebo"
DRAWS = 10_000


def settings(seed: int, further: int, corpus: Path) -> str:
    """The run.yaml of the example, with this seed and more A/A experiments."""
    text = (EXAMPLES / "run.yaml").read_text(encoding="utf-8")
    entries = f"  - {{name: {CONTROL}, use: placebo}}\n"
    for number in range(1, further + 1):  # one exposure of base text each: more find no place
        entries += f"  - {{name: aa-{number}, use: placebo, doses: [0, 1]}}\n"
    edits = {"seed: 1\n": f"seed: {seed}\n", "corpora/mine}": f"{corpus}}}"}
    for old, new in (edits | {"  list:\n": f"  list:\n{entries}"}).items():
        if text.count(old) != 1:
            raise SystemExit(f"{EXAMPLES / 'run.yaml'} does not hold {old!r} once")
        text = text.replace(old, new)
    return text


def train(seed: int, further: int, corpus: Path) -> dict[str, float]:
    """{experiment: p} of every A/A of one training."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "run.yaml").write_text(settings(seed, further, corpus), encoding="utf-8")
        words = [sys.executable, str(EXAMPLES / "trainer.py"), "run.yaml", "--cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return placebo_p(folder / "runs" / "guest")


def placebo_p(run: Path) -> dict[str, float]:
    """{experiment: p} of every A/A in a run folder; a report names only the smallest."""
    study = load_measured(run)
    if study.draws != DRAWS:
        raise SystemExit(f"{run}: {study.draws} draws instead of {DRAWS}")
    found = {}
    for measured in study.measured:
        if measured.experiment.role == "placebo":
            answer = Answer(measured, study.seed, study.draws, 1)
            found[measured.name] = answer.entry(details=False)["primary"]["p"]
    return found


def judged(found: list[dict[str, float]]) -> dict[str, Any]:
    """Smallest p and Kolmogorov-Smirnov p of the controls, and of all A/A experiments."""
    groups = {"controls": [one[CONTROL] for one in found]}
    groups["all"] = [p for one in found for p in one.values()]
    result: dict[str, Any] = {"seeds": len(found)}
    for name, values in groups.items():
        test = uniformity(values, DRAWS)
        result[name] = {"n": len(values), "min": min(values), "ks_p": test, "p": sorted(values)}
        result[name]["at_05"] = float(np.mean(np.array(values) <= 0.05))
    result["ok"] = all(result[name]["ks_p"] > NOT_UNIFORM for name in groups)
    return result


def trainings(seeds: int, further: int, results: Path | None) -> list[dict[str, float]]:
    """One training per seed; those that the results file holds are read from it."""
    example = [(EXAMPLES / name).read_text(encoding="utf-8") for name in ("trainer.py", "run.yaml")]
    made_with = sha256_hex(canonical_json([*example, further]))[:12]
    done: dict[int, dict[str, float]] = {}
    if results and results.exists():
        rows = map(json.loads, results.read_text(encoding="utf-8").splitlines())
        done = {row["seed"]: row["p"] for row in rows if row["settings"] == made_with}
    missing = [seed for seed in range(seeds) if seed not in done]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "stdlib"
        if missing:
            words = ("--output", str(corpus), "--vocabulary-size", "1024")
            motet("data", "prepare", "stdlib:", *words)
        for ended, seed in enumerate(missing, 1):
            done[seed] = train(seed, further, corpus)
            if results:
                row = {"settings": made_with, "seed": seed, "p": done[seed]}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            spent = time.monotonic() - began
            print(f"{ended} of {len(missing)} trainings, {spent:.0f} s", file=sys.stderr)
    return [done[seed] for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--further", type=int, default=9, help="A/A experiments beside the control")
    parser.add_argument(
        "--results", type=Path, default=KEPT, help="keep ended trainings here, and go on from it"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = judged(trainings(options.seeds, options.further, options.results))
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for name in ("controls", "all"):
        one = result[name]
        print(
            f"{name:9} n {one['n']:4}  smallest p {one['min']:.4f}  p <= .05: {one['at_05']:.1%}  "
            f"Kolmogorov-Smirnov p = {one['ks_p']:.3f}"
        )
    print("OK" if result["ok"] else "NOT OK")


if __name__ == "__main__":
    main()
