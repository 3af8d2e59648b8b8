"""`motet data index`: a corpus over token files of other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from motet.core.errors import UserError
from motet.launcher.commands import options
from motet.launcher.commands.data.prepare import print_made
from motet.launcher.output import flags, terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """The files, their format and the corpus to write."""
    options.dry_run(parser)
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="Megatron .bin, Dolma .npy, nanoGPT .bin"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the corpus to write")
    parser.add_argument(
        "--format", default="auto", choices=("auto", "megatron", "dolma", "nanogpt"), dest="layout"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or Hugging Face folder")
    parser.add_argument("--dtype", choices=("uint16", "uint32"), help="of files without a header")
    parser.add_argument("--eod", type=int, metavar="ID", help="end-of-document token")
    parser.add_argument(
        "--eod-marks",
        default="auto",
        choices=("auto", "end", "start", "both"),
        help="where it stands in each document (default: found)",
    )
    parser.add_argument("--vocabulary-size", type=int, metavar="N", help="without a tokenizer")


def run(arguments: argparse.Namespace) -> int:
    """Make a corpus over token files of other programs, without copying them."""
    layouts = {layout_of(Path(name)) for name in arguments.files}
    layout = arguments.layout
    if layout == "auto":
        if len(layouts) > 1:
            raise UserError(
                f"--format: the files are of several kinds ({', '.join(sorted(layouts))})"
            )
        layout = layouts.pop()
    if arguments.dry_run:
        files = ", ".join(arguments.files)
        terminal.print_facts([("reads", files), ("format", layout), ("writes", arguments.output)])
        return 0
    from motet.experiments.corpora.prepare import index_tokens

    with flags.named_as_typed():
        corpus = index_tokens(
            arguments.files,
            layout,
            arguments.tokenizer,
            arguments.eod,
            arguments.output,
            dtype=arguments.dtype,
            vocabulary_size=arguments.vocabulary_size,
            eod_marks=None if arguments.eod_marks == "auto" else arguments.eod_marks,
        )
    for caution in corpus.cautions:
        print(f"motet: warning: {flags.as_typed(caution)}", file=sys.stderr)
    print_made(corpus)
    return 0


def layout_of(path: Path) -> str:
    """The format that a token file's name tells."""
    if path.suffix == ".npy":
        return "dolma"
    index = Path(f"{path.with_suffix('') if path.suffix in ('.bin', '.idx') else path}.idx")
    return "megatron" if index.exists() else "nanogpt"
