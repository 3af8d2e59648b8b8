"""Speed of searching a token file for the units of experiments, next to two scans that anyone could
write: a Python set of n-grams, and `datasketch`'s MinHash of every stretch of the corpus.

    python bench/decontaminate.py [--jsonl FILE] [--gb 1] [--units 2000] [--json]

The corpus is the file's text tokenized, its documents in random order again and again until there
are as many bytes; a unit in fifty is in it, half of those word for word, half with every tenth
token changed. All three search for the same units in one run of this file; peers read a part of
the corpus, since they take thousands of times longer, and their speed is per byte of what they
read. Ours finds runs of 13 tokens with their place and what is nearly a unit; the set finds 13-grams
and no more, the sketches what is nearly a unit and no more.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.corpora.matches import EXACT, NEAR, SHINGLE, Sought, TokenArray, matches
from motet.experiments.corpora.tokenizer import train_bpe

SPEECHES = Path(os.environ.get("MOTET_SHARED", "/work/shared")) / "data" / "speeches.jsonl"
LEAST, SIMILAR, UNIT_TOKENS = 13, 0.5, 60
SET_TOKENS, SKETCH_TOKENS = 2_000_000, 60_000
Ints = npt.NDArray[np.integer]


def write_corpus(documents: list[Ints], n_bytes: int, path: Path) -> npt.NDArray[np.uint16]:
    """Write documents in random order until there are `n_bytes`; return the file, mapped."""
    draw, written = np.random.default_rng(0), 0
    with path.open("wb") as file:
        while written < n_bytes:
            order = draw.permutation(len(documents))
            part = np.concatenate([documents[i] for i in order]).astype(np.uint16)
            written += file.write(part.tobytes()[: n_bytes - written])
    return np.memmap(path, np.uint16, "r")


def make_units(documents: list[Ints], count: int) -> list[Ints]:
    """Units of which every fiftieth is of the corpus; the others have its words in another
    order.
    """
    draw = np.random.default_rng(1)
    text = np.concatenate(documents)
    units = []
    for i, at in enumerate(draw.integers(0, len(text) - UNIT_TOKENS, count).tolist()):
        unit = text[at : at + UNIT_TOKENS].copy()
        if i % 50:
            unit = draw.permutation(unit)
        elif i % 100:
            unit[::10] = 3
        units.append(unit)
    return units


def ours(corpus: npt.NDArray[np.uint16], units: list[Ints]) -> dict[str, Any]:
    """Everything that is found, and how fast."""
    sought = [Sought(u, LEAST, np.ones(len(u) - SHINGLE + 1, dtype=bool), SIMILAR) for u in units]
    wall, processor = time.perf_counter(), time.process_time()
    found = [one for part in matches(TokenArray(corpus), sought) for one in part]
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {
        "mb": round(corpus.nbytes / 1e6),
        "wall_s": round(wall, 2),
        "cpu_s": round(processor, 2),
        "mb_per_s": round(corpus.nbytes / 1e6 / wall, 1),
        "mb_per_cpu_s": round(corpus.nbytes / 1e6 / processor, 1),
        "minutes_for_10_gb": round(1e4 / (corpus.nbytes / 1e6 / wall) / 60, 2),
        "exact_places": sum(one.how == EXACT for one in found),
        "near_places": sum(one.how == NEAR for one in found),
        "units_exact": len({one.text for one in found if one.how == EXACT}),
        "units_near": len({one.text for one in found if one.how == NEAR}),
    }


def set_scan(corpus: npt.NDArray[np.uint16], units: list[Ints]) -> dict[str, Any]:
    """Peer: a set of 13-grams."""
    tokens = corpus[:SET_TOKENS].tolist()
    wanted = {
        tuple(unit[i : i + LEAST].tolist()) for unit in units for i in range(len(unit) - LEAST + 1)
    }
    started = time.process_time()
    hits = sum(tuple(tokens[i : i + LEAST]) in wanted for i in range(len(tokens) - LEAST + 1))
    return _peer(2 * len(tokens), time.process_time() - started, hits)


def sketches(corpus: npt.NDArray[np.uint16], units: list[Ints]) -> dict[str, Any]:
    """Peer: MinHash of 128 permutations of overlapping stretches, looked up by banding."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILAR, num_perm=128)

    def sketch(tokens: Ints) -> MinHash:
        one = MinHash(num_perm=128)
        one.update_batch([shingle.tobytes() for shingle in _shingles(tokens)])
        return one

    for number, unit in enumerate(units):
        index.insert(number, sketch(unit.astype(np.uint16)))
    started, hits = time.process_time(), 0
    for at in range(0, SKETCH_TOKENS - UNIT_TOKENS, UNIT_TOKENS // 4):
        hits += len(index.query(sketch(np.array(corpus[at : at + UNIT_TOKENS]))))
    return _peer(2 * SKETCH_TOKENS, time.process_time() - started, hits)


def _shingles(tokens: Ints) -> Iterator[Ints]:
    return (tokens[i : i + SHINGLE] for i in range(len(tokens) - SHINGLE + 1))


def _peer(n_bytes: int, seconds: float, hits: int) -> dict[str, Any]:
    speed = n_bytes / 1e6 / seconds
    return {"mb": n_bytes / 1e6, "cpu_s": round(seconds, 2), "mb_per_cpu_s": speed, "hits": hits}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jsonl", type=Path, default=SPEECHES)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    lines = arguments.jsonl.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = train_bpe(texts, 8192)
    end = np.array([tokenizer.eod])
    documents = [np.concatenate([ids, end]) for ids in tokenizer.encode_batch(texts)]
    units = make_units(documents, arguments.units)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(documents, int(arguments.gb * 1e9), Path(folder) / "tokens.bin")
        found: dict[str, Any] = {
            "units": len(units),
            "motet": ours(corpus, units),
            "set_of_13_grams": set_scan(corpus, units),
            "minhash_of_stretches": sketches(corpus, units),
        }
    for peer in ("set_of_13_grams", "minhash_of_stretches"):
        faster = found["motet"]["mb_per_cpu_s"] / found[peer]["mb_per_cpu_s"]
        found[peer]["motet_is_times_faster"] = round(faster, 1)
    if arguments.json:
        print(json.dumps(found))
        return
    for part, values in found.items():
        print(part, values)


if __name__ == "__main__":
    main()
