"""State of engines whose every weight is a tensor, plain or distributed, that AdamW updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from motet.parallel.runtime.dtensors import fill, local, own_part, trained, whole
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.step_totals import expert_state

if TYPE_CHECKING:
    from motet.models.growth.state import WeightState

OPTIMIZER_KEYS = ("exp_avg", "exp_avg_sq", "step")


class TensorState:
    """The part of the `Engine` protocol that reads and sets state; an engine sets the
    attributes.
    """

    world: World
    parameters: dict[str, nn.Parameter]
    frozen: frozenset[str] = frozenset()
    new: Mapping[str, Tensor] | None = None
    """Which values of this rank's parts have a learning rate of their own; None: none."""
    new_share: float = 1.0
    experts: Any  # mixtures by layer: an attribute here, a cached property there

    def adam(self) -> torch.optim.Optimizer:
        """Return the optimizer that holds the state of the parameters."""
        raise NotImplementedError

    def freeze(self, names: frozenset[str]) -> None:
        """See `Engine.freeze`."""
        self.frozen = names

    def leave_frozen(self) -> None:
        """Drop the gradients of frozen weights: AdamW touches neither them nor their moments."""
        for name in self.frozen & self.parameters.keys():
            self.parameters[name].grad = None

    def rewarm(self, share: float, new: Callable[[str], Tensor | None]) -> None:
        """See `Engine.rewarm`."""
        self.new_share = share
        if share == 1.0:
            self.new = None
        elif self.new is None:
            found = {name: (new(name), weight) for name, weight in self.parameters.items()}
            self.new = {
                name: own_part(mask, weight).to(local(weight).device)
                for name, (mask, weight) in found.items()
                if mask is not None
            }

    @contextmanager
    def rewarmed(self) -> Iterator[None]:
        """Let an update of AdamW within it move new values by their share: it moves a value in
        proportion to the learning rate, decay too.
        """
        new = self.new or {}
        before = {name: local(self.parameters[name]).clone() for name in new}
        yield
        for name, old in before.items():
            now = local(self.parameters[name])
            now.copy_(torch.where(new[name], torch.lerp(old, now, self.new_share), now))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of a step: of every group that over its width multiplier."""
        for group in self.adam().param_groups:
            group["lr"] = lr / group["width_multiplier"]

    def speaks(self) -> bool:
        """Return whether this rank tells the others of the weights that it holds."""
        return self.world.rank == 0

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine.tensors`; a mixture adds "frequencies.blocks.N" and "bias.blocks.N"."""
        return trained(self.parameters, self.adam()) | expert_state(self.experts)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.restore`: these are the tensors that train, so nothing is left to do."""

    def load_model(self, state: dict[str, Tensor]) -> None:
        """See `Engine.load_model`."""
        fill(self.parameters, lambda name, _: state[name])

    def full_model(self) -> dict[str, Tensor]:
        """See `Engine.full_model`."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            value = whole(parameter.detach())
            if self.world.rank == 0:
                state[name] = value.cpu().clone()
        return state

    def export_state(self) -> Iterator[tuple[str, WeightState]]:
        """See `Engine.export_state`."""
        states = self._held()
        shapes_of: list[dict[str, dict[str, tuple[int, ...]]]] = [{}] * self.world.size
        if self.world.size > 1:
            shapes = {
                name: {key: tuple(value.shape) for key, value in parts.items()}
                for name, parts in states.items()
            }
            speaks = shapes if self.speaks() else {}
            dist.all_gather_object(shapes_of, speaks, group=self.world.control)
        everywhere = self.world.size == 1 or set(shapes_of[0]) >= {
            n for held in shapes_of for n in held
        }
        source = {
            name: rank for rank, held in reversed(list(enumerate(shapes_of))) for name in held
        }
        for name in states if everywhere else sorted(source):
            parts = {key: whole(value).cpu().clone() for key, value in states.get(name, {}).items()}
            if not everywhere:  # a stage of a pipeline holds it: its first rank sends it to all
                parts = parts or {
                    key: torch.empty(shape) for key, shape in shapes_of[source[name]][name].items()
                }
                for key in sorted(parts):
                    dist.broadcast(parts[key], source[name], group=self.world.control)
            yield name, parts

    def import_state(self, state: Iterable[tuple[str, WeightState]]) -> None:
        """See `Engine.import_state`."""
        mine = self._held()
        for name, parts in state:
            for key, value in mine.pop(name, {}).items():
                local(value).copy_(own_part(parts[key], value))
        if mine:
            raise ValueError(f"the state lacks {', '.join(sorted(mine))}")

    def _held(self) -> dict[str, WeightState]:
        """Return the tensors that this rank trains, by weight, in one order on all its holders."""
        optimizer = self.adam()
        found: dict[str, WeightState] = {
            name: {
                "weight": parameter.detach(),
                **{key: optimizer.state[parameter][key] for key in OPTIMIZER_KEYS},
            }
            for name, parameter in self.parameters.items()
        }
        experts = expert_state(self.experts)
        return found | {name: {"value": value} for name, value in experts.items()}


def gather_stages(parameters: dict[str, Tensor], speaks: bool, world: World) -> dict[str, Tensor]:
    """Bring the weights of every stage of a pipeline to rank 0, tensor by tensor; {} elsewhere (a
    collective).

    Args:
        parameters: those that this rank tells of; rank 0 its own.
        speaks: this rank tells the others of its stage.
    """
    sends = speaks and world.rank != 0
    shapes = {name: tuple(value.shape) for name, value in parameters.items()} if sends else {}
    shapes_of: list[dict[str, tuple[int, ...]]] = [{}] * world.size
    dist.all_gather_object(shapes_of, shapes, group=world.control)
    for source, parts in enumerate(shapes_of):
        for name, shape in parts.items():
            if world.rank == source:
                dist.send(parameters[name], 0, group=world.control)
            elif world.rank == 0 and name not in parameters:
                parameters[name] = torch.empty(shape)
                dist.recv(parameters[name], source, group=world.control)
            elif world.rank == 0:
                dist.recv(torch.empty(shape), source, group=world.control)
    return parameters if world.rank == 0 else {}
