"""What engines share whose every rank runs the whole model on its own sequences; how state is
divided is the library's affair.

B batch, T tokens. Such a library averages gradients over ranks, so a rank's loss is multiplied by
their number: what comes out is the mean over all labels of the global batch, however unevenly they
are spread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.family.base import Member, StepChoices
from motet.models.moe import MoE
from motet.parallel.engines.protocol import EngineOptions, Guard, MicroBatch, StepResult
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from motet.parallel.runtime.step_totals import asked, balance, count_step, mixtures, settle


class Trained(nn.Module):
    """A decoder as DeepSpeed and Accelerate take it: one module whose result is a plain tuple of
    tensors.

    Autocast is entered inside, because DeepSpeed turns off what surrounds it.
    """

    def __init__(self, decoder: Decoder, autocast: str | None, z_loss: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.autocast, self.z_loss = autocast, z_loss

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor, document_ids_BT: Tensor | None, train: bool
    ) -> tuple[Tensor, Tensor]:
        """Return summed (cross-entropy, z-loss) for training, else (log-probability, greedy) [B,
        T].
        """
        with self._compute():
            if train:
                sums = self.decoder(
                    tokens_BT, labels_BT, document_ids_BT, mode="loss", z_loss=self.z_loss
                )
                return sums.cross_entropy, sums.z_loss
            scores = self.decoder(tokens_BT, labels_BT, mode="score")
            return scores.logprob, scores.greedy

    def _compute(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        # Each weight is used once per pass: a cache of rounded copies would only hold memory.
        return torch.autocast(self.autocast, torch.bfloat16, cache_enabled=False)


class DataParallelEngine(ABC):
    """Steps and scores of an `Engine`; a subclass says how gradients, updates and state are
    handled.

    A subclass sets `decoder` (whose mixtures it counts) before the first step.
    """

    decoder: Decoder

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
        """See `Engine.step`; members are refused before an engine is built (`members.refusals`)."""
        assert members is None
        n_labels, n_tokens = count_step(batches, True, self.world)
        for moe in self.experts.values():
            moe.begin_step(n_tokens, gradient_scale=self.world.size)
        sums = self._forward_backward(batches, self.world.size / max(n_labels, 1))
        totals = torch.cat([sums, asked(stop), balance(self.config, self.experts)])
        if self.world.size > 1:
            dist.all_reduce(totals, group=self.world.control)
        cross_entropy, z_loss, stops, balance_loss = totals[:4].tolist()
        loss = cross_entropy / max(n_labels, 1)
        grad_norm, applied = self._update(lr, loss, guard)
        if applied:
            settle(self.config, self.experts, totals[4:])
        return StepResult(
            loss, z_loss / max(n_labels, 1), grad_norm, n_labels, applied, stops > 0, balance_loss
        )

    def _forward_backward(self, batches: Sequence[MicroBatch], scale: float) -> Tensor:
        """Add the gradient of all micro-batches; return this rank's summed [cross-entropy, z-loss],
        float64.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(batches):
            tokens_BT = self._to_device(batch.tokens_BT)
            labels_BT = self._to_device(batch.labels_BT)
            ids = batch.document_ids_BT
            ids_BT = None if ids is None else self._to_device(ids)
            with self._micro_batch(last=number == len(batches) - 1):
                cross_entropy, z_loss = self._run(tokens_BT, labels_BT, ids_BT, train=True)
                self._backward(cross_entropy * scale)  # its gradient holds the z-loss's: `LossSums`
            sums += torch.stack([cross_entropy, z_loss]).detach().double()
        return sums.cpu()

    def _to_device(self, array: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.world.device, torch.int64, non_blocking=True)

    @cached_property
    def experts(self) -> dict[int, MoE]:
        """The mixtures by layer."""
        return mixtures([self.decoder])

    @torch.no_grad()
    def score(
        self,
        tokens_BT: npt.NDArray[np.int64],
        labels_BT: npt.NDArray[np.int64],
        member: Member | None = None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """See `Engine.score`."""
        assert member is None
        logprob, greedy = self._run(
            self._to_device(tokens_BT), self._to_device(labels_BT), None, train=False
        )
        return logprob.double().cpu().numpy(), greedy.cpu().numpy()
