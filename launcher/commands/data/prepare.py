"""`motet data prepare`: text to token shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from motet.core.errors import UserError, raise_problems
from motet.launcher.commands import options
from motet.launcher.output import flags, terminal

if TYPE_CHECKING:
    from motet.experiments.corpora.corpus import Corpus
    from motet.experiments.corpora.prepare import PrepareRequest

VOCABULARY_SIZE = 32_768
MOST_TOLD = 50
ONE_LONG_TOKENS = 100_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, what is written, and how it is split into tokens."""
    options.dry_run(parser)
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="files, folders, .jsonl(.gz|.zst|.bz2|.xz), .parquet, saved data sets, hf:NAME, or "
        "stdlib:",
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
    parser.add_argument(
        "--split",
        metavar="PATTERN|N|NAME",
        help="cut text files at each match of a regular expression, or after N characters; of data "
        "sets, which split (default: train)",
    )
    parser.add_argument("--streaming", action="store_true", help="read a data set while loading it")
    parser.add_argument("--skip-bad", action="store_true", help="leave out unreadable documents")
    parser.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents")
    parser.add_argument("--processes", type=int, default=0, help="default: decided by the input")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Tokenize text into a corpus."""
    from motet.experiments.corpora.prepare import PrepareRequest, prepare_request_problems

    split, hub_split = _split(arguments.split, arguments.sources)
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
        hub_split=hub_split,
        split=split,
        streaming=arguments.streaming,
        skip_bad=arguments.skip_bad,
        max_documents=arguments.max_documents,
        workers=arguments.processes,
    )
    with flags.named_as_typed():
        raise_problems(prepare_request_problems(request))
        if arguments.dry_run:
            print_request(request)
            return 0
        _prepare(request, quiet=arguments.quiet)
    return 0


def _split(value: str | None, sources: list[str]) -> tuple[str | None, str]:
    """Return how text files are cut, and which split of data sets is read."""
    from motet.experiments.corpora.sources import is_dataset

    sets = [name for name in sources if is_dataset(name)]
    if value is None or not sets:
        return value, "train"
    if len(sets) < len(sources):
        raise UserError(
            f"--split={value}: data sets and others are given together, and it means another thing "
            "for each; prepare them one by one"
        )
    return None, value


def print_request(request: PrepareRequest) -> None:
    """What would be done, one setting a line."""
    from motet.experiments.corpora.sources import open_inputs

    tokenizer = request.tokenizer or f"a BPE of {request.vocabulary_size:,} tokens, trained on them"
    terminal.print_facts(
        [
            ("reads", ", ".join(str(name) for name in request.inputs)),
            ("tokenizer", str(tokenizer)),
            ("writes", str(request.output)),
        ]
    )
    left_out = open_inputs(request.inputs, request.read_options).left_out
    _tell("files left out", len(left_out), [str(problem) for problem in left_out])


def prepare_text(inputs: list[str], output: Path, vocabulary_size: int) -> None:
    """Prepare a corpus with a tokenizer that is trained on it, with a progress bar."""
    from motet.experiments.corpora.prepare import PrepareRequest

    _prepare(PrepareRequest(inputs=inputs, output=output, vocabulary_size=vocabulary_size))


def _prepare(request: PrepareRequest, quiet: bool = False) -> None:
    from motet.experiments.corpora.prepare import left_out_of, prepare

    corpus = prepare(request, progress=not quiet)
    left_out = left_out_of(corpus.path)
    _tell("files left out", len(left_out.files), left_out.files, corpus.path)
    bad = "unreadable documents left out (--skip-bad)"
    _tell(bad, left_out.n_bad, left_out.bad, corpus.path)
    if corpus.n_documents == 1 and corpus.n_tokens > ONE_LONG_TOKENS and request.split is None:
        print(
            "motet: warning: all of it is one document; --split cuts a text file into several",
            file=sys.stderr,
        )
    print_made(corpus)


def _tell(what: str, count: int, lines: list[str], folder: Path | None = None) -> None:
    """Say on stderr what was left out, and where the rest of a long list is."""
    if not count:
        return
    shown = [f"  {flags.as_typed(line)}" for line in lines[:MOST_TOLD]]
    if count > len(shown):
        where = f", see {folder / 'prepare.json'}" if folder else ""
        shown.append(f"  and {count - len(shown):,} more{where}")
    print(f"motet: {count:,} {what}:", *shown, sep="\n", file=sys.stderr)


def print_made(corpus: Corpus) -> None:
    """What a corpus holds, in a line."""
    facts = f"{corpus.n_documents:,} documents, {corpus.n_tokens:,} tokens"
    end = f"end of document {corpus.eod} {corpus.eod_token}".rstrip()
    print(f"{corpus.path}: {facts}, vocabulary {corpus.vocabulary_size:,}, {end}")
