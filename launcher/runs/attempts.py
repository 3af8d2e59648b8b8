"""Who claims an attempt, how each of them ended, and whether they crash in a loop: from
`attempts/N/` alone.

One start by the launcher (a *launch*) makes an attempt, and each restart by torchrun inside it
makes another.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile, UserError
from motet.core.files import read_fields, write_json
from motet.launcher.runs.blame import blame
from motet.launcher.runs.rundir import RunDir

CRASHES_IN_A_ROW = 2
DAMAGED = ".damaged-"
"""In the name of a checkpoint that could not be used, and was set aside."""
HANDED_OVER = "handed_over"
"""How an attempt ended whose stage is over, where the next one needs other ranks."""
ENDED_WELL = ("finished", "stopped", HANDED_OVER)
STOP_MARKER = "stop"
"""File of an attempt that was asked to stop before it trained."""


def facts_of(folder: Path) -> dict[str, Any]:
    """Return attempt.json, {} when it is missing or damaged."""
    try:
        found = read_fields(folder / "attempt.json", {})
    except DamagedFile:
        return {}
    return found if str(found.get("attempt", folder.name)) == folder.name else {}


def begun(run: RunDir, number: int) -> bool:
    """Return whether ranks have taken the attempt."""
    return (run.attempt(number) / "attempt.json").exists()


def numbers(run: RunDir, since: int = 1, before: int | None = None) -> list[int]:
    """Return the attempts from `since` on that have a folder, those below `before` only."""
    last = run.latest_attempt() if before is None else before - 1
    return [number for number in range(max(1, since), last + 1) if run.attempt(number).is_dir()]


def launch_attempt(run: RunDir, told: str | None) -> int:
    """Return the attempt that this launch began with.

    Args:
        told: what the launcher left in MOTET_ATTEMPT; None for ranks that torchrun was made to
            start by hand, which take the newest folder unless another start took it.
    """
    if told:
        return int(told)
    latest = run.latest_attempt()
    return latest + 1 if latest == 0 or begun(run, latest) else latest


def claim(run: RunDir, launch: int, world_size: int) -> int:
    """Take an attempt for the group that has just formed (rank 0): the launch's own, or the next
    one after a restart.
    """
    if begun(run, launch):
        number = run.next_attempt()
    else:
        number = launch
        run.attempt(number).mkdir(parents=True, exist_ok=True)
    settle(run, launch, before=number)
    write_json(
        run.attempt(number) / "attempt.json",
        {
            "attempt": number,
            "start_step": newest_step(run),
            "end_step": None,
            "world_size": world_size,
            "started": time.time(),
            "ended": None,
            "reason": "running",
        },
    )
    return number


def settle(run: RunDir, launch: int, before: int | None = None) -> None:
    """Write down how attempts ended whose ranks had no time to, and which rank made them crash."""
    for number in numbers(run, before=before):
        facts = facts_of(run.attempt(number))
        settled = dict(facts)
        if facts.get("reason") == "running":
            settled |= {"reason": _unsaid_end(run, number, launch), "ended": time.time()}
        if settled.get("reason") == "crashed" and _told(run, number).exists():
            settled["reason"] = "refused"  # the others crashed on the rank that gave up
        if settled.get("reason") == "crashed" and "culprit" not in facts:
            settled["culprit"] = blame(run.attempt(number))
        if settled != facts:
            write_json(run.attempt(number) / "attempt.json", settled)


def _unsaid_end(run: RunDir, number: int, launch: int) -> str:
    """Return how an attempt ended that says "running" though nobody runs it: with its machine, when
    its launch is over as well.
    """
    if number < launch:
        return "lost"
    return "stopped" if stopped_early(run, launch) else "crashed"


def stopped_early(run: RunDir, launch: int) -> bool:
    """Return whether a stop was asked for in this launch before training began."""
    return (run.attempt(launch) / STOP_MARKER).exists()


def refusal(run: RunDir, launch: int) -> Path | None:
    """Return the error.txt of this launch: a mistake or a bad run, which a restart would only
    repeat.
    """
    files = (_told(run, number) for number in numbers(run, launch))
    return next((path for path in files if path.exists()), None)


def _told(run: RunDir, number: int) -> Path:
    return run.attempt(number) / "error.txt"


def refuse_start_over(run: RunDir) -> None:
    """Refuse to train from step 0 a run whose checkpoints were all found damaged.

    Raises:
        UserError: what to type when that is what is wanted.
    """
    lost = [path.name for path in run.checkpoints.glob(f"step-*{DAMAGED}*")]
    if not lost or run.checkpoint_steps():
        return
    names = ", ".join(sorted(lost))
    raise UserError(
        f"every checkpoint of {run.root} was damaged and is set aside ({names} in checkpoints/); "
        "restore one under its own name, or train from step 0 anew: "
        f"motet resume {run.root} --from-start"
    )


def give_up_damaged(run: RunDir) -> None:
    """Let a run start over although its checkpoints were damaged; they are kept, under names that
    speak of it.
    """
    for path in run.checkpoints.glob(f"step-*{DAMAGED}*"):
        path.rename(path.with_name(path.name.replace(DAMAGED, ".given-up-")))


def newest_step(run: RunDir) -> int:
    """Return the step that an attempt would start from now."""
    return (run.checkpoint_steps() or [0])[-1]


def crash_loop(run: RunDir, since: int = 1, before: int | None = None) -> str | None:
    """Return why another attempt would be in vain, None when it would not.

    The two newest attempts crashed, and both started from where the next one would. An attempt that
    was stopped, preempted or lost with its machine is no crash.

    Args:
        since: attempts before this one do not count (a person who resumes has a reason to).
        before: the attempt that is about to start, when it has its folder already.
    """
    found = [facts_of(run.attempt(number)) for number in numbers(run, since, before)]
    found = [facts for facts in found if facts][-CRASHES_IN_A_ROW:]
    step = newest_step(run)
    stuck = [f for f in found if f.get("reason") == "crashed" and f.get("start_step") == step]
    if len(stuck) < CRASHES_IN_A_ROW:
        return None
    names = " and ".join(str(facts.get("attempt", "?")) for facts in stuck)
    why = stuck[-1].get("culprit") or "its ranks left no word of why"
    return (
        f"attempts {names} both started from step {step:,} and crashed before the next checkpoint, "
        "so a third try is in vain; "
        f"the last time: {why}"
    )
