"""A damaged `segment.json` of the steps that weights grew from: every command names it with what
works, a resume and `verify --mend` write it again, and what nobody keeps is said to be lost.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from motet.core.files import read_json, write_json
from motet.experiments.stream.ledger import (
    LedgerWriter,
    ancestry,
    open_segment,
    read_segment,
    segment_folder,
)
from motet.launcher.report.collect import assemble, collect
from motet.launcher.runs.mending import kept_segment, manifests_of, mend
from motet.launcher.runs.rundir import RunDir
from tests.launcher.invented import STEPS
from tests.launcher.runs.test_verify import (
    HOW,
    asked,
    damage,
    flip,
    no_ranks,
    run,
    said,
    weights_of,
    whole,
)

__all__ = ["no_ranks", "run", "weights_of", "whole"]
NAME = "ledger/segment-00001/segment.json"
REPORTED = ("cut",)
"""Ways of damage after which a report is made as well, which takes a second; it looks at the ledger
by the same code."""
HOWS = (*HOW, "gone", "of another segment", "half a character")


def spoil(run: RunDir, how: str) -> None:
    """Damage the first segment's file in one way."""
    path = run.root / NAME
    if how == "gone":
        path.unlink()
    elif how == "of another segment":
        other = segment_folder(run.ledger, 2) / path.name
        mine = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(mine)
    elif how == "half a character":
        path.write_bytes(path.read_bytes()[:20] + b"\xc3")
    else:
        damage(path, how)


def told(run: RunDir, command: str) -> tuple[int, str]:
    code, text = asked(run, command)
    return code, " ".join(text.split())


@pytest.mark.parametrize("how", HOWS)
def test_it_is_named_with_what_works_and_a_resume_writes_it_again(run: RunDir, how: str) -> None:
    kept, reports = content_of(run), how in REPORTED
    answers = assemble(collect(run))["answers"] if reports else None
    spoil(run, how)
    for command in ("audit", "verify"):
        code, text = told(run, command)
        assert (code, NAME in text) == (1, True), text
        assert "motet verify --mend writes it again" in text  # without the folder's name
    if reports:
        assert NAME in assemble(collect(run))["first_line"]
    code, text = told(run, "resume")
    assert code == 0, text
    assert "mended: ledger/segment-00001/" in text
    assert "warning: damaged" not in text
    assert content_of(run) == kept
    for command in ("audit", "verify"):
        code, text = told(run, command)
        assert code == 0, text
    if reports:
        after = assemble(collect(run))
        assert after["first_line"] is None
        assert after["answers"] == answers


def content_of(run: RunDir) -> dict[str, bytes]:
    """What the ledger's files hold; what was damaged is kept beside."""
    files = [path for path in run.ledger.rglob("*") if path.is_file()]
    return {str(p): p.read_bytes() for p in files if ".damaged-" not in p.name}


def test_verify_mends_when_it_is_asked_to(run: RunDir) -> None:
    spoil(run, "cut")
    assert said("verify", str(run.root))[0] == 1
    spoiled = (run.root / NAME).read_bytes()
    code, text = said("verify", "--mend", str(run.root))
    assert code == 0
    assert text.startswith(f"mended: {NAME} cannot be read as JSON")
    (aside,) = (run.root / NAME).parent.glob("segment.json.damaged-*")
    assert aside.read_bytes() == spoiled
    assert said("verify", "--mend", str(run.root))[1].startswith("whole: ")


def test_a_dry_run_mends_nothing(run: RunDir) -> None:
    spoil(run, "cut")
    before = content_of(run)
    assert said("resume", "--dry-run", str(run.root))[0] == 0
    assert content_of(run) == before


def forget(run: RunDir, step: int, **other: object) -> None:
    """Let a checkpoint say something else of the segments that it grew from."""
    path = run.checkpoint(step) / "manifest.json"
    facts = read_json(path)
    kept = {key: value for key, value in facts.items() if key != "lineage"}
    write_json(path, kept | other)


