"""A second set of the weights that members follow: frozen at a step, or an average over steps.

Sources: Once-for-All's full network (arXiv:1908.09791, section 3.3), which stays as it was before
shrinking began; the mean teacher (arXiv:1703.01780), POA's for instance. It is divided over ranks
as the model is, without gradients and optimizer: 4 bytes a weight beside the 16 of weights,
gradients and Adam's moments. It is part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.distill import Teacher
from motet.models.layers import Places
from motet.models.member import TeacherUpdate
from motet.parallel.runtime.dtensors import local, reshard
from motet.parallel.runtime.options import EngineOptions
from motet.parallel.runtime.step_totals import expert_state, mixtures


class FollowedModel:
    """A model without gradient beside the one that trains, as one rank holds it.

    Args:
        decoder: laid out as the model is.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder.requires_grad_(False)
        self.state = state_of(decoder)

    def follow(self, update: TeacherUpdate | None) -> None:
        """Carry out what is due before a step, once."""

    @torch.no_grad()
    def states(self, tokens_BT: Tensor, places: Places) -> Teacher:
        """Run it over a micro-batch; what it returns holds until `rest`."""
        teacher: Teacher = self.decoder(tokens_BT, mode="states", places=places)
        return teacher

    def rest(self) -> None:
        """Give back the weights that it gathered."""
        reshard(self.decoder)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it."""
        return {}


class EarlierTeacher(FollowedModel):
    """A trained model of sizes of its own, that another learns from (Minitron, arXiv:2407.14679).

    It is no part of checkpoints: the one that it was read from stays.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        for value in self.state.values():
            local(value).fill_(torch.nan)  # before it is read, no loss is a number

    def source(self) -> dict[str, Tensor]:
        """Return its tensors by their names in the checkpoint that it is read from."""
        own = {name for name, _ in self.decoder.named_parameters()}
        return {f"model.{n}" if n in own else n: value for n, value in self.state.items()}


class KeptTeacher(FollowedModel):
    """The second set, as one rank holds it.

    Args:
        decoder: laid out as the model's.
        students: the tensors that it is made from, by name (`state_of`).
    """

    def __init__(self, decoder: Decoder, students: Mapping[str, Tensor]) -> None:
        super().__init__(decoder)
        self.students = students
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

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it: "teacher.N" for every weight N, and its step."""
        state = {f"teacher.{name}": value for name, value in self.state.items()}
        return {**state, "teacher_step": self.since}


class WithTeacher:
    """The part of an engine that answers for the model that is followed; the engine sets it."""

    teacher: FollowedModel | None

    def teacher_source(self) -> dict[str, Tensor]:
        """See `Engine.teacher_source`."""
        assert isinstance(self.teacher, EarlierTeacher)
        return self.teacher.source()


def followed(
    config: ModelConfig,
    options: EngineOptions,
    laid_out: Callable[[ModelConfig], Decoder],
    decoders: Mapping[int, Decoder],
) -> FollowedModel | None:
    """Return the model that is followed, as options ask for it; None where nobody is.

    Args:
        laid_out: makes a model of some sizes, laid out as the one that trains.
        decoders: of that one.
    """
    if options.taught_by is not None:
        return EarlierTeacher(laid_out(options.taught_by))
    return KeptTeacher(laid_out(config), state_of(decoders[0])) if options.teacher else None


def state_of(decoder: Decoder) -> dict[str, Tensor]:
    """Return this rank's parts of a decoder's weights, and the balance of its mixtures, by name."""
    weights = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    return weights | expert_state(mixtures([decoder]))
