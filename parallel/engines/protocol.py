"""The protocol between the step loop and whatever trains the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from motet.parallel.runtime.options import EngineOptions as EngineOptions
from motet.parallel.runtime.options import MicroBatch as MicroBatch

if TYPE_CHECKING:
    from motet.models.config import ModelConfig
    from motet.models.family.base import Member, StepChoices
    from motet.models.growth.state import WeightState
    from motet.parallel.layout.layout import Layout
    from motet.parallel.runtime.mesh import World


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        loss: mean cross-entropy over the labels of the global batch, nats.
        z_loss: mean squared log-partition, times its weight.
        grad_norm: before clipping.
        n_labels: labels of the global batch.
        balance_loss: load-balancing and router losses of a mixture of experts, with their
            coefficients; 0 for a dense model.
        applied: False when the guard refused the update.
        stop: some rank was asked to stop.
        losses: mean cross-entropy of each member that trained, by name, None for the whole model;
            empty where the whole model trained alone.
    """

    loss: float
    z_loss: float
    grad_norm: float
    n_labels: int
    applied: bool
    stop: bool
    balance_loss: float = 0.0
    losses: Mapping[str | None, float] = field(default_factory=dict)


Guard = Callable[..., bool]
"""(loss, gradient norm) -> whether to apply the update; with members (loss, gradient norm,
{member's
name: its loss}).

All are global, so every rank decides alike.
"""


class Engine(Protocol):
    """What trains a model; the same experiments, probes and checkpoints run on any of them."""

    def step(
        self,
        batches: Sequence[MicroBatch],
        lr: float,
        guard: Guard,
        stop: Callable[[], bool],
        members: StepChoices | None = None,
    ) -> StepResult:
        """Train on one global batch; the loss is the mean over all its labels, however they are
        spread over ranks.

        Args:
            batches: the micro-batches of this data-parallel rank (`Layout.dp_rank`), all of one
                shape.
            lr: learning rate of this step.
            guard: decides whether the update is applied.
            stop: whether this rank was asked to stop; called once, after the passes, so that a
                signal is heard within the step that it comes in.
            members: who trains on each micro-batch, and with which losses; ranks may differ in
                widths, never in layers. None: the whole model alone.
        """

    def compile_ahead(self, batch: MicroBatch, members: Sequence[Member]) -> None:
        """Compile what trains the whole model and each of its members, by a pass of each that
        changes nothing, so that no step waits for it (a collective); nothing where blocks are not
        compiled.
        """

    def score(
        self,
        tokens_BT: npt.NDArray[np.int64],
        labels_BT: npt.NDArray[np.int64],
        member: Member | None = None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Return log-probability (nats) and greedy agreement of every label, [B, T], as a member
        of the family (None: the whole model) sees them.

        A collective: ranks of one data-parallel rank bring the same rows and get the same scores;
        all call it equally often.
        """

    def likeliest(
        self,
        tokens_BT: npt.NDArray[np.int64],
        at_BK: npt.NDArray[np.int64],
        member: Member | None = None,
    ) -> npt.NDArray[np.int64]:
        """Return the most likely token after each of the places `at_BK` of each row, int64 [B, K],
        the smallest of those whose logits are nearly equal (`models.loss.TIE`). A collective, as
        `score` is.
        """

    def finish_scoring(self) -> None:
        """Give back what scoring held, so that the next step finds the engine as it was."""

    def freeze(self, names: frozenset[str]) -> None:
        """Leave some weights as they are in the steps that follow, moments too; () trains all. The
        native engine alone does.
        """

    def rewarm(self, share: float, new: Callable[[str], torch.Tensor | None]) -> None:
        """Give new values of a model that grew so many times the learning rate of all others in the
        steps that follow; 1 treats all alike. The native engine alone does.

        Args:
            new: which values of a weight are new, bool of its unsharded shape; None: none of them.
                Asked once, until the share is 1 again.
        """

    def channel_scores(self, batches: Sequence[MicroBatch]) -> dict[str, list[float]]:
        """Return how much every channel of every axis matters: how large its activations are on
        some sequences (`parallel.engines.channel_order.measured`; a collective).

        Args:
            batches: this data-parallel rank's part of them.
        """

    def order_channels(self, batches: Sequence[MicroBatch], groups: int) -> dict[str, list[int]]:
        """Put the channels of every axis in the order of their importance, weights with their
        moments, and return the orders (`models.family.importance`); the model computes the same (a
        collective).

        Args:
            batches: this data-parallel rank's part of the sequences that show importance.
            groups: of the members (`Member.groups`).
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of model and optimizer by layout-independent names (a
        collective).

        "model.N", "exp_avg.N", "exp_avg_sq.N" and "step.N" for every weight N that this rank holds
        a part of.
        """

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what a checkpoint was read into: the very tensors that `tensors` returned (a
        collective).
        """

    def export_state(self) -> Iterator[tuple[str, WeightState]]:
        """Yield every weight's name with its unsharded value and optimizer state, fp32 on the CPU
        of every rank (a collective that all must follow to its end).

        One weight at a time: no rank holds more than that beside its own part. Then a mixture's
        balance, "frequencies.blocks.N" and "bias.blocks.N", as {"value": tensor}.
        """

    def import_state(self, state: Iterable[tuple[str, WeightState]]) -> None:
        """Go on from what `export_state` gave, of an engine of any kind and layout, or what a
        growth operator made of it; each rank keeps its own part (a collective).

        Raises:
            ValueError: a weight of this model is missing.
        """

    def teacher_source(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model that is followed (`EngineOptions.taught_by`), by their
        names in the checkpoint of the run that trained it: `dcp.load` fills them in place. Native
        alone has them.
        """
        raise NotImplementedError

    def full_model(self) -> dict[str, torch.Tensor]:
        """Return the unsharded model on the CPU of rank 0, {} elsewhere. A collective."""

    def load_model(self, state: dict[str, torch.Tensor]) -> None:
        """Set the weights from unsharded tensors, present on every rank."""


ENGINES = {
    "native": ("motet.parallel.engines.native", "NativeEngine"),
    "deepspeed": ("motet.parallel.engines.engine_deepspeed", "DeepSpeedEngine"),
    "accelerate": ("motet.parallel.engines.engine_accelerate", "AccelerateEngine"),
}


def build_engine(
    config: ModelConfig, options: EngineOptions, layout: Layout, world: World
) -> Engine:
    """Build the engine that a layout asks for; its module, and what that needs, is imported only
    then.
    """
    if options.base_width is not None and layout.engine != "native":
        raise AssertionError(f"{layout.engine} gives all weights one learning rate")
    module, name = ENGINES[layout.engine]
    engine: Engine = getattr(import_module(module), name)(config, options, layout, world)
    return engine
