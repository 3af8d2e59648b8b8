"""What a run of very many experiments costs apart from training: its check and its report.

    python bench/many_experiments.py [--experiments 4 40 200] [--units 64] [--json]

Half of the experiments are canaries (16 probe items a unit), half questions (4), all invented, with
the two controls. Training is not done: probe scores are invented (`tests/launcher/invented.py`),
everything else is as the loop writes it. Seconds are the processor's; the cache of earlier searches
and simulations is empty at first (`check`, `report`), and full the second time (`again`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUN = {
    "seed": 1,
    "data": {"sequence_length": 128},
    "batch": {"sequences": 64},
    "training": {"steps": 40, "schedule": {"warmup_steps": 2}},
    "layout": {"processes": 1, "device": "cpu", "micro_sequences": 16},
    "probes": {"every": 0.25},
}
INVENT = """
import json, sys
from pathlib import Path
from tests.launcher import invented

class Many(invented.InventedRun):
    logs = True

folder, corpus, text = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).read_text()
run = Many(folder, corpus, lambda _: text)
run.train(
    json.loads(text)["training"]["steps"],
    gained=lambda name, step: 0.0 if name == "aa-placebo" else 3.0,
)
print(run.run.root)
"""


def entries(experiments: int, units: int) -> list[dict[str, Any]]:
    """Canaries and questions by turns, each shown once or never."""
    found: list[dict[str, Any]] = []
    for number in range(experiments):
        entry: dict[str, Any] = {"name": f"exp-{number:03d}", "doses": [0, 1]}
        entry |= {"use": "contamination", "generate": {"count": units, "seed": number}}
        if number % 2 == 0:
            entry |= {"use": "memorization", "options": {"n_references": 15}}
        found.append(entry)
    return found


def seconds(words: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Processor seconds of a command, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, done.stdout


def measure(experiments: int, units: int, folder: Path, corpus: Path) -> dict[str, Any]:
    """One row of the table."""
    # Room for all of them: a step for every 250 exposures, whichever run is longest.
    steps = max(40, experiments * units // 100)
    run = json.loads(json.dumps(RUN)) | {"name": f"many-{experiments}"}
    run["data"]["corpora"] = [{"path": str(corpus)}]
    run["training"]["steps"] = steps
    run["experiments"] = {"list": entries(experiments, units)}
    path = folder / f"many-{experiments}.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    yaml = folder / f"many-{experiments}.yaml"
    yaml.write_text(json.dumps(run), encoding="utf-8")
    paths = os.pathsep.join([str(ROOT / ".src"), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment |= {"XDG_CACHE_HOME": str(folder / f"cache-{experiments}")}
    motet = [sys.executable, "-m", "motet.launcher.cli"]
    row: dict[str, Any] = {"experiments": experiments, "units": units}
    row["check_s"], _ = seconds([*motet, "experiments", "check", str(yaml)], environment)
    row["check_again_s"], _ = seconds([*motet, "experiments", "check", str(yaml)], environment)
    words = [sys.executable, "-c", INVENT, str(folder), str(corpus), str(path)]
    _, printed = seconds(words, environment)
    root = Path(printed.strip().splitlines()[-1])
    row["report_s"], _ = seconds([*motet, "report", str(root)], environment)
    row["report_again_s"], _ = seconds([*motet, "report", str(root)], environment)
    row["report_mb"] = (root / "report.html").stat().st_size / 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, nargs="*", default=[4, 40, 200])
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if left out")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        corpus = folder / "corpus"
        if not corpus.exists():
            words = [sys.executable, "-m", "motet.launcher.cli", "data", "prepare", "stdlib:"]
            more = ["--output", str(corpus), "--vocabulary-size", "1024"]
            seconds([*words, *more], dict(os.environ))
        rows = [measure(count, asked.units, folder, corpus) for count in asked.experiments]
    if asked.json:
        print(json.dumps({"rows": rows}))
        return
    print("experiments  check     again     report    again     page")
    for row in rows:
        print(
            f"{row['experiments']:>11}  {row['check_s']:6.1f} s  {row['check_again_s']:6.1f} s  "
            f"{row['report_s']:6.1f} s  {row['report_again_s']:6.1f} s  {row['report_mb']:5.2f} MB"
        )


if __name__ == "__main__":
    main()
