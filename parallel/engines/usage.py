"""Which values of a rank's weights the members of a step used, and what follows for their update.

A value that no member of a step used has a gradient of zero. AdamW moves it all the same, by
momentum and decay, and its second moment fades: at beta2 = .95 to a half in 13.5 steps, so that the
next gradient meets a tiny one. `step_within` leaves it alone. And a gradient is a mean over all
shares of a step, also over those that did not use the value: `Usage.by_users` makes it the mean
over those that did, a step function over channels where members are prefixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from motet.models.config import ModelConfig
from motet.models.member import Choice, Cut, Member, StepChoices
from motet.models.slices import inside, member_parts
from motet.parallel.runtime.dtensors import local, own_indices

_Cuts = tuple[Cut | None, ...]


class Usage:
    """How many of a step's shares used each value that this rank holds.

    Args:
        whole: the model that holds all weights.
        parameters: this rank's parts of them, by name.
    """

    def __init__(self, whole: ModelConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        self.whole, self.parameters = whole, parameters
        self.total = 0.0
        self._shares: list[tuple[float, list[dict[str, _Cuts]]]] = []
        self._indices: dict[str, list[Tensor]] = {}

    def of(self, step: StepChoices) -> Usage:
        """Take the members of a step."""
        shares = step.shares or step.mine
        self.total = float(len(shares))
        alike = Counter(frozenset(_trained(choice)) for choice in shares)
        self._shares = [
            (float(number), [self._parts(*one) for one in who]) for who, number in alike.items()
        ]
        return self

    def _parts(self, member: Member | None, skips: tuple[int, ...]) -> dict[str, _Cuts]:
        """Return what a pass of a member takes of its weights by name, of each dimension."""
        left_out = tuple(f"blocks.{layer}." for layer in skips)
        parts: dict[str, _Cuts] = dict.fromkeys(self.parameters, ())
        if member is not None:
            parts = {name: cuts for _, name, cuts in member_parts(member, self.whole)}
        return {name: cuts for name, cuts in parts.items() if not name.startswith(left_out)}

    def _takes(self, name: str) -> tuple[float, list[tuple[float, list[_Cuts]]]]:
        """Return how many shares used all of a weight, and of the others (how many, what each of
        their members takes of it).
        """
        everywhere, parts = 0.0, []
        for number, members in self._shares:
            takes = [parts_of[name] for parts_of in members if name in parts_of]
            cuts = [cut for cut in takes if any(cut)]
            if len(cuts) < len(takes):
                everywhere += number
            elif cuts:
                parts.append((number, cuts))
        return everywhere, parts

    def count(self, name: str) -> Tensor | float:
        """Return the number of shares that used each value of a weight, as this rank holds it; one
        number where it is the same for all.
        """
        everywhere, parts = self._takes(name)
        if not parts:
            return everywhere
        return everywhere + torch.stack([n * self._union(name, cuts) for n, cuts in parts]).sum(0)

    def used(self, name: str) -> Tensor:
        """Return which values of a weight some share used, bool, as this rank holds it."""
        return self._union(name, [cut for _, cuts in self._takes(name)[1] for cut in cuts])

    def partly(self) -> list[str]:
        """Return the weights of which shares used some values and left out others."""
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
            for everywhere, parts in [self._takes(name)]
            if parts and not everywhere
        ]

    def _union(self, name: str, cuts: Iterable[_Cuts]) -> Tensor:
        return reduce(torch.logical_or, (self._inside(name, cut) for cut in cuts))

    def _inside(self, name: str, cuts: _Cuts) -> Tensor:
        """Return which of its values a member takes, bool in the shape of this rank's part."""
        parameter = self.parameters[name]
        if name not in self._indices:
            device = local(parameter).device
            self._indices[name] = [index.to(device) for index in own_indices(parameter)]
        masks = [
            inside(index, size, cut).view([-1 if d == at else 1 for d in range(parameter.ndim)])
            for at, (index, size, cut) in enumerate(
                zip(self._indices[name], parameter.shape, cuts, strict=True)
            )
        ]
        return reduce(torch.logical_and, masks).expand(local(parameter).shape)

    @torch.no_grad()
    def by_users(self) -> None:
        """Make gradients means over the shares that used a value, from means over all shares."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            count, gradient = self.count(name), local(parameter.grad)
            if isinstance(count, Tensor):
                gradient.mul_(self.total / count.clamp(min=1.0))
            elif 0.0 < count < self.total:
                gradient.mul_(self.total / count)


def _trained(choice: Choice) -> Iterable[tuple[Member | None, tuple[int, ...]]]:
    return ((term.member, term.skips) for term in choice if term.trains)


@torch.no_grad()
def step_within(optimizer: torch.optim.Optimizer, usage: Usage) -> None:
    """Take a step of AdamW with the values that were used; others, and their moments, stay.

    The bias correction is that of the weight as a whole: it counts every step in which some value
    was used. One weight at a time is copied, so that it holds no second set of weights.
    """
    names = {usage.parameters[name]: name for name in usage.partly()}
    gradients = {parameter: parameter.grad for parameter in names}
    for parameter in names:
        parameter.grad = None
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in filter(names.__contains__, group["params"]):
            parameter.grad = gradients[parameter]
            used = usage.used(names[parameter])
            _step_within(parameter, optimizer.state[parameter], group, used)


def _step_within(
    parameter: nn.Parameter, state: Mapping[str, Tensor], group: Mapping[str, Any], used: Tensor
) -> None:
    """Take a step with some values of one weight."""
    assert parameter.grad is not None
    whole = [local(x) for x in (parameter, state["exp_avg"], state["exp_avg_sq"])]
    if not used.any():  # on this rank; all count the step
        state["step"].add_(1)
        return
    value, mean, square = (x[used] for x in whole)
    beta1, beta2 = group["betas"]
    adamw(
        [value],
        [local(parameter.grad)[used]],
        [mean],
        [square],
        [],
        [state["step"]],
        foreach=group["foreach"],
        fused=group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for target, part in zip(whole, (value, mean, square), strict=True):
        target[used] = part
