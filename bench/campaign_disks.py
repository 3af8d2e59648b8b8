"""Disks that are full, read-only or gone: cases of `bench/campaign.py`."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from campaign_kills import under
from campaign_world import Case, Trained, World, as_twin, must

from tests.system.runs import motet_here, rows

AT = 13
LARGE_MIB = 600


@contextlib.contextmanager
def disk(one: Trained, mib: int = LARGE_MIB) -> Iterator[None]:
    """A disk of its own for the runs of a case."""
    folder = one.run.root.parent
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    must(subprocess.run(words, capture_output=True).returncode == 0, "not shown: no right to mount")
    try:
        yield
    finally:
        one.close()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fill a disk but for `leave` bytes."""
    filler = folder / "filler"
    found = os.statvfs(folder)
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - leave))
    return filler


def one_end(one: Trained, told: str) -> str:
    """The reason that `status` finds, and that it was told once and without a traceback."""
    status = motet_here("status", str(one.run.root)).stdout
    must(told in " ".join(status.split()), f"status says {status[-600:]}")
    said = [line for line in one.said().splitlines() if line.startswith("motet: ") and told in line]
    must(len(said) <= 2, f"told {len(said)} times")
    return status


def no_room(world: World) -> str:
    """Room for the first checkpoints, not for a later one."""
    one, twin = world.new(), world.twin()
    with disk(one):
        one.start()
        one.until_step(AT)
        filler = fill(one.run.root.parent, 300_000)
        one.pace(0.0)
        code = one.ends(2)
        one_end(one, "no room for the checkpoint")
        facts = one.attempts()[-1]
        must(facts["reason"] == "refused" and facts["end_step"] == 20, f"recorded as {facts}")
        filler.unlink()
        one.resume()
        return f"exit {code}, the reason in status, end_step 20; {as_twin(one, twin)}"


def skipped(world: World) -> str:
    """The same, and the run may go on without."""
    one, twin = world.new("checkpoint.no_room=skip"), world.twin()
    with disk(one):
        one.start()
        one.until_step(AT)
        filler = fill(one.run.root.parent, 300_000)
        one.until_step(24)
        status = " ".join(motet_here("status", str(one.run.root)).stdout.split())
        told = "checkpoints are skipped" in status and "no room for the checkpoint" in status
        must(told, f"status says {status[-500:]}")
        filler.unlink()
        one.until(lambda: 30 in one.run.checkpoint_steps(), "the next checkpoint")
        status = motet_here("status", str(one.run.root)).stdout
        must("skipped" not in status, f"status says {status[-500:]}")
        one.pace(0.0)
        one.ends(0)
        events = [
            row for row in rows(one.run.root, "event") if row["event"] == "checkpoint_skipped"
        ]
        must([row["step"] for row in events] == [20], f"skipped {events}")
        return f"skipped after step 20, said in status and metrics, saved after step 30; {as_twin(one, twin)}"


def skipped_at_the_end(world: World) -> str:
    """No room until the end, which is never skipped."""
    one, twin = world.new("checkpoint.no_room=skip"), world.twin()
    with disk(one):
        one.start()
        one.until_step(41)
        filler = fill(one.run.root.parent, 300_000)
        one.pace(0.0)
        code = one.ends(2)
        one_end(one, "no room for the checkpoint after step 60")
        must(not one.run.done.exists(), "it counts as finished")
        filler.unlink()
        one.resume()
        return f"skipped after step 50, exit {code} at the end; {as_twin(one, twin)}"


def full(world: World) -> str:
    """Not a byte is left for a record of the ledger."""
    one, twin = world.new(), world.twin()
    with disk(one):
        one.start()
        one.until_step(AT)
        filler = fill(one.run.root.parent, 0)
        began = time.monotonic()
        code = one.ends(1, 2, wait_s=120.0)
        took_s = time.monotonic() - began
        text = os.strerror(errno.ENOSPC)
        must(text in one.said() or "no room" in one.said(), f"said {one.said()[-500:]}")
        filler.unlink()
        one.resume()
        return f"exit {code} after {took_s:.0f} s with the reason; {as_twin(one, twin)}"


LIES = """
import os
_statvfs, _file = os.statvfs, os.environ.get("CAMPAIGN_CLOCK", "")
def statvfs(path):
    found = _statvfs(path)
    if not os.path.exists(_file):
        return found
    return os.statvfs_result((*found[:4], 1 << 40, *found[5:]))
os.statvfs = statvfs
"""
"""The disk says that it has room, as one does that somebody fills a moment later."""


