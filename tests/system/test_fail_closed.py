"""Nothing trains on data or a plan that is not the frozen one, whichever rank sees it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.launcher.config import run_yaml
from motet.launcher.rank.attempt import _verified
from motet.launcher.runs.rundir import RunDir
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.system.runs import motet_here, write_yaml


def verdict(world: World, roots: list[Path]) -> str:
    """What a rank says about the run folder that it sees."""
    run = RunDir(roots[world.rank])
    try:
        _verified(run, run_yaml.load(run.resolved_yaml), world)
    except UserError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize("damage", ["altered", "missing", "another definition"])
def test_a_plan_that_is_wrong_on_one_rank_stops_all_with_the_reason(
    whole_run: Path, tmp_path: Path, damage: str
) -> None:
    other = tmp_path / "whole"
    shutil.copytree(whole_run, other)
    plan, definition = other / "plan" / "exposures.plan", other / "plan" / "definition.json"
    if damage == "altered":
        content = bytearray(plan.read_bytes())
        content[-5] ^= 1
        plan.write_bytes(bytes(content))
    elif damage == "missing":
        plan.unlink()
    else:
        definition.write_text(definition.read_text().replace('"margin":null', '"margin":0.5', 1))
    expected = {
        "altered": "was altered",
        "missing": "cannot be opened",
        "another definition": "was frozen with",
    }
    said = run_ranks(2, verdict, [whole_run, other])
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: ")
    assert expected[damage] in said[0]
    assert run_ranks(2, verdict, [whole_run, whole_run]) == ["fine", "fine"]


def test_settings_that_a_file_system_shows_late_to_one_rank_stop_all(
    whole_run: Path, tmp_path: Path
) -> None:
    """It reads those of before: nothing is trained by two settings."""
    other = tmp_path / "whole"
    shutil.copytree(whole_run, other)
    settings = run_yaml.load(RunDir(other).resolved_yaml)
    before = replace(settings, checkpoint=replace(settings.checkpoint, keep=7))
    run_yaml.store(RunDir(other).resolved_yaml, before)
    for said in run_ranks(2, verdict, [whole_run, other]):
        assert said.startswith("rank 1: this rank read other settings of the run than rank 0")
        assert "shows new files late" in said


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_shard_is_named_before_anything_starts(
    corpus: Path, tmp_path: Path, damage: str
) -> None:
    broken = tmp_path / "docs"
    shutil.copytree(corpus, broken)
    shard = next(broken.glob("tokens-*.bin"))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(bytes(content) if damage == "altered" else bytes(content[:-10]))
    yaml = write_yaml(tmp_path, broken, "r")
    done = motet_here("train", str(yaml), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "r").exists()


def test_a_report_under_a_changed_definition_says_so_in_its_first_line(
    whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "whole"
    shutil.copytree(whole_run, run)
    assert motet_here("report", str(run)).returncode == 0
    assert "differently" not in (run / "report.html").read_text()[:4000]
    resolved = run / "resolved.yaml"
    text = resolved.read_text()
    assert "use: memorization" in text
    resolved.write_text(text.replace("use: memorization", "use: memorization\n    margin: 0.3", 1))
    done = motet_here("report", str(run))
    assert done.returncode == 1, done.stderr
    assert done.stdout.split()[:5] == ["The", "run", "folder", "is", "damaged,"]
    assert "resolved.yaml was altered" in done.stdout
    page = (run / "report.html").read_text()
    body = page[page.index("<body") :]
    assert "resolved.yaml was altered" in body[: body.index("<h1")]
