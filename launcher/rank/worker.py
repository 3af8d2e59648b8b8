"""What torchrun starts on every rank: `python -m motet.launcher.worker RUNDIR`.

Nothing heavy is imported here: importing torch takes seconds, and a signal that comes before its
handler is there kills the rank.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from motet.launcher.rank.stop import StopRequest

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
"""Who a process is that no launcher told: `accelerate launch` says nothing to a single one."""


def name_rank() -> None:
    """Let the environment say which rank this is.

    torchrun's c10d rendezvous numbers machines as they come; where the launcher knows their order,
    it left the number of the first rank of this machine in MOTET_RANK_OFFSET. What torchrun calls
    its rank 0 holds the store of the group all the same.
    """
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MOTET_HOLDS_STORE", str(int(os.environ["RANK"] == "0")))
    offset = os.environ.get("MOTET_RANK_OFFSET")
    if offset:
        os.environ["RANK"] = str(int(offset) + int(os.environ["LOCAL_RANK"]))


def open_logs(run: RunDir) -> None:
    """Open the folder of what ranks print as far as the one around it: torchrun makes it for its
    owner only, whatever the umask.
    """
    logs = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "/")).parent.parent.parent
    if os.environ["LOCAL_RANK"] == "0" and logs.is_relative_to(run.attempts):
        with contextlib.suppress(OSError):
            logs.chmod(stat.S_IMODE(logs.parent.stat().st_mode))


def main(argv: list[str]) -> int:
    """Run one attempt; the exit code is 0 when it finished, stopped as asked, or had nothing to do
    any more.
    """
    stop = StopRequest().listen()
    name_rank()
    from motet.core.access import follow
    from motet.launcher.rank.signals import Lifeline
    from motet.launcher.runs.attempts import launch_attempt, refusal, stopped_early
    from motet.launcher.runs.presence import be_present
    from motet.launcher.runs.rundir import RunDir
    from motet.launcher.runs.starting import Starting, StartStage, folder_of

    run = RunDir(Path(argv[0]))
    follow(run.root)
    launch = launch_attempt(run, os.environ.get("MOTET_ATTEMPT"))
    run.attempt(launch).mkdir(parents=True, exist_ok=True)  # by hand there is none yet
    open_logs(run)
    lifeline = Lifeline(run.attempt(launch), int(os.environ["LOCAL_WORLD_SIZE"])).watch()
    if stop.requested():
        lifeline.consider()
    if refusal(run, launch) or stopped_early(run, launch):
        return 0  # torchrun started this rank anew, but the launch is over; the launcher says why
    starting = Starting(folder_of(run.attempt(launch)), f"rank-{os.environ['RANK']}")
    starting.at(StartStage.IMPORTS, "torch to be imported")
    with be_present(run):
        from motet.launcher.rank.attempt import rank_main

        return rank_main(run, launch, stop, lifeline, starting)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
