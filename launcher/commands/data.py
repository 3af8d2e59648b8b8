"""`motet data prepare | index | inspect`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError, raise_problems
from motet.launcher.commands import common
from motet.launcher.config import load as config
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from motet.experiments.corpora.corpus import Corpus
    from motet.experiments.corpora.prepare import PrepareRequest
    from motet.launcher.config.sections import RunSettings

VOCABULARY_SIZE = 32_768


def prepare(arguments: argparse.Namespace) -> int:
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
    common.print_facts(
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

    _print_made(prepare(request, progress=not quiet))


def _print_made(corpus: Corpus) -> None:
    facts = f"{corpus.n_documents:,} documents, {corpus.n_tokens:,} tokens"
    print(f"{corpus.path}: {facts}, vocabulary {corpus.vocabulary_size:,}")


def index(arguments: argparse.Namespace) -> int:
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
        common.print_facts([("reads", files), ("format", layout), ("writes", arguments.output)])
        return 0
    from motet.experiments.corpora.prepare import index_tokens

    corpus = index_tokens(
        arguments.files,
        layout,
        arguments.tokenizer,
        arguments.eod,
        arguments.output,
        dtype=arguments.dtype,
        vocabulary_size=arguments.vocabulary_size,
    )
    _print_made(corpus)
    return 0


def layout_of(path: Path) -> str:
    """The format that a token file's name tells."""
    if path.suffix == ".npy":
        return "dolma"
    return "megatron" if path.with_suffix(".idx").exists() else "nanogpt"


def inspect(arguments: argparse.Namespace) -> int:
    """Show a corpus, or the corpora of a run; or one slot of a run."""
    path = Path(arguments.path)
    if (path / "corpus.json").exists():
        if arguments.slot is not None:
            raise UserError("--slot: a slot belongs to a run; give its folder, or a run.yaml")
        return inspect_corpora([path], arguments)
    settings, plan = run_of(path)
    if arguments.slot is None:
        return inspect_corpora([Path(corpus.path) for corpus in settings.data.corpora], arguments)
    from motet.launcher.study.slot_view import view_slot

    view = view_slot(settings, arguments.slot, plan)
    if arguments.json:
        common.print_json(view)
    else:
        print_slot(view, planned=plan is not None)
    return 0


def run_of(path: Path) -> tuple[RunSettings, Path | None]:
    """Settings and plan folder of what the argument names: a run's folder or a run.yaml."""
    if (path / "resolved.yaml").exists():
        rundir = RunDir(path)
        plan = rundir.plan if rundir.plan.is_dir() else None
        return config.load(rundir.resolved_yaml), plan
    if path.is_file():
        return config.load(path), None
    reason = "is neither a corpus nor a run" if path.exists() else "does not exist"
    raise UserError(f"{path} {reason}; give the folder of a corpus or of a run, or a run.yaml")


def inspect_corpora(paths: list[Path], arguments: argparse.Namespace) -> int:
    """Facts, some documents and, when asked, the checksums of corpora. 1 when a file is damaged."""
    from motet.experiments.corpora.corpus import Corpus
    from motet.experiments.corpora.prepare import inspect_corpus

    shown: list[dict[str, Any]] = []
    damaged = False
    for path in paths:
        corpus = Corpus.open(path)
        found = inspect_corpus(corpus, arguments.documents, arguments.first)
        problems = [str(problem) for problem in corpus.verify()] if arguments.verify else []
        damaged |= bool(problems)
        shown.append({"facts": dict(found.facts), "n_tokens": corpus.n_tokens})
        shown[-1]["n_documents"] = corpus.n_documents
        shown[-1]["documents"] = [asdict(row) for row in found.documents]
        if arguments.verify:
            shown[-1]["problems"] = problems
        if not arguments.json:
            print(found, *problems, sep="\n")
            if arguments.verify and not problems:
                print("\nevery checksum holds")
    if arguments.json:
        common.print_json(shown[0] if len(shown) == 1 else shown)
    return 1 if damaged else 0


def print_slot(view: dict[str, Any], planned: bool) -> None:
    """A slot for reading."""
    common.print_facts(
        [
            ("slot", f"{view['slot']:,} (step {view['step']:,})"),
            ("corpus", f"{view['corpus']}, epoch {view['epoch']}, sequence {view['sequence']:,}"),
            ("documents", ", ".join(view["documents"])),
            ("exposures", str(len(view["exposures"])) if planned else "not planned yet"),
        ]
    )
    for exposure in view["exposures"]:
        kind = "placebo" if exposure["placebo"] else f"repetition {exposure['repetition']}"
        place = f"tokens {exposure['offset']} to {exposure['offset'] + exposure['n_tokens']}"
        print(f"# {exposure['experiment']} · {exposure['unit']} · {kind} · {place}")
        print(f"#   {exposure['text']!r}")
    print(f"\n{view['text']}")
