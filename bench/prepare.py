"""Speed of `prepare` next to a bare loop over `tokenizers.encode_batch`, in MB of text per second.

    python bench/prepare.py [--jsonl FILE] [--repeats 5] [--json]

The bare loop gets its texts ready in memory and throws the tokens away; `prepare` reads, parses,
encodes, indexes, hashes, writes and syncs. The two alternate in one process, so that other load
on the machine meets both; medians are reported, and the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from motet.experiments.corpora.prepare import PrepareRequest, prepare
from motet.experiments.corpora.sources import STDLIB_INPUT, read_documents
from motet.experiments.corpora.tokenizer import Tokenizer, train_bpe

BATCH_DOCUMENTS = 256
VOCABULARY_SIZE = 4096


def bare_seconds(texts: Sequence[str], tokenizer_file: Path) -> float:
    """Time the loop that anyone would write."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    started_s = time.perf_counter()
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        tokenizer.encode_batch(texts[first : first + BATCH_DOCUMENTS])
    return time.perf_counter() - started_s


def prepare_seconds(request: PrepareRequest) -> float:
    """Time the whole preparation, from opening the input to the published folder."""
    started_s = time.perf_counter()
    prepare(request)
    return time.perf_counter() - started_s


def measure(inputs: list[str], repeats: int, workers: int) -> dict[str, float]:
    """Return MB/s of both and their ratio."""
    texts = [text for _, text in read_documents(inputs)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    bare_s, ours_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_file = train_bpe(texts, VOCABULARY_SIZE).save(folder)
        assert Tokenizer.load(tokenizer_file).vocabulary_size == VOCABULARY_SIZE
        for repeat in range(repeats):
            output = Path(folder) / f"corpus-{repeat}"
            request = PrepareRequest(inputs, output, str(tokenizer_file), workers=workers)
            pair = [lambda: bare_s.append(bare_seconds(texts, tokenizer_file))]
            pair.append(lambda request=request: ours_s.append(prepare_seconds(request)))  # type: ignore[misc]
            for run in pair if repeat % 2 else reversed(pair):
                run()
    ratios = [bare / ours for bare, ours in zip(bare_s, ours_s, strict=True)]
    return {
        "mb_per_s": round(megabytes / statistics.median(ours_s), 3),
        "bare_mb_per_s": round(megabytes / statistics.median(bare_s), 3),
        "ratio": round(statistics.median(ratios), 3),
        "input_mb": round(megabytes, 3),
        "repeats": repeats,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jsonl", help="JSON lines to prepare (default: Python's own sources)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="as in `motet data prepare`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    inputs = [arguments.jsonl or STDLIB_INPUT]
    result = measure(inputs, arguments.repeats, arguments.workers)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"prepare      {result['mb_per_s']:.2f} MB/s  ({result['input_mb']:.1f} MB of text)")
    print(f"encode_batch {result['bare_mb_per_s']:.2f} MB/s")
    print(f"ratio        {result['ratio']:.2f}  (at least 0.9)")


if __name__ == "__main__":
    main()
