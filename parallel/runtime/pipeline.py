"""Pipeline parallelism: stages of a decoder driven by `torch.distributed.pipelining`.

Every rank of a pipeline reads the same micro-batches: the first stage takes the tokens, the last
the labels, all of them the document ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from motet.models.decoder import Decoder
from motet.models.layers import Places
from motet.parallel.layout.layout import Layout

_SCHEDULES: dict[str, Any] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": pipelining.ScheduleZBVZeroBubble,
}

Local = Callable[[Decoder, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Places]]
"""(decoder, tokens or hidden states, labels, document ids) -> this rank's part of them and their
places.
"""


class Stage(nn.Module):
    """One stage as the schedule calls it: [B, T] or [B, T, D] in; [B, T, D] or, from the last, the
    summed loss [1] out.
    """

    def __init__(self, decoder: Decoder, local: Local, z_loss: float) -> None:
        super().__init__()
        self.decoder, self.local, self.z_loss = decoder, local, z_loss
        self.sums: list[Tensor] = []

    def forward(
        self,
        x: Tensor,
        labels_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        score: bool = False,
    ) -> Tensor:
        """Train, or with `score` return log-probabilities and greediness, [2, B, T], from the last
        stage.
        """
        if score:
            places = self.decoder.places(labels_BT)
            if not self.decoder.part.last:
                return self._hidden(x, labels_BT, places)
            scores = self.decoder(x, labels_BT, mode="score", places=places)
            return torch.stack([scores.logprob, scores.greedy.to(scores.logprob.dtype)])
        x, labels_BT, places = self.local(self.decoder, x, labels_BT, document_ids_BT)
        if not self.decoder.part.last:
            return self._hidden(x, labels_BT, places)
        sums = self.decoder(x, labels_BT, mode="loss", z_loss=self.z_loss, places=places)
        self.sums.append(torch.stack([sums.cross_entropy, sums.z_loss]).detach())
        return torch.stack([sums.cross_entropy])

    def _hidden(self, x: Tensor, labels_BT: Tensor, places: Places) -> Tensor:
        hidden: Tensor = self.decoder(x, labels_BT, places=places)
        return hidden


class Pipeline:
    """The stages that this rank holds, and the schedules over them.

    Args:
        stages: stage number -> module.
        layout: its schedule and stages.
        group: the ranks of this pipeline, in order.
        shape: (B, T) of tokens -> shape of the hidden states of them that one rank of a pipeline
            passes on.
        dtype: of these hidden states.
    """

    def __init__(
        self,
        stages: dict[int, Stage],
        layout: Layout,
        group: dist.ProcessGroup,
        device: torch.device,
        shape: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        self.stages, self.layout, self.group, self.device = stages, layout, group, device
        self.shape, self.dtype = shape, dtype
        self.rank = dist.get_rank(group)
        self._schedules: dict[tuple[int, int, int], Any] = {}
        self._scale = 1.0

    def run(self, batches: Sequence[tuple[Tensor, Tensor, Tensor | None]], scale: float) -> Tensor:
        """Run all micro-batches forward and backward; return [cross-entropy, z-loss], zeros on
        ranks without the last stage.

        Args:
            batches: (tokens, labels, document ids) of equal shapes.
            scale: factor of the loss before the backward pass.
        """
        self._scale = scale
        rows, length = batches[0][0].shape
        schedule = self._schedule(len(batches), rows, length)
        whole = [
            None if part[0] is None else torch.cat(part) for part in zip(*batches, strict=True)
        ]
        tokens_BT, labels_BT, ids_BT = whole
        keywords = {"labels_BT": labels_BT}
        if ids_BT is not None:
            keywords["document_ids_BT"] = ids_BT
        arguments = (tokens_BT,) if 0 in self.stages else ()
        target = labels_BT if self.layout.stages - 1 in self.stages else None
        losses: list[Tensor] = []
        schedule.step(*arguments, target=target, losses=losses, return_outputs=False, **keywords)
        return self._take_sums()

    def _take_sums(self) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64)
        last = self.stages.get(self.layout.stages - 1)
        if last is not None:
            # Shape inference of the schedule may run a stage once more: only the sums of this
            # step's backward count.
            total += torch.stack(last.sums).double().sum(0).cpu()
            last.sums.clear()
        return total

    def _schedule(self, micro_batches: int, rows: int, length: int) -> Any:
        """Return the schedule for a number of micro-batches of one shape; made once."""
        key = (micro_batches, rows, length)
        if key not in self._schedules:
            stages = [self._torch_stage(number, rows, length) for number in self.stages]
            kind = _SCHEDULES[self.layout.schedule]
            single = self.layout.virtual_stages == 1
            self._schedules[key] = kind(
                stages[0] if single else stages,
                micro_batches,
                loss_fn=lambda output, _: output.sum() * self._scale,
                scale_grads=False,
            )
        return self._schedules[key]

    def _torch_stage(self, number: int, rows: int, length: int) -> pipelining.PipelineStage:
        hidden = torch.empty(
            self.shape(rows, length // self.layout.cp),
            dtype=self.dtype,
            device="meta",
            requires_grad=True,
        )
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        loss = torch.empty(1, device="meta", requires_grad=True)
        return pipelining.PipelineStage(
            self.stages[number],
            number,
            self.layout.stages,
            self.device,
            input_args=tokens if number == 0 else hidden,
            output_args=loss if number == self.layout.stages - 1 else hidden,
            group=self.group,
        )

    @torch.no_grad()
    def score(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Run one batch through all stages, forward only; return [2, B, T] (see `Stage`) on every
        rank of the pipeline.
        """
        x, number_of_stages = tokens_BT, self.layout.stages
        holder = {s: r for r in range(self.layout.pp) for s in self.layout.stages_of(r)}
        result = torch.empty(2, *tokens_BT.shape, device=self.device)
        for number in range(number_of_stages):
            if number and holder[number] != holder[number - 1]:
                x = self._pass_on(x, holder[number - 1], holder[number], tokens_BT.shape)
            if number in self.stages:
                x = self.stages[number](x, labels_BT, score=True)
        if number_of_stages - 1 in self.stages:
            result.copy_(x)
        dist.broadcast(result, group=self.group, group_src=holder[number_of_stages - 1])
        return result

    def _pass_on(self, x: Tensor, sender: int, receiver: int, shape: Sequence[int]) -> Tensor:
        if self.rank == sender:
            dist.send(x.contiguous(), group=self.group, group_dst=receiver)
        elif self.rank == receiver:
            x = torch.empty(self.shape(shape[0], shape[1]), dtype=self.dtype, device=self.device)
            dist.recv(x, group=self.group, group_src=sender)
        return x
