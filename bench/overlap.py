"""Speed of searching a corpus for units, next to a plain scan with a set of n-grams; and the time
and recall of comparing experiments with each other, exactly and by MinHash.

    python bench/overlap.py [--jsonl FILE] [--units 2000] [--repeats 3] [--json]

Peer: the loop that anyone would write, `tuple(tokens[i : i + 8]) in set`, over the same tokens; it
only says whether an 8-gram occurs, while ours compares whole runs and counts them. The corpus is the
file's text tokenized, and read as often as is needed for a million tokens (ours: twenty million).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from motet.experiments.corpora.occurrences import ANCHOR, TokenArray, occurrences
from motet.experiments.corpora.tokenizer import train_bpe
from motet.experiments.design import overlap
from motet.experiments.design.assignment import ask
from motet.experiments.design.known_overlaps import known_overlaps
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library import generate
from motet.experiments.library.kinds import Library

SPEECHES = Path(os.environ.get("MOTET_SHARED", "/work/shared")) / "data" / "speeches.jsonl"


def seconds(run: Callable[[], Any]) -> float:
    """Processor time: other load on the machine is not ours."""
    started = time.process_time()
    run()
    return time.process_time() - started


def plain_scan(tokens: list[int], wanted: set[tuple[int, ...]]) -> int:
    """The peer."""
    return sum(tuple(tokens[i : i + ANCHOR]) in wanted for i in range(len(tokens) - ANCHOR + 1))


def scan(jsonl: Path, units: int, repeats: int) -> dict[str, float]:
    """MB of text and tokens per second of both, and the ratio."""
    texts = [json.loads(line)["text"] for line in jsonl.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_bpe(texts, 4096)
    once = np.concatenate([*tokenizer.encode_batch(texts)])
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(once)
    generator = np.random.default_rng(0)
    runs = [once[at : at + 13] for at in generator.integers(0, len(once) - 13, units)]
    # As it is with a user's units: one in a hundred is in the corpus, the others are not.
    runs = [run if i % 100 == 0 else generator.permutation(run) for i, run in enumerate(runs)]
    corpus = np.tile(once, 1 + 20_000_000 // len(once))
    small = np.tile(once, 1 + 1_000_000 // len(once)).tolist()
    wanted = {tuple(run[:ANCHOR].tolist()) for run in runs}
    ours, peers = [], []
    for _ in range(repeats):
        ours.append(len(corpus) / seconds(lambda: occurrences(TokenArray(corpus), runs)))
        peers.append(len(small) / seconds(lambda: plain_scan(small, wanted)))
    assert occurrences(TokenArray(once), runs[::100]).min() >= 1
    mine, peer = statistics.median(ours), statistics.median(peers)
    return {
        "tokens_per_s": round(mine),
        "mb_per_s": round(mine * bytes_per_token / 1e6, 1),
        "peer_tokens_per_s": round(peer),
        "ratio": round(mine / peer, 1),
        "runs": len(runs),
    }


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
    parser.add_argument("--jsonl", type=Path, default=SPEECHES)
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = {"scan": scan(arguments.jsonl, arguments.units, arguments.repeats)}
    found["compare"] = compare(min(arguments.units, 1000))
    if arguments.json:
        print(json.dumps(found))
        return
    for part, values in found.items():
        print(part, *(f"{name}={value}" for name, value in values.items()), sep="  ")


if __name__ == "__main__":
    main()
