"""What engines share whose every rank runs the whole model on its own sequences; how state is
divided is the library's affair.

B batch, T tokens. Such a library averages gradients over ranks, so a rank's loss is multiplied by
their number: what comes out is the mean over all labels of the global batch, however unevenly they
are spread.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.family.base import Member, StepChoices
from motet.models.moe import MoE
from motet.parallel.engines.embedding_noise import refuse_noise
from motet.parallel.engines.members import MemberTally
from motet.parallel.engines.protocol import EngineOptions, Guard, MicroBatch, StepResult
from motet.parallel.engines.scoring import I64, Scoring
from motet.parallel.layout.layout import Layout, LayoutError
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.passes import Pass
from motet.parallel.runtime.step_totals import asked, balance, count_step, mixtures, settle

_Inputs = tuple[Tensor, Tensor, Tensor | None]


class Trained(nn.Module):
    """A decoder as DeepSpeed and Accelerate take it: one module whose result is a plain tuple of
    tensors.

    Autocast is entered inside, because DeepSpeed turns off what surrounds it.

    Attributes:
        turn: whose pass the next training pass is; None: the whole model's.
        scored: whose scores are asked for.
        taught: states of those that teach, of the micro-batch at hand.
        touches: let also the blocks that the last pass of a step leaves out be part of its graph,
            with gradients of zero: DDP waits for every weight.
    """

    def __init__(self, decoder: Decoder, autocast: str | None, z_loss: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.autocast, self.z_loss = autocast, z_loss
        self.turn: Pass | None = None
        self.scored: Member | None = None
        self.taught: dict[Member | None, Tensor] = {}
        self.touches = False

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor, document_ids_BT: Tensor | None, train: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (what to go backward through, summed [cross-entropy, z-loss]) for training, else
        (log-probability, likeliest token) [B, T].
        """
        with self._compute():
            if not train:
                scores = self.decoder(tokens_BT, labels_BT, mode="score", member=self.scored)
                return scores.logprob, scores.likeliest
            turn = self.turn
            sums = self.decoder(
                tokens_BT,
                labels_BT,
                document_ids_BT,
                mode="loss",
                z_loss=self.z_loss,
                **({} if turn is None else turn.keywords(self.taught)),
            )
            objective: Tensor = sums.objective
            if turn is not None:
                if sums.hidden_BTD is not None:
                    self.taught[turn.term.member] = sums.hidden_BTD.detach()
                if self.touches and turn.last:
                    objective = objective + self._touch(turn.term.member)
            return objective, torch.stack([sums.cross_entropy, sums.z_loss]).detach()

    def _touch(self, member: Member | None) -> Tensor:
        """Return zero, with a gradient to every weight of the blocks that a member leaves out."""
        idle = [
            weight.flatten()[:1].sum()
            for layer, block in self.decoder.blocks.items()
            if member is not None and int(layer) not in member.layers
            for weight in block.parameters()
        ]
        return torch.stack(idle).sum() * 0.0 if idle else torch.zeros((), device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.decoder.parameters()).device

    def _compute(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        # Each weight is used once per pass: a cache of rounded copies would only hold memory.
        return torch.autocast(self.autocast, torch.bfloat16, cache_enabled=False)


def _with_members(
    guard: Guard, losses: Mapping[str | None, float], loss: float, grad_norm: float
) -> bool:
    return guard(loss, grad_norm, losses)


class DataParallelEngine(Scoring):
    """Steps and scores of an `Engine`; a subclass says how gradients, updates and state are
    handled.

    A subclass sets `decoder` (whose mixtures it counts) and `trained` before the first step.

    Attributes:
        sums_each: gradients of a pass are added up over ranks right after it where members of one
            step run different blocks; else with the last pass alone.
        needs_all_layers: updates move weights of layers that nobody ran.
    """

    decoder: Decoder
    trained: Trained
    sums_each = False
    needs_all_layers = False

    def __init__(
        self, config: ModelConfig, options: EngineOptions, layout: Layout, world: World
    ) -> None:
        self.config, self.options, self.layout, self.world = config, options, layout, world

    @abstractmethod
    def _run(
        self, tokens_BT: Tensor, labels_BT: Tensor, document_ids_BT: Tensor | None, train: bool
    ) -> tuple[Tensor, Tensor]:
        """Run `Trained.forward` through the library."""

    @abstractmethod
    def _micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Surround forward and backward pass of a micro-batch; gradients are complete after the
        `last` one of a step.
        """

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss; the library divides it by the number of
        ranks.
        """

    @abstractmethod
    def _update(self, lr: float, loss: float, guard: Guard) -> tuple[float, bool]:
        """Ask the guard, apply or drop the gradients; return (gradient norm before clipping,
        whether it was applied).
        """

    def step(
        self,
        batches: Sequence[MicroBatch],
        lr: float,
        guard: Guard,
        stop: Callable[[], bool],
        members: StepChoices | None = None,
    ) -> StepResult:
        """See `Engine.step`."""
        tally = None if members is None else MemberTally(members, batches, self.config.n_layers)
        if tally is not None and self.needs_all_layers:
            self._refuse_short(tally)
        if any(getattr(batch, "noise", ()) for batch in batches):
            refuse_noise({"the plan": 0.0}, self.layout, False)
        n_labels, n_tokens = count_step(batches, True, self.world)
        for moe in self.experts.values():
            moe.begin_step(n_tokens, gradient_scale=self.world.size)
        sums = self._forward_backward(batches, self.world.size / max(n_labels, 1), tally)
        chosen = balance(self.config, self.experts, members is not None)
        totals = torch.cat([sums, asked(stop), chosen])
        if self.world.size > 1:
            dist.all_reduce(totals, group=self.world.control)
        cross_entropy, z_loss, stops, balance_loss = totals[:4].tolist()
        loss = cross_entropy / max(n_labels, 1)
        losses = {} if tally is None else tally.losses(True, 1, self.world)
        judge = partial(_with_members, guard, losses) if losses else guard
        grad_norm, applied = self._update(lr, loss, judge)
        if applied:
            settle(self.config, self.experts, totals[4:])
        return StepResult(
            loss,
            z_loss / max(n_labels, 1),
            grad_norm,
            n_labels,
            applied,
            stops > 0,
            balance_loss,
            losses,
        )

    def _forward_backward(
        self, batches: Sequence[MicroBatch], scale: float, tally: MemberTally | None
    ) -> Tensor:
        """Add the gradient of all micro-batches; return this rank's summed [cross-entropy, z-loss],
        float64.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(batches):
            ids = batch.document_ids_BT
            inputs = (
                self._to_device(batch.tokens_BT),
                self._to_device(batch.labels_BT),
                None if ids is None else self._to_device(ids),
            )
            if tally is None:
                self.trained.turn = None
                total += self._one_pass(inputs, scale, number == len(batches) - 1)
            else:
                total += self._members(number, inputs, scale, tally)
        if tally is not None and self.trained.touches:
            self._leave_alone(tally)
        self.trained.taught.clear()
        return total.cpu()

    def _one_pass(self, inputs: _Inputs, scale: float, last: bool) -> Tensor:
        with self._micro_batch(last):
            objective, sums = self._run(*inputs, train=True)
            self._backward(objective * scale)  # its gradient holds the z-loss's: `LossSums`
        return sums.double()

    def _members(self, number: int, inputs: _Inputs, scale: float, tally: MemberTally) -> Tensor:
        """Run every pass over a micro-batch; return [cross-entropy, z-loss], their mean."""
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for one in tally.passes(number):
            self.trained.turn = one
            if one.trains:
                # Blocks that only an earlier member uses are not in the last pass.
                last = one.last or (self.sums_each and not tally.same_layers)
                mine = self._one_pass(inputs, scale * one.weight, last)
            else:
                with torch.no_grad():
                    mine = self._run(*inputs, train=True)[1].double()
            tally.add(number, one.term, mine)
            total += mine * one.share
        return total

    def _refuse_short(self, tally: MemberTally) -> None:
        """Raise `LayoutError` for a slice of fewer layers that is no member of its family: those
        were refused before a rank started.
        """
        for term in (term for choice in tally.choices for term in choice):
            if term.member is not None and len(term.member.layers) < self.config.n_layers:
                raise LayoutError(
                    f"layout.engine={self.layout.engine}: {term.member.name!r} leaves out layers, "
                    "which ZeRO would move all the same; use native or accelerate"
                )

    def _leave_alone(self, tally: MemberTally) -> None:
        """Drop the zeros that `Trained.touches` gave to blocks that nobody ran in this step."""
        terms = [term for choice in tally.choices for term in choice if term.trains]
        for layer, block in self.decoder.blocks.items():
            if all(t.member is not None and int(layer) not in t.member.layers for t in terms):
                block.zero_grad(set_to_none=True)

    def _to_device(self, array: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.world.device, torch.int64, non_blocking=True)

    @cached_property
    def experts(self) -> dict[int, MoE]:
        """The mixtures by layer."""
        return mixtures([self.decoder])

    def compile_ahead(self, batch: MicroBatch, members: Sequence[Member]) -> None:
        """See `Engine.compile_ahead`: not here. A library counts a backward pass as one of a
        step's, so blocks compile when a member first trains.
        """

    def _scored(
        self, tokens_BT: I64, labels_BT: I64, member: Member | None
    ) -> tuple[Tensor, Tensor]:
        """See `Scoring`."""
        self.trained.scored = member
        return self._run(self._to_device(tokens_BT), self._to_device(labels_BT), None, train=False)
