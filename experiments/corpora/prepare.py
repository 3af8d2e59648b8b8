"""Text to a corpus: read, encode in parallel, write shards; resumable after any kill.

The input is cut into the same blocks every time (`sources.py`), and blocks are written in their
order, so the result does not depend on the number of workers. Every `CHECKPOINT_S` seconds the
files are synced and `prepare.json` in `OUTPUT.partial` records how many blocks they hold and
their sizes; a later run cuts off what came after and goes on. The finished folder keeps
`prepare.json`: preparing it again with the same settings and input changes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.files import atomic_write, read_fields, write_json
from motet.core.hashing import sha256_hex
from motet.core.listed import SMALL_BYTES, refuse_altered
from motet.core.locks import Taken, held
from motet.experiments.corpora.blocks import ReadOptions, SourceBlock
from motet.experiments.corpora.corpus import SHARD_TOKENS, Corpus, CorpusWriter
from motet.experiments.corpora.encoding import encode_blocks, worker_count
from motet.experiments.corpora.indexed import index_tokens
from motet.experiments.corpora.inspection import inspect_corpus
from motet.experiments.corpora.progress import Progress, progress_bar
from motet.experiments.corpora.sources import (
    HUB_PREFIX,
    STDLIB_INPUT,
    Source,
    open_inputs,
    stdlib_sources,
)
from motet.experiments.corpora.splitting import split_problem
from motet.experiments.corpora.storage import MANIFEST, check_output, partial_folder
from motet.experiments.corpora.tokenizer import Tokenizer, smallest_vocabulary, train_bpe

__all__ = [
    "LeftOut",
    "PrepareRequest",
    "Progress",
    "index_tokens",
    "inspect_corpus",
    "left_out_of",
    "prepare",
    "prepare_request_problems",
    "stdlib_sources",
]

CHECKPOINT_S = 2.0
STATE = "prepare.json"
MIB = 1 << 20
MOST_BAD = 100  # documents that cannot be read are named up to so many, and all counted


@dataclass(frozen=True)
class PrepareRequest:
    """What to make a corpus of, and how."""

    inputs: Sequence[str]  # files, folders, hf:NAME, saved data sets, stdlib: (see sources.py)
    output: Path  # the corpus folder to make
    tokenizer: str | None = None  # tokenizer.json or Hugging Face folder; None: train a BPE
    eod_token: str | None = None  # end-of-document token of a loaded tokenizer; None: found
    vocabulary_size: int = 4096  # tokens, of a trained tokenizer
    reserved_tokens: Sequence[str] = ()  # special tokens of a trained tokenizer, ids 1, 2, ...
    sample_mib: int = 64  # MiB of text that a tokenizer is trained on, spread over the input
    text_field: str = "text"  # field of JSON lines, parquet and data sets that holds the text
    id_field: str = "id"  # field that holds the document's id; where absent, FILE:LINE
    glob: str | None = None  # which files of a folder, e.g. "**/*.txt"; None: all known suffixes
    hub_config: str | None = None  # configuration of a data set
    hub_split: str = "train"  # split of a data set
    streaming: bool = False  # read a data set while downloading it
    split: str | None = None  # text files: cut at a pattern, or every N characters (splitting.py)
    skip_bad: bool = False  # leave out documents that cannot be read, and count them
    max_documents: int | None = None  # stop after so many
    shard_tokens: int = SHARD_TOKENS  # tokens per shard file
    workers: int = 0  # processes; 1: this one with the tokenizer's threads; 0: decide

    @property
    def read_options(self) -> ReadOptions:
        """The part that says how inputs are read."""
        return ReadOptions(
            text_field=self.text_field,
            id_field=self.id_field,
            glob=self.glob,
            hub_config=self.hub_config,
            hub_split=self.hub_split,
            streaming=self.streaming,
            skip_bad=self.skip_bad,
            split=self.split,
        )


def prepare(request: PrepareRequest, progress: Callable[[Progress], None] | bool = False) -> Corpus:
    """Make the corpus that `request` describes, going on where a killed run stopped.

    `progress` is called after every block; True draws a bar. Returns at once if the finished
    corpus is there. Raises `UserError` for a wrong request, unreadable input, or when `output`
    was begun or made with other settings or other input (it says which).
    """
    if progress is True:
        with progress_bar() as show:
            return prepare(request, show)
    raise_problems(prepare_request_problems(request))
    if request.tokenizer is not None:
        _check_origin(Path(request.tokenizer))
    sources, left_out = open_inputs(request.inputs, request.read_options)
    tokenizer = request.tokenizer and Tokenizer.load(request.tokenizer, request.eod_token)
    settings = _settings(request, sources, tokenizer or None)
    finished = _load_state(request.output)
    if finished is not None:
        _check_same(finished, settings, request, request.output)
        return Corpus.open(request.output)
    check_output(request.output)
    partial = partial_folder(request.output)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        state = _begin(partial, settings, request)
        state.left_out = [str(problem) for problem in left_out]
        show = progress or (lambda _: None)
        tokenizer = tokenizer or _trained(request, sources, state, show)
        return _run(request, sources, state, tokenizer, show)


def _check_origin(tokenizer: Path) -> None:
    """Refuse a tokenizer, of another corpus or an exported model, that is not what it was."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    if (folder / MANIFEST).exists():
        Corpus.open(folder).check_tokenizer()
    refuse_altered(folder, "tokenizer", "export it again, or name another", SMALL_BYTES)


