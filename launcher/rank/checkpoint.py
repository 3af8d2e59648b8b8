"""Checkpoints: written in the background, published by rename, verified before they are read.

`checkpoints/.step-N.part/` fills while training goes on: DCP writes the tensors, then every rank
hashes the files it wrote, then rank 0 gathers the hashes into `manifest.json` and renames the
folder. A folder under its final name is whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from motet.core.errors import UserError
from motet.core.files import fsync_folder, read_json, write_json
from motet.core.hashing import sha256_file
from motet.launcher.rank.safe_reader import SafeReader
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import damage, read_checkpoint
from motet.parallel.runtime.mesh import World, first_complaint

HASHES_WAIT_S = 600.0


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
        self._pending: Future[None] | None = None

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
            may_skip: the run can do without this one.

        Returns:
            "", or on every rank why it was skipped: the disk has no room for it.

        Raises:
            UserError: the disk has no room for it, and it may not be skipped; every rank raises it,
                and nothing was begun.
        """
        self.wait()
        if told := first_complaint(self._lacks_room(step, tensors), self.world):
            if may_skip:
                return told
            raise UserError(told)
        final = self.run.checkpoint(step, grown)
        aside = self._folder_aside(final, step)
        writer = dcp.FileSystemWriter(aside, single_file_per_rank=True, sync_files=True)
        written = dcp.async_save(
            dict(tensors), storage_writer=writer, process_group=self.world.saving
        )
        self._pending = self._pool.submit(
            self._publish,
            cast("Future[Any]", written),
            aside,
            final,
            {"version": 1, "step": step, "world_size": self.world.size, **facts},
            before_publish,
        )
        if not self.background:
            self.wait()
        return ""

    def _folder_aside(self, final: Path, step: int) -> Path:
        """Make the folder that a checkpoint fills before it has its name (a collective)."""
        aside = final.with_name(f".{final.name}.part")
        if self.world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            # What grew of another training of the same steps must not be gone on with.
            shutil.rmtree(self.run.checkpoint(step, grown=True), ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier(group=self.world.control)
        return aside

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
        found = os.statvfs(self.run.root)
        free = found.f_bavail * found.f_frsize
        if not found.f_blocks or needed <= free:  # some file systems do not say
            return None
        return (
            f"no room for the checkpoint after step {step:,}: it takes {needed:,} bytes, and "
            f"{free:,} are free at {self.run.root}; make room (checkpoint.keep={self.keep} are "
            "kept), then `motet resume` goes on from the newest"
        )

    def keep_for_good(self, step: int) -> None:
        """Never remove the checkpoint of a step."""
        self.always |= {step}

    def wait(self) -> None:
        """Wait for the save under way; a failure in the background is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def busy(self) -> bool:
        """Return whether this rank's part of a save is still under way (no collective)."""
        return self._pending is not None and not self._pending.done()

    def close(self) -> None:
        """Finish the save under way and stop the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _publish(
        self,
        written: Future[Any],
        aside: Path,
        final: Path,
        manifest: dict[str, Any],
        before_publish: Callable[[], None] | None,
    ) -> None:
        """Hash this rank's files; on rank 0 also gather all hashes, write the manifest and
        rename.
        """
        written.result()
        if before_publish is not None:
            before_publish()
        rank, size = self.world.rank, self.world.size
        mine = list(aside.glob(f"__{rank}_*.distcp"))
        if rank == 0:
            mine.append(aside / ".metadata")
        hashes = {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in mine
        }
        write_json(aside / f"hashes-{rank}.json", hashes)
        if rank == 0:
            manifest["files"] = _gather_hashes(aside, size)
            write_json(aside / "manifest.json", manifest)
            self._rename(aside, final)
            self._retain()

    def _rename(self, aside: Path, final: Path) -> None:
        """Make the folder appear under its name; an older one of the same step gives way."""
        for leftover in aside.glob("hashes-*.json"):
            leftover.unlink()
        fsync_folder(aside)
        if final.exists():
            old = self.run.checkpoints / f".{final.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
            os.rename(aside, final)
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
            UserError: a file is missing, altered or refused; every rank raises it.
        """
        folder = self.run.checkpoint(step, grown)
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
        dcp.load(
            cast("dict[str, Any]", dict(tensors)),
            storage_reader=SafeReader(folder),
            process_group=self.world.saving,
        )
        return manifest

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


def _gather_hashes(aside: Path, world_size: int) -> dict[str, Any]:
    """Return the hashes that every rank left in the folder, once all have."""
    deadline = time.monotonic() + HASHES_WAIT_S
    files: dict[str, Any] = {}
    for rank in range(world_size):
        path = aside / f"hashes-{rank}.json"
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} did not finish its part of {aside.name}")
            time.sleep(0.02)
        files.update(read_json(path))
    return files
