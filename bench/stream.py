"""How fast the stream is read, with and without a plan: `python bench/stream.py [--json]`.

Batches of 32 sequences of 2,048 tokens from a corpus of 400 million tokens on disk, on one core,
digests included; the plan holds a million exposures of 100 tokens in as many slots as a
210-billion-token run has. Readings with and without alternate; the median pair counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from motet.experiments.corpora.corpus import Corpus, CorpusWriter
from motet.experiments.corpora.tokenizer import train_bpe
from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.stream.placement import Request, Texts, compile_plan
from motet.experiments.stream.random import text_keys
from motet.experiments.stream.stream import Stream

LENGTH, BATCH, EXPOSURES, SLOTS = 2048, 32, 1_000_000, 210_000_000_000 // 2048


def make_corpus(folder: Path, n_tokens: int) -> Corpus:
    """Write random documents of about 1,000 tokens."""
    tokenizer = train_bpe(["bench " * 100], 300)
    generator = np.random.default_rng(0)
    writer = CorpusWriter(folder, tokenizer)
    for start in range(0, n_tokens, 1000):
        writer.append(generator.integers(1, 300, 999, dtype=np.uint16), f"doc-{start}")
    writer.close()
    return Corpus.open(folder)


def make_plan(path: Path) -> ExposurePlan:
    """Write a plan of a million exposures."""
    tokens = np.random.default_rng(0).integers(1, 300, EXPOSURES * 100, dtype=np.uint16)
    rows = np.arange(EXPOSURES, dtype=np.int32)
    request = Request(
        "bench",
        text_keys([f"unit-{number}" for number in range(EXPOSURES)]),
        rows,
        np.zeros(EXPOSURES, dtype=np.int32),
        rows,
        np.zeros(EXPOSURES, dtype=np.int64),
        np.full(EXPOSURES, SLOTS),
        Texts(tokens, np.arange(EXPOSURES + 1, dtype=np.int64) * 100),
    )
    write_plan(compile_plan([request], 1, LENGTH), path)
    return ExposurePlan(path)


def seconds(stream: Stream, first: int, batches: int) -> float:
    """Return the time to read and digest consecutive batches."""
    started = time.perf_counter()
    for number in range(batches):
        stream.batch(first + number * BATCH, BATCH).digest()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=float, default=4e8, help="tokens of the corpus")
    parser.add_argument("--batches", type=int, default=240, help="batches per reading")
    parser.add_argument("--pairs", type=int, default=16)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus", int(arguments.tokens))
        plan = make_plan(Path(folder) / "exposures.plan")
        clean = Stream([corpus], [1.0], LENGTH, seed=1)
        planned = Stream([corpus], [1.0], LENGTH, seed=1, plan=plan)
        times = []
        for pair in range(arguments.pairs):
            first = pair * arguments.batches * BATCH * 37
            seconds(clean, first, arguments.batches)  # whoever reads first would pay for cold pages
            one, two = (planned, clean) if pair % 2 else (clean, planned)
            found = {id(one): seconds(one, first, arguments.batches)}
            found[id(two)] = seconds(two, first, arguments.batches)
            times.append((found[id(clean)], found[id(planned)]))
    ratio = statistics.median(b / a for a, b in times)
    best = statistics.median(b for _, b in times)
    result = {
        "tokens_per_s": arguments.batches * BATCH * LENGTH / best,
        "overhead_ratio": ratio,
        "pairs": len(times),
    }
    print(json.dumps(result) if arguments.json else result)


if __name__ == "__main__":
    main()
