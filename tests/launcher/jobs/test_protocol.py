"""The launcher speaks of schedulers in neutral terms; Slurm's words stay in its room."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.core.jobs import FINISHED_STATES, JobState
from motet.slurm import states
from tests.imports import ROOT

# Who may talk to the slurm room: the adapter, the section `slurm:` of run.yaml with its checks, the
# list of nodes as a cluster, and the commands that are Slurm's own by name.
MAY_IMPORT_SLURM = (
    "launcher/jobs/slurm_scheduler.py",
    "launcher/config/batch.py",
    "launcher/config/checks.py",
    "launcher/measure/slurm_cluster.py",
    "launcher/commands/cluster/told.py",
    "launcher/commands/slurm/",
)
VARIABLE = re.compile(r"\b(SLURM|SBATCH|SQUEUE|SRUN)_[A-Z]*")


def texts(path: Path) -> Iterator[str]:
    """Every text of a module but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in docstrings:
            yield node.value


def launcher() -> list[Path]:
    return sorted((ROOT / "launcher").rglob("*.py"))


def test_the_launcher_knows_no_variable_and_no_state_of_slurm() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {text[:60]!r}"
        for path in launcher()
        for text in texts(path)
        if VARIABLE.search(text) or text in states._STATES
    ]
    assert not wrong


def test_few_modules_of_the_launcher_talk_to_the_slurm_room() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in launcher()
        if re.search(r"^\s*from motet\.slurm", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert not [name for name in importing if not name.startswith(MAY_IMPORT_SLURM)]
    unused = [o for o in MAY_IMPORT_SLURM if not any(name.startswith(o) for name in importing)]
    assert not unused


@pytest.mark.parametrize("word", states._STATES)
def test_every_word_of_slurm_has_a_state_and_what_has_ended_says_how(word: str) -> None:
    state = states.state(word)
    if state in FINISHED_STATES and state is not JobState.SUCCEEDED:
        assert states.why(word, "").startswith(("it ", "a node ", "another cluster "))
    elif state is JobState.PENDING:
        assert states.why(word, "Resources") == "waits until enough nodes are free (Resources)"


def test_a_state_of_a_newer_slurm_means_that_the_job_is_starting() -> None:
    assert states.state("POWER_UP_NODE") is JobState.STARTING
    assert states.why("POWER_UP_NODE", "") == "Slurm says POWER_UP_NODE"
