"""The decoder: tokens in; logits, summed losses or token scores out.

B batch, T tokens, V vocabulary, D model width. It knows no rank, no environment and no file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from motet.models.attention import document_places, visible
from motet.models.config import ModelConfig, ModelError, check
from motet.models.distill import Teacher, distilled_sums
from motet.models.flex import takes
from motet.models.layers import Block, Linear, Places, RMSNorm
from motet.models.loss import LossSums, Scores, VocabularyShard, cap_logits, label_scores, loss_sums
from motet.models.member import UNCUT, BlockCuts, Cut, Member, block_cuts
from motet.models.rope_scaling import longest
from motet.models.rotary import rotary_tables
from motet.models.slices import own_slice, take

MIN_TABLE_POSITIONS = 2048
NO_EXITS: Mapping[int, float] = MappingProxyType({})
MATRIX_PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,  # of experts
]


@dataclass(frozen=True)
class Part:
    """Which part of the decoder a pipeline stage holds: some blocks, and the embedding or norm and
    head at the ends.
    """

    layers: range
    first: bool = True
    last: bool = True


class Decoder(nn.Module):
    """A causal language model of the Llama, OLMo, Qwen, Gemma or Granite shape.

    Made on the meta device it holds no values; `initialize`, or a loaded state, fills it. Its state
    is the parameters alone: rotary tables are computed when first needed, on the tokens' device.

    With `part` it is one stage of a pipeline: some of the blocks under their own numbers, the
    embedding only in the first stage, norm and head only in the last. Stages other than the first
    read hidden states [B, T, D] instead of tokens, and stages other than the last return them in
    every mode.
    """

    def __init__(self, config: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.part = part = part or Part(range(config.n_layers))
        self.embedding = Embedding(config.vocabulary_size, config.d_model) if part.first else None
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in part.layers})
        self.norm = RMSNorm(config.d_model, config.norm_eps) if part.last else None
        self.head = (
            Linear(config.d_model, config.vocabulary_size)
            if part.last and not config.tied_embeddings
            else None
        )
        self.vocabulary: VocabularyShard | None = None
        self.recompute = "none"
        self.fused_loss = False  # compile what the loss does between matrix products
        self._tables: dict[bool, tuple[Tensor, Tensor]] = {}  # of layers with a window, and others

    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        mode: Literal["logits"] = "logits",
        z_loss: float = 0.0,
        places: Places | None = None,
        member: Member | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        *,
        mode: Literal["loss"],
        z_loss: float = 0.0,
        places: Places | None = None,
        member: Member | None = None,
        teachers: Sequence[Teacher] = (),
        weights: Sequence[float] = (1.0,),
        teaches: bool = False,
        skips: Collection[int] = (),
        exits: Mapping[int, float] = NO_EXITS,
        times: Sequence[int] = (),
    ) -> LossSums: ...
    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        *,
        mode: Literal["states"],
        places: Places | None = None,
    ) -> Teacher: ...
    @overload
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        *,
        mode: Literal["score"],
        z_loss: float = 0.0,
        places: Places | None = None,
        member: Member | None = None,
    ) -> Scores: ...
    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        mode: Literal["logits", "loss", "score", "states"] = "logits",
        z_loss: float = 0.0,
        places: Places | None = None,
        member: Member | None = None,
        teachers: Sequence[Teacher] = (),
        weights: Sequence[float] = (1.0,),
        teaches: bool = False,
        skips: Collection[int] = (),
        exits: Mapping[int, float] = NO_EXITS,
        times: Sequence[int] = (),
    ) -> Tensor | LossSums | Scores | Teacher:
        """Run the model on int64 [B, T] tokens.

        `labels_BT[b, t]` is the token to predict after `tokens_BT[b, t]`, -100 for none.
        With `document_ids_BT` a token sees only earlier tokens of its own document, and positions
        restart at each change of id. Modes: "logits" returns [B, T, V]; "loss" `LossSums`, with
        gradient; "score" `Scores`, without. Padding on the right changes no result on its left.
        `places` says where the tokens stand when they are not a whole sequence in order.
        `member` runs a member of the family: its blocks, and of every weight its part. With
        `teachers` its loss is weights[0] x cross-entropy + weights[1], .. x divergence from each;
        one that `teaches` hands out what a `Teacher` needs, as mode "states" does. Blocks in
        `skips` are left out; each runs `times[block]` times. With `exits` (block -> weight) the
        states after those blocks meet norm and head too, and the objective is that of all.
        """
        if mode not in ("logits", "loss", "score", "states"):
            raise ValueError(f"mode={mode!r} is not one of 'logits', 'loss', 'score', 'states'")
        if mode in ("loss", "score") and labels_BT is None:
            raise ValueError(
                f"mode={mode!r} needs labels_BT: the token to predict at each position"
            )
        places = places or self.places(tokens_BT, document_ids_BT)
        ways: list[Tensor] = []
        hidden_BTD = self._hidden(tokens_BT, places, member, skips, exits, ways, times)
        if not self.part.last:
            return hidden_BTD
        head_VD = self._head_weight(self._stream(member))
        if mode == "states":
            return Teacher(hidden_BTD, member, head_VD)
        if mode == "logits":
            if self.head is None:
                logits_BTV = F.linear(hidden_BTD, head_VD)
            else:
                logits_BTV = self.head(hidden_BTD, None, self._stream(member))
            return cap_logits(logits_BTV, self.config.logit_softcap)
        assert labels_BT is not None
        shard, softcap = self.vocabulary, self.config.logit_softcap
        if mode == "loss":
            how = z_loss, shard, self.fused_loss, softcap
            if not teachers:
                sums = loss_sums(hidden_BTD, head_VD, labels_BT, *how)
            else:
                followed = [(teacher.hidden_BTS, self._head_of(teacher)) for teacher in teachers]
                sums = distilled_sums(
                    hidden_BTD, head_VD, labels_BT, followed, weights, z_loss, shard, softcap
                )
            sums = sums._replace(hidden_BTD=hidden_BTD) if teaches else sums
            if not exits:
                return sums
            others = [loss_sums(x, head_VD, labels_BT, *how) for x in ways]
            return _with_exits(sums, 1.0 if teachers else weights[0], others, exits)
        return label_scores(hidden_BTD, head_VD, labels_BT, shard, softcap)

    def _head_weight(self, stream: Cut | None) -> Tensor:
        module = self.embedding if self.head is None else self.head
        assert module is not None
        return own_slice(module.weight, module.gradient_placements, None, stream)

    def _head_of(self, teacher: Teacher) -> Tensor:
        if teacher.head_VS is not None:
            return teacher.head_VS
        return self._head_weight(self._stream(teacher.member))

    def _stream(self, member: Member | None) -> Cut | None:
        """Return what a member takes of the residual stream."""
        return None if member is None else block_cuts(self.config, member)[0].stream

    def _blocks(self, member: Member | None) -> Iterator[tuple[int, nn.Module, BlockCuts]]:
        """Yield the blocks here that a member runs, with what it takes of each."""
        cuts = None
        if member is not None:
            cuts = dict(zip(member.layers, block_cuts(self.config, member), strict=True))
        for layer, block in self.blocks.items():
            if cuts is None or int(layer) in cuts:
                yield int(layer), block, UNCUT if cuts is None else cuts[int(layer)]

    def _hidden(
        self,
        x: Tensor,
        places: Places,
        member: Member | None,
        skips: Collection[int],
        exits: Collection[int],
        ways: list[Tensor],
        times: Sequence[int],
    ) -> Tensor:
        """Return the states before the head; those of exits are added to `ways`."""
        stream = self._stream(member)  # between stages of a pipeline padded to the whole width
        x_BTD = take(x, -1, stream) if self.embedding is None else self._embedded(x, stream)
        recompute = self.recompute != "none" and torch.is_grad_enabled()
        for layer, block, cuts in self._blocks(member):
            for _ in range(0 if layer in skips else times[layer] if times else 1):
                if recompute:
                    x_BTD = _again(block, x_BTD, places, cuts, self.recompute)
                else:
                    x_BTD = block(x_BTD, places, cuts)
            if layer in exits and self.norm is not None:
                ways.append(self._normed(x_BTD, stream))
        if self.norm is not None:
            return self._normed(x_BTD, stream)
        return x_BTD if stream is None else F.pad(x_BTD, (0, stream.whole - stream.kept))

    def _embedded(self, tokens_BT: Tensor, stream: Cut | None) -> Tensor:
        assert self.embedding is not None
        x_BTD: Tensor = self.embedding(tokens_BT, stream)
        scale = self.config.embedding_scale
        return x_BTD if scale == 1.0 else x_BTD * scale

    def _normed(self, x_BTD: Tensor, stream: Cut | None) -> Tensor:
        """Return what the head reads: logits are scaled here, where all modes meet."""
        assert self.norm is not None
        x_BTD = self.norm(x_BTD, stream)
        divisor = self.config.logits_divisor / self.config.output_multiplier
        return x_BTD if divisor == 1.0 else x_BTD / divisor

    def places(self, tokens_BT: Tensor, document_ids_BT: Tensor | None = None) -> Places:
        """Return the places of whole sequences: positions that restart at each document, and the
        mask between documents.
        """
        rows, length = tokens_BT.shape[:2]
        order_T, width = torch.arange(length, device=tokens_BT.device), self.config.head_width
        window, in_blocks = self.config.window, takes(order_T.device, length, width)
        if document_ids_BT is None:
            places = self.places_at(order_T, length)
            first_BT = torch.zeros_like(order_T).expand(rows if in_blocks else 1, -1)
            if in_blocks and self.config.attention_softcap:
                # The kernels that cap scores read blocks of a mask.
                places = replace(places, mask=visible(first_BT, width))
        else:
            positions_BT, mask = document_places(document_ids_BT, width)
            places = replace(self.places_at(positions_BT, length), mask=mask)
            first_BT = order_T - positions_BT
        if places.windowed is None:
            return places
        band = places.mask
        if window < length:
            band = visible(torch.maximum(first_BT, order_T - window + 1), width)
        return replace(places, windowed=replace(places.windowed, mask=band))

    def places_at(self, positions_BT: Tensor, length: int) -> Places:
        """Return places of tokens at given positions, int64 [B, T] or [T], below `length`; without
        a mask.
        """
        cos, sin = self._rotary(length, positions_BT.device)
        places = Places(cos[positions_BT], sin[positions_BT], None)
        config = self.config
        if config.window_rope_theta is not None:
            cos, sin = self._rotary(length, positions_BT.device, windowed=True)
            return replace(places, windowed=Places(cos[positions_BT], sin[positions_BT], None))
        return replace(places, windowed=places) if 0 < config.window < length else places

    def _rotary(
        self, length: int, device: torch.device, windowed: bool = False
    ) -> tuple[Tensor, Tensor]:
        config, tables = self.config, self._tables.get(windowed)
        most = longest(config.rope_scaling)
        if most is not None and length > most:
            raise ModelError(
                f"{length:,} tokens are more than the {most:,} of model.rope_scaling, whose "
                "frequencies would change with the length of each sequence"
            )
        if tables is None or len(tables[0]) < length or tables[0].device != device:
            rows = max(MIN_TABLE_POSITIONS, 1 << (length - 1).bit_length())
            theta, scaling = config.rope_theta, config.rope_scaling
            if windowed:
                theta, scaling = config.window_rope_theta or theta, None
            tables = rotary_tables(rows, config.head_width, theta, device, scaling)
            self._tables[windowed] = tables
        return tables


def _with_exits(
    sums: LossSums, weight: float, others: Sequence[LossSums], exits: Mapping[int, float]
) -> LossSums:
    """Return the sums of a pass with those of its exits in the objective."""
    objective = sums.objective * weight
    for other, part in zip(others, exits.values(), strict=True):
        objective = objective + other.objective * part
    apart = tuple(torch.stack([s.cross_entropy, s.z_loss]).detach() for s in others)
    return sums._replace(objective=objective, exits=apart)


def _again(
    block: nn.Module, x_BTD: Tensor, places: Places, cuts: BlockCuts, recompute: str
) -> Tensor:
    """Run a block that keeps little for the backward pass and runs again there.

    "full" keeps the block's input only; "selective" keeps the results of matrix products, the dear
    part to make again (Korthikanti et al., arXiv:2205.05198, section 5).
    """
    extra: dict[str, Any] = {}
    if recompute == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)
    y_BTD: Tensor = checkpoint(
        block, x_BTD, places, cuts, use_reentrant=False, preserve_rng_state=False, **extra
    )
    return y_BTD


class Embedding(nn.Embedding):
    """A lookup table whose values come from `initialize` or from a checkpoint."""

    gradient_placements: Any = None  # see `own`
    first_row: int | None = None  # of the rows that this process holds, when others hold the rest
    added: Callable[[Tensor], Tensor] | None = None  # what is done to the embeddings of a pass

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""

    def forward(self, tokens_BT: Tensor, stream: Cut | None = None) -> Tensor:
        """[B, T] -> [B, T, D]; zeros where another process holds the row."""
        weight_VD = own_slice(self.weight, self.gradient_placements, None, stream)
        if self.first_row is None:
            x_BTD = F.embedding(tokens_BT, weight_VD)
            return x_BTD if self.added is None else self.added(x_BTD)
        rows_BT = tokens_BT - self.first_row
        held_BT = (rows_BT >= 0) & (rows_BT < len(weight_VD))
        return F.embedding(rows_BT.where(held_BT, 0), weight_VD) * held_BT[..., None]


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Return the first value of parameter `name` (its full name in `Decoder`), fp32 on the CPU.

    A pure function of its arguments: every layout, and every order of calls, gets the same numbers.
    Norms are 1, biases 0. Others are normal with `init_std`; projections that write to the residual
    stream (`o_proj`, `down_proj`) are divided by sqrt(2 n_layers), as in GPT-2 (section 2.3).
    Weights of E experts are E draws, expert e's under the name "`name`.e": a rank that holds some
    experts can ask for those alone.
    """
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    if name.split(".")[-2].endswith("norm"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if ".experts." in name and len(shape) == 3:
        experts = range(shape[0])
        return torch.stack([initial_value(f"{name}.{e}", shape[1:], config, seed) for e in experts])
    std = config.init_std
    if name.endswith(("o_proj.weight", "down_proj.weight")) or ".experts.down_proj." in name:
        std /= (2 * config.n_layers) ** 0.5
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill a `Decoder` of plain tensors with initial values; from the meta device, on the CPU."""
    config = module.config
    assert isinstance(config, ModelConfig)
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))
