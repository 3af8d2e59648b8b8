"""The lock of a study: which experiments were registered, in which order, with which absolute
schedules, so that adding one, removing one or extending the run moves no exposure of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError
from motet.core.files import read_fields
from motet.core.hashing import sha256_hex
from motet.experiments.design.spec import Schedule
from motet.experiments.stream.claims import Claims
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.placement import Request

CHANGED = (
    "its units, doses, lengths or windows differ from those registered in experiments.lock; "
    "restore them, or give the changed experiment a new name"
)


@dataclass(frozen=True)
class Registered:
    """One entry of the lock: an experiment, in order of registration.

    `asked` is the schedule as written and `schedule` has absolute steps; `placement_sha256`
    identifies everything that its positions depend on.
    """

    name: str
    asked: Schedule
    schedule: Schedule
    placement_sha256: str
    removed: bool = False


def placement_hash(request: Request) -> str:
    """Return the SHA-256 of everything that an experiment's positions depend on."""
    parts: list[npt.NDArray[Any]] = [
        request.unit_keys[request.unit],
        request.repetition,
        request.first_slot,
        request.last_slot,
        request.texts.lengths()[request.text],
    ]
    if request.offset is not None:
        parts.append(request.offset)
    joined = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return sha256_hex(joined + request.placement.encode())


def next_lock(
    registered: Sequence[Registered], entries: Mapping[str, Registered], order: Sequence[str]
) -> tuple[Registered, ...]:
    """Return the lock with new experiments appended, and missing ones kept as removed."""
    kept = [
        entries[entry.name] if entry.name in entries else replace(entry, removed=True)
        for entry in registered
    ]
    before = {entry.name for entry in registered}
    return (*kept, *(entries[name] for name in order if name not in before))


def placed_tombstones(
    lock: Sequence[Registered], tombstones: Mapping[str, Claims]
) -> list[tuple[int, Claims]]:
    """Return (number of the first request that comes after it, claims) of each removed
    experiment.
    """
    placed, number = [], 0
    for entry in lock:
        if entry.removed:
            placed.append((number, tombstones[entry.name]))
        else:
            number += 1
    return placed


def read_lock(
    folder: Path, seed: int, sequence_length: int
) -> tuple[tuple[Registered, ...], dict[str, Claims]]:
    """Read a lock, and the claims of every experiment in it (only removed ones will be used).

    Raises:
        UserError: no lock there, or one made with another seed or sequence length, under which
            every place would move.
    """
    lock = _registered(folder)
    plan = ExposurePlan(folder / "exposures.plan")
    for name, then, now in (
        ("seed", plan.seed, seed),
        ("data.sequence_length", plan.sequence_length, sequence_length),
    ):
        if then != now:
            raise UserError(
                f"experiments.lock={folder}: was made with {name}={then}, this run has {now}; "
                "every exposure would move"
            )
    claims = {}
    for entry in lock:
        if entry.removed:
            start, stop = np.load(folder / "tombstones" / f"{entry.name}.npy", allow_pickle=False)
            claims[entry.name] = Claims(start, stop)
        else:
            claims[entry.name] = plan.claims(entry.name)
    return lock, claims


def _registered(folder: Path) -> tuple[Registered, ...]:
    """Return the entries of `folder`/lock.json."""
    try:
        content = read_fields(folder / "lock.json", {"experiments": list})
    except UserError as error:
        raise UserError(
            f"experiments.lock={folder}: cannot be read ({error}); give the plan folder of a run"
        ) from None
    return tuple(
        Registered(
            entry["name"],
            schedule_of(entry["asked"]),
            schedule_of(entry["schedule"]),
            entry["placement_sha256"],
            entry["removed"],
        )
        for entry in content["experiments"]
    )


def schedule_of(fields: Mapping[str, Any]) -> Schedule:
    """Return a Schedule from its JSON."""
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return Schedule(**values)
