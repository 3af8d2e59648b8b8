"""What a decoder is made of: every weight and every product, in blocks and outside of them.

No torch. Counts, layouts, collectives, costs, sharding and Hugging Face names read this list;
`Decoder` alone builds modules by hand, and a test holds it to the list, name by name. A product
that is added here is counted, split, moved and priced.

V vocabulary, D model width, F hidden width, E experts, K channels per head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from motet.models.config import ModelConfig

TABLE = ("vocabulary", "stream")
"""The axes of embedding and head."""


class Split(Enum):
    """How the ranks of a pipeline stage may divide a weight before data parallelism does.

    The words for matrices are Megatron-LM's (arXiv:1909.08053, section 3), with the weight as torch
    holds it, [outputs, inputs].
    """

    COLUMNS = "tensor parallelism divides the outputs, dimension 0; biases and norms of them too"
    ROWS = "tensor parallelism divides the inputs, dimension 1; partial sums leave"
    VOCABULARY = "tensor parallelism divides the rows, where the vocabulary is divided"
    EXPERT_COLUMNS = "expert parallelism divides dimension 0; expert-tensor parallelism outputs, 1"
    EXPERT_ROWS = "expert parallelism divides dimension 0; expert-tensor parallelism inputs, 2"
    STREAM = "whole everywhere; meets the residual stream, of which ranks may hold other tokens"
    HEADS = "whole everywhere; meets the heads of its own rank"

    @property
    def tensor_dimension(self) -> int | None:
        """The dimension that tensor parallelism divides, if any."""
        return {Split.COLUMNS: 0, Split.ROWS: 1, Split.VOCABULARY: 0}.get(self)

    @property
    def expert_dimension(self) -> int | None:
        """The dimension that expert-tensor parallelism divides, of experts' weights."""
        return {Split.EXPERT_COLUMNS: 1, Split.EXPERT_ROWS: 2}.get(self)


class WeightSpec(NamedTuple):
    """One weight of a decoder, whole.

    Attributes:
        name: its name in `Decoder`, or within its block.
        shape: of all of it.
        split: how it may be divided.
        axes: what each dimension counts: "stream", channels of the residual stream; "heads",
            channels of all heads; "head", of one; "hidden", "expert", "shared", hidden channels of
            a feed-forward, of each expert, of the shared block; "experts"; "vocabulary"; "one".
            Slices of a nested family and growth read them.
        product: the product of a token's row with it; those that read the same row are one.
            "" = none: norms, biases and lookups.
    """

    name: str
    shape: tuple[int, ...]
    split: Split
    axes: tuple[str, ...]
    product: str = ""

    @property
    def numel(self) -> int:
        """Values in it."""
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether it holds routed experts, one for each index of dimension 0."""
        return self.split.expert_dimension is not None

    @property
    def is_norm(self) -> bool:
        """Whether it scales a normalized row."""
        return self.name.endswith("norm.weight")

    @property
    def region(self) -> str:
        """The part of its block that it belongs to: the first word of its name there."""
        return self.name.partition(".")[0]

    @property
    def data_dimension(self) -> int:
        """The dimension that data parallelism divides: the first; of experts D, which expert
        parallelism leaves whole.
        """
        dimension = self.split.expert_dimension
        return 0 if dimension is None else 3 - dimension


class Product(NamedTuple):
    """[rows, inner] x [inner, columns] for the rows of a token.

    Attributes:
        name: that of `WeightSpec.product`.
        visits: rows of one token that it multiplies.
        matrices: experts among which the rows are spread.
    """

    name: str
    inner: int
    columns: int
    split: Split
    visits: int = 1
    matrices: int = 1

    @property
    def is_expert(self) -> bool:
        """Whether rows visit experts."""
        return self.split.expert_dimension is not None

    @property
    def multiplies(self) -> int:
        """Values of weights that one token meets: two operations each in a forward pass."""
        return self.inner * self.columns * self.visits


class Mixing(NamedTuple):
    """What attention does without weights; channels of one token, all heads together.

    Attributes:
        window: tokens that a query reads at most; 0 = all before it.
        windowed: share of blocks that have the window, where this stands for several.
    """

    heads: int
    queries: int
    keys: int
    values: int
    window: int = 0
    windowed: float = 1.0

    def operations(self, keys: int) -> float:
        """Return the operations of one query's scores with `keys` keys, and of its weighted sum.

        All T of a sequence are twice the T / 2 that causal queries read on average; within a window
        of W it is twice W - W^2 / (2 T), what they read on average of a band.
        """
        if 0 < self.window < keys:
            band = self.window * (2 - self.window / keys)
            return 4 * self.queries * (self.windowed * band + (1 - self.windowed) * keys)
        return 4 * self.queries * keys


def mixing(config: ModelConfig, layer: int = 0) -> Mixing:
    """Return what the attention of block `layer` mixes."""
    widths = config.n_heads, config.query_width, config.kv_width, config.kv_width
    return Mixing(*widths, config.window_of(layer))


def block_weights(config: ModelConfig, layer: int = 0) -> tuple[WeightSpec, ...]:
    """Return the weights of block `layer` (from 0), in the order of `Decoder`; names within it."""
    return _block_weights(config, *_feed(config, layer))


def block_products(config: ModelConfig, layer: int = 0) -> tuple[Product, ...]:
    """Return the products of block `layer`, in the order of its weights."""
    return _block_products(config, *_feed(config, layer))


def block_kinds(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Return (a layer, how many are like it) for every kind of block that there is."""
    counts = Counter(_kind(config, layer) for layer in range(config.n_layers))
    first = {_kind(config, layer): layer for layer in reversed(range(config.n_layers))}
    return tuple((first[kind], counts[kind]) for kind in sorted(counts))


