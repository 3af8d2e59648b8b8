from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from unicodedata import combining

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.slurm.config import PATTERNS, BatchRequest, JobComponent, fault, seconds
from motet.slurm.script import batch_script

MODULES = {"hook": "motet.launcher.batch", "node": "motet.launcher.node"}
GOLDEN = Path(__file__).parents[1] / "golden"
REQUESTS = {
    "one": BatchRequest(
        name="first",
        run="/runs/first",
        python="/venv/bin/python",
        **MODULES,
        groups=(
            JobComponent(partition="gpu", nodes=4, processes=8, cpus=96, gpus=8, gpu_type="h100"),
        ),
        account="physics",
        qos="normal",
        time="2-00:00",
        passed=("WANDB_API_KEY",),
        variables=(("NCCL_DEBUG", "INFO"), ("NOTE", "a b")),
        modules=("cuda/12.4",),
        mail_user="me@site.org",
        mail_type=("END", "FAIL"),
        dependency=("afterok:12",),
    ),
    "groups": BatchRequest(
        name="two-kinds",
        run="/runs/two-kinds",
        python="/venv/bin/python",
        **MODULES,
        groups=(
            JobComponent(
                partition="h200", nodes=2, processes=8, cpus=64, gpus=8, constraint="ib&nvme"
            ),
            JobComponent(partition="a100", nodes=3, processes=4, cpus=32, gpus=4, memory="500G"),
        ),
        time="12:00:00",
        srun=("--container-image=/images/motet.sqsh", "--mpi=none"),
    ),
    "array": BatchRequest(
        name="seeds",
        run="/runs/seeds-seed",
        python="/usr/bin/python3",
        **MODULES,
        groups=(JobComponent(cpus=4, processes=4),),
        array=(1, 2, 30),
        array_limit=2,
        time="60",
        container=("apptainer", "exec", "/images/motet.sif"),
        requeue="never",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_batch_script_is_the_golden_one(name: str) -> None:
    assert batch_script(REQUESTS[name]) == (GOLDEN / f"sbatch_{name}.txt").read_text()


@pytest.mark.parametrize("name", REQUESTS)
def test_bash_understands_the_script(name: str) -> None:
    text = batch_script(REQUESTS[name])
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


FAKE_PYTHON = """#!/bin/bash
echo "$*" >> {folder}/asked
case "$3" in
begin) echo 7 ;;
end) exit {end} ;;
esac
"""
FAKE_SRUN = """#!/bin/bash
echo "attempt $MOTET_ATTEMPT" >> {folder}/asked
trap 'echo usr1 >> {folder}/asked; exit 3' USR1
for i in $(seq {tenths}); do sleep 0.1; done
exit {code}
"""
FAKE_SCONTROL = """#!/bin/bash
echo "scontrol $*" >> {folder}/asked
exit 1
"""


def run_script(
    folder: Path, end: int = 0, code: int = 0, tenths: int = 1
) -> tuple[subprocess.Popen[str], Path]:
    """Start the script of a small job with programs of our own in place of python, srun and
    scontrol.
    """
    programs = {"python": FAKE_PYTHON, "srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}
    for name, text in programs.items():
        (folder / name).write_text(text.format(folder=folder, end=end, code=code, tenths=tenths))
        (folder / name).chmod(0o755)
    request = BatchRequest(
        "r", str(folder / "run"), str(folder / "python"), (JobComponent(),), **MODULES
    )
    environment = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "12"}
    process = subprocess.Popen(
        ["bash", "-c", batch_script(request)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, folder / "asked"


@pytest.mark.parametrize(("end", "expected"), [(0, 0), (1, 1), (10, 1)])
def test_the_script_begins_trains_and_does_what_the_end_says(
    tmp_path: Path, end: int, expected: int
) -> None:
    process, asked = run_script(tmp_path, end=end, code=5)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == expected
    lines = asked.read_text().splitlines()
    run = tmp_path / "run"
    assert lines[0] == f"-m motet.launcher.batch begin {run}"
    assert lines[1] == "attempt 7"
    assert lines[2].rstrip() == f"-m motet.launcher.batch end {run} 5"
    assert lines[3:] == (["scontrol requeue 12"] if end == 10 else [])
    assert ("motet resume" in errors) == (end == 10)


@pytest.mark.parametrize(("number", "word"), [("USR1", "time"), ("TERM", "killed")])
def test_a_signal_reaches_the_step_and_the_end_learns_of_it(
    tmp_path: Path, number: str, word: str
) -> None:
    process, asked = run_script(tmp_path, tenths=200)
    while not asked.exists() or "attempt 7" not in asked.read_text():
        assert process.poll() is None
    subprocess.run(["kill", f"-{number}", str(process.pid)], check=True)
    process.communicate(timeout=30)
    lines = asked.read_text().splitlines()
    assert "usr1" in lines
    assert lines[-1] == f"-m motet.launcher.batch end {tmp_path / 'run'} 3 {word}"


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "value"])
@given(st.text() | st.text(st.sampled_from("/a ¹é\u0301'$\n\u2028\u200b;")).map("/{}".format))
def test_no_pattern_lets_through_what_a_shell_or_sbatch_would_read(name: str, value: str) -> None:
    if not fault(name, value):
        foreign = [letter for letter in value if not letter.isascii()]
        # Run folders may have letters of any script, and blanks: sbatch gets the path in quotes.
        assert not foreign or name == "path"
        assert all(letter.isalnum() or combining(letter) for letter in foreign)
        assert value.isprintable()
        allowed = {"srun": {"#"}, "path": {" "}}.get(name, set())
        assert not set(value) & set(" \t\n\r\"'`$;\\<>{}#!?") - allowed
        assert not set(value) & set("&|()*[]") or name == "constraint"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition", "gpu"),
        ("partition", "no"),
        ("partition", "gpu,gpu-long"),
        ("constraint", "[rack1*2&rack2]"),
        ("time", "12:30"),
        ("time", "1-12"),
        ("mail_user", "a.b+c@d.org"),
        ("dependency", "afterok:12:13_4"),
        ("srun", "--container-mounts=/data:/data,/home"),
    ],
)
def test_what_sites_use_is_allowed(name: str, value: str) -> None:
    assert fault(name, value) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition", "gpu\n#SBATCH --wrap=id"),
        ("partition", "gpu\n"),
        ("account", "$(id)"),
        ("qos", "-x"),
        ("time", "1h"),
        ("time", "٣٠"),
        ("srun", "--task-prolog=/tmp/x"),
        ("srun", "--export=ALL,A=b"),
        ("dependency", "singleton;id"),
        ("path", "/a /b"),
        ("path", "/a/%j"),
        ("name", "a" * 129),
    ],
)
def test_what_is_not_named_is_refused_with_the_reason(name: str, value: str) -> None:
    why = fault(name, value)
    assert why
    assert "\n" not in why
    assert len(why) < 300


