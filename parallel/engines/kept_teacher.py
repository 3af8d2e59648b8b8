"""A second set of the weights that members follow: frozen at a step, or an average over steps.

Sources: Once-for-All's full network (arXiv:1908.09791, section 3.3), which stays as it was before
shrinking began; the mean teacher (arXiv:1703.01780), POA's for instance. It is divided over ranks
as the model is, without gradients and optimizer: 4 bytes a weight beside the 16 of weights,
gradients and Adam's moments. It is part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from motet.models.decoder import Decoder
from motet.models.distill import Teacher
from motet.models.layers import Places
from motet.models.member import TeacherUpdate
from motet.parallel.runtime.dtensors import local, reshard
from motet.parallel.runtime.step_totals import expert_state, mixtures


class KeptTeacher:
    """The second set, as one rank holds it.

    Args:
        decoder: laid out as the model's.
        students: the tensors that it is made from, by name (`state_of`).
    """

    def __init__(self, decoder: Decoder, students: Mapping[str, Tensor]) -> None:
        self.decoder = decoder.requires_grad_(False)
        self.students = students
        self.state = state_of(decoder)
        self.since = torch.full((), -1.0, dtype=torch.float64)
        """The step of its last update; -1 before the first."""
        self._take(0.0)

    @torch.no_grad()
    def follow(self, update: TeacherUpdate | None) -> None:
        """Carry out what is due before a step, once."""
        if update is None or update.at <= self.since.item():
            return
        self._take(update.keep if self.since.item() >= 0 else 0.0)
        self.since.fill_(update.at)

    def _take(self, keep: float) -> None:
        mine = [local(value) for value in self.state.values()]
        theirs = [local(self.students[name]) for name in self.state]
        with torch.no_grad():
            if keep:
                torch._foreach_lerp_(mine, theirs, 1.0 - keep)
            else:  # what was there may be no number: memory without a value
                torch._foreach_copy_(mine, theirs)

    @torch.no_grad()
    def states(self, tokens_BT: Tensor, places: Places) -> Teacher:
        """Run it over a micro-batch; what it returns holds until `rest`."""
        teacher: Teacher = self.decoder(tokens_BT, mode="states", places=places)
        return teacher

    def rest(self) -> None:
        """Give back the weights that it gathered."""
        reshard(self.decoder)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it: "teacher.N" for every weight N, and its step."""
        state = {f"teacher.{name}": value for name, value in self.state.items()}
        return {**state, "teacher_step": self.since}


def state_of(decoder: Decoder) -> dict[str, Tensor]:
    """Return this rank's parts of a decoder's weights, and the balance of its mixtures, by name."""
    weights = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    return weights | expert_state(mixtures([decoder]))
