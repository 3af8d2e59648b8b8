"""What really reached a model in training, compared with the plan.

A loop that Motet does not own may skip, shuffle or repeat. So the tokens are taken from the model's
own training forward
passes, and the ledger is written from them: it tells the truth even where the loop does not follow
the plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motet.experiments.stream.ledger import Record
from motet.experiments.stream.stream import Batch
from motet.launcher.guest.model import model_inputs, unwrap

MOST_SHOWN = 5
MASK64 = 0xFFFFFFFFFFFFFFFF
Read = Callable[[int, int], Batch]
"""(first slot, count) -> the planned batch."""


class Watch:
    """Keeps the tokens and labels of every forward pass that makes a gradient, until they are
    taken.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[tuple[Tensor | None, Tensor | None]] = []
        # Compiled code would run a hook only while it is traced.
        hook = torch.compiler.disable(self._see)
        self._handle = unwrap(model).register_forward_pre_hook(hook, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            ids = kwargs.get("input_ids", args[0] if args else None)
            labels = kwargs.get("labels")
            # References: the copy to the host waits until the step is over.
            self._seen.append(
                (
                    None if ids is None else ids.detach(),
                    None if labels is None else labels.detach(),
                )
            )

    def take(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return (input_ids, labels) of every training forward pass since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def close(self) -> None:
        """See nothing any more."""
        self._handle.remove()


@dataclass
class Consumed:
    """What a process consumed in a step.

    Attributes:
        once: planned slots, the first time that they were seen.
        again: planned slots, every further time.
        missing: planned slots that were not seen.
        relabelled: slots whose labels were not the planned ones.
        foreign: rows that are no slot of this process in this step.
    """

    once: list[int]
    again: list[int]
    missing: list[int]
    relabelled: list[int]
    foreign: int

    @property
    def as_planned(self) -> bool:
        return not (self.again or self.missing or self.relabelled or self.foreign)


def compare(
    seen: Sequence[tuple[Tensor | None, Tensor | None]], planned: Sequence[Batch]
) -> Consumed:
    """Find every row that was seen among the planned slots, by its tokens; the order of rows within
    a step is free.
    """
    slots: dict[bytes, list[int]] = defaultdict(list)
    labels: dict[int, bytes] = {}
    for batch in planned:
        shifted = model_inputs(batch)["labels"].numpy()
        for row, tokens in enumerate(batch.tokens_BT):
            slots[tokens.tobytes()].append(batch.first_slot + row)
            labels[batch.first_slot + row] = shifted[row].tobytes()
    left = {key: list(found) for key, found in slots.items()}
    found = Consumed([], [], [], [], 0)
    for key, label in _rows(seen):
        if key not in slots:
            found.foreign += 1
            continue
        if not left[key]:
            found.again.append(slots[key][0])
            continue
        # Equal tokens may have other labels where their documents begin elsewhere.
        fits = [slot for slot in left[key] if label in (None, labels[slot])]
        slot = (fits or left[key])[0]
        left[key].remove(slot)
        found.once.append(slot)
        if not fits:
            found.relabelled.append(slot)
    found.missing = sorted(slot for rest in left.values() for slot in rest)
    return found


def _rows(
    seen: Sequence[tuple[Tensor | None, Tensor | None]],
) -> Iterator[tuple[bytes, bytes | None]]:
    """Yield (tokens, labels) of every row, as bytes."""
    for ids, labels in seen:
        if ids is None:
            yield b"", None
            continue
        label_rows = None if labels is None else labels.to("cpu", torch.int64).numpy()
        for row, tokens in enumerate(ids.to("cpu", torch.int64).numpy().astype(np.int32)):
            yield tokens.tobytes(), None if label_rows is None else label_rows[row].tobytes()


def records(
    found: Consumed, planned: Sequence[Batch], step: int, applied: bool, read: Read
) -> list[Record]:
    """Return what the ledger says of a step: one record per run of consecutive slots.

    What was read twice has two records, what was not read has none, and rows from elsewhere have
    one that covers slots a second
    time: the audit finds each of them.
    """
    if found.as_planned:
        return [_record(list(run), step, applied) for run in _joined(planned)]
    runs = [*_runs(sorted(found.once)), *((slot, 1) for slot in found.again)]
    first = planned[0].first_slot
    runs += [(first, 1)] * (found.foreign + len(found.relabelled))
    return [_record([read(first, count)], step, applied) for first, count in runs]


def _record(batches: Sequence[Batch], step: int, applied: bool) -> Record:
    """Return one record of batches that follow each other."""
    digest = sum(batch.digest() for batch in batches) & MASK64
    count = sum(len(batch.tokens_BT) for batch in batches)
    ids = np.concatenate([batch.exposure_ids for batch in batches])
    return Record(step, batches[0].first_slot, count, digest, applied, ids)


def _joined(planned: Sequence[Batch]) -> list[list[Batch]]:
    """Group batches whose slots follow each other."""
    groups: list[list[Batch]] = []
    for batch in sorted(planned, key=lambda batch: batch.first_slot):
        last = groups[-1][-1] if groups else None
        if last is not None and last.first_slot + len(last.tokens_BT) == batch.first_slot:
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return groups


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, count) of every run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for slot in slots:
        if found and sum(found[-1]) == slot:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((slot, 1))
    return found


def complaint(found: Consumed, step: int) -> str | None:
    """Say what a step did that was not planned; None when all is well."""
    if found.as_planned:
        return None
    parts = []
    if found.missing:
        parts.append(f"{_some(found.missing)} never reached the model")
    if found.again:
        parts.append(f"{_some(found.again)} reached it more than once")
    if found.relabelled:
        parts.append(f"the labels of {_some(found.relabelled)} were changed")
    if found.foreign:
        rows = f"{found.foreign} sequence{'s' if found.foreign > 1 else ''}"
        parts.append(f"{rows} reached it that this process was not to read in this step")
    return (
        f"step {step:,} was not trained as planned: {'; '.join(parts)}. Every sequence must be "
        "used once, in its step and on its "
        "process: no shuffling, skipping or repeating, and all forward passes with a gradient "
        "belong to the run"
    )


def _some(slots: Sequence[int]) -> str:
    shown = ", ".join(f"{slot:,}" for slot in slots[:MOST_SHOWN])
    more = ", ..." if len(slots) > MOST_SHOWN else ""
    return f"slot{'s' if len(slots) > 1 else ''} {shown}{more}"
