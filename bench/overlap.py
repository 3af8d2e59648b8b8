"""The time and recall of comparing experiments with each other, exactly and by MinHash.

python bench/overlap.py [--units 1000] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from motet.experiments.design import overlap
from motet.experiments.design.assignment import ask
from motet.experiments.design.known_overlaps import known_overlaps
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library import generate
from motet.experiments.library.kinds import Library


def seconds(run: Callable[[], Any]) -> float:
    """Processor time: other load on the machine is not ours."""
    started = time.process_time()
    run()
    return time.process_time() - started


def compare(count: int) -> dict[str, float]:
    """Seconds to compare two experiments, and pairs that MinHash finds of those that are there."""
    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder))
        path = ("documents", 1)
        rows = [
            [{"id": d.id, "text": d.texts[which]} for d in generate.documents(path, count, 4)]
            for which in (0, 0)
        ]
        entries = []
        for name, each in zip(("one", "two"), rows, strict=True):
            # Every third word of the second file is another one: Jaccard similarity about .5.
            text = "".join(json.dumps(_worn(row) if name == "two" else row) + "\n" for row in each)
            (Path(folder) / f"{name}.jsonl").write_text(text)
            entries.append({"name": name, "use": "forgetting", "items": f"{name}.jsonl"})
        specs, _ = parse_experiments(entries, Path(folder), library)
        questions = [ask(spec, 0, library) for spec in specs]
        sides = [overlap.Told(question) for question in questions]
        exact: list[Any] = []
        taken = seconds(lambda: exact.extend(overlap._near(*sides)))
        most, overlap.MOST_PAIRS = overlap.MOST_PAIRS, 0
        banded: list[Any] = []
        sketched = seconds(lambda: banded.extend(overlap._near(*sides)))
        overlap.MOST_PAIRS = most
        whole = seconds(lambda: overlap.find_overlaps(questions))
        os.environ["XDG_CACHE_HOME"] = folder
        assert known_overlaps(questions) == overlap.find_overlaps(questions)
        again = seconds(lambda: known_overlaps(questions))
        return {
            "units": count,
            "exact_s": round(taken, 3),
            "minhash_s": round(sketched, 3),
            "minhash_recall": round(len(set(banded) & set(exact)) / max(1, len(set(exact))), 3),
            "all_relations_s": round(whole, 3),
            "kept_s": round(again, 3),
        }


def _worn(row: dict[str, str]) -> dict[str, str]:
    words = row["text"].split()
    words[7::14] = ["mostly"] * len(words[7::14])
    return {**row, "text": " ".join(words)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = {"compare": compare(arguments.units)}
    if arguments.json:
        print(json.dumps(found))
        return
    for part, values in found.items():
        print(part, *(f"{name}={value}" for name, value in values.items()), sep="  ")


if __name__ == "__main__":
    main()
