"""Teachers that are a second set of the whole model's weights: frozen, or an average; no torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from motet.core.schema import MappingReader, is_number
from motet.models.member import TeacherUpdate

TEACHERS = ("largest", "frozen", "ema")
DEPLOYED = ("student", "ema")
MOMENTUM = (0.992, 0.9999)
"""POA's (its `vit_ssl_default_config.yaml`)."""


class FrozenTeacher(NamedTuple):
    """The whole model as it was after `step` updates, as Once-for-All's (arXiv:1908.09791)."""

    step: int

    def update(self, step: int) -> TeacherUpdate | None:
        """See `Family.teacher_update`."""
        return TeacherUpdate(self.step) if step >= self.step else None


class AveragedTeacher(NamedTuple):
    """An exponential average of the weights, whose momentum rises along a cosine.

    Attributes:
        first, last: the momentum in step 0, and from step `steps` on.
    """

    first: float
    last: float
    steps: int

    def update(self, step: int) -> TeacherUpdate | None:
        """See `Family.teacher_update`."""
        part = min(step / self.steps, 1.0)
        left = (self.last - self.first) * (1.0 + math.cos(math.pi * part)) / 2.0
        return TeacherUpdate(step, self.last - left)


def read_teacher(
    read: MappingReader, phase_end: int | None
) -> FrozenTeacher | AveragedTeacher | None:
    """Return what the options `teacher`, `teacher_step`, `ema_momentum` and `ema_steps` ask for;
    None: the largest of the same weights.

    Args:
        phase_end: where the first phase ends: a teacher is frozen there unless said otherwise.
    """
    kind = read.choice("teacher", TEACHERS, "largest")
    of = {"teacher_step": "frozen", "ema_momentum": "ema", "ema_steps": "ema", "deploy": "ema"}
    for key, owner in of.items():
        if key in read.values and kind != owner and read.values[key] != "student":
            read.problem(key, f"belongs to teacher {owner}, not to {kind}")
    if kind == "frozen":
        step = read.whole("teacher_step", phase_end, 1)
        if step is None:
            read.problem("teacher_step", "must say after which step the whole model is frozen")
        return FrozenTeacher(step or 1)
    if kind == "ema":
        first, last = read.checked("ema_momentum", MOMENTUM, _is_momentum, "two numbers, 0 to 1")
        steps = read.whole("ema_steps", None, 1)
        if steps is None:
            read.problem("ema_steps", "must say over how many steps the momentum rises")
        return AveragedTeacher(first, last, steps or 1)
    return None


def _is_momentum(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(is_number(part) and 0 <= part <= 1 for part in value)
        and value[0] <= value[1]
    )