def within(policy: str) -> Callable[[World], str]:
    """The disk fills while a checkpoint is written."""

    def act(world: World) -> str:
        one, twin = under(world, LIES, f"checkpoint.no_room={policy}"), world.twin()
        with disk(one):
            one.start()
            one.until_step(AT)
            filler = fill(one.run.root.parent, 300_000)
            Path(one.more["CAMPAIGN_CLOCK"]).touch()
            told = "after step 20: the disk was full before all of it was written"
            if policy == "stop":
                one.pace(0.0)
                code = one.ends(2)
                one_end(one, told)
                left = list(one.run.checkpoints.glob(".*"))
                must(not left, f"left: {left}")
                filler.unlink()
                one.resume()
                return (
                    f"exit {code}, the reason in status, nothing half written; {as_twin(one, twin)}"
                )
            one.until_step(24)
            status = " ".join(motet_here("status", str(one.run.root)).stdout.split())
            must(told in status, f"status says {status[-500:]}")
            must(not list(one.run.checkpoints.glob(".*")), "a half checkpoint is left")
            filler.unlink()
            one.until(lambda: 30 in one.run.checkpoint_steps(), "the next checkpoint")
            one.pace(0.0)
            one.ends(0)
            events = [r for r in rows(one.run.root, "event") if r["event"] == "checkpoint_skipped"]
            must(len(events) == 1 and told in events[0]["why"], f"skipped {events}")
            return f"skipped after step 20, told once, nothing of it left; {as_twin(one, twin)}"

    return act


@contextlib.contextmanager
def ext4(one: Trained) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """An ext4 disk for the runs of a case; yields what makes it fail, as the kernel does when it
    finds an error (all further writes are refused), and what mends it.
    """
    folder = one.run.root.parent
    image = folder.with_name("disk.img")
    folder.mkdir(exist_ok=True)
    with open(image, "wb") as file:
        file.truncate(LARGE_MIB << 20)
    mounting = ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)]
    made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True).returncode == 0
    able = made and subprocess.run(mounting, capture_output=True).returncode == 0
    must(able, "not shown: no right to mount")
    shutil.rmtree(folder / "lost+found")
    found = subprocess.run(
        ["findmnt", "-no", "SOURCE", str(folder)], capture_output=True, text=True
    )
    trigger = Path("/sys/fs/ext4") / Path(found.stdout.strip()).name / "trigger_fs_error"

    def mend() -> None:
        subprocess.run(["umount", str(folder)], check=True)
        checked = subprocess.run(["fsck.ext4", "-fy", str(image)], capture_output=True)
        must(checked.returncode in (0, 1), f"fsck: {checked.returncode}")
        subprocess.run(mounting, check=True)

    try:
        yield lambda: trigger.write_text("campaign") and None, mend
    finally:
        one.close()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(world: World) -> str:
    """The kernel finds an error on the disk and lets nobody write any more."""
    one, twin = world.new(), world.twin()
    with ext4(one) as (fail, mend):
        one.start()
        one.until_step(AT)
        began = time.monotonic()
        fail()
        code = one.ends(1, 2, wait_s=120.0)
        took_s = time.monotonic() - began
        must(os.strerror(errno.EROFS) in one.said(), f"said {one.said()[-500:]}")
        mend()
        one.resume()
        return f"exit {code} after {took_s:.0f} s with the reason; {as_twin(one, twin)}"


def deleted(world: World) -> str:
    """Somebody removes the run folder."""
    one = world.new()
    with contextlib.closing(one):
        one.start()
        one.until_step(AT)
        began = time.monotonic()
        shutil.rmtree(one.run.root, ignore_errors=True)
        shutil.rmtree(one.run.root, ignore_errors=True)
        code = one.ends(1, 2, wait_s=120.0)
        took_s = time.monotonic() - began
        must("was removed while the run was going on" in one.said(), f"said {one.said()[-500:]}")
        return f"exit {code} after {took_s:.0f} s, says that the folder was removed"


GOES_ON = "one end with its reason; resumed when there is room, equal to its twin"
CASES = [
    Case("no room for a checkpoint (policy stop)", "disks and clocks", GOES_ON, no_room),
    Case(
        "no room for a checkpoint (policy skip)",
        "disks and clocks",
        "goes on, told in status and metrics, tried again; equal to its twin",
        skipped,
    ),
    Case(
        "no room for the last checkpoint (policy skip)",
        "disks and clocks",
        "never skipped: " + GOES_ON,
        skipped_at_the_end,
    ),
    *(
        Case(
            f"a disk that fills within a save (policy {policy})",
            "disks and clocks",
            perfect,
            within(policy),
        )
        for policy, perfect in (
            ("skip", "goes on, told once, nothing half written; equal to its twin"),
            ("stop", GOES_ON),
        )
    ),
    Case("a full disk between checkpoints", "disks and clocks", GOES_ON, full),
    Case("mounted read-only under the run", "disks and clocks", GOES_ON, read_only),
    Case(
        "the run folder is removed",
        "disks and clocks",
        "one end that says so, nobody left",
        deleted,
    ),
]