def first_weights(config: ModelConfig) -> tuple[WeightSpec, ...]:
    """Return the weights before the blocks: the embedding, the head too where it is tied."""
    product = "head" if config.tied_embeddings else ""
    return (WeightSpec("embedding.weight", _table(config), Split.VOCABULARY, TABLE, product),)


def last_weights(config: ModelConfig) -> tuple[WeightSpec, ...]:
    """Return the weights after the blocks."""
    norm = WeightSpec("norm.weight", (config.d_model,), Split.STREAM, ("stream",))
    if config.tied_embeddings:
        return (norm,)
    return norm, WeightSpec("head.weight", _table(config), Split.VOCABULARY, TABLE, "head")


def head_product(config: ModelConfig) -> Product:
    """Return the product that makes logits."""
    return _products([*first_weights(config), *last_weights(config)], config)[0]


def named_weights(config: ModelConfig) -> Iterator[WeightSpec]:
    """Yield every weight of a decoder under its full name, in the order of its state."""
    yield from first_weights(config)
    for layer in range(config.n_layers):
        for weight in block_weights(config, layer):
            yield weight._replace(name=f"blocks.{layer}.{weight.name}")
    yield from last_weights(config)


def hidden_products(config: ModelConfig, layer: int = 0) -> tuple[Product, ...]:
    """Return the product out of the hidden channels of every SwiGLU of a block: `inner` is their
    number.
    """
    return tuple(p for p in block_products(config, layer) if p.name.endswith("down"))


def _table(config: ModelConfig) -> tuple[int, int]:
    return config.vocabulary_size, config.d_model


def _kind(config: ModelConfig, layer: int) -> tuple[bool, int, int]:
    """Return what tells blocks apart: whether it has experts, its hidden width otherwise, and the
    window of its attention.
    """
    return *_feed(config, layer), config.window_of(layer)


def _feed(config: ModelConfig, layer: int) -> tuple[bool, int]:
    """Return what tells weights of blocks apart."""
    has_experts = config.has_experts(layer)
    return has_experts, 0 if has_experts else config.ffn_width(layer)


@lru_cache(maxsize=256)
def _block_weights(config: ModelConfig, has_experts: bool, width: int) -> tuple[WeightSpec, ...]:
    stream = (config.d_model,), Split.STREAM, ("stream",)
    feed = _mixture(config) if has_experts else _swiglu("feed_forward", config, width)
    # Biases of what leaves a region are added to the sum of all ranks: once, outside of it.
    after = {
        "attention_out_norm.weight": config.norm_position == "both",
        "feed_forward_out_norm.weight": config.norm_position == "both",
        "attention_bias.bias": config.o_bias,
        "feed_forward_bias.bias": config.mlp_bias,
    }
    return (
        *_attention(config),
        WeightSpec("attention_norm.weight", *stream),
        *feed,
        WeightSpec("feed_forward_norm.weight", *stream),
        *(WeightSpec(name, *stream) for name, has in after.items() if has),
    )


