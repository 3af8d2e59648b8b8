"""`motet data sample`: passages of a corpus as items of an experiment."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.launcher.commands import options


def arguments(parser: argparse.ArgumentParser) -> None:
    """The corpus, and how many passages of which length."""
    options.dry_run(parser)
    parser.add_argument("corpus", metavar="CORPUS")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="how many passages")
    parser.add_argument("--tokens", type=int, default=60, metavar="N", help="about, of each")
    parser.add_argument("--output", metavar="FILE", help="JSONL to write (default: print them)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw")


def run(arguments: argparse.Namespace) -> int:
    """Write one JSON line per passage: id, text, document and position in tokens."""
    for name, least in (("count", 1), ("tokens", 12), ("seed", 0)):
        if getattr(arguments, name) < least:
            value = getattr(arguments, name)
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    from motet.experiments.corpora.corpus import Corpus
    from motet.experiments.corpora.inspection import load_tokenizer
    from motet.experiments.corpora.sampling import passages

    corpus = Corpus.open(Path(arguments.corpus))
    tokenizer = load_tokenizer(corpus)
    if tokenizer is None:
        raise UserError(f"{corpus.path}: has no tokenizer, so its tokens cannot be read as text")
    if arguments.dry_run:
        said = f"would draw {arguments.count} passages from {corpus.n_tokens:,} tokens"
        print(said, file=sys.stderr)
        return 0
    rows = passages(corpus, tokenizer, arguments.count, arguments.tokens, arguments.seed)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if arguments.output:
        atomic_write(Path(arguments.output), "\n".join(lines) + "\n")
        print(f"{len(lines)} passages in {arguments.output}", file=sys.stderr)
    else:
        print(*lines, sep="\n")
    return 0
