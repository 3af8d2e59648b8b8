"""From definitions to a frozen study: doses, schedules, placebos, locks, and what never moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import Tokenizer, train_bpe
from motet.experiments.design.frozen import freeze, read_definition, read_questions
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.requests import EARLY, LATE, Setting, slot_windows
from motet.experiments.design.spec import Schedule
from motet.experiments.design.study import Study, build_study, with_controls
from motet.experiments.library.kinds import Library
from motet.experiments.stream.batch_sizes import Steps
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.experiments.stream.stream import Stream
from motet.launcher.study.answerable import answer_problems, answer_warnings
from motet.launcher.study.controls import control_problems
from tests.experiments.plans import ArrayCorpus

LENGTH = 640
KINDS = Library(Path("."))
CANARIES = {
    "name": "canaries",
    "use": "memorization",
    "doses": [0, 1, 3],
    "generate": {"count": 30},
}
FACTS = {
    "name": "facts",
    "use": "knowledge",
    "generate": {"count": 12},
    "schedule": {"every": 3, "start": 2},
}
LATER = {
    "name": "later",
    "use": "forgetting",
    "generate": {"count": 8},
    "schedule": {"kind": "steps", "at": [5]},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["some text about canaries and codes, facts and dates " * 40], 400)


@pytest.fixture(scope="module")
def stream(tokenizer: Tokenizer) -> Stream:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 380, 200_000).astype(np.uint16)
    tokens[::61] = tokenizer.eod
    source = ArrayCorpus(tokens, np.arange(0, 200_000, 61) + 1, eod=tokenizer.eod)
    return Stream([source], [1.0], LENGTH, seed=0)


def setting(tokenizer: Tokenizer, stream: Stream, steps: int = 60, seed: int = 4) -> Setting:
    return Setting(seed, Steps.of(16), steps, tokenizer, stream, 1000, {"corpora": []}, KINDS)


def test_exposures_and_corpora_have_one_end_of_document(
    tokenizer: Tokenizer, stream: Stream
) -> None:
    with pytest.raises(UserError, match=r"ends documents with 7, the corpora with 0; .*eod=0"):
        setting(tokenizer.ending_with(7), stream)


def study(where: Setting, *entries: dict[str, Any], lock: Path | None = None) -> Study:
    specs, problems = parse_experiments(list(entries), Path("."), Library(Path(".")))
    assert problems == []
    return build_study(specs, where, lock)


def positions(made: Study, name: str) -> dict[int, tuple[int, int]]:
    rows = made.plan.rows
    mine = np.flatnonzero(rows.experiment == made.plan.experiments.index(name))
    return {int(rows.id[row]): (int(rows.slot[row]), int(rows.offset[row])) for row in mine}


def test_adding_removing_and_reordering_experiments_move_nothing(
    tokenizer: Tokenizer, stream: Stream, tmp_path: Path
) -> None:
    where = setting(tokenizer, stream)
    first = study(where, CANARIES, FACTS)
    freeze(first, tmp_path / "one")
    reordered = study(where, FACTS, CANARIES)
    added = study(where, {**CANARIES, "name": "aaa"}, LATER, FACTS, CANARIES, lock=tmp_path / "one")
    freeze(added, tmp_path / "two")
    removed = study(where, FACTS, LATER, lock=tmp_path / "two")
    freeze(removed, tmp_path / "three")
    again = study(where, LATER, FACTS, {**CANARIES, "name": "zzz"}, lock=tmp_path / "three")
    for other in (reordered, added, removed, again):
        for name in ("canaries", "facts", "later"):
            if name in first.plan.experiments and name in other.plan.experiments:
                assert positions(first, name) == positions(other, name), name
    assert positions(added, "later") == positions(removed, "later") == positions(again, "later")


@pytest.mark.parametrize(
    ("control", "count", "needle"),
    [
        ("placebo", 4, "cannot fall below 0.33"),
        ("placebo", 8, "9 clusters in one block would do"),
        ("positive_control", 4, "cannot fall below 0.33"),
        ("placebo", 10, None),
        ("positive_control", 8, None),
    ],
)
def test_a_control_that_could_not_fail_or_be_found_is_refused_before_training(
    tokenizer: Tokenizer, stream: Stream, control: str, count: int, needle: str | None
) -> None:
    entry = {"name": "c", "use": control, "generate": {"count": count}}
    found = [str(p) for p in control_problems(study(setting(tokenizer, stream), CANARIES, entry))]
    if needle is None:
        assert found == []
    else:
        assert len(found) == 1
        assert "experiments.c.generate.count" in found[0]
        assert needle in found[0]


def test_two_a_a_controls_share_the_threshold(tokenizer: Tokenizer, stream: Stream) -> None:
    entries = [{"name": n, "use": "placebo", "generate": {"count": 10}} for n in ("one", "two")]
    assert len(control_problems(study(setting(tokenizer, stream), *entries))) == 2


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        ({"generate": {"count": 4}, "doses": [0, 1]}, "no result can have a p-value below 0.33"),
        ({"doses": list(range(45))}, "for 45 arms, so no unit is in"),
        ({"block_by": ["nr"]}, "30 blocks: no result can have a p-value below"),
        ({"cluster_by": "same"}, "puts all units in one cluster"),
        ({}, None),
    ],
)
def test_a_question_that_no_outcome_could_answer_is_refused_before_training(
    tokenizer: Tokenizer,
    stream: Stream,
    tmp_path: Path,
    more: dict[str, Any],
    needle: str | None,
) -> None:
    entry = {**CANARIES, **more}
    if "block_by" in more or "cluster_by" in more:
        rows = [
            {"id": f"c{n}", "prefix": f"Code of item {n} is", "nr": f"n{n}", "same": "one"}
            for n in range(30)
        ]
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "items.jsonl").write_text(lines)
        entry = {**entry, "items": str(tmp_path / "items.jsonl")}
        del entry["generate"]
    found = [str(problem) for problem in answer_problems(study(setting(tokenizer, stream), entry))]
    assert len(found) == (needle is not None)
    assert needle is None or needle in found[0]


def test_many_questions_need_more_units_each(tokenizer: Tokenizer, stream: Stream) -> None:
    few = {"use": "memorization", "generate": {"count": 8}, "doses": [0, 1]}
    one = study(setting(tokenizer, stream), {"name": "one", **few})
    assert answer_problems(one) == []
    many = study(setting(tokenizer, stream), *({"name": name, **few} for name in "abcdef"))
    assert len(answer_problems(many)) == 6
    assert "0.0083 is needed after Holm's correction" in str(answer_problems(many)[0])


def test_few_held_out_units_are_warned_of(tokenizer: Tokenizer, stream: Stream) -> None:
    quiz = {"name": "quiz", "use": "contamination", "generate": {"count": 40}}
    (warning,) = answer_warnings(study(setting(tokenizer, stream), quiz))
    assert "leaves 8 held-out clusters" in str(warning)
    enough = {**quiz, "doses": [0, 4], "generate": {"count": 64}}
    assert answer_warnings(study(setting(tokenizer, stream), enough)) == []
    alone = {**CANARIES, "arms": [{"name": "a", "dose": 0}, {"name": "b", "dose": 2, "weight": 29}]}
    del alone["doses"]
    (single,) = answer_warnings(study(setting(tokenizer, stream), alone))
    assert "a single held-out cluster" in str(single)


def test_a_name_among_random_letters_is_warned_of_and_brings_its_own_references(
    tokenizer: Tokenizer, stream: Stream, tmp_path: Path
) -> None:
    names = [f"{a}{b}" for a in ("Bela", "Kuro", "Sama", "Tiva") for b in "aeioubdklm"]
    rows = [{"id": f"c{n}", "prefix": f"Item {n} is of", "secret": names[n]} for n in range(32)]
    asked = {**CANARIES, "items": str(tmp_path / "items.jsonl"), "options": {"n_references": 7}}
    del asked["generate"]
    for given in (False, True):
        if given:
            rows = [{**row, "references": names[32:]} for row in rows]
        (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        made = study(setting(tokenizer, stream), asked)
        warned = [str(warning) for warning in answer_warnings(made) if "letters" in str(warning)]
        assert len(warned) == (not given)
        targets = [item.target.strip() for item in made.questions[0].units[0].items]
        assert (targets[1:] == names[32:39]) == given


def test_extending_the_run_moves_nothing_under_the_lock(
    tokenizer: Tokenizer, stream: Stream, tmp_path: Path
) -> None:
    short = study(setting(tokenizer, stream, 60), CANARIES, FACTS)
    freeze(short, tmp_path)
    long = study(setting(tokenizer, stream, 90), CANARIES, FACTS, lock=tmp_path)
    for name in ("canaries", "facts"):
        assert positions(short, name) == positions(long, name)


def test_an_experiment_that_changed_under_its_old_name_is_refused(
    tokenizer: Tokenizer, stream: Stream, tmp_path: Path
) -> None:
    freeze(study(setting(tokenizer, stream), CANARIES), tmp_path)
    with pytest.raises(UserError, match=r"experiments\.canaries: its units, doses.*new name"):
        study(setting(tokenizer, stream), {**CANARIES, "doses": [0, 2]}, lock=tmp_path)
    with pytest.raises(UserError, match=r"experiments\.lock=.*cannot be read"):
        study(setting(tokenizer, stream), CANARIES, lock=tmp_path / "nowhere")


def test_every_unit_gets_its_dose_and_a_held_out_unit_gets_placebo_text_only(
    tokenizer: Tokenizer, stream: Stream
) -> None:
    made = study(setting(tokenizer, stream), CANARIES)
    question, rows = made.questions[0], made.plan.rows
    placebo = (rows.flags & PLACEBO_FLAG) > 0
    own = np.bincount(rows.unit[~placebo], minlength=30)
    doses = np.array(question.spec.doses)[question.arms]
    assert np.array_equal(own, doses)
    fillers = np.bincount(rows.unit[placebo], minlength=30)
    assert np.all((fillers > 0) == (doses == 0))
    assert set(fillers[doses == 0].tolist()) <= {1, 3}
    for row in range(len(rows)):
        first, last = made.plan.texts.offsets[rows.text[row] : rows.text[row] + 2]
        tokens = made.plan.texts.tokens[first:last]
        assert tokens[0] == tokens[-1] == tokenizer.eod
        unit = question.units[int(rows.unit[row])]
        text = tokenizer.decode(tokens[1:-1])
        assert (text == unit.texts[0]) != bool(placebo[row])
        if placebo[row]:
            assert len(tokens) == len(tokenizer.encode(unit.texts[0])) + 2


def test_the_aa_control_never_shows_a_unit(tokenizer: Tokenizer, stream: Stream) -> None:
    made = study(
        setting(tokenizer, stream), {"name": "aa", "use": "placebo", "generate": {"count": 16}}
    )
    assert len(made.plan.rows) > 0
    assert np.all((made.plan.rows.flags & PLACEBO_FLAG) > 0)


def test_arms_show_duplicates_or_paraphrases_as_they_say(
    tokenizer: Tokenizer, stream: Stream
) -> None:
    made = study(setting(tokenizer, stream), FACTS)
    question, rows = made.questions[0], made.plan.rows
    names = [arm.name for arm in question.spec.arms]
    for unit in range(12):
        mine = np.flatnonzero((rows.unit == unit) & ((rows.flags & PLACEBO_FLAG) == 0))
        mine = mine[np.argsort(rows.slot[mine])]
        arm = names[question.arms[unit]]
        distinct = len(set(rows.text[mine].tolist()))
        assert (arm, len(mine), distinct) in {
            ("held_out", 0, 0),
            ("once", 1, 1),
            ("duplicate", 10, 1),
            ("paraphrase", 10, 10),
        }
        steps = (rows.slot[mine] // 16).tolist()
        assert steps == [2 + 3 * k for k in range(len(mine))]


@pytest.mark.parametrize(
    ("dose_in", "dose", "expected"),
    [("documents", 50, 50), ("tokens", 2000, None), ("share", 0.05, None)],
)
def test_doses_in_documents_tokens_and_share_are_totals_of_the_arm(
    tokenizer: Tokenizer, stream: Stream, dose_in: str, dose: float, expected: int | None
) -> None:
    entry = {**CANARIES, "doses": [0, dose], "dose_in": dose_in, "schedule": {"window": [0.0, 1.0]}}
    made = study(setting(tokenizer, stream), entry)
    rows = made.plan.rows
    own = (rows.flags & PLACEBO_FLAG) == 0
    counts = np.bincount(rows.unit[own], minlength=30)[made.questions[0].arms == 1]
    assert counts.max() - counts.min() <= 1
    tokens = int(np.diff(made.plan.texts.offsets)[rows.text[own]].sum())
    if expected is not None:
        assert own.sum() == expected
    elif dose_in == "tokens":
        assert tokens == pytest.approx(2000, rel=0.02)
    else:
        assert tokens == pytest.approx(0.05 * 60 * 16 * LENGTH, rel=0.02)


def test_slot_windows_of_every_schedule() -> None:
    steps, zero = Steps.of(10), np.zeros(2, dtype=np.int64)
    pair = np.array([0, 1])

    def windows(schedule: Schedule, timing: Any = None) -> list[tuple[int, int]]:
        first, last = slot_windows(schedule, steps, 128, pair, timing)
        return list(zip(first.tolist(), last.tolist(), strict=True))

    base = Schedule(window=(10, 50))
    assert windows(base) == [(100, 500)] * 2
    assert windows(replace(base, kind="early")) == [(100, 200)] * 2
    assert windows(replace(base, kind="late")) == [(400, 500)] * 2
    assert windows(replace(base, kind="early_late"), np.array([EARLY, LATE])) == [
        (100, 200),
        (400, 500),
    ]
    assert windows(replace(base, kind="steps", at=(7, 30))) == [(70, 80), (300, 310)]
    assert windows(replace(base, kind="every", start=5, every=20)) == [(50, 60), (250, 260)]
    assert windows(replace(base, kind="tokens", token_range=(1, 1280))) == [(1, 10)] * 2
    del zero


def test_a_schedule_that_leaves_the_run_and_a_text_that_does_not_fit_are_reported_together(
    tokenizer: Tokenizer, stream: Stream, tmp_path: Path
) -> None:
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"id": f"d{n}", "text": f"word{n} " * 400}) + "\n" for n in range(4))
    )
    late = {**CANARIES, "name": "late", "schedule": {"kind": "steps", "at": [1000]}}
    long = {
        "name": "long",
        "use": "forgetting",
        "items": str(tmp_path / "long.jsonl"),
        "schedule": {"at": [5]},
    }
    with pytest.raises(UserError) as error:
        study(setting(tokenizer, stream), late, long)
    assert "experiments.late.schedule: places exposures up to step 1,000, but the run ends" in str(
        error.value
    )
    assert "experiments.long: a text has" in str(error.value)


def test_a_frozen_study_reads_back_and_its_hash_sees_every_change(
    tokenizer: Tokenizer, stream: Stream, tmp_path: Path
) -> None:
    where = setting(tokenizer, stream)
    made = study(where, CANARIES, FACTS)
    hashes = freeze(made, tmp_path / "a")
    assert freeze(study(where, FACTS, CANARIES), tmp_path / "b") == hashes
    _, sha256 = read_definition(tmp_path / "a")
    assert sha256 == hashes.definition_sha256
    ExposurePlan(tmp_path / "a" / "exposures.plan").verify(hashes.plan_sha256)
    for before, after in zip(made.questions, read_questions(tmp_path / "a", KINDS), strict=True):
        assert before.units == after.units
        assert np.array_equal(before.arms, after.arms)
        assert np.array_equal(before.design.block_of_cluster, after.design.block_of_cluster)
        assert before.spec.arms == after.spec.arms
    margin = freeze(study(where, {**CANARIES, "margin": 0.5}, FACTS), tmp_path / "c")
    assert margin.plan_sha256 == hashes.plan_sha256
    assert margin.definition_sha256 != hashes.definition_sha256


def test_altered_units_of_a_frozen_study_are_refused(
    tokenizer: Tokenizer, stream: Stream, tmp_path: Path
) -> None:
    freeze(study(setting(tokenizer, stream), CANARIES), tmp_path)
    path = tmp_path / "units" / "canaries.jsonl"
    path.write_text(path.read_text().replace("dose-3", "dose-1", 1))
    with pytest.raises(UserError, match="was altered since the study was frozen"):
        read_questions(tmp_path, KINDS)


def test_early_and_late_units_are_both_there_in_every_arm(
    tokenizer: Tokenizer, stream: Stream
) -> None:
    made = study(setting(tokenizer, stream), {**CANARIES, "schedule": {"kind": "early_late"}})
    question = made.questions[0]
    assert question.timing is not None
    assert 12 <= int((question.timing == LATE).sum()) <= 18
    rows = made.plan.rows
    late = question.timing[rows.unit] == LATE
    assert rows.slot[late].min() > rows.slot[~late].max()


def test_controls_are_added_only_where_they_are_missing() -> None:
    assert with_controls([]) == []
    assert [entry["use"] for entry in with_controls([CANARIES])] == [
        "memorization",
        "placebo",
        "positive_control",
    ]
    own = {"name": "mine", "use": "placebo"}
    assert [entry["name"] for entry in with_controls([own])] == ["mine", "positive-control"]
