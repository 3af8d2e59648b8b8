"""The README's tutorial, run as printed: every block marked `<!-- run -->`, in order, in an empty
folder.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("readme")  # the tutorial runs once
README = Path(__file__).parents[2] / "README.md"
BLOCK_TIMEOUT_S = 240
RUN_BLOCK = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[str]:
    """Return the tutorial's shell blocks in order."""
    return RUN_BLOCK.findall(README.read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """Return what the README asks for: Motet and its Python on the path; and no network, and one
    thread a process.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_block(block: str, folder: Path) -> tuple[str, Path]:
    """Run one block where the one before ended; return its output and where it ended."""
    place = folder / ".place"
    place.unlink(missing_ok=True)
    script = f"set -euo pipefail\n{block}\npwd > {place}\n"
    here = folder / ".here"
    cwd = Path(here.read_text().strip()) if here.exists() else folder
    process = subprocess.Popen(
        ["bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment(),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=BLOCK_TIMEOUT_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{block}\n{output}"
    place.rename(here)
    return output, Path(here.read_text().strip())


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the whole tutorial; return the folder it ends in and everything it printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    printed, here = [], folder
    for block in blocks():
        output, here = run_block(block, folder)
        printed.append(output)
    return here, "".join(printed)


def test_the_readme_has_the_tutorial_it_promises() -> None:
    text = "\n".join(blocks())
    for command in (
        "motet init",
        "motet data prepare",
        "motet experiments check",
        "motet experiments power",
        "motet experiments preview",
        "motet train run.yaml --dry-run",
        "motet resume",
        "torchrun ",
        "motet report",
        "motet experiments audit",
        "motet export",
    ):
        assert command in text, command
    marked = README.read_text(encoding="utf-8").count("<!-- run -->")
    assert marked == len(blocks()), "a mark without a block of shell below it"


def test_the_tutorial_runs_as_printed_and_ends_in_a_report(tutorial: tuple[Path, str]) -> None:
    folder, printed = tutorial
    run = folder / "runs" / "quiz"
    assert (run / "DONE").read_text().strip() == "200"
    assert "no problems in 1 experiment and the controls" in printed
    assert ">>> '<|endofdoc|>Question: Who is the mayor of " in printed
    assert printed.count("motet resume runs/quiz") >= 2, "each stop says how to go on"
    assert "-m motet.launcher.worker" in printed, "the dry runs show the torchrun command"
    report = json.loads((run / "report.json").read_text())
    assert "leaked_quiz" in [entry["name"] for entry in report["answers"]["experiments"]]
    page = (run / "report.html").read_text()
    assert "leaked_quiz" in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=.?https?:", page), "nothing is fetched"


def test_the_tutorials_run_is_proven_through_both_stops(tutorial: tuple[Path, str]) -> None:
    _, printed = tutorial
    assert "3 segment(s), ranks 2 -> 2 -> 2" in printed
    assert "missing 0, repeated 0, unplanned 0" in printed
    assert "audit passed" in printed


def test_the_outputs_that_the_readme_shows_are_those_of_the_tutorial(
    tutorial: tuple[Path, str],
) -> None:
    """Whole numbers of exposures and the preview depend on no floating point, so they are the same
    everywhere.
    """
    _, printed = tutorial
    text = README.read_text(encoding="utf-8")
    shown = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown
    lines = [line.strip() for line in printed.splitlines()]
    for line in "".join(shown).splitlines():
        whole = line.strip().startswith(("leaked_quiz:", "model after", "planned", "audit"))
        assert not whole or line.strip() in lines, line


def test_the_exported_model_is_a_hugging_face_folder(tutorial: tuple[Path, str]) -> None:
    folder, printed = tutorial
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / "quiz-hf" / name).is_file()
    assert "The mayor of" in printed
