"""Several machines by hand: `motet train RUN.yaml --nnodes 2 --node-rank K --endpoint HOST:PORT` on
each.

They meet in the run's folder, on a file system that all of them see. The first machine makes (or
opens) the run and holds it; each other leaves a request with a word that nobody else knows; once
all have, the first claims an attempt and answers with the words, so that an answer of an earlier
launch is never taken for this one's. The rest is `meeting.py`'s. `motet cluster probe`, which has
no run, meets alike in a folder of the user's.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from motet.core.errors import DamagedFile, UserError
from motet.core.files import read_json, write_json
from motet.core.hashing import sha256_hex
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.launch.alone import private_folder
from motet.launcher.launch.command import NodePlace
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.stage_layouts import checked_layouts, family_of
from motet.models.config import ModelConfig

WAIT_S = 600.0
POLL_S = 0.2
_T = TypeVar("_T")


@dataclass(frozen=True)
class JoinRequest:
    """What a machine tells the first one: its word, its name, its processes, and its settings
    (without the processes).
    """

    word: str
    host: str
    processes: int
    settings: Mapping[str, Any]


def request_of(settings: RunSettings) -> JoinRequest:
    """Return this machine's request."""
    told = run_yaml.public(replace(settings, layout=replace(settings.layout, processes=1)))
    told.pop("runs", None)  # where the folder lies may differ between machines
    return JoinRequest(secrets.token_hex(8), socket.gethostname(), settings.layout.processes, told)


def places(
    requests: Mapping[int, JoinRequest], endpoint: str
) -> tuple[dict[int, NodePlace], str | None]:
    """Return each machine's place, and what is wrong with them together, if anything."""
    count = len(requests)
    sizes = [requests[rank].processes for rank in range(count)]
    total = sum(sizes)
    place_of = {
        rank: NodePlace(count, rank, endpoint, sum(sizes[:rank]), total) for rank in range(count)
    }
    for rank in range(1, count):
        if requests[rank].settings != requests[0].settings:
            differing = sorted(
                key
                for key, value in requests[0].settings.items()
                if requests[rank].settings.get(key) != value
            )
            return place_of, (
                f"machine {rank} ({requests[rank].host}) was given other settings than machine 0 "
                f"({requests[0].host}): "
                f"{', '.join(differing)}; give all machines the same file and settings "
                "(layout.processes may differ)"
            )
    if requests[0].settings["layout"]["engine"] == "accelerate" and len(set(sizes)) > 1:
        return (
            place_of,
            f"layout.processes={sizes}: Accelerate needs the same number on every machine",
        )
    return place_of, None


def gather(run: RunDir, settings: RunSettings, count: int, endpoint: str) -> tuple[int, NodePlace]:
    """As the first machine: wait for the others' requests, claim an attempt, answer; return both.

    Raises:
        UserError: not all came in time, or they do not fit together. The others are told.
    """
    private_folder(run.joining)
    for leftover in run.joining.glob("*.json"):
        leftover.unlink()
    requests = {0: request_of(settings)}
    try:
        for rank in range(1, count):
            path = run.joining / f"{rank}.json"
            missing = f"machine {rank} of {count} did not come within {WAIT_S:.0f} s"
            wanted = (
                f"motet: waiting for machine {rank}: it needs the same command with --node-rank "
                f"{rank}"
            )
            requests[rank] = JoinRequest(**_wait(partial(_read, path), missing, wanted))
        place_of, wrong = places(requests, endpoint)
        if wrong:
            raise UserError(wrong)
        _check_together(run, settings, place_of[0].world_size(0))
    except UserError as error:
        refused = {"words": _words(requests), "error": str(error)}
        write_json(run.joining / "answer.json", refused, private=True)
        raise
    attempt = run.next_attempt()
    offsets = {str(rank): place.offset for rank, place in place_of.items()}
    write_json(
        run.joining / "answer.json",
        {
            "words": _words(requests),
            "attempt": attempt,
            "offsets": offsets,
            "total": place_of[0].total,
        },
        private=True,
    )
    return attempt, place_of[0]