def prepare_request_problems(request: PrepareRequest) -> list[Problem]:
    """Return everything that is wrong with a request, without reading its inputs."""
    problems = [
        Problem(name, "does not exist")
        for name in request.inputs
        if not (name.startswith(HUB_PREFIX) or name == STDLIB_INPUT or Path(name).exists())
    ]
    if not request.inputs:
        problems.append(Problem("inputs", "is empty; name files, folders or hf:NAME"))
    if request.tokenizer is not None and not Path(request.tokenizer).exists():
        message = f"{request.tokenizer} does not exist; give a tokenizer.json or its folder"
        problems.append(Problem("tokenizer", message))
    if request.split is not None and (problem := split_problem(request.split)):
        problems.append(Problem("split", problem))
    fewest = smallest_vocabulary(len(request.reserved_tokens))
    if request.tokenizer is None and request.vocabulary_size < fewest:
        message = f"{request.vocabulary_size} is too few tokens; at least {fewest}"
        problems.append(Problem("vocabulary_size", message))
    smallest = {"sample_mib": 1, "shard_tokens": 1, "workers": 0, "max_documents": 1}
    for setting, least in smallest.items():
        value = getattr(request, setting)
        if value is not None and value < least:
            problems.append(Problem(setting, f"{value} is too small; at least {least}"))
    return problems


class LeftOut(NamedTuple):
    """What a preparation did not take into its corpus."""

    n_bad: int  # documents that cannot be read
    bad: list[str]  # the first of them: where, and why
    files: list[str]  # files in folders that were not read, and why


def left_out_of(folder: Path) -> LeftOut:
    """Return what was left out of a corpus that `prepare` made.

    Raises `UserError` if its `prepare.json` is damaged.
    """
    state = _load_state(folder) or _State({})
    return LeftOut(state.n_bad, state.bad, state.left_out)


@dataclass
class _State:
    """What `prepare.json` records; everything in it follows from settings and input."""

    settings: dict[str, Any]
    n_blocks: int = 0  # that the files hold
    n_bad: int = 0  # documents left out
    bad: list[str] = field(default_factory=list)  # the first of them: where, and why
    left_out: list[str] = field(default_factory=list)  # files in folders that were not read
    writer: dict[str, Any] | None = None  # CorpusWriter.checkpoint()
    tokenizer_sha256: str = ""  # of the one that was trained, if one was

    def save(self, folder: Path) -> None:
        write_json(folder / STATE, vars(self))


def _run(
    request: PrepareRequest,
    sources: Sequence[Source],
    state: _State,
    tokenizer: Tokenizer,
    show: Callable[[Progress], None],
) -> Corpus:
    """Write the blocks that are not yet written, and publish."""
    writer = CorpusWriter(request.output, tokenizer, request.shard_tokens, state.writer)
    _write_blocks(request, sources, state, writer, show)
    state.writer = writer.checkpoint()
    state.save(writer.partial)
    return writer.close()


def _write_blocks(
    request: PrepareRequest,
    sources: Sequence[Source],
    state: _State,
    writer: CorpusWriter,
    show: Callable[[Progress], None],
) -> None:
    """Append the encoded blocks in order, recording a checkpoint now and then."""
    total_bytes = _total_bytes(sources)
    most = request.max_documents
    blocks = _blocks(sources, request.read_options)
    input_bytes = sum(block.n_bytes for block in itertools.islice(blocks, state.n_blocks))
    left_bytes = None if total_bytes is None else total_bytes - input_bytes
    workers = worker_count(request.workers, left_bytes)
    text_bytes, saved_at_s = 0, time.monotonic()
    encoded = encode_blocks(blocks, writer.tokenizer, request.read_options, workers)
    with contextlib.closing(encoded):
        while most is None or writer.n_documents < most:
            block = next(encoded, None)
            if block is None:
                break
            if most is not None:
                block = block.first(most - writer.n_documents)
            writer.append_many(block.tokens, block.lengths, block.document_ids)
            state.n_blocks += 1
            state.n_bad += len(block.bad)
            state.bad += block.bad[: MOST_BAD - len(state.bad)]
            input_bytes += block.n_input_bytes
            text_bytes += block.n_text_bytes
            read = (input_bytes, total_bytes, text_bytes)
            show(Progress("encode", *read, writer.n_documents, writer.n_tokens))
            if time.monotonic() - saved_at_s >= CHECKPOINT_S:
                state.writer = writer.checkpoint()
                state.save(writer.partial)
                saved_at_s = time.monotonic()


