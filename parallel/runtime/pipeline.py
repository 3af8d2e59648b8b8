"""Pipeline parallelism: stages of a decoder driven by `torch.distributed.pipelining`.

Every rank of a pipeline reads the same micro-batches: the first stage takes the tokens, the last
the labels, all of them the document ids. Where members of a family train, every pass of one over a
micro-batch is a micro-batch of the schedule, in the order in which they follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from motet.models.decoder import Decoder
from motet.models.layers import Places
from motet.models.member import Member
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.rules import schedule_takes
from motet.parallel.runtime.passes import Pass

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


class _Untaught(torch.autograd.Function):
    """Values that the backward pass stops at: the input that they came from gets zeros, which the
    schedule sends on as it sends every gradient.
    """

    @staticmethod
    def forward(ctx: Any, origin: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(origin)
        return values.detach()  # not a view of it: schedules detach what stages return in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (origin,) = ctx.saved_tensors
        return torch.zeros_like(origin), None


class Stage(nn.Module):
    """One stage as the schedule calls it: [B, T] or [B, T, D] in; [B, T, D] or, from the last, the
    summed loss [1] out.

    Hidden states have the whole model's width, also those of a narrower member: buffers between
    ranks have one size.
    """

    def __init__(self, decoder: Decoder, local: Local, z_loss: float) -> None:
        super().__init__()
        self.decoder, self.local, self.z_loss = decoder, local, z_loss
        self.sums: list[Tensor] = []
        self._turns: Iterator[Pass | None] | None = None
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._taught: dict[Member | None, Tensor] = {}

    def begin(
        self, turns: Sequence[Pass | None] | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Say who trains in the passes that come next: a schedule takes a stage's micro-batches in
        order. None in the place of one: it only fills the schedule.

        Args:
            shape, dtype: of the hidden states that it hands on.
        """
        self._turns = None if turns is None else iter(turns)
        self._shape, self._dtype = shape, dtype

    def take_sums(self) -> Tensor:
        """Return [cross-entropy, z-loss] of each pass since the last call, float64 on the CPU."""
        found = torch.stack(self.sums).double().cpu()
        self.sums.clear()
        self._taught.clear()
        return found

    def forward(
        self,
        x: Tensor,
        labels_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        score: bool = False,
        member: Member | None = None,
    ) -> Tensor:
        """Train, or with `score` return log-probabilities and likeliest tokens of a member, [2, B,
        T], from the last stage.
        """
        if score:
            places = self.decoder.places(labels_BT)
            if not self.decoder.part.last:
                return self._hidden(x, labels_BT, places, member)
            scores = self.decoder(x, labels_BT, mode="score", places=places, member=member)
            return torch.stack([scores.logprob, scores.likeliest.to(scores.logprob.dtype)])
        mine, labels_BT, places = self.local(self.decoder, x, labels_BT, document_ids_BT)
        if self._turns is None:
            return self._pass(mine, labels_BT, places, None)
        turn = next(self._turns)
        if turn is not None and turn.trains:
            return self._pass(mine, labels_BT, places, turn)
        # A teacher that does not train here costs its forward pass alone.
        with torch.no_grad():
            values = self._pass(mine, labels_BT, places, turn) if turn else self._idle(mine)
        origin = x if x.requires_grad else torch.zeros((), device=x.device, requires_grad=True)
        result: Tensor = _Untaught.apply(origin, values)
        return result

    def _pass(self, x: Tensor, labels_BT: Tensor, places: Places, turn: Pass | None) -> Tensor:
        if not self.decoder.part.last:
            return self._hidden(x, labels_BT, places, None if turn is None else turn.term.member)
        extra = {} if turn is None else turn.keywords(self._taught)
        sums = self.decoder(x, labels_BT, mode="loss", z_loss=self.z_loss, places=places, **extra)
        self.sums.append(torch.stack([sums.cross_entropy, sums.z_loss]).detach())
        if turn is None:
            return torch.stack([sums.cross_entropy])
        if sums.hidden_BTD is not None:
            self._taught[turn.term.member] = sums.hidden_BTD.detach()
        return torch.stack([sums.objective * turn.weight])

    def _idle(self, x: Tensor) -> Tensor:
        if self.decoder.part.last:
            self.sums.append(torch.zeros(2, device=x.device))
            return torch.zeros(1, device=x.device)
        return torch.zeros(self._shape, dtype=self._dtype, device=x.device)

    def _hidden(
        self, x: Tensor, labels_BT: Tensor, places: Places, member: Member | None
    ) -> Tensor:
        hidden: Tensor = self.decoder(x, labels_BT, places=places, member=member)
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
        self._kept: tuple[tuple[int, int, int], Any] | None = None
        self._scale = 1.0

    def run(
        self,
        batches: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        scale: float,
        turns: Sequence[Pass] | None = None,
    ) -> Tensor:
        """Run all micro-batches forward and backward; return [cross-entropy, z-loss] of each,
        float64, zeros on ranks without the last stage.

        Args:
            batches: (tokens, labels, document ids) of equal shapes; one that several members pass
                over stands there as often.
            scale: factor of the loss before the backward pass.
            turns: which pass is made over each; None: of the whole model.
        """
        self._scale, wanted = scale, len(batches)
        rows, length = batches[0][0].shape
        padded: list[Pass | None] | None = None if turns is None else list(turns)
        if padded is not None:
            while not schedule_takes(self.layout, len(padded)):
                padded.append(None)
            batches = [*batches, *[batches[-1]] * (len(padded) - wanted)]
        for stage in self.stages.values():
            stage.begin(padded, self.shape(rows, length // self.layout.cp), self.dtype)
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
        last = self.stages.get(self.layout.stages - 1)
        return torch.zeros(wanted, 2).double() if last is None else last.take_sums()[:wanted]

    def _schedule(self, micro_batches: int, rows: int, length: int) -> Any:
        """Return the schedule for a number of micro-batches of one shape.

        One is kept: each holds a buffer for every micro-batch.
        """
        key = (micro_batches, rows, length)
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            stages = [self._torch_stage(number, rows, length) for number in self.stages]
            kind = _SCHEDULES[self.layout.schedule]
            single = self.layout.virtual_stages == 1
            made = kind(
                stages[0] if single else stages,
                micro_batches,
                loss_fn=lambda output, _: output.sum() * self._scale,
                scale_grads=False,
            )
            self._kept = key, made
        return self._kept[1]

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
    def score(self, tokens_BT: Tensor, labels_BT: Tensor, member: Member | None = None) -> Tensor:
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
                x = self.stages[number](x, labels_BT, score=True, member=member)
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
