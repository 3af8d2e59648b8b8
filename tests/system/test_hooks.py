"""Hooks of the user's own, from a file next to run.yaml, in real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.system.runs import RUN_YAML, motet, motet_here, write_yaml

BOTH = ("before_step", "after_step")
HOOKS = '''
import json
from pathlib import Path

from motet.launcher.rank.hooks import Hook, HookContext

SEEN = Path(__file__).resolve().parents[2] / "seen"  # in the run folder


class Diary(Hook):
    """Writes down every moment, and what it may see."""

    def _write(self, moment: str, context: HookContext) -> None:
        SEEN.mkdir(exist_ok=True)
        weights = sorted(context.weights()) if moment == "at_end" else None
        facts = {key: value for key, value in context.facts.items() if key != "folder"}
        line = [moment, context.step, context.world_size, facts, weights]
        with open(SEEN / f"rank-{context.rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")

    def before_step(self, context: HookContext) -> None:
        self._write("before_step", context)

    def after_step(self, context: HookContext) -> None:
        self._write("after_step", context)
        context.log(twice_the_loss=2 * context.facts["loss"])
        if context.step == 7 and context.rank == 1:
            context.ask_to_stop("seen enough")

    def at_probe(self, context: HookContext) -> None:
        self._write("at_probe", context)

    def at_checkpoint(self, context: HookContext) -> None:
        self._write("at_checkpoint", context)

    def at_end(self, context: HookContext) -> None:
        self._write("at_end", context)


class Breaks(Hook):
    """Fails on one rank only."""

    def after_step(self, context: HookContext) -> None:
        if context.step == 3 and context.rank == 1:
            raise ValueError("no such file: notes.txt")
'''


def write(folder: Path, corpus: Path, name: str, hook: str) -> Path:
    (folder / "my_hooks.py").write_text(HOOKS)
    line = f"training:\n  hooks: [my_hooks.py:{hook}]"
    return write_yaml(folder, corpus, name, lambda text: text.replace("training:", line))


def seen(run: Path, rank: int) -> list[list[object]]:
    return [json.loads(line) for line in (run / f"seen/rank-{rank}.jsonl").open()]


def test_a_users_hook_sees_every_moment_on_every_rank_logs_and_stops_the_run(
    tmp_path: Path, corpus: Path
) -> None:
    yaml = write(tmp_path, corpus, "r", "Diary")
    done = motet("train", str(yaml))
    run = tmp_path / "runs/r"
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stdout
    (tmp_path / "my_hooks.py").unlink()  # the run has its own copy
    steps = [entry[:2] for entry in seen(run, 0) if str(entry[0]).endswith("_step")]
    assert steps == [
        [moment, step + late] for step in range(7) for late, moment in enumerate(BOTH)
    ], "one rank's wish stops both after step 7"
    assert ["at_checkpoint", 6] in [entry[:2] for entry in seen(run, 0)]
    assert [entry[:3] for entry in seen(run, 0)] == [entry[:3] for entry in seen(run, 1)]
    ends = [seen(run, rank)[-1] for rank in (0, 1)]
    assert [end[3] for end in ends] == [{"reason": "stopped"}] * 2
    assert "blocks.0.attention.q_proj.weight" in ends[0][4]
    assert ends[1][4] == []
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}
    hooks = {row["step"]: row["Diary"] for row in rows if row["kind"] == "hook"}
    assert hooks == {step: {"twice_the_loss": 2 * loss} for step, loss in losses.items()}

    (run / "code/plugins/my_hooks.py").write_text(HOOKS + "\n# changed\n")
    changed = motet_here("resume", str(run))
    assert changed.returncode == 2
    assert "is not the source that the run was frozen with" in changed.stderr
    assert "Traceback" not in changed.stderr
    (run / "code/plugins/my_hooks.py").unlink()
    missing = motet_here("resume", str(run))
    assert missing.returncode == 2
    assert "code/plugins/my_hooks.py is missing" in missing.stderr
    (run / "code/plugins/my_hooks.py").write_text(HOOKS)
    new = motet_here("resume", str(run), "training.hooks=[my_hooks.py:Breaks]")
    assert new.returncode == 2
    assert "the run was frozen without it" in new.stderr
    without = motet("resume", str(run), "training.hooks=[]")
    assert without.returncode == 0, without.stderr
    assert (run / "DONE").exists()
    audit = motet_here("experiments", "audit", str(run))
    assert audit.returncode == 0, audit.stdout


def test_a_hook_that_fails_on_one_rank_ends_the_run_with_one_message(
    tmp_path: Path, corpus: Path
) -> None:
    yaml = write(tmp_path, corpus, "r", "Breaks")
    done = motet("train", str(yaml))
    assert done.returncode == 2, done.stdout
    line = 1 + HOOKS[: HOOKS.index("raise ValueError")].count("\n")
    place = (
        f"{tmp_path}/runs/r/code/plugins/my_hooks.py:{line}: ValueError: no such file: notes.txt"
    )
    assert "my_hooks.py:Breaks" in done.stderr
    assert f"after_step at step 3 failed: {place}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("my_hooks.py:Dairy", "has no class 'Dairy'"),
        ("other.py:Diary", "there is no file"),
        ("my_hooks.py:json", "must be a class"),
        ("Diary", "it must be my_file.py:Class"),
    ],
)
def test_a_hook_that_cannot_be_loaded_is_refused_before_the_run_exists(
    tmp_path: Path, corpus: Path, hook: str, message: str
) -> None:
    yaml = write(tmp_path, corpus, "r", "Diary")
    done = motet_here("train", str(yaml), f"training.hooks=[{hook!r}]")
    assert done.returncode == 2
    assert message in done.stderr
    assert "training.hooks.0" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in done.stderr


def test_a_run_without_hooks_writes_no_word_of_them(whole_run: Path) -> None:
    assert "hooks" not in RUN_YAML
    assert "hooks:" not in (whole_run / "resolved.yaml").read_text()
    assert "plugins" not in json.loads((whole_run / "manifest.json").read_text())
    assert not (whole_run / "code/plugins").exists()