def fresh_meeting(base: Path, nodes: NodePlace, wait_s: float) -> Path:
    """Return a private folder that all machines of this launch have, and no other launch.

    Args:
        base: on a file system that all of them see.
        nodes: launches of one endpoint at one time are taken for one.
        wait_s: for the other machines, in seconds.

    Raises:
        UserError: not all came in time, or the folder is someone else's.
    """
    private_folder(base)
    papers, mine = base / sha256_hex(nodes.endpoint)[:16], secrets.token_hex(8)
    papers.mkdir(mode=0o700, exist_ok=True)
    answered = papers / "answer.json"
    if nodes.rank:
        path = papers / f"{nodes.rank}.json"

        def answer() -> dict[str, Any] | None:
            if (_read(path) or {}).get("word") != mine:
                write_json(path, {"word": mine}, private=True)
            told = _read(answered)
            return told if told and mine in told["words"] else None

        late = f"machine 0 did not come to {base} within {wait_s:.0f} s; do all machines see it?"
        found = _wait(answer, late, f"motet: waiting for machine 0 in {base}", wait_s)
        return papers / str(found["folder"])
    for paper in papers.glob("*.json"):
        paper.unlink(missing_ok=True)
    for earlier in filter(Path.is_dir, papers.iterdir()):
        shutil.rmtree(earlier)
    words = []
    for rank in range(1, nodes.count):
        late = f"machine {rank} did not come to {base} within {wait_s:.0f} s; do all see it?"
        come = partial(_read, papers / f"{rank}.json")
        words.append(_wait(come, late, f"motet: waiting for machine {rank}", wait_s)["word"])
    made = papers / mine
    made.mkdir(mode=0o700)
    write_json(answered, {"words": words, "folder": made.name}, private=True)
    return made


def _words(requests: Mapping[int, JoinRequest]) -> list[str]:
    return [request.word for request in requests.values()]


def _check_together(run: RunDir, settings: RunSettings, total: int) -> None:
    """The layout fits the processes of all machines."""
    manifest = read_json(run.manifest)
    model = ModelConfig(**manifest["model"])
    family = family_of(settings, model, run, manifest)
    checked_layouts(settings, manifest, model, total, family=family, alone=False)


def ask_to_join(run: RunDir, settings: RunSettings, nodes: NodePlace) -> tuple[int, NodePlace]:
    """As another machine: wait for the run, leave a request, wait for the answer; return the
    attempt and this machine's place.

    Raises:
        UserError: the first machine did not come in time, or refused.
    """
    late = (
        f"machine 0 did not make {run.root} ready within {WAIT_S:.0f} s; is it on a file system "
        "that all machines see?"
    )
    say = f"motet: waiting for machine 0 at {run.root}"
    _wait(lambda: run.manifest.exists() and run.resolved_yaml.exists(), late, say)
    mine, path = request_of(settings), run.joining / f"{nodes.rank}.json"

    def answer() -> dict[str, Any] | None:
        # The first machine clears what earlier launches left; what is there may be an earlier
        # request of this machine.
        if (_read(path) or {}).get("word") != mine.word:
            run.joining.mkdir(exist_ok=True, mode=0o700)
            write_json(path, vars(mine), private=True)
        told = _read(run.joining / "answer.json")
        return told if told and mine.word in told["words"] else None

    told = _wait(answer, late, say)
    if told.get("error"):
        raise UserError(f"machine 0 refused: {told['error']}")
    offset = int(told["offsets"][str(nodes.rank)])
    return int(told["attempt"]), replace(nodes, offset=offset, total=int(told["total"]))


def _read(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON, None while it is not there: another machine may remove it."""
    try:
        return dict(read_json(path))
    except DamagedFile:
        if path.exists():
            raise
        return None


def _wait(ready: Callable[[], _T | None], late: str, say: str, wait_s: float | None = None) -> _T:
    """Wait for something that is true; says so after two seconds.

    Raises:
        UserError: it was not there in time.
    """
    began, said = time.monotonic(), False
    while not (found := ready()):
        waited = time.monotonic() - began
        if waited > (WAIT_S if wait_s is None else wait_s):
            raise UserError(late)
        if waited > 2.0 and not said:
            said = True
            print(say, file=sys.stderr, flush=True)
        time.sleep(POLL_S)
    return found
