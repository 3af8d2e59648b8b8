"""`motet data prepare`: text to token shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import raise_problems
from motet.launcher.commands import options
from motet.launcher.output import terminal

if TYPE_CHECKING:
    from motet.experiments.corpora.corpus import Corpus
    from motet.experiments.corpora.prepare import PrepareRequest

VOCABULARY_SIZE = 32_768


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, what is written, and how it is split into tokens."""
    options.dry_run(parser)
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="files, folders, .jsonl(.gz|.zst), .parquet, saved data sets, hf:NAME, or stdlib:",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the corpus to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or Hugging Face folder")
    which.add_argument(
        "--vocabulary-size", type=int, metavar="N", help="train a BPE of N tokens (default 32768)"
    )
    parser.add_argument("--eod-token", metavar="TEXT", help="end of document (default: found)")
    parser.add_argument("--text-field", default="text", help="field of the text (default: text)")
    parser.add_argument("--id-field", default="id", help="field of the id (default: id)")
    parser.add_argument("--glob", help="which files of a folder, such as '**/*.txt'")
    parser.add_argument("--config", help="configuration of a data set")
    parser.add_argument("--split", default="train", help="split of a data set (default: train)")
    parser.add_argument("--streaming", action="store_true", help="read a data set while loading it")
    parser.add_argument("--skip-bad", action="store_true", help="leave out unreadable documents")
    parser.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents")
    parser.add_argument("--processes", type=int, default=0, help="default: decided by the input")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Tokenize text into a corpus."""
    from motet.experiments.corpora.prepare import PrepareRequest, prepare_request_problems

    request = PrepareRequest(
        inputs=arguments.sources,
        output=Path(arguments.output),
        tokenizer=arguments.tokenizer,
        eod_token=arguments.eod_token,
        vocabulary_size=arguments.vocabulary_size or VOCABULARY_SIZE,
        text_field=arguments.text_field,
        id_field=arguments.id_field,
        glob=arguments.glob,
        hub_config=arguments.config,
        hub_split=arguments.split,
        streaming=arguments.streaming,
        skip_bad=arguments.skip_bad,
        max_documents=arguments.max_documents,
        workers=arguments.processes,
    )
    raise_problems(prepare_request_problems(request))
    if arguments.dry_run:
        print_request(request)
        return 0
    _prepare(request, quiet=arguments.quiet)
    return 0


def print_request(request: PrepareRequest) -> None:
    """What would be done, one setting a line."""
    tokenizer = request.tokenizer or f"a BPE of {request.vocabulary_size:,} tokens, trained on them"
    terminal.print_facts(
        [
            ("reads", ", ".join(str(name) for name in request.inputs)),
            ("tokenizer", str(tokenizer)),
            ("writes", str(request.output)),
        ]
    )


def prepare_text(inputs: list[str], output: Path, vocabulary_size: int) -> None:
    """Prepare a corpus with a tokenizer that is trained on it, with a progress bar."""
    from motet.experiments.corpora.prepare import PrepareRequest

    _prepare(PrepareRequest(inputs=inputs, output=output, vocabulary_size=vocabulary_size))


def _prepare(request: PrepareRequest, quiet: bool = False) -> None:
    from motet.experiments.corpora.prepare import prepare

    print_made(prepare(request, progress=not quiet))


def print_made(corpus: Corpus) -> None:
    """What a corpus holds, in a line."""
    facts = f"{corpus.n_documents:,} documents, {corpus.n_tokens:,} tokens"
    print(f"{corpus.path}: {facts}, vocabulary {corpus.vocabulary_size:,}")
