"""The native engine: PyTorch's own FSDP2, DTensor and pipelining around a Decoder, with AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from motet.models.attention import document_positions
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder, Part, initial_value
from motet.models.distill import Teacher
from motet.models.family.base import Member, StepChoices
from motet.models.family.importance import orders_by
from motet.models.layers import Places
from motet.models.loss import LossSums
from motet.models.member import Term, name_of
from motet.models.moe import MoE
from motet.models.width_multipliers import fan_in_ratio
from motet.parallel.engines.channel_order import measured, move, read_through
from motet.parallel.engines.embedding_noise import NoisyEmbeddings
from motet.parallel.engines.kept_teacher import WithTeacher, followed
from motet.parallel.engines.members import MemberTally, through_stages
from motet.parallel.engines.protocol import EngineOptions, Guard, MicroBatch, StepResult
from motet.parallel.engines.scoring import I64, Scoring
from motet.parallel.engines.tensor_state import TensorState, gather_stages
from motet.parallel.engines.usage import Usage, step_within
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.weights import gathers_again
from motet.parallel.runtime.context_parallel import RingAttention
from motet.parallel.runtime.context_pieces import context_slice
from motet.parallel.runtime.dtensors import adamw, clip, fill, norm_squared, reshard, whole
from motet.parallel.runtime.mesh import World, build_meshes
from motet.parallel.runtime.passes import NOBODY, Pass, Taught
from motet.parallel.runtime.pipeline import Pipeline, Stage
from motet.parallel.runtime.shard import split
from motet.parallel.runtime.step_totals import (
    asked,
    balance,
    count_step,
    mixtures,
    settle,
)

_ValueOf = Callable[[str, tuple[int, ...]], Tensor]
_Inputs = tuple[Tensor, Tensor, Tensor | None]


class NativeEngine(NoisyEmbeddings, Scoring, WithTeacher, TensorState):
    """A Decoder laid out over the ranks of a world; bare on one rank."""

    def __init__(
        self, config: ModelConfig, options: EngineOptions, layout: Layout, world: World
    ) -> None:
        self.config, self.options, self.layout, self.world = config, options, layout, world
        self.meshes = build_meshes(layout, world, config.n_experts > 0)
        self.ring = None if self.meshes.context is None else RingAttention(self.meshes.context)
        self.place = layout.place(world.rank)
        self.decoders = self._decoders(config)
        self.roots: dict[int, nn.Module] = dict(self.decoders)
        if layout.pp > 1:
            self.roots = {
                number: Stage(decoder, self._local, options.z_loss)
                for number, decoder in self.decoders.items()
            }
        self.keeps_gathered = not gathers_again(config, layout)
        for number, decoder in self.decoders.items():
            self._lay_out(decoder, self.roots[number])
        self.pipeline = self._pipeline() if layout.pp > 1 else None
        self.parameters = {  # each rank's own part, for good
            name: parameter
            for decoder in self.decoders.values()
            for name, parameter in decoder.named_parameters()
        }
        self.experts = mixtures(self.decoders.values())
        fill(self.parameters, lambda name, shape: initial_value(name, shape, config, options.seed))
        self.optimizer = adamw(self.parameters, options, fan_in_ratio(options.base_width, config))
        self.usage = Usage(config, self.parameters)
        self.teacher = followed(config, options, self._second, self.decoders)

    def _decoders(self, config: ModelConfig) -> dict[int, Decoder]:
        """Return the stages that this rank holds, on the meta device."""
        layers, stages = self.layout.layers_of_stages(config), self.layout.stages
        with torch.device("meta"):
            return {
                number: Decoder(config, Part(layers[number], number == 0, number == stages - 1))
                for number in self.layout.stages_of(self.place.pp)
            }

    def _lay_out(self, decoder: Decoder, root: nn.Module) -> None:
        """Split one stage over its ranks and give it memory."""
        decoder.recompute = self.layout.recompute
        if self.options.compile:
            decoder.fused_loss = self.world.device.type != "cpu"
            for block in decoder.blocks.values():
                block.compile()
        if self.layout.stage_ranks > 1:
            split(decoder, root, self.layout, self.meshes, self.options)
        decoder.to_empty(device=self.world.device)
        for module in decoder.modules():
            if isinstance(module, MoE):
                module.reset_state(self.world.device)

    def _second(self, config: ModelConfig) -> Decoder:
        """Return a second model, laid out as the first; pipelines are refused before."""
        (decoder,) = self._decoders(config).values()
        self._lay_out(decoder, decoder)
        return decoder

    def _pipeline(self) -> Pipeline:
        split_by = self.layout.tp if self.layout.sequence_parallel else 1
        stages = {n: root for n, root in self.roots.items() if isinstance(root, Stage)}
        low = self.options.precision == "bf16" and self.layout.stage_ranks > 1
        return Pipeline(
            stages,
            self.layout,
            self.meshes.dense["pp"].get_group(),
            self.world.device,
            lambda rows, length: (rows, length // split_by, self.config.d_model),
            torch.bfloat16 if low else torch.float32,
        )

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
        if self.teacher is not None and members is not None:
            self.teacher.follow(members.teacher)
        self._note_noise(batches)
        inputs = [self._to_device(batch) for batch in batches]
        counted = self.layout.is_dp_leader(self.world.rank)
        n_labels, n_tokens = count_step(batches, counted, self.world)
        for moe in self.experts.values():
            moe.begin_step(n_tokens)
        sums = self._forward_backward(inputs, 1.0 / max(n_labels, 1), tally)
        self.leave_frozen()
        parts = self.options.mask_update or self.options.by_users
        usage = self.usage.of(members) if parts and members is not None else None
        if usage is not None and self.options.by_users:
            usage.by_users()
        squares = norm_squared(self.parameters.values())
        chosen = balance(self.config, self.experts, members is not None)
        totals = torch.cat([sums, squares, asked(stop), chosen])
        if self.world.size > 1:
            dist.all_reduce(totals, group=self.world.control)
        cross_entropy, z_loss, square, stops, balance_loss = totals[:5].tolist()
        loss, grad_norm = cross_entropy / max(n_labels, 1), math.sqrt(square)
        losses = {} if tally is None else tally.losses(counted, self.layout.tp, self.world)
        verdict = guard(loss, grad_norm, losses) if losses else guard(loss, grad_norm)
        applied = self._update(lr, grad_norm, verdict, usage)
        if applied:
            settle(self.config, self.experts, totals[5:])
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

    def compile_ahead(self, batch: MicroBatch, members: Sequence[Member]) -> None:
        """See `Engine.compile_ahead`; teachers and scores, which have no gradient, compile when
        they are met.
        """
        if not self.options.compile:
            return
        sizes = (None, *members)
        batches, trained = [batch] * len(sizes), tuple((Term(one),) for one in sizes)
        names = tuple(name_of(one) for one in sizes)
        tally = MemberTally(StepChoices(trained, names), batches, self.config.n_layers)
        self._forward_backward([self._to_device(one) for one in batches], 0.0, tally)
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(
        self, inputs: Sequence[_Inputs], scale: float, tally: MemberTally | None
    ) -> Tensor:
        """Add the gradient of all micro-batches; return this rank's [cross-entropy, z-loss],
        float64, to be summed over ranks.
        """
        if self.pipeline is not None:
            with self._autocast():
                sums = through_stages(self.pipeline, inputs, scale, tally)
        else:
            sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
            for number, micro_batch in enumerate(inputs):
                last = number == len(inputs) - 1
                if tally is None:
                    self._synchronise(last)
                    with self._with_noise(number):
                        sums += self._one_micro_batch(micro_batch, scale)
                else:
                    sums += self._members(number, micro_batch, scale, tally)
            if self.teacher is not None:
                self.teacher.rest()
        # Under tensor parallelism every rank has the sums of the same tokens.
        return sums.cpu() / self.layout.tp

    def _one_micro_batch(self, micro_batch: _Inputs, scale: float) -> Tensor:
        sums = self._loss(micro_batch)
        (sums.objective * scale).backward()
        return torch.stack([sums.cross_entropy, sums.z_loss]).detach().double()

    def _members(
        self, number: int, micro_batch: _Inputs, scale: float, tally: MemberTally
    ) -> Tensor:
        """Run every pass over a micro-batch; return [cross-entropy, z-loss], their mean."""
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        taught: dict[Member | None, Tensor] = {}
        kept = self._kept(micro_batch) if any(t.kept for t in tally.choices[number]) else ()
        for one in tally.passes(number):
            # Blocks that only an earlier member uses are not in the last pass.
            self._synchronise(one.last, mixed=not tally.same_layers)
            with torch.set_grad_enabled(one.trains):
                sums = self._loss(micro_batch, one, taught, kept)
            if one.trains:
                (sums.objective * (scale * one.weight)).backward()
            if sums.hidden_BTD is not None:
                taught[one.term.member] = sums.hidden_BTD.detach()
            mine = torch.stack([sums.cross_entropy, sums.z_loss]).detach().double()
            tally.add(number, one.term, mine, *sums.exits)
            total += mine * one.share
        return total

    def _kept(self, micro_batch: _Inputs) -> tuple[Teacher]:
        """Run the kept teacher over a micro-batch."""
        assert self.teacher is not None
        tokens_BT, _, places = self._local(self.teacher.decoder, *micro_batch)
        with self._autocast():
            return (self.teacher.states(tokens_BT, places),)

    def _loss(
        self,
        micro_batch: _Inputs,
        one: Pass | None = None,
        taught: Taught = NOBODY,
        kept: tuple[Teacher, ...] = (),
    ) -> LossSums:
        """Run one pass forward.

        Args:
            taught: the states of those that teach.
            kept: those of the kept teacher, if somebody follows it.
        """
        decoder = self.decoders[0]
        tokens_BT, labels_BT, places = self._local(decoder, *micro_batch)
        more = {} if one is None else one.keywords(taught, kept)
        with self._autocast():
            sums: LossSums = decoder(
                tokens_BT, labels_BT, mode="loss", z_loss=self.options.z_loss, places=places, **more
            )
        return sums

    def _local(
        self, decoder: Decoder, x: Tensor, labels_BT: Tensor, ids_BT: Tensor | None
    ) -> tuple[Tensor, Tensor, Places]:
        """Return this context rank's part of tokens, or hidden states, and labels; its places."""
        rows, length = labels_BT.shape
        if self.ring is None:
            return x, labels_BT, decoder.places(labels_BT, ids_BT)

        def mine(whole: Tensor) -> Tensor:
            return context_slice(whole, self.place.cp, self.layout.cp)

        if ids_BT is None:
            positions, segments = torch.arange(length, device=x.device).expand(rows, -1), None
        else:
            positions, segments = document_positions(ids_BT)
        own = None if segments is None else mine(segments)
        plan = self.ring.plan(own, length // self.layout.cp)
        places = decoder.places_at(mine(positions), length).reaching(self.ring, plan)
        return mine(x) if decoder.part.first else x, mine(labels_BT), places

    def _to_device(self, batch: MicroBatch) -> _Inputs:
        """Return int64 tokens, labels and document ids on the device."""
        arrays = (batch.tokens_BT, batch.labels_BT, batch.document_ids_BT)
        tokens, labels, ids = (
            None
            if array is None
            else torch.from_numpy(array).to(self.world.device, torch.int64, non_blocking=True)
            for array in arrays
        )
        assert tokens is not None
        assert labels is not None
        return tokens, labels, ids

    def _update(self, lr: float, grad_norm: float, applied: bool, usage: Usage | None) -> bool:
        """Clip and apply the gradient, or drop it."""
        if applied:
            clip(self.parameters.values(), grad_norm, self.options.clip_norm)
            self.set_lr(lr)
            with self.rewarmed():
                if self.options.mask_update and usage is not None:
                    step_within(self.optimizer, usage)
                else:
                    self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return applied

    def _synchronise(self, last: bool, mixed: bool = False) -> None:
        """Keep weights gathered and gradients whole until the last pass; or neither, where they are
        too large for that.

        Where members are `mixed`, the last pass may leave out blocks that earlier ones used, and
        nothing would add their gradients up: then each pass does.
        """
        root = self.roots[0]
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(last or mixed or not self.keeps_gathered)
            # Over replicas, of what is reduced over shards.
            root.set_requires_all_reduce(last or mixed)
            root.set_is_last_backward(last)
            if self.keeps_gathered:
                root.set_reshard_after_backward(last or mixed)

    def _autocast(self) -> AbstractContextManager[object]:
        """Compute in bf16 where asked; under FSDP2 its mixed-precision policy does that instead."""
        if self.options.precision != "bf16" or self.layout.stage_ranks > 1:
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _scored(
        self, tokens_BT: I64, labels_BT: I64, member: Member | None
    ) -> tuple[Tensor, Tensor]:
        """See `Scoring`."""
        length = tokens_BT.shape[1]
        pad = -length % self.layout.tp  # sequence parallelism splits T evenly
        tokens = torch.from_numpy(np.pad(tokens_BT, ((0, 0), (0, pad)))).to(self.world.device)
        labels = np.pad(labels_BT, ((0, 0), (0, pad)), constant_values=-100)
        with self._autocast():
            scores = self._score(tokens, torch.from_numpy(labels).to(self.world.device), member)
        logprob_BT, likeliest_BT = scores[:, :, :length]
        return logprob_BT, likeliest_BT

    def _score(self, tokens_BT: Tensor, labels_BT: Tensor, member: Member | None) -> Tensor:
        """Return log-probability and the likeliest token, [2, B, T]; fp32 holds every token."""
        if self.pipeline is not None:
            return self.pipeline.score(tokens_BT, labels_BT, member)
        scores = self.decoders[0](tokens_BT, labels_BT, mode="score", member=member)
        return torch.stack([scores.logprob, scores.likeliest.to(scores.logprob.dtype)])

    def channel_scores(self, batches: Sequence[MicroBatch]) -> dict[str, list[float]]:
        """See `Engine.channel_scores`; pipelines are refused before."""
        run = partial(read_through, self.score, batches)
        scores = measured(self.decoders[0], self.place.tp, run, self.world)
        self.finish_scoring()
        return scores

    def order_channels(self, batches: Sequence[MicroBatch], groups: int) -> dict[str, list[int]]:
        """See `Engine.order_channels`."""
        orders = orders_by(self.channel_scores(batches), groups)
        move(self.tensors(), self.config, orders)
        return orders

    def finish_scoring(self) -> None:
        """See `Engine.finish_scoring`."""
        for root in self.roots.values():
            reshard(root)

    def tensors(self) -> dict[str, Tensor]:
        """See `Engine.tensors`; a kept teacher adds "teacher.N" and "teacher_step"."""
        kept = {} if self.teacher is None else self.teacher.tensors()
        return super().tensors() | kept

    def adam(self) -> torch.optim.Optimizer:
        """See `TensorState.adam`."""
        return self.optimizer

    def speaks(self) -> bool:
        """See `TensorState.speaks`: one rank of each stage does."""
        place = self.place
        return place.dp_replicate == place.dp_shard == place.cp == place.tp == 0

    def full_model(self) -> dict[str, Tensor]:
        """See `Engine.full_model`."""
        if self.layout.pp == 1:
            return super().full_model()
        mine: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            value = whole(parameter.detach())
            if self.world.rank == 0 or self.speaks():
                mine[name] = value.cpu().clone()
        return gather_stages(mine, self.speaks(), self.world)
