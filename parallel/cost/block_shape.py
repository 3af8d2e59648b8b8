"""One kind of block as its cost sees it: products, how ranks divide them, bytes that it keeps.

Pure; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from motet.models.architecture import (
    Mixing,
    Product,
    Split,
    block_products,
    block_weights,
    hidden_products,
    mixing,
)
from motet.models.config import ModelConfig
from motet.parallel.cost.links import CommGroup
from motet.parallel.cost.terms import ATTENTION_EFFICIENCY, Traits


@dataclass(frozen=True)
class BlockSplit:
    """How a block is divided: degrees, and where their groups stand."""

    tokens: int
    sequence_length: int
    tp: CommGroup
    cp: CommGroup
    ep: CommGroup
    etp: CommGroup
    sequence_parallel: bool
    alone: bool  # no other rank holds a part of the stage

    @property
    def over_stream(self) -> int:
        """Ranks that divide the residual stream."""
        return self.tp.ranks if self.sequence_parallel else 1


class ProductShape(NamedTuple):
    """`architecture.Product` as a backend has it: sizes need not be whole numbers."""

    inner: float
    columns: float
    split: Split
    visits: int
    matrices: int

    @staticmethod
    def of(product: Product) -> ProductShape:
        """Return a product as the list has it."""
        return ProductShape(*product[1:])


class BlockShape(NamedTuple):
    """One kind of block, from the list of its products.

    Attributes:
        d_model: width of the residual stream.
        mixed: what attention mixes.
        attention: its products.
        feed: products of its dense feed-forward, or of router, shared block and gate.
        experts: products of its routed experts.
        hidden: channels between the two products of all SwiGLUs that a token meets; of a dense
            feed-forward without a gate, its own.
        alone: those whose silu(gate) is kept by itself: of a dense feed-forward or of routed
            experts.
        gated: whether its feed-forward is a SwiGLU.
        entered: how often the residual stream enters a part that tensor parallelism divides.
        norms: of the residual stream, or of what is added to it.
    """

    d_model: int
    mixed: Mixing
    attention: tuple[ProductShape, ...]
    feed: tuple[ProductShape, ...]
    experts: tuple[ProductShape, ...]
    hidden: float
    alone: float
    gated: bool
    entered: int
    norms: int = 2

    @property
    def whole(self) -> tuple[ProductShape, ...]:
        """Products that every token's row meets, of a dense block."""
        return self.attention if self.experts else self.attention + self.feed

    @staticmethod
    def of(model: ModelConfig, layer: int, gated: bool) -> BlockShape:
        """Return that of one block.

        Args:
            gated: whether the backend's dense feed-forward is a SwiGLU; else one product goes in
                and one comes out, of 1.5 times the channels: as many weights.
        """
        # Attention and feed-forward apart: the ring hides behind one, experts stand in the other.
        products, weights = block_products(model, layer), block_weights(model, layer)
        attention = tuple(p for p in products if p.name.startswith("attention."))
        experts = tuple(p for p in products if p.is_expert)
        beside = [p for p in products if p not in attention and p not in experts]
        feed = tuple(_as_built(product, gated) for product in beside)
        out = hidden_products(model, layer)
        hidden = float(sum(p.visits * p.inner for p in out))
        alone = sum(p.visits * p.inner for p in out if p.is_expert) if experts else hidden
        return BlockShape(
            model.d_model,
            _mixed(model, layer),
            tuple(ProductShape.of(product) for product in attention),
            feed,
            tuple(ProductShape.of(product) for product in experts),
            hidden if gated or experts else 1.5 * hidden,
            alone,
            gated or bool(experts),
            1 + any(product.split is Split.COLUMNS for product in feed),
            sum(weight.is_norm and weight.axes == ("stream",) for weight in weights),
        )


