"""Steps and slots: which slots a step consumes, batch ramps counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.core.errors import UserError


@dataclass(frozen=True)
class Steps:
    """The batch size of every step.

    Attributes:
        changes: (step, sequences) pairs, ascending: from that step on a step takes so many slots.
            The first pair is step 0.
    """

    changes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, sequences: int, ramp: Sequence[tuple[int, int]] = ()) -> Steps:
        """Build from a constant batch, or from a ramp whose last entry must agree with `sequences`.

        Raises:
            UserError: sizes below 1, steps not ascending, or a ramp that does not start at step 0.
        """
        changes = tuple((int(step), int(size)) for step, size in ramp) or ((0, int(sequences)),)
        steps = [step for step, _ in changes]
        if steps[0] != 0 or sorted(set(steps)) != steps:
            raise UserError(f"batch.ramp: steps {steps} must ascend from 0")
        if min(size for _, size in changes) < 1:
            raise UserError("batch.sequences: every step needs at least 1 sequence")
        return cls(changes)

    def slots_before(self, step: int) -> int:
        """Return how many slots steps [0, step) consume: the first slot of `step`."""
        total = 0
        for (first, size), (after, _) in zip(
            self.changes, [*self.changes[1:], (max(step, self.changes[-1][0]), 0)], strict=True
        ):
            total += max(0, min(step, after) - first) * size
        return total

    def steps_for(self, slots: int) -> int:
        """Return the fewest steps that consume at least so many slots."""
        if slots <= 0:
            return 0
        part = max(
            k for k, (first, _) in enumerate(self.changes) if self.slots_before(first) < slots
        )
        first, size = self.changes[part]
        return first - (self.slots_before(first) - slots) // size

    def sequences(self, step: int) -> int:
        """Return how many slots a step consumes."""
        return next(size for first, size in reversed(self.changes) if first <= step)

    def step_of(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the step that consumes each slot, int64."""
        firsts = np.array([first for first, _ in self.changes], dtype=np.int64)
        sizes = np.array([size for _, size in self.changes], dtype=np.int64)
        bases = np.array([self.slots_before(int(first)) for first in firsts], dtype=np.int64)
        part = np.searchsorted(bases, slots, side="right") - 1
        return firsts[part] + (slots - bases[part]) // sizes[part]
