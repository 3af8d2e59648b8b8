"""`motet status`, `logs` and `cancel` on a run that really trains."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from motet.launcher.runs.rundir import RunDir
from tests.system.runs import (
    MOTET,
    TIMEOUT_S,
    environment,
    kill_rank,
    motet,
    rows,
    train_until,
    write_yaml,
)


def test_a_run_is_followed_through_a_restart_to_its_cancelling(
    tmp_path: Path, corpus: Path
) -> None:
    yaml = write_yaml(tmp_path, corpus, "r", lambda text: text.replace("steps: 24", "steps: 4000"))
    process, run = train_until(yaml, 8)
    with subprocess.Popen(
        [*MOTET, "logs", "r", "-f"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
    ) as following:
        try:
            kill_rank(run, 1, signal.SIGKILL)
            while not any(row["attempt"] == 2 for row in rows(run, "attempt")):
                assert process.poll() is None
                time.sleep(0.05)
            told = json.loads(motet("status", "r", "--json", cwd=tmp_path).stdout)["runs"][0]
            assert told["state"] == "running"
            assert told["attempts"] == 2
            assert told["steps"] == 4000
            first, second = told["attempt_list"]
            assert (first["reason"], second["reason"]) == ("crashed", "running")
            assert "rank 1" in first["why"]
            done = motet("cancel", "r", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            newest = RunDir.open(run).checkpoint_steps()[-1]
            assert f"stopped; the newest checkpoint is step {newest}" in done.stdout
            assert process.wait(TIMEOUT_S) == 0
            out, err = following.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
            following.kill()
    assert "[1.0] " in out
    # What rank 0 said of the loss of its peer: it failed in a collective, or was told before it did.
    assert "Error" in out or "another rank of this machine was gone" in out
    assert err == "motet: r is stopped: as asked, after a checkpoint\n"
    listed = motet("ls", cwd=tmp_path).stdout.splitlines()
    assert listed[1].split()[:2] == ["r", "stopped"]
