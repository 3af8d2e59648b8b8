"""Mango: one learned map from all old weights to all new ones, as a ring of four small tensors.

B blocks of a layer (every matrix cut in squares of the model's width), O and I their rows and
columns, L layers; primes are of the new model. R ranks of the ring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from motet.core.errors import Problem
from motet.models.architecture import WeightSpec, block_weights
from motet.models.config import ModelConfig
from motet.models.growth.axes import copies, reads
from motet.models.growth.learned import LearnedGrowth, LearnedOperator
from motet.models.growth.operator import DEPTH, TIES, WIDTH, OperatorFacts, layer_of
from motet.models.growth.state import Moments, Read


class Square(NamedTuple):
    """A block of a layer: part of a matrix.

    Attributes:
        name: of the weight, within its block of the decoder.
        expert: which of its matrices; None where it is one.
        row, column: place among the squares of the matrix.
    """

    name: str
    expert: int | None
    row: int
    column: int


def squares(config: ModelConfig) -> list[Square]:
    """Return the squares of a layer, in the order of its weights."""
    found = []
    for weight in block_weights(config):
        if len(weight.shape) == 1:
            continue
        rows, columns = (math.ceil(size / config.d_model) for size in weight.shape[-2:])
        experts = range(weight.shape[0]) if len(weight.shape) == 3 else [None]
        found += [
            Square(weight.name, expert, row, column)
            for expert in experts
            for row in range(rows)
            for column in range(columns)
        ]
    return found


class Mango(LearnedGrowth):
    """M' = TR(S_B, S_O, S_I, S_L) M: the tensor-ring operator of Mango, equation (6).

    Matrices alone are mixed; embedding, head, gains and biases grow as bert2BERT's do, with their
    layer. A matrix that does not fill its squares is repeated until it does.
    """

    def __init__(
        self,
        source: ModelConfig,
        target: ModelConfig,
        layers: list[int],
        maps: nn.ParameterDict,
    ) -> None:
        super().__init__(source, target, layers, maps)
        self.old_squares, self.new_squares = squares(source), squares(target)

    def value(self, weight: WeightSpec, read: Read) -> Tensor:
        """See `LearnedGrowth.value`."""
        return self._value(weight, read, None)

    def values(self, read: Read) -> dict[str, Tensor]:
        """See `LearnedGrowth.values`: the old squares are stacked once."""
        stack_LBOI = self._stack(read)
        return {name: self._value(w, read, stack_LBOI) for name, w in self._weights.items()}

    def olds(self, weight: WeightSpec) -> tuple[str, ...]:
        """See `LearnedGrowth.olds`: all matrices of all layers."""
        layer = layer_of(weight.name)
        if layer is not None and len(weight.shape) > 1:
            names = dict.fromkeys(square.name for square in self.old_squares)
            return tuple(
                f"blocks.{old}.{name}" for old in range(self.source.n_layers) for name in names
            )
        if layer is not None:
            return (f"blocks.{self.layers[layer]}.{weight.name.split('.', 2)[2]}",)
        tied = weight.name == "head.weight" and self.source.tied_embeddings
        return ("embedding.weight" if tied else weight.name,)

    def _value(self, weight: WeightSpec, read: Read, stack_LBOI: Tensor | None) -> Tensor:
        layer = layer_of(weight.name)
        if layer is None or len(weight.shape) == 1:
            return self._copied(weight, read)
        stack_LBOI = self._stack(read) if stack_LBOI is None else stack_LBOI
        name = weight.name.split(".", 2)[2]
        experts = range(weight.shape[0]) if len(weight.shape) == 3 else [None]
        matrices = [
            self._matrix(name, expert, layer, weight.shape[-2:], stack_LBOI) for expert in experts
        ]
        return matrices[0] if len(weight.shape) == 2 else torch.stack(matrices)

    def _matrix(
        self,
        name: str,
        expert: int | None,
        layer: int,
        shape: tuple[int, ...],
        stack_LBOI: Tensor,
    ) -> Tensor:
        """Return a new matrix: its squares side by side, cut to its shape."""
        found: dict[int, list[Tensor]] = {}
        for at, square in enumerate(self.new_squares):
            if (square.name, square.expert) == (name, expert):
                found.setdefault(square.row, []).append(self._square(at, layer, stack_LBOI))
        rows = [torch.cat(row, 1) for _, row in sorted(found.items())]
        return torch.cat(rows)[: shape[0], : shape[1]]

    def _square(self, block: int, layer: int, stack_LBOI: Tensor) -> Tensor:
        """Return one new square [O', I'] of a layer.

        The ring is closed in an order that makes nothing larger than R^2 squares: blocks and layers
        first, then rows, then columns.
        """
        blocks_RBR, layers_RLR = self.maps["blocks"][:, block], self.maps["layers"][:, layer]
        mixed = torch.einsum("rbs,tlr,lboi->stoi", blocks_RBR, layers_RLR, stack_LBOI)
        rows = torch.einsum("spou,stoi->utpi", self.maps["rows"], mixed)
        return torch.einsum("uqit,utpi->pq", self.maps["columns"], rows)

    def _stack(self, read: Read) -> Tensor:
        """Return all old squares, [L, B, O, I]."""
        layers = range(self.source.n_layers)
        return torch.stack([torch.stack(list(self._cut(layer, read))) for layer in layers])

    def _cut(self, layer: int, read: Read) -> Iterator[Tensor]:
        d = self.source.d_model
        for square in self.old_squares:
            matrix = read(f"blocks.{layer}.{square.name}")["weight"]
            matrix = matrix if square.expert is None else matrix[square.expert]
            starts = (square.row * d, square.column * d)
            for dimension, start in enumerate(starts):
                places = torch.arange(start, start + d) % matrix.shape[dimension]
                matrix = matrix.index_select(dimension, places)
            yield matrix

    def _copied(self, weight: WeightSpec, read: Read) -> Tensor:
        """Return a weight that is no matrix of a block: channels copied, learned along the
        stream.
        """
        value = read(self.olds(weight)[0])["weight"]
        for dimension, axis in enumerate(weight.axes):
            wanted = weight.shape[dimension]
            if value.shape[dimension] == wanted:
                continue
            tied = weight.name == "norm.weight" and self.target.tied_embeddings
            reading = reads(weight, dimension) or tied
            if axis == "stream":
                matrix = self.maps["stream-read" if reading else "stream"]
                value = torch.tensordot(value, matrix, ([dimension], [1])).movedim(-1, dimension)
            else:
                value = value.index_select(dimension, torch.arange(wanted) % value.shape[dimension])
        return value


@dataclass(frozen=True)
class MangoOperator(LearnedOperator):
    """Learned multi-linear growth (Mango).

    Attributes:
        rank: of the ring; published: 1 is enough.
    """

    rank: int = 1

    facts: ClassVar[OperatorFacts] = OperatorFacts(
        name="mango",
        source="Mango, arXiv:2310.10699; no public code: squares of the model's width, what is no "
        "matrix grows as in bert2BERT",
        exact="never",
        loss_jump_nats=3.0,
        jump_seen="that of its beginning, near bert2bert-fpi and stack, less what is learned",
        symmetry="by learning, and noise in the maps",
        moments=Moments.DROP,
        state="m, v = 0 and step = 0, as published",
        changes=(*DEPTH, *WIDTH, *TIES),
    )

    def own_problems(self, source: ModelConfig, target: ModelConfig) -> list[Problem]:
        """See `GrowthOperator.own_problems`."""
        if self.rank < 1:
            return [Problem("rank", f"{self.rank!r} is not a whole number of at least 1")]
        for config in (source, target):
            kinds = {tuple(block_weights(config, layer)) for layer in range(config.n_layers)}
            if len(kinds) > 1:
                why = "blocks must be alike in all layers for one map over them; take ligo"
                setting = "moe_every" if config.n_experts else "layer_ffn"
                return [Problem(setting, why)]
        if target.n_heads // target.n_kv_heads != source.n_heads // source.n_kv_heads:
            ratio = source.n_heads // source.n_kv_heads
            why = f"heads lie in squares in order; keep {ratio} queries per key-value head"
            return [Problem("n_heads", f"{why}, or take ligo")]
        return super().own_problems(source, target)

    def learned(self, source: ModelConfig, target: ModelConfig, layers: list[int]) -> Mango:
        """See `LearnedOperator.learned`: begins as copies of blocks, channels and layers."""
        maps = nn.ParameterDict()
        growth = Mango(source, target, layers, maps)
        grown = copies(source.d_model, target.d_model)
        out = torch.zeros(target.d_model, source.d_model)
        out[torch.arange(target.d_model), grown.index_N] = 1.0
        reading = out / grown.counts_N[:, None]
        depth = torch.zeros(target.n_layers, source.n_layers)
        depth[torch.arange(target.n_layers), torch.tensor(layers)] = 1.0
        begin = {"blocks": _same_blocks(growth), "rows": out, "columns": reading, "layers": depth}
        for name, first in begin.items():
            maps[name] = nn.Parameter(self._ring(name, first))
        maps["stream"] = nn.Parameter(out + self.draw("stream", *out.shape))
        maps["stream-read"] = nn.Parameter(reading + self.draw("read", *out.shape) / len(out))
        return growth

    def _ring(self, name: str, first: Tensor) -> Tensor:
        """Return [R, new, old, R]: noise, and the beginning at the first rank.

        Noise is a share of an entry's even part, so that a sum over the old index stays near it.
        """
        ring = self.draw(name, self.rank, *first.shape, self.rank) / first.shape[1]
        ring[0, :, :, 0] += first
        return ring


def _same_blocks(growth: Mango) -> Tensor:
    """Return [B', B]: each new square begins as the old one of the same matrix and place."""
    old = {square: at for at, square in enumerate(growth.old_squares)}
    rows = {(s.name, s.expert): 1 + s.row for s in growth.old_squares}
    columns = {(s.name, s.expert): 1 + s.column for s in growth.old_squares}
    found = torch.zeros(len(growth.new_squares), len(growth.old_squares))
    for at, square in enumerate(growth.new_squares):
        key = square.name, square.expert
        place = square._replace(row=square.row % rows[key], column=square.column % columns[key])
        found[at, old[place]] = 1.0
    return found
