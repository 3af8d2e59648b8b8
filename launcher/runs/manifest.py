"""`manifest.json`: the frozen facts of a run, and their check on every rank before anything
trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.hashing import sha256_file
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.design.frozen import check_kinds, read_definition
from motet.experiments.library.kinds import Library
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.stream import Stream
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.begun import unlike_frozen
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import altered_files, read_frozen, read_manifest


def open_corpora(settings: RunSettings) -> list[Corpus]:
    """Open every corpus of a run.

    Raises:
        UserError: a corpus is missing or cut short, or they do not share one tokenizer.
    """
    corpora = [Corpus.open(entry.path) for entry in settings.data.corpora]
    for number, corpus in enumerate(corpora[1:], start=1):
        if _vocabulary(corpus) != _vocabulary(corpora[0]):
            raise UserError(
                f"data.corpora[{number}].path={settings.data.corpora[number].path}: its vocabulary "
                "has "
                f"{corpus.vocabulary_size:,} tokens and ends documents with {corpus.eod}, "
                "data.corpora[0] has "
                f"{corpora[0].vocabulary_size:,} and {corpora[0].eod}, or their tokenizers differ; "
                "prepare both with one tokenizer"
            )
    return corpora


def _vocabulary(corpus: Corpus) -> tuple[int, int, str | None]:
    """Return what two corpora must share: end of document, size, and the tokenizer's hash."""
    path = corpus.tokenizer_path
    content = None if path is None else sha256_file(Path(path))
    return corpus.eod, corpus.vocabulary_size, content


def open_stream(settings: RunSettings, plan: ExposurePlan | None = None) -> Stream:
    """Return the stream of a run, with a plan laid over it if given."""
    corpora = open_corpora(settings)
    return Stream(
        corpora,
        [entry.weight for entry in settings.data.corpora],
        settings.data.sequence_length,
        settings.data_seed,
        plan,
        settings.data.document_masks,
    )


def corpus_problems(
    settings: RunSettings, frozen: Mapping[str, Any] | None = None, full: bool = False
) -> list[Problem]:
    """Return what is wrong with the corpora of a run: each file that is missing, cut short or
    altered, and corpora that are not the frozen ones.

    Args:
        frozen: `data` of the manifest; None compares with nothing.
        full: hash every file, also where its content, size and time are known.
    """
    found = [
        problem for corpus in open_corpora(settings) for problem in corpus.verify(known=not full)
    ]
    if frozen and not found and (now := data_facts(settings)) != frozen:
        found.append(Problem("data", f"is not that of the run: {_first_difference(now, frozen)}"))
    return found


def data_facts(settings: RunSettings) -> dict[str, Any]:
    """Return what identifies the data of a run."""
    return {
        "seed": settings.data_seed,
        "document_masks": settings.data.document_masks,
        "corpora": [
            {"fingerprint": corpus.fingerprint, "weight": entry.weight}
            for corpus, entry in zip(open_corpora(settings), settings.data.corpora, strict=True)
        ],
    }


def check_frozen(run: RunDir, settings: RunSettings) -> tuple[dict[str, Any], ExposurePlan]:
    """Verify, on one rank, that definition, plan and corpora are those that the run was frozen
    with.

    Raises:
        UserError: one of them is missing or altered.
    """
    manifest = read_manifest(run)
    raise_problems(unlike_frozen(manifest, settings))
    _, sha256 = read_definition(run.plan)
    if sha256 != manifest["definition_sha256"]:
        raise UserError(
            f"{run.plan}/definition.json has the hash {sha256[:16]}..., but this run was frozen "
            "with "
            f"{manifest['definition_sha256'][:16]}...; restore it, or start a new run for a new "
            "question"
        )
    check_kinds(run.plan, Library(run.plugins))
    for name, what in altered_files(run.root, read_frozen(run, manifest) or {}):
        raise UserError(f"{run.root / name} {what}; restore it from a copy")
    plan = ExposurePlan(run.plan / "exposures.plan")
    plan.verify(manifest["plan_sha256"])
    now, then = data_facts(settings), manifest["data"]
    if now != then:
        raise UserError(
            "data: the corpora or their order are not those of the frozen run: "
            f"{_first_difference(now, then)}"
        )
    return manifest, plan


def _first_difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    for key in then:
        if now.get(key) != then[key]:
            return f"{key} is {now.get(key)!r} and was {then[key]!r}"
    return f"{sorted(set(now) - set(then))} is new"