def _mixed(model: ModelConfig, layer: int) -> Mixing:
    """Return what attention mixes on average of the blocks with, or without, experts as `layer`."""
    kind = model.has_experts(layer)
    layers = [at for at in range(model.n_layers) if model.has_experts(at) == kind]
    share = sum(model.window_of(at) > 0 for at in layers) / len(layers)
    return mixing(model, layer)._replace(window=model.window, windowed=share)


def _as_built(product: Product, gated: bool) -> ProductShape:
    """Return a product of a feed-forward as the backend has it.

    A shared block beside experts is priced as Megatron-LM divides it, by channels. Motet's engine
    divides its tokens: as many operations, and no gather before or sum after it (a difference that
    `test_priced_bytes` counts).
    """
    shape = ProductShape.of(product)
    if product.name.endswith(".gate_up"):
        return shape._replace(columns=shape.columns * (1 if gated else 0.75), split=Split.COLUMNS)
    if product.name.endswith(".down"):
        return shape._replace(inner=shape.inner * (1 if gated else 1.5), split=Split.ROWS)
    return shape


def alternate_bytes(shape: BlockShape, split: BlockSplit, value: float) -> float:
    """Return bytes of attention's output and of every second product's: gate or up, or all of a
    feed-forward without a gate, and what goes out.
    """
    mixed = shape.mixed
    # What every second product gives is kept: half of queries, keys, values, gate and up.
    feed = shape.hidden * (2.0 if shape.gated else 1.0)
    inside = mixed.queries + 0.5 * (mixed.queries + mixed.keys + mixed.values + feed)
    stream = shape.d_model / split.over_stream
    return split.tokens * value * (inside / split.tp.ranks + stream)


def kept_bytes(
    shape: BlockShape, split: BlockSplit, value: float, traits: Traits
) -> tuple[float, float, float]:
    """Return bytes of activations of a block, of its attention's core, of its pointwise kernels.

    The count of arXiv:2205.05198, section 4.1, redone for each trait (see
    `counts.activation_bytes_per_layer`).

    Args:
        value: bytes of one.
    """
    mixed, fused, tp = shape.mixed, traits.fused_elementwise, split.tp.ranks
    # One fp32 log-sum per head and query; queries, output, keys and values.
    core = 4.0 * mixed.heads
    inside = value * (2 * mixed.queries + mixed.keys + mixed.values)
    turned = traits.rotary and not fused
    pointwise = value * (mixed.queries + mixed.keys) if turned else 0.0
    if traits.attention not in ATTENTION_EFFICIENCY:
        # Scores and their softmax; a mask of what was dropped; a copy where kernels are many.
        each = 2 * value + (1.0 if traits.dropout else 0.0)
        each += 0.0 if traits.attention == "fused" else value
        core += each * mixed.heads * split.sequence_length
    wide = 0.0
    if shape.experts:
        first = shape.experts[0]
        inside += first.visits * value * 2 * shape.d_model  # rows in, results out
        wide = 4.0 * (shape.d_model + 5 * first.matrices)  # the router's fp32
    # Gate, up and their product; silu(gate) too, if by itself. Without a gate: before and after.
    inside += (3 if shape.gated else 2) * value * shape.hidden
    if shape.gated and not fused:
        pointwise += value * shape.alone
    # What norms read, and what they hand on to the products behind them.
    stream = 2 * shape.norms * value * shape.d_model + wide
    # Of each norm, in fp32: its input, and its rows before they are scaled.
    pointwise_stream = 0.0 if traits.fused_norms or fused else 8.0 * shape.norms
    if traits.dropout:
        pointwise_stream += 2.0
    pointwise_stream *= shape.d_model
    # What lies inside a region that tensor parallelism divides is divided with it.
    over, tokens = split.over_stream, split.tokens
    kept = tokens * ((inside + pointwise + core) / tp + (stream + pointwise_stream) / over)
    light = tokens * (pointwise / tp + (pointwise_stream + 2 * value * shape.d_model) / over)
    return kept, tokens * core / tp, light