@pytest.mark.parametrize(
    "make",
    [
        lambda: JobComponent(partition="a\nb"),
        lambda: JobComponent(constraint="`id`"),
        lambda: BatchRequest("r;id", "/r", "/p", (JobComponent(),), **MODULES),
        lambda: BatchRequest("r", "/r $(id)", "/p", (JobComponent(),), **MODULES),
        lambda: BatchRequest("r", "/r", "/p", (JobComponent(),), **MODULES, modules=("x; id",)),
        lambda: BatchRequest(
            "r", "/r", "/p", (JobComponent(),), **MODULES, variables=(("A", "'"),)
        ),
        lambda: BatchRequest(
            "r", "/r", "/p", (JobComponent(),), **MODULES, variables=(("A B", "x"),)
        ),
        lambda: BatchRequest(
            "r", "/r", "/p", (JobComponent(),), **MODULES, mail_type=("END --wrap",)
        ),
    ],
)
def test_no_request_can_be_made_of_a_faulty_text(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="cannot be handed to Slurm"):
        make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("90", 5400),
        ("12:30", 750),
        ("04:00:00", 14400),
        ("1-12", 129600),
        ("2-00:30", 174600),
        ("0-0:0:1", 1),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, expected: int | None) -> None:
    assert seconds(text) == expected
