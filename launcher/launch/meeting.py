"""How the launchers of several machines meet: by papers in a private folder that all of them see.

Run by its path, with the module of a launcher and that one's arguments: `python meeting.py
torch.distributed.run --rdzv-backend motet --rdzv-conf rank=0 ...`. Nothing of Motet is imported
here: a run goes on with the code that it was frozen with, which may be older than this file.

torchrun's own c10d rendezvous listens on every interface, and unpickles what anyone writes there.
Here nothing listens, and papers are JSON. A round is complete when every machine has left its
paper in it; a machine whose ranks died begins the next round, which is how the others learn of it.
No clock is compared with another machine's.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from torch.distributed import FileStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

BACKEND = "motet"
FOLDER, ROUND = "MOTET_MEETING", "MOTET_ROUND"
"""Variables: where machines meet, and, for ranks, in which round of it they were started."""
POLL_S, LOOK_S = 0.1, 1.0
CLOSED = "closed"


class FolderMeeting(RendezvousHandler):
    """The rendezvous of one machine.

    Args:
        folder: private to the user, and of this launch alone.
        rank, count: which machine this is, of how many.
        run_id: torchrun's name for the run.
        join_s: how long a machine waits for the others, in seconds.
    """

    def __init__(self, folder: Path, rank: int, count: int, run_id: str, join_s: float) -> None:
        self.folder, self.rank, self.count = folder, rank, count
        self.run_id, self.join_s = run_id, join_s
        self.round = 0
        self._looked, self._waiting = 0.0, 0

    def get_backend(self) -> str:
        """Return the name under which torchrun knows this."""
        return BACKEND

    def get_run_id(self) -> str:
        """Return torchrun's name for the run."""
        return self.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Come to the next round, and wait for all machines.

        Raises:
            RendezvousClosedError: a machine has given up.
            RendezvousConnectionError: there is another launch's paper, or the folder is gone.
            RendezvousTimeoutError: not all machines came in time.
        """
        number = self.round + 1
        self._leave_paper(number)
        ends = time.monotonic() + self.join_s
        while len(self._here(number)) < self.count:
            if self.is_closed():
                raise RendezvousClosedError(f"the launch in {self.folder} is over")
            if time.monotonic() > ends:
                missing = sorted(set(map(str, range(self.count))) - self._here(number))
                raise RendezvousTimeoutError(
                    f"machines {', '.join(missing)} did not come within {self.join_s:.0f} s"
                )
            time.sleep(POLL_S)
        self.round = number
        self._looked, self._waiting = time.monotonic(), 0
        os.environ[ROUND] = str(number)  # ranks inherit it
        first = json.loads((self._of(number) / "0").read_text(encoding="utf-8"))
        store = FileStore(str(self.folder / f"launchers-{number}"), self.count)
        address = RendezvousStoreInfo(str(first["host"]), int(first["port"]))
        return RendezvousInfo(store, self.rank, self.count, address)

    def num_nodes_waiting(self) -> int:
        """Return how many machines have come to the next round already; looks once a second."""
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._waiting = len(self._here(self.round + 1))
        return self._waiting

    def is_closed(self) -> bool:
        """Return whether a machine has given up, or the folder is gone."""
        try:
            return CLOSED in os.listdir(self.folder)
        except OSError:
            return True

    def set_closed(self) -> None:
        """Tell the others that no further round begins."""
        try:
            (self.folder / CLOSED).touch()
        except OSError as error:  # a full disk: they find out by waiting
            print(f"motet: {self.folder}: {error.strerror}", file=sys.stderr)

    def shutdown(self) -> bool:
        """Tell the others that this machine has ended."""
        self.set_closed()
        return True

    def _of(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _here(self, number: int) -> set[str]:
        """Which machines have come. A listing asks the server anew where a name would not."""
        try:
            return {name for name in os.listdir(self._of(number)) if name.isdecimal()}
        except OSError:
            return set()

    def _leave_paper(self, number: int) -> None:
        """Leave this machine's paper, whole: it is linked to its name once it is written."""
        text = json.dumps({"host": socket.gethostname(), "port": _free_port()})
        written, path = self._of(number) / f".{self.rank}", self._of(number) / str(self.rank)
        try:
            self._of(number).mkdir(mode=0o700, exist_ok=True)
            written.write_text(text, encoding="utf-8")
            os.link(written, path)
        except FileExistsError:
            raise RendezvousConnectionError(
                f"{path}: another process has come as machine {self.rank}"
            ) from None
        except OSError as error:
            raise RendezvousConnectionError(f"{path}: {error.strerror}") from error


def _free_port() -> int:
    """A port that is free now: ranks of runs that were frozen by older versions meet there."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def handler_of(parameters: RendezvousParameters) -> FolderMeeting:
    """Return the rendezvous that torchrun's arguments and the environment describe."""
    return FolderMeeting(
        Path(os.environ[FOLDER]),
        int(parameters.config["rank"]),
        parameters.max_nodes,
        parameters.run_id,
        float(parameters.config.get("join_timeout", 600)),
    )


if __name__ == "__main__":
    rendezvous_handler_registry.register(BACKEND, handler_of)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
