"""Checkpoints: written in the background, published by rename, verified before they are read.

`checkpoints/.step-N.part/` fills while training goes on: DCP writes the tensors, then every rank
hashes the files it wrote and tells the others, then rank 0 writes the hashes into `manifest.json`
and renames the folder. A folder under its final name is whole. How a save ended is the same on all
ranks: where the disk became full within it, on whichever rank, its folder is gone before they know.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from motet.core.errors import UserError
from motet.core.files import FULL, fsync_folder, not_shown, write_json
from motet.core.hashing import sha256_file
from motet.core.listed import damage
from motet.launcher.rank.disk import CheckpointWriter, SavedPart, failed_part, of_any_rank
from motet.launcher.rank.safe_reader import SafeReader
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.parallel.runtime.mesh import World, first_complaint, tell_all

LATE_S = 90.0
"""How long a file system may take to show a file on all machines; NFS keeps what it knows of a
folder for up to 60 s.
"""


class NotShown(UserError):
    """A file is there for some ranks and not for others."""


@dataclass(frozen=True)
class SaveUnderWay:
    """A save under way.

    Attributes:
        aside, final: the folder that fills, and its name once it is whole.
        manifest: what the manifest says beside the hashes.
        before_publish: called on each rank before its part counts as done.
        may_skip: the run can do without it.
    """

    aside: Path
    final: Path
    manifest: Mapping[str, Any]
    before_publish: Callable[[], None] | None
    may_skip: bool


class Checkpoints:
    """The checkpoints of one run, as one rank sees them; every method is called by all ranks."""

    def __init__(
        self,
        run: RunDir,
        world: World,
        keep: int = 3,
        keep_every_steps: int = 0,
        background: bool = True,
        always: Collection[int] = (),
    ) -> None:
        self.run, self.world = run, world
        self.always = frozenset(always)
        """Steps whose checkpoints stay for good."""
        self.keep, self.keep_every_steps, self.background = keep, keep_every_steps, background
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[str] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        facts: Mapping[str, Any],
        before_publish: Callable[[], None] | None = None,
        grown: bool = False,
        may_skip: bool = False,
    ) -> str:
        """Start saving; returns once the tensors are copied, or once published when not in the
        background.

        Args:
            step: the model after that many updates.
            tensors: what to save, sharded or not.
            facts: JSON values that the manifest keeps.
            before_publish: called in the background on each rank before its part counts as done.
            grown: it is what was made of the model of that step, see `RunDir.checkpoint`.
            may_skip: the run can do without this one. `wait` says of the save before whether it
                was skipped: call that first.

        Returns:
            "", or on every rank why it was skipped: the disk has no room for it.

        Raises:
            UserError: the disk has no room for it, and it may not be skipped; every rank raises it,
                and nothing was begun.
        """
        self.wait()
        final = self.run.checkpoint(step, grown)
        aside = final.with_name(f".{final.name}.part")
        told = first_complaint(self._lacks_room(step, tensors), self.world)
        if told := told or first_complaint(self._make_folder(aside, step), self.world):
            if may_skip:
                return told
            raise UserError(told)
        manifest = {"version": 1, "step": step, "world_size": self.world.size, **facts}
        saving = SaveUnderWay(aside, final, manifest, before_publish, may_skip)
        written = dcp.async_save(
            dict(tensors),
            storage_writer=CheckpointWriter(aside, single_file_per_rank=True, sync_files=True),
            process_group=self.world.saving,
        )
        self._pending = self._pool.submit(self._publish, cast("Future[Any]", written), saving)
        return "" if self.background else self.wait()

    def _make_folder(self, aside: Path, step: int) -> str | None:
        """Make, on rank 0, the folder that a checkpoint fills before it has its name; return what
        to say of a disk that has no room for it.
        """
        if self.world.rank:
            return None
        shutil.rmtree(aside, ignore_errors=True)
        # What grew of another training of the same steps must not be gone on with.
        shutil.rmtree(self.run.checkpoint(step, grown=True), ignore_errors=True)
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return f"no room for the checkpoint after step {step:,}: {error}; {self._remedy()}"
        return None

    def _lacks_room(self, step: int, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Return on rank 0 what to say of a disk with less room than a checkpoint is known to take:
        as much as the last one, and as the tensors that this rank knows of.
        """
        if self.world.rank:
            return None
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if earlier := self.run.checkpoint_steps():
            files = self.run.checkpoint(earlier[-1]).glob("*")
            needed = max(needed, sum(path.stat().st_size for path in files))
        found = os.statvfs(self.run.checkpoints)
        free = found.f_bavail * found.f_frsize
        if not found.f_blocks or needed <= free:  # some file systems do not say
            return None
        return (
            f"no room for the checkpoint after step {step:,}: it takes {needed:,} bytes, and "
            f"{free:,} are free at {self.run.checkpoints}; {self._remedy()}"
        )

    def _remedy(self) -> str:
        return (
            f"make room (checkpoint.keep={self.keep} are kept), then `motet resume` goes on from "
            "the newest"
        )

    def keep_for_good(self, step: int) -> None:
        """Never remove the checkpoint of a step."""
        self.always |= {step}

    def wait(self) -> str:
        """Wait for the save under way.

        Returns:
            "", or on every rank why that save was skipped after all: the disk became full within
            it, and it may be skipped. Nothing is left of it.

        Raises:
            UserError: on every rank: the same, and it may not be skipped.
            OSError, RuntimeError: on every rank, what else failed in the background on one.
        """
        pending, self._pending = self._pending, None
        return "" if pending is None else pending.result()

    def skipped(self) -> str:
        """Return why the save under way was skipped, as `wait` will; "" as long as it was not (no
        collective: a rank may know it before others).
        """
        pending = self._pending
        if pending is None or not pending.done() or pending.exception() is not None:
            return ""
        return pending.result()

    def gives_room(self) -> bool:
        """Wait until the save under way, if there is one, takes no more room, or has given up what
        it had (no collective: the background threads agree). Return whether there was one: what
        the disk refused meanwhile may be tried again, once.
        """
        if self._pending is None:
            return False
        wait_for([self._pending])
        return True

    def busy(self) -> bool:
        """Return whether this rank's part of a save is still under way (no collective)."""
        return self._pending is not None and not self._pending.done()

    def close(self) -> None:
        """Finish the save under way and stop the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _publish(self, written: Future[Any], saving: SaveUnderWay) -> str:
        """Let all ranks bring their part, then publish on rank 0; return why that was skipped."""
        parts = self._told(self._own_part(written, saving))
        if not any(part.failed for part in parts):
            files = {name: facts for part in parts for name, facts in part.files.items()}
            parts = self._told(self._published(saving, files))
        failed = [(rank, part) for rank, part in enumerate(parts) if part.failed]
        if not failed:
            return ""
        told = "; ".join(f"rank {rank}: {part.failed}" for rank, part in failed)
        if any(part.errno not in FULL for _, part in failed):
            first = failed[0][1].errno
            raise OSError(first, told) if first else RuntimeError(told)
        if self.world.rank == 0:
            shutil.rmtree(saving.aside, ignore_errors=True)
        self._told(SavedPart({}))  # all know that there is room again
        step = saving.manifest["step"]
        why = (
            f"no room for the checkpoint after step {step:,}: the disk was full before all of it "
            f"was written ({told}), and what was is removed; {self._remedy()}"
        )
        if saving.may_skip:
            return why
        raise UserError(why)

    def _told(self, mine: SavedPart) -> list[SavedPart]:
        """Return every rank's part, by rank (a collective of the background threads)."""
        parts: list[SavedPart] = [mine] * self.world.size
        dist.all_gather_object(parts, mine, group=self.world.saving)
        return parts

    def _own_part(self, written: Future[Any], saving: SaveUnderWay) -> SavedPart:
        """Hash this rank's files once they are written. What failed within DCP it tells to all
        ranks alike; anything else that it raises is no agreement, and ends this rank.
        """
        rank = self.world.rank
        try:
            written.result()
        except CheckpointException as error:
            return failed_part(of_any_rank(error))
        try:
            if saving.before_publish is not None:
                saving.before_publish()
        except OSError as error:  # the ledger's: no run goes on without
            return SavedPart({}, str(error))
        names = [path.name for path in saving.aside.glob(f"__{rank}_*.distcp")]
        try:
            paths = [saving.aside / name for name in [*names, *[".metadata"] * (rank == 0)]]
            return SavedPart(
                {p.name: {"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in paths}
            )
        except OSError as error:
            return failed_part(error)

    def _published(self, saving: SaveUnderWay, files: Mapping[str, Any]) -> SavedPart:
        """Give the folder its manifest and its name, on rank 0."""
        if self.world.rank:
            return SavedPart({})
        try:
            write_json(saving.aside / "manifest.json", {**saving.manifest, "files": files})
            self._rename(saving.aside, saving.final)
        except OSError as error:
            return failed_part(error) if saving.aside.exists() else SavedPart({}, str(error))
        self._retain()
        return SavedPart({})

    def _rename(self, aside: Path, final: Path) -> None:
        """Make the folder appear under its name; an older one of the same step gives way."""
        fsync_folder(aside)
        if final.exists():
            old = self.run.checkpoints / f".{final.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
            try:
                os.rename(aside, final)
            except OSError:
                os.rename(old, final)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(aside, final)
        fsync_folder(self.run.checkpoints)

    def _retain(self) -> None:
        """Remove checkpoints that the retention policy lets go; what grew can be made again of the
        checkpoint before, which stays.
        """
        steps = self.run.checkpoint_steps()
        for step in kept_out(steps, self.keep, self.keep_every_steps):
            if step not in self.always:
                shutil.rmtree(self.run.checkpoint(step), ignore_errors=True)
        for step in self.run.grown_steps():
            if step < min(steps[-self.keep :], default=0):
                shutil.rmtree(self.run.checkpoint(step, grown=True), ignore_errors=True)

    def load(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        expected: Mapping[str, Any] | None = None,
        grown: bool = False,
    ) -> dict[str, Any]:
        """Verify a checkpoint and read it into `tensors` in place; return its manifest.

        `expected` are facts that its manifest must hold, such as the hashes of this run's study.

        Raises:
            NotShown: rank 0 sees a file that another rank does not, for a minute; every rank raises
                it.
            UserError: a file is missing, altered or refused; every rank raises it.
        """
        folder = self.run.checkpoint(step, grown)
        self._until_shown(folder)
        complaint = first_complaint(self._damage(step, grown), self.world)
        if complaint:
            raise UserError(f"checkpoint {folder} is damaged: {complaint}")
        manifest = read_checkpoint(self.run, step, {"files": dict}, grown)
        missing = {"run_sha256"}  # in none of before hashes were kept
        foreign = [
            key
            for key, value in (expected or {}).items()
            if manifest.get(key, value if key in missing else None) != value
        ]
        if told := first_complaint(", ".join(foreign) or None, self.world):
            raise UserError(f"checkpoint {folder} is not of this run: it differs in {told}")
        try:
            dcp.load(
                cast("dict[str, Any]", dict(tensors)),
                storage_reader=SafeReader(folder),
                process_group=self.world.saving,
            )
        except CheckpointException as error:
            raise of_any_rank(error) from error
        return manifest

    def _until_shown(self, folder: Path) -> None:
        """Wait on every rank for the files that rank 0 sees: what is shown late is not damaged, and
        must not be given up.
        """
        seen = tell_all(sorted(path.name for path in folder.glob("*")), self.world)
        late = not_shown([folder / name for name in seen], LATE_S)
        told = f"does not see {late[0]}" if late else None
        if told := first_complaint(told, self.world):
            raise NotShown(
                f"{told}, which rank 0 does, after {LATE_S:.0f} s: is the run folder one file "
                "system on all machines? Nothing was changed; `motet resume` tries again"
            )

    def _damage(self, step: int, grown: bool) -> str | None:
        """Return what is wrong with this rank's share of a checkpoint's files."""
        folder = self.run.checkpoint(step, grown)
        try:
            files = read_checkpoint(self.run, step, {"files": dict}, grown)["files"]
            SafeReader(folder).read_metadata()
        except (UserError, KeyError) as error:
            return str(error)
        mine = sorted(files)[self.world.rank :: self.world.size]
        return damage(folder, {name: files[name] for name in mine})


def kept_out(steps: list[int], keep: int, keep_every_steps: int) -> list[int]:
    """Return the steps of checkpoints to remove: not among the newest `keep`, not a multiple of
    `keep_every_steps`.
    """
    old = steps[:-keep] if keep else steps
    return [step for step in old if not (keep_every_steps and step % keep_every_steps == 0)]
