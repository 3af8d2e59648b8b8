"""`motet data inspect`: documents and tokens of a corpus, or one sequence of a run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.core.errors import UserError
from motet.launcher.commands import options
from motet.launcher.config import run_yaml
from motet.launcher.output import terminal
from motet.launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from motet.experiments.corpora.corpus import Corpus
    from motet.launcher.config.sections import RunSettings


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to look at, and how much of it."""
    options.as_json(parser)
    parser.add_argument("path", metavar="CORPUS|RUN|RUN.yaml")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many to show")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="first document to show")
    parser.add_argument("--slot", type=int, metavar="N", help="decode this training sequence")
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of every shard")


def run(arguments: argparse.Namespace) -> int:
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
        terminal.print_json(view)
    else:
        print_slot(view, planned=plan is not None)
    return 0


def run_of(path: Path) -> tuple[RunSettings, Path | None]:
    """Settings and plan folder of what the argument names: a run's folder or a run.yaml."""
    if (path / "resolved.yaml").exists():
        rundir = RunDir(path)
        plan = rundir.plan if rundir.plan.is_dir() else None
        return run_yaml.load(rundir.resolved_yaml), plan
    if path.is_file():
        return run_yaml.load(path), None
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
            shown[-1] |= {"problems": problems, "without_checksum": without_checksum(corpus)}
        if not arguments.json:
            print(found, *problems, sep="\n")
            if arguments.verify and not problems:
                left = ", ".join(without_checksum(corpus))
                print("\nevery checksum holds" + (f"; none is kept of {left}" if left else ""))
    if arguments.json:
        terminal.print_json(shown[0] if len(shown) == 1 else shown)
    return 1 if damaged else 0


def without_checksum(corpus: Corpus) -> list[str]:
    """Return the files of a corpus's folder that `verify` cannot speak of: made after it, or before
    hashes of them were kept.
    """
    from motet.experiments.corpora.storage import MANIFEST

    known = {file.path for file in corpus.files()}
    known |= {corpus.path / MANIFEST} if corpus.vouched else set()
    return sorted(p.name for p in corpus.path.iterdir() if p.is_file() and p not in known)


def print_slot(view: dict[str, Any], planned: bool) -> None:
    """A slot for reading."""
    terminal.print_facts(
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
