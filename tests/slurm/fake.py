"""Slurm's commands as small programs on a PATH of their own: they note what they were asked, and
answer as a test says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol")

_PROGRAM = """\
#!{python} -S
import json, os, pathlib, sys, time
folder, name = pathlib.Path({folder!r}), {name!r}
answers = json.loads((folder / "answers.json").read_text())
text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
note = {{"command": name, "arguments": sys.argv[1:], "stdin": text, "environment": dict(os.environ)}}
with open(folder / "asked.jsonl", "a") as file:
    file.write(json.dumps(note) + "\\n")
keys = [name + " " + a for a in sys.argv[1:]] + [name]
answer = next((answers[k] for k in keys if k in answers), {{}})
time.sleep(answer.get("wait_s", 0))
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("error", ""))
sys.exit(answer.get("code", 0))
"""


class FakeSlurm:
    """A Slurm that remembers; `answer` says what a command prints.

    Args:
        folder: where its commands lie.
        commands: those that there are.
    """

    def __init__(self, folder: Path, commands: tuple[str, ...] = COMMANDS) -> None:
        self.folder = folder
        self.answers: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name in commands:
            program = folder / name
            program.write_text(
                _PROGRAM.format(python=sys.executable, folder=str(folder), name=name)
            )
            program.chmod(0o755)
        self.answer("sbatch --version", "slurm-wlm 22.05.8\n")
        self.answer("sbatch --test-only", error="sbatch: Job 9 to start at 2030-01-01T00:00:00\n")
        self.answer("sbatch", "4711\n")

    def answer(
        self, asked: str, out: str = "", error: str = "", code: int = 0, wait_s: float = 0
    ) -> None:
        """Say what a command answers; `asked` is its name, or its name and one of its arguments."""
        self.answers[asked] = {"out": out, "error": error, "code": code, "wait_s": wait_s}
        (self.folder / "answers.json").write_text(json.dumps(self.answers))

    def environment(self, **more: str) -> dict[str, str]:
        """Variables with which commands find this Slurm and no other."""
        return {**os.environ, "PATH": f"{self.folder}:/usr/bin:/bin", **more}

    def asked(self, command: str = "") -> list[dict[str, Any]]:
        """What was asked so far, of one command or of all."""
        path = self.folder / "asked.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        notes = [json.loads(line) for line in lines]
        return [note for note in notes if command in ("", note["command"])]
