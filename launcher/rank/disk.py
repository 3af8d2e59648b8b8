"""A disk that takes no more: how it is known behind other errors, and told across ranks."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from motet.core.files import FULL

DISK_OUT = (*FULL, errno.EROFS)


def disk_error(error: BaseException | None) -> OSError | None:
    """Return what a disk that took no more said, if that is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_OUT:
            return error
        error = error.__cause__ or error.__context__
    return None


def disk_is_out(error: BaseException | None) -> str:
    """Return in words that a disk took no more, if that is behind an error; else ""."""
    found = disk_error(error)
    return "" if found is None else str(found.strerror)


@contextlib.contextmanager
def disk_first() -> Iterator[None]:
    """Let an error behind which a disk is out be that of the disk: causes are lost where errors are
    told to other ranks, and torch's archives hide it behind an error of their own.
    """
    try:
        yield
    except Exception as error:
        if found := disk_error(error):
            raise OSError(found.errno, found.strerror) from error
        raise


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes a checkpoint's files; of a full disk it says so."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:  # type: ignore[override]
        """Write this rank's tensors."""
        with disk_first():
            return super().write_data(plan, planner)  # type: ignore[return-value]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on one rank."""
        with disk_first():
            super().finish(metadata, results)


def of_any_rank(error: CheckpointException) -> Exception:
    """Return what failed on some rank, as an error: torch tells it as none that `except Exception`
    catches. A full disk comes last: it can be made good, and what else failed cannot.
    """
    failures = [one for one, _ in error.failures.values()]
    worst = min(failures, key=lambda one: getattr(one, "errno", None) in FULL)
    if isinstance(worst, OSError):
        return OSError(worst.errno, worst.strerror)
    return RuntimeError(f"{type(worst).__name__}: {worst}")


@dataclass(frozen=True)
class SavedPart:
    """What one rank brings to a save: its files, or why it has none.

    Attributes:
        files: name -> hash and size.
        failed: in words; "" = all is written.
        errno: of what the disk said, 0 where that cannot be made good by leaving this save out.
    """

    files: Mapping[str, Any]
    failed: str = ""
    errno: int = 0


def failed_part(error: Exception) -> SavedPart:
    """Return the part of a rank that failed."""
    return SavedPart({}, str(error), getattr(error, "errno", None) or 0)
