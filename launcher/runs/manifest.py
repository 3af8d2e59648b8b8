"""`manifest.json`: the frozen facts of a run, and their check on every rank before anything
trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from motet.core.errors import Problem, UserError, raise_problems
from motet.core.hashing import sha256_file
from motet.core.listed import altered_files
from motet.experiments.corpora.corpus import Corpus
from motet.experiments.design.frozen import check_kinds, read_definition
from motet.experiments.library.kinds import Library
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.part import CorpusPart, hold_out
from motet.experiments.stream.repeat import Repeat
from motet.experiments.stream.stream import Stream
from motet.launcher.config.sections import RunSettings
from motet.launcher.config.validation import names_of
from motet.launcher.runs.begun import unlike_frozen
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_frozen, read_manifest


def open_corpora(settings: RunSettings) -> list[Corpus]:
    """Open every corpus of a run.

    Raises:
        UserError: a corpus is missing or cut short, or they do not share one tokenizer.
    """
    corpora = [Corpus.open(entry.path) for entry in settings.data.corpora]
    for number, corpus in enumerate(corpora[1:], start=1):
        _check_vocabulary(f"data.corpora[{number}]", corpus, corpora[0])
    return corpora


def open_validation_corpora(settings: RunSettings) -> list[Corpus]:
    """Open the corpora of `validation.corpora`.

    Raises:
        UserError: one is missing, cut short or trained on, or has another tokenizer than the run.
    """
    found = [Corpus.open(entry.path) for entry in settings.validation.corpora]
    trained = open_corpora(settings) if found else []
    for number, corpus in enumerate(found):
        where = f"validation.corpora[{number}]"
        _check_vocabulary(where, corpus, trained[0])
        for other, one in enumerate(trained):
            if one.fingerprint == corpus.fingerprint:
                raise UserError(
                    f"{where}.path={corpus.path}: data.corpora[{other}] holds the same tokens, so "
                    "they are trained on; validation.documents holds some of them out"
                )
    return found


def _check_vocabulary(where: str, corpus: Corpus, first: Corpus) -> None:
    if _vocabulary(corpus) != _vocabulary(first):
        raise UserError(
            f"{where}.path={corpus.path}: its vocabulary has {corpus.vocabulary_size:,} tokens and "
            f"ends documents with {corpus.eod}, data.corpora[0] has {first.vocabulary_size:,} and "
            f"{first.eod}, or their tokenizers differ; prepare both with one tokenizer"
        )


def _vocabulary(corpus: Corpus) -> tuple[int, int, str | None]:
    """Return what two corpora must share: end of document, size, and the tokenizer's hash."""
    path = corpus.tokenizer_path
    content = None if path is None else sha256_file(Path(path))
    return corpus.eod, corpus.vocabulary_size, content


def training_sources(settings: RunSettings) -> list[Corpus | CorpusPart]:
    """Return what the run reads of each corpus: all, or all but the documents held out.

    Raises:
        UserError: a corpus has too few documents for that.
    """
    corpora = open_corpora(settings)
    if not settings.validation.documents:
        return list(corpora)
    return [rest for rest, _ in _held_out(settings, corpora)]


def _held_out(
    settings: RunSettings, corpora: Sequence[Corpus]
) -> list[tuple[CorpusPart, CorpusPart]]:
    count = settings.validation.documents
    return [
        hold_out(corpus, count, settings.data_seed, "validation.documents", f"data.corpora[{n}]")
        for n, corpus in enumerate(corpora)
    ]


def validation_streams(settings: RunSettings) -> dict[str, Stream]:
    """Return the text of each validation loss by its name, cut as the run cuts its own: documents
    held out, then the corpora of their own.

    Raises:
        UserError: a corpus cannot be used, has too few documents, or is shorter than a sequence.
    """
    held = (
        [part for _, part in _held_out(settings, open_corpora(settings))]
        if settings.validation.documents
        else []
    )
    sources: list[Corpus | CorpusPart] = [*held, *open_validation_corpora(settings)]
    length = settings.data.sequence_length
    found = {}
    for name, source in zip(
        names_of(settings.validation, settings.data.paths), sources, strict=True
    ):
        if source.n_tokens < length:
            what = "held-out documents have" if isinstance(source, CorpusPart) else "corpus has"
            raise UserError(
                f"validation: the {what} {source.n_tokens:,} tokens ({name}), fewer than one "
                f"sequence of data.sequence_length={length:,}; give more text"
            )
        masks = settings.data.document_masks
        found[name] = Stream([source], [1.0], length, settings.data_seed, None, masks)
    return found


def open_stream(settings: RunSettings, plan: ExposurePlan | None = None) -> Stream:
    """Return the stream of a run, with a plan laid over it if given."""
    return Stream(
        training_sources(settings),
        [entry.weight for entry in settings.data.corpora],
        settings.data.sequence_length,
        settings.data_seed,
        plan,
        settings.data.document_masks,
        repeat_of(settings),
    )


def repeat_of(settings: RunSettings) -> Repeat | None:
    """Return what a run reads again and again; None where nothing is."""
    asked = settings.data.repeat
    if not asked.share:
        return None
    steps = settings.batch_steps
    return Repeat(asked.share, asked.sequences, asked.mixed, asked.drawn, steps)


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
        problem
        for corpus in [*open_corpora(settings), *open_validation_corpora(settings)]
        for problem in corpus.verify(known=not full)
    ]
    if frozen and not found and (now := data_facts(settings)) != frozen:
        found.append(Problem("data", f"is not that of the run: {_first_difference(now, frozen)}"))
    return found


def data_facts(settings: RunSettings) -> dict[str, Any]:
    """Return what identifies the data of a run."""
    validated = [corpus.fingerprint for corpus in open_validation_corpora(settings)]
    return {
        **({"validation": validated} if validated else {}),
        "seed": settings.data_seed,
        "document_masks": settings.data.document_masks,
        **({"repeat": asdict(settings.data.repeat)} if settings.data.repeat.share else {}),
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
