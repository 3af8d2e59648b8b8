"""Removal: every place of a treated text is overwritten in every epoch, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from motet.core.errors import UserError, raise_problems
from motet.experiments.corpora.sampling import searched_tokens
from motet.experiments.corpora.tokenizer import Tokenizer, train_bpe
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.removal import _with
from motet.experiments.design.requests import Setting
from motet.experiments.design.study import Study, build_study
from motet.experiments.library import generate
from motet.experiments.library.kinds import Library
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.exposure_plan import ExposurePlan, write_plan
from motet.experiments.stream.stream import Stream
from tests.experiments.design.desk import Desk
from tests.experiments.plans import ArrayCorpus

LENGTH, BATCH = 64, 8


def documents() -> list[str]:
    """Texts of which some sentences stand in two documents."""
    texts = [d.texts[0] for d in generate.documents(("removal",), 60, 1)]
    return [*texts, *(f"It is said again: {text}" for text in texts[:5])]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(documents(), 500)


def corpus_of(tokenizer: Tokenizer) -> ArrayCorpus:
    parts, starts, at = [], [], 0
    for ids in tokenizer.encode_batch(documents()):
        starts.append(at)
        parts.append(np.append(ids, tokenizer.eod))
        at += len(ids) + 1
    tokens = np.concatenate(parts).astype(np.uint16)
    return ArrayCorpus(tokens, np.array(starts), eod=tokenizer.eod)


def study_of(folder: Path, tokenizer: Tokenizer, rows: list[dict], epochs: float = 2.2) -> Study:
    corpus = corpus_of(tokenizer)
    stream = Stream([corpus], [1.0], LENGTH, seed=0)
    steps = int(epochs * stream.sequences_of(0) / BATCH)
    kinds = Library(folder)
    setting = Setting(0, Steps.of(BATCH), steps, tokenizer, stream, 100, {"corpora": []}, kinds)
    entries = [
        Desk(folder).entry("gone", "removal", rows),
        {"name": "canaries", "use": "memorization", "generate": {"count": 8, "seed": 0}},
    ]
    entries[1] |= {"doses": [0, 1], "options": {"secret_digits": 4, "n_references": 15}}
    specs, problems = parse_experiments(entries, folder, kinds)
    raise_problems(problems)
    return build_study(specs, setting)


def passages() -> list[dict]:
    """A sentence of every third document."""
    return [
        {"id": f"p{number}", "text": text.split(". ")[1] + "."}
        for number, text in enumerate(documents()[:60:3])
    ]


def occurrences(tokens: np.ndarray, runs: list[np.ndarray]) -> np.ndarray:
    """How often each run is in the tokens, by comparing every place."""
    counts = []
    for run in runs:
        if len(run) > len(tokens):
            counts.append(0)
            continue
        windows = np.lib.stride_tricks.sliding_window_view(tokens, len(run))
        counts.append(int((windows == run).all(axis=1).sum()))
    return np.array(counts)


def held(study: Study, folder: Path, runs: list[np.ndarray], with_plan: bool) -> np.ndarray:
    """How often each run of tokens is in the run's sequences, laid end to end as the corpus has
    them: those of one epoch are the corpus, so a run across two sequences is counted too.
    """
    setting = study.setting
    corpus = setting.stream.corpora[0]
    write_plan(study.plan, folder / "exposures.plan")
    plan = ExposurePlan(folder / "exposures.plan") if with_plan else None
    stream = Stream([corpus], [1.0], LENGTH, seed=0, plan=plan)
    slots = setting.steps_total * BATCH
    tokens = stream.batch(0, slots).tokens_BT
    _, epoch, sequence = stream.locate(np.arange(slots))
    total = np.zeros(len(runs), dtype=np.int64)
    for number in range(int(epoch.max()) + 1):
        mine = np.flatnonzero(epoch == number)
        order = mine[np.argsort(sequence[mine])]
        breaks = np.flatnonzero(np.diff(sequence[order]) != 1) + 1
        for part in np.split(order, breaks):
            total += occurrences(tokens[part].reshape(-1), runs)
    return total


def test_treated_passages_are_nowhere_in_any_epoch_and_held_out_ones_are_where_they_were(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    study = study_of(tmp_path, tokenizer, passages())
    question = next(q for q in study.questions if q.name == "gone")
    runs = searched_tokens(tokenizer, [unit.texts[0] for unit in question.units])
    before, after = (held(study, tmp_path, runs, plan) for plan in (False, True))
    treated = question.treated()
    assert treated.sum() == 10
    assert (before >= 2).all()
    assert before.max() >= 4, "some stand in two documents"
    assert (after[treated] == 0).all()
    # A held-out passage may lose a place to a canary of the other experiment, and to nothing else.
    rows = study.plan.rows
    canaries = int((rows.experiment == study.plan.experiments.index("canaries")).sum())
    assert (before[~treated] - after[~treated]).sum() <= canaries
    assert (after[~treated] > 0).all()


def test_what_is_removed_is_replaced_by_base_text_of_the_same_length_between_ends_of_document(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    study = study_of(tmp_path, tokenizer, passages())
    request = next(r for r in study.requests if r.experiment == "gone")
    runs = searched_tokens(tokenizer, [row["text"] for row in passages()])
    assert request.offset is not None
    assert not request.placebo.any()
    for number, length in enumerate(request.texts.lengths()):
        start = request.texts.offsets[number]
        text = request.texts.tokens[start : start + length]
        assert text[0] == text[-1] == tokenizer.eod
        assert occurrences(text, runs).sum() == 0
    assert (request.offset + request.texts.lengths() <= LENGTH).all()
    pairs = set(zip(request.unit.tolist(), request.repetition.tolist(), strict=True))
    assert len(pairs) == len(request)


def test_ranges_to_avoid_are_joined_with_those_of_others() -> None:
    def claims(*pairs: tuple[int, int]) -> Claims:
        start, stop = np.array(pairs, dtype=np.int64).T
        return Claims(start, stop)

    one = {0: claims((0, 10), (40, 50)), 1: claims((5, 6))}
    other = {0: claims((2, 4), (8, 20), (30, 35)), 2: claims((1, 2))}
    joined = _with(one, other)
    assert joined[0].start.tolist() == [0, 30, 40]
    assert joined[0].stop.tolist() == [20, 35, 50]
    assert joined[1] is one[1]
    assert joined[2] is other[2]


def test_passages_that_are_nowhere_too_short_unread_or_in_one_another_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    good = passages()
    for wrong, epochs, needle in (
        (
            {"id": "w", "text": "no such words are in this corpus as far as anyone knows"},
            2,
            "not in",
        ),
        ({"id": "w", "text": f"{good[0]['text'][:-1]}"}, 2, "lie in one another"),
        (None, 0.2, "never reads them"),
    ):
        rows = [*good, wrong] if wrong else good
        with pytest.raises(UserError, match=needle) as caught:
            study_of(tmp_path, tokenizer, rows, epochs)
        assert "experiments.gone.items" in str(caught.value)
    rows = [*good, {"id": "w", "text": "a b c"}]
    with pytest.raises(UserError, match="fewer than 8 words"):
        study_of(tmp_path, tokenizer, rows)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"doses": [0, 2]}, "left \\(0\\) or removed \\(1\\)"),
        ({"schedule": {"kind": "uniform", "window": [0.0, 0.5]}}, "wherever the run reads it"),
        ({"items": None, "generate": {"count": 8, "seed": 0}}, "motet data sample"),
    ],
)
def test_a_removal_of_a_part_or_of_invented_passages_is_refused(
    tmp_path: Path, change: dict, needle: str
) -> None:
    entry = {**Desk(tmp_path).entry("gone", "removal", passages()), **change}
    with pytest.raises(UserError, match=needle):
        raise_problems(parse_experiments([entry], tmp_path, Library(tmp_path))[1])


def test_sampled_passages_are_found_again_share_nothing_and_make_a_removal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from motet.experiments.corpora.corpus import Corpus
    from motet.experiments.corpora.inspection import load_tokenizer
    from motet.experiments.corpora.prepare import PrepareRequest, prepare
    from motet.launcher import cli

    (tmp_path / "texts").mkdir()
    for number, text in enumerate(documents()):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    prepare(
        PrepareRequest(
            inputs=(str(tmp_path / "texts"),), output=tmp_path / "corpus", vocabulary_size=500
        )
    )
    file = tmp_path / "passages.jsonl"
    asked = ["data", "sample", str(tmp_path / "corpus"), "--count", "12", "--tokens", "40"]
    assert cli.main([*asked, "--output", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 12
    corpus = Corpus.open(tmp_path / "corpus")
    tokenizer = load_tokenizer(corpus)
    assert tokenizer is not None
    everything = corpus.read(0, corpus.n_tokens)
    runs = searched_tokens(tokenizer, [row["text"] for row in rows])
    assert (occurrences(everything, runs) >= 1).all()
    starts = sorted(row["position"] for row in rows)
    assert min(np.diff(starts)) >= 40
    capsys.readouterr()
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == file.read_text(), "the same seed draws the same passages"
    assert cli.main([*asked, "--count", "4000"]) != 0
    assert "ask for fewer" in capsys.readouterr().err