@lru_cache(maxsize=256)
def _block_products(config: ModelConfig, has_experts: bool, width: int) -> tuple[Product, ...]:
    return _products(_block_weights(config, has_experts, width), config)


def _products(weights: Iterable[WeightSpec], config: ModelConfig) -> tuple[Product, ...]:
    """Return the products of weights; columns that meet the same row stand side by side."""
    found: dict[str, Product] = {}
    for weight in weights:
        if not weight.product:
            continue
        columns, inner = weight.shape[-2:]
        before = found.get(weight.product)
        if before is not None:
            columns += before.columns
        visits, matrices = 1, 1
        if weight.is_expert:
            visits, matrices = config.experts_per_token, weight.shape[0]
        name = weight.product
        found[name] = Product(name, inner, columns, weight.split, visits, matrices)
    return tuple(found.values())


def _attention(config: ModelConfig) -> Iterator[WeightSpec]:
    d_model, queries, keys = config.d_model, config.query_width, config.kv_width
    for name, width in (("q", queries), ("k", keys), ("v", keys)):
        projection = f"attention.{name}_proj"
        shape, product = (width, d_model), "attention.qkv"
        yield WeightSpec(f"{projection}.weight", shape, Split.COLUMNS, ("heads", "stream"), product)
        if config.qkv_bias:
            yield WeightSpec(f"{projection}.bias", (width,), Split.COLUMNS, ("heads",))
    shape, name = (d_model, queries), "attention.o_proj.weight"
    yield WeightSpec(name, shape, Split.ROWS, ("stream", "heads"), "attention.o")
    if config.qk_norm == "none":
        return
    for name, width in (("q", queries), ("k", keys)):
        # A norm of each head is one vector for all heads; a norm over all heads follows them.
        norm = f"attention.{name}_norm.weight"
        if config.qk_norm == "head":
            yield WeightSpec(norm, (config.head_width,), Split.HEADS, ("head",))
        else:
            yield WeightSpec(norm, (width,), Split.COLUMNS, ("heads",))


def _swiglu(
    name: str, config: ModelConfig, width: int, whole: bool = False
) -> Iterator[WeightSpec]:
    """Return gate, up and down of a SwiGLU; `whole`: tensor-parallel ranks run it on tokens of
    their own.
    """
    into, out = (Split.STREAM, Split.STREAM) if whole else (Split.COLUMNS, Split.ROWS)
    inner, product = "shared" if whole else "hidden", f"{name}.gate_up"
    for projection in ("gate", "up"):
        weight, shape = f"{name}.{projection}_proj.weight", (width, config.d_model)
        yield WeightSpec(weight, shape, into, (inner, "stream"), product)
        if config.mlp_bias:
            bias = f"{name}.{projection}_proj.bias"
            yield WeightSpec(bias, (width,), into, (inner,))
    weight, shape = f"{name}.down_proj.weight", (config.d_model, width)
    yield WeightSpec(weight, shape, out, ("stream", inner), f"{name}.down")


def _mixture(config: ModelConfig) -> Iterator[WeightSpec]:
    """Return router, routed experts, shared block and its gate (`moe.MoE`)."""
    d_model, n_experts, width = config.d_model, config.n_experts, config.expert_width
    name = "feed_forward.router"
    axes: tuple[str, ...] = ("experts", "stream")
    yield WeightSpec(f"{name}.weight", (n_experts, d_model), Split.STREAM, axes, name)
    name = "feed_forward.experts"
    for projection in ("gate", "up"):
        shape, axes = (n_experts, width, d_model), ("experts", "expert", "stream")
        product = f"{name}.gate_up"
        yield WeightSpec(f"{name}.{projection}_proj", shape, Split.EXPERT_COLUMNS, axes, product)
    shape, axes = (n_experts, d_model, width), ("experts", "stream", "expert")
    yield WeightSpec(f"{name}.down_proj", shape, Split.EXPERT_ROWS, axes, f"{name}.down")
    if config.shared_width:
        yield from _swiglu("feed_forward.shared", config, config.shared_width, whole=True)
    if config.shared_gate:
        name = "feed_forward.shared_gate"
        yield WeightSpec(f"{name}.weight", (1, d_model), Split.STREAM, ("one", "stream"), name)
