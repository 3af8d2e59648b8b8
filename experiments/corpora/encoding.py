"""Encode blocks of input in order, by as many processes as help.

Worker processes were faster than the `tokenizers` library's own threads in three comparisons on two
shared cores (1.04, 1.2 and 1.7 times). They cost a third of a second to start, so a small input is
encoded in this process. The tokens are the same either way.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.experiments.corpora.blocks import ReadOptions, SourceBlock
from motet.experiments.corpora.tokenizer import Tokenizer, token_dtype

SMALL_INPUT_BYTES = 4_000_000  # less is encoded before worker processes have started
THREADS = 2  # of this process: one reads and converts while the tokenizer's own threads encode
BLOCKS_AHEAD_PER_WORKER = 3  # bounds memory: blocks that are read or encoded but not yet written


class EncodedBlock(NamedTuple):
    """N documents as tokens, in the order of their block."""

    tokens: npt.NDArray[Any]  # documents end to end, each with its end-of-document token
    lengths: npt.NDArray[np.int64]  # [N] tokens, that token included
    document_ids: list[str]  # [N]
    n_input_bytes: int
    n_text_bytes: int  # UTF-8
    bad: list[str]  # documents left out because they cannot be read: where, and why

    def first(self, n_documents: int) -> EncodedBlock:
        """Return the block with only its first documents; bytes still count all of it."""
        lengths = self.lengths[:n_documents]
        tokens = self.tokens[: int(lengths.sum())]
        return self._replace(
            tokens=tokens, lengths=lengths, document_ids=self.document_ids[:n_documents]
        )


def encode_block(block: SourceBlock, tokenizer: Tokenizer, options: ReadOptions) -> EncodedBlock:
    """Parse and encode one block. Raises `UserError` naming the line that cannot be read."""
    parsed = block.parse(options)
    texts = [document.text for document in parsed.documents]
    ids = tokenizer.encode_batch(texts)
    lengths = np.array([len(document) + 1 for document in ids], np.int64)
    tokens = np.full(lengths.sum(), tokenizer.eod, token_dtype(tokenizer.vocabulary_size))
    stop = 0
    for document in ids:
        tokens[stop : stop + len(document)] = document
        stop += len(document) + 1
    n_text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    document_ids = [document.id for document in parsed.documents]
    return EncodedBlock(tokens, lengths, document_ids, block.n_bytes, n_text_bytes, parsed.bad)


def encode_blocks(
    blocks: Iterable[SourceBlock], tokenizer: Tokenizer, options: ReadOptions, workers: int
) -> Generator[EncodedBlock, None, None]:
    """Yield every block encoded, in order; `workers` <= 1 encodes in this process.

    Raises the `UserError` of the first block that has one, and `UserError` if a worker dies.
    """
    pool: Executor
    encode: Callable[[SourceBlock], EncodedBlock]
    if workers <= 1:
        workers = THREADS
        pool = ThreadPoolExecutor(workers)
        encode = partial(encode_block, tokenizer=tokenizer, options=options)
    else:
        pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(tokenizer.json_bytes, tokenizer.eod_token, options),
        )
        encode = _encode_in_worker
    try:
        yield from _in_order(pool, encode, blocks, BLOCKS_AHEAD_PER_WORKER * workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} worker processes died, perhaps for lack of memory; repeat the "
            "command to go on where it stopped, with workers=1 if it happens again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def worker_count(wanted: int, input_bytes: int | None) -> int:
    """Return how many worker processes to use; `wanted` 0 decides by cores and size of input."""
    if wanted:
        return wanted
    if input_bytes is not None and input_bytes < SMALL_INPUT_BYTES:
        return 1
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _in_order(
    pool: Executor,
    encode: Callable[[SourceBlock], EncodedBlock],
    blocks: Iterable[SourceBlock],
    most_ahead: int,
) -> Iterator[EncodedBlock]:
    """Keep `most_ahead` blocks in the pool and yield results in the order of the blocks."""
    left = iter(blocks)
    waiting: deque[Future[EncodedBlock]] = deque()
    while True:
        for block in itertools.islice(left, most_ahead - len(waiting)):
            waiting.append(pool.submit(encode, block))
        if not waiting:
            return
        yield waiting.popleft().result()


_worker: dict[str, Any] = {}  # filled once in each worker process


def _start_worker(json_bytes: bytes, eod_token: str, options: ReadOptions) -> None:
    """Load the tokenizer; leave Ctrl-C to the parent, and die with it even if it is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker["tokenizer"] = Tokenizer(json_bytes, eod_token)
    _worker["options"] = options


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(block: SourceBlock) -> EncodedBlock:
    return encode_block(block, _worker["tokenizer"], _worker["options"])