def refused(run: RunDir) -> None:
    """Nothing is written in the place of what nobody keeps, and that is said; the run goes on."""
    spoil(run, "cut")
    before = content_of(run)
    code, text = told(run, "verify")
    assert code == 1
    assert "no checkpoint keeps what it held, so without it no audit can pass" in text
    code, text = told(run, "resume")
    assert code == 0
    assert f"warning: damaged: {NAME}" in text
    assert "ranks start" in text or "finished" in text
    assert content_of(run) == before


def test_what_no_checkpoint_keeps_is_not_made_up(run: RunDir) -> None:
    """Checkpoints of before they kept segments."""
    for step in run.checkpoint_steps():
        forget(run, step)
    refused(run)


def test_checkpoints_that_say_different_things_of_a_segment_are_not_believed(run: RunDir) -> None:
    (first, second) = run.checkpoint_steps()
    line = read_json(run.checkpoint(second) / "manifest.json")["lineage"]
    forget(run, first, lineage=[line[0] | {"attempt": 7}])
    refused(run)


@pytest.mark.parametrize(
    "other",
    [{"start_step": 5}, {"world_size": 0}, {"plan_sha256": "f" * 64}, {"definition_sha256": "f"}],
    ids=str,
)
def test_records_and_plan_must_agree_with_what_is_kept(
    run: RunDir, other: dict[str, object]
) -> None:
    for step in run.checkpoint_steps():
        line = read_json(run.checkpoint(step) / "manifest.json")["lineage"]
        forget(run, step, lineage=[line[0] | other, *line[1:]])
    refused(run)


def test_a_checkpoint_of_another_run_is_not_believed(run: RunDir) -> None:
    for step in run.checkpoint_steps():
        facts = read_json(run.checkpoint(step) / "manifest.json")
        forget(run, step, lineage=facts["lineage"], run_sha256="f" * 64)
    assert kept_segment(run, 1, manifests_of(run)) is None


def test_one_checkpoint_that_is_whole_is_enough(run: RunDir) -> None:
    flip(run.checkpoint(STEPS // 2) / "manifest.json")
    spoil(run, "empty")
    (done,) = mend(run)
    assert done.startswith(NAME)
    assert read_segment(run.ledger, 1).world_size == 1


def test_a_run_that_goes_on_from_an_older_one_keeps_all_of_its_segments(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    first = open_segment(ledger, 0, 1, 0, 2, ("p", "d"))
    second = open_segment(ledger, 1, 2, 8, 1, ("p", "d"))
    assert [one["segment"] for one in ancestry(ledger, first)] == [1]
    assert [one["segment"] for one in ancestry(ledger, second, {"segment": 1})] == [1, 2]
    line = ancestry(ledger, first)
    (segment_folder(ledger, 1) / "segment.json").write_text("{")
    assert ancestry(ledger, second, {"segment": 1}) == [], "not known, so nothing is said"
    assert [one["segment"] for one in ancestry(ledger, second, {"lineage": line})] == [1, 2]


def test_records_that_lie_under_the_name_of_the_facts_are_not_lost(run: RunDir) -> None:
    """With two ranks each has a file; the facts changed places with the second's."""
    shutil.rmtree(segment_folder(run.ledger, 2))
    segment = open_segment(run.ledger, 1, 2, STEPS // 2, 2, ("p", "d"))
    for rank in (0, 1):
        LedgerWriter(run.ledger, segment.segment, rank).close()
    folder = segment_folder(run.ledger, 2)
    record = (segment_folder(run.ledger, 1) / "rank-00000.bin").read_bytes()
    (folder / "rank-00001.bin").write_bytes(record)
    before = content_of(run)
    (folder / "segment.json").rename(folder / "x")
    (folder / "rank-00001.bin").rename(folder / "segment.json")
    (folder / "x").rename(folder / "rank-00001.bin")
    (done,) = mend(run)
    assert done.endswith("rank-00001.bin had changed places; each has its own again")
    assert content_of(run) == before