def _trained(
    request: PrepareRequest,
    sources: Sequence[Source],
    state: _State,
    show: Callable[[Progress], None],
) -> Tokenizer:
    """Return the tokenizer that an earlier run trained, or train it.

    Raises:
        UserError: it is not the one that the blocks before were encoded with.
    """
    trained = partial_folder(request.output) / "tokenizer.json"
    if trained.exists():
        found = Tokenizer.load(trained)
        if state.tokenizer_sha256 not in ("", found.sha256):
            raise UserError(
                f"{trained} was altered since it was trained; delete {trained.parent}, and prepare "
                "the corpus again"
            )
        state.tokenizer_sha256 = found.sha256
        return found
    texts = _sample(sources, request.read_options, request.sample_mib * MIB, show)
    tokenizer = train_bpe(texts, request.vocabulary_size, request.reserved_tokens)
    atomic_write(trained, tokenizer.json_bytes)
    state.tokenizer_sha256 = tokenizer.sha256
    state.save(trained.parent)  # before a block is encoded with it
    return tokenizer


def _sample(
    sources: Sequence[Source],
    options: ReadOptions,
    sample_bytes: int,
    show: Callable[[Progress], None],
) -> Iterator[str]:
    """Yield texts of every n-th block, so that about `sample_bytes` are spread over the input.

    The beginning of the input is taken where its size cannot be known before reading.
    """
    total_bytes = _total_bytes(sources)
    every = math.ceil((total_bytes or 1) / sample_bytes)
    n_bytes, n_documents = 0, 0
    for block in itertools.islice(_blocks(sources, options), 0, None, every):
        for document in block.parse(options).documents:
            yield document.text
            n_documents += 1
        n_bytes += block.n_bytes
        show(Progress("train tokenizer", n_bytes, None, n_bytes, n_documents, 0))
        if total_bytes is None and n_bytes >= sample_bytes:
            return


def _blocks(sources: Sequence[Source], options: ReadOptions) -> Iterator[SourceBlock]:
    return itertools.chain.from_iterable(source.blocks(options) for source in sources)


def _total_bytes(sources: Sequence[Source]) -> int | None:
    """Return the size of all input, or None if a source does not know its own."""
    sizes = [source.n_bytes for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _settings(
    request: PrepareRequest, sources: Sequence[Source], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return what the bytes of the corpus depend on; a change of it forbids to go on."""
    settings = {
        name: value
        for name, value in vars(request).items()
        if name not in ("output", "workers", "skip_bad")
    }
    settings["inputs"] = list(request.inputs)
    settings["reserved_tokens"] = list(request.reserved_tokens)
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer.sha256
        settings["eod_token"] = tokenizer.eod_token
        for unused in ("vocabulary_size", "reserved_tokens", "sample_mib"):
            del settings[unused]
    files = json.dumps([source.state() for source in sources])
    settings["files of the input"] = sha256_hex(files)
    return settings


def _begin(partial: Path, settings: dict[str, Any], request: PrepareRequest) -> _State:
    """Return the state to go on from; nothing is lost by starting anew before the first block."""
    state = _load_state(partial)
    if state is not None and state.n_blocks:
        _check_same(state, settings, request, partial)
        return state
    if state is None or state.settings != settings:
        (partial / "tokenizer.json").unlink(missing_ok=True)
    state = _State(settings)
    state.save(partial)
    return state


def _load_state(folder: Path) -> _State | None:
    try:
        if not (folder / STATE).is_file():
            return None
        return _State(**read_fields(folder / STATE, {"settings": dict}, f"delete {folder}"))
    except TypeError as error:
        raise UserError(f"{folder / STATE} is damaged ({error}); delete {folder}") from error


def _check_same(
    state: _State, settings: dict[str, Any], request: PrepareRequest, folder: Path
) -> None:
    """Raise `UserError` naming every setting in which `folder` differs from the request."""
    differing = [
        f"{name} was {state.settings.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted(state.settings.keys() | settings.keys())
        if state.settings.get(name) != settings.get(name)
    ]
    if state.n_bad and not request.skip_bad:
        differing.append(f"skip_bad was True and left out {state.n_bad} documents, is False")
    if differing:
        raise UserError(
            f"{folder} was made with other settings: {'; '.join(differing)}. "
            f"Restore them, name another output, or delete {folder}"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes away with the process, however it ends."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(folder))
        except Taken:
            raise UserError(f"{folder} is being prepared by another process") from None
        except OSError as error:
            raise UserError(f"{folder} cannot be held for this process: {error}") from None
        yield
