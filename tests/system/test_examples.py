"""The examples of guests run, a third as long as printed; their runs pass the audit, and Motet
takes ten lines of a script at most. One that runs as printed answers.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.system.runs import TIMEOUT_S, environment, kill_rank, losses, motet_here

pytest.importorskip("transformers", minversion="5")

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("trainer.py", "accelerate_loop.py", "deepspeed_loop.py")
MOST_LINES = 10
CONTROL = "- {name: control, use: positive_control, generate: {count: 16}, doses: [0, 8]}"
"""The usual one does not fit into 40 steps."""
EXACT = "\nimport torch\ntorch.set_default_dtype(torch.float64)\n"
"""At the examples' learning rate the rounding of float32 is 1e-5 of a loss after 25 steps, whatever
the ranks; in float64 a sum over ranks that is wrong is the only thing that can part two runs.
"""


def command(folder: Path, script: str, processes: int, *arguments: str) -> list[str]:
    """Return how to start an example of 40 steps; one process needs no torchrun, except for
    DeepSpeed.
    """
    text = (EXAMPLES / script).read_text()
    assert ("STEPS = 8, 2, 120" in text) == (script == "trainer.py")
    text = text.replace("STEPS = 8, 2, 120", "STEPS = 8, 2, 40")
    if script != "deepspeed_loop.py":
        text = text.replace("import motet  # motet\n", f"import motet  # motet\n{EXACT}")
    (folder / script).write_text(text)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    alone = processes == 1 and script != "deepspeed_loop.py"
    return [sys.executable, *([] if alone else torchrun), script, *arguments]


def settings(folder: Path, corpus: Path, short: bool = True) -> Path:
    text = (EXAMPLES / "run.yaml").read_text()
    edits = {"{path: corpora/mine}": f"{{path: {corpus}}}"}
    if short:
        edits |= {"steps: 120": "steps: 40", "  list:\n": f"  list:\n  {CONTROL}\n"}
    for old, new in edits.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def run(folder: Path, words: list[str]) -> None:
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        words, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def audit(folder: Path) -> str:
    done = motet_here("experiments", "audit", "runs/guest", "--replay", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing 0, repeated 0, unplanned 0" in done.stdout
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_motet_takes_at_most_ten_lines_and_each_is_marked(script: str) -> None:
    lines = (EXAMPLES / script).read_text().splitlines()
    code = lines[lines.index("from __future__ import annotations") :]
    marked = [line for line in code if line.endswith("# motet")]
    assert 0 < len(marked) <= MOST_LINES
    for line in code:
        assert ("guest" in line or "motet" in line) <= (line in marked), f"not marked: {line}"
    plain = "\n".join(line for line in code if line not in marked)
    assert "motet" not in plain


@pytest.mark.parametrize(
    ("script", "arguments", "alone"),
    [
        # the whole of it is trained below, the shares of two processes in tests/launcher/guest
        pytest.param("trainer.py", ["--cpu"], True, marks=pytest.mark.long),
        ("accelerate_loop.py", ["--cpu"], True),
        ("deepspeed_loop.py", ["3"], False),
    ],
    ids=["trainer", "accelerate", "deepspeed-zero-3"],
)
def test_an_example_passes_its_audit_and_has_a_report(
    corpus: Path, tmp_path: Path, script: str, arguments: list[str], alone: bool
) -> None:
    """On two processes; on one as well where that is quick, with the same losses."""
    found = []
    for processes in (1, 2)[not alone :]:
        folder = tmp_path / str(processes)
        folder.mkdir()
        yaml = settings(folder, corpus)
        run(folder, command(folder, script, processes, str(yaml), *arguments))
        assert f"model after step 40; 1 segment(s), ranks {processes}" in audit(folder)
        found.append(losses(folder / "runs" / "guest"))
        assert sorted(found[-1]) == list(range(1, 41))
    np.testing.assert_allclose(list(found[0].values()), list(found[-1].values()), rtol=1e-9)
    done = motet_here("report", "runs/guest", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "canaries" in (folder / "runs" / "guest" / "report.html").read_text()


def test_a_trainer_killed_on_two_processes_goes_on_with_one(corpus: Path, tmp_path: Path) -> None:
    yaml = settings(tmp_path, corpus)
    process = subprocess.Popen(
        command(tmp_path, "trainer.py", 2, str(yaml), "--cpu"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    guest = tmp_path / "runs" / "guest"
    deadline = time.monotonic() + TIMEOUT_S
    while max(losses(guest), default=0) < 13:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_rank(guest, 1, signal.SIGKILL)
    assert process.wait(timeout=TIMEOUT_S) != 0
    assert not (guest / "DONE").exists()
    run(tmp_path, command(tmp_path, "trainer.py", 1, str(yaml), "--cpu", "--resume"))
    assert "model after step 40; 2 segment(s), ranks 2 -> 1" in audit(tmp_path)
    assert (guest / "DONE").read_text().strip() == "40"


@pytest.fixture(scope="session")
def readme_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the README: the language reference that Python carries."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("readme")
    rows = [json.dumps({"id": name, "text": text}) for name, text in topics.items()]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    words = ("texts.jsonl", "--output", "mine", "--vocabulary-size", "1024")
    done = motet_here("data", "prepare", *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "mine"


def test_the_example_fits_and_a_third_of_it_is_warned_of(
    readme_corpus: Path, tmp_path: Path
) -> None:
    yaml = settings(tmp_path, readme_corpus)
    few = "training.schedule.warmup_steps=2"  # a guest's loop warms up by itself; 40 is below ours
    warned = motet_here("experiments", "check", str(yaml), few, cwd=tmp_path).stdout
    assert "warning: training.steps: is 40: experiments.control is judged at step 40" in warned
    yaml = settings(tmp_path, readme_corpus, short=False)
    checked = motet_here("experiments", "check", str(yaml), cwd=tmp_path)
    said, probes = checked.stdout.splitlines()
    assert said == "no problems in 1 experiment and the controls"
    assert probes.startswith("probes: about ")


@pytest.mark.parametrize(
    "script",
    [
        "trainer.py",
        # as valid, and a minute and a half: two processes of one core
        *(pytest.param(script, marks=pytest.mark.long) for script in SCRIPTS[1:]),
    ],
)
def test_an_example_as_printed_ends_in_a_valid_answer(
    readme_corpus: Path, tmp_path: Path, script: str
) -> None:
    yaml = settings(tmp_path, readme_corpus, short=False)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start = torchrun if script == "deepspeed_loop.py" else []
    cpu = [] if script == "deepspeed_loop.py" else ["--cpu"]
    run(tmp_path, [sys.executable, *start, str(EXAMPLES / script), str(yaml), *cpu])
    audit(tmp_path)
    assert motet_here("report", "runs/guest", cwd=tmp_path).returncode == 0
    answers = json.loads((tmp_path / "runs" / "guest" / "report.json").read_text())["answers"]
    (canaries,) = answers["experiments"]
    assert canaries["verdict"]["kind"] in ("found", "not_found", "negligible")
    assert [answers["controls"][kind]["ok"] for kind in ("placebo", "positive")] == [True, True]
